#include "cascaded_group_attention.h"

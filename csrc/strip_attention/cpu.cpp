#include <stdexcept>

#include "strip_attention.h"

namespace vitkernels::strip_attention {

void forward_cpu(const Params&, int) {
  throw std::runtime_error("strip_attention has no CPU kernel in this build");
}

void backward_cpu(const Params&, int) {
  throw std::runtime_error("strip_attention has no CPU kernel in this build");
}

}  // namespace vitkernels::strip_attention

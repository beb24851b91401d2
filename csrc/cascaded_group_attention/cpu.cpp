#include <stdexcept>

#include "cascaded_group_attention.h"

namespace vitkernels::cascaded_group_attention {

void forward_cpu(const Params&, int) {
  throw std::runtime_error("cascaded_group_attention: no CPU kernel yet");
}
void backward_cpu(const Params&, int) {
  throw std::runtime_error("cascaded_group_attention: no CPU kernel yet");
}

}  // namespace vitkernels::cascaded_group_attention

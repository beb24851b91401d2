#include <stdexcept>

#include "neighborhood_attention.h"

namespace vitkernels::neighborhood_attention {

void forward_cpu(const Params&, int) {
  throw std::runtime_error("neighborhood_attention has no CPU kernel in this build");
}
void backward_cpu(const Params&, int) {
  throw std::runtime_error("neighborhood_attention has no CPU kernel in this build");
}

}  // namespace vitkernels::neighborhood_attention

#pragma once
#include "learnable_token_merge.h"

namespace vitkernels::learnable_token_merge {

// params.grad_g, which is present. `norms` as find_norms() leaves them.
int64_t mask_gradient_workspace(const Params& params);
void mask_gradient(const Params& params, void* norms, void* workspace, Stream stream);

}  // namespace vitkernels::learnable_token_merge

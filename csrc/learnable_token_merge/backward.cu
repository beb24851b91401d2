// Backward: dz = G dy is the forward's product with the mask the other way round; dg is mask_gradient.cu.
//
// Floor: bytes, z, other, dy and g once, dz, dother and dg once; 4 batch N P (D + D') FLOPs.
#include "mask_gradient.h"
#include "merge.h"
#include "norms.h"

namespace vitkernels::learnable_token_merge {

int64_t backward_workspace_cuda(const Params& p) {
  return norms_bytes(p) + (p.grad_g ? mask_gradient_workspace(p) : 0);
}

void backward_cuda(const Params& p, Stream stream) {
  check_sizes(p);
  if (p.batch == 0 && !p.grad_g) return;
  if (exact_norms(p)) find_norms(p, false, p.workspace, stream);
  with_dtypes(p.dtype, p.mask_dtype, [&](auto token, auto element) {
    using T = decltype(token);
    using M = decltype(element);
    const Operand<T> first{{p.grad_y, p.width}, {p.grad_z, p.width}};
    const Operand<T> second{{p.grad_y_other, p.other_width}, {p.grad_other, p.other_width}};
    launch_merge<false, T, M>(make_mask<T, M>(p, p.workspace), first, second, p.batch, stream);
  });
  if (p.grad_g) mask_gradient(p, p.workspace, static_cast<char*>(p.workspace) + norms_bytes(p), stream);
}

}  // namespace vitkernels::learnable_token_merge

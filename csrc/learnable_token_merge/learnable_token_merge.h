// Learnable token merging: y = G^T z, and y_other = G^T other, with G made of the mask g on the fly.
//
//   none: G = g   sum: g[n, p] / c[p], c[p] = sum_n g[n, p] (an exact 0 counts as 1)
//   softmax: exp(g[n, p] - l[p]) over n   softmax_rows: exp(g[n, p] - l[n]) over p
// G is computed in fp32 (fp64) and rounded to the dtype of z before it multiplies.
//
// Backward, dG[n, p] = <z[n], dy[p]> + <other[n], dy_other[p]>:
//   dz = G dy, dother = G dy_other
//   none: dg = dG
//   sum: (dG - e[p]) / c[p] (where the sum was 0: dG)   softmax: G (dG - e[p]), e[p] = sum_n G dG
//   softmax_rows: G (dG - e[n]), e[n] = sum_p G dG
// e[p] = <y[p], dy[p]> + <y_other[p], dy_other[p]> needs no pass over n, but with outputs rounded to half
// precision it is no more exact than they are. e[n] = <z[n], dz[n]> + <other[n], dother[n]> likewise. A
// shared mask's gradient sums over the batch, in a fixed order.
//
// Floor: 2 batch N P (D + D') FLOPs forward, twice that backward; z, other and g read once, the results
// written once.
#pragma once
#include "vitkernels/params.h"

namespace vitkernels::learnable_token_merge {

enum class Normalize : int { none = 0, sum = 1, softmax = 2, softmax_rows = 3 };

struct Params {
  DType dtype;       // z, other, y and their gradients
  DType mask_dtype;  // g and grad_g: dtype, or f32
  Normalize normalize;
  int64_t batch;
  int64_t tokens, merged_tokens;  // N >= 1, P >= 1
  int64_t width, other_width;     // D, D'; 0 without other

  View z, other;    // [batch, N, D], channels side by side
  View g;           // [batch, N, P], p side by side; batch stride 0: a shared mask
  View y, y_other;  // [batch, P, D], contiguous
  View divisors;  // c or l, f32 (f64): [batch, P], [batch, N]; contiguous, batch stride 0: shared; absent for
                  // none

  // Backward only; incoming gradients and results may each be absent.
  View grad_y, grad_y_other;  // channels side by side
  View grad_z, grad_other;    // as z and other
  View grad_g;                // as g, batch stride 0: summed over the batch

  void* workspace = nullptr;  // CUDA: forward_ or backward_workspace_cuda() bytes
};

void forward_cuda(const Params& params, Stream stream);
void backward_cuda(const Params& params, Stream stream);
int64_t forward_workspace_cuda(const Params& params);
int64_t backward_workspace_cuda(const Params& params);

void forward_cpu(const Params& params, int threads);
void backward_cpu(const Params& params, int threads);

}  // namespace vitkernels::learnable_token_merge

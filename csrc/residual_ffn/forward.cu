// Forward of the residual FFN.
//
// Floor of N tokens of C channels and H hidden units: 2 N C sizeof(T) bytes (x in, out out), 2 C H sizeof(T)
// of weights, and 4 N C H + 18 N C FLOPs. At EfficientViT's sizes (C = 64 to 384, H = 2 C) a single image is
// bound by latency and by how fast few SMs can fetch 33 KB to 1.2 MB of weights, many images by the tensor
// cores: C = 192 and 14 x 14 are 190 FLOPs a byte.
//   fused     A block takes a tile of tokens through both products, with u and the hidden layer in shared
//             memory; every weight passes through it once.
//   split     Two launches with the hidden layer, and u, in a workspace between them, for so few tokens that
//             the tiles would leave most of the device idle: a block has 16 tokens and some rows of the
//             weight, and its warps share the depth of the product.
// The second launch fetches its weights while the first one runs. On Hopper many tokens take another way:
// forward_hopper.cu.
// x is read with its neighbours where it lies; the nine reads of an element meet in the first-level cache.
#include "way.h"

namespace vitkernels::residual_ffn {
namespace {

template <class T>
void launch_tiles(const Problem& problem, const Way& way, Stream stream) {
  const Params& p = problem.params;
  const TilesLayout first(way.first, p.channels, taps_elements(p)), second(way.second, p.hidden, 0);
  const Dim3 grid1{tiles_of(problem, first.row_bits), (p.hidden + first.columns - 1) / first.columns};
  const Dim3 grid2{tiles_of(problem, second.row_bits), (p.channels + second.columns - 1) / second.columns};
  launch(forward_expand_tiles_kernel<T>, grid1, THREADS, static_cast<size_t>(first.bytes), stream, problem,
         first);
  launch_dependent(forward_contract_tiles_kernel<T>, grid2, THREADS, static_cast<size_t>(second.bytes),
                   stream, problem, second);
}

template <class T>
void launch_split(const Problem& problem, const Way& way, Stream stream) {
  const Params& p = problem.params;
  const int64_t tiles = tiles_of(problem, SPLIT_BITS);
  const SplitLayout first(way.columns1, p.channels, taps_elements(p)),
      second(way.columns2, p.hidden, 0, p.out.stride[1] == 1);
  const Dim3 grid1{tiles, (p.hidden + way.columns1 - 1) / way.columns1};
  const Dim3 grid2{tiles, (p.channels + way.columns2 - 1) / way.columns2};
  const auto expand = way.columns1 == 64 ? forward_expand_kernel<T, 64> : forward_expand_kernel<T, 32>;
  const auto contract = way.columns2 == 64 ? forward_contract_kernel<T, 64> : forward_contract_kernel<T, 32>;
  launch(expand, grid1, THREADS, static_cast<size_t>(first.bytes), stream, problem, first);
  launch_dependent(contract, grid2, THREADS, static_cast<size_t>(second.bytes), stream, problem, second);
}

template <class T>
void forward_tensor(const Problem& problem, const Way& way, Stream stream) {
  if (way.kind == Kind::TILES) return launch_tiles<T>(problem, way, stream);
  if (way.kind == Kind::SPLIT) return launch_split<T>(problem, way, stream);
  if (way.kind == Kind::HOPPER) return forward_hopper<T>(problem, stream);
  const FusedLayout layout(problem.params, way.first.row_bits, way.first.depth);
  launch(forward_fused_kernel<T>, Dim3{tiles_of(problem, way.first.row_bits)}, THREADS,
         static_cast<size_t>(layout.bytes), stream, problem, layout);
}

}  // namespace

void forward_cuda(const Params& params, Stream stream) {
  const Problem problem(params);
  const Way way = choose_way(problem);
  with_dtype(params.dtype, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (sizeof(T) == 2) {
      if (way.kind != Kind::PLAIN) return forward_tensor<T>(problem, way, stream);
    }
    forward_plain<T>(problem, stream);
  });
}

// On the device that the launch will be on: it decides what fits.
int64_t forward_workspace_cuda(const Params& params) {
  const Problem problem(params);
  const Kind kind = choose_way(problem).kind;
  const int64_t kept = kind == Kind::PLAIN   ? params.hidden
                       : kind == Kind::FUSED ? 0
                                             : params.hidden + params.channels;
  return sizeof_dtype(params.dtype) * problem.tokens * kept;
}

}  // namespace vitkernels::residual_ffn

// Forward: the mask, written once.
//
// Floor: (H W)^2 elements a head over the bandwidth. A thread owns 16 bytes of keys and runs down the queries
// of a row (transposed: of a column), so that the part all those queries share stays in registers, and each
// element costs a subtraction, a selection and an addition, for exp(M) an exponential more. A warp writes 512
// bytes in a row. Sums of the decays, 2 / (H W) of the output, are made before and come from L1.
#include "sums.h"

namespace vitkernels::polyline_path_mask {
namespace {

constexpr int FORWARD_THREADS = 128;

template <class T, bool Transpose, bool Log, int N>
VK_KERNEL void VK_LAUNCH_BOUNDS(FORWARD_THREADS, 4)
    forward_kernel(Shape s, int owners, int steps, int64_t blocks, const accumulate_t<T>* sums, T* mask) {
  using Acc = accumulate_t<T>;
  const int64_t tokens = s.tokens(), vectors = tokens / N;
  const int64_t plane = block_x() / blocks;
  const int64_t index = block_x() % blocks * FORWARD_THREADS + thread_x();
  if (index >= owners * vectors) return;
  const Pairs<Transpose, Acc> pairs{sums + plane * tokens, sums + (s.planes + plane) * tokens, s.width,
                                    static_cast<int>(index / vectors)};
  const int64_t first = index % vectors * N;
  Acc part[N], value[N];
  int position[N];
  VK_UNROLL
  for (int e = 0; e < N; ++e) {
    const int j = static_cast<int>((first + e) / s.width), l = static_cast<int>((first + e) % s.width);
    part[e] = pairs.shared_part(j, l);
    position[e] = pairs.position(j, l);
    value[e] = pairs.own_value(position[e]);
  }
  T* to = mask + plane * tokens * tokens + first;
  for (int step = 0; step < steps; ++step) {
    const Acc query = pairs.own_value(step);
    Vec<T, N> out;
    VK_UNROLL
    for (int e = 0; e < N; ++e) {
      const Acc sum = part[e] + between(query, step, value[e], position[e]);
      out[e] = from_accumulate<T>(Log ? sum : exp_(sum));
    }
    out.store(to + pairs.query(step) * tokens);
  }
}

template <class T, bool Transpose, bool Log, int N>
void launch_forward(const Params& p, Stream stream) {
  const int64_t blocks = (p.owners() * (p.tokens() / N) + FORWARD_THREADS - 1) / FORWARD_THREADS;
  launch(forward_kernel<T, Transpose, Log, N>, Dim3{p.planes() * blocks}, FORWARD_THREADS, 0, stream,
         Shape(p), p.owners(), p.steps(), blocks, static_cast<const accumulate_t<T>*>(p.workspace),
         static_cast<T*>(p.mask.data));
}

template <class T, bool Transpose, bool Log>
void launch_forward(const Params& p, Stream stream) {
  constexpr int N = 16 / sizeof(T);
  const bool aligned = reinterpret_cast<uintptr_t>(p.mask.data) % 16 == 0;
  if (aligned && p.tokens() % N == 0)
    launch_forward<T, Transpose, Log, N>(p, stream);
  else
    launch_forward<T, Transpose, Log, 1>(p, stream);
}

}  // namespace

int64_t forward_workspace_cuda(const Params& p) {
  return sums_bytes(p);
}

void forward_cuda(const Params& p, Stream stream) {
  with_dtype(p.dtype, [&](auto element) {
    using T = decltype(element);
    launch_sums<T>(p, stream);
    if (p.transpose)
      p.log ? launch_forward<T, true, true>(p, stream) : launch_forward<T, true, false>(p, stream);
    else
      p.log ? launch_forward<T, false, true>(p, stream) : launch_forward<T, false, false>(p, stream);
  });
}

}  // namespace vitkernels::polyline_path_mask

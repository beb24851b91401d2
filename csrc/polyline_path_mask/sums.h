// What the CUDA kernels of the polyline path mask share: the sums of the decays and what lies between two of
// them.
#pragma once
#include "polyline_path_mask.h"
#include "vitkernels/device.h"

namespace vitkernels::polyline_path_mask {

constexpr int SUM_THREADS = 64;

struct Shape {
  int64_t planes;
  int heads, height, width;

  explicit Shape(const Params& p) : planes(p.planes()), heads(p.heads), height(p.height), width(p.width) {}
  VK_HOST_DEVICE int64_t tokens() const { return static_cast<int64_t>(height) * width; }
};

// A thread for each line: sums [planes][H][W] of decay_w along the rows, then of decay_h down the columns.
// Without the first of a line, which is in no difference of two sums and may be anything.
template <class T>
VK_KERNEL void VK_LAUNCH_BOUNDS(SUM_THREADS, 1)
    sums_kernel(Shape s, View decay_w, View decay_h, accumulate_t<T>* sums) {
  using Acc = accumulate_t<T>;
  const int per_plane = s.height + s.width;
  const int64_t index = static_cast<int64_t>(block_x()) * SUM_THREADS + thread_x();
  // The lines of one head lie next to those of the next, as in the decays.
  const int head = static_cast<int>(index % s.heads);
  const int64_t rest = index / s.heads;
  const int line = static_cast<int>(rest % per_plane);
  const int64_t b = rest / per_plane, plane = b * s.heads + head;
  if (plane >= s.planes) return;
  const bool row = line < s.height;
  // Each field by itself: a choice between two Views would put them in local memory.
  const void* data = row ? decay_w.data : decay_h.data;
  const int64_t batch_step = row ? decay_w.stride[0] : decay_h.stride[0];
  const int64_t line_step = row ? decay_w.stride[1] : decay_h.stride[2];
  const int64_t from_step = row ? decay_w.stride[2] : decay_h.stride[1];
  const int64_t head_step = row ? decay_w.stride[3] : decay_h.stride[3];
  const int at = row ? line : line - s.height, count = row ? s.width : s.height;
  const T* from = static_cast<const T*>(data) + b * batch_step + head * head_step + at * line_step;
  const int64_t step = row ? 1 : s.width;
  Acc* to = sums + ((row ? 0 : s.planes) + plane) * s.tokens() +
            (row ? static_cast<int64_t>(at) * s.width : static_cast<int64_t>(at));
  Acc sum = Acc(0);
  VK_UNROLL
  for (int i = 0; i < count; ++i) {
    sum += i > 0 ? to_accumulate(from[i * from_step]) : Acc(0);
    to[i * step] = sum;
  }
}

template <class T>
void launch_sums(const Params& p, Stream stream) {
  const int64_t lines = p.planes() * (p.height + p.width);
  launch(sums_kernel<T>, Dim3{(lines + SUM_THREADS - 1) / SUM_THREADS}, SUM_THREADS, 0, stream, Shape(p),
         p.decay_w, p.decay_h, static_cast<accumulate_t<T>*>(p.workspace));
}

inline int64_t sums_bytes(const Params& p) {
  return 2 * p.planes() * p.tokens() * (p.dtype == DType::f64 ? 8 : 4);
}

// The decays between positions p and q of a line, by the order of the positions.
template <class Acc>
VK_DEVICE Acc between(Acc at_p, int p, Acc at_q, int q) {
  return p >= q ? at_p - at_q : at_q - at_p;
}

// How the mask comes about for the pairs of one owner: the query's row i, or transposed its column k. A key
// (j, l) has a part that all the owner's queries share, and a value of its own that each query's differs
// from:
//   M[(i,k),(j,l)]  = (column l from i to j) + (row i from k to l):     a part by i, a value in row i
//   Mt[(i,k),(j,l)] = (row j from k to l) + (column k from i to j):     a part by k, a value in column k
template <bool Transpose, class Acc>
struct Pairs {
  const Acc *along, *down;  // sums of this plane
  int width, owner;

  VK_DEVICE Acc shared_part(int j, int l) const {
    const int64_t row = static_cast<int64_t>(j) * width;
    if (Transpose) return between(along[row + owner], owner, along[row + l], l);
    return between(down[static_cast<int64_t>(owner) * width + l], owner, down[row + l], j);
  }
  VK_DEVICE Acc own_value(int position) const {
    if (Transpose) return down[static_cast<int64_t>(position) * width + owner];
    return along[static_cast<int64_t>(owner) * width + position];
  }
  // Where a key stands on the line that queries move along.
  VK_DEVICE static int position(int j, int l) { return Transpose ? j : l; }
  // The token number of the query at a step.
  VK_DEVICE int64_t query(int step) const {
    return Transpose ? static_cast<int64_t>(step) * width + owner
                     : static_cast<int64_t>(owner) * width + step;
  }
};

}  // namespace vitkernels::polyline_path_mask

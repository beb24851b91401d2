#include "vitkernels/matrix_cpu.h"

namespace vitkernels::VITKERNELS_ISA {

template <class T, int V>
static void multiply_columns(const Product<T>& p, int lane) {
  if (p.rows == 0) return;
  const int blocks = ceil_div(p.rows, max_rows(V)), least = p.rows / blocks, larger = p.rows % blocks;
  int row = 0;
  for (int i = 0; i < blocks; ++i) {
    const int rows = least + (i < larger);
    multiply_rows<T, V, max_rows(V)>(p, rows, row, lane);
    row += rows;
  }
}

template <class T>
void multiply(int vecs, const Product<T>& p, int run) {
  if (p.depth > run) {
    Product<T> part = p;
    for (int runs = ceil_div(p.depth, run), k = 0; runs > 0; --runs, k += part.depth) {
      part.depth = ceil_div(p.depth - k, runs);
      part.a = p.a + k * p.a_k;
      part.b = p.b + k * p.b_k;
      part.factor = runs == 1 ? p.factor : nullptr;
      part.row_factor = runs == 1 ? p.row_factor : nullptr;
      multiply<T>(vecs, part, run);
      part.add = p.c;
      part.add_row = p.c_row;
      part.start = nullptr;
    }
    return;
  }
  int lane = 0;
  for (int groups = ceil_div(vecs, kMaxVecs); groups > 0; --groups) {
    const int v = ceil_div(vecs, groups);
    if constexpr (kMaxVecs >= 4) {
      if (v == 4) multiply_columns<T, 4>(p, lane);
    }
    if (v == 3) multiply_columns<T, 3>(p, lane);
    if (v == 2) multiply_columns<T, 2>(p, lane);
    if (v == 1) multiply_columns<T, 1>(p, lane);
    vecs -= v;
    lane += v * kLanes<T>;
  }
}

template void multiply(int, const Product<float>&, int);
template void multiply(int, const Product<double>&, int);

}  // namespace vitkernels::VITKERNELS_ISA

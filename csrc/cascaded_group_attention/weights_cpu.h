// The six weights and biases as the kernels read them: in place where their rows are dense and need no
// conversion, else as dense copies.
#pragma once
#include "cpu_kernel.h"
#include "vitkernels/matrix_cpu.h"

namespace vitkernels::cascaded_group_attention {
namespace VITKERNELS_ISA {

using namespace vitkernels::VITKERNELS_ISA;

// A tensor of up to four dimensions whose last is dense.
template <class T>
struct Dense {
  const T* data;
  ptrdiff_t stride[3];
};

template <class T>
struct Weights {
  Dense<T> qkv, qkv_bias, dw, dw_bias, proj, proj_bias;

  static bool in_place(const Params& p) {
    const bool same = p.weight_dtype == (sizeof(T) == 8 ? DType::f64 : DType::f32);
    return same && p.qkv_weight.stride[2] == 1 && p.qkv_bias.stride[1] == 1 && p.dw_weight.stride[3] == 1 &&
           p.dw_bias.stride[1] == 1 && p.proj_weight.stride[1] == 1 && p.proj_bias.stride[0] == 1;
  }

  // visit(tensor, view, shape, dimensions) for each.
  template <class Visit>
  void each(const Params& p, Visit visit) {
    const int h = p.num_heads, k = p.key_dim, d = p.value_dim(), c = p.channels, rows = p.qkv_rows();
    const int qkv_shape[] = {h, rows, d}, qkv_bias_shape[] = {h, rows};
    const int dw_shape[] = {h, k, p.kernel_max, p.kernel_max}, dw_bias_shape[] = {h, k};
    const int proj_shape[] = {c, c}, proj_bias_shape[] = {c};
    visit(qkv, p.qkv_weight, qkv_shape, 3);
    visit(qkv_bias, p.qkv_bias, qkv_bias_shape, 2);
    visit(dw, p.dw_weight, dw_shape, 4);
    visit(dw_bias, p.dw_bias, dw_bias_shape, 2);
    visit(proj, p.proj_weight, proj_shape, 2);
    visit(proj_bias, p.proj_bias, proj_bias_shape, 1);
  }

  Weights(const Params& p, void* shared) {
    if (in_place(p)) {
      each(p, [](Dense<T>& to, const View& view, const int*, int dims) {
        to.data = static_cast<const T*>(view.data);
        for (int i = 0; i + 1 < dims; ++i) to.stride[i] = view.stride[i];
      });
      return;
    }
    Scratch scratch(shared);
    each(p, [&](Dense<T>& to, const View&, const int* shape, int dims) {
      size_t size = 1;
      for (int i = dims - 1; i >= 0; --i) {
        size *= shape[i];
        if (i) to.stride[i - 1] = static_cast<ptrdiff_t>(size);
      }
      to.data = scratch.take<T>(size);
    });
  }

  static size_t size(const Params& p) {
    if (in_place(p)) return 0;
    Scratch scratch(nullptr);
    Weights(p, nullptr).each(p, [&](Dense<T>&, const View&, const int* shape, int dims) {
      size_t size = 1;
      for (int i = 0; i < dims; ++i) size *= shape[i];
      scratch.take<T>(size);
    });
    return scratch.used;
  }

  template <class W>
  static void copy_as(const Params& p, void* shared, const Team& all) {
    Weights(p, shared).each(p, [&](Dense<T>& to, const View& view, const int* shape, int dims) {
      const int last = shape[dims - 1];
      int rows = 1;
      for (int i = 0; i + 1 < dims; ++i) rows *= shape[i];
      T* dst = const_cast<T*>(to.data);
      for (int r = all.begin(rows); r < all.end(rows); ++r) {
        int rest = r;
        const W* src = static_cast<const W*>(view.data);
        for (int i = dims - 2; i >= 0; --i) {
          src += rest % shape[i] * view.stride[i];
          rest /= shape[i];
        }
        T* row = dst + static_cast<ptrdiff_t>(r) * last;
        int i = 0;
        if constexpr (kSame<Compute<W>, T>) {
          if (view.stride[dims - 1] == 1)
            for (; i + kLanes<T> <= last; i += kLanes<T>) store(row + i, load(src + i));
        }
        for (; i < last; ++i) row[i] = static_cast<T>(load_one(src + i * view.stride[dims - 1]));
      }
    });
  }

  static void prepare(const Params& p, void* shared, const Team& all) {
    with_dtype(p.weight_dtype, [&](auto element) { copy_as<decltype(element)>(p, shared, all); });
  }
};

}  // namespace VITKERNELS_ISA
}  // namespace vitkernels::cascaded_group_attention

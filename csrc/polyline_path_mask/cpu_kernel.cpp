// The polyline path mask on one core, one instruction set.
//
// Floor: the (H W)^2 elements of a head cross memory once, written forward, read backward. One vector of them
// takes a load, an addition and a store into a buffer in L1, from where whole cache lines leave for memory
// without being read first. exp(M) is a product of exponentials where M is a sum, and those are few: of
// tables of a row of queries, or where these fit in L2 of all keys and columns.
//
// Lines of H or W tokens start at multiples of a vector here ("pitch"), in the mask they do not: stores run
// over the end of a line and the next line overwrites what they left, loads run over and nobody looks.
#include "cpu_kernel.h"

#include "stream_cpu.h"
#include "vitkernels/matrix_cpu.h"
#include "vitkernels/simd.h"

namespace vitkernels::polyline_path_mask {
namespace VITKERNELS_ISA {

using namespace vitkernels::VITKERNELS_ISA;

namespace {

template <class T>
int pitch_of(int width) {
  return ceil_div(width, kLanes<T>) * kLanes<T>;
}

// The sums of an image and head, [H][pitch]: of decay_w along its rows, of decay_h down its columns. Without
// the first of a line, which is in no difference of two sums and may be anything.
template <class T>
struct Sums {
  T *w, *h;
  int height, width, pitch;
  int64_t plane = -1;

  Sums(const Params& p, Scratch& scratch) : height(p.height), width(p.width), pitch(pitch_of<T>(p.width)) {
    w = scratch.take<T>(static_cast<size_t>(height) * pitch);
    h = scratch.take<T>(static_cast<size_t>(height) * pitch);
  }

  // Whether another one was loaded before.
  template <class E>
  bool load_plane(const Params& p, int64_t wanted) {
    if (wanted == plane) return false;
    plane = wanted;
    const int64_t b = plane / p.heads, head = plane % p.heads;
    const View *decay_w = &p.decay_w, *decay_h = &p.decay_h;
    const E* from_w =
        static_cast<const E*>(decay_w->data) + b * decay_w->stride[0] + head * decay_w->stride[3];
    const E* from_h =
        static_cast<const E*>(decay_h->data) + b * decay_h->stride[0] + head * decay_h->stride[3];
    for (int i = 0; i < height; ++i) {
      T sum = 0;
      for (int l = 0; l < pitch; ++l) {
        const bool inside = l < width;
        if (inside && l > 0) sum += load_one(from_w + i * decay_w->stride[1] + l * decay_w->stride[2]);
        w[i * pitch + l] = sum;
        h[i * pitch + l] =
            inside && i > 0
                ? h[(i - 1) * pitch + l] + load_one(from_h + i * decay_h->stride[1] + l * decay_h->stride[2])
                : T(0);
      }
    }
    return true;
  }

  // to[l] = the decays of row i between columns k and l.
  void along_row(int i, int k, T* to) const {
    const T* row = w + static_cast<size_t>(i) * pitch;
    const T at = row[k];
    for (int l = 0; l < k; ++l) to[l] = at - row[l];
    for (int l = k; l < pitch; ++l) to[l] = row[l] - at;
  }
  // to[j][l] = the decays of column l between rows i and j.
  void down_columns(int i, T* to) const {
    const T* at = h + static_cast<size_t>(i) * pitch;
    for (int j = 0; j < height; ++j) {
      const T* row = h + static_cast<size_t>(j) * pitch;
      const T sign = j < i ? T(-1) : T(1);
      for (int l = 0; l < pitch; ++l) to[static_cast<size_t>(j) * pitch + l] = (row[l] - at[l]) * sign;
    }
  }
  // to[j] = the decays of column k between rows i and j.
  void down_column(int k, int i, T* to) const {
    const T* column = h + k;
    const T at = column[static_cast<size_t>(i) * pitch];
    for (int j = 0; j < height; ++j) {
      const T here = column[static_cast<size_t>(j) * pitch];
      to[j] = j < i ? at - here : here - at;
    }
  }
};

// The first `count` elements, and those that fill up the last vector.
template <class T>
void exponentials(T* x, size_t count) {
  for (size_t i = 0; i < count; i += kLanes<T>) store(x + i, exp_softmax<T>(load(x + i)));
}

// Tables up to this many bytes stay in L2 beside what else is there.
constexpr size_t kTableBytes = 256 << 10;

// ---- forward

template <class E>
struct ForwardScratch {
  using T = Compute<E>;
  Sums<T> sums;
  // Of a row of queries: the parts of the mask that belong to keys, and those that belong to a place on a
  // line. Transposed, for exp(M), the parts of keys for each column of queries, if they fit.
  T *table, *line, *down, *products;
  E* buffer;
  size_t size;

  ForwardScratch(const Params& p, Scratch scratch) : sums(p, scratch) {
    const size_t plane = static_cast<size_t>(p.height) * sums.pitch;
    const bool fits = p.transpose && !p.log && plane * p.width * sizeof(T) <= kTableBytes;
    table = p.transpose ? nullptr : scratch.take<T>(plane);
    line = scratch.take<T>(sums.pitch);
    down = scratch.take<T>(p.height + kLanes<T>);
    products = fits ? scratch.take<T>(plane * p.width) : nullptr;
    buffer = scratch.take<E>(StreamWriter<E>::buffer_size(sums.pitch));
    size = scratch.used;
  }
};

template <class E, bool Log>
void forward_range(const Params& p, bool stream, int64_t begin, int64_t end, void* memory) {
  using T = Compute<E>;
  constexpr int L = kLanes<T>;
  ForwardScratch<E> s(p, Scratch(memory));
  const int width = p.width, height = p.height, pitch = s.sums.pitch;
  const size_t plane = static_cast<size_t>(height) * pitch;
  const int64_t tokens = p.tokens();
  StreamWriter<E> writer(static_cast<E*>(p.mask.data) + begin * width * tokens, s.buffer, stream);
  for (int64_t item = begin; item < end; ++item) {
    const int i = static_cast<int>(item % height);
    const bool another = s.sums.template load_plane<E>(p, item / height);
    if (another && s.products) {
      for (int k = 0; k < width; ++k)
        for (int j = 0; j < height; ++j) s.sums.along_row(j, k, s.products + k * plane + j * pitch);
      exponentials(s.products, width * plane);
    }
    if (!p.transpose) {
      s.sums.down_columns(i, s.table);
      if (!Log) exponentials(s.table, plane);
    }
    for (int k = 0; k < width; ++k) {
      if (p.transpose) {
        for (int l = 0; l < pitch; ++l) s.line[l] = l < k ? T(-1) : T(1);
        s.sums.down_column(k, i, s.down);
        if (s.products) exponentials(s.down, height);
      } else {
        s.sums.along_row(i, k, s.line);
        if (!Log) exponentials(s.line, width);
      }
      for (int j = 0; j < height; ++j) {
        E* to = writer.place();
        if (!p.transpose) {
          const T* row = s.table + static_cast<size_t>(j) * pitch;
          for (int l = 0; l < width; l += L)
            store(to + l, Log ? load(row + l) + load(s.line + l) : load(row + l) * load(s.line + l));
        } else if (s.products) {
          const T *row = s.products + k * plane + j * pitch, down = s.down[j];
          for (int l = 0; l < width; l += L) store(to + l, load(row + l) * down);
        } else {
          const T* row = s.sums.w + static_cast<size_t>(j) * pitch;
          const T at = row[k], down = s.down[j];
          for (int l = 0; l < width; l += L) {
            const Vec<T> sum = (load(row + l) - at) * load(s.line + l) + down;
            store(to + l, Log ? sum : exp_softmax<T>(sum));
          }
        }
        writer.advance(width);
      }
    }
  }
  writer.finish();
}

// ---- backward

template <class E>
struct BackwardScratch {
  using T = Compute<E>;
  Sums<T> sums;
  T *table, *line, *down, *gradient, *pairs, *own;
  size_t size;

  BackwardScratch(const Params& p, Scratch scratch) : sums(p, scratch) {
    const size_t plane = static_cast<size_t>(p.height) * sums.pitch;
    const int longest = imin(p.height, p.width) == p.height ? p.width : p.height;
    table = scratch.take<T>(plane);
    line = scratch.take<T>(sums.pitch);
    down = scratch.take<T>(p.height + kLanes<T>);
    gradient = scratch.take<T>(plane);
    pairs = scratch.take<T>(longest + kLanes<T>);
    own = scratch.take<T>(longest);
    size = scratch.used;
  }
};

// Adds to sums[t], for 0 < t < count, the gradients of those pairs (at, q) that have t in (min, max].
template <class T>
void add_crossings(const T* pairs, int at, int count, T* sums) {
  T run = 0;
  for (int t = 1; t <= at; ++t) sums[t] += run += pairs[t - 1];
  run = 0;
  for (int t = count - 1; t > at; --t) sums[t] += run += pairs[t];
}

// One row of the gradient: adds it to `gradient` [H][pitch], and sums it over the rows j (down) or along each
// (across) into `pairs`.
template <class E, bool Log, bool Transpose>
void take_row(const Params& p, const BackwardScratch<E>& s, const E* row) {
  using T = Compute<E>;
  constexpr int L = kLanes<T>;
  const int width = p.width, height = p.height, pitch = s.sums.pitch, last = (ceil_div(width, L) - 1) * L;
  for (int j = 0; j < height; ++j) {
    const E* from = row + static_cast<size_t>(j) * width;
    T* gradient = s.gradient + static_cast<size_t>(j) * pitch;
    const T* table = s.table + static_cast<size_t>(j) * pitch;
    Vec<T> sum{};
    for (int l = 0; l <= last; l += L) {
      // The last vector of a line is cut off, for the sum across it and where the tensor ends.
      Vec<T> g = l < last ? load(from + l) : load_first(from + l, width - l);
      if constexpr (!Log) {
        g *= load(table + l);
        g *= Transpose ? broadcast(s.down[j]) : load(s.line + l);
      }
      store(gradient + l, load(gradient + l) + g);
      if constexpr (Transpose)
        sum += g;
      else
        store(s.pairs + l, load(s.pairs + l) + g);
    }
    if constexpr (Transpose) s.pairs[j] = across<T>(sum);
  }
}

template <class E, bool Log, bool Transpose>
void backward_range(const Params& p, int64_t begin, int64_t end, void* memory, void* shared) {
  using T = Compute<E>;
  BackwardScratch<E> s(p, Scratch(memory));
  const int width = p.width, height = p.height, pitch = s.sums.pitch;
  const int owners = p.owners(), steps = p.steps();
  const View &grad = p.grad_mask, &own = Transpose ? p.grad_h : p.grad_w;
  const bool wants_plane = Transpose ? static_cast<bool>(p.grad_w) : static_cast<bool>(p.grad_h);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t plane = item / owners, b = plane / p.heads, head = plane % p.heads;
    const int owner = static_cast<int>(item % owners);
    if (!Log) {
      s.sums.template load_plane<E>(p, plane);
      if (Transpose)
        for (int j = 0; j < height; ++j) s.sums.along_row(j, owner, s.table + static_cast<size_t>(j) * pitch);
      else
        s.sums.down_columns(owner, s.table);
      exponentials(s.table, static_cast<size_t>(height) * pitch);
    }
    for (int q = 0; q < height * pitch; ++q) s.gradient[q] = 0;
    for (int t = 0; t < steps; ++t) s.own[t] = 0;
    for (int step = 0; step < steps; ++step) {
      const int i = Transpose ? step : owner, k = Transpose ? owner : step;
      if (!Transpose)
        for (int l = 0; l < pitch; ++l) s.pairs[l] = 0;
      if (!Log) {
        Transpose ? s.sums.down_column(k, i, s.down) : s.sums.along_row(i, k, s.line);
        exponentials(Transpose ? s.down : s.line, Transpose ? height : width);
      }
      const E* row = static_cast<const E*>(grad.data) + b * grad.stride[0] + head * grad.stride[1] +
                     (static_cast<int64_t>(i) * width + k) * grad.stride[2];
      take_row<E, Log, Transpose>(p, s, row);
      if (own) add_crossings(s.pairs, step, steps, s.own);
    }
    if (own) {
      E* to = static_cast<E*>(own.data) + b * own.stride[0] + head * own.stride[3] +
              owner * own.stride[Transpose ? 2 : 1];
      for (int t = 0; t < steps; ++t) store_one(to + t * own.stride[Transpose ? 1 : 2], s.own[t]);
    }
    if (!wants_plane) continue;
    T* share = static_cast<T*>(shared) + item * p.tokens();
    for (int64_t q = 0; q < p.tokens(); ++q) share[q] = 0;
    if (Transpose) {
      for (int j = 0; j < height; ++j)
        add_crossings(s.gradient + static_cast<size_t>(j) * pitch, owner, width,
                      share + static_cast<int64_t>(j) * width);
    } else {
      // As add_crossings, all columns at once.
      for (int j = 1; j < height; ++j) {
        const bool above = j <= owner;
        const int t = above ? j : height - (j - owner);
        const T* pair = s.gradient + static_cast<size_t>(above ? t - 1 : t) * pitch;
        const T* before = share + static_cast<int64_t>(above ? t - 1 : t + 1) * width;
        const bool first = !above && t == height - 1;
        T* to = share + static_cast<int64_t>(t) * width;
        for (int l = 0; l < width; ++l) to[l] = pair[l] + (first ? T(0) : before[l]);
      }
    }
  }
}

template <class E>
void reduce_range(const Params& p, int64_t begin, int64_t end, const void* shared) {
  using T = Compute<E>;
  const View& to = p.transpose ? p.grad_w : p.grad_h;
  const int owners = p.owners();
  for (int64_t plane = begin; plane < end; ++plane) {
    E* base = static_cast<E*>(to.data) + plane / p.heads * to.stride[0] + plane % p.heads * to.stride[3];
    for (int i = 0; i < p.height; ++i)
      for (int l = 0; l < p.width; l += kLanes<T>) {
        const int count = imin(kLanes<T>, p.width - l);
        const T* share = static_cast<const T*>(shared) + plane * owners * p.tokens() +
                         static_cast<int64_t>(i) * p.width + l;
        Vec<T> sum{};
        for (int owner = 0; owner < owners; ++owner, share += p.tokens()) sum += load_first(share, count);
        for (int q = 0; q < count; ++q)
          store_one(base + i * to.stride[1] + static_cast<int64_t>(l + q) * to.stride[2], sum[q]);
      }
  }
}

// ---- by dtype

size_t forward_scratch(const Params& p) {
  size_t size = 0;
  with_dtype(p.dtype, [&](auto e) { size = ForwardScratch<decltype(e)>(p, Scratch(nullptr)).size; });
  return size;
}
void forward(const Params& p, bool stream, int64_t begin, int64_t end, void* scratch) {
  with_dtype(p.dtype, [&](auto e) {
    using E = decltype(e);
    p.log ? forward_range<E, true>(p, stream, begin, end, scratch)
          : forward_range<E, false>(p, stream, begin, end, scratch);
  });
}
size_t backward_scratch(const Params& p) {
  size_t size = 0;
  with_dtype(p.dtype, [&](auto e) { size = BackwardScratch<decltype(e)>(p, Scratch(nullptr)).size; });
  return size;
}
size_t partials_size(const Params& p) {
  if (p.transpose ? !p.grad_w : !p.grad_h) return 0;
  return (p.dtype == DType::f64 ? 8 : 4) * static_cast<size_t>(p.planes() * p.owners() * p.tokens());
}
void backward(const Params& p, int64_t begin, int64_t end, void* scratch, void* partials) {
  with_dtype(p.dtype, [&](auto e) {
    using E = decltype(e);
    if (p.log)
      p.transpose ? backward_range<E, true, true>(p, begin, end, scratch, partials)
                  : backward_range<E, true, false>(p, begin, end, scratch, partials);
    else
      p.transpose ? backward_range<E, false, true>(p, begin, end, scratch, partials)
                  : backward_range<E, false, false>(p, begin, end, scratch, partials);
  });
}
void reduce_partials(const Params& p, int64_t begin, int64_t end, const void* partials) {
  with_dtype(p.dtype, [&](auto e) { reduce_range<decltype(e)>(p, begin, end, partials); });
}

}  // namespace

extern const CpuKernel kKernel;
const CpuKernel kKernel = {forward_scratch, forward,  backward_scratch,
                           partials_size,   backward, reduce_partials};

}  // namespace VITKERNELS_ISA
}  // namespace vitkernels::polyline_path_mask

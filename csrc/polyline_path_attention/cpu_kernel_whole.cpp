// Polyline path attention of whole maps, forward, on one core and one instruction set.
//
// Floor of a map of N tokens: 2 N^2 (d + dv) FLOPs, and N^2 exponentials; where the gradient is wanted 2 N^2
// dv FLOPs more, for the first softmax's own product with v.
//
// The scores of a block of queries with all keys are computed once and kept. The first pass over them finds
// the maximum and both sums, the second makes of both softmaxes one matrix of weights and multiplies v by it.
#include "whole_cpu.h"

namespace vitkernels::polyline_path_attention {
namespace VITKERNELS_ISA {
namespace {

template <class T>
constexpr T kTiny = static_cast<T>(0x1p-60);

template <class T>
struct ForwardScratch {
  Map<T> map;
  Factors<T> factors;
  T *q, *scores, *tops, *weights, *first_weights, *out, *first;
  size_t size;

  ForwardScratch(const Params& p, Scratch scratch) : map(p, scratch), factors(p, p.height, scratch) {
    const size_t width = kBlockRows * kLanes<T>, tile = static_cast<size_t>(tile_rows(p)) * p.width;
    q = scratch.take<T>(p.head_dim * width);
    scores = scratch.take<T>(map.tokens * width);
    tops = scratch.take<T>(p.height * width);
    weights = scratch.take<T>(tile * width);
    first_weights = scratch.take<T>(tile * width);
    out = scratch.take<T>(p.value_dim * width);
    first = scratch.take<T>(p.value_dim * width);
    size = scratch.used;
  }
};

template <class T>
struct Softmax {
  Vec<T> top[2], sum[2];  // of each softmax; with factors both have one top
};

// One block's scores with all keys, and what becomes of them.
template <class E, class T>
struct Forward {
  static constexpr int L = kLanes<T>;
  const Map<T>& map;
  const Block<T>& block;
  const ForwardScratch<T>& w;
  int step;  // rows of keys in a tile

  T* tile(int r) const { return w.scores + static_cast<ptrdiff_t>(r) * map.width * block.width; }
  int end(int r) const { return imin(map.height, r + step); }

  void multiply_keys(int r) const {
    multiply<T>(block.rows,
                {(end(r) - r) * map.width, map.d, map.k + static_cast<ptrdiff_t>(r) * map.width * map.d_pitch,
                 map.d_pitch, 1, w.q, block.width, nullptr, 0, tile(r), block.width});
  }

  // scores <- e^(scores - top), top being the largest so far; the sums grow.
  __attribute__((noinline)) void exponentiate(int r0, int v, Softmax<T>& state) const {
    T* s = tile(r0) + v * L;
    // Stores might change what is behind a reference, as far as the compiler knows.
    const int columns = map.width, keys = (end(r0) - r0) * columns, last = end(r0);
    const ptrdiff_t width = block.width;
    Vec<T> top = state.top[0];
    for (int i = 0; i < keys; ++i) top = vmax(load(s + i * width), top);
    const Vec<T> fade = exp_softmax<T>(state.top[0] - top);
    state.top[0] = top;
    store(w.tops + (r0 / step * block.rows + v) * L, top);
    const T* near = w.factors.near_row(map, v);
    Vec<T> sum[2] = {state.sum[0] * fade, state.sum[1] * fade};
    for (int r = r0; r < last; ++r) {
      const T *drop = w.factors.drop_row(map, v, r, 0, map.height), *far = w.factors.far_row(map, r);
      const Vec<T> fall = exp_softmax<T>(block.log_fall(map, v, r));
      Vec<T> run[2] = {};
      for (int l = 0; l < columns; ++l, s += width) {
        const Vec<T> e = exp_softmax<T>(load(s) - top);
        store(s, e);
        run[0] += e * (load(near + l * L) * drop[l]);
        run[1] += e * load(far + l * L);
      }
      sum[0] += run[0];
      sum[1] += run[1] * fall;
    }
    state.sum[0] = sum[0];
    state.sum[1] = sum[1];
  }

  // The weights of one tile from e^(scores - top); the first softmax's own too, wanted or not, so that the
  // output has the same bits with and without a gradient.
  __attribute__((noinline)) void weigh(int r0, int v, const Softmax<T>& state) const {
    const T* s = tile(r0) + v * L;
    T *to = w.weights + v * L, *first = w.first_weights + v * L;
    const Vec<T> fade = exp_softmax<T>(load(w.tops + (r0 / step * block.rows + v) * L) - state.top[0]);
    const Vec<T> scale1 = fade / state.sum[0], half1 = scale1 * T(0.5), half2 = fade / state.sum[1] * T(0.5);
    const T* near = w.factors.near_row(map, v);
    const int columns = map.width, last = end(r0);
    const ptrdiff_t width = block.width;
    for (int r = r0; r < last; ++r) {
      const T *drop = w.factors.drop_row(map, v, r, 0, map.height), *far = w.factors.far_row(map, r);
      const Vec<T> half_fall = half2 * exp_softmax<T>(block.log_fall(map, v, r));
      for (int l = 0; l < columns; ++l, s += width, to += width, first += width) {
        const Vec<T> e = load(s), mine = e * (load(near + l * L) * drop[l]);
        store(first, mine * scale1);
        store(to, mine * half1 + e * (load(far + l * L) * half_fall));
      }
    }
  }

  // ---- the same from logits, for scores so far apart that a mask may bring one up by more than a float
  // holds

  template <class Visit>
  __attribute__((always_inline)) void logits(int r0, int r1, int v, Visit visit) const {
    const T* s = tile(r0) + v * L;
    for (int r = r0; r < r1; ++r) {
      const Vec<T> fall = block.log_fall(map, v, r);
      for (int l = 0; l < map.width; ++l, s += block.width)
        visit(load(s) + (block.log_near(map, v, l) + block.log_drop(map, v, r, l)),
              load(s) + (block.log_far(map, r, l) + fall));
    }
  }
  __attribute__((noinline)) void reduce_logits(int v, Softmax<T>& state) const {
    const Vec<T> nothing = broadcast(-static_cast<T>(__builtin_inff()));
    Vec<T> top1 = nothing, top2 = nothing, sum1 = {}, sum2 = {};
    logits(0, map.height, v, [&](Vec<T> a, Vec<T> b) {
      top1 = vmax(a, top1);
      top2 = vmax(b, top2);
    });
    for (int r = 0; r < map.height; ++r) {
      Vec<T> run1 = {}, run2 = {};
      logits(r, r + 1, v, [&](Vec<T> a, Vec<T> b) {
        run1 += exp_softmax<T>(a - top1);
        run2 += exp_softmax<T>(b - top2);
      });
      sum1 += run1;
      sum2 += run2;
    }
    state = {{top1, top2}, {sum1, sum2}};
  }
  __attribute__((noinline)) void weigh_logits(int r0, int v, const Softmax<T>& state) const {
    T *to = w.weights + v * L, *first = w.first_weights + v * L;
    const Vec<T> scale1 = T(1) / state.sum[0], half1 = scale1 * T(0.5), half2 = T(0.5) / state.sum[1];
    logits(r0, end(r0), v, [&](Vec<T> a, Vec<T> b) {
      const Vec<T> mine = exp_softmax<T>(a - state.top[0]);
      store(first, mine * scale1);
      store(to, mine * half1 + exp_softmax<T>(b - state.top[1]) * half2);
      to += block.width;
      first += block.width;
    });
  }

  void multiply_values(int r, const T* weights, T* out) const {
    multiply<T>(block.rows, {map.dv, (end(r) - r) * map.width,
                             map.v + static_cast<ptrdiff_t>(r) * map.width * map.dv_pitch, 1, map.dv_pitch,
                             weights, block.width, r ? out : nullptr, block.width, out, block.width});
  }

  void run(bool keep_first, Softmax<T>* states) const {
    const Vec<T> nothing = broadcast(-static_cast<T>(__builtin_inff()));
    for (int v = 0; v < block.rows; ++v) states[v] = {{nothing, nothing}, {}};
    for (int r = 0; r < map.height; r = end(r)) {
      multiply_keys(r);
      for (int v = 0; v < block.rows; ++v) exponentiate(r, v, states[v]);
    }
    bool apart = false;
    for (int v = 0; v < block.rows; ++v) {
      for (int i = 0; i < L; ++i)
        apart |= !(states[v].sum[0][i] > kTiny<T>) || !(states[v].sum[1][i] > kTiny<T>);
      states[v].top[1] = states[v].top[0];
    }
    if (apart) {
      for (int r = 0; r < map.height; r = end(r)) multiply_keys(r);
      for (int v = 0; v < block.rows; ++v) reduce_logits(v, states[v]);
    }
    for (int r = 0; r < map.height; r = end(r)) {
      for (int v = 0; v < block.rows; ++v) apart ? weigh_logits(r, v, states[v]) : weigh(r, v, states[v]);
      multiply_values(r, w.weights, w.out);
      if (keep_first) multiply_values(r, w.first_weights, w.first);
    }
  }
};

template <class E, class T>
void write_block(const View& view, int64_t batch, int head, const Block<T>& block, const T* from,
                 int channels, const T* ones) {
  for (int v = 0; v < block.rows; ++v)
    unpack(token<E>(view, batch, head, block.y0 + v, block.x0), view.stride[4], view.stride[2],
           from + v * kLanes<T>, block.width, channels, block.lanes, ones);
}

// Items: (batch, head, band of columns).
template <class E>
void forward_range(const Params& p, int64_t begin, int64_t end, void* memory) {
  using T = Compute<E>;
  ForwardScratch<T> w(p, Scratch(memory));
  const int column_tiles = w.map.column_tiles(), count = bands(p, column_tiles);
  T ones[kLanes<T>];
  for (int i = 0; i < kLanes<T>; ++i) ones[i] = 1;
  for (int64_t item = begin; item < end; ++item) {
    const int band = static_cast<int>(item % count), head = static_cast<int>(item / count % p.heads);
    const int64_t batch = item / count / p.heads;
    if (band == 0 || item == begin) w.map.template read<E>(p, batch, head);
    for (int tile = column_tiles * band / count; tile < column_tiles * (band + 1) / count; ++tile) {
      w.factors.fill_far(w.map, Block<T>(w.map, 0, 1, tile), 0, p.height);
      int y = 0;
      for (int blocks = ceil_div(p.height, kBlockRows); blocks > 0; --blocks) {
        const Block<T> block(w.map, y, ceil_div(p.height - y, blocks), tile);
        block.template read<E>(p.q, batch, head, p.head_dim, static_cast<T>(p.scale), w.q);
        w.factors.fill_block(w.map, block, 0, p.height);
        Softmax<T> states[kBlockRows];
        const bool keep_first = static_cast<bool>(p.partial);
        Forward<E, T>{w.map, block, w, tile_rows(p)}.run(keep_first, states);
        write_block<E>(p.out, batch, head, block, w.out, p.value_dim, ones);
        if (keep_first)
          write_block<E>(saved_product<E>(p, 0), batch, head, block, w.first, p.value_dim, ones);
        for (int s = 0; p.lse && s < 2; ++s)
          for (int v = 0; v < block.rows; ++v)
            store_first(plane<T>(p.lse, s, batch, head) + static_cast<ptrdiff_t>(y + v) * p.width + block.x0,
                        states[v].top[s] + log_softmax<T>(states[v].sum[s]), block.lanes);
        y += block.rows;
      }
    }
  }
}

// ---- by dtype

int64_t sums_items(const Params& p) {
  return p.batch * p.heads;
}
size_t no_scratch(const Params&) {
  return 0;
}
template <class E>
void sums_range(const Params& p, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item)
    sum_decays<E>(p, item / p.heads, static_cast<int>(item % p.heads));
}
void sums(const Params& p, int64_t begin, int64_t end, void*) {
  with_dtype(p.dtype, [&](auto element) { sums_range<decltype(element)>(p, begin, end); });
}

int64_t forward_items(const Params& p) {
  const int lanes = p.dtype == DType::f64 ? kLanes<double> : kLanes<float>;
  return p.batch * p.heads * bands(p, ceil_div(p.width, lanes));
}
size_t forward_scratch(const Params& p) {
  return p.dtype == DType::f64 ? ForwardScratch<double>(p, Scratch(nullptr)).size
                               : ForwardScratch<float>(p, Scratch(nullptr)).size;
}
void forward(const Params& p, int64_t begin, int64_t end, void* scratch) {
  with_dtype(p.dtype, [&](auto element) { forward_range<decltype(element)>(p, begin, end, scratch); });
}

}  // namespace

const Loop kSums = {sums_items, no_scratch, sums};
const Loop kWholeForward = {forward_items, forward_scratch, forward};

}  // namespace VITKERNELS_ISA
}  // namespace vitkernels::polyline_path_attention

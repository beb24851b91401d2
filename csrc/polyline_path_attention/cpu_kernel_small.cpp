// Polyline path attention of small whole maps, forward, on one core and one instruction set.
//
// Floor of a map of N tokens: 2 N^2 (d + dv) FLOPs and 2 N^2 exponentials.
#include "small_cpu.h"

namespace vitkernels::polyline_path_attention {
namespace VITKERNELS_ISA {
namespace {

// Of `count` queries from `first` on: scores become the mean of both softmaxes. `second` holds as many
// numbers as one vector of them has logits.
template <class T>
__attribute__((noinline)) void weigh(const Params& p, const SmallMap<T>& map, int64_t batch, int head,
                                     int first, int count, T* scores, ptrdiff_t pitch, T* second,
                                     Ahead& ahead) {
  using V = Vec<T>;
  constexpr int L = kLanes<T>;
  const typename SmallMap<T>::Queries at = map.find(first);
  const int columns = map.width, rows = map.height, keys = map.tokens;
  V top1 = broadcast(-static_cast<T>(__builtin_inff())), top2 = top1, sum1 = {}, sum2 = {};
  T *score = scores, *other = second;
  for (int r = 0; r < rows; ++r) {
    ahead.step();
    const typename SmallMap<T>::Masks masks = map.masks(at, r);
    for (int l = 0; l < columns; ++l, score += pitch, other += L) {
      const V x = load(score), a = x + masks.first(l), b = x + masks.second(l);
      store(score, a);
      store(other, b);
      top1 = vmax(a, top1);
      top2 = vmax(b, top2);
    }
  }
  score = scores, other = second;
  for (int key = 0; key < keys;) {
    V run1 = {}, run2 = {};
    for (const int end = imin(keys, key + kRun); key < end; ++key, score += pitch, other += L) {
      const V a = exp_softmax<T>(load(score) - top1), b = exp_softmax<T>(load(other) - top2);
      store(score, a);
      store(other, b);
      run1 += a;
      run2 += b;
    }
    sum1 += run1;
    sum2 += run2;
  }
  const V half1 = T(0.5) / sum1, half2 = T(0.5) / sum2;
  score = scores, other = second;
  for (int key = 0; key < keys; ++key, score += pitch, other += L)
    store(score, load(score) * half1 + load(other) * half2);
  if (!p.lse) return;
  store_first(plane<T>(p.lse, 0, batch, head) + first, top1 + log_softmax<T>(sum1), count);
  store_first(plane<T>(p.lse, 1, batch, head) + first, top2 + log_softmax<T>(sum2), count);
}

template <class E>
struct Forward {
  using T = Compute<E>;
  static constexpr int L = kLanes<T>;

  const Params& p;
  int tokens, d_pitch, v_pitch;
  Tiling<T> tiling;
  size_t size;
  Scratch scratch;
  SmallMap<T> map;
  T *q, *k, *v, *out;             // [token][channel]
  T *q_lanes, *weights, *second;  // of a tile; the second logits of one vector of it
  T* ones;

  Forward(const Params& p, void* memory)
      : p(p),
        tokens(p.height * p.width),
        d_pitch(round_up_lanes<T>(p.head_dim)),
        v_pitch(round_up_lanes<T>(p.value_dim)),
        tiling(tokens),
        scratch(memory),
        map(p, tiling, scratch) {
    const size_t all = tokens;
    T** const of_logits[] = {&q, &k};
    for (T** tensor : of_logits) *tensor = scratch.take<T>(all * d_pitch);
    T** const of_values[] = {&v, &out};
    for (T** tensor : of_values) *tensor = scratch.take<T>(all * v_pitch);
    q_lanes = scratch.take<T>(p.head_dim * tiling.width);
    weights = scratch.take<T>(all * tiling.width);
    second = scratch.take<T>(all * L);
    ones = scratch.take<T>(v_pitch);
    size = scratch.used;
  }

  // What `run` of an item reads and writes.
  Ahead ahead_of(int64_t item, bool wanted) const {
    Ahead ahead(p, wanted ? tokens : 0, ceil_div(tokens, L) * p.height);
    const int64_t batch = item / p.heads;
    const int head = static_cast<int>(item % p.heads);
    const View* const of_logits[] = {&p.q, &p.k};
    const View* const of_values[] = {&p.v, &p.out};
    for (const View* view : of_logits) ahead.add<E>(*view, batch, head, 0, p.head_dim);
    for (const View* view : of_values) ahead.add<E>(*view, batch, head, 0, p.value_dim);
    return ahead;
  }

  // Tiles [first, last) of a head's queries.
  void run(int64_t batch, int head, int first, int last, Ahead ahead) const {
    if (last - first == tiling.count) sum_decays<E>(p, batch, head);
    map.read(p, batch, head);
    read_map<E>(p, p.q, batch, head, p.head_dim, static_cast<T>(p.scale), q);
    read_map<E>(p, p.k, batch, head, p.head_dim, T(1), k);
    read_map<E>(p, p.v, batch, head, p.value_dim, T(1), v);
    const Result<E> result(p, p.out, batch, head, 0, p.height, p.value_dim, tokens, out);
    for (int tile = first; tile < last; ++tile) {
      const int begin = tiling.start(tile), lanes = tiling.lanes(tile), pitch = tiling.width;
      const int vecs = ceil_div(lanes, L);
      pack(q_lanes, pitch, static_cast<const T*>(q + static_cast<ptrdiff_t>(begin) * d_pitch), 1, d_pitch,
           p.head_dim, lanes, T(1));
      multiply<T>(vecs, {tokens, p.head_dim, k, d_pitch, 1, q_lanes, pitch, nullptr, 0, weights, pitch});
      for (int i = 0; i < vecs; ++i)
        weigh<T>(p, map, batch, head, begin + i * L, imin(L, lanes - i * L), weights + i * L, pitch, second,
                 ahead);
      multiply<T>(v_pitch / L,
                  {lanes, tokens, weights, 1, pitch, v, v_pitch, nullptr, 0, result.at(begin), result.step});
    }
    for (int i = 0; i < v_pitch; ++i) ones[i] = 1;
    result.deliver(ones, tiling.start(first), tiling.start(last - 1) + tiling.lanes(last - 1));
  }
};

// Items: (batch, head, band of tiles). Where an item is a head, it sums the head's decays.
template <class T>
int bands(const Params& p) {
  return VITKERNELS_ISA::bands(p, Tiling<T>(p.height * p.width).count);
}
int64_t items(const Params& p) {
  return p.batch * p.heads * with_dtype(p.dtype, [&](auto e) { return bands<Compute<decltype(e)>>(p); });
}
size_t scratch_size(const Params& p) {
  return with_dtype(p.dtype, [&](auto e) { return Forward<decltype(e)>(p, nullptr).size; });
}
void run(const Params& p, int64_t begin, int64_t end, void* scratch) {
  with_dtype(p.dtype, [&](auto e) {
    const Forward<decltype(e)> forward(p, scratch);
    const int count = bands<Compute<decltype(e)>>(p), tiles = forward.tiling.count;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t of_heads = item / count;
      const int band = static_cast<int>(item % count);
      forward.run(of_heads / p.heads, static_cast<int>(of_heads % p.heads), tiles * band / count,
                  tiles * (band + 1) / count, forward.ahead_of(of_heads + 1, count == 1 && item + 1 < end));
    }
  });
}

}  // namespace

const Loop kSmallForward = {items, scratch_size, run};

}  // namespace VITKERNELS_ISA
}  // namespace vitkernels::polyline_path_attention

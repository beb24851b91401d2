// Criss-cross polyline path attention, backward, on one core and one instruction set.
//
// Floor of a map of N tokens: 2 N (H + W) (3 d + 5 dv) FLOPs and N (H + W) exponentials. With G = grad_out /
// 2:
//   rows      Y1 = A_w v, dY2 = A_w^T G
//   columns   Y2 = A_h v, dA_h = G Y1^T + dY2 v^T, dY1 = A_h^T G, and what v, q, k and log_decay_h get
//             through A_h
//   rows      dA_w = dY1 v^T + G Y2^T, and what v, q, k and log_decay_w get through A_w
// Y1 and Y2 are computed again: in memory they would be two tensors more to write, to map and to read, which
// takes longer than half a product each. A line has one owner and holds all its keys, so the softmax's own
// sum is taken from the probabilities. The rows' probabilities of a small head are kept from one sweep to the
// other; otherwise they are computed twice, which adds 2 N W d and N W.
#include "lines_cpu.h"

namespace vitkernels::polyline_path_attention {
namespace VITKERNELS_ISA {
namespace {

template <class E>
struct Backward {
  using T = Compute<E>;
  static constexpr int L = kLanes<T>;

  const Params& p;
  int64_t batch;
  int head, d_pitch, v_pitch;
  bool decays, logits;                                           // wanted: of the decays; of any logit
  T *q, *k, *v, *g, *y1, *y2, *dy1, *dy2, *dq, *dk, *dv, *kept;  // of the head
  T *sums, *lse, *q_lanes, *g_lanes, *dy_lanes, *s, *ds, *across_keys, *dsums, *ones, *scales;  // of a line
  size_t head_used, scratch_used;

  Backward(const Params& p, int64_t batch, int head, void* memory, void* scratch)
      : p(p),
        batch(batch),
        head(head),
        d_pitch(round_up_lanes<T>(p.head_dim)),
        v_pitch(round_up_lanes<T>(p.value_dim)),
        decays(p.grad_log_decay_w || p.grad_log_decay_h),
        logits(decays || p.grad_q || p.grad_k) {
    Scratch of_head(memory), of_line(scratch);
    const size_t tokens = gathered_tokens(p), longest = longest_line(p);
    T** const of_logits[] = {&q, &k, &dq, &dk};
    for (T** tensor : of_logits) *tensor = of_head.take<T>(tokens * d_pitch);
    T** const of_values[] = {&v, &g, &y1, &y2, &dy1, &dy2, &dv};
    for (T** tensor : of_values) *tensor = of_head.take<T>(tokens * v_pitch);
    const Tiling<T> rows(p.width);
    kept = keeps_rows<T>(p) ? of_head.take<T>(tokens * rows.count * rows.width) : nullptr;
    head_used = of_head.used;
    const size_t padded = longest + kTileWidth;
    sums = of_line.take<T>(padded);
    lse = of_line.take<T>(padded);
    q_lanes = of_line.take<T>(p.head_dim * kTileWidth);
    g_lanes = of_line.take<T>(p.value_dim * kTileWidth);
    dy_lanes = of_line.take<T>(p.value_dim * kTileWidth);
    s = of_line.take<T>(longest * kTileWidth);
    ds = of_line.take<T>(longest * kTileWidth);
    across_keys = of_line.take<T>(longest * L);
    dsums = of_line.take<T>(padded);
    ones = of_line.take<T>(v_pitch + d_pitch);
    scales = of_line.take<T>(d_pitch);
    scratch_used = of_line.used;
  }
  static size_t head_size(const Params& p) { return Backward(p, 0, 0, nullptr, nullptr).head_used; }
  static size_t scratch_size(const Params& p) { return Backward(p, 0, 0, nullptr, nullptr).scratch_used; }

  void begin() const {}

  void line(int sweep, int index, const Place& next, bool wanted) const {
    if (sweep == kRows) gather(index);
    const Line<T> line(p, index, sweep);
    const Tiling<T> tiling(line.length);
    const int padded = tiling.count * tiling.width;
    line.read(plane<const T>(p.cum, line.vertical, batch, head), sums, padded, true, T(0));
    // A lane beyond the line gets probability 0.
    line.read(plane<const T>(p.lse, line.vertical, batch, head), lse, padded, false,
              static_cast<T>(__builtin_inff()));
    for (int i = 0; i < padded; ++i) dsums[i] = 0;
    for (int i = 0; i < line.length * L; i += L) store(across_keys + i, Vec<T>{});
    Ahead ahead(p, wanted && !line.vertical ? p.width : 0, tiling.count * (tiling.vecs + 2));
    const bool first = sweep == kRows;
    const View* const of_logits[] = {first ? &p.q : &p.grad_q, first ? &p.k : &p.grad_k};
    const View* const of_values[] = {first ? &p.v : &p.grad_v, first ? &p.grad_out : nullptr};
    for (const View* view : of_logits) ahead.add<E>(*view, next.batch, next.head, next.line, p.head_dim);
    for (const View* view : of_values)
      if (view) ahead.add<E>(*view, next.batch, next.head, next.line, p.value_dim);
    if (sweep == kRowsAgain) {
      for (int i = 0; i < v_pitch + d_pitch; ++i) ones[i] = 1;
      for (int i = 0; i < d_pitch; ++i) scales[i] = static_cast<T>(p.scale);
    }
    const int row = line.vertical ? 0 : index;
    const Result<E> to_q = row_result<E>(p, p.grad_q, batch, head, row, p.head_dim, dq),
                    to_k = row_result<E>(p, p.grad_k, batch, head, row, p.head_dim, dk),
                    to_v = row_result<E>(p, p.grad_v, batch, head, row, p.value_dim, dv);
    const Results results =
        sweep == kRowsAgain ? Results{{to_q.data, to_q.step}, {to_k.data, to_k.step}, {to_v.data, to_v.step}}
                            : Results{line.of(dq, d_pitch), line.of(dk, d_pitch), line.of(dv, v_pitch)};
    for (int tile = 0; tile < tiling.count; ++tile)
      differentiate(sweep, line, tiling.start(tile), tiling.lanes(tile), tiling, results, ahead);
    if (sweep == kRows) return;
    const View& grad = line.vertical ? p.grad_log_decay_h : p.grad_log_decay_w;
    if (grad) {
      add_across(dsums, across_keys, line.length);
      by_decay<E>(p, [&](auto d) {
        using D = decltype(d);
        D* to = line.vertical ? token<D>(grad, batch, head, 0, index) : token<D>(grad, batch, head, index, 0);
        differentiate_sums(dsums, 1, line.length, to, grad.stride[line.vertical ? 1 : 2]);
      });
    }
    if (sweep == kRowsAgain) to_q.deliver(ones), to_k.deliver(ones), to_v.deliver(ones);
  }

  void gather(int y) const {
    gather_row<E>(p, p.q, batch, head, y, p.head_dim, static_cast<T>(p.scale), q, d_pitch);
    gather_row<E>(p, p.k, batch, head, y, p.head_dim, T(1), k, d_pitch);
    gather_row<E>(p, p.v, batch, head, y, p.value_dim, T(1), v, v_pitch);
    gather_row<E>(p, p.grad_out, batch, head, y, p.value_dim, T(0.5), g, v_pitch);
  }
  // to[query] = (before[query] +) sum over keys of weights * from[key], times factor[channel] if there is one
  void to_queries(const Line<T>& line, const T* weights, int begin, int lanes, int pitch, T* from, T* before,
                  const Tokens<T>& to, int channels, const T* factor = nullptr) const {
    const Tokens<T> f = line.of(from, channels);
    multiply<T>(channels / L, {lanes, line.length, weights, 1, pitch, f.data, f.step,
                               before ? line.of(before, channels).at(begin) : nullptr, f.step, to.at(begin),
                               to.step, nullptr, factor});
  }
  // to[key] = (before[key] +) sum over queries of weights * from[query]
  void to_keys(const Line<T>& line, const T* weights, int begin, int lanes, int pitch, T* from, T* before,
               const Tokens<T>& to, int channels) const {
    const Tokens<T> f = line.of(from, channels);
    multiply<T>(channels / L, {line.length, lanes, weights, pitch, 1, f.at(begin), f.step,
                               before ? line.of(before, channels).data : nullptr, f.step, to.data, to.step});
  }

  // Where a sweep leaves a line's gradients.
  struct Results {
    Tokens<T> q, k, v;
  };

  // One tile of queries.
  void differentiate(int sweep, const Line<T>& line, int begin, int lanes, const Tiling<T>& tiling,
                     const Results& results, Ahead& ahead) const {
    const int n = line.length, pitch = tiling.width, vecs = ceil_div(lanes, L);
    const bool again = sweep == kRowsAgain, later = begin > 0;
    T* weights = kept && !line.vertical
                     ? kept + line.first * tiling.count * pitch + static_cast<ptrdiff_t>(begin) * n
                     : s;
    if (!again || !kept) {
      line.of(q, d_pitch).read_lanes(begin, lanes, p.head_dim, q_lanes, pitch);
      const Tokens<T> keys = line.of(k, d_pitch);
      multiply<T>(vecs, {n, p.head_dim, keys.data, keys.step, 1, q_lanes, pitch, nullptr, 0, weights, pitch});
      for (int i = 0; i < vecs * L; i += L) {
        if (!again) ahead.step();
        recall_line(sums, n, begin + i, load(lse + begin + i), weights + i, pitch);
      }
    }
    ahead.step();
    if (sweep == kRows) {
      to_keys(line, weights, begin, lanes, pitch, g, later ? dy2 : nullptr, line.of(dy2, v_pitch), v_pitch);
      ahead.step();
      if (logits) to_queries(line, weights, begin, lanes, pitch, v, nullptr, line.of(y1, v_pitch), v_pitch);
      return;
    }
    T* const dy = again ? dy1 : dy2;  // through the other factor
    if (!again)
      to_keys(line, weights, begin, lanes, pitch, g, later ? dy1 : nullptr, line.of(dy1, v_pitch), v_pitch);
    if (p.grad_v)
      to_keys(line, weights, begin, lanes, pitch, dy, again || later ? dv : nullptr, results.v, v_pitch);
    if (!logits) return;
    if (!again) to_queries(line, weights, begin, lanes, pitch, v, nullptr, line.of(y2, v_pitch), v_pitch);
    ahead.step();
    // What G meets came through the other factor, what dY meets did not.
    const Tokens<T> with_g = line.of(again ? y2 : y1, v_pitch), with_dy = line.of(v, v_pitch);
    line.of(g, v_pitch).read_lanes(begin, lanes, p.value_dim, g_lanes, pitch);
    line.of(dy, v_pitch).read_lanes(begin, lanes, p.value_dim, dy_lanes, pitch);
    multiply<T>(vecs, {n, p.value_dim, with_g.data, with_g.step, 1, g_lanes, pitch, nullptr, 0, ds, pitch});
    multiply<T>(vecs, {n, p.value_dim, with_dy.data, with_dy.step, 1, dy_lanes, pitch, ds, pitch, ds, pitch});
    for (int i = 0; i < vecs * L; i += L) {
      ahead.step();
      differentiate_softmax(n, begin + i, weights + i, ds + i, pitch);
    }
    if (p.grad_q)
      to_queries(line, ds, begin, lanes, pitch, k, again ? dq : nullptr, results.q, d_pitch,
                 again ? scales : nullptr);
    if (p.grad_k)
      to_keys(line, ds, begin, lanes, pitch, q, again || later ? dk : nullptr, results.k, d_pitch);
  }

  // ds, gradients of the probabilities w, becomes that of the logits; and with later(i, j) = +1 where i is
  // the later one, -1 where the earlier:
  //   dsums[i] += later(i, j) ds[j][i] for the lanes' queries i, dsums[j] -= the same for the keys j
  __attribute__((noinline)) void differentiate_softmax(int keys, int lane, const T* w, T* ds,
                                                       int pitch) const {
    Vec<T> mean = {};
    for (int key = 0; key < keys; ++key)
      mean += load(w + static_cast<ptrdiff_t>(key) * pitch) * load(ds + static_cast<ptrdiff_t>(key) * pitch);
    Vec<T> queries = {};
    T* const by_key = across_keys;  // stores might change what is behind `this`
    const auto visit = [&](int from, int to, auto direct) __attribute__((always_inline)) {
      for (int key = from; key < to; ++key) {
        T* at = ds + static_cast<ptrdiff_t>(key) * pitch;
        const Vec<T> d = load(w + static_cast<ptrdiff_t>(key) * pitch) * (load(at) - mean);
        store(at, d);
        const Vec<T> directed = direct(key, d);
        queries += directed;
        store(by_key + key * L, load(by_key + key * L) - directed);
      }
    };
    const int before = imin(keys, lane), mixed = imin(keys, lane + L);
    const IntVec<T> lanes = positions_from<T>(lane);
    visit(0, before, [](int, Vec<T> d) { return d; });
    visit(before, mixed, [&](int key, Vec<T> d) { return towards<T>(d, lanes, key); });
    visit(mixed, keys, [](int, Vec<T> d) { return -d; });
    store(dsums + lane, load(dsums + lane) + queries);
  }
};

}  // namespace

VITKERNELS_POLYLINE_SWEEPS(kCrissCrossBackward, Backward);

}  // namespace VITKERNELS_ISA
}  // namespace vitkernels::polyline_path_attention

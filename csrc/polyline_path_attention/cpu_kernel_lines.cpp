// Criss-cross polyline path attention, forward, on one core and one instruction set.
//
// Floor of a map of N tokens: 2 N (H + W) (d + 2 dv) FLOPs and N (H + W) exponentials. Sweeps:
//   rows      Y1 = A_w v
//   columns   A_h Y1 and Y2 = A_h v
//   rows      A_w Y2, and the mean of both orders
// The rows' probabilities of a small head are kept; otherwise they are computed twice, which adds 2 N W d and
// N W.
#include "lines_cpu.h"

namespace vitkernels::polyline_path_attention {
namespace VITKERNELS_ISA {
namespace {

template <class E>
struct Forward {
  using T = Compute<E>;
  static constexpr int L = kLanes<T>;

  const Params& p;
  int64_t batch;
  int head, d_pitch, v_pitch;
  T *q, *k, *v, *y1, *y2, *out, *lse_rows, *kept;              // of the head
  T *sums, *q_lanes, *s, *inverse, *lse_line, *ones, *halves;  // of a line
  size_t head_used, scratch_used;

  Forward(const Params& p, int64_t batch, int head, void* memory, void* scratch)
      : p(p),
        batch(batch),
        head(head),
        d_pitch(round_up_lanes<T>(p.head_dim)),
        v_pitch(round_up_lanes<T>(p.value_dim)) {
    Scratch of_head(memory), of_line(scratch);
    const size_t tokens = gathered_tokens(p), longest = longest_line(p);
    q = of_head.take<T>(tokens * d_pitch);
    k = of_head.take<T>(tokens * d_pitch);
    v = of_head.take<T>(tokens * v_pitch);
    y1 = of_head.take<T>(tokens * v_pitch);
    y2 = of_head.take<T>(tokens * v_pitch);
    out = of_head.take<T>(tokens * v_pitch);
    lse_rows = of_head.take<T>(tokens);
    const Tiling<T> rows(p.width);
    kept = keeps_rows<T>(p) ? of_head.take<T>(tokens * rows.count * rows.width) : nullptr;
    head_used = of_head.used;
    const size_t padded = longest + kTileWidth;
    sums = of_line.take<T>(padded);
    q_lanes = of_line.take<T>(p.head_dim * kTileWidth);
    s = of_line.take<T>(longest * kTileWidth);
    inverse = of_line.take<T>(padded);
    lse_line = of_line.take<T>(padded);
    ones = of_line.take<T>(v_pitch);
    halves = of_line.take<T>(v_pitch);
    scratch_used = of_line.used;
  }
  static size_t head_size(const Params& p) { return Forward(p, 0, 0, nullptr, nullptr).head_used; }
  static size_t scratch_size(const Params& p) { return Forward(p, 0, 0, nullptr, nullptr).scratch_used; }

  // Of a head that no other thread works on.
  void begin() const { sum_decays<E>(p, batch, head); }

  void line(int sweep, int index, const Place& next, bool wanted) const {
    if (sweep == kRows) gather(index);
    const Line<T> line(p, index, sweep);
    const Tiling<T> tiling(line.length);
    line.read(plane<const T>(p.cum, line.vertical, batch, head), sums, tiling.count * tiling.width, true,
              T(0));
    Ahead ahead(p, wanted && !line.vertical ? p.width : 0,
                tiling.count * (sweep == kRows ? tiling.vecs + 2 : 1));
    if (sweep == kRows) {
      const View* const of_logits[] = {&p.q, &p.k};
      for (const View* view : of_logits) ahead.add<E>(*view, next.batch, next.head, next.line, p.head_dim);
    }
    ahead.add<E>(sweep == kRows ? p.v : p.out, next.batch, next.head, next.line, p.value_dim);
    const int row = line.vertical ? 0 : index;
    const Result<E> result = row_result<E>(p, p.out, batch, head, row, p.value_dim, out);
    for (int i = 0; sweep == kRowsAgain && i < v_pitch; ++i) ones[i] = 1, halves[i] = T(0.5);
    for (int tile = 0; tile < tiling.count; ++tile)
      attend(sweep, line, tiling.start(tile), tiling.lanes(tile), tiling, {result.data, result.step}, ahead);
    if (sweep == kRowsAgain) result.deliver(ones);
  }

  void gather(int y) const {
    gather_row<E>(p, p.q, batch, head, y, p.head_dim, static_cast<T>(p.scale), q, d_pitch);
    gather_row<E>(p, p.k, batch, head, y, p.head_dim, T(1), k, d_pitch);
    gather_row<E>(p, p.v, batch, head, y, p.value_dim, T(1), v, v_pitch);
  }

  // One tile of queries.
  void attend(int sweep, const Line<T>& line, int begin, int lanes, const Tiling<T>& tiling,
              const Tokens<T>& result, Ahead& ahead) const {
    const int n = line.length, pitch = tiling.width, vecs = ceil_div(lanes, L);
    const bool again = sweep == kRowsAgain;
    T* weights = kept && sweep != kColumns ? kept_tile(line, begin, tiling) : s;
    if (!again || !kept) {
      if (!again) ahead.step();
      line.of(q, d_pitch).read_lanes(begin, lanes, p.head_dim, q_lanes, pitch);
      const Tokens<T> keys = line.of(k, d_pitch);
      multiply<T>(vecs, {n, p.head_dim, keys.data, keys.step, 1, q_lanes, pitch, nullptr, 0, weights, pitch});
    }
    const T* factors = nullptr;
    if (!again) {
      for (int i = 0; i < vecs * L; i += L) {
        ahead.step();
        softmax_of_line(sums, n, begin + i, weights + i, pitch, inverse + i, lse_line + i);
      }
      write_lse(line, begin, lanes);
      factors = inverse;
      if (kept && sweep == kRows) normalise(weights, n, pitch, vecs), factors = nullptr;
    } else if (!kept) {
      for (int i = 0; i < vecs * L; i += L)
        recall_line(sums, n, begin + i, load_first(lse_rows + line.first + begin + i, imin(L, lanes - i)),
                    weights + i, pitch);
    }
    const auto product = [&](T* values, const Tokens<T>& to) {
      ahead.step();
      const Tokens<T> from = line.of(values, v_pitch), before = line.of(out, v_pitch);
      multiply<T>(v_pitch / L,
                  {lanes, n, weights, 1, pitch, from.data, from.step, again ? before.at(begin) : nullptr,
                   before.step, to.at(begin), to.step, nullptr, again ? halves : nullptr, factors});
    };
    if (sweep == kRows) return product(v, line.of(y1, v_pitch));
    if (again) return product(y2, result);
    product(y1, line.of(out, v_pitch));
    product(v, line.of(y2, v_pitch));
  }

  T* kept_tile(const Line<T>& line, int begin, const Tiling<T>& tiling) const {
    return kept + line.first * tiling.count * tiling.width + static_cast<ptrdiff_t>(begin) * line.length;
  }

  void normalise(T* weights, int n, int pitch, int vecs) const {
    for (int r = 0; r < n; ++r, weights += pitch)
      for (int i = 0; i < vecs * L; i += L) store(weights + i, load(weights + i) * load(inverse + i));
  }

  void write_lse(const Line<T>& line, int begin, int lanes) const {
    if (!line.vertical)
      for (int i = 0; i < lanes; ++i) lse_rows[line.first + begin + i] = lse_line[i];
    if (!p.lse) return;
    T* to = plane<T>(p.lse, line.vertical, batch, head) + line.first;
    for (int i = 0; i < lanes; ++i) to[(begin + i) * line.step] = lse_line[i];
  }
};

}  // namespace

VITKERNELS_POLYLINE_SWEEPS(kCrissCrossForward, Forward);

}  // namespace VITKERNELS_ISA
}  // namespace vitkernels::polyline_path_attention

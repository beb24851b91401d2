// Polyline path attention of whole maps, backward, on one core and one instruction set.
//
// Floor of a map of N tokens: 2 N^2 (3 d + 2 dv) FLOPs and N^2 exponentials.
//
// With dP = grad_out v^T and delta = sum_c grad_out * (P v) of each softmax, the gradients of the logits are
// D1 = P1 (dP - delta1) / 2 and D2 = P2 (dP - delta2) / 2, that of the scores D1 + D2. The map's keys are
// taken in chunks that stay in cache with their gradients while all queries pass. One head has one owner, so
// that every sum has one order. Of the decays, with `later` = +1 where the first index is the later one, -1
// where the earlier:
//   dCw[i, j] += later(j, l) D1, dCw[i, l] += later(l, j) D1     the way along the query's row i, for D1
//   dCh[i, l] += later(i, r) D1, dCh[r, l] -= later(i, r) D1     the way down the key's column l
// and for D2 along the key's row r and down the query's column j.
#include "whole_cpu.h"

namespace vitkernels::polyline_path_attention {
namespace VITKERNELS_ISA {
namespace {

// Rows of keys in a chunk: keys, values, their gradients and three vectors of a key, within half of a small
// L2.
int chunk_rows(const Params& p) {
  const int bytes = 4 * (2 * (p.head_dim + p.value_dim) + 24), tile = tile_rows(p);
  const int64_t row = static_cast<int64_t>(bytes) * p.width;
  const int fit = static_cast<int>((256 << 10) / row);
  const int rows = fit < tile ? tile : fit / tile * tile;
  return imin(p.height, rows);
}

template <class T>
struct BackwardScratch {
  Map<T> map;
  Factors<T> factors;
  int step, chunk;
  T *grad_k, *grad_v, *grad_q;     // of the head, [token][channel]; grad_q [block][channel][v][lane]
  T *grad_along, *grad_down;       // of the sums, [y][column]
  T *delta1, *delta2;              // [y][column]
  T *q, *q_tokens, *g, *g_tokens;  // of the block
  T *scores, *products;            // of the tile: then the weights, and the gradients of the scores
  T *row_sums, *before, *after;    // [v][l][lane]: D1 summed over rows of keys; those up to the query's own
  T *drops, *fars;                 // [r][l][lane]: later(i, r) D1 and D2, summed over queries
  T *ones, *scales;
  size_t size;

  BackwardScratch(const Params& p, Scratch scratch)
      : map(p, scratch), factors(p, chunk_rows(p), scratch), step(tile_rows(p)), chunk(chunk_rows(p)) {
    const size_t L = kLanes<T>, width = kBlockRows * L, tokens = map.tokens;
    const size_t plane = static_cast<size_t>(p.height) * map.pitch, row = static_cast<size_t>(p.width) * L;
    grad_k = scratch.take<T>(tokens * map.d_pitch);
    grad_v = scratch.take<T>(tokens * map.dv_pitch);
    grad_q = scratch.take<T>(plane * p.head_dim);
    grad_along = scratch.take<T>(plane);
    grad_down = scratch.take<T>(plane);
    delta1 = scratch.take<T>(plane);
    delta2 = scratch.take<T>(plane);
    q = scratch.take<T>(p.head_dim * width);
    q_tokens = scratch.take<T>(map.d_pitch * width);
    g = scratch.take<T>(p.value_dim * width);
    g_tokens = scratch.take<T>(map.dv_pitch * width);
    scores = scratch.take<T>(step * p.width * width);
    products = scratch.take<T>(step * p.width * width);
    row_sums = scratch.take<T>(kBlockRows * row);
    before = scratch.take<T>(kBlockRows * row);
    after = scratch.take<T>(kBlockRows * row);
    drops = scratch.take<T>(chunk * row);
    fars = scratch.take<T>(chunk * row);
    ones = scratch.take<T>(map.pitch + map.d_pitch + map.dv_pitch);
    scales = scratch.take<T>(map.pitch + map.d_pitch + map.dv_pitch);
    size = scratch.used;
  }
};

template <class T>
void clear(T* to, ptrdiff_t count) {
  for (ptrdiff_t i = 0; i < count; ++i) to[i] = 0;
}

// sum_c grad_out * (P v) of both softmaxes; the second product is what the first leaves of twice the output.
template <class E, class T>
void read_deltas(const Params& p, int64_t batch, int head, const BackwardScratch<T>& w) {
  constexpr int L = kLanes<T>;
  const View first = saved_product<E>(p, 0);
  for (int y = 0; y < p.height; ++y)
    for (int x = 0; x < p.width; ++x) {
      const E *g = token<const E>(p.grad_out, batch, head, y, x),
              *out = token<const E>(p.out, batch, head, y, x);
      const E* one = token<const E>(first, batch, head, y, x);
      Vec<T> sum1 = {}, sum2 = {};
      for (int c = 0; c < p.value_dim; c += L) {
        const int count = imin(L, p.value_dim - c);
        const Vec<T> gc = load_first(g + c, count), mine = load_first(one + c, count);
        sum1 += gc * mine;
        sum2 += gc * (T(2) * load_first(out + c, count) - mine);
      }
      w.delta1[static_cast<ptrdiff_t>(y) * w.map.pitch + x] = across<T>(sum1);
      w.delta2[static_cast<ptrdiff_t>(y) * w.map.pitch + x] = across<T>(sum2);
    }
}

// A block of queries and the chunk [r0, r1) of keys.
template <class T>
struct Backward {
  static constexpr int L = kLanes<T>;
  const Map<T>& map;
  const Block<T>& block;
  const BackwardScratch<T>& w;
  int r0, r1;
  bool decays;
  Vec<T> lse1[kBlockRows], lse2[kBlockRows], delta1[kBlockRows], delta2[kBlockRows];

  ptrdiff_t key(int r) const { return static_cast<ptrdiff_t>(r - r0) * map.width * L; }

  // Whether a factor may not fit into a float: a score far above what its softmax adds up to, or one softmax
  // far above the other.
  bool far_apart(int keys, int v) const {
    const Vec<T> between_both = lse1[v] - lse2[v];
    Vec<T> top = vmax(between_both, -between_both);
    const T* s = w.scores + v * L;
    for (int i = 0; i < keys; ++i, s += block.width) top = vmax(load(s) - lse1[v], top);
    bool apart = false;
    for (int i = 0; i < L; ++i) apart |= !(top[i] < T(40));
    return apart;
  }

  // Of one tile: scores <- weights, products <- gradients of the scores; the decays' sums grow.
  template <bool Logits, bool Decays>
  __attribute__((noinline)) void differentiate(int t0, int t1, int v) const {
    T *s = w.scores + v * L, *dp = w.products + v * L;
    T* sums = w.row_sums + static_cast<ptrdiff_t>(v) * map.width * L;
    const T* near = w.factors.near_row(map, v);
    const int y = block.y0 + v;
    // Stores might change what is behind a reference, as far as the compiler knows.
    const int columns = map.width;
    const ptrdiff_t width = block.width;
    const Vec<T> shift1 = lse1[v], shift2 = lse2[v], mean1 = delta1[v], mean2 = delta2[v];
    const Vec<T> half = broadcast(T(0.5)), ratio = exp_softmax<T>(lse1[v] - lse2[v]);
    for (int r = t0; r < t1; ++r) {
      if (Decays && r == y) copy_sums(v, w.before);
      const T *drop = w.factors.drop_row(map, v, r, r0, r1), *far = w.factors.far_row(map, r);
      T *drops = w.drops + key(r), *fars = w.fars + key(r);
      const Vec<T> log_fall = block.log_fall(map, v, r);
      const Vec<T> fall = exp_softmax<T>(log_fall) * ratio;
      const T later = r < y ? T(1) : r > y ? T(-1) : T(0);
      Vec<T> falls = {};
      for (int l = 0; l < columns; ++l, s += width, dp += width) {
        Vec<T> p1, p2;
        if constexpr (Logits) {
          p1 = exp_softmax<T>(load(s) + (block.log_near(map, v, l) + block.log_drop(map, v, r, l)) - shift1);
          p2 = exp_softmax<T>(load(s) + (block.log_far(map, r, l) + log_fall) - shift2);
        } else {
          const Vec<T> e = exp_softmax<T>(load(s) - shift1);
          p1 = e * (load(near + l * L) * drop[l]);
          p2 = e * (load(far + l * L) * fall);
        }
        p1 *= half;
        p2 *= half;
        const Vec<T> d1 = p1 * (load(dp) - mean1), d2 = p2 * (load(dp) - mean2);
        store(s, p1 + p2);
        store(dp, d1 + d2);
        if constexpr (Decays) {
          store(sums + l * L, load(sums + l * L) + d1);
          store(drops + l * L, load(drops + l * L) + d1 * later);
          store(fars + l * L, load(fars + l * L) + d2);
          falls += d2;
        }
      }
      if (!Decays) continue;
      if (r == y) copy_sums(v, w.after);
      T* mine = w.grad_down + static_cast<ptrdiff_t>(y) * map.pitch + block.x0;
      T* its = w.grad_down + static_cast<ptrdiff_t>(r) * map.pitch + block.x0;
      store(mine, load(mine) + falls * later);
      store(its, load(its) - falls * later);
    }
  }
  void copy_sums(int v, T* to) const {
    const ptrdiff_t row = static_cast<ptrdiff_t>(map.width) * L;
    for (ptrdiff_t i = v * row; i < (v + 1) * row; i += L) store(to + i, load(w.row_sums + i));
  }
  void differentiate(int t0, int t1, int v) const {
    if (far_apart((t1 - t0) * map.width, v))
      decays ? differentiate<true, true>(t0, t1, v) : differentiate<true, false>(t0, t1, v);
    else
      decays ? differentiate<false, true>(t0, t1, v) : differentiate<false, false>(t0, t1, v);
  }

  void run(bool logits, const Params& p, T* grad_q) const {
    const int rows = block.rows, width = block.width;
    for (int t = r0; t < r1; t += w.step) {
      const int t1 = imin(r1, t + w.step), keys = (t1 - t) * map.width;
      const ptrdiff_t first = static_cast<ptrdiff_t>(t) * map.width;
      const T *k = map.k + first * map.d_pitch, *v = map.v + first * map.dv_pitch;
      T *grad_k = w.grad_k + first * map.d_pitch, *grad_v = w.grad_v + first * map.dv_pitch;
      multiply<T>(rows, {keys, map.d, k, map.d_pitch, 1, w.q, width, nullptr, 0, w.scores, width});
      if (logits)
        multiply<T>(rows, {keys, map.dv, v, map.dv_pitch, 1, w.g, width, nullptr, 0, w.products, width});
      for (int i = 0; i < rows; ++i) differentiate(t, t1, i);
      if (p.grad_v)
        multiply<T>(map.dv_pitch / L, {keys, width, w.scores, width, 1, w.g_tokens, map.dv_pitch, grad_v,
                                       map.dv_pitch, grad_v, map.dv_pitch});
      if (p.grad_k)
        multiply<T>(map.d_pitch / L, {keys, width, w.products, width, 1, w.q_tokens, map.d_pitch, grad_k,
                                      map.d_pitch, grad_k, map.d_pitch});
      if (p.grad_q)
        multiply<T>(rows, {map.d, keys, k, 1, map.d_pitch, w.products, width, grad_q, width, grad_q, width});
    }
    if (decays) collect();
  }

  // What the block's own rows get of D1: the sums over the chunk's keys are complete.
  void collect() const {
    for (int v = 0; v < block.rows; ++v) {
      const int y = block.y0 + v;
      const ptrdiff_t at = static_cast<ptrdiff_t>(v) * map.width * L;
      T *sums = w.row_sums + at, *before = w.before + at, *after = w.after + at;
      T* along = w.grad_along + static_cast<ptrdiff_t>(y) * map.pitch;
      Vec<T> lanes = {};
      for (int l = 0; l < map.width; ++l) {
        const Vec<T> sum = load(sums + l * L), directed = towards<T>(sum, block.columns, l);
        lanes += directed;
        // Rows of keys above the query's less those below.
        Vec<T> down = y < r0 ? -sum : sum;
        if (y >= r0 && y < r1) down = load(before + l * L) - (sum - load(after + l * L));
        store(before + l * L, down);
        store(sums + l * L, -directed);
      }
      store(along + block.x0, load(along + block.x0) + lanes);
      add_across(along, sums, map.width);
      add_across(w.grad_down + static_cast<ptrdiff_t>(y) * map.pitch, before, map.width);
    }
  }
};

// The chunk's rows of keys get their share of D2 along the row, the same for all blocks in a tile of columns.
template <class T>
void collect_fars(const Map<T>& map, const Block<T>& block, const BackwardScratch<T>& w, int r0, int r1) {
  constexpr int L = kLanes<T>;
  for (int r = r0; r < r1; ++r) {
    T* fars = w.fars + static_cast<ptrdiff_t>(r - r0) * map.width * L;
    T* along = w.grad_along + static_cast<ptrdiff_t>(r) * map.pitch;
    Vec<T> lanes = {};
    for (int l = 0; l < map.width; ++l) {
      const Vec<T> directed = towards<T>(load(fars + l * L), block.columns, l);
      lanes += directed;
      store(fars + l * L, -directed);
    }
    store(along + block.x0, load(along + block.x0) + lanes);
    add_across(along, fars, map.width);
  }
}

template <class E, class T>
void backward_chunk(const Params& p, int64_t batch, int head, BackwardScratch<T>& w, int r0, int r1,
                    bool logits, bool decays) {
  constexpr int L = kLanes<T>;
  const ptrdiff_t keys = static_cast<ptrdiff_t>(r1 - r0) * p.width;
  if (decays) clear(w.drops, keys * L);
  for (int tile = 0; tile < w.map.column_tiles(); ++tile) {
    const Block<T> column(w.map, 0, 1, tile);
    w.factors.fill_far(w.map, column, r0, r1);
    if (decays) clear(w.fars, keys * L);
    int y = 0;
    for (int blocks = ceil_div(p.height, kBlockRows); blocks > 0; --blocks) {
      const Block<T> block(w.map, y, ceil_div(p.height - y, blocks), tile);
      block.template read<E>(p.q, batch, head, p.head_dim, static_cast<T>(p.scale), w.q);
      block.template read<E>(p.grad_out, batch, head, p.value_dim, T(1), w.g);
      if (p.grad_k)
        block.template read_tokens<E>(p.q, batch, head, p.head_dim, static_cast<T>(p.scale), w.q_tokens);
      if (p.grad_v) block.template read_tokens<E>(p.grad_out, batch, head, p.value_dim, T(1), w.g_tokens);
      w.factors.fill_block(w.map, block, r0, r1);
      Backward<T> task{w.map, block, w, r0, r1, decays, {}, {}, {}, {}};
      for (int v = 0; v < block.rows; ++v) {
        task.lse1[v] = block.read_numbers(plane<const T>(p.lse, 0, batch, head), p.width, v);
        task.lse2[v] = block.read_numbers(plane<const T>(p.lse, 1, batch, head), p.width, v);
        task.delta1[v] = block.read_numbers(w.delta1, w.map.pitch, v);
        task.delta2[v] = block.read_numbers(w.delta2, w.map.pitch, v);
      }
      if (decays) clear(w.row_sums, static_cast<ptrdiff_t>(block.rows) * p.width * L);
      // The blocks of a tile of columns lie one after the other.
      task.run(logits, p, w.grad_q + (static_cast<ptrdiff_t>(tile) * p.height + y) * p.head_dim * L);
      y += block.rows;
    }
    if (decays) collect_fars(w.map, column, w, r0, r1);
  }
  if (!decays) return;
  for (ptrdiff_t i = 0; i < keys * L; i += L) store(w.drops + i, -load(w.drops + i));
  for (int r = r0; r < r1; ++r)
    add_across(w.grad_down + static_cast<ptrdiff_t>(r) * w.map.pitch,
               w.drops + static_cast<ptrdiff_t>(r - r0) * p.width * L, p.width);
}

template <class E, class T>
void write_gradients(const Params& p, int64_t batch, int head, const BackwardScratch<T>& w) {
  constexpr int L = kLanes<T>;
  if (p.grad_k) write_map<E>(p, p.grad_k, batch, head, p.head_dim, w.ones, w.grad_k);
  if (p.grad_v) write_map<E>(p, p.grad_v, batch, head, p.value_dim, w.ones, w.grad_v);
  for (int tile = 0; p.grad_q && tile < w.map.column_tiles(); ++tile) {
    int y = 0;
    for (int blocks = ceil_div(p.height, kBlockRows); blocks > 0; --blocks) {
      const Block<T> block(w.map, y, ceil_div(p.height - y, blocks), tile);
      const T* from = w.grad_q + (static_cast<ptrdiff_t>(tile) * p.height + y) * p.head_dim * L;
      for (int v = 0; v < block.rows; ++v)
        unpack(token<E>(p.grad_q, batch, head, y + v, block.x0), p.grad_q.stride[4], p.grad_q.stride[2],
               from + v * L, block.width, p.head_dim, block.lanes, w.scales);
      y += block.rows;
    }
  }
  by_decay<E>(p, [&](auto d) {
    using D = decltype(d);
    for (int y = 0; p.grad_log_decay_w && y < p.height; ++y)
      differentiate_sums(w.grad_along + static_cast<ptrdiff_t>(y) * w.map.pitch, 1, p.width,
                         token<D>(p.grad_log_decay_w, batch, head, y, 0), p.grad_log_decay_w.stride[2]);
    for (int x = 0; p.grad_log_decay_h && x < p.width; ++x)
      differentiate_sums(w.grad_down + x, w.map.pitch, p.height,
                         token<D>(p.grad_log_decay_h, batch, head, 0, x), p.grad_log_decay_h.stride[1]);
  });
}

template <class E>
void backward_range(const Params& p, int64_t begin, int64_t end, void* memory) {
  using T = Compute<E>;
  BackwardScratch<T> w(p, Scratch(memory));
  const bool decays = p.grad_log_decay_w || p.grad_log_decay_h, logits = decays || p.grad_q || p.grad_k;
  for (int i = 0; i < w.map.pitch + w.map.d_pitch + w.map.dv_pitch; ++i) {
    w.ones[i] = 1;
    w.scales[i] = static_cast<T>(p.scale);
  }
  // Lanes beyond the map take part in tiles and must hold numbers.
  const ptrdiff_t plane = static_cast<ptrdiff_t>(p.height) * w.map.pitch;
  clear(w.products, static_cast<ptrdiff_t>(w.step) * p.width * kBlockRows * kLanes<T>);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t batch = item / p.heads;
    const int head = static_cast<int>(item % p.heads);
    w.map.template read<E>(p, batch, head);
    read_deltas<E>(p, batch, head, w);
    clear(w.grad_k, static_cast<ptrdiff_t>(w.map.tokens) * w.map.d_pitch);
    clear(w.grad_v, static_cast<ptrdiff_t>(w.map.tokens) * w.map.dv_pitch);
    clear(w.grad_q, plane * p.head_dim);
    clear(w.grad_along, plane);
    clear(w.grad_down, plane);
    for (int r = 0; r < p.height; r += w.chunk)
      backward_chunk<E>(p, batch, head, w, r, imin(p.height, r + w.chunk), logits, decays);
    write_gradients<E>(p, batch, head, w);
  }
}

// ---- by dtype

int64_t backward_items(const Params& p) {
  return p.batch * p.heads;
}
size_t backward_scratch(const Params& p) {
  return p.dtype == DType::f64 ? BackwardScratch<double>(p, Scratch(nullptr)).size
                               : BackwardScratch<float>(p, Scratch(nullptr)).size;
}
void backward(const Params& p, int64_t begin, int64_t end, void* scratch) {
  with_dtype(p.dtype, [&](auto element) { backward_range<decltype(element)>(p, begin, end, scratch); });
}

}  // namespace

const Loop kWholeBackward = {backward_items, backward_scratch, backward};

}  // namespace VITKERNELS_ISA
}  // namespace vitkernels::polyline_path_attention

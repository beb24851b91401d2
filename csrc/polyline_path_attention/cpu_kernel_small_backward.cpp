// Polyline path attention of small whole maps, backward, on one core and one instruction set.
//
// Floor of a map of N tokens: 2 N^2 (3 d + 2 dv) FLOPs and 2 N^2 exponentials.
//
// Nothing but the softmaxes' logarithms is saved by the forward pass: the sums over P dP come from a tile of
// queries itself, which has all keys. With dP = grad_out v^T / 2, D1 = P1 (dP - sum P1 dP) and D2 likewise
// are the gradients of the logits, D1 + D2 that of the scores. Of the decays, with later(a, b) = 1, 0, -1
// where a is after, at, before b:
//   dCw[i, j] += later(j, l) D1, dCw[i, l] -= the same     the way along the query's row i, for D1
//   dCh[i, l] += later(i, r) D1, dCh[r, l] -= the same     the way down the key's column l
// and for D2 along the key's row r and down the query's column j.
#include "small_cpu.h"

namespace vitkernels::polyline_path_attention {
namespace VITKERNELS_ISA {
namespace {

// What depends on the type that is computed in alone, so that tensors of half precision share it.
template <class T>
struct Gradients {
  using V = Vec<T>;
  static constexpr int L = kLanes<T>;

  int height, width, tokens;
  Tiling<T> tiling;
  Scratch scratch;
  SmallMap<T> map;
  T* lse;                                          // of both softmaxes
  T *dalong, *ddown, *dalong_turns, *ddown_turns;  // gradients of the sums of decays, as the map has those
  T *keys_along, *keys_down;                       // [key][lane]: the same, to be added across the lanes
  T *s, *ds, *second;                              // of a tile; P2 of one vector of it
  T *sums, *turns;                                 // [l][lane] of a vector of queries

  Gradients(const Params& p, void* memory)
      : height(p.height),
        width(p.width),
        tokens(height * width),
        tiling(tokens),
        scratch(memory),
        map(p, tiling, scratch) {
    const size_t all = tokens, turned = static_cast<size_t>(height) * map.turn;
    T** const planes[] = {&dalong, &ddown};
    for (T** plane : planes) *plane = scratch.take<T>(map.padded);
    lse = scratch.take<T>(2 * static_cast<size_t>(map.padded));
    T** const turning[] = {&dalong_turns, &ddown_turns};
    for (T** plane : turning) *plane = scratch.take<T>(turned);
    T** const by_keys[] = {&keys_along, &keys_down, &second};
    for (T** vectors : by_keys) *vectors = scratch.take<T>(all * L);
    s = scratch.take<T>(all * tiling.width);
    ds = scratch.take<T>(all * tiling.width);
    T** const by_columns[] = {&sums, &turns};
    for (T** vectors : by_columns) *vectors = scratch.take<T>(static_cast<size_t>(width) * L);
  }

  // Of L queries from `first` on, which are lanes of the tile: s, scores, becomes P1 + P2; ds, the gradients
  // of those, becomes D1 + D2; the decays' sums grow.
  template <bool Decays>
  __attribute__((noinline)) void differentiate(int first, int lane, Ahead& ahead) const {
    const typename SmallMap<T>::Queries at = map.find(first);
    const int columns = width, rows = height, keys = tokens, turn = map.turn;
    const ptrdiff_t pitch = tiling.width;
    const V lse1 = load(lse + first), lse2 = load(lse + map.padded + first);
    V mean1 = {}, mean2 = {}, sum1 = {}, sum2 = {};
    // Stores might change what is behind `this`, as far as the compiler knows.
    const T *grad = ds + lane, *later_l = map.later_columns;
    T *const sums_l = sums, *const turns_l = turns;
    T *score = s + lane, *other = second;
    for (int l = 0; l < columns * L; l += L) store(sums_l + l, V{}), store(turns_l + l, V{});
    for (int r = 0; r < rows; ++r) {
      const typename SmallMap<T>::Masks masks = map.masks(at, r);
      for (int l = 0; l < columns; ++l, score += pitch, other += L) {
        const V x = load(score);
        store(score, x + masks.first(l) - lse1);
        store(other, x + masks.second(l) - lse2);
      }
    }
    // Apart from the masks: with them there would be too much at once for the processor to overlap.
    score = s + lane, other = second;
    for (int key = 0; key < keys;) {
      V run1 = {}, run2 = {}, weights1 = {}, weights2 = {};
      for (const int end = imin(keys, key + kRun); key < end;
           ++key, score += pitch, grad += pitch, other += L) {
        const V p1 = exp_softmax<T>(load(score)), p2 = exp_softmax<T>(load(other)), dp = load(grad);
        store(score, p1);
        store(other, p2);
        run1 += p1 * dp;
        run2 += p2 * dp;
        weights1 += p1;
        weights2 += p2;
      }
      mean1 += run1;
      mean2 += run2;
      sum1 += weights1;
      sum2 += weights2;
    }
    const V inverse1 = undo_rounding_of_lse<T>(sum1), inverse2 = undo_rounding_of_lse<T>(sum2);
    mean1 *= inverse1;
    mean2 *= inverse2;
    V own_along = {}, own_down = {};
    T *gradient = ds + lane, *to_along = keys_along, *to_down = keys_down;
    score = s + lane, other = second;
    for (int r = 0; r < rows; ++r) {
      ahead.step();
      const V later = towards<T>(broadcast(T(1)), at.rows, r);
      V fall = {}, far = {};
      for (int l = 0; l < columns; ++l, score += pitch, gradient += pitch, other += L) {
        const V p1 = load(score) * inverse1, p2 = load(other) * inverse2, dp = load(gradient);
        const V d1 = p1 * (dp - mean1), d2 = p2 * (dp - mean2);
        store(score, p1 + p2);
        store(gradient, d1 + d2);
        if constexpr (Decays) {
          const V drop = later * d1, along_row = load(later_l + l * L) * d2;
          store(sums_l + l * L, load(sums_l + l * L) + d1);
          store(turns_l + l * L, load(turns_l + l * L) + drop);
          store(to_down, load(to_down) - drop);
          store(to_along, load(to_along) - along_row);
          fall += d2;
          far += along_row;
          to_down += L;
          to_along += L;
        }
      }
      if constexpr (Decays) {
        fall *= later;
        own_down += fall;
        T *far_to = dalong_turns + r * turn + at.column, *fall_to = ddown_turns + r * turn + at.column;
        store(far_to, load(far_to) + far);
        store(fall_to, load(fall_to) - fall);
      }
    }
    if constexpr (Decays) {
      for (int l = 0; l < columns; ++l) {
        const V directed = load(later_l + l * L) * load(sums_l + l * L), turned = load(turns_l + l * L);
        own_along += directed;
        for (int row = at.row, from = 0, to = columns - at.column; from < L && row < rows;
             ++row, from = to, to += columns) {
          const IntVec<T> mine = at.rows == static_cast<typename Bits<T>::type>(row);
          T *key_along = keys_along + (row * columns + l) * L,
            *key_down = keys_down + (row * columns + l) * L;
          store(key_along, load(key_along) - (mine ? directed : V{}));
          store(key_down, load(key_down) + (mine ? turned : V{}));
        }
      }
      store(dalong + first, load(dalong + first) + own_along);
      store(ddown + first, load(ddown + first) + own_down);
    }
  }
};

template <class E>
struct Backward : Gradients<Compute<E>> {
  using T = Compute<E>;
  using Base = Gradients<T>;
  using Base::dalong;
  using Base::dalong_turns;
  using Base::ddown;
  using Base::ddown_turns;
  using Base::ds;
  using Base::height;
  using Base::keys_along;
  using Base::keys_down;
  using Base::lse;
  using Base::map;
  using Base::s;
  using Base::scratch;
  using Base::tiling;
  using Base::tokens;
  using Base::width;
  static constexpr int L = kLanes<T>;

  const Params& p;
  int d_pitch, v_pitch;
  T *q, *k, *v, *g, *dq, *dk, *dv;  // [token][channel]
  T *q_lanes, *g_lanes;             // of a tile
  T *ones, *scales;
  size_t size;

  Backward(const Params& p, void* memory)
      : Base(p, memory),
        p(p),
        d_pitch(round_up_lanes<T>(p.head_dim)),
        v_pitch(round_up_lanes<T>(p.value_dim)) {
    const size_t all = tokens;
    T** const of_logits[] = {&q, &k, &dq, &dk};
    for (T** tensor : of_logits) *tensor = scratch.template take<T>(all * d_pitch);
    T** const of_values[] = {&v, &g, &dv};
    for (T** tensor : of_values) *tensor = scratch.template take<T>(all * v_pitch);
    q_lanes = scratch.template take<T>(p.head_dim * tiling.width);
    g_lanes = scratch.template take<T>(p.value_dim * tiling.width);
    ones = scratch.template take<T>(d_pitch + v_pitch);
    scales = scratch.template take<T>(d_pitch);
    size = scratch.used;
  }

  // What `run` of an item reads and writes.
  Ahead ahead_of(int64_t item, bool wanted) const {
    Ahead ahead(p, wanted ? tokens : 0, ceil_div(tokens, L) * height);
    const int64_t batch = item / p.heads;
    const int head = static_cast<int>(item % p.heads);
    const View* const of_logits[] = {&p.q, &p.k, &p.grad_q, &p.grad_k};
    const View* const of_values[] = {&p.v, &p.grad_out, &p.grad_v};
    for (const View* view : of_logits) ahead.add<E>(*view, batch, head, 0, p.head_dim);
    for (const View* view : of_values) ahead.add<E>(*view, batch, head, 0, p.value_dim);
    return ahead;
  }

  void run(int64_t batch, int head, Ahead ahead) const {
    const bool decays = p.grad_log_decay_w || p.grad_log_decay_h;
    read(batch, head);
    const auto result = [&](const View& view, int channels, T* scratch) {
      return Result<E>(p, view, batch, head, 0, height, channels, tokens, scratch);
    };
    const Result<E> to_q = result(p.grad_q, p.head_dim, dq), to_k = result(p.grad_k, p.head_dim, dk),
                    to_v = result(p.grad_v, p.value_dim, dv);
    for (int tile = 0; tile < tiling.count; ++tile) {
      const int begin = tiling.start(tile), lanes = tiling.lanes(tile), pitch = tiling.width;
      const int vecs = ceil_div(lanes, L);
      const T *tile_q = q + static_cast<ptrdiff_t>(begin) * d_pitch,
              *tile_g = g + static_cast<ptrdiff_t>(begin) * v_pitch;
      pack(q_lanes, pitch, tile_q, 1, d_pitch, p.head_dim, lanes, T(1));
      pack(g_lanes, pitch, tile_g, 1, v_pitch, p.value_dim, lanes, T(1));
      multiply<T>(vecs, {tokens, p.head_dim, k, d_pitch, 1, q_lanes, pitch, nullptr, 0, s, pitch});
      multiply<T>(vecs, {tokens, p.value_dim, v, v_pitch, 1, g_lanes, pitch, nullptr, 0, ds, pitch});
      for (int i = 0; i < vecs; ++i)
        decays ? this->template differentiate<true>(begin + i * L, i * L, ahead)
               : this->template differentiate<false>(begin + i * L, i * L, ahead);
      const auto add = [&](const Result<E>& to) { return tile ? to.data : nullptr; };
      if (p.grad_v)
        multiply<T>(v_pitch / L, {tokens, lanes, s, pitch, 1, tile_g, v_pitch, add(to_v), to_v.step,
                                  to_v.data, to_v.step});
      if (p.grad_k)
        multiply<T>(d_pitch / L, {tokens, lanes, ds, pitch, 1, tile_q, d_pitch, add(to_k), to_k.step,
                                  to_k.data, to_k.step});
      if (p.grad_q)
        multiply<T>(d_pitch / L, {lanes, tokens, ds, 1, pitch, k, d_pitch, nullptr, 0, to_q.at(begin),
                                  to_q.step, nullptr, scales});
    }
    to_q.deliver(ones), to_k.deliver(ones), to_v.deliver(ones);
    if (decays) write_decays(batch, head);
  }

  void read(int64_t batch, int head) const {
    read_map<E>(p, p.q, batch, head, p.head_dim, static_cast<T>(p.scale), q);
    read_map<E>(p, p.k, batch, head, p.head_dim, T(1), k);
    read_map<E>(p, p.v, batch, head, p.value_dim, T(1), v);
    read_map<E>(p, p.grad_out, batch, head, p.value_dim, T(0.5), g);
    map.read(p, batch, head);
    // A lane beyond the map gets probability 0.
    for (int which = 0; which < 2; ++which) {
      const T* from = plane<const T>(p.lse, which, batch, head);
      T* to = lse + which * map.padded;
      for (int i = 0; i < tokens; ++i) to[i] = from[i];
      for (int i = tokens; i < map.padded; ++i) to[i] = static_cast<T>(__builtin_inff());
    }
    for (int i = 0; i < map.padded; ++i) dalong[i] = ddown[i] = 0;
    for (int i = 0; i < height * map.turn; ++i) dalong_turns[i] = ddown_turns[i] = 0;
    for (int i = 0; i < tokens * L; ++i) keys_along[i] = keys_down[i] = 0;
    for (int i = 0; i < d_pitch + v_pitch; ++i) ones[i] = 1;
    for (int i = 0; i < d_pitch; ++i) scales[i] = static_cast<T>(p.scale);
  }

  void write_decays(int64_t batch, int head) const {
    const int turn = map.turn;
    add_across(dalong, keys_along, tokens);
    add_across(ddown, keys_down, tokens);
    map.for_turns([&](int y, int begin, int count) {
      for (int x = 0; x < count; ++x) {
        dalong[y * width + x] += dalong_turns[y * turn + begin + x];
        ddown[y * width + x] += ddown_turns[y * turn + begin + x];
      }
    });
    by_decay<E>(p, [&](auto d) {
      using D = decltype(d);
      const View &w = p.grad_log_decay_w, &h = p.grad_log_decay_h;
      for (int y = 0; w && y < height; ++y)
        differentiate_sums(dalong + y * width, 1, width, token<D>(w, batch, head, y, 0), w.stride[2]);
      for (int x = 0; h && x < width; ++x)
        differentiate_sums(ddown + x, width, height, token<D>(h, batch, head, 0, x), h.stride[1]);
    });
  }
};

int64_t items(const Params& p) {
  return p.batch * p.heads;
}
size_t scratch_size(const Params& p) {
  return with_dtype(p.dtype, [&](auto e) { return Backward<decltype(e)>(p, nullptr).size; });
}
void run(const Params& p, int64_t begin, int64_t end, void* scratch) {
  with_dtype(p.dtype, [&](auto e) {
    const Backward<decltype(e)> backward(p, scratch);
    for (int64_t item = begin; item < end; ++item)
      backward.run(item / p.heads, static_cast<int>(item % p.heads),
                   backward.ahead_of(item + 1, item + 1 < end));
  });
}

}  // namespace

const Loop kSmallBackward = {items, scratch_size, run};

}  // namespace VITKERNELS_ISA
}  // namespace vitkernels::polyline_path_attention

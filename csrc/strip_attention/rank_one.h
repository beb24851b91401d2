// Strip attention with one channel a query and a key (r = 1) and no bias, in half precision and float: what
// its kernels share.
//
// Scores are an outer product s q_n k_m, so a tile of probabilities is built in registers, where the tensor
// core wants its left operand: no product q k^T, no tile of scores in shared memory. The largest score of a
// row is known beforehand, since it belongs to the largest or the smallest key: no running maximum, no
// rescaling, and the probabilities of 16 keys at a time are all that is held. (Float has no such operand: the
// probabilities of a step pass through 16 rows of shared memory.)
//
// With kx the key whose score is the largest, a score minus the maximum is taken as q' (k_m - kx), q' = s
// unit q_n, and not as q' k_m - q' kx. It then never exceeds zero and is exactly zero at kx, even where the
// maximum is so large that one ulp of it would overflow the exponential. The backward has no use for lse,
// which is as large: its exponents would inherit the rounding.
//
// Floor per batch entry and head for N queries, M keys and dv channels: forward N M exponentials, 2 N M dv
// FLOPs and (N (1 + dv) + M (1 + dv)) sizeof(T) bytes; backward 2 N M exponentials, 6 N M dv FLOPs and (N (2
// + 2 dv) + M (4 + 4 dv)) sizeof(T) bytes (grad_out is read by both kernels). On an H200 the stages at 224
// pixels (M = 49) are bound by the bytes, from M of about 200 on the exponentials are.
#pragma once
#include <cmath>

#include "strip_attention.h"
#include "vitkernels/tile_attention_engine.h"

namespace vitkernels::strip_attention::rank_one {

using tile_attention::BLOCK_THREADS;
using tile_attention::Carver;
using tile_attention::clear;
using tile_attention::Exponential;
using tile_attention::Group;
using tile_attention::leading_dimension;
using tile_attention::load_tile;
using tile_attention::offset;
using tile_attention::present;
using tile_attention::round_up;
using tile_attention::Span;
using tile_attention::store_tile;
using tile_attention::write_sums;

constexpr int TILE = 64;  // tokens in a tile that streams in
constexpr int WARPS = BLOCK_THREADS / 32;
constexpr int RESIDENT_BYTES = 36 * 1024;  // tiles of values stay in shared memory if all take no more
constexpr int WIDEST_HALF = 128;           // dv whose sums fit the registers
constexpr int WIDEST_FLOAT = 112;          // dv for which two tiles of float and the warps' rows fit

// All that the kernels are told. `partials`, `rows`: see backward. A unit is a head of a batch entry.
struct Call {
  int heads, queries, keys, value_dim;
  int64_t units;
  double scale;
  View q, k, v, out, lse, grad_out, grad_lse, grad_q, grad_k, grad_v;
  int tiles = 0;   // of the side that owns results, in a unit
  int chunks = 1;  // forward and queries: of `tiles`; keys: of the queries' tiles
  int tiles_per_chunk = 0;
  void* rows = nullptr;
  void* partials = nullptr;

  explicit Call(const Params& params)
      : heads(params.heads),
        queries(static_cast<int>(params.queries)),
        keys(static_cast<int>(params.keys)),
        value_dim(params.value_dim),
        units(params.batch * params.heads),
        scale(params.scale),
        q(params.q),
        k(params.k),
        v(params.v),
        out(params.out),
        lse(params.lse),
        grad_out(params.grad_out),
        grad_lse(params.grad_lse),
        grad_q(params.grad_q),
        grad_k(params.grad_k),
        grad_v(params.grad_v) {}
};

VK_HOST_DEVICE int tiles_of(int tokens, int rows) {
  return (tokens + rows - 1) / rows;
}

// Tokens in even distances: the map that Matrix asks for.
struct Even {};
template <class T>
using Matrix = tile_attention::Matrix<T, Even>;

// The tensors of one unit.
struct Unit {
  int64_t index;
  int batch, head;

  VK_DEVICE Unit(const Call& call, int64_t index)
      : index(index),
        batch(static_cast<int>(index / call.heads)),
        head(static_cast<int>(index % call.heads)) {}

  template <class T>
  VK_DEVICE Matrix<T> matrix(const View& view, int channels) const {
    return Matrix<T>(view, Even{}, batch, head, channels);
  }
  // A tensor with one value a token: [batch, heads, tokens(, 1)].
  template <class T>
  VK_DEVICE T& scalar(const View& view, int token) const {
    return offset<T>(view, batch, head)[token * view.stride[2]];
  }
};

// The largest and the smallest key of a unit.
template <class Acc>
struct Extremes {
  Acc largest, smallest;

  // The key with the largest score.
  VK_DEVICE Acc of(Acc q) const { return q >= Acc(0) ? largest : smallest; }

  // From where the backward measures keys, whose moments then cancel least: the middle where all scores are
  // near each other (2^8 between the largest probability and the least), else the key that has most of the
  // weight.
  VK_DEVICE Acc origin(Acc q) const {
    const Acc spread = q * (largest - smallest);
    return spread < Acc(8) && spread > Acc(-8) ? Acc(0.5) * largest + Acc(0.5) * smallest : of(q);
  }
};

// All threads take part and receive the result; `scratch` holds 2 WARPS values and is free again after the
// next barrier.
template <class T, class Acc>
VK_DEVICE Extremes<Acc> find_extremes(const Call& call, const Unit& unit, Acc* scratch) {
  Acc largest = -INFINITY, negated = -INFINITY;
  const T* const keys = offset<T>(call.k, unit.batch, unit.head);
  for (int m = thread_x(); m < call.keys; m += BLOCK_THREADS) {
    const Acc key = to_accumulate(keys[m * call.k.stride[2]]);
    largest = key > largest ? key : largest;
    negated = -key > negated ? -key : negated;
  }
  largest = warp_max(largest);
  negated = warp_max(negated);
  if (lane_id() == 0) {
    scratch[warp_id()] = largest;
    scratch[WARPS + warp_id()] = negated;
  }
  sync_block();
  VK_UNROLL
  for (int warp = 0; warp < WARPS; ++warp) {
    largest = scratch[warp] > largest ? scratch[warp] : largest;
    negated = scratch[WARPS + warp] > negated ? scratch[WARPS + warp] : negated;
  }
  return {largest, -negated};
}

// A step is 16 rows of a strip against 16 of a tile. Elements that a warp needs to hand on its probabilities.
template <class T>
constexpr int STEP = tile_attention::Engine<T, 16>::SCRATCH;

// The products of many steps are summed up tile by tile in float, as matrix libraries do: one running sum
// over all tokens would err several times as much.
template <class Acc, int STRIPS, int BLOCKS>
VK_DEVICE void add(Acc (&sums)[STRIPS][BLOCKS][4], const Acc (&part)[STRIPS][BLOCKS][4]) {
  VK_UNROLL
  for (int s = 0; s < STRIPS; ++s) {
    VK_UNROLL
    for (int j = 0; j < BLOCKS; ++j) {
      VK_UNROLL
      for (int c = 0; c < 4; ++c) sums[s][j][c] += part[s][j][c];
    }
  }
}
template <class Acc, int STRIPS, int BLOCKS>
VK_DEVICE void clear_all(Acc (&sums)[STRIPS][BLOCKS][4]) {
  VK_UNROLL
  for (int s = 0; s < STRIPS; ++s) clear(sums[s]);
}

// Rows of this warp as the left operand of many products: in registers, or in its slab.
template <class T, int COLUMNS, int STRIPS>
class Rows {
 public:
  using Acc = accumulate_t<T>;

  // Rows `first` and on of a tensor, zeros from `count` on.
  VK_DEVICE void load(const Matrix<T>& source, int first, int count, T* slab, int ld) {
    sync_warp();  // the rows before these may still be read
    VK_UNROLL
    for (int s = 0; s < STRIPS; ++s) {
      load_tile(slab + 16 * s * ld, ld, source, Group<16>(), [&](int slot) {
        const int token = first + 16 * s + slot;
        return token < count ? token : -1;
      });
    }
    cp_async_commit();
    cp_async_wait<0>();
    sync_warp();
    slab_ = slab;
    depth_ = round_up(source.channels, 16);
    if constexpr (!PLAIN) {
      const T* row = slab + (lane_id() & 15) * ld + (lane_id() >> 4) * 8;
      VK_UNROLL
      for (int s = 0; s < STRIPS; ++s) {
        VK_UNROLL
        for (int c = 0; c < COLUMNS / 16; ++c) {
          if (16 * c >= depth_) break;
          ldmatrix_x4(fragments_[s][c], row + 16 * s * ld + 16 * c);
        }
      }
    }
  }

  // products = rows times those of a step, over all channels.
  VK_DEVICE void multiply(Acc (&products)[STRIPS][2][4], const T* step, int ld) const {
    clear_all(products);
    if constexpr (PLAIN) {
      VK_UNROLL
      for (int s = 0; s < STRIPS; ++s)
        tile_attention::Plain<T, 16>::multiply_rows(products[s], slab_ + 16 * s * ld, ld, step, ld, depth_,
                                                    Span{0, 16});
    } else {
      const int lane = lane_id();
      step += ((lane & 7) + (lane >> 4) * 8) * ld + ((lane >> 3) & 1) * 8;
      VK_UNROLL
      for (int c = 0; c < COLUMNS / 16; ++c) {
        if (16 * c >= depth_) break;
        uint32_t right[4];
        ldmatrix_x4(right, step + 16 * c);
        VK_UNROLL
        for (int s = 0; s < STRIPS; ++s) {
          mma_m16n8k16<T>(products[s][0], fragments_[s][c], {right[0], right[1]});
          mma_m16n8k16<T>(products[s][1], fragments_[s][c], {right[2], right[3]});
        }
      }
    }
  }

 private:
  static constexpr bool PLAIN = std::is_floating_point_v<T>;
  uint32_t fragments_[STRIPS][PLAIN ? 1 : COLUMNS / 16][4];
  const T* slab_;
  int depth_;
};

// sums += p times the rows of a step, for `blocks` blocks of 8 columns.
template <class T, class Acc, int STRIPS, int BLOCKS>
VK_DEVICE void multiply_step(Acc (&sums)[STRIPS][BLOCKS][4], const Acc (&p)[STRIPS][2][4], T* scratch,
                             const T* step, int ld, int blocks) {
  if constexpr (std::is_floating_point_v<T>) {
    VK_UNROLL
    for (int s = 0; s < STRIPS; ++s)
      tile_attention::Plain<T, 16>::multiply_registers(sums[s], p[s], scratch, step, ld, blocks, Span{0, 16});
  } else {
    uint32_t left[STRIPS][4];
    VK_UNROLL
    for (int s = 0; s < STRIPS; ++s) {
      VK_UNROLL
      for (int i = 0; i < 4; ++i) left[s][i] = pack2<T>(p[s][i / 2][i % 2 * 2], p[s][i / 2][i % 2 * 2 + 1]);
    }
    step += (lane_id() & 15) * ld + (lane_id() >> 4) * 8;
    VK_UNROLL
    for (int j = 0; j < BLOCKS; j += 2) {
      if (j >= blocks) break;
      uint32_t right[4];
      ldmatrix_x4_trans(right, step + j * 8);
      VK_UNROLL
      for (int s = 0; s < STRIPS; ++s) {
        mma_m16n8k16<T>(sums[s][j], left[s], {right[0], right[1]});
        mma_m16n8k16<T>(sums[s][j + 1], left[s], {right[2], right[3]});
      }
    }
  }
}

// Tiles of keys and values in shared memory, for the kernels whose warps own queries: all of them, or two
// that take turns.
template <class T>
struct KeyLayout {
  using Acc = accumulate_t<T>;
  int ld;
  int values, keys, slabs, steps, scratch;
  int value_bytes;  // of a buffer
  int slab_rows;    // of a warp
  bool resident;
  int64_t bytes;

  KeyLayout(const Call& call, int slab_rows)
      : ld(leading_dimension<T>(call.value_dim)),
        value_bytes(TILE * ld * static_cast<int>(sizeof(T))),
        slab_rows(slab_rows),
        resident(tiles_of(call.keys, TILE) <= RESIDENT_BYTES / value_bytes || call.keys <= TILE) {
    const int buffers = resident ? tiles_of(call.keys, TILE) : 2;
    Carver carver;
    values = carver.take<T>(static_cast<int64_t>(buffers) * TILE * ld);
    keys = carver.take<Acc>(buffers * TILE);
    slabs = carver.take<T>(WARPS * slab_rows * ld);
    steps = carver.take<T>(WARPS * STEP<T>);
    scratch = carver.take<Acc>(2 * WARPS);
    bytes = carver.used();
  }
};

// Walks over the tiles of keys, once for each tile of queries: start(), then next() before each tile.
template <class T>
class KeyTiles {
 public:
  using Acc = accumulate_t<T>;

  VK_DEVICE KeyTiles(const Call& call, const KeyLayout<T>& layout, const Unit& unit, int rounds)
      : call_(call), layout_(layout), unit_(unit), count_(tiles_of(call.keys, TILE)), left_(rounds * count_) {
    if (layout.resident) left_ = count_;
    stage(0, 0);
  }

  // Makes tile `tile` the current one. A barrier for all threads, unless the tiles are resident and were here
  // before.
  VK_DEVICE void next(int tile) {
    buffer_ = layout_.resident ? tile : turn_ & 1;
    if (left_ == 0) return;
    cp_async_wait<0>();
    sync_block();  // the tile is there for all, and all are done with the other buffer
    ++turn_;
    if (--left_ > 0) {
      const int following = tile + 1 < count_ ? tile + 1 : 0;
      stage(following, layout_.resident ? following : turn_ & 1);
    }
  }
  VK_DEVICE const T* values() const {
    return reinterpret_cast<const T*>(shared_memory() + layout_.values + buffer_ * layout_.value_bytes);
  }
  VK_DEVICE const Acc* keys() const {
    return reinterpret_cast<const Acc*>(shared_memory() + layout_.keys) + buffer_ * TILE;
  }

 private:
  // Zeros in place of values that do not exist; of a key that does not, the unit's first.
  VK_DEVICE void stage(int tile, int buffer) const {
    const int first = tile * TILE, keys = call_.keys;
    load_tile(reinterpret_cast<T*>(shared_memory() + layout_.values + buffer * layout_.value_bytes),
              layout_.ld, unit_.template matrix<T>(call_.v, call_.value_dim), Group<TILE>(),
              [&](int slot) { return first + slot < keys ? first + slot : -1; });
    cp_async_commit();
    if (thread_x() < TILE) {
      const int token = first + thread_x() < keys ? first + thread_x() : 0;
      reinterpret_cast<Acc*>(shared_memory() + layout_.keys)[buffer * TILE + thread_x()] =
          to_accumulate(unit_.template scalar<T>(call_.k, token));
    }
  }

  const Call& call_;
  const KeyLayout<T>& layout_;
  const Unit& unit_;
  int count_;
  int left_;  // tiles that have not arrived
  int turn_ = 0;
  int buffer_ = 0;
};

// The work of a block of a kernel whose warps own queries: consecutive tiles of queries of one unit.
struct QueryItem {
  Unit unit;
  int begin, end;

  VK_DEVICE explicit QueryItem(const Call& call)
      : unit(call, block_x() / call.chunks), begin(block_x() % call.chunks * call.tiles_per_chunk) {
    end = begin + call.tiles_per_chunk < call.tiles ? begin + call.tiles_per_chunk : call.tiles;
  }
};

// More blocks than this gain nothing: a block then takes several tiles and loads its keys once.
constexpr int64_t ENOUGH_BLOCKS = 2048;

inline int64_t split_queries(Call* call, int rows) {
  call->tiles = tiles_of(call->queries, rows);
  const int64_t wanted = ENOUGH_BLOCKS / call->units;
  call->chunks = static_cast<int>(wanted < 1 ? 1 : wanted < call->tiles ? wanted : call->tiles);
  call->tiles_per_chunk = tiles_of(call->tiles, call->chunks);
  call->chunks = tiles_of(call->tiles, call->tiles_per_chunk);
  return call->units * call->chunks;
}

// Strips of 16 rows that a warp owns. With two each fragment of the other side's tile serves twice.
inline int strips(DType dtype, int tokens, int value_dim) {
  return dtype != DType::f32 && value_dim <= 64 && tokens > TILE ? 2 : 1;
}

// run(T(), COLUMNS, STRIPS) as constants.
template <class Run>
void with_shape(DType dtype, int tokens, int value_dim, Run run) {
  const auto of_type = [&](auto zero) {
    using T = decltype(zero);
    if (value_dim > 64) return run(T(), std::integral_constant<int, 128>(), std::integral_constant<int, 1>());
    if constexpr (!std::is_floating_point_v<T>) {
      if (strips(dtype, tokens, value_dim) == 2)
        return run(T(), std::integral_constant<int, 64>(), std::integral_constant<int, 2>());
    }
    return run(T(), std::integral_constant<int, 64>(), std::integral_constant<int, 1>());
  };
  if (dtype == DType::f32) return of_type(float());
  dtype == DType::f16 ? of_type(half_t()) : of_type(bfloat16_t());
}

// Whether these kernels run a call; the tile-attention core runs the others.
inline bool applies(const Params& params) {
  return params.key_dim == 1 && !params.bias && params.dtype != DType::f64 &&
         params.value_dim <= (params.dtype == DType::f32 ? WIDEST_FLOAT : WIDEST_HALF);
}

void forward(const Params& params, Stream stream);
void backward(const Params& params, Stream stream);
int64_t backward_workspace(const Params& params);

}  // namespace vitkernels::strip_attention::rank_one

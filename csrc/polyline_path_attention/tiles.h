// What the forward and the backward kernels do alike with a tile: the decays beside it, its logits, its
// result.
#pragma once
#include <cmath>

#include "field.h"

namespace vitkernels::polyline_path_attention {

using tile_attention::Carver;
using tile_attention::clear;
using tile_attention::Exponential;
using tile_attention::leading_dimension;
using tile_attention::load_tile;
using tile_attention::store_tile;
using tile_attention::write_sums;

template <class T>
using Engine = tile_attention::Engine<T, std::is_same_v<T, double> ? 16 : 64>;
// Where the tiles of an Engine<float> would not fit into shared memory.
using SmallEngine = tile_attention::Engine<float, 16>;

// The cumulative sums of one head of one map. Shared memory holds them times the exponential's unit.
template <class T>
struct Sums {
  using Acc = accumulate_t<T>;
  const Acc *along, *down;  // [height * width]; lines: that of their direction, in `along`

  VK_DEVICE static Acc scaled(Acc sum) { return sum * static_cast<Acc>(Exponential<T>::unit); }
};

template <class Acc, bool WHOLE>
using Beside = std::conditional_t<WHOLE, Standing<Acc>, Acc>;

// Whole: a token's sums and where it stands, relative to the slab of `tile`. Lines: its sum.
template <bool WHOLE, class T>
VK_DEVICE Beside<accumulate_t<T>, WHOLE> beside(const Field& field, const Sums<T>& sums, int rows, int tile,
                                                int token) {
  using Acc = accumulate_t<T>;
  if constexpr (WHOLE) {
    if (token < 0) return {{{Acc(0), Acc(0)}}, {{0, 0}}};
    const int y = token >> 16, x = token & 0xffff, index = y * field.width + x;
    return {{{Sums<T>::scaled(sums.along[index]), Sums<T>::scaled(sums.down[index])}},
            {{token, y * field.width - field.slab_begin(rows, tile)}}};
  } else {
    return token < 0 ? Acc(0) : Sums<T>::scaled(sums.along[field.index(token)]);
  }
}

template <class T>
VK_DEVICE void load_slab(Vec<accumulate_t<T>, 2>* slab, const Field& field, const Sums<T>& sums, int rows,
                         int tile, int thread, int threads) {
  const int begin = field.slab_begin(rows, tile), length = field.slab_length(rows, tile);
  VK_NO_UNROLL
  for (int e = thread; e < length; e += threads)
    slab[e] = {{Sums<T>::scaled(sums.along[begin + e]), Sums<T>::scaled(sums.down[begin + e])}};
}

// Lines have one mask; the whole mode's two have their corners in the own row and in the other.
enum class Mask { line, own, other };

// Scores of 16 own rows to the logits of a mask. Slots without a token get -inf.
template <bool WHOLE, bool ALONE, int ROWS, class Acc>
struct Logits {
  Beside<Acc, WHOLE> own[2];  // of this lane's rows
  int position[2];            // lines: how far along

  template <class T>
  VK_DEVICE void stand(const Field& field, const Sums<T>& sums, int group, int tile, int lane_row) {
    VK_UNROLL
    for (int r = 0; r < 2; ++r) {
      const int slot = lane_row + 8 * r;
      own[r] = beside<WHOLE>(field, sums, ROWS, tile, field.template token<WHOLE>(ROWS, group, tile, slot));
      position[r] = tile * ROWS + (slot & (field.slots - 1));
    }
  }

  // `slab` is that of the mask's corners.
  template <Mask MASK>
  VK_DEVICE void make(Acc (&p)[ROWS / 8][4], Acc scale, const Field& field, const Beside<Acc, WHOLE>* others,
                      const Vec<Acc, 2>* slab, int other_tile, Span seen) const {
    static_assert(WHOLE == (MASK != Mask::line));
    const int lane_column = lane_id() % 4 * 2;
    // a column's distance to the own row is this minus the column
    const int ahead[2] = {position[0] - other_tile * ROWS + seen.begin,
                          position[1] - other_tile * ROWS + seen.begin};
    VK_UNROLL
    for (int j = 0; j < ROWS / 8; ++j) {
      if (8 * j + 8 <= seen.begin || 8 * j >= seen.end) continue;
      VK_UNROLL
      for (int c = 0; c < 4; ++c) {
        const int column = 8 * j + lane_column + c % 2, r = c / 2;
        Acc mask;
        if constexpr (MASK == Mask::own) {
          mask = own_corner(own[r], others[column], slab);
        } else if constexpr (MASK == Mask::other) {
          mask = other_corner(own[r], others[column], slab);
        } else {
          mask = signed_by(ahead[r] - column, own[r] - others[column]);
        }
        p[j][c] = p[j][c] * scale + mask;
      }
    }
    const int filled = field.filled(ROWS, other_tile);
    if (filled == field.slots) return;
    VK_UNROLL
    for (int j = 0; j < ROWS / 8; ++j) {
      if (ALONE && (8 * j + 8 <= filled || 8 * j >= seen.end)) continue;
      VK_UNROLL
      for (int c = 0; c < 4; ++c)
        if (((8 * j + lane_column + c % 2) & (field.slots - 1)) >= filled) p[j][c] = -INFINITY;
    }
  }
};

// sums += a b^T as Engine::multiply_rows. In float and double long products are summed in parts, as matrix
// libraries do: one running sum over 128 channels would err several times as much, and in the criss-cross
// mode one product follows another.
template <class Engine, class T, class Acc, int TILES>
VK_DEVICE void multiply_rows(Acc (&sums)[TILES][4], const T* a, int lda, const T* b, int ldb, int depth,
                             Span seen) {
  constexpr int PART = 32;
  if constexpr (std::is_floating_point_v<T>) {
    if (depth > PART) {
      VK_NO_UNROLL
      for (int first = 0; first < depth; first += PART) {
        Acc part[TILES][4];
        clear(part);
        Engine::multiply_rows(part, a + first, lda, b + first, ldb,
                              depth - first < PART ? depth - first : PART, seen);
        VK_UNROLL
        for (int j = 0; j < TILES; ++j) {
          VK_UNROLL
          for (int c = 0; c < 4; ++c) sums[j][c] += part[j][c];
        }
      }
      return;
    }
  }
  Engine::multiply_rows(sums, a, lda, b, ldb, depth, seen);
}

// sums += p b as Engine::multiply_registers, in float and double a tile's part on its own: a map has many
// tiles.
template <class Engine, class T, class Acc, int TILES>
VK_DEVICE void multiply_registers(Acc (&sums)[TILES][4], const Acc (&p)[Engine::ROWS / 8][4], T* scratch,
                                  const T* b, int ldb, int tiles, Span seen) {
  if constexpr (std::is_floating_point_v<T>) {
    Acc part[TILES][4];
    clear(part);
    Engine::multiply_registers(part, p, scratch, b, ldb, tiles, seen);
    VK_UNROLL
    for (int j = 0; j < TILES; ++j) {
      VK_UNROLL
      for (int c = 0; c < 4; ++c) sums[j][c] += part[j][c];
    }
  } else {
    Engine::multiply_registers(sums, p, scratch, b, ldb, tiles, seen);
  }
}

// sums = sums * factor + the tile's elements, each of which only this lane touches.
template <class T, class Acc, int TILES>
VK_DEVICE void add_tile(Acc (&sums)[TILES][4], const T* tile, int ld, int tiles, Acc factor0, Acc factor1) {
  const T* low = tile + lane_id() / 4 * ld + lane_id() % 4 * 2;
  const T* high = low + 8 * ld;
  VK_UNROLL
  for (int j = 0; j < TILES; ++j) {
    if (j >= tiles) break;
    const auto a = Vec<T, 2>::load(low + 8 * j), b = Vec<T, 2>::load(high + 8 * j);
    VK_UNROLL
    for (int e = 0; e < 2; ++e) {
      sums[j][e] = sums[j][e] * factor0 + to_accumulate(a[e]);
      sums[j][2 + e] = sums[j][2 + e] * factor1 + to_accumulate(b[e]);
    }
  }
}

// target = sums times factors, through `tile`, a tile of shared memory that nobody reads any more.
template <int ROWS, class T, class Acc, int TILES, class Token>
VK_DEVICE void store_sums(const Matrix<T, Field>& target, T* tile, int ld, const Acc (&sums)[TILES][4],
                          Acc factor0, Acc factor1, const Group<ROWS>& group, Token token) {
  write_sums(tile + group.first_row * ld, ld, sums, round_up(target.channels, 16) / 8, factor0, factor1);
  group.sync();
  store_tile(target, tile, ld, group, token);
  group.sync();
}

VK_HOST_DEVICE int channels_from(int channel, int channels) {
  const int left = channels - channel;
  return left < MOST_COLUMNS ? left : MOST_COLUMNS;
}

// What a kernel is compiled for: the more it knows, the fewer registers a thread takes and the more blocks
// share a multiprocessor, which is what hides latency here.
template <bool WHOLE_, bool ALONE_, int COLUMNS_, int ROW_SLOTS_ = 0>
struct Form {
  static constexpr bool WHOLE = WHOLE_;  // one sweep over the map, or lines
  static constexpr bool ALONE = ALONE_;  // a tile has one line
  static constexpr int COLUMNS = COLUMNS_;
  static constexpr int ROW_SLOTS = ROW_SLOTS_;  // as Field's row_slots
};

// run(Form), which holds `columns` channels. Only tensor cores are worth more than one kernel for lines.
template <class Engine, bool WHOLE, class Run>
void with_form(const Field& field, int columns, Run run) {
  constexpr bool NARROW = sizeof(typename Engine::T) == 2;
  if constexpr (WHOLE && NARROW) {
    if (field.row_slots == 16) return run(Form<true, true, MOST_COLUMNS, 16>());
    if (field.row_slots == 8) return run(Form<true, true, MOST_COLUMNS, 8>());
  }
  if constexpr (!WHOLE && NARROW) {
    if (field.slots < Engine::ROWS) {
      run(Form<false, false, MOST_COLUMNS>());
    } else if (columns > 16) {
      run(Form<false, true, MOST_COLUMNS>());
    } else {
      run(Form<false, true, 16>());
    }
  } else {
    run(Form<WHOLE, WHOLE, MOST_COLUMNS>());
  }
}

template <class Kernel, class Call, class Layout>
void launch_tiles(Kernel kernel, const Call& call, const Layout& layout, int threads, Stream stream) {
  if (layout.bytes > tile_attention::SHARED_LIMIT)
    throw std::runtime_error("polyline path attention: a tile needs " + std::to_string(layout.bytes) +
                             " bytes of shared memory, the limit is " +
                             std::to_string(tile_attention::SHARED_LIMIT));
  if (call.field.items() > 0x7fffffff)
    throw std::runtime_error("polyline path attention: more than 2^31 - 1 tiles");
  launch(kernel, Dim3{call.field.items()}, threads, static_cast<size_t>(layout.bytes), stream, call, layout);
}

}  // namespace vitkernels::polyline_path_attention

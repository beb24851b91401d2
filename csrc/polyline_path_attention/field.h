// Polyline path attention on tiles of ROWS tokens: which tokens make up a tile, and what the masks add to a
// logit.
//
// Floors, for N = batch * height * width tokens a head of widths d, dv. Whole, forward: q, k, v and out once,
// 2 N (d + dv) sizeof(T) bytes; 2 N H W (d + 2 dv) FLOPs; 2 N H W exponentials, which bind at d = 16 and 32.
// Criss-cross, forward: the same tensors once and three products with v in and out, N (2 d + 8 dv) sizeof(T)
// bytes, which bind; 2 N (H + W) (d + 2 dv) FLOPs and N (2 W + H) exponentials, the rows' being made twice.
//
// One of the two tiles that meet is a block's own, the other comes to it. Own and other change places between
// the queries' and the keys' side of the backward, and so do the two masks, which makes the two sides one
// kernel: seen from an own token u = (i, j) and another w = (r, l), the mask with its corner at (i, l), in
// the own row, is M for a query and M^T for a key; the mask with its corner at (r, j) is the other one:
//   own corner     s_c (Cw[u] - Cw[i, l]) + s_r (Ch[i, l] - Ch[w])      s_c = sign(j - l), s_r = sign(i - r)
//   other corner   s_c (Cw[r, j] - Cw[w]) + s_r (Ch[u] - Ch[r, j])
// So a tile needs the sums of its own tokens and of its rows' tokens, the other ones included: a slab of less
// than ROWS + 2 W tokens, whatever H. No table of H W tokens exists.
#pragma once
#include <string>

#include "polyline_path_attention.h"
#include "vitkernels/divide.h"
#include "vitkernels/tile_attention_engine.h"

namespace vitkernels::polyline_path_attention {

using tile_attention::Group;
using tile_attention::Matrix;
using tile_attention::present;
using tile_attention::round_up;
using tile_attention::Span;

// The most channels of a product whose sums a warp keeps, in registers; wider products take several launches.
constexpr int MOST_COLUMNS = 32;

enum class Sweep { whole, rows, columns };

struct Item {
  int batch, head, group, tile;
};

// A token is y << 16 | x. A sweep's lines are the rows, the columns, or one line of all tokens. A line longer
// than a tile takes several; of short ones several share a tile, each with its own 16 or 32 slots, and only
// their own slots meet.
struct Field {
  int batch = 0, heads = 0, height = 0, width = 0;
  Divisor by_width, by_heads, by_tiles, by_groups;
  bool columns = false;
  int length = 0, lines = 0;             // tokens of a line, lines of a map
  int slots = 0, tiles = 0, groups = 0;  // slots of a line in a tile, tiles of a line, groups of lines
  int slot_bits = 0;

  int row_slots = 0;  // whole: of a row of the map, 0 where tokens are packed, see aligned.h

  Field(const Params& params, Sweep sweep, int rows, int row_slots = 0)
      : batch(static_cast<int>(params.batch)),
        heads(params.heads),
        height(params.height),
        width(params.width),
        by_width(params.width),
        columns(sweep == Sweep::columns),
        length(sweep == Sweep::whole ? height * (row_slots > 0 ? row_slots : width)
               : columns             ? height
                                     : width),
        lines(sweep == Sweep::whole ? 1
              : columns             ? width
                                    : height),
        row_slots(row_slots) {
    slots = sweep == Sweep::whole || length > rows / 2 ? rows : length > 16 ? 32 : 16;
    while ((1 << slot_bits) < slots) ++slot_bits;
    const int together = rows / slots;
    tiles = (length + rows - 1) / rows;
    groups = (lines + together - 1) / together;
    by_heads = Divisor(heads);
    by_tiles = Divisor(tiles);
    by_groups = Divisor(groups);
  }

  VK_HOST_DEVICE int tokens() const { return height * width; }
  VK_HOST_DEVICE int64_t items() const { return static_cast<int64_t>(batch) * groups * tiles * heads; }
  // Heads run fastest: they lie side by side in memory.
  VK_DEVICE Item item(int index) const {
    Item item;
    const int place = by_heads.divide(index), above = by_tiles.divide(place);
    item.head = index - place * heads;
    item.tile = place - above * tiles;
    item.batch = by_groups.divide(above);
    item.group = above - item.batch * groups;
    return item;
  }

  template <bool WHOLE, int ROW_SLOTS = 0>
  VK_DEVICE int token(int rows, int group, int tile, int slot) const {
    if constexpr (ROW_SLOTS > 0) {
      const int index = tile * rows + slot, y = index / ROW_SLOTS, x = index % ROW_SLOTS;
      return y < height && x < width ? y << 16 | x : -1;
    } else if constexpr (WHOLE) {
      const int index = tile * rows + slot, y = by_width.divide(index);
      return index < length ? y << 16 | (index - y * width) : -1;
    } else {
      const int line = (group << (rows == 64 ? 6 - slot_bits : 0)) + (slot >> slot_bits);
      const int position = tile * rows + (slot & (slots - 1));
      if (line >= lines || position >= length) return -1;
      return columns ? position << 16 | line : line << 16 | position;
    }
  }
  // Which slots of the line's tile `tile` the 16 own slots from `first` on meet, in eights. ALONE: a tile has
  // one line, so that a warp knows them without looking at its rows and skips what is beyond the line's end.
  template <bool ALONE>
  VK_DEVICE Span slots_met(int rows, int tile, int first) const {
    if constexpr (ALONE) {
      return {0, round_up(filled(rows, tile), 8)};
    } else {
      const int begin = first & ~(slots - 1);
      return {begin, begin + slots};
    }
  }
  // Of a line's slots in a tile, how many have a token.
  VK_DEVICE int filled(int rows, int tile) const {
    const int left = length - tile * rows;
    return left < slots ? left : slots;
  }

  // [batch, heads, height, width], contiguous
  VK_DEVICE int64_t plane(int item_batch, int head) const {
    return (static_cast<int64_t>(item_batch) * heads + head) * tokens();
  }
  VK_DEVICE int index(int token) const { return (token >> 16) * width + (token & 0xffff); }

  // The rows that a tile of the whole sweep touches: their first token, and how many tokens they have.
  VK_HOST_DEVICE int slab_begin(int rows, int tile) const { return by_width.divide(tile * rows) * width; }
  VK_HOST_DEVICE int slab_length(int rows, int tile) const {
    const int end = (tile + 1) * rows < length ? (tile + 1) * rows : length;
    return (by_width.divide(end - 1) + 1) * width - slab_begin(rows, tile);
  }
  VK_HOST_DEVICE int slab_capacity(int rows) const {
    const int touched = (rows + width - 2) / width + 1;
    return (touched < height ? touched : height) * width;
  }

  struct Positions {  // of a View with strides (batch, head, x, channel, y)
    int64_t stride_y, stride_x;

    VK_DEVICE Positions(const View& view, const Field&)
        : stride_y(view.stride[4]), stride_x(view.stride[2]) {}
    VK_DEVICE int64_t operator()(int token) const {
      return (token >> 16) * stride_y + (token & 0xffff) * stride_x;
    }
    VK_DEVICE bool multiples_of(int width) const { return (stride_y | stride_x) % width == 0; }
    VK_DEVICE bool dense() const { return false; }
  };
};

// (batch, y, x, head, channel) -> (batch, head, x, channel, y)
inline View on_field(const View& view) {
  const int64_t* s = view.stride;
  return View{view.data, {s[0], s[3], s[2], s[4], s[1]}};
}

// One of the saved products, [batch, height, width, heads * dv].
inline View product(const Params& params, int index, size_t element_size) {
  const View& all = params.partial;
  if (!present(all)) return {};
  char* data = static_cast<char*>(all.data) + index * all.stride[0] * static_cast<int64_t>(element_size);
  return View{data, {all.stride[1], params.value_dim, all.stride[3], 1, all.stride[2]}};
}

// The channels of a view from `first` on.
template <class T>
View from_channel(View view, int first) {
  if (present(view)) view.data = static_cast<T*>(view.data) + first * view.stride[3];
  return view;
}

inline void check_sizes(const Params& params) {
  if (params.batch > 0x7fffffff || params.height > 0x7fff || params.width > 0x7fff ||
      static_cast<int64_t>(params.height) * params.width > 0x3fffffff)
    throw std::runtime_error(
        "polyline path attention: the batch must be below 2^31, height and width below 2^15, "
        "height * width below 2^30");
  if (params.head_dim > tile_attention::MAX_COLUMNS || params.value_dim > tile_attention::MAX_COLUMNS)
    throw std::runtime_error("polyline path attention: head_dim and value_dim must be at most " +
                             std::to_string(tile_attention::MAX_COLUMNS) + ", got " +
                             std::to_string(params.head_dim) + " and " + std::to_string(params.value_dim));
}

// x, or -x for negative n: one logical operation. At 0 the decays between two tokens are 0 too, but not their
// gradients: see signed_or_zero.
template <class Acc>
VK_DEVICE Acc signed_by(int n, Acc x) {
  if constexpr (std::is_same_v<Acc, float>) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof(bits));
    bits ^= static_cast<uint32_t>(n) & 0x80000000u;
    memcpy(&x, &bits, sizeof(bits));
    return x;
  } else {
    return n < 0 ? -x : x;
  }
}
template <class Acc>
VK_DEVICE Acc signed_or_zero(int n, Acc x) {
  return n == 0 ? Acc(0) : signed_by(n, x);
}

// What the masks need of a token of the whole sweep: its sums, where it is, and where its row begins in the
// slab of its tile. 16 bytes in single precision: what four lanes read of every second one lies in different
// banks.
template <class Acc>
struct Standing {
  Vec<Acc, 2> sums;   // along the row, down the column
  Vec<int, 2> place;  // y << 16 | x, row in the slab

  VK_DEVICE int y() const { return place[0] >> 16; }
  VK_DEVICE int x() const { return place[0] & 0xffff; }
  VK_DEVICE int row() const { return place[1]; }
};

// The mask with its corner in the own row, and that with its corner in the other.
template <class Acc>
VK_DEVICE Acc own_corner(const Standing<Acc>& own, const Standing<Acc>& other, const Vec<Acc, 2>* own_slab) {
  const Vec<Acc, 2> near = own_slab[own.row() + other.x()];
  return signed_by(own.x() - other.x(), own.sums[0] - near[0]) +
         signed_by(own.y() - other.y(), near[1] - other.sums[1]);
}
template <class Acc>
VK_DEVICE Acc other_corner(const Standing<Acc>& own, const Standing<Acc>& other,
                           const Vec<Acc, 2>* other_slab) {
  const Vec<Acc, 2> far = other_slab[other.row() + own.x()];
  return signed_by(own.x() - other.x(), far[0] - other.sums[0]) +
         signed_by(own.y() - other.y(), own.sums[1] - far[1]);
}

}  // namespace vitkernels::polyline_path_attention

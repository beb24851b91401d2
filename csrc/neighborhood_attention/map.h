// Neighborhood attention as a map of the tile-attention core: tiles of queries of one dilation group against
// the rectangle of keys that their windows cover, and relative position biases by offset.
//
// Floor, for N = batch * height * width queries a head of widths d, dv and a kernel of K keys: q, k, v and
// out once, 2 N (d + dv) sizeof(T) bytes; 2 N K (d + dv) FLOPs; N K exponentials. Backward: eight tensors
// once, 4 N (d + dv) sizeof(T) bytes; 2 N K (3 d + 2 dv) FLOPs. At K = 49, d = dv = 32 and 16 bits the
// forward has 24.5 FLOPs a byte: the bytes are the limit by a factor of eight.
//
// A tile of 8 x 8 queries at K = 7 x 7 meets 14 x 14 keys, packed into four tiles of 64; each warp computes
// the 112 keys that its two rows of queries have to do with, so that 41 % of the pairs count. A group no
// larger than a tile (kernel * dilation == size) is one tile of queries and one of keys; all its pairs count.
//
// A logit costs a dozen instructions, the softmax included: what depends on its query or its key alone is
// prepared once a tile, the mask's tests of both axes are packed, and nothing branches.
#pragma once
#include "geometry.h"
#include "vitkernels/tile_attention_forward.h"
#include "vitkernels/tile_attention_table.h"

namespace vitkernels::neighborhood_attention {

// A token is y << x_bits | x, in coordinates of the whole map. Its code holds group coordinates instead, y in
// the upper and x in the lower field, wide enough that the two highest bits of each are free: in a key's code
// the highest is set (a guard, which a subtraction that would borrow clears), in a query's code it says that
// the query's group is a long one.
template <class T>
struct NeighborhoodMap {
  using Acc = accumulate_t<T>;
  static constexpr bool SCATTERED = true;

  Axis y, x;
  Divisor width;
  int height = 0;
  int x_bits = 0, field_bits = 2;
  uint32_t guards = 0;
  Tiling small, large;  // of 16 and of 64 slots
  View rpb;             // absent: no bias
  bool wide_table = false;

  explicit NeighborhoodMap(const Params& params)
      : y(params.height, params.kernel_h, params.dilation_h, params.causal_h),
        x(params.width, params.kernel_w, params.dilation_w, params.causal_w),
        width(params.width),
        height(params.height),
        x_bits(bit_length(params.width - 1)),
        field_bits(bit_length(x.longest() - 1) + 2),
        guards(uint32_t{1} << 31 | uint32_t{1} << (field_bits - 1)),
        small(choose_tiling(16, y, x)),
        large(choose_tiling(64, y, x)),
        rpb(params.rpb),
        wide_table(params.rpb_dtype != params.dtype) {}

  VK_HOST_DEVICE const Tiling& tiling(int rows) const { return rows == 16 ? small : large; }
  VK_HOST_DEVICE int groups() const { return y.dilation.value() * x.dilation.value(); }
  VK_HOST_DEVICE int query_tiles(int rows) const { return groups() * tiling(rows).per_group(); }
  VK_HOST_DEVICE int key_tiles(int rows) const { return query_tiles(rows); }
  int most_key_tiles(int rows) const { return most_tiles(rows, 1); }
  // A border's keys are met by the queries of whole windows on their other side, too.
  int most_query_tiles(int rows) const { return most_tiles(rows, 2); }
  int most_tiles(int rows, int windows) const {
    const auto longest = [&](const Axis& axis, int size) {
      const int met = size + windows * (axis.kernel - 1);
      return met < axis.longest() ? met : axis.longest();
    };
    const Tiling& tiles = tiling(rows);
    return (longest(y, tiles.height) * longest(x, tiles.width.value()) + rows - 1) / rows;
  }
  bool fits_small_tile() const { return small.per_group() == 1; }
  bool disjoint(int rows) const { return tiling(rows).per_group() == 1; }

  // The tokens of a tile, of queries and of keys alike.
  struct Place {
    int group_y, group_x, length_y, length_x;
    Span y, x;
    VK_DEVICE bool empty() const { return y.length() <= 0 || x.length() <= 0; }
  };
  VK_DEVICE Place place(int rows, int tile) const {
    const Tiling& tiles = tiling(rows);
    const int row = tiles.tiles_x.divide(tile), group = tiles.tiles_y.divide(row);
    const int tile_x = tile - row * tiles.tiles_x.value(), tile_y = row - group * tiles.tiles_y.value();
    Place place;
    place.group_y = x.dilation.divide(group);
    place.group_x = group - place.group_y * x.dilation.value();
    place.length_y = y.length(place.group_y);
    place.length_x = x.length(place.group_x);
    place.y = span(tile_y, tiles.height, place.length_y);
    place.x = span(tile_x, tiles.width.value(), place.length_x);
    return place;
  }
  VK_DEVICE static Span span(int tile, int size, int length) {
    const int begin = tile * size, end = begin + size;
    return {begin, end < length ? end : length};
  }
  VK_DEVICE int token(const Place& place, int number_y, int number_x) const {
    return (place.group_y + number_y * y.dilation.value()) << x_bits |
           (place.group_x + number_x * x.dilation.value());
  }

  VK_HOST_DEVICE int query_count() const { return height * width.value(); }
  VK_DEVICE int query_at(int number) const {
    const int token_y = width.divide(number);
    return token_y << x_bits | (number - token_y * width.value());
  }
  VK_DEVICE int query_number(int token) const {
    const int token_y = token >> x_bits;
    return token_y * width.value() + token - (token_y << x_bits);
  }
  VK_DEVICE int query(int rows, int tile, int slot) const {
    const Place p = place(rows, tile);
    const Divisor& width = tiling(rows).width;
    const int row = width.divide(slot), column = slot - row * width.value();
    return row < p.y.length() && column < p.x.length()
               ? token(p, p.y.begin, p.x.begin) + row * row_step() + column * x.dilation.value()
               : -1;
  }
  VK_DEVICE int key(int rows, int tile, int slot) const { return query(rows, tile, slot); }
  VK_DEVICE int row_step() const { return y.dilation.value() << x_bits; }

  // The keys that a tile of queries meets and the queries that meet a tile of keys, `rows` at a time.
  VK_DEVICE Box keys_of(const Place& p, const Box& part) const {
    return {y.keys_of(part.y, p.length_y), x.keys_of(part.x, p.length_x)};
  }
  VK_DEVICE Box queries_of(const Place& p, const Box& part) const {
    return {y.queries_of(part.y, p.length_y), x.queries_of(part.x, p.length_x)};
  }
  VK_DEVICE Box keys_of(const Place& p) const { return keys_of(p, {p.y, p.x}); }
  VK_DEVICE Box queries_of(const Place& p) const { return queries_of(p, {p.y, p.x}); }
  VK_DEVICE Numbering numbering(const Place& p, const Box& box) const {
    const int width = box.x.length();
    return {token(p, box.y.begin, box.x.begin), row_step() - width * x.dilation.value(), box.count(),
            Reciprocal(width)};
  }
  VK_DEVICE int key_tiles_of(int rows, int tile) const {
    const Place p = place(rows, tile);
    return p.empty() ? 0 : (keys_of(p).count() + rows - 1) / rows;
  }
  VK_DEVICE int query_tiles_of(int rows, int tile) const {
    const Place p = place(rows, tile);
    return p.empty() ? 0 : (queries_of(p).count() + rows - 1) / rows;
  }
  VK_DEVICE int key_of(int rows, int tile, int i, int slot) const {
    const Place p = place(rows, tile);
    return numbering(p, keys_of(p)).token(i * rows + slot, x.dilation.value());
  }
  VK_DEVICE int query_of(int rows, int tile, int i, int slot) const {
    const Place p = place(rows, tile);
    return numbering(p, queries_of(p)).token(i * rows + slot, x.dilation.value());
  }

  // The tokens of 16 slots of a box that is numbered in rows of `width`: exact if they lie in one row, else
  // whole rows.
  template <class Width>
  VK_DEVICE static Box strip(Box whole, const Width& width, int first) {
    const int last = first + 15, begin = width.divide(first), end = width.divide(last);
    const Span rows{whole.y.begin + begin, whole.y.begin + end + 1};
    const Span columns{whole.x.begin + first - begin * width.value(),
                       whole.x.begin + last - end * width.value() + 1};
    return {common(rows, whole.y), begin == end ? common(columns, whole.x) : whole.x};
  }
  // The slots from that of `part`'s first token to that of its last, less `first`.
  VK_DEVICE static Span slots(Box part, Box whole, int width, int first, int rows) {
    if (part.empty()) return {0, 0};
    const int begin = (part.y.begin - whole.y.begin) * width + part.x.begin - whole.x.begin - first;
    const int end = (part.y.end - 1 - whole.y.begin) * width + part.x.end - whole.x.begin - first;
    const Span span = common({begin, end}, {0, rows});
    return span.length() > 0 ? span : Span{0, 0};
  }
  VK_DEVICE Span keys_seen(int rows, int tile, int i, int first) const {
    const Place p = place(rows, tile);
    const Box box = keys_of(p), part = strip({p.y, p.x}, tiling(rows).width, first);
    if (part.empty()) return {0, 0};
    return slots(keys_of(p, part), box, box.x.length(), i * rows, rows);
  }
  VK_DEVICE Span seen_by(int rows, int tile, int i, int first) const {
    const Place p = place(rows, tile);
    const Box box = queries_of(p), part = strip({p.y, p.x}, tiling(rows).width, first);
    if (part.empty()) return {0, 0};
    return slots(queries_of(p, part), box, box.x.length(), i * rows, rows);
  }
  VK_DEVICE Span keys_seen_of(int rows, int tile, int i, int first) const {
    const Place p = place(rows, tile);
    const Box box = queries_of(p), part = strip(box, Reciprocal(box.x.length()), i * rows + first);
    if (part.empty()) return {0, 0};
    const Box keys = keys_of(p, part);
    return slots({common(keys.y, p.y), common(keys.x, p.x)}, {p.y, p.x}, tiling(rows).width.value(), 0, rows);
  }

  struct Positions {
    int64_t stride_y, stride_x;
    int x_bits;

    VK_DEVICE Positions(const View& view, const NeighborhoodMap& map)
        : stride_y(view.stride[4]), stride_x(view.stride[2]), x_bits(map.x_bits) {}
    // Of no token, -1, too: unsigned, since negative numbers must not be shifted.
    VK_DEVICE int x_of(int token, int token_y) const {
      return token - static_cast<int>(static_cast<uint32_t>(token_y) << x_bits);
    }
    VK_DEVICE int64_t operator()(int token) const {
      const int token_y = token >> x_bits;
      return token_y * stride_y + x_of(token, token_y) * stride_x;
    }
    template <class U>
    VK_DEVICE U* near(U* data, int token) const {
      const int token_y = token >> x_bits, size = static_cast<int>(sizeof(U));
      return reinterpret_cast<U*>(reinterpret_cast<uintptr_t>(data) +
                                  static_cast<int64_t>(token_y) * static_cast<int>(stride_y * size) +
                                  static_cast<int64_t>(x_of(token, token_y)) *
                                      static_cast<int>(stride_x * size));
    }
    VK_DEVICE bool multiples_of(int width) const { return (stride_y | stride_x) % width == 0; }
    VK_DEVICE bool dense() const { return stride_x == 1; }
  };

  // Group coordinates, and the key's part of the place of a table entry in bytes.
  struct alignas(8) KeyCode {
    uint32_t numbers;
    int entry;
  };
  VK_DEVICE KeyCode key_code(int token) const {
    const int token_y = token >> x_bits, token_x = token - (token_y << x_bits);
    const int number_y = y.dilation.divide(token_y), number_x = x.dilation.divide(token_x);
    return {guards + pack(number_y, number_x), entry(number_y, number_x)};
  }
  // The lower field's guard is missing: clear where no query borrows, and who borrows clears the upper one's.
  VK_DEVICE static KeyCode no_key() { return {uint32_t{1} << 31, 0}; }
  VK_DEVICE int query_code(int token) const {
    const int token_y = token >> x_bits, token_x = token - (token_y << x_bits);
    const int number_y = y.dilation.divide(token_y), number_x = x.dilation.divide(token_x);
    const bool long_y = token_y - number_y * y.dilation.value() < y.long_groups;
    const bool long_x = token_x - number_x * x.dilation.value() < x.long_groups;
    return static_cast<int>(uint32_t{long_y} << 31 | static_cast<uint32_t>(number_y) << field_bits |
                            uint32_t{long_x} << (field_bits - 1) | static_cast<uint32_t>(number_x));
  }

  VK_HOST_DEVICE int pitch() const { return 2 * x.kernel - 1; }
  VK_HOST_DEVICE int table_entries() const { return (2 * y.kernel - 1) * pitch(); }

  // The numbers of a query's first and last key, the latter with both guards twice; its part of an entry.
  struct Query {
    uint32_t first, last;
    int entry;
  };
  VK_DEVICE Query of_query(int query_code) const {
    const uint32_t query = static_cast<uint32_t>(query_code);
    const uint32_t x_flag = uint32_t{1} << (field_bits - 1);
    const int number_y = static_cast<int>((query & 0x7fffffffu) >> field_bits);
    const int number_x = static_cast<int>(query & (x_flag - 1));
    const int length_y = y.short_length + static_cast<int>(query >> 31);
    const int length_x = x.short_length + ((query & x_flag) != 0);
    const uint32_t first = pack(y.window(number_y, length_y), x.window(number_x, length_x));
    const uint32_t last = first + pack(y.kernel - 1, x.kernel - 1) + 2 * guards;
    return {first, last, entry(y.kernel - 1 - number_y, x.kernel - 1 - number_x)};
  }
  // Without a table the one entry of zero that stands in for it.
  VK_DEVICE int entry(int number_y, int number_x) const {
    return tile_attention::present(rpb) ? (number_y * pitch() + number_x) * static_cast<int>(sizeof(Acc)) : 0;
  }

  // Two subtractions and one logical operation for the mask of both axes, one addition for the table entry.
  VK_DEVICE Acc logit(Acc s, const Query& query, KeyCode key, const Acc* table) const {
    // Each difference keeps its guard exactly where it is not negative.
    const bool inside = (~((key.numbers - query.first) & (query.last - key.numbers)) & guards) == 0;
    const int place = inside ? key.entry + query.entry : 0;
    const Acc bias = *reinterpret_cast<const Acc*>(reinterpret_cast<const char*>(table) + place);
    return inside ? s + bias : -INFINITY;
  }
  VK_DEVICE uint32_t pack(int number_y, int number_x) const {
    return (static_cast<uint32_t>(number_y) << field_bits) + static_cast<uint32_t>(number_x);
  }

  VK_HOST_DEVICE int shared_elements() const { return tile_attention::present(rpb) ? table_entries() : 1; }
  VK_DEVICE void stage(Acc* table, int64_t head, int thread, int threads) const {
    if (!tile_attention::present(rpb)) {
      if (thread == 0) table[0] = Acc(0);
      return;
    }
    VK_NO_UNROLL
    for (int e = thread; e < table_entries(); e += threads)
      table[e] = tile_attention::read_table<T>(*this, rpb, head, e);
  }
  static constexpr int SOURCES = 1;
  VK_DEVICE int source(int entry, int) const { return entry; }
  VK_HOST_DEVICE int64_t table_offset(const View& table, int entry) const {
    return entry / pitch() * table.stride[1] + entry % pitch() * table.stride[2];
  }

  // sums[e] += the tile's gradients at entry e, queries in ascending order: each entry has one thread.
  VK_HOST_DEVICE int gradient_elements() const { return table_entries(); }
  VK_DEVICE void gradient(Acc* sums, const tile_attention::GradientTile<Acc, KeyCode>& tile) const {
    const Place p = place(tile.rows, tile.query_tile);
    if (p.empty()) return;
    const Box box = keys_of(p);
    const int first_key = tile.key_tile * tile.rows, width = box.x.length();
    const int tile_width = tiling(tile.rows).width.value();
    VK_NO_UNROLL
    for (int e = tile.thread; e < table_entries(); e += tile.threads) {
      const int entry_y = e / pitch(), entry_x = e - entry_y * pitch();
      // The key of the tile's first query, in the box.
      const int key_y = p.y.begin + entry_y - (y.kernel - 1) - box.y.begin;
      const int key_x = p.x.begin + entry_x - (x.kernel - 1) - box.x.begin;
      const int left = key_x < 0 ? -key_x : 0;
      const int right = width - key_x < p.x.length() ? width - key_x : p.x.length();
      Acc sum = sums[e];
      VK_NO_UNROLL
      for (int row = 0; row < p.y.length(); ++row) {
        if (key_y + row < 0 || key_y + row >= box.y.length()) continue;
        const int key_slot = (key_y + row) * width + key_x - first_key;  // of this row's first query
        const int begin = left > -key_slot ? left : -key_slot;
        const int end = right < tile.rows - key_slot ? right : tile.rows - key_slot;
        const int offset = row * tile_width * tile.ld + key_slot;
        for (int column = begin; column < end; ++column) sum += tile.values[offset + column * (tile.ld + 1)];
      }
      sums[e] = sum;
    }
  }
};

// Sizes that tokens, codes and boxes hold; a sequence of 65 000 tokens fits whatever its kernel.
inline void check_sizes(const Params& params) {
  const Axis y(params.height, params.kernel_h, params.dilation_h, params.causal_h);
  const Axis x(params.width, params.kernel_w, params.dilation_w, params.causal_w);
  const auto smaller = [](int64_t a, int64_t b) { return a < b ? a : b; };
  const int64_t box_y = smaller(y.longest(), params.kernel_h + 63),
                box_x = smaller(x.longest(), params.kernel_w + 63);
  if (bit_length(params.height - 1) + bit_length(params.width - 1) > 31 ||
      bit_length(y.longest() - 1) + bit_length(x.longest() - 1) > 28 ||
      (box_y * box_x + 65) * box_x >= int64_t{1} << 32)
    throw std::runtime_error("neighborhood attention: a map of " + std::to_string(params.height) + " x " +
                             std::to_string(params.width) + " tokens with a kernel of " +
                             std::to_string(params.kernel_h) + " x " + std::to_string(params.kernel_w) +
                             " is too large");
}

inline tile_attention::Problem make_problem(const Params& params) {
  check_sizes(params);
  tile_attention::Problem problem = tile_attention::make_problem(params, "neighborhood attention");
  for (View* view : {&problem.q, &problem.k, &problem.v, &problem.out, &problem.lse, &problem.grad_out,
                     &problem.grad_lse, &problem.grad_q, &problem.grad_k, &problem.grad_v}) {
    // (batch, y, x, head, channel) -> (batch, head, x, channel, y)
    const int64_t* s = view->stride;
    *view = View{view->data, {s[0], s[3], s[2], s[4], s[1]}};
  }
  return problem;
}

}  // namespace vitkernels::neighborhood_attention

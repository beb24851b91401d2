// The tile-attention core: softmax(logits) v for tiles of queries against tiles of keys, and its backward.
//
// One warp owns 16 rows of a tile; a group of ROWS / 16 warps owns a tile of ROWS rows (16 or 64) against
// ROWS columns, and a block holds one or more groups that never meet. Two engines multiply tiles
// (tile_attention_engine.h): TensorCores for half_t and bfloat16_t, Plain for float and double.
//
// An operator supplies a Map, passed to the kernels by value. It says WHICH tokens meet:
//   query_count()                                         of a batch entry and head
//   query_tiles(rows), query(rows, tile, slot)            tiles of queries; a token, or -1 for none
//   key_tiles_of(rows, tile), key_of(rows, tile, i, slot)       the key tiles that a query tile meets
//   key_tiles(rows), key(rows, tile, slot)                tiles of keys (backward)
//   query_tiles_of(rows, tile), query_of(rows, tile, i, slot)   the query tiles that a key tile meets
//   fits_small_tile()                                     no tile needs more than 16 queries and 16 keys
//   Positions, SCATTERED, query_run(..), disjoint(rows), keys_seen(..), enter(..), ...   optional, see below
// and WHAT a logit is:
//   query_code(token)                                     an int
//   KeyCode, key_code(token), no_key()                    what logit() needs of a key; of a slot without one
//   shared_elements(), stage(shared, head, thread, threads)     tables in shared memory, times unit
//   Query, of_query(query_code)                           what logit() needs of a query, taken from its code
//   once
//                                                         for all the keys of a tile
//   logit(s, query, key_code, shared)                     of s = scale * q k; or -inf, as without a key.
//                                                         d logit / d s = 1. Of every pair of a tile: no
//                                                         branches
//   gradient_elements(), gradient(sums, tile)             sums over tiles of d loss / d logit (backward)
// Acc is accumulate_t<T>. Logits and tables are multiplied by unit = Exponential<T>::unit.
#pragma once
#include <limits>

#include "vitkernels/device.h"

namespace vitkernels::tile_attention {

constexpr int BLOCK_THREADS = 128;
constexpr int MAX_COLUMNS = 128;   // of the sums that a kernel holds in registers; more take passes
constexpr int MAX_CHANNELS = 256;  // of q and k, and of v, the half of it in double
// What a block may use on every architecture from sm_80 on (sm_86, sm_89 and sm_120 are the tightest). A
// fixed number, so that the choice of tiles, and with it every rounding, depends on the sizes alone.
constexpr int64_t SHARED_LIMIT = 99 * 1024;

// Half-precision tensors take the hardware's exp2, whose error is far below their own. For float and double
// the library's natural exp is used: the backward recomputes P from lse, and every rounding shows.
template <class T>
struct Exponential {
  static constexpr float unit = LOG2E;
  static VK_DEVICE float exp(float x) { return exp2_fast(x); }
  static VK_DEVICE float log(float x) { return log2_fast(x); }
};
template <>
struct Exponential<float> {
  static constexpr float unit = 1.0f;
  static VK_DEVICE float exp(float x) { return exp_(x); }
  static VK_DEVICE float log(float x) { return log_(x); }
};
template <>
struct Exponential<double> {
  static constexpr double unit = 1.0;
  static VK_DEVICE double exp(double x) { return exp_(x); }
  static VK_DEVICE double log(double x) { return log_(x); }
};

// Tensors are [batch, heads, tokens, channels], lse and grad_lse [batch, heads, tokens]; any strides. The
// fifth stride is for the map's Positions.
struct Problem {
  int batch = 0;
  int heads = 0;
  int head_dim = 0;
  int value_dim = 0;
  double scale = 1.0;
  View q, k, v, out, lse;             // forward: lse may be absent
  View grad_out, grad_lse;            // backward, each may be absent
  View grad_q, grad_k, grad_v;        // backward, each may be absent
  void* gradient_partials = nullptr;  // Acc [chunks, tiles, heads, gradient_elements], may be absent
  void* query_rows = nullptr;         // query_rows_workspace() bytes

  // A pass of the backward whose owner is not Owner::both: the channels of its gradient. Set by the core.
  int first_column = 0;
  int columns = 0;

  // A work item is a chunk of the batch, a head, and a tile; set by split().
  int tiles = 0;
  int chunks = 0;
  int batch_per_chunk = 0;

  VK_HOST_DEVICE int64_t items() const { return static_cast<int64_t>(chunks) * heads * tiles; }
};

VK_HOST_DEVICE bool present(const View& view) {
  return view.data != nullptr;
}

// The problem of an operator's Params, which name these fields alike; the strides may still need reordering.
template <class Params>
Problem make_problem(const Params& params, const std::string& name) {
  if (params.batch > 0x7fffffff || params.heads > 0x7fffffff)
    throw std::runtime_error(name + ": batch and heads must be below 2^31");
  const int most = params.dtype == DType::f64 ? MAX_CHANNELS / 2 : MAX_CHANNELS;
  if (params.head_dim > most || params.value_dim > most)
    throw std::runtime_error(name + ": head_dim and value_dim must be at most " + std::to_string(most) +
                             ", got " + std::to_string(params.head_dim) + " and " +
                             std::to_string(params.value_dim));
  Problem problem;
  problem.batch = static_cast<int>(params.batch);
  problem.heads = static_cast<int>(params.heads);
  problem.head_dim = params.head_dim;
  problem.value_dim = params.value_dim;
  problem.scale = params.scale;
  problem.q = params.q;
  problem.k = params.k;
  problem.v = params.v;
  problem.out = params.out;
  problem.lse = params.lse;
  problem.grad_out = params.grad_out;
  problem.grad_lse = params.grad_lse;
  problem.grad_q = params.grad_q;
  problem.grad_k = params.grad_k;
  problem.grad_v = params.grad_v;
  return problem;
}

// Where the tokens of one tensor lie, in elements. A map whose tokens are not evenly spaced (those of a 2-D
// map inside a larger one) has a type Positions with these members.
struct EvenPositions {
  int64_t stride;

  template <class Map>
  VK_DEVICE EvenPositions(const View& view, const Map&) : stride(view.stride[2]) {}
  VK_DEVICE int64_t operator()(int token) const { return token * stride; }
  // The same in bytes from the first element on, for strides of less than 2^31 bytes: one multiplication.
  template <class T>
  VK_DEVICE T* near(T* data, int token) const {
    return reinterpret_cast<T*>(reinterpret_cast<uintptr_t>(data) +
                                static_cast<int64_t>(token) * static_cast<int>(stride * sizeof(T)));
  }
  VK_DEVICE bool multiples_of(int width) const { return stride % width == 0; }
  VK_DEVICE bool dense() const { return stride == 1; }
};
template <class Map, class = void>
struct PositionsOf {
  using type = EvenPositions;
};
template <class Map>
struct PositionsOf<Map, std::void_t<typename Map::Positions>> {
  using type = typename Map::Positions;
};

// A map whose tokens take more than a multiplication to find says `static constexpr bool SCATTERED = true`:
// those of a tile's slots are then found once and kept in shared memory, instead of by every access.
template <class Map, class = void>
constexpr bool SCATTERED = false;
template <class Map>
constexpr bool SCATTERED<Map, std::void_t<decltype(Map::SCATTERED)>> = Map::SCATTERED;
template <class Map, class Find>
VK_DEVICE int token_of(const int* kept, int slot, const Find& find) {
  if constexpr (SCATTERED<Map>)
    return kept[slot];
  else
    return find(slot);
}

// The slots of a tile whose tokens follow each other: the first `count` have them. A map whose tiles are all
// like that says so with
//   query_run(rows, tile), key_run(rows, tile, i)         the tokens of query() and of key_of()
struct Run {
  int first = 0, count = 0;

  static VK_DEVICE Run of(int tokens, int rows, int tile) {
    const int first = tile * rows, left = tokens - first;
    return {first, left < rows ? left : rows};
  }
  VK_DEVICE int token(int slot) const { return slot < count ? first + slot : -1; }
};
template <class Map, class = void>
constexpr bool RUNS = false;
template <class Map>
constexpr bool RUNS<Map, std::void_t<decltype(&Map::key_run)>> = true;

// The most key tiles that any query tile meets, and the other way round; all, where a map does not say.
template <class Map>
auto most_key_tiles(const Map& map, int rows, int) -> decltype(map.most_key_tiles(rows)) {
  return map.most_key_tiles(rows);
}
template <class Map>
int most_key_tiles(const Map& map, int rows, ...) {
  return map.key_tiles(rows);
}
template <class Map>
auto most_query_tiles(const Map& map, int rows, int) -> decltype(map.most_query_tiles(rows)) {
  return map.most_query_tiles(rows);
}
template <class Map>
int most_query_tiles(const Map& map, int rows, ...) {
  return map.query_tiles(rows);
}

// The queries of a batch entry and head in one row: query_count() of them, with
//   query_at(number), query_number(token)                 where tokens are no such numbers themselves
template <class Map>
VK_DEVICE auto query_at(const Map& map, int number, int) -> decltype(map.query_at(number)) {
  return map.query_at(number);
}
template <class Map>
VK_DEVICE int query_at(const Map&, int number, ...) {
  return number;
}
template <class Map>
VK_DEVICE auto query_number(const Map& map, int token, int) -> decltype(map.query_number(token)) {
  return map.query_number(token);
}
template <class Map>
VK_DEVICE int query_number(const Map&, int token, ...) {
  return token;
}

// Whether query tile i meets key tile i and no other, for all i, and no key tile meets two query tiles. The
// backward then reads every tensor once.
template <class Map>
auto disjoint(const Map& map, int rows, int) -> decltype(map.disjoint(rows)) {
  return map.disjoint(rows);
}
template <class Map>
bool disjoint(const Map& map, int rows, ...) {
  return map.query_tiles(rows) == 1 && map.key_tiles(rows) == 1;
}

// A map whose logits differ from batch entry to batch entry is told which one comes next.
template <class Map>
VK_DEVICE auto enter(Map& map, int batch, int head, int) -> decltype(map.enter(batch, head)) {
  return map.enter(batch, head);
}
template <class Map>
VK_DEVICE void enter(Map&, int, int, ...) {}
template <class Map, class = void>
constexpr bool ENTERS = false;
template <class Map>
constexpr bool ENTERS<Map, std::void_t<decltype(&Map::enter)>> = true;

// A code that no token has.
constexpr int INVALID = std::numeric_limits<int>::lowest();

struct Span {
  int begin = 0, end = 0;
  VK_HOST_DEVICE int length() const { return end - begin; }
};

// A map whose tiles meet in few of their pairs may say which slots of one tile the 16 slots from `first` on
// of the other have to do with; a warp skips the rest. Only tiles of more than 16 slots ask.
//   keys_seen(rows, tile, i, first)      slots of key_of(.., i, ..) that slots of query(..) see
//   keys_seen_of(rows, tile, i, first)   slots of key(..) that slots of query_of(.., i, ..) see
//   seen_by(rows, tile, i, first)        slots of query_of(.., i, ..) that see slots of key(..)
template <class Map, class = void>
struct Strips {
  static VK_DEVICE Span keys_seen(const Map&, int rows, int, int, int) { return {0, rows}; }
  static VK_DEVICE Span keys_seen_of(const Map&, int rows, int, int, int) { return {0, rows}; }
  static VK_DEVICE Span seen_by(const Map&, int rows, int, int, int) { return {0, rows}; }
};
template <class Map>
struct Strips<Map, std::void_t<decltype(&Map::keys_seen)>> {
  static VK_DEVICE Span keys_seen(const Map& map, int rows, int tile, int i, int first) {
    return map.keys_seen(rows, tile, i, first);
  }
  static VK_DEVICE Span keys_seen_of(const Map& map, int rows, int tile, int i, int first) {
    return map.keys_seen_of(rows, tile, i, first);
  }
  static VK_DEVICE Span seen_by(const Map& map, int rows, int tile, int i, int first) {
    return map.seen_by(rows, tile, i, first);
  }
};

// Chunks of the batch, a function of the sizes only. Enough items to fill a large device several times over;
// beyond that a group walks over a chunk, which spares it the staging of tables and shortens the partial
// sums.
inline void split(Problem* problem, int tiles, int rows, int64_t enough = 0) {
  if (enough == 0) enough = rows == 16 ? 4096 : 2048;
  const int64_t chunks = enough / (static_cast<int64_t>(problem->heads) * tiles);
  problem->tiles = tiles;
  problem->batch_per_chunk =
      static_cast<int>(chunks <= 1 ? problem->batch : (problem->batch + chunks - 1) / chunks);
  problem->chunks = (problem->batch + problem->batch_per_chunk - 1) / problem->batch_per_chunk;
}

struct Item {
  int tile;
  int head;
  int chunk;
  int batch_begin;
  int batch_end;
};

VK_DEVICE Item get_item(const Problem& problem, int64_t index) {
  Item item;
  const unsigned whole = static_cast<unsigned>(index), unit = whole / problem.tiles;
  item.tile = static_cast<int>(whole - unit * problem.tiles);
  item.chunk = static_cast<int>(unit / problem.heads);
  item.head = static_cast<int>(unit - item.chunk * problem.heads);
  item.batch_begin = item.chunk * problem.batch_per_chunk;
  const int left = problem.batch - item.batch_begin;
  item.batch_end = item.batch_begin + (left < problem.batch_per_chunk ? left : problem.batch_per_chunk);
  return item;
}

// An item's sums of the operator's gradient, by the threads that they belong to.
template <class Acc>
VK_DEVICE void store_partials(const Problem& problem, const Item& item, const Acc* sums, int elements,
                              int thread, int threads) {
  const int64_t tile = static_cast<int64_t>(item.chunk) * problem.tiles + item.tile;
  Acc* partials =
      static_cast<Acc*>(problem.gradient_partials) + (tile * problem.heads + item.head) * elements;
  for (int e = thread; e < elements; e += threads) partials[e] = sums[e];
}

// The warps that share a tile. A group of one warp never waits for the rest of its block.
template <int ROWS>
struct Group {
  static_assert(ROWS == 16 || ROWS == 64);
  static constexpr int THREADS = 2 * ROWS;
  static constexpr int PER_BLOCK = BLOCK_THREADS / THREADS;

  int index = PER_BLOCK == 1 ? 0 : thread_x() / THREADS;
  int thread = PER_BLOCK == 1 ? thread_x() : thread_x() % THREADS;
  int first_row = thread / 32 * 16;  // of this warp

  VK_DEVICE static void sync() {
    if constexpr (ROWS == 16) {
      sync_warp();
    } else {
      sync_block();
    }
  }
};

VK_HOST_DEVICE int round_up(int value, int multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// Numbers that are never negative are extended to 64 bits without an instruction; in double, whose kernels
// have no register to spare, the compiler does better when it is not told.
template <class T>
VK_HOST_DEVICE T* offset(const View& view, int batch, int head) {
  using Number = std::conditional_t<sizeof(T) == 8, int, uint32_t>;
  T* data = static_cast<T*>(view.data);
  return data == nullptr ? data
                         : data + static_cast<int64_t>(static_cast<Number>(batch)) * view.stride[0] +
                               static_cast<int64_t>(static_cast<Number>(head)) * view.stride[1];
}

// Hands out byte offsets into a group's shared memory. Layouts are made on the host and passed to the
// kernels, so that every offset is a constant-bank operand instead of a register.
class Carver {
 public:
  template <class T>
  int take(int64_t elements) {
    const int64_t offset = used_;
    used_ += (elements * static_cast<int64_t>(sizeof(T)) + 15) / 16 * 16;
    return static_cast<int>(offset);
  }
  int64_t used() const { return used_; }

 private:
  int64_t used_ = 0;
};

// Launches `kernel` over all items, with as many groups in a block as fit.
template <int ROWS, class Kernel, class Layout, class Map>
void launch_items(Kernel kernel, const Problem& problem, const Layout& layout, const Map& map,
                  Stream stream) {
  int64_t groups = SHARED_LIMIT / layout.bytes;
  if (groups > Group<ROWS>::PER_BLOCK) groups = Group<ROWS>::PER_BLOCK;
  if (groups < 1)
    throw std::runtime_error("tile attention: a tile needs " + std::to_string(layout.bytes) +
                             " bytes of shared memory, the limit is " + std::to_string(SHARED_LIMIT));
  if (problem.items() > 0x7fffffff) throw std::runtime_error("tile attention: more than 2^31 - 1 work items");
  const int64_t blocks = (problem.items() + groups - 1) / groups;
  launch(kernel, Dim3{blocks}, static_cast<int>(groups) * Group<ROWS>::THREADS,
         static_cast<size_t>(groups * layout.bytes), stream, problem, layout, map);
}

}  // namespace vitkernels::tile_attention

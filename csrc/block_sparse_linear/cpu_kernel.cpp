// The block-sparse linear map on one core, one instruction set.
//
// Floor: 2 N nnz bh bw FLOPs for y, for dx and for dV, at two FMAs a cycle. Beside them every feature of a
// token is packed once a pass, and every stored value once a product, for which a value serves N tokens and a
// feature as many outputs as its column of blocks has; x, y and their gradients cross memory once or twice.
//
// An item of a product is one row of blocks for a block of tokens. Its cost is known from the index, so that
// threads get shares of equal cost however uneven the rows are and whatever tokens are left at the end.
//
// The backward pass goes through the tokens in slices: what is packed of x and of grad_y is read by all three
// gradients while it is in the caches, and the same memory holds the next slice but one.
#include "cpu_kernel.h"

#include "gradient_cpu.h"
#include "pack_cpu.h"

namespace vitkernels::block_sparse_linear {
namespace VITKERNELS_ISA {

using namespace vitkernels::VITKERNELS_ISA;

namespace {

constexpr int kBlockBytes = 256 << 10;  // of a block of tokens, which half of the second-level cache holds
constexpr int kLeastTokens = 48, kMostTokens = 192;
// How the tokens of a slice are cut for a product.
struct Tokens {
  int64_t blocks;
  int size;

  int count(int64_t block, int64_t tokens) const {
    const int64_t rest = tokens - block * size;
    return static_cast<int>(rest < size ? rest : size);
  }

  template <class T>
  static Tokens of(int64_t tokens, const Side& side, T) {
    const int64_t bytes = static_cast<int64_t>(side.blocks) * round_up_lanes<T>(side.depth) * sizeof(T);
    int64_t most = kBlockBytes / bytes;
    most = most < kLeastTokens ? kLeastTokens : most > kMostTokens ? kMostTokens : most;
    Tokens t;
    t.blocks = (tokens + most - 1) / most;
    t.size = t.blocks ? static_cast<int>((tokens + t.blocks - 1) / t.blocks) : 0;
    // Whole tiles, but for the last block's.
    t.size = ceil_div(t.size, kRows<kPanelVecs>) * kRows<kPanelVecs>;
    t.blocks = t.size ? (tokens + t.size - 1) / t.size : 0;
    return t;
  }
};

// ---- y = activation(x W^T + bias), or the gradient of x

// Where a tile's rows go, and what is on the way; a row costs few instructions beside its sums.
template <class E, class T, int V>
struct Finish {
  E *to, *before;
  ptrdiff_t step, before_step;
  Vec<T> shift[V];
  int count;  // real lanes

  template <Activation A, bool kWhole>
  void rows(const T* sums, int count_of_rows) const {
    constexpr int L = kLanes<T>;
    E *row = to, *kept = before;
    for (int r = 0; r < count_of_rows; ++r, row += step, kept += before_step, sums += V * L) {
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) {
        const int real = kWhole ? L : imin(L, count - v * L);
        if (!kWhole && real <= 0) break;
        Vec<T> z = load(sums + v * L) + shift[v];
        if constexpr (A == Activation::gelu) {
          if (before) put<kWhole>(kept + v * L, z, real);
          z = gelu<T>(z);
        } else if constexpr (A == Activation::relu) {
          z = z <= T(0) ? Vec<T>{} : z;  // NaN passes
        }
        put<kWhole>(row + v * L, z, real);
      }
    }
  }

  template <bool kWhole>
  static void put(E* to, Vec<T> z, int real) {
    if (kWhole || real == kLanes<T>)
      store(to, z);
    else
      store_first(to, z, real);
  }

  template <Activation A>
  void rows(const T* sums, int count_of_rows) const {
    if (count >= V * kLanes<T>)
      rows<A, true>(sums, count_of_rows);
    else
      rows<A, false>(sums, count_of_rows);
  }
};

template <class E, class T, int V>
void panel_tile(const Params& p, bool backward, const Source& source, const T* features, const T* weights,
                const int32_t* ids, const Runs& runs, int64_t token, int rows, int first, int count) {
  constexpr int L = kLanes<T>;
  const View& out = backward ? p.grad_x : p.y;
  Finish<E, T, V> finish{};
  finish.count = count;
  finish.step = static_cast<ptrdiff_t>(out.stride[0]);
  finish.to = const_cast<E*>(row_of<E>(out, token)) + first;
  if (!backward && p.before) {
    finish.before_step = static_cast<ptrdiff_t>(p.before.stride[0]);
    finish.before = const_cast<E*>(row_of<E>(p.before, token)) + first;
  }
  if (!backward && p.bias) {
    const E* bias = static_cast<const E*>(p.bias.data) + first;
    for (int v = 0; v < V && v * L < count; ++v)
      finish.shift[v] = count - v * L >= L ? load(bias + v * L) : load_first(bias + v * L, count - v * L);
  }
  const Activation activation = backward ? Activation::none : p.activation;
  T sums[kRows<V> * V * L];
  for (int tiles = ceil_div(rows, kRows<V>); tiles > 0; --tiles) {
    const int tile = ceil_div(rows, tiles);
    // The lines to write arrive while the sums are made.
    for (int i = 0; i < tile; ++i) __builtin_prefetch(finish.to + i * finish.step, 1);
    multiply_panel<T, V>(source, features, weights, ids, runs, tile, sums);
    if (activation == Activation::none)
      finish.template rows<Activation::none>(sums, tile);
    else if (activation == Activation::gelu)
      finish.template rows<Activation::gelu>(sums, tile);
    else
      finish.template rows<Activation::relu>(sums, tile);
    rows -= tile;
    features += tile * source.token_step;
    finish.to += tile * finish.step;
    finish.before += tile * finish.before_step;
  }
}

// Whether a row of blocks is packed by the thread that multiplies it, when its turn comes: then nobody waits
// for anybody, and what is packed is in the thread's own cache. For few tokens, for which a row is packed
// once.
bool packs_rows(const Plan& plan) {
  return plan.slices == 1 && plan.slice <= kSlice;
}

// Tokens [token, token + tokens) of a row of blocks; `features` are the first one's, `weights` the row's.
template <class E, class T>
void product_item(const Params& p, const Side& side, bool backward, int64_t token, int tokens, int group,
                  const Source& source, const T* features, const T* weights) {
  constexpr int L = kLanes<T>;
  const int padded = round_up_lanes<T>(side.lanes), lanes = side.lanes_of(group);
  const int32_t* ids = side.ids + side.pointers[group];
  const int blocks = side.pointers[group + 1] - side.pointers[group];
  const Runs runs(blocks, side.depth);
  // Tiles of equal height: a row too few leaves adders idle.
  for (int tiles = ceil_div(tokens, kMaxRows); tiles > 0; --tiles) {
    const int rows = ceil_div(tokens, tiles);
    for (int lane = 0; lane < lanes; lane += kPanelVecs * L) {
      const T* panel = weights + static_cast<ptrdiff_t>(blocks) * side.depth * lane;
      const int first = group * side.lanes + lane, count = lanes - lane;
      if (padded - lane >= kPanelVecs * L)
        panel_tile<E, T, kPanelVecs>(p, backward, source, features, panel, ids, runs, token, rows, first,
                                     count);
      else
        panel_tile<E, T, 1>(p, backward, source, features, panel, ids, runs, token, rows, first, count);
    }
    tokens -= rows;
    token += rows;
    features += rows * source.token_step;
  }
}

// A thread's share of the product for a slice: the items whose cost begins there. Their order is (block of
// tokens, row of blocks), so that the features stay in the second-level cache; or the reverse where a row is
// packed into `scratch` when its turn comes.
template <class E, class T>
void product(const Params& p, bool backward, const Plan& plan, const Part& part, const T* features,
             const T* packed, T* scratch) {
  const Side side(p, p.transposed == backward);
  const Range slice(p, plan, part.slice);
  const int width = round_up_lanes<T>(side.depth);
  Source source{static_cast<ptrdiff_t>(plan.slice) * width, width, side.depth, side.blocks - 1,
                side.depth_of(side.blocks - 1)};
  if constexpr (kSame<E, T>) {
    if (!backward) {
      features = row_of<T>(p.x, slice.first);
      source.block_step = side.depth;
      source.token_step = static_cast<ptrdiff_t>(p.x.stride[0]);
    }
  }
  const Tokens tokens = Tokens::of(slice.count, side, T{});
  // A token of a row of blocks costs its blocks, and about one more for the epilogue.
  const int64_t each = p.nnz + side.groups, all = each * slice.count;
  const int64_t from = all * part.rank / part.size, to = all * (part.rank + 1) / part.size;
  const auto run = [&](int64_t first, int count, int g, const T* weights) {
    product_item<E, T>(p, side, backward, slice.first + first, count, g, source,
                       features + first * source.token_step, weights);
  };
  if (packs_rows(plan)) {
    for (int g = 0; g < side.groups; ++g) {
      const int blocks = side.pointers[g + 1] - side.pointers[g];
      int64_t cost = static_cast<int64_t>(side.pointers[g] + g) * slice.count;
      bool ready = false;
      for (int64_t b = 0; b < tokens.blocks; ++b) {
        const int count = tokens.count(b, slice.count);
        if (cost >= from && cost < to) {
          if (!ready) pack_row<E, T>(p, side, g, 0, blocks, scratch);
          ready = true;
          run(b * tokens.size, count, g, scratch);
        }
        cost += static_cast<int64_t>(blocks + 1) * count;
      }
    }
    return;
  }
  for (int64_t b = 0; b < tokens.blocks; ++b) {
    const int64_t first = b * tokens.size;
    const int count = tokens.count(b, slice.count);
    if ((first + count) * each <= from || first * each >= to) continue;
    for (int g = 0; g < side.groups; ++g) {
      const int64_t cost = first * each + static_cast<int64_t>(side.pointers[g] + g) * count;
      if (cost >= from && cost < to) run(first, count, g, packed + row_size<T>(side, side.pointers[g]));
    }
  }
}

// ---- the table

// Forward, x is read where it lies if it needs no conversion: what is read by one product is not copied.
template <class E, class T>
Plan plan_as(const Params& p, bool backward) {
  Plan plan{};
  // Sums over tokens that results of a narrower type cannot hold between slices are made in one slice.
  const bool whole = backward ? !kSame<E, T> && (p.grad_values || p.grad_bias) : kSame<E, T>;
  plan.slices = whole || p.tokens <= kSlice ? 1 : (p.tokens + kSlice - 1) / kSlice;
  plan.slice = (p.tokens + plan.slices - 1) / plan.slices;
  const Side taken(p, !p.transposed), given(p, p.transposed);  // by their depth
  const Side& weights = backward ? given : taken;
  if (p.grad_values)
    plan.thread = static_cast<size_t>(p.block_height) * round_up_lanes<T>(p.block_width) * sizeof(T);
  if (!backward || p.grad_x) {
    if (!packs_rows(plan)) plan.weights = row_size<T>(weights, p.nnz) * sizeof(T);
    for (int g = 0; packs_rows(plan) && g < weights.groups; ++g) {
      const size_t row = row_size<T>(weights, weights.pointers[g + 1] - weights.pointers[g]) * sizeof(T);
      if (plan.thread < row) plan.thread = row;
    }
  }
  if (backward ? bool(p.grad_values) : !kSame<E, T>)
    plan.inputs = static_cast<size_t>(taken.blocks) * plan.slice * round_up_lanes<T>(taken.depth) * sizeof(T);
  if (backward)
    plan.outputs =
        static_cast<size_t>(given.blocks) * plan.slice * round_up_lanes<T>(given.depth) * sizeof(T);
  return plan;
}

// A thread's share of what is to be packed for a slice, and of the values before the first.
template <class E, class T>
void pack_as(const Params& p, bool backward, const Plan& plan, const Part& part, const Shared& shared) {
  const Range slice(p, plan, part.slice);
  const int64_t begin = slice.first + slice.count * part.rank / part.size;
  const int64_t end = slice.first + slice.count * (part.rank + 1) / part.size;
  const auto tokens = [&](void* memory, int block, auto pack) {
    const int width = round_up_lanes<T>(block);
    pack(static_cast<T*>(memory) + (begin - slice.first) * width, static_cast<ptrdiff_t>(plan.slice) * width);
  };
  const int taken = p.transposed ? p.block_height : p.block_width;
  const int given = p.transposed ? p.block_width : p.block_height;
  if (plan.inputs)
    tokens(shared.inputs, taken, [&](T* to, ptrdiff_t step) {
      pack_tokens<E, T, Activation::none>(p.x, {}, p.taken(), taken, begin, end, to, step);
    });
  if (plan.outputs)
    tokens(shared.outputs, given, [&](T* to, ptrdiff_t step) {
      if (p.activation == Activation::gelu)
        pack_tokens<E, T, Activation::gelu>(p.grad_y, p.before, p.given(), given, begin, end, to, step);
      else if (p.activation == Activation::relu)
        pack_tokens<E, T, Activation::relu>(p.grad_y, p.y, p.given(), given, begin, end, to, step);
      else
        pack_tokens<E, T, Activation::none>(p.grad_y, {}, p.given(), given, begin, end, to, step);
    });
  if (plan.weights && part.slice == 0)
    pack_weights<E, T>(p, Side(p, p.transposed == backward), p.nnz * part.rank / part.size,
                       p.nnz * (part.rank + 1) / part.size, static_cast<T*>(shared.weights));
}

template <class E, class T>
void multiply_as(const Params& p, bool backward, const Plan& plan, const Part& part, const Shared& shared,
                 void* scratch) {
  const T* inputs = static_cast<const T*>(shared.inputs);
  const T* outputs = static_cast<const T*>(shared.outputs);
  if (!backward || p.grad_x)
    product<E, T>(p, backward, plan, part, backward ? outputs : inputs, static_cast<const T*>(shared.weights),
                  static_cast<T*>(scratch));
  if (backward && (p.grad_values || p.grad_bias))
    gradients<E, T>(p, plan, part, inputs, outputs, static_cast<T*>(scratch));
}

// A function's instance for the element type of the call and the type it computes in.
#define VITKERNELS_BY_TYPE(function, ...)                         \
  p.dtype == DType::f64   ? function<double, double>(__VA_ARGS__) \
  : p.dtype == DType::f32 ? function<float, float>(__VA_ARGS__)   \
  : p.dtype == DType::f16 ? function<f16, float>(__VA_ARGS__)     \
                          : function<bf16, float>(__VA_ARGS__)

Plan plan(const Params& p, bool backward) {
  return VITKERNELS_BY_TYPE(plan_as, p, backward);
}

void pack(const Params& p, bool backward, const Plan& plan, const Part& part, const Shared& shared) {
  VITKERNELS_BY_TYPE(pack_as, p, backward, plan, part, shared);
}

void multiply(const Params& p, bool backward, const Plan& plan, const Part& part, const Shared& shared,
              void* scratch) {
  VITKERNELS_BY_TYPE(multiply_as, p, backward, plan, part, shared, scratch);
}

#undef VITKERNELS_BY_TYPE

}  // namespace

extern const CpuKernel kKernel;
const CpuKernel kKernel{plan, pack, multiply};

}  // namespace VITKERNELS_ISA
}  // namespace vitkernels::block_sparse_linear

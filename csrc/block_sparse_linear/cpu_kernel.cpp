// The block-sparse linear map on one core, one instruction set.
//
// Floor: 2 N nnz bh bw FLOPs for y, for dx and for dV, at two FMAs a cycle. Beside them every feature of a
// token is packed once a pass, and every stored value once a product, for which a value serves N tokens and a
// feature as many outputs as its column of blocks has; x, y and their gradients cross memory once or twice.
//
// An item of a product is one row of blocks for a block of tokens. Its cost is known from the index, so that
// threads get shares of equal cost however uneven the rows are.
#include "cpu_kernel.h"

#include "pack_cpu.h"

namespace vitkernels::block_sparse_linear {
namespace VITKERNELS_ISA {

using namespace vitkernels::VITKERNELS_ISA;

namespace {

constexpr int kBlockBytes = 256 << 10;  // of a block of tokens, which half of the second-level cache holds
constexpr int kLeastTokens = 48, kMostTokens = 192;
constexpr int kSlice = 200;  // tokens of one chain of sums in the gradient of the values

// How the tokens are cut for a product.
struct Tokens {
  int64_t blocks;
  int size;

  template <class T>
  static Tokens of(const Params& p, const Side& side, T) {
    const int64_t bytes = static_cast<int64_t>(side.blocks) * round_up_lanes<T>(side.depth) * sizeof(T);
    int64_t most = kBlockBytes / bytes;
    most = most < kLeastTokens ? kLeastTokens : most > kMostTokens ? kMostTokens : most;
    Tokens t;
    t.blocks = (p.tokens + most - 1) / most;
    t.size = t.blocks ? static_cast<int>((p.tokens + t.blocks - 1) / t.blocks) : 0;
    // Whole tiles, but for the last block's.
    t.size = ceil_div(t.size, kRows<kPanelVecs>) * kRows<kPanelVecs>;
    t.blocks = t.size ? (p.tokens + t.size - 1) / t.size : 0;
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
void panel_tile(const Params& p, bool backward, const Run<T>& run, const Runs& runs, int64_t token, int rows,
                int first, int count) {
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
  for (int r = 0; r < rows; r += kRows<V>) {
    Run<T> part = run;
    part.features += r * run.token_step;
    const int tile = imin(kRows<V>, rows - r);
    // The lines to write arrive while the sums are made.
    for (int i = 0; i < tile; ++i) __builtin_prefetch(finish.to + i * finish.step, 1);
    multiply_panel<T, V>(part, runs, tile, sums);
    if (activation == Activation::none)
      finish.template rows<Activation::none>(sums, tile);
    else if (activation == Activation::gelu)
      finish.template rows<Activation::gelu>(sums, tile);
    else
      finish.template rows<Activation::relu>(sums, tile);
    finish.to += tile * finish.step;
    finish.before += tile * finish.before_step;
  }
}

// Where the features of a token lie: packed, or in x itself.
template <class T>
struct Features {
  const T* data;
  ptrdiff_t block_step, token_step;
};

template <class E, class T>
void product_item(const Params& p, const Side& side, bool backward, int64_t begin, int64_t end, int group,
                  const Features<T>& features, const T* weights) {
  constexpr int L = kLanes<T>;
  const int padded = round_up_lanes<T>(side.lanes);
  const int64_t start = side.pointers[group];
  const int blocks = side.pointers[group + 1] - side.pointers[group];
  const int lanes = side.lanes_of(group);
  weights += start * padded * side.depth;
  Run<T> run{nullptr,    features.block_step, features.token_step,           nullptr, side.ids + start, 0,
             side.depth, side.blocks - 1,     side.depth_of(side.blocks - 1)};
  const Runs runs(blocks, side.depth);
  // Tiles of equal height: a row too few leaves adders idle.
  const int tokens = static_cast<int>(end - begin), tiles = ceil_div(tokens, kMaxRows);
  int64_t token = begin;
  for (int i = 0; i < tiles; ++i) {
    const int rows = ceil_div(static_cast<int>(end - token), tiles - i);
    run.features = features.data + token * features.token_step;
    for (int lane = 0; lane < lanes; lane += kPanelVecs * L) {
      run.weights = weights + static_cast<ptrdiff_t>(blocks) * side.depth * lane;
      const int first = group * side.lanes + lane, count = lanes - lane;
      if (padded - lane >= kPanelVecs * L)
        panel_tile<E, T, kPanelVecs>(p, backward, run, runs, token, rows, first, count);
      else
        panel_tile<E, T, 1>(p, backward, run, runs, token, rows, first, count);
    }
    token += rows;
  }
}

// Shares [begin, end) of `shares`: items whose cost begins there, in the order (block of tokens, row of
// blocks).
template <class E, class T>
void product(const Params& p, bool backward, int64_t begin, int64_t end, int64_t shares, const T* features,
             const T* weights) {
  const Side side(p, p.transposed == backward);
  const int width = round_up_lanes<T>(side.depth);
  Features<T> source{features, static_cast<ptrdiff_t>(p.tokens) * width, width};
  if constexpr (kSame<E, T>) {
    if (!backward)
      source = {static_cast<const T*>(p.x.data), side.depth, static_cast<ptrdiff_t>(p.x.stride[0])};
  }
  const Tokens tokens = Tokens::of(p, side, T{});
  // A row of blocks costs its blocks, and about one more for the epilogue.
  const int64_t each = p.nnz + side.groups, all = each * tokens.blocks;
  const int64_t from = all * begin / shares, to = all * end / shares;
  for (int64_t b = from / each; b < tokens.blocks && b * each < to; ++b) {
    const int64_t first = b * tokens.size;
    const int64_t last = first + tokens.size < p.tokens ? first + tokens.size : p.tokens;
    for (int g = 0; g < side.groups; ++g) {
      const int64_t cost = b * each + side.pointers[g] + g;
      if (cost >= from && cost < to) product_item<E, T>(p, side, backward, first, last, g, source, weights);
    }
  }
}

// ---- the gradients of the values and of bias

template <class T, int V, int R = kRows<V>>
void gradient_rows(const Product<T>& product, int rows) {
  for (int row = 0, groups = ceil_div(rows, R); groups > 0; --groups) {
    const int count = ceil_div(rows - row, groups);
    multiply_rows<T, V, R>(product, count, row, 0);
    row += count;
  }
}

// Stored blocks [begin, end): dV[a][c] = sum over tokens of u[token][a] v[token][c].
template <class E, class T>
void gradient_values(const Params& p, int64_t begin, int64_t end, const T* rows, const T* columns, T* sums) {
  constexpr int L = kLanes<T>;
  const Index index(p.index, p.block_rows, p.block_cols, p.nnz);
  const int height = p.block_height, width = p.block_width;
  const int row_width = round_up_lanes<T>(height), col_width = round_up_lanes<T>(width);
  for (int64_t block = begin; block < end; ++block) {
    const int row = index.row[block], col = index.col[block];
    const T* u = rows + static_cast<ptrdiff_t>(row) * p.tokens * row_width;
    const T* v = columns + static_cast<ptrdiff_t>(col) * p.tokens * col_width;
    const int real_rows = imin(height, p.out_features - row * height);
    const int real_cols = imin(width, p.in_features - col * width);
    Product<T> product{0, 0, u, 1, row_width, v, col_width, nullptr, col_width, sums, col_width};
    const int64_t slices = (p.tokens + kSlice - 1) / kSlice;
    int64_t token = 0;
    for (int64_t s = 0; s < slices; ++s, token += product.depth) {
      product.depth = static_cast<int>((p.tokens - token + slices - s - 1) / (slices - s));
      product.add = nullptr;
      for (int lane = 0; lane < col_width; lane += kPanelVecs * L) {
        Product<T> panel = product;
        panel.a = u + token * row_width;
        panel.b = v + token * col_width + lane;
        panel.c = sums + lane;
        panel.add = s > 0 ? panel.c : nullptr;
        if (col_width - lane >= kPanelVecs * L)
          gradient_rows<T, kPanelVecs>(panel, real_rows);
        else
          gradient_rows<T, 1>(panel, real_rows);
      }
    }
    E* to = static_cast<E*>(p.grad_values.data) + block * height * static_cast<int64_t>(width);
    for (int r = 0; r < height; ++r, to += width) {
      const int count = r < real_rows ? real_cols : 0;
      const T* from = sums + static_cast<ptrdiff_t>(r) * col_width;
      for (int c = 0; c < count; c += L) {
        const int real = imin(L, count - c);
        if (real == L)
          store(to + c, load(from + c));
        else
          store_first(to + c, load(from + c), real);
      }
      for (int c = count; c < width; ++c) store_one(to + c, T(0));
    }
  }
}

// Blocks [begin, end) of features, summed over the tokens in slices.
template <class E, class T>
void gradient_bias(const Params& p, const Side& side, int64_t begin, int64_t end, const T* grads) {
  constexpr int L = kLanes<T>;
  const int width = round_up_lanes<T>(side.depth);
  for (int64_t block = begin; block < end; ++block) {
    const int first = static_cast<int>(block) * side.depth, count = side.depth_of(static_cast<int>(block));
    for (int i = 0; i < count; i += L) {
      const T* from = grads + block * p.tokens * width + i;
      Vec<T> all = {};
      for (int64_t token = 0; token < p.tokens; token += kSlice) {
        const int64_t stop = token + kSlice < p.tokens ? token + kSlice : p.tokens;
        Vec<T> slice = {};
        for (int64_t n = token; n < stop; ++n) slice += load(from + n * width);
        all += slice;
      }
      store_first(static_cast<E*>(p.grad_bias.data) + first + i, all, imin(L, count - i));
    }
  }
}

// ---- the table

template <class E>
void run_as(const Params& p, Step step, bool backward, int64_t begin, int64_t end, int64_t items,
            const Shared& shared, void* scratch) {
  using T = Compute<E>;
  T* inputs = static_cast<T*>(shared.inputs);
  T* outputs = static_cast<T*>(shared.outputs);
  T* weights = static_cast<T*>(shared.weights);
  const int taken_block = p.transposed ? p.block_height : p.block_width;
  const int given_block = p.transposed ? p.block_width : p.block_height;
  const int64_t first = begin * kChunk, last = end * kChunk < p.tokens ? end * kChunk : p.tokens;
  if (step == kPackInputs)
    pack_tokens<E, T, Activation::none>(p, p.x, {}, p.taken(), taken_block, first, last, inputs);
  else if (step == kPackOutputs && p.activation == Activation::gelu)
    pack_tokens<E, T, Activation::gelu>(p, p.grad_y, p.before, p.given(), given_block, first, last, outputs);
  else if (step == kPackOutputs && p.activation == Activation::relu)
    pack_tokens<E, T, Activation::relu>(p, p.grad_y, p.y, p.given(), given_block, first, last, outputs);
  else if (step == kPackOutputs)
    pack_tokens<E, T, Activation::none>(p, p.grad_y, {}, p.given(), given_block, first, last, outputs);
  else if (step == kPackWeights)
    pack_weights<E, T>(p, Side(p, p.transposed == backward), begin, end, weights);
  else if (step == kForward || step == kBackward)
    product<E, T>(p, backward, begin, end, items, backward ? outputs : inputs, weights);
  else if (step == kGradientValues)
    gradient_values<E, T>(p, begin, end, p.transposed ? inputs : outputs, p.transposed ? outputs : inputs,
                          static_cast<T*>(scratch));
  else
    gradient_bias<E, T>(p, Side(p, p.transposed), begin, end, outputs);
}

void run(const Params& p, Step step, bool backward, int64_t begin, int64_t end, int64_t items,
         const Shared& shared, void* scratch) {
  if (p.dtype == DType::f64)
    run_as<double>(p, step, backward, begin, end, items, shared, scratch);
  else if (p.dtype == DType::f32)
    run_as<float>(p, step, backward, begin, end, items, shared, scratch);
  else if (p.dtype == DType::f16)
    run_as<f16>(p, step, backward, begin, end, items, shared, scratch);
  else
    run_as<bf16>(p, step, backward, begin, end, items, shared, scratch);
}

int64_t items(const Params& p, Step step, int threads) {
  if (step == kPackInputs || step == kPackOutputs) return (p.tokens + kChunk - 1) / kChunk;
  if (step == kPackWeights || step == kGradientValues) return p.nnz;
  if (step == kGradientBias) return p.transposed ? p.block_cols : p.block_rows;
  return threads;
}

template <class T>
size_t shared_as(const Params& p, Step step, bool backward) {
  if (step == kPackWeights) {
    const Side side(p, p.transposed == backward);
    return static_cast<size_t>(p.nnz) * side.depth * round_up_lanes<T>(side.lanes) * sizeof(T);
  }
  const Side side(p, p.transposed == (step == kPackOutputs));
  return static_cast<size_t>(side.blocks) * p.tokens * round_up_lanes<T>(side.depth) * sizeof(T);
}

size_t shared_bytes(const Params& p, Step step, bool backward) {
  return p.dtype == DType::f64 ? shared_as<double>(p, step, backward) : shared_as<float>(p, step, backward);
}

size_t thread_bytes(const Params& p, Step step) {
  if (step != kGradientValues) return 0;
  return static_cast<size_t>(p.block_height) * (p.block_width + kLanes<float>)*sizeof(double);
}

}  // namespace

extern const CpuKernel kKernel;
const CpuKernel kKernel{shared_bytes, thread_bytes, items, run};

}  // namespace VITKERNELS_ISA
}  // namespace vitkernels::block_sparse_linear

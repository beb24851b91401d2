// The mask's gradient: dG = z dy^T + other dy_other^T, then the chain through the normalisation.
//
// A shared mask's dG is summed over the batch before the chain, which is linear in it. Blocks of threads sum
// over a share of the batch each, so that there are enough of them to fill a GPU; a second pass adds the
// shares in their order. The chain reads the dG of one mask, in float, twice: once for its sum e over a
// column or a row, which is exact to float where <y, dy> would carry the rounding of y. It costs a mask of N
// x P floats, written and read through L2: a quarter of the tokens' bytes at 197 x 768 to 158. Without a
// normalisation a mask for each sample is written as it is.
//
// Floor: 2 batch N P (D + D') FLOPs; the tokens and their merged gradients once, the mask twice. From L2 come
// the tokens once for every 128 merged ones, and those once for every 64 tokens.
#include "mask_gradient.h"
#include "norms.h"
#include "strips.h"
#include "vitkernels/sum_partials.h"

namespace vitkernels::learnable_token_merge {
namespace {

// Blocks of threads that fill a large GPU about twice, and the most memory that the shares may take.
constexpr int64_t MANY_BLOCKS = 512, PARTIAL_BYTES = int64_t{64} << 20;

template <class T>
struct Pair {
  Matrices<const T> tokens, merged;
  int steps = 0;  // through its channels; none where one of the two is absent

  Pair(const View& left, const View& right, int64_t width) : tokens(left, width), merged(right, width) {
    if (left && right) steps = ceil_div(width, Config<T>::DEPTH);
  }
};

template <class T>
struct GradientProblem {
  Pair<T> first, second;
  int tokens, merged, batch, share;  // share: batch entries of a block of threads
  int row_tiles, column_tiles;
};

template <class T, class R>
struct GradientShape {
  using C = Config<T>;
  static constexpr int LEFT = ROWS * C::LD_DEPTH, STAGE = LEFT + COLUMNS * C::LD_DEPTH;
  static constexpr size_t STAGED = sizeof(T) * C::STAGES * STAGE;
  static constexpr size_t SHARED = STAGED > result_bytes<T, R>() ? STAGED : result_bytes<T, R>();
};

// A tile of dG, summed over a share of the batch, to results [shares][N][P].
template <class T, class R>
VK_KERNEL void VK_LAUNCH_BOUNDS(THREADS, sizeof(T) == 2   ? 4
                                         : sizeof(T) == 4 ? 2
                                                          : 1)
    gradient_kernel(GradientProblem<T> p, Matrices<R> results) {
  using C = Config<T>;
  using S = GradientShape<T, R>;
  constexpr int STAGES = C::STAGES, DEPTH = C::DEPTH;
  T* const stages = reinterpret_cast<T*>(shared_memory());
  const int above = block_x() / p.column_tiles, column = (block_x() - above * p.column_tiles) * COLUMNS;
  const int part = above / p.row_tiles, row = (above - part * p.row_tiles) * ROWS;
  const int begin = part * p.share, left_over = p.batch - begin;
  const int entries = left_over < p.share ? left_over : p.share;
  const int of_entry = p.first.steps + p.second.steps;
  const int64_t steps = static_cast<int64_t>(entries) * of_entry;

  int entry = begin, inside = 0, place = 0;  // of the stage that is loaded next
  const auto load = [&](int64_t step) {
    if (step < steps) {
      const bool second = inside >= p.first.steps;
      const Matrices<const T> tokens = second ? p.second.tokens : p.first.tokens;
      const Matrices<const T> merged = second ? p.second.merged : p.first.merged;
      const int channel = (second ? inside - p.first.steps : inside) * DEPTH;
      T* stage = stages + place * S::STAGE;
      load_tile<ROWS, DEPTH>(stage, C::LD_DEPTH, tokens, entry, row, p.tokens, channel);
      load_tile<COLUMNS, DEPTH>(stage + S::LEFT, C::LD_DEPTH, merged, entry, column, p.merged, channel);
      if (++inside == of_entry) {
        inside = 0;
        ++entry;
      }
      place = place == STAGES - 1 ? 0 : place + 1;
    }
    cp_async_commit();
  };

  WarpSums<T, TILES> sums;
  clear_sums<T, TILES>(sums);
  VK_UNROLL
  for (int s = 0; s < STAGES - 1; ++s) load(s);
  const int warp_row = warp_id() % 2 * 32, warp_column = warp_id() / 2 * 16 * TILES;
  int current = 0;
  VK_NO_UNROLL
  for (int64_t step = 0; step < steps; ++step) {
    cp_async_wait<STAGES - 2>();
    sync_block();  // the stage is there for all, and all are done with the one before
    load(step + STAGES - 1);
    const T* left = stages + current * S::STAGE;
    const T* right = left + S::LEFT + warp_column * C::LD_DEPTH;
    left += warp_row * C::LD_DEPTH;
    VK_UNROLL
    for (int k = 0; k < DEPTH; k += 16)
      multiply_step<true, true, C::LD_DEPTH, C::LD_DEPTH, T, TILES>(sums, left + k, right + k,
                                                                    (1 << TILES) - 1);
    current = current == STAGES - 1 ? 0 : current + 1;
  }
  sync_block();  // the results take the place of the stages
  store_results<T, R>(sums, results, part, row, p.tokens, column);
}

template <class Acc, class M>
struct Chain {
  const M* g;
  const Acc *gradient, *shift, *divisor;  // dG [masks][N][P]; shift and divisor as in Mask
  M* result;
  int64_t g_mask, g_row, norm_mask, result_mask, result_row;
  int rows, columns;

  VK_DEVICE const Acc* gradient_row(int64_t mask, int row) const {
    return gradient + (mask * rows + row) * columns;
  }
};

// sum: (dG - e) / c, or dG where c was 0; softmax: G (dG - e); e[p] = sum_n G dG.
template <class Acc, class M>
VK_KERNEL void VK_LAUNCH_BOUNDS(STRIP_THREADS, 1)
    chain_columns_kernel(Chain<Acc, M> p, int strips, bool softmax) {
  Acc* scratch = reinterpret_cast<Acc*>(shared_memory());
  const int64_t mask = block_x() / strips;
  const int column = static_cast<int>(block_x() % strips) * 32 + lane_id();
  const bool exists = column < p.columns;
  const M* g = exists ? p.g + mask * p.g_mask + column : nullptr;
  Acc shift = Acc(0), divisor = Acc(1);
  bool empty = false;
  if (!softmax) {
    divisor = column_sum<Acc>(g, p.g_row, p.rows, scratch);
    empty = divisor == Acc(0);
  } else if (exists) {
    shift = p.shift[mask * p.norm_mask + column];
    if (p.divisor != nullptr) divisor = p.divisor[mask * p.norm_mask + column];
  }
  const auto weight = [&](int row) {
    const Acc value = to_accumulate(g[row * p.g_row]);
    return (softmax ? exp_(value - shift) : value) / divisor;
  };
  Acc sum = Acc(0);
  if (exists && !empty) {
    VK_UNROLL_4
    for (int row = warp_id(); row < p.rows; row += STRIP_WARPS)
      sum += weight(row) * p.gradient_row(mask, row)[column];
  }
  sum = over_warps<false>(sum, scratch);
  if (!exists) return;
  M* result = p.result + mask * p.result_mask + column;
  VK_UNROLL_4
  for (int row = warp_id(); row < p.rows; row += STRIP_WARPS) {
    const Acc gradient = p.gradient_row(mask, row)[column];
    const Acc chained = softmax ? weight(row) * (gradient - sum)
                        : empty ? gradient
                                : (gradient - sum) / divisor;
    result[row * p.result_row] = from_accumulate<M>(chained);
  }
}

// G (dG - e), e[n] = sum_p G dG: a warp a row.
template <class Acc, class M>
VK_KERNEL void VK_LAUNCH_BOUNDS(STRIP_THREADS, 1) chain_rows_kernel(Chain<Acc, M> p, int64_t all_rows) {
  const int64_t index = static_cast<int64_t>(block_x()) * STRIP_WARPS + warp_id();
  if (index >= all_rows) return;
  const int64_t mask = index / p.rows;
  const int row = static_cast<int>(index - mask * p.rows);
  const M* g = p.g + mask * p.g_mask + row * p.g_row;
  const Acc* gradient = p.gradient_row(mask, row);
  const Acc shift = p.shift[mask * p.norm_mask + row];
  const Acc divisor = p.divisor == nullptr ? Acc(1) : p.divisor[mask * p.norm_mask + row];
  const auto weight = [&](int column) { return exp_(to_accumulate(g[column]) - shift) / divisor; };
  Acc sum = Acc(0);
  VK_NO_UNROLL
  for (int column = lane_id(); column < p.columns; column += 32) sum += weight(column) * gradient[column];
  sum = warp_sum(sum);
  M* result = p.result + mask * p.result_mask + row * p.result_row;
  VK_NO_UNROLL
  for (int column = lane_id(); column < p.columns; column += 32)
    result[column] = from_accumulate<M>(weight(column) * (gradient[column] - sum));
}

struct Plan {
  bool summed, direct;  // over the batch; dG is the result
  int64_t size, parts, share;

  explicit Plan(const Params& p)
      : summed(p.grad_g.stride[0] == 0), size(p.tokens * p.merged_tokens), parts(p.batch), share(1) {
    if (summed) {
      const int64_t tiles = int64_t{ceil_div(p.tokens, ROWS)} * ceil_div(p.merged_tokens, COLUMNS);
      const int64_t fit = PARTIAL_BYTES / (size * accumulator_bytes(p)), fill = MANY_BLOCKS / tiles;
      int64_t most = fit < fill ? fit : fill;
      if (most > p.batch) most = p.batch;
      if (most < 1) most = 1;
      share = ceil_div(p.batch, most);
      if (share < 1) share = 1;
      parts = ceil_div(p.batch, share);
      if (parts < 1) parts = 1;  // an empty batch sums to zero
    }
    direct = p.normalize == Normalize::none && (!summed || parts == 1);
  }
};

template <class T, class R>
void launch_gradient(const Params& p, const Plan& plan, const View& results, Stream stream) {
  GradientProblem<T> problem{{p.z, p.grad_y, p.width},   {p.other, p.grad_y_other, p.other_width},
                             static_cast<int>(p.tokens), static_cast<int>(p.merged_tokens),
                             static_cast<int>(p.batch),  static_cast<int>(plan.share),
                             ceil_div(p.tokens, ROWS),   ceil_div(p.merged_tokens, COLUMNS)};
  launch(gradient_kernel<T, R>, Dim3{plan.parts * problem.row_tiles * problem.column_tiles}, THREADS,
         GradientShape<T, R>::SHARED, stream, problem, Matrices<R>(results, p.merged_tokens));
}

template <class T, class M>
void run(const Params& p, void* norms, void* workspace, Stream stream) {
  using Acc = accumulate_t<T>;
  const Plan plan(p);
  if (plan.parts == 0) return;
  if (plan.direct) return launch_gradient<T, M>(p, plan, p.grad_g, stream);
  launch_gradient<T, Acc>(p, plan, View{workspace, {plan.size, p.merged_tokens, 1}}, stream);

  Acc* gradient = static_cast<Acc*>(workspace);
  M* result = static_cast<M*>(p.grad_g.data);
  const int rows = static_cast<int>(p.tokens), columns = static_cast<int>(p.merged_tokens);
  if (plan.summed && plan.parts > 1) {
    if (p.normalize == Normalize::none) {
      sum_partials(gradient, plan.size, plan.parts, plan.size,
                   StoreRows<M>{result, p.grad_g.stride[1], columns}, stream);
      return;
    }
    // In place of the first part: who adds an element's parts is the one who writes it.
    sum_partials(gradient, plan.size, plan.parts, plan.size, StoreRows<Acc>{gradient, columns, columns},
                 stream);
  }
  const Mask<T, M> mask = make_mask<T, M>(p, norms);
  const Chain<Acc, M> chain{
      mask.g,          gradient,         mask.shift,         mask.divisor,       result, mask.batch_stride,
      mask.row_stride, mask.norm_stride, p.grad_g.stride[0], p.grad_g.stride[1], rows,   columns};
  const int64_t masks = plan.summed ? 1 : p.batch;
  if (by_rows(p)) {
    launch(chain_rows_kernel<Acc, M>, Dim3{ceil_div(masks * rows, STRIP_WARPS)}, STRIP_THREADS, 0, stream,
           chain, masks * rows);
  } else {
    const int strips = ceil_div(columns, 32);
    launch(chain_columns_kernel<Acc, M>, Dim3{masks * strips}, STRIP_THREADS, STRIP_BYTES<Acc>, stream, chain,
           strips, by_softmax(p));
  }
}

}  // namespace

int64_t mask_gradient_workspace(const Params& p) {
  const Plan plan(p);
  return plan.direct ? 0 : plan.parts * plan.size * accumulator_bytes(p);
}

void mask_gradient(const Params& p, void* norms, void* workspace, Stream stream) {
  with_dtypes(p.dtype, p.mask_dtype, [&](auto token, auto element) {
    run<decltype(token), decltype(element)>(p, norms, workspace, stream);
  });
}

}  // namespace vitkernels::learnable_token_merge

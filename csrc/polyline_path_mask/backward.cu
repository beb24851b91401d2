// Backward: the gradient of the mask, read once, to the gradients of the decays.
//
// A decay receives the gradients of all pairs whose way leads across it. Every pair lies on two lines: its
// query's row (transposed: column), where the gradients of all keys in one place of the line are alike, and
// its key's column (row), where those of all queries of the owner are. So one pass over the gradient makes
// two tables, `own` [planes][owners][chunks][steps][steps] and `shared` [planes][owners][tokens]; both then
// become, for each line, running sums away from the pair's other end, which are what the decays receive from
// its pairs, and are added up in order.
//
// Floor: (H W)^2 elements a head over the bandwidth; the tables are 2 / H or 2 / W of that.
#include "sums.h"

namespace vitkernels::polyline_path_mask {
namespace {

constexpr int BACKWARD_THREADS = 256, SMALL_THREADS = 128;
constexpr int ROWS = 4;   // rows of keys a thread
constexpr int STEPS = 4;  // queries at a time: loads in flight, and barriers shared

// Keys are cut into chunks of rows and columns for the blocks of an owner.
struct Cut {
  int columns, rows, row_chunks, column_chunks;

  explicit Cut(const Params& p) {
    columns = p.width < BACKWARD_THREADS ? p.width : BACKWARD_THREADS;
    rows = BACKWARD_THREADS / columns * ROWS;
    row_chunks = (p.height + rows - 1) / rows;
    column_chunks = (p.width + columns - 1) / columns;
  }
  // Of a place on the line that owns the queries: its keys lie in this many chunks.
  VK_HOST_DEVICE int chunks(bool transpose) const { return transpose ? column_chunks : row_chunks; }
};

template <class T, bool Transpose, bool Log>
VK_KERNEL void VK_LAUNCH_BOUNDS(BACKWARD_THREADS, 2)
    backward_kernel(Shape s, Cut cut, int owners, int steps, View grad, const accumulate_t<T>* sums,
                    accumulate_t<T>* own, accumulate_t<T>* shared) {
  using Acc = accumulate_t<T>;
  Acc* exchange = reinterpret_cast<Acc*>(shared_memory());
  const int64_t tokens = s.tokens();
  const int per_owner = cut.row_chunks * cut.column_chunks;
  const int64_t item = block_x() / per_owner, plane = item / owners;
  const int row_chunk = block_x() % per_owner % cut.row_chunks;
  const int column_chunk = block_x() % per_owner / cut.row_chunks;
  const int owner = static_cast<int>(item % owners);
  const Pairs<Transpose, Acc> pairs{sums + plane * tokens, sums + (s.planes + plane) * tokens, s.width,
                                    owner};
  own += (item * cut.chunks(Transpose) + (Transpose ? column_chunk : row_chunk)) * steps * steps;

  const int group = thread_x() / cut.columns, groups = cut.rows / ROWS;
  const int first_row = row_chunk * cut.rows, first_column = column_chunk * cut.columns;
  const int j0 = first_row + group, l = first_column + thread_x() % cut.columns;
  const bool active = group < groups && l < s.width;
  const T* from = static_cast<const T*>(grad.data) + plane / s.heads * grad.stride[0] +
                  plane % s.heads * grad.stride[1] + l;
  Acc total[ROWS], part[ROWS], value[ROWS];
  VK_UNROLL
  for (int u = 0; u < ROWS; ++u) {
    const int j = j0 + u * groups;
    total[u] = part[u] = value[u] = Acc(0);
    if (!Log && active && j < s.height) {
      part[u] = pairs.shared_part(j, l);
      value[u] = pairs.own_value(pairs.position(j, l));
    }
  }
  for (int step0 = 0; step0 < steps; step0 += STEPS) {
    Acc g[STEPS][ROWS];
    VK_UNROLL
    for (int q = 0; q < STEPS; ++q) {
      const bool inside = active && step0 + q < steps;
      const T* row = from + pairs.query(step0 + q) * grad.stride[2];
      const Acc query = !Log && inside ? pairs.own_value(step0 + q) : Acc(0);
      VK_UNROLL
      for (int u = 0; u < ROWS; ++u) {
        const int j = j0 + u * groups;
        g[q][u] = Acc(0);
        if (inside && j < s.height) {
          g[q][u] = to_accumulate(row[static_cast<int64_t>(j) * s.width]);
          if (!Log) g[q][u] *= exp_(part[u] + between(query, step0 + q, value[u], pairs.position(j, l)));
        }
        total[u] += g[q][u];
      }
    }
    sync_block();  // the tables of the steps before have been read
    if (Transpose) {
      // The sum along each row of keys, by the lanes of a warp.
      VK_UNROLL
      for (int q = 0; q < STEPS; ++q) {
        VK_UNROLL
        for (int u = 0; u < ROWS; ++u) exchange[(q * ROWS + u) * BACKWARD_THREADS + thread_x()] = g[q][u];
      }
      sync_block();
      for (int row = warp_id(); row < STEPS * ROWS * groups; row += BACKWARD_THREADS / 32) {
        const int which = row / groups, at = row % groups;
        Acc sum = Acc(0);
        for (int c = lane_id(); c < cut.columns; c += 32)
          sum += exchange[which * BACKWARD_THREADS + at * cut.columns + c];
        sum = warp_sum(sum);
        const int step = step0 + which / ROWS, j = first_row + which % ROWS * groups + at;
        if (lane_id() == 0 && step < steps && j < s.height) own[static_cast<int64_t>(step) * steps + j] = sum;
      }
    } else {
      // The sum down each column of keys.
      VK_UNROLL
      for (int q = 0; q < STEPS; ++q) {
        Acc sum = g[q][0];
        VK_UNROLL
        for (int u = 1; u < ROWS; ++u) sum += g[q][u];
        exchange[q * BACKWARD_THREADS + thread_x()] = sum;
      }
      sync_block();
      for (int t = thread_x(); t < STEPS * cut.columns; t += BACKWARD_THREADS) {
        const int q = t / cut.columns, c = t % cut.columns;
        Acc sum = Acc(0);
        for (int at = 0; at < groups; ++at) sum += exchange[q * BACKWARD_THREADS + at * cut.columns + c];
        if (step0 + q < steps && first_column + c < s.width)
          own[static_cast<int64_t>(step0 + q) * steps + first_column + c] = sum;
      }
    }
  }
  VK_UNROLL
  for (int u = 0; u < ROWS; ++u) {
    const int j = j0 + u * groups;
    if (active && j < s.height) shared[item * tokens + static_cast<int64_t>(j) * s.width + l] = total[u];
  }
}

// Lines inside a table: those of an outer part lie inner_step apart, their places place_step.
struct Lines {
  int64_t outers, outer_size, inner_step, place_step, chunk_size;
  int inners, places, chunks, owners;
  bool inner_is_end;  // whether a line's number, or its owner, is where the other end of its pairs stands
};

// Turns the gradients of the pairs (end, place) into what the decay before each place receives from them all.
// The chunks of a line are added up on the way.
template <class Acc>
VK_KERNEL void VK_LAUNCH_BOUNDS(SMALL_THREADS, 1) cross_kernel(Lines lines, Acc* table) {
  const int64_t index = static_cast<int64_t>(block_x()) * SMALL_THREADS + thread_x();
  if (index >= lines.outers * lines.inners) return;
  const int64_t outer = index / lines.inners;
  const int inner = static_cast<int>(index % lines.inners);
  const int end = lines.inner_is_end ? inner : static_cast<int>(outer % lines.owners);
  Acc* line = table + outer * lines.outer_size + inner * lines.inner_step;
  const auto pair = [&](int place) {
    Acc sum = line[place * lines.place_step];
    for (int chunk = 1; chunk < lines.chunks; ++chunk)
      sum += line[place * lines.place_step + chunk * lines.chunk_size];
    return sum;
  };
  Acc run = Acc(0), before = pair(0);
  for (int place = 1; place <= end; ++place) {
    run += before;
    before = pair(place);
    line[place * lines.place_step] = run;
  }
  run = Acc(0);
  for (int place = lines.places - 1; place > end; --place) {
    run += pair(place);
    line[place * lines.place_step] = run;
  }
}

// A thread for each decay: the sum over the other ends. `owned` decays lie on the line of an owner.
template <class T>
VK_KERNEL void VK_LAUNCH_BOUNDS(SMALL_THREADS, 1)
    sum_kernel(Shape s, bool transpose, bool owned, int64_t outer_size, int terms, int64_t term_step,
               const accumulate_t<T>* table, View grad) {
  const int owners = transpose ? s.width : s.height, steps = transpose ? s.height : s.width;
  const int64_t index = static_cast<int64_t>(block_x()) * SMALL_THREADS + thread_x();
  if (index >= s.planes * s.tokens()) return;
  const int64_t plane = index / s.tokens();
  const int token = static_cast<int>(index % s.tokens());
  int j = token / s.width, l = token % s.width, place;
  const accumulate_t<T>* from = table;
  if (owned) {
    const int owner = token / steps;
    place = token % steps;
    j = transpose ? place : owner;
    l = transpose ? owner : place;
    from += (plane * owners + owner) * outer_size + place;
  } else {
    place = transpose ? l : j;
    from += plane * outer_size + token;
  }
  accumulate_t<T> sum = 0;
  for (int term = 0; place > 0 && term < terms; ++term) sum += from[term * term_step];
  static_cast<T*>(grad.data)[plane / s.heads * grad.stride[0] + j * grad.stride[1] + l * grad.stride[2] +
                             plane % s.heads * grad.stride[3]] = from_accumulate<T>(sum);
}

int64_t own_elements(const Params& p, const Cut& cut) {
  return p.planes() * p.owners() * cut.chunks(p.transpose) * int64_t{p.steps()} * p.steps();
}

template <class T, bool Transpose, bool Log>
void launch_backward(const Params& p, Stream stream) {
  using Acc = accumulate_t<T>;
  const Cut cut(p);
  Acc* sums = static_cast<Acc*>(p.workspace);
  Acc* own = sums + 2 * p.planes() * p.tokens();
  Acc* shared = own + own_elements(p, cut);
  const int64_t items = p.planes() * p.owners(), steps = p.steps(), tokens = p.tokens();
  const int chunks = cut.chunks(Transpose);
  if (!Log) launch_sums<T>(p, stream);
  launch(backward_kernel<T, Transpose, Log>, Dim3{items * cut.row_chunks * cut.column_chunks},
         BACKWARD_THREADS, sizeof(Acc) * BACKWARD_THREADS * STEPS * (Transpose ? ROWS : 1), stream, Shape(p),
         cut, p.owners(), p.steps(), p.grad_mask, sums, own, shared);

  const auto blocks = [](int64_t threads) { return Dim3{(threads + SMALL_THREADS - 1) / SMALL_THREADS}; };
  if (const View& grad = Transpose ? p.grad_h : p.grad_w) {
    const Lines lines{
        items, chunks * steps * steps, steps, 1, steps * steps, p.steps(), p.steps(), chunks, p.owners(),
        true};
    launch(cross_kernel<Acc>, blocks(items * steps), SMALL_THREADS, 0, stream, lines, own);
    launch(sum_kernel<T>, blocks(p.planes() * tokens), SMALL_THREADS, 0, stream, Shape(p), Transpose, true,
           chunks * steps * steps, p.steps(), steps, own, grad);
  }
  if (const View& grad = Transpose ? p.grad_w : p.grad_h) {
    const int count = Transpose ? p.height : p.width, places = p.owners();
    const Lines lines{
        items,      tokens, Transpose ? p.width : 1, Transpose ? 1 : p.width, 0, count, places, 1,
        p.owners(), false};
    launch(cross_kernel<Acc>, blocks(items * count), SMALL_THREADS, 0, stream, lines, shared);
    launch(sum_kernel<T>, blocks(p.planes() * tokens), SMALL_THREADS, 0, stream, Shape(p), Transpose, false,
           p.owners() * tokens, p.owners(), tokens, shared, grad);
  }
}

}  // namespace

int64_t backward_workspace_cuda(const Params& p) {
  const Cut cut(p);
  const int64_t shared = p.planes() * p.owners() * p.tokens();
  return sums_bytes(p) + (own_elements(p, cut) + shared) * (p.dtype == DType::f64 ? 8 : 4);
}

void backward_cuda(const Params& p, Stream stream) {
  with_dtype(p.dtype, [&](auto element) {
    using T = decltype(element);
    if (p.transpose)
      p.log ? launch_backward<T, true, true>(p, stream) : launch_backward<T, true, false>(p, stream);
    else
      p.log ? launch_backward<T, false, true>(p, stream) : launch_backward<T, false, false>(p, stream);
  });
}

}  // namespace vitkernels::polyline_path_mask

// Matching: in one launch where an image's even tokens are those of one block, else scores, ranks and the
// plan one after another, each spread over the whole GPU.
//
// Floor of an image of t tokens: t^2 c / 2 FLOPs at the matrix rate, t c elements read, 12 t + 4 r bytes
// written. ViT-B at 64 images: 80 MFLOP and 1.8 MB, neither of which is a microsecond, so a call is bound by
// the latency of its one launch: load, multiply, count, with six barriers between. Stable Diffusion's 2 x
// 4096 x 320: 5.4 GFLOP, 5.2 MB, the scores bound by mma.sync's rate. In between, where blocks of rows alone
// would leave multiprocessors idle, the odd tokens are split among blocks too; the choice does not depend on
// the split.
#include "plan.h"
#include "vitkernels/divide.h"

namespace vitkernels::bipartite_match {
namespace {

constexpr int GROUP = 32;   // tokens of a block that counts, one a lane; its warps share the keys
constexpr int KEYS = 1024;  // of them in shared memory at a time

// What the launches of a large call hand on: of every image [parts][evens] values and odds, [evens] inverses
// and targets.
template <class Acc>
struct Work {
  int parts, part;  // of the odd tokens; tokens of one
  int64_t evens, images;
  Acc *values, *inverses;
  int* odds;
  uint32_t* targets;

  // `tile`: odd tokens that a block takes at once.
  Work(const Sizes& p, int tile, void* workspace) : evens(p.evens()), images(p.batch) {
    const int64_t blocks = images * ((evens + ROWS - 1) / ROWS), tiles = (p.odds() + tile - 1) / tile;
    int64_t wanted = (MULTIPROCESSORS + blocks - 1) / blocks;
    if (wanted > tiles) wanted = tiles;
    part = static_cast<int>((tiles + wanted - 1) / wanted) * tile;
    parts = (p.odds() + part - 1) / part;
    values = static_cast<Acc*>(workspace);
    inverses = values + images * parts * evens;
    odds = reinterpret_cast<int*>(inverses + images * evens);
    targets = reinterpret_cast<uint32_t*>(odds + images * parts * evens);
  }

  int64_t bytes() const {
    return images * evens * static_cast<int64_t>((parts + 1) * (sizeof(Acc) + sizeof(int)));
  }
  VK_DEVICE int64_t place(int64_t image, int index, int a) const {
    return (image * parts + index) * evens + a;
  }
  VK_DEVICE Ranked<Acc> ranked(const Sizes& p, int64_t image, int a) const {
    Best<Acc> best{values[place(image, 0, a)], odds[place(image, 0, a)]};
    for (int i = 1; i < parts; ++i) best.take(values[place(image, i, a)], odds[place(image, i, a)]);
    return Ranked<Acc>(p, a, best, inverses[image * evens + a]);
  }
};

// The keys that the calling warp counts, of `count` in shared memory (a multiple of four).
struct Segment {
  int begin, end;

  VK_DEVICE explicit Segment(int count) {
    const int share = tile_attention::round_up((count + WARPS - 1) / WARPS, 4);
    begin = warp_id() * share < count ? warp_id() * share : count;
    end = begin + share < count ? begin + share : count;
  }
};

// Over the warps of a block, lane by lane; `scratch` holds THREADS values, free for reuse after a barrier.
VK_DEVICE int sum_of_warps(int value, int* scratch) {
  scratch[thread_x()] = value;
  sync_block();
  int total = 0;
  for (int warp = 0; warp < WARPS; ++warp) total += scratch[32 * warp + lane_id()];
  return total;
}

template <class T>
VK_KERNEL void VK_LAUNCH_BOUNDS(THREADS, Config<T>::BLOCKS) whole_kernel(Problem<T> p, Plan plan) {
  using Acc = accumulate_t<T>;
  const Tiles<T> tiles(shared_memory());
  Acc* keys = reinterpret_cast<Acc*>(shared_memory() + Tiles<T>::BYTES);
  uint32_t* targets = reinterpret_cast<uint32_t*>(keys + ROWS);
  const int64_t image = block_x();
  const int evens = p.evens(), end = tile_attention::round_up(evens, 4);
  const int token = thread_x() % ROWS;  // of the even ones, then one half of the threads has odd ones

  scores_of<T>(tiles, p, image, 0, 0, p.odds());
  sync_block();
  int odd = 0;
  if (thread_x() < ROWS) {
    Acc key = Acc(INFINITY);
    if (token < evens) {
      const Ranked<Acc> ranked(p, token, tiles.best(), tiles.even_inverse[token]);
      key = ranked.key;
      odd = ranked.odd;
    }
    keys[token] = key;
  }
  sync_block();
  if (thread_x() < ROWS) {
    uint32_t target = NOWHERE;
    if (token < evens)
      target = plan.ranked(p, image, token, count_before(keys, 0, end, keys[token], token), odd);
    targets[token] = target;
  }
  sync_block();
  if (thread_x() < ROWS) {
    const uint32_t target = targets[token];
    if (token < evens) plan.place_even(p, image, token, target, count_before(targets, 0, end, target, token));
  } else if (token < p.odds()) {
    const uint32_t x = static_cast<uint32_t>(token);
    const int before = count_before(targets, 0, end, x, 0);
    plan.place_odd(p, image, token, before, count_before(targets, 0, end, x, token + 1) - before);
  }
}

template <class T>
VK_KERNEL void VK_LAUNCH_BOUNDS(THREADS, Config<T>::BLOCKS)
    score_kernel(Problem<T> p, Work<accumulate_t<T>> work, Divisor row_blocks, Divisor parts) {
  using Acc = accumulate_t<T>;
  const Tiles<T> tiles(shared_memory());
  const int rows = parts.divide(block_x()), part = block_x() - rows * parts.value();
  const int image = row_blocks.divide(rows), row = (rows - image * row_blocks.value()) * ROWS;
  const int begin = part * work.part, end = begin + work.part < p.odds() ? begin + work.part : p.odds();

  scores_of<T>(tiles, p, image, row, begin, end);
  sync_block();
  const int a = row + thread_x();
  if (thread_x() >= ROWS || a >= p.evens()) return;
  const Best<Acc> best = tiles.best();
  work.values[work.place(image, part, a)] = best.value;
  work.odds[work.place(image, part, a)] = best.odd;
  if (part == 0) work.inverses[image * work.evens + a] = tiles.even_inverse[thread_x()];
}

template <class Acc>
VK_KERNEL void VK_LAUNCH_BOUNDS(THREADS, 4) rank_kernel(Sizes p, Work<Acc> work, Plan plan, Divisor groups) {
  Acc* keys = reinterpret_cast<Acc*>(shared_memory());
  int* scratch = reinterpret_cast<int*>(keys + KEYS);
  const int image = groups.divide(block_x()), a = (block_x() - image * groups.value()) * GROUP + lane_id();
  const int evens = p.evens();

  const Ranked<Acc> mine = work.ranked(p, image, a < evens ? a : 0);
  int rank = 0;
  for (int first = 0; first < evens; first += KEYS) {
    const int rest = evens - first, count = rest < KEYS ? tile_attention::round_up(rest, 4) : KEYS;
    for (int i = thread_x(); i < count; i += THREADS)
      keys[i] = i < rest ? work.ranked(p, image, first + i).key : Acc(INFINITY);
    sync_block();
    const Segment own(count);
    rank += count_before(keys, own.begin, own.end, mine.key, a - first);
    sync_block();
  }
  rank = sum_of_warps(rank, scratch);
  if (warp_id() == 0 && a < evens)
    work.targets[image * work.evens + a] = plan.ranked(p, image, a, rank, mine.odd);
}

VK_KERNEL void VK_LAUNCH_BOUNDS(THREADS, 4)
    plan_kernel(Sizes p, const uint32_t* all_targets, Plan plan, Divisor groups, int even_groups) {
  uint32_t* targets = reinterpret_cast<uint32_t*>(shared_memory());
  int* scratch = reinterpret_cast<int*>(targets + KEYS);
  const int image = groups.divide(block_x()), group = block_x() - image * groups.value();
  const bool even = group < even_groups;
  const int token = (even ? group : group - even_groups) * GROUP + lane_id();
  const int evens = p.evens();
  all_targets += static_cast<int64_t>(image) * evens;

  const uint32_t target = even ? all_targets[token < evens ? token : 0] : static_cast<uint32_t>(token);
  int before = 0, own = 0;  // own: of an odd token
  for (int first = 0; first < evens; first += KEYS) {
    const int rest = evens - first, count = rest < KEYS ? tile_attention::round_up(rest, 4) : KEYS;
    for (int i = thread_x(); i < count; i += THREADS)
      targets[i] = i < rest ? all_targets[first + i] : NOWHERE;
    sync_block();
    const Segment mine(count);
    const int low = count_before(targets, mine.begin, mine.end, target, even ? token - first : 0);
    before += low;
    if (!even) own += count_before(targets, mine.begin, mine.end, target, token + 1 - first) - low;
    sync_block();
  }
  before = sum_of_warps(before, scratch);
  sync_block();
  own = sum_of_warps(own, scratch);
  if (warp_id() != 0) return;
  if (even) {
    if (token < evens) plan.place_even(p, image, token, target, before);
  } else if (token < p.odds()) {
    plan.place_odd(p, image, token, before, own);
  }
}

template <class T>
void match(const Problem<T>& p, const Plan& plan, void* workspace, Stream stream) {
  using Acc = accumulate_t<T>;
  if (p.evens() <= ROWS) {
    const size_t shared = Tiles<T>::BYTES + ROWS * (sizeof(Acc) + sizeof(uint32_t));
    return launch(whole_kernel<T>, Dim3{p.batch}, THREADS, shared, stream, p, plan);
  }
  const Work<Acc> work(p, Config<T>::COLUMNS, workspace);
  const int row_blocks = (p.evens() + ROWS - 1) / ROWS;
  launch(score_kernel<T>, Dim3{p.batch * row_blocks * work.parts}, THREADS, Tiles<T>::BYTES, stream, p, work,
         Divisor(row_blocks), Divisor(work.parts));
  const int even_groups = (p.evens() + GROUP - 1) / GROUP;
  const int all_groups = even_groups + (p.odds() + GROUP - 1) / GROUP;
  launch(rank_kernel<Acc>, Dim3{p.batch * even_groups}, THREADS, KEYS * sizeof(Acc) + THREADS * sizeof(int),
         stream, p, work, plan, Divisor(even_groups));
  launch(plan_kernel, Dim3{p.batch * all_groups}, THREADS, KEYS * sizeof(uint32_t) + THREADS * sizeof(int),
         stream, p, work.targets, plan, Divisor(all_groups), even_groups);
}

}  // namespace

void forward_cuda(const Params& p, Stream stream) {
  if (p.batch == 0) return;
  with_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    match(Problem<T>(p), Plan(p), p.workspace, stream);
  });
}

int64_t workspace_cuda(const Params& p) {
  const Sizes sizes(p);
  if (p.batch == 0 || sizes.evens() <= ROWS) return 0;
  return with_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    return Work<accumulate_t<T>>(sizes, Config<T>::COLUMNS, nullptr).bytes();
  });
}

}  // namespace vitkernels::bipartite_match

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <utility>

#include "cpu_kernel.h"
#include "vitkernels/cpu_dispatch.h"
#include "vitkernels/parallel.h"

namespace vitkernels::bipartite_match {
namespace {

const CpuKernels& kernels() {
#ifdef VITKERNELS_X86_ISAS
  if (selected_isa() == Isa::avx512) return avx512::kKernels;
  if (selected_isa() == Isa::avx2) return avx2::kKernels;
#endif
  return baseline::kKernels;
}

size_t aligned(size_t bytes) {
  return (bytes + 63) / 64 * 64;
}

// ---- from the best scores to the plan

// Keys that sort by falling score, then by rising token; no two are equal.
uint64_t key_of(float score, uint32_t token) {
  score += 0.0f;  // -0 equals 0
  uint32_t bits;
  std::memcpy(&bits, &score, sizeof(bits));
  const uint32_t rising = bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
  return static_cast<uint64_t>(~rising) << 32 | token;
}
uint32_t token_of(uint64_t key) {
  return static_cast<uint32_t>(key);
}

using WideKey = std::pair<uint64_t, uint32_t>;

WideKey key_of(double score, uint32_t token) {
  score += 0.0;
  uint64_t bits;
  std::memcpy(&bits, &score, sizeof(bits));
  const uint64_t rising = bits ^ (bits >> 63 ? ~uint64_t{0} : uint64_t{1} << 63);
  return {~rising, token};
}
uint32_t token_of(const WideKey& key) {
  return key.second;
}

// Writes the plan of an image. `memory` holds a key for each even token and then t' counters.
template <class T>
void write_plan(const Params& p, const Image& image, void* memory) {
  using Key = decltype(key_of(T(), 0));
  const int64_t tokens = p.tokens, evens = (tokens + 1) / 2, r = p.merged, alone = evens - r;
  const int64_t merged_tokens = tokens - r;
  int32_t* rows = static_cast<int32_t*>(p.rows.data) + image.number * tokens;
  int32_t* starts = static_cast<int32_t*>(p.starts.data) + image.number * (merged_tokens + 1);
  int32_t* members = static_cast<int32_t*>(p.members.data) + image.number * tokens;
  int32_t* src = static_cast<int32_t*>(p.src.data) + image.number * r;
  int32_t* dst = static_cast<int32_t*>(p.dst.data) + image.number * r;
  const T* best = static_cast<const T*>(image.best);

  Key* keys = static_cast<Key*>(memory);
  const int64_t ranked = evens - p.class_token;
  for (int64_t i = 0; i < ranked; ++i) {
    const uint32_t a = static_cast<uint32_t>(i + p.class_token);
    keys[i] = key_of(best[a], a);
  }
  if (p.class_token) {
    std::nth_element(keys, keys + r - 1, keys + ranked);
    std::sort(keys, keys + r);
  } else {
    std::sort(keys, keys + ranked);
  }

  const auto odd_row = [&](int64_t b) {
    return static_cast<int32_t>(p.distill_token && b == 0 ? 1 : alone + b);
  };
  const auto kept_row = [&](int64_t j) { return static_cast<int32_t>(j + (p.distill_token && j > 0)); };
  for (int64_t a = 0; a < evens; ++a) rows[2 * a] = -1;
  for (int64_t b = 0; b < tokens / 2; ++b) rows[2 * b + 1] = odd_row(b);
  for (int64_t i = 0; i < r; ++i) {
    const uint32_t a = token_of(keys[i]);
    const int32_t b = image.choice[a];
    rows[2 * a] = odd_row(b);
    src[i] = static_cast<int32_t>(2 * a);
    dst[i] = 2 * b + 1;
  }
  if (p.class_token) {
    for (int64_t a = 0, j = 0; a < evens; ++a)
      if (rows[2 * a] < 0) rows[2 * a] = kept_row(j++);
  } else {
    for (int64_t j = 0; j < alone; ++j) rows[2 * token_of(keys[r + j])] = kept_row(j);
  }

  int32_t* next = reinterpret_cast<int32_t*>(keys + evens);
  std::fill(next, next + merged_tokens, 0);
  for (int64_t i = 0; i < tokens; ++i) ++next[rows[i]];
  int32_t start = 0;
  for (int64_t g = 0; g < merged_tokens; ++g) {
    starts[g] = start;
    start += std::exchange(next[g], start);
  }
  starts[merged_tokens] = start;
  for (int64_t i = 0; i < tokens; ++i) members[next[rows[i]]++] = static_cast<int32_t>(i);
}

// ---- the loops

struct Call {
  const Params& params;
  const CpuKernel& kernel;
  int64_t panels, tiles;
  size_t odds, best, choice, evens, plan, shared;
  char* memory = nullptr;

  explicit Call(const Params& p) : params(p), kernel(p.dtype == DType::f64 ? kernels().f64 : kernels().f32) {
    const int64_t count = (p.tokens + 1) / 2;
    panels = (p.tokens / 2 + kernel.panel_odds - 1) / kernel.panel_odds;
    tiles = (count + kernel.tile_evens - 1) / kernel.tile_evens;
    odds = aligned(kernel.odds_bytes(p));
    best = aligned(count * sizeof(double));
    choice = aligned(count * sizeof(int32_t));
    plan = aligned(count * sizeof(WideKey) + (p.tokens - p.merged) * sizeof(int32_t));
    evens = aligned(kernel.evens_bytes(p));
    shared = odds + best + choice + plan;
  }

  Image image(int64_t number, char* place) const {
    return {number, place, place + odds, reinterpret_cast<int32_t*>(place + odds + best)};
  }
  void finish(const Image& image, char* place) const {
    void* scratch = place + odds + best + choice;
    params.dtype == DType::f64 ? write_plan<double>(params, image, scratch)
                               : write_plan<float>(params, image, scratch);
  }
};

// An image a thread.
void by_images(Call& call, int threads) {
  call.memory = static_cast<char*>(thread_scratch((call.shared + call.evens) * threads));
  parallel_for(
      call.params.batch, threads,
      [](void* context, int64_t begin, int64_t end, int slot) {
        const Call& c = *static_cast<Call*>(context);
        char* place = c.memory + (c.shared + c.evens) * slot;
        for (int64_t number = begin; number < end; ++number) {
          const Image image = c.image(number, place);
          c.kernel.pack_panels(c.params, image, 0, c.panels);
          c.kernel.score_tiles(c.params, image, 0, c.tiles, place + c.shared);
          c.finish(image, place);
        }
      },
      &call);
}

// All threads on one image after the other.
void within_images(Call& call, int threads) {
  call.memory = static_cast<char*>(thread_scratch(call.shared + call.evens * threads));
  parallel_team(
      threads,
      [](void* context, int rank, int size, TeamBarrier& barrier) {
        const Call& c = *static_cast<Call*>(context);
        for (int64_t number = 0; number < c.params.batch; ++number) {
          const Image image = c.image(number, c.memory);
          // The scores of the image before have all been read: its last barrier came after them.
          c.kernel.pack_panels(c.params, image, c.panels * rank / size, c.panels * (rank + 1) / size);
          // Here also waits who still writes the plan of the image before from what is overwritten next.
          barrier.wait(size);
          c.kernel.score_tiles(c.params, image, c.tiles * rank / size, c.tiles * (rank + 1) / size,
                               c.memory + c.shared + c.evens * rank);
          barrier.wait(size);
          if (rank == 0) c.finish(image, c.memory);
        }
      },
      &call);
}

}  // namespace

void forward_cpu(const Params& p, int threads) {
  Call call(p);
  const double work = 2.0 * p.batch * ((p.tokens + 1) / 2) * (p.tokens / 2) * p.channels;
  threads = worthwhile_threads(work, p.batch * call.tiles, threads);
  if (p.batch % threads == 0 || p.batch >= 4 * threads)
    by_images(call, threads);
  else
    within_images(call, threads);
}

}  // namespace vitkernels::bipartite_match

// From the best of every even token to the plan, by counting alone.
//
// Every number of a plan is the count of keys that come before another in the order of (key, place):
//   rank[a]  of the even tokens: by falling best, then by a
//   then with the target of each as its key, merged tokens by the odd token they go to, kept ones behind them
//   by rank (with a class token by a):
//   a merged token's place among the members, and a kept token's row; an odd token's place and its row's
//   start
// No two keys are equal then, every thread counts for itself, and nothing depends on an order of execution:
// neither a sort nor a scan nor atomics, and no limit of shared memory on the number of tokens. A pair of
// tokens costs about 12 instructions in all, its score c multiply-adds.
#pragma once
#include "scores.h"

namespace vitkernels::bipartite_match {

// How many of keys[begin .. end) come before (x, pivot), place i being that of keys[i]. Both ends are
// multiples of four, the keys in shared memory; 16 bytes are read at a time, by all lanes the same.
template <class K>
VK_DEVICE int count_before(const K* keys, int begin, int end, K x, int pivot) {
  constexpr int WIDTH = static_cast<int>(16 / sizeof(K));
  int counts[WIDTH] = {};  // one for each place of a vector: additions that do not wait for each other
  int i = begin;
  const int split = pivot < end ? pivot / WIDTH * WIDTH : end;
  for (; i < split; i += WIDTH) {
    const auto values = Vec<K, WIDTH>::load(keys + i);
    VK_UNROLL
    for (int e = 0; e < WIDTH; ++e) counts[e] += values[e] <= x ? 1 : 0;
  }
  if (i < end && i <= pivot) {
    const auto values = Vec<K, WIDTH>::load(keys + i);
    VK_UNROLL
    for (int e = 0; e < WIDTH; ++e) counts[e] += values[e] < x || (values[e] == x && i + e < pivot) ? 1 : 0;
    i += WIDTH;
  }
  for (; i < end; i += WIDTH) {
    const auto values = Vec<K, WIDTH>::load(keys + i);
    VK_UNROLL
    for (int e = 0; e < WIDTH; ++e) counts[e] += values[e] < x ? 1 : 0;
  }
  int count = counts[0];
  VK_UNROLL
  for (int e = 1; e < WIDTH; ++e) count += counts[e];
  return count;
}

// The key of an even token's rank, and the odd token it would go to.
template <class Acc>
struct Ranked {
  Acc key;  // minus the score, so that the best comes first
  int odd;

  VK_DEVICE Ranked(const Sizes& p, int a, Best<Acc> best, Acc inverse) {
    const Acc score = best.value * inverse;
    const bool number = score >= Acc(-2);  // neither NaN nor the minus infinity of a row that met only NaN
    key = p.class_token && a == 0 ? Acc(INFINITY) : number ? -score : Acc(2);
    odd = number ? best.odd : p.first_odd();
  }
};

// Where an even token goes: the odd token it merges into; or, from KEPT on, what the kept ones are ordered
// by. No key reaches NOWHERE.
constexpr uint32_t KEPT = 0x80000000u, NOWHERE = 0xffffffffu;

struct Plan {
  int32_t *rows, *starts, *members, *src, *dst;

  explicit Plan(const Params& p)
      : rows(static_cast<int32_t*>(p.rows.data)),
        starts(static_cast<int32_t*>(p.starts.data)),
        members(static_cast<int32_t*>(p.members.data)),
        src(static_cast<int32_t*>(p.src.data)),
        dst(static_cast<int32_t*>(p.dst.data)) {}

  VK_DEVICE uint32_t ranked(const Sizes& p, int64_t image, int a, int rank, int odd) const {
    if (rank >= p.merged) return p.class_token ? KEPT : KEPT + static_cast<uint32_t>(rank);
    src[image * p.merged + rank] = 2 * a;
    dst[image * p.merged + rank] = 2 * odd + 1;
    return static_cast<uint32_t>(odd);
  }

  // An even token, and how many come before it by (target, a).
  VK_DEVICE void place_even(const Sizes& p, int64_t image, int a, uint32_t target, int before) const {
    if (target >= KEPT) {
      const int among = before - p.merged;
      const int row = among + (p.distill_token && among > 0 ? 1 : 0);
      rows[image * p.tokens + 2 * a] = row;
      starts[image * starts_stride(p) + row] = row;  // rows of one token, and so are all those before
      members[image * p.tokens + row] = 2 * a;
    } else {
      const int odd = static_cast<int>(target), own = odd < a ? 1 : 0;  // the odd token comes first
      rows[image * p.tokens + 2 * a] = p.kept() + odd;
      members[image * p.tokens + p.kept() + odd + own + before] = 2 * a;
    }
  }

  // An odd token, how many tokens merge into lower ones, and how many into itself from places before its own.
  VK_DEVICE void place_odd(const Sizes& p, int64_t image, int b, int before, int own) const {
    const int row = p.distill_token && b == 0 ? 1 : p.kept() + b;
    const int start = row + before;
    rows[image * p.tokens + 2 * b + 1] = row;
    starts[image * starts_stride(p) + row] = start;
    members[image * p.tokens + start + own] = 2 * b + 1;
    if (b == 0) starts[image * starts_stride(p) + starts_stride(p) - 1] = p.tokens;
  }

 private:
  static VK_DEVICE int64_t starts_stride(const Sizes& p) { return p.tokens - p.merged + 1; }
};

}  // namespace vitkernels::bipartite_match

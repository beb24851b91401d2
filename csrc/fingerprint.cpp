#include "vitkernels/fingerprint.h"

#include <cstring>

namespace vitkernels {
namespace {

constexpr int kLanes = 16;  // of 64 bits: two cache lines, enough sums in flight to keep up with the memory
constexpr size_t kStripe = kLanes * sizeof(uint64_t);

typedef uint64_t Pair __attribute__((vector_size(16)));

constexpr uint64_t kOdd[3] = {0x9fb21c651e98df25u, 0xd6e8feb86659fd93u, 0xa0761d6478bd642fu};

uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 32)) * kOdd[1];
  x = (x ^ (x >> 29)) * kOdd[0];
  return x ^ (x >> 32);
}

// Each 64-bit word w adds lo32(w ^ key) * hi32(w ^ key) to one sum and w to its neighbour's: the product is not linear,
// so that scaled, negated or shifted weights do not cancel; the word itself makes up for a factor of zero. Keys differ
// between places, so that weights that swap them are seen too.
void add_stripes(const char* data, size_t stripes, Pair (&sums)[kLanes / 2]) {
  Pair keys[kLanes / 2];
  for (int i = 0; i < kLanes / 2; ++i) keys[i] = Pair{mix(2 * i + 1), mix(2 * i + 2)};
  const Pair step = {kOdd[0], kOdd[2]};
  for (; stripes > 0; --stripes, data += kStripe) {
    for (int i = 0; i < kLanes / 2; ++i) {
      Pair word;
      std::memcpy(&word, data + i * sizeof(Pair), sizeof(Pair));
      const Pair key = word ^ keys[i];
      sums[i] += (key & 0xffffffffu) * (key >> 32) + Pair{word[1], word[0]};
      keys[i] += step;
    }
  }
}

}  // namespace

void Fingerprint::add(uint64_t word) {
  value[0] = mix(value[0] ^ word) + value[1];
  value[1] = mix(value[1] + word * kOdd[2]);
}

void Fingerprint::add(const void* data, size_t bytes) {
  const char* from = static_cast<const char*>(data);
  Pair sums[kLanes / 2] = {};
  const size_t whole = bytes / kStripe;
  add_stripes(from, whole, sums);
  for (const Pair& sum : sums) {
    add(sum[0]);
    add(sum[1]);
  }
  for (size_t at = whole * kStripe; at < bytes; at += sizeof(uint64_t)) {
    uint64_t word = 0;
    std::memcpy(&word, from + at, bytes - at < sizeof(word) ? bytes - at : sizeof(word));
    add(word);
  }
  add(bytes);
}

}  // namespace vitkernels

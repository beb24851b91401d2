#include "vitkernels/fingerprint.h"

#include <cstring>

#include "vitkernels/cpu_dispatch.h"

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define VITKERNELS_FINGERPRINT_AVX2 1
#include <immintrin.h>
#endif

namespace vitkernels {
namespace {

constexpr int kLanes = 16;  // of 64 bits: two cache lines, enough sums in flight to keep up with the memory
constexpr size_t kStripe = kLanes * sizeof(uint64_t);
constexpr uint64_t kOdd[4] = {0x9fb21c651e98df25u, 0xd6e8feb86659fd93u, 0xa0761d6478bd642fu,
                              0xe7037ed1a0b428dbu};

uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 32)) * kOdd[1];
  x = (x ^ (x >> 29)) * kOdd[0];
  return x ^ (x >> 32);
}

// Each 64-bit word w adds lo32(w ^ key) * hi32(w ^ key) to one sum and w to its neighbour's: the product is
// not linear, so that scaled, negated or shifted weights do not cancel; the word itself makes up for a factor
// of zero. Keys differ between places, so that weights that change places are seen too.
void add_stripes(const char* data, size_t stripes, uint64_t* keys, uint64_t* sums) {
  for (; stripes > 0; --stripes, data += kStripe) {
    for (int i = 0; i < kLanes; ++i) {
      uint64_t word;
      std::memcpy(&word, data + i * sizeof(word), sizeof(word));
      const uint64_t key = word ^ keys[i];
      sums[i] += (key & 0xffffffffu) * (key >> 32);
      sums[i ^ 1] += word;
      keys[i] += kOdd[i % 4];
    }
  }
}

#ifdef VITKERNELS_FINGERPRINT_AVX2
__attribute__((target("avx2"))) void add_stripes_avx2(const char* data, size_t stripes, uint64_t* keys,
                                                      uint64_t* sums) {
  constexpr int vectors = kLanes / 4;
  __m256i key[vectors], sum[vectors];
  const __m256i step = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kOdd));
  for (int i = 0; i < vectors; ++i) {
    key[i] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(keys) + i);
    sum[i] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(sums) + i);
  }
  for (; stripes > 0; --stripes, data += kStripe) {
#pragma GCC unroll 4
    for (int i = 0; i < vectors; ++i) {
      const __m256i word = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(data) + i);
      const __m256i keyed = _mm256_xor_si256(word, key[i]);
      sum[i] = _mm256_add_epi64(sum[i], _mm256_mul_epu32(keyed, _mm256_srli_epi64(keyed, 32)));
      sum[i] = _mm256_add_epi64(sum[i], _mm256_shuffle_epi32(word, 0x4e));
      key[i] = _mm256_add_epi64(key[i], step);
    }
  }
  for (int i = 0; i < vectors; ++i) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(keys) + i, key[i]);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums) + i, sum[i]);
  }
}
#endif

}  // namespace

void Fingerprint::add(uint64_t word) {
  value[0] = mix(value[0] ^ word) + value[1];
  value[1] = mix(value[1] + word * kOdd[2]);
}

void Fingerprint::add(const void* data, size_t bytes) {
  const char* from = static_cast<const char*>(data);
  const size_t whole = bytes / kStripe;
  if (whole > 0) {
    uint64_t keys[kLanes], sums[kLanes] = {};
    for (int i = 0; i < kLanes; ++i) keys[i] = mix(i + 1);
#ifdef VITKERNELS_FINGERPRINT_AVX2
    if (selected_isa() != Isa::baseline)
      add_stripes_avx2(from, whole, keys, sums);
    else
#endif
      add_stripes(from, whole, keys, sums);
    for (uint64_t sum : sums) add(sum);
  }
  for (size_t at = whole * kStripe; at < bytes; at += sizeof(uint64_t)) {
    uint64_t word = 0;
    std::memcpy(&word, from + at, bytes - at < sizeof(word) ? bytes - at : sizeof(word));
    add(word);
  }
  add(bytes);
}

}  // namespace vitkernels

// half_t and bfloat16_t of the host twin, bit for bit what the device's conversions give.
#pragma once
#include <cstdint>
#include <cstring>

namespace vitkernels {

namespace twin {
inline uint32_t float_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}
inline float bits_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}
}  // namespace twin

struct half_t {
  uint16_t bits;

  // The device gives one NaN, 0x7fff, whatever the sign and payload of the source.
  static half_t round(float x) {
    const uint32_t all = twin::float_bits(x);
    const uint32_t sign = (all >> 16) & 0x8000u;
    uint32_t magnitude = all & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return {0x7fff};
    if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // 65520 and above
    if (magnitude < 0x38800000u) {                                                 // subnormal: below 2^-14
      // One ulp of 0.5f is one subnormal step, so the addition does the rounding.
      const float shifted = twin::bits_float(magnitude) + 0.5f;
      return {static_cast<uint16_t>(sign | (twin::float_bits(shifted) - twin::float_bits(0.5f)))};
    }
    magnitude += 0xfffu + ((magnitude >> 13) & 1u);
    return {static_cast<uint16_t>(sign | ((magnitude - 0x38000000u) >> 13))};
  }
};

struct bfloat16_t {
  uint16_t bits;

  static bfloat16_t round(float x) {
    const uint32_t all = twin::float_bits(x);
    if ((all & 0x7fffffffu) > 0x7f800000u) return {0x7fff};
    return {static_cast<uint16_t>((all + 0x7fffu + ((all >> 16) & 1u)) >> 16)};
  }
};

inline float to_float(half_t x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t exponent = (x.bits >> 10) & 31u;
  const uint32_t mantissa = x.bits & 0x3ffu;
  if (exponent == 0) {
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
    return twin::bits_float(sign | twin::float_bits(magnitude));
  }
  const uint32_t wide = exponent == 31 ? 0xffu : exponent + 112;
  return twin::bits_float(sign | wide << 23 | mantissa << 13);
}

inline float to_float(bfloat16_t x) {
  return twin::bits_float(static_cast<uint32_t>(x.bits) << 16);
}

}  // namespace vitkernels

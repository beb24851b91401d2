// Division by numbers that are known before the launch, or for a whole tile: a multiplication.
#pragma once
#include "vitkernels/device.h"

namespace vitkernels {

// n / divisor and n % divisor for 0 <= n < 2^31. Made on the host.
class Divisor {
 public:
  Divisor() : Divisor(1) {}
  explicit Divisor(int divisor) : divisor_(static_cast<uint32_t>(divisor)) {
    while ((uint64_t{1} << shift_) < divisor_) ++shift_;
    factor_ = static_cast<uint32_t>((((uint64_t{1} << shift_) - divisor_) << 32) / divisor_ + 1);
  }

  VK_HOST_DEVICE int divide(int n) const {
    const uint32_t numerator = static_cast<uint32_t>(n);
    const uint32_t high = static_cast<uint32_t>((uint64_t{factor_} * numerator) >> 32);
    return static_cast<int>((high + numerator) >> shift_);
  }
  VK_HOST_DEVICE int value() const { return static_cast<int>(divisor_); }

 private:
  uint32_t divisor_;
  uint32_t factor_ = 0;
  uint32_t shift_ = 0;
};

// n / divisor with a divisor that the device finds: one division for many. Exact while (n + 1) * divisor
// is at most 2^32.
class Reciprocal {
 public:
  VK_DEVICE explicit Reciprocal(int divisor)
      : divisor_(divisor), factor_(0xffffffffu / static_cast<uint32_t>(divisor)) {}
  VK_DEVICE int divide(int n) const {
    return static_cast<int>((uint64_t{factor_} * (static_cast<uint32_t>(n) + 1)) >> 32);
  }
  VK_DEVICE int value() const { return divisor_; }

 private:
  int divisor_;
  uint32_t factor_;
};

}  // namespace vitkernels

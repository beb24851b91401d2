// A fingerprint of memory: equal for equal bytes, and different for different ones but for one chance in
// about 2^64. It tells a weight that was edited behind PyTorch's back. Not meant against somebody who wants
// to be missed.
#pragma once
#include <cstddef>
#include <cstdint>

namespace vitkernels {

struct Fingerprint {
  uint64_t value[2] = {0x9e3779b97f4a7c15u, 0xc2b2ae3d27d4eb4fu};

  void add(uint64_t word);
  void add(const void* data, size_t bytes);
};

}  // namespace vitkernels

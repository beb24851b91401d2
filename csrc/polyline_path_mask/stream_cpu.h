// Writing a long run of elements past the caches: lines are filled in L1 and leave for memory whole.
#pragma once
#include "vitkernels/simd.h"

namespace vitkernels::polyline_path_mask {
namespace VITKERNELS_ISA {

using namespace vitkernels::VITKERNELS_ISA;

constexpr int kLineBytes = 64;

// 64 bytes to an address that is a multiple of 64.
VITKERNELS_INLINE void stream_line(char* to, const char* from) {
#if defined(__AVX512F__)
  _mm512_stream_si512(reinterpret_cast<__m512i*>(to), _mm512_loadu_si512(from));
#elif defined(__AVX2__)
  const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + 32));
  _mm256_stream_si256(reinterpret_cast<__m256i*>(to), low);
  _mm256_stream_si256(reinterpret_cast<__m256i*>(to + 32), high);
#else
  __builtin_memcpy(to, from, kLineBytes);
#endif
}

// Elements are put at place(), a line of up to the pitch that buffer_size() was told (and the vector that
// runs over its end) at a time; advance() tells how many of them count.
template <class E>
class StreamWriter {
 public:
  static constexpr int kElements = 8192 / sizeof(E);
  static size_t buffer_size(int pitch) { return kElements + 2 * static_cast<size_t>(pitch) + kLineBytes; }

  StreamWriter(E* to, E* buffer, bool stream) : to_(to), buffer_(buffer), stream_(stream) {}

  E* place() const { return buffer_ + used_; }
  void advance(int count) {
    used_ += count;
    if (used_ >= kElements) flush();
  }
  void finish() {
    copy(used_);
#if defined(__AVX2__)
    if (stream_) _mm_sfence();
#endif
  }

 private:
  // Everything but the last, incomplete line of memory.
  void flush() {
    const size_t over = (reinterpret_cast<uintptr_t>(to_ + used_) % kLineBytes) / sizeof(E);
    const size_t rest = over < used_ ? over : used_;
    copy(used_ - rest);
    __builtin_memmove(buffer_, buffer_ + used_ - rest, rest * sizeof(E));
    used_ = rest;
  }
  void copy(size_t count) {
    char* to = reinterpret_cast<char*>(to_);
    const char* from = reinterpret_cast<const char*>(buffer_);
    to_ += count;
    size_t bytes = count * sizeof(E);
    if (stream_) {
      size_t head = (kLineBytes - reinterpret_cast<uintptr_t>(to) % kLineBytes) % kLineBytes;
      if (head > bytes) head = bytes;
      __builtin_memcpy(to, from, head);
      to += head, from += head, bytes -= head;
      for (; bytes >= kLineBytes; to += kLineBytes, from += kLineBytes, bytes -= kLineBytes)
        stream_line(to, from);
    }
    __builtin_memcpy(to, from, bytes);
  }

  E *to_, *buffer_;
  size_t used_ = 0;
  bool stream_;
};

}  // namespace VITKERNELS_ISA
}  // namespace vitkernels::polyline_path_mask

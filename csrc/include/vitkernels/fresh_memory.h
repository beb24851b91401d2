// Results that the C library maps anew at every call.
#pragma once
#include <stddef.h>
#include <stdint.h>

#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace vitkernels {

// Memory of this size is never kept by glibc: each call writes to pages that are not there yet, and a fault
// for every 4 KiB costs more than filling them. Asks for large pages there, which fault five hundred times
// less; the advice goes with the mapping. Contents do not change, and where the system declines nothing
// happens.
inline void expect_large_result(void* data, size_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr size_t kNeverKept = size_t{32} << 20;  // M_MMAP_THRESHOLD rises to this at most
  if (bytes < kNeverKept) return;
  const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / page * page;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

}  // namespace vitkernels

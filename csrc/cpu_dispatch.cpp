#include "vitkernels/cpu_dispatch.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace vitkernels {
namespace {

constexpr const char* kNames[] = {"baseline", "avx2", "avx512"};

// For tests alone: chosen where it is asked for, never by itself.
#ifdef VITKERNELS_EMULATE_AVX512
constexpr bool kEmulated = true;
#else
constexpr bool kEmulated = false;
#endif

bool available(Isa isa) {
#ifdef VITKERNELS_X86_ISAS
  __builtin_cpu_init();
  const bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (isa == Isa::avx2) return avx2;
  if (isa == Isa::avx512 && kEmulated) return avx2;
  if (isa == Isa::avx512)
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
  return isa == Isa::baseline;
}

Isa choose() {
  if (const char* asked = std::getenv("VITKERNELS_CPU_ISA"); asked && *asked) {
    for (Isa isa : {Isa::baseline, Isa::avx2, Isa::avx512}) {
      if (std::string(asked) != kNames[static_cast<int>(isa)]) continue;
      if (!available(isa))
        throw std::runtime_error(std::string("VITKERNELS_CPU_ISA=") + asked +
                                 ": not available on this processor or in this build");
      return isa;
    }
    throw std::invalid_argument(std::string("VITKERNELS_CPU_ISA: expected baseline, avx2 or avx512, got ") +
                                asked);
  }
  for (Isa isa : {Isa::avx512, Isa::avx2})
    if (available(isa) && !(kEmulated && isa == Isa::avx512)) return isa;
  return Isa::baseline;
}

}  // namespace

Isa selected_isa() {
  static const Isa isa = choose();
  return isa;
}

const char* cpu_isa() {
  if (kEmulated && selected_isa() == Isa::avx512) return "avx512 (emulated)";
  return kNames[static_cast<int>(selected_isa())];
}

}  // namespace vitkernels

// Which instruction set the CPU kernels use in this process.
#pragma once

namespace vitkernels {

enum class Isa { baseline, avx2, avx512 };

// The best one that was compiled and that this processor has; VITKERNELS_CPU_ISA=baseline|avx2|avx512
// asks for another; AVX-512 that is emulated, for tests, is used only so. Decided once. Throws
// std::invalid_argument for a name it does not know and std::runtime_error for a set that is not available
// here.
Isa selected_isa();
const char* cpu_isa();

}  // namespace vitkernels

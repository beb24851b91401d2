// From addresses in this module's code to what stands there in the source; by addr2line, which comes with
// g++.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace vitkernels::twin {

// Counted from the module's start.
uint32_t code_number(const void* code);
// "file:line" of the call that returns to `code`, and of what it is inlined into, innermost first, without
// the twin's own lines, which are the same for all kernels.
std::string line_of(uint32_t code);
std::vector<std::string> lines_of(
    const std::vector<uint32_t>& codes);  // in one go, which takes as long as one
// The function that begins at `code`, without namespaces and arguments.
std::string function_at(uint32_t code);

}  // namespace vitkernels::twin

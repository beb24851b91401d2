// What a warp's accesses to memory would take on the device: wavefronts of shared memory, sectors of global
// memory, beside the least that as many different bytes can take.
//
// A wavefront serves each of the 32 banks once with one 4-byte word, which any number of lanes may want; 8
// and 16 bytes a lane are served to half and a quarter of the warp at a time, an ldmatrix by its 8x8 tiles. A
// sector is 32 bytes of global memory. Lanes run one after another here: what they do between two collectives
// is laid side by side, the n-th access from one place in the code with the n-th of the other lanes. The
// compiler for the device may keep in registers what is read twice here, so counts are of the source's
// accesses; what they take relative to the least is the layout's.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace vitkernels::twin::traffic {

bool enabled();
void set_enabled(bool enabled);  // also forgets what was counted

void begin_launch(const void* kernel);
void note(int thread, uintptr_t address, size_t bytes, bool writes, bool shared, uint32_t code);
// The lanes of the warp stand at the same place.
void meet(int warp);

struct Row {
  std::string kernel, line;
  bool shared, writes;
  int64_t requests, taken, least;  // of warps; wavefronts or sectors
};
std::vector<Row> rows();

}  // namespace vitkernels::twin::traffic

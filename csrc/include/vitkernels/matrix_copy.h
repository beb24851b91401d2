// Copies of tiles of a matrix of 16-bit elements to shared memory by Hopper's copy engine: one thread begins
// a copy of a whole tile, which costs the warps neither instructions nor registers nor the load-store unit.
// Rows of a tile are 64 elements, 128 bytes, and lie as chunk_of<128>() of wgmma.h has them; what is outside
// the matrix is zero. On the host twin a copy is seen from the first wait for it on, and waits are held to
// what was begun. Where wgmma_available(), this is.
//
// A copy is over for those threads for which wait_arrival() of its barrier has returned; nothing else orders
// it. Before it is begun its place must be free, by a barrier of the block, and expect_arrival() must have
// told the bytes of all copies that the use of the barrier stands for, whole tiles also at the matrix's edge.
#pragma once
#include "vitkernels/wgmma.h"

#if !defined(VITKERNELS_HOST_TWIN)
#include <cuda.h>
#endif

namespace vitkernels {

constexpr int COPIED_COLUMNS = 64;  // of a tile

// Streaming multiprocessors of an H100 or H200, whatever the device: how much memory is asked for and how it
// is used must not depend on which device is current.
constexpr int64_t HOPPER_BLOCKS = 132;

// Whether the copy engine takes a matrix, its rows `stride` elements apart.
inline bool takes_matrix(const void* data, int64_t columns, int64_t stride) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride % 8 == 0 && stride >= columns;
}

#if defined(VITKERNELS_HOST_TWIN)

#define VK_GRID_CONSTANT

struct MatrixMap {
  const char* data;
  int64_t rows, columns, row_bytes;
  int tile_rows;
};

// Of a matrix that takes_matrix() admits. Tiles have up to 256 rows.
inline MatrixMap map_matrix(const void* data, int64_t rows, int64_t columns, int64_t stride, int tile_rows) {
  if (!takes_matrix(data, columns, stride) || tile_rows > 256)
    throw std::runtime_error("host twin: the copy engine does not take this matrix");
  return {static_cast<const char*>(data), rows, columns, 2 * stride, tile_rows};
}

// How many uses have begun, by which thread the last of them, and how many of its bytes have not come.
struct Arrival {
  int16_t uses, thread;
  int32_t missing;
};
VK_UNWATCHED inline void prepare_arrivals(Arrival* arrivals, int count) {
  for (int i = 0; i < count; ++i) arrivals[i] = {0, -1, 0};
}

// Other threads than the one that begins the copies may be here before them.
VK_UNWATCHED inline void check_wait(const Arrival* arrival, int use) {
  if (arrival->uses > use + 1) twin::fail("a wait for copies of which the barrier's next use has begun");
  if (arrival->thread == thread_x() && (arrival->uses <= use || arrival->missing != 0))
    twin::fail("a wait without end for copies: of a later use than has begun, or of other bytes");
}
inline void wait_arrival(Arrival* arrival, int use) {
  check_wait(arrival, use);
  twin::land_copies_of_engine(arrival);
}

VK_UNWATCHED inline void expect_arrival(Arrival* arrival, int bytes) {
  if (arrival->uses < 0) twin::fail("a barrier of copies that is not prepared");
  *arrival = {static_cast<int16_t>(arrival->uses + 1), static_cast<int16_t>(thread_x()), bytes};
}
VK_UNWATCHED inline void count_arrived(Arrival* arrival, int bytes) {
  arrival->missing -= bytes;
}
VK_INLINE void copy_tile(char* to, const MatrixMap& map, int column, int row, Arrival* arrival) {
  count_arrived(arrival, 128 * map.tile_rows);
  if ((to - shared_memory()) % 1024 != 0) twin::fail("a copied tile begins at a multiple of 1024 bytes");
  for (int r = 0; r < map.tile_rows; ++r) {
    for (int chunk = 0; chunk < COPIED_COLUMNS / 8; ++chunk) {
      uint16_t elements[8] = {};
      for (int i = 0; i < 8; ++i) {
        const int c = column + 8 * chunk + i;
        if (row + r < map.rows && c < map.columns)
          std::memcpy(elements + i, map.data + (row + r) * map.row_bytes + 2 * c, 2);
      }
      twin::copy_by_engine(to + r * 128 + chunk_of<128>(r, chunk) * 16, elements, arrival);
    }
  }
}

#else

#define VK_GRID_CONSTANT __grid_constant__

using MatrixMap = CUtensorMap;

inline MatrixMap map_matrix(const void* data, int64_t rows, int64_t columns, int64_t stride, int tile_rows) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  // By way of the runtime, so that nothing links with the driver.
  static const Encode encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found{};
#if CUDART_VERSION >= 12050
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                                               cudaEnableDefault, &found);
#else
    const cudaError_t error =
        cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found);
#endif
    if (error != cudaSuccess) throw_cuda_error(error, "cuTensorMapEncodeTiled");
    if (found != cudaDriverEntryPointSuccess || function == nullptr)
      throw std::runtime_error("the driver has no cuTensorMapEncodeTiled");
    return reinterpret_cast<Encode>(function);
  }();
  // The driver wants a current context. In a thread that autograd has just begun, whose first call of CUDA
  // this may be, the runtime makes one current only where it needs it itself, or is told to.
  int device = 0;
  cudaError_t made = cudaGetDevice(&device);
  if (made == cudaSuccess) made = cudaSetDevice(device);
  if (made != cudaSuccess) throw_cuda_error(made, "the current device");
  MatrixMap map;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(stride) * 2};
  const cuuint32_t tile[] = {COPIED_COLUMNS, static_cast<cuuint32_t>(tile_rows)}, steps[] = {1, 1};
  const CUresult result =
      encode(&map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 2, const_cast<void*>(data), sizes, strides, tile, steps,
             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS)
    throw std::runtime_error("cuTensorMapEncodeTiled failed: " + std::to_string(static_cast<int>(result)));
  return map;
}

struct Arrival {
  uint64_t state;
};

#if defined(VK_WGMMA)

// By one thread, which may then begin copies; other threads may wait after a barrier of the block.
VK_DEVICE void prepare_arrivals(Arrival* arrivals, int count) {
  for (int i = 0; i < count; ++i)
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(arrivals + i)) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster; fence.proxy.async.shared::cta;" ::: "memory");
}

// The use number `use` of the barrier, from zero on, of which no later one can have begun.
VK_DEVICE void wait_arrival(Arrival* arrival, int use) {
  asm volatile(
      "{.reg .pred done; again%=: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1; @!done bra "
      "again%=;}" ::"r"(shared_address(arrival)),
      "r"(use & 1)
      : "memory");
}

// By the thread that begins copies, before them: of how many bytes the barrier's next use is.
VK_DEVICE void expect_arrival(Arrival* arrival, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(arrival)),
               "r"(bytes)
               : "memory");
}
VK_DEVICE void copy_tile(char* to, const MatrixMap& map, int column, int row, Arrival* arrival) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, "
      "%3}], [%4];" ::"r"(shared_address(to)),
      "l"(&map), "r"(column), "r"(row), "r"(shared_address(arrival))
      : "memory");
}

#endif  // VK_WGMMA
#endif

}  // namespace vitkernels

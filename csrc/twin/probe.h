// Small kernels written with the device layer, each showing one thing; tests/device runs them in the twin and
// compiles them for real targets.
#pragma once
#include <cstdint>

namespace vitkernels::probe {

// probe_order.cu. `missing`: 0 nothing, 1 the barrier before the reads, 2 the barrier after them, 3 in a
// warp: a shuffle stands in the place of the one before.
void exchange_in_block(const float* in, float* out, int blocks, int threads, int missing);
void exchange_in_warp(const float* in, float* out, int blocks, int missing);
// For the dtypes f32, f64, i32, u32 in turn; `out` is [9, 64], one row per operation.
void collectives_f32(const float* in, float* out, int from, int mask, int delta);
void collectives_f64(const double* in, double* out, int from, int mask, int delta);
void collectives_i32(const int32_t* in, int32_t* out, int from, int mask, int delta);
void collectives_u32(const uint32_t* in, uint32_t* out, int from, int mask, int delta);
enum Divergence : int { SHUFFLE_AND_BARRIER, SHUFFLE_AND_EXIT, TWO_COLLECTIVES, BARRIER_AND_EXIT };
void diverge(int* out, int threads, int how);
void count_positive(const float* in, int* count, int64_t n);
// Each block's threads write integers that begin `apart` from the next block's.
void dependent_launch(const float* in, float* between, float* out, int threads);
void write_from_blocks(int* out, int blocks, int threads, int apart);
void positions(int* out, int64_t x, int64_t y, int64_t z, int threads);
void launch_shape(int64_t x, int64_t y, int64_t z, int threads, int64_t shared_bytes);

// probe_memory.cu
void write_shared(int64_t shared_bytes, int64_t offset);
void write_global(float* out, int64_t index);
void read_shared_unwritten(float* out);
void write_local(int* out, int index);
// A warp's lanes write `width` floats each, `pitch` apart, to shared memory and to out.
void write_apart(float* out, int width, int pitch);
void copy_vectors_16(const uint16_t* in, uint16_t* out, int width, int64_t vectors);
void copy_vectors_64(const double* in, double* out, int width, int64_t vectors);
// Copies [steps, 512] floats through a two-stage pipeline; `flaw`: 0 none, 1 reads before the wait, 2 waits
// for one group too few, 3 refills a stage before everyone has read it. Rows at or beyond `valid` arrive as
// zeros. `bytes` of a copy: 16 or 8.
void pipeline(const float* in, float* out, int steps, int valid, int flaw, int bytes);

// probe_tile.cu. a [16, 16], b [16, 8], c and d [16, 8] row-major; `from`: 0 registers filled by hand, 1
// through ldmatrix with b stored by columns, 2 through ldmatrix_trans with a stored by columns.
void multiply_half(const uint16_t* a, const uint16_t* b, const float* c, float* d, int from);
void multiply_bfloat16(const uint16_t* a, const uint16_t* b, const float* c, float* d, int from);
// By a warpgroup: a [64, bytes / 2], b [bytes / 2, n], d [64, n] row-major, rows of shared memory of `bytes`,
// 64 or 128; n 32 (64 bytes only), 64, 128 or 256.
void multiply_group_half(const uint16_t* a, const uint16_t* b, float* d, int n, int bytes, int by_features,
                         int from_registers);
void multiply_group_bfloat16(const uint16_t* a, const uint16_t* b, float* d, int n, int bytes,
                             int by_features, int from_registers);
// A product of zeros; `flaw`: 0 none, 1 an operand is written again before the wait, 5 and a barrier is
// behind that, 2 operands are written without fence_async_proxy(), 3 no wgmma_fence(), 4 the sums are used
// before the wait.
void flawed_product(int flaw);
// matrix [rows, columns], its rows `stride` apart; out [tile_rows, 64], zeros beyond the matrix. `bytes` are
// expected, 128 a row of the tile, and use number `use` of the barrier is waited for, 0, or none where it is
// -2.
void copy_matrix_tile(const uint16_t* matrix, uint16_t* out, int rows, int columns, int stride, int tile_rows,
                      int column, int row, int bytes, int use);
// in: tiles 8x8; out [32, tiles] registers.
void load_matrices(const uint16_t* in, uint32_t* out, int tiles, int transposed, int misaligned);
void round_half(const float* in, uint16_t* out, int64_t n);
void round_bfloat16(const float* in, uint16_t* out, int64_t n);
void widen_half(const uint16_t* in, float* out, int64_t n);
void widen_bfloat16(const uint16_t* in, float* out, int64_t n);
void pack_half(const float* lo, const float* hi, uint32_t* out, int64_t n);
void pack_bfloat16(const float* lo, const float* hi, uint32_t* out, int64_t n);
// out [6, n]: exp2_fast, log2_fast, exp_, log_, reciprocal_fast, at_most 2.
void special_functions(const float* in, float* out, int64_t n);

}  // namespace vitkernels::probe

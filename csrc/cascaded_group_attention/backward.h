// Backward of cascaded group attention: its launches, and what they leave for each other in the workspace.
//
//   windows   recomputes q~, k, v, P of each window, head by head from the last, and finds grad_x and the
//             gradient of q~, k, v. A block takes every blocks-th window in turn and keeps its own sums of
//             the gradients of taps and tables.
//   weights   grad_y^T u and grad_out^T relu(heads) over chunks of tokens, on tensor cores for half
//   precision. reduce    adds up both kinds of partial sums in a fixed order.
// Blocks, chunks and every order of summation are functions of the sizes only.
#pragma once
#include "plain.h"

namespace vitkernels::cascaded_group_attention {

// The partial sums of one block of `windows`: tables [heads][tokens], taps [heads][key_dim][kernel_max^2],
// biases of the depthwise convolution [heads][key_dim].
struct WindowSums {
  int64_t tables, taps, biases, elements;

  explicit WindowSums(const Problem& problem) {
    const Params& p = problem.params;
    const int64_t heads = p.num_heads;
    tables = 0;
    taps = heads * problem.tokens;
    biases = taps + heads * p.key_dim * p.kernel_max * p.kernel_max;
    elements = biases + heads * p.key_dim;
  }
};

// The partial sums of one chunk of `weights`.
struct WeightSums {
  int64_t qkv_weight, qkv_bias, proj_weight, proj_bias, elements;

  explicit WeightSums(const Problem& problem) {
    const int64_t heads = problem.params.num_heads, channels = problem.params.channels;
    qkv_weight = 0;
    qkv_bias = heads * problem.qkv_rows * problem.value_dim;
    proj_weight = qkv_bias + heads * problem.qkv_rows;
    proj_bias = proj_weight + channels * channels;
    elements = proj_bias + channels;
  }
};

// Byte offsets into the workspace.
struct Workspace {
  bool tensor;     // the window kernel runs on tensor cores
  int64_t blocks;  // of the window kernel
  int64_t chunks, rows_per_chunk;
  int64_t grad_y;                    // T [tokens of all windows][heads][qkv_rows]
  int64_t grad_z;                    // T [tokens of all windows][channels], tensor cores only
  int64_t slots;                     // of the plain window kernel
  int64_t window_sums, weight_sums;  // Acc
  int64_t bytes;
};

// The window kernels fill grad_x when present, grad_y and the window sums.
template <class T>
void backward_windows_plain(const Problem& problem, const Workspace& workspace, Stream stream);
template <class T>
PlainSlots backward_slots_plain(const Problem& problem);
template <class T>
void backward_windows_tensor(const Problem& problem, const Workspace& workspace, Stream stream);
int64_t backward_blocks_tensor(const Problem& problem);  // 0: does not fit
// grad_z [tokens of all windows][channels], for the tensor-core window kernel.
template <class T>
void backward_projection(const Problem& problem, T* grad_z, Stream stream);
bool projection_fits(const Problem& problem);

// Fills the weight sums of those weights and biases that are wanted.
template <class T>
void weight_sums(const Problem& problem, const Workspace& workspace, Stream stream);

inline bool wants_qkv(const Params& p) {
  return p.grad_qkv_weight || p.grad_qkv_bias;
}
inline bool wants_proj(const Params& p) {
  return p.grad_proj_weight || p.grad_proj_bias;
}
inline bool wants_windows(const Params& p) {
  return p.grad_x || wants_qkv(p) || p.grad_dw_weight || p.grad_dw_bias || p.grad_attn_bias;
}

}  // namespace vitkernels::cascaded_group_attention

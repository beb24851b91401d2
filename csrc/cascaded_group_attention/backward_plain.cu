// The window kernel of the backward on the plain path.
//
// Floor per window: 2 (h (2 (2k + d) d N + 3 k N^2 + 2 d N^2) + C^2 N) FLOPs on the CUDA cores, q~, k, v and
// P recomputed. What lies between the steps outgrows shared memory in the later stages and then lives in L2,
// see PlainSlots.
#include "backward.h"

namespace vitkernels::cascaded_group_attention {
namespace {

struct PlainBackwardLayout {
  int ld_c, ld_d, ld_y, ld_k, ld_n;  // pitches of rows of C, d, 2k + d, k and N
  int grad_out;                      // of the window, zero where padded
  int grad_z;                        // of the heads' outputs, from the projection
  int u, y, q, p;                    // recomputed
  int grad_o, grad_q, grad_y, d;     // d: of the logits
  int64_t bytes;

  template <class Acc>
  static PlainBackwardLayout of(const Problem& problem) {
    PlainBackwardLayout l;
    l.ld_c = plain_pitch(problem.params.channels);
    l.ld_d = plain_pitch(problem.value_dim);
    l.ld_y = plain_pitch(problem.qkv_rows);
    l.ld_k = plain_pitch(problem.params.key_dim);
    l.ld_n = plain_pitch(problem.tokens);
    tile_attention::Carver carver;
    const int64_t tokens = problem.tokens;
    l.grad_out = carver.take<Acc>(tokens * l.ld_c);
    l.grad_z = carver.take<Acc>(tokens * l.ld_c);
    l.u = carver.take<Acc>(tokens * l.ld_d);
    l.y = carver.take<Acc>(tokens * l.ld_y);
    l.q = carver.take<Acc>(tokens * l.ld_k);
    l.p = carver.take<Acc>(tokens * l.ld_n);
    l.grad_o = carver.take<Acc>(tokens * l.ld_d);
    l.grad_q = carver.take<Acc>(tokens * l.ld_k);
    l.grad_y = carver.take<Acc>(tokens * l.ld_y);
    l.d = carver.take<Acc>(tokens * l.ld_n);
    l.bytes = carver.used();
    return l;
  }
};

// The sums of d over all pairs at each offset, and the gradients of the live taps and biases; dead taps get
// zeros. Each element has one thread, which adds to what the block's earlier windows left.
template <class Acc>
VK_DEVICE void add_window_sums(const Problem& problem, const WindowSums& places, Acc* sums, bool first,
                               int head, const Acc* d, int ld_d, const Acc* y, int ld_y, const Acc* grad_q,
                               int ld_q) {
  const Params& params = problem.params;
  const int window_h = params.window_h, window_w = params.window_w, k = params.key_dim,
            side = params.kernel_max;
  const auto add = [&](int64_t at, Acc value) { sums[at] = first ? value : sums[at] + value; };
  for (int entry = thread_x(); entry < problem.tokens; entry += block_dim_x()) {
    const int dy = entry / window_w, dx = entry % window_w;
    Acc sum = Acc(0);
    for (int query = 0; query < problem.tokens; ++query) {
      const int y0 = query / window_w, x0 = query % window_w;
      for (int flip_y = 0; flip_y < (dy > 0 ? 2 : 1); ++flip_y) {
        const int y1 = flip_y ? y0 - dy : y0 + dy;
        if (y1 < 0 || y1 >= window_h) continue;
        for (int flip_x = 0; flip_x < (dx > 0 ? 2 : 1); ++flip_x) {
          const int x1 = flip_x ? x0 - dx : x0 + dx;
          if (x1 >= 0 && x1 < window_w) sum += d[query * ld_d + y1 * window_w + x1];
        }
      }
    }
    add(places.tables + head * problem.tokens + entry, sum);
  }
  const int size = params.kernel_sizes[head], dead = (side - size) / 2;
  for (int i = thread_x(); i < k * side * side; i += block_dim_x()) {
    const int channel = i / (side * side), ky = i / side % side - dead, kx = i % side - dead;
    Acc sum = Acc(0);
    if (ky >= 0 && ky < size && kx >= 0 && kx < size) {
      for (int token = 0; token < problem.tokens; ++token) {
        const int from_y = token / window_w + ky - size / 2, from_x = token % window_w + kx - size / 2;
        if (from_y < 0 || from_y >= window_h || from_x < 0 || from_x >= window_w) continue;
        sum += grad_q[token * ld_q + channel] * y[(from_y * window_w + from_x) * ld_y + channel];
      }
    }
    add(places.taps + static_cast<int64_t>(head) * k * side * side + i, sum);
  }
  for (int channel = thread_x(); channel < k; channel += block_dim_x()) {
    Acc sum = Acc(0);
    for (int token = 0; token < problem.tokens; ++token) sum += grad_q[token * ld_q + channel];
    add(places.biases + head * k + channel, sum);
  }
}

template <class T>
VK_KERNEL void VK_LAUNCH_BOUNDS(THREADS, 1)
    backward_windows_plain_kernel(Problem problem, PlainBackwardLayout layout, PlainSlots slots,
                                  WindowSums places, void* slot_memory, T* all_grad_y,
                                  accumulate_t<T>* all_sums) {
  using Acc = accumulate_t<T>;
  const Params& params = problem.params;
  char* base = slots.base(slot_memory);
  const auto at = [&](int offset) { return reinterpret_cast<Acc*>(base + offset); };
  Acc *grad_out = at(layout.grad_out), *grad_z = at(layout.grad_z), *u = at(layout.u), *y = at(layout.y),
      *q = at(layout.q), *p = at(layout.p), *grad_o = at(layout.grad_o), *grad_q = at(layout.grad_q),
      *grad_y = at(layout.grad_y), *d = at(layout.d);
  const int tokens = problem.tokens, channels = params.channels, width = problem.value_dim,
            k = params.key_dim;
  const int rows = problem.qkv_rows, ld_c = layout.ld_c, ld_d = layout.ld_d, ld_y = layout.ld_y,
            ld_k = layout.ld_k, ld_n = layout.ld_n;
  const Acc scale = static_cast<Acc>(params.scale);
  const auto* x = static_cast<const T*>(params.x.data);
  const View &qkv_weight = params.qkv_weight, &proj_weight = params.proj_weight;
  Acc* sums = all_sums + block_x() * places.elements;

  for (int64_t window = block_x(); window < problem.windows; window += grid_x()) {
    const auto head_value = [&](const View& view, int token, int channel) {
      return to_accumulate(static_cast<const T*>(
          view.data)[Problem::heads_offset(view, window, token) + channel * view.stride[2]]);
    };
    for (int i = thread_x(); i < tokens * channels; i += block_dim_x()) {
      const int token = i % tokens, channel = i / tokens;
      const int64_t offset = present(params.grad_out) ? problem.offset(params.grad_out, window, token) : -1;
      grad_out[token * ld_c + channel] =
          offset < 0 ? Acc(0)
                     : to_accumulate(static_cast<const T*>(
                           params.grad_out.data)[offset + channel * params.grad_out.stride[1]]);
    }
    for (int i = thread_x(); i < tokens * width; i += block_dim_x())
      grad_o[i / width * ld_d + i % width] = Acc(0);
    sync_block();
    block_product<Acc>(
        tokens, channels, present(params.grad_out) ? channels : 0,
        [&](int row, int o) { return grad_out[row * ld_c + o]; },
        [&](int o, int column) {
          return read<T>(proj_weight, problem.wide_weights,
                         o * proj_weight.stride[0] + column * proj_weight.stride[1]);
        },
        [&](int row, int column, Acc sum) {
          if (!(head_value(params.heads, row, column) > Acc(0))) sum = Acc(0);
          if (present(params.grad_heads)) sum += head_value(params.grad_heads, row, column);
          grad_z[row * ld_c + column] = sum;
        });
    sync_block();

    for (int head = params.num_heads - 1; head >= 0; --head) {
      for (int i = thread_x(); i < tokens * width; i += block_dim_x()) {
        const int token = i % tokens, c = i / tokens, channel = head * width + c;
        const int64_t offset = problem.offset(params.x, window, token);
        Acc value = offset < 0 ? Acc(0) : to_accumulate(x[offset + channel * params.x.stride[1]]);
        if (head > 0) value = rounded<T>(value + head_value(params.heads, token, channel - width));
        u[token * ld_d + c] = value;
        grad_o[token * ld_d + c] += grad_z[token * ld_c + channel];
      }
      sync_block();
      plain_qkv<T>(problem, head, u, ld_d, y, ld_y);
      sync_block();
      plain_queries<T>(problem, head, y, ld_y, q, ld_k);
      sync_block();
      plain_softmax<T>(problem, head, q, ld_k, y, ld_y, p, ld_n);

      block_product<Acc>(
          tokens, tokens, width, [&](int row, int c) { return grad_o[row * ld_d + c]; },
          [&](int c, int column) { return y[column * ld_y + 2 * k + c]; },
          [&](int row, int column, Acc sum) { d[row * ld_n + column] = sum; });
      sync_block();
      for (int row = warp_id(); row < tokens; row += block_dim_x() / 32) {
        Acc delta = Acc(0);
        for (int m = lane_id(); m < tokens; m += 32) delta += p[row * ld_n + m] * d[row * ld_n + m];
        delta = warp_sum(delta);
        for (int m = lane_id(); m < tokens; m += 32)
          d[row * ld_n + m] = p[row * ld_n + m] * (d[row * ld_n + m] - delta);
      }
      sync_block();
      block_product<Acc>(
          tokens, width, tokens, [&](int m, int n) { return p[n * ld_n + m]; },
          [&](int n, int column) { return grad_o[n * ld_d + column]; },
          [&](int m, int column, Acc sum) { grad_y[m * ld_y + 2 * k + column] = sum; });
      block_product<Acc>(
          tokens, k, tokens, [&](int m, int n) { return d[n * ld_n + m]; },
          [&](int n, int column) { return q[n * ld_k + column]; },
          [&](int m, int column, Acc sum) { grad_y[m * ld_y + k + column] = sum * scale; });
      block_product<Acc>(
          tokens, k, tokens, [&](int n, int m) { return d[n * ld_n + m]; },
          [&](int m, int column) { return y[m * ld_y + k + column]; },
          [&](int n, int column, Acc sum) { grad_q[n * ld_k + column] = sum * scale; });
      sync_block();
      plain_convolve<T>(problem, head, true, grad_q, ld_k,
                        [&](int token, int channel, Acc sum) { grad_y[token * ld_y + channel] = sum; });
      add_window_sums(problem, places, sums, window == block_x(), head, d, ld_n, y, ld_y, grad_q, ld_k);
      sync_block();
      for (int i = thread_x(); i < tokens * rows; i += block_dim_x()) {
        const int token = i / rows, row = i % rows;
        all_grad_y[((window * tokens + token) * params.num_heads + head) * rows + row] =
            from_accumulate<T>(grad_y[token * ld_y + row]);
      }
      // grad_o is through; the gradient of the head's input takes its place, as part of the next one's
      // output.
      block_product<Acc>(
          tokens, width, rows, [&](int n, int o) { return grad_y[n * ld_y + o]; },
          [&](int o, int column) {
            return read<T>(
                qkv_weight, problem.wide_weights,
                head * qkv_weight.stride[0] + o * qkv_weight.stride[1] + column * qkv_weight.stride[2]);
          },
          [&](int n, int column, Acc sum) {
            grad_o[n * ld_d + column] = sum;
            const int64_t offset = present(params.grad_x) ? problem.offset(params.grad_x, window, n) : -1;
            if (offset < 0) return;
            const int channel = head * width + column;
            if (params.residual) sum += grad_out[n * ld_c + channel];
            static_cast<T*>(params.grad_x.data)[offset + channel * params.grad_x.stride[1]] =
                from_accumulate<T>(sum);
          });
      sync_block();
    }
  }
}

}  // namespace

template <class T>
PlainSlots backward_slots_plain(const Problem& problem) {
  return PlainSlots(PlainBackwardLayout::of<accumulate_t<T>>(problem).bytes, problem.windows);
}

template <class T>
void backward_windows_plain(const Problem& problem, const Workspace& workspace, Stream stream) {
  const auto layout = PlainBackwardLayout::of<accumulate_t<T>>(problem);
  const PlainSlots slots(layout.bytes, problem.windows);
  char* base = static_cast<char*>(problem.params.workspace);
  launch(backward_windows_plain_kernel<T>, Dim3{slots.blocks}, THREADS, slots.shared_bytes(), stream, problem,
         layout, slots, WindowSums(problem), static_cast<void*>(base + workspace.slots),
         reinterpret_cast<T*>(base + workspace.grad_y),
         reinterpret_cast<accumulate_t<T>*>(base + workspace.window_sums));
}

template PlainSlots backward_slots_plain<double>(const Problem&);
template PlainSlots backward_slots_plain<float>(const Problem&);
template PlainSlots backward_slots_plain<half_t>(const Problem&);
template PlainSlots backward_slots_plain<bfloat16_t>(const Problem&);
template void backward_windows_plain<double>(const Problem&, const Workspace&, Stream);
template void backward_windows_plain<float>(const Problem&, const Workspace&, Stream);
template void backward_windows_plain<half_t>(const Problem&, const Workspace&, Stream);
template void backward_windows_plain<bfloat16_t>(const Problem&, const Workspace&, Stream);

}  // namespace vitkernels::cascaded_group_attention

#include "backward.h"
#include "decays.h"

namespace vitkernels::polyline_path_attention {
namespace {

constexpr int DELTA_THREADS = 128;

struct Pair {
  View a, b;
};

// For every query, with G = grad_out / 2 and the two products O and O' whose mean is out:
//   delta[0] = G . O + further[0].a . further[0].b        delta[1] = G . O' + further[1].a . further[1].b
struct DeltaCall {
  Field field;
  int value_dim;
  View grad_out, out, first;  // first: O
  Pair further[2];            // may be absent
  void* delta[2];             // [batch, heads, height, width]
};

template <class T>
VK_KERNEL void VK_LAUNCH_BOUNDS(DELTA_THREADS, 1) delta_kernel(DeltaCall call) {
  using Acc = accumulate_t<T>;
  constexpr int WIDTH = 16 / sizeof(T), LANES = 4;
  const Field& field = call.field;
  const int64_t rows = static_cast<int64_t>(field.batch) * field.tokens() * field.heads;
  int64_t row = (static_cast<int64_t>(block_x()) * DELTA_THREADS + thread_x()) / LANES;
  const bool exists = row < rows;
  if (!exists) row = 0;  // the sum needs all lanes
  const int64_t place = row / field.heads;
  const int head = static_cast<int>(row - place * field.heads);
  const int batch = static_cast<int>(place / field.tokens());
  const int index = static_cast<int>(place - static_cast<int64_t>(batch) * field.tokens());
  const int y = field.by_width.divide(index), token = y << 16 | (index - y * field.width);

  const auto dot = [&](const View& a, const View& b) {
    const Matrix<T, Field> left(a, field, batch, head, call.value_dim),
        right(b, field, batch, head, call.value_dim);
    const T *p = left.data + left.position(token), *q = right.data + right.position(token);
    const int lane = lane_id() % LANES;
    Acc sum = Acc(0);
    if (left.vectorized() && right.vectorized()) {
      for (int c = lane * WIDTH; c < call.value_dim; c += LANES * WIDTH) {
        const auto u = Vec<T, WIDTH>::load(p + c), w = Vec<T, WIDTH>::load(q + c);
        VK_UNROLL
        for (int e = 0; e < WIDTH; ++e) sum += to_accumulate(u[e]) * to_accumulate(w[e]);
      }
    } else {
      for (int c = lane; c < call.value_dim; c += LANES)
        sum += to_accumulate(p[c * left.channel_stride]) * to_accumulate(q[c * right.channel_stride]);
    }
    return warp_sum<LANES>(sum);
  };
  // O' = 2 out - O
  Acc delta[2];
  delta[0] = Acc(0.5) * dot(call.grad_out, call.first);
  delta[1] = dot(call.grad_out, call.out) - delta[0];
  VK_UNROLL
  for (int i = 0; i < 2; ++i) {
    if (present(call.further[i].a)) delta[i] += dot(call.further[i].a, call.further[i].b);
    if (exists && lane_id() % LANES == 0)
      static_cast<Acc*>(call.delta[i])[field.plane(batch, head) + index] = delta[i];
  }
}

void make_deltas(DType dtype, const DeltaCall& call, Stream stream) {
  const int64_t threads = int64_t{4} * call.field.batch * call.field.tokens() * call.field.heads;
  with_dtype(dtype, [&](auto zero) {
    launch(delta_kernel<decltype(zero)>, Dim3{(threads + DELTA_THREADS - 1) / DELTA_THREADS}, DELTA_THREADS,
           0, stream, call);
  });
}

size_t size_of(DType dtype) {
  return with_dtype(dtype, [](auto zero) { return sizeof(zero); });
}
size_t size_of_sum(DType dtype) {
  return dtype == DType::f64 ? sizeof(double) : sizeof(float);
}

// Which kernels run, and where in the workspace they leave what for each other.
struct Plan {
  int rows;
  bool want_decays, want_d;  // in any kernel
  void* delta[2] = {};
  void* of_tokens[2][2] = {};  // see SumGradients
  void* corners[2] = {};
  View through[2] = {};  // criss-cross: A_h^T G, A_w^T G
  int64_t bytes = 0;

  explicit Plan(const Params& params) {
    rows = params.criss_cross ? line_rows(params) : whole_rows(params);
    want_decays = present(params.grad_log_decay_w) || present(params.grad_log_decay_h);
    want_d = present(params.grad_q) || present(params.grad_k) || want_decays;
    const Field field(params, Sweep::whole, rows);
    const int64_t planes = params.batch * params.heads, tokens = planes * field.tokens();
    const int64_t sum = size_of_sum(params.dtype);
    if (want_d) {
      for (void*& delta_of : delta) delta_of = take(params, tokens * sum);
    }
    if (want_decays) {
      for (auto& direction : of_tokens) {
        for (void*& side : direction) side = take(params, tokens * sum);
      }
      if (!params.criss_cross && row_slots(params, rows) == 0) {
        for (void*& side : corners)
          side = take(params, planes * field.tiles * field.slab_capacity(rows) * 2 * sum);
      }
    }
    if (params.criss_cross) {
      const int64_t width = params.value_dim, x = width * params.heads, y = x * params.width;
      for (View& view : through)
        view = View{take(params, tokens * width * static_cast<int64_t>(size_of(params.dtype))),
                    {y * params.height, width, x, 1, y}};
    }
  }

 private:
  void* take(const Params& params, int64_t size) {
    char* const base = static_cast<char*>(params.workspace);
    void* const result = base == nullptr ? nullptr : base + bytes;
    bytes += (size + 255) / 256 * 256;
    return result;
  }
};

// A call without operands. `flipped`: what belongs to the two masks, or directions, changes places.
BackwardCall make_call(const Params& params, const Plan& plan, Sweep sweep, bool flipped) {
  const int slots = sweep == Sweep::whole ? row_slots(params, plan.rows) : 0;
  BackwardCall call{Field(params, sweep, plan.rows, slots), params.head_dim, params.value_dim, params.scale};
  const auto plane = [&](const View& view, int i) -> const void* {
    return static_cast<const char*>(view.data) +
           i * view.stride[0] * static_cast<int64_t>(size_of_sum(params.dtype));
  };
  for (int i = 0; i < 2; ++i) {
    const int of = flipped ? 1 - i : i;
    call.lse[i] = plane(params.lse, of);
    call.delta[i] = plan.delta[of];
    call.sums[i] = plane(params.cum, params.criss_cross ? of : i);
  }
  return call;
}

void set_queries(BackwardCall* call, const Params& params, const Pair& first, const Pair& second) {
  call->x = on_field(params.q);
  call->y = on_field(params.k);
  call->z[0] = first.a;
  call->w[0] = first.b;
  call->z[1] = second.a;
  call->w[1] = second.b;
  call->grad_x = on_field(params.grad_q);
}
void set_keys(BackwardCall* call, const Params& params, const Pair& first, const Pair& second) {
  set_queries(call, params, {first.b, first.a}, {second.b, second.a});
  call->x = on_field(params.k);
  call->y = on_field(params.q);
  call->grad_x = on_field(params.grad_k);
  call->grad_z = on_field(params.grad_v);
}

void whole(const Params& params, const Plan& plan, Stream stream) {
  const Pair pair{on_field(params.grad_out), on_field(params.v)};
  const Field field(params, Sweep::whole, plan.rows, row_slots(params, plan.rows));
  const bool one_tile = field.tiles == 1;
  if (plan.want_d && !one_tile)
    make_deltas(params.dtype,
                {field,
                 params.value_dim,
                 pair.a,
                 on_field(params.out),
                 product(params, 0, size_of(params.dtype)),
                 {},
                 {plan.delta[0], plan.delta[1]}},
                stream);
  for (const Own own : {Own::queries, Own::keys}) {
    const int side = own == Own::queries ? 0 : 1;
    BackwardCall call = make_call(params, plan, Sweep::whole, side == 1);
    if (side == 0) {
      set_queries(&call, params, pair, {});
      call.makes_delta = one_tile && plan.want_d;
    } else {
      set_keys(&call, params, pair, {});
      call.product_factor = 0.5;
    }
    if (plan.want_decays) {
      for (int direction = 0; direction < 2; ++direction)
        call.grad_sums[direction] = plan.of_tokens[direction][side];
      call.corners = plan.corners[side];
    }
    if (present(call.grad_x) || present(call.grad_z) || plan.want_decays || call.makes_delta)
      backward_whole(params.dtype, own, plan.rows, call, stream);
  }
}

void criss_cross(const Params& params, const Plan& plan, Stream stream) {
  const size_t size = size_of(params.dtype);
  const View grad_out = on_field(params.grad_out), v = on_field(params.v);
  const View rows_v = product(params, 0, size), columns_v = product(params, 1, size);
  const auto sweep_of = [](int direction) { return direction == 0 ? Sweep::rows : Sweep::columns; };
  // A_h^T G for the rows, A_w^T G for the columns
  for (int direction = 0; direction < 2; ++direction) {
    BackwardCall call = make_call(params, plan, sweep_of(1 - direction), direction == 0);
    set_keys(&call, params, {grad_out, v}, {});
    call.grad_x = {};
    call.grad_z = plan.through[direction];
    call.product_factor = 0.5;
    call.delta[0] = nullptr;
    backward_lines(params.dtype, Own::keys, plan.rows, call, stream);
  }
  const auto one_tile = [&](int direction) {
    return Field(params, sweep_of(direction), plan.rows).tiles == 1;
  };
  if (plan.want_d && !(one_tile(0) && one_tile(1))) {
    // delta[0] is the rows', whose product is the second of the two that make up out.
    make_deltas(params.dtype,
                {Field(params, Sweep::whole, plan.rows),
                 params.value_dim,
                 grad_out,
                 on_field(params.out),
                 product(params, 2, size),
                 {{plan.through[1], columns_v}, {plan.through[0], rows_v}},
                 {plan.delta[1], plan.delta[0]}},
                stream);
  }
  for (int direction = 0; direction < 2; ++direction) {
    const Pair with_out{grad_out, direction == 0 ? columns_v : rows_v}, through{plan.through[direction], v};
    const bool want_decays = present(direction == 0 ? params.grad_log_decay_w : params.grad_log_decay_h);
    for (const Own own : {Own::queries, Own::keys}) {
      BackwardCall call = make_call(params, plan, sweep_of(direction), direction == 1);
      if (own == Own::queries) {
        set_queries(&call, params, with_out, through);
        call.makes_delta = plan.want_d && one_tile(direction);
      } else {
        set_keys(&call, params, with_out, through);
        call.product = 1;
      }
      call.adds_x = call.adds_z = direction == 1;
      if (want_decays) call.grad_sums[0] = plan.of_tokens[direction][own == Own::queries ? 0 : 1];
      if (present(call.grad_x) || present(call.grad_z) || want_decays || call.makes_delta)
        backward_lines(params.dtype, own, plan.rows, call, stream);
    }
  }
}

}  // namespace

int64_t backward_workspace_cuda(const Params& params) {
  return Plan(params).bytes;
}

void backward_cuda(const Params& params, Stream stream) {
  check_sizes(params);
  const Plan plan(params);
  params.criss_cross ? criss_cross(params, plan, stream) : whole(params, plan, stream);
  if (!plan.want_decays) return;
  SumGradients gradients;
  for (int side = 0; side < 2; ++side) {
    for (int direction = 0; direction < 2; ++direction)
      gradients.of_tokens[direction][side] = plan.of_tokens[direction][side];
    gradients.corners[side] = plan.corners[side];
  }
  decay_gradients(params, gradients, Field(params, Sweep::whole, plan.rows), plan.rows, stream);
}

}  // namespace vitkernels::polyline_path_attention

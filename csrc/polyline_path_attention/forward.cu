// local memory: up to 16 bytes: five or six blocks of an SM leave a thread of the lines' kernel with two
// products 96 or 80 registers, up to four too few on sm_80 and two on sm_90.
#include "decays.h"
#include "forward.h"

namespace vitkernels::polyline_path_attention {
namespace {

// All channels of the values, some at a time.
template <class Engine, bool WHOLE>
void forward_with(const ForwardCall& whole, Stream stream) {
  using T = typename Engine::T;
  for (int channel = 0; channel < whole.value_dim; channel += MOST_COLUMNS) {
    ForwardCall call = whole;
    call.value_dim = channels_from(channel, whole.value_dim);
    for (View* view : {&call.v, &call.other_v, &call.out, &call.mean_with, &call.second_out})
      *view = from_channel<T>(*view, channel);
    if (channel > 0) call.lse[0] = call.lse[1] = nullptr;
    with_form<Engine, WHOLE>(call.field, call.value_dim, [&](auto form) {
      using Form = decltype(form);
      auto kernel = forward_kernel<Engine, Form, false>;
      if constexpr (!WHOLE)
        if (present(call.other_v)) kernel = forward_kernel<Engine, Form, true>;
      launch_tiles(kernel, call, ForwardLayout<Engine, Form>(call), Group<Engine::ROWS>::THREADS, stream);
    });
  }
}

template <class T>
ForwardCall make_call(const Params& params, Sweep sweep, int rows, int row_slots = 0) {
  ForwardCall call{Field(params, sweep, rows, row_slots),
                   params.head_dim,
                   params.value_dim,
                   params.scale,
                   on_field(params.q),
                   on_field(params.k),
                   {},
                   {},
                   {},
                   {},
                   {},
                   {},
                   {}};
  using Acc = accumulate_t<T>;
  const bool second = sweep == Sweep::columns;
  for (int i = 0; i < 2; ++i) {
    const int of = second ? 1 - i : i;
    call.sums[i] = static_cast<const Acc*>(params.cum.data) + of * params.cum.stride[0];
    if (present(params.lse)) call.lse[i] = static_cast<Acc*>(params.lse.data) + of * params.lse.stride[0];
  }
  return call;
}

template <class Engine>
void whole(const Params& params, Stream stream) {
  using T = typename Engine::T;
  ForwardCall call = make_call<T>(params, Sweep::whole, Engine::ROWS, row_slots(params, Engine::ROWS));
  call.v = on_field(params.v);
  call.out = on_field(params.out);
  call.second_out = product(params, 0, sizeof(T));
  forward_with<Engine, true>(call, stream);
}

template <class Engine>
void criss_cross(const Params& params, Stream stream) {
  using T = typename Engine::T;
  const View v = on_field(params.v), rows_v = product(params, 0, sizeof(T)),
             columns_v = product(params, 1, sizeof(T)), columns_rows_v = product(params, 2, sizeof(T));
  ForwardCall call = make_call<T>(params, Sweep::rows, Engine::ROWS);
  call.v = v;
  call.out = rows_v;
  forward_with<Engine, false>(call, stream);

  ForwardCall down = make_call<T>(params, Sweep::columns, Engine::ROWS);
  down.v = rows_v;
  down.out = columns_rows_v;
  down.other_v = v;
  down.second_out = columns_v;
  forward_with<Engine, false>(down, stream);

  call.v = columns_v;
  call.out = on_field(params.out);
  call.mean_with = columns_rows_v;
  call.lse[0] = nullptr;
  forward_with<Engine, false>(call, stream);
}

// Whether the large tiles fit, whatever the sweep.
template <bool WHOLE>
bool large_tiles_fit(const Params& params) {
  ForwardCall call = make_call<float>(params, WHOLE ? Sweep::whole : Sweep::columns, 64);
  call.value_dim = channels_from(0, params.value_dim);
  if (!WHOLE) call.other_v = on_field(params.v);
  return ForwardLayout<Engine<float>, Form<WHOLE, WHOLE, MOST_COLUMNS>>(call).bytes <=
         tile_attention::SHARED_LIMIT;
}

}  // namespace

void forward_cuda(const Params& params, Stream stream) {
  check_sizes(params);
  cumulate(params, stream);
  with_dtype(params.dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto run = [&](auto engine) {
      using Chosen = decltype(engine);
      params.criss_cross ? criss_cross<Chosen>(params, stream) : whole<Chosen>(params, stream);
    };
    if constexpr (std::is_same_v<T, float>) {
      if (!(params.criss_cross ? large_tiles_fit<false>(params) : large_tiles_fit<true>(params)))
        return run(SmallEngine());
    }
    run(Engine<T>());
  });
}

}  // namespace vitkernels::polyline_path_attention

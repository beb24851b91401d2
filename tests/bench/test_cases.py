"""The shapes are the models', the cost is the operator's, the inputs are what models hand over."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import vitkernels
from vitkernels.bench import runner
from vitkernels.bench.case import Unavailable, load_case, operators, parse_fields
from vitkernels.bench.presets import WINDOW_MODELS
from vitkernels.bench.providers import ours

CASE = load_case("window_attention")


def inputs_of(problem, batch=1, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return CASE.make_inputs(problem, batch, dtype=dtype, device=torch.device("cpu"), generator=generator)


def test_every_operator_that_has_a_case_is_an_operator():
    assert "window_attention" in operators()
    for name in operators():
        assert callable(getattr(vitkernels.ops, name))
        case = load_case(name)
        assert case.operator == name
        assert case.default_preset in case.presets


def test_unknown_operator_names_the_known_ones():
    with pytest.raises(ValueError, match=r"op: expected one of .*window_attention.*; got 'nothing'"):
        load_case("nothing")


@pytest.mark.parametrize("preset", sorted(WINDOW_MODELS))
def test_presets_are_valid_calls(preset):
    for problem in CASE.presets[preset]:
        inputs = inputs_of(problem)
        reasons = vitkernels.supported_backends("window_attention", **inputs.tensors, **inputs.options)
        assert reasons["reference"] == []
        out = inputs.tensors["v"]
        assert inputs.grad_out.shape == out.shape
        assert problem.describe(1).startswith("x".join(map(str, out.shape[:3])))


def test_efficientvit_presets_are_the_published_models():
    dims = {"m0": (64, 128, 192), "m3": (128, 240, 320), "m5": (192, 288, 384)}
    heads = {"m0": (4, 4, 4), "m3": (4, 3, 4), "m5": (3, 3, 4)}
    for name, widths in dims.items():
        stages = WINDOW_MODELS[f"efficientvit_{name}"]
        assert [s.value_dim for s in stages] == [w // h for w, h in zip(widths, heads[name], strict=True)]
        assert [s.windows * s.window[0] * s.window[1] for s in stages] == [14 * 14, 7 * 7, 4 * 4]


@pytest.mark.parametrize(("preset", "dense"), [("efficientvit_m5", -2), ("swin_t", -1)])
def test_inputs_have_the_strides_that_models_produce(preset, dense):
    inputs = inputs_of(CASE.presets[preset][0], 2)
    for name in "qkv":
        tensor = inputs.tensors[name]
        assert tensor.stride(dense) == 1
        assert not tensor.is_contiguous()
    assert (
        inputs.tensors["k"].untyped_storage().data_ptr() == inputs.tensors["v"].untyped_storage().data_ptr()
    )


@pytest.mark.parametrize("preset", ["efficientvit_m5", "swin_t"])
@pytest.mark.parametrize("mode", ["fwd", "fwd+bwd"])
def test_cost_counts_the_flops_of_the_operator(preset, mode):
    problem = CASE.presets[preset][1]
    inputs = inputs_of(problem, 2)
    tensors = {name: tensor.detach().requires_grad_() for name, tensor in inputs.tensors.items()}
    with FlopCounterMode(display=False) as counter:
        out = CASE.eager(**tensors, **inputs.options)
        if mode == "fwd+bwd":
            torch.autograd.grad(out, list(tensors.values()), inputs.grad_out)
    assert CASE.cost(problem, 2, torch.float32, mode).flops == counter.get_total_flops()


@pytest.mark.parametrize("operator", operators())
def test_a_product_has_two_in_the_backward(operator):
    """The floor is the least work: scores that a kernel makes anew, and taps counted once a channel, are none of it."""
    case = load_case(operator)
    for problem in (*case.presets[case.default_preset], *map(case.parse_shape, case.check_shapes.values())):
        forward, both = (case.cost(problem, 2, torch.float32, mode) for mode in runner.MODES)
        # A choice of tokens has no gradient.
        assert both.flops == (forward.flops if operator == "token_merge" else 3 * forward.flops)


def test_cost_in_bytes_is_every_tensor_once():
    problem = CASE.presets["swin_t"][2]
    inputs = inputs_of(problem, 3, torch.float16)
    tensors = inputs.tensors
    once = sum(tensor.numel() * 2 for tensor in (*tensors.values(), inputs.grad_out))
    assert CASE.cost(problem, 3, torch.float16, "fwd").bytes == once
    rows = tensors["q"][..., 0].numel()
    gradients = sum(tensor.numel() * 2 for tensor in tensors.values())
    read_again = once - tensors["bias_table"].numel() * 2 + inputs.grad_out.numel() * 2
    expected = once + read_again + gradients + tensors["bias_table"].numel() * 2 + 2 * rows * 4
    assert CASE.cost(problem, 3, torch.float16, "fwd+bwd").bytes == expected


@pytest.mark.parametrize(
    "text", ["window=3x2,heads=2,lse=1,layout=map", "window=2x3,bias=none,lse=1", "bias=none"]
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_inputs_without_bias_and_with_lse(text, dtype):
    problem = CASE.parse_shape(text)
    inputs = inputs_of(problem, 2, dtype)
    truth, baseline = runner.truth_and_baseline(CASE, inputs, True)
    names = {"out", "q", "k", "v"} | ({"lse"} if problem.with_lse else set())
    assert set(truth) == names | (set() if "none" in text else {"bias_table"})
    assert runner.judge(CASE, problem, 2, inputs, baseline, baseline, truth).ok
    if problem.with_lse:
        assert baseline["lse"].dtype is torch.float32
        wrong = {**baseline, "lse": baseline["lse"] * 1.02}
        verdict = runner.judge(CASE, problem, 2, inputs, wrong, baseline, truth)
        assert not verdict.ok
        assert verdict.name == "lse"
        without = dataclasses.replace(inputs, grad_more={"lse": torch.zeros_like(truth["lse"])})
        assert not torch.allclose(
            runner.evaluate(ours(CASE, "reference").prepare(without, True), without, True)["q"], baseline["q"]
        )
        with pytest.raises(Unavailable, match="returns no lse"):
            CASE.peers(torch.device("cpu"))[1].prepare(inputs, True)


def test_check_shapes_reach_the_loops_over_the_batch():
    """csrc/include/vitkernels/tile_attention.h splits the batch into chunks beyond these numbers of items."""
    for name, text in CASE.check_shapes.items():
        problem = CASE.parse_shape(text)
        small = problem.tokens <= 16
        items = 3 * problem.stage.windows * problem.stage.heads * (1 if small else -(-problem.tokens // 64))
        assert (items > (4096 if small else 2048)) == name.endswith("-many"), name


def test_shape_text():
    problem = CASE.parse_shape("windows=3,window=7x5,heads=2,d=24,dv=48,bias=signed")
    assert problem.describe(2) == "6x2x35x24|48"
    assert problem.entries == 13 * 9
    assert CASE.parse_shape("d=32").stage.value_dim == 32
    for text, message in [
        ("width=3", "key=value with key in"),
        ("d", "key=value with key in"),
        ("window=7", "window=intxint"),
        ("d=x", "d=int"),
        ("bias=some", "bias in absolute, signed, none"),
        ("lse=2", "lse in 0, 1"),
        ("window=7x0", "window of at least 1"),
        ("dv=-1", "dv of at least 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            CASE.parse_shape(text)
    assert parse_fields("", {"a": 1}) == {"a": 1}
    assert parse_fields("a=0", {"a": 1}, or_zero=("a",)) == {"a": 0}


@pytest.mark.parametrize("operator", operators())
def test_sizes_are_positive(operator):
    case = load_case(operator)
    for item in case.shape_help.replace(" ", "").split(","):
        key, _, value = item.partition("=")
        if value[:1].isdigit() and key != "kernels":
            with pytest.raises(ValueError, match=f"shape: expected {key}"):
                case.parse_shape(f"{key}={'-1x-1' if 'x' in value else '-1'}")
    for text in case.check_shapes.values():
        assert case.parse_shape(text)


def test_eager_neighborhood_attention_copies_nothing_it_gathered():
    """It did, every key and value 49 times over, and sorted 49 times as many indices in the backward."""
    case = load_case("neighborhood_attention")
    problem = case.parse_shape("map=9x9,heads=2,d=16")
    generator, cpu = torch.Generator().manual_seed(0), torch.device("cpu")
    inputs = case.make_inputs(problem, 1, dtype=torch.float32, device=cpu, generator=generator)
    large = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.numel() >= problem.pairs(1) * 16:
                before = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
                if result.untyped_storage().data_ptr() not in before:
                    large.append(func.overloadpacket.__name__)
            return result

    with Watch():
        runner.evaluate(functools.partial(case.eager, **inputs.options), inputs, True)
    # Keys and values, and the gradients of what was gathered.
    assert sorted(large) == ["bmm", "bmm", "index_select", "index_select"]


@pytest.mark.parametrize(
    "operator", ["window_attention", "neighborhood_attention", "cascaded_group_attention"]
)
@pytest.mark.filterwarnings("error:Dynamo detected a call")
def test_what_is_compiled_calls_no_cached_function(operator):
    case = load_case(operator)
    problem = case.parse_shape(next(iter(case.check_shapes.values())))
    generator, cpu = torch.Generator().manual_seed(0), torch.device("cpu")
    inputs = case.make_inputs(problem, 1, dtype=torch.float32, device=cpu, generator=generator)
    eager = functools.partial(case.eager, **inputs.options)
    torch._dynamo.reset()
    compiled = torch.compile(eager, fullgraph=True, dynamic=False, backend="eager")
    torch.testing.assert_close(compiled(**inputs.tensors), eager(**inputs.tensors))

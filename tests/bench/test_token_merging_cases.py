"""Cases of token merging: the published shapes, counted costs, inputs whose plan no rounding decides."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from vitkernels import ops
from vitkernels.bench import runner
from vitkernels.bench.case import load_case
from vitkernels.bench.cases import token_merge
from vitkernels.bench.providers import ours

MERGE, ATTENTION, SOFT = map(load_case, ("token_merge", "attention_with_size", "learnable_token_merge"))
CPU = torch.device("cpu")


def inputs_of(case, problem, batch=1, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return case.make_inputs(problem, batch, dtype=dtype, device=CPU, generator=generator)


@pytest.mark.parametrize(
    ("preset", "bytes_of_the_table"), [("vit_b", 38.8), ("deit_s", 81.4), ("sd_512", 13.1)]
)
def test_bytes_are_those_counted_by_hand(preset, bytes_of_the_table):
    """Metric, tokens and merged tokens once, in fp16; sizes come on top."""
    batch = {"vit_b": 64, "deit_s": 256, "sd_512": 2}[preset]
    (problem,) = MERGE.presets[preset]
    counted = MERGE.cost(problem, batch, torch.float16, "fwd").bytes
    if problem.mode == "wavg":
        counted -= 4 * batch * (2 * problem.tokens - problem.r)
    assert counted / 1e6 == pytest.approx(bytes_of_the_table, rel=5e-3)


def test_multiply_adds_of_the_scores():
    assert MERGE.cost(MERGE.presets["vit_l_384"][0], 1, torch.float32, "fwd").flops == 2 * 289 * 288 * 64
    assert MERGE.cost(MERGE.presets["sd_512"][0], 1, torch.float32, "fwd").flops == 2 * 2048 * 2048 * 320


def test_blocks_hold_the_tokens_that_are_left():
    assert [p.queries for p in ATTENTION.presets["vit_b"]] == [181, 101, 21]
    assert [p.queries for p in ATTENTION.presets["deit_s"]] == [184, 119, 54]
    for problem in ATTENTION.presets["vit_l_384"]:
        size = inputs_of(ATTENTION, problem).options["size"]
        assert size.min() >= 1
        assert size.sum() == 577


def test_queries_keys_and_values_are_slices_of_one_projection():
    tensors = inputs_of(ATTENTION, ATTENTION.presets["deit_s"][0], 2).tensors
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors.values()}) == 1
    assert tensors["q"].stride() == (184 * 3 * 384, 64, 3 * 384, 1)


@pytest.mark.parametrize("case", [ATTENTION, SOFT], ids=lambda case: case.operator)
@pytest.mark.parametrize("mode", ["fwd", "fwd+bwd"])
def test_flops_are_those_of_the_operator(case, mode):
    for problem in (
        (case.parse_shape("heads=2,queries=9,keys=7,d=8,dv=5"),)
        if case is ATTENTION
        else (
            case.parse_shape("tokens=9,d=8,merged=5"),
            case.parse_shape("tokens=9,d=8,merged=5,other=3,shared=1"),
        )
    ):
        inputs = inputs_of(case, problem, 2)
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.tensors.items()}
        with FlopCounterMode(display=False) as counter:
            out = case.eager(**leaves, **inputs.options)
            if mode == "fwd+bwd":
                outputs = out if isinstance(out, tuple) else (out,)
                torch.autograd.grad(outputs, list(leaves.values()), inputs.gradients)
        assert case.cost(problem, 2, torch.float32, mode).flops == counter.get_total_flops()


def test_no_rounding_decides_a_plan():
    generator = torch.Generator().manual_seed(1)
    metric = torch.randn(2, 40, 8, generator=generator)
    metric[0, 6] = metric[0, 8]  # two sources tie at every rank
    metric[1, 5] = metric[1, 11]  # two destinations tie for every source
    metric[1, 10] = 2 * metric[1, 5]
    token_merge.without_ties(metric, 9, generator)
    unit = torch.nn.functional.normalize(metric.double(), dim=2)
    best = (unit[:, ::2] @ unit[:, 1::2].mT).sort(2, descending=True).values
    ranked = best[..., 0].sort(1, descending=True).values
    assert (ranked[:, 8] - ranked[:, 9]).min() > token_merge.TIE
    assert not torch.equal(metric[1, 10], 2 * metric[1, 5])
    kept, merged, targets = token_merge.choose(metric, 9, False)
    plan = ops.bipartite_match(metric, 9, backend="reference")
    assert torch.equal(plan.src.long().sort(1).values, 2 * merged.sort(1).values)
    assert torch.equal(plan.unm.long().sort(1).values, 2 * kept.sort(1).values)
    assert torch.equal(plan.dst.long(), 2 * targets + 1)


@pytest.mark.parametrize("case", [MERGE, ATTENTION, SOFT], ids=lambda case: case.operator)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_reference_passes_and_a_wrong_result_does_not(case, dtype):
    for name, text in case.check_shapes.items():
        if name in ("577", "1370", "4096"):  # as 197, and slow
            continue
        problem = case.parse_shape(text)
        draws = runner.Draws(case, problem, 1, True, runner.Settings(CPU, dtype))
        provider = ours(case, "reference")
        inputs, truth, baseline = draws[0]
        assert draws.judge(provider, provider.prepare(inputs, True)).ok, name
        wrong = {**baseline, "out": baseline["out"] * 1.1}
        assert not runner.judge(case, problem, 1, inputs, wrong, baseline, truth).ok, name


def test_shape_text():
    assert MERGE.parse_shape("tokens=577,c=1024,r=23").describe(2) == "2x577x1024 by 64 -23"
    assert (
        SOFT.parse_shape("tokens=9,d=4,merged=3,other=2,shared=1").describe(2)
        == "2x9x4+2 -> 3 softmax shared"
    )
    for case, text, message in (
        (MERGE, "mode=median", "shape: expected mode in wavg, sum, mean, amax; got 'median'"),
        (SOFT, "normalize=max", "shape: expected normalize in none, sum, softmax, softmax_rows; got 'max'"),
    ):
        with pytest.raises(ValueError, match=message):
            case.parse_shape(text)


def test_no_more_is_merged_than_every_second_token():
    case = load_case("token_merge")
    for text in ("tokens=1,r=0", "tokens=20,r=10", "tokens=20,r=11,cls=0"):
        with pytest.raises(ValueError, match="r of at most "):
            case.parse_shape(text)
    assert case.parse_shape("tokens=20,r=9")
    assert case.parse_shape("tokens=20,r=10,cls=0")

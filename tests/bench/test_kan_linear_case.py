from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from vitkernels.bench import runner
from vitkernels.bench.case import Unavailable, load_case

CASE = load_case("kan_linear")


def inputs_of(problem, batch=1, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return CASE.make_inputs(problem, batch, dtype=dtype, device=torch.device("cpu"), generator=generator)


def test_presets_are_the_published_models():
    """KAN multiply-adds of MedViTV2 at 224 px, in G: the blocks of a stage times its two layers."""
    blocks = {"medvit_tiny": (1, 2, 1), "medvit_small": (1, 2, 2), "medvit_large": (1, 2, 2)}
    published = {"medvit_tiny": 1.105, "medvit_small": 2.055, "medvit_large": 8.221}
    for name, counts in blocks.items():
        macs = [CASE.cost(problem, 1, torch.float32, "fwd").flops / 2 for problem in CASE.presets[name]]
        total = sum(count * (macs[2 * i] + macs[2 * i + 1]) for i, count in enumerate(counts))
        assert total / 1e9 == pytest.approx(published[name], rel=2e-3)


def test_cost_is_what_the_composition_counts():
    problem = CASE.parse_shape("rows=7,channels=6,outputs=5,grids=3")
    inputs = inputs_of(problem, 2)
    for mode in ("fwd", "fwd+bwd"):
        with FlopCounterMode(display=False) as counter:
            if mode == "fwd":
                CASE.eager(**inputs.tensors, **inputs.options)
            else:
                runner.evaluate(lambda **tensors: CASE.eager(**tensors, **inputs.options), inputs, True)
        assert counter.get_total_flops() == CASE.cost(problem, 2, torch.float32, mode).flops


def test_the_product_alone_is_the_right_answer():
    problem = CASE.parse_shape("rows=7,channels=6,outputs=5")
    inputs = inputs_of(problem)
    (gemm,) = CASE.peers(torch.device("cpu"))
    got = gemm.prepare(inputs, False)(**inputs.tensors)
    torch.testing.assert_close(got, CASE.eager(**inputs.tensors, **inputs.options))
    with pytest.raises(Unavailable):
        gemm.prepare(inputs, True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_reference_and_plain_pytorch_agree(dtype):
    truth, baseline = runner.truth_and_baseline(
        CASE, inputs_of(CASE.parse_shape("rows=9,channels=5"), 1, dtype), True
    )
    assert set(truth) == set(baseline) == {"out", "x", "weight", "ln_weight", "ln_bias"}

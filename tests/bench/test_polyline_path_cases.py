from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from vitkernels.bench import runner
from vitkernels.bench.case import Unavailable, load_case

MASK, SCAN = load_case("polyline_path_mask"), load_case("polyline_path_scan")


def inputs_of(case, problem, batch=1, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return case.make_inputs(problem, batch, dtype=dtype, device=torch.device("cpu"), generator=generator)


@pytest.mark.parametrize("case", [MASK, SCAN], ids=lambda case: case.operator)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_reference_and_plain_pytorch_agree(case, dtype):
    for text in ("size=3x4,heads=2", "size=4x3,heads=1,transpose=1"):
        truth, baseline = runner.truth_and_baseline(
            case, inputs_of(case, case.parse_shape(text), 1, dtype), True
        )
        assert set(truth) == set(baseline)
        assert {"out", "log_decay_w", "log_decay_h"} <= set(truth)


def test_the_eager_mask_is_added_from_dense_tables():
    """Its columns lay a table apart, and plain PyTorch took up to 1.9 times as long as it needs."""
    problem = MASK.parse_shape("size=6x5,heads=3")
    generator, cpu = torch.Generator().manual_seed(0), torch.device("cpu")
    inputs = MASK.make_inputs(problem, 2, dtype=torch.float32, device=cpu, generator=generator)
    strides = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if func is torch.ops.aten.add.Tensor and result.numel() == inputs.grad_out.numel():
                strides.extend(table.stride(-1) for table in args)
            return result

    with Watch():
        MASK.eager(**inputs.tensors, **inputs.options)
    assert strides == [1, 1]


def test_presets_are_the_published_stages():
    """The masks of PPMA-T's whole stages at 224 px, batch 64, in MB of float32."""
    sizes = [MASK.cost(p, 64, torch.float32, "fwd").bytes for p in MASK.presets["ppma_t"]]
    assert [round(size / 1e6) for size in sizes] == [79, 10]
    assert [p.stage.size for p in SCAN.presets["ppma_b"]] == [(56, 56), (28, 28), (14, 14), (7, 7)]
    assert [p.stage.heads for p in SCAN.presets["ppma_b"]] == [5, 5, 10, 16]


def test_cost_of_the_scan_is_what_the_composition_counts():
    problem = SCAN.parse_shape("size=5x7,heads=2,d=3")
    inputs = inputs_of(SCAN, problem, 2)
    for mode in ("fwd", "fwd+bwd"):
        with FlopCounterMode(display=False) as counter:
            runner.evaluate(lambda **t: SCAN.eager(**t, **inputs.options), inputs, mode != "fwd")
        assert counter.get_total_flops() == SCAN.cost(problem, 2, torch.float32, mode).flops


def test_the_whole_mask_is_the_right_answer_where_it_is_small():
    for text in ("size=5x7,heads=2,d=3", "size=5x7,heads=2,d=3,transpose=1"):
        inputs = inputs_of(SCAN, SCAN.parse_shape(text))
        (dense,) = SCAN.peers(torch.device("cpu"))
        got = dense.prepare(inputs, False)(**inputs.tensors)
        torch.testing.assert_close(got, SCAN.eager(**inputs.tensors, **inputs.options))
    with pytest.raises(Unavailable):
        dense.prepare(inputs_of(SCAN, SCAN.parse_shape("size=33x32")), False)


@pytest.mark.parametrize("case", [MASK, SCAN], ids=lambda case: case.operator)
def test_shape_text(case):
    assert case.parse_shape("size=5x9").tokens == 45
    with pytest.raises(ValueError, match="transpose in 0, 1"):
        case.parse_shape("transpose=2")

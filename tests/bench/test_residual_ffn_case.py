from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from vitkernels.bench import runner
from vitkernels.bench.case import load_case
from vitkernels.bench.providers import ours

CASE = load_case("residual_ffn")


@pytest.mark.parametrize("mode", ["fwd", "fwd+bwd"])
def test_cost_and_results(mode: str) -> None:
    problem = CASE.parse_shape("c=24,side=5")
    training = mode == "fwd+bwd"
    generator = torch.Generator().manual_seed(0)
    inputs = CASE.make_inputs(
        problem, 2, dtype=torch.float32, device=torch.device("cpu"), generator=generator
    )
    tensors = {name: tensor.detach().requires_grad_() for name, tensor in inputs.tensors.items()}
    with FlopCounterMode(display=False) as counter:
        out = CASE.eager(**tensors)
        if training:
            torch.autograd.grad(out, list(tensors.values()), inputs.grad_out)
    taps = 18 * 2 * 25 * 24  # PyTorch counts their gradient 24 times, once a channel
    cost = CASE.cost(problem, 2, torch.float32, mode)
    assert cost.flops == counter.get_total_flops() - training * 23 * taps
    if not training:
        assert cost.bytes == 4 * sum(tensor.numel() for tensor in (*tensors.values(), inputs.grad_out))
    truth, baseline = runner.truth_and_baseline(CASE, inputs, training)
    providers = [ours(CASE, "cpu"), *(() if training else CASE.peers(torch.device("cpu")))]
    for provider in providers:
        got = runner.evaluate(provider.prepare(inputs, training), inputs, training)
        assert runner.judge(CASE, problem, 2, inputs, got, baseline, truth).ok, provider.name

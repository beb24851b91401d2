"""A kernel that does nothing but exponentials in registers, to measure the special-function rate of a GPU."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl

BLOCK = 2048
STEPS = 512


@triton.jit
def exp_kernel(out, STEPS: tl.constexpr, BLOCK: tl.constexpr):
    x = tl.arange(0, BLOCK).to(tl.float32) * (1.0 / BLOCK)
    for _ in range(STEPS):
        # Converges to 0.64 and never overflows; every step needs the one before, so none can be dropped.
        x = tl.exp2(-x)
    tl.store(out + tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK), x)


def exponentials(device: torch.device) -> tuple[Callable[[], object], int]:
    """A launch and how many exponentials it does."""
    programs = torch.cuda.get_device_properties(device).multi_processor_count * 16
    out = torch.empty(programs * BLOCK, device=device)

    def step() -> object:
        return exp_kernel[(programs,)](out, STEPS=STEPS, BLOCK=BLOCK, num_warps=8)

    return step, programs * BLOCK * STEPS

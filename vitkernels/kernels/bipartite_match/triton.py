"""Launches the Triton kernels of bipartite matching: which tiles, how many programs.

The configuration follows from channels, dtype and the sequence's order of magnitude: no autotuning, and neither a new
batch size nor another layer's sequence recompiles.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import torch
import triton
from torch import Tensor

from vitkernels.core.triton_tiles import device_of, padded
from vitkernels.kernels.bipartite_match.triton_arrange import arrange
from vitkernels.kernels.bipartite_match.triton_scores import best_partners

# Longest sequence that one program arranges alone, sparing a launch.
ALONE = 1024
# Programs that fill a large GPU about twice over; an image takes a part of them.
PROGRAMS = 512
ARRANGE = {"BLOCK": 64, "CHUNK": 64, "num_warps": 8}


@cache
def configuration(channels: int, itemsize: int, long: bool) -> dict[str, int]:
    """Tiles of `best_partners`; long sequences afford larger ones. Up to 128 channels stay where they are."""
    config = {"num_warps": 4, "num_stages": 2}
    if itemsize == 4:  # on the FMA units
        return {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_C": min(32, padded(channels)), **config}
    block_c = padded(channels) if channels <= 128 else 64
    return {"BLOCK_M": 64 if long else 32, "BLOCK_N": 64, "BLOCK_C": block_c, **config}


def _scratch(like: Tensor, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=like.device)


def forward(
    rows: Tensor,
    starts: Tensor,
    members: Tensor,
    src: Tensor,
    dst: Tensor,
    metric: Tensor,
    r: int,
    class_token: bool,
    distill_token: bool,
) -> None:
    """Fills rows, starts, members, src and dst; r is at least 1."""
    batch, tokens, channels = metric.shape
    evens = (tokens + 1) // 2
    config = configuration(channels, metric.element_size(), tokens > ALONE)
    best, partner = _scratch(metric, batch, evens), _scratch(metric, batch, evens, dtype=torch.int32)
    told = {"CLASS_TOKEN": class_token, "DISTILL_TOKEN": distill_token}
    with device_of(metric):
        best_partners[(batch * triton.cdiv(evens, config["BLOCK_M"]),)](
            best, partner, metric, *metric.stride(), tokens, CHANNELS=channels, **told, **config
        )
        tensors = (rows, starts, members, src, dst, best, partner, tokens, r)
        if tokens <= ALONE:
            arrange[(batch,)](*tensors, 1, RANK=True, PLACE=True, **told, **ARRANGE)
            return
        for count, rank in ((evens, True), (tokens, False)):
            programs = min(triton.cdiv(count, ARRANGE["BLOCK"]), max(1, PROGRAMS // batch))
            arrange[(batch * programs,)](*tensors, programs, RANK=rank, PLACE=not rank, **told, **ARRANGE)


def examples(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], None]]]:
    """Calls that launch every kernel at representative sizes, for compiling them without a GPU."""
    for tokens, channels, r, told in ((197, 64, 16, (True, False)), (4096, 320, 2048, (False, False))):
        metric = torch.empty(2, tokens, channels, dtype=dtype)
        results = [torch.empty(2, n, dtype=torch.int32) for n in (tokens, tokens - r + 1, tokens, r, r)]

        def call(results=results, inputs=(metric, r, *told)):
            forward(*results, *inputs)

        yield f"{tokens} tokens, c={channels}", call

"""Calls of matching, merging and unmerging for their tests: inputs, what is right, and the house rule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tolerance import FORWARD, GRADIENT, assert_close_to_truth
from torch import Tensor

from vitkernels.core.merge_plan import groups
from vitkernels.kernels.bipartite_match import clipped
from vitkernels.kernels.bipartite_match import reference as match
from vitkernels.kernels.token_merge import reference as merge
from vitkernels.kernels.token_unmerge import reference as unmerge

MODES = ("wavg", "sum", "mean", "amax")
PROTECTED = [(False, False), (True, False), (False, True), (True, True)]
NAMES = ("rows", "starts", "members", "src", "dst")
NOTHING = torch.iinfo(torch.int32).min
Plan = dict[str, Tensor]
Results = dict[str, Tensor]


def launch_match(
    module: Any,
    metric: Tensor,
    r: int,
    class_token: bool = False,
    distill_token: bool = False,
    /,
    *,
    allocate: Callable[[tuple[int, ...]], Tensor] | None = None,
    **options: Any,
) -> Plan:
    """The plan that a backend's module fills in; r may be more than can merge."""
    batch, tokens, _ = metric.shape
    r = clipped(tokens, r, class_token, distill_token)
    assert r > 0, "nothing to merge: the operator never gets here"
    allocate = allocate or (lambda shape: torch.full(shape, NOTHING, dtype=torch.int32))
    shapes = [(tokens,), (tokens - r + 1,), (tokens,), (r,), (r,)]
    plan = {name: allocate((batch, *shape)) for name, shape in zip(NAMES, shapes, strict=True)}
    module.forward(*plan.values(), metric, r, class_token, distill_token, **options)
    return plan


def expected(metric: Tensor, r: int, class_token: bool = False, distill_token: bool = False) -> Plan:
    r = clipped(metric.shape[1], r, class_token, distill_token)
    return dict(zip(NAMES, match.forward(metric, r, class_token, distill_token), strict=True))


def assert_same(got: Plan, want: Plan) -> None:
    for name in NAMES:
        assert torch.equal(got[name], want[name]), f"{name}:\n{got[name]}\nexpected\n{want[name]}"


def check_match(
    got: Plan, metric: Tensor, r: int, class_token: bool = False, distill_token: bool = False
) -> bool:
    """Asserts that the plan is that of the definition, but for scores closer to each other than their rounding.

    Returns whether there were none of those, so that the plan is the definition's and no other.
    """
    wide = torch.finfo(torch.float64 if metric.dtype is torch.float64 else torch.float32)
    # Two dot products and two norms of c terms, their errors those of sums whose roundings do not conspire.
    near = 8 * wide.eps * metric.shape[2] ** 0.5
    scores = match.similarities(metric.double())
    if class_token:
        scores[:, 0] = -torch.inf
    if distill_token:
        scores[:, :, 0] = -torch.inf
    best, evens = scores.amax(2), scores.shape[1]
    src, dst = got["src"].long() // 2, got["dst"].long() // 2
    assert ((src >= class_token) & (src < evens) & (dst >= distill_token) & (dst < scores.shape[2])).all()
    assert (got["src"] % 2 == 0).all()
    assert (got["dst"] % 2 == 1).all()
    images = torch.arange(len(metric)).unsqueeze(1)
    assert (scores[images, src, dst] >= best[images, src] - near).all(), "not each one's best partner"
    ranked = best.gather(1, src)
    assert (ranked[:, 1:] <= ranked[:, :-1] + near).all(), "the best pairs are not first"
    left = best.scatter(1, src, -torch.inf)
    assert (left.amax(1) <= ranked[:, -1] + near).all(), "a better pair was left out"

    # The rest of the plan follows from src and dst, but for the order of those kept by rank.
    odds, kept = scores.shape[2], evens - src.shape[1]
    merged = torch.zeros_like(best, dtype=torch.bool).scatter(1, src, True)
    assert (merged.sum(1) == src.shape[1]).all(), "a token merges twice"
    other = torch.arange(odds) + kept
    alone = torch.arange(kept)
    if distill_token:
        other[0], alone = 1, alone + (alone > 0)
    rows = got["rows"].long()
    assert (rows[:, 1::2] == other).all()
    assert torch.equal(rows[:, ::2].gather(1, src), other[dst])
    where = rows[:, ::2][~merged].view(len(metric), kept)
    assert torch.equal(where.sort(1).values, alone.expand_as(where))
    values = best[~merged].view(len(metric), kept).gather(1, where.argsort(1))
    if class_token:
        assert torch.equal(where, alone.expand_as(where))
    else:
        assert (values[:, 1:] <= values[:, :-1] + near).all(), "those kept are not ordered by rank"
    again = groups(got["rows"], got["starts"].shape[1] - 1)
    for name, want in zip(NAMES, again, strict=False):
        assert torch.equal(got[name], want), name

    top = scores.topk(min(2, odds), dim=2).values
    ranking = best[:, class_token:].sort(1).values
    clear = (
        (top[:, class_token:, 0] - top[:, class_token:, -1] > near).all()
        if odds > 1 + distill_token
        else True
    )
    clear = bool(clear) and bool((ranking[:, 1:] - ranking[:, :-1] > near).all())
    if clear:
        want = expected(metric.double(), r, class_token, distill_token)
        assert_same(got, want)
    return clear


def tied_metric(batch: int, tokens: int, channels: int, dtype: torch.dtype) -> Tensor:
    """Few different scores, each exact in every dtype and order of sums: norms are powers of two."""
    metric = torch.zeros(batch, tokens, channels)
    for token in metric.view(-1, channels):
        token[torch.randperm(channels)[:4]] = 2.0 ** torch.randint(-1, 3, ()) * torch.randint(0, 2, (4,)).mul(
            2
        ).sub(1)
    return metric.to(dtype)


def random_plan(batch: int, tokens: int, merged: int) -> tuple[Tensor, Tensor, Tensor]:
    """(rows, starts, members): groups of all sizes, the last one the largest, in no order of the tokens."""
    rows = []
    for _ in range(batch):
        extra = torch.cat([torch.randint(0, merged, (1,)), torch.full((tokens,), merged - 1)])
        row = torch.cat([torch.arange(merged), torch.randint(0, merged, (tokens,)), extra])[:tokens]
        row[merged + (tokens - merged) // 2 :] = merged - 1
        rows.append(row[torch.randperm(tokens)])
    return groups(torch.stack(rows).int(), merged)


def launch_merge(
    module: Any, x: Tensor, size: Tensor | None, plan: Any, mode: str, grad_y: Tensor, /, **options: Any
) -> Results:
    wide = torch.float64 if x.dtype is torch.float64 else torch.float32
    batch, merged = plan[1].shape[0], plan[1].shape[1] - 1
    y = torch.full((batch, merged, x.shape[2]), float("nan"), dtype=x.dtype)
    sizes = torch.full((batch, merged), float("nan"), dtype=wide)
    grad_x = torch.full(x.shape, float("nan"), dtype=x.dtype)
    module.forward(y, sizes, x, size, *plan, mode, **options)
    nobody = (None,) * 4
    module.backward(grad_x, *nobody, grad_y, None, y, sizes, x, size, *plan, mode, **options)
    return {"y": y, "sizes": sizes, "grad x": grad_x}


def launch_unmerge(module: Any, y: Tensor, plan: Any, grad_x: Tensor, /, **options: Any) -> Results:
    x = torch.full((*plan[0].shape, y.shape[2]), float("nan"), dtype=y.dtype)
    grad_y = torch.full(y.shape, float("nan"), dtype=y.dtype)
    module.forward(x, y, *plan, **options)
    module.backward(grad_y, None, None, None, grad_x, x, y, *plan, **options)
    return {"x": x, "grad y": grad_y}


def _merge_of(x: Tensor, size: Tensor | None, plan: Any, mode: str, grad_y: Tensor) -> Results:
    leaf = x.detach().requires_grad_()
    y, sizes = merge.forward(leaf, size, *plan, mode)
    (grad_x,) = torch.autograd.grad(y, leaf, grad_y.to(y.dtype))
    return {"y": y.detach(), "sizes": sizes, "grad x": grad_x}


def _unmerge_of(y: Tensor, plan: Any, grad_x: Tensor) -> Results:
    leaf = y.detach().requires_grad_()
    (x,) = unmerge.forward(leaf, *plan)
    (grad_y,) = torch.autograd.grad(x, leaf, grad_x.to(x.dtype))
    return {"x": x.detach(), "grad y": grad_y}


def _hold(got: Results, baseline: Results, truth: Results, dtype: torch.dtype, reduced: int) -> None:
    for name, want in truth.items():
        factor = GRADIENT if name.startswith("grad") else FORWARD
        assert_close_to_truth(
            name, got[name], baseline[name], want, factor=factor, reduced=reduced, dtype=dtype
        )


def check_merge(got: Results, x: Tensor, size: Tensor | None, plan: Any, mode: str, grad_y: Tensor) -> None:
    wide_size = None if size is None else size.double()
    truth = _merge_of(x.double(), wide_size, plan, mode, grad_y.to(x.dtype).double())
    longest = int(plan[1].diff(dim=1).max())
    _hold(got, _merge_of(x, size, plan, mode, grad_y), truth, x.dtype, longest)


def check_unmerge(got: Results, y: Tensor, plan: Any, grad_x: Tensor) -> None:
    truth = _unmerge_of(y.double(), plan, grad_x.to(y.dtype).double())
    longest = int(plan[1].diff(dim=1).max())
    _hold(got, _unmerge_of(y, plan, grad_x), truth, y.dtype, longest)

"""Samples of merging tokens, hard and soft, and of attention among merged ones."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import torch

from vitkernels import MergePlan, ops

from .attention import strip_tensors
from .sample import Sample


def _merge_plan(tensors: dict[str, Any], name: str) -> MergePlan:
    """Seven tokens into four: groups of one, two and three tokens, not in the order of the tokens."""
    x = tensors[name]
    rows = torch.tensor([2, 0, 1, 2, 3, 2, 1], dtype=torch.int32, device=x.device)
    starts = torch.tensor([0, 1, 3, 6, 7], dtype=torch.int32, device=x.device)
    members = torch.tensor([1, 2, 6, 0, 3, 5, 4], dtype=torch.int32, device=x.device)
    return MergePlan(*(t.repeat(x.shape[0], 1) for t in (rows, starts, members)))


def _wrong_plan(**changes: Any) -> MergePlan:
    """With a tensor of another dtype, or cut off along a dimension."""
    plan = _merge_plan({"x": _tokens}, "x")
    for name, change in changes.items():
        value = getattr(plan, name)
        setattr(plan, name, value.narrow(change, 0, 1) if isinstance(change, int) else value.to(change))
    return plan


def _more_rows_than_tokens() -> MergePlan:
    plan = _merge_plan({"x": _tokens}, "x")
    plan.starts = torch.arange(plan.tokens + 2, dtype=torch.int32).repeat(len(plan.rows), 1)
    return plan


def _of_one_image(name: str) -> MergePlan:
    plan = _merge_plan({"x": _tokens}, "x")
    setattr(plan, name, getattr(plan, name)[0])
    return plan


def _elsewhere(name: str) -> MergePlan:
    plan = _merge_plan({"x": _tokens}, "x")
    setattr(plan, name, getattr(plan, name).to("meta"))
    return plan


def token_merge(**arguments: Any) -> torch.Tensor:
    return ops.token_merge(**arguments)[0]  # the sizes have no gradient


def _token_merge(sized: bool) -> dict[str, Callable[..., dict[str, Any]]]:
    def arguments(tensors: dict[str, Any]) -> dict[str, Any]:
        x = tensors["x"]
        size = torch.arange(1.0, 8.0, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        return tensors | {
            "plan": _merge_plan(tensors, "x"),
            "size": size.repeat(x.shape[0], 1) if sized else None,
        }

    return {"make": lambda batch: {"x": torch.randn(batch, 7, 5)}, "arguments": arguments}


def _sized_attention(heads: int, queries: int, keys: int, d: int, dv: int) -> dict[str, Any]:
    def arguments(tensors: dict[str, Any]) -> dict[str, Any]:
        q = tensors["q"]
        size = torch.arange(1.0, keys + 1, dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
        return tensors | {"size": size.repeat(q.shape[0], 1)}

    return {"make": strip_tensors(heads, queries, keys, d, dv), "arguments": arguments}


def learnable_token_merge(z: Any, g: Any, *, other: Any = None, **options: Any) -> Any:
    return ops.learnable_token_merge(z, g, *(() if other is None else (other,)), **options)


def _soft_merge(shared: bool, other: int | None = None) -> Callable[..., Any]:
    def make(batch: int) -> dict[str, torch.Tensor]:
        mask = torch.rand(7, 3) if shared else torch.rand(batch, 7, 3)
        tensors = {"z": torch.randn(batch, 7, 5), "g": 0.5 + mask}
        return tensors if other is None else tensors | {"other": torch.randn(batch, 7, other)}

    return make


_narrow, _wide = torch.randn(2, 2, 5, 1), torch.randn(2, 2, 5, 3)
_tokens = torch.randn(2, 7, 5)
_x = torch.randn(2, 2, 15, 8)

SAMPLES = [
    Sample(
        "token_merge-wavg",
        token_merge,
        **_token_merge(True),
        kwargs={"mode": "wavg"},
        products=False,
        bad=[
            ({"x": "text"}, TypeError, "argument `x`: expected a tensor"),
            ({"x": _tokens[:, 1:]}, ValueError, "argument `x`: expected shape [batch, tokens, channels] of"),
            ({"x": _tokens.int()}, TypeError, "argument `x`: expected dtype"),
            ({"x": _tokens[..., :0]}, ValueError, "argument `x`: expected at least one channel"),
            ({"plan": _tokens}, TypeError, "argument `plan`: expected a MergePlan"),
            (
                {"plan": _wrong_plan(rows=torch.int64)},
                TypeError,
                "argument `plan.rows`: expected dtype int32",
            ),
            (
                {"plan": _wrong_plan(members=torch.float)},
                TypeError,
                "argument `plan.members`: expected dtype",
            ),
            ({"plan": _of_one_image("rows")}, ValueError, "argument `plan.rows`: expected shape"),
            ({"plan": _of_one_image("starts")}, ValueError, "argument `plan.starts`: expected shape"),
            ({"plan": _wrong_plan(members=1)}, ValueError, "argument `plan.members`: expected shape"),
            ({"plan": _wrong_plan(starts=0)}, ValueError, "argument `plan.starts`: expected shape"),
            (
                {"plan": _more_rows_than_tokens()},
                ValueError,
                "argument `plan.starts`: expected [batch, merged",
            ),
            *(
                ({"plan": _elsewhere(name)}, ValueError, "argument `plan`: expected device cpu")
                for name in ("rows", "starts", "members")
            ),
            (
                {"plan": _merge_plan({"x": _tokens.to("meta")}, "x")},
                ValueError,
                "argument `plan`: expected device cpu",
            ),
            ({"size": 1.0}, TypeError, "argument `size`: expected a tensor"),
            ({"size": torch.ones(2, 7, 1)}, ValueError, "argument `size`: expected shape"),
            ({"size": torch.ones(2, 7).to("meta")}, ValueError, "argument `size`: expected device cpu"),
            ({"size": torch.ones(2, 7).half()}, TypeError, "argument `size`: expected dtype float32"),
            (
                {"size": torch.ones(2, 7, requires_grad=True)},
                ValueError,
                "argument `size`: expected a tensor without a gradient",
            ),
            ({"mode": "max"}, ValueError, "argument `mode`: expected 'wavg', 'sum', 'mean' or 'amax'"),
            ({"backend": "cudnn"}, ValueError, "argument `backend`: expected one of"),
        ],
    ),
    Sample("token_merge-amax", token_merge, **_token_merge(False), kwargs={"mode": "amax"}, products=False),
    Sample("token_merge-sum", token_merge, **_token_merge(True), kwargs={"mode": "sum"}, products=False),
    Sample("token_merge-mean", token_merge, **_token_merge(True), kwargs={"mode": "mean"}, products=False),
    Sample(
        "token_unmerge",
        ops.token_unmerge,
        lambda batch: {"y": torch.randn(batch, 4, 5)},
        arguments=lambda tensors: tensors | {"plan": _merge_plan(tensors, "y")},
        products=False,
        bad=[
            ({"y": "text"}, TypeError, "argument `y`: expected a tensor"),
            ({"y": _tokens}, ValueError, "argument `y`: expected shape [batch, merged tokens, channels] of"),
            ({"y": _tokens[:, :4].int()}, TypeError, "argument `y`: expected dtype"),
            ({"plan": None}, TypeError, "argument `plan`: expected a MergePlan"),
            ({"plan": _wrong_plan(members=1)}, ValueError, "argument `plan.members`: expected shape"),
            *(
                ({"plan": _elsewhere(name)}, ValueError, "argument `plan`: expected device cpu")
                for name in ("rows", "starts", "members")
            ),
            ({"y": _tokens[:, :4].to("meta")}, ValueError, "argument `plan`: expected device meta"),
            ({"backend": "cudnn"}, ValueError, "argument `backend`: expected one of"),
        ],
    ),
    Sample(
        "attention_with_size",
        ops.attention_with_size,
        **_sized_attention(2, 9, 5, 4, 3),
        bad=[
            ({"q": "text"}, TypeError, "argument `q`: expected a tensor"),
            ({"k": _x}, ValueError, "argument `k`: expected shape [batch, heads, M, d] = [2, 2, *, 4]"),
            ({"q": _narrow[..., :0], "k": _narrow[..., :0]}, ValueError, "argument `q`: expected a last"),
            (
                {"k": torch.ones(2, 2, 0, 4), "v": _wide[:, :, :0], "size": torch.ones(2, 0)},
                ValueError,
                "argument `k`: expected at least one key",
            ),
            ({"v": _wide[:, :, 1:]}, ValueError, "argument `v`: expected shape"),
            ({"v": _wide.double()}, TypeError, "argument `v`: expected dtype float32"),
            ({"v": _wide[..., :0]}, ValueError, "argument `v`: expected a last dimension of at least 1"),
            ({"size": None}, TypeError, "argument `size`: expected a tensor [batch, M]"),
            ({"size": torch.ones(2, 9)}, ValueError, "argument `size`: expected shape [batch, M] = [2, 5]"),
            ({"size": torch.ones(2, 5).half()}, TypeError, "argument `size`: expected dtype float32"),
            ({"size": torch.ones(2, 5).to("meta")}, ValueError, "argument `size`: expected device cpu"),
            (
                {"size": torch.ones(2, 5, requires_grad=True)},
                ValueError,
                "argument `size`: expected a tensor without a gradient",
            ),
            ({"scale": float("nan")}, ValueError, "argument `scale`: expected a finite number"),
            ({"backend": "cudnn"}, ValueError, "argument `backend`: expected one of"),
        ],
    ),
    Sample(
        "learnable_token_merge-softmax",
        learnable_token_merge,
        _soft_merge(False),
        {"normalize": "softmax"},
        bad=[
            ({"z": "text"}, TypeError, "argument `z`: expected a tensor"),
            ({"z": _tokens.int()}, TypeError, "argument `z`: expected dtype"),
            ({"g": torch.ones(6, 3)}, ValueError, "argument `g`: expected shape [N, P] = [7, *]"),
            ({"g": torch.ones(1, 7, 3)}, ValueError, "argument `g`: expected shape [batch, N, P] or [N, P]"),
            ({"g": torch.ones(7, 0)}, ValueError, "argument `g`: expected at least one token"),
            ({"g": torch.ones(7, 3).half()}, TypeError, "argument `g`: expected dtype float32"),
            ({"g": torch.ones(7, 3).to("meta")}, ValueError, "argument `g`: expected device cpu"),
            ({"z": torch.ones(2, 7, 0)}, ValueError, "argument `z`: expected at least one channel"),
            ({"other": torch.ones(2, 7, 0)}, ValueError, "argument `others`: expected at least one channel"),
            ({"other": _tokens[:, 1:]}, ValueError, "argument `others`: expected shape"),
            ({"other": _tokens.double()}, TypeError, "argument `others`: expected dtype float32"),
            ({"other": _tokens.to("meta")}, ValueError, "argument `others`: expected device cpu"),
            ({"normalize": "max"}, ValueError, "argument `normalize`: expected None, 'sum', 'softmax'"),
            ({"backend": "cudnn"}, ValueError, "argument `backend`: expected one of"),
        ],
    ),
    Sample(
        "learnable_token_merge-sum-shared",
        learnable_token_merge,
        _soft_merge(True, 4),
        {"normalize": "sum"},
        share=Fraction(3 * (5 + 4), 3 * 5 + 4),  # no gradient of the second result arrives where this counts
        positional=("z", "g", "other"),
    ),
    Sample(
        "learnable_token_merge-rows",
        learnable_token_merge,
        _soft_merge(False, 2),
        {"normalize": "softmax_rows"},
        share=Fraction(3 * (5 + 2), 3 * 5 + 2),
        positional=("z", "g", "other"),
    ),
    Sample("learnable_token_merge-plain-shared", learnable_token_merge, _soft_merge(True)),
]

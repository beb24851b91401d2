"""Checks of user input. Each error names the argument, what was expected, what came, and the fix."""

from __future__ import annotations

from typing import Any

import torch


def describe(value: Any) -> str:
    """A tensor as dtype, shape and device; anything else by its repr."""
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)} on {value.device}"
    return repr(value)


def fail(name: str, expected: str, got: Any, fix: str = "", kind: type[Exception] = ValueError) -> None:
    """Raises `kind` for argument `name`."""
    raise kind(f"argument `{name}`: expected {expected}; got {describe(got)}.{f' {fix}' if fix else ''}")


def check_tensor(name: str, value: Any, shape: tuple[Any, ...], layout: str) -> None:
    """Checks that value is a strided tensor of that rank and of those sizes, None meaning any.

    Args:
        shape: a first entry of `...` stands for any dimensions, or none.
        layout: the shape in words, for the message, as in "[batch, heads, tokens, head_dim]".
    """
    if not isinstance(value, torch.Tensor):
        fail(name, f"a tensor {layout}", value, kind=TypeError)
    if value.layout is not torch.strided:
        fail(name, "a dense (strided) tensor", value.layout, "Call .to_dense() first.", TypeError)
    try:
        sizes = value.shape
    except RuntimeError:  # a nested tensor, whose sizes nobody can tell
        fail(name, f"a tensor {layout}", "a nested tensor", "Call .to_padded_tensor(0.0) first.", TypeError)
    if shape and shape[0] is ...:
        shape = (None,) * (len(sizes) - len(shape) + 1) + shape[1:]
    fits = len(sizes) == len(shape)
    for size, wanted in zip(sizes, shape):  # noqa: B905 (strict costs a keyword call in every op's hot path)
        if wanted is not None and size != wanted:
            fits = False
    if not fits:
        wanted_sizes = ", ".join("*" if wanted is None else str(wanted) for wanted in shape)
        fail(name, f"shape {layout} = [{wanted_sizes}]", value)


def check_dtype(name: str, value: torch.Tensor, allowed: tuple[torch.dtype, ...], fix: str = "") -> None:
    if value.dtype not in allowed:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        fail(name, f"dtype {names}", value, fix, TypeError)


def check_device(name: str, value: torch.Tensor, device: torch.device, other: str) -> None:
    if value.device != device:
        fail(name, f"device {device}, as `{other}`", value, f"Move it with {name}.to({other}.device).")


def check_positive_ints(name: str, value: Any, count: int) -> tuple[int, ...]:
    """A tuple of `count` positive ints; one int stands for all."""
    if type(value) is int or isinstance(value, torch.SymInt):
        value = (value,) * count
    if not isinstance(value, (tuple, list)) or len(value) != count:
        fail(name, f"{count} ints", value, kind=TypeError)
    for entry in value:
        if type(entry) is not int and not isinstance(entry, torch.SymInt):
            fail(name, f"{count} ints", value, kind=TypeError)
        if entry < 1:
            fail(name, f"{count} positive ints", value)
    return tuple(value)


def check_scale(value: Any, default: float) -> float:
    """The softmax scale: a finite number, `default` for None."""
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        fail("scale", "a number or None", value, "A learned scale is multiplied onto q.", TypeError)
    return check_finite("scale", value)


def check_finite(name: str, value: float) -> float:
    """A number as a finite float."""
    try:
        number = float(value)
    except OverflowError:  # an int
        number = float("inf")
    if number != number or number in (float("inf"), float("-inf")):
        fail(name, "a finite number", value)
    return number


# Asked once: Dynamo of torch 2.11 cannot trace the question.
_AUTOCAST_DEVICES = frozenset(
    filter(torch.amp.is_autocast_available, ("cpu", "cuda", "mps", "xpu", "hpu", "mtia"))
)


def autocasts(device: str) -> bool:
    """Whether autocast is on for a type of device."""
    return device in _AUTOCAST_DEVICES and torch.is_autocast_enabled(device)


def autocast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Casts tensors as autocast casts a matmul's: to its dtype where it is on, float64 left alone."""
    device = tensors[0].device.type
    if not autocasts(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        t.to(dtype) if t.is_floating_point() and t.dtype is not torch.float64 else t for t in tensors
    )

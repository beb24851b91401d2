"""Where the Triton kernels read and write, in Triton's interpreter.

The interpreter reads beyond a tensor whatever lies there, which shows in no result where it is thrown away later, and
runs one program after the other. A GPU may fault, and runs them at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from triton.runtime import interpreter

NOBODY = -1


def _elements(tensor: torch.Tensor) -> np.ndarray:
    """The address of every element."""
    places = np.array([tensor.data_ptr()] if tensor.numel() else [], dtype=np.int64)
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        if stride:
            places = np.add.outer(places, np.arange(size) * stride * tensor.element_size()).ravel()
    return places


class _Launch:
    """The elements of a launch's tensors, and the last program that read or wrote each of them."""

    def __init__(self, kernel: str, tensors: list[torch.Tensor]) -> None:
        self.kernel = kernel
        self.places = np.unique(np.concatenate([_elements(tensor) for tensor in tensors]))
        self.writer = np.full(len(self.places), NOBODY)
        self.reader = np.full(len(self.places), NOBODY)

    def find(self, pointers: Any, mask: Any, what: str) -> np.ndarray:
        wanted = np.broadcast_to(pointers.data, mask.data.shape)[mask.data.astype(bool)].astype(np.int64)
        found = np.searchsorted(self.places, wanted).clip(max=len(self.places) - 1)
        outside = np.count_nonzero(self.places[found] != wanted)
        assert not outside, f"{self.kernel} {what} {outside} elements outside its tensors"
        return found

    def read(self, pointers: Any, mask: Any, program: int) -> None:
        found = self.find(pointers, mask, "reads")
        written = self.writer[found]
        assert np.isin(written, (NOBODY, program)).all(), f"{self.kernel} reads what another program writes"
        self.reader[found] = program

    def write(self, pointers: Any, mask: Any, program: int) -> None:
        found = self.find(pointers, mask, "writes")
        touched = np.concatenate((self.writer[found], self.reader[found]))
        assert np.isin(touched, (NOBODY, program)).all(), f"{self.kernel} writes what another program uses"
        self.writer[found] = program


@contextmanager
def watched() -> Iterator[None]:
    """Within it every access must lie in one of the kernel's tensors, and no program may use what another writes."""
    executor, builder = interpreter.GridExecutor, interpreter.InterpreterBuilder
    prepare, load, store = executor._init_args_hst, builder.create_masked_load, builder.create_masked_store
    launch: _Launch | None = None

    def watched_prepare(self: Any, *args: Any) -> Any:
        nonlocal launch
        positional, named = prepare(self, *args)
        tensors = [value for value in (*positional, *named.values()) if isinstance(value, torch.Tensor)]
        launch = _Launch(self.fn.__name__, tensors)
        return positional, named

    def program(self: Any) -> int:
        (x, y, z), (_, height, depth) = self.grid_idx, self.grid_dim
        return (x * height + y) * depth + z

    def watched_load(self: Any, pointers: Any, mask: Any, *args: Any) -> Any:
        assert launch is not None
        launch.read(pointers, mask, program(self))
        return load(self, pointers, mask, *args)

    def watched_store(self: Any, pointers: Any, value: Any, mask: Any, *args: Any) -> Any:
        assert launch is not None
        launch.write(pointers, mask, program(self))
        return store(self, pointers, value, mask, *args)

    executor._init_args_hst = watched_prepare
    builder.create_masked_load, builder.create_masked_store = watched_load, watched_store
    try:
        yield
    finally:
        executor._init_args_hst = prepare
        builder.create_masked_load, builder.create_masked_store = load, store

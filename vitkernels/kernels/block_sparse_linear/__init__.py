"""Linear maps with a block-sparse weight."""

from __future__ import annotations

import math
from typing import Any

import torch

from vitkernels.core.backends import FLOAT_DTYPES, Backend
from vitkernels.core.checks import autocast, check_device, check_dtype, check_tensor, fail
from vitkernels.core.operator import Operator
from vitkernels.kernels.block_sparse_linear import reference
from vitkernels.kernels.block_sparse_linear.tensor import BlockSparseTensor

ACTIVATIONS = (None, "gelu", "relu")
_TRITON_BLOCKS = (16, 32, 64, 128)


def block_sparse_linear(
    x: torch.Tensor,
    weight: BlockSparseTensor,
    bias: torch.Tensor | None = None,
    *,
    activation: str | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """y = activation(x W^T + bias), where only some blocks of W are stored: `F.linear` for a `BlockSparseTensor`.

    The backward pass computes the gradient of x through the index of the transpose, that of the stored blocks only
    (exactly 0 beyond the edge of the matrix), and that of bias. Sums are in float32 (float64 for float64) and rounded
    once. Deterministic, forward and backward. An empty block row gives y = activation(bias), an empty block column a
    gradient of 0.

    With activation="gelu" a training call keeps what went into the GELU, in x's dtype, as the two layers apart would:
    that costs the memory of y, computing it again would cost a third of the products. ReLU keeps nothing.

    Under autocast x, the values and bias are cast to autocast's dtype.

    Args:
        x: [..., I], any strides; float16, bfloat16, float32 or float64.
        weight: a BlockSparseTensor of shape (O, I), its values in x's dtype. Gradients reach `weight.values`.
        bias: [O], in x's dtype; None for none.
        activation: None, "gelu" (the exact one, with erf) or "relu".
        backend: "cuda", "triton", "cpu", "reference" or "auto". Default: the choice of the enclosing
            ``vitkernels.backend`` scope, else of ``VITKERNELS_BACKEND``, else the fastest that fits.

    Returns:
        y, [..., O], in x's dtype, contiguous.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, device or name; a forced backend that cannot run the call.

    Paper: LPViT (Xu et al., ECCV 2024).

    Example:
        >>> weight = BlockSparseTensor.from_dense(torch.randn(64, 96), (32, 32), torch.eye(2, 3))
        >>> block_sparse_linear(torch.randn(2, 197, 96), weight, torch.zeros(64), activation="gelu").shape
        torch.Size([2, 197, 64])
    """
    _check_sparse("weight", weight)
    tensors = (x, weight.values, bias, weight.index)
    return operator(tensors, (*weight.shape, activation, False), backend, False)[0]


def block_sparse_matmul(
    a: torch.Tensor | BlockSparseTensor,
    b: torch.Tensor | BlockSparseTensor,
    *,
    transpose: bool = False,
    backend: str | None = None,
) -> torch.Tensor:
    """The matrix product a b, one of the two a `BlockSparseTensor`, forward and backward by `block_sparse_linear`.

    ======================================  ==========================  ============
    call, W a BlockSparseTensor [O, I]      dense operand               result
    ======================================  ==========================  ============
    block_sparse_matmul(W, d)               [..., I, M]                 [..., O, M]
    block_sparse_matmul(W, d, transpose)    [..., O, M]                 [..., I, M]
    block_sparse_matmul(d, W)               [..., N, O] (or [O])        [..., N, I]
    block_sparse_matmul(d, W, transpose)    [..., N, I] (or [I])        [..., N, O]
    ======================================  ==========================  ============

    Columns of a dense right operand are what the kernels take as tokens: where they are not dense in memory, as those
    of a transposed view are, they are copied first.

    Args:
        a, b: the operands.
        transpose: whether to take the sparse one transposed. Neither values nor index are copied for it.
        backend: as for `block_sparse_linear`.

    Raises:
        TypeError: none or both operands sparse, or an argument of the wrong type or dtype.
        ValueError: sizes that do not fit, a wrong device or name.

    Example:
        >>> weight = BlockSparseTensor.from_dense(torch.randn(64, 96), 32)
        >>> block_sparse_matmul(torch.randn(5, 64), weight).shape
        torch.Size([5, 96])
    """
    if type(transpose) is not bool:
        fail("transpose", "True or False", transpose, kind=TypeError)
    if isinstance(a, BlockSparseTensor):
        if isinstance(b, BlockSparseTensor):
            fail("b", "a dense tensor beside a BlockSparseTensor", b, "Take b.to_dense().", TypeError)
        check_tensor("b", b, (..., None, None), "[..., rows, columns]")
        assert isinstance(b, torch.Tensor)
        return _product(b.mT, a, not transpose, backend, "b").mT
    _check_sparse("b", b)
    check_tensor("a", a, (..., None), "[..., columns]")
    return _product(a, b, transpose, backend, "a")


def _product(x: Any, weight: Any, forward: bool, backend: str | None, name: str) -> torch.Tensor:
    features = weight.shape[1] if forward else weight.shape[0]
    if x.shape[-1] != features:
        fail(
            name,
            f"{features} {'columns' if name == 'a' else 'rows'} beside {weight}",
            x.mT if name == "b" else x,
        )
    tensors = (x, weight.values, None, weight.index)
    return operator(tensors, (*weight.shape, None, not forward), backend, False)[0]


def _check_sparse(name: str, value: Any) -> None:
    if not isinstance(value, BlockSparseTensor):
        fix = "BlockSparseTensor.from_dense(weight, (32, 32), mask) makes one."
        fail(name, "a BlockSparseTensor", value, fix, TypeError)


def _check(
    x: Any,
    values: Any,
    bias: Any,
    index: Any,
    out_features: int,
    in_features: int,
    activation: Any,
    transposed: bool,
) -> tuple[Any, ...]:
    taken, given = (out_features, in_features) if transposed else (in_features, out_features)
    check_tensor("x", x, (..., taken), "[..., in_features]")
    check_dtype("x", x, FLOAT_DTYPES, "Cast it with x.float().")
    if activation not in ACTIVATIONS:
        fail("activation", "None, 'gelu' or 'relu'", activation)
    # Of the index nothing but its length is looked at; BlockSparseTensor looked at the rest when it was made.
    check_tensor("weight.values", values, (None, None, None), "[nnz, bh, bw]")
    blocks, height, width = values.shape
    entries = 2 - (-out_features // height) - (-in_features // width) + 4 * blocks
    check_tensor("weight.index", index, (entries,), "[2 + block rows + block columns + 4 nnz]")
    check_dtype("weight.index", index, (torch.int32,), "BlockSparseTensor(...) makes an index.")
    check_device("weight", values, x.device, "x")
    check_device("weight", index, x.device, "x")
    if bias is not None:
        check_tensor("bias", bias, (given,), "[out_features]")
        check_device("bias", bias, x.device, "x")

    x, values = autocast(x, values)
    check_dtype("weight", values, (x.dtype,), "Cast it with weight.to(x.dtype).")
    if bias is not None:
        (bias,) = autocast(bias)
        check_dtype("bias", bias, (x.dtype,), "Cast it with bias.to(x.dtype).")
    return x, values, bias, index, out_features, in_features, activation or "none", transposed


def _allocate_y(
    x: Any, values: Any, bias: Any, index: Any, out_features: int, in_features: int, _: str, transposed: bool
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], in_features if transposed else out_features))


def _allocate_before(
    x: Any, values: Any, bias: Any, index: Any, out: int, inside: int, activation: str, transposed: bool
) -> torch.Tensor:
    kept = (inside if transposed else out) if activation == "gelu" else 0
    return x.new_empty((*x.shape[:-1], kept))


def _flops(x: Any, values: Any, *_: Any, mask: list[bool] | None) -> int:
    """2 x MACs of the product with the stored blocks, or of the products of the wanted gradients."""
    product = 2 * math.prod(x[:-1]) * math.prod(values)
    return product if mask is None else product * (mask[0] + mask[1])


_ROOM = "vitkernels.kernels.block_sparse_linear"


def _triton_limits(x: Any, values: Any, *_: Any) -> list[str]:
    """A block is the operand of a matrix instruction, which has 16 rows or columns at least."""
    height, width = values.shape[1:]
    if height in _TRITON_BLOCKS and width in _TRITON_BLOCKS:
        return []
    return [f"blocks are {height} x {width}; the sides it takes are 16, 32, 64 and 128"]


operator = Operator(
    "block_sparse_linear",
    tensors=("x", "values", "bias?", "index"),
    params="int out_features, int in_features, str activation, bool transposed",
    outputs=("y", "before"),
    check=_check,
    allocate=(_allocate_y, _allocate_before),
    reference=reference.forward,
    backends=(
        Backend("cuda", f"{_ROOM}.native", skips_by_products=True),
        Backend(
            "triton",
            f"{_ROOM}.triton",
            dtypes=(torch.float32, torch.float16, torch.bfloat16),
            limits=_triton_limits,
            skips_by_products=True,
        ),
        Backend("cpu", f"{_ROOM}.native", skips_by_products=True),
    ),
    order={"cuda": ("cuda", "triton"), "cpu": ("cpu",)},
    flops=_flops,
    reads_result="relu",
)

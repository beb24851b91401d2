"""What neighborhood attention is: which keys a query sees, golden values, identities, natten's own output."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from vitkernels import ops
from vitkernels.core import native as extension
from vitkernels.kernels.neighborhood_attention import count_pairs, reference

BACKENDS = [
    "reference",
    pytest.param(
        "cpu", marks=pytest.mark.skipif(bool(extension.why_missing()), reason="the extension is missing")
    ),
]
each_backend = pytest.mark.parametrize("backend", BACKENDS)
attend = functools.partial(ops.neighborhood_attention, return_lse=True)


def neighbors_of(i: int, size: int, kernel: int, dilation: int, causal: bool) -> list[int]:
    """The definition, in words: of the tokens of i's residue group, a run of `kernel` around i, moved inward."""
    group = [j for j in range(size) if j % dilation == i % dilation]
    at = group.index(i)
    if causal:
        return group[max(0, at - kernel + 1) : at + 1]
    run = [*range(at - kernel // 2, at - kernel // 2 + kernel)]
    while run[0] < 0:
        run = [c + 1 for c in run]
    while run[-1] >= len(group):
        run = [c - 1 for c in run]
    return [group[c] for c in run]


SIZES = (*range(1, 15), 23, 33)
each_sizes = pytest.mark.parametrize(
    "sizes", [SIZES, pytest.param(range(1, 41), marks=pytest.mark.thorough)], ids=["some", "all"]
)


def windows(sizes: Iterable[int]) -> Any:
    for size in sizes:
        for kernel in range(1, size + 1):
            for dilation in range(1, size // kernel + 1):
                for causal in (False, True):
                    yield size, kernel, dilation, causal


@each_sizes
def test_reference_sees_the_neighbors(sizes: Iterable[int]) -> None:
    for size, kernel, dilation, causal in windows(sizes):
        token, relative, seen = reference.axis_neighbors(size, kernel, 1, dilation, causal)
        rows = zip(token.tolist(), relative.tolist(), seen.tolist(), strict=True)
        pairs = 0
        for i, (tokens, offsets, valid) in enumerate(rows):
            got = [j for j, ok in zip(tokens, valid, strict=True) if ok]
            assert got == neighbors_of(i, size, kernel, dilation, causal), (size, kernel, dilation, causal, i)
            assert all(j - i == dilation * (t - kernel + 1) for j, t in zip(tokens, offsets, strict=True))
            assert all(0 <= t <= 2 * kernel - 2 for t in offsets)
            assert i in got
            pairs += len(got)
        assert pairs == count_pairs((size,), (kernel,), (dilation,), (causal,))


@each_sizes
@each_backend
def test_operator_sees_the_neighbors(backend: str, sizes: Iterable[int]) -> None:
    """With zero queries and one-hot values an output row is its neighborhood."""
    for size, kernel, dilation, causal in windows(sizes if backend == "cpu" else range(1, 13)):
        q = torch.zeros(1, size, 1, 1)
        v = torch.eye(size).view(1, size, 1, size)
        out, lse = attend(q, q, v, kernel, dilation=dilation, is_causal=causal, backend=backend)
        want = torch.zeros(size, size)
        for i in range(size):
            want[i, neighbors_of(i, size, kernel, dilation, causal)] = 1
        counts = want.sum(1)
        assert torch.equal(out.view(size, size) > 0, want > 0), (size, kernel, dilation, causal)
        torch.testing.assert_close(out.view(size, size), want / counts[:, None])
        torch.testing.assert_close(lse.view(size), counts.log())


@each_backend
@pytest.mark.parametrize("causal", [(False, False), (True, False), (True, True)], ids=str)
def test_a_map_has_the_product_of_its_axes(backend: str, causal: tuple[bool, bool]) -> None:
    sizes, kernel, dilation = (9, 13), (4, 3), (2, 3)
    q = torch.zeros(1, *sizes, 1, 1)
    v = torch.eye(9 * 13).view(1, *sizes, 1, -1)
    out, _ = attend(q, q, v, kernel, dilation=dilation, is_causal=causal, backend=backend)
    for y in range(9):
        for x in range(13):
            rows, columns = (
                neighbors_of(i, n, k, d, c)
                for i, n, k, d, c in zip((y, x), sizes, kernel, dilation, causal, strict=True)
            )
            want = torch.zeros(sizes)
            want[rows, :] += 1
            want[:, columns] += 1
            assert torch.equal(out[0, y, x, 0].view(sizes) > 0, want == 2)


@each_sizes
def test_queries_that_see_a_key_are_an_interval(sizes: Iterable[int]) -> None:
    """The bounds in csrc/neighborhood_attention/neighborhood_attention.h, in which the kernels trust."""
    for size, kernel, dilation, causal in windows(sizes):
        sights = [neighbors_of(i, size, kernel, dilation, causal) for i in range(size)]
        for i in range(size):
            n = size // dilation + (i % dilation < size % dilation)
            c, left = i // dilation, kernel // 2
            if causal:
                low, high = c, min(c + kernel - 1, n - 1)
            else:
                low = 0 if c <= kernel - 1 else c - (kernel - 1 - left)
                high = n - 1 if c >= n - kernel else c + left
            seers = [q // dilation for q in range(i % dilation, size, dilation) if i in sights[q]]
            assert seers == [*range(low, high + 1)], (size, kernel, dilation, causal, i)


WORKED = {
    (3, 2, False): "0,2,4 1,3,5 0,2,4 1,3,5 2,4,6 3,5,7 4,6,8 5,7,9 4,6,8 5,7,9",
    (3, 3, False): "0,3,6 1,4,7 2,5,8 0,3,6 1,4,7 2,5,8 3,6,9 1,4,7 2,5,8 3,6,9",
    (4, 1, False): "0,1,2,3 0,1,2,3 0,1,2,3 1,2,3,4 2,3,4,5 3,4,5,6 4,5,6,7 5,6,7,8 6,7,8,9 6,7,8,9",
    (3, 2, True): "0 1 0,2 1,3 0,2,4 1,3,5 2,4,6 3,5,7 4,6,8 5,7,9",
}


@pytest.mark.parametrize("case", WORKED, ids=str)
def test_worked_examples(case: tuple[int, int, bool]) -> None:
    kernel, dilation, causal = case
    for i, text in enumerate(WORKED[case].split()):
        assert neighbors_of(i, 10, kernel, dilation, causal) == [int(j) for j in text.split(",")]


GOLDEN_BIAS = {
    "out": ".720355 1.407047 .933247 1.704691 2.746178 4.039624 5.568698 7.320040 5.847636 7.584704",
    "lse": "1.201943 1.528390 1.580270 2.155712 2.952265 3.967191 5.197735 6.641311 6.595613 8.258660",
    "q": ".107904 .158128 .102317 .136649 .157983 .167386 .167221 .160252 .114159 .107351",
    "k": "-.034777 -.099431 -.131453 -.205660 -.275622 -.212211 -.291872 -.307337 .733724 .824640",
    "v": ".486933 .381158 .744582 .685177 1.214891 1.299189 .988766 .995592 1.564828 1.638883",
    "rpb": "-.213632 -1.976265 -1.503005 2.892576 .800324",
}
GOLDEN = {
    "bias": GOLDEN_BIAS,
    "bias-lse": {
        **GOLDEN_BIAS,
        "q": ".321215 .497540 .366348 .523089 .664188 .790572 .904691 1.009549 .873137 .974191",
        "k": ".002488 -.033022 -.027949 -.049468 -.015821 .163407 .204196 .276567 1.837087 2.142515",
        "rpb": "-.167099 -1.094454 2.171855 7.485456 1.604242",
    },
    "causal": {
        "out": "0 .100000 .239475 .616525 1.077825 1.892361 2.958662 4.261275 5.787628 7.528177",
        "lse": "0 .100000 .913015 1.337488 2.101518 2.907606 3.930678 5.168046 6.617253 8.276155",
        "q": "0 0 .019221 .036605 .089604 .113119 .125504 .128977 .126031 .118933",
        "k": "-.071935 -.135592 -.154615 -.175959 -.159797 -.134108 -.007886 .014139 .394233 .431520",
        "v": "1.523583 1.444374 .935981 .936897 .854802 .876767 .880908 .903474 .804726 .838488",
    },
}


def golden_inputs() -> dict[str, torch.Tensor]:
    line = torch.arange(10, dtype=torch.float64).view(1, 10, 1, 1)
    values = {"q": line, "k": line.clone(), "v": line**2 / 10}
    return {name: value.requires_grad_() for name, value in values.items()}


@each_backend
@pytest.mark.parametrize("name", GOLDEN)
def test_golden_values(name: str, backend: str) -> None:
    inputs, options = golden_inputs(), {"is_causal": True}
    if name != "causal":
        inputs["rpb"] = torch.tensor([[-0.2, -0.1, 0, 0.1, 0.2]], dtype=torch.float64, requires_grad=True)
        options = {"rpb": inputs["rpb"]}
    qkv = (inputs[letter] for letter in "qkv")
    out, lse = attend(*qkv, 3, dilation=2, scale=0.1, backend=backend, **options)
    loss = out.sum() + lse.sum() if name == "bias-lse" else out.sum()
    got = {
        "out": out,
        "lse": lse,
        **dict(zip(inputs, torch.autograd.grad(loss, [*inputs.values()]), strict=True)),
    }
    for key, text in GOLDEN[name].items():
        want = torch.tensor([float(number) for number in text.split()], dtype=torch.float64)
        assert (got[key].detach().flatten() - want).abs().max() < 6e-7, key


def random_call(*sizes: int, kernel: tuple[int, ...], heads: int = 2) -> dict[str, torch.Tensor]:
    tensors = {name: torch.randn(2, *sizes, heads, 8, dtype=torch.float64) for name in "qkv"}
    tensors["rpb"] = torch.randn(heads, *(2 * k - 1 for k in kernel), dtype=torch.float64)
    return {name: tensor.requires_grad_() for name, tensor in tensors.items()}


@each_backend
def test_identities(backend: str) -> None:
    kernel = (3, 4)
    call = random_call(7, 9, kernel=kernel)
    out, lse = attend(**call, kernel_size=kernel, dilation=(2, 1), backend=backend)
    grad_v, grad_rpb = torch.autograd.grad(out.sum(), (call["v"], call["rpb"]), retain_graph=True)
    # probabilities sum to 1, so a constant gradient of the output hands one unit per query to the values
    torch.testing.assert_close(grad_v.sum((1, 2)), torch.full((2, 2, 8), 63.0, dtype=torch.float64))
    torch.testing.assert_close(grad_rpb.sum((1, 2)), torch.zeros(2, dtype=torch.float64), atol=1e-10, rtol=0)
    grad_lse = torch.randn_like(lse)
    (grad_rpb,) = torch.autograd.grad(lse, call["rpb"], grad_lse)
    torch.testing.assert_close(grad_rpb.sum((1, 2)), grad_lse.sum((0, 1, 2)))

    shifted = {**call, "rpb": call["rpb"] + 3}
    moved, higher = attend(**shifted, kernel_size=kernel, dilation=(2, 1), backend=backend)
    torch.testing.assert_close(moved, out)
    torch.testing.assert_close(higher, lse + 3)


@each_backend
def test_a_dilated_map_is_its_groups(backend: str) -> None:
    kernel, dilation = (3, 2), (2, 3)
    call = random_call(7, 11, kernel=kernel)
    out, lse = attend(**call, kernel_size=kernel, dilation=dilation, backend=backend)
    for y in range(2):
        for x in range(3):
            group = {n: t if n == "rpb" else t[:, y::2, x::3] for n, t in call.items()}
            part, part_lse = attend(**group, kernel_size=kernel, backend=backend)
            torch.testing.assert_close(out[:, y::2, x::3], part)
            torch.testing.assert_close(lse[:, y::2, x::3], part_lse)


@each_backend
@pytest.mark.parametrize("sizes", [(5, 7), (9, 8)], ids=str)
def test_kernel_of_the_whole_map_is_dense_attention(sizes: tuple[int, int], backend: str) -> None:
    call = random_call(*sizes, kernel=sizes)
    del call["rpb"]
    out, _ = attend(**call, kernel_size=sizes, backend=backend)
    q, k, v = (t.flatten(1, 2).transpose(1, 2) for t in call.values())
    torch.testing.assert_close(out.flatten(1, 2).transpose(1, 2), F.scaled_dot_product_attention(q, k, v))


@each_backend
def test_scale_of_zero_is_zero(backend: str) -> None:
    call = random_call(5, 6, kernel=(3, 3))
    del call["rpb"]
    _, lse = attend(**call, kernel_size=3, scale=0.0, backend=backend)
    torch.testing.assert_close(lse, torch.full_like(lse, 9.0).log())


@each_backend
def test_empty_batch(backend: str) -> None:
    q = torch.zeros(0, 5, 6, 2, 8, requires_grad=True)
    rpb = torch.randn(2, 5, 5, requires_grad=True)
    out, lse = attend(q, q, q, 3, rpb=rpb, backend=backend)
    assert out.shape == q.shape
    assert lse.shape == q.shape[:-1]
    grads = torch.autograd.grad(out.sum() + lse.sum(), (q, rpb))
    assert grads[0].shape == q.shape
    assert (grads[1] == 0).all()


NATTEN_CASES: list[Any] = [
    ((20,), 5, 3, False),
    ((33,), 4, 2, True),
    ((14, 14), 7, 2, False),
    ((11, 19), (3, 6), (2, 3), False),
    ((12, 9), (4, 3), (1, 2), (True, False)),
]


@each_backend
@pytest.mark.parametrize("case", NATTEN_CASES, ids=str)
def test_equals_natten(case: tuple[Any, ...], backend: str) -> None:
    natten = pytest.importorskip("natten", reason="natten is not installed")
    sizes, kernel, dilation, causal = case
    q, k, v = (torch.randn(2, *sizes, 2, 32) for _ in range(3))
    peer = natten.na1d if len(sizes) == 1 else natten.na2d
    want = peer(q, k, v, kernel_size=kernel, dilation=dilation, is_causal=causal, backend="flex-fna")
    got, _ = attend(q, k, v, kernel, dilation=dilation, is_causal=causal, backend=backend)
    torch.testing.assert_close(got, want, atol=2e-6, rtol=1e-5)

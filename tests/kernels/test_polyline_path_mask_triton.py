"""The Triton kernels of polyline_path_mask in Triton's interpreter, against plain PyTorch.

Triton reads TRITON_INTERPRET when a kernel is defined, so these tests need a process of their own:
`TRITON_INTERPRET=1 pytest tests/kernels/test_polyline_path_mask_triton.py`.
"""

from __future__ import annotations

import os

import pytest
import torch
from guarded import Guarded, Layout
from polyline_calls import check, decays, gradient_like, launch, strided

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a process with TRITON_INTERPRET=1 (make test starts one)", allow_module_level=True)
pytest.importorskip("triton")

from vitkernels import ops
from vitkernels.kernels.polyline_path_mask import triton as launcher

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
OPTIONS = [(log, transpose) for log in (True, False) for transpose in (False, True)]
each_option = pytest.mark.parametrize(("log", "transpose"), OPTIONS)


@each_option
@pytest.mark.parametrize(
    ("grid", "dtype"),
    [
        *(((1, 9), F32), ((9, 1), F16), ((3, 4), BF16)),
        *(
            pytest.param(*more, marks=pytest.mark.thorough)
            for more in [((1, 1), F32), ((7, 7), F32), ((4, 6), F16)]
        ),
    ],
)
def test_forward_and_gradients(grid, dtype, log, transpose):
    tensors = decays(2, *grid, 1, dtype)
    grad = gradient_like(tensors)
    check(launch(launcher, tensors, grad, log, transpose), tensors, grad, log, transpose)


@pytest.mark.parametrize("log", [True, False])
def test_what_comes_before_a_line_plays_no_part(log):
    tensors = decays(1, 3, 4, 1)
    grad = gradient_like(tensors)
    want = launch(launcher, tensors, grad, log, False)
    tensors["log_decay_w"][:, :, 0] = tensors["log_decay_h"][:, 0] = -torch.inf
    got = launch(launcher, tensors, grad, log, False)
    assert all(torch.equal(got[name], tensor) for name, tensor in want.items())


@each_option
@pytest.mark.parametrize("grid", [(3, 5), pytest.param((9, 5), marks=pytest.mark.thorough)])
def test_several_tiles_of_keys(grid, log, transpose, monkeypatch):
    """Tiles smaller than a row, and than a column."""
    tensors = decays(1, *grid, 1)
    grad = gradient_like(tensors)
    for tile in (4, 8) if log else (8,):
        monkeypatch.setattr(launcher, "TILE", tile)
        check(launch(launcher, tensors, grad, log, transpose), tensors, grad, log, transpose)


@each_option
def test_strong_decay(log, transpose):
    tensors = {name: torch.full_like(t, -50.0) for name, t in decays(1, 3, 4, 2).items()}
    grad = gradient_like(tensors)
    check(launch(launcher, tensors, grad, log, transpose), tensors, grad, log, transpose)


@each_option
def test_nothing_is_read_or_written_outside(log, transpose, monkeypatch):
    guarded, plain = Guarded(), decays(1, 3, 5, 2)
    monkeypatch.setattr(launcher, "_scratch", lambda like, *shape: guarded(shape, F32))
    grad = gradient_like(plain)
    want = launch(launcher, plain, grad, log, transpose)
    tensors = {name: guarded(tuple(t.shape), F32, "odd").copy_(t) for name, t in plain.items()}
    out = guarded((1, 2, 15, 15), F32, "offset")
    upstream = guarded((1, 2, 15, 15), F32, Layout(padding=3, before=65)).copy_(grad)
    grads = {name: guarded(tuple(t.shape), F32, "odd") for name, t in plain.items()}
    launcher.forward(out, *tensors.values(), log, transpose)
    launcher.backward(*grads.values(), upstream, out, *tensors.values(), log, transpose)
    guarded.check()
    assert torch.equal(out, want["out"])
    for name, gradient in grads.items():
        assert torch.equal(gradient, want[name]), name


@pytest.mark.parametrize("wanted", ["log_decay_w", "log_decay_h"])
def test_each_gradient_alone(wanted):
    tensors = decays(1, 3, 4, 2)
    grad = gradient_like(tensors)
    want = launch(launcher, tensors, grad, True, True)
    grads = [torch.full_like(t, float("nan")) if n == wanted else None for n, t in tensors.items()]
    launcher.backward(*grads, grad, want["out"], *tensors.values(), True, True)
    for gradient in grads:
        if gradient is not None:
            assert torch.equal(gradient, want[wanted])


def test_the_public_function_runs_the_kernels_on_strided_inputs():
    tensors = decays(1, 3, 4, 2)
    want = launch(launcher, tensors, gradient_like(tensors), True, False)["out"]
    for _, views in strided(tensors):
        assert torch.equal(ops.polyline_path_mask(**views, backend="triton"), want)


def test_a_wrong_kernel_fails_the_rule():
    tensors = decays(1, 4, 4, 1)
    grad = gradient_like(tensors)
    got = launch(launcher, tensors, grad, False, False)
    for name in got:
        with pytest.raises(AssertionError):
            check({**got, name: got[name] * (1 + 1e-3)}, tensors, grad, False, False)

"""The extension seen from Python: which devices a binary serves, and how it is missing."""

from __future__ import annotations

import weakref
from types import ModuleType

import pytest
import torch

from vitkernels import ops
from vitkernels.core import backends, native


@pytest.mark.parametrize(
    ("archs", "capability", "serves"),
    [
        ("80, 90a-real, 120-real", (8, 0), True),
        ("80, 90a-real, 120-real", (8, 9), True),
        ("80, 90a-real, 120-real", (9, 0), True),
        ("80, 90a-real, 120-real", (10, 0), True),
        ("80, 90a-real, 120-real", (7, 5), False),
        ("90a-real", (9, 0), True),
        ("90a-real", (8, 0), False),
        ("90a-real", (10, 0), False),
        ("86-real", (8, 0), False),
        ("86-real", (8, 9), True),
        ("80-real", (9, 0), False),
        ("80-virtual", (9, 0), True),
        ("80-virtual", (8, 0), True),
        ("90", (8, 0), False),
    ],
)
def test_which_devices_a_binary_serves(archs, capability, serves):
    assert native.covers(archs, capability) is serves


def test_a_binary_for_another_gpu_is_a_reason(monkeypatch):
    """Built for an H100 alone and run on an A100, every launch would fail; auto must take Triton."""
    monkeypatch.setattr(native, "cuda_reason", lambda: "")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 0))

    class Binary:
        cuda_archs = "90a-real"

    monkeypatch.setattr(native, "_module", Binary)
    reason = backends._why_unavailable("cuda", "cuda", 0)
    assert "holds code for 90a-real only" in reason
    assert "VITKERNELS_CUDA_ARCHS=80-real" in reason
    Binary.cuda_archs = "80"
    assert backends._why_unavailable("cuda", "cuda", 0) == ""


def test_a_missing_extension_says_what_to_do(monkeypatch):
    monkeypatch.setattr(native, "_module", None)
    monkeypatch.setattr(native, "_error", "the compiled extension vitkernels._native was not built")
    with pytest.raises(RuntimeError, match=r"was not built\. Reinstall where a C\+\+ compiler is on PATH"):
        native.load()
    assert native.status()["path"] is None
    assert "was not built" in native.cuda_reason()


def test_an_old_driver_is_named(monkeypatch):
    class Binary:
        cuda_archs = "80"

        @staticmethod
        def cuda_status():
            return {"driver": 12040, "runtime": 13000, "devices": 1, "error": ""}

    monkeypatch.setattr(native, "_module", Binary)
    assert "the driver speaks CUDA 12.4, but the extension was built with CUDA 13.0" in native.cuda_reason()


def test_an_address_keeps_its_tensor():
    """Strided inputs are copied for the call; freed before it, their memory held anything."""
    copy = torch.ones(3, 4)
    alive = weakref.ref(copy)
    arguments = native.arguments(ModuleType("other"), copy, None)
    address = copy.data_ptr()
    del copy
    assert alive() is not None
    assert arguments == ((address, (3, 4), (4, 1), native.DTYPES[torch.float32]), None)


@pytest.mark.skipif(not native.holds("window_attention"), reason="needs the extension's window attention")
def test_large_results_may_lie_in_large_pages(monkeypatch):
    told = []
    monkeypatch.setattr(native, "LARGE", 256)
    monkeypatch.setattr(native, "expect_large", lambda tensor: told.append(tuple(tensor.shape)))
    q, k = (torch.randn(4, 2, 4, 4) for _ in range(2))  # 128 elements
    v = torch.randn(4, 2, 4, 8)  # 256
    want = ops.window_attention(q, k, v, window=(2, 2), backend="reference")
    assert torch.allclose(ops.window_attention(q, k, v, window=(2, 2), backend="cpu"), want, atol=1e-5)
    assert told == [tuple(v.shape)]
    told.clear()
    v.requires_grad_()
    ops.window_attention(q, k, v, window=(2, 2), backend="cpu").sum().backward()
    assert told.count(tuple(v.shape)) == 2  # the output and the gradient of v; of q and k none is asked for


def test_the_advice_on_large_results_changes_nothing():
    tensor = torch.arange(native.LARGE + 1000, dtype=torch.float64)[3:]
    before = tensor.clone()
    native.expect_large(tensor)
    assert torch.equal(tensor, before)
    native.expect_large(torch.empty(0))


@pytest.mark.parametrize("in_one_call", [True, False])
def test_only_strided_channels_are_copied_and_delivered(monkeypatch, in_one_call: bool) -> None:
    if not in_one_call:
        monkeypatch.setattr(native, "_are_dense", None)
    dense, column, strided = torch.randn(3, 4), torch.randn(1, 4).T, torch.randn(4, 3).T
    assert all(a is b for a, b in zip(native.dense(dense, None, column), (dense, None, column), strict=True))
    same, nothing, copy = native.dense(dense, None, strided)
    assert same is dense
    assert nothing is None
    assert copy.stride(-1) == 1
    assert torch.equal(copy, strided)
    wanted = (torch.zeros(3, 4), None, torch.zeros(4, 3).T)
    places = native.writable(*wanted)
    assert places[0] is wanted[0]
    assert places[2] is not wanted[2]
    places[2].fill_(1)
    native.deliver(wanted, places)
    assert wanted[2].eq(1).all()

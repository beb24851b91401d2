"""Kernels for Hopper are compiled without wgmma where the assembler miscompiles it (see triton_compiler.py)."""

from __future__ import annotations

import os
import sys
import threading
import types
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter replaces the compiler", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
import kernel_report
import triton.language as tl

from vitkernels.core import triton_compiler


def compiled_ptx(monkeypatch, tmp_path, capability: int) -> str:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))

    @triton_compiler.jit
    def product(out, a, b, SIZE: tl.constexpr):
        place = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
        tl.store(out + place, tl.dot(tl.load(a + place), tl.load(b + place)))

    operand = torch.empty(64, 64, dtype=torch.float16)
    with kernel_report.compile_only(capability) as compiled:
        product[(1,)](torch.empty(64, 64), operand, operand, SIZE=64, num_warps=4)
    ((_, kernel),) = compiled
    return kernel.asm["ptx"]


@pytest.mark.parametrize(("version", "sound"), [((12, 8), False), ((0, 0), False), ((13, 1), True)])
def test_hopper_has_no_wgmma_from_an_unsound_assembler(monkeypatch, tmp_path, version, sound):
    monkeypatch.delenv(triton_compiler.SWITCH, raising=False)
    monkeypatch.setattr(triton_compiler, "ptxas_version", lambda: version)
    ptx = compiled_ptx(monkeypatch, tmp_path, 90)
    assert ("wgmma" in ptx) == sound
    assert ("mma.sync" in ptx) == (not sound)
    assert triton_compiler.SWITCH not in os.environ


def test_the_users_own_choice_stays(monkeypatch, tmp_path):
    monkeypatch.setenv(triton_compiler.SWITCH, "0")
    monkeypatch.setattr(triton_compiler, "ptxas_version", lambda: (12, 8))
    assert "wgmma" in compiled_ptx(monkeypatch, tmp_path, 90)
    assert os.environ[triton_compiler.SWITCH] == "0"


def test_a_compilation_that_ends_leaves_another_threads_switch(monkeypatch):
    monkeypatch.delenv(triton_compiler.SWITCH, raising=False)
    monkeypatch.setattr(triton_compiler, "miscompiles", lambda target: True)
    first_began, second_began, first_ended = (threading.Event() for _ in range(3))
    seen = []

    def compile_kernel(first: bool) -> None:
        if first:
            first_began.set()
            second_began.wait(0.3)  # which comes only where the two are let in together
        else:
            second_began.set()
            first_ended.wait(10)
            seen.append(os.environ.get(triton_compiler.SWITCH))

    compile_soundly = triton_compiler.guarded(compile_kernel)
    nowhere = types.SimpleNamespace(get_current_target=lambda: None)
    monkeypatch.setattr(triton_compiler.triton.runtime, "driver", types.SimpleNamespace(active=nowhere))
    second = threading.Thread(target=lambda: first_began.wait(10) and compile_soundly(False))
    second.start()
    compile_soundly(True)
    first_ended.set()
    second.join()
    assert seen == ["1"]
    assert triton_compiler.SWITCH not in os.environ


def test_the_assembler_tells_its_version():
    assert triton_compiler.ptxas_version() >= (12, 0)

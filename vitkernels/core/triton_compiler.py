"""How this package's Triton kernels are compiled: like any other's, but on Hopper without `wgmma`.

The assembler that comes with Triton 3.4 to 3.7 for sm_90 (ptxas 12.8) miscompiles kernels with several products
that are lowered to `wgmma`: wrong gradients, or an illegal memory access, depending on the shape
(fla-org/flash-linear-attention#984 and #1262, triton-lang/triton#10486 and #11366; ptxas 13.1 is sound). On an H200
the backward of cascaded group attention was such a kernel. With `mma`, the instructions of Ampere, they are right. A
variable DISABLE_MMA_V3 in the environment is the user's own choice and stays as it is.
"""

from __future__ import annotations

import functools
import os
import re
import threading
from collections.abc import Callable
from typing import Any

import triton
from triton.runtime.jit import JITFunction

SOUND_PTXAS = (13, 1)
SWITCH = "DISABLE_MMA_V3"
# The environment is the whole process's: of two threads that compile at once (the backward passes of two devices have
# one each), the first to end would take the switch from under the other.
_compiling = threading.RLock()


def jit(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """`triton.jit`, for every kernel of this package."""
    if function is None:
        return functools.partial(jit, **options)
    kernel = triton.jit(function, **options)
    if isinstance(kernel, JITFunction):
        # What Triton calls once a specialization; before 3.5 there is only the whole call.
        name = "_do_compile" if hasattr(kernel, "_do_compile") else "run"
        setattr(kernel, name, guarded(getattr(kernel, name)))
    return kernel


def guarded(compile_kernel: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(compile_kernel)
    def compile_soundly(*args: Any, **kwargs: Any) -> Any:
        if not miscompiles(triton.runtime.driver.active.get_current_target()):
            return compile_kernel(*args, **kwargs)
        with _compiling:
            if SWITCH in os.environ:
                return compile_kernel(*args, **kwargs)
            os.environ[SWITCH] = "1"
            try:
                return compile_kernel(*args, **kwargs)
            finally:
                os.environ.pop(SWITCH, None)

    return compile_soundly


def miscompiles(target: Any) -> bool:
    """Whether wgmma is not to be trusted for this target."""
    return target.backend == "cuda" and target.arch == 90 and ptxas_version() < SOUND_PTXAS


@functools.cache
def ptxas_version() -> tuple[int, ...]:
    """(major, minor) of the assembler that Triton uses for Hopper; (0, 0) where it does not tell."""
    try:
        version = triton.knobs.nvidia.ptxas.version
    except AttributeError:
        return 0, 0
    found = re.match(r"(\d+)\.(\d+)", version or "")
    return (int(found[1]), int(found[2])) if found else (0, 0)

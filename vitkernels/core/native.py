"""The compiled extension: loading it, saying why it is missing, handing it tensors."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch

# The order of csrc/include/vitkernels/params.h; int32 is for indices alone (bind.h).
DTYPES = {torch.float64: 0, torch.float32: 1, torch.float16: 2, torch.bfloat16: 3, torch.int32: 4}

_module: ModuleType | None = None
_error: str = ""
try:
    from vitkernels import _native as _module  # type: ignore[no-redef,attr-defined]
except ImportError as error:  # a missing or unloadable binary must not break the import of the package
    _error = str(error)
    if "_native" in _error and "cannot import name" in _error:
        _error = "the compiled extension vitkernels._native was not built"


def why_missing() -> str:
    """Why the compiled extension cannot be used; empty when it can."""
    return _error


def holds(operator: str) -> bool:
    """Whether the extension has the kernels of an operator."""
    return _module is not None and operator in _module.operators


def why_left_out(operator: str) -> str:
    """Why an extension that is there lacks an operator; empty where it holds it."""
    if _module is None or operator in _module.operators:
        return ""
    return "the extension was built without this operator (VITKERNELS_OPERATORS)"


def load() -> ModuleType:
    """The compiled extension.

    Raises:
        RuntimeError: it is missing; the message has the cause and the fix.
    """
    if _module is None:
        raise RuntimeError(
            f"vitkernels: {_error}. Reinstall where a C++ compiler is on PATH (and nvcc for the CUDA kernels): "
            "pip install --force-reinstall --no-deps vitkernels. `python -m vitkernels info` shows what is there."
        )
    return _module


def _take_exchange() -> bool:
    """Lets the extension read tensors through DLPack's exchange table, where torch offers one (2.10 and later)."""
    table = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    if _module is None or table is None:
        return False
    try:
        _module.use_exchange(table, torch.Tensor, torch.nn.Parameter)
    except RuntimeError:  # a table of a version to come
        return False
    return True


lends: bool = _take_exchange()


class _Address(tuple):
    """What the bindings need of a tensor. Holds it: a copy made for the call alone must outlive the call."""

    tensor: torch.Tensor


def _address(tensor: torch.Tensor) -> _Address:
    address = _Address((tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), DTYPES[tensor.dtype]))
    address.tensor = tensor
    return address


def arguments(module: ModuleType, *tensors: torch.Tensor | None) -> tuple[Any, ...]:
    """Tensors as the bindings of `module` take them."""
    if lends and module is _module:
        return tensors
    return tuple(None if t is None else _address(t) for t in tensors)


_are_dense = _module.are_dense if _module is not None and lends else None


def dense(*tensors: torch.Tensor | None) -> tuple[Any, ...]:
    """The tensors with their channels side by side, as the kernels read them; copied where they are not."""
    # One call for all: each look at a stride from Python costs as much.
    if _are_dense is not None and _are_dense(*tensors):
        return tensors
    return tuple(t if _is_dense(t) else t.contiguous() for t in tensors)  # type: ignore[union-attr]


def writable(*tensors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """Where kernels write tensors: in themselves, or in others whose channels are side by side, for `deliver`."""
    if _are_dense is not None and _are_dense(*tensors):
        return tensors
    return tuple(t if _is_dense(t) else torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in tensors)  # type: ignore[union-attr]


def _is_dense(tensor: torch.Tensor | None) -> bool:
    return tensor is None or tensor.stride(-1) == 1 or tensor.shape[-1] == 1


def deliver(tensors: tuple[torch.Tensor | None, ...], places: tuple[torch.Tensor | None, ...]) -> None:
    """Copies to the tensors what kernels wrote to their `writable` places instead."""
    if places is tensors:
        return
    for tensor, place in zip(tensors, places, strict=True):
        if tensor is not None and place is not None and place is not tensor:
            tensor.copy_(place)


# Elements of float64 in the least memory that is mapped anew at every allocation (fresh_memory.h).
LARGE = (32 << 20) // 8


def expect_large(tensor: torch.Tensor) -> None:
    """Before a CPU kernel fills a fresh result of at least LARGE elements: lets it lie in large pages."""
    if tensor.is_cpu and _module is not None:
        _module.expect_large_result(tensor.data_ptr(), tensor.nbytes)


def indices(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Tensors of int32, contiguous, as the kernels read them."""
    return tuple(t if t.is_contiguous() else t.contiguous() for t in tensors)


def place(tensor: torch.Tensor) -> tuple[int, int]:
    """(device index, current stream) of a CUDA tensor, (threads, 0) of a CPU tensor."""
    if tensor.is_cuda:
        index = tensor.get_device()
        return index, torch.cuda.current_stream(index).cuda_stream
    return torch.get_num_threads(), 0


def cuda_reason() -> str:
    """Why the CUDA kernels of the extension cannot run on this machine; empty when they can."""
    if _module is None:
        return _error
    if not _module.cuda_archs:
        return "the extension was built without nvcc, so it holds no CUDA kernels"
    status = _module.cuda_status()
    if status["driver"] == 0:
        return "no CUDA driver was found"
    if status["driver"] // 1000 < status["runtime"] // 1000:
        return (
            f"the driver speaks CUDA {_cuda_version(status['driver'])}, but the extension was built with "
            f"CUDA {_cuda_version(status['runtime'])}; update the driver or rebuild with an older nvcc"
        )
    return status["error"]


def covers(archs: str, capability: tuple[int, int]) -> bool:
    """Whether a binary built for CMake architectures such as "80, 90a-real" holds code for a device.

    "80" is machine code and PTX, "80-real" machine code alone, "80-virtual" PTX alone. Machine code runs on the same
    major version from its minor version on, "90a" code on exactly 9.0, PTX on anything newer.
    """
    for arch in archs.split(","):
        number, _, kind = arch.strip().partition("-")
        specific = number.endswith(("a", "f"))
        version = int(number.rstrip("af"))
        built = (version // 10, version % 10)
        if specific:
            if built == capability:
                return True
            continue
        machine_code = built[0] == capability[0] and built <= capability and kind != "virtual"
        if machine_code or (built <= capability and kind != "real"):
            return True
    return False


def status() -> dict[str, Any]:
    """Facts about the extension for `python -m vitkernels info`."""
    if _module is None:
        return {"path": None, "error": _error, "cuda": False, "cuda_archs": "", "isa": None, "openmp": None}
    cuda = _module.cuda_status()
    return {
        "path": _module.__file__,
        "error": "",
        "version": _module.version,
        "compiler": _module.compiler,
        "operators": _module.operators,
        "isa": _module.cpu_isa(),
        "openmp": _module.openmp_runtime(),
        "dlpack_exchange": lends,
        "cuda": bool(_module.cuda_archs),
        "cuda_archs": _module.cuda_archs,
        "cuda_runtime": _cuda_version(cuda.get("runtime", 0)),
        "cuda_driver": _cuda_version(cuda.get("driver", 0)),
        "cuda_reason": cuda_reason(),
    }


def _cuda_version(number: int) -> str | None:
    return f"{number // 1000}.{number % 1000 // 10}" if number else None

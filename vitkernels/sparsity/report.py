"""What `sparsify` did to a model, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from vitkernels.nn.block_sparse_linear import BlockSparseLinear

# Time of the sparse layer / time of the dense one, forward, as a line in the density: a share of what the dense layer
# takes whatever is stored, and the stored blocks at a lower rate than its own. About the slowest that was measured
# beside a dense layer of the same threads: see benchmarks/block_sparse_break_even.py.
CPU_FIXED, CPU_RATE = 0.02, 1.20
_MODELLED_SIDE, _MODELLED_ROWS = 32, 96  # blocks and rows from which on it holds


@dataclass
class SparseLayer:
    """One layer that stores only some blocks now.

    Attributes:
        name: of the module.
        shape: (out_features, in_features).
        block_shape: (bh, bw).
        blocks, kept: number of its blocks, and of those stored.
        elements: number of elements that are stored, without the padding of partial blocks.
        rows: rows of its input an image; None without calibration.
        speed: dense time / time of a forward pass, measured; None if not asked for.
        device, dtype: of the weight.
    """

    name: str
    shape: tuple[int, int]
    block_shape: tuple[int, int]
    blocks: int
    kept: int
    elements: int
    rows: float | None
    speed: float | None = None
    device: str = "cpu"
    dtype: torch.dtype = torch.float32

    @property
    def density(self) -> float:
        """Stored blocks / all blocks."""
        return self.kept / self.blocks

    @property
    def bound(self) -> float:
        """The speed-up that the product cannot exceed: 1 / density in multiply-adds."""
        return self.blocks / self.kept if self.kept else float("inf")

    @property
    def expected(self) -> float | None:
        """dense time / time of a forward pass: measured, else by a model of what was measured elsewhere; None where
        there is no such model, which is other devices than the CPU, other types than float32, blocks smaller than
        32 and few rows."""
        if self.speed is not None:
            return self.speed
        known = (
            self.device == "cpu" and self.dtype == torch.float32 and min(self.block_shape) >= _MODELLED_SIDE
        )
        if not known or (self.rows is not None and self.rows < _MODELLED_ROWS):
            return None
        return 1 / (CPU_FIXED + CPU_RATE * self.density)

    @property
    def slower(self) -> bool:
        """Whether the dense layer is expected to be as fast or faster."""
        return self.expected is not None and self.expected <= 1


@dataclass
class SparsityReport:
    """What `sparsify` did; print it for a table.

    Attributes:
        layers: the layers that are block-sparse now.
        skipped: (name, class, reason) of each layer of interest that was left dense.
        density: remaining share of the weights of all layers that could be pruned.
        flops: remaining share of the FLOPs of all Linear layers, those left dense included; None where the numbers of
            tokens are not known.
    """

    model: str
    layers: list[SparseLayer] = field(default_factory=list)
    skipped: list[tuple[str, str, str]] = field(default_factory=list)
    density: float = 1.0
    flops: float | None = None

    def __str__(self) -> str:
        rows = [("layer", "shape", "blocks kept", "density", "expected speed")]
        for layer in self.layers:
            speed = f"at most {layer.bound:.2f}x"
            if layer.expected is not None:
                measured = layer.speed is not None
                speed = f"{layer.expected:.2f}x measured" if measured else f"about {layer.expected:.2f}x"
            kept = f"{layer.kept} of {layer.blocks}"
            rows.append((layer.name, "x".join(map(str, layer.shape)), kept, f"{layer.density:.3f}", speed))
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        flops = "" if self.flops is None else f", {self.flops:.1%} of the FLOPs of its Linear layers"
        blocks = {layer.block_shape for layer in self.layers}
        of = f" in blocks of {' and '.join(f'{bh}x{bw}' for bh, bw in sorted(blocks))}" if blocks else ""
        title = (
            f"vitkernels: {len(self.layers)} layers of {self.model} sparsified{of}, {len(self.skipped)} left"
        )
        lines = [
            "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[4]])
            for row in rows
        ]
        slow = [layer.name for layer in self.layers if layer.slower]
        slower = [f"expected to be slower than dense: {', '.join(slow)}; exclude them"] if slow else []
        left = [f"left: {name} ({cls}): {reason}" for name, cls, reason in self.skipped]
        rest = f"{self.density:.1%} of the prunable weights remain{flops}."
        return "\n".join([title, *(lines if len(rows) > 1 else []), *slower, *left, rest])


def measure_speed(dense: nn.Linear, sparse: BlockSparseLinear, rows: int) -> float:
    """Time of the dense layer / time of the sparse one, forward, on that many rows of random input."""
    from torch.utils.benchmark import Timer  # it brings setuptools along, which `import vitkernels` need not

    device = dense.weight.device
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(rows, dense.in_features, generator=generator, device=device, dtype=dense.weight.dtype)
    times = []
    with torch.no_grad():
        for run, layer in ((F.linear, dense), (None, sparse)):
            statement = "layer(x)" if run is None else "run(x, layer.weight, layer.bias)"
            timer = Timer(
                statement, globals={"run": run, "layer": layer, "x": x}, num_threads=torch.get_num_threads()
            )
            timer.timeit(2)
            times.append(timer.blocked_autorange(min_run_time=0.05).median)
    return times[0] / times[1]

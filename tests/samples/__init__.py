"""Sample calls of every operator, for the tests that all operators share. A new operator adds its own to a family."""

from . import attention, layers, merging, polyline
from .sample import Sample

__all__ = ["SAMPLES", "WITHOUT_GRADIENT", "Sample"]

SAMPLES: list[Sample] = [*attention.SAMPLES, *polyline.SAMPLES, *layers.SAMPLES, *merging.SAMPLES]

# Matching returns integers; its tests are in tests/kernels.
WITHOUT_GRADIENT = {"bipartite_match"}

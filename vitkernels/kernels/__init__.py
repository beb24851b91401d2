"""One room per operator; the public functions are re-exported by `vitkernels.ops`."""

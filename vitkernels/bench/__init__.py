"""Benchmarks of vitkernels against PyTorch and public peers: ``python -m vitkernels bench --help``.

Nothing here is imported by ``import vitkernels``. The parts, bottom up:

- ``presets``     what published models hand to their token mixers
- ``cases/<op>``  one file an operator: its inputs, its plain-PyTorch form, its peers, its cost
- ``gate``        no speed is printed for a wrong result
- ``timing``      interleaved timing on CPU and CUDA
- ``peaks``       what this machine can do, measured; gives the floor
- ``runner``      gate + timing over shapes, modes and providers; ``models`` does the same for networks
- ``report``, ``plot``, ``cli``
"""

"""Imports timm where torchvision's binary does not load, as beside a CPU build of PyTorch.

timm needs only torchvision's Python; importing that without its binary fails on the two operators it
registers fake implementations for, so they are declared here (and never called).
"""

import sys

import torch

_library = None


def import_timm():
    global _library
    try:
        import timm
    except RuntimeError as error:
        if "torchvision::" not in str(error) or _library is not None:
            raise
        for name in [name for name in sys.modules if name.split(".")[0] in ("timm", "torchvision")]:
            del sys.modules[name]
        _library = torch.library.Library("torchvision", "FRAGMENT")
        _library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import timm
    return timm

"""Everything that may change the weights of a module after its first call, for what keeps tensors derived from them."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from randomise import randomise
from torch import nn


def _tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    named = dict(module.named_parameters()) | dict(module.named_buffers())
    return {name: tensor for name, tensor in named.items() if tensor.is_floating_point()}


def _through_data(name_part: str) -> Callable[[nn.Module], None]:
    def edit(module: nn.Module) -> None:
        tensor = next(tensor for name, tensor in _tensors(module).items() if name.endswith(name_part))
        tensor.data.flatten()[-1] += 0.5

    return edit


def _step(module: nn.Module) -> None:
    for p in module.parameters():
        p.grad = torch.ones_like(p)
    torch.optim.SGD(module.parameters(), lr=0.05).step()
    module.zero_grad()


def _numpy(module: nn.Module) -> None:
    next(t for n, t in _tensors(module).items() if n.endswith("proj.1.c.weight")).detach().numpy()[0] *= 1.5


def _swap(module: nn.Module) -> None:
    with torch.no_grad():
        heads = [
            t for n, t in _tensors(module).items() if n.endswith("weight") and "qkvs" in n and t.ndim == 4
        ]
        first = heads[0].data.clone()
        heads[0].data.copy_(heads[1])
        heads[1].data.copy_(first)


def _trained(module: nn.Module) -> None:
    module.train()
    for name, tensor in _tensors(module).items():
        if name.endswith("running_mean"):
            tensor.data.add_(0.5)
    module.eval()


EDITS: dict[str, Callable[[nn.Module], object]] = {
    "load_state_dict": lambda m: m.load_state_dict(randomise(copy.deepcopy(m), seed=7).state_dict()),
    "assign": lambda m: m.load_state_dict(randomise(copy.deepcopy(m), seed=7).state_dict(), assign=True),
    "optimizer": _step,
    "half_and_back": lambda m: m.bfloat16().float(),
    "double": lambda m: m.double(),
    "qkv_weight": _through_data("qkvs.1.c.weight"),
    "dw_weight": _through_data("dws.0.c.weight"),
    "proj_weight": _through_data("proj.1.c.weight"),
    "norm_weight": _through_data("dws.1.bn.weight"),
    "norm_bias": _through_data("qkvs.0.bn.bias"),
    "mean": _through_data("proj.1.bn.running_mean"),
    "variance": _through_data("qkvs.1.bn.running_var"),
    "attention_biases": _through_data("attention_biases"),
    "sign": lambda m: [t.data.neg_() for n, t in _tensors(m).items() if n.endswith("c.weight")],
    "numpy": _numpy,
    "swap": _swap,
    "storage": lambda m: [setattr(p, "data", p.data * 1.5) for p in m.parameters()],
    "train_and_eval": _trained,
    "eps": lambda m: [setattr(n, "eps", 0.5) for n in m.modules() if isinstance(n, nn.BatchNorm2d)],
}

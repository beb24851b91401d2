"""Token merging for a stack of transformer blocks, in place of the loop that runs them one after another.

Sizes and the tokens' sources travel through the loop as values: the blocks stay what they are, nothing is kept
between calls, and no layer of the model needs to know of its neighbors.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from vitkernels import ops
from vitkernels.core.checks import fail
from vitkernels.patching.layers import Patched, signature_of, trial_copy, why_no_values


@dataclass(frozen=True)
class Merging:
    """How a stack merges.

    Attributes:
        schedule: how many tokens each block takes away.
        class_token, distill_token: whether the sequence begins with them.
        proportional: attention counts a token as often as it stands for one.
        restore: bring the sequence back to its length after the last block, for a model that does not read single
            tokens alone. The mean over the restored tokens is the mean weighted by the sizes.
        trace: keep the sources of the last call, and where each block's merging took its tokens.
    """

    schedule: tuple[int, ...]
    class_token: bool
    distill_token: bool
    proportional: bool
    restore: bool
    trace: bool


class MergedBlocks(Patched):
    """A Sequential or ModuleList of blocks that merges tokens between attention and MLP of each.

    Iterating over it gives one callable that runs all blocks, for models that loop over their blocks.
    """

    vitkernels_merging: Merging | None = None
    vitkernels_source: torch.Tensor | None = None
    vitkernels_steps: tuple[torch.Tensor, ...] = ()

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        if self.vitkernels_merging is None:  # a slice of the stack
            return super().forward(x)  # type: ignore[misc]
        return run(self, x)

    def __iter__(self: Any) -> Iterator[Any]:
        if self.vitkernels_merging is None:
            return super().__iter__()  # type: ignore[misc]
        return iter((self._whole,))

    def _whole(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        given = [*args, *(value for value in kwargs.values() if value is not None and value is not False)]
        if given:
            fail("attn_mask", "no mask and no other argument of a block, with token merging", given[0])
        return run(self, x)


def run(stack: Any, x: torch.Tensor) -> torch.Tensor:
    """All blocks of a stack with a `Merging`."""
    merging, backend = stack.vitkernels_merging, stack.vitkernels_backend
    size = source = None
    steps = []
    for block, r in zip(stack._modules.values(), merging.schedule, strict=True):
        x, size, plan = run_block(block, x, size, r, merging, backend)
        if plan is not None and (merging.restore or merging.trace):
            source = plan.rows if source is None else plan.rows.gather(1, source.long())
            steps.append(plan.rows)
    if merging.trace:
        stack.vitkernels_source, stack.vitkernels_steps = source, tuple(steps)
    if merging.restore and source is not None:
        x = x.gather(1, source.long().unsqueeze(2).expand(*source.shape, x.shape[2]))
    return x


def run_block(
    block: Any, x: torch.Tensor, size: torch.Tensor | None, r: int, merging: Merging, backend: str | None
) -> tuple[torch.Tensor, torch.Tensor | None, Any]:
    """(tokens, sizes, plan) after one block; a block that has nothing to merge or to weigh runs as it is."""
    weights = size if merging.proportional else None
    if r == 0 and weights is None:
        return block(x), size, None
    if _hooked(block):
        warnings.warn(
            f"hooks on {type(block).__name__}s and their attention are not called while tokens merge",
            stacklevel=2,
        )
    mixed, keys = attend(block.attn, block.norm1(x), weights, backend)
    x = x + _branch(block, "1", mixed)
    plan = None
    if r > 0:
        plan = ops.bipartite_match(
            keys.mean(1),
            r,
            class_token=merging.class_token,
            distill_token=merging.distill_token,
            backend=backend,
        )
        if plan.r:
            x, size = ops.token_merge(x, plan, size=size, backend=backend)
        else:
            plan = None
    return x + _branch(block, "2", block.mlp(block.norm2(x))), size, plan


def _branch(block: Any, number: str, x: torch.Tensor) -> torch.Tensor:
    for name in (f"ls{number}", f"drop_path{number}" if hasattr(block, "drop_path1") else "drop_path"):
        layer = getattr(block, name, None)
        if layer is not None:
            x = layer(x)
    return x


def attend(
    attn: Any, x: torch.Tensor, size: torch.Tensor | None, backend: str | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(output, keys [batch, heads, tokens, head_dim]) of an attention layer of timm, and of copies of it."""
    q, k, v = attn.qkv(x).unflatten(2, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    if hasattr(attn, "q_norm"):
        q, k = attn.q_norm(q), attn.k_norm(k)
    dropout = attn.attn_drop.p if attn.training and hasattr(attn, "attn_drop") else 0.0
    scale = getattr(attn, "scale", None)
    if size is None or dropout > 0:
        bias = None if size is None else size.log().to(q.dtype)[:, None, None]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout, scale=scale)
    else:
        size = size.double() if q.dtype is torch.float64 else size.float()
        out = ops.attention_with_size(q, k, v, size, scale=scale, backend=backend)
    out = out.transpose(1, 2).flatten(2)
    if hasattr(attn, "norm"):
        out = attn.norm(out)
    if getattr(attn, "gate", None) is not None:
        out = out * attn.gate(x).sigmoid()
    out = attn.proj(out)
    return (attn.proj_drop(out) if hasattr(attn, "proj_drop") else out), k


def schedule_of(value: Any, blocks: int) -> tuple[int, ...]:
    """How many tokens each of the blocks takes away: from r, [r, ...] or (r, inflect)."""
    expected = "an int r, a list of ints, one a block, or a pair (r, inflect)"
    if isinstance(value, tuple):
        if len(value) != 2 or type(value[0]) is not int or not isinstance(value[1], (int, float)):
            fail("token_merging", expected, value, kind=TypeError)
        r, inflect = value
        if r < 0 or not -1 <= inflect <= 1:
            fail("token_merging", "r >= 0 and inflect from -1 (early) to 1 (late)", value)
        first = int(r * (1 - inflect))
        step = (2 * r - 2 * first) / max(blocks - 1, 1)
        return tuple(int(first + step * i) for i in range(blocks))
    if type(value) is int:
        value = [value] * blocks
    if not isinstance(value, list) or any(type(r) is not int for r in value):
        fail("token_merging", expected, value, kind=TypeError)
    if len(value) > blocks or any(r < 0 for r in value):
        fail("token_merging", f"at most {blocks} numbers, one a block, none negative", value)
    return (*value, *[0] * (blocks - len(value)))


def is_stack(module: nn.Module) -> bool:
    """Whether a module looks like a model's stack of transformer blocks."""
    if not isinstance(module, (nn.Sequential, nn.ModuleList)) or len(module) == 0:
        return False
    blocks: list[Any] = list(module._modules.values())
    return all(
        hasattr(block, name) for block in blocks for name in ("norm1", "attn", "norm2", "mlp")
    ) and all(hasattr(block.attn, name) for block in blocks for name in ("qkv", "num_heads", "proj"))


def why_not_stack(stack: nn.Module, owner: Any) -> str:
    """Why the blocks cannot merge tokens; empty when they can."""
    if getattr(owner, "grad_checkpointing", False):
        return "gradient checkpointing runs the blocks one by one: call model.set_grad_checkpointing(False)"
    if owner is None:
        return "the blocks alone do not tell whether there is a class token: pass the model that owns them"
    if not (hasattr(owner, "cls_token") or hasattr(owner, "pos_embed")):
        return f"{type(owner).__name__}, which owns the blocks, does not tell whether there is a class token"
    if getattr(owner, "reg_token", None) is not None:
        return "register tokens would merge with patches"
    proven = set()
    for block in stack._modules.values():
        assert block is not None
        if _hooked(block):
            return (
                f"hooks on {type(block).__name__}s and their attention would not be called, nor a forward set on "
                "one of them: remove them first"
            )
        signature = signature_of(block)
        if signature not in proven:
            if reason := why_no_values(block):
                return f"of {type(block).__name__}, {reason}"
            if _differs(block):
                return f"{type(block).__name__} computes something else than a plain transformer block"
            proven.add(signature)
    return ""


def _hooked(block: Any) -> bool:
    """Whether somebody listens to what `run_block` does not call, the dropout on attention weights included, or set a
    forward of their own there. Who listens to every module misses these few of a block.
    """
    attn = block.attn
    return any(
        part._forward_hooks
        or part._forward_pre_hooks
        or part._backward_hooks
        or part._backward_pre_hooks
        or "forward" in part.__dict__
        for part in (block, attn, attn._modules.get("attn_drop"))
        if part is not None
    )


_FIX = "Call vitkernels.revert(model) first."


def _refuse_checkpointing(enable: bool = True) -> None:
    if enable:
        fail("enable", "no gradient checkpointing in a model that merges tokens", enable, _FIX)


def _refuse_intermediates(*_: Any, **__: Any) -> None:
    raise ValueError(f"a model that merges tokens has no features of single blocks. {_FIX}")


# In the place of the owner's methods of these names: timm's would run or read the blocks past the stack, or put a part
# of it in its place, which merges nothing.
REFUSED: dict[str, Callable[..., None]] = {
    "set_grad_checkpointing": _refuse_checkpointing,
    "forward_intermediates": _refuse_intermediates,
    "get_intermediate_layers": _refuse_intermediates,
    "prune_intermediate_layers": _refuse_intermediates,
}


def _differs(block: nn.Module) -> bool:
    """Whether a block, run as `run_block` does but merging nothing, has another output on random tokens."""
    trial = trial_copy(block).to("cpu", torch.float64).eval()
    with torch.no_grad(), torch.device("cpu"), torch.random.fork_rng(devices=[]):
        for parameter in trial.parameters():
            parameter.normal_().mul_(parameter.shape[-1] ** -0.5)
        try:
            x = torch.randn(2, 5, trial.attn.qkv.in_features, dtype=torch.float64)
            expected = trial(x)
            mixed, _ = attend(trial.attn, trial.norm1(x), None, "reference")
            got = x + _branch(trial, "1", mixed)
            got = got + _branch(trial, "2", trial.mlp(trial.norm2(got)))
        except Exception:
            return True
    return got.shape != expected.shape or not torch.allclose(got, expected, rtol=1e-9, atol=1e-9)


def merging_for(stack: nn.Module, owner: Any, value: Any, proportional: bool, trace: bool) -> Merging:
    """What a stack is to do, from the model that owns it."""
    class_token = getattr(owner, "cls_token", None) is not None
    pool = getattr(owner, "global_pool", "token")
    return Merging(
        schedule=schedule_of(value, len(stack._modules)),
        class_token=class_token,
        distill_token=class_token and getattr(owner, "dist_token", None) is not None,
        proportional=proportional,
        restore=not class_token or pool not in ("token", False),
        trace=trace,
    )


def find_stacks(model: nn.Module) -> Iterator[tuple[str, nn.Module, Any]]:
    """(name, stack, the module that owns it) for each stack of blocks in a model."""
    lookup: Callable[[str], Any] = model.get_submodule
    for name, module in model.named_modules():
        if is_stack(module):
            yield name, module, lookup(name.rpartition(".")[0]) if name else None


def merged_source(model: nn.Module) -> torch.Tensor:
    """Which token of the merged sequence each original token is in, after the last call of the model.

    Args:
        model: a model that `vitkernels.apply(model, token_merging=..., trace_source=True)` has changed.

    Returns:
        [batch, tokens], int32: rows of the sequence after the last block; class and distillation token included.

    Raises:
        ValueError: the model traces nothing, was not called yet, or merged nothing.
    """
    if (stack := _traced_stack(model)) is not None:
        return stack.vitkernels_source
    fix = "Apply with trace_source=True and r > 0, and call the model."
    fail("model", "a model that merged tokens and traced them", type(model).__name__, fix)
    raise AssertionError


def merged_steps(model: nn.Module) -> tuple[torch.Tensor, ...]:
    """For each block that merged in the last call of a model that traces, [batch, tokens], int32: the row that each
    token went to."""
    return () if (stack := _traced_stack(model)) is None else stack.vitkernels_steps


def _traced_stack(model: nn.Module) -> Any:
    for module in model.modules():
        if isinstance(module, MergedBlocks) and module.vitkernels_source is not None:
            return module
    return None

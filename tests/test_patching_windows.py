"""What `apply` does to TinyViT, LeViT and Swin."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from randomise import randomise, relative_error
from timm_import import import_timm
from torch import nn

import vitkernels

timm = import_timm()
from timm.models import levit, swin_transformer, swin_transformer_v2, tiny_vit  # noqa: E402 (import_timm comes first)


class PlainAttention(nn.Module):
    """TinyViT's and LeViT's attention as their authors have it, without a note of the window's sides."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.num_heads, self.key_dim, self.d = 2, 4, 8
        self.scale = self.key_dim**-0.5
        self.qkv = nn.Linear(12, self.num_heads * (2 * self.key_dim + self.d))
        self.proj = nn.Sequential(nn.Hardswish(), nn.Linear(16, 12))
        self.attention_biases = nn.Parameter(torch.zeros(2, 9))
        rows, columns = torch.arange(9) // 3, torch.arange(9) % 3
        index = (rows[:, None] - rows).abs() * 3 + (columns[:, None] - columns).abs()
        self.register_buffer("attention_bias_idxs", index, persistent=False)
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, _ = x.shape
        q, k, v = (
            part.transpose(1, 2)
            for part in self.qkv(x).view(batch, tokens, 2, -1).split([self.key_dim, self.key_dim, self.d], 3)
        )
        logits = q @ k.mT * (self.scale * self.factor) + self.attention_biases[:, self.attention_bias_idxs]
        return self.proj((logits.softmax(-1) @ v).transpose(1, 2).flatten(2))


def layers() -> dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]]:
    """Name: a layer and the shape of its input."""
    conv = {"resolution": (4, 3), "use_conv": True, "attn_ratio": 1.5}
    return {
        "tinyvit": (lambda: tiny_vit.Attention(24, 8, 3, attn_ratio=1, resolution=(7, 7)), (3, 49, 24)),
        "tinyvit-wide": (lambda: tiny_vit.Attention(24, 8, 3, attn_ratio=2, resolution=(3, 5)), (2, 15, 24)),
        "levit": (lambda: levit.Attention(24, 8, 3, attn_ratio=2, resolution=5), (2, 25, 24)),
        "levit-conv": (lambda: levit.Attention(24, 8, 4, **conv), (2, 24, 4, 3)),
        "plain": (PlainAttention, (2, 9, 12)),
        "swin": (lambda: swin_transformer.WindowAttention(24, 3, window_size=7), (4, 49, 24)),
        "swin-wide": (
            lambda: swin_transformer.WindowAttention(24, 3, head_dim=16, window_size=(3, 5), qkv_bias=False),
            (4, 15, 24),
        ),
    }


@pytest.fixture(params=layers())
def layer_and_input(request: pytest.FixtureRequest) -> tuple[nn.Module, torch.Tensor]:
    make, shape = layers()[request.param]
    layer = randomise(make()).double()
    layer.eval()  # returns None from timm's
    return layer, torch.randn(shape, generator=torch.Generator().manual_seed(0)).double()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The arguments of the operator's calls."""
    seen: list[dict[str, Any]] = []
    original = vitkernels.ops.window_attention

    def spy(*args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs)
        return original(*args, **kwargs)

    monkeypatch.setattr(vitkernels.ops, "window_attention", spy)
    return seen


def applied(layer: nn.Module, **options: Any) -> nn.Module:
    layer = copy.deepcopy(layer)
    report = vitkernels.apply(layer, verbose=False, **options)
    assert report.skipped == []
    assert report.replaced[0] == ("", type(layer).__name__, "window_attention")
    return layer


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_layers_compute_the_same_through_the_operator(
    mode: str, layer_and_input: tuple[nn.Module, torch.Tensor], calls: list[dict[str, Any]]
) -> None:
    layer, x = layer_and_input
    ours = applied(layer, backend="cpu")
    for module in (layer, ours):
        module.train(mode == "train")
    calls.clear()
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [module(leaf) for module, leaf in zip((layer, ours), leaves, strict=True)]
    assert [call["backend"] for call in calls] == ["cpu"]
    assert relative_error(outputs[1], outputs[0]) < 1e-12
    probe = torch.randn(outputs[0].shape, generator=torch.Generator().manual_seed(1)).double()
    for output in outputs:
        (output * probe).sum().backward()
    pairs = zip((leaves[1], *ours.parameters()), (leaves[0], *layer.parameters()), strict=True)
    for got, wanted in pairs:
        # What a norm of a batch takes out again has a gradient of 0 and a rounding.
        assert (got.grad - wanted.grad).norm() < 1e-10 * (wanted.grad.norm() + 1)
    assert vitkernels.revert(ours) > 0
    assert [type(module) for module in ours.modules()] == [type(module) for module in layer.modules()]


def test_copies_follow_their_own_weights(layer_and_input: tuple[nn.Module, torch.Tensor]) -> None:
    layer, x = layer_and_input
    ours = applied(layer)
    with torch.no_grad():
        expected = layer(x)
        for made in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
            assert relative_error(made(x), expected) < 1e-12
            made.qkv.requires_grad_(False).apply(randomise_again)
            assert relative_error(made(x), expected) > 1e-3
        assert relative_error(ours(x), expected) < 1e-12


def randomise_again(module: nn.Module) -> None:
    for parameter in module.parameters(recurse=False):
        parameter.mul_(1.5)


def test_layers_compile_and_take_autocast(layer_and_input: tuple[nn.Module, torch.Tensor]) -> None:
    layer, x = layer_and_input
    ours = applied(layer).float()
    x = x.float()
    with torch.no_grad():
        expected = ours(x)
        compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
        assert relative_error(compiled(x), expected) < 1e-5
        with torch.autocast("cpu", torch.bfloat16):
            assert relative_error(ours(x).float(), expected) < 3e-2


def test_shifted_windows_dropout_and_watched_weights_run_as_before(calls: list[dict[str, Any]]) -> None:
    layer = randomise(swin_transformer.WindowAttention(24, 3, window_size=4, attn_drop=0.5)).eval()
    x, mask = torch.randn(6, 16, 24), torch.zeros(3, 16, 16)
    mask[1, :8, 8:] = mask[1, 8:, :8] = -100
    ours = applied(layer)
    calls.clear()
    assert torch.equal(ours(x, mask=mask), layer(x, mask=mask))
    assert relative_error(ours(x), layer(x)) < 1e-6
    assert len(calls) == 1
    for inner in (ours.softmax, ours.attn_drop):
        handle = inner.register_forward_hook(lambda *_: None)
        ours(x)
        handle.remove()
    assert len(calls) == 1, "who hooks into the weights wants to see them"
    for module in (ours, layer):
        module.train()
    torch.manual_seed(0)
    got = ours(x)
    torch.manual_seed(0)
    assert torch.equal(got, layer(x))
    assert len(calls) == 1


def test_what_is_another_attention_is_left() -> None:
    for layer, reason in (
        (PlainAttention(factor=1.1), "computes something else in eval mode than its class name says"),
        (levit.AttentionDownsample(24, 32, 8, 3, resolution=4), "no kernel for this class"),
        (swin_transformer_v2.WindowAttention(24, (4, 4), 3), "no kernel for this class"),
    ):
        report = vitkernels.apply(randomise(layer), verbose=False)
        assert "window_attention" not in [kernel for *_, kernel in report.replaced]
        assert report.skipped[0][2].startswith(reason)


def test_what_the_operator_cannot_know_is_left() -> None:
    for change, reason in (
        (lambda layer: setattr(layer, "window_size", (4, 4, 4)), "its window is not one of two sides"),
        (lambda layer: setattr(layer, "window_size", (4, 5)), "relative_position_bias_table is not a table"),
        (lambda layer: setattr(layer, "attn_drop", nn.Identity()), "attn_drop is not a Dropout"),
        (lambda layer: delattr(layer, "scale"), "has no attribute scale"),
    ):
        layer = swin_transformer.WindowAttention(24, 3, window_size=4)
        change(layer)
        assert vitkernels.apply(layer, verbose=False).skipped[0][2].startswith(reason)
    for change, reason in (
        (lambda layer: setattr(layer, "resolution", (2, 4)), "attention_biases is not a table"),
        (lambda layer: delattr(layer, "key_dim"), "has no attribute key_dim"),
    ):
        layer = PlainAttention()
        change(layer)
        assert vitkernels.apply(layer, verbose=False).skipped[0][2].startswith(reason)


NETWORKS = {
    "tiny_vit_5m_224": ({}, {"batch norm folded": 27, "window_attention": 10}),
    "levit_128s": ({}, {"batch norm folded": 50, "window_attention": 9}),
    "levit_conv_128s": ({}, {"batch norm folded": 50, "window_attention": 9}),
    "swin_tiny_patch4_window7_224": (
        {"img_size": 112, "depths": (2, 2), "embed_dim": 32, "num_heads": (1, 2)},
        {"window_attention": 4},
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_timm_compute_the_same(name: str) -> None:
    arguments, replaced = NETWORKS[name]
    model = randomise(timm.create_model(name, **arguments)).eval()
    x = torch.randn(1, 3, *[arguments.get("img_size", 224)] * 2, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(x)
        report = vitkernels.apply(model, verbose=False)
        kernels = [kernel for *_, kernel in report.replaced]
        assert {kernel: kernels.count(kernel) for kernel in kernels} == replaced
        assert relative_error(model(x), expected) < 1e-5
        vitkernels.revert(model)
        assert torch.equal(model(x), expected)


def test_levits_norms_take_all_tokens_for_one_batch() -> None:
    layer, x = randomise(levit.LinearNorm(6, 8)), torch.randn(2, 5, 6)
    twin = copy.deepcopy(layer)
    report = vitkernels.apply(layer, verbose=False)
    assert report.replaced == [("", "LinearNorm", "batch norm folded")]
    assert torch.equal(layer(x), twin(x)), "in train mode"
    for module in (layer, twin):
        module.eval()
    with torch.no_grad():
        for _ in range(2):
            assert relative_error(layer(x), twin(x)) < 1e-6
            for module in (layer, twin):
                module.bn.running_var.data.mul_(3)
        assert layer.__dict__.pop("_vitkernels_kept").folds
        assert torch.equal(layer(x[:1]), twin(x[:1])), "five tokens of six channels"
        assert "_vitkernels_kept" not in layer.__dict__
        seen = []
        layer.bn.register_forward_hook(lambda *_: seen.append(1))
        assert relative_error(layer(x), twin(x)) < 1e-6
        assert seen
        for module in (layer, twin):
            with pytest.raises(ValueError, match="expected 2D or 3D input"):
                module(x[0])

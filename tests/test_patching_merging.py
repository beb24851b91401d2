"""Token merging in timm's models, against the steps written out with plain PyTorch."""

from __future__ import annotations

import copy
import pickle
from functools import partial

import pytest
import torch
from randomise import relative_error
from timm_import import import_timm
from torch import nn

import vitkernels
from vitkernels import ops
from vitkernels.patching import patches
from vitkernels.patching.merging import schedule_of

timm = import_timm()
SMALL = {"img_size": 64, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 10}

PATCHES = ("patch_embed.proj", "Conv2d", "patches by a matrix product in half precision on GPUs")


def vit(**options) -> nn.Module:
    torch.manual_seed(3)
    model = timm.models.vision_transformer.VisionTransformer(**{**SMALL, **options})
    for parameter in model.parameters():  # timm's initial values hide the biases and LayerScale
        nn.init.normal_(parameter, std=max(parameter.shape[-1], 4) ** -0.5)
    return model.eval()


def plain(model: nn.Module, x: torch.Tensor, schedule, proportional: bool = True) -> torch.Tensor:
    """The merged model in steps: matrices of similarities, a matrix that merges, a bias on the logits."""
    x = model.norm_pre(model._pos_embed(model.patch_embed(x)))
    cls = model.cls_token is not None
    batch, tokens, _ = x.shape
    size = torch.ones(batch, tokens, dtype=x.dtype)
    whole = torch.eye(tokens, dtype=x.dtype).expand(batch, -1, -1)
    for block, r in zip(model.blocks._modules.values(), schedule, strict=True):
        attn = block.attn
        q, k, v = attn.qkv(block.norm1(x)).unflatten(2, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = attn.q_norm(q), attn.k_norm(k)
        logits = q @ k.mT * attn.scale
        if proportional:
            logits = logits + size.log()[:, None, None]
        x = x + block.ls1(attn.proj((logits.softmax(-1) @ v).transpose(1, 2).flatten(2)))
        r = min(r, (x.shape[1] - cls) // 2)
        if r > 0:
            merge = torch.stack([_matrix(keys, r, cls) for keys in k.mean(1)])
            x = merge @ (x * size.unsqueeze(2))
            size = (merge @ size.unsqueeze(2)).squeeze(2)
            x, whole = x / size.unsqueeze(2), merge @ whole
        x = x + block.ls2(block.mlp(block.norm2(x)))
    if model.global_pool != "token":
        x = whole.mT @ x
    return model.forward_head(model.norm(x))


def _matrix(keys: torch.Tensor, r: int, cls: bool) -> torch.Tensor:
    tokens = len(keys)
    unit = keys / keys.norm(dim=1, keepdim=True)
    scores = unit[::2] @ unit[1::2].mT
    if cls:
        scores[0] = -torch.inf
    best, choice = scores.max(1)
    order = best.argsort(descending=True)
    kept = sorted(order[r:].tolist()) if cls else order[r:].tolist()
    matrix = torch.zeros(tokens - r, tokens, dtype=keys.dtype)
    for row, a in enumerate(kept):
        matrix[row, 2 * a] = 1
    for b in range(tokens // 2):
        matrix[len(kept) + b, 2 * b + 1] = 1
    for a in order[:r].tolist():
        matrix[len(kept) + choice[a], 2 * a] = 1
    return matrix


MODELS = {
    "class token": {},
    "layer scale and key norms": {"init_values": 0.1, "qk_norm": True},
    "mean pool": {"global_pool": "avg"},
    "no class token": {"global_pool": "avg", "class_token": False},
}
each_model = pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)


@each_model
def test_equals_the_steps(options: dict) -> None:
    model, x = vit(**options), torch.randn(2, 3, 64, 64)
    for value, schedule in ((9, [9] * 3), ([0, 7], [0, 7, 0]), ((8, -1.0), [16, 8, 0]), (99, [99] * 3)):
        for proportional in (True, False):
            merged = copy.deepcopy(model)
            vitkernels.apply(merged, token_merging=value, proportional_attention=proportional, verbose=False)
            with torch.no_grad():
                got = merged(x)
                exact = plain(copy.deepcopy(model).double(), x.double(), schedule, proportional)
            assert relative_error(got, exact) < 1e-5
            assert relative_error(got, model(x)) > 1e-4


@each_model
def test_nothing_to_merge_changes_no_bit_and_revert_undoes_it(options: dict) -> None:
    model, x = vit(**options), torch.randn(2, 3, 64, 64)
    before, keys, kinds = model(x), list(model.state_dict()), [type(m) for m in model.modules()]
    vitkernels.apply(model, token_merging=0, verbose=False)
    assert torch.equal(model(x), before)
    report = vitkernels.apply(model, token_merging=5, verbose=False)
    assert report.replaced == [PATCHES, ("blocks", "Sequential", "token merging, r = [5, 5, 5]")]
    assert not torch.equal(model(x), before)
    assert list(model.state_dict()) == keys
    assert str(vitkernels.apply(model, verbose=False)) == str(report)
    assert vitkernels.revert(model) == 2
    assert [type(m) for m in model.modules()] == kinds
    assert torch.equal(model(x), before)


def test_distilled() -> None:
    torch.manual_seed(3)
    model = timm.models.deit.VisionTransformerDistilled(**SMALL).eval()
    x = torch.randn(2, 3, 64, 64)
    assert model(x).shape == (2, 10)
    vitkernels.apply(model, token_merging=9, trace_source=True, verbose=False)
    assert model.forward_features(x).shape == (2, 66 - 27, 48)
    source = vitkernels.merged_source(model)
    assert source.shape == (2, 66)
    assert (source[:, 0] == 0).all()
    assert (source[:, 1] == 1).all()
    assert ((source == 0).sum(1) == 1).all()
    assert ((source == 1).sum(1) == 1).all()


def test_gradients_copies_and_training() -> None:
    model, x = vit(init_values=0.1), torch.randn(2, 3, 64, 64).double()
    model = model.double()
    merged = copy.deepcopy(model)
    vitkernels.apply(merged, token_merging=9, verbose=False)
    merged = pickle.loads(pickle.dumps(copy.deepcopy(merged))).train()
    merged(x).square().sum().backward()
    plain(model, x, [9] * 3).square().sum().backward()
    for (name, a), b in zip(merged.named_parameters(), model.parameters(), strict=True):
        assert relative_error(a.grad, b.grad) < 1e-9, name


def test_an_empty_batch_trains_as_before() -> None:
    """Its heads were once a -1 in a shape, which no elements leave open."""
    model, x = vit(), torch.randn(0, 3, 64, 64)
    vitkernels.apply(model, token_merging=9, verbose=False)
    logits = model(x)
    assert logits.shape == (0, 10)
    logits.sum().backward()
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)


def test_attention_dropout_still_drops() -> None:
    model = vit(attn_drop_rate=0.5).train()
    vitkernels.apply(model, token_merging=9, verbose=False)
    x = torch.randn(2, 3, 64, 64)
    assert not torch.equal(model(x), model(x))
    assert torch.equal(model.eval()(x), model(x))


def test_compiles_as_one_graph() -> None:
    model, x = vit(), torch.randn(2, 3, 64, 64)
    vitkernels.apply(model, token_merging=9, verbose=False)
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        assert relative_error(compiled(x), model(x)) < 1e-5


def test_block_sparse_models_merge_too() -> None:
    options = {"embed_dim": 64, "num_heads": 2, "depth": 2, "img_size": 64, "block_shape": 16}
    model = vitkernels.models.create_model("deit_small_bsr", **options).eval()
    vitkernels.apply(model, token_merging=3, verbose=False)
    assert model.forward_features(torch.randn(1, 3, 64, 64)).shape == (1, 17 - 6, 64)


class Looped(timm.models.vision_transformer.VisionTransformer):
    """MAE's own model: loops over its blocks, and takes the mean without the class token."""

    def forward_features(self, x):
        x = self._pos_embed(self.patch_embed(x))
        for blk in self.blocks:
            x = blk(x)
        return self.norm(x[:, 1:].mean(1))

    def forward(self, x):
        return self.head(self.forward_features(x))


def test_a_model_that_loops_over_its_blocks() -> None:
    model = Looped(**SMALL).eval()
    model.global_pool = True
    x, seen = torch.randn(2, 3, 64, 64), []
    model.blocks[2].mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    before = model(x)
    vitkernels.apply(model, token_merging=9, trace_source=True, verbose=False)
    after = model(x)
    assert seen == [65, 65 - 27]
    assert after.shape == before.shape
    assert relative_error(after, before) > 1e-6


def test_half_precision() -> None:
    model, x = vit(), torch.randn(2, 3, 64, 64)
    vitkernels.apply(model, token_merging=9, verbose=False)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert model(x).isfinite().all()
    with torch.no_grad():
        assert model.bfloat16()(x.bfloat16()).dtype is torch.bfloat16


def test_schedules() -> None:
    assert schedule_of((16, -1), 12) == (32, 29, 26, 23, 20, 17, 14, 11, 8, 5, 2, 0)
    assert schedule_of((16, 1), 12) == (0, 2, 5, 8, 11, 14, 17, 20, 23, 26, 29, 32)
    assert schedule_of((16, 0), 12) == schedule_of(16, 12) == (16,) * 12
    assert schedule_of([4, 2], 4) == (4, 2, 0, 0)
    assert schedule_of((4, 0.5), 1) == (2,)


@pytest.mark.parametrize("value", [1.5, "8", [1, 2.0], (8, None), True])
def test_bad_schedules(value) -> None:
    with pytest.raises(TypeError, match="argument `token_merging`: expected an int r"):
        vitkernels.apply(vit(), token_merging=value, verbose=False)


def test_reasons() -> None:
    for value in ([1] * 4, -1, (8, 2.0)):
        with pytest.raises(ValueError, match="argument `token_merging`"):
            vitkernels.apply(vit(), token_merging=value, verbose=False)
    with pytest.raises(ValueError, match="no sequence of blocks"):
        vitkernels.apply(nn.Linear(3, 3), token_merging=8, verbose=False)
    parallel = vit(block_fn=timm.models.vision_transformer.ResPostBlock)
    with pytest.raises(ValueError, match="ResPostBlock computes something else"):
        vitkernels.apply(parallel, token_merging=8, verbose=False)
    checkpointed = vit()
    checkpointed.set_grad_checkpointing()
    with pytest.raises(ValueError, match="gradient checkpointing"):
        vitkernels.apply(checkpointed, token_merging=8, verbose=False)
    with pytest.raises(ValueError, match="register tokens would merge"):
        vitkernels.apply(vit(reg_tokens=4), token_merging=8, verbose=False)
    with pytest.raises(ValueError, match="on the meta device or fake; apply after loading"):
        vitkernels.apply(vit().to("meta"), token_merging=8, verbose=False)
    crossvit = timm.create_model("crossvit_tiny_240")
    with pytest.raises(ValueError, match="which owns the blocks, does not tell"):
        vitkernels.apply(crossvit, token_merging=8, verbose=False)
    with pytest.raises(ValueError, match="the blocks alone do not tell whether there is a class token"):
        vitkernels.apply(vit().blocks, token_merging=8, verbose=False)
    with pytest.raises(ValueError, match="merged tokens and traced them"):
        vitkernels.merged_source(vit())
    masked = vit()
    vitkernels.apply(masked, token_merging=8, verbose=False)
    with pytest.raises(ValueError, match="argument `attn_mask`"):
        masked(torch.randn(1, 3, 64, 64), attn_mask=torch.ones(65, 65, dtype=torch.bool))


class Scaled(timm.models.vision_transformer.Block):
    """A block that may halve its tokens, which no parameter tells."""

    halve = False

    def forward(self, x: torch.Tensor, attn_mask: torch.Tensor | None = None) -> torch.Tensor:
        return super().forward(x) / (2 if self.halve else 1)


def test_blocks_that_differ_in_a_setting_alone_are_tried_one_by_one() -> None:
    model = vit(block_fn=Scaled)
    model.blocks[-1].halve = True
    with pytest.raises(ValueError, match="Scaled computes something else"):
        vitkernels.apply(model, token_merging=8, verbose=False)


def test_sources_are_the_partition() -> None:
    model, x = vit(), torch.randn(2, 3, 64, 64)
    vitkernels.apply(model, token_merging=[9, 0, 4], trace_source=True, verbose=False)
    model(x)
    source = vitkernels.merged_source(model)
    assert source.shape == (2, 65)
    for image in source:
        assert sorted(image.unique().tolist()) == list(range(65 - 13))
    assert ops.bipartite_match(x.flatten(2), 1).r == 1


@pytest.mark.thorough
@pytest.mark.parametrize(
    "name", ["deit_small_patch16_224", "vit_base_patch16_224", "vit_base_patch14_dinov2"]
)
def test_published_models(name: str) -> None:
    size = 224
    options = {"img_size": size} if "dinov2" in name else {}
    model, x = timm.create_model(name, **options).eval(), torch.randn(1, 3, size, size)
    with torch.no_grad():
        before = model(x)
        vitkernels.apply(model, token_merging=0, verbose=False)
        assert torch.equal(model(x), before)
        vitkernels.apply(model, token_merging=8, verbose=False)
        got = model(x)
        vitkernels.revert(model)
        assert torch.equal(model(x), before)
        exact = plain(model.double(), x.double(), [8] * 12)
    assert relative_error(got, exact) < 1e-5


def test_checkpointing_after_the_change_is_refused() -> None:
    """It would run the blocks one by one, and merge nothing."""
    model = vit()
    vitkernels.apply(model, token_merging=4, verbose=False)
    for changed in (model, pickle.loads(pickle.dumps(copy.deepcopy(model)))):
        with pytest.raises(ValueError, match="argument `enable`: expected no gradient checkpointing"):
            changed.set_grad_checkpointing()
        changed.set_grad_checkpointing(False)
    vitkernels.revert(model)
    model.set_grad_checkpointing()
    assert model.grad_checkpointing


def test_hooks_of_blocks() -> None:
    """Refused, and called by nobody; those that come later are not called, which is said."""
    heard: list[str] = []
    for layer in ("blocks.1", "blocks.1.attn"):
        model = vit()
        handle = model.get_submodule(layer).register_forward_hook(lambda *_: heard.append("called"))
        with pytest.raises(ValueError, match="hooks on Blocks and their attention would not be called"):
            vitkernels.apply(model, token_merging=4, verbose=False)
        handle.remove()
        vitkernels.apply(model, token_merging=4, verbose=False)
        model.get_submodule(layer).register_forward_pre_hook(lambda *_: heard.append("called"))
        with pytest.warns(UserWarning, match="are not called while tokens merge"):
            model(torch.randn(1, 3, 64, 64))
    assert heard == []


@pytest.mark.parametrize(
    ("layer", "listen"),
    [
        ("blocks.1", lambda module, hear: module.register_full_backward_hook(hear)),
        ("blocks.1.attn", lambda module, hear: module.register_full_backward_pre_hook(hear)),
        ("blocks.1.attn.attn_drop", lambda module, hear: module.register_forward_hook(hear)),
        (
            "blocks.1.attn",
            lambda module, hear: setattr(module, "forward", partial(_heard, module.forward, hear)),
        ),
    ],
    ids=["backward", "before_backward", "attention_weights", "forward"],
)
def test_other_listeners_of_blocks(layer: str, listen) -> None:
    """Gradients for Grad-CAM, attention weights, wrapped forwards: none of them was refused, nor called."""
    heard: list[str] = []
    model = vit()
    for attn in (block.attn for block in model.blocks):
        attn.fused_attn = False
    listen(model.get_submodule(layer), lambda *_: heard.append("called"))
    x = torch.randn(1, 3, 64, 64)
    model(x).sum().backward()
    assert heard == ["called"]
    with pytest.raises(ValueError, match="would not be called"):
        vitkernels.apply(model, token_merging=4, verbose=False)
    later = vit()
    vitkernels.apply(later, token_merging=4, verbose=False)
    listen(later.get_submodule(layer), lambda *_: heard.append("called"))
    with pytest.warns(UserWarning, match="are not called while tokens merge"):
        later(x)


def _heard(forward, hear, *args, **kwargs):
    hear()
    return forward(*args, **kwargs)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("r", [4, [4, 100, 4]], ids=["r", "more than there are"])
def test_traces(r) -> None:
    """Sizes are tensors in torch.jit.trace, and a bool was subtracted from one."""
    model, x = vit(), torch.randn(2, 3, 64, 64)
    vitkernels.apply(model, token_merging=r, verbose=False)
    with torch.no_grad():
        traced = torch.jit.trace(model, x)
        for images in (x.flip(0), x[:1]):
            assert torch.equal(traced(images), model(images))


def test_features_of_single_blocks_are_refused() -> None:
    model, x = vit(), torch.randn(1, 3, 64, 64)
    before = model.forward_intermediates(x, intermediates_only=True)
    vitkernels.apply(model, token_merging=4, verbose=False)
    for changed in (model, copy.deepcopy(model)):
        for method in ("forward_intermediates", "get_intermediate_layers", "prune_intermediate_layers"):
            with pytest.raises(ValueError, match="no features of single blocks"):
                getattr(changed, method)(x)
    vitkernels.revert(model)
    for got, want in zip(model.forward_intermediates(x, intermediates_only=True), before, strict=True):
        assert torch.equal(got, want)


def test_another_pooling_is_taken_up_by_the_next_apply() -> None:
    model, x = vit(), torch.randn(1, 3, 64, 64)
    vitkernels.apply(model, token_merging=4, verbose=False)
    model.reset_classifier(10, global_pool="avg")
    vitkernels.apply(model, token_merging=4, verbose=False)
    with torch.no_grad():
        assert relative_error(model(x), plain(model, x, (4, 4, 4))) < 1e-4


def test_the_report_leaves_out_attention_that_merges() -> None:
    report = vitkernels.apply(vit(), token_merging=4, verbose=False)
    assert [kernel for *_, kernel in report.replaced] == [PATCHES[-1], "token merging, r = [4, 4, 4]"]
    assert report.skipped == []


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("bias", [True, False])
def test_patches_by_a_matrix_product_are_the_convolution(bias, memory_format) -> None:
    torch.manual_seed(5)
    conv = nn.Conv2d(3, 10, (4, 2), (4, 2), bias=bias, dtype=torch.float64)
    x = torch.randn(2, 3, 12, 8, dtype=torch.float64).to(memory_format=memory_format).requires_grad_()
    expected = conv(x)
    inputs = (x, *conv.parameters())
    grad = torch.randn_like(expected)
    assert patches.cuts_patches(conv)
    got = patches.project(conv, x)
    torch.testing.assert_close(got, expected)
    wanted = torch.autograd.grad(expected, inputs, grad)
    torch.testing.assert_close(torch.autograd.grad(got, inputs, grad), wanted)


@pytest.mark.parametrize(
    "options",
    [
        *({"padding": 1}, {"dilation": 2}, {"stride": 3}, {"groups": 3}),
        *({"in_channels": 8}, {"padding": "same", "kernel_size": 1, "stride": 1}),
    ],
    ids=str,
)
def test_other_convolutions_do_not_cut_patches(options) -> None:
    chosen = {"in_channels": 3, "out_channels": 6, "kernel_size": 4, "stride": 4, **options}
    assert not patches.cuts_patches(nn.Conv2d(**chosen))


def test_a_convolution_with_a_forward_of_its_own_keeps_it() -> None:
    class Standardized(nn.Conv2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)

    class Doubled(nn.Conv2d):
        def _conv_forward(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
            return super()._conv_forward(x, 2 * weight, bias)

    for kind in (Standardized, Doubled):
        model = vit()
        model.patch_embed.proj = kind(3, 48, 8, 8)
        report = vitkernels.apply(model, token_merging=5, verbose=False)
        assert type(model.patch_embed.proj) is kind
        assert [name for name, *_ in report.replaced] == ["blocks"]


def test_a_merging_model_projects_its_patches_where_that_pays(monkeypatch) -> None:
    model = vit().double()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    odd = torch.randn(2, 3, 64, 66, dtype=torch.float64)
    names = list(model.state_dict())
    conv = model.patch_embed.proj
    vitkernels.apply(model, token_merging=5, verbose=False)
    assert list(model.state_dict()) == names
    expected, of_odd = model(x), conv(odd)
    calls = []
    project = patches.project
    monkeypatch.setattr(patches, "project", lambda *args: calls.append(1) or project(*args))
    model(x)
    assert not calls, "on the CPU the convolution runs"
    monkeypatch.setattr(patches, "pays", lambda x: True)
    torch.testing.assert_close(model(x), expected)
    assert calls == [1]
    torch.testing.assert_close(conv(odd), of_odd)  # what is left of the last patches is not looked at
    assert calls == [1]
    vitkernels.revert(model)
    assert type(conv) is nn.Conv2d

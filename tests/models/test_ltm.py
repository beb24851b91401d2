from __future__ import annotations

import pytest
import torch
from randomise import randomise, relative_error
from timm_import import import_timm
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vitkernels import models
from vitkernels.nn import LTMBlock, MergingMask

timm = import_timm()
SMALL = {"embed_dim": 32, "num_heads": 2, "depth": 3, "img_size": 64, "num_classes": 10}


def tokens(count: int, width: int = 24) -> torch.Tensor:
    return torch.randn(2, count, width, dtype=torch.float64)


def block(**options) -> LTMBlock:
    return randomise(LTMBlock(24, 3, **{"tokens": 15, "compression": 0.5, **options})).double().eval()


@pytest.mark.parametrize(("name", "published"), [("ltm_vit_small", 3.7), ("ltm_vit_base", 12.9)])
def test_multiply_adds_are_those_published(name: str, published: float) -> None:
    model = models.create_model(name).eval()
    # Only the composed attention's products are counted on a CPU.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(torch.randn(1, 3, 224, 224))
    assert abs(counter.get_total_flops() / 2e9 / published - 1) < 0.03


def test_the_steps_of_a_block() -> None:
    layer, x = block(), tokens(16)
    before = tokens(15, 8)
    y, mask = layer(x, before)
    z = x + layer.attn(layer.norm1(x))
    logits = layer.mask.fc2(nn.functional.gelu(layer.mask.fc1(z[:, 1:]))) + layer.mask.carry * before
    torch.testing.assert_close(mask, logits)
    merged = torch.cat((z[:, :1], logits.softmax(1).mT @ z[:, 1:]), 1)
    torch.testing.assert_close(y, merged + layer.mlp(layer.norm2(merged)))
    assert y.shape == (2, 1 + 8, 24)


def test_a_block_that_restores_its_tokens() -> None:
    layer, x = block(restore=True), tokens(16)
    y, logits = layer(x)
    z = x + layer.attn(layer.norm1(x))
    merged = torch.cat((z[:, :1], logits.softmax(1).mT @ z[:, 1:]), 1)
    change = layer.mlp(layer.norm2(merged))
    spread = torch.cat((change[:, :1], logits.softmax(2) @ change[:, 1:]), 1)
    torch.testing.assert_close(y, z + spread)


def test_a_hard_mask_that_keeps_all_is_a_plain_block() -> None:
    """Logits of a large identity: every merged token is one token."""
    layer, x = block(compression=1.0), tokens(16)

    class Identity(MergingMask):
        def forward(self, z, before=None):
            return 1e4 * torch.eye(15, dtype=z.dtype).expand(len(z), 15, 15)

    layer.mask = Identity(24, 15)
    y, _ = layer(x)
    z = x + layer.attn(layer.norm1(x))
    torch.testing.assert_close(y, z + layer.mlp(layer.norm2(z)))


@pytest.mark.parametrize("compression", [0.8, 1.0])
def test_gradients_reach_all_parameters(compression: float) -> None:
    """DistributedDataParallel asks for it. Each mask once had a share of the one before, whose shape never fitted."""
    options = {**SMALL, "merge_blocks": (0, 1), "compression": compression}
    model = randomise(models.create_model("ltm_vit_small", **options))
    model(torch.randn(2, 3, 64, 64)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    assert (model.blocks[1].mask.carry is not None) == (compression == 1)


def test_no_parameter_is_a_scalar() -> None:
    """FSDP's fully_shard takes none."""
    assert all(parameter.ndim for parameter in block().parameters())


def test_without_merging_it_is_the_plain_vit(tmp_path) -> None:
    theirs = randomise(timm.models.vision_transformer.VisionTransformer(**SMALL)).eval()
    torch.save(theirs.state_dict(), tmp_path / "vit.pth")
    options = {**SMALL, "weights": tmp_path / "vit.pth"}
    images = torch.randn(2, 3, 64, 64)
    plain = models.create_model("ltm_vit_small", merge_blocks=(), **options).eval()
    merging = models.create_model("ltm_vit_small", **options).eval()
    with torch.no_grad():
        assert relative_error(plain(images), theirs(images)) < 1e-5
        assert merging.forward_features(images).shape == (2, 1 + 13, 32)
    names = {name for name in merging.state_dict() if ".mask." not in name}
    assert names == set(theirs.state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_compile(dtype: torch.dtype) -> None:
    model = randomise(models.create_model("ltm_vit_small", **SMALL)).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        exact = model(images)
        with torch.autocast("cpu", dtype):
            assert relative_error(model(images), exact) < 0.1
        if dtype is torch.bfloat16:
            compiled = torch.compile(model, backend="eager", fullgraph=True)
            assert relative_error(compiled(images), exact) < 1e-5


def test_the_share_that_is_left_is_rounded_up_from_its_decimal_value() -> None:
    """0.55 * 20 and 0.28 * 25 are a hair above whole numbers in binary."""
    for share, count, left in ((0.55, 20, 11), (0.28, 25, 7), (0.8, 196, 157), (1.0, 9, 9), (1e-9, 9, 1)):
        assert LTMBlock(8, 1, tokens=count, compression=share).merged_tokens == left


def test_errors_name_the_argument() -> None:
    for call, message in (
        (lambda: LTMBlock(24, 5, tokens=4), "argument `dim`: expected a multiple"),
        (lambda: LTMBlock(24, 3, tokens=4, compression=0.0), "argument `compression`: expected a share"),
        (lambda: LTMBlock(24, 3, tokens=0), "argument `tokens`: expected a positive int"),
        (lambda: LTMBlock(24, 3, tokens=4, prefix_tokens=-1), "argument `prefix_tokens`: expected an int"),
        (lambda: LTMBlock(0, 3, tokens=4), "argument `dim`: expected a multiple"),
        (lambda: block()(tokens(15)), "argument `x`: expected 1 [+] 15 tokens"),
        (lambda: MergingMask(64, 0), "argument `merged_tokens`: expected 1 positive ints"),
        (
            lambda: models.LTMViT(**SMALL)(torch.zeros(1, 3, 80, 64)),
            r"argument `x`: expected images of 64 x 64.*got float32 \[1, 3, 80, 64\].*img_size=\(80, 64\)",
        ),
        (lambda: models.LTMViT(**SMALL, merge_blocks=(3,)), "argument `merge_blocks`: expected blocks"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_what_is_inferred_is_named_so() -> None:
    for text in (models.ltm.__doc__, LTMBlock.__doc__, MergingMask.__doc__):
        assert "nferred" in text

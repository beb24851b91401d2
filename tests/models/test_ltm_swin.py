from __future__ import annotations

import pytest
import torch
from randomise import randomise, relative_error
from timm_import import import_timm
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.swa_utils import AveragedModel
from torch.utils.flop_counter import FlopCounterMode

from vitkernels import models
from vitkernels.models.ltm_swin import LTMSwinBlock, map_of, windows_of

timm = import_timm()
# Stages of 14 x 14 (shifted windows) and 7 x 7 (a single one).
SMALL = {"embed_dim": 16, "depths": (2, 1), "num_heads": (2, 4), "img_size": 56, "num_classes": 5}


def test_multiply_adds_are_those_published() -> None:
    model = models.create_model("ltm_swin_tiny").eval()
    # Only the composed attention's products are counted on a CPU.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(torch.randn(1, 3, 224, 224))
    assert abs(counter.get_total_flops() / 2e9 / 3.8 - 1) < 0.03


def test_without_merging_it_is_the_plain_swin(tmp_path) -> None:
    theirs = timm.models.swin_transformer.SwinTransformer(
        **{**SMALL, "img_size": (112, 56)}, patch_size=4, window_size=7
    )
    theirs = randomise(theirs).eval()
    torch.save(theirs.state_dict(), tmp_path / "swin.pth")
    options = {**SMALL, "img_size": (112, 56), "weights": tmp_path / "swin.pth"}
    plain = models.create_model("ltm_swin_tiny", compression=1.0, **options).eval()
    merging = models.create_model("ltm_swin_tiny", **options).eval()
    images = torch.randn(2, 3, 112, 56)
    with torch.no_grad():
        assert relative_error(plain(images), theirs(images)) < 1e-5
        assert relative_error(merging(images), theirs(images)) > 1e-3
    assert {name for name in merging.state_dict() if ".mask." not in name} == set(plain.state_dict())


def test_windows_and_back() -> None:
    x = torch.randn(2, 14, 21, 3)
    windows = windows_of(x)
    assert torch.equal(windows[4].view(7, 7, 3), x[0, 7:, 7:14])
    assert torch.equal(map_of(windows, 14, 21), x)


def test_the_steps_of_a_block() -> None:
    block = randomise(LTMSwinBlock(16, 2, 3, (14, 7), 36, 0.0, None)).double().eval()
    x = torch.randn(2, 14, 7, 16, dtype=torch.float64)
    z = windows_of(x + block.attn(block.norm1(x)))
    logits = block.mask.fc2(torch.nn.functional.gelu(block.mask.fc1(z)))
    assert logits.shape == (4, 49, 36)
    change = block.mlp(block.norm2(logits.softmax(1).mT @ z))
    torch.testing.assert_close(block(x), map_of(z + logits.softmax(2) @ change, 14, 7))


def test_gradients_reach_all_parameters() -> None:
    model = randomise(models.create_model("ltm_swin_tiny", **SMALL))
    model(torch.randn(2, 3, 56, 56)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_autocast_compile_and_classifier() -> None:
    model = randomise(models.create_model("ltm_swin_tiny", **SMALL)).eval()
    images = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        exact = model(images)
        with torch.autocast("cpu", torch.bfloat16):
            assert relative_error(model(images), exact) < 0.1
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        assert relative_error(compiled(images), exact) < 1e-5
        model.reset_classifier(0)
        assert model(images).shape == (2, 32)


@pytest.mark.parametrize("assign", [False, True])
def test_a_network_built_on_the_meta_device_and_loaded(assign: bool) -> None:
    model = randomise(models.create_model("ltm_swin_tiny", **SMALL)).eval()
    with torch.device("meta"):
        loaded = models.create_model("ltm_swin_tiny", **SMALL).eval()
    if not assign:
        loaded.to_empty(device="cpu")
        for buffer in loaded.buffers():
            buffer.zero_()  # memory that nobody wrote holds anything
    loaded.load_state_dict(model.state_dict(), assign=assign)
    images = torch.randn(1, 3, 56, 56)
    with torch.no_grad():
        assert torch.equal(loaded(images), model(images))


def test_averages_of_weights_and_buffers() -> None:
    """PyTorch averages buffers too, by a subtraction that it refuses for bools: a mask was one."""
    model = randomise(models.create_model("ltm_swin_tiny", **SMALL)).eval()
    averaged = AveragedModel(model, use_buffers=True)
    for _ in range(2):
        averaged.update_parameters(model)
    images = torch.randn(1, 3, 56, 56)
    with torch.no_grad():
        assert torch.equal(averaged(images), model(images))


def test_another_size_than_the_announced_one() -> None:
    announced, other = (
        models.create_model("ltm_swin_tiny", **{**SMALL, "img_size": size}) for size in (56, 112)
    )
    randomise(announced)
    other.load_state_dict(announced.state_dict())
    images = torch.randn(1, 3, 112, 112)
    with torch.no_grad():
        # The last stage shifts its windows only where the announced size has several: here it has one block.
        torch.testing.assert_close(announced.eval()(images), other.eval()(images), rtol=0, atol=0)


def test_errors_name_the_argument() -> None:
    for call, message in (
        (lambda: models.ltm_swin_tiny(compression=0.01), "argument `compression`: expected a share"),
        (lambda: models.ltm_swin_tiny(img_size=256), "argument `img_size`: expected multiples of 224"),
        (lambda: models.LTMSwin(**SMALL)(torch.randn(1, 3, 64, 56)), "argument `x`: expected images"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_what_is_inferred_is_named_so() -> None:
    assert "Inferred" in models.ltm_swin.__doc__

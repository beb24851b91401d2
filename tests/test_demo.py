from __future__ import annotations

import sys

import pytest
import torch
from PIL import Image

from vitkernels.__main__ import main
from vitkernels.bench import host_model, models, photo
from vitkernels.bench.runner import Settings


@pytest.fixture(autouse=True)
def _one_thread():
    """Threads that wait for each other on a busy machine turn seconds into minutes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def picture():
    return photo.load_photo()[0]


def test_demo_prints_the_comparison_and_writes_the_plot(tmp_path, capsys):
    plot = tmp_path / "demo.png"
    assert main(["demo", "--model", "efficientvit_m0", "--seconds", "0.02", "--output", str(plot)]) == 0
    printed = capsys.readouterr().out
    assert plot.read_bytes()[:4] == b"\x89PNG"
    for phrase in (
        "photograph",
        "from itself in float64",
        "from eager",
        "bit for bit the same",
        "images/s",
        "CascadedGroupAttention",
    ):
        assert phrase in printed


def test_bad_image_is_one_line(tmp_path, capsys):
    file = tmp_path / "not_an_image.jpg"
    file.write_text("hello")
    assert main(["demo", "--image", str(file)]) == 2
    assert "image: expected a readable image file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--threads", "0"], "threads: expected at least 1; got 0"),
        (["--seconds", "-1"], "seconds: expected a positive number"),
        (["--output", "d.foo"], "output: expected a file of "),
        (["--output", "."], "output: expected a file; got the folder '.'"),
    ],
)
def test_bad_arguments_are_one_line(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(photo, "load_photo", lambda *_: pytest.fail("began"))
    assert main(["demo", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_the_reason_why_timm_is_missing_is_in_the_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(
        ValueError, match=r"deit_base_bsr.*got 'resnet18', and timm cannot be imported \(.*Error: "
    ):
        host_model.create_host_model("resnet18")
    assert "timm cannot be imported" in host_model.create_host_model("efficientvit_m0").note


def test_photo_and_crops(picture):
    assert picture.shape[0] == 3
    assert picture.std() > 0.05
    crops = photo.random_crops(picture, 3, 64, torch.Generator().manual_seed(0))
    assert crops.shape == (3, 3, 64, 64)
    assert 0 <= crops.min() <= crops.max() <= 1
    assert not torch.equal(crops[0], crops[1])


def test_a_photograph_from_a_file_may_be_written_to(tmp_path):
    """PyTorch warned of every --image that it could not be."""
    path = tmp_path / "grey.png"
    Image.new("RGB", (4, 3), (128, 128, 128)).save(path)
    assert photo._read(path).flags.writeable
    assert photo.load_photo(path)[0].shape == (3, 3, 4)


def test_randomized_network_uses_its_mixers(picture):
    """At default initialisation EfficientViT's mixers add nothing and any mixer would pass."""
    model = host_model.create_host_model("efficientvit_m0").model
    generator = torch.Generator().manual_seed(0)
    host_model.randomize(model, generator)
    images = photo.normalize(photo.random_crops(picture, 8, 224, generator))
    host_model.calibrate(model, [images])
    assert not model.training
    before = models.forward(model, images)
    assert 0.01 < before.std() < 100
    for name, parameter in model.named_parameters():
        if name.endswith("attention_biases"):
            parameter.data.mul_(-1)
    twin = host_model.clone(model)
    change = (models.forward(twin, images) - before).norm() / before.norm()
    assert change > 1e-3
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert all(norm.momentum == 0.1 for norm in norms)


def test_folded_baseline_is_exact_and_has_no_norms(picture):
    model = host_model.create_host_model("efficientvit_m0").model
    host_model.randomize(model, torch.Generator().manual_seed(0))
    model = host_model.clone(model, torch.float64)
    images = torch.randn(2, 3, 224, 224, dtype=torch.float64)
    folded = host_model.fold_conv_bn(model)
    assert sum(isinstance(m, torch.nn.BatchNorm2d) for m in folded.modules()) == 0
    difference = models.forward(folded, images) - models.forward(model, images)
    assert difference.norm() / models.forward(model, images).norm() < 1e-12


def test_model_bench_gates_every_variant(monkeypatch):
    def broken(model):
        changed = host_model.clone(model)
        for name, parameter in changed.named_parameters():
            if name.endswith("attention_biases"):
                parameter.data.add_(0.1 * torch.randn_like(parameter))
        return changed

    monkeypatch.setitem(models.VARIANTS, "broken", broken)
    model = host_model.create_host_model("efficientvit_m0").model
    generator = torch.Generator().manual_seed(0)
    host_model.randomize(model, generator)
    images = torch.randn(2, 3, 224, 224, generator=generator)
    host_model.calibrate(model, [images])
    settings = Settings(torch.device("cpu"), torch.float32, ["fwd"], [2], seconds=0.02, rounds=2)
    rows = []
    names = ["eager", "eager-folded", "broken"]
    models.run_model("efficientvit_m0", model, lambda batch: images, names, settings, rows)
    by_name = {row.provider: row for row in rows}
    assert by_name["broken"].status == "wrong"
    assert by_name["broken"].images_per_second is None
    assert by_name["eager"].status == by_name["eager-folded"].status == "ok"
    assert by_name["eager-folded"].images_per_second > 0

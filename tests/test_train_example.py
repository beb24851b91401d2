from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import vitkernels
from vitkernels import models

SCRIPT = Path(__file__).parents[1] / "examples" / "train.py"
# DiNAT-mini with 3 x 3 neighborhoods: at 96 pixels its dilations are 8, 4, 2 and 1 as at 224
DINAT = ["--model", "dinat_mini", "--size", "96", "--batch-size", "8"]
DINAT_ARGS = ["kernel_size=3", "img_size=96"]
NARROW = [*DINAT_ARGS, "embed_dim=16", "num_heads=(1,2,4,8)"]


@pytest.fixture
def train() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_example", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_loss_falls_and_a_resumed_run_has_the_same_curve(
    train: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [*DINAT, "--model-args", *NARROW, "drop_path_rate=0.1", "--limit", "48", "--epochs", "4"]
    whole = train.main([*arguments, "--history", str(tmp_path / "history.json")])
    losses = [sum(entry["losses"]) / len(entry["losses"]) for entry in whole]
    assert [len(entry["losses"]) for entry in whole] == [6] * 4
    assert losses[-1] < 0.9 * losses[0]
    lines = (tmp_path / "history.json").read_text().splitlines()
    assert [json.loads(line)["losses"] for line in lines] == [entry["losses"] for entry in whole]

    accuracy, calls = train.Trainer.accuracy, []

    def stops_in_the_third_epoch(trainer) -> float:
        calls.append(0)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return accuracy(trainer)

    saved = [*arguments, "--checkpoint", str(tmp_path / "mini.pth"), "--resume"]
    monkeypatch.setattr(train.Trainer, "accuracy", stops_in_the_third_epoch)
    with pytest.raises(KeyboardInterrupt):
        train.main(saved)
    resumed = train.main(saved)
    assert len(calls) == 5
    assert [entry["losses"] for entry in resumed] == [entry["losses"] for entry in whole]
    assert [entry["accuracy"] for entry in resumed] == [entry["accuracy"] for entry in whole]
    other = train.main([*arguments[:-1], "1", "--seed", "1"])
    assert other[0]["losses"] != whole[0]["losses"]

    narrow = {"embed_dim": 16, "num_heads": (1, 2, 4, 8), "kernel_size": 3, "img_size": 96}
    model = models.create_model("dinat_mini", num_classes=10, weights=tmp_path / "mini.pth", **narrow)
    state = torch.load(tmp_path / "mini.pth", weights_only=True)["model"]
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_dinat_mini_on_two_processes_has_the_curve_of_one(train: ModuleType, tmp_path: Path) -> None:
    arguments = [*DINAT, "--model-args", *NARROW, "drop_path_rate=0", "--limit", "24", "--epochs", "2"]
    arguments += ["--device", "cpu"]
    alone = train.main(arguments)
    path = tmp_path / "history.json"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [sys.executable, *launcher, str(SCRIPT), *arguments, "--history", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)  # it once hung at its end
    assert done.returncode == 0, done.stderr[-2000:]
    assert "2 x cpu" in done.stdout
    shared = [json.loads(line) for line in path.read_text().splitlines()]
    one, two = (
        torch.tensor([loss for epoch in epochs for loss in epoch["losses"]], dtype=torch.float64)
        for epochs in (alone, shared)
    )
    difference = ((one - two).abs() / one).max().item()
    print(f"largest relative difference of {len(one)} losses: {difference:.1e}")
    assert len(one) == 6
    assert one.std() > 0.1  # a curve, not a constant
    assert difference < 1e-5


@pytest.mark.parametrize("split", [False, True], ids=["one folder", "train and val"])
def test_a_folder_of_images(train: ModuleType, tmp_path: Path, split: bool) -> None:
    from PIL import Image

    for part in ("train", "val") if split else (".",):
        for label, color in (("cat", "red"), ("dog", "blue")):
            folder = tmp_path / part / label
            folder.mkdir(parents=True)
            (folder / "notes.txt").write_text("not an image")
            for i in range(8):
                Image.new("RGB" if i % 2 else "P", (20 + i, 30), color).save(folder / f"{i}.png")
    training, validation = train.load_data(str(tmp_path))
    assert (len(training), len(validation)) == ((16, 16) if split else (14, 2))
    assert not {str(path) for path, _ in training} & {str(path) for path, _ in validation}
    assert all(path.parent.name == ("cat", "dog")[label] for path, label in (*training, *validation))
    arguments = ["--model", "efficientvit_m0", "--data", str(tmp_path), "--size", "64", "--batch-size", "4"]
    arguments += ["--epochs", "1", "--flip", "--autocast", "bfloat16", "--device", "cpu", "--workers", "1"]
    history = train.main(arguments)
    assert len(history[0]["losses"]) == len(training) // 4


def test_batches_are_shared_out_and_crops_follow_from_the_key(train: ModuleType) -> None:
    monolith = train.batches(10, 4, "0/1")
    assert [len(batch) for batch in monolith] == [4, 4]
    assert monolith != train.batches(10, 4, "0/2")
    train.WORLD, parts = 2, []
    for train.RANK in range(2):
        parts.append(train.batches(10, 4, "0/1"))
    assert [sorted([*a, *b]) for a, b in zip(*parts, strict=True)] == [sorted(batch) for batch in monolith]

    args = train.parse_arguments(["--size", "32", "--batch-size", "2", "--crop", "0.5"])
    training, _ = train.load_data("digits")
    first, again, other, whole = (train.Images(training, args, key)[0][0] for key in ("a", "a", "b", None))
    assert first.shape == (3, 32, 32)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(whole, train.Images(training, args)[0][0])


def test_bad_arguments(train: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train.main(["--resume"])
    assert "--checkpoint" in capsys.readouterr().err
    wrong = [("--batch-size", "0"), ("--batch-size", "-4"), ("--data", "no/such/folder"), ("--limit", "-5")]
    wrong += [("--size", "0"), ("--epochs", "0"), ("--crop", "2"), ("--model-args", "depths")]
    for name, bad in wrong:
        with pytest.raises(SystemExit):
            train.parse_arguments([name, bad])
        assert f"error: {name}: expected" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="expected at most 16"):
        train.main(["--limit", "16"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match="--data: expected a folder of images a class"):
        train.main(["--data", str(tmp_path)])


def test_a_small_medvit_learns_the_digits_on_the_fused_kernels(train: ModuleType) -> None:
    """A narrow, shallow MedViTV2 on a ninth of the digits: above chance in three epochs, and no more than that.

    The full claim, MedViTV2-tiny above 95 % within ten minutes, is a run of the example's own first command.
    """
    arguments = ["--model", "medvit_tiny", "--model-args", "depths=(1,1,3,1)", "dims=(32,128,128,128)"]
    arguments += ["stem_chs=(16,16,32)", "--data", "digits", "--limit", "200", "--size", "97"]
    with vitkernels.backend("cpu"):  # no reference where a kernel does not fit: it raises
        history = train.main(
            [*arguments, "--batch-size", "8", "--lr", "2e-3", "--epochs", "3", "--device", "cpu"]
        )
    print([f"{entry['accuracy']:.1%} after {entry['seconds']:.0f} s" for entry in history])
    losses = [sum(entry["losses"]) / len(entry["losses"]) for entry in history]
    assert losses[-1] < 0.9 * losses[0]
    assert history[-1]["accuracy"] > 0.25  # chance is 0.1


def test_a_small_ppma_learns_the_digits_on_the_fused_kernels(train: ModuleType) -> None:
    """A narrow, shallow PPMA, both kinds of attention in it: above chance after two epochs."""
    arguments = ["--model", "ppma_t", "--model-args", "depths=(1,1,2,1)", "embed_dims=(16,32,48,64)"]
    arguments += ["num_heads=(2,2,3,4)", "projection=128", "drop_path_rate=0", "--data", "digits"]
    arguments += ["--limit", "240", "--size", "64", "--batch-size", "8", "--lr", "2e-3", "--epochs", "2"]
    with vitkernels.backend("cpu"):  # no reference where a kernel does not fit: it raises
        history = train.main([*arguments, "--device", "cpu"])
    print([f"{entry['accuracy']:.1%} after {entry['seconds']:.0f} s" for entry in history])
    losses = [sum(entry["losses"]) / len(entry["losses"]) for entry in history]
    assert losses[-1] < 0.9 * losses[0]
    assert history[-1]["accuracy"] > 0.25  # chance is 0.1

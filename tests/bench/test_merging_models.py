"""Whole networks with and without token merging, held to the network in float64."""

from __future__ import annotations

import math

import pytest
import torch
from timm_import import import_timm

from vitkernels.__main__ import main
from vitkernels.bench import merging, models
from vitkernels.bench.runner import Settings
from vitkernels.patching import merging as patched

timm = import_timm()
SETTINGS = Settings(torch.device("cpu"), torch.float32, ("fwd",), (2,), seconds=0.01, rounds=2)


def small() -> torch.nn.Module:
    torch.manual_seed(0)
    model = timm.models.vision_transformer.VisionTransformer(
        img_size=48, patch_size=8, embed_dim=32, depth=3, num_heads=2, num_classes=7
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=max(parameter.shape[-1], 4) ** -0.5)
    return model.eval()


def run(names, schedule=5):
    generator, rows = torch.Generator().manual_seed(1), []
    models.run_model(
        "small",
        small(),
        lambda batch: torch.randn(batch, 3, 48, 48, generator=generator),
        names,
        SETTINGS,
        rows,
        contest=merging.contest(schedule),
    )
    return {row.provider: row for row in rows}


def test_every_variant_is_right_and_timed() -> None:
    rows = run(["eager", "plain-merging", "vitkernels"], [5, 0, 20])
    assert {name: row.status for name, row in rows.items()} == dict.fromkeys(rows, "ok")
    assert len(rows) == 3
    assert all(row.median for row in rows.values())


def test_a_variant_that_forgets_the_sizes_is_wrong(monkeypatch) -> None:
    real = patched.attend

    def forgetful(attn, x, size, backend):
        return real(attn, x, size if x.dtype is torch.float64 else None, backend)

    monkeypatch.setattr(patched, "attend", forgetful)
    assert run(["eager", "vitkernels"])["vitkernels"].status == "wrong"


def test_a_variant_that_merges_others_is_wrong(monkeypatch) -> None:
    real = patched.ops.bipartite_match

    def backwards(metric, r, **options):
        return real(metric.flip(2) ** 3, r, **options)

    monkeypatch.setattr(patched.ops, "bipartite_match", backwards)
    row = run(["eager", "vitkernels"])["vitkernels"]
    assert row.status == "wrong"
    assert row.reason.startswith("similarity lost by the choices")


@pytest.mark.parametrize("blocks", ["all", "the last"])
def test_a_variant_that_merges_fewer_is_wrong(blocks, monkeypatch) -> None:
    real, calls = patched.ops.bipartite_match, []

    def fewer(metric, r, **options):
        calls.append(r)
        return real(metric, r - 1 if blocks == "all" or len(calls) % 3 == 0 else r, **options)

    monkeypatch.setattr(patched.ops, "bipartite_match", fewer)
    row = run(["eager", "vitkernels"])["vitkernels"]
    assert row.status == "wrong"
    assert row.reason.startswith("lengths of the merged sequences")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_judged_by_its_own_choices(dtype, monkeypatch) -> None:
    """There two right programs merge most images otherwise, and otherwise than float64."""
    judge = merging.contest(5).judge
    model, images = small().to(dtype), torch.randn(8, 3, 48, 48).to(dtype)
    ours = merging.contest(5).variants["vitkernels"](model)
    assert judge(model, images)("vitkernels", ours).ok
    assert judge(model, images)("plain-merging", merging.contest(5).variants["plain-merging"](model)).ok
    real = patched.ops.bipartite_match
    monkeypatch.setattr(
        patched.ops, "bipartite_match", lambda metric, r, **options: real(metric.flip(2) ** 3, r, **options)
    )
    assert not judge(model, images)("vitkernels", ours).ok


def test_what_choices_lose() -> None:
    """Six tokens, of which the first stands apart: even 2 and 4 match odd 1 and 5 exactly, and 3 not at all."""
    metric = torch.tensor([[[1.0, 1.0], [1.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]])
    for rows, loss in (
        ([0, 1, 1, 2, 3, 3], 0.0),  # 2 to 1 and 4 to 5
        ([0, 1, 2, 2, 3, 3], 1.0),  # 2 to 3, which points away, and 4 to 5
        ([1, 1, 0, 2, 3, 3], math.inf),  # the class token to 1
        ([0, 1, 1, 2, 3, 4], math.inf),  # 2 to 1 alone
    ):
        assert merging.lost(metric, torch.tensor([rows]), 2).tolist() == pytest.approx([loss])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--token-merging", "-1"], "token_merging"),
        (["--token-merging", "8", "--providers", "eager-folded"], "providers: expected some of eager"),
    ],
)
def test_bad_arguments_are_one_line_on_stderr(arguments, message, capsys) -> None:
    code = main(["bench", "--model", "deit_tiny_patch16_224", "--device", "cpu", "--quiet", *arguments])
    captured = capsys.readouterr()
    assert message in captured.err + captured.out
    assert code == 2

from __future__ import annotations

import json
import subprocess
import sys

import torch

from vitkernels import info
from vitkernels.__main__ import main
from vitkernels.core import native


def test_json_has_every_part(capsys):
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["torch"]["version"] == torch.__version__
    assert facts["torch"]["threads"] == torch.get_num_threads()
    assert {"timm", "natten", "torchvision"} == set(facts["peers"])
    table = facts["operators"]["window_attention"]
    assert set(table) == {"cuda", "triton", "cpu", "reference"}
    assert table["reference"]["devices"]["cpu"] == ""
    assert "float64" in table["reference"]["dtypes"]


def test_text_names_what_is_missing_and_why(monkeypatch):
    status = {"path": None, "error": "undefined symbol: frobnicate", "cuda": False, "isa": None}
    monkeypatch.setattr(native, "status", lambda: status)
    text = info.render(info.collect())
    assert "missing: undefined symbol: frobnicate" in text
    assert "operator window_attention" in text


def test_environment_overrides_are_shown(monkeypatch):
    monkeypatch.setenv("VITKERNELS_BACKEND", "reference")
    assert "VITKERNELS_BACKEND=reference" in info.render(info.collect())


def test_no_part_that_breaks_breaks_the_rest(monkeypatch):
    def broken(*_args):
        raise OSError("driver in disarray")

    for name in ("_cpu", "_torch", "_gpus", "_nvidia_smi", "_peers", "_operators"):
        monkeypatch.setattr(info, name, broken)
    monkeypatch.setattr(native, "status", broken)
    text = info.render(info.collect())
    assert "OSError: driver in disarray" in text
    assert f"torch        {torch.__version__}" in text


def test_a_reader_that_has_gone_and_an_interrupt_are_no_tracebacks(monkeypatch, capsys):
    code = "import sys; from vitkernels.__main__ import main; sys.exit(main(['info']))"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 1

    def interrupted(_args):
        raise KeyboardInterrupt

    monkeypatch.setattr(info, "run", interrupted)
    assert main(["info"]) == 130
    assert capsys.readouterr().err == "vitkernels: interrupted\n"


def test_import_of_the_package_loads_neither_the_bench_nor_what_takes_long():
    code = (
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import vitkernels\n"
        "unwanted = ('vitkernels.bench', 'rich', 'matplotlib', 'timm', 'torch._dynamo', 'torch.utils.benchmark')\n"
        "loaded = [name for name in sys.modules.keys() - before if name.startswith(unwanted)]\n"
        "assert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

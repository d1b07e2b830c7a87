"""The command lines: what they print, and how they refuse."""

from __future__ import annotations

import io
import pathlib
import re
import subprocess
import sys

import pytest
import torch

from moecompile import exported
from moecompile.passes import PASSES
from moecompile.tools import demo, demo_models, demo_text, families, opt, progress
from moecompile.tools.main import COMMANDS, main
from tests.models.layer import Recipe

FILECHECK = pathlib.Path(__file__).resolve().parents[1] / "filecheck"


def test_opt_lists_every_pass(capsys: pytest.CaptureFixture[str]) -> None:
    assert opt.main(["--list"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in PASSES)


@pytest.mark.parametrize("name", PASSES)
def test_every_pass_has_goldens(name: str) -> None:
    stem = name.replace("-", "_")
    assert (FILECHECK / f"{stem}.py").exists() and (FILECHECK / f"{stem}_no_match.py").exists()
    assert name in (FILECHECK / "list.test").read_text()


def test_opt_names_the_nearest_pass(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        opt.main(["x.py", "-p", "fuse-expert"])
    assert "did you mean 'fuse-experts'" in capsys.readouterr().err


FILES = {
    "": r"no function example\(\)",
    "def example(: pass": r"broken.py:1: invalid syntax",
    "import no_such_module": r"No module named 'no_such_module'",
    "def example(): return 3": r"returns \(int\), needs \(module or function, tuple of inputs\)",
    "import torch\ndef example(): return torch.relu, torch.ones(2)": r"returns \(.*, Tensor\), needs",
}


@pytest.mark.parametrize("text", FILES, ids=list(FILES.values()))
def test_files_that_are_no_examples(text: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "broken.py").write_text(text)
    for status, command in ((opt.main, []), (main, ["explain"])):
        assert status([*command, str(tmp_path / "broken.py")]) == 2
        assert re.search(FILES[text], capsys.readouterr().err)


def test_files_that_are_not_there(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert opt.main([str(tmp_path / "none.py")]) == 2 == main(["explain", str(tmp_path / "none.py")])
    assert capsys.readouterr().err.count("No such file") == 2


BROKEN = """
import torch

def f(x):
    torch._dynamo.graph_break()
    return x

def example():
    return f, (torch.ones(2),)
"""


def test_opt_says_why_there_is_no_graph(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "broken.py").write_text(BROKEN)
    assert opt.main([str(tmp_path / "broken.py")]) == 2
    assert re.search(r"does not capture example\(\) in one graph: .*graph_break", capsys.readouterr().err)


def test_explain_names_the_cure_for_the_loop_of_transformers(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    assert main(["explain", "mixtral", "--experts", "eager"]) == 1
    printed = capsys.readouterr().out
    assert printed.count('set_experts_implementation("grouped_mm")') == 1 and "graph 0" not in printed


@pytest.mark.parametrize("given", [["x.py", "--experts", "eager"], ["x.py", "--out", "x.txt"], ["x.py", "--out", "none/x.json"]])
def test_explain_refuses(given: list[str], tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.py").write_text("import torch\ndef example(): return torch.relu, (torch.ones(2),)")
    assert main(["explain", str(tmp_path / given[0]), *given[1:]]) == 2
    assert capsys.readouterr().err.startswith("moecompile explain: ")


LOADING = """
import moecompile.exported, sys, torch
from moecompile.codegen.cpu import CpuImplementation

CpuImplementation.experts = lambda *a: print("kernel called") or torch.full((5, 16), 7.0)
with torch.no_grad():
    print(torch.export.load(sys.argv[1]).module()(torch.ones(5, 16))[0].mean())
"""


def test_an_exported_program_runs_by_kernels_elsewhere(tmp_path: pathlib.Path) -> None:
    """In a process that imports moecompile.exported and nothing else."""
    x = torch.randn(5, 16)
    fused = exported.fuse(torch.export.export(Recipe().make(), (x,)), {"kernels": "reference"})
    torch.export.save(torch.export.export(fused, (x,)), tmp_path / "fused.pt2")
    command = [sys.executable, "-W", "ignore", "-c", LOADING, str(tmp_path / "fused.pt2")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    assert "kernel called" in done.stdout and "7." in done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert f"moecompile {command}" in capsys.readouterr().out


def test_bench_lists_every_benchmark(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench"]) == 0
    printed = capsys.readouterr().out
    assert [line.split()[0] for line in printed.splitlines()] == ["families", "gpu", "layer"]
    assert main(["bench", "gpus"]) == 2
    assert "did you mean 'gpu'" in capsys.readouterr().err


def test_config_prints_value_and_origin(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "verify=3"]) == 0
    assert re.search(r"^verify +3 +call ", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.parametrize("given", ["verfy=3", "verify=-1", "verify"])
def test_config_refuses(given: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", given]) == 2
    assert capsys.readouterr().err.startswith("moecompile config: ")


def test_explain_names_the_nearest_family(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    assert main(["explain", "mixtrl"]) == 2
    assert "did you mean 'mixtral'" in capsys.readouterr().err


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_families_are_tiny(family: str) -> None:
    pytest.importorskip("transformers")
    model, named = families.build(family)
    assert sum(p.numel() for p in model.parameters()) < 1e6
    with torch.no_grad():
        assert model(**named).logits.isfinite().all()


def test_the_corpus_is_python() -> None:
    text = demo_text.corpus()
    assert len(text) > 1_000_000 and text.dtype == torch.uint8
    assert "import" in demo_text.readable(text[:20_000])
    a, b = (demo_text.batch(text, 4, 16, torch.Generator().manual_seed(1)) for _ in range(2))
    assert a.shape == (4, 16) and torch.equal(a, b)


def test_demo_learns_and_writes(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The demo's own functions, on eager and a smaller model: losses fall, curves are drawn, text comes out."""
    pytest.importorskip("transformers")
    monkeypatch.setattr(demo, "PROMPT", 16)
    monkeypatch.setattr(demo, "REPLY", 8)
    monkeypatch.setattr(demo, "BATCH", 2)
    monkeypatch.setattr(demo, "LENGTH", 16)
    monkeypatch.setattr(demo_models, "SIZE", dict(demo_models.SIZE, hidden_size=32))
    text = demo_text.corpus()
    both = [demo.Contender("eager", demo_models.olmoe()) for _ in range(2)]
    demo.train(both, text, steps=8, limit=60, seed=0)
    assert both[0].losses == both[1].losses and both[0].losses[-1] < both[0].losses[0]
    demo.print_losses(both)
    demo.plot_losses(both, tmp_path / "loss.png")
    demo.converse(both, text[:16].long()[None])
    demo.print_rates(both, [("decode", "decode", 1)])
    assert torch.equal(both[0].text, both[1].text) and both[0].text.shape == (1, 8)
    assert len(demo_text.readable(demo.invent(both[0], text[:16].long()[None], 0))) == 8
    assert "the same as eager for 8 of 8" in capsys.readouterr().out


def test_progress_is_plain_off_a_terminal() -> None:
    out = io.StringIO()
    with progress.Progress("work", 3, out) as bar:
        bar.to(1)
        bar.to(3, "done")
    assert out.getvalue() == "work 3/3, 0 s done\n"

"""The command lines: what they print, and how they refuse."""

from __future__ import annotations

import io
import pathlib
import re

import pytest
import torch

from moecompile.passes import PASSES
from moecompile.tools import demo, demo_models, demo_text, families, opt, progress
from moecompile.tools.main import COMMANDS, main

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


def test_opt_needs_an_example(tmp_path: pathlib.Path) -> None:
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(ValueError, match=r"no function example\(\)"):
        opt.capture(str(tmp_path / "empty.py"))


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

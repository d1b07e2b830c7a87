"""`moecompile tune` from the outside."""

from __future__ import annotations

import argparse
import pathlib
import re

import pytest
import torch

from moecompile.autotune import pack
from moecompile.autotune.entry import Choice
from moecompile.autotune.key import Key, Problem, environment_of
from moecompile.autotune.store import Store
from moecompile.codegen import gpu_choose
from moecompile.kernels.gpu.config import Config
from moecompile.tools import tune

SHAPE = "H2048,F768,E128,K8,bf16"
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOECOMPILE_CACHE_DIR", str(tmp_path / "cache"))


def command(*given: str) -> int:
    parser = argparse.ArgumentParser(prog="moecompile tune")
    tune.add_arguments(parser)
    return tune.main(parser.parse_args(given))


@no_gpu
def test_without_a_gpu_it_says_so_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert command(SHAPE) == 1
    assert "there is no GPU here" in capsys.readouterr().err


def test_a_simulated_run_keeps_its_budget_and_can_be_repeated(capsys: pytest.CaptureFixture[str]) -> None:
    assert command("olmoe", "--simulate", "--budget", "1h", "--tokens", "64,2048") == 0
    first = capsys.readouterr()
    assert "these times are invented" in first.out
    assert re.search(r"^up, <=8 rows per expert .*x  \d+/\d+/\d+/\d+/\d+/\d+$", first.out, re.MULTILINE), first.out
    assert re.search(r"^8/96 .*% of the floor$|^\d+/96 ", first.err, re.MULTILINE), first.err
    assert command("olmoe", "--simulate", "--budget", "1h", "--tokens", "64,2048") == 0
    again = capsys.readouterr()
    assert "\n0 measurements" in again.out and "(stored before)" in again.out


def test_why(capsys: pytest.CaptureFixture[str]) -> None:
    assert command(SHAPE, "--simulate", "--why", "--tokens", "512") == 0
    assert "miss: nothing was tuned yet" in capsys.readouterr().out
    command(SHAPE, "--simulate", "--budget", "1h", "--tokens", "512")
    command(SHAPE, "--simulate", "--why", "--tokens", "512")
    assert "up, <=32 rows per expert: hit: block_m" in capsys.readouterr().out
    command("H2048,F767,E128,K8", "--simulate", "--why", "--tokens", "512")
    assert "intermediate: 767 here, 768 there" in capsys.readouterr().out


def test_export_and_import(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    problem = Problem("up", "bfloat16", 2048, 768, 128, 8, 2048, 2, bucket=3)
    real = Choice(Key(problem, environment_of(gpu_choose.TARGETS["sm_90"])), Config(64, 32, 64, 4, 3), 1e-4, 2e-4)
    command(SHAPE, "--simulate", "--budget", "1h", "--tokens", "512")
    Store().put(real)
    assert command("--export", str(tmp_path / "pack.json")) == 0
    assert "1 configurations" in capsys.readouterr().out, "invented times stay at home"
    assert command("--import", str(tmp_path / "pack.json"), "--simulate", "--budget", "1h") == 0
    assert "1 configurations taken up; each runs once it was measured on this machine" in capsys.readouterr().out
    assert Store().proposal(problem) == real.config


@no_gpu
def test_a_pack_can_be_taken_up_without_a_gpu(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    problem = Problem("up", "bfloat16", 2048, 768, 128, 8, 2048, 2, bucket=3)
    config = Config(64, 32, 64, 4, 3)
    pack.write(tmp_path / "pack.json", [Choice(Key(problem, environment_of(gpu_choose.TARGETS["sm_90"])), config, 1e-4, 2e-4)])
    assert command("--import", str(tmp_path / "pack.json")) == 0
    assert "they wait for the next tuning" in capsys.readouterr().out
    assert Store().proposal(problem) == config


@pytest.mark.parametrize(
    ("given", "about"),
    [
        (["H2048,F76x,E128,K8"], "F76x"),
        (["H2048,F768,K8"], "E is missing"),
        (["H2048,F768,E4,K8"], "at most E"),
        (["olmo"], "did you mean 'olmoe'"),
        ([], "needs a model or a shape"),
        (["--import", "/nowhere/pack.json"], "No such file"),
    ],
)
def test_mistakes_are_explained(given: list[str], about: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(*given) == 2
    assert about in capsys.readouterr().err


def test_a_store_that_cannot_be_trusted_is_said_before_time_is_spent(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cache" / "tuned").mkdir(parents=True)
    (tmp_path / "cache" / "tuned").chmod(0o777)
    assert command(SHAPE, "--simulate") == 2
    assert "chmod go-w" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["0", "-3", "ten", "60sec", "1d"])
def test_a_budget_is_a_time(text: str) -> None:
    with pytest.raises(SystemExit):
        command(SHAPE, "--budget", text)


def test_training_adds_the_backward_kernels(capsys: pytest.CaptureFixture[str]) -> None:
    command(SHAPE, "--simulate", "--budget", "1h", "--tokens", "1", "--train")
    names = {line.split(",")[0] for line in capsys.readouterr().out.splitlines() if "rows per expert" in line}
    assert names == {"decode_up", "decode_down", "router", "up", "down", "combine", "grad_z", "grad_rows", "grad_matrix"}

"""`moecompile ship` from the outside, for one small layer and one GPU that is not here."""

from __future__ import annotations

import argparse
import pathlib

import pytest

from moecompile.autotune import pack
from moecompile.autotune.entry import Compiled
from moecompile.tools import ship

pytest.importorskip("triton")


def command(*given: str) -> int:
    parser = argparse.ArgumentParser(prog="moecompile ship")
    ship.add_arguments(parser)
    return ship.main(parser.parse_args(given))


@pytest.mark.slow
def test_a_pack_of_what_compiled(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("H128,F64,E8,K2", "--for", "MI300X", "--out", str(tmp_path)) == 0
    assert "gfx942.json: 14 of 14 compiled without spills, for MI300X" in capsys.readouterr().out
    entries = pack.read(tmp_path / "gfx942.json")
    assert entries and all(isinstance(e, Compiled) and e.device == "MI300X" for e in entries)


def test_a_layer_that_nobody_knows(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("mixtrall", "--out", str(tmp_path)) == 2
    assert "did you mean 'mixtral-8x7b'" in capsys.readouterr().err

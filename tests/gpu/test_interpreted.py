"""Starts the tests of tests/gpu/interpreted, each file in a process of its own with TRITON_INTERPRET=1 set before triton is
imported."""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys

import pytest

from tests.gpu import interpreter

HERE = pathlib.Path(__file__).resolve().parent
FILES = sorted(p.name for p in (HERE / "interpreted").glob("test_*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_in_the_interpreter(name: str) -> None:
    if reason := interpreter.missing():
        pytest.skip(reason)
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-rs", str(HERE / "interpreted" / name)]
    done = subprocess.run(command, cwd=HERE.parents[1], env=environment, capture_output=True, text=True)
    if done.returncode == pytest.ExitCode.NO_TESTS_COLLECTED and (skipped := re.search(r"^SKIPPED .*", done.stdout, re.M)):
        pytest.skip(skipped[0])
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout

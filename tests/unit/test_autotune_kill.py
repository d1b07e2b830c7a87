"""kill -9 at random points of a tuning run: the store is never corrupt, and at most one measurement is made twice."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
KILLS = 20

# One process imports everything and forks a child for each run, so that a run is short and a kill falls into its work.
DRIVER = """
import collections, functools, io, json, os, pathlib, random, signal, sys, time
from moecompile.analysis.machine import MACHINES
from moecompile.autotune import entry, tuner
from moecompile.autotune.key import Problem, canonical
from moecompile.autotune.measure import Simulated
from moecompile.autotune.store import Store
from moecompile.autotune.tuner import Budget
from moecompile.tools.tune import tune_all

sys.stderr = io.StringIO()
PACE = 0.002  # seconds of one measurement
root, kills = pathlib.Path(sys.argv[1]), int(sys.argv[2])
machine = MACHINES["H200"]
problems = [Problem(k, "bfloat16", 2048, 768, 128, 8, 2048, 2, bucket=5) for k in ("up", "down", "grad_matrix")]
tuner.candidates = functools.lru_cache(tuner.candidates)  # nothing is kept of a run but what is on disk; this saves its time

class Logged(Simulated):
    def measure(self, problem, config):
        line = canonical(problem) + canonical(config) + "\\n"
        handle = os.open(self.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        os.write(handle, line.encode())
        os.close(handle)
        return 2 * super().measure(problem, config)  # far from the floor: every candidate is tried

    def versus(self, problem, a, b):
        return tuple(Simulated.measure(self, problem, c) for c in (a, b))

def tune(folder):
    timer = Logged(machine, pace=PACE)
    timer.log = folder / "log"
    tune_all(problems, machine, timer, Store(folder / "cache" / "tuned"), Budget(1e9, timer.now))

def run(folder):
    pid = os.fork()
    if pid == 0:
        tune(folder)
        os._exit(0)
    return pid

def whole(folder):
    found = {}
    for path in (folder / "cache" / "tuned").glob("[!.]*"):
        item = entry.from_text(path.read_bytes())
        assert entry.file_name(item) == path.name, path
        found[path.name] = entry.to_text(item)
    return found

def finish(folder):
    assert os.waitstatus_to_exitcode(os.waitpid(run(folder), 0)[1]) == 0

for name in ("warm-up", "undisturbed"):
    (root / name).mkdir()
tune(root / "warm-up")
finish(root / "undisturbed")
wanted = whole(root / "undisturbed")
rng, repeated, partial = random.Random(0), [], 0
for i in range(kills):
    folder = root / str(i)
    folder.mkdir()
    pid = run(folder)
    reached, patience = (len(wanted) - 1) * (i + rng.random()) / kills, time.monotonic() + 20
    while len(list((folder / "cache" / "tuned").glob("[!.]*"))) < reached and time.monotonic() < patience:
        time.sleep(2e-4)
    time.sleep(PACE * rng.random())
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    partial += 0 < len(whole(folder)) < len(wanted)
    finish(folder)
    assert whole(folder) == wanted, i
    lines = collections.Counter((folder / "log").read_text().splitlines())
    repeated.append(sum(lines.values()) - len(lines))
print(json.dumps({"entries": len(wanted), "repeated": repeated, "partial": partial}))
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_stopped(tmp_path: pathlib.Path) -> None:
    command = [sys.executable, "-c", DRIVER, str(tmp_path), str(KILLS)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:] + done.stdout
    found = json.loads(done.stdout)
    assert len(found["repeated"]) == KILLS
    assert max(found["repeated"]) <= 1
    assert found["partial"] >= KILLS // 2, f"most kills must fall into the run: {found}"

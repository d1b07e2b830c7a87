"""The timer for GPUs, as far as it can be tried without one: Triton's interpreter stands in, and nothing is said of speed."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch

from moecompile.analysis.machine import MACHINES
from moecompile.autotune import device
from moecompile.autotune.candidates import candidates, refusal, target_of
from moecompile.autotune.device import in_force, make_inputs, routing
from moecompile.autotune.entry import REFUSED
from moecompile.autotune.key import Problem, spec_of
from moecompile.autotune.measure import Refused
from moecompile.codegen import gpu_choose
from moecompile.errors import BuildError
from moecompile.kernels.gpu.config import Config
from tests.gpu import interpreter

ROOT = pathlib.Path(__file__).resolve().parents[2]
UP = Problem("up", "bfloat16", 2048, 768, 128, 8, 2048, 2, bucket=3)
TINY = Problem("up", "float32", 32, 16, 8, 2, 32, 2, bucket=1)

INTERPRETED = """
import json, sys, torch
from moecompile.analysis.machine import MACHINES
from moecompile.autotune import device
from moecompile.autotune.candidates import candidates
from moecompile.autotune.key import Problem
from moecompile.autotune.measure import Refused

machine, found = MACHINES["H100"], {}
device.ROTATED, device.ROUNDS = 1, 2
timer = device.Device(machine, torch.device("cpu"))
for kernel in ("up", "decode_down", "router"):
    sizes = (1, 1, 8, 2, 1, 1) if kernel == "router" else (32, 16, 8, 2, 32, 2)
    problem = Problem(kernel, "float32", *sizes, bucket=0 if kernel == "decode_down" else 1)
    config = candidates(problem, machine)[1]
    timer._sets(problem)
    right, runs = device._outputs, []
    device._outputs = lambda *a: runs.append(1) or right(*a)
    found[kernel] = [timer.measure(problem, config), timer.floor(problem)]
    device._outputs = right
    assert len(runs) == 1, "the op runs once a set, and its kernel is timed alone"
    if kernel == "up":
        for factor in (1.1, float("nan")):
            device._outputs = lambda *a: [t * factor for t in right(*a)]
            try:
                timer.measure(problem, config)
            except Refused as error:
                found[str(factor)] = error.reason
            device._outputs = right
        a, b = timer.versus(problem, config, candidates(problem, machine)[0])
        found["versus"] = [a, b]
print(json.dumps(found))
"""


@pytest.mark.slow
def test_every_kind_of_kernel_is_recorded_checked_and_timed() -> None:
    pytest.importorskip("triton")
    if reason := interpreter.missing():
        pytest.skip(reason)
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", INTERPRETED]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found.pop("1.1"), found.pop("nan")) == ("wrong", "wrong")
    assert len(found) == 4
    for seconds in found.values():
        assert min(seconds) > 0


def test_routing_chooses_distinct_experts_and_skew_crowds_them() -> None:
    generator = torch.Generator().manual_seed(0)
    uniform, skewed = (routing(4096, 64, 4, skew, generator) for skew in (0.0, 1.5))
    for ids in (uniform, skewed):
        assert ids.min() >= 0 and ids.max() < 64
        assert (ids.sort(1).values.diff(dim=1) > 0).all()
    assert uniform.flatten().bincount(minlength=64).max() < 1.4 * 256
    assert skewed.flatten().bincount(minlength=64).max() > 8 * 256
    assert routing(3, 1, 1, 1.0, generator).tolist() == [[0], [0], [0]]


def test_inputs_take_turns_until_they_exceed_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "ROTATED", 200_000)
    sets = make_inputs(TINY, torch.device("cpu"))
    held = [sum(t.nbytes for t in (s.x, *s.params)) for s in sets]
    assert 1 < len(sets) < device.MOST_SETS
    assert sum(held) >= 200_000 > sum(held[:-1])
    timer = device.Device(MACHINES["H100"], torch.device("cpu"))
    for i, (one, skew) in enumerate(zip(sets, device.skews_of(TINY), strict=True)):
        assert torch.equal(one.ids, timer._routing(TINY, i, skew)), "the floor counts the experts that are really hit"
    assert not torch.equal(sets[0].params[0], sets[1].params[0])
    again = make_inputs(TINY, torch.device("cpu"))
    assert all(torch.equal(a.x, b.x) and torch.equal(a.ids, b.ids) for a, b in zip(sets, again, strict=True)), "runs compare"


def test_a_configuration_in_force_takes_its_partner_along() -> None:
    spec, target = spec_of(UP), gpu_choose.TARGETS["sm_90"]
    usual = {f: gpu_choose.choose(f, spec, 512, target) for f in ("up", "down", "grad_z", "combine")}
    with in_force(UP, Config(128, 64, 32, 8, 3)):
        assert gpu_choose.choose("up", spec, 512, target) == Config(128, 64, 32, 8, 3)
        down = gpu_choose.choose("down", spec, 512, target)
        assert down.block_m == 128
        assert refusal(Problem(**{**vars(UP), "kernel": "down"}), down, target) is None
        assert gpu_choose.choose("grad_z", spec, 512, target) == usual["grad_z"]
        assert gpu_choose.choose("combine", spec, 512, target) == usual["combine"]
    assert gpu_choose.choose("up", spec, 512, target) == usual["up"]


def test_only_the_order_of_sums_may_differ() -> None:
    right = torch.randn(512, 64).bfloat16()
    near = right + torch.randn(512, 64).bfloat16() * 0.004
    one_row = right.clone()
    one_row[77] = 0
    last_tile = right.clone()
    last_tile[:, 48:] = 0
    unwritten = right.clone()
    unwritten[3, 5] = float("nan")
    found = [device._alike([t], [right]) for t in (right, near, one_row, last_tile, unwritten)]
    assert found == [True, True, False, False, False]


def test_what_went_wrong_gets_a_reason_that_the_store_knows() -> None:
    class OutOfResources(Exception):
        """Triton's, by name: it may be absent here."""

    reasons = [
        device._reason(error)
        for error in (Refused("wrong"), torch.OutOfMemoryError(), OutOfResources(), BuildError(), RuntimeError("CUDA error"))
    ]
    assert reasons == ["wrong", "memory", "resources", "compile", "launch"]
    assert set(reasons) <= set(REFUSED)
    assert device._reason(ValueError("ours")) is None


def test_candidates_for_the_card_at_hand_follow_its_limits() -> None:
    """A smaller card of a known architecture: what the driver reports counts, not the table."""
    small = dataclasses.replace(MACHINES["H100"], block_shared=101_376)
    for config in candidates(UP, small)[1:]:
        assert refusal(UP, config, target_of(small)) is None

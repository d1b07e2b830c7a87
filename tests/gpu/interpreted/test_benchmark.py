"""The GPU benchmark's own forms and checks, on CPU tensors: what it calls right and wrong is so.

Run as tests/gpu/test_interpreted.py does.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from benchmarks.gpu import correct, layers, measure, plan, work
from benchmarks.gpu.contenders import ours, plain
from moecompile.codegen import gpu, gpu_ahead
from moecompile.ir import ops
from moecompile.kernels.gpu.config import Kernel

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def bound(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    gpu.set_config_source(None)
    before = ops._BOUND.pop("cpu", None)
    ops.bind("cpu", gpu.GpuImplementation())
    monkeypatch.setattr(correct, "graphed", lambda layer, given, params, dtype: ours(layer, dtype)(given, params))
    yield
    ops._BOUND.pop("cpu")
    if before is not None:
        ops._BOUND["cpu"] = before


@pytest.mark.parametrize("name", layers.LAYERS)
def test_every_form_is_right(name: str) -> None:
    for what, share in correct.check_form(layers.LAYERS[name].smaller(40, 24), 3, torch.float32, CPU):
        assert share <= 1, f"{what}: {share}"


@pytest.mark.parametrize("name", layers.LAYERS)
def test_the_form_beside_ours_computes_the_same(name: str) -> None:
    layer = layers.LAYERS[name].smaller(40, 24)
    given = layers.inputs(layer, 9, "zipf", CPU, 3)
    params = layer.parameters(CPU)
    got, want = plain(layer)(given.x, given.logits, given.bias, params), ours(layer)(given, params)
    assert correct.error(got, want.double()) < correct.allowed(torch.bfloat16)
    assert correct.check_full(layer, given, params) < 1


@pytest.mark.parametrize("train", (False, True))
@pytest.mark.parametrize("tokens", (1, 40, 2100))
@pytest.mark.parametrize("name", layers.LAYERS)
def test_what_is_compiled_ahead_is_what_is_launched(name: str, tokens: int, train: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Same text, function, numbers and dtypes, and so the same entry of Triton's cache."""
    layer, seen = layers.LAYERS[name].smaller(40, 24), set()

    def note(kernel: Kernel, function: str, grid: tuple[int, ...], *args: Any) -> None:
        seen.add((kernel.text, function, kernel.config, tuple(getattr(a, "dtype", int) for a in args)))
        for a in args:
            if isinstance(a, torch.Tensor) and a.device.type == "cpu":
                a.data.nan_to_num_().clamp_(0, 1)  # nothing runs, and ids must be in range

    monkeypatch.setattr(gpu_ahead, "_warm", note)
    monkeypatch.setattr(Kernel, "run", note)
    gpu_ahead.build(layer.router, layer.spec(), tokens, train)
    ahead = set(seen)
    seen.clear()
    given, params = layers.inputs(layer, tokens, "zipf", CPU, 1), layer.parameters(CPU)
    cell = plan.Cell(name, "train" if train else "forward", "zipf", tokens, "ours")
    for leaf in (given.x, given.logits, *params):
        leaf.requires_grad_(train)
    work.call_of(cell, given, params, ours(layer))()
    assert ahead == seen and len(ahead) > (8 if train else 2)


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> work.Worker:
    """One whose device is the CPU and whose layers are small; nothing is timed."""
    monkeypatch.setattr(work, "LAYERS", {name: layer.smaller(40, 24) for name, layer in layers.LAYERS.items()})
    monkeypatch.setattr(work, "usable", lambda: True)
    monkeypatch.setattr(measure, "timed", lambda calls, seconds: [call() for call in calls] and measure.Timing(1.0, 0.0, True))
    found: work.Worker = object.__new__(work.Worker)
    found.device, found.held = CPU, ("", [])
    return found


@pytest.mark.parametrize("contender", ("ours", "grouped_mm"))
@pytest.mark.parametrize("mode", ("forward", "train"))
def test_a_cell_is_checked_and_timed(worker: work.Worker, contender: str, mode: str) -> None:
    record = worker(("time", plan.Cell("OLMoE", mode, "zipf", 5, contender)))
    assert "reason" not in record and record["seconds"] == 1.0 and 1 <= record["distinct"] <= 16
    assert (contender == "ours") == ("error" in record) and record.get("error", 0.0) < 1


def test_a_kernel_that_fails_is_a_reason_and_not_the_reference(worker: work.Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("too little shared memory")

    monkeypatch.setattr(Kernel, "run", fails)
    record = worker(("time", plan.Cell("OLMoE", "forward", "zipf", 5, "ours")))
    assert record["reason"] == "RuntimeError: too little shared memory"
    with pytest.raises(RuntimeError, match="too little shared memory"):  # which the pool answers for it
        worker(("check", "OLMoE", 3, torch.float32))


def test_the_kernels_are_bound_without_a_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "_BOUND", {})
    work.bind()
    assert type(ops.bound(torch.device("cuda"))) is gpu.GpuImplementation
    assert type(ops.bound(CPU)) is not gpu.GpuImplementation


def test_a_wrong_number_is_called_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layers.LAYERS["Qwen3-30B-A3B"].smaller(40, 24)
    monkeypatch.setattr(correct, "expected", lambda *a, **k: [1.01 * t for t in before(*a, **k)])
    assert max(share for _, share in correct.check_form(layer, 3, torch.float32, CPU)) > 1


before = correct.expected

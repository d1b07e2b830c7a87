"""The GPU benchmark without a GPU: its plan, its processes that die, hang and fail, and what it keeps of a run cut off."""

from __future__ import annotations

import contextlib
import json
import pathlib
import sys
import time
import types
from typing import Any

import pytest
import torch

from benchmarks.gpu import __main__ as benchmark
from benchmarks.gpu import contenders, correct, layers, measure, plan, pool, results, work
from benchmarks.gpu.layers import LAYERS
from benchmarks.gpu.plan import Cell
from benchmarks.gpu.results import Results
from tests.gpu import rehearsal


def found(tasks: str, folder: pathlib.Path, workers: int = 1, patience: float = 30.0, seconds: float = 60.0) -> dict[str, Any]:
    """What became of each word of `tasks`."""
    given = [(word, word) for word in tasks.split()]
    return dict(pool.results(given, rehearsal.rehearse, (str(folder),), workers, time.monotonic() + seconds, patience))


# ---------------------------------------------------------------- processes


def test_a_process_that_dies_costs_its_own_task(tmp_path: pathlib.Path) -> None:
    got = found("a dies b", tmp_path)
    assert got["dies"] == {"reason": "the process died (exit code 7)"}
    assert got["a"]["did"] == "a" and got["b"]["did"] == "b"
    assert got["a"]["process"] != got["b"]["process"]


def test_an_exception_is_an_answer_and_its_process_is_not_used_again(tmp_path: pathlib.Path) -> None:
    got = found("refused b spoilt c", tmp_path)
    assert got["refused"] == {"reason": "ValueError: refused"}
    assert got["b"]["process"] == got["spoilt"]["process"] != got["c"]["process"]
    assert len(list(tmp_path.iterdir())) == 3


def test_a_hang_is_cut_off(tmp_path: pathlib.Path) -> None:
    start = time.monotonic()
    got = found("hangs b", tmp_path, patience=8.0)
    assert got["hangs"] == {"reason": "no answer in time: killed"} and got["b"]["did"] == "b"
    assert time.monotonic() - start < 40


def test_the_end_is_the_end(tmp_path: pathlib.Path) -> None:
    start = time.monotonic()
    assert "hangs" not in found("a hangs b", tmp_path, seconds=12.0)
    assert time.monotonic() - start < 20


def test_processes_that_never_start_end_the_run() -> None:
    with pytest.raises(RuntimeError, match=r"3 processes in a row did not start: the process died \(exit code 5\)"):
        list(pool.results([("a", "a")], rehearsal.never, (), 1, time.monotonic() + 60, 30.0))


def test_no_tasks_start_nothing(tmp_path: pathlib.Path) -> None:
    assert found("", tmp_path, workers=4) == {} and not list(tmp_path.iterdir())


# ---------------------------------------------------------------- the whole run


def test_a_run_survives_all_of_that_and_goes_on_where_it_stopped(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(benchmark, "PATIENCE", 10.0)
    held = Results.at(tmp_path, {"device": "made up"}, {"run": 1})
    assert benchmark.benchmark(held, True, rehearsal.Rehearsal, 2, "NVIDIA H200") == 1
    said = capsys.readouterr().out
    assert "WRONG: CUDA graph at 3.00 of what is allowed" in said
    assert "correct OLMoE T=129 torch.bfloat16: FAILED: the process died (exit code 9)" in said
    assert "forward uniform T=512 grouped_mm: FAILED: RuntimeError: refuses this shape" in said
    assert "forward uniform T=8192 grouped_mm: FAILED: no answer in time: killed" in said
    assert "floor of 500 TFLOP/s and 2.00 TB/s (measured)" in said and "liger takes no part: liger_kernel is not installed" in said
    assert said.index("right: ") < said.index("us, ") and "complete" in said
    kept = json.loads((tmp_path / "results.json").read_text())
    assert kept["environment"] == {"device": "made up"} and kept["runs"] == [{"run": 1}]
    assert {c.key for c in plan.cells(True)} <= set(kept["cells"])
    assert all(r["floor"] > 0 for r in kept["cells"].values() if "seconds" in r)

    again = Results.at(tmp_path, {"device": "made up"}, {"run": 2})
    assert again.cells == kept["cells"] and again.described == [{"run": 1}, {"run": 2}]
    assert benchmark.benchmark(again, True, rehearsal.never, 2, "NVIDIA H200") == 1, "nothing is left, so no process starts"


def test_without_time_for_all_it_says_what_is_left(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(benchmark, "MINUTES", {True: 0.0, False: 0.0})
    held = Results.at(tmp_path, {"device": "made up"}, {})
    assert benchmark.benchmark(held, False, rehearsal.Rehearsal, 2, "NVIDIA H100 80GB HBM3") == 0
    said = capsys.readouterr().out
    assert "floor of 700 TFLOP/s and 3.00 TB/s (H100)" in said and "left: run again to go on" in said


@pytest.mark.parametrize("text", ("", "{", "[]", '{"cells": {}}', '{"environment": {"device": "other"}, "cells": {}, "runs": []}'))
def test_other_results_are_moved_aside(text: str, tmp_path: pathlib.Path) -> None:
    for number in (1, 2):
        (tmp_path / "results.json").write_text(text)
        assert Results.at(tmp_path, {"device": "this"}, {}).cells == {}
        assert (tmp_path / f"results-{number}.json").read_text() == text


def test_the_source_is_part_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    before, read = results.source_key(), pathlib.Path.read_bytes
    assert before == results.source_key()
    monkeypatch.setattr(pathlib.Path, "read_bytes", lambda path: read(path) + b"#" * (path.name == "up.py"))
    assert results.source_key() != before


def test_the_environment_is_written_down(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    card = types.SimpleNamespace(name="NVIDIA H200", total_memory=2**37, major=9, minor=0, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    monkeypatch.setenv("PATH", "")
    measured_in, described = benchmark.environment(torch.device("cuda", 0))
    assert set(measured_in) == {"device", "memory", "torch", "triton", "moecompile"}
    assert measured_in["device"] == "NVIDIA H200" and results.source_key() in measured_in["moecompile"]
    assert described["driver, power limit, SM clock"] == "unknown (FileNotFoundError)"
    assert json.loads(json.dumps([measured_in, described])) == [measured_in, described]


def test_plots_need_no_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert results.plot(Results.at(tmp_path, {}, {})) == []


# ---------------------------------------------------------------- the plan


def test_what_is_measured() -> None:
    cells = list(plan.cells(False))
    assert len({c.key for c in cells}) == len(cells)
    ours = [c for c in cells if c.contender == "ours"]
    assert {c.layer for c in ours} == set(LAYERS) and {c.tokens for c in ours} == set(layers.TOKENS)
    assert {(c.mode, c.routing) for c in ours} == {("forward", "uniform"), ("train", "uniform"), ("forward", "zipf")}
    assert {c.contender for c in cells} == set(contenders.CONTENDERS)
    assert all(c.contender in ("ours", "grouped_mm") for c in cells[: 2 * len(ours)]), "the nearest form comes first"


@pytest.mark.parametrize("smoke", (True, False))
def test_checks_come_first_and_every_timed_kernel_is_compiled_ahead(smoke: bool) -> None:
    tasks = benchmark.prepared(smoke)
    kinds = [task[0] for _, task in tasks]
    assert kinds[0] == "check" and kinds.index("build") == sum(d == torch.bfloat16 for _, _, d in correct.forms(smoke))
    built = {task[1:] for _, task in tasks if task[0] == "build"}
    assert built == {(c.layer, c.mode, c.tokens) for c in plan.cells(smoke) if c.contender == "ours"}


# ---------------------------------------------------------------- the contenders and the clock


def test_a_compiled_contender_is_compiled_for_every_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its layers share one code object, and Dynamo compiles one only so often (8 times)."""
    compiled: list[object] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, backend=backend, options=None, **how: compile_(f, backend=backend, **how))
    layer = LAYERS["Qwen3-30B-A3B"].smaller(16, 16)
    params = layer.parameters(torch.device("cpu"))
    for tokens in range(2, 14):
        given = layers.inputs(layer, tokens, "uniform", torch.device("cpu"), 1)
        contenders.inductor(layer)(given, params)
    assert len(compiled) == 12


@pytest.mark.parametrize("usable", (True, False))
def test_a_failed_cell_says_whether_its_process_may_go_on(usable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = object.__new__(work.Worker)
    monkeypatch.setattr(work, "usable", lambda: usable)

    def fails(*_: object) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(worker, "_time", fails)
    record = worker(("time", Cell("OLMoE", "train", "uniform", 8, "ours")))
    assert record["reason"] == "OutOfMemoryError: CUDA out of memory" and record[pool.SPOILT] is not usable
    monkeypatch.setattr(worker, "_time", lambda cell: {"graphed": False})
    assert worker(("time", Cell("OLMoE", "train", "uniform", 8, "ours")))[pool.SPOILT], "a capture that failed"


class Graph:
    """Stands for CUDA in measure.timed: capture fails with `problem`."""

    def __init__(self, problem: Exception) -> None:
        self.problem = problem

    def __call__(self, *_: object) -> Graph:
        return self

    def __enter__(self) -> None:
        raise self.problem

    def __exit__(self, *_: object) -> None: ...


@pytest.mark.parametrize(
    "problem,graphed", ((RuntimeError("operation not permitted"), False), (torch.OutOfMemoryError("none"), None))
)
def test_only_what_cannot_be_captured_is_timed_without_a_graph(
    problem: Exception, graphed: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = type("Stream", (), {"wait_stream": lambda *_: None})
    for name, value in (
        ("Stream", stream),
        ("current_stream", stream),
        ("stream", lambda _: contextlib.nullcontext()),
        ("synchronize", lambda: None),
        ("CUDAGraph", lambda: type("G", (), {"replay": None})),
        ("graph", Graph(problem)),
    ):
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(measure, "_seconds", lambda run, n: 1e-3 * n)
    if graphed is None:
        with pytest.raises(torch.OutOfMemoryError):
            measure.timed([lambda: None], 0.1)
    else:
        assert measure.timed([lambda: None], 0.1) == measure.Timing(1e-3, 0.0, False)

"""MoE layers on the GPU at hand.

    python -m benchmarks.gpu --out DIR            correctness, then every cell that fits in 9 minutes; run again to go on
    python -m benchmarks.gpu --out DIR --smoke    two minutes
    python -m benchmarks.gpu                      without a GPU: checks itself and says "skipped: no GPU"

First several processes check every form against float64 and compile the kernels that will be timed; then one process times cell
after cell, ours first. The floor is that of moecompile.analysis.cost with the two ceilings measured at the start; router,
permutation and combine are in every time, forward and backward of the experts and the router's weights in "train".
A contender or kernel that fails, hangs or ends its process is recorded with its reason, and the rest goes on.
Needs torch >= 2.11 with its triton; matplotlib for plots.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
import time
from typing import Any

import torch

import moecompile
from benchmarks.gpu import contenders, correct, plan, pool, results
from benchmarks.gpu.layers import LAYERS
from benchmarks.gpu.pool import Record, Task
from benchmarks.gpu.results import Results
from benchmarks.gpu.work import Worker
from moecompile.analysis import cost
from moecompile.analysis.machine import MACHINES, Machine, known
from moecompile.codegen.gpu import triton_missing

MINUTES = {False: 8.5, True: 1.8}
CHECKED = 0.45  # of the time: no more for checks and compilation
PATIENCE = 90.0  # seconds that one task may take
PROCESSES = 12  # that check and compile


def floor(layer: str, tokens: int, mode: str, machine: Machine, hit: float | None) -> float:
    """Least seconds of one perfect kernel; `hit` distinct experts where they were counted."""
    sizes = LAYERS[layer]
    shape = cost.Shape(sizes.hidden, sizes.intermediate, sizes.experts, sizes.top_k, sizes.hidden)
    kernels = [cost.LEAST_FORWARD, *([cost.LEAST_BACKWARD] if mode == "train" else [])]
    return sum(machine.seconds(*cost.work((k,), shape, tokens, save=mode == "train", distinct=hit)[k.name]) for k in kernels)


def environment(device: torch.device) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the results depend on, and what is only written beside them."""
    import triton

    properties = torch.cuda.get_device_properties(device)
    measured_in = {
        "device": properties.name,
        "memory": properties.total_memory,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "moecompile": f"{moecompile.__version__} {results.source_key()}",
    }
    query = ["nvidia-smi", f"--id={device.index}", "--query-gpu=driver_version,power.limit,clocks.max.sm", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        driver = f"unknown ({type(error).__name__})"
    described = {
        "driver, power limit, SM clock": driver,
        "cuda": torch.version.cuda,
        "capability": f"{properties.major}.{properties.minor}",
        "SMs": properties.multi_processor_count,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    return measured_in, described


def prepared(smoke: bool) -> list[Task]:
    """Checks in the first dtype, what the timed cells launch, and checks in the other dtypes."""
    checks = [(f"correct {layer} T={n} {dtype}", ("check", layer, n, dtype)) for layer, n, dtype in correct.forms(smoke)]
    first = [task for task in checks if task[1][3] == correct.DTYPES[0]]
    builds = [(f"build {layer} {mode} T={n}", ("build", layer, mode, n)) for layer, mode, n in plan.builds(smoke)]
    return [*first, *builds, *(task for task in checks if task not in first)]


def said_of(record: Record) -> str:
    """One record in words, its first word what became of it."""
    if "reason" in record:
        return f"FAILED: {record['reason']}"
    if record["kind"] == "correct":
        name, worst = max(record["errors"].items(), key=lambda item: item[1])
        return f"{'WRONG' if worst > 1 else 'right'}: {name} at {worst:.2f} of what is allowed"
    if record["kind"] == "time":
        wrong = "WRONG, " if record.get("error", 0.0) > 1 else ""
        alone = "" if record["graphed"] else ", not in a graph"
        return f"{wrong}{record['seconds'] * 1e6:.1f} us, {record['floor'] / record['seconds']:.0%} of the floor{alone}"
    return "done"


def bad(record: Record) -> bool:
    """A wrong number, or one of ours that failed."""
    ours = record["kind"] != "time" or record["contender"] == "ours"
    return record.get("error", 0.0) > 1 or max(record.get("errors", {"": 0.0}).values()) > 1 or (ours and "reason" in record)


def benchmark(held: Results, smoke: bool, make: Any, workers: int, device_name: str) -> int:
    """0, or 1 where a number was wrong or one of our kernels failed."""
    start = time.monotonic()
    end = start + 60 * MINUTES[smoke]

    def keep(key: str, kind: str, record: Record) -> None:
        held.put(key, {"kind": kind, **record})
        print(f"{time.monotonic() - start:5.0f} s  {key}: {said_of(held.cells[key])}", flush=True)

    tasks = [t for t in prepared(smoke) if t[0] not in held.cells]
    for key, record in pool.results(tasks, make, (), workers, start + CHECKED * (end - start), PATIENCE):
        keep(key, key.split()[0], record)
    unchecked = sum(key not in held.cells for key, _ in tasks)
    if unchecked:
        print(f"{unchecked} checks and compilations left: run again to make them")
    absent = {name: reason for name in contenders.CONTENDERS if (reason := contenders.absent(name))}
    wanted = [c for c in plan.cells(smoke) if c.contender not in absent]
    cells = {c.key: c for c in wanted if c.key not in held.cells}
    timed: list[Task] = [("ceilings", ("ceilings",))] if "ceilings" not in held.cells else []
    for key, record in pool.results([*timed, *((k, ("time", c)) for k, c in cells.items())], make, (), 1, end, PATIENCE):
        if key in cells:
            record = {**dataclasses.asdict(cells[key]), **record}
            if "seconds" in record:
                at = record["layer"], record["tokens"], record["mode"]
                record["floor"] = floor(*at, ceilings(held, device_name), record["distinct"])
        keep(key, "time" if key in cells else key, record)
    print(results.table(held))
    print(results.summary(held))
    machine = ceilings(held, device_name)
    print(f"floor of {machine.flops / 1e12:.0f} TFLOP/s and {machine.bandwidth / 1e12:.2f} TB/s ({machine.name})")
    print("".join(f"{name} takes no part: {reason}\n" for name, reason in absent.items()), end="")
    print("plots:", ", ".join(map(str, results.plot(held))) or "none")
    wrong = [key for key, record in held.cells.items() if bad(record)]
    print("".join(f"bad: {key}: {said_of(held.cells[key])}\n" for key in wrong), end="")
    left = sum(c.key not in held.cells for c in wanted) + unchecked
    print(f"{left} left: run again to go on" if left else "complete", f"after {time.monotonic() - start:.0f} s", flush=True)
    return 1 if wrong else 0


def ceilings(held: Results, device_name: str) -> Machine:
    """The machine as it was measured; as the table has it where that failed."""
    found = held.cells.get("ceilings", {})
    if "flops" in found:
        return dataclasses.replace(MACHINES["H200"], name="measured", flops=found["flops"], bandwidth=found["bandwidth"])
    return known(device_name) or MACHINES["H200"]


def self_check() -> None:
    """All that can be checked without a GPU: the cells, the forms, the floors, the store and the pictures."""
    for smoke in (True, False):
        everything = list(plan.cells(smoke))
        assert len({c.key for c in everything}) == len(everything)
        keys = [key for key, _ in prepared(smoke)]
        assert len(set(keys)) == len(keys)
        for name, _, dtype in correct.forms(smoke):
            LAYERS[name].smaller().spec(dtype)
    for layer in LAYERS.values():
        for contender in ("ours", "grouped_mm"):
            contenders.CONTENDERS[contender](layer)
    with tempfile.TemporaryDirectory() as folder:
        held = Results.at(pathlib.Path(folder), {"device": "none"}, {})
        for i, cell in enumerate(plan.cells(True)):
            least = floor(cell.layer, cell.tokens, cell.mode, MACHINES["H200"], None)
            made_up = {
                "kind": "time",
                **dataclasses.asdict(cell),
                "floor": least,
                "seconds": least * (2 + i),
                "spread": 0.0,
                "graphed": True,
            }
            held.put(cell.key, made_up)
        again = Results.at(pathlib.Path(folder), {"device": "none"}, {})
        assert again.cells == held.cells and len(results.table(again).splitlines()) == 4
        assert results.summary(again)
        results.plot(again)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=pathlib.Path, default=pathlib.Path("out/gpu"), help="folder for results.json and plots (%(default)s)"
    )
    parser.add_argument("--smoke", action="store_true", help="two minutes: one layer, three token counts")
    given = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        self_check()
        print("skipped: no GPU")
        return 0
    if reason := triton_missing():
        print(f"no GPU kernels: {reason}")
        return 2
    measured_in, described = environment(torch.device("cuda", torch.cuda.current_device()))
    held = Results.at(given.out, measured_in, described)
    return benchmark(held, given.smoke, Worker, min(PROCESSES, os.cpu_count() or 1), measured_in["device"])


if __name__ == "__main__":
    sys.exit(main())

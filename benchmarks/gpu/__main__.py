"""MoE layers on the GPU at hand.

    python -m benchmarks.gpu --out DIR            correctness, then every cell that fits in 9 minutes; run again to go on
    python -m benchmarks.gpu --out DIR --smoke    two minutes
    python -m benchmarks.gpu                      without a GPU: checks itself and says "skipped: no GPU"

A cell is (layer, forward or forward and backward, routing, tokens, contender). Cells come in order of interest: ours first.
The floor is that of moecompile.analysis.cost with the two ceilings measured at the start; router, permutation and combine
are in every time, forward and backward of the experts and the router's weights in "train". Needs torch >= 2.11 with its triton.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import correct, layers, measure, results
from benchmarks.gpu.contenders import CONTENDERS
from benchmarks.gpu.layers import LAYERS, TOKENS, Inputs, Layer
from benchmarks.gpu.results import Results
from moecompile.analysis import cost
from moecompile.analysis.machine import MACHINES, Machine

MINUTES = {False: 8.5, True: 1.8}
SECONDS = 0.25  # of replays for a cell
TRAINED = ("Qwen3-30B-A3B", "OLMoE", "Mixtral-8x7B", "gpt-oss-120b")  # the others' weights and gradients do not fit


@dataclasses.dataclass(frozen=True)
class Cell:
    """One measurement."""

    layer: str
    mode: str  # "forward" or "train"
    routing: str
    tokens: int
    contender: str

    @property
    def key(self) -> str:
        return f"{self.layer} {self.mode} {self.routing} T={self.tokens} {self.contender}"


def cells(smoke: bool) -> Iterator[Cell]:
    """In order of interest: the first layers, ours and the nearest form beside it, then the rest."""
    if smoke:
        for tokens in (1, 512, 8192):
            for contender in ("ours", "grouped_mm"):
                yield Cell("Qwen3-30B-A3B", "forward", "uniform", tokens, contender)
        yield Cell("Qwen3-30B-A3B", "train", "uniform", 8192, "ours")
        return
    for contenders in (("ours", "grouped_mm"), ("grouped_mm+inductor", "compiled", "liger")):
        for layer in LAYERS:
            for mode, routing in (("forward", "uniform"), ("train", "uniform"), ("forward", "zipf")):
                if mode == "train" and layer not in TRAINED:
                    continue
                for tokens in TOKENS if mode == "forward" else TOKENS[3:]:
                    if routing == "zipf" and tokens not in (8, 512, 8192):
                        continue
                    for contender in contenders:
                        yield Cell(layer, mode, routing, tokens, contender)


def call_of(cell: Cell, layer: Layer, given: Inputs, params: list[Tensor], function: Any) -> Callable[[], object]:
    """One call to be timed."""
    if cell.mode == "forward":

        def forward() -> object:
            with torch.no_grad():
                return function(given, params)

        return forward
    leaves = [given.x, given.logits, *params]

    def train() -> object:
        return torch.autograd.grad(function(given, params), leaves, given.grad, allow_unused=True)

    return train


def floor(layer: Layer, tokens: int, mode: str, machine: Machine, hit: float | None) -> float:
    """Least seconds of one perfect kernel; `hit` distinct experts where they were counted."""
    shape = cost.Shape(layer.hidden, layer.intermediate, layer.experts, layer.top_k, layer.hidden)
    kernels = [cost.LEAST_FORWARD, *([cost.LEAST_BACKWARD] if mode == "train" else [])]
    return sum(machine.seconds(*cost.work((k,), shape, tokens, save=mode == "train", distinct=hit)[k.name]) for k in kernels)


def run(cell: Cell, params: list[Tensor], machine: Machine, device: torch.device) -> results.Record:
    """Measure one cell. A contender that cannot take part is recorded with its reason."""
    layer, record = LAYERS[cell.layer], {"kind": "time", **dataclasses.asdict(cell)}
    sets = measure.SETS if cell.tokens <= 8192 else 1
    given = [layers.inputs(layer, cell.tokens, cell.routing, device, 10 + i) for i in range(sets)]
    for tensor in (t for g in given for t in (g.x, g.logits)):
        tensor.requires_grad_(cell.mode == "train")
    hit = sum(float(torch.ops.moe.route(g.logits.detach(), g.bias, layer.router.text())[1].unique().numel()) for g in given) / sets
    record["distinct"], record["floor"] = hit, floor(layer, cell.tokens, cell.mode, machine, hit)
    try:
        function = CONTENDERS[cell.contender](layer)
        timing = measure.timed([call_of(cell, layer, g, params, function) for g in given], SECONDS)
    except Exception as problem:  # a contender that is absent, or out of memory: the others go on
        torch.cuda.synchronize()
        return {**record, "reason": f"{type(problem).__name__}: {problem}"[:300]}
    record |= dataclasses.asdict(timing)
    if cell.contender == "ours":
        record["error"] = correct.check_full(layer, given[0], [p.detach() for p in params])
    return record


def environment(device: torch.device) -> dict[str, Any]:
    import triton

    properties = torch.cuda.get_device_properties(device)
    return {"device": properties.name, "torch": torch.__version__, "triton": triton.__version__, "memory": properties.total_memory}


def benchmark(out: pathlib.Path, smoke: bool) -> int:
    """0, or 1 where a number was wrong."""
    from moecompile.codegen.target import bind_all

    start, device = time.monotonic(), torch.device("cuda", torch.cuda.current_device())
    end = start + 60 * MINUTES[smoke]
    bind_all()
    held = Results.at(out, environment(device))
    wrong = 0
    for layer, tokens, dtype in correct.forms(smoke):
        key = f"correct {layer.name} T={tokens} {dtype}"
        if key not in held.cells:
            errors = dict(correct.check_form(layer, tokens, dtype, device))
            held.put(key, {"kind": "correct", "errors": {k: v if v < 1e9 else 1e9 for k, v in errors.items()}})
        worst = max(held.cells[key]["errors"].items(), key=lambda item: item[1])
        wrong += worst[1] > 1
        print(f"{'WRONG' if worst[1] > 1 else 'right'} {key}: {worst[0]} at {worst[1]:.2f} of what is allowed", flush=True)
    if "ceilings" not in held.cells:
        flops, bandwidth = measure.ceilings(device)
        held.put("ceilings", {"kind": "ceilings", "flops": flops, "bandwidth": bandwidth})
    found = held.cells["ceilings"]
    machine = dataclasses.replace(MACHINES["H200"], name="measured", flops=found["flops"], bandwidth=found["bandwidth"])
    print(f"ceilings: {machine.flops / 1e12:.0f} TFLOP/s, {machine.bandwidth / 1e12:.2f} TB/s", flush=True)
    left, params, current = 0, [], ""
    for cell in cells(smoke):
        if cell.key in held.cells:
            continue
        if time.monotonic() > end:
            left += 1
            continue
        if (cell.layer, cell.mode) != current:
            params = []
            gc.collect()
            torch.cuda.empty_cache()
            params = [p.requires_grad_(cell.mode == "train") for p in LAYERS[cell.layer].parameters(device)]
            current = (cell.layer, cell.mode)
        record = run(cell, params, machine, device)
        held.put(cell.key, record)
        wrong += record.get("error", 0.0) > 1
        said = (
            f"{record['seconds'] * 1e6:9.1f} us, {record['floor'] / record['seconds']:.0%} of the floor"
            if "seconds" in record
            else record["reason"]
        )
        print(f"{cell.key}: {said}", flush=True)
    print(results.table(held))
    print(results.summary(held))
    print("plots:", ", ".join(map(str, results.plot(held))) or "none")
    print(f"{left} cells left: run again to measure them" if left else f"complete in {time.monotonic() - start:.0f} s of this run")
    return 1 if wrong else 0


def self_check() -> None:
    """All that can be checked without a GPU: the cells, the forms, the floors, the store and the pictures."""
    for smoke in (True, False):
        everything = list(cells(smoke))
        assert len({c.key for c in everything}) == len(everything)
        for layer, _, dtype in correct.forms(smoke):
            layer.spec(dtype)
    for layer in LAYERS.values():
        for contender in ("ours", "grouped_mm"):
            CONTENDERS[contender](layer)
    with tempfile.TemporaryDirectory() as folder:
        held = Results.at(pathlib.Path(folder), {"device": "none"})
        for i, cell in enumerate(cells(True)):
            least = floor(LAYERS[cell.layer], cell.tokens, cell.mode, MACHINES["H200"], None)
            made_up = {
                "kind": "time",
                **dataclasses.asdict(cell),
                "floor": least,
                "seconds": least * (2 + i),
                "spread": 0.0,
                "graphed": True,
            }
            held.put(cell.key, made_up)
        again = Results.at(pathlib.Path(folder), {"device": "none"})
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
    return benchmark(given.out, given.smoke)


if __name__ == "__main__":
    sys.exit(main())

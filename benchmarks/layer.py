"""One MoE layer: backend="moe" against every Hugging Face form of it, each with and without Inductor.

    python -m benchmarks.layer                            # all cells, about 12 minutes on 2 cores
    python -m benchmarks.layer --layers olmoe --tokens 1 8 --seconds 5
    python -m benchmarks.layer --kernel-only              # moe.experts called directly, no compile

The contenders share their weights and take turns in one process, in random order; figures are medians.  The floor of a cell is
measured in the same run: the time to read the bytes of the weights that are used (and, for gradients, as many as are written)
or to multiply as many numbers with torch.mm of a good size in the same dtype, whichever is longer.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import pathlib
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch._dynamo
import transformers
from torch import Tensor, nn

FORMS = ("eager", "grouped_mm", "batched_mm")
MOST_GATHERED = 6e9  # bytes of weights that batched_mm may gather
SLOW = 4.0  # times the quickest: a contender that is slower after the first rounds takes no part in the rest
HOPELESS = 20.0  # likewise, after the first round


@dataclass(frozen=True)
class Layer:
    """H, F, E, K as in the specs; `family` names the block in transformers."""

    name: str
    family: str
    hidden: int
    intermediate: int
    experts: int
    top_k: int
    dtype: torch.dtype

    def block(self) -> nn.Module:
        """The sparse block of the family with random weights."""
        modeling: Any = getattr(transformers.models, self.family)
        part = {"olmoe": "Olmoe", "mixtral": "Mixtral"}[self.family]
        config = getattr(transformers, f"{part}Config")(
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_experts_per_tok=self.top_k,
            **{"num_experts" if self.family == "olmoe" else "num_local_experts": self.experts},
        )
        block: nn.Module = getattr(getattr(modeling, f"modeling_{self.family}"), f"{part}SparseMoeBlock")(config).to(self.dtype)
        g = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in block.parameters():
                p.normal_(std=p.shape[-1] ** -0.5, generator=g)
        return block

    def flops(self, tokens: int, backward: bool) -> float:
        return (3 if backward else 1) * 2.0 * tokens * self.top_k * 3 * self.hidden * self.intermediate

    def bytes(self, hit: int, backward: bool) -> float:
        expert = 3.0 * self.hidden * self.intermediate * self.dtype.itemsize
        return expert * (2 * hit + self.experts if backward else hit)


LAYERS = (
    Layer("olmoe", "olmoe", 2048, 1024, 64, 8, torch.bfloat16),
    Layer("mixtral", "mixtral", 1024, 3584, 8, 2, torch.float32),
)


def with_form(block: nn.Module, form: str) -> nn.Module:
    """The block in another experts implementation of transformers, on the same weights."""
    twin = copy.deepcopy(block, {id(p): p for p in block.parameters()})
    for module in twin.modules():
        if hasattr(module, "config"):
            module.config = copy.deepcopy(module.config)
            module.config._experts_implementation = form
    return twin


class KernelBlock(nn.Module):
    """The family's own router, then moe.experts."""

    def __init__(self, block: Any, layer: Layer) -> None:
        super().__init__()
        from moecompile.codegen.cpu import CpuImplementation
        from moecompile.ir import expr, ops
        from moecompile.ir.spec import ExpertsSpec, OutOfRange, Weight, WeightOn

        ops.bind("cpu", CpuImplementation())
        E, H, F = layer.experts, layer.hidden, layer.intermediate
        up = [Weight((0,), (E, 2 * F, H), i * F * H, 2 * F * H, H, 1) for i in range(2)]
        down = Weight((1,), (E, H, F), 0, H * F, F, 1)
        activation = ("mul", expr.silu(("in", 0)), ("in", 1))
        sizes = (E, layer.top_k, H, F, H)
        self.gate, self.experts = block.gate, block.experts
        self.spec = ExpertsSpec(
            *sizes, tuple(up), (None, None), activation, down, None, WeightOn.OUTPUT, OutOfRange.SKIP, layer.dtype, layer.dtype
        ).text()

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, weights, ids = self.gate(x)
        params = [self.experts.gate_up_proj, self.experts.down_proj]
        return torch.ops.moe.experts(x, weights, ids, params, [], self.spec, "").view_as(hidden_states)


def contenders(block: nn.Module, layer: Layer, args: argparse.Namespace) -> dict[str, nn.Module]:
    found: dict[str, nn.Module] = {}
    for form in args.forms:
        twin = with_form(block, form)
        found[form] = twin
        if not args.no_inductor:
            found[f"{form} + inductor"] = torch.compile(with_form(block, form))  # type: ignore[assignment]
    if args.kernel_only:
        found["moe"] = KernelBlock(block, layer)
    else:
        found["moe"] = torch.compile(with_form(block, "grouped_mm"), backend="moe")  # type: ignore[assignment]
    return found


def runner(module: nn.Module, x: Tensor, backward: bool) -> Callable[[], Tensor]:
    if not backward:

        def forward() -> Tensor:
            with torch.no_grad():
                return module(x)  # type: ignore[no-any-return]

        return forward
    leaf = x.clone().requires_grad_()
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x.dtype)
    parameters = list(module.parameters())

    def both() -> Tensor:
        leaf.grad = None
        for p in parameters:
            p.grad = None
        module(leaf).backward(grad)
        assert leaf.grad is not None
        return leaf.grad

    return both


def take_turns(
    runs: dict[str, Callable[[], Tensor]], floors: dict[str, Callable[[], Tensor]], seconds: float, least: int
) -> dict[str, list[float]]:
    """Seconds of each run and floor, round by round in random order, for about `seconds` and at least `least` rounds.

    After `least` rounds, runs that take over SLOW times as long as the quickest leave: what is near has more rounds so.  Runs
    that take over HOPELESS times as long leave after the first.
    """
    all_of_them = {**runs, **floors}
    times: dict[str, list[float]] = {name: [] for name in all_of_them}
    order, start, rounds = random.Random(0), time.perf_counter(), 0
    names = list(all_of_them)
    while rounds < least or time.perf_counter() - start < seconds:
        order.shuffle(names)
        for name in names:
            begin = time.perf_counter()
            all_of_them[name]()
            times[name].append(time.perf_counter() - begin)
        rounds += 1
        if rounds in (1, least):
            typical = {name: statistics.median(times[name]) for name in runs}
            most = min(typical.values()) * (SLOW if rounds == least else HOPELESS)
            names = [name for name in names if typical.get(name, 0.0) <= most]
    return times


def floor_runs(layer: Layer) -> dict[str, tuple[Callable[[], Tensor], float]]:
    """A plain read and a plain multiplication, with their bytes and FLOPs."""
    data, n = torch.ones(1 << 27), 2048
    a, b = torch.randn(n, n).to(layer.dtype), torch.randn(n, n).to(layer.dtype)
    return {"read": (lambda: data.sum(), data.numel() * 4.0), "multiply": (lambda: torch.mm(a, b), 2.0 * n**3)}


def measure(
    layer: Layer, block: nn.Module, modules: dict[str, nn.Module], tokens: int, backward: bool, args: argparse.Namespace
) -> dict[str, Any]:
    x = torch.randn(1, tokens, layer.hidden, generator=torch.Generator().manual_seed(tokens)).to(layer.dtype)
    with torch.no_grad():
        ids = block.gate(x[0])[2]  # type: ignore[operator]
    hit = int(ids.unique().numel())
    cell: dict[str, Any] = {"layer": layer.name, "tokens": tokens, "backward": backward, "experts_hit": hit, "skipped": {}}
    runs: dict[str, Callable[[], Tensor]] = {}
    results: dict[str, Tensor] = {}
    gathered = tokens * layer.top_k * 3.0 * layer.hidden * layer.intermediate * layer.dtype.itemsize
    for name, module in modules.items():
        if name.startswith("batched_mm") and gathered * (2 if backward else 1) > MOST_GATHERED:
            cell["skipped"][name] = f"would gather {gathered / 1e9:.1f} GB of weights" + " and as many gradients" * backward
            continue
        run = runner(module, x, backward)
        for _ in range(2):
            results[name] = run()
        runs[name] = run
    oracle = results[args.forms[0]].double()
    cell["difference"] = {n: float((r.double() - oracle).abs().max() / oracle.abs().max()) for n, r in results.items()}
    results.clear()
    floors = floor_runs(layer)
    every = take_turns(runs, {n: run for n, (run, _) in floors.items()}, args.seconds, args.rounds)
    rate = {n: work / statistics.median(every[n]) for n, (_, work) in floors.items()}
    cell["median_s"] = {n: statistics.median(every[n]) for n in runs}
    cell["best_s"] = {n: min(every[n]) for n in runs}
    cell["rounds"] = len(every["moe"])
    cell["read_GB_per_s"], cell["multiply_GFLOP_per_s"] = rate["read"] / 1e9, rate["multiply"] / 1e9
    cell["floor_s"] = max(layer.bytes(hit, backward) / rate["read"], layer.flops(tokens, backward) / rate["multiply"])
    rivals = {n: t for n, t in cell["median_s"].items() if n != "moe"}
    cell["best_rival"] = min(rivals, key=rivals.__getitem__)
    cell["ratio"] = rivals[cell["best_rival"]] / cell["median_s"]["moe"]
    cell["share_of_floor"] = cell["floor_s"] / cell["median_s"]["moe"]
    for p in block.parameters():
        p.grad = None
    return cell


def show(cell: dict[str, Any]) -> None:
    what = "forward + backward" if cell["backward"] else "forward"
    print(f"\n{cell['layer']}, T = {cell['tokens']}, {what}: {cell['experts_hit']} experts hit, {cell['rounds']} rounds")
    ours = cell["median_s"]["moe"]
    for name, t in sorted(cell["median_s"].items(), key=lambda item: item[1]):
        best, apart = cell["best_s"][name], cell["difference"][name]
        print(f"  {name:24} {t * 1e3:10.2f} ms   {t / ours:6.2f} x moe   best {best * 1e3:9.2f}   differs by {apart:.1e}")
    for name, why in cell["skipped"].items():
        print(f"  {name:24} skipped: {why}")
    rates = f"read {cell['read_GB_per_s']:.1f} GB/s, multiply {cell['multiply_GFLOP_per_s']:.0f} GFLOP/s"
    gain = f"{cell['ratio']:.2f} x faster than {cell['best_rival']}"
    print(f"  floor {cell['floor_s'] * 1e3:.2f} ms ({rates}): share {cell['share_of_floor']:.0%}; {gain}", flush=True)


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--layers", nargs="+", default=[layer.name for layer in LAYERS], choices=[layer.name for layer in LAYERS])
    p.add_argument("--tokens", nargs="*", type=int, default=[1, 8, 64, 512], help="token counts, forward")
    p.add_argument("--backward-tokens", nargs="*", type=int, default=[64, 512], help="token counts, forward + backward")
    p.add_argument("--forms", nargs="+", default=list(FORMS), choices=FORMS)
    p.add_argument("--no-inductor", action="store_true", help="leave out the contenders compiled by Inductor")
    p.add_argument("--kernel-only", action="store_true", help='call moe.experts instead of compiling with backend="moe"')
    p.add_argument("--seconds", type=float, default=8.0, help="measuring time of a cell")
    p.add_argument("--rounds", type=int, default=5, help="least number of rounds of a cell")
    p.add_argument("--json", help="write all figures here")
    args = p.parse_args()
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    machine = {"cpu": _cpu(), "threads": torch.get_num_threads(), **versions}
    print(machine)
    cells = []
    for layer in (layer for layer in LAYERS if layer.name in args.layers):
        torch._dynamo.reset()
        block = layer.block()
        modules = contenders(block, layer, args)
        for backward, counts in ((False, args.tokens), (True, args.backward_tokens)):
            for tokens in counts:
                cells.append(measure(layer, block, modules, tokens, backward, args))
                show(cells[-1])
                gc.collect()
        del block, modules
        gc.collect()
    behind = [c for c in cells if c["ratio"] < 1]
    print(f"\nahead of every contender in {len(cells) - len(behind)} of {len(cells)} cells")
    if args.json:
        with open(args.json, "w") as f:
            json.dump({"machine": machine, "cells": cells}, f, indent=1)
    return 1 if behind else 0


def _cpu() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    sys.exit(main())

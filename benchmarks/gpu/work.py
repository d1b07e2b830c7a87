"""What a process of the benchmark does with a task: check a form, compile a layer's kernels, measure the ceilings, time a cell.

The kernels are bound without the fallback that users have: one that fails must be seen, not replaced.
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import correct, layers, measure
from benchmarks.gpu.contenders import CONTENDERS
from benchmarks.gpu.layers import LAYERS, Inputs
from benchmarks.gpu.plan import Cell
from benchmarks.gpu.pool import SPOILT, Record
from moecompile.ir import reference

SECONDS = 0.25  # of replays for a cell
WORST = 1e9  # stands for an infinite error: JSON has no infinity


def bind() -> None:
    from moecompile.codegen.gpu import GpuImplementation
    from moecompile.codegen.target import bind_all
    from moecompile.ir import ops

    bind_all()  # now, so that compiling with backend="moe" does not bind the fallback later
    ops.bind("cuda", GpuImplementation())


def usable() -> bool:
    """Whether this process may go on: a context that met a fault, or a stream left in capture, answers nothing more."""
    try:
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return not torch.cuda.is_current_stream_capturing()
    except RuntimeError:
        return False


def call_of(cell: Cell, given: Inputs, params: list[Tensor], function: Any) -> Callable[[], object]:
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


class Worker:
    """Tasks are (method, arguments..); the weights of the last timed layer are kept for the next."""

    def __init__(self) -> None:
        bind()
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.held: tuple[str, list[Tensor]] = ("", [])

    def __call__(self, task: tuple[Any, ...]) -> Record:
        method, *arguments = task
        return dict(getattr(self, method)(*arguments))

    def check(self, layer: str, tokens: int, dtype: torch.dtype) -> Record:
        errors = dict(correct.check_form(LAYERS[layer].smaller(), tokens, dtype, self.device))
        return {"kind": "correct", "errors": {k: min(v, WORST) for k, v in errors.items()}}

    def build(self, layer: str, mode: str, tokens: int) -> Record:
        from moecompile.codegen import gpu_ahead

        gpu_ahead.build(LAYERS[layer].router, LAYERS[layer].spec(), tokens, mode == "train")
        return {"kind": "build"}

    def ceilings(self) -> Record:
        flops, bandwidth = measure.ceilings(self.device)
        return {"kind": "ceilings", "flops": flops, "bandwidth": bandwidth, SPOILT: not usable()}

    def time(self, cell: Cell) -> Record:
        """Time one cell. A contender that cannot take part, or finds no memory, is recorded with its reason."""
        record: Record = {"kind": "time", **dataclasses.asdict(cell)}
        try:
            record |= self._time(cell)
            spoilt = not record["graphed"]  # a capture that failed leaves the allocator where it was
        except Exception as problem:
            record["reason"], spoilt = f"{type(problem).__name__}: {problem}"[:300], False
        return {**record, SPOILT: not usable() or spoilt}

    def _time(self, cell: Cell) -> Record:
        layer = LAYERS[cell.layer]
        function = CONTENDERS[cell.contender](layer)
        params = self._parameters(cell.layer)
        for p in params:
            p.requires_grad_(cell.mode == "train")
        sets = measure.SETS if cell.tokens <= 8192 else 1
        given = [layers.inputs(layer, cell.tokens, cell.routing, self.device, 10 + i) for i in range(sets)]
        hit = sum(reference.route(layer.router, g.logits, g.bias)[1].unique().numel() for g in given) / sets
        found: Record = {"distinct": hit}
        if cell.contender == "ours":
            found["error"] = min(correct.check_full(layer, given[0], [p.detach() for p in params]), WORST)
        for tensor in (t for g in given for t in (g.x, g.logits)):
            tensor.requires_grad_(cell.mode == "train")
        timing = measure.timed([call_of(cell, g, params, function) for g in given], SECONDS)
        return {**found, **dataclasses.asdict(timing)}

    def _parameters(self, layer: str) -> list[Tensor]:
        if self.held[0] != layer:
            self.held = ("", [])
            usable()
            self.held = (layer, LAYERS[layer].parameters(self.device))
        return self.held[1]

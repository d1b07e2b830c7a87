"""Timing on a GPU: one kernel's launches, as the op makes them, replayed in a CUDA graph.

The op runs once with the configuration in force; the launches of the family are recorded with their arguments and replayed
alone.  Several sets of weights and of routing, uniform to skewed, take turns until they exceed what L2 can hold, so that L2
does not pose as memory.  Numbers are checked against those of the default configuration before they are timed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moecompile.analysis.machine import Machine, default_machine
from moecompile.autotune import bucket
from moecompile.autotune.candidates import closed_form, floor_seconds
from moecompile.autotune.family import BACKWARD, DECODE, LEADER
from moecompile.autotune.key import Problem, problem_of, spec_of
from moecompile.autotune.measure import DeviceLost, Refused
from moecompile.codegen import gpu_choose
from moecompile.codegen.gpu import GpuImplementation, set_config_source
from moecompile.errors import BuildError
from moecompile.ir.spec import ExpertsSpec, RouterSpec
from moecompile.kernels.gpu.config import Config, Kernel

ROTATED = 256 * 1024 * 1024  # bytes of all sets together: five times the L2 of an H200
MOST_SETS = 12
SKEWS = (0.5, 0.0, 1.0)  # exponents of the experts' popularity by rank, taking turns
ROUNDS = 7
ROUND_SECONDS = 2e-3  # least length of one timed round

Launch = Callable[[], None]


def machine_here(device: torch.device) -> Machine:
    """The GPU at hand: of the table, else measured; its limits as the driver has them."""
    target = gpu_choose.target_of(device)
    found = default_machine()
    arch = f"sm_{target.arch}" if isinstance(target.arch, int) else target.arch
    return dataclasses.replace(found, arch=arch, sms=target.processors, block_shared=target.shared_memory)


@dataclass(frozen=True)
class Inputs:
    """One set of a layer's operands; for a router `x` are the logits and the rest is empty."""

    x: Tensor
    weights: Tensor
    ids: Tensor
    params: tuple[Tensor, ...]


def routing(tokens: int, num_experts: int, top_k: int, skew: float, generator: torch.Generator) -> Tensor:
    """ids [T,K], K distinct experts a token, the expert of popularity rank j chosen in proportion to (j + 1)^-skew."""
    device = generator.device
    rank = torch.randperm(num_experts, generator=generator, device=device)
    noise = torch.rand(tokens, num_experts, generator=generator, device=device).clamp_(1e-20).log_().neg_().log_().neg_()
    return (noise - skew * (rank + 1).log()).topk(top_k, 1).indices


def skews_of(problem: Problem) -> list[float]:
    """The skew of each set of inputs: as many sets as it takes to exceed ROTATED bytes, at most MOST_SETS."""
    shape, tokens = problem.shape, _tokens(problem)
    weights = problem.num_experts * problem.intermediate * (problem.projections * problem.hidden + problem.out_features)
    rows = tokens * (problem.num_experts if problem.kernel == "router" else problem.hidden)
    held = (rows if problem.kernel == "router" else rows + weights) * shape.weight_bytes
    return [SKEWS[i % len(SKEWS)] for i in range(min(MOST_SETS, math.ceil(ROTATED / held)))]


def make_inputs(problem: Problem, device: torch.device) -> list[Inputs]:
    """The sets that take turns. MemoryError where they do not fit."""
    try:
        return [_set(problem, device, i, skew) for i, skew in enumerate(skews_of(problem))]
    except torch.OutOfMemoryError as error:
        raise MemoryError(f"a layer of {problem} does not fit beside what holds the GPU's memory: {error}") from error


def _tokens(problem: Problem) -> int:
    return bucket.representative(problem.bucket, problem.top_k, problem.num_experts)


def _set(problem: Problem, device: torch.device, number: int, skew: float) -> Inputs:
    tokens, generator = _tokens(problem), torch.Generator(device).manual_seed(number)
    E, H, F, O, P = problem.num_experts, problem.hidden, problem.intermediate, problem.out_features, problem.projections
    dtype = getattr(torch, problem.dtype)

    ids = routing(tokens, E, problem.top_k, skew, generator)

    def normal(scale: float, *size: int) -> Tensor:
        return torch.empty(size, dtype=dtype, device=device).normal_(std=scale, generator=generator)

    if problem.kernel == "router":
        return Inputs(normal(1.0, tokens, E), ids, ids, ())
    weights = torch.rand(ids.shape, device=device, generator=generator).to(dtype)
    return Inputs(normal(1.0, tokens, H), weights, ids, (normal(H**-0.5, E, P * F, H), normal(F**-0.5, E, O, F)))


@contextlib.contextmanager
def in_force(problem: Problem, config: Config) -> Iterator[None]:
    """The family runs with `config`; a family that shares its row tiles follows."""
    leader = LEADER.get(problem.kernel, problem.kernel)
    tiled_alike = {leader, *(f for f, its in LEADER.items() if its == leader)} if leader in LEADER.values() else set()

    def source(family: str, spec: ExpertsSpec | RouterSpec, tokens: int, target: gpu_choose.Target) -> Config | None:
        if family == problem.kernel:
            return config
        other = problem_of(family, spec, tokens) if family in tiled_alike else None
        return None if other is None else closed_form(other, target, config.block_m)

    set_config_source(source)
    try:
        yield
    finally:
        set_config_source(None)


@contextlib.contextmanager
def recorded(family: str) -> Iterator[list[Launch]]:
    """Every launch of the family's kernels, ready to be made again."""
    found: list[Launch] = []
    run = Kernel.run

    def note(kernel: Kernel, function: str, grid: tuple[int, ...], *args: Any) -> None:
        if kernel.family == family:
            found.append(lambda: run(kernel, function, grid, *args))
        run(kernel, function, grid, *args)

    Kernel.run = note  # type: ignore[method-assign, assignment]
    try:
        yield found
    finally:
        Kernel.run = run  # type: ignore[method-assign]


class Device:
    """A timer on `device`: a GPU, or the CPU where Triton's interpreter runs the kernels (for tests: it says nothing of speed)."""

    kind = "device"

    def __init__(self, machine: Machine, device: torch.device) -> None:
        self.machine, self.device = machine, device
        self._held: tuple[Problem, list[Inputs], list[list[Tensor]]] | None = None

    def now(self) -> float:
        return time.monotonic()

    def floor(self, problem: Problem) -> float:
        hit = [len(self._routing(problem, i, skew).unique()) for i, skew in enumerate(skews_of(problem))]
        return floor_seconds(problem, self.machine, sum(hit) / len(hit))

    def _routing(self, problem: Problem, number: int, skew: float) -> Tensor:
        """The ids of a set, without its weights."""
        generator = torch.Generator(self.device).manual_seed(number)
        return routing(_tokens(problem), problem.num_experts, problem.top_k, skew, generator)

    def measure(self, problem: Problem, config: Config) -> float:
        ready = self._ready(problem, config)
        return statistics.median(self._sample(ready) for _ in range(ROUNDS))

    def versus(self, problem: Problem, a: Config, b: Config) -> tuple[float, float]:
        both = [self._ready(problem, c) for c in (a, b)]
        times: tuple[list[float], list[float]] = ([], [])
        for turn in range(2 * ROUNDS):
            for i in (0, 1) if turn % 2 else (1, 0):
                times[i].append(self._sample(both[i]))
        return statistics.median(times[0]), statistics.median(times[1])

    def _sets(self, problem: Problem) -> tuple[list[Inputs], list[list[Tensor]]]:
        """The inputs, and what the op gives for each with the default configuration."""
        if self._held is None or self._held[0] != problem:
            self._held = None  # frees the last problem's before these are made
            inputs = make_inputs(problem, self.device)
            try:
                wanted = [_outputs(problem, one) for one in inputs]
            except Exception as error:
                if _reason(error) is None:
                    raise
                raise BuildError(f"{problem.kernel} does not run untuned on a layer of {problem}: {error}") from error
            self._held = (problem, inputs, wanted)
        return self._held[1], self._held[2]

    def _ready(self, problem: Problem, config: Config) -> tuple[Launch, int]:
        """What launches the family's kernels on every set once, and how many sets there are. Refused, DeviceLost."""
        inputs, wanted = self._sets(problem)  # what fails here is not the configuration's fault
        try:
            with in_force(problem, config), recorded(problem.kernel) as launches:
                for one, right in zip(inputs, wanted, strict=True):
                    if not _alike(_outputs(problem, one), right):
                        raise Refused("wrong")
            assert launches, f"the op launched no kernel of family {problem.kernel}"
            return self._graph(launches), len(inputs)
        except Exception as error:
            reason = _reason(error)
            if reason is None:
                raise
            self._check_alive(error)
            raise Refused(reason) from error

    def _graph(self, launches: Sequence[Launch]) -> Launch:
        def all_of_them() -> None:
            for launch in launches:
                launch()

        if self.device.type != "cuda":
            return all_of_them
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            all_of_them()
        kept = (graph, launches)  # the graph writes to the tensors that the launches hold
        return lambda: kept[0].replay()

    def _sample(self, ready: tuple[Launch, int]) -> float:
        """Seconds of the launches of one set, in a round of at least ROUND_SECONDS."""
        launch, sets = ready
        if self.device.type != "cuda":
            start = time.perf_counter()
            launch()
            return (time.perf_counter() - start) / sets
        passes = 1
        while True:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(passes):
                launch()
            end.record()
            end.synchronize()
            seconds = float(begin.elapsed_time(end)) / 1e3
            if seconds >= ROUND_SECONDS:
                return seconds / passes / sets
            passes = max(passes + 1, int(passes * 1.2 * ROUND_SECONDS / max(seconds, 1e-6)))

    def _check_alive(self, error: Exception) -> None:
        if self.device.type == "cuda":
            try:
                torch.cuda.synchronize(self.device)
            except RuntimeError:
                raise DeviceLost(str(error)) from error


def _outputs(problem: Problem, one: Inputs) -> list[Tensor]:
    """What the op that holds the family gives, forward or backward."""
    op, spec = GpuImplementation(), spec_of(problem)
    text = spec.text()
    if isinstance(spec, RouterSpec):
        return [op.route(one.x, None, text)[0]]
    given = (one.x, one.weights, one.ids, one.params, (), text, "")
    if problem.kernel in BACKWARD:
        out, saved = op.experts_train(*given)
        return op.experts_bwd(torch.ones_like(out), *given, saved, (True,) * 4)
    decodes = gpu_choose.decodes(spec, one.x.shape[0])
    assert decodes or problem.kernel not in DECODE, f"{one.x.shape[0]} tokens do not take the decode path"
    return [op.experts(*given) if decodes == (problem.kernel in DECODE) else op.experts_train(*given)[0]]


def _alike(found: list[Tensor], wanted: list[Tensor]) -> bool:
    """Whether two results differ by no more than the order of their sums explains."""
    for a, b in zip(found, wanted, strict=True):
        eps = torch.finfo(b.dtype).eps
        difference, scale = (a.float() - b.float()), b.float()
        if not (difference.norm() <= 4 * eps * scale.norm() and difference.abs().max() <= 16 * eps * scale.abs().max()):
            return False
    return True


def _reason(error: Exception) -> str | None:
    """One of entry.REFUSED for what a configuration may fail with, None for what is not its fault."""
    if isinstance(error, Refused):
        return error.reason
    if isinstance(error, torch.OutOfMemoryError):
        return "memory"
    kind = type(error).__name__
    if kind == "OutOfResources":
        return "resources"
    if isinstance(error, BuildError) or kind in ("CompilationError", "PTXASError"):
        return "compile"
    return "launch" if isinstance(error, RuntimeError) else None

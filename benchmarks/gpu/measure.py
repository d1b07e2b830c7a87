"""Times by CUDA events over replays of a CUDA graph that holds several calls with different tokens."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

SETS = 4  # calls in a graph, each with its own tokens, so that one call's experts are not all in L2 for the next
ROUNDS = 5


@dataclass(frozen=True)
class Timing:
    """Median seconds of one call, the relative half range of the rounds, and whether a graph was replayed."""

    seconds: float
    spread: float
    graphed: bool


def timed(calls: Sequence[Callable[[], object]], budget: float) -> Timing:
    """Time `calls` (each one call of the contender); about `budget` seconds, warm-up and capture apart."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            for call in calls:
                call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        run, graphed = graph.replay, True
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # a contender that waits for the device cannot be captured; it is timed as it runs
        torch.cuda.synchronize()

        def run() -> None:
            for call in calls:
                call()

        graphed = False
    once = _seconds(run, 1)
    repeats = max(1, min(200, int(budget / ROUNDS / max(once, 1e-6))))
    rounds = [_seconds(run, repeats) / repeats / len(calls) for _ in range(ROUNDS)]
    middle = statistics.median(rounds)
    return Timing(middle, (max(rounds) - min(rounds)) / 2 / middle, graphed)


def _seconds(run: Callable[[], object], repeats: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(repeats):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def ceilings(device: torch.device) -> tuple[float, float]:
    """(FLOP/s of a bf16 matmul of 8192^3, bytes/s of a device copy of 2 GiB), the best of ten."""
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.empty(2**31, device=device, dtype=torch.int8)
    target = torch.empty_like(source)
    out = torch.empty_like(a)
    for _ in range(3):
        torch.mm(a, b, out=out)
        target.copy_(source)
    torch.cuda.synchronize()
    matmul = min(_seconds(lambda: torch.mm(a, b, out=out), 1) for _ in range(10))
    copy = min(_seconds(lambda: target.copy_(source), 1) for _ in range(10))
    return 2 * 8192**3 / matmul, 2 * source.numel() / copy

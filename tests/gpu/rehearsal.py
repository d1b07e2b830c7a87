"""Stand-ins for the GPU benchmark's work, importable by its processes: they answer, fail, hang and die without a GPU."""

from __future__ import annotations

import os
import pathlib
import time
from collections.abc import Callable
from typing import Any

from benchmarks.gpu.pool import SPOILT, Record


class Rehearsal:
    """Answers as benchmarks.gpu.work.Worker does, at once and with made-up numbers; some tasks go wrong in every way."""

    def __call__(self, task: tuple[Any, ...]) -> Record:
        method, *arguments = task
        if method == "check":
            layer, tokens, _ = arguments
            if (layer, tokens) == ("OLMoE", 129):
                os._exit(9)  # as a driver that gives up would
            return {"kind": "correct", "errors": {"training": 0.25, "CUDA graph": 3.0 if layer == "Mixtral-8x7B" else 0.0}}
        if method == "build":
            return {"kind": "build"}
        if method == "ceilings":
            return {"kind": "ceilings", "flops": 5e14, "bandwidth": 2e12}
        cell = arguments[0]
        if cell.contender == "grouped_mm" and cell.tokens == 512:
            raise RuntimeError("refuses this shape")
        if cell.contender == "grouped_mm" and cell.tokens == 8192:
            time.sleep(1000)
        return {"kind": "time", "distinct": 8.0, "seconds": 1e-3, "spread": 0.0, "graphed": True, "error": 0.5}


def rehearse(folder: str) -> Callable[[Any], Record]:
    """Work by the first letter of a task: what it did is noted in a file of its process."""
    pathlib.Path(folder, f"{os.getpid()}").touch()

    def work(task: str) -> Record:
        if task.startswith("d"):
            os._exit(7)
        if task.startswith("h"):
            time.sleep(1000)
        if task.startswith("r"):
            raise ValueError("refused")
        return {"did": task, "process": os.getpid(), SPOILT: task.startswith("s")}

    return work


def never(*_: object) -> Callable[[Any], Record]:
    """A process that dies while it starts."""
    os._exit(5)

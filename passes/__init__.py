"""Passes over the Dynamo graph: one file each, found by listing the folder.

A pass is a function (GraphModule, Context) -> GraphModule with a kebab-case name, a phase, and what it must come after.
"""

from __future__ import annotations

import enum
import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch._dynamo.exc import RestartAnalysis, SkipFrame

from moecompile.errors import VerifyError
from moecompile.ir import verifier
from moecompile.ir.spec import ExpertsSpec, RouterSpec

# How Dynamo and Inductor ask for another trace, and what no fallback can mend.
CONTROL_FLOW = (RestartAnalysis, SkipFrame, MemoryError)


class Phase(enum.IntEnum):
    """When a pass runs."""

    REWRITE = 1  # moe.* ops take the place of what they compute


@dataclass
class Entry:
    """What became of one layer, or of something that nearly was one: a line of explain()."""

    status: str  # "fused" or "declined"
    node: str
    form: str = ""
    spec: ExpertsSpec | None = None
    router: RouterSpec | None = None
    reason: str = ""  # why declined
    router_reason: str = ""  # why the router was left as it is
    statistics: str = ""  # what balancing losses read of the router, where its kernel sums it
    statistics_reason: str = ""  # why it does not
    stack_trace: str = ""
    region: str = ""
    kernel: str = ""  # what runs it
    op: fx.Node | None = None  # the moe.experts node: names are unique only within a graph, and child graphs have their own


@dataclass
class Context:
    """What passes are told and what they tell: whether a kernel would run a spec, and the report."""

    supports_experts: Callable[[ExpertsSpec, torch.device, bool], str | None] = lambda spec, device, train: None
    supports_router: Callable[[RouterSpec, torch.device], str | None] = lambda spec, device: None
    supports_statistics: Callable[[RouterSpec, torch.device], str | None] = lambda spec, device: None
    kernel: Callable[[torch.device], str] = lambda device: ""
    train: bool = False
    router: bool = True
    policy: str = ""  # the options that a kept layer runs under: part of its name, so that models do not share them
    entries: list[Entry] = field(default_factory=list)
    regions: dict[str, fx.GraphModule | None] = field(default_factory=dict)  # name -> a layer's original nodes, if they stand alone


@dataclass(frozen=True)
class Pass:
    """A named step of the compiler."""

    name: str
    phase: Phase
    after: tuple[str, ...]
    function: Callable[[fx.GraphModule, Context], fx.GraphModule]
    exact: bool  # True where it changes no rounding

    def run(self, gm: fx.GraphModule, context: Context | None = None) -> fx.GraphModule:
        """The graph after the pass, verified. VerifyError names the pass, whatever went wrong in it."""
        try:
            result = self.function(gm, context if context is not None else Context())
        except CONTROL_FLOW:
            raise
        except Exception as e:
            raise VerifyError(f"in {self.name}: {type(e).__name__}: {e}") from e
        try:
            verifier.verify(result)
        except Exception as e:
            raise VerifyError(f"after {self.name}: {e}") from e
        return result


PASSES: dict[str, Pass] = {}


def graph_pass(name: str, phase: Phase, after: tuple[str, ...] = (), exact: bool = False) -> Callable[[Any], Any]:
    """Register a function as a pass."""

    def add(function: Callable[[fx.GraphModule, Context], fx.GraphModule]) -> Callable[..., fx.GraphModule]:
        PASSES[name] = Pass(name, phase, after, function, exact)
        return function

    return add


def pipeline() -> list[Pass]:
    """All passes in the order in which they run: by phase, then after what they need, then by name."""
    left = sorted(PASSES.values(), key=lambda p: (p.phase, p.name))
    done: list[Pass] = []
    while left:
        ready = next(p for p in left if all(a in {d.name for d in done} for a in p.after))
        done.append(ready)
        left.remove(ready)
    return done


for _module in sorted(m.name for m in pkgutil.iter_modules(__path__)):
    importlib.import_module(f"moecompile.passes.{_module}")

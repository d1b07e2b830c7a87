"""What the backend made of a module: the one place in the tests that knows the shape of its reports."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._dynamo.utils import counters

from moecompile import report
from moecompile.backend import moe


@dataclass(frozen=True)
class Layer:
    """One MoE layer, or near miss. `router`: the router was fused too. `reason`: why it, or its router, was not."""

    fused: bool
    router: bool
    reason: str
    form: str


def compiled(module: nn.Module, inner: str = "eager", kernels: str = "reference", **settings: Any) -> Any:
    """The module compiled by the backend, everything compiled before forgotten, Dynamo's counters at 0.

    inner: what compiles the rest of the graph.  kernels: "reference" tests what was recognised and rewritten, without
    building a kernel for each of a thousand specs; "auto" is what users get.  `settings` are torch.compile's.
    """
    torch._dynamo.reset()
    counters.clear()
    options = {"inner": inner, "kernels": kernels, "fallback": "silent", "strict": True, **settings.pop("options", {})}
    return torch.compile(module, backend=moe, options=options, **settings)


def layers() -> list[Layer]:
    """Every layer of every graph since compiled()."""
    return [Layer(e.status == "fused", e.router is not None, e.reason or e.router_reason, e.form) for e in report.last_reports()]


def fused() -> list[Layer]:
    return [layer for layer in layers() if layer.fused]


def reasons() -> list[str]:
    """Why layers were declined, or their routers left as they are."""
    return [layer.reason for layer in layers() if not (layer.fused and layer.router)]


def statistics() -> list[str]:
    """What the router's op sums for balancing losses, layer by layer."""
    return [e.statistics for e in report.last_reports()]


def statistics_reasons() -> list[str]:
    """Why it does not sum more."""
    return [e.statistics_reason for e in report.last_reports()]

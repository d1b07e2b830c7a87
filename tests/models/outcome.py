"""What the backend made of a module: the one place in the tests that knows the shape of its reports."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moecompile import report


@dataclass(frozen=True)
class Layer:
    """One MoE layer, or near miss. `router`: the router was fused too. `reason`: why it, or its router, was not."""

    fused: bool
    router: bool
    reason: str
    form: str


def compiled(module: nn.Module, inner: str = "eager", **settings: Any) -> Any:
    """The module compiled by the backend, everything compiled before forgotten. `settings` are torch.compile's; inner is
    what compiles the rest of the graph."""
    torch._dynamo.reset()
    options = {"inner": inner, "fallback": "silent", "strict": True, **settings.pop("options", {})}
    return torch.compile(module, backend="moe", options=options, **settings)


def layers() -> list[Layer]:
    """Every layer of every graph since compiled()."""
    return [
        Layer(entry.status == "fused", bool(entry.router_fused), entry.reason or "", str(entry.form))
        for one in report.last_reports()
        for entry in one.layers
    ]


def fused() -> list[Layer]:
    return [layer for layer in layers() if layer.fused]


def reasons() -> list[str]:
    """Why layers were declined, or their routers left as they are."""
    return [layer.reason for layer in layers() if not (layer.fused and layer.router)]


def quiet() -> None:
    """Dynamo warns once about functools.lru_cache inside transformers: not ours to mend."""
    warnings.filterwarnings("ignore", message=".*lru_cache.*")

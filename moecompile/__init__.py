"""moecompile: a torch.compile backend for Mixture-of-Experts models.  torch.compile(model, backend="moe")."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moecompile.report import Report

_root = pathlib.Path(__file__).resolve().parent.parent
if (_root / "passes" / "__init__.py").exists() and (_root / "kernels" / "__init__.py").exists():
    __path__.append(str(_root))  # run from a checkout: moecompile.passes and moecompile.kernels lie beside this folder

__version__ = "0.1.0"


def explain(
    model: Callable[..., Any], *args: Any, out: str | None = None, options: dict[str, Any] | None = None, **kwargs: Any
) -> Report:
    """Print what the backend makes of model(*args, **kwargs): each MoE layer, fused and how, or left alone and why.

    The report is returned, and written to `out` (.json or .html).  The model runs once, its dense parts uncompiled.
    """
    from moecompile import report

    found = report.explain(model, *args, out=out, options=options, **kwargs)
    print(found)
    return found

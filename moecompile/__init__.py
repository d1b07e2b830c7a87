"""moecompile: a torch.compile backend for Mixture-of-Experts models.  torch.compile(model, backend="moe")."""

from __future__ import annotations

import pathlib

_root = pathlib.Path(__file__).resolve().parent.parent
if (_root / "passes" / "__init__.py").exists() and (_root / "kernels" / "__init__.py").exists():
    __path__.append(str(_root))  # run from a checkout: moecompile.passes and moecompile.kernels lie beside this folder

__version__ = "0.1.0"

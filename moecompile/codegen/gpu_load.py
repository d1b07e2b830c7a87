"""Generated texts become kernels: is there a Triton that can run them, import of a text, the device they launch on."""

from __future__ import annotations

import contextlib
from functools import lru_cache
from typing import Any

import torch

from moecompile.errors import BuildError
from moecompile.kernels.gpu.config import Config, Kernel

LEAST_TRITON = (3, 5)


@lru_cache(1)
def triton_missing() -> str | None:
    """Why no Triton kernel can be built here, or None."""
    try:
        import triton
    except Exception as error:  # a broken installation raises anything
        return f"needs triton, which does not import here: {type(error).__name__}: {error}"
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < LEAST_TRITON:
        return f"needs triton >= {'.'.join(map(str, LEAST_TRITON))}, got {triton.__version__}"
    return None


@lru_cache(4096)
def load(family: str, config: Config, text: str, processors: int = 1) -> Kernel:
    """The kernel of a text. BuildError where it cannot be written or imported."""
    from torch._inductor.codecache import PyCodeCache

    try:
        return Kernel(family, config, text, PyCodeCache.load(text), processors)
    except (OSError, ImportError, SyntaxError, RuntimeError) as error:
        raise BuildError(f"the {family} kernel cannot be loaded: {type(error).__name__}: {error}") from error


def on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Launches inside go to this device."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()

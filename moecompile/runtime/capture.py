"""Dynamo settings that hold while this backend's models are traced, and for no other.

A loop over experts calls nonzero, whose size depends on data: without two settings Dynamo breaks the graph there.  They are
global, so they are set around each call of a compiled function (some 5 us), by a hook that torch.compile() would drop on
the way from the backend: `install` keeps it.  Where the settings turn a model that compiles in pieces into one that raises,
the frame is traced again without them.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch._dynamo
from torch._dynamo import convert_frame, eval_frame

from moecompile.errors import Unsupported

config = torch._dynamo.config
log = logging.getLogger("moecompile.capture")
SETTINGS = {"capture_dynamic_output_shape_ops": True, "capture_scalar_outputs": True}


class Scope:
    """Entered around every call of a compiled function: it must cost next to nothing (config.patch() costs 4-5x more)."""

    __slots__ = ("undo",)
    enter = staticmethod(config._make_closure_patcher(**SETTINGS))

    def __enter__(self) -> None:
        self.undo = Scope.enter()

    def __exit__(self, *_: object) -> None:
        self.undo()


def _is_ours(backend: Any, ours: Callable[..., Any]) -> bool:
    for _ in range(8):
        if backend is ours:
            return True
        backend = getattr(backend, "compiler_fn", None) or getattr(backend, "_torchdynamo_orig_backend", None)
        if backend is None:
            return False
    return False


def install(ours: Callable[..., Any]) -> None:
    """Make torch.compile() keep `ours.backend_ctx_ctor`, and retry frames that the settings broke. Safe to call twice."""
    if not hasattr(eval_frame.get_compiler_fn, "keeps_backend_ctx"):
        eval_frame.get_compiler_fn = _keeping_ctx(eval_frame.get_compiler_fn, ours)
    if not hasattr(convert_frame.ConvertFrame.__call__, "retries_without_capture"):
        convert_frame.ConvertFrame.__call__ = _retrying(convert_frame.ConvertFrame.__call__, ours)  # type: ignore[method-assign]


def _keeping_ctx(original: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def get_compiler_fn(compiler_fn: Any) -> Any:
        wrapped = original(compiler_fn)
        if _is_ours(compiler_fn, ours) and callable(wrapped):
            wrapped.backend_ctx_ctor = Scope  # type: ignore[attr-defined]
        return wrapped

    get_compiler_fn.keeps_backend_ctx = True  # type: ignore[attr-defined]
    return get_compiler_fn


def _retrying(original: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return original(self, *args, **kwargs)
        except Exception as e:
            meant = isinstance(getattr(e, "inner_exception", e), Unsupported)  # options={"fallback": "error"}
            if meant or not config.capture_scalar_outputs or not _is_ours(getattr(self, "_torchdynamo_orig_backend", None), ours):
                raise
            log.info("traced again without data-dependent capture: %s", str(e).splitlines()[0])
            off = config._make_closure_patcher(**dict.fromkeys(SETTINGS, False))()
            try:
                return original(self, *args, **kwargs)
            finally:
                off()

    call.retries_without_capture = True  # type: ignore[attr-defined]
    return call

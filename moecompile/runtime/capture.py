"""Dynamo settings that hold while this backend's models are traced, and for no other.

A loop over experts calls nonzero, whose size depends on data: without two settings Dynamo breaks the graph there.  They are
global, so they are set around the tracing of each frame of ours; a call of what is compiled already pays nothing.  Where the
settings did no good, the frame is traced again as the user's own settings have it:

    they turned a model that compiles in pieces into one that raises          any exception but a refusal of ours
    sizes that depend on data are in the graph, and no layer or too few sizes   Retrace: what has no MoE compiles as with Inductor
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch._dynamo
from torch import fx
from torch._dynamo import convert_frame
from torch._subclasses.fake_tensor import FakeTensor

from moecompile.errors import Unsupported, VerifyError

config = torch._dynamo.config
log = logging.getLogger("moecompile.capture")
SETTINGS = {"capture_dynamic_output_shape_ops": True, "capture_scalar_outputs": True}
_switch_on = config._make_closure_patcher(**SETTINGS)
_trying: ContextVar[bool] = ContextVar("trying", default=False)


class Retrace(Exception):
    """The frame is to be traced without our settings; no user meets it."""


def install(ours: Callable[..., Any]) -> None:
    """Make Dynamo trace frames for the backend `ours` with our settings. Safe to call twice."""
    if not hasattr(convert_frame.ConvertFrame.__call__, "sets_capture"):
        convert_frame.ConvertFrame.__call__ = _with_settings(convert_frame.ConvertFrame.__call__, ours)  # type: ignore[method-assign]


def unwanted(gm: fx.GraphModule, layers: bool) -> bool:
    """Whether the frame of a rewritten graph is better traced by the user's own settings: ours, not the user's, captured sizes
    that depend on data, and no layer was met; or Dynamo took a size for the one it saw, and others would raise."""
    if not _trying.get():
        return False
    left = {symbol for n in gm.graph.nodes for symbol in n.meta.get("unbacked_bindings") or ()}
    if not left or not layers:
        return bool(left)
    values = (n.meta.get("example_value") for n in gm.graph.nodes)
    env: Any = next((v.fake_mode.shape_env for v in values if isinstance(v, FakeTensor)), None)
    return env is not None and any(symbol in env.replacements or env.deferred_runtime_asserts.get(symbol) for symbol in left)


@contextlib.contextmanager
def _settings_on() -> Iterator[None]:
    undo, token = _switch_on(), _trying.set(True)
    try:
        yield
    finally:
        _trying.reset(token)
        undo()


def _with_settings(original: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        wanted = all(getattr(config, name) for name in SETTINGS)  # by the user, or by a trace around this one
        if wanted or not _is_ours(getattr(self, "_torchdynamo_orig_backend", None), ours):
            return original(self, *args, **kwargs)
        try:
            with _settings_on():
                return original(self, *args, **kwargs)
        except Exception as e:
            inner = getattr(e, "inner_exception", e)
            if isinstance(inner, (Unsupported, VerifyError, MemoryError)):
                raise
            said = str(inner).strip().splitlines()[:1]
            log.info("traced again without data-dependent capture: %s", said[0] if said else type(inner).__name__)
        return original(self, *args, **kwargs)

    call.sets_capture = True  # type: ignore[attr-defined]
    return call


def _is_ours(backend: Any, ours: Callable[..., Any]) -> bool:
    """Whether `ours` is what torch.compile, its debugging tools and its DDP optimizer wrapped."""
    for _ in range(8):
        if backend is ours or backend is None:
            break
        backend = next((inner for name in _WRAPPED if (inner := getattr(backend, name, None)) is not None), None)
    return backend is ours


_WRAPPED = ("compiler_fn", "_torchdynamo_orig_backend", "backend_compile_fn", "__self__")

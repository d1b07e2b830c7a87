"""torch.compile(model, backend="moe"): the whole flow.

    capture    Dynamo traces with its data-dependent settings on, for this backend only        runtime.capture
    rewrite    fuse-experts, fuse-router, fuse-statistics, join-router on a copy of the graph; the verifier after each   passes
    lower      Inductor compiles the rest; each moe.* op runs its device's kernel when called     codegen, runtime
    report     what matched, what did not and why                                                 report

Nothing here can make a program fail that would have run without it: the passes work on a copy, and where they or the
compilation of their result fail, the original graph is compiled (option `strict`: the failure is raised).
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from moecompile import __version__, config, report
from moecompile.codegen import build_cpp, target
from moecompile.config import Settings
from moecompile.errors import Unsupported, VerifyError
from moecompile.ir import ops, surgery
from moecompile.passes import CONTROL_FLOW, Context, pipeline
from moecompile.runtime import backward, capture, fallback, kept_memory

log = logging.getLogger("moecompile.backend")


def moe(
    gm: fx.GraphModule, example_inputs: list[Any], *, mode: str | None = None, options: dict[str, Any] | None = None, **_: Any
) -> Callable[..., Any]:
    """The backend torch.compile calls for each graph. May be called twice for one graph; ValueError for bad options."""
    settings = config.resolve(mode, options)
    candidate = None
    try:
        bind()
        candidate = rewrite(gm, settings)
        if candidate is not None:
            return lower(candidate, example_inputs, settings)
    except (Unsupported, capture.Retrace):
        raise
    except CONTROL_FLOW:
        if candidate is not None:
            report.withdraw()
        raise
    except Exception as error:
        doing = "rewriting" if candidate is None else "compiling the rewritten graph"
        if settings.strict or settings.fallback == "error":
            raise VerifyError(f"{doing} failed: {type(error).__name__}: {error}") from error
        if candidate is not None:
            report.decline_last(f"{doing} failed: {type(error).__name__}: {str(error).partition(chr(10))[0]}")
        report.internal_failure(doing, error, settings)
    return lower(gm, example_inputs, settings)


@functools.cache
def bind() -> None:
    """Bind each device's kernels to the moe.* ops, and what was tuned for this GPU to the kernels; once a process."""
    target.bind_all()
    if torch.cuda.is_available():
        from moecompile.autotune import source

        source.install()


def rewrite(gm: fx.GraphModule, settings: Settings) -> fx.GraphModule | None:
    """A rewritten copy of gm, or None where there is nothing to rewrite."""
    context = Context(
        supports_experts=lambda spec, device, train: target.supports_experts(spec, device, train, settings.kernels),
        supports_router=lambda spec, device: target.supports_router(spec, device, settings.kernels),
        supports_statistics=lambda spec, device: target.supports_statistics(spec, device, settings.kernels),
        kernel=lambda device: target.kernel_name(device, settings.kernels),
        train=torch.is_grad_enabled(),
        router=settings.router,
        policy=f"{settings.fallback} {settings.verify} {settings.kernels}",
    )
    candidate = surgery.copy_of(gm)
    for graph_pass in pipeline():
        candidate = graph_pass.run(candidate, context)
    for e in context.entries:
        e.op = None  # the report outlives the graph
    if capture.unwanted(candidate, layers=bool(context.entries)):
        for e in context.entries:
            e.status, e.reason = "declined", "other sizes in the graph depend on data, and capturing them would fix them"
        _declare(gm, gm, context, settings)
        raise capture.Retrace
    _declare(gm, candidate, context, settings)
    if not any(e.status == "fused" for e in context.entries):
        return None
    reference = settings.kernels == "reference"
    for name, original in context.regions.items():
        fallback.register(name, None if reference else original, settings.fallback, settings.verify, reference)
    for e in context.entries:
        if e.router is not None:
            fallback.register("route:" + e.router.text(), None, settings.fallback, settings.verify, reference)
    return candidate


def _declare(gm: fx.GraphModule, candidate: fx.GraphModule, context: Context, settings: Settings) -> None:
    """Report what became of the layers; Unsupported where one was declined and that is an error."""
    report.add(gm, candidate, context.entries)
    declined = [e for e in context.entries if e.status == "declined"]
    if declined and settings.fallback == "error":
        raise Unsupported("; ".join(f"{e.node}: {e.reason}" for e in declined) + " (options={'fallback': 'error'})")
    if declined and settings.fallback == "warn":
        for e in declined:
            message = f"moecompile: a layer runs as it was written ({e.node}): {e.reason}"
            report.warn_once(message)


def lower(gm: fx.GraphModule, example_inputs: list[Any], settings: Settings) -> Callable[..., Any]:
    """Compile a graph that may hold moe.* ops."""
    if settings.inner == "eager":
        return gm.forward
    if settings.inner == "aot_eager":
        from torch._dynamo.backends.debugging import aot_eager

        return aot_eager(gm, example_inputs)  # type: ignore[no-any-return]
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    fatal = settings.strict or settings.fallback == "error"
    inner = compile_fx_inner if fatal else backward.guarded(compile_fx_inner, warn=settings.fallback == "warn")
    # Inductor's caches know an op by name, not by what its Python code does: the tag keeps releases apart.
    tags = torch.compiler.config
    with tags.patch(cache_key_tag=f"{tags.cache_key_tag}moecompile-{__version__}-{ops.ABI}"):  # type: ignore[attr-defined]
        return compile_fx(gm, example_inputs, inner, config_patches=settings.inductor or None)  # type: ignore[return-value]


def reset() -> None:
    """Called by torch._dynamo.reset()."""
    report.reset()
    fallback.reset()
    build_cpp.forget_failures()
    kept_memory.release()


moe.reset = reset  # type: ignore[attr-defined]
capture.install(moe)

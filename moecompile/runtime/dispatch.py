"""What a private moe.* op does when it is called: the device's kernel, or what stands in for it.

    kernel     unless the region's kernel failed before
    fallback   the original nodes of the layer (runtime.fallback), or the reference in a process that does not have them
    verify     both, for the first calls of a region that asked for it

Where a training forward ran without the kernel, what it saved means nothing: the layer's backwards do not read it from then on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from moecompile.errors import CaptureError
from moecompile.ir import ops, reference
from moecompile.ir.spec import experts_from_text, router_from_text
from moecompile.runtime import fallback

Found = TypeVar("Found")
CALLERS = (IndexError, CaptureError)  # the caller's ids, a call before its time: not the kernel's failure


class Dispatch(ops.InTwoSteps):
    """An Implementation around a device's own: same results, whatever happens to the kernel."""

    def __init__(self, kernels: ops.Implementation) -> None:
        self.kernels = kernels
        self.reference = ops.Reference()

    def route(self, logits: Tensor, bias: Tensor | None, spec: str) -> tuple[Tensor, Tensor]:
        r = fallback.region("route:" + spec)
        found = _tried(r, self.kernels.route, logits, bias, spec)
        if found is None:
            return self.reference.route(logits, bias, spec)
        if r.due("forward"):
            fallback.compare(r, "a router", "forward", *_choice(logits, bias, *found, spec), logits.shape[-1])
        return found

    def differentiates(self, spec: str) -> bool:
        return self.kernels.differentiates(spec)

    def route_stats(self, logits: Tensor, bias: Tensor | None, spec: str) -> ops.Stats:
        r = fallback.region("route:" + spec)
        found = _tried(r, self.kernels.route_stats, logits, bias, spec)
        if found is None:
            return self.reference.route_stats(logits, bias, spec)
        if r.due("forward"):
            want = self.reference.route_stats(logits, bias, spec)
            got, right = _choice(logits, bias, found[0], found[1], spec)
            fallback.compare(r, "a router", "forward", [*got, *found[3:]], [*right, *want[3:]], logits.numel())
        return found

    def route_bwd(
        self,
        grad: Tensor,
        logits: Tensor,
        bias: Tensor | None,
        ids: Tensor,
        dprobs: Tensor | None,
        dsquares: Tensor | None,
        spec: str,
        needs: Sequence[bool],
    ) -> list[Tensor]:
        r = fallback.region("route:" + spec)
        arguments = (grad, logits, bias, ids, dprobs, dsquares, spec, needs)
        found = _tried(r, self.kernels.route_bwd, *arguments)
        if found is None:
            return self.reference.route_bwd(*arguments)
        if r.due("backward"):
            want = self.reference.route_bwd(*arguments)
            fallback.compare(r, "a router", "backward", found, want, max(grad.numel(), logits.shape[-1]))
        return found

    def experts(
        self, x: Tensor, weights: Tensor | None, ids: Tensor, params: Sequence[Tensor], sizes: Sequence[int], spec: str, region: str
    ) -> Tensor:
        r = fallback.region(region)
        out = _tried(r, self.kernels.experts, x, weights, ids, params, sizes, spec, region, callers=CALLERS)
        if out is None:
            return self._original(r, x, weights, ids, params, sizes, spec)
        if r.due("forward"):
            self._verify(r, spec, out, x, weights, ids, params, sizes)
        return out

    def routed_experts(self, x, logits, bias, params, sizes, router, spec, region):  # type: ignore[no-untyped-def]
        r, chooses = fallback.region(region), fallback.region("route:" + router)
        if chooses.kernel and not (chooses.due("forward") or r.due("forward")):
            arguments = (x, logits, bias, params, sizes, router, spec, region)
            found = _tried(r, self.kernels.routed_experts, *arguments, callers=CALLERS)
            if found is not None:
                return found
        return super().routed_experts(x, logits, bias, params, sizes, router, spec, region)

    def experts_train(self, x, weights, ids, params, sizes, spec, region):  # type: ignore[no-untyped-def]
        r = fallback.region(region)
        found = _tried(r, self.kernels.experts_train, x, weights, ids, params, sizes, spec, region, callers=CALLERS)
        if found is None:
            r.unsaved = True
            s = experts_from_text(spec)
            saved = x.new_zeros(ids.numel(), len(s.projections) * s.intermediate, dtype=s.dtype)
            return self._original(r, x, weights, ids, params, sizes, spec), saved
        if r.due("forward"):
            self._verify(r, spec, found[0], x, weights, ids, params, sizes)
        return found

    def experts_bwd(self, grad, x, weights, ids, params, sizes, spec, region, saved, needs):  # type: ignore[no-untyped-def]
        r = fallback.region(region)
        forward = fallback.original(r, experts_from_text(spec), ids, sizes)
        found = None
        if not r.unsaved:
            arguments = (grad, x, weights, ids, params, sizes, spec, region, saved, needs)
            found = _tried(r, self.kernels.experts_bwd, *arguments, callers=CALLERS)
        if found is None:
            return ops.gradients(forward, grad, x, weights, params, needs)
        if r.due("backward"):
            want = ops.gradients(forward, grad, x, weights, params, needs)
            length = max(x.shape[0], x.shape[1], grad.shape[1])
            fallback.compare(r, _name(spec), "backward", found, want, length)
        return found

    def _original(self, r: fallback.Region, x: Tensor, weights: Any, ids: Tensor, params: Any, sizes: Any, spec: str) -> Tensor:
        fallback.COUNTS["fallback"] += not r.reference
        with torch.no_grad():
            return fallback.original(r, experts_from_text(spec), ids, sizes)(x, weights, params)

    def _verify(
        self, r: fallback.Region, spec: str, out: Tensor, x: Tensor, weights: Any, ids: Tensor, params: Any, sizes: Any
    ) -> None:
        s = experts_from_text(spec)
        with torch.no_grad():
            want = fallback.original(r, s, ids, sizes)(x, weights, params)
        fallback.compare(r, _name(spec), "forward", [out], [want], max(s.hidden, s.intermediate))


def _tried(
    r: fallback.Region, kernel: Callable[..., Found], *arguments: Any, callers: tuple[type[Exception], ...] = ()
) -> Found | None:
    """What the kernel returns; None where it is not to be used, or fails and will not be used again. `callers` go through."""
    if not r.kernel:
        return None
    try:
        return kernel(*arguments)
    except callers:
        raise
    except Exception as e:
        fallback.failed(r, e)
        return None


def _choice(logits: Tensor, bias: Tensor | None, weights: Tensor, ids: Tensor, spec: str) -> tuple[list[Tensor], list[Tensor]]:
    """A router's result, and what it is to be compared with: ids that tie are as good as any, so the values chosen are compared,
    and the weights with those of the same ids."""
    s = router_from_text(spec)
    at = ids.clamp(0, s.num_experts - 1)
    choice = reference.choices(s, reference.scores(s, logits), bias)
    right = [reference.weights_of(s, logits, bias, at), choice.topk(s.top_k, -1).values]
    ordered = ids.sort(-1).values
    if not torch.equal(at, ids) or bool((ordered[..., 1:] == ordered[..., :-1]).any()):
        return [torch.full_like(t, torch.nan) for t in right], right  # no choice of K experts at all
    return [weights, choice.gather(-1, at).sort(-1, descending=True).values], right


def _name(spec: str) -> str:
    s = experts_from_text(spec)
    return f"the experts (E={s.num_experts} K={s.top_k} H={s.hidden} F={s.intermediate} {s.dtype})"

"""The moe.* ops.

    moe::route, moe::route_stats, moe::experts, moe::routed_experts
                                    what a rewrite puts in the graph; CompositeImplicitAutograd, so AOTAutograd sees through
      no grad   ->   moe::_route, moe::_experts                     all that an inference graph holds
                     moe::_routed_experts                           both at once, where nothing else reads what is between
      grad      ->   moe::_route, moe::_route_bwd                   where the device has a kernel for it, else
                     (moe::_route_stats likewise, with or without grad)
                     moe::_route for the ids, aten for the weights  (Inductor fuses the latter, forward and backward)
                     moe::_experts_train, moe::_experts_bwd         by an autograd.Function

The private ops have a kernel and a fake but no autograd kernel: a call pays for one dispatch.  All schemas are functional.
`spec` is the text of the spec: an op explains itself to a process that never saw the rewrite.  `region` names the original
nodes, where this process still has them (runtime.dispatch).  What runs is chosen per device: `bind` is how kernels get in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.library import Library, register_fake

from moecompile.ir import reference
from moecompile.ir.spec import experts_from_text, router_from_text

ABI = "2"  # part of every spec text's meaning: raise it when an op's contract changes

library = Library("moe", "DEF")
_EXPERTS = "Tensor x, Tensor? weights, Tensor ids, Tensor[] params, SymInt[] sizes, str spec, str region"
_ROUTED = "Tensor x, Tensor logits, Tensor? bias, Tensor[] params, SymInt[] sizes, str router, str spec, str region"
_SCHEMAS = {
    "route": "(Tensor logits, Tensor? bias, str spec) -> (Tensor, Tensor)",
    "_route": "(Tensor logits, Tensor? bias, str spec) -> (Tensor, Tensor)",
    "route_stats": "(Tensor logits, Tensor? bias, str spec) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "_route_stats": "(Tensor logits, Tensor? bias, str spec) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "_route_bwd": "(Tensor grad, Tensor logits, Tensor? bias, Tensor ids, Tensor? dprobs, Tensor? dsquares, str spec, bool[] needs)"
    " -> Tensor[]",
    "experts": f"({_EXPERTS}) -> Tensor",
    "_experts": f"({_EXPERTS}) -> Tensor",
    "routed_experts": f"({_ROUTED}) -> Tensor",
    "_routed_experts": f"({_ROUTED}) -> Tensor",
    "_experts_train": f"({_EXPERTS}) -> (Tensor, Tensor)",
    "_experts_bwd": f"(Tensor grad, {_EXPERTS}, Tensor saved, bool[] needs) -> Tensor[]",
}
for _name, _schema in _SCHEMAS.items():
    library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))


Stats = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


class Implementation(Protocol):
    """What a device brings. Shapes as in the specs; `saved` [R, projections * F] holds the projections before the
    activation, in an order of the implementation's own."""

    def route(self, logits: Tensor, bias: Tensor | None, spec: str) -> tuple[Tensor, Tensor]: ...

    def differentiates(self, spec: str) -> bool:
        """Whether route_stats and route_bwd are kernels worth more than aten code that Inductor fuses."""

    def route_stats(self, logits: Tensor, bias: Tensor | None, spec: str) -> Stats: ...

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
    ) -> list[Tensor]: ...

    def experts(
        self, x: Tensor, weights: Tensor | None, ids: Tensor, params: Sequence[Tensor], sizes: Sequence[int], spec: str, region: str
    ) -> Tensor: ...

    def routed_experts(
        self,
        x: Tensor,
        logits: Tensor,
        bias: Tensor | None,
        params: Sequence[Tensor],
        sizes: Sequence[int],
        router: str,
        spec: str,
        region: str,
    ) -> Tensor: ...

    def experts_train(
        self, x: Tensor, weights: Tensor | None, ids: Tensor, params: Sequence[Tensor], sizes: Sequence[int], spec: str, region: str
    ) -> tuple[Tensor, Tensor]: ...

    def experts_bwd(
        self,
        grad: Tensor,
        x: Tensor,
        weights: Tensor | None,
        ids: Tensor,
        params: Sequence[Tensor],
        sizes: Sequence[int],
        spec: str,
        region: str,
        saved: Tensor,
        needs: Sequence[bool],
    ) -> list[Tensor]: ...


class InTwoSteps:
    """routed_experts of a device that has nothing to gain from one step."""

    def routed_experts(self: Implementation, x, logits, bias, params, sizes, router, spec, region):  # type: ignore[no-untyped-def]
        weights, ids = self.route(logits, bias, router)
        return self.experts(x, weights.flatten(0, -2), ids.flatten(0, -2), params, sizes, spec, region)


class PlainRouter(InTwoSteps):
    """What a device without kernels for a router's gradients and statistics does about them."""

    def route(self, logits: Tensor, bias: Tensor | None, spec: str) -> tuple[Tensor, Tensor]:
        return reference.route(router_from_text(spec), logits, bias)

    def differentiates(self, spec: str) -> bool:
        return False

    def route_stats(self, logits: Tensor, bias: Tensor | None, spec: str) -> Stats:
        weights, ids = self.route(logits, bias, spec)
        return weights, ids, *reference.statistics(logits, ids)

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
        def forward(logits: Tensor, bias: Tensor | None, params: Sequence[Tensor]) -> Tensor:
            weights = reference.weights_of(router_from_text(spec), logits, bias, ids)
            if dprobs is None or dsquares is None:
                return weights
            _counts, probs, squares = reference.statistics(logits, ids)
            return torch.cat([weights.flatten().to(probs.dtype), probs, squares[None]])

        if dprobs is not None and dsquares is not None:
            grad = torch.cat([grad.flatten().to(dprobs.dtype), dprobs, dsquares[None]])
        return gradients(forward, grad, logits, bias, [], needs)


class Reference(PlainRouter):
    """Plain PyTorch on any device and dtype. `saved` is not used: the backward runs the forward again under autograd."""

    def experts(self, x, weights, ids, params, sizes, spec, region):  # type: ignore[no-untyped-def]
        return reference.experts(experts_from_text(spec), x, weights, ids, params)

    def experts_train(self, x, weights, ids, params, sizes, spec, region):  # type: ignore[no-untyped-def]
        s = experts_from_text(spec)
        saved = x.new_zeros(ids.numel(), len(s.projections) * s.intermediate, dtype=s.dtype)
        return reference.experts(s, x, weights, ids, params), saved

    def experts_bwd(self, grad, x, weights, ids, params, sizes, spec, region, saved, needs):  # type: ignore[no-untyped-def]
        def forward(x: Tensor, weights: Tensor | None, params: Sequence[Tensor]) -> Tensor:
            return reference.experts(experts_from_text(spec), x, weights, ids, params)

        return gradients(forward, grad, x, weights, params, needs)


def _recording(device: torch.device) -> Any:
    """Autograd records inside, though the op may be called from below it (by a graph that has no gradients of its own)."""
    name = "Autograd" + torch._C._dispatch_key_for_device(device.type)
    excluded = torch._C._dispatch_tls_local_exclude_set().remove(getattr(torch._C.DispatchKey, name))
    return torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded)


def gradients(
    forward: Callable[[Tensor, Tensor | None, Sequence[Tensor]], Tensor],
    grad: Tensor,
    x: Tensor,
    weights: Tensor | None,
    params: Sequence[Tensor],
    needs: Sequence[bool],
) -> list[Tensor]:
    """Gradients of forward(x, weights, params) by autograd, as `_experts_bwd` returns them: one tensor for x, weights and
    each parameter, contiguous, empty where not needed."""
    given = [x, weights, *params]
    with torch.enable_grad(), _recording(x.device):
        leaves = [None if t is None else t.detach().requires_grad_(n) for t, n in zip(given, needs, strict=True)]
        assert leaves[0] is not None
        out = forward(leaves[0], leaves[1], [p for p in leaves[2:] if p is not None])
    wanted = [t for t in leaves if t is not None and t.requires_grad]
    found: dict[int, Tensor | None] = {}
    if out.requires_grad:
        found = {id(t): g for t, g in zip(wanted, torch.autograd.grad(out, wanted, grad, allow_unused=True), strict=True)}
    result = []
    for t in leaves:
        if t is None or not t.requires_grad:
            result.append(x.new_empty(0))
        else:
            g = found.get(id(t))
            result.append(t.new_zeros(t.shape) if g is None else g.contiguous())
    return result


_BOUND: dict[str, Implementation] = {}
_REFERENCE = Reference()


def bind(device_type: str, implementation: Implementation) -> None:
    """Run the private ops on this kind of device by `implementation` from now on."""
    _BOUND[device_type] = implementation


def bound(device: torch.device) -> Implementation:
    return _BOUND.get(device.type, _REFERENCE)


# ---------------------------------------------------------------- the private ops: kernel and fake


def _route(logits: Tensor, bias: Tensor | None, spec: str) -> tuple[Tensor, Tensor]:
    return bound(logits.device).route(logits, bias, spec)


def _route_stats(logits: Tensor, bias: Tensor | None, spec: str) -> Stats:
    return bound(logits.device).route_stats(logits, bias, spec)


def _route_bwd(grad: Tensor, *args: Any) -> list[Tensor]:
    return bound(grad.device).route_bwd(grad, *args)


def _experts(x: Tensor, *args: Any) -> Tensor:
    return bound(x.device).experts(x, *args)


def _routed_experts(x: Tensor, *args: Any) -> Tensor:
    return bound(x.device).routed_experts(x, *args)


def _experts_train(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return bound(x.device).experts_train(x, *args)


def _experts_bwd(grad: Tensor, *args: Any) -> list[Tensor]:
    return bound(grad.device).experts_bwd(grad, *args)


# Shapes only, and no branch on a size, which would specialise it.


def _fake_route(logits: Tensor, bias: Tensor | None, spec: str) -> tuple[Tensor, Tensor]:
    s = router_from_text(spec)
    shape = (*logits.shape[:-1], s.top_k)
    read = {"score": s.score_dtype, "logits": logits.dtype}.get(s.weights_from)
    if read is None:
        read = s.score_dtype if bias is None else torch.promote_types(s.score_dtype, bias.dtype)
    return logits.new_empty(shape, dtype=s.weights_dtype(read)), logits.new_empty(shape, dtype=torch.int64)


def _fake_route_stats(logits: Tensor, bias: Tensor | None, spec: str) -> Stats:
    E, wide = logits.shape[-1], torch.float64 if logits.dtype == torch.float64 else torch.float32
    counts = logits.new_empty((E,), dtype=torch.int64)
    return *_fake_route(logits, bias, spec), counts, logits.new_empty((E,), dtype=wide), logits.new_empty((), dtype=wide)


def _fake_route_bwd(grad, logits, bias, ids, dprobs, dsquares, spec, needs):  # type: ignore[no-untyped-def]
    pairs = zip((logits, bias), needs, strict=True)
    return [logits.new_empty((0,)) if t is None or not n else t.new_empty(t.shape) for t, n in pairs]


def _fake_experts(x: Tensor, weights: Tensor | None, ids: Tensor, params: Any, sizes: Any, spec: str, region: str) -> Tensor:
    s = experts_from_text(spec)
    return x.new_empty((x.shape[0], s.out_features), dtype=s.out_dtype)


def _fake_routed(x, logits, bias, params, sizes, router, spec, region):  # type: ignore[no-untyped-def]
    return _fake_experts(x, None, logits, params, sizes, spec, region)


def _fake_train(x, weights, ids, params, sizes, spec, region):  # type: ignore[no-untyped-def]
    s = experts_from_text(spec)
    saved = x.new_empty((ids.shape[0] * ids.shape[1], len(s.projections) * s.intermediate), dtype=s.dtype)
    return _fake_experts(x, weights, ids, params, sizes, spec, region), saved


def _fake_bwd(grad, x, weights, ids, params, sizes, spec, region, saved, needs):  # type: ignore[no-untyped-def]
    given = [x, weights, *params]
    return [t.new_empty(t.shape) if n and t is not None else x.new_empty((0,)) for t, n in zip(given, needs, strict=True)]


for _name, _kernel, _fake in (
    ("_route", _route, _fake_route),
    ("_route_stats", _route_stats, _fake_route_stats),
    ("_route_bwd", _route_bwd, _fake_route_bwd),
    ("_experts", _experts, _fake_experts),
    ("_routed_experts", _routed_experts, _fake_routed),
    ("_experts_train", _experts_train, _fake_train),
    ("_experts_bwd", _experts_bwd, _fake_bwd),
):
    library.impl(_name, _kernel, "CompositeExplicitAutograd")
    register_fake(f"moe::{_name}", _fake, lib=library)


# ---------------------------------------------------------------- the public ops


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, bias, spec):  # type: ignore[no-untyped-def]
        weights, ids = torch.ops.moe._route.default(logits, bias, spec)
        ctx.save_for_backward(logits, bias, ids)
        ctx.spec = spec
        ctx.mark_non_differentiable(ids)
        return weights, ids

    @staticmethod
    def backward(ctx, grad, _):  # type: ignore[no-untyped-def]
        return _routed_back(ctx, grad, None, None)


class _RouteStats(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, bias, spec):  # type: ignore[no-untyped-def]
        weights, ids, counts, probs, squares = torch.ops.moe._route_stats.default(logits, bias, spec)
        ctx.save_for_backward(logits, bias, ids)
        ctx.spec = spec
        ctx.dtypes = weights.dtype, probs.dtype
        ctx.mark_non_differentiable(ids, counts)
        ctx.set_materialize_grads(False)  # where nobody reads the sums, theirs is no part of the backward
        return weights, ids, counts, probs, squares

    @staticmethod
    def backward(ctx, grad, _ids, _counts, dprobs, dsquares):  # type: ignore[no-untyped-def]
        logits, _, ids = ctx.saved_tensors
        if grad is None:
            grad = logits.new_zeros(ids.shape, dtype=ctx.dtypes[0])
        if dprobs is None and dsquares is not None:
            dprobs = logits.new_zeros(logits.shape[-1:], dtype=ctx.dtypes[1])
        if dsquares is None and dprobs is not None:
            dsquares = logits.new_zeros((), dtype=ctx.dtypes[1])
        return _routed_back(ctx, grad, dprobs, dsquares)


def _again(
    forward: Callable[..., Sequence[Tensor]], given: Sequence[Tensor | None], needs: Sequence[bool], grads: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """The gradients by autograd through the reference, for who differentiates them in turn (create_graph=True): kernels have no
    second derivative.  AOTAutograd, which has none either, never comes here."""
    apart = [None if t is None else t.view_as(t) for t in given]  # one may have been computed from another
    pairs = [(out, g) for out, g in zip(forward(*apart), grads, strict=True) if g is not None]
    wanted = [t for t, n in zip(apart, needs, strict=True) if n and t is not None]
    found = torch.autograd.grad([out for out, _ in pairs], wanted, [g for _, g in pairs], create_graph=True, allow_unused=True)
    left = iter(found)
    return [next(left) if n and t is not None else None for t, n in zip(given, needs, strict=True)]


def _routed_back(ctx: Any, grad: Tensor, dprobs: Tensor | None, dsquares: Tensor | None) -> tuple[Any, ...]:
    logits, bias, ids = ctx.saved_tensors
    reached = router_from_text(ctx.spec).weights_from == "choice"
    needs = [ctx.needs_input_grad[0], ctx.needs_input_grad[1] and reached]
    if torch.is_grad_enabled():

        def forward(logits: Tensor, bias: Tensor | None) -> Sequence[Tensor]:
            return reference.weights_of(router_from_text(ctx.spec), logits, bias, ids), *reference.statistics(logits, ids)[1:]

        return *_again(forward, (logits, bias), needs, (grad, dprobs, dsquares)), None
    found = torch.ops.moe._route_bwd.default(grad, logits, bias, ids, dprobs, dsquares, ctx.spec, needs)
    return *(g if n else None for g, n in zip(found, needs, strict=True)), None


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weights, ids, sizes, spec, region, *params):  # type: ignore[no-untyped-def]
        out, saved = torch.ops.moe._experts_train.default(x, weights, ids, params, sizes, spec, region)
        ctx.save_for_backward(x, weights, ids, saved, *params)
        ctx.given = (sizes, spec, region)
        return out

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        x, weights, ids, saved, *params = ctx.saved_tensors
        needs = [ctx.needs_input_grad[i] for i in (0, 1, *range(6, 6 + len(params)))]
        if torch.is_grad_enabled():
            s = experts_from_text(ctx.given[1])
            dx, dw, *dp = _again(lambda x, w, *p: [reference.experts(s, x, w, ids, p)], (x, weights, *params), needs, [grad])
            return dx, dw, None, None, None, None, *dp
        found = torch.ops.moe._experts_bwd.default(grad, x, weights, ids, params, *ctx.given, saved, needs)
        dx, dw, *dp = (g if n else None for g, n in zip(found, needs, strict=True))
        return dx, dw, None, None, None, None, *dp


def experts(
    x: Tensor, weights: Tensor | None, ids: Tensor, params: Sequence[Tensor], sizes: Sequence[int], spec: str, region: str
) -> Tensor:
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weights, *params)):
        return _Experts.apply(x, weights, ids, sizes, spec, region, *params)  # type: ignore[no-untyped-call, no-any-return]
    return torch.ops.moe._experts.default(x, weights, ids, params, sizes, spec, region)  # type: ignore[no-any-return]


def route(logits: Tensor, bias: Tensor | None, spec: str) -> tuple[Tensor, Tensor]:
    if not (torch.is_grad_enabled() and (logits.requires_grad or (bias is not None and bias.requires_grad))):
        return torch.ops.moe._route.default(logits, bias, spec)  # type: ignore[no-any-return]
    if bound(logits.device).differentiates(spec):
        return _Route.apply(logits, bias, spec)  # type: ignore[no-untyped-call, no-any-return]
    ids = torch.ops.moe._route.default(logits.detach(), None if bias is None else bias.detach(), spec)[1]
    with torch.autocast(logits.device.type, enabled=False):
        return reference.weights_of(router_from_text(spec), logits, bias, ids), ids


def routed_experts(
    x: Tensor,
    logits: Tensor,
    bias: Tensor | None,
    params: Sequence[Tensor],
    sizes: Sequence[int],
    router: str,
    spec: str,
    region: str,
) -> Tensor:
    """experts() of route(): logits [..,E] with as many rows as x [T,H] -> out [T,O]."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, logits, bias, *params)):
        weights, ids = route(logits, bias, router)
        return experts(x, weights.flatten(0, -2), ids.flatten(0, -2), params, sizes, spec, region)
    return torch.ops.moe._routed_experts.default(x, logits, bias, params, sizes, router, spec, region)  # type: ignore[no-any-return]


def route_stats(logits: Tensor, bias: Tensor | None, spec: str) -> Stats:
    """As route(), and reference.statistics() of it: by one kernel where the device has it, else by aten after route()."""
    if not bound(logits.device).differentiates(spec):
        weights, ids = route(logits, bias, spec)
        with torch.autocast(logits.device.type, enabled=False):
            return weights, ids, *reference.statistics(logits, ids)
    if torch.is_grad_enabled() and (logits.requires_grad or (bias is not None and bias.requires_grad)):
        return _RouteStats.apply(logits, bias, spec)  # type: ignore[no-untyped-call, no-any-return]
    return torch.ops.moe._route_stats.default(logits, bias, spec)  # type: ignore[no-any-return]


library.impl("route_stats", route_stats, "CompositeImplicitAutograd")
library.impl("route", route, "CompositeImplicitAutograd")
library.impl("experts", experts, "CompositeImplicitAutograd")
library.impl("routed_experts", routed_experts, "CompositeImplicitAutograd")

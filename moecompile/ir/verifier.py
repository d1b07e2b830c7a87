"""What every graph must be after every pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from moecompile.errors import VerifyError
from moecompile.ir.spec import ExpertsSpec, WeightOn, experts_from_text, router_from_text
from moecompile.ir.surgery import value_of


def verify(gm: fx.GraphModule) -> None:
    """Raise VerifyError (or what lint raises) unless gm is well formed and each moe.* node agrees with its spec."""
    gm.graph.lint()
    for n in gm.graph.nodes:
        if n.target is torch.ops.moe.experts.default:
            _experts(n)
        elif n.target is torch.ops.moe.routed_experts.default:
            _routed(n)
        elif n.target in (torch.ops.moe.route.default, torch.ops.moe.route_stats.default):
            _route(n, *n.args)


def _need(condition: bool, n: fx.Node, what: str) -> None:
    if not condition:
        raise VerifyError(f"{n.format_node()}: {what}")


def _experts(n: fx.Node) -> None:
    x, weights, ids, params, _, spec, _ = n.args
    s = experts_from_text(str(spec))
    value = value_of(ids)  # type: ignore[arg-type]
    _need(isinstance(value, Tensor), n, "ids have no example value")
    _need(value.dim() == 2 and value.shape[1] == s.top_k, n, f"ids are {tuple(value.shape)}, the spec has K = {s.top_k}")
    _need((weights is None) == (s.weight_on is WeightOn.NOWHERE), n, "weights are given exactly where the spec uses them")
    _computed(n, s, x, params)


def _routed(n: fx.Node) -> None:
    x, logits, bias, params, _, router, spec, _ = n.args
    s, r = experts_from_text(str(spec)), router_from_text(str(router))
    _route(n, logits, bias, router)
    pair = f"{(r.num_experts, r.top_k)} and {(s.num_experts, s.top_k)}"
    _need((r.num_experts, r.top_k) == (s.num_experts, s.top_k), n, f"the router and the experts have E, K = {pair}")
    _need(s.weight_on is not WeightOn.NOWHERE, n, "the experts use no weights, the router makes some")
    _computed(n, s, x, params)


def _computed(n: fx.Node, s: ExpertsSpec, x: Any, params: Any) -> None:
    values = [value_of(a) for a in (x, *params)]
    _need(all(isinstance(v, Tensor) for v in (*values, value_of(n))), n, "an operand has no example value")
    _need(values[0].dim() == 2 and values[0].shape[1] == s.hidden, n, f"x is {tuple(values[0].shape)}, the spec has H = {s.hidden}")
    _need(len(params) == s.num_params, n, f"{len(params)} parameters, the spec has {s.num_params}")
    for w in s.weights():
        for p in w.params:
            given = values[1 + p]
            _need(tuple(given.shape) == w.shape, n, f"parameter {p} is {tuple(given.shape)}, the spec has {w.shape}")
            _need(given.dtype == s.dtype, n, f"parameter {p} is {given.dtype}, the spec has {s.dtype}")
    _need(values[0].dtype == s.dtype, n, f"x is {values[0].dtype}, the spec has {s.dtype}")
    out = value_of(n)
    right = out.dim() == 2 and out.shape[1] == s.out_features and out.dtype == s.out_dtype
    _need(right, n, f"the result is {out.dtype}{tuple(out.shape)}")


def _route(n: fx.Node, logits: Any, bias: Any, spec: Any) -> None:
    s = router_from_text(str(spec))
    value = value_of(logits)
    _need(isinstance(value, Tensor) and value.shape[-1] == s.num_experts, n, f"logits do not have {s.num_experts} columns")
    _need((bias is not None) == s.bias, n, "a bias is given exactly where the spec has one")

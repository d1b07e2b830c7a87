"""What every graph must be after every pass."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from moecompile.errors import VerifyError
from moecompile.ir.spec import experts_from_text, router_from_text
from moecompile.ir.surgery import value_of


def verify(gm: fx.GraphModule) -> None:
    """Raise VerifyError (or what lint raises) unless gm is well formed and each moe.* node agrees with its spec."""
    gm.graph.lint()
    for n in gm.graph.nodes:
        if n.target is torch.ops.moe.experts.default:
            _experts(n)
        elif n.target is torch.ops.moe.route.default:
            _route(n)


def _need(condition: bool, n: fx.Node, what: str) -> None:
    if not condition:
        raise VerifyError(f"{n.format_node()}: {what}")


def _experts(n: fx.Node) -> None:
    x, weights, ids, params, _, spec, _ = n.args
    s = experts_from_text(str(spec))
    values = [value_of(a) for a in (x, ids, *params)]  # type: ignore[arg-type, misc]
    _need(all(isinstance(v, Tensor) for v in (*values, value_of(n))), n, "an operand has no example value")
    _need(values[0].dim() == 2 and values[0].shape[1] == s.hidden, n, f"x is {tuple(values[0].shape)}, the spec has H = {s.hidden}")
    _need(
        values[1].dim() == 2 and values[1].shape[1] == s.top_k, n, f"ids are {tuple(values[1].shape)}, the spec has K = {s.top_k}"
    )
    _need((weights is None) == (s.weight_on.value == "nowhere"), n, "weights are given exactly where the spec uses them")
    _need(len(params) == s.num_params, n, f"{len(params)} parameters, the spec has {s.num_params}")  # type: ignore[arg-type]
    for w in s.weights():
        for p in w.params:
            _need(
                tuple(values[2 + p].shape) == w.shape, n, f"parameter {p} is {tuple(values[2 + p].shape)}, the spec has {w.shape}"
            )
            _need(values[2 + p].dtype == s.dtype, n, f"parameter {p} is {values[2 + p].dtype}, the spec has {s.dtype}")
    _need(values[0].dtype == s.dtype, n, f"x is {values[0].dtype}, the spec has {s.dtype}")
    out = value_of(n)
    _need(
        out.dim() == 2 and out.shape[1] == s.out_features and out.dtype == s.out_dtype,
        n,
        f"the result is {out.dtype}{tuple(out.shape)}",
    )


def _route(n: fx.Node) -> None:
    logits, bias, spec = n.args
    s = router_from_text(str(spec))
    value = value_of(logits)  # type: ignore[arg-type]
    _need(isinstance(value, Tensor) and value.shape[-1] == s.num_experts, n, f"logits do not have {s.num_experts} columns")
    _need((bias is not None) == s.bias, n, "a bias is given exactly where the spec has one")

"""An FX graph as lines for people: what moe-opt prints between passes and what the goldens hold.

%x: f32[8, 32] = input
%logits: f32[8, 4] = torch.nn.functional.linear(%x, %gate)
%route: (f32[8, 2], i64[8, 2]) = moe.route(%logits)
    // E=4 K=2, softmax in f32, weights from score: normalise(0.0, 0.0)
%y: f32[8, 32] = moe.experts(%x, %weights, %ids, [%gate_up, %down])
    // E=4 K=2 H=32 F=64 O=32, f32 -> f32, mul(mul(h0, sigmoid(h0)), h1), weight on output, ids outside 0..E-1: skip
    // h0 = p0[e*4096 + n*32 + k], h1 = p0[2048 + e*4096 + n*32 + k], down = p1[e*2048 + n*64 + k]
return %y
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from moecompile.ir import expr
from moecompile.ir.spec import ExpertsSpec, RouterSpec, Weight, experts_from_text, router_from_text

_SHORT = {"float": "f", "bfloat": "bf", "int": "i", "uint": "u", "complex": "c"}
_SPECS = {  # arguments that are the spec of a router, and of experts
    "experts": (None, 5), "_experts": (None, 5), "_experts_train": (None, 5), "_experts_bwd": (None, 6),
    "route": (2, None), "_route": (2, None), "_route_bwd": (6, None), "route_stats": (2, None), "_route_stats": (2, None),
    "routed_experts": (5, 6), "_routed_experts": (5, 6),
}  # fmt: skip


def text(gm: fx.GraphModule) -> str:
    """The whole graph; child graphs follow, indented, under their names."""
    return "\n".join(_lines(gm, ""))


def _lines(gm: fx.GraphModule, indent: str) -> Iterator[str]:
    for node in gm.graph.nodes:
        yield from (indent + line for line in node_lines(node))
    for name, child in gm.named_children():
        if isinstance(child, fx.GraphModule):
            yield f"{indent}{name}:"
            yield from _lines(child, indent + "    ")


def node_lines(node: fx.Node) -> list[str]:
    """One line, and for a moe.* op what its spec says."""
    if node.op == "output":
        return [f"return {_arguments(node.args[0] if isinstance(node.args[0], (tuple, list)) else node.args)}"]
    value = type_of(node.meta.get("example_value", node.meta.get("val")))
    left = f"%{node.name}: {value} = " if value else f"%{node.name} = "
    if node.op == "placeholder":
        return [left + "input"]
    if node.op == "get_attr":
        return [f"{left}attribute {node.target}"]
    positions = _spec_positions(node)
    if positions is None:
        named = [f"{k}={_argument(v)}" for k, v in node.kwargs.items()]
        return [f"{left}{target_name(node)}({', '.join([*map(_argument, node.args), *named])})"]
    before = min(p for p in positions if p is not None)
    tensors = [_argument(a) for a in node.args[:before] if a is not None and not _is_sizes(a)]
    return [f"{left}{target_name(node)}({', '.join(tensors)})", *(f"    // {line}" for line in _spec_lines(node, *positions))]


def type_of(value: Any) -> str:
    """f32[8, s0], (f32[8, 2], i64[8, 2]), int, or "" where nothing is known."""
    if isinstance(value, Tensor):
        return f"{dtype_name(value.dtype)}[{', '.join(map(str, value.shape))}]"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(type_of(v) for v in value)})"
    if isinstance(value, torch.SymInt):
        return f"int {value}"
    return "" if value is None else type(value).__name__


def dtype_name(dtype: torch.dtype) -> str:
    """float32 -> f32, bfloat16 -> bf16, bool -> bool, float8_e4m3fn -> f8_e4m3fn."""
    name = str(dtype).removeprefix("torch.")
    letters = name.rstrip("0123456789") if name[-1].isdigit() else name
    for long, short in _SHORT.items():
        if letters == long or name.startswith(f"{long}8_"):
            return short + name[len(long) :]
    return name


def target_name(node: fx.Node) -> str:
    """aten.mm.default, moe.experts, torch.softmax, getitem; methods are written with a dot in front."""
    if node.op != "call_function":
        return f".{node.target}" if node.op == "call_method" else str(node.target)
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        name = str(target)
        return name.removesuffix(".default") if target.namespace == "moe" else name
    if isinstance(target, torch._ops.OpOverloadPacket):
        return str(target)
    name = str(getattr(target, "__name__", ""))
    if getattr(operator, name, None) is target:
        return name
    name = str(torch.fx.node._get_qualified_name(target))
    return name.replace("torch._C._nn.", "torch.nn.functional.").replace("torch._C._VariableFunctions.", "torch.")


def experts_lines(spec: ExpertsSpec) -> list[str]:
    """Sizes and meaning, then where each weight lies in the parameters p0, p1, .."""
    sizes = f"E={spec.num_experts} K={spec.top_k} H={spec.hidden} F={spec.intermediate} O={spec.out_features}"
    dtypes = f"{dtype_name(spec.dtype)} -> {dtype_name(spec.out_dtype)}"
    meaning = f"{expr.text(spec.activation)}, weight on {spec.weight_on.value}, ids outside 0..E-1: {spec.out_of_range.value}"
    places = [f"h{i} = {_place(w)}" for i, w in enumerate(spec.projections)]
    places += [f"b{i} = {_place(w)}" for i, w in enumerate(spec.projection_bias) if w is not None]
    places += [f"down = {_place(spec.down)}"]
    if spec.down_bias is not None:
        places.append(f"down bias = {_place(spec.down_bias)}")
    return [f"{sizes}, {dtypes}, {meaning}", ", ".join(places)]


def router_lines(spec: RouterSpec) -> list[str]:
    """Score, choice and weights on one line."""
    parts = [f"E={spec.num_experts} K={spec.top_k}", f"{spec.score} in {dtype_name(spec.score_dtype)}"]
    if spec.bias:
        parts.append("selection bias")
    if spec.groups is not None:
        g = spec.groups
        parts.append(f"best {g.top_k} of {g.count} groups by {g.score}, others {g.fill}")
    post = [f"{step[0]}({', '.join(_constant(a) for a in step[1:])})" if step[1:] else step[0] for step in spec.post]
    weights = f"weights from {spec.weights_from}" + (f": {', '.join(post)}" if post else "")
    return [", ".join([*parts, weights] if spec.sorted else [*parts, weights, "unsorted"])]


def _place(w: Weight) -> str:
    terms = [str(w.offset)] if w.offset else []
    for letter, stride in (("e", w.e), ("n", w.n), ("k", w.k)):
        if stride:
            terms.append(letter if stride == 1 else f"{letter}*{stride}")
    params = f"p{w.params[0]}" if w.stacked else f"p{w.params[0]}..p{w.params[-1]}"
    return f"{params}[{' + '.join(terms) or '0'}]"


def _spec_positions(node: fx.Node) -> tuple[int | None, int | None] | None:
    target = node.target
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload) or target.namespace != "moe":
        return None
    return _SPECS.get(target._schema.name.removeprefix("moe::"))


def _spec_lines(node: fx.Node, router: int | None, experts: int | None) -> list[str]:
    lines = [] if router is None else router_lines(router_from_text(str(node.args[router])))
    return lines if experts is None else [*lines, *experts_lines(experts_from_text(str(node.args[experts])))]


def _is_sizes(argument: Any) -> bool:
    return isinstance(argument, (tuple, list)) and not any(isinstance(a, fx.Node) for a in argument)


def _arguments(arguments: Any) -> str:
    return ", ".join(_argument(a) for a in arguments)


def _argument(argument: Any) -> str:
    if isinstance(argument, fx.Node):
        return f"%{argument.name}"
    if isinstance(argument, (tuple, list)):
        return f"[{_arguments(argument)}]"
    if isinstance(argument, slice):
        ends = [_argument(a) for a in (argument.start, argument.stop)]
        step = [] if argument.step is None else [_argument(argument.step)]
        return ":".join(["" if e == "None" else e for e in ends] + step)
    return _constant(argument)


def _constant(value: Any) -> str:
    return dtype_name(value) if isinstance(value, torch.dtype) else repr(value)

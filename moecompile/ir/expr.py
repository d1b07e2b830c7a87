"""Pointwise expressions over the projections of one expert, as nested tuples.

An activation is whatever pointwise expression the user's graph computes between the two matmuls.  It is data: hashable,
printable, differentiable, and one table says what each op is in PyTorch, C++ and Triton.

    ("in", 0)              the first projection (the gate of a gated expert), ("in", 1) the second, ...
    ("const", 1.702)       a number
    ("mul", a, b)          an op of OPS on expressions

`text` and `parse` are inverse: "mul(silu(h0), h1)".  All arithmetic is meant in at least float32.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

Expr = tuple[Any, ...]


@dataclass(frozen=True)
class Op:
    """One pointwise op. `cpp` and `triton` are format strings over {0}, {1}, ..; `grad` gives d op / d argument i."""

    arity: int
    torch: Callable[..., Any]
    cpp: str
    triton: str
    grad: Callable[..., tuple[Expr, ...]]


def const(value: float) -> Expr:
    return ("const", float(value))


def _tensor(value: Any) -> torch.Tensor:
    """A number as float64, which rounds nothing and does not widen the tensors it meets."""
    return value if isinstance(value, torch.Tensor) else torch.tensor(value, dtype=torch.float64)


def _c(value: float) -> Expr:
    return const(value)


ZERO, ONE = const(0.0), const(1.0)

# The C++ side is written against V, a vector of floats (codegen.cpu defines V and the functions v_*); comparisons give a
# mask that v_where takes.  The Triton side is plain tl code on float32 blocks.
OPS: dict[str, Op] = {
    "add": Op(2, lambda a, b: a + b, "({0} + {1})", "({0} + {1})", lambda a, b: (ONE, ONE)),
    "sub": Op(2, lambda a, b: a - b, "({0} - {1})", "({0} - {1})", lambda a, b: (ONE, const(-1.0))),
    "mul": Op(2, lambda a, b: a * b, "({0} * {1})", "({0} * {1})", lambda a, b: (b, a)),
    "div": Op(
        2,
        lambda a, b: a / b,
        "({0} / {1})",
        "({0} / {1})",
        lambda a, b: (("div", ONE, b), ("neg", ("div", a, ("mul", b, b)))),
    ),
    "neg": Op(1, lambda a: -a, "(-{0})", "(-{0})", lambda a: (const(-1.0),)),
    "abs": Op(1, abs, "v_abs({0})", "tl.abs({0})", lambda a: (("sign", a),)),
    "sign": Op(
        1,
        lambda a: torch.sign(_tensor(a)),
        "v_sign({0})",
        "tl.where({0} > 0, 1.0, tl.where({0} < 0, -1.0, 0.0))",
        lambda a: (ZERO,),
    ),
    "exp": Op(1, lambda a: torch.exp(_tensor(a)), "v_exp({0})", "tl.exp({0})", lambda a: (("exp", a),)),
    "log": Op(1, lambda a: torch.log(_tensor(a)), "v_log({0})", "tl.log({0})", lambda a: (("div", ONE, a),)),
    "sqrt": Op(
        1,
        lambda a: torch.sqrt(_tensor(a)),
        "v_sqrt({0})",
        "tl.sqrt({0})",
        lambda a: (("div", const(0.5), ("sqrt", a)),),
    ),
    "sigmoid": Op(
        1,
        lambda a: torch.sigmoid(_tensor(a)),
        "v_sigmoid({0})",
        "tl.sigmoid({0})",
        lambda a: (("mul", ("sigmoid", a), ("sub", ONE, ("sigmoid", a))),),
    ),
    "tanh": Op(
        1,
        lambda a: torch.tanh(_tensor(a)),
        "v_tanh({0})",
        "(2.0 * tl.sigmoid(2.0 * ({0})) - 1.0)",
        lambda a: (("sub", ONE, ("mul", ("tanh", a), ("tanh", a))),),
    ),
    "erf": Op(
        1,
        lambda a: torch.erf(_tensor(a)),
        "v_erf({0})",
        "tl.erf({0})",
        lambda a: (("mul", const(2.0 / math.sqrt(math.pi)), ("exp", ("neg", ("mul", a, a)))),),
    ),
    "maximum": Op(  # NaN propagates, as in aten.clamp and aten.relu
        2,
        lambda a, b: torch.maximum(_tensor(a), _tensor(b)),
        "v_maximum({0}, {1})",
        "tl.maximum({0}, {1}, propagate_nan=tl.PropagateNan.ALL)",
        lambda a, b: (("ge", a, b), ("lt", a, b)),
    ),
    "minimum": Op(
        2,
        lambda a, b: torch.minimum(_tensor(a), _tensor(b)),
        "v_minimum({0}, {1})",
        "tl.minimum({0}, {1}, propagate_nan=tl.PropagateNan.ALL)",
        lambda a, b: (("le", a, b), ("gt", a, b)),
    ),
    "ge": Op(2, lambda a, b: (a >= b) * 1.0, "v_where({0} >= {1})", "tl.where({0} >= {1}, 1.0, 0.0)", lambda a, b: (ZERO, ZERO)),
    "gt": Op(2, lambda a, b: (a > b) * 1.0, "v_where({0} > {1})", "tl.where({0} > {1}, 1.0, 0.0)", lambda a, b: (ZERO, ZERO)),
    "le": Op(2, lambda a, b: (a <= b) * 1.0, "v_where({0} <= {1})", "tl.where({0} <= {1}, 1.0, 0.0)", lambda a, b: (ZERO, ZERO)),
    "lt": Op(2, lambda a, b: (a < b) * 1.0, "v_where({0} < {1})", "tl.where({0} < {1}, 1.0, 0.0)", lambda a, b: (ZERO, ZERO)),
}
# Composite activations are built from these, so that one derivative rule serves each of them.


def silu(a: Expr) -> Expr:
    return ("mul", a, ("sigmoid", a))


def relu(a: Expr) -> Expr:
    """max(a, 0), with derivative 0 at 0 as aten has it."""
    return ("maximum", ZERO, a)


def gelu(a: Expr, approximate: str = "none") -> Expr:
    if approximate == "tanh":
        cubic = ("mul", const(0.044715), ("mul", a, ("mul", a, a)))
        inner = ("mul", const(math.sqrt(2.0 / math.pi)), ("add", a, cubic))
        return ("mul", ("mul", const(0.5), a), ("add", ONE, ("tanh", inner)))
    return ("mul", ("mul", const(0.5), a), ("add", ONE, ("erf", ("mul", a, const(math.sqrt(0.5))))))


def inputs_of(e: Expr) -> frozenset[int]:
    """The projections an expression reads."""
    if e[0] == "in":
        return frozenset((e[1],))
    if e[0] == "const":
        return frozenset()
    return frozenset().union(*(inputs_of(a) for a in e[1:]))


def simplify(e: Expr) -> Expr:
    """Fold constants and drop multiplications by 1 and additions of 0 that derivatives leave behind.

    0 * a is folded too: derivatives need it, and forward expressions are not simplified (0 * NaN is NaN there).
    """
    if e[0] in ("in", "const"):
        return e
    args = tuple(simplify(a) for a in e[1:])
    e = (e[0], *args)
    if all(a[0] == "const" for a in args):
        return const(float(OPS[e[0]].torch(*(a[1] for a in args))))
    if e[0] == "mul":
        if ZERO in args:
            return ZERO
        if args[0] == ONE:
            return args[1]
        if args[1] == ONE:
            return args[0]
    if e[0] == "add":
        if args[0] == ZERO:
            return args[1]
        if args[1] == ZERO:
            return args[0]
    if e[0] == "sub" and args[1] == ZERO:
        return args[0]
    return e


@lru_cache(4096)
def derivative(e: Expr, i: int) -> Expr:
    """d e / d ("in", i), simplified."""
    if e[0] == "in":
        return ONE if e[1] == i else ZERO
    if e[0] == "const":
        return ZERO
    total: Expr = ZERO
    for partial, argument in zip(OPS[e[0]].grad(*e[1:]), e[1:], strict=True):
        total = ("add", total, ("mul", partial, derivative(argument, i)))
    return simplify(total)


def evaluate(e: Expr, inputs: Sequence[Any]) -> Any:
    """The expression on tensors or numbers, with PyTorch's ops (differentiable)."""
    if e[0] == "in":
        return inputs[e[1]]
    if e[0] == "const":
        return e[1]
    return OPS[e[0]].torch(*(evaluate(a, inputs) for a in e[1:]))


def text(e: Expr) -> str:
    if e[0] == "in":
        return f"h{e[1]}"
    if e[0] == "const":
        return repr(e[1])
    return f"{e[0]}({', '.join(text(a) for a in e[1:])})"


def parse(source: str) -> Expr:
    """The inverse of text(). ValueError on anything else: nothing is evaluated."""

    def build(node: ast.expr) -> Expr:
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
            op = OPS.get(node.func.id)
            if op is None or len(node.args) != op.arity:
                raise ValueError(f"unknown op {node.func.id!r} with {len(node.args)} arguments")
            return (node.func.id, *(build(a) for a in node.args))
        if isinstance(node, ast.Name):
            if node.id in ("inf", "nan"):
                return const(float(node.id))
            if node.id[:1] == "h" and node.id[1:].isdigit():
                return ("in", int(node.id[1:]))
        if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
            return const(node.value)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            inner = build(node.operand)
            if inner[0] == "const":
                return const(-inner[1])
        raise ValueError(f"not an expression: {ast.dump(node)[:80]}")

    return build(ast.parse(source, mode="eval").body)

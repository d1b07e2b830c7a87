"""Elementwise ops: arithmetic on the rows of pairs becomes an expression; on scores it is the router's."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import Tensor

from moecompile.ir import expr as X
from moecompile.recognize import dims as D
from moecompile.recognize.mode import RoleMode, aten, rule
from moecompile.recognize.roles import (
    DENSE_SPACE,
    TOKEN_SPACE,
    Chosen,
    DenseWeights,
    ExpertWeight,
    Gathered,
    Leaf,
    Mask,
    PairExpr,
    Pairs,
    Role,
    Sentinel,
    Weights,
)
from moecompile.recognize.rules.views import features


def weights_of(c: RoleMode, t: object) -> tuple[Weights, D.Dims] | None:
    """t as the routing weights of pairs, with its dimensions (those of an unknown live-in by number)."""
    role = c.get(t)
    if isinstance(role, Chosen):
        return Weights(None, role.tree, role.routing, role.base), role.dims
    if isinstance(role, DenseWeights) and role.fill == 0:
        return Weights(None, role.tree, role.routing, role.base, dense=True), role.dims
    leaf = c.leaf(t)
    if leaf is not None and isinstance(t, Tensor) and t.is_floating_point() and "b" not in D.names(leaf.dims):
        return (Weights(leaf.ref), leaf.dims) if D.in_natural_order(leaf.dims) else None
    return None


def _as_term(c: RoleMode, t: object, like: Pairs) -> tuple[PairExpr, D.Dims] | None:
    """Another operand of an op on `like`: a number, a value over the same pairs, a bias, or routing weights."""
    number = c.number(t)
    if number is not None:
        return ("const", number), ()
    role = c.get(t)
    if isinstance(role, Pairs):
        same = role.routing is like.routing and role.space == like.space
        return (role.expr, role.dims) if same else None
    if isinstance(role, Gathered):
        if role.routing is like.routing and role.space == like.space and len(role.stack.sizes) == 1:
            return ("bias", role.stack, role.clamped), D.rename(role.dims, {"f": "c"})
        return None
    if not isinstance(t, Tensor):
        return None
    if like.space == DENSE_SPACE and t.dim() == 3 and t.shape[1] == 1 and D.names(like.dims[:1]) == {"e"}:
        stack = c.stack(t, 2)  # a bias [E,N] as [E,1,N]
        if stack is None or stack.e is None or D.size_of(like.dims, "e") != stack.experts or len(like.dims) != 3:
            return None
        vector = dataclasses.replace(stack, strides=stack.strides[1:], sizes=stack.sizes[1:])
        return ("bias", vector, 0), (like.dims[0], (), D.dim(("c", t.shape[2])))
    if like.space.kind == "subset" and t.dim() == 1:
        stack = c.stack(t, 1)
        return None if stack is None or t.shape[0] == 1 else (("bias", stack, 0), (D.dim(("c", t.shape[0])),))
    found = weights_of(c, t)
    if found is None or like.space not in (TOKEN_SPACE, DENSE_SPACE):
        return None
    weights, dims = found
    if weights.routing is not None and weights.routing is not like.routing and like.routing is not None:
        return None
    if weights.dense != (like.space == DENSE_SPACE):
        return None
    if weights.routing is None:  # a live-in: its numbered dimensions must be the pairs', all of them and nothing else
        wanted = tuple(tuple(a for a in d if a[0] in "tk") for d in like.dims)
        if like.routing is None or not D.in_pair_order(like.dims):
            return None
        offset = len(like.dims) - t.dim()
        if offset < 0 or any(wanted[i] for i in range(offset)) or D.sizes(wanted)[offset:] != tuple(t.shape):
            return None
        dims = wanted[offset:]
    return ("weight", weights), dims


def arithmetic(c: RoleMode, out: Tensor, name: str, x: Any, y: Any) -> Role | None:
    """x `name` y where at least one is over pairs."""
    a, b = c.get(x), c.get(y)
    like = a if isinstance(a, Pairs) else b
    if not isinstance(like, Pairs):
        return _first_weighting(c, out, x, y) if name == "mul" else None
    left = (like.expr, like.dims) if like is a else _as_term(c, x, like)
    right = (like.expr, like.dims) if like is b and like is not a else _as_term(c, y, like)
    if x is y:
        right = left
    if left is None or right is None:
        return None
    dims = D.align(left[1], right[1])
    if dims is None or D.sizes(dims) != tuple(out.shape):
        return None
    k = max(like.top_k, *(r.top_k for r in (a, b) if isinstance(r, Pairs)))
    weighs = next((e[1] for e in (left[0], right[0]) if e[0] == "weight"), None)
    routing = weighs.routing if like.routing is None and weighs is not None else like.routing
    return Pairs(dims, (name, left[0], right[0]), routing, like.space, k)


def _first_weighting(c: RoleMode, out: Tensor, x: Any, y: Any) -> Role | None:
    """Rows of x, once per slot, times weights: a value over pairs begins here where the weight is on the input."""
    for rows, other in ((x, y), (y, x)):
        found = weights_of(c, other) if isinstance(other, Tensor) else None
        if found is None or found[0].routing is None:
            continue
        weights, wdims = found
        role = c.get(rows)
        leaf = c.leaf(rows) if role is None or isinstance(role, Leaf) else None
        if leaf is None or ("b" not in D.names(leaf.dims) and (weights.dense or found[0].routing.top_k != 1)):
            continue
        space = DENSE_SPACE if weights.dense else TOKEN_SPACE
        made = rows_of(leaf, "e" if weights.dense else "k")
        if made is None:
            continue
        dims = D.align(made[1], wdims)
        assert weights.routing is not None
        if dims is not None and D.sizes(dims) == tuple(out.shape):
            return Pairs(dims, ("mul", made[0], ("weight", weights)), weights.routing, space, weights.routing.top_k)
    return None


def rows_of(leaf: Leaf, broadcast: str = "b") -> tuple[PairExpr, D.Dims] | None:
    """A live-in [.., H], perhaps repeated, as rows: the last dimension (of those larger than 1) is features, the others are
    tokens."""
    shape = leaf.ref.tensor.shape
    last = str(max((i for i, s in enumerate(shape) if s != 1), default=len(shape) - 1))
    if len(shape) < 2 or not leaf.ref.tensor.is_floating_point():
        return None
    if not D.in_natural_order(tuple(tuple(a for a in d if a[0] != last) for d in leaf.dims)):
        return None
    mapping = {n: "t" for n in D.names(leaf.dims) if n.isdigit() and n != last}
    dims = D.rename(leaf.dims, {**mapping, last: "c", "b": broadcast})
    return ("row", leaf.ref) if leaf.cast is None else ("cast", leaf.cast, ("row", leaf.ref)), dims


# ---------------------------------------------------------------- rules


@rule(aten.mul, aten.mul_)
def _mul(c: RoleMode, out: Tensor, x: Any, y: Any) -> Role | None:
    if not out.is_floating_point():
        return None
    return _of_expert(c, x, y) or _of_expert(c, y, x) or arithmetic(c, out, "mul", x, y)


def _of_expert(c: RoleMode, weights: Any, mask: Any) -> Role | None:
    """weights * (ids == e)."""
    m = c.get(mask)
    found = weights_of(c, weights) if isinstance(m, Mask) and len(m.dims) == 2 else None
    if found is None or not isinstance(m, Mask) or found[0].dense or D.names(m.dims[:1]) > {"t"} or D.names(m.dims[1:]) > {"k"}:
        return None
    if found[0].routing not in (None, m.routing) or tuple(weights.shape) != D.sizes(m.dims):
        return None
    if found[0].routing is not None and found[1] != m.dims:
        return None
    return ExpertWeight(m.dims, found[0], m.routing, m.expert)


@rule(aten.add, aten.add_)
def _add(c: RoleMode, out: Tensor, x: Any, y: Any, *, alpha: Any = 1) -> Role | None:
    return arithmetic(c, out, "add", x, y) if alpha == 1 and out.is_floating_point() else None


@rule(aten.div, aten.div_)
def _div(c: RoleMode, out: Tensor, x: Any, y: Any, *, rounding_mode: str | None = None) -> Role | None:
    return arithmetic(c, out, "div", x, y) if rounding_mode is None and out.is_floating_point() else None


@rule(aten.sub, aten.sub_)
def _sub(c: RoleMode, out: Tensor, x: Any, y: Any, *, alpha: Any = 1) -> Role | None:
    return arithmetic(c, out, "sub", x, y) if alpha == 1 else None


@rule(aten.rsub)
def _rsub(c: RoleMode, out: Tensor, x: Any, y: Any, alpha: Any = 1) -> Role | None:
    return arithmetic(c, out, "sub", y, x) if alpha == 1 else None


@rule(aten.maximum)
def _maximum(c: RoleMode, out: Tensor, x: Any, y: Any) -> Role | None:
    return arithmetic(c, out, "maximum", x, y)


@rule(aten.minimum)
def _minimum(c: RoleMode, out: Tensor, x: Any, y: Any) -> Role | None:
    return arithmetic(c, out, "minimum", x, y)


def mapped(c: RoleMode, x: object, f: Callable[[PairExpr], PairExpr]) -> Role | None:
    role = c.get(x)
    return dataclasses.replace(role, expr=f(role.expr)) if isinstance(role, Pairs) else None


@rule(aten.clamp, aten.clamp_)
def _clamp(c: RoleMode, out: Tensor, x: Tensor, low: Any = None, high: Any = None) -> Role | None:
    role = c.get(x)
    numbers = [None if v is None else c.number(v) for v in (low, high)]
    if any(n is None and v is not None for n, v in zip(numbers, (low, high), strict=True)):
        return None
    if not isinstance(role, Pairs):
        return None
    e = role.expr
    if numbers[0] is not None:
        e = ("maximum", e, ("const", numbers[0]))
    if numbers[1] is not None:
        e = ("minimum", e, ("const", numbers[1]))
    return dataclasses.replace(role, expr=e)


@rule(aten.clamp_min, aten.clamp_min_)
def _clamp_min(c: RoleMode, out: Tensor, x: Tensor, low: Any) -> Role | None:
    return _clamp(c, out, x, low, None)  # type: ignore[no-any-return]


@rule(aten.clamp_max, aten.clamp_max_)
def _clamp_max(c: RoleMode, out: Tensor, x: Tensor, high: Any) -> Role | None:
    return _clamp(c, out, x, None, high)  # type: ignore[no-any-return]


@rule(aten.sigmoid, aten.sigmoid_)
def _sigmoid(c: RoleMode, out: Tensor, x: Tensor) -> Role | None:
    return mapped(c, x, lambda a: ("sigmoid", a))


@rule(aten.sqrt)
def _sqrt(c: RoleMode, out: Tensor, x: Tensor) -> Role | None:
    return mapped(c, x, lambda a: ("sqrt", a))


def _unary(name: str, f: Callable[[PairExpr], PairExpr], *packets: object) -> None:
    rule(*packets)(lambda c, out, x, *_: mapped(c, x, f))


_unary("silu", X.silu, aten.silu, aten.silu_)
_unary("relu", X.relu, aten.relu, aten.relu_)
_unary("neg", lambda a: ("neg", a), aten.neg)
_unary("exp", lambda a: ("exp", a), aten.exp)
_unary("abs", lambda a: ("abs", a), aten.abs)
_unary("tanh", lambda a: ("tanh", a), aten.tanh)
_unary("erf", lambda a: ("erf", a), aten.erf)


@rule(aten.gelu)
def _gelu(c: RoleMode, out: Tensor, x: Tensor, *, approximate: str = "none") -> Role | None:
    return mapped(c, x, lambda a: X.gelu(a, approximate))


@rule(aten.glu)
def _glu(c: RoleMode, out: Tensor, x: Tensor, dim: int = -1) -> Role | None:
    role, dim = c.get(x), dim % x.dim()
    if not isinstance(role, Pairs):
        return None
    n = out.shape[dim]
    a, b = features(role, dim, 0, 1, n), features(role, dim, n, 1, n)
    return None if a is None or b is None else dataclasses.replace(a, expr=("mul", a.expr, ("sigmoid", b.expr)))


@rule(aten.pow)
def _pow(c: RoleMode, out: Tensor, x: Any, y: Any) -> Role | None:
    n = c.number(y)
    if n == 0.5:
        return mapped(c, x, lambda a: ("sqrt", a))
    if n not in (2, 3):
        return None
    return mapped(c, x, lambda a: ("mul", a, a) if n == 2 else ("mul", ("mul", a, a), a))


@rule(aten.square)
def _square(c: RoleMode, out: Tensor, x: Tensor) -> Role | None:
    return mapped(c, x, lambda a: ("mul", a, a))


@rule(aten.masked_fill, aten.masked_fill_)
def _masked_fill(c: RoleMode, out: Tensor, x: Tensor, mask: Tensor, value: Any) -> Role | None:
    m, fill = c.get(mask), c.number(value)
    if fill is None:
        return None
    role = c.get(x)
    if isinstance(m, Sentinel) and fill == 0:
        if isinstance(role, Pairs):
            same = role.routing is m.routing and role.space.order == (m.order or 0)
            fits = D.align(role.dims, m.dims) == role.dims
            return dataclasses.replace(role, expr=("sentinel", m.bound, role.expr)) if same and fits else None
        found = weights_of(c, x)
        if found is None or m.order is not None or x.shape != mask.shape or found[0].dense or not D.in_pair_order(m.dims):
            return None
        if found[0].routing is None or (found[0].routing is m.routing and found[1] == m.dims):
            return Pairs(m.dims, ("sentinel", m.bound, ("weight", found[0])), m.routing, TOKEN_SPACE, m.routing.top_k)
    return None

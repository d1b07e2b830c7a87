"""The router: scores, groups, the choice of experts, and the weights of the chosen.

Trees, from logits to choice          and from the chosen to their weights
    ("logits", ref)                       ("choice",)                what the top-k returned
    ("cast", dtype, a)                    ("gather", a)              scores a at the chosen ids
    ("softmax", a) ("sigmoid", a)         ("cast", dtype, a) ("softmax", a) ("sigmoid", a) ("scale", a, s)
    ("softplus", a) ("sqrt", a)           ("normalise", a, eps, least)      a / max(sum(a) + eps, least)
    ("bias", a, ref)
    ("group", a, groups, kept, how, fill)
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from torch import Tensor

from moecompile.recognize import dims as D
from moecompile.recognize.mode import RoleMode, aten, rule
from moecompile.recognize.roles import (
    Chosen,
    ChosenSum,
    DenseWeights,
    Full,
    GroupBest,
    GroupIds,
    GroupMask,
    GroupScore,
    Ids,
    Leaf,
    Role,
    Routing,
    Scores,
    Tree,
)


def as_scores(c: RoleMode, x: object) -> Scores | None:
    """x as logits: the last dimension is the experts, the others are tokens."""
    role = c.get(x)
    if isinstance(role, Scores):
        return role
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() < 2 or not (role is None or isinstance(role, Leaf)):
        return None
    ref, cast = c.ref(x), None
    if isinstance(role, Leaf) and role.cast is not None and role.dims == D.fresh(role.ref.tensor.shape):
        ref, cast = role.ref, role.cast
    if ref is None:
        return None
    dims = (*(D.dim(("t", s)) for s in x.shape[:-1]), D.dim(("e", x.shape[-1])))
    return Scores(dims, ("logits", ref) if cast is None else ("cast", cast, ("logits", ref)))


def is_last(role: Role, dim: Any, names: set[str]) -> bool:
    """Is `dim` (a number, or a list of one) the last dimension, and that an axis of these names?"""
    if isinstance(dim, (list, tuple)):
        if len(dim) != 1:
            return False
        dim = dim[0]
    n = len(role.dims)
    return isinstance(dim, int) and dim % n == n - 1 and {a for a, _ in role.dims[-1]} <= names


def _on_scores(c: RoleMode, x: Tensor, name: str) -> Role | None:
    role = c.get(x)
    if isinstance(role, Chosen):
        return dataclasses.replace(role, tree=(name, role.tree), base=None)
    if isinstance(role, DenseWeights) and name == "sigmoid" and role.fill == -math.inf and role.tree is not None:
        return dataclasses.replace(role, tree=(name, role.tree), fill=0.0, base=None)
    scores = as_scores(c, x)
    return None if scores is None else dataclasses.replace(scores, tree=(name, scores.tree))


@rule(aten._softmax)
def _softmax(c: RoleMode, out: Tensor, x: Tensor, dim: int, half_to_float: bool = False) -> Role | None:
    """half_to_float: on CUDA softmax(float16, dtype=float32) is one op, which casts first."""

    def softmax(tree: Tree) -> Tree:
        return ("softmax", ("cast", out.dtype, tree) if half_to_float else tree)

    role = c.get(x)
    if isinstance(role, Chosen):
        return dataclasses.replace(role, tree=softmax(role.tree), base=None) if is_last(role, dim, {"k"}) else None
    if isinstance(role, DenseWeights):
        if role.fill == -math.inf and role.tree is not None and is_last(role, dim, {"e"}):
            return dataclasses.replace(role, tree=softmax(role.tree), fill=0.0, base=None, joined=True)
        return None
    scores = as_scores(c, x)
    if scores is None or not is_last(scores, dim, {"e"}):
        return None
    return dataclasses.replace(scores, tree=softmax(scores.tree))


@rule(aten.softplus)
def _softplus(c: RoleMode, out: Tensor, x: Tensor, beta: Any = 1, threshold: Any = 20) -> Role | None:
    asked = (c.number(beta), c.number(threshold)) == (1, 20) and isinstance(c.get(x), (Leaf, Scores, type(None)))
    return _on_scores(c, x, "softplus") if asked else None


@rule(aten.sqrt)
def _sqrt(c: RoleMode, out: Tensor, x: Tensor) -> Role | None:
    role = c.get(x)
    return _on_scores(c, x, "sqrt") if isinstance(role, Scores) and role.tree[0] == "softplus" else None


@rule(aten.sigmoid, aten.sigmoid_)
def _sigmoid(c: RoleMode, out: Tensor, x: Tensor) -> Role | None:
    role = c.get(x)
    asked = role is None or isinstance(role, (Leaf, Scores, Chosen, DenseWeights))
    return _on_scores(c, x, "sigmoid") if asked else None


# ---------------------------------------------------------------- the choice


@rule(aten.topk)
def _topk(c: RoleMode, out: Any, x: Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> Any:
    role = c.get(x)
    if not largest or c.symbolic or dim % x.dim() != x.dim() - 1:
        return None
    if isinstance(role, Scores) and role.dims and D.names(role.dims[-1:]) == {"m"} and k == 2:
        groups = D.size_of(role.dims, "g")
        return [GroupBest((*role.dims[:-1], D.dim(("b", 2))), role.tree, groups), None]
    if isinstance(role, GroupScore):
        dims = (*role.dims[:-1], D.dim(("0", k)))
        return [None, GroupIds(dims, role, k)]
    scores = as_scores(c, x)
    if scores is None or not is_last(scores, dim, {"e"}):
        return None
    return _chosen(c, scores, k, sorted, (*scores.dims[:-1], D.dim(("k", k))), "topk")


def _chosen(c: RoleMode, scores: Scores, k: int, sorted: bool, dims: D.Dims, select: str) -> list[Role]:
    routing = Routing(None, scores.tree, k, D.sizes(scores.dims)[-1], sorted, select, next(c.routings))
    return [Chosen(dims, ("choice",), routing), Ids(dims, routing)]


@rule(aten.max, aten.argmax)
def _max(c: RoleMode, out: Any, x: Tensor, dim: Any = None, keepdim: bool = False) -> Any:
    """The best expert: top-1."""
    if dim is None or isinstance(dim, Tensor):
        return None
    role = c.get(x)
    best = _group_max(c, out, x, dim, keepdim)
    if best is not None:
        return [best, None]
    scores = as_scores(c, x) if isinstance(role, Scores) else None
    if scores is None or not is_last(scores, dim, {"e"}):
        return None
    found = _chosen(c, scores, 1, True, D.without(scores.dims, [len(scores.dims) - 1], keepdim), "max")
    return found[1] if isinstance(out, Tensor) else found


@rule(aten.amax)
def _group_max(c: RoleMode, out: Any, x: Tensor, dim: Any = None, keepdim: bool = False) -> Role | None:
    role = c.get(x)
    if isinstance(role, Scores) and D.names(role.dims[-1:]) == {"m"} and is_last(role, dim, {"m"}) and not keepdim:
        return GroupScore(role.dims[:-1], role.tree, D.size_of(role.dims, "g"), "max")
    return None


@rule(aten.gather)
def _gather(c: RoleMode, out: Tensor, x: Tensor, dim: int, index: Tensor, **_: Any) -> Role | None:
    ids, scores = c.get(index), None
    if not isinstance(ids, Ids) or ids.clamped:
        return None
    role = c.get(x)
    if isinstance(role, DenseWeights):
        same = role.routing is ids.routing and role.dims[:-1] == ids.dims[:-1]
        if role.tree is None or not same or not is_last(role, dim, {"e"}):
            return None
        return Chosen(ids.dims, role.tree, ids.routing)
    if isinstance(role, Scores):
        scores = role
    elif ids.routing.choice is not None:
        scores = as_scores(c, x)
    if scores is None or not is_last(scores, dim, {"e"}) or scores.dims[:-1] != ids.dims[:-1]:
        return None
    return Chosen(ids.dims, ("gather", scores.tree), ids.routing)


# ---------------------------------------------------------------- groups


@rule(aten.bitwise_not, aten.logical_not)
def _not(c: RoleMode, out: Tensor, x: Tensor) -> Role | None:
    role = c.get(x)
    return dataclasses.replace(role, inverted=not role.inverted) if isinstance(role, GroupMask) else None


@rule(aten.scatter, aten.scatter_)
def _scatter(c: RoleMode, out: Tensor, x: Tensor, dim: int, index: Tensor, source: Any, **kwargs: Any) -> Role | None:
    """zeros.scatter(1, groups, 1): which groups were chosen; full(v).scatter(1, ids, weights): dense weights."""
    base, at = c.get(x), c.get(index)
    if kwargs or not isinstance(base, Full) or base.value is None or dim % x.dim() != x.dim() - 1:
        return None
    if isinstance(at, GroupIds):
        ones = c.get(source) if isinstance(source, Tensor) else None
        value = ones.value if isinstance(ones, Full) else c.number(source)
        if (base.value, value) in ((0, 1), (1, 0)) and x.shape == out.shape and D.sizes(at.score.dims) == tuple(x.shape):
            return GroupMask(at.score.dims, at, inverted=value == 0)
        return None
    if isinstance(at, Ids) and isinstance(source, Tensor) and base.value in (0, -math.inf) and at.dims and not at.clamped:
        weights = c.get(source)
        classes = at.routing.num_classes
        if isinstance(weights, Chosen) and weights.routing is at.routing and weights.dims == at.dims and x.shape[-1] == classes:
            dims = (*at.dims[:-1], D.dim(("e", classes)))
            return DenseWeights(dims, weights.tree, at.routing, base.value)
        given = c.leaf(source) if not isinstance(weights, Chosen) and base.value == 0 else None
        distinct = at.routing.choice is not None or at.routing.top_k == 1  # else one of two equal ids overwrites the other
        if (
            distinct
            and given is not None
            and tuple(source.shape) == D.sizes(at.dims)
            and classes in (0, x.shape[-1])
            and x.dim() == 2
        ):
            return DenseWeights((*at.dims[:-1], D.dim(("e", x.shape[-1]))), None, at.routing, 0.0)
    return None


@rule(aten.masked_fill, aten.masked_fill_)
def _masked_fill(c: RoleMode, out: Tensor, x: Tensor, mask: Tensor, value: Any) -> Role | None:
    scores, m, fill = c.get(x), c.get(mask), c.number(value)
    if isinstance(scores, Scores) and isinstance(m, GroupMask) and fill is not None:
        return _masked(scores, m, fill)
    return None


@rule(aten.where)
def _where(c: RoleMode, out: Tensor, mask: Tensor, x: Any = None, y: Any = None) -> Role | None:
    scores, m, other = c.get(x), c.get(mask), c.get(y)
    fill = other.value if isinstance(other, Full) else c.number(y)
    if isinstance(scores, Scores) and isinstance(m, GroupMask) and fill is not None:
        return _masked(scores, dataclasses.replace(m, inverted=not m.inverted), fill)
    return None


def _masked(scores: Scores, mask: GroupMask, fill: float) -> Role | None:
    """scores.masked_fill(mask, fill): only the chosen groups' scores are left."""
    score = mask.ids.score
    if not mask.inverted or score.tree != scores.tree or fill not in (0.0, -math.inf):
        return None
    experts = D.size_of(scores.dims, "e") * D.size_of(scores.dims, "g") * D.size_of(scores.dims, "m")
    members = experts // score.groups
    expected = D.rename(score.dims, {})
    tail = {
        D.dim(("g", score.groups), ("b", members)),
        D.dim(("g", score.groups), ("m", members)),
    }
    flat = mask.dims[:-1] == expected[:-1] and mask.dims[-1] in tail and len(scores.dims) == len(mask.dims)
    apart = mask.dims[:-1] == expected and mask.dims[-1] in ((), D.dim(("b", members)))
    if not (flat or (apart and len(scores.dims) == len(mask.dims))):
        return None
    return dataclasses.replace(scores, tree=("group", scores.tree, score.groups, mask.ids.top_k, score.how, fill))


# ---------------------------------------------------------------- arithmetic


def _nonnegative(tree: Tree, choice: Tree | None) -> bool:
    """Is this certainly >= 0 (or NaN)?"""
    if tree[0] in ("softmax", "sigmoid", "softplus", "sqrt"):
        return True
    if tree[0] in ("cast", "gather"):
        return _nonnegative(tree[-1], choice)
    return tree[0] == "choice" and choice is not None and _nonnegative(choice, None)


@rule(aten.sum)
def _sum(c: RoleMode, out: Tensor, x: Tensor, dim: Any = None, keepdim: bool = False, **_: Any) -> Role | None:
    role = c.get(x)
    if isinstance(role, GroupBest) and is_last(role, dim, {"b"}) and not keepdim:
        return GroupScore(role.dims[:-1], role.tree, role.groups, "top2")
    return _summed(role, dim, keepdim) if isinstance(role, Chosen) else None


def _summed(role: Chosen, dim: Any, keepdim: bool) -> Role | None:
    if not is_last(role, dim, {"k"}) or D.size_of(role.dims, "k") != role.routing.top_k:
        return None
    return ChosenSum(D.without(role.dims, [len(role.dims) - 1], keepdim), role.tree, role.routing)


@rule(aten.linalg_vector_norm)
def _norm(c: RoleMode, out: Tensor, x: Tensor, ord: float = 2, dim: Any = None, keepdim: bool = False, **_: Any) -> Role | None:
    role = c.get(x)
    if ord == 1 and dim is not None and isinstance(role, Chosen) and _nonnegative(role.tree, role.routing.choice):
        return _summed(role, dim, keepdim)
    return None


@rule(aten.add, aten.add_)
def _add(c: RoleMode, out: Tensor, x: Tensor, y: Any, *, alpha: Any = 1) -> Role | None:
    """scores + bias, or sum + eps."""
    if alpha != 1 or not isinstance(x, Tensor) or not out.is_floating_point():
        return None
    a = c.get(x)
    number = c.number(y)
    if isinstance(a, ChosenSum) and number is not None and not a.eps and not a.least:
        return dataclasses.replace(a, eps=number)
    if isinstance(y, Tensor):
        for one, other in ((x, y), (y, x)):
            scores, bias = c.get(one), c.leaf(other)
            if scores is None and x.dim() >= 2 and one is x and y.dim() == 1:
                scores = as_scores(c, x)  # a bias on the logits themselves
            if isinstance(scores, Scores) and bias is not None and bias.cast is None and isinstance(other, Tensor):
                whole = tuple(bias.ref.tensor.shape) == (D.sizes(scores.dims)[-1],)
                alone = all(not d for d in bias.dims[:-1]) and len(bias.dims) <= len(scores.dims)
                if (
                    whole
                    and alone
                    and D.names(scores.dims[-1:]) <= {"e"}
                    and scores.tree[0] != "bias"
                    and other.shape[-1] == out.shape[-1]
                ):
                    return dataclasses.replace(scores, tree=("bias", scores.tree, bias.ref))
    return None


@rule(aten.clamp, aten.clamp_, aten.clamp_min, aten.clamp_min_)
def _at_least(c: RoleMode, out: Tensor, x: Tensor, min: Any = None, max: Any = None) -> Role | None:
    role, least = c.get(x), c.number(min)
    if isinstance(role, ChosenSum) and max is None and least is not None and least > 0 and not role.least:
        return dataclasses.replace(role, least=least)
    return None


@rule(aten.div, aten.div_)
def _div(c: RoleMode, out: Tensor, x: Tensor, y: Any, *, rounding_mode: str | None = None) -> Role | None:
    a, b, number = c.get(x), c.get(y), c.number(y)
    if rounding_mode is not None or not out.is_floating_point():
        return None
    if isinstance(a, Chosen) and isinstance(b, ChosenSum):
        if a.routing is b.routing and a.tree == b.of and D.align(a.dims, b.dims) == a.dims:
            return dataclasses.replace(a, tree=("normalise", a.tree, b.eps, b.least), base=None)
        return None
    if isinstance(a, Chosen) and number and math.frexp(number)[0] == 0.5:  # by a power of two: times its inverse, exactly
        return dataclasses.replace(a, tree=("scale", a.tree, 1.0 / number), base=None)
    return None


@rule(aten.mul, aten.mul_)
def _mul(c: RoleMode, out: Tensor, x: Any, y: Any) -> Role | None:
    for one, other in ((x, y), (y, x)):
        role, number = c.get(one), c.number(other)
        if isinstance(role, Chosen) and number is not None:
            return dataclasses.replace(role, tree=("scale", role.tree, number), base=None)
    return None

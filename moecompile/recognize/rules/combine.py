"""Adding the weighted rows of a token's experts up."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor

from moecompile.errors import Unsupported
from moecompile.recognize import dims as D
from moecompile.recognize.mlp import merge
from moecompile.recognize.mode import RoleMode, aten, rule
from moecompile.recognize.roles import (
    DENSE_SPACE,
    TOKEN_SPACE,
    Counts,
    ExpertWeight,
    Full,
    Mask,
    OneHot,
    PairRows,
    Pairs,
    PairToken,
    Role,
    Sum,
    SumRows,
    Term,
)
from moecompile.recognize.rules.pointwise import weights_of


@rule(aten.sum)
def _sum(c: RoleMode, out: Tensor, x: Tensor, dim: Any = None, keepdim: bool = False, **_: Any) -> Role | None:
    role = c.get(x)
    if isinstance(role, OneHot) and dim is not None:
        at = [d % x.dim() for d in (dim if isinstance(dim, (list, tuple)) else [dim])]
        rest = D.without(role.dims, at, keepdim)
        if D.names(rest) <= {"e"} and not any("e" in D.names(role.dims[i : i + 1]) for i in at) and len(rest) == 1:
            return Counts(rest, role.routing, D.sizes(rest)[0])
        return None
    if isinstance(role, ExpertWeight):
        last = dim if not isinstance(dim, (list, tuple)) else (dim[0] if len(dim) == 1 else None)
        if last not in (-1, x.dim() - 1) or x.dim() != 2:
            return None
        return dataclasses.replace(role, dims=D.without(role.dims, [1], keepdim))
    if not isinstance(role, Pairs) or dim is None or keepdim:
        return None
    at = [d % x.dim() for d in (dim if isinstance(dim, (list, tuple)) else [dim])]
    rest = D.without(role.dims, at, False)
    return complete(role, rest, [a for i in at for a in role.dims[i]])


def complete(role: Pairs, rest: D.Dims, gone: list[D.Axis]) -> Sum | None:
    """The sum over slots (or over all experts, where every expert saw every token)."""
    if role.routing is None:
        return None
    if role.space == TOKEN_SPACE:
        k = role.top_k or role.routing.top_k
        wanted = [] if k == 1 else [("k", k)]
    elif role.space == DENSE_SPACE:
        k = role.routing.top_k
        wanted = [a for a in D.axes(role.dims) if a[0] == "e"]
    else:
        return None
    if not k or gone != wanted or len(rest) < 2 or not D.names(rest[:-1]) <= {"t"} or not D.names(rest[-1:]) <= {"c"}:
        return None
    return Sum(rest, role.routing, (Term(-1, role.expr, role.space, k),))


@rule(aten.bmm)
def _weighted_sum(c: RoleMode, out: Tensor, a: Tensor, b: Tensor) -> Role | None:
    """bmm of weights [T,1,K] and rows [T,K,H], or of rows [T,H,K] and weights [T,K,1]."""
    for rows, other, slots, unit in ((b, a, 1, 1), (a, b, 2, 2)):
        role, found = c.get(rows), weights_of(c, other)
        if not isinstance(role, Pairs) or role.routing is None or found is None or role.space != TOKEN_SPACE or found[0].dense:
            continue
        weights, dims = found
        k = role.top_k or role.routing.top_k
        t = rows.shape[0]
        shape = (t, 1, k) if unit == 1 else (t, k, 1)
        names = [D.names(d_) for d_ in (role.dims[:1], role.dims[slots : slots + 1])]
        if tuple(other.shape) != shape or not (names[0] <= {"t"} and names[1] <= {"k"}) or rows.shape[slots] != k:
            continue
        if weights.routing is None:
            if dims not in (_numbered(other.shape, 0, 2 if unit == 1 else 1), _numbered(other.shape, 0, 1)):
                continue
        elif weights.routing is not role.routing or dims != tuple(
            D.dim(("t", s) if i == 0 else ("k", s)) for i, s in enumerate(shape)
        ):
            continue
        feature = role.dims[3 - slots]
        if D.names((feature,)) > {"c"}:
            continue
        rest = (role.dims[0], (), feature) if unit == 1 else (role.dims[0], feature, ())
        return Sum(rest, role.routing, (Term(-1, ("mul", role.expr, ("weight", weights)), TOKEN_SPACE, k),), whole=False)
    return None


def _numbered(shape: Any, *names: int) -> D.Dims:
    """The dimensions of an unknown live-in whose non-unit dimensions are numbered so."""
    left = list(names)
    out = []
    for s in shape:
        out.append(() if s == 1 else D.dim((str(left.pop(0) if left else -1), s)))
    return tuple(out)


# ---------------------------------------------------------------- one expert after the other


def _dims_of_sum(x: Tensor) -> D.Dims:
    """[.., H]: all dimensions but the last are tokens."""
    return (*(D.dim(("t", s)) for s in x.shape[:-1]), D.dim(("c", x.shape[-1])))


def _with_term(base: Role | None, at: PairToken, rows: Pairs, x: Tensor) -> Sum | None:
    """The running sum with another term in it."""
    if rows.routing is not at.routing or rows.space != at.space or len(rows.dims) != 2 or D.names(rows.dims[1:]) > {"c"}:
        return None
    if D.names(rows.dims[:1]) > {"p", "s"} or D.sizes(rows.dims)[1] != x.shape[-1]:
        return None
    term = Term(at.space.expert, rows.expr, at.space, at.top_k or at.routing.top_k)
    if isinstance(base, Full) and base.value == 0:
        return Sum(_dims_of_sum(x), at.routing, (term,))
    if isinstance(base, Sum) and base.routing is at.routing and term.expert >= 0:
        seen = {t.expert for t in base.terms}
        if -1 not in seen and term.expert not in seen and base.cast is None:
            return Sum(base.dims, at.routing, (*base.terms, term))
    return None


@rule(aten.index_add, aten.index_add_)
def _index_add(c: RoleMode, out: Tensor, x: Tensor, dim: int, index: Tensor, source: Tensor, *, alpha: Any = 1) -> Role | None:
    base, at, rows = c.get(x), c.get(index), c.get(source)
    if dim % x.dim() != 0 or alpha != 1 or x.dim() != 2 or not isinstance(at, PairToken) or not isinstance(rows, Pairs):
        return None
    return _with_term(base, at, rows, x) if len(at.dims) == 1 else None


@rule(aten.scatter_add, aten.scatter_add_)
def _scatter_add(c: RoleMode, out: Tensor, x: Tensor, dim: int, index: Tensor, source: Tensor) -> Role | None:
    """scatter_add(0, token[:, None].expand(-1, H), rows)."""
    base, at, rows = c.get(x), c.get(index), c.get(source)
    if not isinstance(at, PairToken) or not isinstance(rows, Pairs) or dim % x.dim() != 0 or x.dim() != 2:
        return None
    wide = len(at.dims) == 2 and D.names(at.dims[:1]) <= {"p", "s"} and D.names(at.dims[1:]) <= {"b"}
    return _with_term(base, at, rows, x) if wide and tuple(index.shape) == tuple(source.shape) else None


@rule(aten.index_put, aten.index_put_)
def _put(
    c: RoleMode, out: Tensor, x: Tensor, indices: list[Tensor | None], values: Tensor, accumulate: bool = False
) -> Role | None:
    """out[token] = out[token] + rows, or index_put(.., accumulate=True); out[token] = rows where a token has one expert."""
    at, new, base = _tokens(c, x, indices, 1), c.get(values), c.get(x)
    if at is None:
        return None
    if isinstance(new, Pairs):
        once = at.routing.top_k == 1 and at.space.kind == "subset"
        return _with_term(base, at, new, x) if accumulate or once else None
    if not isinstance(new, SumRows) or new.added is None or new.space != at.space or new.routing is not at.routing:
        return None
    if new.storage != c.key(x) or new.version != c.version[c.key(x)]:
        return None
    distinct = at.routing.distinct or "k" not in at.space.how
    if accumulate or not distinct or at.space.kind != "subset":  # one expert twice in a token's slots: one of the two would be lost
        return None
    if isinstance(base, Full) and base.value == 0:
        return Sum(_dims_of_sum(x), at.routing, (new.added,))
    if isinstance(base, Sum) and base.routing is at.routing and new.added.expert not in {t.expert for t in base.terms} | {-1}:
        return Sum(_dims_of_sum(x), at.routing, (*base.terms, new.added))
    return None


@rule(aten.index_put, aten.index_put_)
def _put_pairs(
    c: RoleMode, out: Tensor, x: Tensor, indices: list[Tensor | None], values: Tensor, accumulate: bool = False
) -> Role | None:
    """blank[flat ids == e] = rows, expert after expert: the rows of all pairs, once each expert's are in."""
    at, rows, base = c.get(indices[0]) if len(indices) == 1 else None, c.get(values), c.get(x)
    if not isinstance(at, Mask) or not isinstance(rows, Pairs) or len(at.dims) != 1 or D.names(at.dims) != {"t", "k"}:
        return None
    routing = at.routing
    mine = rows.routing is routing and rows.space == at.space and len(rows.dims) == 2 and D.names(rows.dims[1:]) <= {"c"}
    if accumulate or not mine or routing.choice is None or x.dim() != 2 or D.sizes(rows.dims)[1] != x.shape[1]:
        return None
    before = base.exprs if isinstance(base, PairRows) and base.routing is routing else ()
    if not before and not isinstance(base, Full):
        return None
    exprs = (*before, (at.expert, rows.expr))
    dims = (at.dims[0], D.dim(("c", x.shape[1])))
    experts = sorted(e for e, _ in exprs)
    if len(set(experts)) != len(experts):
        return None
    if experts != list(range(routing.num_classes)):
        return PairRows(dims, routing, exprs)
    try:
        merged = merge([expr for _, expr in sorted(exprs, key=lambda one: one[0])])
    except Unsupported:
        return None
    return Pairs(dims, merged, routing, TOKEN_SPACE, routing.top_k)


def _tokens(c: RoleMode, x: Tensor, indices: list[Tensor | None], count: int) -> PairToken | None:
    """What x [.., H] is indexed by: the tokens of one expert's pairs, as numbers or as a mask over x's leading dimensions."""
    at = c.get(indices[0]) if len(indices) == 1 else None
    if isinstance(at, Mask) and len(at.dims) == x.dim() - 1 and D.names(at.dims) <= {"t"}:
        return PairToken((D.dim(("s", count)),), at.routing, at.space, at.routing.top_k)
    return at if isinstance(at, PairToken) and len(at.dims) == 1 and x.dim() == 2 else None


@rule(aten.index)
def _rows_of_sum(c: RoleMode, out: Tensor, x: Tensor, indices: list[Tensor | None]) -> Role | None:
    """out[token], or out[mask]: about to have an expert's rows added."""
    role, at = c.get(x), _tokens(c, x, indices, out.shape[0])
    if at is None or at.space.kind != "subset":
        return None
    running = isinstance(role, Sum) and role.routing is at.routing
    if not running and not (isinstance(role, Full) and role.value == 0):
        return None
    dims = (at.dims[0], D.dim(("c", x.shape[-1])))
    return SumRows(dims, role, c.key(x), c.version[c.key(x)], at.routing, at.space)


@rule(aten.mul, aten.mul_)
def _weighted(c: RoleMode, out: Tensor, x: Any, y: Any) -> Role | None:
    """The sum of the only expert of each token, times its weight."""
    for one, other in ((x, y), (y, x)):
        total, found = c.get(one), weights_of(c, other)
        if not isinstance(total, Sum) or total.cast is not None or found is None:
            continue
        weights, dims = found
        single = weights.routing is total.routing and weights.routing.choice is not None and weights.routing.top_k == 1
        if single and not weights.dense and D.align(total.dims, dims) == total.dims and D.sizes(total.dims) == tuple(out.shape):
            terms = tuple(dataclasses.replace(t, expr=("mul", t.expr, ("weight", weights))) for t in total.terms)
            return dataclasses.replace(total, terms=terms)
    return None


@rule(aten.add, aten.add_)
def _accumulated(c: RoleMode, out: Tensor, x: Any, y: Any, *, alpha: Any = 1) -> Role | None:
    """out[token] + rows."""
    for one, other in ((x, y), (y, x)) if alpha == 1 else ():
        total, rows = c.get(one), c.get(other)
        if not isinstance(total, SumRows) or total.added is not None or not isinstance(rows, Pairs):
            continue
        if rows.routing is total.routing and rows.space == total.space and D.sizes(rows.dims) == D.sizes(total.dims):
            return dataclasses.replace(total, added=Term(total.space.expert, rows.expr, total.space, rows.top_k))
    return None

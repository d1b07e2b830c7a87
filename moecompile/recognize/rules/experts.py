"""Gathering rows, weights and ids by pair, and the matmuls of the experts."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor

from moecompile.recognize import dims as D
from moecompile.recognize.mode import RoleMode, aten, rule
from moecompile.recognize.roles import (
    DENSE_SPACE,
    TOKEN_SPACE,
    Chosen,
    ExpertWeight,
    Full,
    Gathered,
    Ids,
    Inverse,
    Leaf,
    Mask,
    Offsets,
    PairExpr,
    Pairs,
    PairSlot,
    PairToken,
    Perm,
    Role,
    SortedIds,
    Space,
    Sum,
)
from moecompile.recognize.rules.order import is_flat
from moecompile.recognize.rules.pointwise import rows_of, weights_of
from moecompile.recognize.rules.views import as_ids

GATHERED = -1  # fourth part of ("mm", ..): the matrix was indexed by unclamped ids; > 0: by ids clamped below this; 0: otherwise


def source(c: RoleMode, x: Tensor) -> Leaf | None:
    """x as a live-in, whatever else it may be: a node must hold it."""
    role = c.get(x)
    if isinstance(role, Leaf):
        return role
    ref = c.ref(x)
    return None if ref is None else Leaf(D.fresh(x.shape), ref)


@rule(aten.index)
def _index(c: RoleMode, out: Tensor, x: Tensor, indices: list[Tensor | None]) -> Role | None:
    if not indices:
        return None
    if indices[0] is None:
        return _rows_under_unit(c, x, indices)
    if len(indices) == 2 and indices[1] is not None:
        return _by_two(c, out, x, c.get(indices[0]), c.get(indices[1]))
    if len([i for i in indices if i is not None]) != 1:
        return None
    at = c.get(indices[0])
    if at is None and x.dim() == 3 and x.is_floating_point() and indices[0].dim() == 2:
        at = as_ids(c, indices[0])  # ids from a table, say
    if isinstance(at, Mask):
        return _by_mask(c, out, x, at)
    return gathered(c, out, x, at)


def _rows_under_unit(c: RoleMode, x: Tensor, indices: list[Tensor | None]) -> Role | None:
    """x[None, token]: rows below a dimension of size 1."""
    at, leaf = c.get(indices[-1]), c.get(x)
    if len(indices) != 2 or not isinstance(at, PairToken) or len(at.dims) != 1 or not isinstance(leaf, Leaf) or x.dim() != 3:
        return None
    made = rows_of(leaf) if x.shape[0] == 1 and "b" not in D.names(leaf.dims) else None
    if made is None or D.names(made[1][1:2]) > {"t"} or D.names(made[1][2:]) > {"c"}:
        return None
    return Pairs(((), at.dims[0], made[1][2]), made[0], at.routing, at.space, at.top_k)


@rule(aten.index_select)
def _index_select(c: RoleMode, out: Tensor, x: Tensor, dim: int, index: Tensor) -> Role | None:
    return gathered(c, out, x, c.get(index)) if dim % x.dim() == 0 else None


@rule(aten.gather)
def _gather(c: RoleMode, out: Tensor, x: Tensor, dim: int, index: Tensor, **_: Any) -> Role | None:
    """gather(x, 0, token[:, None].expand(-1, H)): whole rows."""
    at = c.get(index)
    if not isinstance(at, (PairToken, Perm, Inverse)) or x.dim() != 2 or dim % 2 != 0 or len(at.dims) != 2:
        return None
    if D.names(at.dims[1:]) > {"b"} or not D.names(at.dims[:1]) <= {"p", "s"} or out.shape[1] != x.shape[1]:
        return None
    return gathered(c, out, x, dataclasses.replace(at, dims=at.dims[:1]))


@rule(aten.embedding)
def _embedding(c: RoleMode, out: Tensor, weight: Tensor, ids: Tensor, *_: Any) -> Role | None:
    return gathered(c, out, weight, c.get(ids)) if isinstance(c.get(ids), (PairToken, Perm, Inverse)) else None


def gathered(c: RoleMode, out: Tensor, x: Tensor, at: Role | None) -> Role | None:
    """x[at]: what the rows of x are decides what the result is."""
    if isinstance(at, (PairToken, Perm, Inverse)) and len(at.dims) != 1:
        return None
    if isinstance(at, PairToken):
        return _rows(c, x, at)
    if isinstance(at, Perm):
        return _to_expert_order(c, x, at)
    if isinstance(at, Inverse):
        return _to_token_order(c, x, at)
    if isinstance(at, (Ids, SortedIds)) and x.dim() in (2, 3):
        stack = c.stack(x, x.dim() - 1)
        if stack is None:
            return None
        names = ("f", "h")[: x.dim() - 1]
        features = tuple(D.dim((n, s)) for n, s in zip(names, x.shape[1:], strict=True))
        space = TOKEN_SPACE if isinstance(at, Ids) else Space("expert", at.order)
        return Gathered((*at.dims, *features), stack, at.routing, space, at.clamped)
    return None


def _rows(c: RoleMode, x: Tensor, at: PairToken) -> Role | None:
    role = c.get(x)
    running = isinstance(role, Sum) and role.routing is at.routing
    if at.space.kind == "subset" and (running or (isinstance(role, Full) and role.value == 0)):
        return None  # rows of the running sum: rules/combine.py
    if isinstance(role, ExpertWeight):  # summed over the slots, at the tokens where any slot chose the expert
        same = role.routing is at.routing and role.expert == at.space.expert and D.names(role.dims[:1]) <= {"t"}
        once = role.routing.distinct or "k" not in at.space.how  # else a pair would get the weights of two
        if not same or any(role.dims[1:]) or not once or at.space.kind != "subset":
            return None
        return Pairs((at.dims[0], *((),) * (x.dim() - 1)), ("weight", role.weights), at.routing, at.space, at.top_k)
    if x.dim() == 1 or (x.dim() == 2 and x.shape[1] == 1 and isinstance(role, Chosen)):
        found_weights = weights_of(c, x) if at.routing.top_k == 1 else None
        if found_weights is None or (found_weights[0].routing or at.routing) is not at.routing:
            return None
        rest = ((),) * (x.dim() - 1)
        return Pairs((*at.dims, *rest), ("weight", found_weights[0]), at.routing, at.space, 1)
    leaf = source(c, x)
    if leaf is None or x.dim() != 2 or "b" in D.names(leaf.dims):
        return None
    made = rows_of(leaf)
    if made is None or len(made[1]) != 2:
        return None
    return Pairs((at.dims[0], made[1][1]), made[0], at.routing, at.space, at.top_k)


def _to_expert_order(c: RoleMode, x: Tensor, at: Perm) -> Role | None:
    role = c.get(x)
    space = Space("expert", at.order)
    if isinstance(role, Ids) and is_flat(role) and role.routing is at.routing:
        return SortedIds(at.dims, at.routing, at.order, role.clamped)
    if isinstance(role, Pairs):
        flat = role.space == TOKEN_SPACE and role.routing is at.routing and D.names(role.dims[:1]) <= {"t", "k", "r"}
        full = D.sizes(role.dims[:1]) == D.sizes(at.dims) and D.in_pair_order(role.dims)
        if flat and full and not D.names(role.dims[1:]) & {"t", "k"}:
            return dataclasses.replace(role, dims=(at.dims[0], *role.dims[1:]), space=space)
        return None
    if isinstance(role, Leaf) and "b" in D.names(role.dims):  # rows repeated once per slot
        made = rows_of(role)
        last = made[1][0][-1] if made is not None and made[1] and made[1][0] else None
        if made is None or last is None or last[0] != "b" or len(made[1]) != 2 or D.names(made[1][:1]) > {"t", "b"}:
            return None
        if at.routing.top_k not in (0, last[1]):
            return None
        at.routing.top_k = last[1]
        return Pairs((at.dims[0], made[1][1]), made[0], at.routing, space, last[1])
    leaf = source(c, x) if at.routing.top_k == 1 and x.dim() == 2 else None
    made = None if leaf is None or "b" in D.names(leaf.dims) else rows_of(leaf)
    if made is not None and made[1][1:] and x.shape[0] == D.sizes(at.dims)[0] and x.shape[1] > 1:  # pair t is token t
        return Pairs((at.dims[0], made[1][1]), made[0], at.routing, space, 1)
    found = weights_of(c, x)
    if found is None or found[0].dense or x.shape[0] != (D.sizes(at.dims)[0]) or x.numel() != x.shape[0]:
        return None
    if found[0].routing not in (None, at.routing) or not D.in_pair_order(found[1]):
        return None
    return Pairs((at.dims[0], *((),) * (x.dim() - 1)), ("weight", found[0]), at.routing, space, at.routing.top_k)


def _to_token_order(c: RoleMode, x: Tensor, at: Inverse) -> Role | None:
    role = c.get(x)
    if not isinstance(role, Pairs) or role.space != Space("expert", at.order) or role.routing is not at.routing:
        return None
    k = role.top_k or at.routing.top_k
    if not k or D.names(role.dims[:1]) > {"p"} or "p" in D.names(role.dims[1:]):
        return None
    pairs = D.sizes(role.dims[:1])[0]
    return dataclasses.replace(role, dims=(D.dim(("t", pairs // k), ("k", k)), *role.dims[1:]), space=TOKEN_SPACE, top_k=k)


def _by_two(c: RoleMode, out: Tensor, x: Tensor, a: Role | None, b: Role | None) -> Role | None:
    """weights[token, slot] of one expert's pairs."""
    if not (isinstance(a, PairToken) and isinstance(b, PairSlot) and a.routing is b.routing and a.space == b.space):
        return None
    found = weights_of(c, x)
    if found is None or found[0].dense or found[0].routing not in (None, a.routing) or x.dim() < 2:
        return None
    weights, dims = found
    k = a.routing.top_k
    if weights.routing is None:
        if weights.ref is None or x.shape[1] != k or any(s != 1 for s in x.shape[2:]) or dims[0] not in ((), (("0", x.shape[0]),)):
            return None
    elif D.names(dims[:1]) > {"t"} or D.names(dims[1:2]) > {"k"} or any(dims[2:]):
        return None
    return Pairs((a.dims[0], *((),) * (x.dim() - 2)), ("weight", weights), a.routing, a.space, k)


def _by_mask(c: RoleMode, out: Tensor, x: Tensor, mask: Mask) -> Role | None:
    """x[mask]: the rows, or the weights, of one expert's pairs."""
    space = mask.space
    s = D.dim(("s", out.shape[0]))
    routing = mask.routing
    if len(mask.dims) == 1 and D.names(mask.dims) <= {"t"}:
        return _rows(c, x, PairToken((s,), routing, space, routing.top_k))
    if len(mask.dims) == 1 and D.names(mask.dims) == {"t", "k"}:
        return _by_flat_mask(c, x, mask, s)
    found = weights_of(c, x)
    if found is None or found[0].dense or len(mask.dims) != 2 or D.names(mask.dims[:1]) > {"t"} or out.dim() != 1:
        return None
    if found[0].routing not in (None, routing) or tuple(x.shape) != D.sizes(mask.dims):
        return None
    return Pairs((s,), ("weight", found[0]), routing, space, routing.top_k)


def _by_flat_mask(c: RoleMode, x: Tensor, mask: Mask, s: D.Dim) -> Role | None:
    """x[flat ids == e]: x repeated once per slot, or the weights of all pairs, token by token."""
    role, found = c.get(x), weights_of(c, x)
    if isinstance(role, Leaf) and "b" in D.names(role.dims):
        made = rows_of(role, "k")
        if made is None or len(made[1]) != 2 or made[1][0] != mask.dims[0]:
            return None
        return Pairs((s, made[1][1]), made[0], mask.routing, mask.space, mask.routing.top_k)
    if found is None or found[0].dense or found[0].routing is not mask.routing or found[1] != mask.dims:
        return None
    return Pairs((s,), ("weight", found[0]), mask.routing, mask.space, mask.routing.top_k)


# ---------------------------------------------------------------- matmuls


def _grouped(c: RoleMode, out: Tensor, a: Tensor, b: Tensor, offsets: Any) -> Role | None:
    rows, ends = c.get(a), c.get(offsets)
    stack = c.stack(b, 2)
    if not isinstance(rows, Pairs) or rows.space.kind != "expert" or stack is None or stack.e is None:
        return None
    if not isinstance(ends, Offsets) or ends.routing is not rows.routing or ends.num_experts != stack.experts:
        return None
    if len(rows.dims) != 2 or D.names(rows.dims[1:]) > {"c"}:
        return None
    expr: PairExpr = ("mm", stack.transposed(), rows.expr, 0)
    return dataclasses.replace(rows, dims=(rows.dims[0], D.dim(("c", out.shape[1]))), expr=expr)


@rule(aten._grouped_mm)
def _grouped_mm(
    c: RoleMode, out: Tensor, a: Tensor, b: Tensor, offs: Any = None, bias: Any = None, out_dtype: Any = None
) -> Role | None:
    return _grouped(c, out, a, b, offs) if bias is None else None


@rule("transformers.grouped_mm_fallback")
def _grouped_mm_fallback(c: RoleMode, out: Tensor, a: Tensor, b: Tensor, offs: Tensor) -> Role | None:
    """transformers' own op for what torch cannot capture."""
    return _grouped(c, out, a, b, offs)


@rule(aten.bmm)
def _bmm(c: RoleMode, out: Tensor, a: Tensor, b: Tensor) -> Role | None:
    x, y = c.get(a), c.get(b)
    if isinstance(y, Gathered):
        return _gathered_product(c, out, a, x, y, transposed=False)
    if isinstance(x, Gathered):
        return _gathered_product(c, out, b, y, x, transposed=True)
    if x is None or isinstance(x, Leaf):
        x = _every_expert(c, a) or x
    if isinstance(x, Pairs) and x.space == DENSE_SPACE:
        stack = c.stack(b, 2)
        if stack is None or stack.e is None or len(x.dims) != 3 or D.names(x.dims[:1]) != {"e"} or D.names(x.dims[2:]) > {"c"}:
            return None
        if D.names(x.dims[1:2]) > {"t"}:
            return None
        dims = (*x.dims[:2], D.dim(("c", out.shape[2])))
        return dataclasses.replace(x, dims=dims, expr=("mm", stack.transposed(), x.expr, 0))
    return None


def _every_expert(c: RoleMode, a: Tensor) -> Pairs | None:
    """Every token once per expert: rows of x expanded to [E,T,H], before it is known which routing will weigh them."""
    leaf = c.leaf(a)
    made = rows_of(leaf, "e") if leaf is not None and "b" in D.names(leaf.dims) else None
    if made is None or len(made[1]) != 3 or D.names(made[1][:1]) != {"e"}:
        return None
    return Pairs(made[1], made[0], None, DENSE_SPACE)


def _gathered_product(c: RoleMode, out: Tensor, rows: Tensor, x: Role | None, w: Gathered, transposed: bool) -> Role | None:
    """rows [B,m,X] x w [B,X,n], or w [B,n,X] x rows [B,X,m] (transposed)."""
    if len(w.stack.sizes) != 2:
        return None
    if isinstance(x, Pairs):
        if x.routing is not w.routing or x.space != w.space:
            return None
        expr, dims, k = x.expr, x.dims, x.top_k
    else:
        leaf = c.leaf(rows)
        made = None if leaf is None else rows_of(leaf)
        if made is None or w.space != TOKEN_SPACE:
            return None
        expr, dims, k = made[0], D.rename(made[1], {"b": "k"}), w.routing.top_k
    order = (0, 2, 1) if transposed else (0, 1, 2)
    dims, wdims = tuple(dims[i] for i in order), tuple(w.dims[i] for i in order)
    # now rows [batch, m, contracted] and w [batch, contracted, n]
    names = [[n for n, _ in d] for d in wdims]
    contracted = names[1]
    f, h = w.stack.sizes
    if len(contracted) > 1 or len(dims) != 3:
        return None
    which = contracted[0] if contracted else ("h" if h == 1 else "f")
    kept = "f" if which == "h" else "h"
    if D.sizes(dims)[2] != (h if which == "h" else f) or D.names(dims[2:]) > {"c"}:
        return None
    batch = D.align(dims[:1], wdims[:1])
    if batch is None or D.names(dims[1:2]) & {"c"} or (D.names(dims[1:2]) and D.names(wdims[2:]) & {"t", "k"}):
        return None
    stack = w.stack if which == "h" else w.stack.transposed()
    product = (batch[0], dims[1], D.rename(wdims[2:], {kept: "c"})[0])
    merged = tuple(product[i] for i in order)
    if not D.names(merged) >= {n for n in ("t", "k") if n in D.names(w.dims)}:
        return None
    return Pairs(merged, ("mm", stack, expr, w.clamped or GATHERED), w.routing, w.space, k or w.routing.top_k)


def _single(c: RoleMode, out: Tensor, a: Tensor, b: Tensor) -> Pairs | None:
    """One expert's rows times one matrix."""
    rows = c.get(a)
    if not isinstance(rows, Pairs) or rows.space.kind != "subset" or b.dim() != 2:
        return None
    stack = c.stack(b, 2)
    if stack is None or len(rows.dims) != 2 or D.names(rows.dims[1:]) > {"c"}:
        return None
    dims = (rows.dims[0], D.dim(("c", out.shape[1])))
    return dataclasses.replace(rows, dims=dims, expr=("mm", stack.transposed(), rows.expr, 0))


@rule(aten.mm)
def _mm(c: RoleMode, out: Tensor, a: Tensor, b: Tensor) -> Role | None:
    return _single(c, out, a, b)


@rule(aten.addmm)
def _addmm(c: RoleMode, out: Tensor, bias: Tensor, a: Tensor, b: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Role | None:
    product = _single(c, out, a, b) if (beta, alpha) == (1, 1) else None
    stack = c.stack(bias, 1) if product is not None and bias.dim() == 1 else None
    if product is None or stack is None or bias.shape[0] != out.shape[1]:
        return None
    return dataclasses.replace(product, expr=("add", product.expr, ("bias", stack, 0)))

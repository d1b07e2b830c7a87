"""Ids, their order by expert, counts and offsets; one-hot masks and the pairs of one expert."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from moecompile.recognize import dims as D
from moecompile.recognize.mode import RoleMode, aten, rule
from moecompile.recognize.roles import (
    Counts,
    Full,
    Ids,
    Inverse,
    Iota,
    Mask,
    Nonzero,
    Offsets,
    OneHot,
    PairToken,
    Perm,
    Role,
    Sentinel,
    SortedIds,
    Space,
)
from moecompile.recognize.rules.views import as_ids


def is_flat(role: Ids) -> bool:
    """All pairs, token by token and slot by slot, along one dimension."""
    return len(role.dims) == 1 and D.in_pair_order(role.dims)


def is_iota(role: Role | None, size: int) -> bool:
    return isinstance(role, Iota) and D.sizes(role.dims) == (size,)


@rule(aten.sort, aten.argsort)
def _sort(c: RoleMode, out: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    stable_first = isinstance(args[0] if args else None, bool) and len(args) > 1
    rest = args[1:] if stable_first else args
    descending = kwargs.get("descending", rest[1] if len(rest) > 1 else False)
    role = c.get(x)
    if x.dim() == 1 and not descending and isinstance(role, Perm) and not isinstance(out, Tensor):
        return [Iota(D.fresh(x.shape)), Inverse(role.dims, role.routing, role.order)]  # argsort of a permutation
    ids = as_ids(c, x)
    if ids is None or not is_flat(ids) or descending or ids.clamped or isinstance(out, Tensor):
        return None
    order = next(c.orders)
    dims = (D.dim(("p", x.shape[0])),)
    return [SortedIds(dims, ids.routing, order), Perm(dims, ids.routing, order)]


@rule(aten.floor_divide, aten.div, aten.div_)
def _floor_divide(c: RoleMode, out: Tensor, x: Tensor, y: Any, *, rounding_mode: str | None = None) -> Role | None:
    role, k = c.get(x), c.number(y)
    if isinstance(role, Perm) and k is not None and not out.is_floating_point() and k >= 1 and k == int(k):
        if role.routing.top_k in (0, k):
            role.routing.top_k = role.routing.top_k or int(k)
            return PairToken(role.dims, role.routing, Space("expert", role.order), int(k))
        return None
    return None


@rule(aten.histc)
def _histc(c: RoleMode, out: Tensor, x: Tensor, bins: int = 100, min: float = 0, max: float = 0) -> Role | None:
    role = c.get(x)
    if isinstance(role, (SortedIds, Ids)) and not role.clamped and min == 0 and max == bins - 1 and bins > 1 and not c.symbolic:
        return Counts((D.dim(("e", bins)),), role.routing, bins)
    if isinstance(role, (SortedIds, Ids)) and not role.clamped and (bins, min, max) == (1, 0, 0) and role.routing.num_classes == 1:
        return Counts(((),), role.routing, 1)
    return None


@rule(aten.bincount)
def _bincount(c: RoleMode, out: Tensor, x: Tensor, weights: Any = None, minlength: int = 0) -> Role | None:
    role = c.get(x) if c.get(x) is not None else as_ids(c, x)
    if isinstance(role, (SortedIds, Ids)) and not role.clamped and weights is None and out.shape[0] == minlength:
        return Counts((D.dim(("e", minlength)),), role.routing, minlength)
    return None


@rule(aten.scatter_add, aten.scatter_add_)
def _scatter_add(c: RoleMode, out: Tensor, x: Tensor, dim: int, index: Tensor, source: Tensor) -> Role | None:
    """zeros(E).scatter_add(0, ids, ones): counts."""
    base, ids, ones = c.get(x), c.get(index), c.get(source)
    if isinstance(ids, (SortedIds, Ids)) and x.dim() == 1 and isinstance(base, Full) and base.value == 0:
        if isinstance(ones, Full) and ones.value == 1 and not ids.clamped and source.shape == index.shape:
            return Counts((D.dim(("e", x.shape[0])),), ids.routing, x.shape[0])
        return None
    return None


@rule(aten.cumsum)
def _cumsum(c: RoleMode, out: Tensor, x: Tensor, dim: int, *, dtype: torch.dtype | None = None) -> Role | None:
    role = c.get(x)
    if isinstance(role, Counts) and dim in (0, -1):
        return Offsets(role.dims, role.routing, role.num_experts)
    return None


@rule(aten.index_put, aten.index_put_)
def _index_put(
    c: RoleMode, out: Tensor, x: Tensor, indices: list[Tensor | None], values: Tensor, accumulate: bool = False
) -> Role | None:
    """blank[perm] = 0, 1, 2, ..: the inverse permutation."""
    base, perm = c.get(x), c.get(indices[0])
    if isinstance(perm, Perm) and len(indices) == 1 and isinstance(base, Full) and not accumulate:
        n = perm.dims[0][0][1] if perm.dims[0] else 1
        if is_iota(c.get(values), n) and x.shape == (n,):
            return Inverse(perm.dims, perm.routing, perm.order)
        return None
    return None


@rule(aten.scatter, aten.scatter_)
def _scatter(c: RoleMode, out: Tensor, x: Tensor, dim: int, index: Tensor, source: Any, **kwargs: Any) -> Role | None:
    base, perm = c.get(x), c.get(index)
    if isinstance(perm, Perm) and isinstance(base, Full) and isinstance(source, Tensor) and not kwargs:
        n = perm.dims[0][0][1] if perm.dims[0] else 1
        if is_iota(c.get(source), n) and x.shape == (n,):
            return Inverse(perm.dims, perm.routing, perm.order)
        return None
    return None


@rule(aten.index_copy, aten.index_copy_)
def _index_copy(c: RoleMode, out: Tensor, x: Tensor, dim: int, index: Tensor, source: Tensor) -> Role | None:
    return _scatter(c, out, x, dim, index, source) if x.dim() == 1 else None


@rule(aten.clamp, aten.clamp_)
def _clamp(c: RoleMode, out: Tensor, x: Tensor, min: Any = None, max: Any = None) -> Role | None:
    role = c.get(x)
    if isinstance(role, (SortedIds, Ids)):
        high = c.number(max)
        if high is None or c.number(0 if min is None else min) != 0 or role.clamped:
            return None
        return dataclasses.replace(role, clamped=int(high) + 1)
    return None


@rule(aten.ge)
def _ge(c: RoleMode, out: Tensor, x: Tensor, y: Any) -> Role | None:
    role, bound = c.get(x), c.number(y)
    if isinstance(role, (SortedIds, Ids)) and bound is not None and not role.clamped:
        order = role.order if isinstance(role, SortedIds) else None
        return Sentinel(role.dims, role.routing, order, int(bound))
    return None


# ---------------------------------------------------------------- one-hot masks


@rule(aten.eq)
def _eq(c: RoleMode, out: Tensor, x: Tensor, y: Any) -> Role | None:
    if not isinstance(y, Tensor):
        number = c.number(y)
        ids = as_ids(c, x) if number is not None else None
        if ids is None or ids.clamped or number is None or number != int(number) or number < 0:
            return None
        return Mask(_pair_axes(ids), ids.routing, int(number))
    a, b = c.get(x) or as_ids(c, x), c.get(y) or as_ids(c, y)
    for one, iota in ((a, b), (b, a)):
        if isinstance(one, Ids) and isinstance(iota, Iota) and not one.clamped:
            return _one_hot(one, iota)
    return None


def _pair_axes(ids: Ids) -> D.Dims:
    return ids.dims


def _one_hot(ids: Ids, iota: Iota) -> OneHot | None:
    """ids[..., None] == arange(E), in any arrangement of the dimensions."""
    classes = tuple(D.dim(("e", s)) for s in D.sizes(iota.dims))
    dims = D.align(ids.dims, classes)
    return None if dims is None else OneHot(dims, ids.routing)


@rule(aten.nonzero)
def _nonzero(c: RoleMode, out: Tensor, x: Tensor) -> Role | None:
    role = c.get(x)
    if isinstance(role, Mask):
        return Nonzero((D.dim(("s", out.shape[0])), ()), role)
    return None


@rule(aten.any, aten.amax)
def _any(c: RoleMode, out: Tensor, x: Tensor, dim: Any = None, keepdim: bool = False) -> Role | None:
    role = c.get(x)
    if isinstance(role, Mask) and dim is not None and not keepdim:
        at = [d % x.dim() for d in (dim if isinstance(dim, (list, tuple)) else [dim])]
        if all(not role.dims[i] or {n for n, _ in role.dims[i]} == {"k"} for i in at):
            return Mask(D.without(role.dims, at, keepdim), role.routing, role.expert)
    return None

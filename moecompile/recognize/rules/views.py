"""Views, copies, casts and expansions: the same numbers, indexed otherwise."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

import torch
from torch import Tensor

from moecompile.recognize import dims as D
from moecompile.recognize.mode import RoleMode, aten, rule
from moecompile.recognize.roles import (
    Chosen,
    Counts,
    DenseWeights,
    ExpertWeight,
    Full,
    Gathered,
    GroupMask,
    Ids,
    Inverse,
    Iota,
    Leaf,
    Mask,
    Nonzero,
    Offsets,
    OneHot,
    Pairs,
    PairSlot,
    PairToken,
    Perm,
    Role,
    Scores,
    SortedIds,
    Sum,
    Weights,
    holds,
)

R = TypeVar("R", bound=Role)
_INDICES = (torch.int64, torch.int32)
_ORDERS = (Perm, Inverse, PairToken, PairSlot, Counts, Offsets, SortedIds, Iota)


def viewed(c: RoleMode, x: Tensor) -> Role | None:
    """The role of x, or x as a live-in (which a layer's output is to whatever reads it)."""
    role = c.get(x)
    if isinstance(role, Sum) and (role.whole or len(role.dims) == 2):
        return c.leaf(x) or role
    return c.leaf(x) if role is None else role


def with_dims(role: R, dims: D.Dims | None) -> R | None:
    return None if dims is None else dataclasses.replace(role, dims=dims)


def as_ids(c: RoleMode, x: Tensor) -> Ids | None:
    """x as chosen experts: an integer live-in [T,K] (the leading dimensions are tokens), or flat."""
    role = c.get(x)
    if isinstance(role, Ids):
        return role
    if role is not None or x.dtype not in (torch.int64, torch.int32) or x.dim() < 1 or c.ref(x) is None:
        return None
    if x.dim() == 1:
        found = Ids(D.fresh(x.shape) and (D.dim(("r", x.shape[0])),), c.routing(x))
    else:
        k = x.shape[-1]
        dims = (*(D.dim(("t", s)) for s in x.shape[:-1]), D.dim(("k", k)))
        found = Ids(dims, c.routing(x, top_k=k))
    c.put(x, found)
    return found


@rule(aten.view, aten._unsafe_view, aten.reshape, aten._reshape_alias)
def _view(c: RoleMode, out: Tensor, x: Tensor, *_: Any, **__: Any) -> Role | None:
    if c.get(x) is None and x.dtype in (torch.int64, torch.int32) and x.dim() in (2, 3):
        as_ids(c, x)
    role = viewed(c, x)
    if role is None:
        return None
    k = role.routing.top_k if isinstance(role, Ids) else 0
    k = role.top_k if isinstance(role, Pairs) else k
    return with_dims(role, D.regroup(role.dims, out.shape, k))


@rule(aten.unsqueeze)
def _unsqueeze(c: RoleMode, out: Tensor, x: Tensor, dim: int) -> Role | None:
    role = viewed(c, x)
    if role is None:
        return None
    dim = dim % out.dim()
    return with_dims(role, (*role.dims[:dim], (), *role.dims[dim:]))


@rule(aten.squeeze)
def _squeeze(c: RoleMode, out: Tensor, x: Tensor, *_: Any) -> Role | None:
    role = viewed(c, x)
    return None if role is None else with_dims(role, D.regroup(role.dims, tuple(out.shape)))


def permuted(c: RoleMode, x: Tensor, order: list[int]) -> Role | None:
    """Dimensions reordered. Two that are both tokens must stay in order: nothing else tells them apart."""
    role = viewed(c, x)
    if role is None:
        return None
    tokens = [i for i in order if "t" in D.names(role.dims[i % len(order) : i % len(order) + 1])]
    return with_dims(role, tuple(role.dims[i] for i in order)) if tokens == sorted(tokens) else None


@rule(aten.permute)
def _permute(c: RoleMode, out: Tensor, x: Tensor, order: list[int]) -> Role | None:
    return permuted(c, x, order)


@rule(aten.transpose)
def _transpose(c: RoleMode, out: Tensor, x: Tensor, a: int, b: int) -> Role | None:
    order = list(range(x.dim()))
    order[a], order[b] = order[b], order[a]
    return permuted(c, x, order)


@rule(aten.t)
def _t(c: RoleMode, out: Tensor, x: Tensor) -> Role | None:
    return permuted(c, x, list(range(x.dim()))[::-1])


@rule(aten.expand)
def _expand(c: RoleMode, out: Tensor, x: Tensor, *_: Any, **__: Any) -> Role | None:
    role = viewed(c, x)
    return None if role is None else with_dims(role, D.broadcast(role.dims, out.shape))


@rule(aten.repeat)
def _repeat(c: RoleMode, out: Tensor, x: Tensor, times: list[int]) -> Role | None:
    """repeat(n, 1, ..): the whole of x, n times over."""
    role = viewed(c, x)
    if role is None or len(times) != x.dim() or any(n != 1 for n in times[1:]) or not role.dims:
        return None
    return with_dims(role, (D.dim(("b", times[0]), *role.dims[0]), *role.dims[1:]))


@rule(aten.clone, aten.alias, aten.contiguous, aten.lift_fresh_copy)
def _clone(c: RoleMode, out: Tensor, x: Tensor, **_: Any) -> Role | None:
    c.copied(out, x)
    role = c.get(x) or c.leaf(x)
    return None if isinstance(role, Leaf) and "b" not in D.names(role.dims) else role


@rule(aten.detach)
def _detach(c: RoleMode, out: Tensor, x: Tensor) -> Role | None:
    """Gradients stop here: only what has none keeps its role."""
    role = c.get(x)
    return role if isinstance(role, (*_ORDERS, Ids, Mask, OneHot, Full)) else None


def _counts_to(dtype: torch.dtype) -> int:
    """0, 1, .. up to this (and not beyond) are all numbers of the dtype."""
    if dtype == torch.bool:
        return 1
    return int(2 / torch.finfo(dtype).eps) if dtype.is_floating_point else torch.iinfo(dtype).max


@rule(aten._to_copy)
def _to_copy(c: RoleMode, out: Tensor, x: Tensor, *, dtype: torch.dtype | None = None, device: Any = None, **_: Any) -> Role | None:
    if device is not None and device != x.device:
        return None
    dtype = dtype or x.dtype
    c.copied(out, x, dtype)
    role = c.get(x)
    if role is None and x.dtype in _INDICES and dtype in _INDICES:
        return as_ids(c, x) if x.dim() == 2 else None
    role = role or c.leaf(x)
    floats = x.is_floating_point() and dtype.is_floating_point
    if isinstance(role, Scores) and floats:
        return dataclasses.replace(role, tree=("cast", dtype, role.tree))
    if isinstance(role, (Chosen, DenseWeights)) and floats and role.tree is not None:
        return dataclasses.replace(role, tree=("cast", dtype, role.tree), base=None)
    if isinstance(role, Pairs) and floats:
        return dataclasses.replace(role, expr=("cast", dtype, role.expr))
    if isinstance(role, Gathered) and floats and role.stack.cast in (None, dtype):
        return dataclasses.replace(role, stack=dataclasses.replace(role.stack, cast=dtype))
    if isinstance(role, Sum) and floats and holds(x.dtype, dtype):  # a wider dtype would keep what the sum's own rounded
        return dataclasses.replace(role, cast=dtype)
    if isinstance(role, Leaf) and floats and role.cast is None:
        return dataclasses.replace(role, cast=dtype)
    if isinstance(role, (Mask, OneHot, GroupMask)):
        return role
    if isinstance(role, Full) and role.value in (None, 0.0, 1.0):
        return role
    if isinstance(role, (SortedIds, Ids)) and _counts_to(dtype) >= (role.routing.num_classes or 2**24):
        return role  # histc wants floats
    if isinstance(role, Counts) and dtype in (*_INDICES, torch.float32, torch.float64):
        return role
    if isinstance(role, (Perm, Inverse, PairToken, PairSlot, Offsets, Iota)) and dtype in _INDICES:
        return role
    return None


@rule(aten.slice)
def _slice(
    c: RoleMode, out: Tensor, x: Tensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Role | None:
    role = c.get(x)
    if out.shape == x.shape and step == 1:
        return viewed(c, x)
    if isinstance(role, Pairs):
        return features(role, dim % x.dim(), min(start or 0, x.shape[dim]), step, out.shape[dim])
    return None


def features(role: Pairs, dim: int, start: int, step: int, length: int) -> Pairs | None:
    """Some of the features of a value over pairs."""
    d = role.dims[dim]
    if len(d) != 1 or d[0][0] != "c" or start < 0:
        return None
    dims = (*role.dims[:dim], D.dim(("c", length)), *role.dims[dim + 1 :])
    return dataclasses.replace(role, dims=dims, expr=("slice", role.expr, start, step, length))


def _cut(role: Pairs, dim: int, lengths: list[int]) -> list[Role | None]:
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    return [features(role, dim, s, 1, n) for s, n in zip(starts, lengths, strict=True)]


@rule(aten.split, aten.split_with_sizes, aten.chunk)
def _split(c: RoleMode, out: list[Tensor], x: Tensor, size: Any, dim: int = 0) -> list[Role | None] | None:
    role, dim = c.get(x), dim % x.dim()
    return _cut(role, dim, [t.shape[dim] for t in out]) if isinstance(role, Pairs) else None


@rule(aten.unbind)
def _unbind(c: RoleMode, out: list[Tensor], x: Tensor, dim: int = 0) -> list[Role | None] | None:
    role = c.get(x)
    if isinstance(role, Nonzero) and dim in (1, -1):
        return [coordinate(c, role, i) for i in range(len(out))]
    if isinstance(role, Pairs):
        return [part(role, dim % x.dim(), i) for i in range(len(out))]
    return None


def part(role: Pairs, dim: int, i: int) -> Pairs | None:
    """Features seen as [major, minor], at one of the two: a run of them, or every n-th."""
    major, minor = D.size_of(role.dims, "major"), D.size_of(role.dims, "minor")
    rest = (*role.dims[:dim], *role.dims[dim + 1 :])
    which = D.names(role.dims[dim : dim + 1])
    if which == {"major"}:
        return dataclasses.replace(role, dims=D.rename(rest, {"minor": "c"}), expr=("slice", role.expr, i * minor, 1, minor))
    if which == {"minor"}:
        return dataclasses.replace(role, dims=D.rename(rest, {"major": "c"}), expr=("slice", role.expr, i, minor, major))
    return None


def coordinate(c: RoleMode, role: Nonzero, i: int) -> Role | None:
    """Column i of a nonzero: the token, or the slot, of each of an expert's pairs."""
    mask = role.mask
    names = [d[0][0] if len(d) == 1 else "" for d in mask.dims]
    name = names[i] if i < len(names) else ""
    space = mask.space
    dims = (D.dim(("s", role.dims[0][0][1] if role.dims[0] else 1)),)
    if name == "t" or (not mask.dims[i] and i == _missing(mask, "t")):
        return PairToken(dims, mask.routing, space, mask.routing.top_k)
    if name == "k" or (not mask.dims[i] and i == _missing(mask, "k")):
        return PairSlot(dims, mask.routing, space)
    return None


def _missing(mask: Mask, name: str) -> int:
    """Where the axis `name` of size 1 lies in a two-dimensional mask: at the unit dimension that is not the other's."""
    if len(mask.dims) != 2 or name in D.names(mask.dims):
        return -1
    units = [i for i, d in enumerate(mask.dims) if not d]
    return units[0] if len(units) == 1 else -1


@rule(aten.select)
def _select(c: RoleMode, out: Tensor, x: Tensor, dim: int, index: int) -> Role | None:
    role, dim = c.get(x), dim % x.dim()
    if c.symbolic:
        return None
    rest = None if role is None else (*role.dims[:dim], *role.dims[dim + 1 :])
    if isinstance(role, OneHot):
        d = role.dims[dim]
        if (len(d) == 1 and d[0][0] == "e") and index >= 0:
            return Mask(rest, role.routing, index) if rest is not None else None
    if isinstance(role, Nonzero) and dim == 1:
        return coordinate(c, role, index % x.shape[1])
    if isinstance(role, Pairs) and index >= 0:
        return part(role, dim, index)
    if isinstance(role, DenseWeights) and rest is not None and role.fill == 0 and index >= 0:
        d = role.dims[dim]
        if len(d) == 1 and d[0][0] == "e":
            return ExpertWeight(rest, Weights(None, role.tree, role.routing, role.base, dense=True), role.routing, index)
    if isinstance(role, (Ids, Chosen)) and not role.dims[dim] and rest is not None:
        return dataclasses.replace(role, dims=rest)  # the only slot
    return None


@rule(aten.zeros, aten.zeros_like, aten.new_zeros)
def _zeros(c: RoleMode, out: Tensor, *_: Any, **__: Any) -> Role:
    return Full(D.fresh(out.shape), 0.0)


@rule(aten.ones, aten.ones_like, aten.new_ones)
def _ones(c: RoleMode, out: Tensor, *_: Any, **__: Any) -> Role:
    return Full(D.fresh(out.shape), 1.0)


@rule(aten.full, aten.full_like, aten.new_full)
def _full(c: RoleMode, out: Tensor, first: Any, value: Any, third: Any = None, *_: Any, **__: Any) -> Role | None:
    number = c.number(third if third is not None else value)
    return None if number is None else Full(D.fresh(out.shape), number)


@rule(aten.fill_, aten.zero_)
def _fill(c: RoleMode, out: Tensor, x: Tensor, value: Any = 0.0) -> Role | None:
    number = c.number(value)
    return None if number is None else Full(D.fresh(out.shape), number)


@rule(aten.empty, aten.empty_like, aten.new_empty)
def _empty(c: RoleMode, out: Tensor, *_: Any, **__: Any) -> Role:
    return Full(D.fresh(out.shape), None)


@rule(aten.arange)
def _arange(c: RoleMode, out: Tensor, *args: Any, **_: Any) -> Role | None:
    return Iota(D.fresh(out.shape)) if len(args) == 1 or (args[0] == 0 and args[2:] in ((), (1,))) else None

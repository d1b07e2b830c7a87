"""What balancing losses sum over tokens: probabilities, squared logsumexp (z-loss), choices.

Only in graphs that hold a moe.route: to every other walk these are values without a role, which a router may take for its logits.

Trees, besides those of router.py
    ("logsumexp", a) ("square", a)        a number for each token
    ("choices", routing)                  1 where the pair (t, k) chose expert e
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from moecompile.ir.spec import router_from_text
from moecompile.recognize import dims as D
from moecompile.recognize.mode import RoleMode, aten, rule
from moecompile.recognize.roles import Counts, Ids, OneHot, Role, Routing, Scores, Tally, TokenScore
from moecompile.recognize.rules.router import as_scores, is_last


@rule("moe._route")
def _route(c: RoleMode, out: Any, logits: Tensor, bias: Tensor | None, spec: str) -> list[Role | None]:
    s = router_from_text(spec)
    tokens = tuple(D.dim(("t", n)) for n in logits.shape[:-1])
    routing = Routing(None, ("route", spec), s.top_k, s.num_experts, s.sorted, "route", next(c.routings))
    c.routed = True
    return [None, Ids((*tokens, D.dim(("k", s.top_k))), routing)]


@rule(aten.logsumexp)
def _logsumexp(c: RoleMode, out: Tensor, x: Tensor, dim: Any, keepdim: bool = False) -> Role | None:
    scores = as_scores(c, x) if c.routed else None
    if scores is None or not is_last(scores, dim, {"e"}):
        return None
    return TokenScore(D.without(scores.dims, [len(scores.dims) - 1], keepdim), ("logsumexp", scores.tree))


def _squared(c: RoleMode, x: object) -> Role | None:
    role = c.get(x)
    return dataclasses.replace(role, tree=("square", role.tree)) if isinstance(role, TokenScore) else None


@rule(aten.square)
def _square(c: RoleMode, out: Tensor, x: Tensor) -> Role | None:
    return _squared(c, x)


@rule(aten.pow)
def _pow(c: RoleMode, out: Tensor, x: Any, y: Any) -> Role | None:
    return _squared(c, x) if c.number(y) == 2 else None


@rule(aten.mul)
def _mul(c: RoleMode, out: Tensor, x: Any, y: Any) -> Role | None:
    return _squared(c, x) if x is y else None


@rule(aten._to_copy)
def _to_copy(c: RoleMode, out: Tensor, x: Tensor, *, dtype: torch.dtype | None = None, device: Any = None, **_: Any) -> Role | None:
    role = c.get(x)
    if (device is not None and device != x.device) or dtype is None:
        return None
    floats = x.is_floating_point() and dtype.is_floating_point
    if isinstance(role, TokenScore) and floats:
        return dataclasses.replace(role, tree=("cast", dtype, role.tree))
    if not isinstance(role, Tally):
        return None
    kept = floats
    if role.of[0] == "choices":  # a mean that is cast to integers is cut off
        kept = dtype in COUNTED and (role.over == 1 or dtype.is_floating_point)
    return dataclasses.replace(role, dtypes=role.dtypes | {dtype}) if kept else None


COUNTED = (torch.int32, torch.int64, torch.float32, torch.float64)  # where counts of choices are kept without loss


@rule(aten.sum)
def _sum(c: RoleMode, out: Tensor, x: Tensor, dim: Any = None, keepdim: bool = False, **_: Any) -> Role | None:
    return _tallied(c, out, x, dim, keepdim, mean=False)


@rule(aten.mean)
def _mean(c: RoleMode, out: Tensor, x: Tensor, dim: Any = None, keepdim: bool = False, **_: Any) -> Role | None:
    return _tallied(c, out, x, dim, keepdim, mean=True)


def _tallied(c: RoleMode, out: Tensor, x: Tensor, dim: Any, keepdim: bool, mean: bool) -> Role | None:
    role = c.get(x)
    if not c.routed or not isinstance(role, (Scores, TokenScore, OneHot, Tally)):
        return None
    at = [d % x.dim() for d in (dim if isinstance(dim, (list, tuple)) else [dim])] if dim not in (None, [], ()) else []
    at = at or list(range(x.dim()))
    of = role.of if isinstance(role, Tally) else ("choices", role.routing) if isinstance(role, OneHot) else role.tree
    summed = D.names(tuple(role.dims[i] for i in at))
    if not summed <= ({"t", "k"} if of[0] == "choices" else {"t"}) or (of[0] == "choices" and out.dtype not in COUNTED):
        return None
    before = role if isinstance(role, Tally) else Tally((), of, 1, frozenset())
    over = before.over * (math.prod(x.shape[i] for i in at) if mean else 1)
    return Tally(D.without(role.dims, at, keepdim), of, over, before.dtypes | {x.dtype, out.dtype})


@rule(aten.histc)
def _histc(c: RoleMode, out: Tensor, x: Tensor, bins: int = 100, min: float = 0, max: float = 0) -> Role | None:
    """Bins of width 1 from 0 to E: id * E / E has no remainder, so each id falls into its own."""
    role = c.get(x)
    if c.routed and isinstance(role, Ids) and not role.clamped and min == 0 and max == bins and not c.symbolic:
        return Counts((D.dim(("e", bins)),), role.routing, bins)
    return None

"""From the role of a layer's output to what the layer is: its spec and its live-ins, or the reason why not."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from moecompile.errors import Unsupported, need
from moecompile.ir import expr as X
from moecompile.ir.spec import MoESpec, OutOfRange, WeightOn
from moecompile.ir.surgery import value_of
from moecompile.recognize import dims as D
from moecompile.recognize.mlp import Experts, Stacks, merge
from moecompile.recognize.mode import Loss
from moecompile.recognize.roles import (
    DENSE_SPACE,
    TOKEN_SPACE,
    PairExpr,
    Ref,
    Sum,
    Weights,
)
from moecompile.recognize.walk import End, Walk

_SIZES = (int, torch.SymInt, torch.Size)


@dataclass
class Layer:
    """One recognised layer."""

    spec: MoESpec
    form: str
    end: End
    x: Ref
    x_cast: torch.dtype | None
    ids: Ref
    weights: Weights | None
    params: list[tuple[Ref, torch.dtype | None]]  # each with the cast that the graph applies before use
    walk: Walk

    def refs(self) -> Iterator[Ref]:
        """The live-ins of the experts half, routing weights apart."""
        yield self.x
        yield self.ids
        for ref, _ in self.params:
            yield ref

    @property
    def output(self) -> fx.Node:
        return self.end.node


@dataclass
class NearMiss:
    """Something that began as a layer and was not one."""

    node: fx.Node | None
    reason: str


def layers(walk: Walk) -> tuple[list[Layer], list[NearMiss]]:
    """Every complete layer of the graph, and what came close, each with its reason. Bodies of higher-order ops apart."""
    found: list[Layer] = []
    missed: list[NearMiss] = []
    by_routing: dict[int, list[End]] = {}
    for end in walk.ends:
        by_routing.setdefault(id(end.role.routing), []).append(end)
    for ends in by_routing.values():
        ends = _last_of_each_sum(walk, ends)
        for end in ends:
            try:
                found.append(_layer(walk, end))
            except Unsupported as e:
                missed.append(NearMiss(end.node, str(e)))
    done = {id(layer.end.role.routing) for layer in found}
    for loss in walk.losses:
        routing = getattr(loss.role, "routing", None)
        if routing is not None and id(routing) not in done:
            done.add(id(routing))
            missed.append(NearMiss(loss.node, _told(loss)))
    return found, missed


def _told(loss: Loss) -> str:
    by = {
        "PairToken": "the tokens of the experts' pairs",
        "PairSlot": "the slots of one expert's pairs",
        "Perm": "the order of the pairs by expert",
        "Inverse": "the order of the pairs by token",
        "Mask": "a mask of one expert's pairs",
        "Ids": "the chosen experts",
    }.get(type(loss.role).__name__)
    if by is not None:
        return f"{loss.op} by {by} is not followed as it is used here"
    return f"{loss.op} is not followed on a value that is {describe(loss.role)}"


def describe(role: Any) -> str:
    """A role in words, for people."""
    words = {
        "Pairs": "rows of routed tokens",
        "Gathered": "expert weights gathered by chosen ids",
        "SortedIds": "expert ids in sorted order",
        "SumRows": "rows of the running sum over experts",
    }
    return words.get(type(role).__name__, type(role).__name__)


def _last_of_each_sum(walk: Walk, ends: list[End]) -> list[End]:
    """Of the steps of one running sum the last; of a sum and its cast the cast, unless the sum itself is read too."""
    kept: list[End] = []
    for end in ends:
        for i, last in enumerate(kept):
            if end.role.terms[: len(last.role.terms)] == last.role.terms:
                longer = len(end.role.terms) > len(last.role.terms) or end.tensor is last.tensor
                if longer or _only_user(walk, last, end):
                    kept[i] = end
                break
            if _made_of(end.role, last.role):
                if _only_user(walk, last, end) and _is_layer(walk, end):
                    kept[i] = end
                break
        else:
            kept.append(end)
    return kept


def _only_user(walk: Walk, value: End, last: End) -> bool:
    """Does only `last` read the value, perhaps through views and the like that are read by nothing else?"""
    tensor, step = value.tensor, value.step
    while True:
        holders = walk.holders.get(id(tensor), [])
        users = {u for h in holders for u in h.users if walk.when(u) > step and not isinstance(value_of(u), _SIZES)}
        if len(users) != 1:
            return False
        user = users.pop()
        if user is last.node:
            return True
        read = walk.values.get(user)
        if not isinstance(read, Tensor):
            return False
        tensor, step = read, walk.when(user)


def _is_layer(walk: Walk, end: End) -> bool:
    """Not one that goes on with what is no part of a layer: that stays outside."""
    try:
        _layer(walk, end)
    except Unsupported:
        return False
    return True


def _made_of(whole: Sum, part: Sum) -> bool:
    """Is each term of the one computed from that of the other?"""
    return len(whole.terms) == len(part.terms) and all(
        a.expert == b.expert and _within(b.expr, a.expr) for a, b in zip(whole.terms, part.terms, strict=True)
    )


def _within(part: PairExpr, whole: PairExpr) -> bool:
    return part == whole or any(_within(part, a) for a in whole[1:] if isinstance(a, tuple))


# ---------------------------------------------------------------- one layer


def _layer(walk: Walk, end: End) -> Layer:
    role = end.role
    terms = role.terms
    space = terms[0].space
    routing = role.routing
    if terms[0].expert < 0:
        expr, experts = terms[0].expr, 0
    else:
        order = sorted(range(len(terms)), key=lambda i: terms[i].expert)
        experts = len(terms)
        seen = [terms[i].expert for i in order]
        need(seen == list(range(experts)), f"the loop visits the experts {_short(seen)}, not 0..{max(seen)} once each")
        classes = routing.num_classes
        need(classes in (0, experts), f"the router chooses among {classes} experts, the loop visits {experts}")
        expr = merge([terms[i].expr for i in order])
    parsed = Experts(experts)
    parsed.read(expr)
    k = max(t.top_k for t in terms) or routing.top_k
    need(k and routing.top_k in (0, k), "how many experts a token has is not known")
    need(k not in walk.mode.sizes.values, "how many experts a token has is a symbolic size")
    if space.kind == "subset" and k > 1 and routing.choice is None and not all("k" in t.space.how for t in terms):
        weighted = parsed.weights is not None and parsed.weight_on is WeightOn.OUTPUT
        need(weighted, "a token's experts may be the same one twice, and the loop then runs it once")
    weights = parsed.weights
    if space == DENSE_SPACE:
        need(weights is not None, "every expert runs on every token and no routing weight selects among them")
        if parsed.weight_on is WeightOn.INPUT:
            need(_is_zero_at_zero(parsed), "a token that an expert was not chosen for still gets something from it")
    num_classes = routing.num_classes
    if space == DENSE_SPACE:
        need(num_classes == parsed.num_experts, "the router and the weights differ in the number of experts")
    ids = routing.ids
    need(ids is not None, "no node holds the chosen experts' ids")
    assert ids is not None and parsed.row is not None
    x = parsed.row
    tokens = ids.tensor.numel() // k
    need(ids.tensor.numel() == tokens * k, "how many experts a token has is not known")
    need(math.prod(D.sizes(role.dims)[:-1]) == tokens, "the output has other rows than the input")
    out_of_range = OutOfRange.SKIP
    if space == TOKEN_SPACE and not parsed.sentinel and parsed.by_index:
        out_of_range = OutOfRange.SKIP if routing.choice is not None else OutOfRange.INDEX
    spec = parsed.spec(k, out_of_range, end.tensor.dtype)
    need(x.tensor.numel() == tokens * spec.hidden, "ids and rows differ in their tokens")
    need(D.sizes(role.dims)[-1] == spec.out_features, "the output has other features than the experts give")
    return Layer(
        MoESpec(None, spec),
        _form(space, parsed),
        end,
        x,
        None if x.tensor.dtype == spec.dtype else spec.dtype,
        ids,
        weights,
        parsed.params(),
        walk,
    )


def _short(seen: list[int]) -> str:
    return str(seen) if len(seen) <= 8 else f"[{seen[0]}, {seen[1]}, .., {seen[-1]}]"


def _form(space: Any, parsed: Experts) -> str:
    if space == TOKEN_SPACE:
        if isinstance(parsed.down, Stacks):
            return "loop over experts"
        return "gathered weights, batched matmul" if parsed.by_index else "sorted rows, grouped matmul"
    if space == DENSE_SPACE:
        return "every expert on every token"
    return "loop over experts" if space.kind == "subset" else "sorted rows, grouped matmul"


def _is_zero_at_zero(parsed: Experts) -> bool:
    if parsed.down_bias is not None or any(b is not None for _, b, *_ in parsed.projections):
        return False
    assert parsed.activation is not None
    return float(X.evaluate(parsed.activation, [torch.zeros((), dtype=torch.float64)] * len(parsed.projections))) == 0.0

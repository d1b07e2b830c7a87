"""Let the router's kernel sum what balancing losses read of its logits and choices.

    Before:  %route = moe.route(%logits, %bias)    After:  %route = moe.route_stats(%logits, %bias)
             %p = softmax(%logits)                         %f = truediv(getitem(%route, 2), T)
             %mean = mean(%p, 0)                           %mean = truediv(getitem(%route, 3), T)
             %f = mean(sum(one_hot(%route[1], E), 1), 0)   %z = getitem(%route, 4)
             %z = sum(square(logsumexp(%logits)))

Needs: fuse-router, and a kernel for moe.route_stats.  Changes rounding: probabilities and squares are summed in float32, whatever
they were rounded to before.

The walk says which values are such sums over all tokens (recognize.rules.statistics), so spelling does not matter.  A loss may
choose again (as transformers' do): those ids are the route's where both are the top-k of one softmax in one dtype.  A sum is
taken from the op only if all that led to it, [T,E] each, dies with it; choices alone are left, for the op would sum
probabilities that nobody reads.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from moecompile.ir import surgery
from moecompile.ir.spec import router_from_text
from moecompile.passes import Context, Entry, Phase, graph_pass
from moecompile.recognize.roles import OneHot, Scores, Tally, TokenScore
from moecompile.recognize.statistics import CHOICES, NAMES, Statistic, Statistics, same_rows
from moecompile.recognize.walk import Walk, tensors, walk


@graph_pass("fuse-statistics", Phase.REWRITE, after=("fuse-router",))
def fuse_statistics(gm: fx.GraphModule, context: Context) -> fx.GraphModule:
    """Every moe.route whose logits a balancing loss sums becomes moe.route_stats, where a kernel does that on the way."""
    if any(_asked(n, context) for n in surgery.calls_of(gm, torch.ops.moe.route.default)):
        _fuse(gm, walk(gm), context)
    return gm


def _asked(route: fx.Node, context: Context) -> bool:
    """Does anything else read the logits, and could a kernel do it?"""
    logits = route.args[0]
    assert isinstance(logits, fx.Node)
    rows = same_rows(logits)
    if not any(u is not route and u not in rows and u.op != "output" for n in rows for u in n.users):
        return False
    return not context.supports_statistics(router_from_text(str(route.args[2])), surgery.value_of(logits).device)


def _fuse(gm: fx.GraphModule, found: Walk, context: Context) -> None:
    for _, name, child in found.children:
        _fuse(gm.get_submodule(name), child, context)  # type: ignore[arg-type]
    entries = {_route_of(e.op): e for e in context.entries if e.op is not None}
    for route in [n for n in found.nodes if n.target is torch.ops.moe.route.default and _asked(n, context)]:
        entry = entries.get(route) or Entry("fused", route.name)
        known = Statistics(found, route)
        fused = _replace(gm, found, known)
        entry.statistics = ", ".join(NAMES[i] for i in sorted({s.result for s in fused}))
        entry.statistics_reason = "" if fused else "; ".join(dict.fromkeys(known.reasons))
    gm.recompile()


def _route_of(experts: fx.Node) -> fx.Node | None:
    """The moe.route node that the ids of a moe.experts node come from."""
    n = experts.args[2]
    while isinstance(n, fx.Node) and (n.target is operator.getitem or surgery.name_of(n) == "flatten"):
        n = n.args[0]
    return n if isinstance(n, fx.Node) and n.target is torch.ops.moe.route.default else None


def _replace(gm: fx.GraphModule, found: Walk, known: Statistics) -> list[Statistic]:
    """What is now read from the op; empty where the graph was left as it is."""
    sums = _dying(found, known)
    if all(s.result == CHOICES for s in sums):
        if sums:
            known.reasons.append("nothing but the choices is summed")
        return []
    _Rewrite(gm, found, known).insert(sums)
    nodes = surgery.with_size_queries(set().union(*(s.slice for s in sums)), found.nodes)
    surgery.erase(gm.graph, nodes, found.sharers, found.step)
    return sums


def _dying(found: Walk, known: Statistics) -> list[Statistic]:
    """Those of the sums for which nothing is computed any more once they are read from the op."""
    sums = known.found
    while True:
        gone = {holder: s.step for s in sums for holder in found.holders[id(s.tensor)]}
        dead = surgery.with_size_queries(set().union(*(s.slice for s in sums)), found.nodes)
        while alive := {n for n in dead if any(u not in dead and found.when(u) <= gone.get(n, found.when(u)) for u in n.users)}:
            dead -= alive
        kept = []
        for s in sums:
            seen = next((n for n in s.slice - dead if _costly(found, n)), None)
            if seen is None:
                kept.append(s)
            else:
                known.reasons.append(f"{seen.name}, of which {s.node.name} is made, is used elsewhere too")
        if len(kept) == len(sums):
            return sums
        sums = kept


def _costly(found: Walk, n: fx.Node) -> bool:
    """Does n hold numbers for each token?"""
    held = [found.mode.roles.get(id(t)) for t in tensors(found.values.get(n))]
    return any(r is not None and isinstance(r[0], (Scores, TokenScore, OneHot, Tally)) for r in held)


class _Rewrite:
    """One moe.route node by one of moe.route_stats."""

    def __init__(self, gm: fx.GraphModule, found: Walk, known: Statistics) -> None:
        self.gm, self.walk, self.route, self.logits, self.top_k = gm, found, known.route, known.logits, known.spec.top_k

    def insert(self, sums: list[Statistic]) -> None:
        """The op in the route's place, and right behind it what is read from it: nothing stands between that and its readers."""
        graph, route = self.gm.graph, self.route
        with graph.inserting_before(route):
            op = surgery.call(graph, torch.ops.moe.route_stats.default, route.args, route)
        for user in list(route.users):
            user.replace_input_with(route, op)
        with graph.inserting_before(route):
            for s in sums:
                new = self.read_from(op, s)
                for holder in self.walk.holders[id(s.tensor)]:
                    for user in list(holder.users):
                        if self.walk.when(user) > s.step:
                            user.replace_input_with(holder, new)
        graph.erase_node(route)

    def read_from(self, op: fx.Node, s: Statistic) -> fx.Node:
        """The op's result divided, cast and shaped as the value it replaces."""
        graph, dtype = self.gm.graph, s.tensor.dtype
        n = surgery.call_getitem(graph, op, s.result, op)
        if s.result == CHOICES and dtype != torch.int64:
            n = surgery.call(graph, "to", (n, dtype), op)
        if "token" in s.per:
            n = surgery.call(graph, operator.truediv, (n, self.num_tokens(op)), op)
        if "slot" in s.per:
            n = surgery.call(graph, operator.truediv, (n, self.top_k), op)
        if surgery.value_of(n).dtype != dtype:
            n = surgery.call(graph, "to", (n, dtype), op)
        if tuple(surgery.value_of(n).shape) != tuple(s.tensor.shape):
            n = surgery.call(graph, "reshape", (n, *s.tensor.shape), op)
        return n

    def num_tokens(self, op: fx.Node) -> fx.Node | int:
        """How many rows the logits have: a number, or a node that holds it."""
        shape = surgery.value_of(self.logits).shape[:-1]
        number, node = 1, None
        for i, size in enumerate(shape):
            if not surgery.symbolic(size):
                number *= int(size)
                continue
            n = surgery.call(self.gm.graph, "size", (self.logits, i), op)
            node = n if node is None else surgery.call_scalar(self.gm.graph, operator.mul, node, n, op)
        if node is None:
            return number
        return node if number == 1 else surgery.call_scalar(self.gm.graph, operator.mul, node, number, op)

"""Replace the router of every moe.experts node by one op.

    Before:  %p = softmax(%logits)                 After:  %route = moe.route(%logits, %bias)
             %w, %ids = topk(%p, 2)                        %y = moe.experts(%x, %route[0], %route[1], ..)
             %w = truediv(%w, sum(%w))
             %y = moe.experts(%x, %w, %ids, ..)

Needs: fuse-experts.  Changes rounding only of scores that are exponentials; ids are those of aten.topk.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, fx

from moecompile.errors import Unsupported, need
from moecompile.ir import surgery
from moecompile.ir.spec import RouterSpec
from moecompile.passes import Context, Entry, Phase, graph_pass
from moecompile.recognize import dims as D
from moecompile.recognize.roles import Chosen, DenseWeights, Ids
from moecompile.recognize.routing import Router, router_of
from moecompile.recognize.walk import Walk, walk


@graph_pass("fuse-router", Phase.REWRITE, after=("fuse-experts",))
def fuse_router(gm: fx.GraphModule, context: Context) -> fx.GraphModule:
    """The weights and ids of every moe.experts node come from moe.route, where the router's form is known."""
    if context.router and surgery.calls_of(gm, torch.ops.moe.experts.default):
        _fuse(gm, walk(gm), context)
    return gm


def _fuse(gm: fx.GraphModule, found: Walk, context: Context) -> None:
    for _, name, child in found.children:
        _fuse(gm.get_submodule(name), child, context)  # type: ignore[arg-type]
    entries = {e.op: e for e in context.entries if e.op is not None}
    for n in [m for m in found.nodes if m.target is torch.ops.moe.experts.default]:
        entry = entries.get(n) or Entry("fused", n.name)
        try:
            entry.router = _replace(gm, found, n, context)
            entry.router_reason = ""
            found.pin()
        except Unsupported as e:
            entry.router_reason = str(e)
    gm.recompile()


def _replace(gm: fx.GraphModule, found: Walk, n: fx.Node, context: Context) -> RouterSpec:
    weights, ids = (found.values.get(a) for a in n.args[1:3])  # type: ignore[arg-type]
    need(n.args[1] is not None, "the experts are not weighted")
    w, i = found.mode.get(weights), found.mode.get(ids)
    need(
        isinstance(w, Chosen) and isinstance(i, Ids) and w.routing is i.routing,
        "the weights and ids come from code that is not a known router",
    )
    assert isinstance(w, Chosen) and isinstance(i, Ids)
    router = router_of(found, w)
    need(i.routing.ids is not None and isinstance(w.base, Tensor), "no node holds the router's results")
    reason = context.supports_router(router.spec, w.base.device)
    need(not reason, str(reason))
    return _Rewrite(gm, found, router, w, i).do()


class _Rewrite:
    def __init__(self, gm: fx.GraphModule, found: Walk, router: Router, w: Chosen, i: Ids) -> None:
        self.gm, self.walk, self.mode, self.router = gm, found, found.mode, router
        self.weights, self.ids = w.base, i.routing.ids.tensor  # type: ignore[union-attr]
        self.role = w

    def do(self) -> RouterSpec:
        walked, router = self.walk, self.router
        results = [*walked.holders[id(self.weights)], *walked.holders[id(self.ids)]]
        end = max(results, key=lambda m: walked.step[m])
        at = walked.step[end]
        reads = [router.logits, *([router.bias] if router.bias is not None else [])]
        start = max(ref.step for ref in reads)  # moe.route goes right before the node that ran then, which may write its inputs
        for ref in reads:
            written = self.mode.written.get(ref.storage, [])
            early = any(ref.step <= s < start or ref.step < s <= at for s in written)
            need(not early, f"{ref.node.name} is overwritten inside the router")
        for t in (self.weights, self.ids):
            later = self.mode.written.get(self.mode.key(t), [])
            need(not any(s > at for s in later), "the router's results are overwritten later")
        inputs = {r.node for r in reads}
        nodes: set[fx.Node] = set()
        for result in results:
            nodes |= surgery.slice_of(result, inputs, lambda n: walked.writers(n, at))
        self.check_layout()
        nodes = surgery.with_size_queries(nodes, walked.nodes)
        dense = [t for t in self.dense(nodes) if self.leaves(t, nodes)]
        self.check(nodes, at, dense)
        self.insert(start, at, dense, nodes)
        surgery.erase(self.gm.graph, nodes, walked.sharers, walked.step)
        return router.spec

    def check_layout(self) -> None:
        w = self.mode.get(self.weights)
        in_order = w is None or D.in_pair_order(w.dims)
        need(in_order, "the routing weights are not laid out by token and slot")

    def dense(self, nodes: set[fx.Node]) -> list[Tensor]:
        """The weights by token and expert, where they leave the router: they are scattered again from those of the op."""
        found: dict[int, Tensor] = {}
        for n in nodes:
            t = self.walk.values.get(n)
            role = self.mode.get(t)
            if not isinstance(t, Tensor) or not isinstance(role, DenseWeights) or role.fill != 0 or role.joined:
                continue
            plain = [D.names((d,)) for d in role.dims] in ([{"t"}, {"e"}], [{"e"}, {"t"}])
            untouched = not any(s > self.walk.step[n] for s in self.mode.written.get(self.mode.key(t), []))
            mine = role.routing is self.role.routing and role.tree == self.role.tree
            if plain and untouched and mine and t.dtype == self.weights.dtype:
                found[id(t)] = t
        return list(found.values())

    def leaves(self, t: Tensor, nodes: set[fx.Node]) -> list[fx.Node]:
        """What reads t outside of the router."""
        return [u for h in self.walk.holders.get(id(t), []) for u in h.users if u not in nodes]

    def check(self, nodes: set[fx.Node], at: int, dense: list[Tensor]) -> None:
        """The original choice must die: two of them need not agree on ties."""
        ids = self.ids
        written = [s for s in self.mode.written.get(self.mode.key(ids), []) if s <= at]
        need(not written, "the chosen ids are overwritten")
        stays: set[fx.Node] = set()
        todo = []
        for n in nodes:
            value = self.walk.values.get(n)
            if value is ids or any(value is t for t in dense):
                continue
            if any(u not in nodes and not (value is self.weights and self.walk.when(u) > at) for u in n.users):
                todo.append((n, n))
        while todo:
            n, seen = todo.pop()
            value = self.walk.values.get(n)
            if n in stays or n not in nodes or value is ids:
                continue
            stays.add(n)
            choice = isinstance(value, (tuple, list)) and any(t is ids for t in value)
            need(not choice, f"{seen.name}, a value inside the router, is used elsewhere too")
            todo += [(m, seen) for m in (*n.all_input_nodes, *self.walk.writers(n, at))]

    def insert(self, start: int, at: int, dense: list[Tensor], nodes: set[fx.Node]) -> None:
        router, graph = self.router, self.gm.graph
        bias = router.bias.node if router.bias is not None else None
        anchor = self.walk.nodes[start]
        with graph.inserting_before(anchor):
            args = (router.logits.node, bias, router.spec.text())
            route = surgery.call(graph, torch.ops.moe.route.default, args, anchor)
            results = [surgery.call_getitem(graph, route, i, anchor) for i in range(2)]
            weights, ids = (self.shaped(n, t, anchor) for n, t in zip(results, (self.weights, self.ids), strict=True))
            scattered = [self.scattered(t, results[0], results[1], anchor) for t in dense]
        for t, new in zip(dense, scattered, strict=True):
            for user in self.leaves(t, nodes):
                for holder in self.walk.holders[id(t)]:
                    user.replace_input_with(holder, new)
        for tensor, new, since in ((self.weights, weights, at), (self.ids, ids, -1)):
            for holder in self.walk.holders[id(tensor)]:
                for user in list(holder.users):
                    if self.walk.when(user) > since:
                        user.replace_input_with(holder, new)

    def scattered(self, like: Tensor, weights: fx.Node, ids: fx.Node, anchor: fx.Node) -> fx.Node:
        """weights and ids [.., K] as dense weights [T,E] or [E,T], 0 where an expert was not chosen."""
        graph = self.gm.graph
        zeros = surgery.call(graph, torch.zeros_like, (self.router.logits.node,), anchor)
        if self.router.logits.tensor.dtype != like.dtype:
            zeros = surgery.call(graph, "to", (zeros, like.dtype), anchor)
        n = surgery.call(graph, "scatter", (zeros, -1, ids, weights), anchor)
        if self.router.logits.tensor.dim() > 2:
            n = surgery.call(graph, "flatten", (n, 0, -2), anchor)
        role = self.mode.get(like)
        if role is not None and D.names(role.dims[:1]) == {"e"}:
            n = surgery.call(graph, "t", (n,), anchor)
        return surgery.call(graph, "contiguous", (n,), anchor) if like.is_contiguous() else n

    def shaped(self, n: fx.Node, like: Tensor, anchor: fx.Node) -> fx.Node:
        """n [.., K], a result of moe.route, as the tensor it replaces was laid out."""
        tokens, k = tuple(self.router.logits.tensor.shape[:-1]), self.router.spec.top_k
        shape = tuple(like.shape)
        if shape == (*tokens, k):
            return n
        if len(shape) == 1 and shape[0] == math.prod(tokens) * k:
            return surgery.call(self.gm.graph, "flatten", (n,), anchor)
        need(shape == (math.prod(tokens), k), "the routing weights or ids are not laid out by token and slot")
        return surgery.call(self.gm.graph, "flatten", (n, 0, -2), anchor)

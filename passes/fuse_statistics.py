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

import math
import operator
from dataclasses import dataclass

import torch
from torch import Tensor, fx

import moecompile.ir.ops  # noqa: F401 (defines the moe.* ops)
from moecompile.errors import Unsupported, need
from moecompile.ir import surgery
from moecompile.ir.spec import RouterSpec, router_from_text
from moecompile.passes import Context, Entry, Phase, graph_pass
from moecompile.recognize import dims as D
from moecompile.recognize.roles import Counts, Ids, OneHot, Ref, Routing, Scores, Tally, TokenScore, Tree, holds
from moecompile.recognize.routing import softmax_top_k
from moecompile.recognize.rules.statistics import COUNTED
from moecompile.recognize.walk import Walk, tensors, walk

ROUTE, ROUTE_STATS = torch.ops.moe.route.default, torch.ops.moe.route_stats.default
CHOICES, PROBABILITIES, SQUARES = 2, 3, 4  # which results of moe.route_stats they are
NAMES = {CHOICES: "choices", PROBABILITIES: "probabilities", SQUARES: "squared logsumexp"}


@graph_pass("fuse-statistics", Phase.REWRITE, after=("fuse-router",))
def fuse_statistics(gm: fx.GraphModule, context: Context) -> fx.GraphModule:
    """Every moe.route whose logits a balancing loss sums becomes moe.route_stats, where a kernel does that on the way."""
    if any(_asked(n, context) for n in _routes(gm)):
        _fuse(gm, walk(gm), context)
    return gm


def _routes(gm: fx.GraphModule) -> list[fx.Node]:
    found = [n for n in gm.graph.nodes if n.target is ROUTE]
    for child in gm.children():
        if isinstance(child, fx.GraphModule):
            found += _routes(child)
    return found


def _asked(route: fx.Node, context: Context) -> bool:
    """Does anything else read the logits, and could a kernel do it?"""
    logits = route.args[0]
    assert isinstance(logits, fx.Node)
    views = _views(logits)
    if not any(u is not route and u not in views and u.op != "output" for n in views for u in n.users):
        return False
    return not context.supports_statistics(router_from_text(str(route.args[2])), surgery.value_of(logits).device)


_SAME_ROWS = {"view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze", "contiguous", "to", "float"}


def _views(n: fx.Node) -> list[fx.Node]:
    """n, and what it was made of that has the same rows [.., E]: in other leading dimensions, or in a dtype that n's holds."""
    found = [n]
    while n.op in ("call_function", "call_method") and surgery.name_of(n) in _SAME_ROWS and isinstance(n.args[0], fx.Node):
        before, after = surgery.value_of(n.args[0]), surgery.value_of(n)
        if not (isinstance(before, Tensor) and isinstance(after, Tensor) and before.dim() and after.dim()):
            break
        widths = before.shape[-1], after.shape[-1]
        if any(surgery.symbolic(w) for w in widths) or widths[0] != widths[1] or before.device != after.device:
            break
        if not holds(after.dtype, before.dtype):
            break
        n = n.args[0]
        found.append(n)
    return found


def _fuse(gm: fx.GraphModule, found: Walk, context: Context) -> None:
    for _, name, child in found.children:
        _fuse(gm.get_submodule(name), child, context)  # type: ignore[arg-type]
    entries = {_route_of(e.op): e for e in context.entries if e.op is not None}
    for route in [n for n in found.nodes if n.target is ROUTE and _asked(n, context)]:
        entry = entries.get(route) or Entry("fused", route.name)
        rewrite = _Rewrite(gm, found, route)
        entry.statistics = ", ".join(NAMES[i] for i in sorted({s.result for s in rewrite.do()}))
        entry.statistics_reason = "" if entry.statistics else "; ".join(dict.fromkeys(rewrite.reasons))
    gm.recompile()


def _route_of(experts: fx.Node) -> fx.Node | None:
    """The moe.route node that the ids of a moe.experts node come from."""
    n = experts.args[2]
    while isinstance(n, fx.Node) and (n.target is operator.getitem or surgery.name_of(n) == "flatten"):
        n = n.args[0]
    return n if isinstance(n, fx.Node) and n.target is ROUTE else None


@dataclass(eq=False)
class _Sum:
    """A value of the graph that moe.route_stats returns too."""

    tensor: Tensor
    node: fx.Node
    step: int  # of the walk, at which it was complete
    result: int
    per: tuple[str, ...]  # what the result is divided by: "token", "slot"
    slice: set[fx.Node]  # the nodes that compute it


class _Rewrite:
    """One moe.route."""

    def __init__(self, gm: fx.GraphModule, found: Walk, route: fx.Node) -> None:
        self.gm, self.walk, self.mode, self.route = gm, found, found.mode, route
        self.spec: RouterSpec = router_from_text(str(route.args[2]))
        self.logits: fx.Node = route.args[0]  # type: ignore[assignment]
        self.views = self.followed(self.logits)
        self.reasons: list[str] = []

    def do(self) -> list[_Sum]:
        """What is now read from the op; empty where the graph was left as it is."""
        value, returned = self.walk.values.get(self.logits), self.walk.values.get(self.route)
        ids = self.mode.get(returned[1]) if isinstance(returned, tuple) else None
        if self.route not in self.walk.followed or not isinstance(ids, Ids) or not holds(torch.float32, value.dtype):
            return []
        self.own, self.tokens = ids.routing, math.prod(value.shape[:-1])
        sums = []
        for t in self.complete():
            try:
                one = self.sum_of(t)
                if one is not None:
                    sums.append(one)
            except Unsupported as e:
                self.reasons.append(str(e))
        sums = self.dying(sums)
        if all(s.result == CHOICES for s in sums):
            return []
        self.insert(sums)
        nodes = surgery.with_size_queries(set().union(*(s.slice for s in sums)), self.walk.nodes)
        surgery.erase(self.gm.graph, nodes, self.walk.sharers, self.walk.step)
        return sums

    def followed(self, n: fx.Node) -> list[fx.Node]:
        """_views(n), as far as gradients go through."""
        found = [n]
        for m in _views(n)[1:]:
            if found[-1] not in self.walk.followed:
                break
            found.append(m)
        return found

    # ------------------------------------------------------------ which values are results of the op

    def complete(self) -> list[Tensor]:
        """The values that are sums over all tokens, and not merely computed from one that is."""

        def whole(t: object) -> bool:
            role = self.mode.get(t)
            return isinstance(role, Counts) or (isinstance(role, Tally) and D.names(role.dims) <= {"e"})

        found: dict[int, Tensor] = {}
        for n in self.walk.nodes:
            value = self.walk.values.get(n)
            if isinstance(value, Tensor) and whole(value):
                before = [t for m in n.all_input_nodes for t in tensors(self.walk.values.get(m)) if t is not value]
                if not any(whole(t) for t in before):
                    found[id(value)] = value
        return list(found.values())

    def sum_of(self, t: Tensor) -> _Sum | None:
        """t as a result of the op, or None where it is no sum of this router's. Unsupported where it nearly is one."""
        role = self.mode.get(t)
        over, of, kept = 1, ("choices", None), {t.dtype}
        if isinstance(role, Counts):
            of = ("choices", role.routing)
        elif isinstance(role, Tally):
            over, of, kept = role.over, role.of, role.dtypes | kept  # type: ignore[assignment]
        made_of = self.choices(of[1]) if of[0] == "choices" else self.scores(of)  # type: ignore[arg-type]
        if made_of is None:
            return None
        result, read = made_of
        written = self.mode.written.get(self.mode.key(t), [])
        step = max([self.walk.step[self.walk.holders[id(t)][0]], *written])
        node = self.walk.nodes[step]
        experts = 1 if result == SQUARES else self.spec.num_experts
        need(role is not None and D.size_of(role.dims, "e") == experts, f"{node.name} has not one number for each expert")
        if result == CHOICES:
            need(kept <= set(COUNTED), f"{node.name} counts in a dtype that rounds")
        else:
            need(all(holds(torch.float32, d) for d in kept), f"{node.name} is summed in a wider dtype than the router's kernel has")
        need(step > self.walk.step[self.route], f"{node.name} is summed before the router runs")
        for n in {*self.views, *_views(read)}:
            value = self.walk.values.get(n)
            later = self.mode.written.get(self.mode.key(value), []) if isinstance(value, Tensor) else []
            need(not any(s > self.walk.step[n] for s in later), f"{n.name} is overwritten")
        for n in self.walk.on_storage.get(self.mode.key(t), ()):
            seen = n.op == "placeholder" or any(self.walk.when(u) > step for u in n.users)
            alias = self.walk.values[n] is not t and self.walk.step[n] <= step and seen
            need(not alias, f"{n.name}, a view of {node.name} made before it was complete, is used later")
        nodes = surgery.slice_of(node, {read, self.logits, self.route}, lambda n: self.walk.writers(n, step))
        return _Sum(t, node, step, result, self.divisor(over, node, result), nodes)

    def scores(self, tree: Tree) -> tuple[int, fx.Node] | None:
        """Which result it is that sums this over tokens, and the node it reads the logits from."""
        kind, tree, dtypes = 0, *_uncast(tree)
        if tree[0] == "square":
            kind, (tree, more) = SQUARES, _uncast(tree[1])
            dtypes += more
        if tree[0] != ("logsumexp" if kind == SQUARES else "softmax"):
            return None
        tree, given = _uncast(tree[1])
        if tree[0] != "logits" or not self.same(tree[1]):
            return None
        node: fx.Node = tree[1].node
        need(all(holds(d, tree[1].tensor.dtype) for d in given), f"{node.name} is rounded before the probabilities are computed")
        need(all(holds(torch.float32, d) for d in (*dtypes, *given)), f"{node.name} is computed with in a wider dtype")
        return kind or PROBABILITIES, node

    def choices(self, routing: Routing) -> tuple[int, fx.Node] | None:
        """The result that counts this choice, if it is certainly the router's, and what it was read from."""
        if routing is self.own:
            return CHOICES, self.route
        again = softmax_top_k(routing.choice) if routing.choice is not None and routing.select == "topk" else None
        if again is None or not self.same(again[1]):
            return None
        s, (dtype, logits) = self.spec, again
        plain = s.score == "softmax" and not s.bias and s.groups is None and not s.first
        need(
            plain and s.score_dtype == dtype and s.top_k == routing.top_k, f"{logits.node.name} is chosen from by another rule too"
        )
        return CHOICES, logits.node

    def same(self, logits: Ref) -> bool:
        """Are these the route's logits?"""
        return self.followed(logits.node)[-1] is self.views[-1]

    def divisor(self, over: int, node: fx.Node, result: int) -> tuple[str, ...]:
        known: dict[tuple[str, ...], int] = {(): 1, ("token",): self.tokens}
        if result == CHOICES:
            known |= {("token", "slot"): self.tokens * self.spec.top_k, ("slot",): self.spec.top_k}
        found = next((per for per, size in known.items() if size == over), None)
        if found is None:
            raise Unsupported(f"{node.name} is a mean over some of the tokens only")
        return found

    def dying(self, sums: list[_Sum]) -> list[_Sum]:
        """Those of the sums for which nothing is computed any more once they are read from the op."""
        while True:
            gone = {h: s.step for s in sums for h in self.walk.holders[id(s.tensor)]}
            dead = surgery.with_size_queries(set().union(*(s.slice for s in sums)), self.walk.nodes)
            while alive := {n for n in dead if any(u not in dead and self.walk.when(u) <= gone.get(n, 1 << 60) for u in n.users)}:
                dead -= alive
            kept = []
            for s in sums:
                seen = next((n for n in s.slice - dead if self.costly(n)), None)
                if seen is None:
                    kept.append(s)
                else:
                    self.reasons.append(f"{seen.name}, of which {s.node.name} is made, is used elsewhere too")
            if len(kept) == len(sums):
                return sums
            sums = kept

    def costly(self, n: fx.Node) -> bool:
        """Does n hold numbers for each token?"""
        held = [self.mode.roles.get(id(t)) for t in tensors(self.walk.values.get(n))]
        return any(r is not None and isinstance(r[0], (Scores, TokenScore, OneHot, Tally)) for r in held)

    # ------------------------------------------------------------ the new nodes

    def insert(self, sums: list[_Sum]) -> None:
        graph, route = self.gm.graph, self.route
        with graph.inserting_before(route):
            op = surgery.call(graph, ROUTE_STATS, route.args, route)
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

    def read_from(self, op: fx.Node, s: _Sum) -> fx.Node:
        """The op's result divided, cast and shaped as the value it replaces."""
        graph, dtype = self.gm.graph, s.tensor.dtype
        n = surgery.call_getitem(graph, op, s.result, op)
        if s.result == CHOICES and dtype != torch.int64:
            n = surgery.call(graph, "to", (n, dtype), op)
        if "token" in s.per:
            n = surgery.call(graph, operator.truediv, (n, self.num_tokens(op)), op)
        if "slot" in s.per:
            n = surgery.call(graph, operator.truediv, (n, self.spec.top_k), op)
        if surgery.value_of(n).dtype != dtype:
            n = surgery.call(graph, "to", (n, dtype), op)
        return (
            n
            if tuple(s.tensor.shape) == tuple(surgery.value_of(n).shape)
            else surgery.call(graph, "reshape", (n, *s.tensor.shape), op)
        )

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


def _uncast(tree: Tree) -> tuple[Tree, list[torch.dtype]]:
    """The tree below its casts, and what they are to."""
    dtypes = []
    while tree[0] == "cast":
        dtypes.append(tree[1])
        tree = tree[2]
    return tree, dtypes

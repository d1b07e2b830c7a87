"""Replace the experts of every recognised layer by one op.

    Before:  %rows = getitem(%x, %token)           After:  %y = moe.experts(%x, %weights, %ids, [%gate_up, %down])
             %h    = _grouped_mm(%rows, %w1, ..)
             ..    (any form: sorted, gathered, looped, dense)
             %y    = sum(%weighted, 1)

Needs: nothing (walks the graph itself).  Changes rounding: sums and activation are in float32, rounded once.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Mapping

import torch
from torch import fx

from moecompile.errors import Unsupported
from moecompile.ir import reference, surgery
from moecompile.ir.spec import ExpertsSpec, Weight
from moecompile.passes import Context, Entry, Phase, graph_pass
from moecompile.recognize import dims as D
from moecompile.recognize.layer import Layer, layers
from moecompile.recognize.roles import Chosen, DenseWeights, Ref
from moecompile.recognize.walk import Walk, walk


@graph_pass("fuse-experts", Phase.REWRITE)
def fuse_experts(gm: fx.GraphModule, context: Context) -> fx.GraphModule:
    """Every layer found in gm and in its child graphs becomes a moe.experts node, where a kernel supports it."""
    _fuse(gm, walk(gm), context)
    return gm


def _fuse(gm: fx.GraphModule, found: Walk, context: Context) -> None:
    for _, name, child in found.children:
        _fuse(gm.get_submodule(name), child, context)  # type: ignore[arg-type]
    complete, missed = layers(found)
    for layer in complete:
        entry = Entry("fused", layer.output.name, layer.form, layer.spec.experts, stack_trace=_trace(layer.output))
        try:
            _Replacement(gm, layer, context, entry).do()
            found.pin()
        except Unsupported as e:
            entry.status, entry.reason = "declined", str(e)
        context.entries.append(entry)
    for miss in missed:
        name = miss.node.name if miss.node is not None else ""
        context.entries.append(Entry("declined", name, reason=miss.reason, stack_trace=_trace(miss.node)))
    gm.recompile()


def _trace(n: fx.Node | None) -> str:
    return str(n.meta.get("stack_trace", "")) if n is not None else ""


def _overlaps(w: Weight, experts: int) -> bool:
    """Do several experts, or rows, read the same element of a parameter?"""
    return (w.e == 0 and w.stacked and experts > 1) or w.n == 0 or (w.k == 0 and len(w.shape) > 2)


class _Replacement:
    """One layer's nodes by one node."""

    def __init__(self, gm: fx.GraphModule, layer: Layer, context: Context, entry: Entry) -> None:
        self.gm, self.graph, self.layer, self.context, self.entry = gm, gm.graph, layer, context, entry
        self.walk, self.mode, self.end = layer.walk, layer.walk.mode, layer.end
        self.spec: ExpertsSpec = layer.spec.experts
        self.sizes: list[fx.Node] = []

    def do(self) -> None:
        layer, end = self.layer, self.end
        device = end.tensor.device
        reason = self.context.supports_experts(self.spec, device, self.context.train)
        if reason:
            raise Unsupported(reason)
        if self.context.train and any(_overlaps(w, self.spec.num_experts) for w in self.spec.weights()):
            raise Unsupported("the experts share weights (an expanded view), whose gradients would have to be added up")
        weights = self.weights_ref()
        reads: list[Ref] = [*layer.refs(), *([weights] if weights is not None else [])]
        for ref in reads:
            self.check_unwritten(ref)
        self.check_aliases()
        inputs = {m for r in reads for m in self.holding(r)}
        nodes = surgery.slice_of(end.node, inputs, lambda n: self.walk.writers(n, end.step))
        self.check_observed(nodes)
        region = self.cut_out(nodes, reads, weights)
        self.insert(weights, region)
        candidates = surgery.with_size_queries(nodes, self.walk.nodes)
        surgery.erase(self.graph, candidates, self.sharers, self.walk.step)

    def sharers(self, n: fx.Node) -> list[fx.Node]:
        """What still holds a storage that n writes: views made of the finished output are now views of the op's."""
        moved = self.walk.on_storage.get(self.mode.key(self.end.tensor), [])
        return [m for m in self.walk.sharers(n) if not (m in moved and self.walk.when(m) > self.end.step)]

    # ------------------------------------------------------------ checks

    def weights_ref(self) -> Ref | None:
        w = self.layer.weights
        if w is None:
            return None
        ref = w.ref if w.ref is not None else self.mode.ref(w.base)
        if ref is None:
            raise Unsupported("no node holds the routing weights")
        if w.ref is None:  # [T,K] (or [T,E]) by tokens first, or what is taken for weights is something else
            held = self.mode.get(w.base)
            if not isinstance(held, (Chosen, DenseWeights)) or held.tree != w.tree or not D.in_pair_order(held.dims):
                raise Unsupported("the routing weights are overwritten, or not laid out by token and slot")
            by_token = D.names(held.dims[:-1]) <= {"t"} and D.names(held.dims[-1:]) <= {"e"}
            if w.dense and not by_token and not self.by_expert(held):
                raise Unsupported("the dense routing weights are not laid out by token and expert")
        return ref

    def check_observed(self, nodes: set[fx.Node]) -> None:
        """No rows of the experts may be read outside: to still produce them, the original would have to run as well."""
        inside = surgery.with_size_queries(nodes, self.walk.nodes)
        for n in inside:
            v = self.walk.values.get(n)
            for t in v if isinstance(v, (tuple, list)) else (v,):
                heavy = id(t) in self.walk.heavy or t is self.end.tensor
                replaced = t is self.end.tensor
                outside = [u for u in n.users if u not in inside and not (replaced and self.walk.when(u) > self.end.step)]
                if heavy and outside:
                    raise Unsupported(f"{n.name}, a value inside the layer, is used by {outside[0].name} too")

    def check_unwritten(self, ref: Ref) -> None:
        writes = self.mode.written.get(ref.storage, [])
        if any(ref.step <= s <= self.end.step for s in writes):
            raise Unsupported(f"{ref.node.name} is overwritten between its use in the layer and the layer's end")

    def check_aliases(self) -> None:
        """Nothing else may look at the output's memory: the new output lies elsewhere."""
        key = self.mode.key(self.end.tensor)
        for n in self.walk.on_storage.get(key, ()):
            if self.walk.values[n] is not self.end.tensor:
                made_before = self.walk.step[n] <= self.end.step
                if made_before and (n.op == "placeholder" or any(self.walk.when(u) > self.end.step for u in n.users)):
                    raise Unsupported(f"{n.name}, a view of the layer's output made before it was complete, is used later")

    def holding(self, ref: Ref) -> list[fx.Node]:
        """The nodes that hold a live-in's value as the layer reads it: after the last write, the first holder too."""
        written = [s for s in self.mode.written.get(ref.storage, []) if s <= self.end.step]
        found = [n for n in self.walk.holders.get(id(ref.tensor), []) if self.walk.step[n] >= max(written, default=-1)]
        return [self.node(ref), *found]

    def node(self, ref: Ref) -> fx.Node:
        """The node that holds a live-in now: it may have been another layer's output."""
        return self.walk.replaced.get(ref.node, ref.node)

    # ------------------------------------------------------------ the original, kept

    def cut_out(self, nodes: set[fx.Node], reads: list[Ref], weights: Ref | None) -> str:
        """Keep the original nodes under a name, as a function of (x, weights, ids, params, sizes), unless they read more."""
        layer = self.layer
        tokens = [self.node(r) for r in (layer.x, *([weights] if weights is not None else []), layer.ids)]
        given = [*tokens, *(self.node(ref) for ref, _ in layer.params)]
        sizes = self.sizes_for(nodes, tokens)
        returned = self.walk.holders[id(self.end.tensor)][0]
        original: fx.GraphModule | None = None
        if len(set(given)) == len(given):
            with contextlib.suppress(KeyError):  # reads something else: the reference stands in for it
                autocast = self.autocast(nodes)
                restore = {n: surgery.reshaped(n, sizes) for n in given}
                if layer.weights is not None and layer.weights.dense:
                    restore[tokens[1]] = self.dense(tokens[1], tokens[2])
                same = {m: self.node(r) for r in reads for m in self.holding(r)}
                original = surgery.cut(self.gm, nodes, [*given, *sizes], restore, same, self.end.node, returned)
                original.meta["autocast"] = autocast
        self.sizes = sizes if original is not None else []
        told = original.code if original is not None else f"{self.end.node.name}"
        told += repr(original and original.meta["autocast"]) + self.context.policy
        name = hashlib.sha256((told + self.spec.text()).encode()).hexdigest()[:16]
        self.context.regions[name] = original
        return name

    def size_inputs(self) -> list[fx.Node]:
        """The inputs of the graph that are symbolic sizes."""
        return [n for n in self.walk.nodes if n.op == "placeholder" and isinstance(surgery.value_of(n), torch.SymInt)]

    def sizes_for(self, nodes: set[fx.Node], tokens: list[fx.Node]) -> list[fx.Node]:
        """The symbolic sizes that the original nodes read, and those that tell a live-in of several symbolic dimensions apart."""
        symbolic = [[d.node.expr for d in surgery.value_of(n).shape if surgery.symbolic(d)] for n in tokens]
        told = {expr for dims in symbolic if len(dims) > 1 for expr in dims}
        return [n for n in self.size_inputs() if any(u in nodes for u in n.users) or surgery.value_of(n).node.expr in told]

    def dense(self, weights: fx.Node, ids: fx.Node) -> surgery.Restore:
        """Weights [T,K], as the op has them, at their places in [T,E] or [E,T]."""
        assert self.layer.weights is not None
        by_expert = self.by_expert(self.mode.get(self.layer.weights.base))

        def restore(graph: fx.Graph, here: Mapping[fx.Node, fx.Node]) -> fx.Node:
            flat = graph.call_method("reshape", (here[ids], [-1, self.spec.top_k]))
            placed = graph.call_function(reference.dense_weights, (here[weights], flat, self.spec.num_experts))
            return graph.call_method("t", (placed,)) if by_expert else placed

        return restore

    def autocast(self, nodes: set[fx.Node]) -> tuple[str, torch.dtype, bool]:
        """The autocast that was in force over all of the nodes, as torch.autocast takes it; KeyError where it changed."""
        device = self.end.tensor.device.type
        found = {self.walk.autocast[n][device] for n in nodes}
        if len(found) != 1:
            raise KeyError("autocast")
        enabled, dtype = found.pop()
        return device, dtype, enabled

    # ------------------------------------------------------------ the new node

    def insert(self, weights: Ref | None, region: str) -> None:
        layer, graph = self.layer, self.graph
        like = self.walk.holders[id(self.end.tensor)][0]
        anchor = self.end.node
        with graph.inserting_before(anchor.next):
            x = self.flat(self.unshared(layer.x), layer.x_cast, self.spec.hidden)
            ids = self.flat(self.unshared(layer.ids), None, self.spec.top_k)
            w = self.flat_weights(weights, ids)
            params = [self.param(ref, cast) for ref, cast in layer.params]
            new = graph.call_function(
                torch.ops.moe.experts.default,
                (x, w, ids, params, self.sizes, self.spec.text(), region),
            )
            shaped = self.shaped(new, like)
        if "stack_trace" in self.end.node.meta:
            new.meta["stack_trace"] = shaped.meta["stack_trace"] = self.end.node.meta["stack_trace"]
        for holder in self.walk.holders[id(self.end.tensor)]:
            self.walk.replaced[holder] = shaped
            for user in list(holder.users):
                if self.walk.when(user) > self.end.step and user is not new and user is not shaped:
                    user.replace_input_with(holder, shaped)
        self.entry.node, self.entry.op, self.entry.region = new.name, new, region
        self.entry.kernel = self.context.kernel(self.end.tensor.device)

    def shaped(self, new: fx.Node, like: fx.Node) -> fx.Node:
        """The op's result [T,H] in the shape of the output it replaces."""
        value, key = surgery.value_of(like), surgery.key_of(like)
        new.meta.update(like.meta)
        if value.dim() == 2:
            return new
        with value.fake_mode, torch.no_grad():
            new.meta[key] = value.new_empty((math.prod(value.shape[:-1]), value.shape[-1]))
        try:
            sizes = surgery.dimensions(value.shape, self.size_inputs())
        except KeyError:
            raise Unsupported("the output has two dimensions of unknown size") from None
        node = self.graph.call_method("reshape", (new, *sizes))
        node.meta.update(like.meta)
        return node

    def unshared(self, ref: Ref) -> fx.Node:
        """The node, or a copy of it where the value is overwritten later and the op's backward would still need it."""
        if self.context.train and any(s > self.end.step for s in self.mode.written.get(ref.storage, [])):
            return surgery.call(self.graph, "clone", (self.node(ref),), self.end.node)
        return self.node(ref)

    def flat(self, n: fx.Node, cast: torch.dtype | None, last: int = 0) -> fx.Node:
        """n as [rows, last dimension], cast."""
        value = surgery.value_of(n)
        if cast is not None and value.dtype != cast:
            n = surgery.call(self.graph, "to", (n, cast), self.end.node)
        if value.dim() == 2 and last in (0, int(value.shape[-1])):
            return n
        if value.dim() > 2 and last in (0, int(value.shape[-1])):
            return surgery.call(self.graph, "flatten", (n, 0, -2), self.end.node)
        return surgery.call(self.graph, "reshape", (n, -1, last), self.end.node)

    def flat_weights(self, weights: Ref | None, ids: fx.Node) -> fx.Node | None:
        if weights is None:
            return None
        assert self.layer.weights is not None
        n = self.unshared(weights)
        if self.layer.weights.dense:
            if self.by_expert(self.mode.get(self.layer.weights.base)):
                n = surgery.call(self.graph, "t", (n,), self.end.node)
            return surgery.call(self.graph, "gather", (self.flat(n, None), 1, ids), self.end.node)
        value, k = surgery.value_of(n), self.spec.top_k
        if value.dim() >= 2 and isinstance(value.shape[-1], int) and value.shape[-1] == k:
            return self.flat(n, None, k)
        return surgery.call(self.graph, "reshape", (n, -1, k), self.end.node)

    def by_expert(self, role: object) -> bool:
        """Dense weights [E,T]."""
        return isinstance(role, DenseWeights) and [D.names((d,)) for d in role.dims] in ([{"e"}, {"t"}], [{"e"}, set()])

    def param(self, ref: Ref, cast: torch.dtype | None) -> fx.Node:
        return self.node(ref) if cast is None else surgery.call(self.graph, "to", (self.node(ref), cast), self.end.node)

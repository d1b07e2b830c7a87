"""From the roles of a walk to the values that a moe.route's own kernel could sum: what balancing losses read."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from moecompile.errors import Unsupported, need
from moecompile.ir import surgery
from moecompile.ir.spec import RouterSpec, router_from_text
from moecompile.recognize import dims as D
from moecompile.recognize.roles import Counts, Ids, Ref, Routing, Tally, Tree, holds
from moecompile.recognize.routing import softmax_top_k
from moecompile.recognize.rules.statistics import COUNTED
from moecompile.recognize.walk import Walk, tensors

CHOICES, PROBABILITIES, SQUARES = 2, 3, 4  # which results of moe.route_stats they are
NAMES = {CHOICES: "choices", PROBABILITIES: "probabilities", SQUARES: "squared logsumexp"}


@dataclass(eq=False)
class Statistic:
    """A value of the graph that moe.route_stats returns too."""

    tensor: Tensor
    node: fx.Node
    step: int  # of the walk, at which it was complete
    result: int
    per: tuple[str, ...]  # what the result is divided by: "token", "slot"
    slice: set[fx.Node]  # the nodes that compute it from the logits, or from the route's ids


def same_rows(n: fx.Node) -> list[fx.Node]:
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


_SAME_ROWS = {"view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze", "contiguous", "to", "float"}


class Statistics:
    """What is summed of the logits and ids of one moe.route node: `found`, and in `reasons` why something nearly is not."""

    def __init__(self, walk: Walk, route: fx.Node) -> None:
        self.walk, self.mode, self.route = walk, walk.mode, route
        self.spec: RouterSpec = router_from_text(str(route.args[2]))
        self.logits: fx.Node = route.args[0]  # type: ignore[assignment]
        self.rows = self._followed(self.logits)
        self.found: list[Statistic] = []
        self.reasons: list[str] = []
        value, returned = walk.values.get(self.logits), walk.values.get(route)
        ids = self.mode.get(returned[1]) if isinstance(returned, tuple) else None
        if route not in walk.followed or not isinstance(ids, Ids) or not isinstance(value, Tensor):
            return
        if not holds(torch.float32, value.dtype):
            self.reasons.append(f"the router reads {value.dtype}")
            return
        self.own, self.tokens = ids.routing, math.prod(value.shape[:-1])
        for t in self._complete():
            try:
                one = self._statistic(t)
            except Unsupported as e:
                self.reasons.append(str(e))
                continue
            if one is not None:
                self.found.append(one)

    def _followed(self, n: fx.Node) -> list[fx.Node]:
        """same_rows(n), as far as gradients go through."""
        rows = same_rows(n)
        cut = next((i for i, m in enumerate(rows) if m not in self.walk.followed), len(rows) - 1)
        return rows[: cut + 1]

    def _complete(self) -> list[Tensor]:
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

    def _statistic(self, t: Tensor) -> Statistic | None:
        """t as a result of the op, or None where it is no sum of this router's. Unsupported where it nearly is one."""
        role = self.mode.get(t)
        if isinstance(role, Counts):
            role = Tally(role.dims, ("choices", role.routing), 1, frozenset())
        assert isinstance(role, Tally)
        made_of = self._choices(role.of[1]) if role.of[0] == "choices" else self._scores(role.of)
        if made_of is None:
            return None
        result, read = made_of
        written = self.mode.written.get(self.mode.key(t), [])
        step = max([self.walk.step[self.walk.holders[id(t)][0]], *written])
        node = self.walk.nodes[step]
        dtypes, experts = role.dtypes | {t.dtype}, 1 if result == SQUARES else self.spec.num_experts
        need(D.size_of(role.dims, "e") == experts, f"{node.name} has not one number for each expert")
        if result == CHOICES:
            need(dtypes <= set(COUNTED), f"{node.name} counts in a dtype that rounds")
        else:
            need(all(holds(torch.float32, d) for d in dtypes), f"{node.name} is summed in a wider dtype than float32")
        need(step > self.walk.step[self.route], f"{node.name} is summed before the router runs")
        for n in {*self.rows, *same_rows(read)}:
            value = self.walk.values.get(n)
            later = self.mode.written.get(self.mode.key(value), []) if isinstance(value, Tensor) else []
            need(not any(s > self.walk.step[n] for s in later), f"{n.name} is overwritten")
        for n in self.walk.on_storage.get(self.mode.key(t), ()):
            seen = n.op == "placeholder" or any(self.walk.when(u) > step for u in n.users)
            alias = self.walk.values[n] is not t and self.walk.step[n] <= step and seen
            need(not alias, f"{n.name}, a view of {node.name} made before it was complete, is used later")
        nodes = surgery.slice_of(node, {read, self.logits, self.route}, lambda n: self.walk.writers(n, step))
        return Statistic(t, node, step, result, self._divisor(role.over, node, result), nodes)

    def _scores(self, tree: Tree) -> tuple[int, fx.Node] | None:
        """Which result sums this over tokens, and the node whose logits it is made of."""
        tree, after = _uncast(tree)
        result, name = PROBABILITIES, "softmax"
        if tree[0] == "square":
            result, name = SQUARES, "logsumexp"
            tree, more = _uncast(tree[1])
            after += more
        if tree[0] != name:
            return None
        tree, before = _uncast(tree[1])
        if tree[0] != "logits" or not self._same(tree[1]):
            return None
        logits: Ref = tree[1]
        need(all(holds(d, logits.tensor.dtype) for d in before), f"{logits} is rounded before the {name}")
        need(all(holds(torch.float32, d) for d in (logits.tensor.dtype, *before, *after)), f"{logits} is read in a wider dtype")
        return result, logits.node

    def _choices(self, routing: Routing) -> tuple[int, fx.Node] | None:
        """The result that counts this choice, if it is certainly the router's, and the node it was read from."""
        if routing is self.own:
            return CHOICES, self.route
        again = softmax_top_k(routing.choice) if routing.choice is not None and routing.select == "topk" else None
        if again is None or not self._same(again[1]):
            return None
        s, (dtype, logits) = self.spec, again
        plain = s.score == "softmax" and not s.bias and s.groups is None and not s.first
        need(plain and s.score_dtype == dtype and s.top_k == routing.top_k, f"{logits} is chosen from by another rule too")
        return CHOICES, logits.node

    def _same(self, logits: Ref) -> bool:
        """Are these the route's logits?"""
        return self._followed(logits.node)[-1] is self.rows[-1]

    def _divisor(self, over: int, node: fx.Node, result: int) -> tuple[str, ...]:
        known: dict[tuple[str, ...], int] = {(): 1, ("token",): self.tokens}
        if result == CHOICES:
            known |= {("token", "slot"): self.tokens * self.spec.top_k, ("slot",): self.spec.top_k}
        found = next((per for per, size in known.items() if size == over), None)
        if found is None:
            raise Unsupported(f"{node.name} is a mean over some of the tokens only")
        return found


def _uncast(tree: Tree) -> tuple[Tree, list[torch.dtype]]:
    """The tree below its casts, and what they are to."""
    dtypes = []
    while tree[0] == "cast":
        dtypes.append(tree[1])
        tree = tree[2]
    return tree, dtypes

"""Run a Dynamo graph on fake tensors and give every value its role.

static    sizes are plain ints: no guard can appear.  A symbolic size becomes a large number of its own (`GenericSizes`),
          so what is equal here is equal as an expression of the symbols, not by chance
honest    a role is bound to the version of its storage: a write through any alias ends the roles of all of them
total     a node that cannot be run keeps Dynamo's example value without a role; nothing is raised
"""

from __future__ import annotations

import logging
import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import guard_scalar
from torch.utils._pytree import tree_leaves, tree_map

from moecompile.ir.surgery import value_of
from moecompile.recognize import dims as D
from moecompile.recognize.mode import GenericSizes, Loss, RoleMode, load_rules
from moecompile.recognize.roles import Ids, Leaf, PairRows, Pairs, Role, Sum, SumRows, finished

Autocast = dict[str, tuple[bool, torch.dtype]]  # kind of device -> enabled, dtype


def autocast_now() -> Autocast:
    return {device: (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in ("cpu", "cuda")}


@dataclass
class End:
    """A node after which a layer's output, or a part of the sum it is, lies in `tensor`."""

    node: fx.Node
    step: int
    tensor: Tensor
    role: Sum


@dataclass
class Walk:
    """What a walk found."""

    graph: fx.GraphModule
    mode: RoleMode
    nodes: list[fx.Node]
    values: dict[fx.Node, Any] = field(default_factory=dict)  # node -> its static double
    holders: dict[int, list[fx.Node]] = field(default_factory=dict)  # id(tensor) -> the nodes that returned it
    step: dict[fx.Node, int] = field(default_factory=dict)
    failed: list[tuple[fx.Node, str]] = field(default_factory=list)
    losses: list[Loss] = field(default_factory=list)
    children: list[tuple[fx.Node, str, Walk]] = field(default_factory=list)  # bodies of higher-order ops
    ends: list[End] = field(default_factory=list)
    replaced: dict[fx.Node, fx.Node] = field(default_factory=dict)  # what a rewrite put in the place of a node
    heavy: set[int] = field(default_factory=set)  # ids of tensors that hold rows of the experts
    on_storage: dict[object, list[fx.Node]] = field(default_factory=dict)  # storage -> the nodes that hold a tensor on it
    autocast: dict[fx.Node, Autocast] = field(default_factory=dict)  # what was in force when a node ran
    followed: set[fx.Node] = field(default_factory=set)  # the nodes that ran under the graph's own grad mode

    def when(self, n: fx.Node) -> int:
        """The walk's position at n; for a node that was inserted since, after everything."""
        return self.step.get(n, len(self.nodes))

    def pin(self) -> None:
        """Guard the numbers that roles rest on: another value is another graph."""
        for v in self.mode.pinned:
            guard_scalar(v)
        self.mode.pinned.clear()

    def writers(self, n: fx.Node, until: int) -> list[fx.Node]:
        """The nodes up to step `until` that write the storage n holds."""
        v = self.values.get(n)
        if not isinstance(v, Tensor):
            return []
        return [self.nodes[s] for s in self.mode.written.get(self.mode.key(v), ()) if s <= until]

    def sharers(self, n: fx.Node) -> list[fx.Node]:
        """The other nodes that hold a storage n writes in place."""
        at = self.step.get(n)
        keys = self.mode.written_at.get(at, ()) if at is not None else ()
        return [m for k in keys for m in self.on_storage.get(k, ()) if m is not n]


# ---------------------------------------------------------------- the walk over nodes


def tensors(v: object) -> list[Tensor]:
    return [t for t in tree_leaves(v) if isinstance(t, Tensor)]


def walk(gm: fx.GraphModule, sizes: GenericSizes | None = None) -> Walk:
    """The roles of gm's values. Changes and guards nothing."""
    load_rules()
    mode = RoleMode(sizes or GenericSizes())
    result = Walk(gm, mode, list(gm.graph.nodes))
    runner = _Runner(result)
    entered: list[Any] = []
    noise = logging.getLogger("torch._subclasses.fake_tensor")  # logs failures that are caught here
    level = noise.level
    noise.setLevel(logging.CRITICAL)
    with torch.no_grad(), FakeTensorMode(allow_fallback_kernels=False), mode:
        try:
            for i, n in enumerate(result.nodes):
                mode.steps = result.step[n] = i
                runner.run(n, entered)
        finally:
            noise.setLevel(level)
            for context in reversed(entered):
                torch.amp.autocast_mode._exit_autocast(context)
    result.losses = mode.losses
    return result


_CONTEXTS = {"_enter_autocast", "_exit_autocast", "_set_grad_enabled", "_enter_inference_mode", "_exit_inference_mode"}


class _Runner:
    def __init__(self, result: Walk) -> None:
        self.result, self.mode, self.values = result, result.mode, result.values
        self.stand_in: dict[int, Tensor] = {}  # id(example value) -> its static double
        self.grad = torch.is_grad_enabled()
        self.autocast = autocast_now()
        self.outer: list[bool] = []  # whether gradients were followed outside of each inference mode

    def static(self, v: Any) -> Any:
        """A contiguous double of a tensor with plain sizes; scalars at the generic point."""
        if isinstance(v, Tensor):
            if id(v) not in self.stand_in:
                shape = [self.mode.sizes(s) for s in v.shape]
                t = torch.empty(shape, dtype=v.dtype, device=v.device)
                self.mode.put(t, None)  # not blank memory
                self.mode.group[t.untyped_storage()._cdata] = ("example", v.untyped_storage()._cdata)
                self.mode.base[id(t)] = t
                self.stand_in[id(v)] = t
                self.mode.alive.append(v)
            return self.stand_in[id(v)]
        return self.mode.sizes(v)

    def hold_example(self, n: fx.Node) -> None:
        """Let n be what Dynamo says it is, without a role."""
        try:
            self.hold(n, tree_map(self.static, value_of(n)))
        except RuntimeError as e:  # at the generic point the value is too large to exist
            self.result.failed.append((n, str(e).splitlines()[0][:100]))
            self.values[n] = None

    def hold(self, n: fx.Node, value: Any) -> None:
        self.values[n] = value
        if isinstance(value, Tensor):
            self.mode.alive.append(value)
            self.result.holders.setdefault(id(value), []).append(n)
            self.result.on_storage.setdefault(self.mode.key(value), []).append(n)
            self.mode.node_of.setdefault(id(value), n)
            role = self.mode.get(value)
            self.note(n, value, role)
            if isinstance(role, Leaf) and "b" not in D.names(role.dims) and role.cast is None:
                self.mode.put(value, None)  # a node holds it: a live-in in its own right

    def note(self, n: fx.Node, value: Tensor, role: Role | None) -> None:
        done = finished(role) if isinstance(role, Pairs) else role
        if isinstance(done, Sum) and (done.whole or value.dim() == 2):
            self.result.ends.append(End(n, self.mode.steps, value, done))
        if isinstance(role, (Pairs, PairRows, SumRows, Sum)):
            self.result.heavy.add(id(value))
        if isinstance(role, Ids) and role.routing.ids is None:
            role.routing.ids = self.mode.ref(value)

    def run(self, n: fx.Node, entered: list[Any]) -> None:
        mode = self.mode
        mode.current = n
        if n.op in ("placeholder", "get_attr"):
            if n.op == "get_attr" and not isinstance(value_of(n), Tensor):
                found = _attribute(self.result.graph, str(n.target))
                self.values[n] = found
                if isinstance(found, Tensor):
                    self.hold(n, self.static(found))
                return
            self.hold_example(n)
            return
        if n.op not in ("call_function", "call_method"):
            return
        self.result.autocast[n] = self.autocast
        if mode.follow:
            self.result.followed.add(n)
        value = value_of(n)
        if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            self.values[n] = mode.sizes(value)
            return
        name = getattr(n.target, "__name__", str(n.target))
        if name in _CONTEXTS:
            self.context(n, name, entered)
            self.autocast = autocast_now()
            return
        if isinstance(n.target, torch._ops.HigherOrderOperator):
            self.opaque(n)
            return
        scalars = [value_of(m) for m in n.all_input_nodes]
        mode.floats = [v for v in scalars if isinstance(v, torch.SymFloat) and v.node.has_hint()]
        mode.symbolic = any(isinstance(v, (torch.SymInt, torch.SymFloat)) for v in scalars if not any(v is f for f in mode.floats))
        try:
            args, kwargs = fx.map_arg(n.args, self.value), fx.map_arg(n.kwargs, self.value)
            target = n.target if n.op == "call_function" else getattr(args[0], str(n.target))
            out = target(*args, **kwargs) if n.op == "call_function" else target(*args[1:], **kwargs)  # type: ignore[operator]
        except Exception as e:
            self.result.failed.append((n, f"{type(e).__name__}: {str(e).splitlines()[0][:100] if str(e) else ''}"))
            self.distrust(n)
            self.hold_example(n)
            return
        if n.target is operator.setitem:
            self.values[n] = None
            self.note(n, self.values[n.args[0]], mode.get(args[0]))  # type: ignore[index]
        else:
            self.hold(n, out)
            for t in tensors(out) if isinstance(out, (tuple, list)) else ():
                mode.alive.append(t)
                if isinstance(mode.get(t), Pairs):
                    self.result.heavy.add(id(t))

    def value(self, n: fx.Node) -> Any:
        return self.values.get(n)

    def context(self, n: fx.Node, name: str, entered: list[Any]) -> None:
        if name == "_enter_autocast":
            entered.append(torch.amp.autocast_mode._enter_autocast(*n.args))
            self.values[n] = entered[-1]
        elif name == "_exit_autocast":
            context = self.values.get(n.args[0]) if n.args else None  # type: ignore[arg-type]
            if context in entered:
                entered.remove(context)
                torch.amp.autocast_mode._exit_autocast(context)
        elif name == "_enter_inference_mode":
            self.outer.append(self.mode.follow)
            self.mode.follow = self.mode.follow and not (n.args[0] and self.grad)
        elif name == "_exit_inference_mode":
            self.mode.follow = self.outer.pop() if self.outer else True
        else:
            self.mode.follow = bool(n.args[0]) == self.grad

    def distrust(self, n: fx.Node) -> None:
        """What an opaque node may do: write any of its arguments."""
        for m in n.all_input_nodes:
            for t in tensors(self.values.get(m)):
                self.mode.wrote(t)

    def opaque(self, n: fx.Node) -> None:
        """A higher-order op: its effects are unknown; its body, a child GraphModule, may hold layers of its own."""
        pure: list[bool] = []
        for body in (a for a in n.all_input_nodes if a.op == "get_attr"):
            child = _attribute(self.result.graph, str(body.target))
            if isinstance(child, fx.GraphModule):
                found = _walk_child(child, self.mode.sizes)
                holes = [found.values.get(p) for p in found.nodes if p.op == "placeholder"]
                pure.append(not any(found.mode.key(t) in found.mode.written for t in tensors(holes)))
                self.result.children.append((n, str(body.target), found))
        if not pure or not all(pure):
            self.distrust(n)
        self.hold_example(n)


def _walk_child(child: fx.GraphModule, sizes: GenericSizes) -> Walk:
    from torch.utils._python_dispatch import _disable_current_modes

    with _disable_current_modes():
        return walk(child, sizes)


def _attribute(gm: fx.GraphModule, path: str) -> Any:
    found: Any = gm
    for part in path.split("."):
        found = getattr(found, part)
    return found

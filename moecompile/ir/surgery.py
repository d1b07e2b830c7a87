"""Cutting and mending Dynamo graphs: copy, slice, cut out, erase.

A Dynamo graph has in-place nodes without users: `eliminate_dead_code` would delete them, so nothing here calls it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

# Nodes that only ask or assert the sizes of what they read: they go with it.
_SIZE_QUERIES = {
    "size", "sym_size", "numel", "item",
    "_assert_tensor_metadata", "_assert_scalar", "_check", "_check_is_size", "sym_constrain_range_for_size",
    "ge", "le", "gt", "lt", "eq", "ne", "add", "sub", "mul", "floordiv", "mod", "sym_sum", "sym_max", "sym_min",
}  # fmt: skip


def copy_of(gm: fx.GraphModule) -> fx.GraphModule:
    """The same graph in new nodes with their meta; parameters are shared, child graphs copied too."""
    graph: fx.Graph = fx.Graph()
    nodes: dict[fx.Node, fx.Node] = {}
    result, old_output = graph.graph_copy(gm.graph, nodes, return_output_node=True)  # type: ignore[misc]
    output = graph.output(result)
    if isinstance(old_output, fx.Node):
        output.meta.update(old_output.meta)
    for old, new in nodes.items():
        new.meta.update(old.meta)
        _copy_notes(old, new)
    copied = fx.GraphModule(gm, graph)
    copied.meta.update(gm.meta)
    _copy_notes(gm, copied)
    for name, child in list(gm.named_children()):
        if isinstance(child, fx.GraphModule):
            setattr(copied, name, copy_of(child))
    return copied


def _copy_notes(old: fx.Node | fx.GraphModule, new: fx.Node | fx.GraphModule) -> None:
    """What Dynamo wrote beside the meta: where inputs come from, by which AOTAutograd guards inputs that share memory and tells
    CUDA graphs which inputs never move."""
    for name, value in vars(old).items():
        if name not in vars(new):
            setattr(new, name, value)


def key_of(n: fx.Node) -> str:
    """Where the node's value is told: by Dynamo as "example_value", by torch.export as "val"."""
    return "val" if "val" in n.meta and "example_value" not in n.meta else "example_value"


def value_of(n: fx.Node) -> Any:
    """What Dynamo (or torch.export) says the node's value is: fake tensors and symbolic scalars, or None."""
    return n.meta.get(key_of(n))


def name_of(n: fx.Node) -> str:
    """The name of what a node calls, without the overload."""
    return n.target if isinstance(n.target, str) else str(getattr(n.target, "__name__", n.target)).partition(".")[0]


def calls_of(gm: fx.GraphModule, target: Any) -> list[fx.Node]:
    """The nodes that call target, in this graph and its children."""
    found = [n for n in gm.graph.nodes if n.target is target]
    for child in gm.children():
        if isinstance(child, fx.GraphModule):
            found += calls_of(child, target)
    return found


def slice_of(end: fx.Node, inputs: set[fx.Node], writers: Callable[[fx.Node], Iterable[fx.Node]]) -> set[fx.Node]:
    """The nodes that compute `end` from `inputs`: through arguments, and through the in-place nodes that wrote them."""
    found: set[fx.Node] = set()
    todo = [end]
    while todo:
        n = todo.pop()
        if n in found or n in inputs or n.op in ("placeholder", "get_attr"):
            continue
        found.add(n)
        todo.extend(n.all_input_nodes)
        todo.extend(writers(n))
    return found


def with_size_queries(nodes: set[fx.Node], order: Iterable[fx.Node]) -> set[fx.Node]:
    """`nodes` and those that only take them apart, ask for, compute with or assert their sizes."""
    found = set(nodes)
    for n in order:
        value = value_of(n)
        parts = value if isinstance(value, tuple) else (value,)
        scalar = all(v is None or isinstance(v, (torch.SymInt, torch.SymBool, int, bool)) for v in parts)
        asks = n.target is operator.getitem or (scalar and name_of(n) in _SIZE_QUERIES)
        if n not in found and n.op in ("call_function", "call_method") and asks:
            reads = n.all_input_nodes
            if reads and all(m in found for m in reads):
                found.add(n)
    return found


def erase(
    graph: fx.Graph, candidates: set[fx.Node], written: Callable[[fx.Node], Iterable[fx.Node]], step: Mapping[fx.Node, int]
) -> int:
    """Erase what is dead among `candidates`. The number of erased nodes.

    `written(n)`: the nodes that hold a storage n writes in place, n apart. Such an n is dead only if none of them is read
    after it by a node that stays.
    """
    dead = set(candidates)
    changed = True
    while changed:
        changed = False
        for n in list(dead):
            alive = any(u not in dead for u in n.users)
            for m in written(n):
                alive = alive or m.op == "placeholder"
                alive = alive or any(u not in dead and step.get(u, 1 << 60) > step[n] for u in m.users)
            if alive:
                dead.discard(n)
                changed = True
    for n in reversed(list(graph.nodes)):
        if n in dead:
            graph.erase_node(n)
    return len(dead)


Restore = Callable[[fx.Graph, Mapping[fx.Node, fx.Node]], fx.Node]


def cut(
    gm: fx.GraphModule,
    nodes: set[fx.Node],
    inputs: list[fx.Node],
    restore: Mapping[fx.Node, Restore],
    same: Mapping[fx.Node, fx.Node],
    output: fx.Node,
    returned: fx.Node,
) -> fx.GraphModule:
    """The given nodes, in graph order, as a module of `inputs` that returns `returned` [rows, features] as it is after `output`.

    restore   puts an input that will be given in another form into the one the nodes read
    same      other nodes that hold the value of an input
    KeyError where a node reads something that is neither among `nodes` nor `inputs`.
    """
    graph = fx.Graph()
    here: dict[fx.Node, fx.Node] = {n: graph.placeholder(n.name) for n in inputs}
    for n, restored in {n: restore[n](graph, here) for n in inputs if n in restore}.items():
        here[n] = restored
    here.update({m: here[n] for m, n in same.items()})
    for n in gm.graph.nodes:
        if n in nodes and n not in here:
            here[n] = graph.node_copy(n, here.__getitem__)
            here[n].meta.clear()  # example values would keep all that Dynamo knew of the graph
        if n is output:
            break
    result = here[returned]
    graph.output(result if value_of(returned).dim() == 2 else graph.call_method("flatten", (result, 0, -2)))
    return fx.GraphModule(gm, graph)


def symbolic(d: int | torch.SymInt) -> bool:
    """Whether a size is not one plain number (a SymInt may be)."""
    return not isinstance(d, int) and d.node.maybe_as_int() is None


def dimensions(shape: Iterable[int | torch.SymInt], sizes: Iterable[fx.Node]) -> list[int | fx.Node]:
    """A shape as reshape() takes it: a symbolic dimension is the one of `sizes` that has its value, and one, at most, is -1.

    KeyError where more of them are in no node.
    """
    known = {value_of(s).node.expr: s for s in sizes}
    dims = [known.get(d.node.expr, -1) if symbolic(d) else int(d) for d in shape]  # type: ignore[union-attr]
    if dims.count(-1) > 1:
        raise KeyError("sizes")
    return dims


def reshaped(n: fx.Node, sizes: Iterable[fx.Node]) -> Restore:
    """How a tensor given as [rows, last dimension], or in another dtype, becomes what n was."""
    value = value_of(n)
    dims = dimensions(value.shape, sizes)

    def restore(graph: fx.Graph, here: Mapping[fx.Node, fx.Node]) -> fx.Node:
        cast = graph.call_method("to", (here[n], value.dtype))
        return graph.call_method("reshape", (cast, [here[d] if isinstance(d, fx.Node) else d for d in dims]))

    return restore


def call(graph: fx.Graph, target: Any, args: tuple[Any, ...], like: fx.Node) -> fx.Node:
    """A call whose example value is computed from those of its arguments, with the stack trace of `like`.

    `target` is a function, or a method name. New nodes must not put guards on sizes: pass none that compares sizes.
    """
    given = fx.map_arg(args, value_of)
    mode = next(t.fake_mode for t in torch.utils._pytree.tree_leaves(given) if isinstance(t, Tensor) and hasattr(t, "fake_mode"))
    with mode, torch.no_grad():
        out = getattr(given[0], target)(*given[1:]) if isinstance(target, str) else target(*given)
    node = graph.call_method(target, args) if isinstance(target, str) else graph.call_function(target, args)
    node.meta[key_of(like)] = out
    if "stack_trace" in like.meta:
        node.meta["stack_trace"] = like.meta["stack_trace"]
    return node


def call_scalar(graph: fx.Graph, target: Callable[..., Any], a: fx.Node, b: fx.Node | int, like: fx.Node) -> fx.Node:
    """A call on sizes, which may be symbolic."""
    node = graph.call_function(target, (a, b))
    node.meta[key_of(like)] = target(value_of(a), value_of(b) if isinstance(b, fx.Node) else b)
    return node


def call_getitem(graph: fx.Graph, of: fx.Node, position: int, like: fx.Node) -> fx.Node:
    """of[position], for a node that returns several tensors."""
    node = graph.call_function(operator.getitem, (of, position))
    node.meta[key_of(of)] = value_of(of)[position]
    if "stack_trace" in like.meta:
        node.meta["stack_trace"] = like.meta["stack_trace"]
    return node

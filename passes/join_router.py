"""Make one op of a router and its experts, where nothing else reads what is between them.

    Before:  %route = moe.route(%logits, %bias)                  After:  %y = moe.routed_experts(%x, %logits, %bias, ..)
             %y = moe.experts(%x, %route[0], %route[1], ..)

Needs: fuse-router.  Changes no number.  Inference only: with gradients, weights and ids are values of their own.
Comes after fuse-statistics, which needs the moe.route by itself.
"""

from __future__ import annotations

import operator
from types import FunctionType

import torch
from torch import fx

from moecompile.ir import surgery
from moecompile.passes import Context, Phase, graph_pass

# What may stand between the two.  The op reads the logits where the experts are, so nothing may write them before.
_PURE = frozenset(
    {
        *("add", "linear", "matmul", "mul", "sigmoid"),
        *("float", "to", "type_as"),
        *("cat", "chunk", "contiguous", "expand", "flatten", "getitem", "permute", "reshape", "size", "split", "squeeze", "t"),
        *("transpose", "unflatten", "unsqueeze", "view", "view_as"),
    }
)


@graph_pass("join-router", Phase.REWRITE, after=("fuse-router", "fuse-statistics"), exact=True)
def join_router(gm: fx.GraphModule, context: Context) -> fx.GraphModule:
    """moe.experts whose weights and ids come from moe.route, and go nowhere else, become moe.routed_experts."""
    if not context.train:
        _join(gm)
    return gm


def _join(gm: fx.GraphModule) -> None:
    for child in gm.children():
        if isinstance(child, fx.GraphModule):
            _join(child)
    order = {n: i for i, n in enumerate(gm.graph.nodes)}
    nodes = list(order)
    for n in nodes:
        if n.target is not torch.ops.moe.experts.default:
            continue
        chains = [_chain(n.args[1], 0), _chain(n.args[2], 1)]
        route = chains[0][-1] if chains[0] else None
        if route is None or not chains[1] or chains[1][-1] is not route or len(route.users) != 2:
            continue
        if all(_pure(m) for m in nodes[order[route] + 1 : order[n]]):
            _replace(gm.graph, route, n)
            for m in (*chains[0][:-1], *chains[1]):
                gm.graph.erase_node(m)
    gm.recompile()


def _chain(result: object, position: int) -> list[fx.Node]:
    """From the argument of moe.experts back to the moe.route that it is a result of, each read by the next alone; or []."""
    found: list[fx.Node] = []
    n = result
    while isinstance(n, fx.Node) and len(n.users) == 1:
        found.append(n)
        source = n.args[0] if n.args else None
        if n.target is operator.getitem and n.args[1] == position and isinstance(source, fx.Node):
            return [*found, source] if source.target is torch.ops.moe.route.default else []
        if surgery.name_of(n) != "flatten":  # what fuse-router lays before experts of 2-D results
            return []
        n = source
    return []


def _pure(n: fx.Node) -> bool:
    """Whether the node is known to write nothing."""
    if n.op == "get_attr":
        return True
    own = not isinstance(n.target, FunctionType) or n.target.__module__.startswith("torch.")  # not the user's, of that name
    return own and n.op in ("call_function", "call_method") and surgery.name_of(n) in _PURE and "out" not in n.kwargs


def _replace(graph: fx.Graph, route: fx.Node, n: fx.Node) -> None:
    logits, bias, router = route.args
    x, _, _, params, sizes, spec, region = n.args
    with graph.inserting_before(n):
        args = (x, logits, bias, params, sizes, router, spec, region)
        joined = graph.call_function(torch.ops.moe.routed_experts.default, args)
    joined.meta = dict(n.meta)
    n.replace_all_uses_with(joined)
    graph.erase_node(n)

"""From the role of chosen weights to the router that made them: its spec and its live-ins, or the reason why not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from moecompile.errors import Unsupported, need
from moecompile.ir.spec import Groups, RouterSpec
from moecompile.recognize.roles import Chosen, Ref, Tree
from moecompile.recognize.walk import Walk


@dataclass
class Router:
    """The router half: what to compute, from what, and which nodes hold the results."""

    spec: RouterSpec
    logits: Ref
    bias: Ref | None


def router_of(walk: Walk, weights: Chosen) -> Router:
    """The router whose chosen weights these are. Unsupported where its form is not in the grammar of RouterSpec."""
    routing, k = weights.routing, weights.routing.top_k
    if routing.choice is None:
        raise Unsupported("the weights and ids come from code that is not a known router")
    current = walk.mode.get(weights.base)
    need(isinstance(current, Chosen) and current.tree == weights.tree, "the routing weights are overwritten")
    choice, bias, groups = routing.choice, None, None
    if choice[0] == "group":
        _, choice, count, kept, how, fill = choice
        groups = Groups(count, kept, how, fill)
    if choice[0] == "bias":
        _, choice, bias = choice
    score, score_dtype, logits = _score(choice)
    source, post = _post(weights.tree, choice, bias is not None or groups is not None)
    spec = RouterSpec(
        routing.num_classes,
        k,
        score,
        score_dtype,
        bias is not None,
        groups,
        source,
        tuple(post),
        routing.sorted,
        routing.select == "max",
    )
    return Router(spec, logits, bias)


def _score(tree: Tree) -> tuple[str, torch.dtype, Ref]:
    """score(cast(logits)) -> its name, the dtype it is computed in, the logits."""
    name = "identity"
    if tree[0] in ("softmax", "sigmoid"):
        name, tree = tree[0], tree[1]
    elif tree[0] == "sqrt" and tree[1][0] == "softplus":
        name, tree = "sqrtsoftplus", tree[1][1]
    dtype = None
    if tree[0] == "cast":
        dtype, tree = tree[1], tree[2]
    need(tree[0] == "logits", f"a router whose scores are {tree[0]} of something else is not known")
    logits: Ref = tree[1]
    return name, dtype or logits.tensor.dtype, logits


def softmax_top_k(choice: Tree) -> tuple[torch.dtype, Ref] | None:
    """Of what the top-k was taken, where that is softmax(cast(logits)) and nothing else: the softmax's dtype, the logits."""
    try:
        name, dtype, logits = _score(choice)
    except Unsupported:
        return None
    return (dtype, logits) if name == "softmax" else None


def _post(tree: Tree, choice: Tree, changed: bool) -> tuple[str, list[tuple[Any, ...]]]:
    steps: list[tuple[Any, ...]] = []
    while tree[0] in ("cast", "softmax", "sigmoid", "scale", "normalise"):
        if tree[0] == "cast":
            steps.append(("cast", tree[1]))
            tree = tree[2]
        elif tree[0] == "scale":
            steps.append(("scale", tree[2]))
            tree = tree[1]
        elif tree[0] == "normalise":
            steps.append(("normalise", tree[2], tree[3]))
            tree = tree[1]
        else:
            steps.append((tree[0],))
            tree = tree[1]
    steps.reverse()
    if tree[0] == "choice":
        return ("choice" if changed else "score"), steps
    need(tree[0] == "gather", f"routing weights that are {tree[0]} are not known")
    if tree[1] == choice:
        return "score", steps
    inner = tree[1]
    if inner[0] == "logits" and inner == _logits_of(choice):
        return "logits", steps
    raise Unsupported("the weights are gathered from something else than the scores")


def _logits_of(tree: Tree) -> Tree:
    while tree[0] != "logits":
        tree = tree[2] if tree[0] == "cast" else tree[1]
    return tree

"""From the role of a layer's output to what the layer is: its spec and its live-ins, or the reason why not."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from moecompile.errors import Unsupported
from moecompile.ir import expr as X
from moecompile.ir.spec import ExpertsSpec, Groups, MoESpec, OutOfRange, RouterSpec, Weight, WeightOn
from moecompile.recognize import dims as D
from moecompile.recognize.roles import (
    DENSE_SPACE,
    TOKEN_SPACE,
    Chosen,
    PairExpr,
    Ref,
    Stack,
    Tree,
    Weights,
)
from moecompile.recognize.walk import End, Walk


@dataclass
class Router:
    """The router half: what to compute, from what, and which nodes hold the results."""

    spec: RouterSpec
    logits: Ref
    bias: Ref | None


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
        ends = _last_of_each_sum(ends)
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
            missed.append(NearMiss(loss.node, f"{loss.op} is not followed on a value that is {describe(loss.role)}"))
    return found, missed


def describe(role: Any) -> str:
    """A role in words, for people."""
    words = {
        "Pairs": "rows of routed tokens",
        "Gathered": "expert weights gathered by chosen ids",
        "SortedIds": "expert ids in sorted order",
        "SumRows": "rows of the running sum over experts",
    }
    return words.get(type(role).__name__, type(role).__name__)


def _last_of_each_sum(ends: list[End]) -> list[End]:
    """Of the steps of one running sum the last; of a sum and its cast the cast, unless the sum itself is read too."""
    kept: list[End] = []
    for end in ends:
        for i, last in enumerate(kept):
            if end.role.terms[: len(last.role.terms)] == last.role.terms:
                longer = len(end.role.terms) > len(last.role.terms) or end.tensor is last.tensor
                if longer or _only_user(last.node, end.node):
                    kept[i] = end
                break
        else:
            kept.append(end)
    return kept


def _only_user(node: fx.Node, user: fx.Node) -> bool:
    return list(node.users) == [user]


# ---------------------------------------------------------------- one layer


def _need(condition: Any, reason: str) -> None:
    if not condition:
        raise Unsupported(reason)


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
        _need(seen == list(range(experts)), f"the loop visits the experts {_short(seen)}, not 0..{max(seen)} once each")
        classes = routing.num_classes
        _need(classes in (0, experts), f"the router chooses among {classes} experts, the loop visits {experts}")
        expr = _merge([terms[i].expr for i in order])
    parsed = _Experts(experts)
    parsed.read(expr)
    k = max(t.top_k for t in terms) or routing.top_k
    _need(k and routing.top_k in (0, k), "how many experts a token has is not known")
    weights = parsed.weights
    if space == DENSE_SPACE:
        _need(weights is not None, "every expert runs on every token and no routing weight selects among them")
        if parsed.weight_on is WeightOn.INPUT:
            _need(_is_zero_at_zero(parsed), "a token that an expert was not chosen for still gets something from it")
    num_classes = routing.num_classes
    if space == DENSE_SPACE:
        _need(num_classes == parsed.num_experts, "the router and the weights differ in the number of experts")
    ids = routing.ids
    _need(ids is not None, "no node holds the chosen experts' ids")
    assert ids is not None and parsed.row is not None
    x = parsed.row
    tokens = ids.tensor.numel() // k
    _need(ids.tensor.numel() == tokens * k, "how many experts a token has is not known")
    _need(D.sizes(role.dims)[0] == tokens, "the output has other rows than the input")
    out_of_range = OutOfRange.SKIP
    if space == TOKEN_SPACE and not parsed.sentinel and parsed.by_index:
        out_of_range = OutOfRange.SKIP if routing.choice is not None else OutOfRange.INDEX
    spec = parsed.spec(k, out_of_range, end.tensor.dtype)
    _need(x.tensor.numel() == tokens * spec.hidden, "ids and rows differ in their tokens")
    _need(D.sizes(role.dims)[1] == spec.out_features, "the output has other features than the experts give")
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


def _form(space: Any, parsed: _Experts) -> str:
    if space == TOKEN_SPACE:
        return "gathered weights, batched matmul" if parsed.by_index else "sorted rows, grouped matmul"
    if space == DENSE_SPACE:
        return "every expert on every token"
    return "loop over experts" if space.kind == "subset" else "sorted rows, grouped matmul"


def _is_zero_at_zero(parsed: _Experts) -> bool:
    if parsed.down_bias is not None or any(b is not None for _, b, *_ in parsed.projections):
        return False
    assert parsed.activation is not None
    return float(X.evaluate(parsed.activation, [torch.zeros((), dtype=torch.float64)] * len(parsed.projections))) == 0.0


# ---------------------------------------------------------------- per-expert expressions into one


@dataclass(frozen=True)
class Stacks:
    """The same place in the expression of each expert."""

    each: tuple[Stack, ...]


def _merge(exprs: list[PairExpr]) -> PairExpr:
    """E expressions of one structure as one, whose matrices are stacks over the experts."""
    first = exprs[0]
    if len({(type(e), e[0] if isinstance(e, tuple) else None, len(e) if isinstance(e, tuple) else 0) for e in exprs}) != 1:
        raise Unsupported("the experts of the loop are not alike")
    if first[0] in ("mm", "bias"):
        rest = [_merge([e[2] for e in exprs])] if first[0] == "mm" else []
        return (first[0], _stacked([e[1] for e in exprs]), *rest, 0)
    if first[0] == "weight":
        a = first[1]
        for e in exprs:
            same = e[1].ref is a.ref and e[1].tree == a.tree and e[1].routing is a.routing
            _need(same, "the experts of the loop are weighted by different values")
        return first
    out: list[Any] = [first[0]]
    for parts in zip(*(e[1:] for e in exprs), strict=True):
        if isinstance(parts[0], tuple):
            out.append(_merge(list(parts)))
        else:
            _need(all(p is parts[0] or p == parts[0] for p in parts), "the experts of the loop are not alike")
            out.append(parts[0])
    return tuple(out)


def _stacked(each: list[Stack]) -> Stack | Stacks:
    a = each[0]
    alike = all(s.strides == a.strides and s.sizes == a.sizes and s.shape == a.shape and s.cast == a.cast for s in each)
    _need(alike, "the experts' weights differ in shape or layout")
    _need(all(s.e is None for s in each), "a loop over experts multiplies by all experts' weights at once")
    if all(s.ref is a.ref for s in each):
        step = each[1].offset - a.offset if len(each) > 1 else math.prod(a.shape)
        regular = all(s.offset == a.offset + i * step for i, s in enumerate(each)) and (step > 0 or len(each) == 1)
        _need(regular, "expert e of the loop does not use the e-th weights")
        return dataclasses.replace(a, e=step, experts=len(each))
    _need(len({id(s.ref) for s in each}) == len(each), "two experts share their weights")
    _need(all(s.offset == a.offset for s in each), "the experts' weights differ in layout")
    return Stacks(tuple(each))


# ---------------------------------------------------------------- the expression of one pair into a spec


class _Experts:
    """Reads weight * (down(activation(projections(row))) + bias) in any arrangement that means the same."""

    def __init__(self, experts: int) -> None:
        self.num_experts = experts
        self.weights: Weights | None = None
        self.weight_on = WeightOn.NOWHERE
        self.row: Ref | None = None
        self.row_expr: PairExpr | None = None
        self.projections: list[tuple[Any, Any, int, int, int]] = []  # stack, bias, start, step, length
        self.activation: Any = None
        self.down: Any = None
        self.down_bias: Any = None
        self.sentinel = 0
        self.outer_sentinel = 0  # the same, where it masks a pair's weight or output
        self.clamped = 0
        self.by_index = False
        self.dtypes: set[torch.dtype] = set()
        self._uses: dict[int, list[tuple[Stack, set[int]]]] = {}  # parameter -> the rows of which stack are read from it
        self._refs: list[tuple[Ref, torch.dtype | None]] = []

    def read(self, e: PairExpr) -> None:
        e = self._strip_outer(e)
        scale = 1.0
        while e[0] == "mul":
            a, b = self._strip_outer(e[1]), self._strip_outer(e[2])
            rest = self._unweighted(a, b, WeightOn.OUTPUT)
            if rest is not None:
                e = rest
            elif b[0] == "const":
                scale, e = scale * b[1], a
            elif a[0] == "const":
                scale, e = scale * a[1], b
            else:
                raise Unsupported("the experts' outputs are multiplied by something that is not a routing weight")
        e = self._strip(e)
        e, self.down_bias = self._split_bias(e)
        _need(e[0] == "mm", f"the last step of the experts is {_name(e)}, not a matmul")
        self._note_mm(e)
        self.down = e[1]
        inner = self._strip(e[2])
        inner = self._weight_inside(inner)
        self.activation = self._activation(inner)
        _need(self.projections, "only one matmul is done with the experts' weights")
        if scale != 1.0:
            _need(self.down_bias is None, "the experts' outputs are scaled after a bias")
            self.activation = ("mul", self.activation, ("const", scale))
        assert self.row_expr is not None
        self._read_row(self.row_expr)
        if self.clamped:
            _need(self.outer_sentinel == self.clamped, "ids are clamped, and what was out of range is not masked")
        if self.sentinel:
            _need(self.sentinel == self.num_experts, f"ids from {self.sentinel} are masked, there are {self.num_experts} experts")

    # -------- pieces

    def _strip(self, e: PairExpr) -> PairExpr:
        """e without casts and sentinel masks around it."""
        while e[0] in ("cast", "sentinel"):
            if e[0] == "sentinel":
                _need(self.sentinel in (0, e[1]), "two different sentinels")
                self.sentinel = e[1]
            e = e[2]
        return e

    def _strip_outer(self, e: PairExpr) -> PairExpr:
        inner = self._strip(e)
        if e is not inner and self.sentinel:
            self.outer_sentinel = self.sentinel
        return inner

    def _unweighted(self, a: PairExpr, b: PairExpr, on: WeightOn) -> PairExpr | None:
        """Of a product a * b the factor that is not the routing weight, which is noted; None where neither is it."""
        for weight, rest in ((b, a), (a, b)):
            if weight[0] == "weight":
                _need(self.weights is None, "a pair is weighted twice")
                self.weights, self.weight_on = weight[1], on
                return rest
        return None

    def _split_bias(self, e: PairExpr) -> tuple[PairExpr, Any]:
        if e[0] == "add":
            a, b = self._strip(e[1]), self._strip(e[2])
            if b[0] == "bias":
                return a, b[1]
            if a[0] == "bias":
                return b, a[1]
        return e, None

    def _note_mm(self, e: PairExpr) -> None:
        self.by_index = self.by_index or e[3] != 0
        if e[3] > 0:
            _need(self.clamped in (0, e[3]), "ids are clamped twice")
            self.clamped = e[3]
        for s in e[1].each if isinstance(e[1], Stacks) else (e[1],):
            self.dtypes.add(s.cast or s.ref.tensor.dtype)
            if not isinstance(e[1], Stacks):
                _need(s.e is not None, "one matrix serves all experts")
                self.num_experts = self.num_experts or s.experts
                _need(s.experts == self.num_experts, "the experts' weights differ in the number of experts")

    def _weight_inside(self, e: PairExpr) -> PairExpr:
        """A weight on the activation counts as one on the output where the down projection is linear."""
        while e[0] == "mul" and self.down_bias is None and self.weights is None:
            a, b = self._strip(e[1]), self._strip(e[2])
            rest = self._unweighted(a, b, WeightOn.OUTPUT)
            if rest is None:
                return e
            e = rest
        return e

    def _activation(self, e: PairExpr) -> Any:
        e = self._strip(e)
        projection = self._projection(e)
        if projection is not None:
            if projection not in self.projections:
                self.projections.append(projection)
            return ("in", self.projections.index(projection))
        if e[0] == "const":
            return ("const", e[1])
        _need(e[0] in X.OPS, f"{_name(e)} between the experts' matmuls")
        return (e[0], *(self._activation(a) for a in e[1:]))

    def _projection(self, e: PairExpr) -> tuple[Any, Any, int, int, int] | None:
        """Some of the rows of a weight stack times the token's row, with their bias."""
        start, step, length = 0, 1, -1
        while e[0] in ("slice", "cast", "sentinel"):
            if e[0] == "slice":
                start, step, length = e[2] + start * e[3], step * e[3], e[4] if length < 0 else length
                e = e[1]
            else:
                e = self._strip(e)
        inner, bias = self._split_bias(e)
        if inner[0] == "slice" and bias is not None:
            raise Unsupported("a bias is added after the features were split")
        inner = self._strip(inner)
        if inner[0] != "mm":
            return None
        self._note_mm(inner)
        row = inner[2]
        _need(self.row_expr is None or self.row_expr == row, "the projections read different rows")
        self.row_expr = row
        size = (inner[1].each[0] if isinstance(inner[1], Stacks) else inner[1]).sizes[0]
        return inner[1], bias, start, step, size if length < 0 else length

    def _read_row(self, e: PairExpr) -> None:
        e = self._strip(e)
        if e[0] == "mul":
            rest = self._unweighted(self._strip(e[1]), self._strip(e[2]), WeightOn.INPUT)
            if rest is None:
                raise Unsupported("the experts' input is multiplied by something that is not a routing weight")
            e = rest
        _need(e[0] == "row", f"the experts' input is {_name(e)}, not rows of tokens")
        self.row = e[1]

    # -------- the spec

    def params(self) -> list[tuple[Ref, torch.dtype | None]]:
        return self._refs

    def _param(self, s: Stack, rows: set[int]) -> int:
        """The parameter through which these rows of a stack are read. Reads of one that overlap get one each: the gradients
        of a parameter given twice are added up, those of one given once are written once."""
        for i, (ref, _) in enumerate(self._refs):
            same = ref is s.ref and all(used == s and not (taken & rows) for used, taken in self._uses[i])
            if same:
                self._uses[i].append((s, rows))
                return i
        dtype = next(iter(self.dtypes))  # of the matrices; under autocast a bias may have been added in a wider one
        self._refs.append((s.ref, dtype if s.ref.tensor.dtype != dtype else None))
        self._uses[len(self._refs) - 1] = [(s, rows)]
        return len(self._refs) - 1

    def _weight(self, stack: Any, start: int = 0, step: int = 1, length: int = -1) -> Weight:
        each = stack.each if isinstance(stack, Stacks) else (stack,)
        s = each[0]
        n, k = (*s.strides, 0)[:2]
        rows = set(range(start, s.sizes[0] if length < 0 else start + length * step, step))
        params = tuple(self._param(one, rows) for one in each)
        return Weight(params, s.shape, s.offset + start * n, (s.e or 0) if not isinstance(stack, Stacks) else 0, n * step, k)

    def spec(self, k: int, out_of_range: OutOfRange, out_dtype: torch.dtype) -> ExpertsSpec:
        _need(len(self.dtypes) == 1, f"the experts' weights are of several dtypes: {sorted(map(str, self.dtypes))}")
        F = self.projections[0][4]
        _need(all(p[4] == F for p in self.projections), "the projections differ in width")
        up = self.projections[0][0].each[0] if isinstance(self.projections[0][0], Stacks) else self.projections[0][0]
        down = self.down.each[0] if isinstance(self.down, Stacks) else self.down
        _need(down.sizes[1] == F, f"the down projection reads {down.sizes[1]} features, the activation gives {F}")
        projections = tuple(self._weight(p[0], *p[2:]) for p in self.projections)
        biases = tuple(None if p[1] is None else self._weight(p[1], *p[2:]) for p in self.projections)
        return ExpertsSpec(
            self.num_experts,
            k,
            up.sizes[1],
            F,
            down.sizes[0],
            projections,
            biases,
            self.activation,
            self._weight(self.down),
            None if self.down_bias is None else self._weight(self.down_bias),
            self.weight_on,
            out_of_range,
            next(iter(self.dtypes)),
            out_dtype,
        )


def _name(e: PairExpr) -> str:
    return {"row": "a row of tokens", "mm": "a matmul", "weight": "a routing weight"}.get(e[0], str(e[0]))


# ---------------------------------------------------------------- the router half


def router_of(walk: Walk, weights: Chosen) -> Router:
    """The router whose chosen weights these are. Unsupported where its form is not in the grammar of RouterSpec."""
    routing, k = weights.routing, weights.routing.top_k
    if routing.choice is None:
        raise Unsupported("the weights and ids come from code that is not a known router")
    current = walk.mode.get(weights.base)
    _need(isinstance(current, Chosen) and current.tree == weights.tree, "the routing weights are overwritten")
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
    _need(tree[0] == "logits", f"a router whose scores are {tree[0]} of something else is not known")
    logits: Ref = tree[1]
    return name, dtype or logits.tensor.dtype, logits


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
    _need(tree[0] == "gather", f"routing weights that are {tree[0]} are not known")
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

"""What a value of the graph is: one frozen class per kind of role.

`dims` says what the value's dimensions are indexed by (dims.py).  A value over pairs carries an expression: what its
row is for the pair (token t, slot k) that went to expert e.

    ("row", ref)                        the row of x for the pair's token
    ("weight", weights)                 the pair's routing weight, a number
    ("mm", stack, a, how)               a W_e^T for the pair's expert e; `how` as in rules/experts.py
    ("bias", stack, clamped)            a vector of the pair's expert
    ("slice", a, start, step, length)   some of the features of a
    ("cast", dtype, a)
    ("sentinel", bound, a)              a where the pair's id is below `bound`, 0 elsewhere
    ("const", number), (op of ir.expr, a, b, ..)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from moecompile.recognize.dims import Dims

PairExpr = tuple[Any, ...]
Tree = tuple[Any, ...]  # a router's expression: see rules/router.py


def holds(wide: torch.dtype, narrow: torch.dtype) -> bool:
    """Can every number of the one floating-point dtype be written in the other?"""
    if not (wide.is_floating_point and narrow.is_floating_point):
        return False
    a, b = torch.finfo(wide), torch.finfo(narrow)
    return bool(a.eps <= b.eps and a.max >= b.max and a.tiny <= b.tiny)


@dataclass(eq=False)
class Ref:
    """A value that a region reads: the node that holds it, and when it was read."""

    node: fx.Node
    tensor: Tensor
    storage: object
    step: int  # the walk's position at the first read

    def __repr__(self) -> str:
        return self.node.name


@dataclass(frozen=True)
class Stack:
    """E matrices [N,K] (or vectors) as a strided view of one value; for a single expert, one matrix of it (e = None)."""

    ref: Ref
    shape: tuple[int, ...]  # of the value, contiguous
    offset: int
    e: int | None  # stride over experts
    strides: tuple[int, ...]  # over the features: (n, k), or (n,)
    sizes: tuple[int, ...]  # N, K, or N
    experts: int  # E, or 1
    cast: torch.dtype | None

    def transposed(self) -> Stack:
        return Stack(self.ref, self.shape, self.offset, self.e, self.strides[::-1], self.sizes[::-1], self.experts, self.cast)


@dataclass(eq=False)
class Routing:
    """One choice of experts: ids [T,K]. Two values belong together only if they carry the same Routing."""

    ids: Ref | None  # None until the node that holds the ids is known
    choice: Tree | None = None  # what the top-k was taken of, where the router's form is known
    top_k: int = 0  # 0: not known yet (ids given flat)
    num_classes: int = 0  # 0: not known
    sorted: bool = True
    select: str = "topk"
    id: int = 0

    @property
    def distinct(self) -> bool:
        """Are the experts of one token different for certain?"""
        return self.choice is not None or self.top_k == 1


@dataclass(frozen=True)
class Role:
    dims: Dims

    @property
    def kind(self) -> str:
        return type(self).__name__


@dataclass(frozen=True)
class Leaf(Role):
    """A value nothing is known of, seen through views, expansions and a cast."""

    ref: Ref
    cast: torch.dtype | None = None


@dataclass(frozen=True)
class Full(Role):
    """A constant, everywhere: zeros, ones, full; or blank memory (value None)."""

    value: float | None


@dataclass(frozen=True)
class Iota(Role):
    """0, 1, 2, ..."""


# ---------------------------------------------------------------- the router


@dataclass(frozen=True)
class Scores(Role):
    """A number for each token and expert."""

    tree: Tree


@dataclass(frozen=True)
class Chosen(Role):
    """A number for each token and slot, computed from scores. `base`: the last value that is not merely a view."""

    tree: Tree
    routing: Routing
    base: Any = field(default=None, compare=False)


@dataclass(frozen=True)
class ChosenSum(Role):
    """max(eps + the sum over a token's slots, least)."""

    of: Tree
    routing: Routing
    eps: float = 0.0
    least: float = 0.0


@dataclass(frozen=True)
class GroupBest(Role):
    """The two best scores of each group of experts (axis b of size 2)."""

    tree: Tree
    groups: int


@dataclass(frozen=True)
class GroupScore(Role):
    """A number for each token and group."""

    tree: Tree
    groups: int
    how: str  # "max" or "top2"


@dataclass(frozen=True)
class GroupIds(Role):
    """The groups chosen for each token."""

    score: GroupScore
    top_k: int


@dataclass(frozen=True)
class GroupMask(Role):
    """True (or 1) for the experts of chosen groups; the opposite where `inverted`."""

    ids: GroupIds
    inverted: bool


@dataclass(frozen=True)
class DenseWeights(Role):
    """A number for each token and expert: `fill` where the expert was not chosen, else that of the slot it was chosen in
    (computed from scores by `tree`, where that is known)."""

    tree: Tree | None
    routing: Routing
    fill: float
    base: Any = field(default=None, compare=False)
    joined: bool = False  # the others are 0 by a softmax over all: not where a chosen one is NaN


# ---------------------------------------------------------------- what balancing losses sum: see rules/statistics.py


@dataclass(frozen=True)
class TokenScore(Role):
    """A number for each token, computed from its scores."""

    tree: Tree


@dataclass(frozen=True)
class Tally(Role):
    """`of` summed over the axes that `dims` no longer has, and divided by `over`; it was held in these dtypes since."""

    of: Tree
    over: int
    dtypes: frozenset[torch.dtype]


# ---------------------------------------------------------------- the order of pairs


@dataclass(frozen=True)
class Ids(Role):
    """The chosen experts, by token and slot, or flat ("r"). `clamped`: ids were forced into 0 .. clamped - 1."""

    routing: Routing
    clamped: int = 0


@dataclass(frozen=True)
class SortedIds(Role):
    routing: Routing
    order: int
    clamped: int = 0


@dataclass(frozen=True)
class Perm(Role):
    """Position in expert order -> pair."""

    routing: Routing
    order: int


@dataclass(frozen=True)
class Inverse(Role):
    """Pair -> position in expert order."""

    routing: Routing
    order: int


@dataclass(frozen=True)
class PairToken(Role):
    """Position in expert order (or position among one expert's pairs) -> token."""

    routing: Routing
    space: Space
    top_k: int


@dataclass(frozen=True)
class PairSlot(Role):
    """Position among one expert's pairs -> slot."""

    routing: Routing
    space: Space


@dataclass(frozen=True)
class Counts(Role):
    """How many pairs each of the experts 0 .. num_experts - 1 has."""

    routing: Routing
    num_experts: int


@dataclass(frozen=True)
class Offsets(Role):
    """Where each expert's pairs end in expert order."""

    routing: Routing
    num_experts: int


@dataclass(frozen=True)
class OneHot(Role):
    """1 where the pair (t, k) chose the class e."""

    routing: Routing


@dataclass(frozen=True)
class Mask(Role):
    """1 where the pair (t, k) chose expert `expert`; without a k axis: where any of the token's slots did."""

    routing: Routing
    expert: int

    @property
    def space(self) -> Space:
        """The pairs of the mask's expert, in the order in which nonzero() lists them.

        Where a token's experts are different it has at most one of these pairs: the order is that of the tokens, with slots
        and without, unless the slots come first.
        """
        names = [n for d in self.dims for n, _ in d]
        how = "".join(n for i, n in enumerate(names) if names[i - 1 : i] != [n])
        if self.routing.distinct and how in ("", "k", "tk"):
            how = "t"
        return Space("subset", self.routing.id, self.expert, how)


@dataclass(frozen=True)
class ExpertWeight(Role):
    """weights * (ids == expert), by token and slot; without a k axis, summed over the slots."""

    weights: Any
    routing: Routing
    expert: int


@dataclass(frozen=True)
class Nonzero(Role):
    """The coordinates of a mask's ones, one row each."""

    mask: Mask


@dataclass(frozen=True)
class Sentinel(Role):
    """True where the id is >= bound, in the same space as the ids."""

    routing: Routing
    order: int | None
    bound: int


# ---------------------------------------------------------------- the experts


@dataclass(frozen=True)
class Space:
    """Which pairs a value is indexed by, and in what order.

    "token"   all pairs, by token and slot        "expert"  all pairs in expert order number `order`
    "subset"  those of one expert, in an order    "dense"   every expert with every token
    """

    kind: str
    order: int = 0
    expert: int = -1
    how: str = ""


@dataclass(frozen=True)
class Weights:
    """The routing weights of all pairs: a live-in that holds them ([T,K] in any view), and how they follow from scores."""

    ref: Ref | None
    tree: Tree | None = None
    routing: Routing | None = None
    base: Any = field(default=None, compare=False)
    dense: bool = False  # base is [T,E]


TOKEN_SPACE = Space("token")
DENSE_SPACE = Space("dense")


@dataclass(frozen=True)
class Gathered(Role):
    """The matrix (or vector) of each pair's expert: pair axes, then f (rows of the stack) and h (its columns)."""

    stack: Stack
    routing: Routing
    space: Space
    clamped: int = 0


@dataclass(frozen=True)
class Pairs(Role):
    """A row of numbers for each pair of a space. `routing` is None where every expert sees every token, unweighted yet."""

    expr: PairExpr
    routing: Routing | None
    space: Space
    top_k: int = 0


@dataclass(frozen=True)
class Term:
    """What one group of pairs adds to the layer's output. `expert` is -1 for all of them at once."""

    expert: int
    expr: PairExpr
    space: Space
    top_k: int


def finished(role: Pairs) -> Sum | None:
    """Rows of the experts of a layer that gives each token one: its output, if nothing is done with them any more."""
    k = role.top_k or (role.routing.top_k if role.routing is not None else 0)
    tokens = all({n for n, _ in d} <= {"t"} for d in role.dims[:-1])
    if role.routing is None or k != 1 or role.space != TOKEN_SPACE or len(role.dims) < 2 or not tokens:
        return None
    if not {n for n, _ in role.dims[-1]} <= {"c"} or _matmuls(role.expr) < 2:
        return None
    return Sum(role.dims, role.routing, (Term(-1, role.expr, role.space, 1),))


def _matmuls(e: PairExpr) -> int:
    """How many of the experts' matmuls follow one another in e."""
    inside = [_matmuls(a) for a in e[1:] if isinstance(a, tuple)]
    return int(e[0] == "mm") + max(inside, default=0)


@dataclass(frozen=True)
class Sum(Role):
    """For each token the sum of the terms over its pairs: the layer's output once every expert is in."""

    routing: Routing
    terms: tuple[Term, ...]
    cast: torch.dtype | None = None
    whole: bool = True  # False while unit dimensions of a product are still among its dimensions


@dataclass(frozen=True)
class PairRows(Role):
    """Rows by token and slot, of which those of some experts' pairs are in place."""

    routing: Routing
    exprs: tuple[tuple[int, PairExpr], ...]  # expert -> what its pairs' rows are


@dataclass(frozen=True)
class SumRows(Role):
    """The rows of a Sum (or of zeros) at one expert's tokens, with that expert's term added or not yet."""

    total: Any  # the Sum or Full role of the whole
    storage: object
    version: int
    routing: Routing
    space: Space
    added: Term | None = None

"""What a Mixture-of-Experts layer is: frozen, hashable, self-checking, and readable as one line of text.

Letters: T tokens, K chosen per token (top_k), E experts, H hidden, F expert intermediate, R = T*K routed pairs.
"""

from __future__ import annotations

import dataclasses
import enum
import json
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from moecompile.ir import expr
from moecompile.ir.expr import Expr


class WeightOn(enum.Enum):
    """Where the routing weight multiplies: the expert's input row, its output row, or nowhere."""

    INPUT = "input"
    OUTPUT = "output"
    NOWHERE = "nowhere"


class OutOfRange(enum.Enum):
    """What an expert id outside 0..E-1 means."""

    SKIP = "skip"  # the pair contributes nothing (sentinels of expert parallelism, masks `ids == e`)
    INDEX = "index"  # as in `weight[ids]`: -E..-1 count from the end, anything else is an IndexError


@dataclass(frozen=True)
class Weight:
    """A stack of E matrices [N, K] (or vectors [N], with `k` 0) as a strided view of parameters.

    params     positions in the op's `params`: one stacked tensor, or E tensors, one per expert
    shape      of each parameter
    offset, e, n, k    element (e, n, k) of the stack lies `offset + e*e_ + n*n_ + k*k_` elements into a parameter laid out
               contiguously (`e` is 0 for E separate tensors).  A parameter that is not contiguous has the same index map on
               its own strides, see runtime.layout.
    """

    params: tuple[int, ...]
    shape: tuple[int, ...]
    offset: int
    e: int
    n: int
    k: int

    @property
    def stacked(self) -> bool:
        return len(self.params) == 1


@dataclass(frozen=True)
class ExpertsSpec:
    """The experts half: given rows x [T,H], ids [T,K] and routing weights [T,K],

        h_i = x W_i[e]^T + b_i[e]        one for each projection i      [F]
        y   = activation(h_0, h_1, ..) D[e]^T + d[e]                     [O]
        out[t] = sum over k of weight[t,k] * y[t,k]

    GEMM operands are of `dtype`; sums, activation and combine are in float32; out is of `out_dtype`.
    """

    num_experts: int
    top_k: int
    hidden: int
    intermediate: int
    out_features: int
    projections: tuple[Weight, ...]
    projection_bias: tuple[Weight | None, ...]
    activation: Expr
    down: Weight
    down_bias: Weight | None
    weight_on: WeightOn
    out_of_range: OutOfRange
    dtype: torch.dtype
    out_dtype: torch.dtype

    def __post_init__(self) -> None:
        E, sizes = self.num_experts, (self.top_k, self.hidden, self.intermediate, self.out_features)
        if E < 1 or min(sizes) < 1:
            raise ValueError(f"experts spec: sizes must be positive, got E={E} and K, H, F, O = {sizes}")
        if len(self.projection_bias) != len(self.projections) or not self.projections:
            raise ValueError("experts spec: one bias entry (or None) per projection, at least one projection")
        if not expr.inputs_of(self.activation) <= set(range(len(self.projections))):
            raise ValueError(f"experts spec: activation {expr.text(self.activation)} reads a projection that is not there")
        for w in self.weights():
            if len(w.params) not in (1, E):
                raise ValueError(f"experts spec: a weight has {len(w.params)} parameters, needs 1 or E = {E}")

    def weights(self) -> list[Weight]:
        """Every weight and bias, in the order projections, projection biases, down, down bias."""
        found = [*self.projections, *self.projection_bias, self.down, self.down_bias]
        return [w for w in found if w is not None]

    @property
    def num_params(self) -> int:
        return 1 + max(p for w in self.weights() for p in w.params)

    def text(self) -> str:
        """One line of JSON from which experts_from_text() rebuilds the spec."""
        return json.dumps(_plain(self), separators=(",", ":"))


@dataclass(frozen=True)
class Groups:
    """Group-limited choice: keep the `top_k` best of `count` equal groups of experts, fill the rest with `fill`."""

    count: int
    top_k: int
    score: str  # "max" or "top2" (sum of the two best)
    fill: float  # -inf or 0.0


@dataclass(frozen=True)
class RouterSpec:
    """From logits [T,E] to weights [T,K] and ids [T,K].

    score   = `score`(logits cast to `score_dtype`)              softmax, sigmoid, sqrtsoftplus or identity
    choice  = groups(score + bias)                               bias [E] where `bias`
    ids     = top_k(choice)                                      ties as aten.topk, or the first (argmax): `first`
    weights = post(score[ids])                                   or choice[ids], or logits[ids]: `weights_from`
    post    = steps in order:  ("softmax",) ("sigmoid",) ("cast", dtype) ("scale", s)
              ("normalise", eps, least)     w / max(sum(w) + eps, least), over the K chosen
    """

    num_experts: int
    top_k: int
    score: str
    score_dtype: torch.dtype
    bias: bool
    groups: Groups | None
    weights_from: str  # "score", "choice" or "logits"
    post: tuple[tuple[Any, ...], ...]
    sorted: bool
    first: bool = False

    def __post_init__(self) -> None:
        if self.first and self.top_k != 1:
            raise ValueError(f"router: only the best expert can be the first of equals, got top_k = {self.top_k}")
        if not 1 <= self.top_k <= self.num_experts:
            raise ValueError(f"router: top_k is {self.top_k}, needs 1..{self.num_experts} (the number of experts)")
        if self.score not in ("softmax", "sigmoid", "sqrtsoftplus", "identity"):
            raise ValueError(f"router: unknown score {self.score!r}")
        if self.weights_from not in ("score", "choice", "logits"):
            raise ValueError(f"router: unknown source of weights {self.weights_from!r}")
        if self.groups is not None and self.num_experts % self.groups.count:
            raise ValueError(f"router: {self.num_experts} experts do not split into {self.groups.count} equal groups")

    def weights_dtype(self, choice_dtype: torch.dtype) -> torch.dtype:
        """The dtype of the weights, given the dtype in which they are read (score or choice)."""
        for step in self.post:
            if step[0] == "cast":
                choice_dtype = step[1]
        return choice_dtype

    def text(self) -> str:
        """One line of JSON from which router_from_text() rebuilds the spec."""
        return json.dumps(_plain(self), separators=(",", ":"))


@dataclass(frozen=True)
class MoESpec:
    """One layer. `router` is None where the ids and weights come from code that was left as it is."""

    router: RouterSpec | None
    experts: ExpertsSpec


# ---------------------------------------------------------------- text


def _plain(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if dataclasses.is_dataclass(value):
        named = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return {k: expr.text(v) if k == "activation" else _plain(v) for k, v in named.items()}
    if isinstance(value, tuple):
        return [_plain(v) for v in value]
    return value


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"not a dtype: {name!r}")
    return found


def _weight(d: dict[str, Any] | None) -> Weight | None:
    return None if d is None else Weight(tuple(d["params"]), tuple(d["shape"]), d["offset"], d["e"], d["n"], d["k"])


@lru_cache(1024)
def experts_from_text(source: str) -> ExpertsSpec:
    d = json.loads(source)
    down = _weight(d["down"])
    assert down is not None
    return ExpertsSpec(
        **{k: d[k] for k in ("num_experts", "top_k", "hidden", "intermediate", "out_features")},
        projections=tuple(w for w in map(_weight, d["projections"]) if w is not None),
        projection_bias=tuple(map(_weight, d["projection_bias"])),
        activation=expr.parse(d["activation"]),
        down=down,
        down_bias=_weight(d["down_bias"]),
        weight_on=WeightOn(d["weight_on"]),
        out_of_range=OutOfRange(d["out_of_range"]),
        dtype=_dtype(d["dtype"]),
        out_dtype=_dtype(d["out_dtype"]),
    )


@lru_cache(1024)
def router_from_text(source: str) -> RouterSpec:
    d = json.loads(source)
    return RouterSpec(
        **{k: d[k] for k in ("num_experts", "top_k", "score", "bias", "weights_from", "sorted", "first")},
        score_dtype=_dtype(d["score_dtype"]),
        groups=None if d["groups"] is None else Groups(**d["groups"]),
        post=tuple((s[0], _dtype(s[1])) if s[0] == "cast" else tuple(s) for s in d["post"]),
    )

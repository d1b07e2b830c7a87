"""Small layers to test with: a spec, its parameters, its inputs, and what float64 says of them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from moecompile.ir import expr, ops, reference
from moecompile.ir.expr import Expr
from moecompile.ir.spec import ExpertsSpec, OutOfRange, Weight, WeightOn

SWIGLU = ("mul", expr.silu(("in", 0)), ("in", 1))
LAYOUTS = ("stacked", "transposed", "interleaved", "interleaved-transposed", "split", "separate")


def _clamped() -> Expr:
    """gpt-oss: both projections clamped, a scaled sigmoid, (up + 1) * glu."""
    gate = ("minimum", ("in", 0), expr.const(7.0))
    up = ("minimum", ("maximum", ("in", 1), expr.const(-7.0)), expr.const(7.0))
    glu = ("mul", gate, ("sigmoid", ("mul", gate, expr.const(1.702))))
    return ("mul", ("add", up, expr.const(1.0)), glu)


ACTIVATIONS: dict[str, Expr] = {
    "swiglu": SWIGLU,
    "gelu": ("mul", expr.gelu(("in", 0)), ("in", 1)),
    "gelu-tanh": ("mul", expr.gelu(("in", 0), "tanh"), ("in", 1)),
    "relu2": ("mul", expr.relu(("in", 0)), expr.relu(("in", 0))),
    "clamped": _clamped(),
}


def make(
    E: int = 3,
    K: int = 2,
    H: int = 32,
    F: int = 16,
    O: int = 0,
    layout: str = "stacked",
    activation: Expr = SWIGLU,
    bias: bool = False,
    on: WeightOn = WeightOn.OUTPUT,
    out_of_range: OutOfRange = OutOfRange.SKIP,
    dtype: torch.dtype = torch.float32,
) -> ExpertsSpec:
    """A layer whose weights lie as `layout` says; the projections are those the activation reads."""
    O, P = O or H, max(expr.inputs_of(activation)) + 1
    width = P * F
    first = (0,)
    if layout == "stacked":
        ups = [Weight(first, (E, width, H), i * F * H, width * H, H, 1) for i in range(P)]
        down = Weight((1,), (E, O, F), 0, O * F, F, 1)
    elif layout == "transposed":
        ups = [Weight(first, (E, H, width), i * F, width * H, 1, width) for i in range(P)]
        down = Weight((1,), (E, F, O), 0, O * F, 1, O)
    elif layout == "interleaved":
        ups = [Weight(first, (E, width, H), i * H, width * H, P * H, 1) for i in range(P)]
        down = Weight((1,), (E, O, F), 0, O * F, F, 1)
    elif layout == "interleaved-transposed":
        ups = [Weight(first, (E, H, width), i, width * H, P, width) for i in range(P)]
        down = Weight((1,), (E, F, O), 0, O * F, 1, O)
    elif layout == "split":
        ups = [Weight((i,), (E, F, H), 0, F * H, H, 1) for i in range(P)]
        down = Weight((P,), (E, O, F), 0, O * F, F, 1)
    else:
        ups = [Weight(tuple(range(i * E, i * E + E)), (F, H), 0, 0, H, 1) for i in range(P)]
        down = Weight(tuple(range(P * E, P * E + E)), (O, F), 0, 0, F, 1)
    used = 1 + max(p for w in (*ups, down) for p in w.params)
    biases: list[Weight | None] = [None] * P
    down_bias = None
    if bias:
        biases = [Weight((used,), (E, width), i * F, width, 1, 0) for i in range(P)]
        down_bias = Weight((used + 1,), (E, O), 0, O, 1, 0)
    return ExpertsSpec(E, K, H, F, O, tuple(ups), tuple(biases), activation, down, down_bias, on, out_of_range, dtype, dtype)


@dataclass
class Inputs:
    """What a call of the experts takes."""

    x: Tensor
    weights: Tensor | None
    ids: Tensor
    params: list[Tensor]
    grad: Tensor


def inputs(spec: ExpertsSpec, tokens: int, load: str = "random", seed: int = 0) -> Inputs:
    """Inputs of one call. `load`: "random", "one" expert takes all, "half" the experts empty, "holes" (ids -1, E and a
    garbage value between the others), "all" (every id skipped)."""
    g = torch.Generator().manual_seed(seed)
    E, K = spec.num_experts, spec.top_k
    shapes = {p: w.shape for w in spec.weights() for p in w.params}
    params = []
    for i in range(spec.num_params):
        fan_in = spec.hidden if len(shapes[i]) > 1 else 1
        params.append((torch.randn(shapes[i], generator=g) / fan_in**0.5).to(spec.dtype))
    x = torch.randn(tokens, spec.hidden, generator=g).to(spec.dtype)
    grad = torch.randn(tokens, spec.out_features, generator=g).to(spec.out_dtype)
    weights = None if spec.weight_on is WeightOn.NOWHERE else torch.rand(tokens, K, generator=g)
    if load == "one":
        ids = torch.full((tokens, K), E - 1)
    elif load == "half":
        ids = torch.randint(0, max(1, E // 2), (tokens, K), generator=g)
    elif load == "all":
        ids = torch.full((tokens, K), E)
    else:
        ids = torch.randint(0, E, (tokens, K), generator=g)
    if load == "holes":
        holes = torch.tensor([-1, E, 2**40 + 1, -(2**63)])
        drawn = holes[torch.randint(0, 4, ids.shape, generator=g)]
        ids = torch.where(torch.rand(ids.shape, generator=g) < 0.4, drawn, ids)
    return Inputs(x, weights, ids, params, grad)


def _wide(spec: ExpertsSpec) -> ExpertsSpec:
    return dataclasses.replace(spec, dtype=torch.float64, out_dtype=torch.float64)


def _double(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.double()


def expected(spec: ExpertsSpec, given: Inputs) -> Tensor:
    """The layer in float64."""
    params = [p.double() for p in given.params]
    return reference.experts(_wide(spec), given.x.double(), _double(given.weights), given.ids, params)


def expected_gradients(spec: ExpertsSpec, given: Inputs, needs: list[bool]) -> list[Tensor]:
    """Gradients of x, weights and each parameter in float64."""

    def forward(x: Tensor, weights: Tensor | None, params: object) -> Tensor:
        return reference.experts(_wide(spec), x, weights, given.ids, params)  # type: ignore[arg-type]

    return ops.gradients(
        forward, given.grad.double(), given.x.double(), _double(given.weights), [p.double() for p in given.params], needs
    )


def tolerance(dtype: torch.dtype, terms: int) -> float:
    """Largest error, relative to the largest value, of sums of `terms` products in two GEMMs with an activation between.

    The interpreter truncates casts to bfloat16, so an eps counts twice.
    """
    return 8 * torch.finfo(dtype).eps * (terms**0.5 if dtype == torch.float32 else 1.0)


def error(got: Tensor, want: Tensor) -> float:
    """Largest absolute difference over the largest wanted value; 0 for empty tensors, infinite for NaN or shape."""
    if got.shape != want.shape:
        return float("inf")
    if want.numel() == 0:
        return 0.0
    difference = (got.double() - want).abs().max()
    scale = want.abs().max()
    found = float(difference / scale) if scale > 0 else float(difference > 0)
    return found if found == found else float("inf")

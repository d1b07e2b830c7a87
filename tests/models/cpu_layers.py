"""Expert specs with parameters to run them on, for the tests of the CPU kernels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moecompile.ir import expr
from moecompile.ir.expr import Expr
from moecompile.ir.spec import ExpertsSpec, OutOfRange, Weight, WeightOn

H0, H1 = ("in", 0), ("in", 1)


def _clamped_glu() -> Expr:
    """gpt-oss: (clamp(up, -7, 7) + 1) * clamped gate * sigmoid(1.702 * clamped gate)."""
    gate = ("minimum", H0, expr.const(7.0))
    up = ("maximum", ("minimum", H1, expr.const(7.0)), expr.const(-7.0))
    return ("mul", ("add", up, expr.const(1.0)), ("mul", gate, ("sigmoid", ("mul", gate, expr.const(1.702)))))


ACTIVATIONS: dict[str, Expr] = {
    "silu_glu": ("mul", expr.silu(H0), H1),
    "clamped_glu": _clamped_glu(),
    "relu_squared": ("mul", expr.relu(H0), expr.relu(H0)),
    "gelu_erf": expr.gelu(H0),
    "gelu_tanh_glu": ("mul", expr.gelu(H0, "tanh"), H1),
    "softplus_log": ("log", ("add", expr.const(1.0), ("exp", H0))),
}
LAYOUTS = (
    *("rows", "columns", "interleaved_columns", "interleaved_rows", "swapped_columns"),
    *("split", "separate", "padded", "odd_strides"),
)


@dataclass(frozen=True)
class Case:
    """E, K, H, F, O as in the specs, T tokens."""

    E: int = 4
    K: int = 2
    H: int = 64
    F: int = 96
    T: int = 33
    O: int = 0  # 0: as H
    dtype: torch.dtype = torch.float32
    activation: str = "silu_glu"
    layout: str = "rows"
    bias: bool = False
    weight_on: WeightOn = WeightOn.OUTPUT
    out_of_range: OutOfRange = OutOfRange.SKIP
    load: str = "uniform"  # or one (expert takes all), half (of the experts empty)
    out_dtype: torch.dtype | None = None

    def __str__(self) -> str:
        mine, default = vars(self), vars(Case())
        told = [f"{name}={value}" for name, value in mine.items() if value != default[name]]
        return ",".join(t.replace("torch.", "").replace("WeightOn.", "") for t in told) or "default"

    @property
    def gated(self) -> bool:
        return 1 in expr.inputs_of(ACTIVATIONS[self.activation])

    def spec(self) -> ExpertsSpec:
        P, O = 1 + self.gated, self.O or self.H
        projections, biases, down, down_bias = _weights(self.layout, self.E, self.H, self.F, O, P, self.bias)
        return ExpertsSpec(
            *(self.E, self.K, self.H, self.F, O, projections, biases, ACTIVATIONS[self.activation], down, down_bias),
            *(self.weight_on, self.out_of_range, self.dtype, self.out_dtype or self.dtype),
        )

    def inputs(self) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        """x [T,H], weights [T,K], ids [T,K] and the parameters."""
        g = torch.Generator().manual_seed(hash((self.E, self.K, self.H, self.F, self.T)) % 2**31)
        shapes: dict[int, tuple[int, ...]] = {}
        for w in self.spec().weights():
            shapes.update(dict.fromkeys(w.params, w.shape))
        params = [(torch.randn(shapes[i], generator=g) * self.H**-0.5).to(self.dtype) for i in range(len(shapes))]
        x = torch.randn(self.T, self.H, generator=g).to(self.dtype)
        weights = torch.rand(self.T, self.K, generator=g)
        ids = torch.rand(self.T, self.E, generator=g).argsort(-1)[:, : self.K]
        if self.load == "one":
            ids = torch.full_like(ids, self.E - 1)
        elif self.load == "half":
            ids = ids // 2 * 2
        return x, weights, ids, params


def _weights(
    layout: str, E: int, H: int, F: int, O: int, P: int, bias: bool
) -> tuple[tuple[Weight, ...], tuple[Weight | None, ...], Weight, Weight | None]:
    n, down = P * F, Weight((1,), (E, O, F), 0, O * F, F, 1)
    columns = Weight((1,), (E, F, O), 0, F * O, 1, O)
    count, step, first = 2, 1, lambda i: i * F  # of the biases [E, P * F]
    if layout == "rows":
        up = [Weight((0,), (E, n, H), i * F * H, n * H, H, 1) for i in range(P)]
    elif layout == "columns":
        up, down = [Weight((0,), (E, H, n), i * F, H * n, 1, n) for i in range(P)], columns
    elif layout in ("interleaved_columns", "swapped_columns"):
        order = range(P) if layout.startswith("inter") else range(P - 1, -1, -1)
        up, down = [Weight((0,), (E, H, n), i, H * n, P, n) for i in order], columns
        step, first = P, lambda i: i
    elif layout == "interleaved_rows":
        up = [Weight((0,), (E, n, H), i * H, n * H, P * H, 1) for i in range(P)]
        step, first = P, lambda i: i
    elif layout == "split":
        up = [Weight((0 if i == 0 else 2,), (E, F, H), 0, F * H, H, 1) for i in range(P)]
        count = P + 1
    elif layout == "separate":
        up = [Weight(tuple(range(i * E, i * E + E)), (F, H), 0, 0, H, 1) for i in range(P)]
        down, count = Weight(tuple(range(P * E, P * E + E)), (O, F), 0, 0, F, 1), (P + 1) * E
    elif layout == "padded":  # the views leave a row of each expert and a column of each row uncovered
        up = [Weight((0,), (E, n + 1, H + 1), i * F * (H + 1) + 1, (n + 1) * (H + 1), H + 1, 1) for i in range(P)]
    else:  # neither n nor k is contiguous
        up = [Weight((0,), (E, n, H, 3), i * F * H * 3 + 1, n * H * 3, H * 3, 3) for i in range(P)]
        down = Weight((1,), (E, O, F, 2), 0, O * F * 2, F * 2, 2)
    if not bias:
        return tuple(up), (None,) * P, down, None
    biases = tuple(Weight((count,), (E, n), first(i), n, step, 0) for i in range(P))
    if layout == "swapped_columns":
        biases = biases[::-1]
    return tuple(up), biases, down, Weight((count + 1,), (E, O), 0, O, 1, 0)

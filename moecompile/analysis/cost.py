"""FLOPs, bytes and seconds of a MoE layer, as sympy expressions in its letters.

A floor is max(FLOPs / peak, bytes / bandwidth): every byte that must cross memory does so once, and the two overlap
perfectly.  `least` is one perfect kernel; `pipeline` adds up such a maximum over the kernels we run, with the tensors that
pass between them.  Rows gathered from x are charged once per routed row, though a cache may serve the repeats.  No launch,
no tail, no padding and no cache residency is modelled, and unless it is given D assumes uniform, independent routing (skew
makes D smaller and the largest group larger).  A read-only stream can beat the bandwidth of a copy, so that a decode kernel
may pass 100 %.

T tokens, K chosen per token, E experts, H hidden, F intermediate, O output features, P projections (2 gated, 1 plain), D
distinct experts hit, w and b bytes of a weight and of an activation, z = 1 where the projections are saved for a backward,
r = 1 with a router.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import sympy

from moecompile.analysis.machine import Machine
from moecompile.analysis.machine import default_machine as default_machine  # for those who read costs alone
from moecompile.ir.spec import ExpertsSpec, MoESpec

T, K, E, H, F, O, P, D, w, b, z, r = SYMBOLS = sympy.symbols("T K E H F O P D w b z r", positive=True)

R = T * K  # routed rows
DISTINCT = E * (1 - (1 - K / E) ** T)  # D under uniform routing
_DISTINCT = sympy.lambdify((T, E, K), DISTINCT, "math")
EXPERT = F * (P * H + O)  # weight elements of one expert
ROUTING = 8  # bytes of one id and one weight


@dataclass(frozen=True)
class Kernel:
    """One launch: its FLOPs and the bytes it moves, as expressions in SYMBOLS."""

    name: str
    flops: sympy.Expr
    bytes: sympy.Expr


_UP, _DOWN, _LOGITS = 2 * R * H * F * P, 2 * R * F * O, 2 * T * H * E

FORWARD = (
    Kernel("route", r * _LOGITS, r * (T * H * b + H * E * b + R * ROUTING)),
    Kernel("up", _UP, R * H * b + D * P * H * F * w + R * F * b + z * R * P * F * b),
    Kernel("down", _DOWN, R * F * b + D * F * O * w + R * O * b),
    Kernel("combine", sympy.Integer(0), R * O * b + T * O * b),
)
BACKWARD = (
    Kernel("dz", _DOWN, R * O * b + D * F * O * w + 2 * R * P * F * b + R * F * b),
    Kernel("dw_down", _DOWN, R * O * b + R * F * b + E * F * O * w),
    Kernel("dx", _UP, R * P * F * b + D * P * H * F * w + R * H * b),
    Kernel("dw_up", _UP, R * P * F * b + R * H * b + E * P * H * F * w),
    Kernel("dx_sum", sympy.Integer(0), R * H * b + T * H * b),
)
# transformers' grouped_mm form under Inductor, which fuses pointwise chains but not a gather or an activation into a GEMM:
# rows are copied in expert order before the first GEMM, and the projections go out and in again for the activation.
UNFUSED = (
    FORWARD[0],
    Kernel("sort", sympy.Integer(0), 6 * R * ROUTING),
    Kernel("gather", sympy.Integer(0), 2 * R * H * b),
    Kernel("up", _UP, R * H * b + D * P * H * F * w + R * P * F * b),
    Kernel("activation", sympy.Integer(0), R * P * F * b + R * F * b),
    FORWARD[2],
    FORWARD[3],
)

LEAST_FORWARD = Kernel(
    "forward",
    2 * R * EXPERT + r * _LOGITS,
    D * EXPERT * w + T * (H + O) * b + r * H * E * b + z * R * P * F * b,
)
LEAST_BACKWARD = Kernel("backward", 4 * R * EXPERT, (D + E) * EXPERT * w + T * (2 * H + O) * b + R * P * F * b)
SAVED = Kernel("saved", sympy.Integer(0), T * H * b + R * (P * F * b + 12))  # x, projections, routing: no GEMM is run again


@dataclass(frozen=True)
class Shape:
    """The sizes the cost model knows; `router` says whether the router is part of the layer."""

    hidden: int
    intermediate: int
    num_experts: int
    top_k: int
    out_features: int
    projections: int = 2
    weight_bytes: float = 2.0
    activation_bytes: float = 2.0
    router: bool = True

    def __post_init__(self) -> None:
        sizes = (self.hidden, self.intermediate, self.num_experts, self.top_k, self.out_features, self.projections)
        if min(sizes) < 1 or self.top_k > self.num_experts:
            raise ValueError(f"shape: needs positive H, F, E, K, O, P and K <= E, got {sizes}")

    def distinct(self, tokens: int) -> float:
        """Expected number of distinct experts that tokens hit under uniform routing."""
        return float(_DISTINCT(tokens, self.num_experts, self.top_k))

    def rows_per_expert(self, tokens: float) -> float:
        return tokens * self.top_k / self.num_experts


def shape_of(spec: MoESpec | ExpertsSpec) -> Shape:
    experts = spec.experts if isinstance(spec, MoESpec) else spec
    size = float(experts.dtype.itemsize)
    router = isinstance(spec, MoESpec) and spec.router is not None
    return Shape(
        experts.hidden, experts.intermediate, experts.num_experts, experts.top_k, experts.out_features,
        len(experts.projections), size, size, router,
    )  # fmt: skip


@dataclass(frozen=True)
class Floor:
    """Seconds. least: one perfect kernel.  pipeline: the sum over real kernels.  bound: of the perfect kernel."""

    least: float
    pipeline: float
    bound: str


@lru_cache(8)
def _compiled(kernels: tuple[Kernel, ...]) -> Callable[..., list[float]]:
    """FLOPs and bytes of the kernels, one after another, as a plain function of SYMBOLS."""
    compiled: Callable[..., list[float]] = sympy.lambdify(
        SYMBOLS, [e for k in kernels for e in (k.flops, k.bytes)], "math", cse=True
    )
    return compiled


def work(
    kernels: tuple[Kernel, ...], shape: Shape, tokens: int, save: bool = False, distinct: float | None = None
) -> dict[str, tuple[float, float]]:
    """FLOPs and bytes of each kernel at T = tokens; `save` writes the projections for a backward.

    `distinct` is the number of distinct experts hit, where it was counted; otherwise routing is taken to be uniform.
    """
    if tokens < 0:
        raise ValueError(f"tokens must not be negative, got {tokens}")
    hit = shape.distinct(tokens) if distinct is None else distinct
    sizes = (shape.top_k, shape.num_experts, shape.hidden, shape.intermediate, shape.out_features, shape.projections)
    widths = (shape.weight_bytes, shape.activation_bytes, float(save), float(shape.router))
    found = _compiled(kernels)(tokens, *sizes, hit, *widths)
    return {k.name: (found[2 * i], found[2 * i + 1]) for i, k in enumerate(kernels)}


def _floor(least: Kernel, kernels: tuple[Kernel, ...], shape: Shape, tokens: int, machine: Machine, save: bool) -> Floor:
    total = work((least,), shape, tokens, save)[least.name]
    pipeline = sum(machine.seconds(*k) for k in work(kernels, shape, tokens, save).values())
    return Floor(machine.seconds(*total), pipeline, machine.bound(*total))


def forward(shape: Shape, tokens: int, machine: Machine, save: bool = False) -> Floor:
    """Router (where the shape has one), experts and combine."""
    return _floor(LEAST_FORWARD, FORWARD, shape, tokens, machine, save)


def backward(shape: Shape, tokens: int, machine: Machine) -> Floor:
    """Experts only: dx and dW of every expert, zeros included, from saved x and projections."""
    return _floor(LEAST_BACKWARD, BACKWARD, shape, tokens, machine, save=True)


def predict(spec: MoESpec | ExpertsSpec, tokens: int, machine: Machine, train: bool = False) -> float:
    """Seconds our kernels need at best: forward, or forward and backward."""
    shape = shape_of(spec)
    seconds = forward(shape, tokens, machine, save=train).pipeline
    return seconds + backward(shape, tokens, machine).pipeline if train else seconds


def share_of_floor(spec: MoESpec | ExpertsSpec, tokens: int, machine: Machine, seconds: float, train: bool = False) -> float:
    """The least possible time over a measured one: 1.0 is perfect."""
    if seconds <= 0:
        raise ValueError(f"a measured time must be positive, got {seconds}")
    shape = shape_of(spec)
    least = forward(shape, tokens, machine, save=train).least
    return (least + backward(shape, tokens, machine).least if train else least) / seconds


def expected_gain(spec: MoESpec | ExpertsSpec, tokens: int, machine: Machine) -> float:
    """Predicted forward time of the unfused grouped_mm form over ours, by memory traffic alone (launches not counted): >= 1."""
    shape = shape_of(spec)
    unfused = sum(machine.seconds(*k) for k in work(UNFUSED, shape, tokens).values())
    fused = forward(shape, tokens, machine).pipeline
    return unfused / fused if fused > 0 else 1.0


def ridge(shape: Shape, machine: Machine) -> float:
    """Rows per expert above which arithmetic, not the weights' bytes, takes the time."""
    return shape.weight_bytes * machine.flops / (2 * machine.bandwidth)


def saved_bytes(shape: Shape, tokens: int) -> float:
    """Bytes the forward keeps for the backward."""
    return work((SAVED,), shape, tokens, save=True)[SAVED.name][1]


def padding_efficiency(shape: Shape, tokens: int, block_m: int) -> float:
    """Useful rows over computed rows when every expert's rows are padded to a multiple of block_m.

    An expert's count is Binomial(T, K/E): the ratio of expectations, not the expectation of the ratio.
    """
    p = shape.top_k / shape.num_experts
    if tokens < 1:
        return 1.0
    if p >= 1:
        return tokens / (math.ceil(tokens / block_m) * block_m)
    mean, dev = tokens * p, (tokens * p * (1 - p)) ** 0.5
    padded = 0.0
    for n in range(max(0, int(mean - 9 * dev - 2)), min(tokens, int(mean + 9 * dev + 40)) + 1):
        log_pmf = math.lgamma(tokens + 1) - math.lgamma(n + 1) - math.lgamma(tokens - n + 1)
        padded += math.exp(log_pmf + n * math.log(p) + (tokens - n) * math.log(1 - p)) * math.ceil(n / block_m) * block_m
    return mean / padded

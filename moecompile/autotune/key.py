"""What a configuration is for, and where it was measured: the key under which the store keeps it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Any

import torch

import moecompile
from moecompile.analysis.cost import Shape
from moecompile.autotune.bucket import bucket_of
from moecompile.codegen.gpu_choose import Target
from moecompile.ir import expr
from moecompile.ir.spec import ExpertsSpec, OutOfRange, RouterSpec, Weight, WeightOn
from moecompile.kernels.gpu.config import Config

DTYPES = {"bfloat16": 2, "float16": 2, "float32": 4}  # bytes of an element
TIMERS = ("device", "simulated")


@dataclass(frozen=True)
class Problem:
    """One kernel family on one layer shape, for one bucket of rows per expert (an index in bucket.BUCKETS).

    The token count is not in it.  For the router, which knows no more than E and K, the other sizes are 1.
    """

    kernel: str
    dtype: str
    hidden: int
    intermediate: int
    num_experts: int
    top_k: int
    out_features: int
    projections: int
    bucket: int

    @property
    def shape(self) -> Shape:
        size = float(DTYPES[self.dtype])
        return Shape(
            self.hidden, self.intermediate, self.num_experts, self.top_k, self.out_features, self.projections, size, size
        )  # fmt: skip


@dataclass(frozen=True)
class Environment:
    """Where a time was taken: it holds nowhere else. `timer` keeps simulated times apart from real ones."""

    arch: str
    sms: int
    torch: str
    triton: str
    moecompile: str
    timer: str


@dataclass(frozen=True)
class Key:
    problem: Problem
    environment: Environment


def problem_of(family: str, spec: ExpertsSpec | RouterSpec, tokens: int) -> Problem | None:
    """What a kernel is tuned as; None where the store knows no such layer: another dtype, or experts with a parameter each, whose
    pointers take registers that a configuration measured on stacked weights does not leave."""
    if isinstance(spec, RouterSpec):
        sizes, dtype = (1, 1, spec.num_experts, spec.top_k, 1, 1), torch.float32
    else:
        sizes = (spec.hidden, spec.intermediate, spec.num_experts, spec.top_k, spec.out_features, len(spec.projections))
        dtype = spec.dtype
    name = str(dtype).removeprefix("torch.")
    stacked = isinstance(spec, RouterSpec) or all(w.stacked for w in spec.weights())
    if name not in DTYPES or not stacked or spec.top_k > spec.num_experts:
        return None
    return Problem(family, name, *sizes, bucket=bucket_of(tokens, spec.top_k, spec.num_experts))


def spec_of(problem: Problem) -> ExpertsSpec | RouterSpec:
    """A layer of the problem's shape: silu of the first projection times the others, weights stacked and contiguous; softmax
    scores for the router.  The activation and the layout of the weights are not part of a problem."""
    E, K, H, F, O = problem.num_experts, problem.top_k, problem.hidden, problem.intermediate, problem.out_features
    if problem.kernel == "router":
        return RouterSpec(E, K, "softmax", torch.float32, False, None, "score", (("normalise", 0.0, 0.0),), True)
    P = problem.projections
    activation = expr.silu(("in", 0))
    for i in range(1, P):
        activation = ("mul", activation, ("in", i))
    dtype = getattr(torch, problem.dtype)
    return ExpertsSpec(
        num_experts=E, top_k=K, hidden=H, intermediate=F, out_features=O,
        projections=tuple(Weight((0,), (E, P * F, H), i * F * H, P * F * H, H, 1) for i in range(P)),
        projection_bias=(None,) * P, activation=activation,
        down=Weight((1,), (E, O, F), 0, O * F, F, 1), down_bias=None,
        weight_on=WeightOn.OUTPUT, out_of_range=OutOfRange.SKIP, dtype=dtype, out_dtype=dtype,
    )  # fmt: skip


def versions() -> dict[str, str]:
    """torch, triton ("none" where it is absent) and this package."""
    try:
        import triton

        found = str(triton.__version__)
    except Exception:  # a broken installation raises anything
        found = "none"
    return {"torch": str(torch.__version__), "triton": found, "moecompile": moecompile.__version__}


def environment_of(target: Target, timer: str = "device") -> Environment:
    arch = f"sm_{target.arch}" if isinstance(target.arch, int) else target.arch
    return Environment(arch=arch, sms=target.processors, timer=timer, **versions())


def canonical(value: Any) -> str:
    """The one text of a key or a config, whatever the order of its fields."""
    plain = value.plain() if isinstance(value, Config) else dataclasses.asdict(value)
    return json.dumps(plain, sort_keys=True, separators=(",", ":"))


def digest(value: Any) -> str:
    """24 hexadecimal digits that stand for a key or a config in a file name."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()[:24]

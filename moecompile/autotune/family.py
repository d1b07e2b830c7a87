"""The kernel families that are tuned: which numbers each may be given, and what a configuration takes of an SM.

The axes are the one list of allowed values: candidates are drawn from it, and what a store or a pack holds is checked against
it, so that nothing else can reach generated source.  An axis that a family does not use is left as the closed form has it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from moecompile.autotune.key import DTYPES, Problem
from moecompile.codegen.gpu_choose import Target, from_sm_90
from moecompile.kernels.gpu.config import Config

_UNUSED = {a.name: (1 if a.default is dataclasses.MISSING else a.default,) for a in dataclasses.fields(Config)}
_STAGES = (2, 3, 4, 5)


def _powers(least: int, most: int) -> tuple[int, ...]:
    return tuple(1 << i for i in range(least.bit_length() - 1, most.bit_length()))


_GROUPED = {
    "block_m": _powers(16, 128), "block_n": _powers(16, 256), "block_k": _powers(16, 128),
    "warps": (4, 8), "stages": _STAGES, "group": (1, 8),
}  # fmt: skip
_MANY_TILES = {"persistent": (0, 1, 2)}
_FORWARD = {**_MANY_TILES, "swap": (0, 1), "tma": (0, 1)}
_DECODE = {"block_n": _powers(1, 64), "block_k": _powers(1, 1024), "warps": (2, 4, 8), "stages": _STAGES}
_GRADIENT = {
    "block_m": _powers(16, 64),
    "block_n": _powers(16, 256),
    "block_k": _powers(16, 256),
    "warps": (4, 8),
    "stages": _STAGES,
}
_OF_FAMILY: dict[str, dict[str, tuple[int, ...]]] = {
    "router": {"block_m": _powers(1, 1024), "warps": _powers(1, 8)},
    "decode_up": _DECODE,
    "decode_down": {**_DECODE, "split": _powers(1, 8), "pdl": (0, 1)},
    "up": {**_GROUPED, **_FORWARD},
    "down": {**_GROUPED, **_FORWARD, "split": _powers(1, 4)},
    "combine": {"block_n": _powers(1, 4096), "warps": _powers(1, 8)},
    "grad_z": _GROUPED,
    "grad_rows": {**_GROUPED, **_MANY_TILES},
    "grad_matrix": _GRADIENT,
}
AXES: Mapping[str, Mapping[str, tuple[int, ...]]] = {family: {**_UNUSED, **axes} for family, axes in _OF_FAMILY.items()}

# What may be changed together, besides block sizes and launch numbers.  grad_z is not persistent: compiled for sm_90, sm_100 and
# gfx942 with 128 rows it spills 24 to 784 bytes.
Form = Mapping[str, int]
_TILED: tuple[Form, ...] = ({"persistent": 1}, {"persistent": 2})
_WEIGHTS: tuple[Form, ...] = ({"tma": 1}, {"swap": 1}, {"swap": 1, "tma": 1}, *_TILED, {"persistent": 1, "tma": 1})
FORMS: Mapping[str, tuple[Form, ...]] = {
    "up": _WEIGHTS,
    "down": (*_WEIGHTS, {"split": 2}, {"split": 4}),
    "grad_rows": _TILED,
    "decode_down": ({"pdl": 1}, {"split": 2}, {"split": 4}, {"split": 8}, {"split": 2, "pdl": 1}),
}

FORWARD = ("up", "down", "combine", "router")  # in the order in which they are tuned
DECODE = ("decode_up", "decode_down")  # in place of up, down and combine where few rows are routed
BACKWARD = ("grad_z", "grad_rows", "grad_matrix")
GROUPED = ("up", "down", "grad_z", "grad_rows")  # rows of one expert times its weight
GEMMS = (*GROUPED, "grad_matrix")
LEADER = {"down": "up", "grad_rows": "grad_z"}  # whose height of row tiles a family has to share


@dataclass(frozen=True)
class Gemm:
    """The product that a GEMM family tiles: columns `n`, the length `k` of its sums, tiles summed at a time."""

    n: int
    k: int
    accumulators: int


def gemm_of(problem: Problem) -> Gemm:
    """For the gradient of a weight [n,k], of the up projections, the sum runs over routed rows."""
    H, F, O, P = problem.hidden, problem.intermediate, problem.out_features, problem.projections
    return {
        "up": Gemm(F, H, P),
        "decode_up": Gemm(F, H, P),
        "down": Gemm(O, F, 1),
        "decode_down": Gemm(O, F, 1),
        "grad_z": Gemm(F, O, 1),
        "grad_rows": Gemm(H, F, 1),
        "grad_matrix": Gemm(F, H, 1),
    }[problem.kernel]


def check(kernel: str, numbers: Mapping[str, object]) -> str | None:
    """Why these are not numbers for the family, or None."""
    for name, allowed in AXES[kernel].items():
        value = numbers[name]
        if type(value) is not int or value not in allowed:
            return f"config of {kernel}: {name} is {str(value)[:40]!r}, needs one of {', '.join(map(str, allowed))}"
    return None


def shared_bytes(problem: Problem, config: Config, target: Target) -> int:
    """Shared memory of one block: the operand tiles in flight. Other families keep everything in registers.

    Tensor cores that read shared memory on their own (sm_90 and later, from 64 rows on) hold a tile for each stage; elsewhere
    one stage is in registers.  So the offline compiler says for all four targets.
    """
    if problem.kernel not in GEMMS:
        return 0
    gradient = problem.kernel == "grad_matrix"
    rows = config.block_n if gradient else config.block_m
    columns = config.block_k if gradient else config.block_n * gemm_of(problem).accumulators
    reads_alone = from_sm_90(target) and (config.block_n if config.swap else rows) >= 64
    stages = config.stages if reads_alone else max(1, config.stages - 1)
    held = (rows + columns) * (config.block_m if gradient else config.block_k) * stages
    stored = config.block_m * config.block_n if config.persistent else 0  # a tile on its way out while the next one comes in
    return (held + stored) * DTYPES[problem.dtype]


def tile_registers(problem: Problem, config: Config, warp: int) -> int:
    """32-bit registers a thread needs for its share of the float32 tile it sums (or, for a stream, of the tile it reads)."""
    tiles = {
        "router": config.block_m * problem.num_experts,
        "combine": config.block_n,
        "grad_matrix": config.block_n * config.block_k,
    }
    if problem.kernel in GROUPED:
        tiles[problem.kernel] = config.block_m * config.block_n * gemm_of(problem).accumulators
    if problem.kernel in DECODE:
        tiles[problem.kernel] = config.block_n * config.block_k * gemm_of(problem).accumulators
    return -(-tiles[problem.kernel] // (config.warps * warp))

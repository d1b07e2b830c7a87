"""Which numbers a kernel gets: closed forms in rows per expert and the device's limits, no search.

`set_source` lets a tuner answer first.  Token counts enter only as a bucket, so that few variants are built.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch

from moecompile.codegen import gpu_layout
from moecompile.codegen.gpu_text import next_power
from moecompile.codegen.gpu_weights import Layouts
from moecompile.ir.spec import ExpertsSpec, RouterSpec
from moecompile.kernels.gpu.config import Config

_LOG = logging.getLogger("moecompile.runtime")

FEW_PAIRS = 4096  # up to here the permutation is one kernel
DECODE_TOKENS = 16  # above this the experts' weights are worth sharing between tokens, whatever E is


@dataclass(frozen=True)
class Target:
    """A kind of device. `backend`: "cuda", "hip", or "cpu" (the interpreter); `arch`: 80, 90, 100, "gfx942";
    `shared_memory` bytes a program may use; `processors`: SMs or CUs; `name`: of the device at
    hand."""

    backend: str
    arch: int | str
    shared_memory: int
    processors: int
    name: str = ""

    @property
    def warp(self) -> int:
        return 64 if self.backend == "hip" else 32


TARGETS = {
    "sm_80": Target("cuda", 80, 166_912, 108),
    "sm_90": Target("cuda", 90, 232_448, 132),
    "sm_100": Target("cuda", 100, 232_448, 148),
    "gfx942": Target("hip", "gfx942", 65_536, 304),
}
INTERPRETER = Target("cpu", 90, 232_448, 132)


@lru_cache(64)
def target_of(device: torch.device) -> Target:
    """The target a tensor's device is; on the CPU the interpreter; of meta tensors the GPU at hand, or the interpreter."""
    if device.type == "meta" and torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    if device.type != "cuda":
        return INTERPRETER
    found = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return Target("hip", found.gcnArchName.split(":")[0], 65_536, found.multi_processor_count, found.name)
    shared = getattr(found, "shared_memory_per_block_optin", 101_376)  # 101,376: the least of any sm_80 or later
    return Target("cuda", found.major * 10 + found.minor, shared, found.multi_processor_count, found.name)


ConfigSource = Callable[[str, ExpertsSpec | RouterSpec, int, Target], Config | None]
_SOURCE: list[ConfigSource] = []


def set_source(source: ConfigSource | None) -> None:
    """Ask `source(family, spec, tokens, target)` before the closed form from now on; None goes back to the closed form.

    `tokens` is the bucket's representative; the answer may be None.
    """
    _SOURCE[:] = [] if source is None else [source]
    choose.cache_clear()


BUCKETS = (0.5, 2.0, 8.0, 32.0, 128.0, 512.0)


def bucket(rows_per_expert: float) -> int:
    """Which of the buckets {<= .5, 2, 8, 32, 128, 512, more} a load falls in."""
    return sum(rows_per_expert > edge for edge in BUCKETS)


def representative(tokens: int, top_k: int, num_experts: int) -> int:
    """The token count that stands for all of its bucket: the bucket's upper edge, or 2048 rows per expert."""
    index = bucket(tokens * top_k / num_experts)
    rows = (*BUCKETS, 2048.0)[index]
    return max(1, int(rows * num_experts / top_k))


def decodes(spec: ExpertsSpec, tokens: int) -> bool:
    """Whether so few pairs are routed that permuting them costs more than it saves."""
    return tokens <= DECODE_TOKENS and tokens * spec.top_k <= max(spec.top_k, spec.num_experts // 2)


@lru_cache(4096)
def choose(family: str, spec: ExpertsSpec | RouterSpec, tokens: int, target: Target) -> Config:
    """The numbers of `family` for a layer, a representative number of tokens and a target."""
    for source in _SOURCE:
        found = source(family, spec, tokens, target)
        if found is not None:
            return found
    return closed_form(family, spec, tokens, target)


def allowed(family: str, spec: ExpertsSpec, layouts: Layouts, config: Config, target: Target) -> Config:
    """The config without the forms that the target or the layout of the weights rules out: it may have been measured on weights
    of this shape that lie otherwise."""
    if config.tma and (reason := no_descriptors(family, spec, layouts, config, target)):
        _LOG.debug("%s reads its weights by pointers: %s", family, reason)
        config = dataclasses.replace(config, tma=0)
    if config.pdl and not from_sm_90(target):
        config = dataclasses.replace(config, pdl=0)
    if config.split > 1 and target.backend == "hip":  # its barrier lets stores to memory pass: see kernels/gpu/down.py
        config = dataclasses.replace(config, split=1)
    return config


def no_descriptors(family: str, spec: ExpertsSpec, layouts: Layouts, config: Config, target: Target) -> str | None:
    """Why the weights of a kernel cannot be read by tensor descriptors, or None."""
    if family not in ("up", "down"):
        return f"{family} has no such form"
    if not from_sm_90(target):
        return f"needs sm >= 90 for tensor descriptors, got {target.arch}"
    return gpu_layout.no_descriptors(spec, layouts, family, config)


def from_sm_90(target: Target) -> bool:
    """Whether there are tensor descriptors, dependent launches, and tensor cores that read shared memory by 64 rows."""
    return isinstance(target.arch, int) and target.arch >= 90


def closed_form(family: str, spec: ExpertsSpec | RouterSpec, tokens: int, target: Target) -> Config:
    """What `choose` says when nobody measured."""
    if isinstance(spec, RouterSpec):
        lanes = next_power(spec.num_experts)
        block = 1 if tokens <= 4 * target.processors else max(1, 1024 // lanes)
        return Config(block, 1, 1, 1 if lanes * block <= 128 else 4, 1)
    rows = tokens * spec.top_k / spec.num_experts
    H, F, O, P = spec.hidden, spec.intermediate, spec.out_features, len(spec.projections)
    if family == "permute":
        pairs = tokens * spec.top_k
        if pairs > FEW_PAIRS:
            return Config(128, 1, 1, 8, 1)
        return Config(max(256, next_power(pairs)), 1, 1, 4 if pairs <= 1024 else 8, 1)
    if family == "combine":
        return Config(1, min(1024, next_power(max(H, O))), 1, 4, 1)
    if family in ("decode_up", "decode_down"):
        n, k = (F, H) if family == "decode_up" else (O, F)
        return Config(1, min(16, next_power(n)), min(256, next_power(k)), 4, 3)
    if family == "grad_weights":
        return Config(32, min(128, next_power(O)), 1, 4, 2)
    if family == "grad_vector":
        return Config(32, min(128, next_power(max(F, O))), 1, 4, 2)
    if family == "grad_matrix":
        step = min(max(next_power(int(rows) + 1), 16), 64)
        wide = 64 if target.backend == "hip" else 128
        return _fit(Config(step, wide, wide, 8, 3), (min(F, O), min(H, F)), 1, spec.dtype, target)
    block = min(max(next_power(int(1.5 * rows) + 1), 16), 64 if spec.dtype == torch.float32 else 128)
    if family in ("up", "grad_z", "grad_rows", "down"):
        sums = P if family == "up" else 1
        n, k = {"up": (F, H), "grad_z": (F, O), "grad_rows": (H, F), "down": (O, F)}[family]
        narrow = family == "grad_z"  # its epilogue holds the projections, the activation and its derivatives
        if block <= 32:
            wanted = Config(block, 64 if sums > 1 else 128, 128, 4, 3)
        elif block == 64:
            wanted = Config(block, 64 if sums > 1 or narrow else 128, 64, 8 if spec.dtype == torch.float32 else 4, 4)
        else:
            # two accumulators of 128 columns: no spills where the weights are one tensor (checked by compiling, test_offline)
            wide = family == "up" and target.backend == "cuda" and target.arch in (90, 100) and spec.projections[0].stacked
            wanted = Config(block, 128 if (sums == 1 and not narrow) or wide else 64, 64, 8, 3)
        return _fit(wanted, (n, k), sums, spec.dtype, target)
    raise ValueError(f"no such kernel family: {family!r}")


def shared_bytes(config: Config, sums: int, dtype: torch.dtype) -> int:
    """Operand tiles of all stages of a GEMM with `sums` accumulators that share one operand."""
    return config.stages * (config.block_m + sums * config.block_n) * config.block_k * int(dtype.itemsize)


def _fit(config: Config, sizes: tuple[int, int], sums: int, dtype: torch.dtype, target: Target) -> Config:
    """Blocks no larger than the matrix, tiles that the device's shared memory holds. On hip a stage fewer is kept."""
    n, k = (max(16, next_power(s)) for s in sizes)
    config = dataclasses.replace(config, block_n=min(config.block_n, n), block_k=min(config.block_k, k))
    if target.backend == "hip":
        config = dataclasses.replace(config, stages=2, block_k=min(config.block_k, 64))
    if dtype == torch.float32:
        config = dataclasses.replace(config, block_k=min(config.block_k, 32))
    while config.stages > 2 and shared_bytes(config, sums, dtype) > target.shared_memory:
        config = dataclasses.replace(config, stages=config.stages - 1)
    while config.block_k > 16 and shared_bytes(config, sums, dtype) > target.shared_memory:
        config = dataclasses.replace(config, block_k=config.block_k // 2)
    return config

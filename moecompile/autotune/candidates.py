"""A short list instead of a long search: the closed form first, then its best neighbours by the floor model.

Nothing is measured here.  What cannot fit (shared memory, registers) is pruned, the rest is ranked by an estimate that knows
padding, tiles per SM, traffic through L2 and bytes in flight.  The estimate orders candidates; it claims no time.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache

from moecompile.analysis import cost
from moecompile.analysis.machine import Machine
from moecompile.autotune import bucket
from moecompile.autotune.family import AXES, DECODE, FORMS, GEMMS, GROUPED, gemm_of, shared_bytes, tile_registers
from moecompile.autotune.key import DTYPES, Problem, spec_of
from moecompile.codegen import gpu_choose
from moecompile.codegen.gpu_choose import Target, from_sm_90
from moecompile.codegen.gpu_weights import contiguous_layouts
from moecompile.ir.spec import ExpertsSpec
from moecompile.kernels.gpu.config import YOUNGER, Config

MOST = 12
NEAR = 0.05  # estimates this close are taken as equal: the configuration nearest the closed form goes first
FAR = 4.0  # doublings from the closed form
PER_TILE = 2  # candidates that differ in stages, warps and order alone
# Registers a thread may spend on its tile, by warps.  Compiled for sm_90, 1 of 84 candidates spilled, by 8 bytes.
REGISTERS = {4: 64, 8: 128}
REGISTERS_GRAD_Z = 32  # whose epilogue holds more: all 5 candidates with 64 spilled over 660 bytes
IN_FLIGHT = 32 * 1024  # bytes per SM that keep memory busy: 4.3 TB/s times about 0.7 us, over 132 SMs, rounded up
L2_OVER_MEMORY = 2.5  # assumed: bytes per second from L2 over those from memory

_COST_NAMES = {
    "decode_up": ("up",), "decode_down": ("down",), "grad_z": ("dz",), "grad_rows": ("dx",), "grad_matrix": ("dw_up", "dw_down"),
}  # fmt: skip


def candidates(problem: Problem, machine: Machine, block_m: int | None = None) -> list[Config]:
    """At most MOST configurations that fit the machine: the closed form, then by rising estimate, near ones first.

    `block_m` fixes the rows of a tile, where another kernel has chosen them for all.
    """
    target = target_of(machine)
    first = closed_form(problem, target, block_m)
    near = (c for c in _neighbours(problem.kernel, first) if _sensible(problem, c, machine, block_m))
    others = [c for c in near if refusal(problem, c, target) is None]
    times = {c: estimate(problem, c, machine) for c in others}
    best = min(times.values(), default=1.0)

    def order(c: Config) -> tuple[int, float, tuple[int, ...]]:
        return int(math.log(times[c] / best) / math.log(1 + NEAR)), _distance(c, first), dataclasses.astuple(c)

    chosen, alike = [first], Counter([_alike(first)])
    for config in sorted(others, key=order):
        if len(chosen) < MOST and alike[_alike(config)] < (1 if _form(config) else PER_TILE):
            chosen.append(config)
            alike[_alike(config)] += 1
    return chosen


def target_of(machine: Machine) -> Target:
    """The machine as the code generator knows it."""
    nvidia = machine.arch.startswith("sm_")
    arch = int(machine.arch.removeprefix("sm_")) if nvidia else machine.arch
    return Target("cuda" if nvidia else "hip", arch, machine.block_shared, machine.sms, machine.name)


def _neighbours(kernel: str, first: Config) -> Iterator[Config]:
    """Every other configuration of the family that is at most FAR doublings from `first`, in each of the family's forms."""
    axes = {name: values for name, values in AXES[kernel].items() if len(values) > 1 and name not in YOUNGER}
    steps = [[(v, _doublings(v, getattr(first, name))) for v in values] for name, values in axes.items()]
    for chosen in itertools.product(*steps):
        if sum(far for _, far in chosen) <= FAR:
            near = dataclasses.replace(first, **{name: value for name, (value, _) in zip(axes, chosen, strict=True)})
            yield from (c for c in (near, *(dataclasses.replace(near, **form) for form in FORMS.get(kernel, ()))) if c != first)


def _form(config: Config) -> tuple[tuple[str, int], ...]:
    """The form's axes that are not at their default: empty for the plain form."""
    return tuple((name, value) for name, value in config.plain().items() if name in YOUNGER)


def _alike(config: Config) -> tuple[object, ...]:
    """Equal for configurations of one tile, and for all of a form that is not the plain one: that is tried once."""
    return _form(config) or (config.block_m, config.block_n, config.block_k)


def _distance(a: Config, b: Config) -> float:
    """How many doublings apart two configurations are."""
    return sum(_doublings(x, y) for x, y in zip(dataclasses.astuple(a), dataclasses.astuple(b), strict=True))


def _doublings(x: int, y: int) -> float:
    """From 0 to 1 counts as one."""
    return abs(math.log2((x or 0.5) / (y or 0.5)))


def closed_form(problem: Problem, target: Target, block_m: int | None = None) -> Config:
    """What runs when nothing was measured; with `block_m`, the same brought to row tiles of that height."""
    tokens = bucket.representative(problem.bucket, problem.top_k, problem.num_experts)
    config = gpu_choose.closed_form(problem.kernel, spec_of(problem), tokens, target)
    if block_m is None or block_m == config.block_m:
        return config
    config = dataclasses.replace(config, block_m=block_m)
    for name, values in (("warps", (8,)), ("stages", (3, 2)), ("block_k", (64, 32, 16)), ("block_n", (64, 32, 16))):
        for value in values:
            if refusal(problem, config, target) is not None and (name == "warps" or value < getattr(config, name)):
                config = dataclasses.replace(config, **{name: value})
    return config


def refusal(problem: Problem, config: Config, target: Target) -> str | None:
    """Why the configuration does not fit the target, or None."""
    shared = shared_bytes(problem, config, target)
    if shared > target.shared_memory:
        return f"needs {shared} bytes of shared memory, a program has {target.shared_memory}"
    registers = tile_registers(problem, config, target.warp)
    most = REGISTERS_GRAD_Z if problem.kernel == "grad_z" else REGISTERS.get(config.warps, 64)
    if registers > most:
        return f"needs {registers} registers a thread for its tile, spills above {most}"
    return _form_refusal(problem, config, target)


def _form_refusal(problem: Problem, config: Config, target: Target) -> str | None:
    """Why the target, or the layer's sizes, do not have this form of the kernel, or None."""
    if (config.tma or config.pdl or config.swap) and not from_sm_90(target):
        wanted = "tensor descriptors" if config.tma else "dependent launches" if config.pdl else "products of 64 columns"
        return f"needs sm >= 90 for {wanted}, got {target.arch}"
    if config.split > 1 and target.backend == "hip":
        return "programs cannot share a sum on hip: its barrier does not wait for stores"
    if config.tma:
        spec = spec_of(problem)
        assert isinstance(spec, ExpertsSpec)
        return gpu_choose.no_descriptors(problem.kernel, spec, contiguous_layouts(spec), config, target)
    return None


def _sensible(problem: Problem, config: Config, machine: Machine, block_m: int | None) -> bool:
    """Leave out what no shape wants, tiles wider than the matrix, and row tiles of another height than is fixed."""
    if block_m is not None and config.block_m != block_m:
        return False
    if problem.kernel not in (*GEMMS, *DECODE):
        return True
    gemm = gemm_of(problem)
    return config.block_n < 2 * gemm.n and min(32, gemm.k) <= config.block_k < 2 * gemm.k and _form_pays(problem, config, machine)


def _form_pays(problem: Problem, config: Config, machine: Machine) -> bool:
    """Whether the form can do what it is for: fill the 64 rows of a tensor core, go on to a next tile, occupy more processors."""
    tokens = bucket.representative(problem.bucket, problem.top_k, problem.num_experts)
    gemm = gemm_of(problem)
    if config.swap and (config.block_m > 32 or config.block_n < 64 or problem.dtype == "float32"):
        return False
    if problem.kernel == "decode_down":
        return config.split <= problem.top_k and (config.split == 1 or tokens * -(-gemm.n // config.block_n) < 2 * machine.sms)
    if config.persistent or config.split > 1:
        tiles = _tiling(problem, config, tokens)[0]
        if config.persistent:
            return config.persistent <= _resident(problem, config, machine) and tiles > config.persistent * machine.sms
        return tiles < 2 * machine.sms and gemm.k >= 2 * config.split * config.block_k
    return True


def estimate(problem: Problem, config: Config, machine: Machine) -> float:
    """Seconds by which candidates are ordered."""
    tokens = bucket.representative(problem.bucket, problem.top_k, problem.num_experts)
    flops, bytes_ = problem_work(problem)
    if problem.kernel == "router":
        return _stream(problem, config, machine, -(-tokens // config.block_m))
    if problem.kernel == "combine":
        return _stream(problem, config, machine, tokens * -(-problem.out_features // config.block_n))
    gemm, size, resident = gemm_of(problem), DTYPES[problem.dtype], _resident(problem, config, machine)
    slots = machine.sms * resident
    if problem.kernel in DECODE:
        blocks = tokens * (config.split if problem.kernel == "decode_down" else problem.top_k) * -(-gemm.n // config.block_n)
        in_flight = config.block_n * config.block_k * gemm.accumulators * size * resident
        return bytes_ / machine.bandwidth / min(1.0, in_flight / IN_FLIGHT) / _balance(blocks, slots)
    tiles, tile_bytes, step_bytes, waste = _tiling(problem, config, tokens)
    parts = 2.0 * 4 * config.split * tokens * problem.top_k * gemm.n if config.split > 1 else 0.0  # written, and read by the last
    seconds = max(
        flops * waste / machine.flops,
        bytes_ / machine.bandwidth / min(1.0, config.stages * step_bytes * resident / IN_FLIGHT),
        (tiles * tile_bytes + parts) / (L2_OVER_MEMORY * machine.bandwidth),
    )
    return seconds / _balance(tiles * config.split, slots)


def _stream(problem: Problem, config: Config, machine: Machine, blocks: int) -> float:
    """A kernel that multiplies nothing: few elements a thread leave memory idle, many leave SMs idle."""
    lanes = tile_registers(problem, config, machine.warp)
    return machine.seconds(*problem_work(problem)) / _balance(blocks, machine.sms * 8) * (1 + 1 / lanes + lanes / 256)


def _tiling(problem: Problem, config: Config, tokens: int) -> tuple[float, float, float, float]:
    """Output tiles, bytes one of them reads, bytes of weights (for a gradient, of rows) of one step, computed over useful FLOPs."""
    gemm, size = gemm_of(problem), DTYPES[problem.dtype]
    rows = tokens * problem.top_k
    padded = rows / _padding(problem.shape, tokens, config.block_m)
    if problem.kernel in GROUPED:
        columns, steps = -(-gemm.n // config.block_n), -(-gemm.k // config.block_k)
        side = config.block_m + config.block_n * gemm.accumulators
        passes = problem.projections if problem.kernel == "grad_rows" else 1
        waste = padded / rows * columns * config.block_n / gemm.n * steps * config.block_k / gemm.k
        step = config.block_n * gemm.accumulators * config.block_k * size
        return padded / config.block_m * columns, side * steps * passes * config.block_k * size, step, waste
    down, across = -(-gemm.n // config.block_n), -(-gemm.k // config.block_k)
    side = config.block_n + config.block_k
    waste = padded / rows * down * config.block_n / gemm.n * across * config.block_k / gemm.k
    tiles = float(problem.num_experts * down * across * (problem.projections + 1))
    return tiles, side * padded / problem.num_experts * size, side * config.block_m * size, waste


@lru_cache(4096)
def _padding(shape: cost.Shape, tokens: int, block: int) -> float:
    return cost.padding_efficiency(shape, tokens, block)


def _resident(problem: Problem, config: Config, machine: Machine) -> int:
    """Blocks that one SM holds at a time."""
    registers = min(machine.thread_registers, tile_registers(problem, config, machine.warp) + 48)
    by_registers = machine.registers // (config.warps * machine.warp * registers)
    shared = shared_bytes(problem, config, target_of(machine))
    return max(1, min(by_registers, machine.shared // shared if shared else 16, 16))


def _balance(tiles: float, slots: int) -> float:
    """Work done over work paid for when tiles run in waves of `slots`."""
    return tiles / (math.ceil(tiles / slots) * slots)


@lru_cache(1024)
def problem_work(problem: Problem, distinct: float | None = None) -> tuple[float, float]:
    """FLOPs and bytes of the problem's kernels at the bucket's representative token count, where `distinct` experts are hit."""
    tokens = bucket.representative(problem.bucket, problem.top_k, problem.num_experts)
    if problem.kernel == "router":  # float32 logits in, weights and ids out
        return 0.0, tokens * (4.0 * problem.num_experts + 12.0 * problem.top_k)
    found = cost.work((*cost.FORWARD, *cost.BACKWARD), problem.shape, tokens, distinct=distinct)
    parts = [found[name] for name in _COST_NAMES.get(problem.kernel, (problem.kernel,))]
    return sum(flops for flops, _ in parts), sum(bytes_ for _, bytes_ in parts)


def floor_seconds(problem: Problem, machine: Machine, distinct: float | None = None) -> float:
    """Least time of the problem's kernel on the machine."""
    return machine.seconds(*problem_work(problem, distinct))

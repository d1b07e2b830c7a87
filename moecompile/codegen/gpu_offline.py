"""Kernels compiled for a GPU that is not there: what the compiler says of registers, spills, shared memory, instructions.

Everything comes from the compiler's own output, nothing is estimated but the occupancy, which follows from it.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from typing import Any

import torch

from moecompile.codegen.gpu_choose import Target
from moecompile.codegen.gpu_weights import Layouts, interleaved
from moecompile.errors import BuildError
from moecompile.ir.spec import ExpertsSpec
from moecompile.kernels.gpu.config import Config, Kernel

INSTRUCTIONS = ("tcgen05.mma", "wgmma.mma_async", "mma.sync", "v_mfma", "cp.async", "cp.async.bulk")
INT32 = ("TILE_MAP", "ORDER", "OFFSETS", "PLACE", "COUNTS", "TOTALS", "TICKETS")
FLOAT32 = ("MAIN", "PARTS", "SCALE", "DS", "LOGITS", "BIAS", "WEIGHTS")
REGISTERS = 65_536  # 32-bit registers of an SM


@dataclass(frozen=True)
class Built:
    """One kernel on one target. `registers` a thread; `spills` bytes of local memory a thread (0: none); `shared` bytes a
    program; `instructions`: which of INSTRUCTIONS occur; `wide`: whether operands come in by 16 bytes; `programs`: how many
    fit one SM or CU by registers, shared memory and threads; `assembly`: what the rest was read from."""

    function: str
    target: Target
    registers: int
    spills: int
    shared: int
    instructions: frozenset[str]
    wide: bool
    programs: int
    assembly: str = field(repr=False)


def signature(function: Any, spec: ExpertsSpec | None, layouts: Layouts | None, config: Config) -> dict[str, str]:
    """The type of each argument, as the launcher would find it: capitals are pointers or descriptors, the rest sizes."""
    data = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}
    types: dict[str, str] = {}
    tables: set[str] = set()
    described: dict[str, list[int]] = {}
    if layouts is not None and spec is not None:
        parts = [*layouts.projections, *layouts.projection_bias, layouts.down, layouts.down_bias]
        tables = {w.arg for w in parts if w is not None and not w.stacked}
        if config.tma:
            wide = 2 if interleaved(spec, layouts) else 1
            described = {w.arg: w.block(config, wide) for w in layouts.projections}
            described["D"] = layouts.down.block(config)
    for name in function.arg_names:
        if not name.isupper() or name in ("R", "T"):
            types[name] = "i32"
        elif name in described and spec is not None:
            types[name] = f"tensordesc<{data[spec.dtype].strip('*')}{described[name]}>"
        elif name in INT32:
            types[name] = "*i32"
        elif name in ("IDS", "MAINS") or name in tables:
            types[name] = "*i64"
        elif name in FLOAT32 or spec is None:
            types[name] = "*fp32"
        else:
            types[name] = data[spec.dtype]
    return types


def compile_for(
    kernel: Kernel, function: str, target: Target, spec: ExpertsSpec | None = None, layouts: Layouts | None = None
) -> Built:
    """`function` of a kernel, compiled for `target` with 16-byte aligned pointers. BuildError where the compiler refuses."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    jit = getattr(kernel.module, function)
    types = signature(jit, spec, layouts, kernel.config)
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(types.values()) if kind.startswith("*")}
    source = ASTSource(fn=jit, signature=types, constexprs={}, attrs=aligned)
    try:
        built = triton.compile(source, target=GPUTarget(target.backend, target.arch, target.warp), options=kernel.options)
    except Exception as error:  # the compiler raises anything, RuntimeError from MLIR among it
        raise BuildError(f"{function} does not compile for {target.arch}: {type(error).__name__}: {error}") from error
    text = built.asm["ptx"] if target.backend == "cuda" else built.asm["amdgcn"]
    registers, spills = _cubin(built.asm["cubin"]) if target.backend == "cuda" else _amdgcn(text)
    shared = int(built.metadata.shared)
    found = frozenset(name for name in INSTRUCTIONS if name in text)
    wide = re.search(
        r"cp\.async\.c[ag]\.shared\.global \[[^\]]*\], \[[^\]]*\], 0x10|ld\.global[.a-z0-9:_]*\.v4\.b32|"
        r"ld\.global[.a-z0-9:_]*\.v2\.b64|global_load_dwordx4|buffer_load_dwordx4",
        text,
    )
    return Built(
        function,
        target,
        registers,
        spills,
        shared,
        found,
        wide is not None,
        _programs(target, kernel.config.warps, registers, shared),
        text,
    )


def _cubin(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of local memory) of a cubin, by the cuobjdump that triton brings."""
    import triton

    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    with tempfile.NamedTemporaryFile("wb", suffix=".cubin") as f:
        f.write(cubin)
        f.flush()
        said = subprocess.run([tool, "-res-usage", f.name], capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", said)
    if found is None:
        raise BuildError(f"cuobjdump does not say what a cubin uses: {said[:200]!r}")
    return int(found[1]), int(found[2]) + int(found[3])


def _amdgcn(text: str) -> tuple[int, int]:
    """(vector registers, bytes of scratch) from the metadata of AMD assembly."""

    def number(key: str) -> int:
        found = re.search(rf"\.{key}:\s+(\d+)", text)
        return int(found[1]) if found else 0

    return number("vgpr_count"), number("private_segment_fixed_size") + 4 * number("vgpr_spill_count")


def _programs(target: Target, warps: int, registers: int, shared: int) -> int:
    """Programs that fit one SM (of 65,536 registers and the target's shared memory) or one CU (4 SIMDs of 512 registers)."""
    by_shared = target.shared_memory // shared if shared else 32
    if target.backend == "hip":
        waves = 4 * min(8, 512 // max(1, -(-registers // 8) * 8))
        return max(0, min(by_shared, waves // warps))
    per_warp = -(-registers * 32 // 256) * 256
    return max(0, min(by_shared, REGISTERS // (per_warp * warps), 2048 // (32 * warps), 32))

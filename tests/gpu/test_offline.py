"""Every kernel family compiled for GPUs that are not there: no spills, shared memory within limits, tensor cores used.

Runs in an ordinary pytest process (not under TRITON_INTERPRET); prints its table with -s. tests/gpu/golden/offline.json
holds what the compiler said; MOE_UPDATE_GOLDEN=1 writes it anew.
"""

from __future__ import annotations

import json
import os
import pathlib
import random
import re

import pytest
import torch

from moecompile.analysis.machine import MACHINES
from moecompile.autotune import candidates, family, key, offline, pack, source
from moecompile.autotune.entry import Compiled
from moecompile.codegen import gpu_choose, gpu_load, gpu_offline, gpu_text, gpu_weights
from moecompile.codegen.gpu_choose import TARGETS
from moecompile.ir.spec import WeightOn
from moecompile.kernels.gpu.config import Config
from tests.gpu import families, layers

triton = pytest.importorskip("triton")
GOLDEN = pathlib.Path(__file__).parent / "golden" / "offline.json"
LAYERS = {
    # Qwen3-30B-A3B; gpt-oss-120b with its biases and interleaved, transposed weights; Llama 4 in float16, weights on the input
    "qwen3": layers.make(E=128, K=8, H=2048, F=768, dtype=torch.bfloat16),
    "gpt-oss": layers.make(
        E=128,
        K=4,
        H=2880,
        F=2880,
        layout="interleaved-transposed",
        activation=layers.ACTIVATIONS["clamped"],
        bias=True,
        dtype=torch.bfloat16,
    ),
    "llama4": layers.make(E=16, K=1, H=5120, F=8192, layout="transposed", on=WeightOn.INPUT, dtype=torch.float16),
    "mixtral-loops": layers.make(E=8, K=2, H=4096, F=14336, layout="separate", dtype=torch.bfloat16),
    "float32": layers.make(E=8, K=2, H=256, F=512, activation=layers.ACTIVATIONS["gelu"]),
}
ROWS = (0.03, 8.0, 512.0)  # per expert
CASES = [("qwen3", target, rows) for target in TARGETS for rows in ROWS]
CASES += [(name, "sm_90", 512.0) for name in LAYERS if name != "qwen3"]
CASES += [("gpt-oss", target, rows) for target in TARGETS for rows in (0.03, 512.0) if (target, rows) != ("sm_90", 512.0)]
EXPECTED = {
    "sm_80": ({"mma.sync"}, {"mma.sync"}),
    "sm_90": ({"mma.sync", "wgmma.mma_async"}, {"wgmma.mma_async"}),
    "sm_100": ({"mma.sync", "tcgen05.mma"}, {"tcgen05.mma"}),
    "gfx942": ({"v_mfma"}, {"v_mfma"}),
}
MACHINE = {"sm_80": "A100", "sm_90": "H200", "sm_100": "B200", "gfx942": "MI300X"}
SHARES: dict[str, float] = {}  # of the floor, as autotune's estimate predicts; nothing of it was timed
VERSION = ".".join(triton.__version__.split(".")[:2])
SPILT = {("3.6", "mixtral-loops", "grad_z", "sm_90"): 8}  # two registers of the epilogue, outside the loop
SPILLS: dict[str, int] = {}  # bytes
HALF_WIDE = ("gpt-oss", "llama4")  # transposed weights: rows of the transposed operand come in by what divides


@pytest.mark.slow
@pytest.mark.parametrize("name,target_name,rows", CASES, ids=str)
def test_every_family_compiles(name: str, target_name: str, rows: float, record: dict[str, list[int | str]]) -> None:
    spec, target = LAYERS[name], TARGETS[target_name]
    tokens = max(1, int(rows * spec.num_experts / spec.top_k))
    small, large = EXPECTED[target_name]
    for form, function, kernel in families.of_experts(spec, tokens, target):
        built = gpu_offline.compile_for(kernel, function, target, spec, gpu_weights.contiguous_layouts(spec))
        where = f"{name} {form} {target_name} at {rows} rows an expert"
        assert built.spills <= SPILT.get((VERSION, name, form, target_name), 0), f"{where}: {built.spills} bytes spilt"
        assert built.shared <= target.shared_memory, where
        if function in families.GEMMS and spec.dtype != torch.float32:
            used = built.instructions & {"mma.sync", "wgmma.mma_async", "tcgen05.mma", "v_mfma"}
            assert used & (large if kernel.config.block_m >= 64 else small), f"{where}: {sorted(built.instructions)}"
            assert built.wide or name in HALF_WIDE or target.backend == "hip", f"{where}: no 16-byte loads"
        problem = key.problem_of(function, spec, tokens) if function in family.AXES else None
        if problem is not None:
            machine = MACHINES[MACHINE[target_name]]
            share = candidates.floor_seconds(problem, machine) / candidates.estimate(problem, kernel.config, machine)
            SHARES[f"{name}, {form}, {target_name}, {rows:g}"] = share
        SPILLS[f"{name}, {form}, {target_name}, {rows:g}"] = built.spills
        record[f"{name}, {form}, {target_name}, {rows:g}"] = [
            built.registers, built.shared, built.programs, " ".join(sorted(built.instructions))
        ]  # fmt: skip


MODERN = {"sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma"}
NVIDIA = ("sm_80", "sm_90", "sm_100")
FORMS = {  # family, its options, config, and for each target what has to be among the instructions
    "up swapped": ("up", {"train": False}, Config(16, 64, 128, 4, 3, swap=1), MODERN),
    "down swapped": ("down", {}, Config(32, 128, 128, 4, 3, swap=1), MODERN),
    "up tma": ("up", {"train": True}, Config(128, 128, 64, 8, 3, tma=1), MODERN),
    "down tma": ("down", {}, Config(64, 128, 64, 4, 4, tma=1), MODERN),
    "down swapped tma": ("down", {}, Config(16, 128, 128, 4, 3, swap=1, tma=1), MODERN),
    "up persistent": ("up", {"train": True}, Config(64, 64, 64, 4, 2, persistent=2), dict.fromkeys(TARGETS, "")),
    "up persistent tma": ("up", {"train": True}, Config(128, 128, 64, 8, 3, persistent=1, tma=1), MODERN),
    "down persistent": ("down", {}, Config(128, 128, 64, 8, 2, persistent=1), dict.fromkeys(TARGETS, "")),
    "grad_rows persistent": ("grad_rows", {"parts": False}, Config(128, 128, 64, 8, 2, persistent=1), dict.fromkeys(TARGETS, "")),
    "down split": ("down", {}, Config(16, 128, 64, 4, 3, split=4), dict.fromkeys(NVIDIA, "mma.sync")),
    "decode_down split": ("decode_down", {}, Config(1, 16, 256, 4, 3, split=4), dict.fromkeys(NVIDIA, "")),
    "decode_down pdl": ("decode_down", {}, Config(1, 16, 256, 4, 3, pdl=1), dict.fromkeys(MODERN, "")),
    "decode_up signals": ("decode_up", {"signals": True}, Config(1, 16, 256, 4, 3), dict.fromkeys(MODERN, "")),
}


@pytest.mark.parametrize("form,target_name", [(form, target) for form in FORMS for target in FORMS[form][3]], ids=str)
def test_every_form_compiles(form: str, target_name: str, record: dict[str, list[int | str]]) -> None:
    family_, options, config, wanted = FORMS[form]
    spec, target = LAYERS["qwen3"], TARGETS[target_name]
    layouts = gpu_weights.contiguous_layouts(spec)
    assert gpu_choose.allowed(family_, spec, layouts, config, target) == config
    text = gpu_text.experts_text(spec, layouts, family_, config, gpu_text.Style(), tuple(sorted(options.items())))
    built = gpu_offline.compile_for(gpu_load.load(family_, config, text), family_, target, spec, layouts)
    assert built.spills == 0 and built.shared <= target.shared_memory
    assert not wanted[target_name] or wanted[target_name] in built.instructions
    assert ("cp.async.bulk" in built.instructions) == bool(config.tma)
    assert built.assembly.count("griddepcontrol.wait") == config.pdl
    assert built.assembly.count("griddepcontrol.launch_dependents") == int(form == "decode_up signals")
    if config.split > 1:
        _stores_come_before_the_ticket(built.assembly)
    SPILLS[f"qwen3, {form}, {target_name}"] = built.spills
    record[f"qwen3, {form}, {target_name}"] = [
        built.registers, built.shared, built.programs, " ".join(sorted(built.instructions))
    ]  # fmt: skip


def _stores_come_before_the_ticket(ptx: str) -> None:
    """The one atomic is an acq_rel addition at device scope between two barriers; the parts are stored before the first, and
    loaded, past L1, after the second."""
    lines = [line for line in ptx.splitlines() if re.search(r"st\.global|ld\.global|atom\.|bar\.sync", line)]
    drawn = [i for i, line in enumerate(lines) if "atom." in line]
    assert len(drawn) == 1 and "atom.global.gpu.acq_rel.add.u32" in lines[drawn[0]]
    before, after = lines[: drawn[0]], lines[drawn[0] + 1 :]
    last_barrier = max(i for i, line in enumerate(before) if "bar.sync" in line)
    assert not [line for line in before[last_barrier:] if "global" in line]
    assert [line for line in before if "st.global" in line]
    loads = [i for i, line in enumerate(after) if "ld.global.cg" in line]
    assert loads and min(loads) > min(i for i, line in enumerate(after) if "bar.sync" in line)


def test_on_amd_a_barrier_does_not_wait_for_stores() -> None:
    """Why no sum is split there. When this fails, Triton waits: the refusal of splits on hip can go."""
    spec, config, target = LAYERS["qwen3"], Config(16, 128, 64, 4, 2, split=4), TARGETS["gfx942"]
    layouts = gpu_weights.contiguous_layouts(spec)
    text = gpu_text.experts_text(spec, layouts, "down", config, gpu_text.Style())
    built = gpu_offline.compile_for(gpu_load.load("down", config, text), "down", target, spec, layouts)
    between = built.assembly[: built.assembly.index("buffer_wbl2")].rsplit("global_store_dwordx4", 1)[1]
    assert "s_barrier" in between and "vmcnt" not in between[: between.index("s_barrier")]
    assert gpu_choose.allowed("down", spec, layouts, config, target).split == 1


@pytest.mark.parametrize(
    "spec", (families.QWEN_ROUTER, families.DEEPSEEK_ROUTER, families.BIASED_ROUTER), ids=lambda s: str(s.num_experts)
)
@pytest.mark.parametrize("target_name", TARGETS)
def test_the_router_compiles(spec: gpu_offline.Any, target_name: str) -> None:
    for tokens in (1, 8192):
        target = TARGETS[target_name]
        for form, function, kernel in families.of_router(spec, tokens, target):
            built = gpu_offline.compile_for(kernel, function, target)
            assert built.spills == 0, f"{form} {target_name} T={tokens}: {built.spills} bytes spilt"
            print(f"{form} {target_name} T={tokens}: {built.registers} registers, {built.shared} shared")


@pytest.mark.slow
@pytest.mark.parametrize("arch", TARGETS)
def test_what_ships_still_compiles(arch: str) -> None:
    """A few entries of each shipped pack, by the kernels as they are now; `moecompile ship` makes the packs anew."""
    entries = [e for e in pack.read(source.SHIPPED / f"{arch}.json") if isinstance(e, Compiled)]
    for entry in random.Random(arch).sample(entries, 4):
        target = candidates.target_of(MACHINES[entry.device])
        assert offline.compiled(entry.problem, entry.config, target) is not None, f"{entry.problem} {entry.config}"


@pytest.mark.parametrize("op", sorted(layers.expr.OPS))
def test_every_op_of_an_activation_compiles(op: str) -> None:
    arity = layers.expr.OPS[op].arity
    activation = (
        "add",
        (op, ("in", 0), ("in", 1))[: 1 + arity],
        (op, layers.expr.const(0.5), ("in", 1))[: 1 + arity] if arity > 1 else ("in", 1),
    )
    spec = layers.make(E=2, K=1, H=64, F=64, activation=activation, dtype=torch.bfloat16)
    for target_name in ("sm_90", "gfx942"):
        target = TARGETS[target_name]
        for form, function, kernel in families.of_experts(spec, 64, target):
            if form in ("up (train)", "grad_z"):
                gpu_offline.compile_for(kernel, function, target, spec, gpu_weights.contiguous_layouts(spec))


@pytest.fixture(scope="module")
def record() -> gpu_offline.Any:
    """What was built, held against the golden file at the end: registers may move by an eighth, instructions may not."""
    found: dict[str, list[int | str]] = {}
    yield found
    print(f"\n{'layer, kernel, target, rows an expert':44} registers spills  shared programs/SM predicted  instructions")
    for name, (registers, shared, programs, instructions) in found.items():
        share = f"{SHARES[name]:4.0%}" if name in SHARES else "   -"
        print(f"{name:44} {registers:>9} {SPILLS[name]:>6} {shared:>7} {programs:>11} {share:>9}  {instructions}")
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    if os.environ.get("MOE_UPDATE_GOLDEN"):
        golden[VERSION] = {**golden.get(VERSION, {}), **found}
        parts = []
        for version, values in sorted(golden.items()):
            lines = [f'"{k}": {json.dumps(v)}' for k, v in sorted(values.items())]
            parts.append(f'"{version}": {{\n' + ",\n".join(lines) + "\n}")
        GOLDEN.write_text("{\n" + ",\n".join(parts) + "\n}\n")
        return
    for name, values in golden.get(VERSION, {}).items():
        if name in found:
            assert found[name][3] == values[3], f"{name}: instructions {found[name][3]!r}, were {values[3]!r}"
            assert found[name][0] <= values[0] * 1.125, f"{name}: {found[name][0]} registers, were {values[0]}"
            assert found[name][1] == values[1], f"{name}: {found[name][1]} bytes of shared memory, were {values[1]}"

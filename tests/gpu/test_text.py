"""The generated sources: goldens that people read, and what no source may contain.

Runs in an ordinary pytest process. MOE_UPDATE_GOLDEN=1 writes the goldens anew.
"""

from __future__ import annotations

import ast
import dataclasses
import os
import pathlib
import re

import pytest
import torch

from moecompile.codegen import gpu, gpu_choose, gpu_expr, gpu_router_text, gpu_text, gpu_weights
from moecompile.codegen.gpu import Config, supports_experts, supports_router
from moecompile.errors import Unsupported
from moecompile.ir import expr
from moecompile.ir.spec import OutOfRange, RouterSpec, Weight, WeightOn
from tests.gpu import families, layers

GOLDEN = pathlib.Path(__file__).parent / "golden"
SPEC = layers.make(E=8, K=2, H=64, F=96, bias=True, activation=layers.ACTIVATIONS["clamped"], dtype=torch.bfloat16)
PLAIN = layers.make(E=8, K=2, H=64, F=96, layout="separate", activation=layers.ACTIVATIONS["relu2"], dtype=torch.float16)
TRANSPOSED = layers.make(E=8, K=2, H=64, F=80, bias=True, layout="interleaved-transposed", dtype=torch.bfloat16)
CONFIG = Config(16, 32, 32, 4, 3)


SWAPPED = dataclasses.replace(CONFIG, swap=1, tma=1)
SPLIT = dataclasses.replace(CONFIG, split=4)


def text(spec: object, family: str, config: Config = CONFIG, **options: object) -> str:
    given = tuple(sorted(options.items()))
    return gpu_text.experts_text(spec, gpu_weights.contiguous_layouts(spec), family, config, gpu_text.Style(), given)  # type: ignore[arg-type]


TICKET = 'tl.atomic_add(ticket_at, 1, sem="acq_rel", scope="gpu") < SPLIT - 1'  # the one atomic there is: of an integer
GOLDENS = {
    "up": lambda: text(SPEC, "up", train=True),
    "up_separate": lambda: text(PLAIN, "up", train=False),
    "up_interleaved": lambda: text(TRANSPOSED, "up", train=False),
    "up_swapped": lambda: text(SPEC, "up", SWAPPED, train=False),
    "up_persistent": lambda: text(TRANSPOSED, "up", dataclasses.replace(CONFIG, persistent=2, tma=1), train=False),
    "down": lambda: text(SPEC, "down"),
    "down_split": lambda: text(SPEC, "down", SPLIT),
    "combine": lambda: text(SPEC, "combine", width=64, scaled=True),
    "decode_up": lambda: text(PLAIN, "decode_up"),
    "decode_up_signals": lambda: text(PLAIN, "decode_up", signals=True),
    "decode_down": lambda: text(SPEC, "decode_down"),
    "decode_down_split": lambda: text(SPEC, "decode_down", dataclasses.replace(SPLIT, pdl=1)),
    "grad_z": lambda: text(SPEC, "grad_z", need_y=True, parts=True),
    "grad_rows": lambda: text(SPEC, "grad_rows", parts=False),
    "grad_weights": lambda: text(SPEC, "grad_weights", num_parts=3),
    "grad_matrix": lambda: text(SPEC, "grad_matrix", which="w", into=""),
    "grad_matrix_main": lambda: text(TRANSPOSED, "grad_matrix", which="w", into="main"),
    "decode_up_interleaved": lambda: text(TRANSPOSED, "decode_up"),
    "grad_z_interleaved": lambda: text(TRANSPOSED, "grad_z", need_y=False, parts=False),
    "grad_rows_interleaved": lambda: text(TRANSPOSED, "grad_rows", parts=False),
    "grad_vector": lambda: text(SPEC, "grad_vector", which="db", into=""),
    "grad_vector_mains": lambda: text(SPEC, "grad_vector", which="b1", into="mains"),
    "permute": lambda: gpu_text.permute_text(SPEC, Config(256, 1, 1, 4, 1), 16),
    "router": lambda: gpu_router_text.router_text(families.DEEPSEEK_ROUTER, Config(1, 1, 1, 4, 1), torch.float32, torch.float32),
    "router_stats": lambda: gpu_router_text.router_text(families.QWEN_ROUTER, Config(4, 1, 1, 4, 1), torch.float32, None, True),
    "grad_router_stats": lambda: gpu_router_text.grad_router_text(
        families.QWEN_ROUTER, Config(4, 1, 1, 4, 1), torch.float32, None, True
    ),
    "grad_router": lambda: gpu_router_text.grad_router_text(
        families.BIASED_ROUTER, Config(4, 1, 1, 4, 1), torch.float32, torch.float32
    ),
}


@pytest.mark.parametrize("name", GOLDENS)
def test_golden(name: str) -> None:
    path, source = GOLDEN / f"{name}.txt", GOLDENS[name]()
    if os.environ.get("MOE_UPDATE_GOLDEN"):
        path.write_text(source)
    assert source == path.read_text(), f"{path.name} differs; MOE_UPDATE_GOLDEN=1 writes it anew"


@pytest.mark.parametrize("name", GOLDENS)
def test_a_source_is_bit_repeatable_and_never_waits(name: str) -> None:
    source = GOLDENS[name]()
    ast.parse(source)
    assert source.count("atomic") == source.count(TICKET) == name.endswith("_split")
    assert ".item(" not in source and ".cpu(" not in source
    assert source.isascii() and not [line for line in source.splitlines() if line != line.rstrip()]
    assert re.match(r"# moe \w+: .*\n# blocks .*, key [0-9a-f]{16}\n", source)


def test_launches_never_wait() -> None:
    root = pathlib.Path(gpu.__file__).resolve().parents[2]
    for path in [*(root / "kernels" / "gpu").glob("*.py"), *(root / "moecompile" / "codegen").glob("gpu*.py")]:
        for call in (".item(", ".tolist(", ".cpu(", "synchronize", ".nonzero(", "atomic_"):
            assert call not in path.read_text().replace(TICKET, ""), f"{path.name} has {call}"


def test_loaded_indices_are_int64_before_they_meet_a_stride() -> None:
    """Every row, token and expert that was loaded is cast: an expression that multiplies it by a stride names the cast."""
    for name in GOLDENS:
        for line in GOLDENS[name]().splitlines():
            for index in ("row", "token", "e", "pair"):
                wrong = re.search(rf"(?<![\w.]){index}(\[:, None\]|\[None, :\])? \* (H|F|O|N|\d{{2,}})\b", line)
                assert wrong is None, f"{name}: {line.strip()}"


def test_a_kernel_that_starts_early_waits_before_it_reads() -> None:
    lines = GOLDENS["decode_down_split"]().splitlines()
    wait = next(i for i, line in enumerate(lines) if "gdc_wait" in line)
    assert not [line for line in lines[:wait] if "tl.load" in line or "tl.store" in line]
    assert "gdc" not in GOLDENS["decode_down"]() + GOLDENS["decode_up"]()
    interpreted = gpu_text.Style(interpret=True)
    layouts = gpu_weights.contiguous_layouts(SPEC)
    for family, given in (("decode_down", ()), ("decode_up", (("signals", True),))):
        assert "gdc" not in gpu_text.experts_text(SPEC, layouts, family, dataclasses.replace(CONFIG, pdl=1), interpreted, given)


def test_parts_are_stored_before_the_ticket_is_drawn_and_read_after() -> None:
    for name in ("down_split", "decode_down_split"):
        lines = GOLDENS[name]().splitlines()
        stored, barrier, drawn, reset, read = (
            next(i for i, line in enumerate(lines) if mark in line)
            for mark in ("tl.store(parts_at", "tl.debug_barrier()", TICKET, "tl.store(ticket_at, 0)", "tl.load(parts_at")
        )
        assert stored < barrier < drawn < reset < read
        assert all('cache_modifier=".cg"' in line for line in lines if "tl.load(parts_at" in line)


def test_the_forms_that_a_target_lacks_are_left_out() -> None:
    layouts = gpu_weights.contiguous_layouts(SPEC)
    for name, target in gpu_choose.TARGETS.items():
        modern = name in ("sm_90", "sm_100")
        for family, config in (("up", SWAPPED), ("down", SPLIT), ("decode_down", dataclasses.replace(SPLIT, pdl=1))):
            found = gpu_choose.allowed(family, SPEC, layouts, config, target)
            assert found.tma == (config.tma if modern else 0)
            assert found.pdl == (config.pdl if modern else 0)
            assert found.split == (1 if name == "gfx942" else config.split)


@pytest.mark.parametrize(
    "numbers", ({"swap": 2}, {"persistent": 9}, {"split": 3}, {"tma": True}, {"split": 2, "persistent": 1}), ids=str
)
def test_a_config_refuses_what_it_cannot_mean(numbers: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"config: {next(iter(numbers))}"):
        dataclasses.replace(CONFIG, **numbers)


def test_the_key_covers_numbers_and_spec() -> None:
    keys = {re.search(r"key (\w+)", GOLDENS[name]())[1] for name in GOLDENS}  # type: ignore[index]
    assert len(keys) == len(GOLDENS)


@pytest.mark.parametrize("name", layers.ACTIVATIONS)
def test_spliced_lines_compute_the_expression(name: str) -> None:
    """Value and derivatives, run as Python with torch in place of tl."""
    activation = layers.ACTIVATIONS[name]
    wanted = [("y", activation), *((f"dh{i}", expr.derivative(activation, i)) for i in sorted(expr.inputs_of(activation)))]

    class Language:
        sigmoid, erf, exp, where = torch.sigmoid, torch.erf, torch.exp, torch.where

        class PropagateNan:
            ALL = None

        @staticmethod
        def maximum(a: object, b: object, propagate_nan: object) -> torch.Tensor:
            return torch.maximum(torch.as_tensor(a, dtype=torch.float64), torch.as_tensor(b, dtype=torch.float64))

        @staticmethod
        def minimum(a: object, b: object, propagate_nan: object) -> torch.Tensor:
            return torch.minimum(torch.as_tensor(a, dtype=torch.float64), torch.as_tensor(b, dtype=torch.float64))

    h = [torch.linspace(-9, 9, 41, dtype=torch.float64), torch.linspace(8, -8, 41, dtype=torch.float64)]
    scope = {"tl": Language, "h0": h[0], "h1": h[1]}
    lines = compile(gpu_expr.splice(wanted, indent=""), "spliced", "exec")
    exec(lines, scope)
    for key, e in wanted:
        got, want = torch.as_tensor(scope[key]), torch.as_tensor(expr.evaluate(e, h), dtype=torch.float64)
        torch.testing.assert_close(got.expand_as(want), want)


def test_refusals_are_sentences() -> None:
    wide = layers.make(dtype=torch.float64)
    assert "float64" in (supports_experts(wide) or "")
    assert supports_experts(layers.make()) is None
    assert supports_experts(layers.make(), train=True) is None
    tied = Weight((0,), (3, 32, 32), 0, 1024, 32, 1)
    spec = gpu.dataclasses.replace(layers.make(F=32), projections=(tied, tied))
    assert supports_experts(spec) is None
    assert "share elements" in (supports_experts(spec, train=True) or "")
    router = RouterSpec(8, 2, "softmax", torch.float64, False, None, "score", (), True)
    assert "float64" in (supports_router(router) or "")
    with pytest.raises(Unsupported, match="float64"):
        gpu.prepare_experts(wide, train=False)
    with pytest.raises(Unsupported, match="float64"):
        gpu.prepare_router(router)


def test_prepare_loads() -> None:
    gpu.prepare_experts(layers.make(dtype=torch.bfloat16, on=WeightOn.INPUT, out_of_range=OutOfRange.INDEX), train=True)
    gpu.prepare_router(families.QWEN_ROUTER)


@pytest.mark.parametrize("target", gpu_choose.TARGETS.values(), ids=list(gpu_choose.TARGETS))
@pytest.mark.parametrize("family", [f for f in gpu_text.FAMILIES if "router" not in f])
def test_the_closed_form_answers_for_every_load(family: str, target: gpu_choose.Target) -> None:
    for spec in (SPEC, PLAIN, layers.make(E=1, K=1, H=1, F=1), layers.make(E=512, K=10, H=4096, F=512, dtype=torch.bfloat16)):
        for tokens in (1, 8, 512, 32768):
            config = gpu_choose.closed_form(family, spec, tokens, target)
            if family in families.GEMMS:
                assert min(config.block_m, config.block_n, config.block_k) >= 16
                sums = len(spec.projections) if family == "up" else 1
                assert gpu_choose.shared_bytes(config, sums, spec.dtype) <= target.shared_memory


def test_a_source_of_configs_is_asked_first_and_forgotten() -> None:
    mine = Config(32, 16, 16, 8, 2)
    asked = []
    gpu.set_config_source(lambda family, spec, tokens, target: asked.append((family, tokens)) or (mine if family == "up" else None))
    try:
        target = gpu_choose.TARGETS["sm_90"]
        assert gpu.choose("up", SPEC, 64, target) == mine
        assert gpu.choose("down", SPEC, 64, target) == gpu_choose.closed_form("down", SPEC, 64, target)
        assert asked == [("up", 64), ("down", 64)]
    finally:
        gpu.set_config_source(None)
    assert gpu.choose("up", SPEC, 64, target) == gpu_choose.closed_form("up", SPEC, 64, target)

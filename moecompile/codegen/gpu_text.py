"""From a layer's spec, the layout of its weights and a config to the source text of one Triton module.

A template of kernels.gpu is filled with sizes, strides, masks where a size does not divide, and the activation or its
derivatives as lines of float32 arithmetic.  What a layer does not need is not in its text.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jinja2
import torch

from moecompile.codegen.gpu_expr import number, splice
from moecompile.codegen.gpu_weights import TYPES, Layout, Layouts, interleaved, named, read_together
from moecompile.ir import expr
from moecompile.ir.spec import ExpertsSpec, OutOfRange, WeightOn
from moecompile.kernels.gpu import (
    combine,
    decode,
    down,
    grad_params,
    grad_router,
    grad_rows,
    grad_weights,
    grad_z,
    permute,
    router,
    tile,
    up,
)
from moecompile.kernels.gpu.config import YOUNGER, Config

TEMPLATES = {
    "programs": tile.PROGRAMS,
    "tile": tile.SOURCE,
    "permute": permute.SOURCE,
    "up": up.SOURCE,
    "down": down.SOURCE,
    "combine": combine.SOURCE,
    "decode_up": decode.UP,
    "decode_down": decode.DOWN,
    "grad_z": grad_z.SOURCE,
    "grad_rows": grad_rows.SOURCE,
    "grad_weights": grad_weights.SOURCE,
    "grad_matrix": grad_params.MATRIX,
    "grad_vector": grad_params.VECTOR,
    "router_score": router.SCORE,
    "router_post": router.POST,
    "router_softmax": router.SOFTMAX,
    "router": router.SOURCE,
    "grad_router": grad_router.SOURCE,
}
FAMILIES = tuple(name for name in TEMPLATES if name not in ("programs", "tile", "router_score", "router_post"))


def next_power(value: int) -> int:
    """The least power of two that is at least `value`, for value >= 1."""
    return 1 << (value - 1).bit_length()


def _load(pointer: str, *conditions: Any, cache: str = "") -> str:
    mask = " & ".join(c for c in conditions if c)
    options = (f", mask={mask}, other=0.0" if mask else "") + (f', cache_modifier="{cache}"' if cache else "")
    return f"tl.load({pointer}{options})"


def _store(pointer: str, value: str, *conditions: Any) -> str:
    mask = " & ".join(c for c in conditions if c)
    return f"tl.store({pointer}, {value}, mask={mask})" if mask else f"tl.store({pointer}, {value})"


def _rounded(value: str, dtype: torch.dtype) -> str:
    """A float32 value rounded to what `dtype` can hold."""
    if dtype == torch.float32:
        return value
    return f"({value}).to({TYPES[dtype]}).to(tl.float32)"


_ENVIRONMENT = jinja2.Environment(
    loader=jinja2.DictLoader(TEMPLATES),
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
_ENVIRONMENT.globals.update(load=_load, store=_store, rounded=_rounded, number=number)


def module(family: str, title: str, config: Config, constants: dict[str, int | str], context: dict[str, Any]) -> str:
    """The text: header, the constants that occur, the kernels. The key covers all of it."""
    body = _ENVIRONMENT.get_template(family).render(**constants, **context)
    used = [f"{name} = tl.constexpr({value})" for name, value in constants.items() if re.search(rf"\b{name}\b", body)]
    code = "\n".join(["import triton", "import triton.language as tl", "", *used, "", "", body.strip("\n"), ""])
    key = hashlib.sha256((title + code).encode()).hexdigest()[:16]
    numbers = f"blocks {config.block_m} x {config.block_n} x {config.block_k}, {config.warps} warps, {config.stages} stages"
    numbers += "".join(f", {axis} {value}" for axis, value in config.plain().items() if axis in YOUNGER)
    return f"# moe {family}: {title}\n# {numbers}, key {key}\n{code}"


def _form(config: Config) -> dict[str, Any]:
    """What the templates know of a config besides its block sizes."""
    split = " * SPLIT" if config.split > 1 else ""
    return {
        "swap": config.swap,
        "tma": config.tma,
        "split": config.split,
        "persistent": config.persistent,
        "deeper": 4 if config.persistent else 0,
        "jit": "@triton.jit" if config.persistent else '@triton.jit(do_not_specialize=["tiles"])',
        "tiles": "" if config.persistent else ", tiles",
        "grid": "(programs,)" if config.persistent else f"(tiles * N_TILES{split},)",
    }


def _title(spec: ExpertsSpec) -> str:
    name = str(spec.dtype).removeprefix("torch.")
    sizes = f"E={spec.num_experts} K={spec.top_k} H={spec.hidden} F={spec.intermediate} O={spec.out_features}"
    return f"{sizes} {name}, {expr.text(spec.activation)}, weight on {spec.weight_on.value}"


@dataclass(frozen=True)
class Style:
    """How a text is meant to run. `interpret`: tl.dot of 16-bit operands is widened, which the interpreter needs.
    `precision`: of float32 products, "ieee" or "tf32"."""

    interpret: bool = False
    precision: str = "ieee"

    def dot(self, dtype: torch.dtype, a: str, b: str, acc: str, swap: int = 0) -> str:
        """acc + a b; swapped, acc + b^T a^T, which is the transpose of that."""
        if swap:
            a, b = f"tl.trans({b})", f"tl.trans({a})"
        if dtype == torch.float32:
            return f'tl.dot({a}, {b}, {acc}, input_precision="{self.precision}")'
        if self.interpret:
            return f"tl.dot({a}.to(tl.float32), {b}.to(tl.float32), {acc})"
        return f"tl.dot({a}, {b}, {acc})"


def _args(layouts: Sequence[Layout | None]) -> str:
    return "".join(f"{w.arg}, " for w in layouts if w is not None)


@lru_cache(4096)
def experts_text(
    spec: ExpertsSpec, layouts: Layouts, family: str, config: Config, style: Style, options: tuple[Any, ...] = ()
) -> str:
    """The module of `family` for a layer. `options`: what this use of the family needs, as (name, value) pairs:

    up            train                 the pre-activations are kept
    decode_up     signals               where true, decode_down may be launched before this has ended
    combine       width, scaled         columns of the rows; whether SCALE multiplies them
    grad_z        need_y, parts         the activated rows are kept; the routing weights get a gradient
    grad_rows     parts                 the routing weights get a gradient
    grad_weights  num_parts             columns of PARTS
    grad_matrix   which                 "w0", "w1", .. or "d"; "w" for all projections at once, see gpu_weights.gradients()
    grad_vector   which                 "b0", "b1", .. or "db"
      both        into                  "" for a gradient of its own; "main", "mains" or "mains anywhere" to add to float32
                                        main gradients: a stacked one, one per expert, those not aligned to 16 bytes
    """
    given = dict(options)
    H, F, O, P = spec.hidden, spec.intermediate, spec.out_features, len(spec.projections)
    constants: dict[str, int | str] = {"E": spec.num_experts, "K": spec.top_k, "H": H, "F": F, "O": O}
    constants |= {"BM": config.block_m, "BN": config.block_n, "BK": config.block_k, "GROUP": config.group}
    columns = {"up": F, "grad_z": F, "down": O, "grad_rows": H}.get(family)
    if columns is not None:
        constants["N_TILES"] = -(-columns // config.block_n)
    if family == "decode_down":
        constants["SPLIT"] = config.split
    if family == "down":
        steps = -(-F // config.block_k)
        constants |= {"SPLIT": config.split, "SPAN": -(-steps // config.split) * config.block_k}
    on_input, on_output = spec.weight_on is WeightOn.INPUT, spec.weight_on is WeightOn.OUTPUT
    context: dict[str, Any] = {
        "P": P,
        "interleaved": interleaved(spec, layouts),
        "W": layouts.projections,
        "B": layouts.projection_bias,
        "D": layouts.down,
        "DB": layouts.down_bias,
        "on_input": on_input,
        "on_output": on_output,
        "wraps": spec.out_of_range is OutOfRange.INDEX,
        "dtype": TYPES[spec.dtype],
        "dot": lambda a, b, acc: style.dot(spec.dtype, a, b, acc, config.swap),
        "zeros": lambda m, n: f"tl.zeros(({n}, {m}), tl.float32)" if config.swap else f"tl.zeros(({m}, {n}), tl.float32)",
        **_form(config),
    }
    if family in ("up", "decode_up"):
        context |= {
            "weights": _args([*layouts.projections, *layouts.projection_bias]),
            "activation": splice([("y", spec.activation)]),
        }
    elif family in ("down", "decode_down"):
        context["weights"] = _args([layouts.down, layouts.down_bias])
    elif family == "grad_z":
        derivatives = [(f"dh{i}", expr.derivative(spec.activation, i)) for i in range(P)]
        activation = splice([("y", spec.activation)]) if given["need_y"] or given["parts"] else ""
        context |= {"weights": _args([layouts.down]), "activation": activation, "derivatives": splice(derivatives)}
    elif family == "grad_rows":
        context |= {"weights": _args(layouts.projections), "reads": read_together(spec, layouts)}
    elif family == "combine":
        constants["N"] = given["width"]
    elif family == "grad_weights":
        bias = layouts.down_bias is not None and on_output
        context |= {"bias": bias, "weights": _args([layouts.down_bias]), "parts_block": next_power(given["num_parts"])}
    elif family in ("grad_matrix", "grad_vector"):
        context |= _grad_context(spec, layouts, given["which"], given["into"])
        constants |= {"N": context["n"], "M": context["k"], "M_TILES": -(-context["k"] // config.block_k)}
    if family.startswith("decode"):
        context["waits"] = config.pdl and not style.interpret
        context["expert"] = _ENVIRONMENT.from_string(decode.EXPERT).render(wraps=context["wraps"]).rstrip("\n")
    if family == "decode_up":
        given["signals"] = given.get("signals", False) and not style.interpret
    return module(family, _title(spec), config, constants, context | given)


def _grad_context(spec: ExpertsSpec, layouts: Layouts, which: str, into: str) -> dict[str, Any]:
    """What the gradient of weight or bias `which` sums, and where it goes: always laid out as a contiguous parameter.
    Separate parameters get their gradients as slices of one stack, unless each has a main gradient."""
    weight = spec.projections[0] if which == "w" else dict(named(spec))[which]
    H, F, O, P = spec.hidden, spec.intermediate, spec.out_features, len(spec.projections)
    stride, alternate = weight.e if weight.stacked else math.prod(weight.shape), interleaved(spec, layouts)
    n_stride = weight.n // 2 if which == "w" and alternate else weight.n
    matrix = which == "d" or which.startswith("w")
    name = into.split()[0] if into else "dw" if matrix else "db"
    mains = name == "mains"
    out = Layout(
        name, not mains, weight.offset, 0 if mains else stride, n_stride, weight.k,
        torch.float32 if into else spec.dtype, aligned=into != "mains anywhere",
    )  # fmt: skip
    of_down = which.startswith("d")
    index = "" if of_down or which == "w" else which[1:]
    scaled = spec.weight_on is (WeightOn.INPUT if matrix else WeightOn.OUTPUT) and (of_down != matrix)
    return {
        "n": O if of_down else P * F if which == "w" else F,
        "k": F if of_down else H,
        "lda": O if of_down else P * F,
        "a_column": f"(n * 2 + {index})" if index and alternate else f"(n + {int(index) * F})" if index else "n",
        "gathers_a": of_down,
        "scaled": scaled,
        "out": out,
    }


@lru_cache(1024)
def permute_text(spec: ExpertsSpec, config: Config, block_m: int) -> str:
    """Permutation kernels for tiles of `block_m` rows; config.block_m pairs a program."""
    wraps = spec.out_of_range is OutOfRange.INDEX
    constants: dict[str, int | str] = {
        "E": spec.num_experts,
        "BINS": next_power(spec.num_experts + 1),
        "BM": block_m,
        "BLOCK": config.block_m,
        "TILE_BLOCK": 16,
    }
    clean = _ENVIRONMENT.from_string(permute.CLEAN).render(wraps=wraps).rstrip("\n")
    context = {
        "clean": clean,
        "clean_other": clean.replace("pair_e", "pair_e_other"),
        "schedule": permute.SCHEDULE,
        "skipped": -2 if wraps else -1,
    }
    return module("permute", f"E={spec.num_experts}, ids out of range: {spec.out_of_range.value}", config, constants, context)

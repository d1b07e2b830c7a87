"""Small blocks for the interpreter: several tiles and ragged edges in a layer of a few dozen columns."""

from __future__ import annotations

from moecompile.codegen import gpu_choose, gpu_text
from moecompile.codegen.gpu_choose import Target
from moecompile.ir.spec import ExpertsSpec, RouterSpec
from moecompile.kernels.gpu.config import Config

ROWS = 16  # of a tile


def small(family: str, spec: ExpertsSpec | RouterSpec, tokens: int, target: Target) -> Config | None:
    """A configuration source for gpu.set_config_source; two band heights, by the parity of the expert count."""
    if isinstance(spec, RouterSpec):
        return Config(4, 1, 1, 4, 1)
    if family == "permute":
        pairs = tokens * spec.top_k
        few = pairs <= gpu_choose.FEW_PAIRS
        return Config(max(64, gpu_text.next_power(pairs)) if few else 64, 1, 1, 4, 1)
    if family in ("combine", "decode_up", "decode_down"):
        return Config(1, 16, 16, 4, 1)
    return Config(ROWS, 16, 16, 4, 2, group=2 if spec.num_experts % 2 else 1)

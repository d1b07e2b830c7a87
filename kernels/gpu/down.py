"""Grouped GEMM 2: activated rows times the down projection, rows in expert order."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from moecompile.kernels.gpu.config import Kernel
from moecompile.kernels.gpu.permute import Routing

SOURCE = '''\
@triton.jit(do_not_specialize=["tiles"])
def down(Y, {{ weights }}TILE_MAP, OFFSETS, OUT, tiles):
    """OUT[row] = Y[row] D[e]^T. Grid: (tiles * N_TILES,)."""
{% include "tile" %}
    n = column * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    y_at = Y + row64[:, None] * F + k[None, :]
    d_at = {{ D.base() }} + {{ D.at("n[None, :]", "k[:, None]") }}
    acc = tl.zeros((BM, BN), tl.float32)
    for k0 in range(0, F, BK):
        y = {{ load("y_at + k0", "live[:, None]", F % BK and "(k0 + k < F)[None, :]") }}
        d = {{ load("d_at" ~ D.step("k0"), O % BN and "(n < O)[None, :]", F % BK and "(k0 + k < F)[:, None]") }}
        acc = {{ dot("y", "d", "acc") }}
{% if DB %}
    acc += {{ load(DB.base() ~ " + " ~ DB.at("n"), O % BN and "n < O") }}.to(tl.float32)[None, :]
{% endif %}
    {{ store("OUT + row64[:, None] * O + n[None, :]", "acc.to(OUT.dtype.element_ty)", \
"live[:, None]", O % BN and "(n < O)[None, :]") }}
'''


def launch(kernel: Kernel, columns: int, y: Tensor, params: Sequence[Tensor], routing: Routing, out: Tensor) -> None:
    """y [R,F] -> out [R,O]; `columns` = O."""
    grid = (routing.bound * -(-columns // kernel.config.block_n),)
    kernel.run("down", grid, y, *params, routing.tiles, routing.offsets, out, routing.bound)

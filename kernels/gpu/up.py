"""Grouped GEMM 1: gathered rows times every projection, then the activation, rows in expert order."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from moecompile.kernels.gpu.config import Kernel
from moecompile.kernels.gpu.permute import Routing

SOURCE = '''\
@triton.jit(do_not_specialize=["tiles"])
def up(X, {{ weights }}{% if on_input %}SCALE, {% endif %}TILE_MAP, ORDER, OFFSETS, Y, {% if train %}Z, {% endif %}tiles):
    """Y[row] = activation(X[token] W0[e]^T, ..){% if train %}; Z[row] keeps what the activation reads{% endif %}. \
Grid: (tiles * N_TILES,)."""
{% include "tile" %}
    pair = tl.load(ORDER + row, mask=live, other=0)
    n = column * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    x_at = X + (pair // K).to(tl.int64)[:, None] * H + k[None, :]
{% if on_input %}
    scale = tl.load(SCALE + pair, mask=live, other=0.0).to(tl.float32)[:, None]
{% endif %}
{% if interleaved %}
    both = column * (2 * BN) + tl.arange(0, 2 * BN)  # gate and up columns alternate in memory
    w_at = {{ W[0].base() }} + both[None, :] + {{ W[0].along("k[:, None]") }}
    acc = tl.zeros((BM, 2 * BN), tl.float32)
{% else %}
{% for w in W %}
    {{ w.name }}_at = {{ w.base() }} + {{ w.at("n[None, :]", "k[:, None]") }}
    acc{{ loop.index0 }} = tl.zeros((BM, BN), tl.float32)
{% endfor %}
{% endif %}
    for k0 in range(0, H, BK):
        x = {{ load("x_at + k0", "live[:, None]", H % BK and "(k0 + k < H)[None, :]") }}
{% if on_input %}
        x = x.to(tl.float32) * scale
{% endif %}
        x = x.to({{ dtype }})
{% if interleaved %}
        w = {{ load("w_at" ~ W[0].step("k0"), F % BN and "(both < 2 * F)[None, :]", H % BK and "(k0 + k < H)[:, None]") }}
        acc = {{ dot("x", "w", "acc") }}
    acc0, acc1 = tl.split(tl.reshape(acc, (BM, BN, 2)))
{% else %}
{% for w in W %}
        {{ w.name }} = {{ load(w.name ~ "_at" ~ w.step("k0"), F % BN and "(n < F)[None, :]", H % BK and "(k0 + k < H)[:, None]") }}
        acc{{ loop.index0 }} = {{ dot("x", w.name, "acc" ~ loop.index0) }}
{% endfor %}
{% endif %}
{% for b in B if b %}
    acc{{ b.index }} += {{ load(b.base() ~ " + " ~ b.at("n"), F % BN and "n < F") }}.to(tl.float32)[None, :]
{% endfor %}
{% for w in W %}
{% if train %}
    z{{ loop.index0 }} = acc{{ loop.index0 }}.to(Z.dtype.element_ty)
    {{ store("Z + row64[:, None] * " ~ P * F ~ " + (n + " ~ loop.index0 * F ~ ")[None, :]", "z" ~ loop.index0, \
"live[:, None]", F % BN and "(n < F)[None, :]") }}
    h{{ loop.index0 }} = z{{ loop.index0 }}.to(tl.float32)
{% else %}
    h{{ loop.index0 }} = acc{{ loop.index0 }}
{% endif %}
{% endfor %}
{{ activation }}
    {{ store("Y + row64[:, None] * F + n[None, :]", "y.to(Y.dtype.element_ty)", "live[:, None]", F % BN and "(n < F)[None, :]") }}
'''


def launch(
    kernel: Kernel,
    columns: int,
    x: Tensor,
    params: Sequence[Tensor],
    scale: Tensor | None,
    routing: Routing,
    y: Tensor,
    z: Tensor | None,
) -> None:
    """x [T,H] -> y [R,F], and z [R,P*F] where given; `params` as the kernel lists them, `columns` = F."""
    grid = (routing.bound * -(-columns // kernel.config.block_n),)
    scales, kept = [] if scale is None else [scale], [] if z is None else [z]
    kernel.run("up", grid, x, *params, *scales, routing.tiles, routing.order, routing.offsets, y, *kept, routing.bound)

"""Grouped GEMM 1: gathered rows times every projection, then the activation, rows in expert order."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from moecompile.kernels.gpu import tile
from moecompile.kernels.gpu.config import Kernel, Operand
from moecompile.kernels.gpu.permute import Routing

SOURCE = '''\
{{ jit }}
def up(X, {{ weights }}{% if on_input %}SCALE, {% endif %}TILE_MAP, ORDER, OFFSETS, Y{% if train %}, Z{% endif %}{{ tiles }}):
    """Y[row] = activation(X[token] W0[e]^T, ..){% if train %}; Z[row] keeps what the activation reads{% endif %}. \
Grid: {{ grid }}."""
{% include "programs" %}
{% filter indent(deeper, first=true) %}
{% include "tile" %}
    pair = tl.load(ORDER + row, mask=live, other=0)
    n = column * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    x_at = X + (pair // K).to(tl.int64)[:, None] * H + k[None, :]
{% if on_input %}
    scale = tl.load(SCALE + pair, mask=live, other=0.0).to(tl.float32)[:, None]
{% endif %}
{% if interleaved %}
{% if not tma %}
    both = column * (2 * BN) + tl.arange(0, 2 * BN)  # gate and up columns alternate in memory
    w_at = {{ W[0].base() }} + both[None, :] + {{ W[0].along("k[:, None]") }}
{% endif %}
    acc = {{ zeros("BM", "2 * BN") }}
{% else %}
{% for w in W %}
{% if not tma %}
    {{ w.name }}_at = {{ w.base() }} + {{ w.at("n[None, :]", "k[:, None]") }}
{% endif %}
    acc{{ loop.index0 }} = {{ zeros("BM", "BN") }}
{% endfor %}
{% endif %}
    for k0 in range(0, H, BK):
        x = {{ load("x_at + k0", "live[:, None]", H % BK and "(k0 + k < H)[None, :]") }}
{% if on_input %}
        x = x.to(tl.float32) * scale
{% endif %}
        x = x.to({{ dtype }})
{% if interleaved %}
{% if tma %}
        w = {{ W[0].tile("column * (2 * BN)", "k0", "2 * BN") }}
{% else %}
        w = {{ load("w_at" ~ W[0].step("k0"), F % BN and "(both < 2 * F)[None, :]", H % BK and "(k0 + k < H)[:, None]") }}
{% endif %}
        acc = {{ dot("x", "w", "acc") }}
{% if swap %}
    acc = tl.trans(acc)
{% endif %}
    acc0, acc1 = tl.split(tl.reshape(acc, (BM, BN, 2)))
{% else %}
{% for w in W %}
{% if tma %}
        {{ w.name }} = {{ w.tile("column * BN", "k0") }}
{% else %}
        {{ w.name }} = {{ load(w.name ~ "_at" ~ w.step("k0"), F % BN and "(n < F)[None, :]", H % BK and "(k0 + k < H)[:, None]") }}
{% endif %}
        acc{{ loop.index0 }} = {{ dot("x", w.name, "acc" ~ loop.index0) }}
{% endfor %}
{% if swap %}
{% for w in W %}
    acc{{ loop.index0 }} = tl.trans(acc{{ loop.index0 }})
{% endfor %}
{% endif %}
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
{% endfilter %}
'''


def launch(
    kernel: Kernel,
    columns: int,
    x: Tensor,
    params: Sequence[Operand],
    scale: Tensor | None,
    routing: Routing,
    y: Tensor,
    z: Tensor | None,
) -> None:
    """x [T,H] -> y [R,F], and z [R,P*F] where given; `params` as the kernel lists them, `columns` = F."""
    scales, kept = [] if scale is None else [scale], [] if z is None else [z]
    tile.launch(kernel, columns, routing, x, *params, *scales, routing.tiles, routing.order, routing.offsets, y, *kept)

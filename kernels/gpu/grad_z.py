"""Backward through the down projection and the activation, which is computed again from what the forward kept.

The activation's value is stored before its derivatives are computed, from projections that are read again: held at the same
time they need more registers than a thread has (gpt-oss on sm_80: 255 and spills, against 186).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from moecompile.kernels.gpu import tile
from moecompile.kernels.gpu.config import Kernel
from moecompile.kernels.gpu.permute import Routing

SOURCE = '''\
{% macro kept() %}
{% for w in W %}
    h{{ loop.index0 }} = {{ load("Z + row64[:, None] * " ~ P * F ~ " + (n + " ~ loop.index0 * F ~ ")[None, :]", \
"live[:, None]", F % BN and "(n < F)[None, :]") }}.to(tl.float32)
{% endfor %}
{% endmacro %}
@triton.jit(do_not_specialize=["tiles"])
def grad_z(G, {{ weights }}{% if on_output %}SCALE, {% endif %}Z, TILE_MAP, ORDER, OFFSETS, DZ, \
{% if need_y %}Y, {% endif %}{% if parts %}PARTS, {% endif %}tiles):
    """With g = G[token] D[e] and y = activation(Z[row]):  DZ[row] = {% if on_output %}scale * {% endif %}g * y'(Z[row])\
{% if need_y %};  Y[row] = {% if on_output %}scale * {% endif %}y{% endif %}\
{% if parts %};  PARTS[row, column] = sum of g * y over this column{% endif %}. Grid: (tiles * N_TILES,)."""
{% include "programs" %}
{% include "tile" %}
    pair = tl.load(ORDER + row, mask=live, other=0)
    n = column * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    g_at = G + (pair // K).to(tl.int64)[:, None] * O + k[None, :]
    d_at = {{ D.base() }} + {{ D.at("k[:, None]", "n[None, :]") }}
    acc = tl.zeros((BM, BN), tl.float32)
    for k0 in range(0, O, BK):
        g = {{ load("g_at + k0", "live[:, None]", O % BK and "(k0 + k < O)[None, :]") }}.to({{ dtype }})
        d = {{ load("d_at" ~ D.step_n("k0"), F % BN and "(n < F)[None, :]", O % BK and "(k0 + k < O)[:, None]") }}
        acc = {{ dot("g", "d", "acc") }}
{% if on_output %}
    scale = tl.load(SCALE + pair, mask=live, other=0.0).to(tl.float32)[:, None]
{% endif %}
{% if activation %}
{{ kept() -}}
{{ activation }}
{% endif %}
{% if parts %}
    part = tl.where(live[:, None]{% if F % BN %} & (n < F)[None, :]{% endif %}, acc * y, 0.0)
    tl.store(PARTS + row64 * N_TILES + column, tl.sum(part, 1), mask=live)
{% endif %}
{% if need_y %}
    {{ store("Y + row64[:, None] * F + n[None, :]", ("(scale * y)" if on_output else "y") ~ ".to(Y.dtype.element_ty)", \
"live[:, None]", F % BN and "(n < F)[None, :]") }}
{% endif %}
{{ kept() -}}
{{ derivatives }}
{% if on_output %}
    acc *= scale
{% endif %}
{% if interleaved %}
    both = column * (2 * BN) + tl.arange(0, 2 * BN)  # as gate and up alternate in their weight
    dz0, dz1 = (acc * dh0).to(DZ.dtype.element_ty), (acc * dh1).to(DZ.dtype.element_ty)
    dz = tl.reshape(tl.join(dz0, dz1), (BM, 2 * BN))
    {{ store("DZ + row64[:, None] * " ~ 2 * F ~ " + both[None, :]", "dz", \
"live[:, None]", F % BN and "(both < %d)[None, :]" % (2 * F)) }}
{% else %}
{% for w in W %}
    {{ store("DZ + row64[:, None] * " ~ P * F ~ " + (n + " ~ loop.index0 * F ~ ")[None, :]", \
"(acc * dh" ~ loop.index0 ~ ").to(DZ.dtype.element_ty)", "live[:, None]", F % BN and "(n < F)[None, :]") }}
{% endfor %}
{% endif %}
'''


def launch(
    kernel: Kernel,
    columns: int,
    grad: Tensor,
    params: Sequence[Tensor],
    scale: Tensor | None,
    z: Tensor,
    routing: Routing,
    dz: Tensor,
    y: Tensor | None,
    parts: Tensor | None,
) -> None:
    """grad [T,O], z [R,P*F] -> dz [R,P*F], y [R,F] and parts [R, tiles of F] (float32) where given; `columns` = F."""
    given = [grad, *params, *([] if scale is None else [scale]), z, routing.tiles, routing.order, routing.offsets, dz]
    tile.launch(kernel, columns, routing, *given, *(t for t in (y, parts) if t is not None))

"""Backward through the up projections: the gradient of each gathered row of x, in expert order.

Projections that continue each other in memory, one after the other or column by column, are one product over all their
columns.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from moecompile.kernels.gpu import tile
from moecompile.kernels.gpu.config import Kernel
from moecompile.kernels.gpu.permute import Routing

SOURCE = '''\
{{ jit }}
def grad_rows(DZ, {{ weights }}TILE_MAP, {% if parts %}X, ORDER, {% endif %}OFFSETS, DROWS\
{% if parts %}, PARTS{% endif %}{{ tiles }}):
    """DROWS[row] = {{ "DZ[row] W[e], all projections at once" if reads | length < P else "sum over i of DZ_i[row] W_i[e]" }}\
{% if parts %};  PARTS[row, column] = sum of DROWS[row] * X[token] over this column{% endif %}. Grid: {{ grid }}."""
{% include "programs" %}
{% filter indent(deeper, first=true) %}
{% include "tile" %}
    n = column * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    acc = tl.zeros((BM, BN), tl.float32)
{% for w, first, depth in reads %}
    dz_at = DZ + row64[:, None] * {{ P * F }} + {{ "(k + %d)" % first if first else "k" }}[None, :]
    {{ w.name }}_at = {{ w.base() }} + {{ w.at("k[:, None]", "n[None, :]") }}
    for k0 in range(0, {{ depth }}, BK):
        dz = {{ load("dz_at + k0", "live[:, None]", depth % BK and "(k0 + k < %d)[None, :]" % depth) }}
        {{ w.name }} = {{ load(w.name ~ "_at" ~ w.step_n("k0"), \
H % BN and "(n < H)[None, :]", depth % BK and "(k0 + k < %d)[:, None]" % depth) }}
        acc = {{ dot("dz", w.name, "acc") }}
{% endfor %}
{% if parts %}
    token64 = (tl.load(ORDER + row, mask=live, other=0) // K).to(tl.int64)
    x = {{ load("X + token64[:, None] * H + n[None, :]", "live[:, None]", H % BN and "(n < H)[None, :]") }}.to(tl.float32)
    tl.store(PARTS + row64 * N_TILES + column, tl.sum(acc * x, 1), mask=live)
{% endif %}
    {{ store("DROWS + row64[:, None] * H + n[None, :]", "acc.to(DROWS.dtype.element_ty)", \
"live[:, None]", H % BN and "(n < H)[None, :]") }}
{% endfilter %}
'''


def launch(
    kernel: Kernel,
    columns: int,
    dz: Tensor,
    params: Sequence[Tensor],
    x: Tensor,
    routing: Routing,
    drows: Tensor,
    parts: Tensor | None,
) -> None:
    """dz [R,P*F] -> drows [R,H], and parts [R, tiles of H] (float32) where given; `columns` = H."""
    gathered, kept = ([], []) if parts is None else ([x, routing.order], [parts])
    tile.launch(kernel, columns, routing, dz, *params, routing.tiles, *gathered, routing.offsets, drows, *kept)

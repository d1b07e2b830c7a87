"""Gradient of the routing weights: the partial sums of each pair's row, added in order."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from moecompile.kernels.gpu.config import Kernel

SOURCE = '''\
@triton.jit(do_not_specialize=["R"])
def grad_weights(PARTS, PLACE, {% if bias %}G, IDS, {{ weights }}{% endif %}DS, R):
    """DS[pair] = sum over j of PARTS[PLACE[pair], j]{% if bias %} + <G[token], d[e]>{% endif %}. Grid: (R / BM,)."""
    pair = tl.program_id(0) * BM + tl.arange(0, BM)
    row = tl.load(PLACE + pair, mask=pair < R, other=-1)
    live = row >= 0
    j = tl.arange(0, {{ parts_block }})
    at = PARTS + row.to(tl.int64)[:, None] * {{ num_parts }} + j[None, :]
    total = tl.sum({{ load("at", "live[:, None]", parts_block != num_parts and "(j < %d)[None, :]" % num_parts) }}, 1)
{% if bias %}
    e64 = tl.load(IDS + pair, mask=live, other=0).to(tl.int64)
{% if wraps %}
    e64 = tl.where(e64 < 0, e64 + E, e64)
{% endif %}
    n = tl.arange(0, BN)
    token64 = (pair // K).to(tl.int64)
    for n0 in range(0, O, BN):
        g = {{ load("G + token64[:, None] * O + (n0 + n)[None, :]", "live[:, None]", O % BN and "(n0 + n < O)[None, :]") }}
        d = {{ load(DB.base("e64[:, None]", "live[:, None]") ~ " + " ~ DB.at("(n0 + n)[None, :]"), \
"live[:, None]", O % BN and "(n0 + n < O)[None, :]") }}
        total += tl.sum(g.to(tl.float32) * d.to(tl.float32), 1)
{% endif %}
{% if wraps %}
    total = tl.where(row == -2, float("nan"), total)
{% endif %}
    tl.store(DS + pair, total.to(DS.dtype.element_ty), mask=pair < R)
'''


def launch(kernel: Kernel, parts: Tensor, place: Tensor, grad: Tensor, ids: Tensor, bias: Sequence[Tensor], ds: Tensor) -> None:
    """parts [R,n], place [R] -> ds [T,K]; with a down bias also grad [T,O] and ids [T,K]."""
    grid = (-(-ds.numel() // kernel.config.block_m),)
    kernel.run("grad_weights", grid, parts, place, *([grad, ids, *bias] if bias else []), ds, ds.numel())

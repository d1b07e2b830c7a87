"""Gather and sum: the K rows of each token, in slot order, in float32.  The output of the layer, and the gradient of x."""

from __future__ import annotations

from torch import Tensor

from moecompile.kernels.gpu.config import Kernel

SOURCE = '''\
@triton.jit
def combine(ROWS, PLACE, {% if scaled %}SCALE, {% endif %}OUT):
    """OUT[t] = sum over k of {% if scaled %}SCALE[t,k] * {% endif %}ROWS[PLACE[t,k]]. Grid: (T, N / BN)."""
    token = tl.program_id(0)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    acc = tl.zeros((BN,), tl.float32)
    for slot in range(K):
        row = tl.load(PLACE + token * K + slot)
        y = tl.load(ROWS + row.to(tl.int64) * N + n, mask={% if N % BN %}(n < N) & {% endif %}(row >= 0), other=0.0).to(tl.float32)
{% if scaled %}
        scale = tl.load(SCALE + token * K + slot).to(tl.float32)
        acc += tl.where(row >= 0, scale * y, 0.0)
{% else %}
        acc += y
{% endif %}
{% if wraps %}
        acc = tl.where(row == -2, float("nan"), acc)
{% endif %}
    {{ store("OUT + token.to(tl.int64) * N + n", "acc.to(OUT.dtype.element_ty)", N % BN and "n < N") }}
'''


def launch(kernel: Kernel, rows: Tensor, place: Tensor, scale: Tensor | None, out: Tensor) -> None:
    """rows [R,N], place [R] -> out [T,N]."""
    grid = (out.shape[0], -(-out.shape[1] // kernel.config.block_n))
    kernel.run("combine", grid, rows, place, *([] if scale is None else [scale]), out)

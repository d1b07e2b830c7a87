"""Gradients of one expert weight and of one expert bias: sums over the rows of each expert.

Both operands of a weight's gradient are read by rows: one lies in expert order, the other is gathered by token.  An expert
without rows gets exact zeros.  Projections that continue each other in their parameter are one matrix.

Into a main gradient (MAIN, float32, or MAINS, the addresses of one per expert) the sums are added: each element is read and
written by one program, and those of an expert without rows are not touched.  A matrix is added half by half: all of a tile
and of what it is added to at once spilt on sm_90 (128 x 128, separate parameters).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from moecompile.kernels.gpu.config import Kernel

MATRIX = '''\
@triton.jit
def grad_matrix(A, B, {% if scaled %}SCALE, {% endif %}ORDER, OFFSETS, {{ out.arg }}):
    """{{ out.arg }}[e] [N,M] {{ "+=" if into else "=" }} sum over the rows of e of A^T B, \
with {{ "A[token]" if gathers_a else "B[token]" }} gathered. \
Grid: (tiles of N * tiles of M, E)."""
    tile, e = tl.program_id(0), tl.program_id(1)
    n = tile // M_TILES * BN + tl.arange(0, BN)
    m = tile % M_TILES * BK + tl.arange(0, BK)
    r = tl.arange(0, BM)
    start, end = tl.load(OFFSETS + e), tl.load(OFFSETS + e + 1)
{% if into %}
    if start == end:
        return
{% endif %}
    acc = tl.zeros((BN, BK), tl.float32)
    pair = tl.load(ORDER + start + r, mask=start + r < end, other=0)
    for row0 in range(start, end, BM):
        row = row0 + r
        live = row < end
        token64 = (pair // K).to(tl.int64)
        row64 = row.to(tl.int64)
{% if scaled %}
        scale = tl.load(SCALE + pair, mask=live, other=0.0).to(tl.float32)
{% endif %}
        pair = tl.load(ORDER + row + BM, mask=row + BM < end, other=0)
        a = {{ load("A + " ~ ("token64" if gathers_a else "row64") ~ "[None, :] * " ~ lda ~ " + " ~ a_column ~ "[:, None]", \
"live[None, :]", N % BN and "(n < N)[:, None]") }}.to({{ dtype }})
        b = {{ load("B + " ~ ("row64" if gathers_a else "token64") ~ "[:, None] * M + m[None, :]", \
"live[:, None]", M % BK and "(m < M)[None, :]") }}
{% if scaled %}
        b = b.to(tl.float32) * scale[:, None]
{% endif %}
        acc = {{ dot("a", "b.to(" ~ dtype ~ ")", "acc") }}
{% if into %}
    m = tile % M_TILES * BK + tl.arange(0, BK // 2)
    sums0, sums1 = tl.split(tl.permute(tl.reshape(acc, (BN, 2, BK // 2)), (0, 2, 1)))
    main = {{ out.base("e.to(tl.int64)") }}
{% for i in range(2) %}
    at = main + {{ out.at("n[:, None]", "m[None, :]") }}
    sums{{ i }} += {{ load("at", N % BN and "(n < N)[:, None]", M % BK and "(m < M)[None, :]") }}
    {{ store("at", "sums%d" % i, N % BN and "(n < N)[:, None]", M % BK and "(m < M)[None, :]") }}
{% if loop.first %}
    m += BK // 2
{% endif %}
{% endfor %}
{% else %}
    at = {{ out.base("e.to(tl.int64)") }} + {{ out.at("n[:, None]", "m[None, :]") }}
    {{ store("at", "acc.to(DW.dtype.element_ty)", N % BN and "(n < N)[:, None]", M % BK and "(m < M)[None, :]") }}
{% endif %}
'''

VECTOR = '''\
@triton.jit
def grad_vector(A, {% if scaled %}SCALE, {% endif %}ORDER, OFFSETS, {{ out.arg }}):
    """{{ out.arg }}[e] [N] {{ "+=" if into else "=" }} \
sum over the rows of e of {% if scaled %}scale * {% endif %}A[{{ "token" if gathers_a else "row" }}]. \
Grid: (N / BN, E)."""
    e = tl.program_id(1)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    start, end = tl.load(OFFSETS + e), tl.load(OFFSETS + e + 1)
{% if into %}
    if start == end:
        return
{% endif %}
    acc = tl.zeros((BN,), tl.float32)
    for row0 in range(start, end, BM):
        row = row0 + tl.arange(0, BM)
        live = row < end
{% if gathers_a %}
        pair = tl.load(ORDER + row, mask=live, other=0)
        at = (pair // K).to(tl.int64)
{% else %}
        at = row.to(tl.int64)
{% endif %}
        a = {{ load("A + at[:, None] * " ~ lda ~ " + " ~ a_column ~ "[None, :]", \
"live[:, None]", N % BN and "(n < N)[None, :]") }}
{% if scaled %}
        a = a.to(tl.float32) * tl.load(SCALE + pair, mask=live, other=0.0).to(tl.float32)[:, None]
{% endif %}
        acc += tl.sum(a.to(tl.float32), 0)
    to = {{ out.base("e.to(tl.int64)") }} + {{ out.at("n") }}
{% if into %}
    acc += {{ load("to", N % BN and "n < N") }}
{% endif %}
    {{ store("to", "acc" if into else "acc.to(DB.dtype.element_ty)", N % BN and "n < N") }}
'''


def launch_matrix(
    kernel: Kernel,
    size: tuple[int, int],
    num_experts: int,
    a: Tensor,
    b: Tensor,
    scale: Tensor | None,
    order: Tensor,
    offsets: Tensor,
    out: Tensor,
) -> None:
    """a, b with their rows -> the [E,N,M] view of `out` that the kernel was made for, or the addresses of main gradients;
    `size` = (N, M)."""
    n, m = size
    tiles = -(-n // kernel.config.block_n) * -(-m // kernel.config.block_k)
    scales: Sequence[Tensor] = [] if scale is None else [scale]
    kernel.run("grad_matrix", (tiles, num_experts), a, b, *scales, order, offsets, out)


def launch_vector(
    kernel: Kernel, size: int, num_experts: int, a: Tensor, scale: Tensor | None, order: Tensor, offsets: Tensor, out: Tensor
) -> None:
    """a with its rows -> the [E,N] view of `out` that the kernel was made for; `size` = N."""
    grid = (-(-size // kernel.config.block_n), num_experts)
    kernel.run("grad_vector", grid, a, *([] if scale is None else [scale]), order, offsets, out)

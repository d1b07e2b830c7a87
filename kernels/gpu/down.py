"""Grouped GEMM 2: activated rows times the down projection, rows in expert order.

Where `split` programs share the sum of a tile, each writes what it has to PARTS and takes a ticket; whoever draws the last one
adds the parts, in their order, so that the result does not depend on which program that was, and puts the ticket back to 0 for
the next launch.  That the last one sees the parts of the others: the barrier orders the stores of a program's threads before
the one thread that draws; drawing is an atomic of acq_rel semantics at device scope, so it releases those stores (release is
cumulative over the barrier) and, read by a later drawing of the same ticket, forms one release sequence with it; the later
one acquires them, and hands its ticket to the threads of its program through another barrier.  PARTS is read past the L1 cache.
Only for NVIDIA: on gfx942 the barrier is a bare s_barrier, which does not wait for the stores of other waves (no s_waitcnt vmcnt(0)
before it, in what Triton 3.7.1 compiles), so there the last one could read parts that have not arrived.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from moecompile.kernels.gpu import tile
from moecompile.kernels.gpu.config import Kernel, Operand
from moecompile.kernels.gpu.permute import Routing

SOURCE = '''\
{{ jit }}
def down(Y, {{ weights }}TILE_MAP, OFFSETS, {% if split > 1 %}PARTS, TICKETS, {% endif %}OUT{{ tiles }}):
    """OUT[row] = Y[row] D[e]^T{% if split > 1 %}, its sum cut into {{ split }} parts{% endif %}. \
Grid: {{ grid }}."""
{% include "programs" %}
{% filter indent(deeper, first=true) %}
{% include "tile" %}
    n = column * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    y_at = Y + row64[:, None] * F + k[None, :]
{% if not tma %}
    d_at = {{ D.base() }} + {{ D.at("n[None, :]", "k[:, None]") }}
{% endif %}
    acc = {{ zeros("BM", "BN") }}
    for k0 in {{ "range(part * SPAN, tl.minimum(part * SPAN + SPAN, F), BK)" if split > 1 else "range(0, F, BK)" }}:
        y = {{ load("y_at + k0", "live[:, None]", F % BK and "(k0 + k < F)[None, :]") }}
{% if tma %}
        d = {{ D.tile("column * BN", "k0") }}
{% else %}
        d = {{ load("d_at" ~ D.step("k0"), O % BN and "(n < O)[None, :]", F % BK and "(k0 + k < F)[:, None]") }}
{% endif %}
        acc = {{ dot("y", "d", "acc") }}
{% if swap %}
    acc = tl.trans(acc)
{% endif %}
{% if split > 1 %}
    parts_at = PARTS + row64[:, None] * {{ split * O }} + n[None, :]
    {{ store("parts_at + part * O", "acc", "live[:, None]", O % BN and "(n < O)[None, :]") }}
    tl.debug_barrier()
    ticket_at = TICKETS + pid
    if tl.atomic_add(ticket_at, 1, sem="acq_rel", scope="gpu") < SPLIT - 1:
        return
    tl.store(ticket_at, 0)
    acc = {{ load("parts_at", "live[:, None]", O % BN and "(n < O)[None, :]", cache=".cg") }}
    for i in range(1, SPLIT):
        acc += {{ load("parts_at + i * O", "live[:, None]", O % BN and "(n < O)[None, :]", cache=".cg") }}
{% endif %}
{% if DB %}
    acc += {{ load(DB.base() ~ " + " ~ DB.at("n"), O % BN and "n < O") }}.to(tl.float32)[None, :]
{% endif %}
    {{ store("OUT + row64[:, None] * O + n[None, :]", "acc.to(OUT.dtype.element_ty)", \
"live[:, None]", O % BN and "(n < O)[None, :]") }}
{% endfilter %}
'''


def tickets(kernel: Kernel, columns: int, routing: Routing) -> int:
    """How many tickets a launch needs: one for each output tile, 0 where no sum is split."""
    return routing.bound * -(-columns // kernel.config.block_n) if kernel.config.split > 1 else 0


def launch(
    kernel: Kernel, columns: int, y: Tensor, params: Sequence[Operand], routing: Routing, out: Tensor, shared: Sequence[Tensor] = ()
) -> None:
    """y [R,F] -> out [R,O]; `columns` = O. `shared`, where the sum is split: room for the parts [R,split,O] (float32), and the
    tickets, all 0 (int32)."""
    tile.launch(kernel, columns, routing, y, *params, routing.tiles, routing.offsets, *shared, out)

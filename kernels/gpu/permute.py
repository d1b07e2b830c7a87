"""From ids [T,K] to rows sorted by expert, by counting: no sort, no atomics, rows of one expert in token order.

    order    [R]        the pair (token * K + slot) of each row; rows past offsets[E] are not written
    place    [R]        the row of each pair; -1 where the id is skipped, -2 where it is an error
    offsets  [E+2]      first row of each expert, their end, and the number of tiles in use
    tiles    [bound,2]  expert and first row of each tile of BM rows; expert -1 past the last

Few pairs: one kernel, in which the program of an expert reads all ids.  Many pairs: counts per chunk of ids, a scan over the
chunks of each expert, offsets and tiles from the totals, and the scatter.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moecompile.kernels.gpu.config import Kernel, tiles_bound


class Routing(NamedTuple):
    """Which row is whose: see the head of this file. `bound` is how many tiles there can be, `block_m` their rows."""

    order: Tensor
    place: Tensor
    offsets: Tensor
    tiles: Tensor
    bound: int


CLEAN = """\
{% if wraps %}
    pair_e = tl.where(pair_e < 0, pair_e + E, pair_e)
{% endif %}
    pair_e = tl.where((pair_e >= 0) & (pair_e < E), pair_e, E).to(tl.int32)
"""

SCHEDULE = """\
    tiles_of = (counts + (BM - 1)) // BM
    tile = tl.sum(tl.where(bins < e, tiles_of, 0), 0)
    start = tl.sum(tl.where(bins < e, counts, 0), 0)
    count = tl.sum(tl.where(bins == e, counts, 0), 0)
    used = tl.sum(tl.where(bins < E, tiles_of, 0), 0)
    tl.store(OFFSETS + e, start)
    if e == E - 1:
        tl.store(OFFSETS + E, start + count)
        tl.store(OFFSETS + E + 1, used)
    for done in range(0, count, TILE_BLOCK * BM):
        i = done // BM + tl.arange(0, TILE_BLOCK)
        tl.store(TILE_MAP + (tile + i) * 2, e + tl.zeros_like(i), mask=i * BM < count)
        tl.store(TILE_MAP + (tile + i) * 2 + 1, start + i * BM, mask=i * BM < count)
    for i0 in range(used + e * TILE_BLOCK, bound, E * TILE_BLOCK):
        i = i0 + tl.arange(0, TILE_BLOCK)
        tl.store(TILE_MAP + i * 2, tl.full((TILE_BLOCK,), -1, tl.int32), mask=i < bound)
"""

SOURCE = '''\
@triton.jit(do_not_specialize=["R", "bound"])
def permute(IDS, ORDER, PLACE, OFFSETS, TILE_MAP, R, bound):
    """Few pairs: R <= BLOCK. Grid: (E,)."""
    e = tl.program_id(0)
    pair = tl.arange(0, BLOCK)
    pair_e = tl.load(IDS + pair, mask=pair < R, other=E)
{{ clean }}
    mine = pair_e == e
    row = tl.sum((pair_e < e).to(tl.int32), 0) + tl.cumsum(mine.to(tl.int32), 0) - 1
    tl.store(ORDER + row, pair, mask=mine)
    tl.store(PLACE + pair, row, mask=mine)
    if e == 0:
        tl.store(PLACE + pair, tl.full((BLOCK,), {{ skipped }}, tl.int32), mask=(pair_e == E) & (pair < R))
    bins = tl.arange(0, BINS)
    counts = tl.histogram(pair_e, BINS)
{{ schedule }}

@triton.jit(do_not_specialize=["R", "chunks"])
def count(IDS, COUNTS, R, chunks):
    """COUNTS[e, chunk] of BLOCK pairs. Grid: (chunks,)."""
    chunk = tl.program_id(0)
    pair = chunk * BLOCK + tl.arange(0, BLOCK)
    pair_e = tl.load(IDS + pair, mask=pair < R, other=E)
{{ clean }}
    bins = tl.arange(0, BINS)
    tl.store(COUNTS + bins * chunks + chunk, tl.histogram(pair_e, BINS), mask=bins < E)


@triton.jit(do_not_specialize=["chunks"])
def scan(COUNTS, TOTALS, chunks):
    """COUNTS[e] becomes its own exclusive sum, TOTALS[e] the sum. Grid: (E,)."""
    e = tl.program_id(0)
    total = e * 0
    for first in range(0, chunks, BLOCK):
        chunk = first + tl.arange(0, BLOCK)
        counts = tl.load(COUNTS + e * chunks + chunk, mask=chunk < chunks, other=0)
        tl.store(COUNTS + e * chunks + chunk, total + tl.cumsum(counts, 0) - counts, mask=chunk < chunks)
        total += tl.sum(counts, 0)
    tl.store(TOTALS + e, total)


@triton.jit(do_not_specialize=["bound"])
def schedule(TOTALS, OFFSETS, TILE_MAP, bound):
    """Offsets and tiles of the expert totals. Grid: (E,)."""
    e = tl.program_id(0)
    bins = tl.arange(0, BINS)
    counts = tl.load(TOTALS + bins, mask=bins < E, other=0)
{{ schedule }}

@triton.jit(do_not_specialize=["R", "chunks"])
def scatter(IDS, COUNTS, ORDER, PLACE, OFFSETS, R, chunks):
    """Each pair to its row: first row of its expert, plus its expert's pairs in earlier chunks, plus those before it in
    its own. Grid: (chunks,)."""
    chunk = tl.program_id(0)
    pair = chunk * BLOCK + tl.arange(0, BLOCK)
    pair_e = tl.load(IDS + pair, mask=pair < R, other=E)
{{ clean }}
    other = chunk * BLOCK + tl.arange(0, BLOCK)
    pair_e_other = tl.load(IDS + other, mask=other < R, other=E)
{{ clean_other }}
    before = (pair_e[:, None] == pair_e_other[None, :]) & (other[None, :] < pair[:, None])
    live = pair_e < E
    row = tl.load(OFFSETS + pair_e, mask=live, other=0) + tl.load(COUNTS + pair_e * chunks + chunk, mask=live, other=0)
    row += tl.sum(before.to(tl.int32), 1)
    tl.store(ORDER + row, pair, mask=live)
    tl.store(PLACE + pair, tl.where(live, row, {{ skipped }}), mask=pair < R)
'''
FUNCTIONS = ("permute", "count", "scan", "schedule", "scatter")


def launch(kernel: Kernel, ids: Tensor, num_experts: int, block_m: int, few: bool) -> Routing:
    """ids [T,K] of any integer dtype, contiguous; `few` says which of the two ways."""
    rows, E = ids.numel(), num_experts
    bound = tiles_bound(rows, E, block_m)

    def ints(*size: int) -> Tensor:
        return torch.empty(size, dtype=torch.int32, device=ids.device)

    routing = Routing(ints(rows), ints(rows), ints(E + 2), ints(bound, 2), bound)
    if few:
        kernel.run("permute", (E,), ids, routing.order, routing.place, routing.offsets, routing.tiles, rows, bound)
        return routing
    chunks = -(-rows // kernel.config.block_m)
    counts, totals = ints(E, chunks), ints(E)
    kernel.run("count", (chunks,), ids, counts, rows, chunks)
    kernel.run("scan", (E,), counts, totals, chunks)
    kernel.run("schedule", (E,), totals, routing.offsets, routing.tiles, bound)
    kernel.run("scatter", (chunks,), ids, counts, routing.order, routing.place, routing.offsets, rows, chunks)
    return routing

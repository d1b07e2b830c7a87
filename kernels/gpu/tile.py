"""The opening of every kernel that works on row tiles of one expert: which tile, which expert, which rows.

One program for each tile that there can be, those past the last return; or, persistent, fewer programs, each of which goes
through every so many-th tile of those that there are, and loads the first operands of the next one while it stores a tile
(`flatten` makes one loop of the two).  Either way tiles are taken in the order of experts, and those of `group`
row tiles with the same columns follow each other, so that a tile of the weight is read once from memory and then from L2.
"""

from __future__ import annotations

from typing import Any

from moecompile.kernels.gpu.config import Kernel
from moecompile.kernels.gpu.permute import Routing

PROGRAMS = """\
{% if persistent %}
    tiles = tl.load(OFFSETS + E + 1)
    for done in tl.range(0, tiles * N_TILES - tl.program_id(0), tl.num_programs(0), flatten=True):
        pid = done + tl.program_id(0)
{% elif split > 1 %}
    part = tl.program_id(0) % SPLIT
    pid = tl.program_id(0) // SPLIT
{% else %}
    pid = tl.program_id(0)
{% endif %}
"""

SOURCE = """\
    band = pid // (GROUP * N_TILES) * GROUP
    height = tl.minimum(tiles - band, GROUP)
    tile = band + pid % (GROUP * N_TILES) % height
    column = pid % (GROUP * N_TILES) // height
    e = tl.load(TILE_MAP + tile * 2)
{% if not persistent %}
    if e < 0:
        return
{% endif %}
    e64 = e.to(tl.int64)
    row = tl.load(TILE_MAP + tile * 2 + 1) + tl.arange(0, BM)
    live = row < tl.load(OFFSETS + e + 1)
    row64 = row.to(tl.int64)
"""


def launch(kernel: Kernel, columns: int, routing: Routing, *args: Any) -> None:
    """Run the kernel over every row tile and every block of `columns`."""
    config = kernel.config
    tiles = routing.bound * -(-columns // config.block_n) * config.split
    kernel.run(kernel.family, (kernel.programs(tiles),), *args, *([] if config.persistent else [routing.bound]))

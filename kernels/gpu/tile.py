"""The opening of every kernel that works on row tiles of one expert: which tile, which expert, which rows."""

from __future__ import annotations

SOURCE = """\
    pid = tl.program_id(0)
    band = pid // (GROUP * N_TILES) * GROUP
    height = tl.minimum(tiles - band, GROUP)
    tile = band + pid % (GROUP * N_TILES) % height
    column = pid % (GROUP * N_TILES) // height
    e = tl.load(TILE_MAP + tile * 2)
    if e < 0:
        return
    e64 = e.to(tl.int64)
    row = tl.load(TILE_MAP + tile * 2 + 1) + tl.arange(0, BM)
    live = row < tl.load(OFFSETS + e + 1)
    row64 = row.to(tl.int64)
"""

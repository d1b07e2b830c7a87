"""The permutation by itself, both ways: a stable counting sort of the ids that are in range.

Run as tests/gpu/test_interpreted.py does.
"""

from __future__ import annotations

import pytest
import torch

from moecompile.codegen import gpu_load, gpu_text
from moecompile.ir.spec import OutOfRange
from moecompile.kernels.gpu import permute
from moecompile.kernels.gpu.config import Config, tiles_bound
from tests.gpu import layers

IDS = {
    "random": lambda r, E: torch.randint(0, E, (r,)),
    "one expert": lambda r, E: torch.full((r,), E - 1),
    "skipped": lambda r, E: torch.randint(-2, E + 2, (r,)),
    "nothing": lambda r, E: torch.full((r,), -1),
    "garbage": lambda r, E: torch.randint(-(2**62), 2**62, (r,)),
    "int32": lambda r, E: torch.randint(-1, E, (r,), dtype=torch.int32),
}


@pytest.mark.parametrize("few", (True, False))
@pytest.mark.parametrize("drawn", IDS)
@pytest.mark.parametrize("experts", (1, 2, 7, 64))
def test_a_stable_counting_sort(experts: int, drawn: str, few: bool) -> None:
    torch.manual_seed(0)
    check(experts, drawn, few, (1, 16, 17, 100) if experts < 64 else (100,), (16, 32))


def check(experts: int, drawn: str, few: bool, sizes: tuple[int, ...], heights: tuple[int, ...], block: int = 32) -> None:
    spec = layers.make(E=experts, K=1, out_of_range=OutOfRange.SKIP)
    config = Config(128 if few else block, 1, 1, 4, 1)
    for rows in sizes:
        for height in heights:
            kernel = gpu_load.load("permute", config, gpu_text.permute_text(spec, config, height))
            ids = IDS[drawn](rows, experts)
            got = permute.launch(kernel, ids, experts, height, few)
            live = (ids >= 0) & (ids < experts)
            order = torch.where(live, ids, experts).argsort(stable=True)[: int(live.sum())]
            counts = ids[live].long().bincount(minlength=experts)
            starts = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
            assert torch.equal(got.offsets[:-1].long(), starts)
            assert torch.equal(got.order[: len(order)].long(), order)
            place = torch.full((rows,), -1)
            place[order] = torch.arange(len(order))
            assert torch.equal(got.place.long(), place)
            tiles = [(e, int(starts[e]) + i) for e in range(experts) for i in range(0, int(counts[e]), height)]
            assert [tuple(t) for t in got.tiles[: len(tiles)].tolist()] == tiles
            assert (got.tiles[len(tiles) :, 0] == -1).all()
            assert int(got.offsets[-1]) == len(tiles)


def test_more_chunks_than_one_step_of_the_scan_takes() -> None:
    torch.manual_seed(0)
    check(5, "skipped", False, (100,), (16,), block=8)


@pytest.mark.parametrize("height", (1, 16, 128))
def test_no_load_needs_more_tiles_than_the_bound(height: int) -> None:
    torch.manual_seed(0)
    for _ in range(2000):
        experts, rows = int(torch.randint(1, 9, ())), int(torch.randint(1, 600, ()))
        counts = torch.multinomial(torch.rand(experts) ** 4 + 1e-6, rows, True).bincount(minlength=experts)
        assert int((-(-counts // height)).sum()) <= tiles_bound(rows, experts, height)
    worst = torch.tensor([1 + height * 3, 1, 1, 1])
    assert int((-(-worst // height)).sum()) == tiles_bound(int(worst.sum()), 4, height)

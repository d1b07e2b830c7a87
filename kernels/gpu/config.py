"""The numbers of one kernel, and a kernel that is ready to launch."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any


@dataclass(frozen=True)
class Config:
    """Block sizes and launch numbers of one kernel. All but `stages` are powers of two.

    block_m   rows of a tile (tokens for the router, pairs for permute, rows per step for the weight gradients)
    block_n   output columns of a tile
    block_k   length of one step of the inner sum
    group     row tiles that run next to each other, so that they find their weight tile in L2
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    group: int = 8

    def __post_init__(self) -> None:
        for name in ("block_m", "block_n", "block_k", "warps", "group"):
            value = getattr(self, name)
            if type(value) is not int or value < 1 or value & (value - 1):
                raise ValueError(f"config: {name} is {value!r}, needs a power of two")
        if type(self.stages) is not int or not 1 <= self.stages <= 8:
            raise ValueError(f"config: stages is {self.stages!r}, needs 1..8")


@dataclass(frozen=True)
class Kernel:
    """A generated module: its family, its numbers, its source and what importing that source gave."""

    family: str
    config: Config
    text: str
    module: ModuleType

    def run(self, function: str, grid: tuple[int, ...], *args: Any) -> None:
        """Launch `function` on the current device; an empty grid launches nothing."""
        if all(grid):
            getattr(self.module, function)[grid](*args, num_warps=self.config.warps, num_stages=self.config.stages)


def tiles_bound(rows: int, num_experts: int, block_m: int) -> int:
    """Row tiles that `rows` pairs can need, whatever their experts: sum of ceil(n_e / block_m) is never more."""
    return min(rows, -(-rows // block_m) + num_experts - 1)

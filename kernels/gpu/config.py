"""The numbers of one kernel, and a kernel that is ready to launch."""

from __future__ import annotations

from dataclasses import dataclass, fields
from types import ModuleType
from typing import Any

YOUNGER = ("swap", "persistent", "tma", "split", "pdl")  # axes that the first stored configurations do not have


@dataclass(frozen=True)
class Config:
    """Block sizes, forms and launch numbers of one kernel.

    block_m     rows of a tile (tokens for the router, pairs for permute, rows per step for the weight gradients)
    block_n     output columns of a tile
    block_k     length of one step of the inner sum
    group       row tiles that run next to each other, so that they find their weight tile in L2
    swap        1: the product is taken as W x^T, so that columns of the weight lie where tensor cores want 64 rows
    persistent  programs for each processor, each of which works through many tiles; 0: one program for each tile
    tma         1: weights come in by tensor descriptors, where their layout has one
    split       programs that share the inner sum of one output tile
    pdl         1: launched before its predecessor has ended, for whose results it then waits
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    group: int = 8
    swap: int = 0
    persistent: int = 0
    tma: int = 0
    split: int = 1
    pdl: int = 0

    def __post_init__(self) -> None:
        for name in ("block_m", "block_n", "block_k", "warps", "group", "split"):
            value = getattr(self, name)
            if type(value) is not int or value < 1 or value & (value - 1):
                raise ValueError(f"config: {name} is {value!r}, needs a power of two")
        if type(self.stages) is not int or not 1 <= self.stages <= 8:
            raise ValueError(f"config: stages is {self.stages!r}, needs 1..8")
        for name, most in (("swap", 1), ("persistent", 8), ("tma", 1), ("pdl", 1)):
            value = getattr(self, name)
            if type(value) is not int or not 0 <= value <= most:
                raise ValueError(f"config: {name} is {value!r}, needs 0..{most}")
        if self.persistent and self.split > 1:
            raise ValueError(f"config: split is {self.split}, but persistent programs are for many tiles, and share no sum")

    def plain(self) -> dict[str, int]:
        """The numbers by name. Younger axes are left out where they are at their default: so what was stored before there were
        such axes is read as what it was, and goes by the same name."""
        return {f.name: v for f in fields(self) if (v := getattr(self, f.name)) != f.default or f.name not in YOUNGER}


@dataclass(frozen=True)
class Kernel:
    """A generated module: its family, its numbers, its source and what importing that source gave; `processors` of the device
    it was made for."""

    family: str
    config: Config
    text: str
    module: ModuleType
    processors: int = 1

    @property
    def options(self) -> dict[str, int]:
        """What the compiler is told besides the source."""
        options = {"num_warps": self.config.warps, "num_stages": self.config.stages}
        return {**options, "launch_pdl": True} if self.config.pdl else options

    def run(self, function: str, grid: tuple[int, ...], *args: Any) -> None:
        """Launch `function` on the current device; an empty grid launches nothing."""
        if all(grid):
            getattr(self.module, function)[grid](*args, **self.options)

    def programs(self, tiles: int) -> int:
        """How many programs work on `tiles` output tiles: one each, or as many as the device holds."""
        held = self.config.persistent * self.processors
        return min(tiles, held) if held else tiles


Operand = Any  # a weight as a kernel takes it: a tensor, a table of pointers, or a tensor descriptor


def tiles_bound(rows: int, num_experts: int, block_m: int) -> int:
    """Row tiles that `rows` pairs can need, whatever their experts: sum of ceil(n_e / block_m) is never more."""
    return min(rows, -(-rows // block_m) + num_experts - 1)

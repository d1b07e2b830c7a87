"""Where the weights of a layer lie, and how a text spells their addresses."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from moecompile.ir.spec import ExpertsSpec, Weight
from moecompile.kernels.gpu.config import Config

TYPES = {torch.float16: "tl.float16", torch.bfloat16: "tl.bfloat16", torch.float32: "tl.float32"}


def _term(index: str, stride: int) -> str:
    return index if stride == 1 else f"{index} * {stride}"


@dataclass(frozen=True)
class Layout:
    """Where element (e, n, k) of one weight lies: `offset + e*e_ + n*n_ + k*k_` elements from the pointer `arg`, or, where
    the experts are separate parameters, from the pointer found at arg[e].  `aligned`: those pointers divide by 16."""

    name: str
    stacked: bool
    offset: int
    e: int
    n: int
    k: int
    dtype: torch.dtype
    aligned: bool = True

    @property
    def arg(self) -> str:
        return self.name.upper()

    @property
    def index(self) -> int:
        """Which projection this weight or bias belongs to."""
        return int(self.name[1:])

    def offset_of(self, e: str) -> str:
        parts = [*([_term(e, self.e)] if self.e else []), *([str(self.offset)] if self.offset else [])]
        return f"({' + '.join(parts)})" if len(parts) > 1 else parts[0] if parts else "0"

    def base(self, e: str = "e64", mask: str = "") -> str:
        """The pointer to element (e, 0, 0)."""
        if self.stacked:
            return f"{self.arg} + {self.offset_of(e)}"
        address = f"tl.load({self.arg} + {e}{f', mask={mask}, other=0' if mask else ''})"
        if self.aligned and not mask:
            address = f"tl.multiple_of({address}, 16)"
        pointer = f"{address}.to(tl.pointer_type({TYPES[self.dtype]}))"
        return f"{pointer} + {self.offset}" if self.offset else pointer

    def at(self, n: str, k: str = "") -> str:
        return " + ".join([_term(n, self.n), *([_term(k, self.k)] if k else [])])

    def along(self, k: str) -> str:
        return _term(k, self.k)

    def step(self, k0: str) -> str:
        return " + " + _term(k0, self.k)

    def step_n(self, n0: str) -> str:
        return " + " + _term(n0, self.n)

    def tile(self, n0: str, k0: str, columns: str = "BN") -> str:
        """A tile [BK, columns] of expert e, by the tensor descriptor that `described` lays out: zeros past its ends."""
        if self.k == 1:
            return f"tl.trans(tl.reshape({self.arg}.load([e, {n0}, {k0}]), ({columns}, BK)))"
        return f"tl.reshape({self.arg}.load([e, {k0}, {n0}]), (BK, {columns}))"

    def block(self, config: Config, wide: int = 1) -> list[int]:
        """The block that `tile` loads at a time, of BN times `wide` columns."""
        columns = config.block_n * wide
        return [1, columns, config.block_k] if self.k == 1 else [1, config.block_k, columns]

    def described(self, experts: int, columns: int, length: int) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        """Shape and strides of the descriptor of E x `columns` x `length`: the dimension of unit stride is the last."""
        inner, outer = (length, columns) if self.k == 1 else (columns, length)
        step = self.n if self.k == 1 else self.k
        return (experts, outer, inner), (self.e or outer * step, step, 1)

    def no_descriptor(self, experts: int, unit: int = 1) -> str | None:
        """Why no tensor descriptor can say where this weight lies, or None; `unit`: the stride n that neighbours have."""
        if not self.stacked:
            return f"the experts of {self.name} are separate parameters"
        if self.k != 1 and self.n != unit:
            return f"{self.name} has no dimension of unit stride"
        size = self.dtype.itemsize
        strides = (self.n if self.k == 1 else self.k, self.e, self.offset)
        if not self.aligned or any(s * size % 16 for s in strides):
            return f"strides or start of {self.name} do not divide by 16 bytes"
        if strides[0] == 0 or (self.e == 0 and experts > 1):
            return f"{self.name} is expanded: one of its strides is 0"
        return None


@dataclass(frozen=True)
class Layouts:
    """The layout of every weight of a layer, by part."""

    projections: tuple[Layout, ...]
    projection_bias: tuple[Layout | None, ...]
    down: Layout
    down_bias: Layout | None


def named(spec: ExpertsSpec) -> list[tuple[str, Weight]]:
    """Every weight with its name in the text, in the order of spec.weights()."""
    found: list[tuple[str, Weight | None]] = [(f"w{i}", w) for i, w in enumerate(spec.projections)]
    found += [(f"b{i}", b) for i, b in enumerate(spec.projection_bias)]
    found += [("d", spec.down), ("db", spec.down_bias)]
    return [(name, w) for name, w in found if w is not None]


def collect(spec: ExpertsSpec, layouts: dict[str, Layout]) -> Layouts:
    count = len(spec.projections)
    return Layouts(
        tuple(layouts[f"w{i}"] for i in range(count)),
        tuple(layouts.get(f"b{i}") for i in range(count)),
        layouts["d"],
        layouts.get("db"),
    )


def interleaved(spec: ExpertsSpec, layouts: Layouts) -> bool:
    """Whether the two projections are every second column of one weight, in memory and in the parameter as it would be if
    contiguous: read together, in one product, and split after."""
    if len(layouts.projections) != 2 or spec.projections[0].params != spec.projections[1].params:
        return False
    gate, up = layouts.projections
    same = (gate.stacked, gate.e, gate.n, gate.k, gate.dtype) == (up.stacked, up.e, up.n, up.k, up.dtype)
    first, second = spec.projections
    return same and gate.stacked and gate.n == 2 and up.offset == gate.offset + 1 and 2 * (second.offset - first.offset) == first.n


def adjacent(spec: ExpertsSpec, projections: Sequence[Layout | Weight]) -> bool:
    """Whether each projection begins where the one before it ends: all rows together are one matrix [P*F, H]."""
    first, step = projections[0], spec.intermediate * projections[0].n
    one = len({w.params for w in spec.projections}) == 1
    return (
        one
        and len(projections) * step + spec.hidden * first.k < 2**31
        and all(
            (w.stacked, w.e, w.n, w.k, w.offset) == (first.stacked, first.e, first.n, first.k, first.offset + i * step)
            for i, w in enumerate(projections)
        )
    )


def read_together(spec: ExpertsSpec, layouts: Layouts) -> tuple[tuple[Layout, int, int], ...]:
    """What the gradient of x multiplies: (weight, first column of DZ, columns), one where all projections are one matrix."""
    F, weights = spec.intermediate, layouts.projections
    if interleaved(spec, layouts):
        return ((dataclasses.replace(weights[0], n=1), 0, 2 * F),)
    if adjacent(spec, weights):
        return ((weights[0], 0, len(weights) * F),)
    return tuple((w, i * F, F) for i, w in enumerate(weights))


def gradients(spec: ExpertsSpec, layouts: Layouts) -> list[str]:
    """What each launch of grad_matrix and grad_vector is for: names as in named(), "w" for all projections at once."""
    names = [name for name, _ in named(spec)]
    if not (interleaved(spec, layouts) or adjacent(spec, spec.projections)):
        return names
    return ["w", *(name for name in names if not name.startswith("w"))]


@lru_cache(1024)
def contiguous_layouts(spec: ExpertsSpec) -> Layouts:
    """Every parameter contiguous, aligned and of the spec's dtype."""
    return collect(spec, {n: Layout(n, w.stacked, w.offset, w.e, w.n, w.k, spec.dtype) for n, w in named(spec)})

"""How the weights of E experts are stored: every layout gives the same kind of operands to the forms.

An operand is a stack [E,N,K], or [E,K,N] where `transposed`, with a bias [E,N] or None.  `operands()` lists those of the
first projections (one that holds gate and up, or two) and then the down projection; `of(e)` lists the matrices of one expert.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from tests.models import spelling as write
from tests.models.spelling import Spelling


class Operand(NamedTuple):
    weight: Tensor
    transposed: bool
    bias: Tensor | None


class Layout(nn.Module):
    """Base: parameters are made by `make`, read by `operands` or (separate parameters) `of`."""

    stacked = True
    interleaved = False
    fused = True  # gate and up lie in one operand

    def __init__(self, E: int, H: int, F: int, gated: bool, bias: bool, dtype: torch.dtype, spelling: Spelling) -> None:
        super().__init__()
        self.E, self.H, self.F, self.gated, self.biased, self.dtype = E, H, F, gated, bias, dtype
        self.spelling = spelling
        self.N = 2 * F if gated and self.fused else F  # width of a first operand
        self.make()

    def make(self) -> None:
        raise NotImplementedError

    def operands(self) -> list[Operand]:
        raise NotImplementedError

    def of(self, e: int) -> list[Operand]:
        return [Operand(o.weight[e], o.transposed, None if o.bias is None else o.bias[e]) for o in self.operands()]

    def halves(self, first: list[Tensor]) -> list[Tensor]:
        """The products with the first operands -> gate and up, or the one projection."""
        if len(first) == 2 or not self.gated:
            return first
        if self.interleaved:
            return [first[0][..., ::2], first[0][..., 1::2]]
        return list(write.halve(self.spelling, first[0]))

    def weight(self, *shape: int, scale: float = 1.0) -> nn.Parameter:
        return nn.Parameter((torch.randn(*shape) * scale * shape[-1] ** -0.5).to(self.dtype))

    def biases(self) -> None:
        self.up_bias = self.weight(self.E, self.N) if self.biased else None
        self.down_bias = self.weight(self.E, self.H) if self.biased else None


class Rows(Layout):
    """gate_up [E,2F,H], down [E,H,F]: most of transformers. Not gated: up [E,F,H]."""

    def make(self) -> None:
        self.up = self.weight(self.E, self.N, self.H)
        self.down = self.weight(self.E, self.H, self.F)
        self.biases()

    def operands(self) -> list[Operand]:
        return [Operand(self.up, False, self.up_bias), Operand(self.down, False, self.down_bias)]


class RowsInterleaved(Rows):
    """As Rows, gate in the even rows, up in the odd."""

    interleaved = True


class Transposed(Layout):
    """gate_up [E,H,2F], down [E,F,H]."""

    def make(self) -> None:
        self.up = self.weight(self.E, self.H, self.N)
        self.down = self.weight(self.E, self.F, self.H)
        self.biases()

    def operands(self) -> list[Operand]:
        return [Operand(self.up, True, self.up_bias), Operand(self.down, True, self.down_bias)]


class TransposedInterleaved(Transposed):
    """As Transposed, gate in the even columns, up in the odd: gpt-oss."""

    interleaved = True


class Three(Layout):
    """w1 and w3 [E,F,H], w2 [E,H,F]."""

    fused = False

    def make(self) -> None:
        self.w1 = self.weight(self.E, self.F, self.H)
        self.w3 = self.weight(self.E, self.F, self.H) if self.gated else None
        self.w2 = self.weight(self.E, self.H, self.F)
        self.biases()
        self.w3_bias = self.weight(self.E, self.F) if self.biased and self.gated else None

    def operands(self) -> list[Operand]:
        first = [Operand(self.w1, False, self.up_bias)]
        if self.w3 is not None:
            first.append(Operand(self.w3, False, self.w3_bias))
        return [*first, Operand(self.w2, False, self.down_bias)]


class ThreeTransposed(Layout):
    """w1 and w3 [E,H,F], w2 [E,F,H]."""

    fused = False

    def make(self) -> None:
        self.w1, self.w2 = self.weight(self.E, self.H, self.F), self.weight(self.E, self.F, self.H)
        self.w3 = self.weight(self.E, self.H, self.F) if self.gated else None
        self.biases()

    def operands(self) -> list[Operand]:
        first = [Operand(w, True, self.up_bias) for w in (self.w1, self.w3) if w is not None]
        return [*first, Operand(self.w2, True, self.down_bias)]


class Flat(Layout):
    """w1, v1 and w2 all [E*F,H], viewed [E,F,H]; the down projection is used transposed: DBRX."""

    fused = False

    def make(self) -> None:
        self.w1, self.w2 = self.weight(self.E * self.F, self.H), self.weight(self.E * self.F, self.H)
        self.v1 = self.weight(self.E * self.F, self.H) if self.gated else None
        self.biases()

    def operands(self) -> list[Operand]:
        def stack(w: Tensor) -> Tensor:
            return w.view(self.E, self.F, self.H)

        first = [Operand(stack(w), False, self.up_bias) for w in (self.w1, self.v1) if w is not None]
        return [*first, Operand(stack(self.w2), True, self.down_bias)]


class Sliced(Rows):
    """Rows inside larger parameters: more experts, rows and columns than are used."""

    def make(self) -> None:
        self.up = self.weight(self.E + 1, self.N + 3, self.H + 8)
        self.down = self.weight(self.E + 2, self.H + 1, self.F + 16)
        self.biases()

    def operands(self) -> list[Operand]:
        up = self.up[1:, 2 : 2 + self.N, : self.H]
        down = self.down[: self.E, 1:, 8 : 8 + self.F]
        return [Operand(up, False, self.up_bias), Operand(down, False, self.down_bias)]


class Expanded(Rows):
    """One expert's parameters, expanded to E: gradients of all experts add up in them."""

    def make(self) -> None:
        self.up = self.weight(1, self.N, self.H)
        self.down = self.weight(1, self.H, self.F)
        self.biases()

    def operands(self) -> list[Operand]:
        up, down = (w.expand(self.E, -1, -1) for w in (self.up, self.down))
        return [Operand(up, False, self.up_bias), Operand(down, False, self.down_bias)]


class Unaligned(Rows):
    """Rows that start one element into their storage, at no multiple of 16 bytes."""

    def weight(self, *shape: int, scale: float = 1.0) -> nn.Parameter:
        aligned = super().weight(*shape, scale=scale)
        storage = torch.zeros(aligned.numel() + 1, dtype=self.dtype)
        shifted = storage[1:].view(shape)
        shifted.copy_(aligned.detach())
        return nn.Parameter(shifted)


class Strided(Rows):
    """Parameters that are not contiguous: transposed when they were made."""

    def weight(self, *shape: int, scale: float = 1.0) -> nn.Parameter:
        if len(shape) < 3:
            return super().weight(*shape, scale=scale)
        made = super().weight(shape[0], shape[2], shape[1], scale=scale)
        return nn.Parameter(made.detach().transpose(1, 2))


class Separate(Layout):
    """E parameters of each kind, in lists."""

    stacked = False

    def make(self) -> None:
        self.up = nn.ParameterList([self.weight(self.N, self.H) for _ in range(self.E)])
        self.down = nn.ParameterList([self.weight(self.H, self.F) for _ in range(self.E)])
        self.up_bias = nn.ParameterList([self.weight(self.N) for _ in range(self.E if self.biased else 0)])
        self.down_bias = nn.ParameterList([self.weight(self.H) for _ in range(self.E if self.biased else 0)])

    def of(self, e: int) -> list[Operand]:
        up_bias, down_bias = (self.up_bias[e], self.down_bias[e]) if self.biased else (None, None)
        return [Operand(self.up[e], False, up_bias), Operand(self.down[e], False, down_bias)]


class Modules(Layout):
    """E small modules of nn.Linear: gate, up and down."""

    stacked = False
    fused = False

    def make(self) -> None:
        def linears(rows: int, columns: int) -> nn.ModuleList:
            return nn.ModuleList([nn.Linear(columns, rows, self.biased, dtype=self.dtype) for _ in range(self.E)])

        self.gate = linears(self.F, self.H)
        self.up = linears(self.F, self.H) if self.gated else None
        self.down = linears(self.H, self.F)

    def of(self, e: int) -> list[Operand]:
        lists = [self.gate, self.up, self.down] if self.up is not None else [self.gate, self.down]
        return [Operand(m[e].weight, False, m[e].bias) for m in lists]


LAYOUTS: dict[str, type[Layout]] = {
    "rows": Rows,
    "rows_interleaved": RowsInterleaved,
    "transposed": Transposed,
    "transposed_interleaved": TransposedInterleaved,
    "three": Three,
    "three_transposed": ThreeTransposed,
    "flat": Flat,
    "sliced": Sliced,
    "expanded": Expanded,
    "unaligned": Unaligned,
    "strided": Strided,
    "separate": Separate,
    "modules": Modules,
}
STACKED = tuple(name for name, layout in LAYOUTS.items() if layout.stacked)

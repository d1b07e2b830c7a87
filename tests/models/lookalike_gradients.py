"""Look-alikes whose forward is right and whose gradient, rounding or memory is not that of the layer they resemble."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.models.lookalikes import INNER, Batched, Grouped, H, Loop, lookalike


class QuarterGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 0.25


# ---------------------------------------------------------------- gradients that stop, or change, on their way to a parameter


@lookalike("any")
class DownDetached(Grouped):
    def last(self, x: Tensor, h: Tensor, ends: Tensor) -> Tensor:
        return self.mm(h, self.down.detach(), ends)


@lookalike("any")
class DownAsData(Batched):
    def bmm(self, weight: Tensor, pair: Tensor, rows: Tensor) -> Tensor:
        return super().bmm(weight.data if weight is self.down else weight, pair, rows)


@lookalike("any")
class OneMatrixViewedWithoutGradients(Loop):
    def mlp(self, e: int, rows: Tensor) -> Tensor:
        with torch.no_grad():
            down = self.down[e]
        return self.act(rows @ self.gate[e].t(), rows @ self.up[e].t()) @ down.t()


@lookalike("any")
class GradientOfDownScaled(Grouped):
    def last(self, x: Tensor, h: Tensor, ends: Tensor) -> Tensor:
        return self.mm(h, QuarterGradient.apply(self.down), ends)


# ---------------------------------------------------------------- memory


@lookalike("any")
class TransposedCopyWritten(Grouped):
    def last(self, x: Tensor, h: Tensor, ends: Tensor) -> Tensor:
        down = self.down.transpose(1, 2).clone()
        with torch.no_grad():
            down.mul_(0.5)
        return self.mm(h, down.transpose(1, 2), ends)


@lookalike("any")
class SourceWrittenAfterItsCopy(Grouped):
    def last(self, x: Tensor, h: Tensor, ends: Tensor) -> Tensor:
        frozen = self.down.detach() * 1
        down = frozen.transpose(1, 2).clone()
        frozen.mul_(0.5)
        return self.mm(h, down.transpose(1, 2), ends)


@lookalike("any")
class TwoViewsOfOneBuffer(Grouped):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("both", torch.randn(2, self.E, INNER, H) / 4)
        self.views = list(self.both)

    def first(self, x: Tensor, rows: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = self.views
        return self.mm(rows, gate.to(x.dtype), ends), self.mm(rows, up.to(x.dtype), ends)


@lookalike("any")
class ScoresWrittenBeforeTheBias(Batched):
    """The sigmoid overwrites the logits, and the selection bias is read later."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        score = self.logits(x).sigmoid_()
        ids = (score + self.correction).topk(self.K, -1)[1]
        return score.gather(1, ids), ids


@lookalike("any")
class FlatWeightsLeave(Grouped):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        w, ids = self.scores(x).topk(self.K, -1)
        w = w.flatten() * 2.5
        return self.experts(x, w, ids), w


# ---------------------------------------------------------------- rounding


class Rounds:
    """Rounds on the way: only eager knows the numbers."""

    rounds = True


@lookalike("any")
class WeightsRounded(Rounds, Loop):
    def weight(self, w: Tensor, token: Tensor, slot: Tensor) -> Tensor:
        return super().weight(w, token, slot).half().float()


@lookalike("any")
class RowsRounded(Rounds, Loop):
    def rows(self, x: Tensor, token: Tensor) -> Tensor:
        return x[token].half().float()


@lookalike("any")
class HiddenRounded(Rounds, Grouped):
    def act(self, gate: Tensor, up: Tensor) -> Tensor:
        return super().act(gate, up).bfloat16().float()


@lookalike("any")
class ParametersRounded(Rounds, Grouped):
    def last(self, x: Tensor, h: Tensor, ends: Tensor) -> Tensor:
        down = self.down.transpose(1, 2).to(torch.float16).float()
        return self.mm(h, down.transpose(1, 2), ends)


@lookalike("any")
class SumRounded(Rounds, Grouped):
    def combine(self, x: Tensor, y: Tensor, order: Tensor) -> Tensor:
        return super().combine(x, y, order).half().float()

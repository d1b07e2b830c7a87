"""Look-alikes of the spellings in home_spelled.py."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.models.home_spelled import Shaped, Top1, dense_gates
from tests.models.lookalikes import Base, Grouped, H, Loop, lookalike


@lookalike("declined")
class RowsGatheredBySlot(Grouped):
    def rows(self, x: Tensor, order: Tensor) -> Tensor:
        return torch.gather(x, 0, (order % self.K).reshape(-1, 1).expand(-1, H))


@lookalike("declined")
class FeaturesGathered(Grouped):
    """Each row takes the features that a token's number names."""

    def rows(self, x: Tensor, order: Tensor) -> Tensor:
        token = (order // self.K).reshape(-1, 1).expand(-1, H)
        return x.repeat_interleave(self.K, 0).gather(1, token)


@lookalike("declined")
class GatesOfTheNextExpert(Loop):
    def experts(self, x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
        gates, ids = dense_gates(self, x)
        out = torch.zeros_like(x)
        for e in range(self.E):
            token, _ = torch.where(ids == e)
            out = out.index_add(0, token, self.mlp(e, x[token]) * gates[token, (e + 1) % self.E, None])
        return out


@lookalike("declined")
class GatesOfAllExpertsInALoop(Loop):
    """The probabilities of all experts, not those among the chosen."""

    def experts(self, x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
        scores, out = self.scores(x * 1).roll(1, 0), torch.zeros_like(x)
        for e in range(self.E):
            token, _ = torch.where(ids == e)
            out = out.index_add(0, token, self.mlp(e, x[token]) * scores[token, e, None])
        return out


@lookalike("declined")
class MaskTransposed(Shaped):
    """As many sequences as tokens in each, and the sum is indexed by the mask of the other dimension."""

    tokens = 4

    def forward(self, x: Tensor) -> Tensor:
        x = x.view(2, 2, H)
        gates, ids = dense_gates(self, x)
        out, rows, flat = torch.zeros_like(x), x.view(-1, H), gates.view(-1, self.E)
        for e in range(self.E):
            mask = (ids == e).any(-1)
            hit = mask.view(-1)
            out[mask.t()] += self.mlp(e, rows[hit]) * flat[hit, e].unsqueeze(1)
        return out.view(4, H)


@lookalike("declined")
class WeightsInSlotOrder(Loop):
    """The weights of an expert's pairs come slot by slot, its rows token by token."""

    def experts(self, x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(self.E):
            hit = ids == e
            out[hit.any(-1)] += self.mlp(e, x[hit.any(-1)]) * w.t()[hit.t()].unsqueeze(-1)
        return out


@lookalike("declined")
class WrittenOverWithTwoSlots(Loop):
    """out[mask] = y where a token has two experts: the last one stays."""

    def experts(self, x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(self.E):
            hit = (ids == e).any(-1)
            out[hit] = self.mlp(e, x[hit])
        return out


@lookalike("any")
class SumOfTwoTimesTheBestWeight(Loop):
    def experts(self, x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
        return super().experts(x, torch.ones_like(w), ids) * w[:, :1]


@lookalike("experts")
class TimesTheWeightOfAnotherRouter(Top1, Loop):
    def experts(self, x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(self.E):
            token = (ids.view(-1) == e).nonzero(as_tuple=True)[0]
            out[token] = self.mlp(e, x[token])
        return out * self.other(x)[0]


class Sorted(Top1, Grouped):
    def experts(self, x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
        flat = ids.view(-1)
        order = torch.argsort(flat, stable=True)
        ends = self.ends(x, flat)
        gate, up = self.first(x, (x * w)[order], ends)
        return self.order_back(x, self.last(x, self.act(gate, up), ends), order)

    def order_back(self, x: Tensor, y: Tensor, order: Tensor) -> Tensor:
        return y[torch.argsort(order)]


@lookalike("declined")
class NotBrought(Sorted):
    """The rows stay in expert order."""

    def order_back(self, x: Tensor, y: Tensor, order: Tensor) -> Tensor:
        return y


@lookalike("declined")
class BroughtTheWrongWay(Sorted):
    def order_back(self, x: Tensor, y: Tensor, order: Tensor) -> Tensor:
        return y[order]


@lookalike("any")
class RowsBeforeTheWeightLeave(Top1, Grouped):
    """The layer's output is returned before and after it is weighed."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        w, ids = self.route(x)
        order = torch.argsort(ids.view(-1), stable=True)
        ends = self.ends(x, ids.view(-1))
        gate, up = self.first(x, x[order], ends)
        y = self.last(x, self.act(gate, up), ends)[torch.argsort(order)]
        return y, y * w


@lookalike("experts")
class OtherGatesLeave(Base):
    """What leaves is scattered from the probabilities as they were chosen; the experts are weighed by those made to sum to 1."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        best, ids = self.scores(x).topk(self.K, -1)
        w = best / best.sum(-1, keepdim=True)
        gates = torch.zeros(x.shape[0], self.E, dtype=x.dtype).scatter(1, ids, best)
        gate, up = (torch.einsum("th,tkfh->tkf", x, m[ids]) for m in (self.gate, self.up))
        y = torch.einsum("tkf,tkhf->tkh", self.act(gate, up), self.down[ids])
        return (y * w.unsqueeze(-1)).sum(1), gates


@lookalike("any")
class GatesWrittenBeforeTheyLeave(Base):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        w, ids = self.route(x)
        gates = torch.zeros(x.shape[0], self.E, dtype=x.dtype).scatter(1, ids, w)
        out = torch.zeros_like(x)
        for e in range(self.E):
            token, _ = torch.where(ids == e)
            y = torch.relu(x[token] @ self.up[e].t()) @ self.down[e].t()
            out = out.index_add(0, token, y * gates[token, e, None])
        gates = gates * 1
        gates[:, 0] = 0
        return out, gates


@lookalike("experts")
class GatesOfASoftmaxLeave(Loop):
    """Where a chosen logit is NaN all gates of the token are."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        gates, ids = dense_gates(self, x)
        out = torch.zeros_like(x)
        for e in range(self.E):
            token, _ = torch.where(ids == e)
            out = out.index_add(0, token, self.mlp(e, x[token]) * gates[token, e, None])
        return out, gates


@lookalike("any")
class GoesOnAfterTheOnlyRow(Sorted):
    """More is done with the output of a layer whose tokens have one row each."""

    def order_back(self, x: Tensor, y: Tensor, order: Tensor) -> Tensor:
        return (y[torch.argsort(order)] + 1).relu()


class ByPair(Loop):
    def experts(self, x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
        flat, rows = ids.view(-1), self.repeated(x)
        y = torch.zeros_like(rows)
        for e in self.visited():
            y = self.write(y, self.to(flat, e), self.mlp(e, rows[flat == e]))
        return (y.view(*w.shape, -1) * w.unsqueeze(-1)).sum(1)

    def repeated(self, x: Tensor) -> Tensor:
        return x.repeat_interleave(self.K, dim=0)

    def to(self, flat: Tensor, e: int) -> Tensor:
        return flat == e

    def write(self, y: Tensor, at: Tensor, rows: Tensor) -> Tensor:
        y[at] = rows
        return y


@lookalike("declined")
class RowsRepeatedAsAWhole(ByPair):
    """Pair r reads token r modulo T."""

    def repeated(self, x: Tensor) -> Tensor:
        return x.repeat(self.K, 1)


@lookalike("declined")
class OneExpertLeftOutByPair(ByPair):
    def visited(self) -> list[int]:
        return [0, 2, 3]


@lookalike("declined")
class WrittenToTheTurnedPairs(ByPair):
    """The rows of an expert go to its pairs when these are listed slot by slot."""

    def to(self, flat: Tensor, e: int) -> Tensor:
        return flat.view(-1, self.K).t().reshape(-1) == e


@lookalike("declined")
class HalvedInBetween(ByPair):
    def write(self, y: Tensor, at: Tensor, rows: Tensor) -> Tensor:
        y = y * 0.5
        y[at] = rows
        return y


@lookalike("experts")
class GatesLeaveBeforeTheyAreNormalised(Base):
    """The weights are gathered from the gates that leave, and made to sum to 1 after that."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        best, ids = self.scores(x).topk(self.K, -1)
        gates = torch.zeros(x.shape[0], self.E, dtype=x.dtype).scatter(1, ids, best)
        w = gates.gather(1, ids)
        w = w / w.sum(-1, keepdim=True)
        gate, up = (torch.einsum("th,tkfh->tkf", x, m[ids]) for m in (self.gate, self.up))
        y = torch.einsum("tkf,tkhf->tkh", self.act(gate, up), self.down[ids])
        return (y * w.unsqueeze(-1)).sum(1), gates

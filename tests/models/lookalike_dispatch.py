"""Look-alikes that go wrong between the router and the sum over slots, in sorted, batched and dense form."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.models.lookalikes import INNER, Batched, Dense, Grouped, H, lookalike

# ---------------------------------------------------------------- sorted rows


@lookalike("declined")
class RowsOfSlotsNotTokens(Grouped):
    def rows(self, x: Tensor, order: Tensor) -> Tensor:
        return x[order % self.K]


@lookalike("declined")
class RowsByAnotherDivisor(Grouped):
    def rows(self, x: Tensor, order: Tensor) -> Tensor:
        return x[order // (self.K + 1)]


@lookalike("declined")
class RowsOfAnotherSort(Grouped):
    def rows(self, x: Tensor, order: Tensor) -> Tensor:
        return x[torch.sort(self.other(x)[1].reshape(-1))[1] // self.K]


@lookalike("declined")
class SortedDescending(Grouped):
    def sort(self, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        by_expert, order = torch.sort(ids.reshape(-1), descending=True)
        return by_expert, order


@lookalike("declined")
class SortedNextToTheEnd(Grouped):
    """Ids are shifted by one: expert e gets the rows of e - 1, the last expert's rows go to nobody."""

    def sort(self, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        by_expert, order = torch.sort(ids.reshape(-1) + 1)
        return by_expert, order


@lookalike("declined")
class SortedSlotMajor(Grouped):
    """Pairs are laid out slot by slot, and divided as if token by token."""

    def sort(self, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        by_expert, order = torch.sort(ids.t().reshape(-1))
        return by_expert, order


@lookalike("declined")
class OffsetsOfAnotherRouting(Grouped):
    def ends(self, x: Tensor, by_expert: Tensor) -> Tensor:
        return self.counts(self.other(x)[1].reshape(-1)).cumsum(0, dtype=torch.int32)


@lookalike("declined")
class CountsInAnotherRange(Grouped):
    def counts(self, by_expert: Tensor) -> Tensor:
        return torch.histc(by_expert.float(), bins=self.E, min=0, max=self.E + 1)


@lookalike("declined")
class CountsOfFewerExperts(Grouped):
    def counts(self, by_expert: Tensor) -> Tensor:
        return F.pad(torch.histc(by_expert.float(), bins=self.E - 1, min=0, max=self.E - 2), (0, 1))


@lookalike("declined")
class ExclusiveOffsets(Grouped):
    def ends(self, x: Tensor, by_expert: Tensor) -> Tensor:
        counts = self.counts(by_expert).to(torch.int32)
        return (counts.cumsum(0) - counts).to(torch.int32)


@lookalike("declined")
class OffsetsPlusOne(Grouped):
    def ends(self, x: Tensor, by_expert: Tensor) -> Tensor:
        return (super().ends(x, by_expert) + 1).clamp(max=by_expert.shape[0])


@lookalike("declined")
class DownOnOtherOffsets(Grouped):
    def last(self, x: Tensor, h: Tensor, ends: Tensor) -> Tensor:
        other = self.counts(self.other(x)[1].reshape(-1)).cumsum(0, dtype=torch.int32)
        return self.mm(h, self.down, other)


@lookalike("declined")
class UpOnOtherRows(Grouped):
    def first(self, x: Tensor, rows: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
        return self.mm(rows, self.gate, ends), self.mm(rows.flip(0), self.up, ends)


@lookalike("any")
class UpOfTheNextExpert(Grouped):
    """The rolled stack is a stack of weights like any other."""

    def first(self, x: Tensor, rows: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
        return self.mm(rows, self.gate, ends), self.mm(rows, self.up.roll(1, 0), ends)


@lookalike("any")
class DownOfTheExpertsReversed(Grouped):
    def last(self, x: Tensor, h: Tensor, ends: Tensor) -> Tensor:
        return self.mm(h, self.down.flip(0), ends)


@lookalike("declined")
class XWrittenBetweenGateAndUp(Grouped):
    def first(self, x: Tensor, rows: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
        gate = self.mm(rows, self.gate, ends)
        rows.mul_(1.5)
        return gate, self.mm(rows, self.up, ends)

    def mm(self, rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        return super().mm(rows * 1, weight, ends)


@lookalike("declined")
class ActivationReadsAnotherRow(Grouped):
    def act(self, gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate) * up.roll(1, 0)


@lookalike("declined")
class ActivationReadsAnotherFeature(Grouped):
    def act(self, gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate) * up.roll(1, 1)


@lookalike("declined")
class ActivationNormalisesFeatures(Grouped):
    def act(self, gate: Tensor, up: Tensor) -> Tensor:
        return gate.softmax(-1) * up


@lookalike("declined")
class ActivationScalesByTheBatch(Grouped):
    def act(self, gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate) * up / gate.abs().max()


@lookalike("declined")
class HiddenRowsNormalised(Grouped):
    def act(self, gate: Tensor, up: Tensor) -> Tensor:
        return F.rms_norm(F.silu(gate) * up, (INNER,))


@lookalike("declined")
class OutputRowsNormalised(Grouped):
    def last(self, x: Tensor, h: Tensor, ends: Tensor) -> Tensor:
        return F.rms_norm(self.mm(h, self.down, ends), (H,))


@lookalike("declined")
class OutputRowsRectified(Grouped):
    """A nonlinearity between the down projection and the weight."""

    def last(self, x: Tensor, h: Tensor, ends: Tensor) -> Tensor:
        return F.relu(self.mm(h, self.down, ends))


@lookalike("declined")
class WeightsNotSorted(Grouped):
    def weights(self, x: Tensor, w: Tensor, order: Tensor) -> Tensor:
        return w.reshape(-1)


@lookalike("declined")
class WeightsOfAnotherOrder(Grouped):
    def weights(self, x: Tensor, w: Tensor, order: Tensor) -> Tensor:
        return w.reshape(-1)[torch.sort(self.other(x)[1].reshape(-1))[1]]


@lookalike("declined")
class WrongInverse(Grouped):
    """The order itself for its inverse."""

    def back(self, order: Tensor) -> Tensor:
        return order


@lookalike("declined")
class InverseOfAnotherSort(Grouped):
    def combine(self, x: Tensor, y: Tensor, order: Tensor) -> Tensor:
        return super().combine(x, y, torch.sort(self.other(x)[1].reshape(-1))[1])


@lookalike("declined")
class InverseHalfWritten(Grouped):
    def back(self, order: Tensor) -> Tensor:
        inverse = torch.zeros_like(order)
        half = order.shape[0] // 2
        inverse[order[:half]] = torch.arange(half)
        return inverse


@lookalike("declined")
class InverseCountsFromOne(Grouped):
    def back(self, order: Tensor) -> Tensor:
        inverse = torch.empty_like(order)
        inverse[order] = (torch.arange(order.shape[0]) + 1).clamp(max=order.shape[0] - 1)
        return inverse


@lookalike("declined")
class SumOverTokensWhereTEqualsK(Grouped):
    """K = T = 2 in a graph with symbolic sizes: [K,T,H] summed over what only happens to be as long as K."""

    tokens = 2

    def combine(self, x: Tensor, y: Tensor, order: Tensor) -> Tensor:
        return y[self.back(order)].view(self.K, x.shape[0], H).sum(0)


@lookalike("declined")
class ProductOverSlots(Grouped):
    def combine(self, x: Tensor, y: Tensor, order: Tensor) -> Tensor:
        return y[self.back(order)].view(x.shape[0], self.K, H).prod(1)


@lookalike("declined")
class LargestOfTheSlots(Grouped):
    def combine(self, x: Tensor, y: Tensor, order: Tensor) -> Tensor:
        return y[self.back(order)].view(x.shape[0], self.K, H).amax(1)


@lookalike("declined")
class OneSlotLeftOut(Grouped):
    def combine(self, x: Tensor, y: Tensor, order: Tensor) -> Tensor:
        return y[self.back(order)].view(x.shape[0], self.K, H)[:, 1:].sum(1)


@lookalike("declined")
class RunningSumOverSlots(Grouped):
    def combine(self, x: Tensor, y: Tensor, order: Tensor) -> Tensor:
        return y[self.back(order)].view(x.shape[0], self.K, H).cumsum(1).sum(1)


@lookalike("declined")
class AddedToTheWrongTokens(Grouped):
    def combine(self, x: Tensor, y: Tensor, order: Tensor) -> Tensor:
        return torch.zeros_like(x).index_add(0, order % x.shape[0], y)


@lookalike("declined")
class HiddenRowsLeave(Grouped):
    """An inner value is returned too: it must still be produced."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        w, ids = self.route(x)
        y = self.experts(x, w, ids)
        return y, self.seen

    def act(self, gate: Tensor, up: Tensor) -> Tensor:
        self.seen = F.silu(gate) * up
        return self.seen


# ---------------------------------------------------------------- gathered weights


@lookalike("declined")
class RowsRepeatedNotInterleaved(Batched):
    def rows(self, x: Tensor) -> Tensor:
        return x.repeat(self.K, 1)


@lookalike("declined")
class DownOfAnotherRouting(Batched):
    def down_ids(self, x: Tensor, ids: Tensor) -> Tensor:
        return self.other(x)[1].reshape(-1)


@lookalike("declined")
class UpOfSlotsReversed(Batched):
    def up_ids(self, x: Tensor, ids: Tensor) -> Tensor:
        return ids.flip(1).reshape(-1)


@lookalike("declined")
class DownOfTheNextExpert(Batched):
    def down_ids(self, x: Tensor, ids: Tensor) -> Tensor:
        return (ids.reshape(-1) + 1) % self.E


@lookalike("declined")
class SlotsAndTokensSwapped(Batched):
    tokens = 2

    def combine(self, x: Tensor, y: Tensor, w: Tensor) -> Tensor:
        return (y * w.reshape(-1, 1)).view(self.K, x.shape[0], H).sum(0)


@lookalike("any")
class WeightsOfSlotsReversed(Batched):
    def combine(self, x: Tensor, y: Tensor, w: Tensor) -> Tensor:
        return (y * w.flip(1).reshape(-1, 1)).view(x.shape[0], self.K, H).sum(1)


@lookalike("any")
class WeighedTwice(Batched):
    def combine(self, x: Tensor, y: Tensor, w: Tensor) -> Tensor:
        return (y * w.reshape(-1, 1) * w.reshape(-1, 1)).view(x.shape[0], self.K, H).sum(1)


@lookalike("any")
class MeanOverSlots(Batched):
    def combine(self, x: Tensor, y: Tensor, w: Tensor) -> Tensor:
        return (y * w.reshape(-1, 1)).view(x.shape[0], self.K, H).mean(1)


# ---------------------------------------------------------------- dense


@lookalike("declined")
class SumOverTokensWhereTEqualsE(Dense):
    tokens = 4

    def combine(self, y: Tensor) -> Tensor:
        return y.sum(1)


@lookalike("any")
class DownOfTheNextExpertDense(Dense):
    def product(self, h: Tensor) -> Tensor:
        return torch.bmm(h, self.down.roll(1, 0).transpose(1, 2))


@lookalike("declined")
class EveryExpertAddsSomething(Dense):
    """Gates of the experts that were not chosen are small, not zero."""

    def gates(self, x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
        return torch.full((x.shape[0], self.E), 0.01).scatter(1, ids, w)


@lookalike("declined")
class GatesOfAllExperts(Dense):
    """A plain mixture: no choice at all."""

    def gates(self, x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
        return self.scores(x)


@lookalike("declined")
class ScatteredAlongTokens(Dense):
    """T = E: the weights are scattered down the columns."""

    tokens = 4

    def gates(self, x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
        return torch.zeros(x.shape[0], self.E).scatter(0, ids, w)

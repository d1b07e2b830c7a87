"""Look-alikes among loops over experts, and routers that are not of the grammar's form."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.models.lookalikes import Base, Batched, Grouped, H, Loop, lookalike


@lookalike("declined")
class OneExpertTwice(Loop):
    def visited(self) -> list[int]:
        return [0, 1, 1, 2, 3]


@lookalike("any")
class OneExpertLeftOut(Loop):
    """Experts 0, 2 and 3: the pairs of expert 1 add nothing."""

    def visited(self) -> list[int]:
        return [0, 2, 3]


@lookalike("any")
class LastExpertLeftOut(Loop):
    def visited(self) -> list[int]:
        return list(range(self.E - 1))


@lookalike("any")
class MaskOffByOne(Loop):
    """Expert e works on the pairs of id e + 1: id 0 is dropped, the last expert idle."""

    def mask(self, ids: Tensor, e: int) -> Tensor:
        return ids == e + 1


@lookalike("declined")
class MaskOfThisAndLaterExperts(Loop):
    def mask(self, ids: Tensor, e: int) -> Tensor:
        return ids >= e


@lookalike("declined")
class MaskOfAllOthers(Loop):
    def mask(self, ids: Tensor, e: int) -> Tensor:
        return ids != e


@lookalike("declined")
class UpOfTheNextExpertInTheLoop(Loop):
    def mlp(self, e: int, rows: Tensor) -> Tensor:
        up = self.up[(e + 1) % self.E]
        return F.linear(self.act(F.linear(rows, self.gate[e]), F.linear(rows, up)), self.down[e])


@lookalike("declined")
class DownOfExpertZero(Loop):
    def mlp(self, e: int, rows: Tensor) -> Tensor:
        return F.linear(self.act(F.linear(rows, self.gate[e]), F.linear(rows, self.up[e])), self.down[0])


@lookalike("declined")
class ActivationOfOneExpertDiffers(Loop):
    def mlp(self, e: int, rows: Tensor) -> Tensor:
        gate, up = F.linear(rows, self.gate[e]), F.linear(rows, self.up[e])
        return F.linear((F.gelu(gate) if e == 2 else F.silu(gate)) * up, self.down[e])


@lookalike("declined")
class WeightOfTheFirstSlot(Loop):
    def weight(self, w: Tensor, token: Tensor, slot: Tensor) -> Tensor:
        return w[token, 0, None]


@lookalike("declined")
class WeightOfSlotAndTokenSwapped(Loop):
    tokens = 2

    def weight(self, w: Tensor, token: Tensor, slot: Tensor) -> Tensor:
        return w[slot, token, None]


@lookalike("declined")
class RowsOfSlots(Loop):
    """x is indexed by the slot, and not by the token."""

    def experts(self, x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(self.E):
            token, slot = torch.where(ids == e)
            out = out.index_add(0, token, self.mlp(e, x[slot]) * w[token, slot, None])
        return out


@lookalike("declined")
class Overwritten(Loop):
    """The last expert of a token wins."""

    def add(self, out: Tensor, token: Tensor, y: Tensor) -> Tensor:
        out = out.clone()
        out[token] = y
        return out


@lookalike("any")
class AddedTwofold(Loop):
    def add(self, out: Tensor, token: Tensor, y: Tensor) -> Tensor:
        return out.index_add(0, token, y, alpha=2)


@lookalike("declined")
class Subtracted(Loop):
    def add(self, out: Tensor, token: Tensor, y: Tensor) -> Tensor:
        out = out.clone()
        out[token] -= y
        return out


@lookalike("declined")
class SumDecays(Loop):
    """The sum so far is halved before each expert."""

    def add(self, out: Tensor, token: Tensor, y: Tensor) -> Tensor:
        return (out * 0.5).index_add(0, token, y)


@lookalike("any")
class StartsFromX(Loop):
    def start(self, x: Tensor) -> Tensor:
        return x.clone()


@lookalike("declined")
class StartsFromOnes(Loop):
    def start(self, x: Tensor) -> Tensor:
        return torch.ones_like(x)


@lookalike("declined")
class LaterExpertsSeeTheSum(Loop):
    """Each expert works on what the experts before it have added."""

    def experts(self, x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
        out = x.clone()
        for e in range(self.E):
            token, slot = torch.where(ids == e)
            out = out.index_add(0, token, self.mlp(e, out[token]) * w[token, slot, None])
        return out


@lookalike("declined")
class XWrittenInsideTheLoop(Loop):
    def experts(self, x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
        x, out = x.clone(), torch.zeros_like(x)
        for e in range(self.E):
            token, slot = torch.where(ids == e)
            out = out.index_add(0, token, self.mlp(e, x[token]) * w[token, slot, None])
            x.mul_(0.9)
        return out

    def mlp(self, e: int, rows: Tensor) -> Tensor:
        return super().mlp(e, rows * 1)


@lookalike("declined")
class RoutedAgainInTheMiddle(Loop):
    """Half of the experts go by one router, half by another."""

    def experts(self, x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        w_2, ids_2 = self.other(x)
        for e in range(self.E):
            w_e, ids_e = (w, ids) if e < 2 else (w_2, ids_2)
            token, slot = torch.where(ids_e == e)
            out = out.index_add(0, token, self.mlp(e, x[token]) * w_e[token, slot, None])
        return out


@lookalike("declined")
class PartialSumLeaves(Loop):
    """The sum over the first experts is returned too."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        w, ids = self.route(x)
        out, half = torch.zeros_like(x), x
        for e in range(self.E):
            token, slot = torch.where(ids == e)
            out = out.index_add(0, token, self.mlp(e, x[token]) * w[token, slot, None])
            half = out if e == 1 else half
        return out, half


# ---------------------------------------------------------------- routers


@lookalike("experts")
class WeightsOfAnotherRouter(Grouped):
    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.other(x)[0], super().route(x)[1]


@lookalike("experts")
class ScoresOfAnotherRouterGathered(Batched):
    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        ids = self.scores(x).topk(self.K, -1)[1]
        return F.linear(x, self.router_2).softmax(-1).gather(1, ids), ids


@lookalike("experts")
class NormalisedOverTokens(Grouped):
    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        w, ids = self.scores(x).topk(self.K, -1)
        return w / w.sum(0, keepdim=True), ids


@lookalike("experts")
class NormalisedOverTokensWhereTEqualsK(Grouped):
    tokens = 2

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        w, ids = self.scores(x).topk(self.K, -1)
        return w / w.t().sum(-1, keepdim=True), ids


@lookalike("experts")
class NormalisedByAnotherRouter(Grouped):
    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        w, ids = self.scores(x).topk(self.K, -1)
        return w / self.other(x)[0].sum(-1, keepdim=True), ids


@lookalike("experts")
class NormalisedByOneMore(Grouped):
    """By the sum over the best K + 1, of which K are used."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        score = self.scores(x)
        w, ids = score.topk(self.K, -1)
        return w / score.topk(self.K + 1, -1)[0].sum(-1, keepdim=True), ids


@lookalike("experts")
class NormalisedByTheLargest(Grouped):
    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        w, ids = self.scores(x).topk(self.K, -1)
        return w / w.amax(-1, keepdim=True), ids


@lookalike("any")
class SoftmaxOverTokens(Grouped):
    """What remains is a choice among scores that something else computed."""

    def scores(self, x: Tensor) -> Tensor:
        return self.logits(x).softmax(0)


@lookalike("experts")
class SmallestScores(Grouped):
    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        w, ids = self.scores(x).topk(self.K, -1, largest=False)
        return w, ids


@lookalike("any")
class BestTokensWhereTEqualsE(Grouped):
    """Expert choice: the best tokens of each expert, in a layer with as many tokens as experts."""

    tokens = 4

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        w, ids = self.scores(x).t().topk(self.K, -1)
        return w, ids


@lookalike("any")
class WeightsGatheredElsewhere(Batched):
    """The weight of the next expert."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        score = self.scores(x)
        ids = score.topk(self.K, -1)[1]
        return score.gather(1, (ids + 1) % self.E), ids


@lookalike("any")
class BiasAlsoWeighs(Batched):
    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        score = self.scores(x) + self.correction
        ids = score.topk(self.K, -1)[1]
        return score.gather(1, ids), ids


@lookalike("any")
class GroupsInterleaved(Batched):
    """Group g is experts g and g + 2: the view has its groups along the other dimension."""

    def scores(self, x: Tensor) -> Tensor:
        score = super().scores(x)
        grouped = score.view(-1, 2, 2).transpose(1, 2)
        kept = grouped.amax(-1).topk(1, -1)[1]
        mask = torch.zeros(x.shape[0], 2).scatter(1, kept, 1.0).bool()
        return grouped.masked_fill(~mask[..., None], 0.0).transpose(1, 2).reshape(-1, self.E)


@lookalike("any")
class GroupsInverted(Batched):
    """The best group is the one that is left out."""

    def scores(self, x: Tensor) -> Tensor:
        score = super().scores(x)
        kept = score.view(-1, 2, 2).amax(-1).topk(1, -1)[1]
        mask = torch.zeros(x.shape[0], 2).scatter(1, kept, 1.0).bool()
        return score.masked_fill(mask[..., None].expand(-1, 2, 2).reshape(-1, self.E), 0.0)


@lookalike("any")
class IdsChangedAfterTheChoice(Batched):
    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        w, ids = super().route(x)
        return w, (self.E - 1) - ids


# ---------------------------------------------------------------- writes, aliases, modes


@lookalike("any")
class XWrittenBeforeTheExperts(Grouped):
    def forward(self, x: Tensor) -> Tensor:
        x = x * 1
        w, ids = self.route(x * 1)
        x.mul_(2.0)
        return self.experts(x, w, ids)


@lookalike("any")
class WeightsWrittenThroughAnAlias(Grouped):
    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        w, ids = self.scores(x).topk(self.K, -1)
        w = w * 1
        flat = w.view(-1)
        flat.mul_(0.5)
        return w, ids


@lookalike("any")
class IdsWrittenThroughAnAlias(Batched):
    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        w, ids = super().route(x)
        ids = ids * 1
        column = ids[:, 0]
        column.copy_((column + 1) % self.E)
        return w, ids


@lookalike("any")
class WeightsWrittenAfterTheyWereRead(Grouped):
    def weights(self, x: Tensor, w: Tensor, order: Tensor) -> Tensor:
        flat = (w * 1).view(-1)
        read = flat[order]
        flat.zero_()
        return read + flat[order]


@lookalike("any")
class SumWrittenThroughAnAlias(Loop):
    def experts(self, x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
        out = torch.zeros(x.shape[0] + 1, H, dtype=x.dtype)
        head = out[:-1]
        for e in range(self.E):
            token, slot = torch.where(ids == e)
            head.index_add_(0, token, self.mlp(e, x[token]) * w[token, slot, None])
            if e == 1:
                out[0].mul_(0.5)
        return head


@lookalike("any")
class ParametersWrittenInBetween(Grouped):
    def first(self, x: Tensor, rows: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
        down = self.down.detach().clone()
        self.copied = down
        gate, up = super().first(x, rows, ends)
        down.mul_(0.5)
        return gate, up

    def last(self, x: Tensor, h: Tensor, ends: Tensor) -> Tensor:
        return self.mm(h, self.copied, ends)


@lookalike("any")
class WeightsDetached(Grouped):
    def weights(self, x: Tensor, w: Tensor, order: Tensor) -> Tensor:
        return super().weights(x, w, order).detach()


@lookalike("any")
class HiddenDetached(Grouped):
    """No gradient reaches the first projections."""

    def act(self, gate: Tensor, up: Tensor) -> Tensor:
        return super().act(gate, up).detach()


@lookalike("any")
class GateDetached(Grouped):
    def act(self, gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate.detach()) * up


@lookalike("any")
class NoGradAroundTheExperts(Grouped):
    def experts(self, x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
        with torch.no_grad():
            y = super().experts(x, w, ids)
        return y + x


@lookalike("any")
class NoGradAroundTheUpProjection(Grouped):
    def first(self, x: Tensor, rows: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            up = self.mm(rows, self.up, ends)
        return self.mm(rows, self.gate, ends), up


@lookalike("any")
class NoGradAroundTheRouter(Batched):
    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return super().route(x)


@lookalike("declined")
class ExpertChoice(Base):
    """Every expert takes its best tokens: not a choice by tokens."""

    def forward(self, x: Tensor) -> Tensor:
        w, token = self.scores(x).t().topk(self.K, -1)
        rows = x[token]
        h = self.act(torch.bmm(rows, self.gate.transpose(1, 2)), torch.bmm(rows, self.up.transpose(1, 2)))
        y = torch.bmm(h, self.down.transpose(1, 2)) * w[..., None]
        return torch.zeros_like(x).index_add(0, token.reshape(-1), y.reshape(-1, H))

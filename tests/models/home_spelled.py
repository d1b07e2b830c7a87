"""Layers in the spelling of single projects, each with its router: x [T,H], or [B,S,H] where `lead` has two sizes."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.models.lookalikes import Base, E, Grouped, H, Loop

SPELLINGS: list[type[Base]] = []


def spelling(module: type[Base]) -> type[Base]:
    SPELLINGS.append(module)
    return module


class Shaped(Base):
    """x [2,5,H], routed as it is."""

    lead: ClassVar[tuple[int, ...]] = (2, 5)

    def mlp(self, e: int, rows: Tensor) -> Tensor:
        return F.linear(self.act(F.linear(rows, self.gate[e]), F.linear(rows, self.up[e])), self.down[e])


class Top1(Base):
    sizes = (E, 1)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        w, ids = self.scores(x).topk(1, -1)
        return w, ids


def dense_gates(m: Base, x: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax over the chosen logits, 0 elsewhere."""
    logits = m.logits(x)
    best, ids = logits.topk(m.K, -1)
    return torch.full_like(logits, float("-inf")).scatter(-1, ids, best).softmax(-1), ids


@spelling
class GatheredRows(Grouped):
    """Rows by gather with an expanded index, added back by scatter_add: torchtitan."""

    def experts(self, x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
        order = torch.argsort(ids.view(-1), stable=True)
        index = (order // self.K).reshape(-1, 1).expand(-1, H)
        ends = self.ends(x, ids.view(-1))
        gate, up = self.first(x, torch.gather(x, dim=0, index=index), ends)
        y = self.last(x, self.act(gate, up), ends) * w.view(-1)[order].reshape(-1, 1)
        return torch.zeros_like(x).scatter_add(dim=0, index=index, src=y)


@spelling
class SortedTop1(Top1, Grouped):
    """The weight on the input, no sum: each token has one row."""

    def experts(self, x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
        flat = ids.view(-1)
        order = torch.argsort(flat, stable=True)
        ends = self.ends(x, flat)
        gate, up = self.first(x, (x * w)[order], ends)
        return self.last(x, self.act(gate, up), ends)[torch.argsort(order)]


@spelling
class GatesOfTokenAndExpert(Loop):
    """scores[token, e], the tokens found without gradients; the scores are returned: gpt-oss."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        w, ids = self.logits(x).topk(self.K, -1)
        gates = torch.zeros(x.shape[0], self.E, dtype=x.dtype).scatter_(1, ids, w.softmax(-1))
        mask, out = F.one_hot(ids, self.E).permute(2, 1, 0), torch.zeros_like(x)
        for e in range(self.E):
            with torch.no_grad():
                _, token = torch.where(mask[e])
            out.index_add_(0, token, self.mlp(e, x[token]) * gates[token, e, None])
        return out, gates


@spelling
class MaskOverBatchAndSequence(Shaped):
    """out[mask] += .. where x is [B,S,H]: makeMoE."""

    def forward(self, x: Tensor) -> Tensor:
        gates, ids = dense_gates(self, x)
        out, rows, flat = torch.zeros_like(x), x.view(-1, H), gates.view(-1, self.E)
        for e in range(self.E):
            mask = (ids == e).any(-1)
            hit = mask.view(-1)
            out[mask] += self.mlp(e, rows[hit]) * flat[hit, e].unsqueeze(1)
        return out


@spelling
class WeightsByMask(Loop):
    def experts(self, x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(self.E):
            hit = ids == e
            out[hit.any(-1)] += self.mlp(e, x[hit.any(-1)]) * w[hit].unsqueeze(-1)
        return out


@spelling
class WrittenOnce(Top1, Loop):
    """out[token] = y, weighed at the end: Switch."""

    def experts(self, x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(self.E):
            token = (ids.view(-1) == e).nonzero(as_tuple=True)[0]
            out[token, :] = self.mlp(e, x[token, :])
        return (out * w).view(2, -1, H)


@spelling
class GatheredBySequence(Shaped):
    """Gathered weights with ids [B,S,K]."""

    def experts(self, x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
        gate, up = (torch.einsum("bsh,bskfh->bskf", x, m[ids]) for m in (self.gate, self.up))
        y = torch.einsum("bskf,bskhf->bskh", self.act(gate, up), self.down[ids])
        return (y * w.unsqueeze(-1)).sum(dim=2)


@spelling
class DenseByExpert(Shaped):
    """Every expert on every token, the sum taken as [E,B,S,H]; the gates [E,T] are returned."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        flat = x.reshape(-1, H)
        w, ids = self.route(flat)
        gates = torch.zeros_like(self.logits(flat)).scatter_(1, ids, w).t()
        rows = flat.repeat(self.E, 1).view(self.E, -1, H)
        h = self.act(torch.bmm(rows, self.gate.transpose(1, 2)), torch.bmm(rows, self.up.transpose(1, 2)))
        y = torch.bmm(h, self.down.transpose(1, 2)).view(self.E, x.shape[0], -1, H)
        return (y * gates.reshape(self.E, x.shape[0], -1)[..., None]).sum(0), gates


@spelling
class WrittenByPair(Loop):
    """Rows repeated once per slot, written back under the mask of each expert: the first Mixtral."""

    def experts(self, x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
        flat, rows = ids.view(-1), x.repeat_interleave(self.K, dim=0)
        y = torch.empty_like(rows)
        for e in range(self.E):
            y[flat == e] = self.mlp(e, rows[flat == e])
        return (y.view(*w.shape, -1) * w.unsqueeze(-1)).sum(1)

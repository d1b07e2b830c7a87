"""Modules that resemble an MoE layer and are not one, or not the one they seem.

Each is a true form with one step replaced.  LOOKALIKES lists them with what may be made of them:

    "declined"   nothing may be fused: no MoE layer computes this
    "experts"    the experts half may be fused, with ids and weights as they were given; the router may not
    "any"        fusing it right is possible: only the numbers count
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

E, K, H, INNER, T = 4, 2, 16, 24, 10
LOOKALIKES: list[LookAlike] = []


@dataclass(frozen=True)
class LookAlike:
    module: type[Base]
    expect: str

    def __str__(self) -> str:
        return self.module.__name__


def lookalike(expect: str) -> Callable[[type[Base]], type[Base]]:
    def register(module: type[Base]) -> type[Base]:
        LOOKALIKES.append(LookAlike(module, expect))
        return module

    return register


class Base(nn.Module):
    """Parameters and the router: top-2 of the softmax of 4, renormalised."""

    tokens: ClassVar[int] = T
    sizes: ClassVar[tuple[int, int]] = (E, K)
    rounds: ClassVar[bool] = False  # to a dtype narrower than its own

    def __init__(self) -> None:
        super().__init__()
        self.E, self.K = self.sizes
        self.router = nn.Parameter(torch.randn(self.E, H))
        self.router_2 = nn.Parameter(torch.randn(self.E, H))
        self.gate = nn.Parameter(torch.randn(self.E, INNER, H) / 4)
        self.up = nn.Parameter(torch.randn(self.E, INNER, H) / 4)
        self.down = nn.Parameter(torch.randn(self.E, H, INNER) / 5)
        self.correction = nn.Parameter(torch.randn(self.E) / 5)

    def logits(self, x: Tensor) -> Tensor:
        return F.linear(x, self.router)

    def scores(self, x: Tensor) -> Tensor:
        return self.logits(x).softmax(-1)

    def other(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and ids of another router."""
        w, ids = F.linear(x, self.router_2).softmax(-1).topk(self.K, -1)
        return w, ids

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        w, ids = self.scores(x).topk(self.K, -1)
        return w / w.sum(-1, keepdim=True), ids

    def act(self, gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate) * up

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.route(x)
        return self.experts(x, w, ids)

    def experts(self, x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
        raise NotImplementedError


class Grouped(Base):
    """Sorted rows and grouped GEMMs."""

    def experts(self, x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
        by_expert, order = self.sort(x, ids)
        rows = self.rows(x, order)
        ends = self.ends(x, by_expert)
        gate, up = self.first(x, rows, ends)
        y = self.last(x, self.act(gate, up), ends)
        y = y * self.weights(x, w, order)[:, None]
        return self.combine(x, y, order)

    def sort(self, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        by_expert, order = torch.sort(ids.reshape(-1))
        return by_expert, order

    def rows(self, x: Tensor, order: Tensor) -> Tensor:
        return x[order // self.K]

    def counts(self, by_expert: Tensor) -> Tensor:
        return torch.histc(by_expert.float(), bins=self.E, min=0, max=self.E - 1)

    def ends(self, x: Tensor, by_expert: Tensor) -> Tensor:
        return self.counts(by_expert).cumsum(0, dtype=torch.int32)

    def mm(self, rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        return torch.ops.transformers.grouped_mm_fallback(rows, weight.transpose(1, 2), ends)

    def first(self, x: Tensor, rows: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
        return self.mm(rows, self.gate, ends), self.mm(rows, self.up, ends)

    def last(self, x: Tensor, h: Tensor, ends: Tensor) -> Tensor:
        return self.mm(h, self.down, ends)

    def weights(self, x: Tensor, w: Tensor, order: Tensor) -> Tensor:
        return w.reshape(-1)[order]

    def back(self, order: Tensor) -> Tensor:
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(order.shape[0])
        return inverse

    def combine(self, x: Tensor, y: Tensor, order: Tensor) -> Tensor:
        return y[self.back(order)].view(x.shape[0], self.K, H).sum(1)


class Batched(Base):
    """Gathered weights and bmm."""

    def experts(self, x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
        pair = ids.reshape(-1)
        rows = self.rows(x)
        h = self.act(self.bmm(self.gate, pair, rows), self.bmm(self.up, self.up_ids(x, ids), rows))
        y = self.bmm(self.down, self.down_ids(x, ids), h)
        return self.combine(x, y, w)

    def bmm(self, weight: Tensor, pair: Tensor, rows: Tensor) -> Tensor:
        return torch.bmm(weight[pair], rows.unsqueeze(-1)).squeeze(-1)

    def rows(self, x: Tensor) -> Tensor:
        return x.repeat_interleave(self.K, 0)

    def up_ids(self, x: Tensor, ids: Tensor) -> Tensor:
        return ids.reshape(-1)

    def down_ids(self, x: Tensor, ids: Tensor) -> Tensor:
        return ids.reshape(-1)

    def combine(self, x: Tensor, y: Tensor, w: Tensor) -> Tensor:
        return (y * w.reshape(-1, 1)).view(x.shape[0], self.K, H).sum(1)


class Loop(Base):
    """A Python loop over the experts."""

    def experts(self, x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
        out = self.start(x)
        for e in self.visited():
            token, slot = torch.where(self.mask(ids, e))
            y = self.mlp(e, self.rows(x, token)) * self.weight(w, token, slot)
            out = self.add(out, token, y)
        return out

    def start(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)

    def visited(self) -> list[int]:
        return list(range(self.E))

    def mask(self, ids: Tensor, e: int) -> Tensor:
        return ids == e

    def rows(self, x: Tensor, token: Tensor) -> Tensor:
        return x[token]

    def mlp(self, e: int, rows: Tensor) -> Tensor:
        return F.linear(self.act(F.linear(rows, self.gate[e]), F.linear(rows, self.up[e])), self.down[e])

    def weight(self, w: Tensor, token: Tensor, slot: Tensor) -> Tensor:
        return w[token, slot, None]

    def add(self, out: Tensor, token: Tensor, y: Tensor) -> Tensor:
        return out.index_add(0, token, y)


class Dense(Base):
    """Every expert on every token, gates [T,E] from a scatter."""

    def gates(self, x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
        return torch.zeros(x.shape[0], self.E).scatter(1, ids, w)

    def experts(self, x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
        rows = x.repeat(self.E, 1).view(self.E, -1, H)
        h = self.act(torch.bmm(rows, self.gate.transpose(1, 2)), torch.bmm(rows, self.up.transpose(1, 2)))
        y = self.product(h) * self.gates(x, w, ids).t().reshape(self.E, -1, 1)
        return self.combine(y)

    def product(self, h: Tensor) -> Tensor:
        return torch.bmm(h, self.down.transpose(1, 2))

    def combine(self, y: Tensor) -> Tensor:
        return y.sum(0)


TRUE_FORMS = (Grouped, Batched, Loop, Dense)

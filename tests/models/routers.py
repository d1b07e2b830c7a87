"""Routers, composed from the grammar that real ones share: score, selection bias, group limit, choice, weights, post.

A router maps rows [T,H] to logits [T,E], weights [T,K] and ids [T,K].
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.models import spelling as write
from tests.models.spelling import Spelling


@dataclass(frozen=True)
class RouterParts:
    """What a router is made of.

    score       softmax, sigmoid, sqrtsoftplus or identity, taken before the choice; `after` is taken over the K chosen
    cast        where float32 starts: "none", "logits" or "inputs" (the router's matmul is then in float32 too)
    bias        a selection bias [E], which chooses and does not weigh (unless weights are "values")
    groups      "", "max" or "top2": choice limited to the best half of 2 groups, the others filled with `fill`
    weights     "values" of the top-k, or "gather" of the unbiased scores
    normalise   "", "plain", "eps" (sum + 1e-20), "clamp" (sum at least 1e-12), "in_order": scale before dividing
    back        the weights are cast to the dtype of the rows
    select      "topk", or for K = 1 "argmax" or "max"
    """

    score: str = "softmax"
    after: str = ""
    cast: str = "logits"
    bias: bool = False
    linear_bias: bool = False
    groups: str = ""
    fill: float = float("-inf")
    weights: str = "values"
    normalise: str = ""
    scale: float = 1.0
    back: bool = True
    select: str = "topk"
    expert_scale: bool = False

    def __str__(self) -> str:
        default = RouterParts()
        changed = {k: v for k, v in dataclasses.asdict(self).items() if v != getattr(default, k)}
        return ",".join(f"{k}={v}" for k, v in changed.items()) or "softmax"

    @property
    def in_grammar(self) -> bool:
        """Whether a recogniser that knows the grammar can state this router as a RouterSpec."""
        return not self.expert_scale


R3 = RouterParts(score="sigmoid", bias=True, weights="gather", normalise="eps", scale=2.5)
ROUTERS: dict[str, RouterParts] = {
    "R1": RouterParts(),
    "R1_normalised": RouterParts(normalise="plain"),
    "R1_scaled": RouterParts(cast="inputs", scale=1.5, back=False),
    "R1_model_dtype": RouterParts(cast="none", normalise="plain"),
    "R1_per_expert_scale": RouterParts(normalise="plain", expert_scale=True),
    "R1_top1_argmax": RouterParts(weights="gather", select="argmax"),
    "R1_top1_max": RouterParts(select="max"),
    "R1b": RouterParts(cast="inputs", bias=True, weights="gather", normalise="clamp"),
    "R1b_biased_weights": RouterParts(bias=True, weights="values", normalise="plain"),
    "R1g": RouterParts(cast="inputs", groups="max", fill=0.0, scale=1.5),
    "R2": RouterParts(score="identity", after="softmax"),
    "R2_linear_bias": RouterParts(score="identity", after="softmax", cast="none", linear_bias=True),
    "R3": R3,
    "R3_no_bias": RouterParts(score="sigmoid", normalise="plain", back=False),
    "R3_unscaled": RouterParts(score="sigmoid", bias=True, weights="gather", normalise="plain", back=False),
    "R3g": dataclasses.replace(R3, cast="inputs", groups="top2", back=False),
    "R3g_fill_zero": dataclasses.replace(R3, cast="inputs", groups="top2", fill=0.0, back=False),
    "R3_sqrtsoftplus": dataclasses.replace(R3, score="sqrtsoftplus"),
    "R5": RouterParts(score="identity", after="sigmoid", cast="none"),
    "R5_biased": RouterParts(score="identity", after="sigmoid", cast="inputs", bias=True, weights="gather", back=False),
}


class Router(nn.Module):
    def __init__(self, parts: RouterParts, spelling: Spelling, H: int, E: int, K: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.parts, self.spelling, self.E, self.K = parts, spelling, E, K
        self.wide = torch.float32  # float64 in an oracle
        self.weight = nn.Parameter(torch.randn(E, H).div(H**0.5).mul(2).to(dtype))
        self.linear_bias = nn.Parameter(torch.randn(E).mul(0.2).to(dtype)) if parts.linear_bias else None
        self.expert_scale = nn.Parameter(torch.randn(E).mul(0.2).add(1).to(dtype)) if parts.expert_scale else None
        if parts.bias:
            self.register_buffer("bias", torch.randn(E).mul(0.1))

    def forward(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        p, s = self.parts, self.spelling
        logits = self.logits(rows)
        score = self.score(logits)
        choice = score + self.bias if p.bias else score
        if p.groups:
            choice = self.limit(choice)
        values, ids = self.select(choice)
        w = values if p.weights == "values" else write.pick(s, score, ids)
        if p.after == "softmax":
            w = write.softmax(s, w, self.wide if p.cast != "none" else w.dtype)
        elif p.after == "sigmoid":
            w = write.sigmoid(s, w if p.cast == "none" else w.to(self.wide))
        if p.normalise:
            w = write.divide(s, w, self.normaliser(w))
        if p.scale != 1.0:
            w = w * p.scale
        if self.expert_scale is not None:
            w = w * self.expert_scale[ids]
        return logits, w.to(rows.dtype) if p.back else w, ids

    def logits(self, rows: Tensor) -> Tensor:
        p, s = self.parts, self.spelling
        if p.cast == "inputs":
            bias = None if self.linear_bias is None else self.linear_bias.to(self.wide)
            return write.linear(s, rows.to(self.wide), self.weight.to(self.wide), bias)
        return write.linear(s, rows, self.weight, self.linear_bias)

    def score(self, logits: Tensor) -> Tensor:
        p, s = self.parts, self.spelling
        if p.score == "softmax":
            return write.softmax(s, logits, logits.dtype if p.cast == "none" else self.wide)
        z = logits if p.cast == "none" else logits.to(self.wide)
        if p.score == "sigmoid":
            return write.sigmoid(s, z)
        return F.softplus(z).sqrt() if p.score == "sqrtsoftplus" else z

    def limit(self, choice: Tensor) -> Tensor:
        """Keep the better half of the groups. Groups of 4 where E allows, else of E/2."""
        count = self.E // 4 if self.E % 8 == 0 else 2
        grouped = choice.view(-1, count, self.E // count)
        best = grouped.topk(2, dim=-1)[0].sum(dim=-1) if self.parts.groups == "top2" else grouped.max(dim=-1).values
        kept = torch.topk(best, k=count // 2, dim=-1, sorted=False)[1]
        mask = torch.zeros_like(best).scatter_(1, kept, 1)
        mask = mask.unsqueeze(-1).expand(-1, count, self.E // count).reshape(-1, self.E)
        return choice.masked_fill(~mask.bool(), self.parts.fill)

    def select(self, choice: Tensor) -> tuple[Tensor, Tensor]:
        if self.parts.select == "argmax":
            ids = choice.argmax(-1, keepdim=True)
            return choice.gather(-1, ids), ids
        if self.parts.select == "max":
            values, ids = choice.max(-1, keepdim=True)
            return values, ids
        return write.top(self.spelling, choice, self.K)

    def normaliser(self, w: Tensor) -> Tensor:
        total = w.sum(dim=-1, keepdim=True)
        if self.parts.normalise == "eps":
            return total + 1e-20
        return total.clamp(min=1e-12) if self.parts.normalise == "clamp" else total

"""Ids, weights and numbers that the caller gives: an expert twice for one token, a symbolic number of slots, another scale."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.models import outcome
from tests.models.lookalikes import E, H, Loop
from tests.models.numbers import run, wrong


class Given(nn.Module):
    """Experts whose ids come from outside: `form` is how a token that has one expert twice is treated."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.up, self.down = nn.Parameter(torch.randn(E, 24, H) / 4), nn.Parameter(torch.randn(E, H, 24) / 5)

    def forward(self, x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
        if self.form == "dense":
            ids = ids.view(-1, 2)
            gates = torch.zeros(x.shape[0], E, dtype=w.dtype).scatter(1, ids, w).t()[..., None]
            rows = x.unsqueeze(0).expand(E, -1, -1)
            return (torch.bmm(torch.bmm(rows, self.up.transpose(1, 2)).relu(), self.down.transpose(1, 2)) * gates).sum(0)
        out = torch.zeros_like(x)
        for e in range(E):
            hit = ids == e
            token = hit.any(-1)
            if self.form == "gates":  # each of two pairs gets the weight of the second
                token = torch.where(hit)[0]
                out.index_add_(0, token, self.mlp(e, x[token]) * torch.zeros(x.shape[0], E).scatter(1, ids, w)[token, e, None])
                continue
            weight = (w * hit).sum(-1)[token][:, None]
            if self.form == "once":
                y = self.mlp(e, x[token])
            elif self.form == "on_input":
                y = self.mlp(e, x[token] * weight)
            else:
                y = self.mlp(e, x[token]) * weight
            out[token] += y
        return out

    def mlp(self, e: int, rows: Tensor) -> Tensor:
        return (rows @ self.up[e].t()).relu() @ self.down[e].t()


def _inputs(tokens: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(tokens)
    ids = torch.randint(0, E, (tokens, 2), generator=g)
    ids[::2, 1] = ids[::2, 0]
    return [torch.randn(tokens, H, generator=g), torch.rand(tokens, 2, generator=g), ids]


@pytest.mark.parametrize("form", ["dense", "once", "gates", "on_input", "on_output"])
def test_one_expert_twice(form: str) -> None:
    module = Given(form)
    call = outcome.compiled(module)
    assert not wrong(run(call, module, _inputs(10), True), run(module, module, _inputs(10), True))
    assert bool(outcome.fused()) == (form == "on_output"), outcome.reasons()


def test_a_symbolic_number_of_slots_is_declined() -> None:
    module = Given("on_output")
    call = outcome.compiled(module, dynamic=True)
    for tokens in (10, 13):
        assert not wrong(run(call, module, _inputs(tokens), True), run(module, module, _inputs(tokens), True))
    assert any("symbolic size" in reason for reason in outcome.reasons())


class Scaled(Loop):
    scale = 0.5

    def weight(self, w: Tensor, token: Tensor, slot: Tensor) -> Tensor:
        return super().weight(w, token, slot) * self.scale


def test_another_scale_is_another_graph() -> None:
    """A number that Dynamo keeps symbolic is read as it is, and guarded."""
    module = Scaled()
    x = torch.randn(10, H)
    call = outcome.compiled(module, dynamic=True)
    for scale in (0.5, 1.75):
        module.scale = scale
        assert not wrong(run(call, module, [x], True), run(module, module, [x], True))
    assert all(layer.fused for layer in outcome.layers())

"""Layers in the spelling of single projects are fused, their router too, and what they return besides is still right."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moecompile import report
from tests.models import outcome
from tests.models.home_spelled import SPELLINGS
from tests.models.lookalike_spelled import FeaturesGathered
from tests.models.lookalikes import Base, H
from tests.models.numbers import run, wrong


@pytest.mark.parametrize("module", SPELLINGS, ids=lambda c: c.__name__)
def test_a_spelling_is_fused(module: type[Base]) -> None:
    torch.manual_seed(0)
    layer = module()
    lead = getattr(module, "lead", (module.tokens,))
    call = outcome.compiled(layer, dynamic=True)
    for tokens in (lead, (*lead[:-1], lead[-1] + 2)):
        x = torch.randn(*tokens, H, generator=torch.Generator().manual_seed(7))
        assert not wrong(run(call, layer, [x], train=True), run(layer, layer, [x], train=True))
    assert [(found.fused, found.router) for found in outcome.layers()] == [(True, True)], outcome.reasons()


class RowsUnderUnits(Base):
    """x as [T,1,1,H], weights divided in place: the original nodes, which run beside the kernel, expect both as they were."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        w, ids = self.scores(x).topk(self.K, -1)
        w *= 2.5
        return w, ids

    def experts(self, x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
        h = torch.matmul(x[:, None, None, :], self.up[ids].transpose(-1, -2)).relu()
        return (w[..., None] * torch.matmul(h, self.down[ids].transpose(-1, -2)).squeeze(-2)).sum(-2)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_the_original_nodes_take_what_the_op_takes(dynamic: bool) -> None:
    layer = RowsUnderUnits()
    x = torch.randn(10, H)
    call = outcome.compiled(layer, kernels="auto", dynamic=dynamic, options={"verify": 1, "fallback": "error"})
    with torch.no_grad():
        assert torch.allclose(call(x), layer(x), atol=1e-5)
    assert [(found.fused, found.router) for found in outcome.layers()] == [(True, True)], outcome.reasons()


def test_the_index_op_that_is_not_followed_is_named() -> None:
    layer = FeaturesGathered()
    outcome.compiled(layer)(torch.randn(10, H))
    (entry,) = report.last_reports()
    assert entry.reason == "aten.gather by the tokens of the experts' pairs is not followed as it is used here"
    assert ".gather(1, token)" in entry.stack_trace

"""Whole language models: every MoE layer fused, router included, and the numbers of eager."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from tests.models import outcome
from tests.models.language import FAMILIES, MODELS, Language, tokens
from tests.models.numbers import Numbers, run, wrong

BF16 = float(torch.finfo(torch.bfloat16).eps)
BY_NAME = {str(m): m for m in MODELS}


class Logits(nn.Module):
    """input_ids [B,S] -> logits [B,S,V], under autocast where asked."""

    def __init__(self, model: nn.Module, autocast: bool = False) -> None:
        super().__init__()
        self.model, self.autocast = model, autocast

    def forward(self, input_ids: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            out = self.model(input_ids, use_cache=False) if hasattr(self.model, "config") else self.model(input_ids)
        return out if isinstance(out, Tensor) else out.logits


def _exact(model: nn.Module, ids: Tensor, train: bool) -> Numbers:
    """float64 from transformers' eager loop (their routers go on in float32)."""
    exact = copy.deepcopy(model).double()
    inner = exact.model if isinstance(exact, Logits) else exact
    if hasattr(inner, "set_experts_implementation"):
        inner.set_experts_implementation("eager")
    return run(exact, exact, [ids], train)


def _check(model: nn.Module, call: Any, ids: Tensor, train: bool) -> None:
    eager = run(model, model, [ids], train)
    assert not wrong(run(call, model, [ids], train), eager, _exact(model, ids, train))


def _expect_all_fused(language: Language) -> None:
    layers = outcome.layers()
    assert sum(layer.fused for layer in layers) == len(layers), outcome.reasons()
    assert len(layers) % language.moe_layers == 0 and layers
    if language.router:
        assert all(layer.router for layer in layers), outcome.reasons()


@pytest.mark.parametrize("language", MODELS, ids=str)
def test_static_training(language: Language) -> None:
    model = Logits(language.build()).train()
    call = outcome.compiled(model, "aot_eager", "auto", fullgraph=True, dynamic=False)
    _check(model, call, tokens(2, 6), train=True)
    _expect_all_fused(language)
    assert len(outcome.layers()) == language.moe_layers


@pytest.mark.parametrize("language", MODELS, ids=str)
def test_static_evaluation(language: Language) -> None:
    """Without fullgraph: a loop over experts is captured all the same."""
    model = Logits(language.build())
    call = outcome.compiled(model, dynamic=False)
    _check(model, call, tokens(2, 6), train=False)
    _expect_all_fused(language)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("language", MODELS, ids=str)
def test_dynamic(language: Language) -> None:
    """One graph for training at two lengths; one more for evaluation."""
    model = Logits(language.build()).train()
    call = outcome.compiled(model, dynamic=True, fullgraph=True)
    for length in (6, 9):
        _check(model, call, tokens(2, length), train=True)
    # Jamba's mamba layers are traced twice by Dynamo itself, with any backend
    assert counters["stats"]["unique_graphs"] == (2 if str(language) == "jamba" else 1)
    model.eval()
    _check(model, call, tokens(3, 5), train=False)
    _expect_all_fused(language)


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "module_loop"])
def test_fifty_token_counts(name: str) -> None:
    """At most two graphs, with dynamic left as it is by default."""
    model = Logits(BY_NAME[name].build())
    call = outcome.compiled(model)
    for length in range(2, 52):
        ids = tokens(1, length)
        with torch.no_grad():
            torch.testing.assert_close(call(ids), model(ids), rtol=1e-4, atol=1e-5)
    assert counters["stats"]["unique_graphs"] <= 2
    _expect_all_fused(BY_NAME[name])


@pytest.mark.parametrize("name", ["olmoe", "deepseek_v3", "stacked_loop"])
def test_autocast(name: str) -> None:
    model = Logits(BY_NAME[name].build(), autocast=True).train()
    ids = tokens(2, 6)
    eager, exact = run(model, model, [ids], train=True), _exact(_steady(model), ids, train=True)
    got = run(outcome.compiled(model, "eager", "auto", fullgraph=True), model, [ids], train=True)
    assert not wrong(got, eager, exact, BF16)
    _expect_all_fused(BY_NAME[name])


def _steady(model: Logits) -> Logits:
    exact = copy.deepcopy(model)
    exact.autocast = False
    return exact


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_gradient_checkpointing(name: str) -> None:
    model = Logits(BY_NAME[name].build()).train()
    model.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    _check(model, outcome.compiled(model, "aot_eager", fullgraph=True), tokens(2, 6), train=True)
    _expect_all_fused(BY_NAME[name])


@pytest.mark.parametrize("name", ["olmoe", "deepseek_v3"])
def test_with_inductor(name: str) -> None:
    model = Logits(BY_NAME[name].build()).train()
    call = outcome.compiled(model, "inductor", "auto", fullgraph=True)
    _check(model, call, tokens(2, 6), train=True)
    model.eval()
    _check(model, call, tokens(2, 6), train=False)
    _expect_all_fused(BY_NAME[name])


@pytest.mark.parametrize("language", [f for f in FAMILIES if str(f) in ("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss")], ids=str)
def test_generate_with_a_static_cache(language: Language) -> None:
    """Token for token in float32, prefill and decode both compiled."""
    model = language.build()
    ids = tokens(2, 5)
    settings = {"max_new_tokens": 8, "do_sample": False, "cache_implementation": "static", "eos_token_id": None}
    want = model.generate(ids, **settings)
    eager = model.forward
    model.forward = outcome.compiled(eager)
    got = model.generate(ids, **settings)
    assert torch.equal(got, want)
    assert got.shape == (2, 13)
    layers = outcome.layers()
    assert layers and all(layer.fused for layer in layers), outcome.reasons()

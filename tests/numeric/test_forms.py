"""Every form, router, layout, activation, return value, dtype and spelling of the zoo: the numbers of eager, and fused."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models import ALL, Example, outcome
from tests.models.layer import MoE, Recipe, in_float64
from tests.models.numbers import Numbers, run, wrong

FORMS = [e for e in ALL if e.name.startswith("form-")]
BF16 = float(torch.finfo(torch.bfloat16).eps)


def _check(module: MoE, call: Any, x: Tensor, train: bool = True) -> None:
    """call(x) and its gradients are right, measured by float64 and eager."""
    eager = run(module, module, [x], train)
    assert not wrong(run(call, module, [x], train), eager, _exact(module, x, train), _eps(module.recipe))


def _exact(module: MoE, x: Tensor, train: bool) -> Numbers:
    exact = in_float64(module)
    return run(exact, exact, [x.double()], train)


def _eps(recipe: Recipe) -> float:
    return BF16 if recipe.around == "autocast" else float(torch.finfo(recipe.dtype).eps)


def _expect(example: Example) -> None:
    layers = outcome.layers()
    if example.expect == "fused":
        assert layers and all(layer.fused for layer in layers), outcome.reasons()  # one for each graph
    elif example.expect == "declined":
        assert not outcome.fused()
    assert all(layer.reason for layer in layers if not layer.fused)
    if example.router_expected:
        assert layers[0].router, layers[0].reason


@pytest.mark.parametrize("example", ALL, ids=str)
def test_training(example: Example) -> None:
    module = example.recipe.make()
    _check(module, outcome.compiled(module), example.recipe.inputs(module))
    _expect(example)


@pytest.mark.parametrize("example", FORMS, ids=str)
def test_any_number_of_tokens(example: Example) -> None:
    """One graph with symbolic sizes serves several token counts, trained and not."""
    module = example.recipe.make()
    call = outcome.compiled(module, "aot_eager", dynamic=True)
    for shape in ((2, 5), (3, 7), (1, 4)):
        x = dataclasses.replace(example.recipe, shape=shape).inputs(module)
        _check(module, call, x)
    _expect(example)
    _check(module, call, x, train=False)


@pytest.mark.parametrize("example", [e for e in FORMS if e.expect == "fused" and e.recipe.dtype != torch.float32], ids=str)
def test_frozen_weights(example: Example) -> None:
    """Only x is trained: gradients reach it through the frozen layer."""
    module = example.recipe.make().requires_grad_(False)
    _check(module, outcome.compiled(module), example.recipe.inputs(module))
    _expect(example)


@pytest.mark.parametrize("name", ["form-hf_grouped-bf16", "form-loop_where-index_add", "returns-all"])
def test_with_inductor(name: str) -> None:
    example = next(e for e in ALL if e.name == name)
    module = example.recipe.make()
    _check(module, outcome.compiled(module, "inductor", kernels="auto"), example.recipe.inputs(module))
    _expect(example)


def test_the_zoo_itself_is_right() -> None:
    """Eager agrees with float64 to a few roundings: the truth that the other tests hold against is one."""
    for example in ALL:
        module = example.recipe.make()
        x = example.recipe.inputs(module)
        eager = run(module, module, [x], train=True)
        exact = _exact(module, x, True)
        rounded = Numbers({k: v.to(eager.values[k].dtype) for k, v in exact.values.items()})
        assert not wrong(eager, rounded, eps=2 * _eps(example.recipe)), example

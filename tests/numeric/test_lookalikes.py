"""What resembles an MoE layer and is not one keeps its numbers, and nothing that no MoE layer computes is fused."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.models import lookalike_dispatch, lookalike_gradients, lookalike_loops, lookalike_spelled, outcome
from tests.models.lookalikes import LOOKALIKES, TRUE_FORMS, Base, H, LookAlike
from tests.models.numbers import run, wrong

assert lookalike_dispatch and lookalike_gradients and lookalike_loops and lookalike_spelled  # all fill the registry


def _inputs(module: type[Base]) -> torch.Tensor:
    return torch.randn(module.tokens, H, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("case", LOOKALIKES, ids=str)
def test_a_lookalike_keeps_its_numbers(case: LookAlike, dynamic: bool) -> None:
    module = case.module()
    x = _inputs(case.module)
    exact = copy.deepcopy(module).double()
    eager = run(module, module, [x], train=True)
    got = run(outcome.compiled(module, dynamic=dynamic), module, [x], train=True)
    assert not wrong(got, eager, run(exact, exact, [x.double()], train=True) if _has_float64(case) else None)
    if case.expect == "declined":
        assert not outcome.fused()
    if case.expect == "experts":
        assert not [layer for layer in outcome.fused() if layer.router]


def _has_float64(case: LookAlike) -> bool:
    """Counting and the dense gates are written in float32; some round on the way."""
    return not case.module.rounds and "Dense" not in {c.__name__ for c in case.module.__mro__}


@pytest.mark.parametrize("form", TRUE_FORMS, ids=lambda c: c.__name__)
def test_the_form_they_resemble_is_fused(form: type[Base]) -> None:
    module = form()
    x = _inputs(form)
    eager = run(module, module, [x], train=True)
    assert not wrong(run(outcome.compiled(module), module, [x], train=True), eager)
    assert [(layer.fused, layer.router) for layer in outcome.layers()] == [(True, True)], outcome.reasons()


def test_there_are_enough_of_them() -> None:
    assert sum(case.expect == "declined" for case in LOOKALIKES) >= 30
    assert len({str(case) for case in LOOKALIKES}) == len(LOOKALIKES)


def test_each_differs_from_the_form_it_resembles() -> None:
    """A look-alike that computed what its form computes would test nothing."""
    for case in LOOKALIKES:
        form = next((f for f in TRUE_FORMS if issubclass(case.module, f)), None)
        if form is None or case.expect == "any":
            continue
        module, x = case.module(), _inputs(case.module)
        true = form()
        true.load_state_dict(module.state_dict())
        got = module(x)
        differs = isinstance(got, tuple) or not torch.allclose(got, true(x), atol=1e-4)
        assert differs, case

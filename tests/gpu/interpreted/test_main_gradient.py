"""Gradients that are added to float32 main gradients, against float64 and to the bit where nothing is to be added.

Run as tests/gpu/test_interpreted.py does.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moecompile.ir.spec import ExpertsSpec, WeightOn
from tests.gpu import layers
from tests.gpu.interpreted import agree
from tests.gpu.interpreted.blocks import ROWS


def layer(**given: Any) -> ExpertsSpec:
    return layers.make(**{"E": 4, "K": 2, "H": 20, "F": 18, "O": 17, "bias": True, **given})


def started(given: layers.Inputs) -> list[Tensor | None]:
    """Main gradients in use: random values, with zeros of both signs among them."""
    g = torch.Generator().manual_seed(7)
    mains: list[Tensor | None] = []
    for p in given.params:
        main = torch.randn(p.shape, generator=g)
        mains.append(torch.where(torch.rand(p.shape, generator=g) < 0.25, torch.tensor(-0.0), main))
    return mains


def backward(spec: ExpertsSpec, given: layers.Inputs, needs: list[bool], mains: list[Tensor | None]) -> list[Tensor]:
    call = (given.x, given.weights, given.ids, given.params, [], spec.text(), "")
    saved = agree.IMPLEMENTATION.experts_train(*call)[1]
    return agree.IMPLEMENTATION.experts_bwd(given.grad, *call, saved, needs, mains)


def check(spec: ExpertsSpec, tokens: int, load: str = "holes") -> None:
    """Each main gradient has grown by the gradient, and is as it was, bit for bit, for experts without rows."""
    given = layers.inputs(spec, tokens, load)
    needs = [True, given.weights is not None, *(True for _ in given.params)]
    mains = started(given)
    before = [m.clone() for m in mains if m is not None]
    found = backward(spec, given, needs, mains)
    want = layers.expected_gradients(spec, given, needs)
    allowed = layers.tolerance(spec.dtype, spec.hidden + spec.intermediate + tokens)
    for got, right in zip(found[:2], want[:2], strict=True):
        assert layers.error(got, right) <= allowed
    empty = [e for e in range(spec.num_experts) if not bool((given.ids == e).any())]
    for i, (main, old, right) in enumerate(zip(mains, before, want[2:], strict=True)):
        assert main is not None and found[2 + i].numel() == 0, "nothing is returned beside the main gradient"
        scale = max(float(right.abs().max()), 1e-30)
        assert float((main.double() - old.double() - right).abs().max()) <= allowed * scale + 1e-6 * float(old.abs().max()), i
        for kept, was in zip(*_of_empty_experts(spec, i, empty, main, old), strict=True):
            assert torch.equal(kept.view(torch.int32), was.view(torch.int32)), f"parameter {i} of an expert without rows"


def _of_empty_experts(spec: ExpertsSpec, param: int, empty: list[int], *tensors: Tensor) -> list[list[Tensor]]:
    """The parts of a parameter's tensors that belong to experts without rows."""
    if spec.down.stacked:
        return [[t[e] for e in empty] for t in tensors]
    return [[t] if param % spec.num_experts in empty else [] for t in tensors]


@pytest.mark.parametrize("layout", layers.LAYOUTS)
@pytest.mark.parametrize("tokens", (1, ROWS + 1))
def test_layouts(layout: str, tokens: int) -> None:
    check(layer(layout=layout, bias=layout != "separate"), tokens)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("load", ("one", "half", "all"))
def test_loads_and_dtypes(load: str, dtype: torch.dtype) -> None:
    check(layer(dtype=dtype), 9, load)


@pytest.mark.parametrize("on", WeightOn)
def test_where_the_weight_multiplies(on: WeightOn) -> None:
    check(layer(on=on), 7)


def test_no_tokens_change_nothing() -> None:
    spec = layer()
    given = layers.inputs(spec, 0)
    mains = started(given)
    before = [m.clone() for m in mains if m is not None]
    backward(spec, given, [True] * (2 + len(given.params)), mains)
    for main, old in zip(mains, before, strict=True):
        assert main is not None and torch.equal(main.view(torch.int32), old.view(torch.int32))


def test_some_parameters_have_one_and_what_nobody_needs_is_left_alone() -> None:
    """Split weights: gate adds to its main gradient, up has a gradient of its own, down needs none."""
    spec = layer(layout="split", bias=False)
    given = layers.inputs(spec, 9)
    mains = started(given)
    mains[1] = None
    assert mains[0] is not None and mains[2] is not None
    before = [mains[0].clone(), mains[2].clone()]
    needs = [False, False, True, True, False]
    found = backward(spec, given, needs, mains)
    want = layers.expected_gradients(spec, given, needs)
    assert [f.numel() > 0 for f in found] == [False, False, False, True, False]
    assert layers.error(mains[0] - before[0], want[2]) < 1e-5 and layers.error(found[3], want[3]) < 1e-5
    assert torch.equal(mains[2], before[1])


def test_a_run_repeats_bit_for_bit() -> None:
    spec = layer(dtype=torch.bfloat16)
    given = layers.inputs(spec, ROWS + 1)
    runs = []
    for _ in range(3):
        mains = started(given)
        for _ in range(2):
            backward(spec, given, [True] * (2 + len(given.params)), mains)
        runs.append(torch.cat([m.flatten() for m in mains if m is not None]))
    assert torch.equal(runs[0], runs[1]) and torch.equal(runs[0], runs[2])


def test_main_gradients_that_lie_anywhere() -> None:
    """Separate ones at addresses that do not divide by 16."""
    spec = layer(layout="separate", bias=False)
    given = layers.inputs(spec, 9)
    mains: list[Tensor | None] = [torch.zeros(p.numel() + 1)[1:].view(p.shape) for p in given.params]
    needs = [False, False, *(True for _ in given.params)]
    backward(spec, given, needs, mains)
    for main, want in zip(mains, layers.expected_gradients(spec, given, needs)[2:], strict=True):
        assert main is not None and layers.error(main, want) < 1e-5


@pytest.mark.parametrize(
    "wrong,about",
    [
        (lambda m: m.to(torch.bfloat16), "bfloat16"),
        (lambda m: m[..., :-1].contiguous(), "shape"),
        (lambda m: m.transpose(-1, -2).contiguous().transpose(-1, -2), "strides"),
    ],
    ids=("dtype", "shape", "strides"),
)
def test_a_main_gradient_of_another_kind_is_refused(wrong: Any, about: str) -> None:
    spec = layer()
    given = layers.inputs(spec, 3)
    mains = started(given)
    mains[0] = wrong(mains[0])
    with pytest.raises(ValueError, match=f"main gradient of parameter 0: .*{about}"):
        backward(spec, given, [True] * (2 + len(given.params)), mains)


def test_experts_share_the_way_their_gradients_are_kept() -> None:
    spec = layer(layout="separate", bias=False)
    given = layers.inputs(spec, 3)
    mains = started(given)
    mains[1] = None
    with pytest.raises(ValueError, match="main gradients of w0: 3 of 4 parameters have one, needs all or none"):
        backward(spec, given, [True] * (2 + len(given.params)), mains)

"""Experts, forward and backward, at every edge: each line is an axis, the others lie at a default.

Run as tests/gpu/test_interpreted.py does.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moecompile.codegen import gpu_choose
from moecompile.ir.spec import OutOfRange, WeightOn
from tests.gpu import layers
from tests.gpu.interpreted import agree
from tests.gpu.interpreted.blocks import ROWS

TOKENS = (0, 1, ROWS - 1, ROWS, ROWS + 1, 3 * ROWS + 5)
EXPERTS = ((1, 1), (2, 1), (2, 2), (7, 1), (7, 7), (9, 2))
LOADS = ("random", "one", "half", "holes", "all")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SIZES = ((16, 16, 16), (33, 17, 21), (40, 48, 24), (1, 1, 1))  # H, F, O


def layer(**given: Any) -> Any:
    return layers.make(**{"E": 3, "K": 2, "H": 20, "F": 12, **given})


@pytest.mark.parametrize("tokens,load", [(t, load) for t in TOKENS for load in (LOADS if t <= ROWS + 1 else ("one", "holes"))])
def test_tokens_and_load(tokens: int, load: str) -> None:
    spec = layer()
    agree.forward(spec, layers.inputs(spec, tokens, load))
    agree.training(spec, layers.inputs(spec, tokens, load))


@pytest.mark.parametrize("experts", EXPERTS, ids=str)
@pytest.mark.parametrize("tokens", (1, ROWS + 1))
def test_experts_and_top_k(experts: tuple[int, int], tokens: int) -> None:
    spec = layer(E=experts[0], K=experts[1], bias=True)
    agree.forward(spec, layers.inputs(spec, tokens, "holes"))
    agree.training(spec, layers.inputs(spec, min(tokens, 5), "holes"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_sizes_and_dtypes(sizes: tuple[int, int, int], dtype: torch.dtype) -> None:
    H, F, O = sizes
    spec = layer(H=H, F=F, O=O, dtype=dtype, bias=True)
    agree.forward(spec, layers.inputs(spec, 9))
    agree.training(spec, layers.inputs(spec, 9))


@pytest.mark.parametrize("layout", layers.LAYOUTS)
@pytest.mark.parametrize("tokens", (1, ROWS + 1))
def test_layouts(layout: str, tokens: int) -> None:
    spec = layer(E=6, layout=layout, bias=True)
    agree.forward(spec, layers.inputs(spec, tokens, "holes"))
    agree.training(spec, layers.inputs(spec, tokens, "holes"))


@pytest.mark.parametrize("name", layers.ACTIVATIONS)
def test_activations(name: str) -> None:
    spec = layer(activation=layers.ACTIVATIONS[name], bias=True)
    agree.forward(spec, layers.inputs(spec, 1))
    agree.training(spec, layers.inputs(spec, ROWS + 1))


@pytest.mark.parametrize("on", WeightOn)
@pytest.mark.parametrize("tokens", (1, ROWS + 1))
@pytest.mark.parametrize("bias", (False, True))
def test_where_the_weight_multiplies(on: WeightOn, tokens: int, bias: bool) -> None:
    spec = layer(on=on, bias=bias, E=6)
    agree.forward(spec, layers.inputs(spec, tokens, "holes"))
    agree.training(spec, layers.inputs(spec, tokens, "holes"))


@pytest.mark.parametrize("tokens", (1, ROWS + 1))
def test_ids_that_count_from_the_end(tokens: int) -> None:
    spec = layer(E=4, out_of_range=OutOfRange.INDEX, bias=True)
    given = layers.inputs(spec, tokens)
    given.ids = torch.where(torch.arange(given.ids.numel()).view_as(given.ids) % 3 == 0, given.ids - 4, given.ids)
    agree.forward(spec, given)
    agree.training(spec, given)


@pytest.mark.parametrize("tokens", (1, ROWS + 1))
def test_an_id_that_is_an_error_poisons_its_token_and_no_other(tokens: int) -> None:
    """Eager would stop with a device-side assert; a kernel cannot, so the token's output is NaN."""
    spec = layer(E=4, out_of_range=OutOfRange.INDEX)
    given = layers.inputs(spec, tokens)
    given.ids[-1, 1] = 4
    impl = agree.IMPLEMENTATION
    for out in (
        impl.experts(given.x, given.weights, given.ids, given.params, [], spec.text(), ""),
        impl.experts_train(given.x, given.weights, given.ids, given.params, [], spec.text(), "")[0],
    ):
        assert out[-1].isnan().all()
        assert out[:-1].isfinite().all()


@pytest.mark.parametrize("kept", range(6), ids=str)
def test_gradients_that_nobody_needs(kept: int) -> None:
    """Only one of x, weights, three weights and a bias gets a gradient: the others cost nothing and are empty."""
    spec = layer(layout="split", bias=True)
    given = layers.inputs(spec, 9, "holes")
    agree.training(spec, given, [i == kept for i in range(2 + len(given.params))])


@pytest.mark.parametrize("on", (WeightOn.INPUT, WeightOn.OUTPUT))
def test_memory_of_any_strides(on: WeightOn) -> None:
    """x and its gradient transposed, weights expanded, ids sliced, a parameter transposed, another offset by one element."""
    spec = layer(on=on)
    given = layers.inputs(spec, ROWS + 1, "holes")
    given.x = given.x.t().contiguous().t()
    given.grad = given.grad[:1].expand_as(given.grad)
    assert given.weights is not None
    given.weights = given.weights[:, :1].expand_as(given.ids)
    given.ids = torch.cat([given.ids, given.ids], 1)[:, :2]
    given.params[0] = given.params[0].transpose(1, 2).contiguous().transpose(1, 2)
    down = torch.empty(given.params[1].numel() + 1)
    given.params[1] = down[1:].view_as(given.params[1]).copy_(given.params[1])
    agree.forward(spec, given)
    agree.training(spec, given)


@pytest.mark.parametrize("layout", ("split", "separate"))
def test_a_parameter_with_strides_of_no_layout(layout: str) -> None:
    """Its rows are every second row of a larger tensor, or its elements are broadcast: read in place, or copied."""
    spec = layer(layout=layout)
    given = layers.inputs(spec, 9)
    given.params = [torch.stack([p, p], -1)[..., 1] for p in given.params]
    agree.forward(spec, given)
    agree.training(spec, given)


@pytest.mark.parametrize("tokens", (2, 5))
def test_a_token_of_nan_stays_alone(tokens: int) -> None:
    """Padding rows are NaN in serving: nothing of them may reach another token, not even as zero times NaN."""
    agree.nan_stays_alone(layer(E=8, H=20, F=18, O=17), tokens)


def test_sizes_that_divide_give_no_masks() -> None:
    spec = layer(H=32, F=32, O=16)
    agree.forward(spec, layers.inputs(spec, 1, "holes"))
    agree.training(spec, layers.inputs(spec, ROWS, "holes"))


def test_rows_of_empty_experts_get_exact_zeros() -> None:
    spec = layer(E=4, bias=True)
    given = layers.inputs(spec, ROWS, "half")
    impl, text = agree.IMPLEMENTATION, spec.text()
    _, saved = impl.experts_train(given.x, given.weights, given.ids, given.params, [], text, "")
    found = impl.experts_bwd(given.grad, given.x, given.weights, given.ids, given.params, [], text, "", saved, [True] * 6)
    for gradient in found[2:]:
        assert (gradient[2:] == 0).all()


@pytest.mark.parametrize("tokens", (1, ROWS + 1))
def test_a_run_repeats_bit_for_bit_and_tokens_do_not_mind_their_order(tokens: int) -> None:
    spec = layer(E=6, H=33)
    given, impl, text = layers.inputs(spec, tokens, "holes"), agree.IMPLEMENTATION, spec.text()

    def run(rows: slice | torch.Tensor) -> torch.Tensor:
        assert given.weights is not None
        return impl.experts_train(given.x[rows], given.weights[rows], given.ids[rows], given.params, [], text, "")[0]

    everything = run(slice(None))
    assert torch.equal(everything, run(slice(None)))
    order = torch.randperm(tokens, generator=torch.Generator().manual_seed(1))
    assert layers.error(run(order), everything[order].double()) < 1e-6  # numpy's matmul rounds rows by where they lie


@pytest.mark.parametrize("tokens", (1, 8, 9, 40))
def test_many_pairs(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The permutation in several launches, at sizes where it would not be chosen."""
    monkeypatch.setattr(gpu_choose, "FEW_PAIRS", 0)
    spec = layer(E=5, K=5)
    agree.training(spec, layers.inputs(spec, tokens, "holes"))

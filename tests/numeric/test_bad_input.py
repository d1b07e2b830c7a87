"""Input that breaks other backends: the right numbers, eager's own error, or the explained fallback; never something else."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moecompile.backend import moe
from tests.models import outcome
from tests.models.layer import MoE, Recipe, in_float64
from tests.models.numbers import run, wrong
from tests.models.routers import ROUTERS

FORMS = ("grouped", "batched", "loop_where", "dense")
MODE_NAMES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


def _recipe(form: str, **changes: object) -> Recipe:
    return dataclasses.replace(Recipe(form=form, router=ROUTERS["R1_normalised"]), **{"combine": "", **changes})


def _agrees(module: MoE, x: Tensor, train: bool = True, expanded: bool = False, inner: str = "eager", **settings: object) -> None:
    exact = in_float64(module)
    eager = run(module, module, [x], train, expanded)
    truth = run(exact, exact, [x.double()], train, expanded)
    assert not wrong(run(outcome.compiled(module, inner, **settings), module, [x], train, expanded), eager, truth)


# ---------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("written", "nearest"),
    [("fallbakc", "fallback"), ("moe.verfy", "moe.verify"), ("max_autotun", "max_autotune"), ("iner", "inner")],
)
def test_an_unknown_option_names_the_nearest(written: str, nearest: str) -> None:
    module = Recipe().make()
    with pytest.raises(Exception, match=f"{written}.*did you mean '{nearest}'"):
        torch.compile(module, backend=moe, options={written: 1})(torch.randn(2, 5, 16))


def test_an_unknown_mode_names_the_nearest() -> None:
    module = Recipe().make()
    with pytest.raises(Exception, match=r"max-autotun.*did you mean 'max-autotune'"):
        torch.compile(module, backend=moe, mode="max-autotun")(torch.randn(2, 5, 16))


@pytest.mark.parametrize(("option", "value"), [("fallback", "loud"), ("verify", -1), ("verify", "yes"), ("strict", 1)])
def test_a_bad_value_names_the_good_ones(option: str, value: object) -> None:
    module = Recipe().make()
    with pytest.raises(Exception, match=f"{option}.*needs"):
        torch.compile(module, backend=moe, options={option: value})(torch.randn(2, 5, 16))


# ---------------------------------------------------------------- sizes


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("shape", [(0,), (1,), (1, 1), (0, 5)], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_no_token_and_one_token(form: str, shape: tuple[int, ...], dynamic: bool) -> None:
    module = _recipe(form).make()
    _agrees(module, torch.randn(*shape, 16), dynamic=dynamic)


@pytest.mark.parametrize("form", FORMS)
def test_from_many_tokens_to_none(form: str) -> None:
    """One compiled module, and then an empty batch."""
    module = _recipe(form).make()
    call = outcome.compiled(module, dynamic=True)
    for tokens in (7, 3, 1, 0, 5):
        x = torch.randn(tokens, 16)
        assert not wrong(run(call, module, [x], train=True), run(module, module, [x], train=True))


@pytest.mark.parametrize("sizes", [(1, 1, 16, 24), (2, 1, 16, 24), (4, 4, 16, 24), (7, 3, 13, 11), (3, 2, 1, 1)], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_unusual_sizes(form: str, sizes: tuple[int, int, int, int]) -> None:
    """One expert, top_k = E, odd H and F, and H = F = 1. One expert that sees every token, or one feature, may go unseen."""
    recipe = _recipe(form, sizes=sizes)
    module = recipe.make()
    _agrees(module, recipe.inputs(module))
    unseen = form == "dense" and 1 in (sizes[0], sizes[2])
    assert len(outcome.fused()) == 1 or (sizes[2] == 1 and outcome.reasons()) or (unseen and not outcome.layers())


# ---------------------------------------------------------------- routing


@pytest.mark.parametrize("form", FORMS)
def test_all_tokens_to_one_expert(form: str) -> None:
    """top-1, every token to expert 2: the others get none, and gradients of exactly zero."""
    module = _recipe(form, sizes=(4, 1, 16, 24)).make()
    with torch.no_grad():
        module.router.weight.zero_()
        module.router.weight[2, 0] = 5.0
    x = torch.randn(9, 16)
    x[:, 0] = 3.0
    _agrees(module, x)
    gradients = run(outcome.compiled(module), module, [x], train=True).values["gradient of experts.layout.up"]
    assert not gradients[[0, 1, 3]].any()
    assert gradients[2].any()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_rows_that_are_not_finite(form: str, value: float) -> None:
    """Padding rows of a server may hold anything: the other rows keep their numbers."""
    recipe = _recipe(form)
    module = recipe.make()
    x = recipe.inputs(module).reshape(-1, 16)
    clean = module(x)[0]
    x[3] = value
    got = run(outcome.compiled(module), module, [x], train=False).values["output 0"]
    others = [t for t in range(len(x)) if t != 3]
    if form != "dense":  # there 0 times what is not finite is not finite, and every expert sees every row
        assert not got[3].isfinite().all()
    torch.testing.assert_close(got[others], clean[others])


@pytest.mark.parametrize("form", FORMS)
def test_tied_logits(form: str) -> None:
    """All experts alike to the router: any choice is right, and the output belongs to the choice that is returned."""
    recipe = _recipe(form, returns="all")
    module = recipe.make()
    with torch.no_grad():
        module.router.weight.zero_()
    x = torch.randn(10, 16)
    with torch.no_grad():
        y, logits, weights, ids = outcome.compiled(module)(x)
    assert not logits.any()
    assert ((ids >= 0) & (ids < 4)).all()
    assert all(len(set(row)) == 2 for row in ids.tolist())
    torch.testing.assert_close(weights, torch.full_like(weights, 0.5))
    torch.testing.assert_close(y, module.experts(x, ids, weights))


class IdsGiven(nn.Module):
    """The experts half alone: ids and weights come from outside."""

    def __init__(self, form: str, sentinels: bool = False) -> None:
        super().__init__()
        recipe = _recipe(form)
        self.experts = dataclasses.replace(recipe, sentinels=sentinels).make().experts

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out: Tensor = self.experts(x, ids, weights)
        return out


def _given(ids: Tensor) -> list[Tensor]:
    return [torch.randn(len(ids), 16), ids, torch.rand(ids.shape)]


@pytest.mark.parametrize("form", ["hf_grouped", "hf_batched", "loop_where", "loop_mask"])
@pytest.mark.parametrize("bad", [4, 7])
def test_sentinel_ids_add_nothing(form: str, bad: int) -> None:
    """Ids >= E, with weight 0, as transformers uses them under expert parallelism."""
    if form == "hf_grouped" and bad != 4:
        pytest.skip("transformers clamps sentinels to E - 1 after the sort: E is the one it makes")
    module = IdsGiven(form, sentinels=True)
    ids = torch.tensor([[0, 1], [bad, 2], [3, bad], [bad, bad], [1, 0]])
    x, _, weights = _given(ids)
    weights = weights.masked_fill(ids >= 4, 0.0)
    args = [x, ids, weights]
    eager = run(module, module, args, train=True)
    assert not wrong(run(outcome.compiled(module), module, args, train=True), eager)


@pytest.mark.parametrize("form", ["loop_where", "loop_mask", "loop_nonzero"])
@pytest.mark.parametrize("bad", [-1, 4, 9])
def test_a_loop_skips_ids_of_nobody(form: str, bad: int) -> None:
    module = IdsGiven(form)
    args = _given(torch.tensor([[0, 1], [bad, 2], [3, bad], [bad, bad]]))
    assert not wrong(run(outcome.compiled(module), module, args, train=True), run(module, module, args, train=True))


def test_indexing_counts_negative_ids_from_the_end() -> None:
    """`weight[ids]` of -1 is the last expert: what eager does."""
    module = IdsGiven("batched")
    args = _given(torch.tensor([[0, -1], [-4, 2], [3, 1]]))
    assert not wrong(run(outcome.compiled(module), module, args, train=True), run(module, module, args, train=True))


def test_indexing_refuses_ids_past_the_end() -> None:
    module = IdsGiven("batched")
    args = _given(torch.tensor([[0, 1], [4, 2]]))
    with pytest.raises((IndexError, RuntimeError)):
        module(*args)
    with pytest.raises((IndexError, RuntimeError)):
        outcome.compiled(module)(*args)


@pytest.mark.parametrize("form", FORMS)
def test_the_same_expert_twice(form: str) -> None:
    """Duplicate ids in one row: both pairs count."""
    if form == "dense":
        pytest.skip("scatter of duplicate ids keeps one weight, which is not defined")
    module = IdsGiven(form)
    args = _given(torch.tensor([[1, 1], [0, 2], [3, 3]]))
    assert not wrong(run(outcome.compiled(module), module, args, train=True), run(module, module, args, train=True))


# ---------------------------------------------------------------- weights, dtypes, gradients


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded", "unaligned", "strided"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("form", ["batched", "loop_where"])
def test_unusual_memory(form: str, layout: str, dtype: torch.dtype) -> None:
    recipe = _recipe(form, layout=layout, dtype=dtype, bias=True)
    module = recipe.make()
    _agrees(module, recipe.inputs(module))
    assert outcome.layers()


@pytest.mark.parametrize("form", ["batched", "loop_where", "loop_tuple"])
def test_experts_that_share_one_weight(form: str) -> None:
    """In inference they are a stack of stride 0; in training their gradients would have to be added up."""
    recipe = _recipe(form, layout="expanded", bias=True)
    module = recipe.make()
    _agrees(module, recipe.inputs(module), train=False)
    assert outcome.fused()
    _agrees(module, recipe.inputs(module), train=True)
    assert all("share weights" in found.reason for found in outcome.layers())


@pytest.mark.parametrize("form", ["batched", "loop_where", "grouped"])
def test_inputs_in_unusual_memory(form: str) -> None:
    """x transposed, expanded and sliced in memory."""
    recipe = _recipe(form, spelling=dataclasses.replace(Recipe().spelling, rows="reshape"))
    module = recipe.make()
    x = recipe.inputs(module).reshape(-1, 16)
    views = [x.t().contiguous().t(), x[0].expand(10, 16), torch.cat([x, x], 1)[:, :16], torch.cat([x, x])[::2]]
    call = outcome.compiled(module)
    for view in views:
        with torch.no_grad():
            torch.testing.assert_close(call(view)[0], module(view)[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.bfloat16], ids=["fp16", "fp64", "bf16"])
@pytest.mark.parametrize("form", FORMS)
def test_dtypes(form: str, dtype: torch.dtype) -> None:
    recipe = _recipe(form, dtype=dtype)
    module = recipe.make()
    _agrees(module, recipe.inputs(module))


@pytest.mark.parametrize("frozen", ["router", "experts", ""])
@pytest.mark.parametrize("form", FORMS)
def test_frozen_weights(form: str, frozen: str) -> None:
    recipe = _recipe(form)
    module = recipe.make()
    for name, p in module.named_parameters():
        p.requires_grad_(not name.startswith(frozen))
    _agrees(module, recipe.inputs(module))


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("form", FORMS)
def test_expanded_gradients(form: str, inner: str) -> None:
    """`.sum().backward()` sends gradients of stride 0."""
    recipe = _recipe(form)
    module = recipe.make()
    x = recipe.inputs(module)
    _agrees(module, x, expanded=True, inner=inner)
    call = outcome.compiled(module, inner)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    call(ours)[0].sum().backward()
    module(theirs)[0].sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


# ---------------------------------------------------------------- the backend itself


class SortAndSplit(nn.Module):
    """Rows sorted and split by counts on the host: under the capture flags a guard on data fails, without them it compiles."""

    def __init__(self, experts: int = 4) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(experts, 16, 16) / 4)
        self.router = nn.Linear(16, experts)

    def forward(self, x: Tensor) -> Tensor:
        values, ids = self.router(x).softmax(-1).max(-1)
        order = ids.argsort()
        counts = torch.bincount(ids, minlength=self.w.shape[0]).tolist()
        parts = x[order].split(counts)
        y = torch.cat([F.silu(part @ self.w[e]) for e, part in enumerate(parts)])
        return torch.zeros_like(x).index_add(0, order, y * values[order, None])


def test_capture_settings_break_nothing() -> None:
    """What compiles in pieces goes on compiling, without fullgraph."""
    module = SortAndSplit()
    x = torch.randn(9, 16)
    eager = run(module, module, [x], train=True)
    torch._dynamo.reset()
    assert not wrong(run(torch.compile(module, backend="aot_eager"), module, [x], train=True), eager)
    assert not wrong(run(outcome.compiled(module, "aot_eager"), module, [x], train=True), eager)


def test_a_model_without_moe_is_left_alone() -> None:
    module = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
    x = torch.randn(4, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = run(outcome.compiled(module, options={"fallback": "warn"}), module, [x], train=True)
    eager = run(module, module, [x], train=True)
    assert all(torch.equal(got.values[k], v) for k, v in eager.values.items())
    assert not outcome.layers()


def test_fallback_error_raises_where_a_layer_is_declined() -> None:
    """A normalised row after the down projection is no MoE layer of ours: declined, and with "error" that is final."""
    from tests.models.lookalike_dispatch import OutputRowsNormalised

    module = OutputRowsNormalised()
    x = torch.randn(10, 16)
    with pytest.raises(Exception, match=r"(?i)declined|unsupported|not fused|no role|fallback"):
        outcome.compiled(module, options={"fallback": "error"})(x)


def test_fallback_warn_warns_once() -> None:
    from tests.models.lookalike_dispatch import OutputRowsNormalised

    module = OutputRowsNormalised()
    call = outcome.compiled(module, options={"fallback": "warn"})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            assert torch.isfinite(call(torch.randn(10, 16))).all()
    ours = [str(w.message) for w in caught if "moe" in str(w.message).lower()]
    assert len(ours) == 1, ours


@pytest.mark.parametrize("form", ["batched", "loop_where", "dense"])
def test_gradients_of_gradients(form: str) -> None:
    """Where the graph is left to eager autograd; AOTAutograd refuses. A kernel's gradients are no constants."""
    module = _recipe(form).make()
    x = torch.randn(6, 16, requires_grad=True)
    leaves = [x, *module.parameters()]

    def second(call: Callable[..., Any]) -> Sequence[Tensor]:
        y, *_ = call(x)
        first = torch.autograd.grad(y.pow(2).sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.pow(2).sum() for g in first), leaves)

    call = outcome.compiled(module, kernels="auto")
    for got, want in zip(second(call), second(module), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3 * float(want.abs().max()))
    with pytest.raises(RuntimeError, match="double backward"):
        second(outcome.compiled(module, "aot_eager"))

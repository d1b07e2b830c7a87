"""Router and experts by one call of C++: the softmax of its own never chooses other experts than aten's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moecompile.codegen import cpu_routed, cpu_router
from moecompile.codegen.build_cpp import NATIVE
from moecompile.codegen.cpu import CpuImplementation
from moecompile.codegen.cpu_experts import DTYPES
from moecompile.ir import expr, reference
from moecompile.ir.spec import ExpertsSpec, Groups, OutOfRange, RouterSpec, Weight, WeightOn

DONE, UNSURE = 0, cpu_router.UNSURE


def softmax(E: int, K: int, **other: object) -> RouterSpec:
    fields: dict[str, object] = {"score_dtype": torch.float32, "bias": False, "groups": None}
    fields |= {"weights_from": "score", "post": (), "sorted": True}
    return RouterSpec(E, K, "softmax", **(fields | other))  # type: ignore[arg-type]


def choose(spec: RouterSpec, row: Tensor, scored: bool = False) -> tuple[int, Tensor, Tensor]:
    """Status, weights and ids of one token, by the kernel's own softmax."""
    router = cpu_router.router(spec.text())
    weights = torch.full((spec.top_k,), torch.nan, dtype=router.weights_dtype(row, None))
    ids = torch.full((spec.top_k,), -7)
    kept: list[object] = []
    call = router.call(row, None, kept, own=True, scored=scored)
    assert call is not None
    return router._run([*call, weights.data_ptr(), DTYPES[weights.dtype], ids.data_ptr()]), weights, ids


def near(E: int, levels: int, gap: float) -> Tensor:
    """Logits that are equal, or `gap` and more apart, around a few levels."""
    base = torch.randint(levels, (E,)).float()
    return base + torch.randint(3, (E,)).float() * gap


@pytest.mark.parametrize("is_sorted", [True, False])
@pytest.mark.parametrize("E", [1, 2, 7, 8, 16, 60, 64, 256])
def test_sure_ids_are_those_of_topk(E: int, is_sorted: bool) -> None:
    torch.manual_seed(E)
    sure = 0
    for K in sorted({1, 2, 4, 8, E} & set(range(1, E + 1))):
        spec = softmax(E, K, sorted=is_sorted)
        for draw in range(200):
            gap = (1e-3, 1e-4, 1e-5, 1e-6, 1.2e-7, 6e-8, 0.0, 30.0)[draw % 8]
            row = near(E, 1 + draw % 5, gap) + (draw % 3) * 1.7
            status, weights, ids = choose(spec, row)
            sure += status == DONE
            right, right_ids = reference.route(spec, row, None)
            if status == DONE:
                assert torch.equal(ids, right_ids), (row, ids, right_ids)
                torch.testing.assert_close(weights, right, rtol=2e-5 if gap == 30.0 else 2e-6, atol=1e-30)
            else:
                assert status == UNSURE
    assert sure


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_usual_logits_are_sure(dtype: torch.dtype) -> None:
    """Ties of bfloat16 included: else the softmax would be computed twice."""
    torch.manual_seed(0)
    for E, K, least in ((64, 8, 190), (8, 2, 195), (256, 8, 170)):
        statuses = [choose(softmax(E, K), torch.randn(E).to(dtype))[0] for _ in range(200)]
        assert statuses.count(DONE) >= least, (E, K, statuses.count(DONE))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_left_to_aten(value: float) -> None:
    spec = softmax(8, 2)
    row = torch.randn(8)
    row[3] = value
    assert choose(spec, row)[0] == UNSURE
    status, weights, ids = choose(spec, row, scored=True)
    right, right_ids = reference.route(spec, row, None)
    assert status == DONE and torch.equal(ids, right_ids) and torch.equal(weights.nan_to_num(7.0), right.nan_to_num(7.0))


def test_scores_that_vanish_are_left_to_aten() -> None:
    """Below exp(-100) different logits have the same score, 0, and top-k has its own order of those."""
    row = torch.tensor([0.0, -200.0, -110.0, -105.0, -300.0, -1e30, 1.0, -120.0])
    for is_sorted in (True, False):
        assert choose(softmax(8, 4, sorted=is_sorted), row)[0] == UNSURE
    status, _, ids = choose(softmax(8, 2), row)  # the first two have scores
    assert status == DONE and ids.tolist() == [6, 0]


def experts(dtype: torch.dtype = torch.float32, K: int = 2, on: WeightOn = WeightOn.OUTPUT) -> tuple[ExpertsSpec, list[Tensor]]:
    E, H, F = 8, 24, 20
    up = [Weight((0,), (E, 2 * F, H), i * F * H, 2 * F * H, H, 1) for i in range(2)]
    down = Weight((1,), (E, H, F), 0, H * F, F, 1)
    activation = ("mul", expr.silu(("in", 0)), ("in", 1))
    spec = ExpertsSpec(E, K, H, F, H, tuple(up), (None, None), activation, down, None, on, OutOfRange.SKIP, dtype, dtype)
    return spec, [torch.randn(E, 2 * F, H).to(dtype) / 5, torch.randn(E, H, F).to(dtype) / 5]


ROUTERS = {
    "softmax": softmax(8, 2, post=(("normalise", 0.0, 0.0),)),
    "unsorted": softmax(8, 2, sorted=False),
    "cast": softmax(8, 2, post=(("cast", torch.bfloat16),)),
    "from logits": softmax(8, 2, weights_from="logits", post=(("softmax",),)),
    "sigmoid, bias": RouterSpec(8, 2, "sigmoid", torch.float32, True, None, "score", (("normalise", 1e-20, 0.0),), True),
    "groups": softmax(8, 2, groups=Groups(4, 2, "max", 0.0)),
    "in bfloat16": softmax(8, 2, score_dtype=torch.bfloat16),
}


@pytest.mark.parametrize("tokens", [(0,), (1,), (2, 3), (3000,)])
@pytest.mark.parametrize("name", ROUTERS)
def test_one_step_is_two(name: str, tokens: tuple[int, ...]) -> None:
    torch.manual_seed(1)
    router, (spec, params) = ROUTERS[name], experts()
    logits = torch.randn(*tokens, 8)
    if name == "in bfloat16":
        logits = logits.bfloat16()
    if len(tokens) == 2:
        logits[0, 0, :4], logits[1, 1, 3] = 0.5, torch.nan
    bias = torch.randn(8) if router.bias else None
    x = torch.randn(logits[..., 0].numel(), spec.hidden)
    device = CpuImplementation()
    weights, ids = device.route(logits, bias, router.text())
    want = device.experts(x, weights.flatten(0, -2), ids.flatten(0, -2), params, (), spec.text(), "")
    got = device.routed_experts(x, logits, bias, params, (), router.text(), spec.text(), "")
    torch.testing.assert_close(got, want, equal_nan=True)


def test_a_token_does_not_depend_on_its_batch() -> None:
    """The softmax is the kernel's for every number of tokens."""
    router, (spec, params) = softmax(8, 2), experts()
    x, logits = torch.randn(3000, spec.hidden), torch.randn(3000, 8)
    kernel = cpu_routed.kernel(router.text(), spec.text(), NATIVE)
    whole = kernel.run(x, logits, None, params)
    assert whole is not None
    for t in (0, 1234, 2999):
        one = kernel.run(x[t : t + 1], logits[t : t + 1], None, params)
        assert one is not None and torch.equal(one[0], whole[t])


def test_float64_logits_take_two_steps() -> None:
    router, (spec, params) = softmax(8, 2), experts()
    x, logits = torch.randn(3, spec.hidden), torch.randn(3, 8, dtype=torch.float64)
    assert cpu_routed.kernel(router.text(), spec.text(), NATIVE).run(x, logits, None, params) is None
    assert CpuImplementation().routed_experts(x, logits, None, params, (), router.text(), spec.text(), "").isfinite().all()


def test_parameters_that_move_or_change_their_layout_are_found_again() -> None:
    """Addresses are kept from call to call."""
    router, (spec, params) = softmax(8, 2), experts()
    x, logits, device = torch.randn(3, spec.hidden), torch.randn(3, 8), CpuImplementation()
    for case in range(6):
        if case % 2:
            params = [torch.randn_like(p) for p in params]
        elif case:
            params = [p.transpose(1, 2).contiguous().transpose(1, 2) for p in params]
        else:
            params[1].mul_(2)
        weights, ids = reference.route(router, logits, None)
        want = reference.experts(spec, x, weights, ids, params)
        got = device.routed_experts(x, logits, None, params, (), router.text(), spec.text(), "")
        torch.testing.assert_close(got, want)

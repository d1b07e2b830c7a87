"""The fused router: its weights and ids against aten, and any bits at all as logits.

Run as tests/gpu/test_interpreted.py does.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from moecompile.codegen import gpu
from moecompile.ir import reference
from moecompile.ir.spec import Groups, RouterSpec

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
NORMALISE = ("normalise", 1e-20, 0.0)
ROUTERS = {
    "mixtral": RouterSpec(8, 2, "softmax", F32, False, None, "score", (("normalise", 0.0, 0.0),), True),
    "olmoe": RouterSpec(64, 8, "softmax", F32, False, None, "score", (), True),
    "gpt-oss": RouterSpec(32, 4, "identity", F32, False, None, "logits", (("softmax",),), True),
    "llama4": RouterSpec(16, 1, "identity", F32, False, None, "logits", (("sigmoid",),), True),
    "deepseek-v2": RouterSpec(16, 4, "softmax", F32, False, Groups(4, 2, "max", 0.0), "score", (("scale", 16.0),), True),
    "deepseek-v3": RouterSpec(32, 4, "sigmoid", F32, True, Groups(4, 2, "top2", 0.0), "score", (NORMALISE, ("scale", 2.5)), False),
    "groups filled with -inf": RouterSpec(12, 3, "sigmoid", F32, True, Groups(3, 2, "top2", float("-inf")), "score", (), True),
    "groups of no power of two": RouterSpec(30, 5, "softmax", F32, False, Groups(6, 3, "max", 0.0), "choice", (), True),
    "sqrtsoftplus": RouterSpec(9, 3, "sqrtsoftplus", F32, True, None, "score", (("normalise", 0.0, 1e-6), ("scale", 1.5)), True),
    "weights from the choice": RouterSpec(10, 3, "sigmoid", F32, True, None, "choice", (), True),
    "weights cast": RouterSpec(8, 2, "softmax", F32, False, None, "score", (("cast", F16), ("normalise", 0.0, 0.0)), True),
    "one expert": RouterSpec(1, 1, "softmax", F32, False, None, "score", (), True),
    "every expert": RouterSpec(7, 7, "softmax", F32, False, None, "score", (("normalise", 0.0, 0.0),), True),
}
IMPLEMENTATION = gpu.GpuImplementation()


def drawn(spec: RouterSpec, tokens: int, seed: int = 0) -> tuple[Tensor, Tensor | None]:
    g = torch.Generator().manual_seed(seed)
    bias = torch.randn(spec.num_experts, generator=g) / 4 if spec.bias else None
    return 2 * torch.randn(tokens, spec.num_experts, generator=g), bias


def check(spec: RouterSpec, logits: Tensor, bias: Tensor | None) -> None:
    """Against the reference in float64: the same experts, unless their choices tie to float32's rounding; and weights that
    are those of the ids given."""
    weights, ids = IMPLEMENTATION.route(logits, bias, spec.text())
    wide = dataclasses.replace(spec, score_dtype=torch.float64)
    score = reference.scores(wide, logits.double())
    choice = reference.choices(wide, score, None if bias is None else bias.double())
    best = choice.topk(spec.top_k, -1).values
    got = choice.gather(-1, ids).sort(-1, descending=True).values
    torch.testing.assert_close(got, best, rtol=1e-5, atol=1e-6)
    want = reference.chosen_weights(spec, logits, score.float(), choice.float(), ids)
    assert weights.dtype == want.dtype and weights.shape == want.shape
    eps = torch.finfo(want.dtype).eps
    torch.testing.assert_close(weights, want, rtol=8 * eps, atol=4 * eps)


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("tokens", (0, 1, 3, 4, 5, 17))
def test_weights_and_ids(name: str, tokens: int) -> None:
    check(ROUTERS[name], *drawn(ROUTERS[name], tokens))


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_ids_are_in_range_and_unique_for_any_bits(name: str) -> None:
    spec = ROUTERS[name]
    g = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (64, spec.num_experts), generator=g).to(torch.int32).view(F32).clone()
    bits[0], bits[1], bits[2], bits[3], bits[4, 0] = float("nan"), float("inf"), float("-inf"), 0.0, float("nan")
    bias = drawn(spec, 1)[1]
    for logits in (bits, bits.to(BF16), bits.to(F16)):
        _, ids = IMPLEMENTATION.route(logits, bias, spec.text())
        assert bool((ids >= 0).all() and (ids < spec.num_experts).all())
        ordered = ids.sort(-1).values
        assert bool((ordered[:, 1:] > ordered[:, :-1]).all())


def test_ties_go_to_the_lower_expert_and_a_zero_has_no_sign() -> None:
    spec = ROUTERS["gpt-oss"]
    logits = torch.zeros(2, 32)
    logits[1, ::2] = -0.0
    assert IMPLEMENTATION.route(logits, None, spec.text())[1].tolist() == [[0, 1, 2, 3]] * 2


def test_negative_choices_are_ordered() -> None:
    spec = ROUTERS["gpt-oss"]
    check(spec, drawn(spec, 5)[0] - 20, None)


def test_nan_is_the_largest_as_in_topk() -> None:
    logits = torch.arange(32.0)[None].clone()
    logits[0, 5] = -torch.tensor(float("nan"))  # the sign of a NaN does not matter either
    assert logits.view(torch.int32)[0, 5] < 0
    ids = IMPLEMENTATION.route(logits, None, ROUTERS["gpt-oss"].text())[1]
    assert ids.tolist() == [[5, 31, 30, 29]] == logits.topk(4).indices.tolist()


@pytest.mark.parametrize("dtype", (BF16, F16), ids=str)
def test_half_precision_logits_of_any_leading_shape(dtype: torch.dtype) -> None:
    spec = ROUTERS["mixtral"]
    logits = drawn(spec, 6)[0].to(dtype).view(2, 3, 8).transpose(0, 1)
    weights, ids = IMPLEMENTATION.route(logits, None, spec.text())
    assert weights.shape == ids.shape == (3, 2, 2) and ids.dtype == torch.int64
    flat = IMPLEMENTATION.route(logits.reshape(6, 8), None, spec.text())
    assert torch.equal(weights.view(6, 2), flat[0]) and torch.equal(ids.view(6, 2), flat[1])
    check(spec, logits.reshape(6, 8).float(), None)

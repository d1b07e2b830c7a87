"""The C++ router: ids are aten's bit for bit, whatever the logits; weights agree with the reference."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from moecompile.codegen.cpu_router import prepare_router, route, supports_router
from moecompile.ir import reference
from moecompile.ir.spec import Groups, RouterSpec

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def plain(E: int, K: int, **other: object) -> RouterSpec:
    fields: dict[str, object] = {"score": "identity", "score_dtype": torch.float32, "bias": False, "groups": None}
    fields |= {"weights_from": "score", "post": (), "sorted": True}
    return RouterSpec(E, K, **(fields | other))  # type: ignore[arg-type]


@pytest.mark.parametrize("E", [1, 2, 3, 8, 16, 17, 60, 64, 128, 256, 384, 512])
def test_ids_are_those_of_topk(E: int) -> None:
    for K, is_sorted in itertools.product(sorted({1, 2, 4, 8, E // 2, E - 1, E} & set(range(1, E + 1))), (True, False)):
        text = plain(E, K, sorted=is_sorted).text()
        for levels in (1, 3, 50, 10**6):
            x = torch.randint(levels, (200, E)).float()
            for special in (float("nan"), float("inf"), -float("inf"), -0.0):
                x[torch.rand(200, E) < 0.04] = special
            weights, ids = route(x, None, text)
            values, right = x.topk(K, -1, sorted=is_sorted)
            assert torch.equal(ids, right), f"E={E} K={K} sorted={is_sorted} levels={levels}"
            assert torch.equal(weights.nan_to_num(7.0), values.nan_to_num(7.0))


def draw(rng: random.Random) -> RouterSpec:
    E, count = rng.choice((8, 16, 64, 256)), rng.choice((0, 0, 1, 2, 4))
    fill = rng.choice((0.0, -float("inf")))
    posts = (
        (),
        (("normalise", 1e-20, 0.0), ("scale", 2.5)),
        (("softmax",), ("cast", torch.bfloat16)),
        (("sigmoid",),),
        (("cast", torch.bfloat16), ("normalise", 0.0, 0.0), ("cast", torch.float32)),
        (("normalise", 0.0, 1e-6),),
    )
    return plain(
        *(E, rng.randint(1, 8)),
        score=rng.choice(("softmax", "sigmoid", "sqrtsoftplus", "identity")),
        score_dtype=rng.choice(DTYPES),
        bias=rng.random() < 0.5,
        groups=Groups(count, rng.randint(1, count), rng.choice(("max", "top2")), fill) if count else None,
        weights_from=rng.choice(("score", "choice", "logits")),
        post=rng.choice(posts),
        sorted=rng.random() < 0.7,
    )


@pytest.mark.parametrize("seed", range(10))
def test_random_routers(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(60):
        spec, shape = draw(rng), rng.choice(((0,), (1,), (40,), (2, 9)))
        assert supports_router(spec) is None
        logits = torch.randn(*shape, spec.num_experts)
        if rng.random() < 0.5:
            logits = logits.round()  # ties
        if rng.random() < 0.3:
            logits[torch.rand(logits.shape) < 0.05] = rng.choice((float("nan"), float("inf"), -float("inf")))
        logits = logits.to(rng.choice(DTYPES))
        bias = torch.randn(spec.num_experts).to(rng.choice(DTYPES)) if spec.bias else None
        weights, ids = route(logits, bias, spec.text())
        right, right_ids = reference.route(spec, logits, bias)
        assert torch.equal(ids, right_ids), spec.text()
        assert weights.dtype == right.dtype and weights.shape == right.shape
        positive = spec.weights_from == "score" and spec.score != "identity"  # else sums may cancel
        if positive or not any(step[0] == "normalise" for step in spec.post):
            eps = max(float(torch.finfo(d).eps) for d in (right.dtype, torch.float32))
            torch.testing.assert_close(weights, right, rtol=8 * eps, atol=2 * eps, equal_nan=True)


def test_logits_in_any_memory() -> None:
    spec = plain(8, 2, score="softmax", weights_from="logits")
    logits = torch.randn(5, 16)[:, ::2]
    for given in (logits, torch.randn(8, 5).t(), torch.randn(1, 8).expand(5, 8)):
        for ours, right in zip(route(given, None, spec.text()), reference.route(spec, given, None), strict=True):
            assert torch.equal(ours, right)


def test_float64_logits_are_left_to_aten() -> None:
    spec = plain(8, 2, score="softmax", weights_from="logits")
    logits = torch.randn(5, 8, dtype=torch.float64)
    assert torch.equal(route(logits, None, spec.text())[0], reference.route(spec, logits, None)[0])


def test_refusals_say_why() -> None:
    assert "float64" in (supports_router(plain(8, 2, score_dtype=torch.float64)) or "")
    assert "float64" in (supports_router(plain(8, 2, post=(("cast", torch.float64),))) or "")
    assert "one expert" in (supports_router(plain(8, 2, groups=Groups(8, 2, "top2", 0.0))) or "")
    prepare_router(plain(8, 2))

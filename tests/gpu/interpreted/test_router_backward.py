"""The gradients of the fused router against float64, at the ids that it chose.

Run as tests/gpu/test_interpreted.py does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

from moecompile.codegen import gpu, gpu_router
from moecompile.ir import ops
from moecompile.ir.spec import RouterSpec
from tests.gpu.interpreted.test_router import BF16, F16, F32, ROUTERS, drawn

IMPLEMENTATION = gpu.GpuImplementation()
MORE = {
    "sum above the clamp": RouterSpec(6, 3, "sigmoid", F32, False, None, "score", (("normalise", 0.5, 0.25),), True),
    "sum below the clamp": RouterSpec(6, 3, "sigmoid", F32, False, None, "score", (("normalise", 0.5, 30.0),), True),
    "softmax after normalising": RouterSpec(
        9, 4, "softmax", F32, False, None, "score", (("normalise", 0.0, 0.0), ("softmax",), ("scale", 3.0)), True
    ),
    "sigmoid of the biased": RouterSpec(8, 2, "identity", F32, True, None, "choice", (("sigmoid",),), True),
}
DIFFERENTIABLE = {n: s for n, s in (ROUTERS | MORE).items() if gpu_router.differentiates(s) is None}


def wanted(
    spec: RouterSpec, grad: Tensor, logits: Tensor, bias: Tensor | None, ids: Tensor, dstats: Sequence[Tensor] = ()
) -> list[Tensor]:
    """Gradients of logits and bias in float64."""
    post = tuple(("cast", torch.float64) if step[0] == "cast" else step for step in spec.post)
    wide = dataclasses.replace(spec, score_dtype=torch.float64, post=post)
    bias = None if bias is None else bias.double()
    needs = [True, bias is not None and spec.weights_from == "choice"]
    dsums = [t.double() for t in dstats] or [None, None]
    return ops.Reference().route_bwd(grad.double(), logits.double(), bias, ids, *dsums, wide.text(), needs)


def check(spec: RouterSpec, logits: Tensor, bias: Tensor | None, eps: float = 2e-6) -> None:
    weights, ids = IMPLEMENTATION.route(logits, bias, spec.text())
    grad = torch.randn(weights.shape, generator=torch.Generator().manual_seed(1)).to(weights.dtype)
    needs = [True, bias is not None and spec.weights_from == "choice"]
    found = IMPLEMENTATION.route_bwd(grad, logits, bias, ids, None, None, spec.text(), needs)
    want = wanted(spec, grad, logits, bias, ids)
    assert found[0].dtype == logits.dtype and found[0].shape == logits.shape
    for name, got, right in zip(("logits", "bias"), found, want, strict=True):
        assert got.shape == right.shape and got.is_contiguous(), name
        scale = float(right.abs().max()) if right.numel() else 1.0
        torch.testing.assert_close(got.double(), right, rtol=0, atol=eps * max(scale, 1e-30), msg=lambda m: f"{name}: {m}")


@pytest.mark.parametrize("name", DIFFERENTIABLE)
@pytest.mark.parametrize("tokens", (0, 1, 3, 4, 5, 17))
def test_gradients(name: str, tokens: int) -> None:
    spec = DIFFERENTIABLE[name]
    eps = 2e-3 if any(step[0] == "cast" for step in spec.post) else 2e-6
    check(spec, *drawn(spec, tokens), eps)


@pytest.mark.parametrize("dtype", (BF16, F16), ids=str)
def test_half_precision_logits_of_any_leading_shape(dtype: torch.dtype) -> None:
    spec = ROUTERS["mixtral"]
    logits = drawn(spec, 6)[0].to(dtype).view(2, 3, 8).transpose(0, 1)
    check(spec, logits, None, 4 * torch.finfo(dtype).eps)


def test_equal_logits_one_expert_for_all_and_logits_of_minus_infinity() -> None:
    spec = ROUTERS["olmoe"]
    logits = torch.zeros(5, 64)
    logits[1:3, 7] = 40.0
    logits[3, 9:] = -float("inf")
    check(spec, logits, None)
    check(ROUTERS["mixtral"], torch.full((4, 8), 3.0), None)


def test_scores_that_underflow_have_no_slope() -> None:
    """Eager divides 0 by 0 there and spoils the whole row; the limit is 0."""
    spec = ROUTERS["sqrtsoftplus"]
    logits, bias = drawn(spec, 3)
    logits[:, 4] = -200.0
    weights, ids = IMPLEMENTATION.route(logits, bias, spec.text())
    assert not bool((ids == 4).any())
    found = IMPLEMENTATION.route_bwd(torch.ones_like(weights), logits, bias, ids, None, None, spec.text(), [True, False])[0]
    assert found.isfinite().all() and bool((found[:, 4] == 0).all())


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_a_token_of_nan_stays_alone(name: str) -> None:
    spec = DIFFERENTIABLE[name]
    logits, bias = drawn(spec, 6)
    clean = logits.clone()
    logits[2] = float("nan")
    found, other = [], []
    for given, kept in ((logits, found), (clean, other)):
        weights, ids = IMPLEMENTATION.route(given, bias, spec.text())
        kept += IMPLEMENTATION.route_bwd(torch.ones_like(weights), given, bias, ids, None, None, spec.text(), [True, False])
    rows = [0, 1, 3, 4, 5]
    assert torch.equal(found[0][rows], other[0][rows])


def test_what_nobody_needs_is_empty_and_a_bias_that_only_chooses_gets_zeros() -> None:
    spec = ROUTERS["deepseek-v3"]
    logits, bias = drawn(spec, 5)
    weights, ids = IMPLEMENTATION.route(logits, bias, spec.text())
    found = IMPLEMENTATION.route_bwd(weights, logits, bias, ids, None, None, spec.text(), [False, True])
    assert found[0].numel() == 0 and torch.equal(found[1], torch.zeros(32))


def test_a_run_repeats_bit_for_bit() -> None:
    spec = ROUTERS["weights from the choice"]
    logits, bias = drawn(spec, 33)
    weights, ids = IMPLEMENTATION.route(logits, bias, spec.text())
    first, second = (IMPLEMENTATION.route_bwd(weights, logits, bias, ids, None, None, spec.text(), [True, True]) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


@pytest.fixture
def bound() -> Iterator[None]:
    before = ops._BOUND.pop("cpu", None)
    ops.bind("cpu", IMPLEMENTATION)
    yield
    ops._BOUND.pop("cpu")
    if before is not None:
        ops._BOUND["cpu"] = before


@pytest.mark.parametrize("name", ("mixtral", "deepseek-v3", "weights from the choice", "groups of no power of two"))
def test_under_torch_compile(name: str, bound: None) -> None:
    """The graph's backward is the kernel, or aten where there is none; the gradients are those of float64."""
    spec = ROUTERS[name]
    logits, bias = drawn(spec, 7)
    text = spec.text()
    graphs: list[str] = []

    def keep(gm: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        graphs.append(gm.code)
        return gm

    from torch._dynamo.backends.common import aot_autograd

    torch._dynamo.reset()
    compiled = torch.compile(
        lambda z, b: torch.ops.moe.route(z, b, text)[0] * 1.0, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep)
    )
    z = logits.clone().requires_grad_()
    b = None if bias is None else bias.clone().requires_grad_()
    out = compiled(z, b)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    out.backward(grad)
    torch._dynamo.reset()
    assert ("_route_bwd" in graphs[-1]) == (name in DIFFERENTIABLE)
    ids = IMPLEMENTATION.route(logits, bias, text)[1]
    want = wanted(spec, grad, logits, bias, ids)
    torch.testing.assert_close(z.grad.double(), want[0], rtol=0, atol=2e-6 * float(want[0].abs().max()))
    if b is not None and spec.weights_from == "choice":
        torch.testing.assert_close(b.grad.double(), want[1], rtol=0, atol=2e-6 * float(want[1].abs().max()))
    elif b is not None:
        assert b.grad is None or bool((b.grad == 0).all())

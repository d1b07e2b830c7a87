"""The gradients of moe.route in double: by aten where the device has no kernel for them, by moe._route_bwd where it has."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from moecompile.ir import ops, reference
from moecompile.ir.spec import Groups, RouterSpec

F64 = torch.float64
SPECS = {
    "softmax": RouterSpec(5, 2, "softmax", F64, False, None, "score", (("normalise", 0.0, 0.0),), True),
    "sigmoid with groups": RouterSpec(
        6, 2, "sigmoid", F64, True, Groups(2, 1, "top2", 0.0), "score", (("normalise", 1e-20, 0.0), ("scale", 2.5)), False
    ),
    "sqrtsoftplus": RouterSpec(5, 2, "sqrtsoftplus", F64, False, None, "score", (("normalise", 0.0, 1e-6),), True),
    "logits": RouterSpec(5, 3, "identity", F64, False, None, "logits", (("softmax",),), True),
    "from the choice": RouterSpec(5, 2, "sigmoid", F64, True, None, "choice", (("sigmoid",),), True),
}


class Differentiating(ops.Reference):
    def differentiates(self, spec: str) -> bool:
        return True


@pytest.fixture(params=(False, True), ids=("aten", "_route_bwd"))
def device(request: pytest.FixtureRequest) -> Iterator[bool]:
    before = ops._BOUND.get("cpu")
    ops.bind("cpu", Differentiating() if request.param else ops.Reference())
    yield request.param
    ops._BOUND.pop("cpu")
    if before is not None:
        ops._BOUND["cpu"] = before


@pytest.mark.parametrize("name", SPECS)
def test_gradcheck(name: str, device: bool) -> None:
    spec = SPECS[name]
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(3, spec.num_experts, generator=g, dtype=F64, requires_grad=True)
    bias = torch.randn(spec.num_experts, generator=g, dtype=F64, requires_grad=True) if spec.bias else None
    text = spec.text()
    weights = torch.ops.moe.route(logits, bias, text)[0]
    assert ("_Route" in str(weights.grad_fn)) == device

    def weights_of(logits: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return torch.ops.moe.route(logits, bias, text)[0]  # type: ignore[no-any-return]

    assert torch.autograd.gradcheck(weights_of, (logits, bias))
    assert torch.autograd.gradgradcheck(weights_of, (logits, bias))


@pytest.mark.parametrize("name", SPECS)
def test_gradcheck_with_statistics(name: str, device: bool) -> None:
    spec = SPECS[name]
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(3, spec.num_experts, generator=g, dtype=F64, requires_grad=True)
    bias = torch.randn(spec.num_experts, generator=g, dtype=F64, requires_grad=True) if spec.bias else None
    text = spec.text()

    def differentiable(logits: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        weights, _, _, probs, squares = torch.ops.moe.route_stats(logits, bias, text)
        return weights, probs, squares

    assert ("_RouteStats" in str(differentiable(logits, bias)[1].grad_fn)) == device
    assert torch.autograd.gradcheck(differentiable, (logits, bias))
    assert torch.autograd.gradgradcheck(differentiable, (logits, bias))


@pytest.mark.parametrize("used", range(3), ids=("weights", "probs", "squares"))
def test_each_result_alone_has_its_gradient(used: int, device: bool) -> None:
    """What nobody reads is no part of the backward; the rest is as if it were."""
    spec = SPECS["softmax"]
    logits = torch.randn(3, 5, generator=torch.Generator().manual_seed(0), dtype=F64, requires_grad=True)
    weights, ids, _, probs, squares = torch.ops.moe.route_stats(logits, None, spec.text())
    result = (weights, probs, squares)[used]
    grad = torch.randn(result.shape, generator=torch.Generator().manual_seed(1), dtype=F64)
    (found,) = torch.autograd.grad(result, logits, grad)
    plain = (reference.weights_of(spec, logits, None, ids), *reference.statistics(logits, ids)[1:])[used]
    (want,) = torch.autograd.grad(plain, logits, grad)
    torch.testing.assert_close(found, want)


@pytest.mark.parametrize("name", SPECS)
def test_the_op_is_sound(name: str) -> None:
    spec = SPECS[name]
    logits = torch.randn(3, spec.num_experts, dtype=F64)
    bias = torch.randn(spec.num_experts, dtype=F64) if spec.bias else None
    weights, ids = torch.ops.moe._route(logits, bias, spec.text())
    arguments = (weights, logits, bias, ids, None, None, spec.text(), [True, spec.weights_from == "choice"])
    torch.library.opcheck(torch.ops.moe._route_bwd.default, arguments)
    _, _, _, probs, squares = torch.ops.moe._route_stats(logits, bias, spec.text())
    arguments = (weights, logits, bias, ids, probs, squares, spec.text(), [True, False])
    torch.library.opcheck(torch.ops.moe._route_bwd.default, arguments)
    torch.library.opcheck(torch.ops.moe._route_stats.default, (logits, bias, spec.text()))


def test_a_cpu_has_no_such_kernel() -> None:
    from moecompile.codegen.cpu import CpuImplementation

    assert not CpuImplementation().differentiates(SPECS["softmax"].text())

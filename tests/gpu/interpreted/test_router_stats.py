"""What the router sums for balancing losses, and its gradient, against float64.

Run as tests/gpu/test_interpreted.py does.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from moecompile.codegen import gpu
from moecompile.ir import ops, reference
from moecompile.ir.spec import RouterSpec
from tests.gpu.interpreted.test_router import BF16, ROUTERS, drawn
from tests.gpu.interpreted.test_router_backward import DIFFERENTIABLE, wanted

IMPLEMENTATION = gpu.GpuImplementation()


def check(spec: RouterSpec, logits: Tensor, bias: Tensor | None) -> None:
    weights, ids, counts, probs, squares = IMPLEMENTATION.route_stats(logits, bias, spec.text())
    plain = IMPLEMENTATION.route(logits, bias, spec.text())
    assert torch.equal(weights, plain[0]) and torch.equal(ids, plain[1])
    want = reference.statistics(logits.double(), ids)
    assert counts.dtype == torch.int64 and torch.equal(counts, want[0])
    assert probs.dtype == squares.dtype == torch.float32 and squares.shape == ()
    torch.testing.assert_close(probs.double(), want[1], rtol=2e-6, atol=1e-30)
    torch.testing.assert_close(squares.double(), want[2], rtol=4e-6, atol=1e-30)


def check_gradients(spec: RouterSpec, logits: Tensor, bias: Tensor | None) -> None:
    weights, ids, _, probs, squares = IMPLEMENTATION.route_stats(logits, bias, spec.text())
    g = torch.Generator().manual_seed(1)
    grad, dprobs, dsquares = (torch.randn(t.shape, generator=g) for t in (weights, probs, squares))
    needs = [True, bias is not None and spec.weights_from == "choice"]
    found = IMPLEMENTATION.route_bwd(grad.to(weights.dtype), logits, bias, ids, dprobs, dsquares, spec.text(), needs)
    want = wanted(spec, grad, logits, bias, ids, (dprobs, dsquares))
    for got, right in zip(found, want, strict=True):
        scale = float(right.abs().max()) if right.numel() else 1.0
        torch.testing.assert_close(got.double(), right, rtol=0, atol=4e-6 * max(scale, 1e-30))


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("tokens", (0, 1, 3, 4, 5, 17))
def test_sums(name: str, tokens: int) -> None:
    check(ROUTERS[name], *drawn(ROUTERS[name], tokens))


@pytest.mark.parametrize("name", [n for n in DIFFERENTIABLE if n != "weights cast"])
@pytest.mark.parametrize("tokens", (0, 1, 5))
def test_gradients(name: str, tokens: int) -> None:
    check_gradients(DIFFERENTIABLE[name], *drawn(DIFFERENTIABLE[name], tokens))


def test_ties_one_expert_for_all_and_experts_out_of_reach() -> None:
    spec = ROUTERS["olmoe"]
    logits = torch.zeros(6, 64)
    logits[1:3, 7] = 40.0
    logits[3, 9:] = -float("inf")
    check(spec, logits, None)
    check_gradients(spec, logits, None)
    one = torch.zeros(9, 16)
    one[:, 3] = 30.0
    check(ROUTERS["llama4"], one, None)
    assert IMPLEMENTATION.route_stats(one, None, ROUTERS["llama4"].text())[2].tolist() == [0, 0, 0, 9] + 12 * [0]


def test_half_precision_logits_of_any_leading_shape() -> None:
    spec = ROUTERS["mixtral"]
    check(spec, drawn(spec, 6)[0].to(BF16).view(2, 3, 8).transpose(0, 1), None)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_token_of_nan_spoils_the_sums_but_is_counted() -> None:
    """As in eager: the choice is made whatever the bits are, the probabilities have no value."""
    spec = ROUTERS["mixtral"]
    logits, _ = drawn(spec, 5)
    logits[3] = float("nan")
    _, ids, counts, probs, squares = IMPLEMENTATION.route_stats(logits, None, spec.text())
    assert int(counts.sum()) == 10 and torch.equal(counts, ids.flatten().bincount(minlength=8))
    assert bool(probs.isnan().all()) and bool(squares.isnan())


def test_a_run_repeats_bit_for_bit() -> None:
    spec = ROUTERS["mixtral"]
    logits, _ = drawn(spec, 33)
    first, second = (IMPLEMENTATION.route_stats(logits, None, spec.text()) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.fixture
def bound() -> Iterator[None]:
    before = ops._BOUND.pop("cpu", None)
    ops.bind("cpu", IMPLEMENTATION)
    yield
    ops._BOUND.pop("cpu")
    if before is not None:
        ops._BOUND["cpu"] = before


@pytest.mark.parametrize("grad", (False, True))
def test_one_kernel_each_way_under_torch_compile(grad: bool, bound: None) -> None:
    """Switch's balancing loss and ST-MoE's z-loss of one op: value and gradient are those of eager in float64."""
    spec = ROUTERS["mixtral"]
    text, E = spec.text(), spec.num_experts
    logits = drawn(spec, 7)[0]
    graphs: list[str] = []

    def keep(gm: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        graphs.append(gm.code)
        return gm

    from torch._dynamo.backends.common import aot_autograd

    def losses(z: Tensor) -> Tensor:
        weights, _, counts, probs, squares = torch.ops.moe.route_stats(z, None, text)
        T = z.shape[0]
        return weights.square().sum() + E * (counts / T * probs / T).sum() + squares / T  # type: ignore[no-any-return]

    torch._dynamo.reset()
    z = logits.clone().requires_grad_(grad)
    compiled = torch.compile(losses, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep))
    found = compiled(z)
    wide = logits.double().requires_grad_(grad)
    p = torch.softmax(wide, -1)
    top, ids = p.topk(2, -1)
    f = torch.nn.functional.one_hot(ids, E).sum((0, 1)) / 7
    want = (top / top.sum(-1, keepdim=True)).square().sum() + E * (f * p.mean(0)).sum() + torch.logsumexp(wide, -1).square().mean()
    torch.testing.assert_close(found.double(), want, rtol=1e-6, atol=0)
    assert "_route_stats" in graphs[0] and "aten._softmax" not in "".join(graphs)
    if grad:
        found.backward()
        want.backward()
        assert z.grad is not None and wide.grad is not None and "_route_bwd" in graphs[1]
        torch.testing.assert_close(z.grad.double(), wide.grad, rtol=0, atol=2e-6 * float(wide.grad.abs().max()))
    torch._dynamo.reset()

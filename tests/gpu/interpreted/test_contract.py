"""What the kernels promise the ops: saved bytes, no wait for the device, few graphs, gradients under torch.compile.

Run as tests/gpu/test_interpreted.py does.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moecompile.codegen import gpu
from moecompile.ir import ops
from moecompile.ir.spec import ExpertsSpec, RouterSpec
from tests.gpu import layers
from tests.gpu.interpreted import agree

ROUTER = RouterSpec(4, 2, "softmax", torch.float32, False, None, "score", (("normalise", 0.0, 0.0),), True)


@pytest.fixture(autouse=True)
def bound() -> Iterator[None]:
    """The moe.* ops run by the GPU kernels on CPU tensors."""
    before = ops._BOUND.pop("cpu", None)
    ops.bind("cpu", gpu.GpuImplementation())
    yield
    ops._BOUND.pop("cpu")
    if before is not None:
        ops._BOUND["cpu"] = before


def experts(spec: ExpertsSpec, x: Tensor, weights: Tensor | None, ids: Tensor, params: list[Tensor]) -> Tensor:
    return torch.ops.moe.experts(x, weights, ids, params, [], spec.text(), "")  # type: ignore[no-any-return]


@pytest.mark.parametrize("tokens", (5, 40))
def test_saved_for_backward_are_x_the_projections_and_the_routing(tokens: int) -> None:
    """2TH + 2*2TKF bytes in bfloat16, 12 TK of routing (int64 ids, float32 weights), and nothing else but parameters."""
    spec = layers.make(E=4, K=2, H=32, F=16, dtype=torch.bfloat16)
    given = layers.inputs(spec, tokens)
    leaves = [t.requires_grad_() for t in (given.x, *given.params)]
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        if not any(t.untyped_storage().data_ptr() == p.untyped_storage().data_ptr() for p in given.params):
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = experts(spec, given.x, given.weights, given.ids, given.params)
    T, K, H, F = tokens, 2, 32, 16
    assert sum(kept.values()) == 2 * T * H + 4 * T * K * F + 12 * T * K
    out.backward(given.grad)
    want = layers.expected_gradients(spec, given, [True, False, True, True])
    for leaf, w in zip(leaves, [want[0], *want[2:]], strict=True):
        assert leaf.grad is not None and layers.error(leaf.grad, w) < layers.tolerance(spec.dtype, H)


class NoWaiting(TorchDispatchMode):
    """Refuses what copies a number from the device to the host, or has a shape only the device knows."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        assert name not in ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::bincount"), name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("tokens", (1, 9))
def test_nothing_waits_for_the_device(tokens: int) -> None:
    spec = layers.make(E=6, layout="separate", bias=True)
    given, impl, text = layers.inputs(spec, tokens, "holes"), agree.IMPLEMENTATION, spec.text()
    call = (given.x, given.weights, given.ids, given.params, [], text, "")
    with NoWaiting():
        impl.experts(*call)
        saved = impl.experts_train(*call)[1]
        impl.experts_bwd(given.grad, *call, saved, [True] * (2 + len(given.params)))
        impl.route(torch.zeros(tokens, 4), None, ROUTER.text())


@pytest.mark.parametrize("train", (False, True))
def test_one_graph_serves_every_number_of_tokens(train: bool) -> None:
    spec = layers.make(E=4, K=2, H=16, F=16)
    gate = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))

    text, router_text = spec.text(), ROUTER.text()

    def block(x: Tensor, gate: Tensor, params: list[Tensor]) -> Tensor:
        weights, ids = torch.ops.moe.route(x @ gate.t(), None, router_text)
        return torch.ops.moe.experts(x, weights, ids, params, [], text, "")  # type: ignore[no-any-return]

    graphs = 0

    def counting(gm: torch.fx.GraphModule, example: list[Tensor]) -> Any:
        from torch._dynamo.backends.debugging import aot_eager

        nonlocal graphs
        graphs += 1
        return aot_eager(gm, example)

    torch._dynamo.reset()
    compiled = torch.compile(block, backend=counting, fullgraph=True, dynamic=True)
    for tokens in (3, 1, 2, 17, 40):
        given = layers.inputs(spec, tokens)
        x, router = given.x.clone().requires_grad_(train), gate.clone().requires_grad_(train)
        params = [p.requires_grad_(train) for p in given.params]
        out = compiled(x, router, params)
        weights, ids = agree.IMPLEMENTATION.route(given.x @ gate.t(), None, ROUTER.text())
        given.weights, given.ids = weights, ids
        assert layers.error(out, layers.expected(spec, given)) < 1e-5
        if train:
            out.backward(given.grad)
            want = layers.expected_gradients(spec, given, [True, True, True, True])
            assert params[0].grad is not None and layers.error(params[0].grad, want[2]) < 1e-5
            assert router.grad is not None and router.grad.isfinite().all()
    assert graphs <= 2
    torch._dynamo.reset()

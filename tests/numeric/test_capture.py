"""Dynamo's data-dependent settings: on while our frames are traced, and never the reason why a model fails or changes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from moecompile import report
from moecompile.backend import moe
from moecompile.ir import surgery
from moecompile.runtime import capture
from tests.models import outcome
from tests.models.layer import Recipe

LOOPS = ("loop_where", "loop_mask", "loop_nonzero", "loop_tuple", "loop_one_hot")


def first(n: int) -> Tensor:
    return torch.arange(7) < n


def masked_sum(x: Tensor, mask: Tensor) -> Tensor:
    return x[mask] + x[:3]


def masked_view(x: Tensor, mask: Tensor) -> Tensor:
    return x[mask].view(3, 16)


def counted(x: Tensor, mask: Tensor) -> Tensor:
    return x[: int(mask.sum().item())] * 2


@pytest.fixture(autouse=True)
def settings_are_restored() -> Any:
    yield
    assert not any(getattr(capture.config, name) for name in capture.SETTINGS)


@pytest.mark.parametrize("f", [masked_sum, masked_view, counted])
def test_without_a_layer_graphs_are_inductors(f: Callable[..., Tensor]) -> None:
    """With the settings on, a mask's size would be fixed at 3, and 1 row could not be broadcast any more."""
    x, sizes = torch.randn(7, 16), (3,) if f is masked_view else (3, 1)
    graphs = []
    for backend in ("aot_eager", "moe"):
        torch._dynamo.reset()
        counters.clear()
        call = torch.compile(f, backend=backend, options={"inner": "aot_eager"} if backend == "moe" else None)
        for n in sizes:
            torch.testing.assert_close(call(x, first(n)), f(x, first(n)))
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[1]


class Beside(nn.Module):
    """A loop over experts, and f beside it in the same frame."""

    def __init__(self, f: Callable[..., Tensor]) -> None:
        super().__init__()
        self.layer, self.f = Recipe(form="loop_where").make(), f

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.layer(x)[0].sum() + self.f(x, mask).sum()


@pytest.mark.parametrize(("f", "inner"), [(masked_sum, "inductor"), (masked_view, "aot_eager"), (counted, "aot_eager")])
def test_beside_a_layer_nothing_is_fixed(f: Callable[..., Tensor], inner: str) -> None:
    module, x = Beside(f), torch.randn(7, 16)
    call = outcome.compiled(module, inner)
    for n in (3,) if f is masked_view else (3, 1):
        with torch.no_grad():
            torch.testing.assert_close(call(x, first(n)), module(x, first(n)))
    assert outcome.fused()


@pytest.mark.parametrize("form", LOOPS)
def test_nothing_of_a_fused_loop_is_left(form: str) -> None:
    module = Recipe(form=form).make()
    outcome.compiled(module)(torch.randn(7, 16))
    (graph,) = report.last().graphs
    assert graph.layers[0].status == "fused" and graph.nodes_after < 24 < 60 < graph.nodes_before


def test_a_graph_traced_again_is_reported_once() -> None:
    """Inductor asks for another trace where a Python float has to become a constant."""
    module, x = Beside(lambda x, mask: x * x.sum().item()), torch.randn(7, 16)
    outcome.compiled(module, "aot_eager", dynamic=True)(x, first(3))
    assert len(outcome.layers()) == 1


def test_other_backends_inside_are_not_concerned() -> None:
    """A part compiled by another backend, called where the frame is broken: its graphs break as ever."""
    inner = torch.compile(masked_sum, backend="aot_eager")

    def outer(x: Tensor, mask: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return inner(x * 2, mask)

    torch._dynamo.reset()
    call, x = torch.compile(outer, backend=moe, options={"inner": "aot_eager"}), torch.randn(7, 16)
    for n in (3, 1):
        torch.testing.assert_close(call(x, first(n)), masked_sum(x * 2, first(n)))


def test_what_the_user_set_stays() -> None:
    torch._dynamo.reset()
    with capture.config.patch(capture_scalar_outputs=True, capture_dynamic_output_shape_ops=True):
        counters.clear()
        call = torch.compile(counted, backend=moe, options={"inner": "eager"})
        torch.testing.assert_close(call(torch.ones(7, 16), first(3)), torch.full((3, 16), 2.0))
        assert counters["stats"]["unique_graphs"] == 1
        assert capture.config.capture_scalar_outputs


def test_threads_trace_side_by_side() -> None:
    modules = [Recipe(form="loop_where", sizes=(4, 2, 16, 8 + n)).make() for n in range(3)]
    torch._dynamo.reset()
    report.reset()
    options = {"inner": "eager", "kernels": "reference"}
    calls = [torch.compile(m, backend=moe, options=options) for m in modules]
    x, found = torch.randn(5, 16), {}

    def work(n: int) -> None:
        with torch.no_grad():
            found[n] = calls[n](x)[0]

    threads = [threading.Thread(target=work, args=(n,)) for n in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for n, module in enumerate(modules):
        with torch.no_grad():
            torch.testing.assert_close(found[n], module(x)[0])
    assert report.last().fused == 3


def test_an_exception_leaves_nothing_behind() -> None:
    def raises(x: Tensor) -> Tensor:
        raise KeyError("the model's own")

    torch._dynamo.reset()
    with pytest.raises(KeyError):
        torch.compile(raises, backend=moe)(torch.ones(2))


def test_a_refusal_is_final() -> None:
    """`strict` and fallback="error" are not answered by another trace in which there is nothing to refuse."""
    module = Recipe(form="loop_where").make()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moecompile.ir.verifier.verify", lambda gm: 1 / 0)
        with pytest.raises(Exception, match="after fuse-experts"):
            outcome.compiled(module)(torch.randn(5, 16))


def test_a_copied_graph_keeps_where_inputs_come_from() -> None:
    """By that AOTAutograd tells CUDA graphs which inputs never move: parameters would be copied at every call."""
    copies = []

    def backend(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        copies.append((gm, surgery.copy_of(gm)))
        return gm.forward

    torch._dynamo.reset()
    torch.compile(Recipe().make(), backend=backend)(torch.randn(5, 16))
    ((gm, copied),) = copies
    for old, new in zip(gm.graph.find_nodes(op="placeholder"), copied.graph.find_nodes(op="placeholder"), strict=True):
        assert new._dynamo_source is old._dynamo_source
    assert copied._param_name_to_source is gm._param_name_to_source

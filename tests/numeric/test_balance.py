"""Balancing losses whose sums come from the router's op: values and gradients are eager's, and look-alikes are left alone.

No CPU kernel sums them, so the reference stands in for one: by aten, or by the private ops as a GPU has them.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, fx
from torch._dynamo.utils import counters

from moecompile import backend
from moecompile.codegen import target
from moecompile.ir import ops, surgery
from moecompile.passes import Context, pipeline
from tests.models import outcome
from tests.models.balance import FORMS, LOOKALIKES, Balanced, Case, H
from tests.models.numbers import run, wrong


class Summing(ops.Reference):
    def differentiates(self, spec: str) -> bool:
        return True


@pytest.fixture(params=(False, True), ids=("aten", "private ops"))
def summing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    backend.bind()
    monkeypatch.setitem(ops._BOUND, "cpu", Summing() if request.param else ops.Reference())
    monkeypatch.setattr(target, "supports_statistics", lambda spec, device, kernels: None)
    yield
    torch._dynamo.reset()


def _x(case: Case, tokens: int, dtype: torch.dtype = torch.float32) -> Tensor:
    shape = (tokens,) if case.leading == 1 else (3, tokens)
    return torch.randn(*shape, H, generator=torch.Generator().manual_seed(tokens)).to(dtype)


def _check(module: Balanced, call: object, x: Tensor, train: bool = True) -> None:
    eager = run(module, module, [x], train)
    got = run(call, module, [x], train)  # type: ignore[arg-type]
    rounds = {t.dtype for t in eager.values.values() if t.is_floating_point()}
    eps = max(float(torch.finfo(d).eps) for d in rounds)
    assert not wrong(got, eager, eps=eps)


@pytest.mark.parametrize("case", FORMS, ids=str)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("f32", "bf16"))
def test_sums_and_gradients(case: Case, dtype: torch.dtype, summing: None) -> None:
    module = Balanced(case).to(dtype)
    for train in (False, True):
        call = outcome.compiled(module, "aot_eager", fullgraph=True, dynamic=False)
        _check(module, call, _x(case, 7, dtype), train)
        assert outcome.statistics() == [case.expect]


@pytest.mark.parametrize("case", FORMS, ids=str)
def test_one_graph_for_all_sizes(case: Case, summing: None) -> None:
    module = Balanced(case)
    call = outcome.compiled(module, "aot_eager", fullgraph=True, dynamic=True)
    for tokens in (7, 12):
        _check(module, call, _x(case, tokens))
    assert outcome.statistics() == [case.expect]
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("dynamic", (False, True), ids=("static", "dynamic"))
@pytest.mark.parametrize("case", LOOKALIKES, ids=str)
def test_a_lookalike_is_left_alone(case: Case, dynamic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target, "supports_statistics", lambda spec, device, kernels: None)
    module = Balanced(case)
    call = outcome.compiled(module, "aot_eager", dynamic=dynamic)
    _check(module, call, _x(case, 7))
    assert outcome.statistics() == [case.expect]
    if case.expect == "":
        assert all(layer.router for layer in outcome.layers())


def test_a_layer_in_double_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel sums in float32."""
    monkeypatch.setattr(target, "supports_statistics", lambda spec, device, kernels: None)
    case = FORMS[0]
    module = Balanced(case).double()
    _check(module, outcome.compiled(module), _x(case, 7, torch.float64))
    assert outcome.statistics() == [""]


ALONE = Case("alone", lambda m, z, ids: None, "")


@pytest.mark.parametrize("case", [ALONE, *FORMS, *LOOKALIKES], ids=str)
def test_a_router_is_summed_or_joined_with_its_experts(case: Case) -> None:
    """In inference: never both; one that is summed stays by itself, one that is joined has no sums."""
    module, x = Balanced(case), _x(case, 7)
    graphs: list[fx.GraphModule] = []

    def rewritten(gm: fx.GraphModule, _: object) -> fx.GraphModule:
        context = Context()
        for p in pipeline():
            gm = p.run(gm, context)
        graphs.append(gm)
        return gm

    torch._dynamo.reset()
    _check(module, torch.compile(module, backend=rewritten), x, train=False)
    names = [surgery.name_of(n) for gm in graphs for n in gm.graph.nodes if str(n.target).startswith("moe.")]
    if case.expect or case.name == "under_no_grad":  # as everything is here
        assert names == ["route_stats", "experts"]
    elif case.name in ("alone", "of_scaled_logits"):  # no loss reads the ids
        assert names == ["routed_experts"]
    else:
        assert names in (["route", "experts"], ["routed_experts"])


@pytest.mark.parametrize("kernels", ("auto", "reference"))
def test_a_cpu_keeps_its_graph(kernels: str) -> None:
    """No kernel there sums them with the choice: Inductor fuses what was written."""
    case = FORMS[0]
    module = Balanced(case)
    call = outcome.compiled(module, kernels=kernels)
    _check(module, call, _x(case, 7))
    assert outcome.statistics() == [""]

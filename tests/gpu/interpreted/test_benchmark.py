"""The GPU benchmark's own forms and checks, on CPU tensors: what it calls right and wrong is so.

Run as tests/gpu/test_interpreted.py does.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from benchmarks.gpu import correct, layers
from benchmarks.gpu.contenders import ours, plain
from moecompile.codegen import gpu
from moecompile.ir import ops

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def bound(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    gpu.set_config_source(None)
    before = ops._BOUND.pop("cpu", None)
    ops.bind("cpu", gpu.GpuImplementation())
    monkeypatch.setattr(correct, "graphed", lambda layer, given, params, dtype: ours(layer, dtype)(given, params))
    yield
    ops._BOUND.pop("cpu")
    if before is not None:
        ops._BOUND["cpu"] = before


@pytest.mark.parametrize("name", layers.LAYERS)
def test_every_form_is_right(name: str) -> None:
    for what, share in correct.check_form(layers.LAYERS[name].smaller(40, 24), 3, torch.float32, CPU):
        assert share <= 1, f"{what}: {share}"


@pytest.mark.parametrize("name", layers.LAYERS)
def test_the_form_beside_ours_computes_the_same(name: str) -> None:
    layer = layers.LAYERS[name].smaller(40, 24)
    given = layers.inputs(layer, 9, "zipf", CPU, 3)
    params = layer.parameters(CPU)
    got, want = plain(layer)(given.x, given.logits, given.bias, params), ours(layer)(given, params)
    assert correct.error(got, want.double()) < correct.allowed(torch.bfloat16)
    assert correct.check_full(layer, given, params) < 1


def test_a_wrong_number_is_called_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layers.LAYERS["Qwen3-30B-A3B"].smaller(40, 24)
    monkeypatch.setattr(correct, "expected", lambda *a, **k: [1.01 * t for t in before(*a, **k)])
    assert max(share for _, share in correct.check_form(layer, 3, torch.float32, CPU)) > 1


before = correct.expected

"""What the walk makes of ops that only CUDA tensors have, on fake ones: no GPU is needed."""

from __future__ import annotations

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from moecompile.recognize.roles import Chosen
from moecompile.recognize.routing import router_of
from moecompile.recognize.walk import walk


def test_a_float32_softmax_of_float16_logits() -> None:
    """There it is one op, without a cast that could be seen."""
    graph = fx.Graph()
    logits = graph.placeholder("logits")
    with FakeTensorMode():
        logits.meta["example_value"] = torch.empty(5, 8, dtype=torch.float16, device="cuda")
    score = graph.call_function(torch.softmax, (logits, -1), {"dtype": torch.float32})
    top = graph.call_function(torch.topk, (score, 2))
    weights = graph.call_method("__getitem__", (top, 0))
    graph.output(weights)
    found = walk(fx.GraphModule({}, graph))
    role = found.mode.get(found.values[weights])
    assert isinstance(role, Chosen)
    assert router_of(found, role).spec.score_dtype == torch.float32

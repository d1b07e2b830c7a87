"""What a printed graph looks like."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn

from moecompile.ir import expr, ops, printer
from moecompile.ir.spec import ExpertsSpec, OutOfRange, RouterSpec, Weight, WeightOn

assert ops.ABI  # the moe.* ops are registered by this import

EXPERTS = ExpertsSpec(
    num_experts=4,
    top_k=2,
    hidden=32,
    intermediate=64,
    out_features=32,
    projections=(Weight((0,), (4, 128, 32), 0, 4096, 32, 1), Weight((0,), (4, 128, 32), 2048, 4096, 32, 1)),
    projection_bias=(None, None),
    activation=("mul", expr.silu(("in", 0)), ("in", 1)),
    down=Weight((1, 2, 3, 4), (64, 32), 0, 0, 1, 32),
    down_bias=None,
    weight_on=WeightOn.OUTPUT,
    out_of_range=OutOfRange.SKIP,
    dtype=torch.bfloat16,
    out_dtype=torch.float32,
)
ROUTER = RouterSpec(4, 2, "sigmoid", torch.float32, True, None, "score", (("normalise", 1e-20, 0.0), ("scale", 2.5)), False)


def captured(model: nn.Module, *inputs: torch.Tensor, dynamic: bool = False) -> list[str]:
    found: list[fx.GraphModule] = []
    torch._dynamo.reset()
    torch.compile(model, backend=lambda gm, _: found.append(gm) or gm.forward, fullgraph=True, dynamic=dynamic)(*inputs)
    return printer.text(found[0]).splitlines()


class Choice(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weights, ids = torch.topk(x.softmax(-1, dtype=torch.float), 2)
        return weights.to(torch.bfloat16), ids


def test_a_dynamo_graph() -> None:
    lines = captured(Choice(), torch.randn(8, 4))
    assert lines[0].endswith(": f32[8, 4] = input")
    assert any(": (f32[8, 2], i64[8, 2]) = torch.topk(" in line for line in lines)
    assert any(": bf16[8, 2] = .to(" in line and "bf16)" in line for line in lines)
    assert lines[-1].startswith("return %")


def test_a_size_that_is_not_known_is_a_symbol() -> None:
    lines = captured(Choice(), torch.randn(8, 4), dynamic=True)
    assert any("f32[s" in line and line.endswith("] = input") for line in lines)


class Checkpointed(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = torch.utils.checkpoint.checkpoint(torch.sin, x, use_reentrant=False)
        return out


def test_a_child_graph_is_indented() -> None:
    lines = captured(Checkpointed(), torch.randn(3))
    assert lines[lines.index(next(line for line in lines if line.endswith(":"))) + 1].startswith("    %")


def test_moe_ops_say_what_they_are() -> None:
    graph = fx.Graph()
    x, logits, bias, gate_up, *down = (graph.placeholder(n) for n in ("x", "logits", "bias", "p", "a", "b", "c", "d"))
    pair = graph.call_function(torch.ops.moe.route.default, (logits, bias, ROUTER.text()))
    weights, ids = (graph.call_function(torch.topk, (pair, i)) for i in range(2))
    y = graph.call_function(torch.ops.moe.experts.default, (x, weights, ids, [gate_up, *down], [4, 2], EXPERTS.text(), ""))
    graph.output((y,))
    assert printer.text(fx.GraphModule({}, graph)).splitlines()[8:] == [
        "%route_default = moe.route(%logits, %bias)",
        "    // E=4 K=2, sigmoid in f32, selection bias, weights from score: normalise(1e-20, 0.0), scale(2.5), unsorted",
        "%topk = torch.topk(%route_default, 0)",
        "%topk_1 = torch.topk(%route_default, 1)",
        "%experts_default = moe.experts(%x, %topk, %topk_1, [%p, %a, %b, %c, %d])",
        "    // E=4 K=2 H=32 F=64 O=32, bf16 -> f32, mul(mul(h0, sigmoid(h0)), h1), weight on output, ids outside 0..E-1: skip",
        "    // h0 = p0[e*4096 + n*32 + k], h1 = p0[2048 + e*4096 + n*32 + k], down = p1..p4[n + k*32]",
        "return %experts_default",
    ]


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        (torch.float64, "f64"),
        (torch.bfloat16, "bf16"),
        (torch.int64, "i64"),
        (torch.uint8, "u8"),
        (torch.bool, "bool"),
        (torch.float8_e4m3fn, "f8_e4m3fn"),
    ],
)
def test_dtypes_are_short(dtype: torch.dtype, name: str) -> None:
    assert printer.dtype_name(dtype) == name

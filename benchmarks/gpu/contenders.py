"""Who takes part: each is a function of one call's inputs and the layer's parameters to the layer's output.

ours                 moe.route and moe.experts: router, permutation, experts and combine
compiled             the layer as plain PyTorch, under torch.compile(backend="moe")
grouped_mm           the layer as plain PyTorch: aten router, sort, gather, torch._grouped_mm twice, weighted sum
grouped_mm+inductor  the same under torch.compile
liger                Liger's fused experts with the same router, where liger_kernel is installed
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.layers import Inputs, Layer
from moecompile.ir import expr, reference
from moecompile.ir.spec import WeightOn

Call = Callable[[Inputs, Sequence[Tensor]], Tensor]


def ours(layer: Layer, dtype: torch.dtype = torch.bfloat16) -> Call:
    router, experts = layer.router.text(), layer.spec(dtype).text()

    def call(given: Inputs, params: Sequence[Tensor]) -> Tensor:
        weights, ids = torch.ops.moe.route(given.logits, given.bias, router)
        return torch.ops.moe.experts(given.x, weights, ids, list(params), [], experts, "")  # type: ignore[no-any-return]

    return call


def plain(layer: Layer) -> Callable[..., Tensor]:
    """The layer in PyTorch, sorted and grouped: (x, logits, bias, parameters) -> output."""
    E, K, F = layer.experts, layer.top_k, layer.intermediate

    def forward(x: Tensor, logits: Tensor, bias: Tensor | None, params: Sequence[Tensor]) -> Tensor:
        weights, ids = reference.route(layer.router, logits, bias)
        pair = ids.flatten()
        order = pair.argsort(stable=True)
        expert, token = pair[order], order // K
        ends = torch.histc(expert.float(), E, 0, E - 1).cumsum(0).to(torch.int32)
        scale = weights.flatten()[order, None]
        rows = x[token]
        if layer.on is WeightOn.INPUT:
            rows = (rows * scale).to(x.dtype)
        up, down = params[0], params[1]
        if not layer.transposed:
            up, down = up.transpose(1, 2), down.transpose(1, 2)
        h = torch._grouped_mm(rows, up, offs=ends)
        if layer.bias:
            h = h + params[2][expert]
        gate, lift = (h[:, ::2], h[:, 1::2]) if layer.interleaved else (h[:, :F], h[:, F:])
        y = torch._grouped_mm(expr.evaluate(layer.activation, (gate, lift)).contiguous(), down, offs=ends)
        if layer.bias:
            y = y + params[3][expert]
        if layer.on is WeightOn.OUTPUT:
            y = (y * scale).to(x.dtype)
        back = torch.empty_like(order)
        back[order] = torch.arange(order.numel(), device=order.device)
        return y[back].view(-1, K, y.shape[1]).sum(1)

    return forward


def grouped_mm(layer: Layer) -> Call:
    forward = plain(layer)
    return lambda given, params: forward(given.x, given.logits, given.bias, params)


def inductor(layer: Layer) -> Call:
    torch.compiler.reset()  # every layer shares one code object: past the limit of recompilations it would run uncompiled
    forward = torch.compile(plain(layer), dynamic=False, fullgraph=True)
    return lambda given, params: forward(given.x, given.logits, given.bias, params)


def compiled(layer: Layer) -> Call:
    torch.compiler.reset()
    forward = torch.compile(plain(layer), backend="moe", fullgraph=True, options={"fallback": "error"})
    return lambda given, params: forward(given.x, given.logits, given.bias, params)


def liger(layer: Layer) -> Call:
    from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

    if layer.bias or layer.transposed or layer.on is not WeightOn.OUTPUT:
        raise ImportError("liger's experts have no biases, no transposed weights and no weight on the input")
    function: Any = LigerFusedMoEFunction.apply

    def call(given: Inputs, params: Sequence[Tensor]) -> Tensor:
        weights, ids = reference.route(layer.router, given.logits, given.bias)
        return function(given.x, params[0], params[1], ids.int(), weights.float())  # type: ignore[no-any-return]

    return call


def absent(name: str) -> str | None:
    """Why a contender cannot take part at all, or None."""
    if name == "liger" and importlib.util.find_spec("liger_kernel") is None:
        return "liger_kernel is not installed"
    return None


CONTENDERS: dict[str, Callable[[Layer], Call]] = {
    "ours": ours,
    "grouped_mm": grouped_mm,
    "grouped_mm+inductor": inductor,
    "compiled": compiled,
    "liger": liger,
}

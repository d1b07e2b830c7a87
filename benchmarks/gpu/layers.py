"""The layers that are measured: sizes and forms of public models, with random weights."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from moecompile.ir import expr
from moecompile.ir.expr import Expr
from moecompile.ir.spec import ExpertsSpec, Groups, OutOfRange, RouterSpec, Weight, WeightOn

TOKENS = (1, 8, 32, 128, 512, 2048, 8192, 32768)
F32 = torch.float32
SWIGLU = ("mul", expr.silu(("in", 0)), ("in", 1))


def _clamped() -> Expr:
    gate = ("minimum", ("in", 0), expr.const(7.0))
    up = ("minimum", ("maximum", ("in", 1), expr.const(-7.0)), expr.const(7.0))
    return ("mul", ("add", up, expr.const(1.0)), ("mul", gate, ("sigmoid", ("mul", gate, expr.const(1.702)))))


@dataclass(frozen=True)
class Layer:
    """H, F, E, K as everywhere. `transposed`: weights [E,H,2F] and [E,F,H]; `interleaved`: columns gate, up, gate, ..;
    `on`: where the routing weight multiplies."""

    name: str
    hidden: int
    intermediate: int
    experts: int
    top_k: int
    router: RouterSpec
    activation: Expr = SWIGLU
    bias: bool = False
    transposed: bool = False
    interleaved: bool = False
    on: WeightOn = WeightOn.OUTPUT

    def spec(self, dtype: torch.dtype = torch.bfloat16) -> ExpertsSpec:
        E, H, F = self.experts, self.hidden, self.intermediate
        if self.transposed:
            step = 2 if self.interleaved else 1
            offsets = (0, 1) if self.interleaved else (0, F)
            ups = tuple(Weight((0,), (E, H, 2 * F), o, 2 * F * H, step, 2 * F) for o in offsets)
            down = Weight((1,), (E, F, H), 0, F * H, 1, H)
        else:
            ups = tuple(Weight((0,), (E, 2 * F, H), o, 2 * F * H, H, 1) for o in (0, F * H))
            down = Weight((1,), (E, H, F), 0, H * F, F, 1)
        biases: tuple[Weight | None, ...] = (None, None)
        down_bias = None
        if self.bias:
            step, second = (2, 1) if self.interleaved else (1, F)
            biases = (Weight((2,), (E, 2 * F), 0, 2 * F, step, 0), Weight((2,), (E, 2 * F), second, 2 * F, step, 0))
            down_bias = Weight((3,), (E, H), 0, H, 1, 0)
        return ExpertsSpec(
            E, self.top_k, H, F, H, ups, biases, self.activation, down, down_bias, self.on, OutOfRange.SKIP, dtype, dtype
        )

    def parameters(self, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
        """Random weights, scaled so that activations stay of order one."""
        g = torch.Generator(device).manual_seed(0)
        shapes = {w.params[0]: w.shape for w in self.spec().weights()}
        found = []
        for i in range(len(shapes)):
            t = torch.empty(shapes[i], device=device, dtype=dtype)
            found.append(t.normal_(0.0, (self.hidden if i == 0 else self.intermediate) ** -0.5, generator=g))
        return found

    def smaller(self, hidden: int = 192, intermediate: int = 160) -> Layer:
        """The same form at sizes that float64 can follow."""
        groups = self.router.groups
        experts = min(self.experts, 16 if groups is None else 4 * groups.count)
        top_k = min(self.top_k, experts // 2)
        router = RouterSpec(
            experts, top_k, self.router.score, F32, self.router.bias, groups, self.router.weights_from, self.router.post, True
        )
        return dataclasses.replace(self, hidden=hidden, intermediate=intermediate, experts=experts, top_k=top_k, router=router)


def _softmax(E: int, K: int, normalised: bool) -> RouterSpec:
    return RouterSpec(E, K, "softmax", F32, False, None, "score", (("normalise", 0.0, 0.0),) if normalised else (), True)


_NORMALISED = (("normalise", 1e-20, 0.0), ("scale", 2.5))
_DEEPSEEK = RouterSpec(256, 8, "sigmoid", F32, True, Groups(8, 4, "top2", 0.0), "score", _NORMALISED, False)
_GPT_OSS = RouterSpec(128, 4, "identity", F32, False, None, "logits", (("softmax",),), True)
_LLAMA4 = RouterSpec(128, 1, "identity", F32, False, None, "logits", (("sigmoid",),), True)
LAYERS = {
    layer.name: layer
    for layer in (
        Layer("Qwen3-30B-A3B", 2048, 768, 128, 8, _softmax(128, 8, True)),
        Layer("Mixtral-8x7B", 4096, 14336, 8, 2, _softmax(8, 2, True)),
        Layer("OLMoE", 2048, 1024, 64, 8, _softmax(64, 8, False)),
        Layer("gpt-oss-120b", 2880, 2880, 128, 4, _GPT_OSS, _clamped(), True, True, True),
        Layer("DeepSeek-V3", 7168, 2048, 256, 8, _DEEPSEEK),
        Layer("Llama4-Maverick", 5120, 8192, 128, 1, _LLAMA4, transposed=True, on=WeightOn.INPUT),
    )
}


@dataclass
class Inputs:
    """Tokens and router logits of one call; `skew` is already in the logits."""

    x: Tensor
    logits: Tensor
    bias: Tensor | None
    grad: Tensor


def inputs(layer: Layer, tokens: int, routing: str, device: torch.device, seed: int, dtype: torch.dtype = torch.bfloat16) -> Inputs:
    """`routing`: "uniform", or "zipf" (expert e is chosen about as 1 / (1 + e))."""
    g = torch.Generator(device).manual_seed(seed)
    x, grad = (torch.randn(tokens, layer.hidden, device=device, dtype=dtype, generator=g) for _ in range(2))
    uniform = torch.rand(tokens, layer.experts, device=device, generator=g).clamp(1e-6, 1 - 1e-6)
    logits = -torch.log(-torch.log(uniform))  # Gumbel noise: top-k samples without replacement by exp(skew)
    if routing == "zipf":
        logits -= torch.log(1.0 + torch.arange(layer.experts, device=device))
    bias = torch.zeros(layer.experts, device=device) if layer.router.bias else None
    return Inputs(x, logits.float(), bias, grad)

"""Right before fast: every form on the GPU against float64, bit-repeatable, and the same again from a CUDA graph."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.gpu import layers
from benchmarks.gpu.contenders import ours
from benchmarks.gpu.layers import Inputs, Layer
from moecompile.ir import reference

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TOKENS = (1, 3, 129, 700)


def error(got: Tensor, want: Tensor) -> float:
    """Largest absolute difference over the largest wanted value; infinite for NaN."""
    found = float((got.detach().double() - want).abs().max() / want.abs().max().clamp(min=1e-30)) if want.numel() else 0.0
    return found if found == found else float("inf")


def allowed(dtype: torch.dtype) -> float:
    """Two GEMMs of some hundred terms with an activation between, operands rounded to dtype."""
    return 16 * torch.finfo(dtype).eps * (16.0 if dtype == torch.float32 else 1.0)


def expected(layer: Layer, given: Inputs, params: list[Tensor], weights: Tensor, ids: Tensor, grads: bool) -> list[Tensor]:
    """Output in float64 for given weights and ids; with `grads` also the gradients of x, weights and the parameters."""
    spec = dataclasses.replace(layer.spec(), dtype=torch.float64, out_dtype=torch.float64)
    leaves = [t.double().requires_grad_(grads) for t in (given.x, weights, *params)]
    out = reference.experts(spec, leaves[0], leaves[1], ids, leaves[2:])
    return [out.detach(), *(torch.autograd.grad(out, leaves, given.grad.double()) if grads else [])]


def check_form(layer: Layer, tokens: int, dtype: torch.dtype, device: torch.device) -> Iterator[tuple[str, float]]:
    """(what, error over what is allowed) for a layer small enough for float64; above 1 is wrong."""
    given = layers.inputs(layer, tokens, "zipf", device, 1, dtype)
    params = layer.parameters(device, dtype)
    router, experts = layer.router.text(), layer.spec(dtype).text()
    weights, ids = torch.ops.moe.route(given.logits, given.bias, router)
    plain, _ = reference.route(layer.router, given.logits, given.bias)
    yield "routing weights", error(weights.sort(-1).values, plain.double().sort(-1).values) / allowed(torch.float32)
    yield "gradient of logits", logits_error(layer, given, ids) / allowed(torch.float32)
    want = expected(layer, given, params, weights, ids, grads=True)
    leaves = [t.clone().requires_grad_() for t in (given.x, weights, *params)]
    out = torch.ops.moe.experts(leaves[0], leaves[1], ids, leaves[2:], [], experts, "")
    yield "inference", error(torch.ops.moe.experts(given.x, weights, ids, params, [], experts, ""), want[0]) / allowed(dtype)
    yield "training", error(out, want[0]) / allowed(dtype)
    for name, got, exact in zip(
        ("x", "weights", *map(str, range(len(params)))), torch.autograd.grad(out, leaves, given.grad), want[1:], strict=True
    ):
        yield f"gradient of {name}", error(got, exact) / allowed(dtype)
    again = torch.ops.moe.experts(given.x, weights, ids, params, [], experts, "")
    once = torch.ops.moe.experts(given.x, weights, ids, params, [], experts, "")
    yield "repeats bit for bit", 0.0 if torch.equal(again, once) else float("inf")
    yield (
        "CUDA graph",
        0.0 if torch.equal(graphed(layer, given, params, dtype), ours(layer, dtype)(given, params)) else float("inf"),
    )


def logits_error(layer: Layer, given: Inputs, ids: Tensor) -> float:
    """Of the routing weights' gradient for the logits, beside that of the router as plain PyTorch with the same experts."""
    grad = torch.linspace(-1, 1, ids.numel(), device=ids.device).view(ids.shape)
    found = []
    for route in (
        lambda logits: torch.ops.moe.route(logits, given.bias, layer.router.text())[0],
        lambda logits: reference.weights_of(layer.router, logits, given.bias, ids),
    ):
        logits = given.logits.clone().requires_grad_()
        weights = route(logits)
        found += torch.autograd.grad(weights, logits, grad.to(weights.dtype))
    return error(found[0], found[1].double())


def graphed(layer: Layer, given: Inputs, params: list[Tensor], dtype: torch.dtype) -> Tensor:
    """The layer's output for `given`, from a graph that was captured with other tokens."""
    call, held = ours(layer, dtype), dataclasses.replace(given, x=torch.zeros_like(given.x), logits=torch.zeros_like(given.logits))
    call(held, params)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(held, params)
    held.x.copy_(given.x)
    held.logits.copy_(given.logits)
    graph.replay()
    torch.cuda.synchronize()
    return out.clone()


def forms(smoke: bool) -> Iterator[tuple[str, int, torch.dtype]]:
    """What is checked: (layer, tokens, dtype), of the layer's smaller form."""
    for name in layers.LAYERS:
        for dtype in DTYPES[:1] if smoke else DTYPES:
            for tokens in (1, 129) if smoke else TOKENS:
                yield name, tokens, dtype


def check_full(layer: Layer, given: Inputs, params: list[Tensor]) -> float:
    """The first eight tokens of a full-sized layer against float64, in units of what is allowed."""
    weights, ids = torch.ops.moe.route(given.logits, given.bias, layer.router.text())
    out = torch.ops.moe.experts(given.x, weights, ids, params, [], layer.spec().text(), "")[:8]
    spec = dataclasses.replace(layer.spec(), dtype=torch.float64, out_dtype=torch.float64)
    total = torch.zeros(out.shape, dtype=torch.float64, device=out.device)
    for e in ids[:8].unique().tolist():  # one expert's weights at a time: all of them would not fit in float64
        one = [p[e : e + 1].double() for p in params]
        ids_e = torch.where(ids[:8] == e, 0, -1)
        single = dataclasses.replace(spec, num_experts=1, top_k=layer.top_k)
        total += reference.experts(single, given.x[:8].double(), weights[:8].double(), ids_e, one)
    return error(out, total) / allowed(torch.bfloat16)

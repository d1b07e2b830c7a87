"""Every kernel family of a layer in each form it is used in: what is compiled for GPUs that are not here."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from moecompile.codegen import gpu, gpu_choose, gpu_load, gpu_router_text, gpu_text, gpu_weights
from moecompile.codegen.gpu_choose import Target
from moecompile.ir.spec import ExpertsSpec, Groups, RouterSpec, WeightOn
from moecompile.kernels.gpu import permute
from moecompile.kernels.gpu.config import Kernel

GEMMS = ("up", "down", "grad_z", "grad_rows", "grad_matrix")


def of_experts(spec: ExpertsSpec, tokens: int, target: Target) -> Iterator[tuple[str, str, Kernel]]:
    """(family with its form, function, kernel) with the numbers that are chosen for `tokens` on `target`."""
    layouts = gpu_weights.contiguous_layouts(spec)
    on_output, on_input = spec.weight_on is WeightOn.OUTPUT, spec.weight_on is WeightOn.INPUT
    forward = gpu._Builder(spec, layouts, tokens, target, "up")
    backward = gpu._Builder(spec, layouts, tokens, target, "grad_z")
    if gpu_choose.decodes(spec, tokens):
        yield "decode_up", "decode_up", forward.get("decode_up")
        yield "decode_down", "decode_down", forward.get("decode_down")
    else:
        yield "up", "up", forward.get("up", train=False)
    yield "up (train)", "up", forward.get("up", train=True)
    yield "down", "down", forward.get("down")
    yield "combine", "combine", forward.get("combine", width=spec.out_features, scaled=on_output)
    yield "grad_z", "grad_z", backward.get("grad_z", need_y=True, parts=on_output)
    yield "grad_rows", "grad_rows", backward.get("grad_rows", parts=on_input)
    yield "grad_weights", "grad_weights", backward.get("grad_weights", num_parts=8)
    for name in gpu_weights.gradients(spec, layouts):
        family = "grad_matrix" if name == "d" or name.startswith("w") else "grad_vector"
        yield f"{family} {name}", family, backward.get(family, which=name, into="")
        main = "main" if all(w.stacked for w in spec.weights()) else "mains"
        yield f"{family} {name}, main", family, backward.get(family, which=name, into=main)
    config = forward.config("permute")
    kernel = gpu_load.load("permute", config, gpu_text.permute_text(spec, config, forward.block_m))
    few = tokens * spec.top_k <= gpu_choose.FEW_PAIRS
    for function in permute.FUNCTIONS[:1] if few else permute.FUNCTIONS[1:]:
        yield function, function, kernel


def of_router(spec: RouterSpec, tokens: int, target: Target) -> Iterator[tuple[str, str, Kernel]]:
    """The router and its backward with the numbers that are chosen for `tokens` on `target`."""
    f32 = torch.float32
    read = f32 if spec.bias and spec.weights_from == "choice" else None
    for stats in (False, True):
        config = gpu_choose.choose("router", spec, tokens, target)
        text = gpu_router_text.router_text(spec, config, f32, f32 if spec.bias else None, stats)
        yield f"router, stats {stats}", "router", gpu_load.load("router", config, text)
        config = gpu_choose.choose("grad_router", spec, tokens, target)
        text = gpu_router_text.grad_router_text(spec, config, f32, read, stats)
        yield f"grad_router, stats {stats}", "grad_router", gpu_load.load("grad_router", config, text)


DEEPSEEK_ROUTER = RouterSpec(
    256, 8, "sigmoid", torch.float32, True, Groups(8, 4, "top2", 0.0), "score", (("normalise", 1e-20, 0.0), ("scale", 2.5)), False
)
QWEN_ROUTER = RouterSpec(128, 8, "softmax", torch.float32, False, None, "score", (("normalise", 0.0, 0.0),), True)
BIASED_ROUTER = RouterSpec(60, 4, "sigmoid", torch.float32, True, None, "choice", (("normalise", 0.0, 1e-6),), True)

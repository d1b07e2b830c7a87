"""Kernels compiled ahead of their first launch, for the GPU at hand, with none of its memory.

The ops run on meta tensors, which have sizes and no data, and every launch compiles its kernel instead. Triton keeps what
it compiled on disk, so processes that compile different layers at once save the one that runs them the time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from moecompile.codegen import gpu
from moecompile.ir.spec import ExpertsSpec, RouterSpec, WeightOn
from moecompile.kernels.gpu.config import Kernel

META = torch.device("meta")


def _warm(kernel: Kernel, function: str, grid: tuple[int, ...], *args: Any) -> None:
    getattr(kernel.module, function).warmup(*args, grid=grid, **kernel.options)


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    """Launches compile and do not run."""
    run = Kernel.run
    Kernel.run = _warm  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        Kernel.run = run  # type: ignore[method-assign]


def build(router: RouterSpec, experts: ExpertsSpec, tokens: int, train: bool) -> None:
    """Compile what a layer launches for this many tokens: router and experts; with `train` their backward for all gradients.

    Parameters are contiguous, logits, bias and weights float32, as far as the router does not say otherwise.
    """

    def empty(*size: int, dtype: torch.dtype = experts.dtype) -> torch.Tensor:
        return torch.empty(size, device=META, dtype=dtype)

    ops = gpu.GpuImplementation()
    shapes = {p: w.shape for w in experts.weights() for p in w.params}
    params = [empty(*shapes[i]) for i in range(experts.num_params)]
    logits = empty(tokens, router.num_experts, dtype=torch.float32)
    bias = empty(router.num_experts, dtype=torch.float32) if router.bias else None
    x, route, text = empty(tokens, experts.hidden), router.text(), experts.text()
    with compiling():
        chosen, ids = ops.route(logits, bias, route)
        weights = None if experts.weight_on is WeightOn.NOWHERE else chosen
        if not train:
            ops.experts(x, weights, ids, params, [], text, "")
            return
        out, saved = ops.experts_train(x, weights, ids, params, [], text, "")
        needs = [True, weights is not None, *(True for _ in params)]
        ops.experts_bwd(torch.empty_like(out), x, weights, ids, params, [], text, "", saved, needs)
        if weights is not None and ops.differentiates(route):
            ops.route_bwd(weights, logits, bias, ids, None, None, route, [True, False])

"""The router on a GPU: which kernels run, on which buffers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moecompile.codegen import gpu_choose, gpu_weights
from moecompile.codegen.gpu_choose import choose
from moecompile.codegen.gpu_load import load, on, triton_missing
from moecompile.codegen.gpu_router_text import grad_router_text, router_text
from moecompile.errors import Unsupported
from moecompile.ir.spec import RouterSpec, router_from_text
from moecompile.kernels.gpu import grad_router, router
from moecompile.kernels.gpu.config import Config


def supports_router(spec: RouterSpec) -> str | None:
    """Why these kernels cannot run this router, or None."""
    casts = [step[1] for step in spec.post if step[0] == "cast"]
    if wrong := [d for d in (spec.score_dtype, *casts) if d not in gpu_weights.TYPES]:
        return f"the GPU router computes in float16, bfloat16 and float32, got {wrong[0]}"
    if unknown := [s[0] for s in spec.post if s[0] not in ("softmax", "sigmoid", "cast", "scale", "normalise")]:
        return f"the GPU router has no step {unknown[0]!r}"
    if spec.num_experts > 4096:
        return f"the GPU router is for at most 4096 experts, got {spec.num_experts}"
    if spec.groups is not None and spec.groups.score == "top2" and spec.num_experts // spec.groups.count < 2:
        return "groups scored by their two best need two experts each"
    return triton_missing()


def differentiates(spec: RouterSpec) -> str | None:
    """Why there is no kernel for the gradients of this router, or None."""
    if spec.weights_from == "choice" and spec.groups is not None:
        return "weights read from scores whose groups were filled: their gradient would need the choice of groups again"
    return supports_router(spec)


def route(logits: Tensor, bias: Tensor | None, spec: str) -> tuple[Tensor, Tensor]:
    """logits [..,E], bias [E] -> weights [..,K], ids [..,K] int64."""
    return _route(logits, bias, router_from_text(spec), ())


def route_stats(logits: Tensor, bias: Tensor | None, spec: str) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As route(), and over all tokens: choices of each expert [E] int64, its softmax summed [E], squared logsumexp summed []."""
    s = router_from_text(spec)
    flat = _rows(logits, s.num_experts)
    programs = -(-flat.shape[0] // _config("router", s, flat).block_m)
    counts = flat.new_empty((programs, s.num_experts), dtype=torch.int32)
    probs = flat.new_empty((programs, s.num_experts), dtype=torch.float32)
    squares = flat.new_empty((programs,), dtype=torch.float32)
    weights, ids = _route(logits, bias, s, (counts, probs, squares))
    return weights, ids, counts.sum(0), probs.sum(0), squares.sum()


def _route(logits: Tensor, bias: Tensor | None, s: RouterSpec, sums: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    shape, flat = (*logits.shape[:-1], s.top_k), _rows(logits, s.num_experts)
    source = s.score_dtype if s.weights_from != "logits" else logits.dtype
    if s.weights_from == "choice" and bias is not None:
        source = torch.promote_types(s.score_dtype, bias.dtype)
    weights = logits.new_empty(shape, dtype=s.weights_dtype(source))
    ids = logits.new_empty(shape, dtype=torch.int64)
    config = _config("router", s, flat)
    text = router_text(s, config, logits.dtype, None if bias is None else bias.dtype, bool(sums))
    with on(logits.device):
        router.launch(load("router", config, text), flat, None if bias is None else bias.contiguous(), weights, ids, sums)
    return weights, ids


def route_bwd(
    grad: Tensor,
    logits: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    dprobs: Tensor | None,
    dsquares: Tensor | None,
    spec: str,
    needs: Sequence[bool],
) -> list[Tensor]:
    """grad and ids [..,K], logits [..,E], bias [E] -> the gradients of logits and bias, empty where not needed.

    dprobs [E] and dsquares []: gradients of what route_stats sums, both or none.  A block of tokens sums what reaches each
    expert's bias; the sums of the blocks are added in order.
    """
    s = router_from_text(spec)
    flat = _rows(logits, s.num_experts)
    read = bias.contiguous() if bias is not None and s.weights_from == "choice" else None
    dstats = [] if dprobs is None or dsquares is None else [dprobs.contiguous(), dsquares]
    config = _config("grad_router", s, flat)
    text = grad_router_text(s, config, logits.dtype, None if read is None else read.dtype, bool(dstats))
    kernel = load("grad_router", config, text)
    dlogits = torch.empty_like(flat)
    parts = None
    if read is not None:
        parts = flat.new_empty((router.programs(kernel, flat.shape[0]), s.num_experts), dtype=torch.float32)
    with on(logits.device):
        grad_router.launch(kernel, _rows(grad, s.top_k), flat, read, _rows(ids, s.top_k), dstats, dlogits, parts)
    found = [dlogits.view(logits.shape) if needs[0] else logits.new_empty(0), logits.new_empty(0)]
    if needs[1] and bias is not None:
        found[1] = torch.zeros_like(bias) if parts is None else parts.sum(0).to(bias.dtype)
    return found


def _rows(t: Tensor, width: int) -> Tensor:
    return t.reshape(-1, width).contiguous()


def _config(family: str, spec: RouterSpec, logits: Tensor) -> Config:
    tokens = 1 << max(0, logits.shape[0] - 1).bit_length()
    return choose(family, spec, tokens, gpu_choose.target_of(logits.device))


def prepare_router(spec: RouterSpec) -> None:
    """Write and load the router for float32 logits. Unsupported or BuildError where that fails."""
    if reason := supports_router(spec):
        raise Unsupported(reason)
    config = choose("router", spec, 1, gpu_choose.INTERPRETER)
    load("router", config, router_text(spec, config, torch.float32, torch.float32 if spec.bias else None))

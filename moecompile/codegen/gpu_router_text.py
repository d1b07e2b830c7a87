"""From a router's spec and a config to the source text of its Triton modules, forward and backward."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from moecompile.codegen.gpu_text import module, next_power
from moecompile.ir.spec import RouterSpec
from moecompile.kernels.gpu.config import Config


@lru_cache(1024)
def router_text(spec: RouterSpec, config: Config, logits: torch.dtype, bias: torch.dtype | None, stats: bool = False) -> str:
    """The router for logits and bias of these dtypes; `stats`: with the sums that balancing losses need."""
    groups = spec.groups
    count = 1 if groups is None else groups.count
    group_rows, group_lanes = next_power(count), next_power(spec.num_experts // count)
    context = {
        **_context(spec, logits, bias),
        "stats": stats,
        "groups": groups,
        "group_rows": group_rows,
        "group_lanes": group_lanes,
        "group_size": spec.num_experts // count,
    }
    constants = {**_constants(spec, config, group_rows * group_lanes), "LEAST": "-(2**63)"}
    return module("router", _title(spec), config, constants, context)


@lru_cache(1024)
def grad_router_text(spec: RouterSpec, config: Config, logits: torch.dtype, bias: torch.dtype | None, stats: bool = False) -> str:
    """Its backward; `bias` where the weights are read from the biased scores, else None; `stats`: that of the sums too."""
    context = {**_context(spec, logits, bias), "stats": stats}
    if bias is None and spec.weights_from == "choice":
        context["source"] = "score"
    return module("grad_router", _title(spec), config, _constants(spec, config, next_power(spec.num_experts)), context)


def _title(spec: RouterSpec) -> str:
    groups = spec.groups
    kind = f"groups {groups.top_k} of {groups.count} by {groups.score}, " if groups else ""
    return f"E={spec.num_experts} K={spec.top_k} {spec.score}, {kind}weights from {spec.weights_from}"


def _constants(spec: RouterSpec, config: Config, lanes: int) -> dict[str, int | str]:
    return {"E": spec.num_experts, "K": spec.top_k, "BM": config.block_m, "LANES": lanes, "SLOTS": next_power(spec.top_k)}


def _context(spec: RouterSpec, logits: torch.dtype, bias: torch.dtype | None) -> dict[str, Any]:
    """Scores, where the weights are read, and the steps that follow, each with the dtype of its result."""
    choice_dtype = spec.score_dtype if bias is None else torch.promote_types(spec.score_dtype, bias)
    current = {"score": spec.score_dtype, "choice": choice_dtype, "logits": logits}[spec.weights_from]
    post: list[dict[str, Any]] = []
    for step in spec.post:
        if step[0] == "cast":
            current = step[1]
        values = dict(zip({"scale": ("factor",), "normalise": ("eps", "least")}.get(step[0], ()), step[1:], strict=False))
        post.append({"name": step[0], "dtype": current, **values})
    return {
        "bias": bias is not None,
        "score": spec.score,
        "score_dtype": spec.score_dtype,
        "choice_dtype": choice_dtype,
        "source": spec.weights_from,
        "post": post,
    }

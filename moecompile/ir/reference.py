"""What each moe.* op computes, in plain PyTorch: the interpreter, the oracle of the tests, and the last fallback.

Differentiable where the op is.  Works in the dtypes it is given; float16 and bfloat16 are multiplied as such and summed in
float32, float64 stays float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moecompile.ir import expr
from moecompile.ir.spec import ExpertsSpec, OutOfRange, RouterSpec, Weight, WeightOn


def weight_view(w: Weight, params: Sequence[Tensor], e: int, sizes: tuple[int, ...]) -> Tensor:
    """The matrix [N,K] (or the vector [N]) of expert e. A view where the parameter is contiguous."""
    p = params[w.params[0] if w.stacked else w.params[e]]
    strides = (w.n, w.k)[: len(sizes)]
    return p.contiguous().as_strided(sizes, strides, p.storage_offset() * p.is_contiguous() + w.offset + e * w.e * w.stacked)


def expert_ids(spec: ExpertsSpec, ids: Tensor) -> Tensor:
    """ids with `out_of_range` applied: what is skipped becomes E."""
    E = spec.num_experts
    if spec.out_of_range is OutOfRange.INDEX:
        if ids.numel() and bool(((ids < -E) | (ids >= E)).any()):
            raise IndexError(f"expert id out of range: found {int(ids.min())}..{int(ids.max())}, needs -{E}..{E - 1}")
        return torch.where(ids < 0, ids + E, ids)
    return torch.where((ids < 0) | (ids >= E), E, ids)


def experts(spec: ExpertsSpec, x: Tensor, weights: Tensor | None, ids: Tensor, params: Sequence[Tensor]) -> Tensor:
    """x [T,H], weights [T,K] or None, ids [T,K] -> out [T,O]: see ExpertsSpec."""
    with torch.autocast(x.device.type, enabled=False):  # the spec says every dtype
        return _experts(spec, x, weights, ids, params)


def _experts(spec: ExpertsSpec, x: Tensor, weights: Tensor | None, ids: Tensor, params: Sequence[Tensor]) -> Tensor:
    H, F, O = spec.hidden, spec.intermediate, spec.out_features
    wide = torch.float64 if spec.dtype == torch.float64 else torch.float32
    ids = expert_ids(spec, ids)
    out = torch.zeros(x.shape[0], O, dtype=wide, device=x.device)
    for e in range(spec.num_experts):
        token, slot = torch.where(ids == e)
        rows = x[token]
        w = None if weights is None else weights[token, slot].to(wide)[:, None]
        if spec.weight_on is WeightOn.INPUT:
            assert w is not None
            rows = (rows.to(wide) * w).to(spec.dtype)
        h = []
        for matrix, bias in zip(spec.projections, spec.projection_bias, strict=True):
            z = (rows.to(spec.dtype) @ weight_view(matrix, params, e, (F, H)).t()).to(wide)
            h.append(z if bias is None else z + weight_view(bias, params, e, (F,)).to(wide))
        y = (expr.evaluate(spec.activation, h).to(spec.dtype) @ weight_view(spec.down, params, e, (O, F)).t()).to(wide)
        if spec.down_bias is not None:
            y = y + weight_view(spec.down_bias, params, e, (O,)).to(wide)
        if spec.weight_on is WeightOn.OUTPUT:
            assert w is not None
            y = y * w
        out = out.index_add(0, token, y)
    return out.to(spec.out_dtype)


def dense_weights(weights: Tensor, ids: Tensor, num_experts: int) -> Tensor:
    """weights [T,K] of experts ids [T,K] -> [T,E], zero where an expert was not chosen."""
    return weights.new_zeros(weights.shape[0], num_experts).scatter(1, ids, weights)


def scores(spec: RouterSpec, logits: Tensor) -> Tensor:
    """[T,E] -> [T,E] in score_dtype."""
    if spec.score == "softmax":
        return torch.softmax(logits, -1, dtype=spec.score_dtype)
    z = logits.to(spec.score_dtype)
    if spec.score == "sigmoid":
        return torch.sigmoid(z)
    if spec.score == "sqrtsoftplus":
        return torch.nn.functional.softplus(z).sqrt()
    return z


def choices(spec: RouterSpec, score: Tensor, bias: Tensor | None) -> Tensor:
    """What the top-k is taken of: scores plus bias, groups that were not chosen filled."""
    choice = score if bias is None else score + bias
    if spec.groups is None:
        return choice
    g = spec.groups
    grouped = choice.unflatten(-1, (g.count, spec.num_experts // g.count))
    best = grouped.amax(-1) if g.score == "max" else grouped.topk(2, -1).values.sum(-1)
    keep = torch.zeros_like(best, dtype=torch.bool).scatter(-1, best.topk(g.top_k, -1, sorted=False).indices, True)
    return torch.where(keep[..., None], grouped, torch.full_like(grouped, g.fill)).reshape(choice.shape)


def chosen_weights(spec: RouterSpec, logits: Tensor, score: Tensor, choice: Tensor, ids: Tensor) -> Tensor:
    """The weights of given ids: differentiable in logits and score."""
    w = {"score": score, "choice": choice, "logits": logits}[spec.weights_from].gather(-1, ids)
    for step in spec.post:
        if step[0] == "softmax":
            w = torch.softmax(w, -1)
        elif step[0] == "sigmoid":
            w = torch.sigmoid(w)
        elif step[0] == "cast":
            w = w.to(step[1])
        elif step[0] == "scale":
            w = w * step[1]
        else:
            total = w.sum(-1, keepdim=True)
            if step[1]:
                total = total + step[1]
            if step[2]:
                total = total.clamp(min=step[2])
            w = w / total
    return w


def weights_of(spec: RouterSpec, logits: Tensor, bias: Tensor | None, ids: Tensor) -> Tensor:
    """The weights [T,K] of ids that were chosen before: differentiable in logits, and in bias where it reaches them."""
    score = scores(spec, logits)
    choice = choices(spec, score, bias) if spec.weights_from == "choice" else score
    return chosen_weights(spec, logits, score, choice, ids)


def route(spec: RouterSpec, logits: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """logits [T,E], bias [E] -> weights [T,K], ids [T,K] int64: see RouterSpec."""
    score = scores(spec, logits)
    choice = choices(spec, score, bias)
    if spec.first:
        ids = choice.argmax(-1, keepdim=True)
    else:
        ids = choice.topk(spec.top_k, -1, sorted=spec.sorted).indices
    return chosen_weights(spec, logits, score, choice, ids), ids


def statistics(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What balancing losses read of logits [..,E] and ids [..,K], over all tokens: choices of each expert [E] int64, its softmax
    summed [E] (mean probability times tokens), and logsumexp squared and summed [] (z-loss, ST-MoE, times tokens).

    In float32, or float64 for float64 logits; the last two are differentiable.
    """
    z = logits.flatten(0, -2)
    z = z if z.dtype == torch.float64 else z.float()
    chosen = ids.flatten()
    counts = torch.zeros(z.shape[1], dtype=torch.int64, device=ids.device).scatter_add(0, chosen, torch.ones_like(chosen))
    return counts, torch.softmax(z, -1).sum(0), torch.logsumexp(z, -1).square().sum()

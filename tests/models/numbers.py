"""Whether the numbers of a compiled module are right: float64 is the truth, eager's own error the measure.

A tensor is right where its largest error against float64 is at most `SLACK` times eager's, plus a few roundings of the
tensor's largest value: the rewrite may round elsewhere, it may not compute something else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

SLACK = 4.0


@dataclass(frozen=True)
class Numbers:
    """Outputs in order, then gradients, each with a name."""

    values: dict[str, Tensor]


def run(call: Callable[..., Any], module: nn.Module, args: Sequence[Any], train: bool, expanded: bool = False) -> Numbers:
    """Run `call` (the module, or what it was compiled to) on copies of args; in training also the gradients.

    expanded: the incoming gradients are expanded ones, as `.sum().backward()` makes them; else random.
    """
    module.zero_grad(set_to_none=True)

    def leaf(t: Any) -> Any:
        if not isinstance(t, Tensor):
            return t
        t = t.detach().clone()
        return t.requires_grad_(train and t.is_floating_point())

    given = tree_map(leaf, tuple(args))
    torch.manual_seed(0)  # jitter, Gumbel noise
    with torch.set_grad_enabled(train):
        outputs = [t for t in tree_leaves(call(*given)) if isinstance(t, Tensor)]
    values = {f"output {i}": t.detach() for i, t in enumerate(outputs)}
    if train:
        loss = torch.zeros((), dtype=torch.float64)
        for i, t in enumerate(outputs):
            if t.requires_grad:
                loss = loss + (t.double() * (1.0 if expanded else direction(t.shape, i))).sum()
        loss.backward()
        for i, t in enumerate(tree_leaves(given)):
            if isinstance(t, Tensor) and t.requires_grad:
                values[f"gradient of input {i}"] = torch.zeros_like(t) if t.grad is None else t.grad
        for name, p in module.named_parameters():
            if p.requires_grad:
                values[f"gradient of {name}"] = torch.zeros_like(p) if p.grad is None else p.grad
    module.zero_grad(set_to_none=True)
    return Numbers(values)


def direction(shape: Sequence[int], i: int) -> Tensor:
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(100 + i), dtype=torch.float64)


def wrong(got: Numbers, eager: Numbers, exact: Numbers | None = None, eps: float = 0.0) -> str:
    """What is wrong with `got`, in one line, or an empty string.

    exact: the float64 run. Without it eager is the truth and `eps` (of the coarsest dtype on the way) the measure.
    """
    if list(got.values) != list(eager.values):
        return f"returns {list(got.values)}, eager {list(eager.values)}"
    most = max((largest(t) for t in eager.values.values() if t.is_floating_point()), default=0.0)
    for name, theirs in eager.values.items():
        ours = got.values[name]
        if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
            return f"{name}: is {ours.dtype} {list(ours.shape)}, eager {theirs.dtype} {list(theirs.shape)}"
        if not theirs.is_floating_point():
            if not torch.equal(ours, theirs):
                return f"{name}: differs from eager"
            continue
        if not theirs.numel():
            continue
        truth = theirs.double() if exact is None else exact.values[name].double()
        scale = max(largest(truth), most / 16)  # a small gradient may be a difference of large sums
        step = max(eps, float(torch.finfo(theirs.dtype).eps))
        allowed = SLACK * largest(theirs.double() - truth) + (8.0 if exact is not None else 16.0) * step * scale + 1e-30
        error = largest(ours.double() - truth)
        if not torch.equal(ours.isnan(), theirs.isnan()):
            return f"{name}: {int(ours.isnan().sum())} NaN, eager {int(theirs.isnan().sum())}"
        if error > allowed:
            return f"{name}: off by {error:.3g}, allowed {allowed:.3g} (largest value {scale:.3g})"
    return ""


def largest(t: Tensor) -> float:
    """The largest finite magnitude, 0 where there is none (the caller compares where the NaN are)."""
    finite = t[t.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0

"""What experts compute between their matmuls: pointwise functions of one projection or of two (gate, up)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

Activation = Callable[..., Tensor]


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def swiglu_by_hand(gate: Tensor, up: Tensor) -> Tensor:
    return up * (gate * torch.sigmoid(gate))


def swiglu_in_float32(gate: Tensor, up: Tensor) -> Tensor:
    if gate.dtype == torch.float64:
        return F.silu(gate) * up
    return (F.silu(gate.float()) * up.float()).to(gate.dtype)


def swiglu_clamped(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate.clamp(max=1.0)) * up.clamp(min=-1.0, max=1.0)


def swiglu_clamped_after(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate).clamp(max=0.7) * up.clamp(-0.7, 0.7)


def gpt_oss(gate: Tensor, up: Tensor) -> Tensor:
    gate = gate.clamp(min=None, max=1.0)
    up = up.clamp(min=-1.0, max=1.0)
    return (up + 1) * (gate * torch.sigmoid(gate * 1.702))


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.gelu(gate) * up


def geglu_tanh(gate: Tensor, up: Tensor) -> Tensor:
    return F.gelu(gate, approximate="tanh") * up


def reglu(gate: Tensor, up: Tensor) -> Tensor:
    return torch.relu(gate) * up


def softcapped(gate: Tensor, up: Tensor) -> Tensor:
    capped = torch.tanh(gate / 3.0) * 3.0
    return capped * torch.sigmoid(gate) * (torch.tanh(up / 3.0) * 3.0)


def relu(h: Tensor) -> Tensor:
    return F.relu(h)


def relu_squared(h: Tensor) -> Tensor:
    return F.relu(h).square()


def gelu(h: Tensor) -> Tensor:
    return F.gelu(h)


def silu(h: Tensor) -> Tensor:
    return F.silu(h)


def silu_in_place(h: Tensor) -> Tensor:
    return F.silu(h * 1.0, inplace=True)


def identity(h: Tensor) -> Tensor:
    return h


GATED: dict[str, Activation] = {
    f.__name__: f
    for f in (
        swiglu,
        swiglu_by_hand,
        swiglu_in_float32,
        swiglu_clamped,
        swiglu_clamped_after,
        gpt_oss,
        geglu,
        geglu_tanh,
        reglu,
        softcapped,
    )
}
PLAIN: dict[str, Activation] = {f.__name__: f for f in (relu, relu_squared, gelu, silu, silu_in_place, identity)}
ACTIVATIONS = GATED | PLAIN

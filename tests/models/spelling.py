"""The many ways to write one step, as a frozen choice: a module holds a Spelling and asks it to write the step.

Every choice of one field gives the same numbers.  Letters: T tokens, K chosen per token, R = T*K, H hidden.
"""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

CHOICES: dict[str, tuple[str, ...]] = {
    "rows": ("view", "reshape", "flatten", "reshape_size"),
    "flat": ("view", "reshape", "flatten", "ravel"),
    "column": ("unsqueeze", "none", "view"),
    "product": ("rows_first", "weights_first", "method", "in_place"),
    "linear": ("functional", "matmul", "t"),
    "softmax": ("functional_dtype", "torch", "method", "module"),
    "sigmoid": ("torch", "method", "functional"),
    "top": ("function", "method", "unsorted", "named"),
    "divide": ("out_of_place", "augmented", "div_", "torch_div"),
    "pick": ("gather", "torch_gather"),
    "index": ("brackets", "index_select", "gather"),
    "halve": ("chunk", "slice", "split", "unflatten"),
    "blank": ("zeros_like", "new_zeros", "zeros"),
    "slots": ("view", "reshape", "unflatten"),
    "total": ("method", "torch", "keyword"),
    "contiguous": ("no", "yes"),
    "token": ("floordiv", "torch_div", "floor_divide"),
}


@dataclass(frozen=True)
class Spelling:
    """One choice for every step; the default of each is the first entry of CHOICES."""

    rows: str = "view"
    flat: str = "view"
    column: str = "unsqueeze"
    product: str = "rows_first"
    linear: str = "functional"
    softmax: str = "functional_dtype"
    sigmoid: str = "torch"
    top: str = "function"
    divide: str = "out_of_place"
    pick: str = "gather"
    index: str = "brackets"
    halve: str = "chunk"
    blank: str = "zeros_like"
    slots: str = "view"
    total: str = "method"
    contiguous: str = "no"
    token: str = "floordiv"

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if value not in CHOICES[name]:
                raise ValueError(f"spelling of {name!r}: {value!r} is none of {', '.join(CHOICES[name])}")

    def __str__(self) -> str:
        changed = {n: v for n, v in dataclasses.asdict(self).items() if v != CHOICES[n][0]}
        return ",".join(f"{n}={v}" for n, v in changed.items()) or "plain"


def draw(rng: random.Random) -> Spelling:
    return Spelling(**{name: rng.choice(values) for name, values in CHOICES.items()})


def rows(s: Spelling, x: Tensor) -> Tensor:
    """[B,S,H] or [T,H] -> [T,H]."""
    if s.rows == "view":
        return x.view(-1, x.shape[-1])
    if s.rows == "reshape":
        return x.reshape(-1, x.shape[-1])
    if s.rows == "flatten":
        return x.flatten(0, -2)
    return x.reshape(x.numel() // x.size(-1), x.size(-1))


def flat(s: Spelling, t: Tensor) -> Tensor:
    """[T,K] -> [R]."""
    if s.contiguous == "yes":
        t = t.contiguous()
    if s.flat == "view":
        return t.reshape(-1) if not t.is_contiguous() else t.view(-1)
    if s.flat == "reshape":
        return t.reshape(-1)
    return t.flatten() if s.flat == "flatten" else t.ravel()


def column(s: Spelling, w: Tensor) -> Tensor:
    """[n] -> [n,1], [T,K] -> [T,K,1]."""
    if s.column == "unsqueeze":
        return w.unsqueeze(-1)
    return w[..., None] if s.column == "none" else w.reshape(*w.shape, 1)


def product(s: Spelling, y: Tensor, w: Tensor) -> Tensor:
    """y * w, w a column. In place only where that keeps the dtype."""
    if s.product == "rows_first":
        return y * w
    if s.product == "weights_first":
        return w * y
    if s.product == "in_place" and torch.promote_types(y.dtype, w.dtype) == y.dtype:
        y *= w
        return y
    return torch.mul(y, w)


def linear(s: Spelling, x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [n,K], w [N,K] -> [n,N]."""
    if s.linear == "functional":
        return F.linear(x, w, bias)
    y = x @ w.transpose(0, 1) if s.linear == "matmul" else torch.mm(x, w.t())
    return y if bias is None else y + bias


def softmax(s: Spelling, z: Tensor, wide: torch.dtype) -> Tensor:
    if s.softmax == "functional_dtype":
        return F.softmax(z, dim=-1, dtype=wide)
    if s.softmax == "torch":
        return torch.softmax(z.to(wide), dim=-1)
    if s.softmax == "method":
        return z.to(wide).softmax(-1)
    return torch.nn.Softmax(dim=-1)(z.to(wide))


def sigmoid(s: Spelling, z: Tensor) -> Tensor:
    if s.sigmoid == "torch":
        return torch.sigmoid(z)
    return z.sigmoid() if s.sigmoid == "method" else F.sigmoid(z)


def top(s: Spelling, z: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """values [T,K], ids [T,K]."""
    if s.top == "function":
        values, ids = torch.topk(z, k, dim=-1)
        return values, ids
    if s.top == "method":
        values, ids = z.topk(k)
        return values, ids
    if s.top == "unsorted":
        values, ids = torch.topk(z, k, dim=-1, sorted=False)
        return values, ids
    found = z.topk(k, -1)
    return found.values, found.indices


def divide(s: Spelling, w: Tensor, by: Tensor) -> Tensor:
    if s.divide == "out_of_place":
        return w / by
    if s.divide == "torch_div":
        return torch.div(w, by)
    w = w.clone()  # values of a top-k may be returned as they are
    if s.divide == "augmented":
        w /= by
        return w
    return w.div_(by)


def pick(s: Spelling, scores: Tensor, ids: Tensor) -> Tensor:
    return scores.gather(-1, ids) if s.pick == "gather" else torch.gather(scores, 1, ids)


def index(s: Spelling, x: Tensor, at: Tensor) -> Tensor:
    if s.index == "gather":
        return x.gather(0, at[:, None].expand(-1, x.shape[1]))
    return x[at] if s.index == "brackets" else x.index_select(0, at)


def halve(s: Spelling, h: Tensor) -> tuple[Tensor, Tensor]:
    """[..,2F] -> two of [..,F]."""
    n = h.shape[-1] // 2
    if s.halve == "chunk":
        a, b = h.chunk(2, dim=-1)
    elif s.halve == "slice":
        a, b = h[..., :n], h[..., n:]
    elif s.halve == "split":
        a, b = h.split(n, dim=-1)
    else:
        a, b = h.unflatten(-1, (2, n)).unbind(-2)
    return a, b


def blank(s: Spelling, x: Tensor, width: int) -> Tensor:
    """Zeros [T,width] of x's dtype."""
    if s.blank == "zeros_like" and x.shape[-1] == width:
        return torch.zeros_like(x)
    if s.blank == "new_zeros":
        return x.new_zeros(x.shape[0], width)
    return torch.zeros(x.shape[0], width, dtype=x.dtype, device=x.device)


def slots(s: Spelling, y: Tensor, tokens: int, k: int) -> Tensor:
    """[R,H] in token order -> [T,K,H]."""
    if s.slots == "view":
        return y.view(tokens, k, y.shape[-1])
    return y.reshape(tokens, k, y.shape[-1]) if s.slots == "reshape" else y.unflatten(0, (tokens, k))


def total(s: Spelling, y: Tensor) -> Tensor:
    """[T,K,H] -> [T,H]."""
    if s.total == "method":
        return y.sum(1)
    return torch.sum(y, dim=1) if s.total == "torch" else y.sum(dim=-2)


def token_of(s: Spelling, order: Tensor, k: int) -> Tensor:
    if s.token == "floordiv":
        return order // k
    if s.token == "torch_div":
        return torch.div(order, k, rounding_mode="floor")
    return torch.floor_divide(order, k)

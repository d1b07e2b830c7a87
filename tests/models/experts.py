"""The experts half in every form that is asked for: x [T,H], ids [T,K], weights [T,K] -> [T,H].

A form is a function of an Experts module; FORMS lists them with the layouts each can take.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.integrations import moe as hf

from tests.models import spelling as write
from tests.models.activations import ACTIVATIONS, GATED
from tests.models.layouts import LAYOUTS, STACKED, Operand
from tests.models.spelling import Spelling


class Experts(nn.Module):
    """E expert MLPs. `form` is a name of FORMS; `combine` one of the form's; `on_input`: the weight multiplies the rows."""

    has_post_expert_norm = False

    def __init__(
        self,
        form: str,
        layout: str,
        activation: str,
        sizes: tuple[int, int, int],
        bias: bool,
        dtype: torch.dtype,
        spelling: Spelling,
        combine: str,
        on_input: bool,
        sentinels: bool,
    ) -> None:
        super().__init__()
        self.form, self.spelling, self.combine, self.on_input = form, spelling, combine, on_input
        self.E, self.H, self.F = self.num_experts, _, _ = sizes
        self.layout = LAYOUTS[layout](*sizes, activation in GATED, bias, dtype, spelling)
        self.act = self.act_fn = ACTIVATIONS[activation]
        self.dtype = dtype
        self._is_expert_parallel = sentinels

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return FORMS[self.form].run(self, x, ids, weights)

    def mlp(self, e: int, rows: Tensor) -> Tensor:
        *first, down = self.layout.of(e)
        h = self.act(*self.layout.halves([_product(self.spelling, rows, o) for o in first]))
        return _product(self.spelling, h, down)

    # What transformers' own functions read from an experts module.

    @property
    def has_gate(self) -> bool:
        return self.layout.gated

    @property
    def has_bias(self) -> bool:
        return self.layout.biased

    @property
    def is_transposed(self) -> bool:
        return self.layout.operands()[0].transposed

    @property
    def gate_up_proj(self) -> Tensor:
        return self.layout.operands()[0].weight

    up_proj = gate_up_proj

    @property
    def gate_up_proj_bias(self) -> Tensor | None:
        return self.layout.operands()[0].bias

    up_proj_bias = gate_up_proj_bias

    @property
    def down_proj(self) -> Tensor:
        return self.layout.operands()[1].weight

    @property
    def down_proj_bias(self) -> Tensor | None:
        return self.layout.operands()[1].bias

    def _apply_gate(self, first: Tensor) -> Tensor:
        return self.act(*self.layout.halves([first]))


def _product(s: Spelling, rows: Tensor, o: Operand) -> Tensor:
    """rows [n,K] times one expert's matrix, plus its bias."""
    if not o.transposed:
        return write.linear(s, rows, o.weight, o.bias)
    y = rows @ o.weight
    return y if o.bias is None else y + o.bias


# ---------------------------------------------------------------- sorted rows and a grouped GEMM


def _grouped_mm(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """rows [R,K], weight [E,K,N]: the grouped GEMM that can be captured in this dtype."""
    if rows.dtype == torch.bfloat16:
        return F.grouped_mm(rows, weight, offs=ends)
    return torch.ops.transformers.grouped_mm_fallback(rows, weight, ends)


def grouped(m: Experts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    s, (T, K) = m.spelling, ids.shape
    by_expert, order = torch.sort(write.flat(s, ids))
    token = write.token_of(s, order, K)
    rows, w = write.index(s, x, token), write.column(s, write.flat(s, weights)[order])
    if m.on_input:
        rows = write.product(s, rows, w.to(rows.dtype))
    counts = torch.histc(by_expert.float(), bins=m.E, min=0, max=m.E - 1)
    ends = counts.cumsum(0, dtype=torch.int32)

    def product(rows: Tensor, o: Operand) -> Tensor:
        y = _grouped_mm(rows, o.weight if o.transposed else o.weight.transpose(-2, -1), ends)
        return y if o.bias is None else y + o.bias[by_expert]

    *first, down = m.layout.operands()
    y = product(m.act(*m.layout.halves([product(rows, o) for o in first])), down)
    if not m.on_input:
        y = write.product(s, y, w)
    if m.combine == "index_add":
        return write.blank(s, x, m.H).to(y.dtype).index_add_(0, token, y).to(x.dtype)
    if m.combine == "scatter_add":
        return write.blank(s, x, m.H).to(y.dtype).scatter_add_(0, token[:, None].expand(-1, m.H), y).to(x.dtype)
    if m.combine == "argsort":
        back = torch.argsort(order)
    else:
        back = torch.empty_like(order)
        back[order] = torch.arange(order.size(0), device=order.device)
    return write.total(s, write.slots(s, write.index(s, y, back), T, K)).to(x.dtype)


def hf_grouped(m: Experts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    return hf.grouped_mm_experts_forward(m, x, ids, weights)


# ---------------------------------------------------------------- gathered weights


def hf_batched(m: Experts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    return hf.batched_mm_experts_forward(m, x, ids, weights)


def batched(m: Experts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    s, (T, K) = m.spelling, ids.shape
    pair = write.flat(s, ids)
    if s.index == "brackets":
        rows = x.repeat_interleave(K, dim=0)
    else:
        rows = x[:, None, :].expand(T, K, m.H).reshape(T * K, m.H)
    w = write.column(s, write.flat(s, weights))
    if m.on_input:
        rows = write.product(s, rows, w.to(rows.dtype))

    def product(rows: Tensor, o: Operand) -> Tensor:
        chosen = o.weight[pair]
        if o.transposed:
            y = torch.bmm(rows.unsqueeze(1), chosen).squeeze(1)
        else:
            y = torch.bmm(chosen, rows.unsqueeze(-1)).squeeze(-1)
        return y if o.bias is None else y + o.bias[pair]

    *first, down = m.layout.operands()
    y = product(m.act(*m.layout.halves([product(rows, o) for o in first])), down)
    if not m.on_input:
        y = write.product(s, y, w)
    return write.total(s, write.slots(s, y, T, K)).to(x.dtype)


def einsum(m: Experts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Gathered weights [T,K,..] and einsum, as gpt-fast has it."""
    *first, down = m.layout.operands()
    h = []
    for o in first:
        z = torch.einsum("ti,tkio->tko" if o.transposed else "ti,tkoi->tko", x, o.weight[ids])
        h.append(z if o.bias is None else z + o.bias[ids])
    y = torch.einsum("tki,tkio->tko" if down.transposed else "tki,tkoi->tko", m.act(*m.layout.halves(h)), down.weight[ids])
    if down.bias is not None:
        y = y + down.bias[ids]
    if m.combine == "einsum":
        return torch.einsum("tko,tk->to", y, weights.to(y.dtype))
    return write.total(m.spelling, write.product(m.spelling, y, write.column(m.spelling, weights))).to(x.dtype)


# ---------------------------------------------------------------- a Python loop over all experts


def _hits_where(ids: Tensor, e: int, E: int) -> tuple[Tensor, Tensor]:
    token, slot = torch.where(ids == e)
    return token, slot


def _hits_nonzero(ids: Tensor, e: int, E: int) -> tuple[Tensor, Tensor]:
    hits = (ids == e).nonzero()
    return hits[:, 0], hits[:, 1]


def _hits_tuple(ids: Tensor, e: int, E: int) -> tuple[Tensor, Tensor]:
    token, slot = ids.eq(e).nonzero(as_tuple=True)
    return token, slot


def _hits_one_hot(ids: Tensor, e: int, E: int) -> tuple[Tensor, Tensor]:
    mask = F.one_hot(ids, num_classes=E).permute(2, 1, 0)
    slot, token = torch.where(mask[e])
    return token, slot


def _loop(hits: Callable[[Tensor, int, int], tuple[Tensor, Tensor]]) -> Callable[..., Tensor]:
    def run(m: Experts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        s, out = m.spelling, write.blank(m.spelling, x, m.H)
        for e in range(m.E):
            token, slot = hits(ids, e, m.E)
            rows, w = write.index(s, x, token), write.column(s, weights[token, slot])
            if m.on_input:
                y = m.mlp(e, write.product(s, rows, w).to(x.dtype))
            else:
                y = write.product(s, m.mlp(e, rows), w).to(x.dtype)
            out = add(m, out, token, y)
        return out

    return run


def add(m: Experts, out: Tensor, token: Tensor, y: Tensor) -> Tensor:
    """out[token] += y, for rows of one expert."""
    if m.combine == "index_put":
        out[token] += y
        return out
    if m.combine == "scatter_add":
        return out.scatter_add_(0, token[:, None].expand(-1, m.H), y)
    if m.combine == "index_add_out":
        return out.index_add(0, token, y)
    if m.combine == "accumulate":
        return out.index_put_((token,), y, accumulate=True)
    out.index_add_(0, token, y)
    return out


def loop_mask(m: Experts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """The rows of an expert are picked by a boolean mask over tokens."""
    s, out = m.spelling, write.blank(m.spelling, x, m.H)
    for e in range(m.E):
        chosen = ids == e
        mask = chosen.any(dim=-1)
        w = write.column(s, (weights * chosen).sum(-1)[mask])
        rows = x[mask]
        if m.on_input:
            out[mask] += m.mlp(e, write.product(s, rows, w).to(x.dtype))
        else:
            out[mask] += write.product(s, m.mlp(e, rows), w).to(x.dtype)
    return out


# ---------------------------------------------------------------- every expert on every token


def masked_dense(m: Experts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """E dense MLPs, each times the token's weight for it (0 where it was not chosen)."""
    out = write.blank(m.spelling, x, m.H)
    for e in range(m.E):
        w = write.column(m.spelling, (weights * (ids == e)).sum(-1))
        out = out + write.product(m.spelling, m.mlp(e, x), w).to(x.dtype)
    return out


def dense(m: Experts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """bmm over all experts, tokens repeated E times, the weights scattered into [T,E]: Llama 4."""
    T, s = x.shape[0], m.spelling
    gates = torch.zeros(T, m.E, dtype=weights.dtype, device=x.device).scatter_(1, ids, weights)
    rows = x.repeat(m.E, 1)
    w = gates.transpose(0, 1).reshape(-1, 1)
    if m.on_input:
        rows = write.product(s, rows, w.to(rows.dtype))

    def product(rows: Tensor, o: Operand) -> Tensor:
        y = torch.bmm(rows, o.weight if o.transposed else o.weight.transpose(1, 2))
        return y if o.bias is None else y + o.bias[:, None]

    *first, down = m.layout.operands()
    rows = rows.view(m.E, T, m.H)
    y = product(m.act(*m.layout.halves([product(rows, o) for o in first])), down).reshape(m.E * T, m.H)
    if not m.on_input:
        y = write.product(s, y, w)
    return y.reshape(m.E, T, m.H).sum(dim=0).to(x.dtype)


def dense_einsum(m: Experts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Every expert on every token by einsum, gates from one-hots."""
    gates = (F.one_hot(ids, m.E).to(weights.dtype) * weights[..., None]).sum(1)
    *first, down = m.layout.operands()
    h = []
    for o in first:
        z = torch.einsum("ti,eio->teo" if o.transposed else "ti,eoi->teo", x, o.weight)
        h.append(z if o.bias is None else z + o.bias)
    y = torch.einsum("tei,eio->teo" if down.transposed else "tei,eoi->teo", m.act(*m.layout.halves(h)), down.weight)
    y = y if down.bias is None else y + down.bias
    return torch.einsum("teo,te->to", y, gates.to(y.dtype))


# ---------------------------------------------------------------- the registry


@dataclass(frozen=True)
class Form:
    """layouts it takes, ways to combine; `asked`: whether a recogniser must fuse it, or may decline it."""

    run: Callable[[Experts, Tensor, Tensor, Tensor], Tensor]
    layouts: tuple[str, ...]
    combines: tuple[str, ...] = ("",)
    asked: bool = True
    on_input: bool = True
    sentinels: bool = False
    nonzero: bool = False  # data-dependent sizes


ALL = tuple(LAYOUTS)
ONE_OPERAND = tuple(n for n in STACKED if LAYOUTS[n].fused)
LOOP = ("index_add", "index_put", "scatter_add", "index_add_out", "accumulate")
FORMS: dict[str, Form] = {
    "grouped": Form(grouped, STACKED, ("inverse", "argsort", "index_add", "scatter_add")),
    "hf_grouped": Form(hf_grouped, ONE_OPERAND, on_input=False, sentinels=True),
    "hf_batched": Form(hf_batched, ONE_OPERAND, on_input=False, sentinels=True),
    "batched": Form(batched, STACKED),
    "einsum": Form(einsum, STACKED, ("einsum", "sum"), on_input=False),
    "loop_where": Form(_loop(_hits_where), ALL, LOOP, sentinels=True, nonzero=True),
    "loop_nonzero": Form(_loop(_hits_nonzero), ALL, LOOP, sentinels=True, nonzero=True),
    "loop_tuple": Form(_loop(_hits_tuple), ALL, LOOP, sentinels=True, nonzero=True),
    "loop_one_hot": Form(_loop(_hits_one_hot), ALL, LOOP, nonzero=True),
    "loop_mask": Form(loop_mask, ALL, sentinels=True, nonzero=True),
    "masked_dense": Form(masked_dense, ALL, asked=False, on_input=False, sentinels=True),
    "dense": Form(dense, STACKED),
    "dense_einsum": Form(dense_einsum, STACKED, asked=False, on_input=False),
}

"""Layers with balancing losses: what a router's op can sum for them, and what merely resembles it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

E, K, H, WIDTH = 6, 2, 8, 12
BF16 = torch.bfloat16
BOTH, CHOICES, PROBABILITIES, SQUARES = "choices, probabilities", "choices", "probabilities", "squared logsumexp"

Loss = Callable[["Balanced", Tensor, Tensor], object]  # of the module, its logits [..,E] and the chosen ids [T,K] (or [T])


@dataclass(frozen=True)
class Case:
    """A loss, the router beside it, and which sums are read from the router's op."""

    name: str
    loss: Loss
    expect: str
    router: str = "softmax"
    leading: int = 1  # dimensions of the tokens

    def __str__(self) -> str:
        return self.name


FORMS: list[Case] = []
LOOKALIKES: list[Case] = []


def form(expect: str, router: str = "softmax", leading: int = 1) -> Callable[[Loss], Loss]:
    def add(loss: Loss) -> Loss:
        FORMS.append(Case(loss.__name__, loss, expect, router, leading))
        return loss

    return add


def lookalike(expect: str = "", router: str = "softmax", leading: int = 1) -> Callable[[Loss], Loss]:
    """`expect`: what is fused all the same."""

    def add(loss: Loss) -> Loss:
        LOOKALIKES.append(Case(loss.__name__, loss, expect, router, leading))
        return loss

    return add


class Balanced(nn.Module):
    """x [..,H] -> the layer's output [T,H] and what the loss returns."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(3)

        def drawn(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=g) / shape[-1] ** 0.5)

        self.case = case
        self.gate, self.other = nn.Parameter(2 * drawn(E, H).detach()), drawn(E, H)
        self.up, self.down = drawn(E, WIDTH, H), drawn(E, H, WIDTH)
        self.register_buffer("bias", 0.1 * torch.randn(E, generator=g))

    def choose(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        if self.case.router == "top 1":
            return logits.float().softmax(-1).max(-1, keepdim=True)
        if self.case.router == "sigmoid":
            score = logits.float().sigmoid()
            ids = torch.topk(score + self.bias, K).indices
            return score.gather(-1, ids), ids
        if self.case.router == "double":
            return torch.topk(logits.double().softmax(-1), K)
        weights, ids = torch.topk(F.softmax(logits, dim=-1, dtype=torch.float32), K)
        return weights / weights.sum(-1, keepdim=True), ids

    def forward(self, x: Tensor) -> tuple[object, ...]:
        logits = F.linear(x, self.gate)
        flat, rows = logits.view(-1, E), x.reshape(-1, H)
        weights, ids = self.choose(flat)
        h = F.relu(torch.einsum("th,tkfh->tkf", rows, self.up[ids]))
        out = (torch.einsum("tkf,tkhf->tkh", h, self.down[ids]) * weights.to(x.dtype).unsqueeze(-1)).sum(1)
        return out, self.case.loss(self, logits, ids)


def switch(f: Tensor, p: Tensor) -> Tensor:
    return E * (f * p).sum()


# ---------------------------------------------------------------- what the op sums


@form(BOTH)
def switch_of_one_hot(m: Balanced, z: Tensor, ids: Tensor) -> object:
    return switch(F.one_hot(ids, E).sum(1).float().mean(0), z.softmax(-1).mean(0))


@form(BOTH)
def choices_over_tokens_and_slots(m: Balanced, z: Tensor, ids: Tensor) -> object:
    return switch(F.one_hot(ids, E).float().mean(dim=(0, 1)), F.softmax(z, 1).sum(0))


@form(BOTH)
def choices_by_slot_first(m: Balanced, z: Tensor, ids: Tensor) -> object:
    return switch(F.one_hot(ids, E).double().mean(1).sum(0, keepdim=True).float(), F.softmax(z, 1).mean(0, keepdim=True))


@form(BOTH, "top 1")
def switch_of_the_best(m: Balanced, z: Tensor, ids: Tensor) -> object:
    return switch(F.one_hot(ids.squeeze(-1), E).float().mean(0), z.float().softmax(-1).mean(0))


@form(BOTH)
def as_transformers_writes_it(m: Balanced, z: Tensor, ids: Tensor) -> object:
    """5.23: load_balancing_loss_func chooses again."""
    p = F.softmax(z.to(torch.float32), dim=-1)
    again = torch.topk(p, K, dim=-1).indices
    f = torch.zeros(E) + torch.histc(again.reshape(-1).to(torch.float32), bins=E, min=0, max=E)
    return switch(f / p.shape[0], (torch.zeros(E) + p.float().sum(dim=0)) / p.shape[0])


@form(BOTH)
def scattered_ones(m: Balanced, z: Tensor, ids: Tensor) -> object:
    flat = ids.flatten()
    f = torch.zeros(E, dtype=torch.int64).scatter_add_(0, flat, torch.ones_like(flat))
    return f, switch(f / z.shape[0], z.softmax(-1).mean(0))


@form(BOTH)
def zeros_read_before_they_count(m: Balanced, z: Tensor, ids: Tensor) -> object:
    f, flat = torch.zeros(E, dtype=torch.int64), ids.flatten()
    zeros = f + 0
    f.scatter_add_(0, flat, torch.ones_like(flat))
    return zeros, f.clone(), z.softmax(-1).mean(0)


@form(BOTH, "sigmoid")
def beside_a_sigmoid_router(m: Balanced, z: Tensor, ids: Tensor) -> object:
    return switch(F.one_hot(ids, E).sum((0, 1)) / z.shape[0], z.softmax(-1).mean(0))


@form(BOTH, "double")
def beside_a_router_in_double(m: Balanced, z: Tensor, ids: Tensor) -> object:
    return switch(F.one_hot(ids, E).sum(1).float().mean(0), z.softmax(-1).mean(0))


@form(SQUARES)
def z_loss(m: Balanced, z: Tensor, ids: Tensor) -> object:
    return torch.logsumexp(z, dim=-1).square().mean()


@form(SQUARES)
def z_loss_summed_of_a_power(m: Balanced, z: Tensor, ids: Tensor) -> object:
    return (torch.logsumexp(z.float(), -1, keepdim=True) ** 2.0).sum() / z.shape[0]


@form("probabilities, squared logsumexp")
def z_loss_of_a_product(m: Balanced, z: Tensor, ids: Tensor) -> object:
    lse = z.logsumexp(-1)
    return (lse * lse).mean(0), z.softmax(-1).sum(0).square().sum()


@form("choices, probabilities, squared logsumexp", leading=2)
def everything_over_batch_and_sequence(m: Balanced, z: Tensor, ids: Tensor) -> object:
    f = F.one_hot(ids, E).sum(0).float().sum(0)
    return switch(f, z.softmax(-1).mean(0).mean(0)), z.logsumexp(-1).pow(2).mean(), F.softmax(z, 2).sum((0, 1))


@form(PROBABILITIES)
def probabilities_transposed(m: Balanced, z: Tensor, ids: Tensor) -> object:
    return z.softmax(-1).t().sum(1, keepdim=True)


@form(PROBABILITIES)
def probabilities_rounded_after(m: Balanced, z: Tensor, ids: Tensor) -> object:
    return z.float().softmax(-1).to(BF16).mean(0)


# ---------------------------------------------------------------- what it does not


@lookalike()
def of_other_logits(m: Balanced, z: Tensor, ids: Tensor) -> object:
    return F.linear(z @ m.gate, m.other).softmax(-1).mean(0)


@lookalike()
def of_scaled_logits(m: Balanced, z: Tensor, ids: Tensor) -> object:
    return (z * 2).softmax(-1).mean(0), (z / 2).logsumexp(-1).square().mean()


@lookalike()
def of_shifted_logits(m: Balanced, z: Tensor, ids: Tensor) -> object:
    return (z + m.bias).softmax(-1).mean(0), (z + m.bias).logsumexp(-1).square().mean()


@lookalike()
def of_masked_logits(m: Balanced, z: Tensor, ids: Tensor) -> object:
    return z.masked_fill(z < -0.5, float("-inf")).softmax(-1).mean(0)


@lookalike()
def softmax_over_tokens(m: Balanced, z: Tensor, ids: Tensor) -> object:
    return z.softmax(0).sum(0), z.logsumexp(0).square().sum()


@lookalike(leading=2)
def softmax_over_the_sequence(m: Balanced, z: Tensor, ids: Tensor) -> object:
    return z.softmax(1).sum((0, 1))


@lookalike()
def sigmoid_for_softmax(m: Balanced, z: Tensor, ids: Tensor) -> object:
    return z.sigmoid().mean(0), z.log_softmax(-1).mean(0)


@lookalike()
def summed_over_experts(m: Balanced, z: Tensor, ids: Tensor) -> object:
    return z.softmax(-1).square().sum(-1), z.softmax(-1).mean(), z.softmax(-1).sum(-1)


@lookalike()
def the_most_instead_of_the_sum(m: Balanced, z: Tensor, ids: Tensor) -> object:
    return z.softmax(-1).amax(0)


@lookalike()
def of_squared_probabilities(m: Balanced, z: Tensor, ids: Tensor) -> object:
    return z.softmax(-1).square().mean(0)


@lookalike()
def masked_before_the_mean(m: Balanced, z: Tensor, ids: Tensor) -> object:
    mask = (torch.arange(z.shape[0]) % 3 > 0).to(z.dtype)
    return (z.softmax(-1) * mask[:, None]).mean(0), (z.logsumexp(-1).square() * mask).sum()


@lookalike()
def choices_weighted_by_a_mask(m: Balanced, z: Tensor, ids: Tensor) -> object:
    mask = (torch.arange(ids.numel()) % 3 > 0).float()
    return switch(torch.zeros(E).scatter_add_(0, ids.flatten(), mask), (z.softmax(-1) * mask[: z.shape[0], None]).mean(0))


@lookalike()
def some_of_the_tokens(m: Balanced, z: Tensor, ids: Tensor) -> object:
    return z.softmax(-1)[1:].mean(0), z[:3].softmax(-1).mean(0), z.logsumexp(-1)[:-1].square().mean()


@lookalike()
def every_token_twice(m: Balanced, z: Tensor, ids: Tensor) -> object:
    return z.softmax(-1).repeat(2, 1).sum(0), z.softmax(-1).expand(3, -1, -1).sum((0, 1))


@lookalike(leading=2)
def a_mean_over_the_batch_alone(m: Balanced, z: Tensor, ids: Tensor) -> object:
    return z.softmax(-1).mean(0).sum(0), z.logsumexp(-1).square().sum(0).mean(0)


@lookalike(leading=2)
def sums_of_each_sequence(m: Balanced, z: Tensor, ids: Tensor) -> object:
    return z.softmax(-1).mean(1), z.logsumexp(-1).square().sum(1)


@lookalike()
def logsumexp_not_squared(m: Balanced, z: Tensor, ids: Tensor) -> object:
    return z.logsumexp(-1).mean(), z.logsumexp(-1).pow(3).mean(), z.logsumexp(-1).mean().square()


@lookalike()
def logsumexp_of_probabilities(m: Balanced, z: Tensor, ids: Tensor) -> object:
    return z.softmax(-1).logsumexp(-1).square().mean(), z.logsumexp(-1).square().square().sum()


@lookalike()
def rounded_before(m: Balanced, z: Tensor, ids: Tensor) -> object:
    return z.to(torch.float16).softmax(-1).mean(0), z.to(torch.float16).float().logsumexp(-1).square().mean()


@lookalike()
def in_a_wider_dtype(m: Balanced, z: Tensor, ids: Tensor) -> object:
    return (
        *(z.double().softmax(-1).mean(0), z.double().softmax(-1).float().mean(0), z.softmax(-1).double().sum(0)),
        *(z.logsumexp(-1).double().square().mean(), z.double().logsumexp(-1).square().float().mean()),
        z.softmax(-1).sum(0, dtype=torch.float64),
    )


@lookalike()
def without_the_gradient(m: Balanced, z: Tensor, ids: Tensor) -> object:
    return z.detach().softmax(-1).mean(0), z.detach().logsumexp(-1).square().mean(), z.softmax(-1).detach().sum(0)


@lookalike()
def under_no_grad(m: Balanced, z: Tensor, ids: Tensor) -> object:
    with torch.no_grad():
        p = z.softmax(-1).mean(0)
        apart = z.view(-1, E)
    return p, apart.softmax(-1).mean(0)


@lookalike()
def probabilities_read_elsewhere(m: Balanced, z: Tensor, ids: Tensor) -> object:
    p = z.softmax(-1)
    return p.mean(0), p


@lookalike()
def logsumexp_read_elsewhere(m: Balanced, z: Tensor, ids: Tensor) -> object:
    lse = z.logsumexp(-1)
    return lse.square().mean(), z - lse[:, None]


@lookalike()
def logits_overwritten_before_the_loss(m: Balanced, z: Tensor, ids: Tensor) -> object:
    z.mul_(0.5)
    return z.softmax(-1).mean(0), z.logsumexp(-1).square().mean()


@lookalike()
def logits_overwritten_after_the_loss(m: Balanced, z: Tensor, ids: Tensor) -> object:
    p = z.clone().softmax(-1).mean(0)
    z.add_(1.0)
    return p, z.sum()


@lookalike()
def the_sum_overwritten(m: Balanced, z: Tensor, ids: Tensor) -> object:
    p = z.softmax(-1).sum(0)
    p[0] = 0.0
    return p


@lookalike()
def a_view_of_the_sum_overwritten(m: Balanced, z: Tensor, ids: Tensor) -> object:
    p = z.softmax(-1).sum(0)
    p.unsqueeze(0).mul_(2.0)
    return p


@lookalike()
def probabilities_overwritten(m: Balanced, z: Tensor, ids: Tensor) -> object:
    p = z.softmax(-1).clone()
    p[0] = 0.0
    return p.mean(0)


@lookalike()
def choices_alone(m: Balanced, z: Tensor, ids: Tensor) -> object:
    return F.one_hot(ids, E).sum((0, 1)), z.sum()


@lookalike()
def another_top_k(m: Balanced, z: Tensor, ids: Tensor) -> object:
    p = z.softmax(-1)
    return switch(torch.histc(p.topk(K + 1).indices.flatten().float(), E, 0, E), p.mean(0))


@lookalike()
def the_best_chosen_again(m: Balanced, z: Tensor, ids: Tensor) -> object:
    p = z.softmax(-1)
    return switch(F.one_hot(p.argmax(-1), E).float().mean(0), p.mean(0))


@lookalike()
def the_top_k_of_rounded_probabilities(m: Balanced, z: Tensor, ids: Tensor) -> object:
    p = z.softmax(-1).to(torch.float16)
    return switch(F.one_hot(p.topk(K).indices, E).sum((0, 1)), p.mean(0))


@lookalike()
def the_least_probable(m: Balanced, z: Tensor, ids: Tensor) -> object:
    p = z.softmax(-1)
    return switch(F.one_hot(p.topk(K, largest=False).indices, E).sum((0, 1)), p.mean(0))


@lookalike(router="sigmoid")
def another_rule_than_the_routers(m: Balanced, z: Tensor, ids: Tensor) -> object:
    p = z.softmax(-1)
    return switch(F.one_hot(p.topk(K).indices, E).sum((0, 1)), p.mean(0))


@lookalike(PROBABILITIES)
def choices_by_slot(m: Balanced, z: Tensor, ids: Tensor) -> object:
    return (F.one_hot(ids, E).float().mean(0) * z.softmax(-1).mean(0)).sum()


@lookalike(PROBABILITIES)
def choices_of_each_token(m: Balanced, z: Tensor, ids: Tensor) -> object:
    return F.one_hot(ids, E).sum(1), z.softmax(-1).mean(0)


@lookalike(PROBABILITIES)
def one_class_too_many(m: Balanced, z: Tensor, ids: Tensor) -> object:
    return F.one_hot(ids, E + 1).sum((0, 1)), z.softmax(-1).mean(0)


@lookalike(PROBABILITIES)
def ids_shifted(m: Balanced, z: Tensor, ids: Tensor) -> object:
    return F.one_hot((ids + 1) % E, E).sum((0, 1)), z.softmax(-1).mean(0)


@lookalike(PROBABILITIES)
def ids_clamped(m: Balanced, z: Tensor, ids: Tensor) -> object:
    return torch.histc(ids.clamp(0, 2).flatten().float(), E, 0, E), z.softmax(-1).mean(0)


@lookalike(PROBABILITIES)
def bins_that_do_not_fit(m: Balanced, z: Tensor, ids: Tensor) -> object:
    return torch.histc(ids.flatten().float(), E, 0, E + 1), torch.histc(ids.flatten().float(), E, 1, E), z.softmax(-1).mean(0)


@lookalike(PROBABILITIES)
def a_view_made_before_they_were_counted(m: Balanced, z: Tensor, ids: Tensor) -> object:
    flat, f = ids.flatten(), torch.zeros(E, dtype=torch.int64)
    seen = f.view(2, -1)
    f.scatter_add_(0, flat, torch.ones_like(flat))
    return f.float(), seen, z.softmax(-1).mean(0)


@lookalike(PROBABILITIES)
def the_first_choice_alone(m: Balanced, z: Tensor, ids: Tensor) -> object:
    return F.one_hot(ids[:, 0], E).sum(0), z.softmax(-1).mean(0)


@lookalike(PROBABILITIES)
def means_cut_off(m: Balanced, z: Tensor, ids: Tensor) -> object:
    return F.one_hot(ids, E).float().mean(1).to(torch.int64).sum(0), z.softmax(-1).mean(0)


@lookalike(PROBABILITIES)
def choices_counted_in_half(m: Balanced, z: Tensor, ids: Tensor) -> object:
    ones = torch.ones(ids.numel(), dtype=BF16)
    scattered = torch.zeros(E, dtype=BF16).scatter_add_(0, ids.flatten(), ones)
    return F.one_hot(ids, E).to(BF16).mean((0, 1)), scattered, z.softmax(-1).mean(0)

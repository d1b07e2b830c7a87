"""A whole MoE layer from a recipe: router, experts, shared experts, what it returns, and what happens around it."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tests.models import spelling as write
from tests.models.activations import GATED
from tests.models.experts import FORMS, Experts
from tests.models.layouts import LAYOUTS
from tests.models.routers import Router, RouterParts
from tests.models.spelling import Spelling

SHARED = ("", "mlp", "gated", "half")
RETURNS = ("y", "logits", "all", "loss", "counts")
WRITES = ("write_x_later", "write_out_later")
AROUND = ("", "write_x_later", "write_out_later", "checkpoint", "autocast", "residual", "norm", "relu_out")


@dataclass(frozen=True)
class Recipe:
    """What a module is made of. ValueError on parts that do not go together.

    sizes    E, K, H, F;  shape: of x without H
    shared   "", "mlp" (added), "gated" (times a sigmoid), "half" ((routed + shared) / 2)
    returns  "y", or y with "logits", "all" (logits, weights, ids), "loss" (balancing loss), "counts" (tokens per expert)
    around   what the surrounding code does: see AROUND
    sentinels   expert 0 lives elsewhere: its ids become E and their weights 0
    """

    form: str = "grouped"
    layout: str = "rows"
    activation: str = "swiglu"
    router: RouterParts = field(default_factory=RouterParts)
    sizes: tuple[int, int, int, int] = (4, 2, 16, 24)
    shape: tuple[int, ...] = (2, 5)
    bias: bool = False
    dtype: torch.dtype = torch.float32
    combine: str = ""
    on_input: bool = False
    shared: str = ""
    returns: str = "y"
    around: str = ""
    sentinels: bool = False
    spelling: Spelling = field(default_factory=Spelling)

    def __post_init__(self) -> None:
        form, (E, K, _, _) = FORMS[self.form], self.sizes
        for name, value, known in (
            ("layout", self.layout, form.layouts),
            ("shared", self.shared, SHARED),
            ("returns", self.returns, RETURNS),
            ("around", self.around, AROUND),
        ):
            if value not in known:
                raise ValueError(f"{name} {value!r} does not go with form {self.form!r}: needs one of {known}")
        if not self.combine:
            object.__setattr__(self, "combine", form.combines[0])
        if self.combine not in form.combines:
            raise ValueError(f"combine {self.combine!r} does not go with form {self.form!r}: needs one of {form.combines}")
        if (self.on_input and not form.on_input) or (self.sentinels and not form.sentinels):
            raise ValueError(f"form {self.form!r} has no weight on the input, or no sentinels")
        if LAYOUTS[self.layout].interleaved and self.activation not in GATED:
            raise ValueError(f"layout {self.layout!r} interleaves gate and up: activation {self.activation!r} has no gate")
        if not 1 <= K <= E or (self.router.groups and (E % 2 or E < 4 or K > E // 2)):
            raise ValueError(f"top-{K} of {E} experts" + " in two groups" * bool(self.router.groups) + " is impossible")
        if self.router.select != "topk" and K != 1:
            raise ValueError(f"router selects by {self.router.select}: top_k is {K}, needs 1")

    def __str__(self) -> str:
        default = Recipe()
        said = []
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if f.name == "form" or (value != getattr(default, f.name) and value and f.name != "spelling"):
                said.append(f"{f.name}={str(value).removeprefix('torch.').replace(' ', '')}")
        return " ".join([*said, f"spelling={self.spelling}"])

    @property
    def adds_at_zero(self) -> bool:
        """Dense form, weight on the input, a bias: an expert that was not chosen still adds its biases. Not an MoE layer."""
        return self.form == "dense" and self.on_input and self.bias

    def make(self, seed: int = 0) -> MoE:
        torch.manual_seed(seed)
        return MoE(self)

    def inputs(self, module: MoE, seed: int = 1) -> Tensor:
        """x of `shape`, whose rows choose the same experts in the order of the same scores under any small rounding."""
        generator = torch.Generator().manual_seed(seed)
        count = torch.Size(self.shape).numel()
        found: list[Tensor] = []
        for _ in range(50):
            rows = torch.randn(4 * count + 8, self.sizes[2], generator=generator).to(self.dtype)
            found.append(rows[module.steady(rows)])
            if sum(map(len, found)) >= count:
                return torch.cat(found)[:count].view(*self.shape, -1)
        raise ValueError(f"no rows without ties for {self}")


class Shared(nn.Module):
    """A dense gated MLP beside the routed experts."""

    def __init__(self, H: int, inner: int, gated: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.up = nn.Linear(H, 2 * inner, bias=False, dtype=dtype)
        self.down = nn.Linear(inner, H, bias=False, dtype=dtype)
        self.gate = nn.Linear(H, 1, bias=False, dtype=dtype) if gated else None

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.up(x).chunk(2, -1)
        y: Tensor = self.down(F.silu(gate) * up)
        return y if self.gate is None else y * torch.sigmoid(self.gate(x))


class MoE(nn.Module):
    """The layer of a recipe, and the code around it."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = r = recipe
        E, K, H, inner = r.sizes
        self.router = Router(r.router, r.spelling, H, E, K, r.dtype)
        self.experts = Experts(
            r.form, r.layout, r.activation, (E, H, inner), r.bias, r.dtype, r.spelling, r.combine, r.on_input, r.sentinels
        )
        self.shared = Shared(H, inner, r.shared == "gated", r.dtype) if r.shared else None
        self.norm = nn.RMSNorm(H, dtype=r.dtype) if r.around == "norm" else None
        if r.around in WRITES:
            self.router.requires_grad_(False)  # else its matmul needs x as it was, and eager itself cannot be trained

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        around = self.recipe.around
        if around == "checkpoint":
            outputs: tuple[Tensor, ...] = checkpoint(self.layer, x, use_reentrant=False)
            return outputs
        if around == "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                return self.layer(x)
        if around == "residual":
            y, *rest = self.layer(x)
            return (x + y, *rest)
        if around == "norm":
            assert self.norm is not None
            y, *rest = self.layer(self.norm(x))
            return (x + y, *rest)
        if around == "relu_out":
            y, *rest = self.layer(torch.tanh(x))
            return (y.relu(), *rest)
        if around == "write_x_later":
            h = x * 1.0
            y, *rest = self.layer(h)
            h.add_(1.0)
            return (y + h, *rest)
        if around == "write_out_later":
            h = x * 1.0
            y, *rest = self.layer(h)
            h.copy_(y)
            y = y * 2.0
            return (y + h, *rest)
        return self.layer(x)

    def layer(self, x: Tensor) -> tuple[Tensor, ...]:
        r = self.recipe
        rows = write.rows(r.spelling, x)
        logits, weights, ids = self.router(rows)
        local_ids, local_weights = ids, weights
        if r.sentinels:
            elsewhere = ids == 0
            local_ids = ids.masked_fill(elsewhere, r.sizes[0])
            local_weights = weights.masked_fill(elsewhere, 0.0)
        y = self.experts(rows, local_ids, local_weights)
        if self.shared is not None:
            y = y + self.shared(rows)
            if r.shared == "half":
                y = y / 2
        y = y.view(x.shape)
        if r.returns == "logits":
            return y, logits
        if r.returns == "all":
            return y, logits, weights, ids
        if r.returns == "loss":
            return y, self.balancing_loss(logits, ids)
        if r.returns == "counts":
            return y, F.one_hot(ids, r.sizes[0]).sum((0, 1))
        return (y,)

    def balancing_loss(self, logits: Tensor, ids: Tensor) -> Tensor:
        """Share of the pairs times mean probability, summed over experts, times E."""
        E = self.recipe.sizes[0]
        share = F.one_hot(ids, E).to(logits.dtype).mean((0, 1))
        return E * (share * F.softmax(logits, -1).mean(0)).sum()

    @torch.no_grad()
    def steady(self, rows: Tensor) -> Tensor:
        """Which rows [T,H] choose the same ids, in the same order, in float64, as they are, and slightly perturbed."""
        eps = torch.finfo(torch.bfloat16 if self.recipe.around == "autocast" else rows.dtype).eps
        exact = in_float64(self).router
        want = exact(rows.double())[2]
        same = (want == self.router(rows)[2]).all(-1)
        noise = torch.Generator().manual_seed(0)
        near = rows.double() * (1 + 4 * eps * torch.randn(24, *rows.shape, generator=noise))
        return same & (exact(near.flatten(0, 1))[2].view(24, *want.shape) == want).all(-1).all(0)


def plain(m: Experts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """What every form means, expert by expert: the oracle, in x's dtype."""
    E, out = m.E, torch.zeros_like(x)
    for e in range(E):
        token, slot = torch.where(ids == e)
        w, rows = weights[token, slot, None], x[token]
        y = m.mlp(e, rows * w) if m.on_input else m.mlp(e, rows) * w
        out = out.index_add(0, token, y)
    return out


class PlainExperts(Experts):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return plain(self, x, ids, weights)


def in_float64(module: MoE) -> MoE:
    """A copy that computes the same in float64, its experts in the plain form (where that is what they mean)."""
    exact = copy.deepcopy(module).double()
    if module.recipe.dtype != torch.float64:  # there float32 in the router is part of what the module computes
        exact.router.wide = torch.float64
    exact.recipe = dataclasses.replace(exact.recipe, around="" if exact.recipe.around == "autocast" else exact.recipe.around)
    if not exact.recipe.adds_at_zero:
        exact.experts.__class__ = PlainExperts
    return exact

"""One case from one seed: a recipe of parts that go together, spelled at random, and how it is run."""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass

import torch

from tests.models import spelling
from tests.models.activations import GATED, PLAIN
from tests.models.experts import FORMS
from tests.models.layer import AROUND, RETURNS, SHARED, Recipe
from tests.models.layouts import LAYOUTS
from tests.models.routers import RouterParts

DTYPES = (torch.float32,) * 5 + (torch.bfloat16,) * 3 + (torch.float16, torch.float64)
FROZEN = ("",) * 6 + ("router", "experts", "all")


@dataclass(frozen=True)
class Case:
    """A module and how it is compiled and run.

    train      gradients are compared too
    dynamic    compiled with symbolic sizes, run with a second token count as well
    frozen     which parameters need no gradient: "", "router", "experts" or "all"
    expanded   the incoming gradients are expanded, as `.sum().backward()` makes them
    inner      what compiles the rest of the graph
    """

    seed: int
    recipe: Recipe
    train: bool
    dynamic: bool
    frozen: str
    expanded: bool
    inner: str

    def __str__(self) -> str:
        how = ["train" if self.train else "eval", self.inner]
        how += ["dynamic"] * self.dynamic + [f"frozen={self.frozen}"] * bool(self.frozen) + ["expanded"] * self.expanded
        return f"{self.seed}: {self.recipe} [{' '.join(how)}]"

    def other_shape(self) -> Recipe:
        shape = self.recipe.shape
        return dataclasses.replace(self.recipe, shape=(*shape[:-1], shape[-1] + 3))


def draw(seed: int) -> Case:
    """The case of a seed. Parts that do not go together are drawn again."""
    rng = random.Random(seed)
    while True:
        try:
            recipe = _recipe(rng)
        except ValueError:
            continue
        break
    return Case(
        seed,
        recipe,
        train=rng.random() < 0.75,
        dynamic=rng.random() < 0.25,
        frozen=rng.choice(FROZEN),
        expanded=rng.random() < 0.25,
        inner="aot_eager" if rng.random() < 0.08 else "eager",
    )


def _recipe(rng: random.Random) -> Recipe:
    form = rng.choice(tuple(FORMS))
    f = FORMS[form]
    layout = rng.choice(f.layouts)
    gated = LAYOUTS[layout].interleaved or rng.random() < 0.75
    experts = rng.choice((1, 2, 3, 4, 4)) if f.nonzero else rng.choice((1, 2, 3, 4, 5, 8, 8))
    k = min(experts, rng.choice((1, 1, 2, 2, 2, 3, 4)))
    hidden, inner = rng.choice((8, 16, 24, 13)), rng.choice((8, 16, 24, 7))
    parts = _router(rng, experts, k)
    around = rng.choice(AROUND) if rng.random() < 0.4 else ""
    dtype = rng.choice(DTYPES) if around != "autocast" else torch.float32
    return Recipe(
        form=form,
        layout=layout,
        activation=rng.choice(tuple(GATED if gated else PLAIN)),
        router=parts,
        sizes=(experts, k, hidden, inner),
        shape=rng.choice(((2, 5), (7,), (1, 3), (3, 4), (1,), (2, 2), (k,), (experts,))),
        bias=rng.random() < 0.3,
        dtype=dtype,
        combine=rng.choice(f.combines),
        on_input=f.on_input and rng.random() < 0.15,
        shared=rng.choice(SHARED) if rng.random() < 0.3 else "",
        returns=rng.choice(RETURNS) if rng.random() < 0.4 else "y",
        around=around,
        sentinels=f.sentinels and rng.random() < 0.2,
        spelling=spelling.draw(rng),
    )


def _router(rng: random.Random, experts: int, k: int) -> RouterParts:
    score = rng.choice(("softmax", "softmax", "sigmoid", "sqrtsoftplus", "identity"))
    after = rng.choice(("softmax", "softmax", "sigmoid")) if score == "identity" else ""
    bias = rng.random() < 0.35
    groups = rng.choice(("max", "top2")) if experts >= 4 and experts % 2 == 0 and k <= experts // 2 and rng.random() < 0.25 else ""
    return RouterParts(
        score=score,
        after=after,
        cast=rng.choice(("none", "logits", "inputs")),
        bias=bias,
        linear_bias=rng.random() < 0.15,
        groups=groups,
        fill=0.0 if score == "softmax" and not bias and rng.random() < 0.5 else float("-inf"),
        weights="gather" if bias and rng.random() < 0.8 else rng.choice(("values", "gather")),
        normalise=rng.choice(("", "plain", "plain", "eps", "clamp")) if score != "identity" else "",
        scale=rng.choice((1.0, 1.0, 2.5)),
        back=rng.random() < 0.7,
        select=rng.choice(("topk", "topk", "argmax", "max")) if k == 1 else "topk",
        expert_scale=rng.random() < 0.08,
    )

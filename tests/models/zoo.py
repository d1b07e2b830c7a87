"""The registry: every part once in its usual company, and what the backend must make of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from tests.models.activations import ACTIVATIONS, GATED
from tests.models.experts import FORMS
from tests.models.layer import AROUND, RETURNS, SHARED, Recipe
from tests.models.layouts import LAYOUTS
from tests.models.routers import ROUTERS
from tests.models.spelling import CHOICES, Spelling

BF16, F16 = torch.bfloat16, torch.float16


@dataclass(frozen=True)
class Example:
    """`expect`: "fused", "declined", or "either" (right numbers, and a reason where it is declined)."""

    name: str
    recipe: Recipe
    expect: str = "fused"

    def __str__(self) -> str:
        return self.name

    @property
    def router_expected(self) -> bool:
        return self.expect == "fused" and self.recipe.router.in_grammar and not self.recipe.sentinels


def _asked(recipe: Recipe) -> str:
    """What a recogniser must make of a recipe."""
    if recipe.adds_at_zero:
        return "declined"
    shared = recipe.layout == "expanded"  # experts that share weights may be declined: their gradients add up
    return "fused" if FORMS[recipe.form].asked and not shared else "either"


def _examples() -> Iterator[Example]:
    def one(name: str, recipe: Recipe) -> Example:
        return Example(name, recipe, _asked(recipe))

    for form, f in FORMS.items():
        for combine in f.combines:
            yield one(f"form-{form}" + f"-{combine}" * bool(combine), Recipe(form=form, combine=combine))
        yield one(f"form-{form}-bf16", Recipe(form=form, dtype=BF16))
        if f.on_input:
            yield one(f"form-{form}-on-input", Recipe(form=form, on_input=True))
        if f.sentinels:
            yield one(f"form-{form}-sentinels", Recipe(form=form, sentinels=True))
        yield one(f"form-{form}-bias", Recipe(form=form, bias=True))
    yield one("form-dense-on-input-bias", Recipe(form="dense", on_input=True, bias=True))
    for router, parts in ROUTERS.items():
        top_1 = parts.select != "topk"
        sizes = (8, 1 if top_1 else 2, 16, 24)
        yield one(f"router-{router}", Recipe(form="hf_grouped", router=parts, sizes=sizes))
        yield one(f"router-{router}-bf16", Recipe(form="batched", router=parts, sizes=sizes, dtype=BF16))
    for layout in LAYOUTS:
        form = next(n for n in ("grouped", "loop_where") if layout in FORMS[n].layouts)
        yield one(f"layout-{layout}", Recipe(form=form, layout=layout))
        yield one(f"layout-{layout}-bias-bf16", Recipe(form=form, layout=layout, bias=True, dtype=BF16))
        if layout in FORMS["batched"].layouts:
            yield one(f"layout-{layout}-batched", Recipe(form="batched", layout=layout))
            yield one(f"layout-{layout}-loop", Recipe(form="loop_where", layout=layout))
    for activation in ACTIVATIONS:
        yield one(f"activation-{activation}", Recipe(form="hf_grouped", activation=activation))
    yield one("activation-gpt_oss-layout", Recipe("hf_grouped", "transposed_interleaved", "gpt_oss", bias=True))
    for shared in SHARED[1:]:
        yield one(f"shared-{shared}", Recipe(form="hf_grouped", shared=shared))
    for returns in RETURNS[1:]:
        yield one(f"returns-{returns}", Recipe(form="hf_grouped", returns=returns))
    for around in AROUND[1:]:
        yield one(f"around-{around}", Recipe(form="hf_grouped", around=around))
        yield one(f"around-{around}-loop", Recipe(form="loop_where", around=around))
    for dtype in (F16, torch.float64):
        yield one(f"dtype-{str(dtype)[6:]}", Recipe(form="hf_batched", dtype=dtype))
    for sizes in ((1, 1, 16, 24), (4, 4, 16, 24), (4, 1, 16, 24), (7, 3, 17, 13), (16, 4, 8, 5)):
        yield one(f"sizes-{'-'.join(map(str, sizes))}", Recipe(form="grouped", sizes=sizes))
        yield one(f"sizes-{'-'.join(map(str, sizes))}-batched", Recipe(form="hf_batched", sizes=sizes))
    for step, choices in CHOICES.items():
        for choice in choices[1:]:
            spelling = dataclasses.replace(Spelling(), **{step: choice})
            router = ROUTERS["R3"] if step in ("sigmoid", "pick") else ROUTERS["R1_normalised"]
            recipe = Recipe(form="grouped", router=router, spelling=spelling)
            if step == "blank":
                recipe = dataclasses.replace(recipe, form="loop_where", combine="")
            yield one(f"spelling-{step}-{choice}", recipe)
    yield one("everything", Recipe("grouped", "flat", "geglu", ROUTERS["R3g"], (8, 3, 24, 20), shared="gated", returns="all"))
    assert set(GATED) < set(ACTIVATIONS)


ALL: list[Example] = list(_examples())

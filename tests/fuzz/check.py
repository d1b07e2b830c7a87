"""One case compiled and compared: its verdict."""

from __future__ import annotations

import traceback
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from tests.fuzz.draw import Case, draw
from tests.models import outcome
from tests.models.experts import FORMS
from tests.models.layer import MoE, Recipe, in_float64
from tests.models.numbers import Numbers, run, wrong


@dataclass(frozen=True)
class Verdict:
    """kind: "fused", "declined", "unseen" (not even a near miss), "impossible" (eager, or torch.compile
    without this backend, cannot run it either), "wrong" or "crash".

    asked: a recogniser must be able to fuse this form. router: the router was fused. detail: the reason, or what is wrong.
    """

    kind: str
    case: Case
    detail: str = ""
    router: bool = False
    trace: str = ""

    @property
    def failed(self) -> bool:
        return self.kind in ("wrong", "crash") or (self.kind == "unseen" and self.asked and not self.degenerate)

    @property
    def degenerate(self) -> bool:
        """One token, one expert or one slot: an index space is missing, and a layer need not be told from a dense one."""
        return 1 in (*self.case.recipe.sizes[:2], torch.Size(self.case.recipe.shape).numel())

    @property
    def asked(self) -> bool:
        return FORMS[self.case.recipe.form].asked and not self.case.recipe.adds_at_zero

    def __str__(self) -> str:
        return f"{self.kind} {self.case}" + f"\n    {self.detail}" * bool(self.detail)


@dataclass
class Tally:
    """Verdicts counted; reasons of what was declined, most frequent first."""

    verdicts: list[Verdict] = field(default_factory=list)

    def count(self, kind: str, asked: bool = False) -> int:
        return sum(v.kind == kind and (v.asked or not asked) for v in self.verdicts)

    @property
    def failures(self) -> list[Verdict]:
        return [v for v in self.verdicts if v.failed]

    @property
    def fused_share(self) -> float:
        """Of the cases whose form must be recognised."""
        fused, declined = self.count("fused", asked=True), self.count("declined", asked=True)
        return fused / max(1, fused + declined)

    @property
    def router_share(self) -> float:
        """Of the fused cases whose router is of the grammar."""
        recipes = [(v, v.case.recipe) for v in self.verdicts if v.kind == "fused"]
        fused = [v for v, recipe in recipes if recipe.router.in_grammar and not recipe.sentinels]
        return sum(v.router for v in fused) / max(1, len(fused))

    def __str__(self) -> str:
        kinds = ", ".join(f"{self.count(k)} {k}" for k in ("fused", "declined", "unseen", "impossible", "wrong", "crash"))
        return f"{len(self.verdicts)} cases: {kinds}" + (
            f"; {self.fused_share:.1%} of asked forms fused, {self.router_share:.1%} of their routers"
        )

    def reasons(self) -> list[tuple[int, str, int]]:
        """(how often, reason, one seed) of what was declined although asked for."""
        found: dict[str, list[int]] = {}
        for v in self.verdicts:
            if v.kind == "declined" and v.asked:
                found.setdefault(v.detail, []).append(v.case.seed)
        return sorted(((len(seeds), reason, seeds[0]) for reason, seeds in found.items()), reverse=True)


def check(seed: int) -> Verdict:
    """The verdict on the case of that seed.

    The gradient of a clamp jumps at its bound: in 16 bits a value may lie on the one side, exactly on the other.  Where such a
    gradient is off, the same case in float32 decides.  Where a case crashes that crashes too as torch alone compiles it, it is
    no case.
    """
    case = draw(seed)
    found = _check(case)
    narrow = case.recipe.around == "autocast" or case.recipe.dtype in (torch.bfloat16, torch.float16)
    if found.kind == "wrong" and narrow and _kinked(case.recipe.activation) and found.detail.startswith("gradient"):
        around = "" if case.recipe.around == "autocast" else case.recipe.around
        return _check(replace(case, recipe=replace(case.recipe, dtype=torch.float32, around=around)))
    if found.kind == "crash":
        fails = _torch_alone(case)
        return Verdict("impossible", case, fails) if fails else found
    return found


def _kinked(activation: str) -> bool:
    return "clamped" in activation or activation == "gpt_oss"


def _torch_alone(case: Case) -> str:
    """How the case fails without this backend, or nothing."""
    made = _make(case)
    if isinstance(made, Verdict):
        return made.detail
    module, inputs, _ = made
    torch._dynamo.reset()
    try:
        call = torch.compile(module, backend=case.inner, dynamic=case.dynamic)
        for x in inputs:
            run(call, module, [x], case.train, case.expanded)
    except Exception as e:
        return f"{type(e).__name__}: {str(e)[:200]}"
    return ""


def _check(case: Case) -> Verdict:
    made = _make(case)
    if isinstance(made, Verdict):
        return made
    module, inputs, eager = made
    exact = in_float64(module)
    recipe = case.recipe
    coarsest = {torch.float64: torch.float32}.get(recipe.dtype, recipe.dtype)  # routers go through float32
    eps = float(torch.finfo(torch.bfloat16 if recipe.around == "autocast" else coarsest).eps)
    try:
        call = outcome.compiled(module, case.inner, dynamic=case.dynamic)
        for x, theirs in zip(inputs, eager, strict=True):
            truth = run(exact, exact, [x.double()], case.train, case.expanded)
            difference = wrong(run(call, module, [x], case.train, case.expanded), theirs, truth, eps)
            if difference:
                return Verdict("wrong", case, difference)
        layers = outcome.layers()
    except Exception as e:
        return Verdict("crash", case, f"{type(e).__name__}: {str(e)[:500]}", trace=traceback.format_exc())
    if not layers:
        return Verdict("unseen", case)
    if all(layer.fused for layer in layers):
        return Verdict("fused", case, "", layers[0].router)
    reasons = [layer.reason for layer in layers if not layer.fused]
    return Verdict("declined", case, reasons[0]) if all(reasons) else Verdict("crash", case, "declined without a reason")


def _make(case: Case) -> Verdict | tuple[MoE, list[Tensor], list[Numbers]]:
    """The module, its inputs and eager's numbers; or that eager cannot run it."""
    module = case.recipe.make(case.seed)
    if case.frozen:
        for name, p in module.named_parameters():
            p.requires_grad_(p.requires_grad and case.frozen != "all" and not name.startswith(case.frozen))
    recipes: list[Recipe] = [case.recipe, case.other_shape()] if case.dynamic else [case.recipe]
    try:
        inputs = [recipe.inputs(module, case.seed) for recipe in recipes]
        return module, inputs, [run(module, module, [x], case.train, case.expanded) for x in inputs]
    except (RuntimeError, ValueError, NotImplementedError) as e:
        return Verdict("impossible", case, f"{type(e).__name__}: {str(e)[:200]}")

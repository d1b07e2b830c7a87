"""Choosing without the GPU: the best candidate by the floor model that the compiler makes without spills.

What is chosen holds for the architecture it was compiled for.  That it compiles well is known, that it is fast is not.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from moecompile.analysis.machine import Machine
from moecompile.autotune.candidates import candidates, closed_form, estimate, target_of
from moecompile.autotune.entry import Compiled
from moecompile.autotune.key import Problem, spec_of, versions
from moecompile.codegen import gpu_offline, gpu_text, gpu_weights
from moecompile.codegen.gpu_choose import Target
from moecompile.codegen.gpu_load import load
from moecompile.errors import BuildError
from moecompile.ir.spec import ExpertsSpec
from moecompile.kernels.gpu.config import YOUNGER, Config

WORTH = 1.1  # the estimate orders candidates, it knows no more: a smaller gain is none

FORMS: dict[str, tuple[dict[str, Any], ...]] = {  # each in which a family is used on stacked weights
    "up": ({"train": False}, {"train": True}),
    "down": ({},),
    "decode_up": ({},),
    "decode_down": ({},),
    "grad_z": ({"need_y": True, "parts": True},),
    "grad_rows": ({"parts": False},),
    "grad_matrix": ({"which": "w", "into": ""}, {"which": "d", "into": ""}),
}


def chosen(problem: Problem, machine: Machine) -> Compiled | None:
    """The first in `ranked` that compiles for the machine in every form; None where none does, or the family is not compiled."""
    if problem.kernel not in FORMS:
        return None
    for config in ranked(problem, machine):
        built = compiled(problem, config, target_of(machine))
        if built is not None:
            registers, shared = built
            return Compiled(problem, machine.arch, machine.name, versions()["triton"], config, registers, shared)
    return None


def ranked(problem: Problem, machine: Machine) -> list[Config]:
    """The candidates with the closed form's height of row tiles, which kernels share, and of its form (a form is for measuring
    to choose): those that the estimate finds better by WORTH and more, in their order, then the closed form, then the rest."""
    first, *others = candidates(problem, machine, closed_form(problem, target_of(machine)).block_m)
    others = [c for c in others if all(getattr(c, axis) == getattr(first, axis) for axis in YOUNGER)]
    usual = estimate(problem, first, machine)
    better = [c for c in others if estimate(problem, c, machine) * WORTH < usual]
    return [*better, first, *(c for c in others if c not in better)]


def compiled(problem: Problem, config: Config, target: Target) -> tuple[int, int] | None:
    """The most registers a thread and bytes of shared memory of any form; None where one does not fit."""
    found = []
    for kernel, spec in _kernels(problem, config):
        try:
            built = gpu_offline.compile_for(kernel, problem.kernel, target, spec, gpu_weights.contiguous_layouts(spec))
        except BuildError:
            return None
        if built.spills or built.shared > target.shared_memory:
            return None
        found.append((built.registers, built.shared))
    return max(r for r, _ in found), max(s for _, s in found)


def _kernels(problem: Problem, config: Config) -> Iterator[tuple[Any, ExpertsSpec]]:
    spec = spec_of(problem)
    assert isinstance(spec, ExpertsSpec)
    layouts = gpu_weights.contiguous_layouts(spec)
    for form in FORMS[problem.kernel]:
        options = tuple(sorted(form.items()))
        text = gpu_text.experts_text(spec, layouts, problem.kernel, config, gpu_text.Style(), options)
        yield load(problem.kernel, config, text), spec

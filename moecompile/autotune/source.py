"""What a kernel runs with: a choice measured here, else one that ships with the package, else the closed form. Never measures."""

from __future__ import annotations

import pathlib
from functools import lru_cache

from moecompile.autotune import pack
from moecompile.autotune.candidates import closed_form
from moecompile.autotune.family import AXES, LEADER
from moecompile.autotune.key import Environment, Key, Problem, environment_of, problem_of
from moecompile.autotune.store import Store
from moecompile.codegen.gpu import set_config_source
from moecompile.codegen.gpu_choose import Target
from moecompile.ir.spec import ExpertsSpec, RouterSpec
from moecompile.kernels.gpu.config import Config

SHIPPED = pathlib.Path(__file__).parent  # packs named shipped_*.json


def install(store: Store | None = None) -> None:
    """From now on kernels ask the store (by default the user's) for their numbers."""
    kept = store or Store()

    def source(family: str, spec: ExpertsSpec | RouterSpec, tokens: int, target: Target) -> Config | None:
        if family not in AXES or target.backend == "cpu":
            return None
        problem = problem_of(family, spec, tokens)
        return None if problem is None else tuned(kept, Key(problem, environment_of(target)), target)

    set_config_source(source)


def tuned(store: Store, key: Key, target: Target) -> Config | None:
    """The configuration for the key; None where the closed form should run.

    Kernels that share their row tiles are tuned for one height of tile: a configuration of another height than the closed
    form's is used only where its partner has the same.
    """
    problem = key.problem
    found = _stored(store, key)
    if found is None or problem.kernel not in (*LEADER, *LEADER.values()):
        return found
    partner = LEADER.get(problem.kernel) or next(f for f, leader in LEADER.items() if leader == problem.kernel)
    other = _stored(store, Key(_of(partner, problem), key.environment))
    if other is not None and other.block_m == found.block_m:
        return found
    return found if found.block_m == closed_form(problem, target).block_m else None


def _of(kernel: str, problem: Problem) -> Problem:
    fields = {**vars(problem), "kernel": kernel}
    return Problem(**fields)


def _stored(store: Store, key: Key) -> Config | None:
    choice = store.choice(key)
    return choice.config if choice is not None else _shipped().get((key.problem, key.environment.arch, key.environment.sms))


@lru_cache(1)
def _shipped() -> dict[tuple[Problem, str, int], Config]:
    """What was measured on these GPUs and comes with the package, whatever the versions then were."""
    found = {}
    for path in sorted(SHIPPED.glob("shipped_*.json")):
        for choice in pack.read(path):
            where: Environment = choice.key.environment
            if where.timer == "device":
                found[choice.key.problem, where.arch, where.sms] = choice.config
    return found

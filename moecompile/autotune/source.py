"""What a kernel runs with: a choice measured here, else one that ships with the package, else the closed form. Never measures.

An imported pack comes before what ships when a shape is tuned, but runs only once it was measured here (pack.py).
"""

from __future__ import annotations

import pathlib
import warnings
from functools import lru_cache

from moecompile.analysis.machine import known
from moecompile.autotune import pack
from moecompile.autotune.candidates import closed_form
from moecompile.autotune.entry import Choice, Compiled, InPacks
from moecompile.autotune.family import AXES, LEADER
from moecompile.autotune.key import Key, Problem, environment_of, problem_of
from moecompile.autotune.store import Store, numbers
from moecompile.codegen.gpu import set_config_source
from moecompile.codegen.gpu_choose import Target
from moecompile.ir.spec import ExpertsSpec, RouterSpec
from moecompile.kernels.gpu.config import Config

SHIPPED = pathlib.Path(__file__).parent / "packs"  # made by `moecompile ship`, or exported where they were measured


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
    problem, device = key.problem, _device(target)
    found = _stored(store, key, device)
    if found is None or problem.kernel not in (*LEADER, *LEADER.values()):
        return found
    partner = LEADER.get(problem.kernel) or next(f for f, leader in LEADER.items() if leader == problem.kernel)
    other = _stored(store, Key(_of(partner, problem), key.environment), device)
    if other is not None and other.block_m == found.block_m:
        return found
    return found if found.block_m == closed_form(problem, target).block_m else None


def _device(target: Target) -> str:
    """The name under which the target's device is known, or nothing."""
    machine = known(target.name)
    return "" if machine is None else machine.name


def _of(kernel: str, problem: Problem) -> Problem:
    fields = {**vars(problem), "kernel": kernel}
    return Problem(**fields)


def _stored(store: Store, key: Key, device: str) -> Config | None:
    choice = store.choice(key)
    if choice is not None:
        return choice.config
    found = shipped(key, device)
    return None if found is None else found.config


def shipped(key: Key, device: str) -> InPacks | None:
    """What ships for the problem on this architecture: measured with as many SMs, whatever the versions then were; else
    compiled for the device of that name, else for another of the architecture."""
    found = _shipped().get(key.environment.arch, {}).get(key.problem, ())

    def rank(entry: InPacks) -> int:
        return 0 if isinstance(entry, Choice) else 1 if entry.device == device else 2

    serves = [e for e in found if isinstance(e, Compiled) or e.key.environment.sms == key.environment.sms]
    return min(serves, key=rank, default=None)


@lru_cache(1)
def _shipped() -> dict[str, dict[Problem, list[InPacks]]]:
    """All that ships, by architecture and problem. A pack that cannot be read is one warning, and as if it were not there."""
    found: dict[str, dict[Problem, list[InPacks]]] = {}
    for path in sorted(SHIPPED.glob("*.json")):
        try:
            entries = pack.read(path)
        except (OSError, ValueError) as error:
            warnings.warn(f"moecompile: a shipped tuning pack is left aside: {error}", stacklevel=2)
            continue
        for entry in entries:
            if isinstance(entry, Choice) and entry.key.environment.timer != "device":
                continue
            arch, problem = (
                (entry.arch, entry.problem) if isinstance(entry, Compiled) else (entry.key.environment.arch, entry.key.problem)
            )
            found.setdefault(arch, {}).setdefault(problem, []).append(entry)
    return found


def why(store: Store, key: Key, target: Target) -> str:
    """What runs for the key and why not something better, level by level, for people."""
    first = store.why(key)
    if first.startswith("hit"):
        return first
    proposal, found = store.proposal(key.problem), shipped(key, _device(target))
    imported = "none" if proposal is None else f"{numbers(proposal)}, which waits to be measured here"
    if found is not None:
        how = "measured elsewhere" if isinstance(found, Choice) else f"compiled for {found.device}, not measured"
        ships = f"{numbers(found.config)}, {how}"
    elif key.environment.arch not in _shipped():
        ships = f"nothing for {key.environment.arch}"
    else:
        ships = f"nothing for this shape on {key.environment.arch}"
    runs = tuned(store, key, target)
    last = "the shipped one" if runs is not None else f"the closed form, {numbers(closed_form(key.problem, target))}"
    return f"{first}; imported: {imported}; shipped: {ships}; runs: {last}"

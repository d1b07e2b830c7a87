"""Tuning of one problem: time the candidates until one is near the floor, the list ends or the budget is spent.

Each measurement is stored as it is made, so that a run that is killed goes on where it stopped.  At the end the best
configuration and the default are timed again, turn by turn, and the better one is stored as the choice.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from moecompile.analysis.machine import Machine
from moecompile.autotune import bucket
from moecompile.autotune.candidates import MOST, candidates, refusal, target_of
from moecompile.autotune.entry import Choice, Measurement
from moecompile.autotune.key import Key, Problem, environment_of
from moecompile.autotune.measure import DeviceLost, Refused, Timer
from moecompile.autotune.progress import Progress
from moecompile.autotune.store import Store
from moecompile.kernels.gpu.config import Config

ENOUGH = 0.95  # share of the floor at which no better configuration is looked for


class Budget:
    """Seconds to spend on a clock. It is kept by asking whether one more step as long as the longest so far still fits."""

    def __init__(self, seconds: float, clock: Callable[[], float]) -> None:
        if not seconds > 0:
            raise ValueError(f"budget: {seconds:g} s, needs more than 0")
        self._clock, self._end = clock, clock() + seconds
        self._longest = [0.0]  # shared with the parts of this budget

    def left(self) -> float:
        return self._end - self._clock()

    def part(self, of: int) -> Budget:
        """The first of `of` equal parts of what is left; what it does not spend stays in this one."""
        part = copy.copy(self)
        part._end = self._clock() + self.left() / of
        return part

    def allows(self, steps: int) -> bool:
        return self.left() > 0 and self.left() >= steps * self._longest[0]

    def spent(self, since: float) -> None:
        """A step that began at `since` on the clock has ended."""
        self._longest[0] = max(self._longest[0], self._clock() - since)


@dataclass(frozen=True)
class Outcome:
    """`choice` is None where the budget ended before a choice could be made. `measured` counts what this run timed, `stopped`
    is "floor", "list", "budget" or "stored"."""

    problem: Problem
    choice: Choice | None
    measured: int
    stopped: str
    floor: float


def label(problem: Problem) -> str:
    return f"{problem.kernel}, {bucket.name(problem.bucket)} rows per expert"


def tune(
    problem: Problem, machine: Machine, timer: Timer, store: Store, budget: Budget, progress: Progress, block_m: int | None = None
) -> Outcome:
    """Choose a configuration for the problem and store it. `block_m` fixes the rows of a tile."""
    return _Tuning(problem, machine, timer, store, budget, progress).run(block_m)


class _Tuning:
    def __init__(self, problem: Problem, machine: Machine, timer: Timer, store: Store, budget: Budget, progress: Progress) -> None:
        self.problem, self.timer, self.store, self.budget, self.progress = problem, timer, store, budget, progress
        self.machine = machine
        self.key = Key(problem, environment_of(target_of(machine), timer.kind))
        self.floor = timer.floor(problem)
        self.times: dict[Config, float] = {}
        self.measured = 0

    def run(self, block_m: int | None) -> Outcome:
        configs = self._candidates(block_m)
        known = self.store.measurements(self.key)
        stored = self.store.choice(self.key)
        if stored is not None and stored.config in configs and self._settled(stored, configs, known):
            self.progress.skip(MOST)
            return self._outcome(stored, "stored")
        stopped = self._measure_all(configs, known)
        self.progress.skip(MOST - self.measured)
        best = min(self.times, key=lambda c: self.times[c], default=None)
        if best is None or (best != configs[0] and not self.budget.allows(1)):
            return self._outcome(None, stopped)
        choice = self._better(best, configs[0])
        self.store.put(choice)
        return self._outcome(choice, stopped)

    def _settled(self, stored: Choice, configs: list[Config], known: Mapping[Config, Measurement]) -> bool:
        """Whether nothing is left to try."""
        return self.floor / stored.seconds >= ENOUGH or all(c in known for c in configs)

    def _candidates(self, block_m: int | None) -> list[Config]:
        """The default first; then what was imported, and the list, at most MOST together."""
        found = candidates(self.problem, self.machine, block_m)
        proposed = self.store.proposal(self.problem)
        fits = proposed is not None and refusal(self.problem, proposed, target_of(self.machine)) is None
        if proposed is not None and fits and proposed not in found and block_m in (None, proposed.block_m):
            found = [found[0], proposed, *found[1 : MOST - 1]]
        return found

    def _measure_all(self, configs: list[Config], known: Mapping[Config, Measurement]) -> str:
        for config in configs:
            if config in known and known[config].refused != "memory":  # there may be more of it today
                seconds = known[config].seconds
            elif self.budget.allows(2):  # this one, and the comparison at the end
                seconds = self._measure(config)
            else:
                return "budget"
            if seconds > 0:
                self.times[config] = seconds
                if self.floor / seconds >= ENOUGH:
                    return "floor"
        return "list"

    def _measure(self, config: Config) -> float:
        """Time and store one configuration; 0 if it was refused."""
        start, refused, seconds = self.timer.now(), "", 0.0
        try:
            seconds = self.timer.measure(self.problem, config)
        except Refused as error:
            refused = error.reason
        except DeviceLost:
            self.store.put(Measurement(self.key, config, 0.0, "launch"))  # so that the next run passes it by
            raise
        self.budget.spent(start)
        self.measured += 1
        self.store.put(Measurement(self.key, config, seconds, refused))
        best = min([s for s in (*self.times.values(), seconds) if s > 0], default=0.0)
        self.progress.step(label(self.problem), best, self.floor)
        return seconds

    def _better(self, best: Config, default: Config) -> Choice:
        if best == default or default not in self.times:
            return Choice(self.key, best, self.times[best], self.times.get(default, self.times[best]))
        start = self.timer.now()
        tuned_seconds, default_seconds = self.timer.versus(self.problem, best, default)
        self.budget.spent(start)
        if tuned_seconds < default_seconds:
            return Choice(self.key, best, tuned_seconds, default_seconds)
        return Choice(self.key, default, default_seconds, default_seconds)

    def _outcome(self, choice: Choice | None, stopped: str) -> Outcome:
        return Outcome(self.problem, choice, self.measured, stopped, self.floor)

"""Who times a configuration: what the tuner asks of a timer, and a simulated one."""

from __future__ import annotations

import time
from typing import Protocol

from moecompile.analysis.machine import Machine
from moecompile.autotune.candidates import estimate, floor_seconds
from moecompile.autotune.key import Problem, digest
from moecompile.kernels.gpu.config import Config


class Refused(Exception):
    """A configuration that has no time here. `reason` is one of entry.REFUSED."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class DeviceLost(Exception):
    """The configuration just tried left the device unusable for this process; it has been stored as refused."""


class Timer(Protocol):
    """What the tuner needs of a device. `kind` is one of key.TIMERS."""

    kind: str

    def now(self) -> float:
        """Seconds on the clock by which budgets are kept."""

    def floor(self, problem: Problem) -> float:
        """Least seconds of the problem's kernel under the routing that is timed."""

    def measure(self, problem: Problem, config: Config) -> float:
        """Median seconds of the problem's kernel. Refused where it does not run or gives wrong numbers."""

    def versus(self, problem: Problem, a: Config, b: Config) -> tuple[float, float]:
        """Median seconds of both, timed turn by turn."""


class Simulated:
    """Times by the estimate, off by up to a fifth either way but always the same; its clock moves only when it measures.

    `pace` seconds really pass at each measurement, for whoever wants to interrupt it.
    """

    kind = "simulated"
    build, rounds = 1.0, 0.1  # simulated seconds to compile a configuration, and to time it

    def __init__(self, machine: Machine, pace: float = 0.0) -> None:
        self.machine, self.pace = machine, pace
        self._now = 0.0
        self._built: set[tuple[Problem, Config]] = set()

    def now(self) -> float:
        return self._now

    def floor(self, problem: Problem) -> float:
        return floor_seconds(problem, self.machine)

    def measure(self, problem: Problem, config: Config) -> float:
        self._now += self.rounds + (0.0 if (problem, config) in self._built else self.build)
        self._built.add((problem, config))
        time.sleep(self.pace)
        if int(digest(config), 16) % 29 == 0:
            raise Refused("compile")
        off = int(digest(problem)[:6] + digest(config)[:6], 16) % 1000 / 1000
        return max(self.floor(problem) / 0.97, estimate(problem, config, self.machine) * (0.8 + 0.4 * off))

    def versus(self, problem: Problem, a: Config, b: Config) -> tuple[float, float]:
        return self.measure(problem, a), self.measure(problem, b)

"""Tuning on the simulated timer: the budget, the floor, the default, and what is stored."""

from __future__ import annotations

import io
import pathlib
from collections import Counter

import pytest

from moecompile.analysis.machine import MACHINES
from moecompile.autotune import family
from moecompile.autotune.candidates import MOST, candidates, closed_form, target_of
from moecompile.autotune.entry import Measurement, Proposal
from moecompile.autotune.key import Key, Problem, environment_of
from moecompile.autotune.measure import DeviceLost, Refused, Simulated
from moecompile.autotune.progress import Progress
from moecompile.autotune.store import Store
from moecompile.autotune.tuner import Budget, Outcome, tune
from moecompile.kernels.gpu.config import Config
from moecompile.tools.tune import tune_all

H200 = MACHINES["H200"]
PROBLEM = Problem("grad_matrix", "bfloat16", 2048, 768, 128, 8, 2048, 2, bucket=5)


class Scripted(Simulated):
    """A simulated timer whose times, by place in the list of candidates, are given; None is refused. Counts what it is asked."""

    def __init__(self, times: dict[int, float | None], other: float = 10.0, versus: tuple[float, float] | None = None) -> None:
        super().__init__(H200)
        self.calls: Counter[Config] = Counter()
        self.compared = 0
        self._versus = versus
        self._times = {c: times.get(i, other) for i, c in enumerate(candidates(PROBLEM, H200))}
        self._other = other

    def measure(self, problem: Problem, config: Config) -> float:
        self._now += 1.0
        self.calls[config] += 1
        floors = self._times.get(config, self._other)
        if floors is None:
            raise Refused("resources")
        return floors * self.floor(problem)

    def versus(self, problem: Problem, a: Config, b: Config) -> tuple[float, float]:
        self.compared += 1
        self._now += 1.0
        if self._versus:
            return self._versus
        return self._times[a] * self.floor(problem), self._times[b] * self.floor(problem)  # type: ignore[operator]


@pytest.fixture
def store(tmp_path: pathlib.Path) -> Store:
    return Store(tmp_path / "tuned")


def run(store: Store, timer: Simulated, budget: float = 1000.0, problem: Problem = PROBLEM) -> Outcome:
    return tune(problem, H200, timer, store, Budget(budget, timer.now), Progress(MOST, io.StringIO()))


def key(problem: Problem = PROBLEM) -> Key:
    return Key(problem, environment_of(target_of(H200), "simulated"))


def test_the_fastest_of_the_list_is_chosen_and_stored(store: Store) -> None:
    timer = Scripted({7: 2.0})
    outcome = run(store, timer)
    assert outcome.choice and outcome.choice.config == candidates(PROBLEM, H200)[7]
    assert outcome.stopped == "list" and outcome.measured == MOST
    assert outcome.choice.default_seconds == 10.0 * outcome.floor
    assert store.choice(key()) == outcome.choice
    assert len(store.measurements(key())) == MOST


def test_near_the_floor_no_more_is_tried(store: Store) -> None:
    timer = Scripted({3: 1 / 0.951})
    outcome = run(store, timer)
    assert outcome.stopped == "floor" and outcome.measured == 4


def test_just_off_the_floor_the_list_goes_on(store: Store) -> None:
    assert run(store, Scripted({3: 1 / 0.949})).measured == MOST


def test_tuned_against_default_the_better_is_kept(store: Store) -> None:
    """The first time of a configuration may have been luck."""
    timer = Scripted({7: 2.0}, versus=(3e-3, 1e-3))
    outcome = run(store, timer)
    assert timer.compared == 1
    assert outcome.choice and outcome.choice.config == candidates(PROBLEM, H200)[0]
    assert outcome.choice.seconds == 1e-3


def test_the_default_is_not_compared_with_itself(store: Store) -> None:
    timer = Scripted({0: 2.0})
    assert run(store, timer).choice and timer.compared == 0


@pytest.mark.parametrize("seconds", [0.5, 1.0, 2.0, 3.5, 6.0, 11.0])
def test_the_budget_is_kept(store: Store, seconds: float) -> None:
    """The first step has no earlier one to go by: a budget shorter than that is passed by no more than its length."""
    timer = Scripted({7: 2.0})
    outcome = run(store, timer, seconds)
    assert timer.now() <= max(seconds, 1.0)
    assert outcome.stopped == "budget" and outcome.measured >= 1


def test_what_the_budget_cut_short_is_gone_on_with(store: Store) -> None:
    first = Scripted({9: 2.0})
    cut = run(store, first, 6.0)
    assert cut.stopped == "budget" and 0 < cut.measured < MOST
    second = Scripted({9: 2.0})
    outcome = run(store, second)
    assert cut.measured + outcome.measured == MOST
    assert not first.calls.keys() & second.calls.keys()
    assert outcome.choice and outcome.choice.config == candidates(PROBLEM, H200)[9]


def test_a_second_run_measures_nothing(store: Store) -> None:
    first = run(store, Scripted({7: 2.0}))
    timer = Scripted({7: 2.0})
    second = run(store, timer)
    assert second.stopped == "stored" and second.choice == first.choice
    assert not timer.calls and timer.compared == 0


def test_refused_configurations_are_remembered(store: Store) -> None:
    run(store, Scripted({0: None, 1: None, 5: 2.0}), 100)
    refused = [m for m in store.measurements(key()).values() if m.refused]
    assert [m.refused for m in refused] == ["resources"] * 2
    (store.path / "choice-x.json").unlink(missing_ok=True)
    timer = Scripted({})
    run(store, timer)
    assert not timer.calls


def test_a_lost_device_ends_the_run_and_its_cause_is_passed_by(store: Store) -> None:
    class Fragile(Scripted):
        def measure(self, problem: Problem, config: Config) -> float:
            if config == candidates(PROBLEM, H200)[2]:
                raise DeviceLost("illegal memory access")
            return super().measure(problem, config)

    with pytest.raises(DeviceLost):
        run(store, Fragile({7: 2.0}))
    assert [m.refused for m in store.measurements(key()).values() if m.refused] == ["launch"]
    outcome = run(store, Fragile({7: 2.0}))
    assert outcome.stopped == "list" and outcome.measured == MOST - 3


def test_a_want_of_memory_is_not_held_against_a_configuration(store: Store) -> None:
    default = closed_form(PROBLEM, target_of(H200))
    store.put(Measurement(key(), default, 0.0, "memory"))
    timer = Scripted({0: 2.0})
    outcome = run(store, timer)
    assert timer.calls[default] == 1 and outcome.choice and outcome.choice.config == default


def test_where_nothing_runs_nothing_is_chosen(store: Store) -> None:
    outcome = run(store, Scripted(dict.fromkeys(range(MOST))))
    assert outcome.choice is None and outcome.measured == MOST
    assert store.choice(key()) is None


def test_an_imported_configuration_is_tried_second_and_only_then_trusted(store: Store) -> None:
    imported = Config(16, 32, 32, 4, 2, 8)
    assert imported not in candidates(PROBLEM, H200)
    store.put(Proposal(key(), imported))
    assert store.choice(key()) is None
    timer = Scripted({})
    outcome = run(store, timer)
    assert list(timer.calls)[1] == imported and outcome.measured == MOST
    assert outcome.choice and outcome.choice.config != imported, "it was no faster here"


@pytest.mark.parametrize(("height", "tried"), [(16, True), (64, False)])
def test_an_imported_configuration_of_another_row_height_is_not_tried(store: Store, height: int, tried: bool) -> None:
    down = Problem("down", "bfloat16", 2048, 768, 128, 8, 2048, 2, bucket=3)
    imported = Config(16, 32, 32, 4, 2, 8)
    store.put(Proposal(key(down), imported))
    timer = LikesOtherHeights(H200)
    tune(down, H200, timer, store, Budget(1e6, timer.now), Progress(MOST, io.StringIO()), height)
    measured = store.measurements(key(down))
    assert (imported in measured) is tried
    assert {config.block_m for config in measured} == {height}


def test_a_store_that_cannot_be_written_does_not_stop_a_run(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "put", lambda item: False)
    assert run(store, Scripted({7: 2.0})).choice


def test_real_and_simulated_times_do_not_mix(store: Store) -> None:
    real = Key(PROBLEM, environment_of(target_of(H200), "device"))
    store.put(Measurement(real, closed_form(PROBLEM, target_of(H200)), 1e-6, ""))
    timer = Scripted({7: 2.0})
    assert run(store, timer).measured == MOST
    assert store.choice(real) is None


class LikesOtherHeights(Simulated):
    """Leaders run faster the further their row tiles are from the closed form's height."""

    def measure(self, problem: Problem, config: Config) -> float:
        usual = closed_form(problem, target_of(H200)).block_m
        return self.floor(problem) * (2.0 if problem.kernel in family.LEADER or config.block_m == usual else 1.5)


def test_partners_share_the_height_of_their_row_tiles(store: Store) -> None:
    problems = [Problem(k, "bfloat16", 2048, 768, 128, 8, 2048, 2, bucket=b) for b in range(1, 7) for k in family.GROUPED]
    timer = LikesOtherHeights(H200)
    found = {o.problem: o.choice for o in tune_all(problems, H200, timer, store, Budget(1e6, timer.now))}
    heights = set()
    for one, choice in found.items():
        if one.kernel in family.LEADER:
            leader = found[Problem(**{**vars(one), "kernel": family.LEADER[one.kernel]})]
            assert choice and leader and choice.config.block_m == leader.config.block_m
            heights.add(choice.config.block_m != closed_form(one, target_of(H200)).block_m)
    assert True in heights, "the simulation never chose another height, so this shows nothing"


def test_a_budget_has_a_length() -> None:
    with pytest.raises(ValueError, match="budget"):
        Budget(0.0, lambda: 0.0)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar_and_a_file_plain_lines() -> None:
    clock = [0.0]
    bar, plain = Terminal(), io.StringIO()
    for stream in (bar, plain):
        progress = Progress(4, stream, lambda: clock[0])
        for _ in range(4):
            clock[0] += 1.0
            progress.step("up", 2e-4, 1e-4)
        progress.close()
    assert "[############............] 2/4 1.0/s up: best 200.0 us, 50 % of the floor" in bar.getvalue()
    assert bar.getvalue().endswith("\r\x1b[K") and "\n" not in bar.getvalue()
    assert "\x1b" not in plain.getvalue() and plain.getvalue().splitlines()[-1].startswith("4/4 ")
    assert len(plain.getvalue().splitlines()) < 4, "plain lines come every few seconds, not at every step"


def test_progress_before_anything_ran() -> None:
    stream = io.StringIO()
    Progress(1, stream, lambda: 0.0).step("up", 0.0, 1e-4)
    assert stream.getvalue() == "1/1 -/s up: none ran yet\n"

"""Packs, shipped configurations, and what a kernel is told when it asks."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Iterator

import pytest

from moecompile.autotune import pack, source
from moecompile.autotune.entry import Choice, Measurement
from moecompile.autotune.key import Environment, Key, Problem, environment_of, spec_of
from moecompile.autotune.store import Store
from moecompile.codegen import gpu_choose
from moecompile.codegen.gpu import set_config_source
from moecompile.kernels.gpu.config import Config

TARGET = gpu_choose.TARGETS["sm_90"]
UP = Problem("up", "bfloat16", 2048, 768, 128, 8, 2048, 2, bucket=3)
DOWN = dataclasses.replace(UP, kernel="down")
HERE = environment_of(TARGET)
SAME_HEIGHT, OTHER_HEIGHT = Config(64, 32, 64, 4, 3, 8), Config(32, 64, 64, 4, 3, 8)


def choice(problem: Problem, config: Config, environment: Environment = HERE) -> Choice:
    return Choice(Key(problem, environment), config, 1.9e-4, 2.0e-4)


@pytest.fixture
def store(tmp_path: pathlib.Path) -> Iterator[Store]:
    yield Store(tmp_path / "tuned")
    set_config_source(None)


def asked(problem: Problem, target: gpu_choose.Target = TARGET) -> Config:
    spec = spec_of(problem)
    tokens = gpu_choose.representative(512, spec.top_k, spec.num_experts)
    return gpu_choose.choose(problem.kernel, spec, tokens, target)


def test_a_kernel_gets_what_was_tuned(store: Store) -> None:
    usual = asked(UP)
    store.put(choice(UP, SAME_HEIGHT))
    source.install(store)
    assert usual != SAME_HEIGHT and asked(UP) == SAME_HEIGHT


def test_other_versions_devices_and_the_interpreter_get_the_closed_form(store: Store) -> None:
    usual = asked(UP)
    store.put(choice(UP, SAME_HEIGHT, dataclasses.replace(HERE, triton="0.0.0")))
    store.put(choice(UP, SAME_HEIGHT, dataclasses.replace(HERE, timer="simulated")))
    store.put(Measurement(Key(UP, HERE), SAME_HEIGHT, 1e-6, ""))
    source.install(store)
    assert asked(UP) == usual, "another version, an invented time, a time without a choice"
    store.put(choice(UP, SAME_HEIGHT))
    source.install(store)
    assert asked(UP, gpu_choose.INTERPRETER) == gpu_choose.closed_form("up", spec_of(UP), 512, gpu_choose.INTERPRETER)
    assert asked(UP, dataclasses.replace(TARGET, processors=114)) == usual
    assert gpu_choose.choose("permute", spec_of(UP), 512, TARGET).block_m > 1, "families that are not tuned are not asked for"


def test_row_tiles_of_another_height_need_the_partner(store: Store) -> None:
    """up and down share one map of row tiles: one alone must not change its height."""
    usual = asked(UP)
    store.put(choice(UP, OTHER_HEIGHT))
    source.install(store)
    assert asked(UP) == usual
    store.put(choice(DOWN, Config(16, 64, 64, 4, 3, 8)))
    source.install(store)
    assert asked(UP) == usual, "the partner has yet another height"
    store.put(choice(DOWN, Config(32, 128, 64, 4, 3, 8)))
    source.install(store)
    assert asked(UP) == OTHER_HEIGHT and asked(DOWN).block_m == 32


def test_a_pack_travels_as_proposals(store: Store, tmp_path: pathlib.Path) -> None:
    elsewhere = dataclasses.replace(HERE, sms=114, triton="3.6.0")
    invented = choice(DOWN, OTHER_HEIGHT, dataclasses.replace(HERE, timer="simulated"))
    written = [choice(UP, SAME_HEIGHT, elsewhere), invented]
    pack.write(tmp_path / "pack.json", written)
    assert pack.read(tmp_path / "pack.json") == written
    assert pack.propose(written, store) == 1
    assert store.proposal(UP) == SAME_HEIGHT and store.proposal(DOWN) is None
    assert store.choice(Key(UP, HERE)) is None, "it was not measured here"
    usual = asked(UP)
    source.install(store)
    assert asked(UP) == usual


@pytest.mark.parametrize(
    ("change", "about"),
    [
        (lambda p: p["choices"][0]["config"].update(block_m=3), "entry 1: config of up: block_m"),
        (lambda p: p["choices"][0].update(kind="proposed"), "entry 1"),
        (lambda p: p.update(schema=7), "schema"),
        (lambda p: p.update(more=1), "not a tuning pack"),
        (lambda p: p.update(choices={}), "schema"),
    ],
)
def test_one_bad_entry_condemns_a_pack(tmp_path: pathlib.Path, change, about: str) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "pack.json"
    pack.write(path, [choice(UP, SAME_HEIGHT)])
    plain = json.loads(path.read_text())
    change(plain)
    path.write_text(json.dumps(plain))
    with pytest.raises(ValueError, match=about):
        pack.read(path)


def test_garbage_is_no_pack(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "pack.json"
    for text in ("", "[]", "{", "null"):
        path.write_text(text)
        with pytest.raises(ValueError, match="pack"):
            pack.read(path)


@pytest.fixture
def shipped(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[pathlib.Path]:
    monkeypatch.setattr(source, "SHIPPED", tmp_path)
    source._shipped.cache_clear()
    yield tmp_path / "shipped_sm_90.json"
    source._shipped.cache_clear()


def test_what_ships_serves_where_nothing_was_measured(store: Store, shipped: pathlib.Path) -> None:
    pack.write(shipped, [choice(UP, SAME_HEIGHT, dataclasses.replace(HERE, triton="0.0.0"))])
    source.install(store)
    assert asked(UP) == SAME_HEIGHT, "whatever the versions then were"
    measured = dataclasses.replace(SAME_HEIGHT, stages=5)
    store.put(choice(UP, measured))
    source.install(store)
    assert asked(UP) == measured


def test_what_ships_for_another_device_does_not_serve(store: Store, shipped: pathlib.Path) -> None:
    usual = asked(UP)
    pack.write(shipped, [choice(UP, SAME_HEIGHT, dataclasses.replace(HERE, sms=114))])
    source.install(store)
    assert asked(UP) == usual


def test_invented_times_do_not_serve_though_they_ship(store: Store, shipped: pathlib.Path) -> None:
    usual = asked(UP)
    pack.write(shipped, [choice(UP, SAME_HEIGHT, dataclasses.replace(HERE, timer="simulated"))])
    source.install(store)
    assert asked(UP) == usual


def test_all_that_ships_can_be_read() -> None:
    source._shipped.cache_clear()
    assert isinstance(source._shipped(), dict)

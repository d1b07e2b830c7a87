"""Packs, shipped configurations, and what a kernel is told when it asks."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Iterator

import pytest

from moecompile.analysis.machine import MACHINES
from moecompile.autotune import entry, pack, source
from moecompile.autotune.candidates import closed_form, target_of
from moecompile.autotune.entry import Choice, Compiled, Measurement
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
def store(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """A store of one's own; nothing ships, but where the test says so."""
    monkeypatch.setattr(source, "SHIPPED", tmp_path / "none")
    source._shipped.cache_clear()
    yield Store(tmp_path / "tuned")
    set_config_source(None)
    source._shipped.cache_clear()


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
def shipped(store: Store, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[pathlib.Path]:
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


def compiled(problem: Problem, config: Config, device: str = "H100") -> Compiled:
    return Compiled(problem, "sm_90", device, "3.7.1", config, 128, 65536)


def test_what_was_compiled_serves_its_architecture_and_first_its_device(store: Store, shipped: pathlib.Path) -> None:
    usual = asked(UP)
    other = dataclasses.replace(SAME_HEIGHT, stages=4)
    pack.write(shipped, [compiled(UP, SAME_HEIGHT), compiled(UP, other, "H200")])
    assert pack.read(shipped) == [compiled(UP, SAME_HEIGHT), compiled(UP, other, "H200")]
    source.install(store)
    assert asked(UP) == SAME_HEIGHT, "of no known name: the first of its architecture"
    named = {
        name: dataclasses.replace(TARGET, name=name) for name in ("NVIDIA H200", "NVIDIA H100 80GB HBM3", "NVIDIA GH200 480GB")
    }
    assert [asked(UP, t) for t in named.values()] == [other, SAME_HEIGHT, SAME_HEIGHT]
    assert asked(UP, gpu_choose.TARGETS["sm_80"]) == gpu_choose.closed_form("up", spec_of(UP), 512, gpu_choose.TARGETS["sm_80"])
    assert usual not in (other, SAME_HEIGHT)


def test_a_measured_one_goes_before_what_was_compiled(store: Store, shipped: pathlib.Path) -> None:
    measured = dataclasses.replace(SAME_HEIGHT, stages=5)
    pack.write(shipped, [compiled(UP, SAME_HEIGHT)])
    pack.write(shipped.with_name("zz_exported.json"), [choice(UP, measured)])
    source.install(store)
    assert asked(UP) == measured


def test_a_broken_shipped_pack_is_one_warning_and_a_miss(store: Store, shipped: pathlib.Path) -> None:
    usual = asked(UP)
    shipped.write_text("{")
    pack.write(shipped.with_name("shipped_sm_90_more.json"), [compiled(DOWN, Config(64, 32, 64, 4, 3))])
    source.install(store)
    with pytest.warns(UserWarning, match="shipped tuning pack is left aside: .*not JSON") as seen:
        assert asked(UP) == usual
        assert asked(DOWN) == Config(64, 32, 64, 4, 3), "the other pack serves"
        asked(dataclasses.replace(UP, bucket=4))
    assert len(seen) == 1


@pytest.mark.parametrize(
    ("change", "about"),
    [
        ({"seconds": 1e-6}, "field 'seconds' is unknown"),
        ({"device": "H900"}, "device is 'H900'"),
        ({"device": "A100"}, "device is 'A100'"),
        ({"arch": "../sm_90"}, "arch is"),
        ({"registers": 0}, "registers is"),
        ({"triton": "import os"}, "triton is"),
        ({"config": {**vars(SAME_HEIGHT), "block_m": 3}}, "config of up: block_m"),
    ],
)
def test_what_was_compiled_is_checked_field_by_field(tmp_path: pathlib.Path, change: dict[str, object], about: str) -> None:
    plain = {**entry.to_plain(compiled(UP, SAME_HEIGHT)), **change}
    path = tmp_path / "pack.json"
    path.write_text(json.dumps({"schema": entry.SCHEMA, "kind": "pack", "choices": [plain]}))
    with pytest.raises(ValueError, match=f"entry 1: .*{about}"):
        pack.read(path)


def test_what_was_compiled_claims_no_time_and_is_no_proposal(store: Store) -> None:
    assert pack.propose([compiled(UP, SAME_HEIGHT)], store) == 0
    with pytest.raises(ValueError, match="was not measured: it belongs in a pack"):
        entry.from_text(json.dumps(entry.to_plain(compiled(UP, SAME_HEIGHT))))


def test_why_names_every_level(store: Store, shipped: pathlib.Path) -> None:
    key = Key(UP, HERE)
    assert "imported: none; shipped: nothing for sm_90; runs: the closed form, block_m: 64" in source.why(store, key, TARGET)
    source._shipped.cache_clear()
    pack.write(shipped, [compiled(DOWN, SAME_HEIGHT)])
    assert "shipped: nothing for this shape on sm_90; runs: the closed form" in source.why(store, key, TARGET)
    source._shipped.cache_clear()
    pack.write(shipped, [compiled(UP, SAME_HEIGHT)])
    pack.propose([choice(UP, OTHER_HEIGHT, dataclasses.replace(HERE, sms=114))], store)
    found = source.why(store, key, TARGET)
    assert found.startswith("miss: nothing was tuned yet") and "which waits to be measured here" in found
    assert "block_m: 64, block_n: 32" in found and "compiled for H100, not measured; runs: the shipped one" in found
    store.put(choice(UP, SAME_HEIGHT))
    assert source.why(store, key, TARGET).startswith("hit: ")


def test_what_ships_was_compiled_for_every_known_gpu() -> None:
    """Each entry fits by the same rules as a candidate; nothing of it was measured until a GPU has made a pack."""
    source._shipped.cache_clear()
    assert set(source._shipped()) == {"sm_80", "sm_90", "sm_100", "gfx942"}
    for path in source.SHIPPED.glob("*.json"):
        for found in pack.read(path):
            if isinstance(found, Compiled):
                target = target_of(MACHINES[found.device])
                assert found.shared <= target.shared_memory and found.arch == MACHINES[found.device].arch
                assert found.config.block_m == closed_form(found.problem, target).block_m, "kernels share their row tiles"

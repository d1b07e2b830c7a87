"""A store that others may have damaged: a miss with one warning, never a crash, never a wrong configuration."""

from __future__ import annotations

import dataclasses
import errno
import os
import pathlib
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator

import pytest

from moecompile.autotune import entry, folder, store
from moecompile.autotune.entry import Choice, Measurement
from moecompile.autotune.folder import Folder
from moecompile.autotune.key import Environment, Key, Problem
from moecompile.autotune.store import Store
from moecompile.kernels.gpu.config import Config

ROOT = pathlib.Path(__file__).resolve().parents[2]
PROBLEM = Problem("up", "bfloat16", 2048, 768, 128, 8, 2048, 2, bucket=3)
ENVIRONMENT = Environment("sm_90", 132, "2.13.0+cu130", "3.7.1", "0.1.0", "device")
KEY = Key(PROBLEM, ENVIRONMENT)
CHOICE = Choice(KEY, Config(64, 64, 64, 4, 4, 8), 1.9e-4, 2.0e-4)


@pytest.fixture(autouse=True)
def _fresh_warnings() -> Iterator[None]:
    store._WARNED.clear()
    yield


@pytest.fixture
def kept(tmp_path: pathlib.Path) -> Store:
    found = Store(tmp_path / "cache" / "tuned")
    assert found.put(CHOICE)
    return found


def file_of(kept: Store) -> pathlib.Path:
    return kept.path / entry.file_name(CHOICE)


def misses_with_one_warning(kept: Store, about: str) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = [kept.choice(KEY) for _ in range(3)]
    assert found == [None] * 3
    assert len(caught) == 1, [str(w.message) for w in caught]
    assert about in str(caught[0].message)


def test_what_is_put_is_found_by_another_store_and_is_private(kept: Store) -> None:
    assert Store(kept.path).choice(KEY) == CHOICE
    assert file_of(kept).stat().st_mode & 0o777 == 0o600
    for place in (kept.path, kept.path.parent):
        assert place.stat().st_mode & 0o777 == 0o700


def _link(file: pathlib.Path) -> None:
    file.rename(file.with_name("elsewhere"))
    file.symlink_to(file.with_name("elsewhere"))


def _fifo(file: pathlib.Path) -> None:
    file.unlink()
    os.mkfifo(file, 0o600)


DAMAGE: dict[str, Callable[[pathlib.Path], object]] = {
    "truncated": lambda f: f.write_bytes(f.read_bytes()[:100]),
    "empty": lambda f: f.write_bytes(b""),
    "garbage": lambda f: f.write_bytes(os.urandom(500)),
    "other schema": lambda f: f.write_text(f.read_text().replace('"schema": 1', '"schema": 2')),
    "wrong hardware": lambda f: f.write_text(f.read_text().replace('"sms": 132', '"sms": 114')),
    "other kind": lambda f: f.write_text(entry.to_text(Measurement(KEY, CHOICE.config, 1e-4, ""))),
    "number out of its set": lambda f: f.write_text(f.read_text().replace('"block_m": 64', '"block_m": 63')),
    "huge": lambda f: f.write_bytes(b" " * (folder.LARGEST + 1)),
    "world-writable": lambda f: f.chmod(0o666),
    "a link": _link,
    "a pipe": _fifo,
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file_is_a_miss_and_is_left_aside(kept: Store, damage: Callable[[pathlib.Path], object]) -> None:
    damage(file_of(kept))
    misses_with_one_warning(kept, "it is left aside")
    assert not os.path.lexists(file_of(kept))
    assert kept.put(CHOICE) and kept.choice(KEY) == CHOICE


def test_a_folder_in_the_place_of_a_file_is_a_miss(kept: Store) -> None:
    file_of(kept).unlink()
    file_of(kept).mkdir()
    misses_with_one_warning(kept, "it is left aside")


def test_a_foreign_file_is_a_miss(kept: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.fstat

    def foreign(handle: int) -> os.stat_result:
        fields = list(real(handle))
        fields[4] = os.geteuid() + 1
        return os.stat_result(fields)

    monkeypatch.setattr(folder.os, "fstat", foreign)
    misses_with_one_warning(kept, "belongs to user")


def test_a_foreign_folder_is_a_miss_with_the_cure(kept: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    me = os.geteuid()
    monkeypatch.setattr(folder.os, "geteuid", lambda: me + 1)
    misses_with_one_warning(kept, "set MOECOMPILE_CACHE_DIR to a folder of your own")
    assert "belongs to user" in str(kept.refusal())
    assert not kept.put(CHOICE)
    assert kept.why(KEY).startswith("miss: ")


@pytest.mark.parametrize("mode", [0o777, 0o702, 0o720])
def test_a_folder_that_others_can_write_is_a_miss_with_the_cure(kept: Store, mode: int) -> None:
    kept.path.chmod(mode)
    misses_with_one_warning(kept, f"chmod go-w {kept.path}")
    kept.path.chmod(0o700)
    assert kept.choice(KEY) == CHOICE


def test_a_world_writable_parent_is_distrusted_unless_sticky(kept: Store) -> None:
    kept.path.parent.chmod(0o777)
    assert "chmod" in str(Folder(kept.path, 1).distrust())
    kept.path.parent.chmod(0o1777)
    assert Folder(kept.path, 1).distrust() is None


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC, errno.EBUSY])
def test_a_folder_that_cannot_be_written_is_one_warning(kept: Store, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    real = os.open

    def refuse(path: str, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_CREAT:
            raise OSError(code, os.strerror(code))
        return real(path, flags, mode)

    monkeypatch.setattr(folder.os, "open", refuse)
    with pytest.warns(UserWarning, match="not kept") as caught:
        assert [kept.put(CHOICE) for _ in range(3)] == [False] * 3
    assert len(caught) == 1
    assert kept.choice(KEY) == CHOICE
    assert "MOECOMPILE_CACHE_DIR" in str(kept.refusal())


def test_a_full_disk_leaves_no_half_file(kept: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(folder.os, "fsync", full)
    with pytest.warns(UserWarning, match="No space"):
        assert not kept.put(dataclasses.replace(CHOICE, seconds=1e-4))
    assert kept.choice(KEY) == CHOICE
    assert [p.name for p in kept.path.iterdir()] == [file_of(kept).name]


def test_a_vanished_folder_is_a_silent_miss_and_is_made_again(kept: Store) -> None:
    shutil.rmtree(kept.path.parent)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert kept.choice(KEY) is None and kept.measurements(KEY) == {} and kept.choices() == []
        assert kept.put(CHOICE)
    assert kept.choice(KEY) == CHOICE


def test_a_file_in_the_place_of_the_folder_is_a_miss(tmp_path: pathlib.Path) -> None:
    (tmp_path / "tuned").write_text("")
    misses_with_one_warning(Store(tmp_path / "tuned"), "is not a folder")


def test_an_entry_of_another_key_under_this_name_is_not_used(kept: Store) -> None:
    other = dataclasses.replace(CHOICE, key=Key(PROBLEM, dataclasses.replace(ENVIRONMENT, triton="3.6.0")))
    file_of(kept).write_text(entry.to_text(other))
    misses_with_one_warning(kept, "another key")


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(Environment)])
def test_another_environment_is_a_miss_and_why_names_it(kept: Store, field: str) -> None:
    value = {"sms": 114, "arch": "sm_100", "timer": "simulated"}.get(field, "9.9.9")
    key = Key(PROBLEM, dataclasses.replace(ENVIRONMENT, **{field: value}))
    assert kept.choice(key) is None
    assert f"{field}: {value} here, {getattr(ENVIRONMENT, field)} there" in kept.why(key)


def test_why_tells_the_cases_apart(kept: Store, tmp_path: pathlib.Path) -> None:
    assert kept.why(KEY).startswith("hit: block_m: 64")
    half = Key(dataclasses.replace(PROBLEM, bucket=1), ENVIRONMENT)
    kept.put(Measurement(half, CHOICE.config, 1e-4, ""))
    assert "interrupted after 1 measurement" in kept.why(half)
    assert "rows per expert here" in kept.why(Key(dataclasses.replace(PROBLEM, bucket=2), ENVIRONMENT))
    assert "nothing was tuned" in Store(tmp_path / "empty").why(KEY)


def test_the_least_recently_used_go_first(tmp_path: pathlib.Path) -> None:
    kept = Folder(tmp_path / "tuned", limit=2500)
    for i in range(4):
        kept.write(f"{i}.json", b"x" * 1000)
        os.utime(kept.path / f"{i}.json", (i, i))
    assert kept.read("0.json")
    kept.trim()
    assert kept.names() == ["0.json", "3.json"]


def test_stale_leftovers_are_removed_and_fresh_ones_are_not(tmp_path: pathlib.Path) -> None:
    kept = Folder(tmp_path / "tuned", limit=1000)
    kept.write("a.json", b"x")
    for name, age in ((".b.json.1.aa", 7200), (".c.json.2.bb", 10), (".damaged-d.json", 7200)):
        (kept.path / name).write_bytes(b"half")
        os.utime(kept.path / name, (time.time() - age,) * 2)
    assert kept.names() == ["a.json"]
    kept.trim()
    assert sorted(p.name for p in kept.path.iterdir()) == [".c.json.2.bb", "a.json"]


def test_an_empty_variable_means_the_users_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("MOECOMPILE_CACHE_DIR", "")
    assert store.default_path().name == "tuned" and store.default_path().is_absolute()
    assert pathlib.Path.cwd() not in store.default_path().parents
    monkeypatch.setenv("MOECOMPILE_CACHE_DIR", str(tmp_path / "mine"))
    assert Store().path == tmp_path / "mine" / "tuned"


WRITER = """
import sys, pathlib
from moecompile.autotune.folder import Folder
kept = Folder(pathlib.Path(sys.argv[1]), 10**9)
mine = sys.argv[2].encode()
for i in range(300):
    kept.write("shared.json", b"{" + mine * (2000 + i) + b"}")
    found = kept.read("shared.json")
    assert found[:1] == b"{" and found[-1:] == b"}" and set(found[1:-1]) == {found[1]}, found[:50]
"""


@pytest.mark.slow
def test_eight_processes_writing_one_file_never_show_half_of_it(tmp_path: pathlib.Path) -> None:
    command = [sys.executable, "-c", WRITER, str(tmp_path / "tuned")]
    running = [subprocess.Popen([*command, str(i)], stderr=subprocess.PIPE, text=True, cwd=ROOT) for i in range(8)]
    failed = [error for process in running if (error := process.communicate(timeout=120)[1])]
    assert not failed, failed[0]
    assert len(list((tmp_path / "tuned").iterdir())) == 1

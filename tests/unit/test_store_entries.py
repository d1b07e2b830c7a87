"""Entries of the store as text: what is written is read back, and nothing else is read."""

from __future__ import annotations

import copy
import dataclasses
import json
from typing import Any

import pytest

from moecompile.autotune import entry
from moecompile.autotune.entry import Choice, Entry, Measurement, Proposal
from moecompile.autotune.key import Environment, Key, Problem, digest
from moecompile.kernels.gpu.config import Config

PROBLEM = Problem("up", "bfloat16", 2048, 768, 128, 8, 2048, 2, bucket=3)
ENVIRONMENT = Environment("sm_90", 132, "2.13.0+cu130", "3.7.1", "0.1.0", "device")
KEY = Key(PROBLEM, ENVIRONMENT)
CONFIG = Config(64, 64, 64, 4, 4, 8)
ENTRIES = (
    Measurement(KEY, CONFIG, 1.9e-4, ""),
    Measurement(KEY, CONFIG, 0.0, "resources"),
    Choice(KEY, CONFIG, 1.9e-4, 2.0e-4),
    Proposal(KEY, CONFIG),
)
FORMED = (
    Choice(KEY, dataclasses.replace(CONFIG, block_m=32, swap=1, tma=1), 1.9e-4, 2.0e-4),
    Measurement(KEY, dataclasses.replace(CONFIG, persistent=2), 1.9e-4, ""),
)


@pytest.mark.parametrize("item", (*ENTRIES, *FORMED), ids=lambda e: type(e).__name__)
def test_text_comes_back(item: Entry) -> None:
    assert entry.from_text(entry.to_text(item)) == item


def test_names_tell_keys_and_configs_apart() -> None:
    other = Key(PROBLEM, dataclasses.replace(ENVIRONMENT, sms=114))
    items = [*ENTRIES[1:], Choice(other, CONFIG, 1e-4, 1e-4), Measurement(KEY, dataclasses.replace(CONFIG, stages=3), 1e-4, "")]
    assert len({entry.file_name(i) for i in items}) == len(items)
    assert entry.file_name(Proposal(other, CONFIG)) == entry.file_name(Proposal(KEY, CONFIG)), "a proposal is for any machine"


def changed(path: str, value: Any) -> dict[str, Any]:
    """The plain choice with the value at the dotted path replaced, or removed where it is ..."""
    plain: dict[str, Any] = copy.deepcopy(entry.to_plain(ENTRIES[2]))
    *folders, last = path.split(".")
    place = plain
    for name in folders:
        place = place[name]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return plain


BAD = [
    ("schema", 2), ("schema", True), ("schema", ...), ("kind", "pickle"), ("kind", ["choice"]), ("kind", ...), ("extra", 1),
    ("seconds", 0), ("seconds", -1.0), ("seconds", float("nan")), ("seconds", float("inf")), ("seconds", "1"), ("seconds", True),
    ("seconds", 1e9), ("default_seconds", ...), ("key", []), ("key.problem", None), ("key.environment", ...),
    ("key.problem.kernel", "rm -rf"), ("key.problem.kernel", ["up"]), ("key.problem.dtype", "float64"), ("key.problem.hidden", 0),
    ("key.problem.hidden", 2048.0), ("key.problem.hidden", True), ("key.problem.hidden", 2**40), ("key.problem.bucket", 7),
    ("key.problem.top_k", 129), ("key.problem.more", 1), ("key.environment.arch", "sm_90; import os"),
    ("key.environment.arch", "sm_90\n"), ("key.environment.torch", "2 13"), ("key.environment.triton", ""),
    ("key.environment.timer", "sundial"), ("key.environment.sms", 0), ("config", 3), ("config.block_m", 48),
    ("config.block_m", 1 << 20), ("config.block_m", "64"), ("config.block_m", True), ("config.block_m", 64.0), ("config.stages", 9),
    ("config.warps", ...), ("config.__class__", "os.system"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "value"), BAD, ids=[f"{p}={v!r}"[:40] for p, v in BAD])
def test_whatever_is_off_is_refused_by_name(path: str, value: Any) -> None:
    with pytest.raises(ValueError, match=path.split(".")[-1]) as caught:
        entry.from_text(json.dumps(changed(path, value)))
    assert len(str(caught.value)) < 400


GARBAGE = [
    b"",
    b"{",
    b"null",
    b"[]",
    b"3",
    b'"x"',
    b"\xff\xfe\x00",
    b"[" * 100_000,
    b'{"schema":1}',
    b"1" * 5000,
    b'{"schema":1,"kind":null}',
]


@pytest.mark.parametrize("text", GARBAGE, ids=range(len(GARBAGE)))
def test_garbage_is_refused(text: bytes) -> None:
    with pytest.raises(ValueError):
        entry.from_text(text)


@pytest.mark.parametrize("cut", range(0, 600, 23))
def test_truncated_text_is_refused(cut: int) -> None:
    whole = entry.to_text(ENTRIES[2]).encode()
    with pytest.raises(ValueError):
        entry.from_text(whole[: min(cut, len(whole) - 3)])


def test_an_entry_from_before_the_younger_axes_is_what_it_was() -> None:
    """Its text names six numbers, and so does the name of its file: both are as they were when there were no more."""
    plain = entry.to_plain(ENTRIES[0])
    assert list(plain["config"]) == ["block_m", "block_n", "block_k", "warps", "stages", "group"]
    assert entry.from_plain(plain) == ENTRIES[0]
    assert entry.file_name(ENTRIES[0]) == f"measured-{digest(KEY)}-711d800d66982aa0551282cc.json"


@pytest.mark.parametrize(("name", "value"), [("swap", 2), ("tma", True), ("persistent", 3), ("split", 2), ("pdl", 1), ("wings", 2)])
def test_a_younger_axis_has_its_own_list(name: str, value: Any) -> None:
    plain = entry.to_plain(ENTRIES[0])
    with pytest.raises(ValueError, match=name):
        entry.from_plain({**plain, "config": {**plain["config"], name: value}})


def test_axes_that_exclude_each_other_are_refused_together() -> None:
    key = Key(dataclasses.replace(PROBLEM, kernel="down"), ENVIRONMENT)
    plain = entry.to_plain(Measurement(key, dataclasses.replace(CONFIG, split=2), 1e-4, ""))
    with pytest.raises(ValueError, match="split"):
        entry.from_plain({**plain, "config": {**plain["config"], "persistent": 1}})


def test_a_refused_configuration_has_no_time() -> None:
    plain = entry.to_plain(ENTRIES[1])
    with pytest.raises(ValueError, match="refused"):
        entry.from_plain({**plain, "seconds": 1e-3})
    with pytest.raises(ValueError, match="refused"):
        entry.from_plain({**plain, "refused": "because"})

"""Tuning packs: the choices of one machine in one JSON file, to carry to another.

An imported choice is a proposal: it is tried first when that shape is tuned, and runs only after it was measured there.  What
was chosen by compiling alone ships with the package (source.py) and is no proposal: tuning starts from the same estimates.
"""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Sequence

from moecompile.autotune import entry
from moecompile.autotune.entry import SCHEMA, Choice, Compiled, InPacks, Proposal
from moecompile.autotune.store import Store

LARGEST = 32 * 1024 * 1024  # bytes


def write(path: pathlib.Path, choices: Sequence[InPacks]) -> None:
    """Make the pack, whole or not at all. OSError if that cannot be done."""
    plain = {"schema": SCHEMA, "kind": "pack", "choices": [entry.to_plain(c) for c in choices]}
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(json.dumps(plain, indent=1, sort_keys=True) + "\n")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read(path: pathlib.Path) -> list[InPacks]:
    """The pack's choices. ValueError that says what is wrong, OSError; one bad entry condemns the pack."""
    if path.stat().st_size > LARGEST:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, a pack has at most {LARGEST}")
    try:
        plain = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(plain, dict) or set(plain) != {"schema", "kind", "choices"} or plain["kind"] != "pack":
        raise ValueError(f"{path} is not a tuning pack")
    if plain["schema"] != SCHEMA or not isinstance(plain["choices"], list):
        raise ValueError(f"{path}: schema is {plain['schema']!r}, needs {SCHEMA}")
    found: list[InPacks] = []
    for number, item in enumerate(plain["choices"], 1):
        try:
            choice = entry.from_plain(item)
        except ValueError as error:
            raise ValueError(f"{path}, entry {number}: {error}") from None
        if not isinstance(choice, Choice | Compiled):
            raise ValueError(f"{path}, entry {number}: kind is not 'choice' or 'compiled'")
        found.append(choice)
    return found


def propose(choices: Sequence[InPacks], store: Store) -> int:
    """Put the choices into the store as proposals; how many of them were taken. Simulated and compiled ones are not."""
    real = [c for c in choices if isinstance(c, Choice) and c.key.environment.timer == "device"]
    return sum(store.put(Proposal(c.key, c.config)) for c in real)

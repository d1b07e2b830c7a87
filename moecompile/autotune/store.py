"""Measured configurations on disk: one JSON file per entry, written as it is measured.

Whatever is wrong with the folder or a file is a miss with one warning: never a crash, and never a configuration that was not
measured under exactly the key that is asked for.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import warnings

from moecompile import config as options
from moecompile.autotune import bucket, entry
from moecompile.autotune.entry import Choice, Entry, Measurement, Proposal
from moecompile.autotune.folder import Folder
from moecompile.autotune.key import Key, Problem
from moecompile.kernels.gpu.config import Config

LIMIT = 16 * 1024 * 1024  # bytes; an entry has about 800
_TRIM_EVERY = 256  # writes
_WARNED: set[str] = set()  # each folder's kind of trouble, once per process


def default_path() -> pathlib.Path:
    return options.cache_dir() / "tuned"


class Store:
    """The entries of one folder, by default the user's cache folder's `tuned`."""

    def __init__(self, path: pathlib.Path | None = None, limit: int = LIMIT) -> None:
        self.path = path or default_path()
        self._folder = Folder(self.path, limit)
        self._writes = 0

    def choice(self, key: Key) -> Choice | None:
        """What was chosen for exactly this key."""
        found = self._get(entry.choice_name(key))
        return found if isinstance(found, Choice) else None

    def measurements(self, key: Key) -> dict[Config, Measurement]:
        """What was timed under the key, finished or not."""
        prefix = entry.measured_prefix(key)
        found = (self._get(name) for name in self._names(prefix))
        return {m.config: m for m in found if isinstance(m, Measurement)}

    def proposal(self, problem: Problem) -> Config | None:
        """An imported configuration for the problem, not measured here."""
        found = self._get(entry.proposal_name(problem))
        return found.config if isinstance(found, Proposal) else None

    def choices(self) -> list[Choice]:
        found = (self._get(name) for name in self._names("choice-"))
        return [c for c in found if isinstance(c, Choice)]

    def put(self, item: Entry) -> bool:
        """Write the entry; False, and one warning, where that cannot be done."""
        if self._distrusted():
            return False
        try:
            self._folder.write(entry.file_name(item), entry.to_text(item).encode())
        except OSError as error:
            self._warn("write", f"{self.path} cannot be written ({error.strerror}): results of this run are not kept")
            return False
        self._writes += 1
        if self._writes % _TRIM_EVERY == 0:
            self._folder.trim()
        return True

    def refusal(self) -> str | None:
        """Why nothing can be kept here, with the cure, or None. Makes the folder."""
        try:
            wrong = self._folder.distrust()
            if wrong is None:
                self._folder.write(".probe", b"")
                (self.path / ".probe").unlink(missing_ok=True)
                self._folder.trim()
        except OSError as error:
            return f"{self.path} cannot be written ({error.strerror}): set MOECOMPILE_CACHE_DIR to a folder of your own"
        return wrong

    def why(self, key: Key) -> str:
        """Why a look-up of the key hits or misses, for people."""
        wrong = self._folder.distrust()
        if wrong is not None:
            return f"miss: {wrong}"
        found = self.choice(key)
        if found is not None:
            gain = found.default_seconds / found.seconds
            return f"hit: {numbers(found.config)}, {found.seconds * 1e6:.1f} us, {gain:.2f}x the default; {self.path}"
        timed = self.measurements(key)
        if timed:
            return f"miss: tuning was interrupted after {len(timed)} measurements; tune again, it goes on from there"
        others = self.choices()
        if not others:
            return f"miss: nothing was tuned yet in {self.path}; run `moecompile tune`"
        nearest = min((_differences(key, c.key) for c in others), key=len)
        return "miss: the nearest entry differs in " + "; ".join(nearest)

    def _get(self, name: str) -> Entry | None:
        """The entry of that name, if it is whole, ours and really of that name."""
        if self._distrusted():
            return None
        try:
            found = entry.from_text(self._folder.read(name))
            if entry.file_name(found) != name:
                raise ValueError("holds the entry of another key")
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            self._warn("damaged", f"{self.path / name} {reason}: it is left aside, and counts as not tuned")
            self._folder.quarantine(name)
            return None
        return found

    def _names(self, prefix: str) -> list[str]:
        return [] if self._distrusted() else self._folder.names(prefix)

    def _distrusted(self) -> bool:
        wrong = self._folder.distrust()
        if wrong is not None:
            self._warn("distrust", f"{wrong}. Until then nothing tuned is used.")
        return wrong is not None

    def _warn(self, kind: str, text: str) -> None:
        if f"{kind} {self.path}" not in _WARNED:
            _WARNED.add(f"{kind} {self.path}")
            warnings.warn(f"moecompile: {text}", stacklevel=4)


def _differences(wanted: Key, other: Key) -> list[str]:
    """The fields in which a stored key is not the wanted one, as words."""
    found = []
    for part, there in ((wanted.environment, other.environment), (wanted.problem, other.problem)):
        for field in dataclasses.fields(part):
            a, b = getattr(part, field.name), getattr(there, field.name)
            if a != b:
                shown = [f"{bucket.name(v)} rows per expert" if field.name == "bucket" else str(v) for v in (a, b)]
                found.append(f"{field.name}: {shown[0]} here, {shown[1]} there")
    return found


def numbers(config: Config) -> str:
    """A configuration as people read it."""
    return json.dumps(config.plain()).strip("{}").replace('"', "")

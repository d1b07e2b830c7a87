"""A private folder of small files that no one else may have written and no reader ever sees half of.

A file is written under a dot-name, forced to disk and renamed into place: a kill leaves at most a dot-file, which readers skip
and trim() removes.  There is no lock, so it works on network file systems and one process never waits for another.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import secrets
import stat
import time
from collections.abc import Iterator

LARGEST = 64 * 1024  # bytes of a file; nothing we write comes near
_STALE = 3600.0  # seconds after which a dot-file is nobody's


class Folder:
    """`limit` is the total size in bytes to which trim() reduces it, the least recently used files going first."""

    def __init__(self, path: pathlib.Path, limit: int) -> None:
        if limit < 1:
            raise ValueError(f"folder: the limit is {limit} bytes, needs at least 1")
        self.path, self.limit = path, limit

    def distrust(self) -> str | None:
        """Why the folder may hold what another user wrote, with the cure; None if it is ours alone or is not there."""
        for place in (self.path, self.path.parent):
            try:
                found = os.stat(place)
            except FileNotFoundError:
                continue
            except OSError as error:
                return f"{place} cannot be looked at ({error.strerror}): set MOECOMPILE_CACHE_DIR to a folder of your own"
            if place == self.path and not stat.S_ISDIR(found.st_mode):
                return f"{place} is not a folder: remove it, or set MOECOMPILE_CACHE_DIR to another place"
            if place == self.path and found.st_uid != os.geteuid():
                who = f"user {found.st_uid}, you are {os.geteuid()}"
                return f"{place} belongs to {who}: set MOECOMPILE_CACHE_DIR to a folder of your own"
            sticky = place != self.path and found.st_mode & stat.S_ISVTX
            others = stat.S_IWOTH | (stat.S_IWGRP if place == self.path else 0)
            if found.st_mode & others and not sticky:
                return f"{place} can be written by other users: run `chmod go-w {place}`, or set MOECOMPILE_CACHE_DIR"
        return None

    def names(self, prefix: str = "") -> list[str]:
        """The files that are whole, sorted. Empty where there is no folder."""
        try:
            return sorted(n for n in os.listdir(self.path) if n.startswith(prefix) and not n.startswith("."))
        except OSError:
            return []

    def read(self, name: str) -> bytes:
        """A file's content. FileNotFoundError if it is not there, OSError or ValueError if it is not to be trusted."""
        handle = os.open(self.path / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(handle, "rb") as file:
            found = os.fstat(handle)
            if not stat.S_ISREG(found.st_mode):
                raise ValueError("is not a plain file")
            if found.st_uid != os.geteuid():
                raise ValueError(f"belongs to user {found.st_uid}, you are {os.geteuid()}")
            if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                raise ValueError("can be written by other users")
            if found.st_size > LARGEST:
                raise ValueError(f"has {found.st_size} bytes, needs at most {LARGEST}")
            content = file.read(LARGEST + 1)
        with contextlib.suppress(OSError):
            os.utime(self.path / name)  # what was used last is trimmed last
        return content

    def write(self, name: str, content: bytes) -> None:
        """Make the file, whole or not at all. OSError if that cannot be done."""
        for place in reversed([self.path, *self.path.parents]):
            if not place.exists():
                with contextlib.suppress(FileExistsError):
                    os.mkdir(place, 0o700)
        temporary = self.path / f".{name}.{os.getpid()}.{secrets.token_hex(4)}"
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.path / name)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise

    def quarantine(self, name: str) -> None:
        """Put a damaged file out of the readers' sight; it is deleted with the stale dot-files."""
        with contextlib.suppress(OSError):
            os.replace(self.path / name, self.path / f".damaged-{name}")

    def trim(self) -> None:
        """Delete stale dot-files, and the least recently used files above the limit."""
        now, kept = time.time(), []
        for entry in self._entries():
            with contextlib.suppress(OSError):
                found = entry.stat(follow_symlinks=False)
                if not entry.name.startswith("."):
                    kept.append((found.st_mtime, found.st_size, entry.path))
                elif now - found.st_mtime > _STALE:
                    os.unlink(entry.path)
        total = sum(size for _, size, _ in kept)
        for _, size, path in sorted(kept):
            if total <= self.limit:
                break
            with contextlib.suppress(OSError):
                os.unlink(path)
            total -= size

    def _entries(self) -> Iterator[os.DirEntry[str]]:
        with contextlib.suppress(OSError), os.scandir(self.path) as entries:
            yield from entries

"""A progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TextIO

WIDTH = 30  # characters of the bar
EVERY = 5.0  # seconds between plain lines


class Progress:
    """with Progress("training", 100) as bar: bar.to(7, "loss 3.2").  A total of 0 is not known: only time is shown."""

    def __init__(self, label: str, total: int = 0, out: TextIO | None = None) -> None:
        self.label, self.total, self.out = label, total, out or sys.stderr
        self.start = self.shown = time.monotonic()
        self.live = self.out.isatty()
        self.done, self.note = 0, ""

    def __enter__(self) -> Progress:
        if self.live or not self.total:
            self._write(f"{self.label} ..")
        return self

    def to(self, done: int, note: str = "") -> None:
        """`done` of the total is finished. Cheap: writes only when there is something new to see."""
        self.done, self.note = done, note
        now = time.monotonic()
        if now - self.shown >= (0.1 if self.live else EVERY):
            self.shown = now
            self._write(self._line())

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self._write(self._line())
        if self.live:
            self.out.write("\n")

    def _line(self) -> str:
        seconds = f"{time.monotonic() - self.start:.0f} s"
        if not self.total:
            return f"{self.label}: {seconds} {self.note}".rstrip()
        full = WIDTH * min(self.done, self.total) // self.total
        bar = f"[{'#' * full}{'.' * (WIDTH - full)}] " if self.live else ""
        return f"{self.label} {bar}{self.done}/{self.total}, {seconds} {self.note}".rstrip()

    def _write(self, line: str) -> None:
        self.out.write(f"\r\x1b[K{line}" if self.live else f"{line}\n")
        self.out.flush()

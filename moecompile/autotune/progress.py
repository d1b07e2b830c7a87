"""What a tuning run shows while it runs: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TextIO

_WIDTH = 24
_EVERY = 5.0  # seconds between plain lines


class Progress:
    """Counts of `total` measurements, their rate, the best time so far and its share of the floor."""

    def __init__(self, total: int, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self.total, self.done, self._measured = total, 0, 0
        self._stream, self._clock = stream, clock
        self._bar = stream.isatty()
        self._start, self._shown = clock(), float("-inf")

    def skip(self, count: int) -> None:
        """Measurements that will not be made, or were made before."""
        self.done += count

    def step(self, label: str, best: float, floor: float) -> None:
        """One more measurement; `best` seconds so far for `label` (0 if none yet), whose floor is `floor` seconds."""
        self.done += 1
        self._measured += 1
        text = self._text(label, best, floor)
        if self._bar:
            filled = int(_WIDTH * self.done / max(self.total, self.done))
            self._stream.write(f"\r\x1b[K[{'#' * filled}{'.' * (_WIDTH - filled)}] {text}")
            self._stream.flush()
        elif self._clock() - self._shown >= _EVERY or self.done == self.total:
            self._shown = self._clock()
            self._stream.write(text + "\n")
            self._stream.flush()

    def close(self) -> None:
        """Leave the bar's line."""
        if self._bar and self.done:
            self._stream.write("\r\x1b[K")
            self._stream.flush()

    def _text(self, label: str, best: float, floor: float) -> str:
        elapsed = self._clock() - self._start
        rate = f"{self._measured / elapsed:.1f}/s" if elapsed > 0 else "-/s"
        found = f"best {best * 1e6:.1f} us, {100 * floor / best:.0f} % of the floor" if best > 0 else "none ran yet"
        return f"{self.done}/{self.total} {rate} {label}: {found}"

"""Real text that every machine has: the sources of the Python standard library, read as bytes."""

from __future__ import annotations

import pathlib
import sysconfig

import torch
from torch import Tensor

LIMIT = 4_000_000  # bytes


def corpus() -> Tensor:
    """The sources of the standard library, one after another, as uint8 [bytes]."""
    folder = pathlib.Path(sysconfig.get_path("stdlib"))
    text = bytearray()
    for path in sorted(folder.glob("*.py")):
        text += path.read_bytes()
        if len(text) > LIMIT:
            break
    if len(text) < 100_000:
        raise FileNotFoundError(f"{folder}: {len(text)} bytes of Python sources, needs 100,000: is the library zipped?")
    return torch.frombuffer(text, dtype=torch.uint8)


def batch(text: Tensor, size: int, length: int, generator: torch.Generator) -> Tensor:
    """`size` random pieces of the text, int64 [size, length]."""
    starts = torch.randint(len(text) - length, (size,), generator=generator)
    return torch.stack([text[s : s + length] for s in starts.tolist()]).long()


def readable(tokens: Tensor) -> str:
    """Bytes as text; what is not printable becomes a dot."""
    return "".join(chr(t) if t == 10 or 32 <= t < 127 else "." for t in tokens.flatten().tolist())

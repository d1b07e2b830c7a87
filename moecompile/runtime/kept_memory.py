"""Memory for the gradients of expert weights on CPU, kept from one step to the next.

PyTorch gives a large CPU tensor back to the system when it dies, and the next one is paged in again: of a training step of OLMoE's
layer (0.8 GB of gradients, 64 tokens) that was half of the CPU time.  A block is handed out again when nothing but this file
holds it, which the use count of its storage says.
"""

from __future__ import annotations

import math
import os
import sys
import threading
from collections import deque
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, UntypedStorage

LEAST = 1 << 20  # bytes: what is smaller the C library keeps by itself
SHARE = 8  # at most this part of the machine's memory is kept

_blocks: dict[int, deque[Block]] = {}  # by size in bytes, the one handed out longest ago first
_lock = threading.Lock()


class Block(NamedTuple):
    storage: UntypedStorage

    def in_use(self) -> bool:
        """Whether a tensor or, as a Python object, somebody else refers to the storage."""
        return torch._C._storage_Use_Count(self.storage._cdata) > 1 or sys.getrefcount(self.storage) > 2  # type: ignore[attr-defined]


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """As torch.empty: a contiguous CPU tensor, anything in it."""
    size = math.prod(shape) * dtype.itemsize
    # Deterministic algorithms fill what is new with NaN: leave that to torch.
    if size < LEAST or torch.are_deterministic_algorithms_enabled() or not _counts_uses():
        return torch.empty(shape, dtype=dtype)
    with _lock:
        of_size = _blocks.setdefault(size, deque())
        for _ in range(len(of_size)):
            block = of_size.popleft()
            if block.in_use():
                of_size.append(block)
            elif block.storage.nbytes() == size:  # its last holder did not resize it
                of_size.append(block)
                return torch.empty(0, dtype=dtype).set_(block.storage, 0, tuple(shape))  # type: ignore[call-overload, no-any-return]
        made = torch.empty(shape, dtype=dtype)
        if _room_for(size):
            _blocks[size].append(Block(made.untyped_storage()))
    return made


def release() -> None:
    """Keep nothing; what is in use lives on with its tensors."""
    with _lock:
        _blocks.clear()


def kept() -> int:
    """Bytes of all blocks, in use or not."""
    return sum(size * len(of_size) for size, of_size in _blocks.items())


def _room_for(size: int) -> bool:
    """Whether one more block may be kept, after those that nobody uses have gone if need be."""
    if kept() + size > _limit():
        for other, of_size in _blocks.items():
            _blocks[other] = deque(b for b in of_size if b.in_use())
    return kept() + size <= _limit()


@lru_cache(1)
def _limit() -> int:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // SHARE
    except (OSError, ValueError):
        return 1 << 30


@lru_cache(1)
def _counts_uses() -> bool:
    """Whether this torch counts the uses of a storage as this file reads them."""
    try:
        block = Block(torch.empty(4).untyped_storage())
        seen = [block.in_use()]
        view = torch.empty(0).set_(block.storage, 1, (2,))  # type: ignore[call-overload]
        seen.append(block.in_use())
        storage = view.untyped_storage()
        del view
        seen.append(block.in_use())
        del storage
        return [*seen, block.in_use()] == [False, True, True, False]
    except (AttributeError, TypeError, RuntimeError):
        return False

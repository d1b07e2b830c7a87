"""Tables of the addresses of separate parameters, which kernels over all experts read.

A table is made at the first call with a set of parameters, by a copy from the host.  A CUDA graph cannot hold that copy, so
the first call has to come before capture; and the table must not lie in the memory of a graph that is being warmed up, which
takes it back without asking, so another thread allocates it: the pool of a graph is that of one thread.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from moecompile.errors import CaptureError

LIMIT = 256  # tables kept, those apart that a graph reads
Key = tuple[tuple[int, ...], torch.device]

_TABLES: OrderedDict[Key, Tensor] = OrderedDict()  # least recently used first
_CAPTURED: dict[Key, Tensor] = {}  # what a graph reads is never freed: the graph has its address
_LOCK = threading.Lock()


def capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def table(tensors: Sequence[Tensor]) -> Tensor:
    """The addresses of the tensors [E], on their device. CaptureError where it would have to be made during a capture."""
    device = tensors[0].device
    key = tuple(t.data_ptr() for t in tensors), device
    captures = capturing(device)
    with _LOCK:
        found = _CAPTURED.get(key)
        if found is None:
            found = _TABLES.get(key)
        if found is None and captures:
            raise CaptureError(
                f"the addresses of {len(tensors)} separate expert parameters are not on {device} yet, and a CUDA graph cannot hold"
                " the copy that brings them there: run the layer once with these parameters before capture, as torch.cuda.graph"
                " asks for in any case"
            )
        if found is None:
            found = apart(lambda: _made(*key))
        _TABLES[key] = found
        _TABLES.move_to_end(key)
        if captures:
            _CAPTURED[key] = found
        while len(_TABLES) > LIMIT:
            _TABLES.popitem(last=False)
    return found


def _made(addresses: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(addresses, dtype=torch.int64, device=device)


def apart(make: Callable[[], Tensor]) -> Tensor:
    """What `make` copies from the host to a device, in memory that belongs to no graph."""
    with ThreadPoolExecutor(1) as other:
        return other.submit(make).result()

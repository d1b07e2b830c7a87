"""What programs that share a sum have in common: room for their parts, and the tickets that say who is the last."""

from __future__ import annotations

import torch
from torch import Tensor

from moecompile.codegen.gpu_tables import apart, capturing
from moecompile.codegen.gpu_text import next_power
from moecompile.kernels.gpu.config import Config

_TICKETS: dict[tuple[torch.device, int, int], Tensor] = {}  # by device, stream and number; never freed


def shared(config: Config, x: Tensor, size: tuple[int, int], tickets: int) -> list[Tensor]:
    """Where programs that share a sum leave their parts, and their tickets: none where no sum is split.

    Tickets are 0 before and after each launch, so one tensor serves all launches of a stream; it lies apart from the memory of
    graphs, which is taken back after a warm-up.  A graph that is captured gets its own: it may be replayed on any stream, beside
    launches of this one.
    """
    if config.split == 1:
        return []
    device, number = x.device, next_power(tickets)
    parts = x.new_empty((size[0], config.split, size[1]), dtype=torch.float32)
    if capturing(device):
        return [parts, torch.zeros(number, dtype=torch.int32, device=device)]
    key = device, torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0, number
    if key not in _TICKETS:
        _TICKETS[key] = apart(lambda: torch.zeros(number, dtype=torch.int32).to(device))
    return [parts, _TICKETS[key]]

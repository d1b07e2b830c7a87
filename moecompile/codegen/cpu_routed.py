"""moe::_routed_experts on CPU: router and experts by one call of C++.

For one token what is lost between two calls is no trifle: the weights that stream through the caches push Python's own data
out of them, so that every object touched is a miss.
"""

from __future__ import annotations

import array
import threading
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from moecompile.codegen import cpu_experts, cpu_router
from moecompile.codegen.cpu_experts import DTYPES, ExpertsKernel
from moecompile.codegen.cpu_router import UNSURE, Router

_kernels: dict[tuple[str, str, tuple[str, ...]], RoutedKernel] = {}
_lock = threading.Lock()


def kernel(router: str, spec: str, target: tuple[str, ...]) -> RoutedKernel:
    """The kernel of a router's text and an experts' text."""
    found = _kernels.get((router, spec, target))
    if found is None:
        made = RoutedKernel(cpu_router.router(router), cpu_experts.kernel(spec, target))
        with _lock:
            found = _kernels.setdefault((router, spec, target), made)
    return found


class RoutedKernel:
    """A router and experts that were built apart, and the layout of struct RoutedCall of kernels/cpu/call.h."""

    def __init__(self, router: Router, experts: ExpertsKernel) -> None:
        self._router, self._experts = router, experts

    def run(self, x: Tensor, logits: Tensor, bias: Tensor | None, params: Sequence[Tensor]) -> Tensor | None:
        """x [T,H], logits [..,E], bias [E] -> out [T,O]. None where the router is left to aten."""
        dtype = DTYPES[self._router.weights_dtype(logits, bias)]
        kept: list[Any] = []
        out, call = self._experts.call(x, None, None, params, None, kept)
        for scored in (False, True):
            chosen = self._router.call(logits, bias, kept, True, scored)
            if chosen is None:
                return None
            status = self._experts.routed(array.array("q", (self._router.address, *chosen, 0, dtype, 0)) + call)
            if status != UNSURE:
                self._experts.check(status, None)
                return out
        return None

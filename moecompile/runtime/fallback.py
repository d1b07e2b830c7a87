"""What runs when a kernel does not: the original nodes of the layer, kept here under the region's name.

Also counts and says so, once per layer, and compares the two while `verify` asks for it.
"""

from __future__ import annotations

import logging
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from moecompile.errors import VerifyError
from moecompile.ir import reference
from moecompile.ir.spec import ExpertsSpec

log = logging.getLogger("moecompile.runtime")


@dataclass
class Region:
    """One layer's original nodes and what is known of its kernel."""

    original: fx.GraphModule | None
    policy: str = "warn"
    verify: int = 0
    reference: bool = False  # asked for: no kernel is to be used
    broken: str = ""  # why the kernel is not used any more
    unsaved: bool = False  # a training forward ran without the kernel: what it saved is not what the kernel's backward reads
    verified: Counter[str] = field(default_factory=Counter)  # compared calls, forward and backward
    worst: float = 0.0  # the largest difference seen, in units of what the dtype explains

    @property
    def kernel(self) -> bool:
        """Is the kernel to be used?"""
        return not (self.reference or self.broken)

    def due(self, what: str) -> bool:
        """Is this call, "forward" or "backward", to be compared?"""
        return self.verified[what] < self.verify


_REGIONS: dict[str, Region] = {}
COUNTS: Counter[str] = Counter()  # calls by outcome: "kernel", "fallback", "verified"
_lock = threading.Lock()


def register(name: str, original: fx.GraphModule | None, policy: str, verify: int, reference: bool = False) -> None:
    """Keep a layer's original nodes. Registering again starts anew, but for backwards that may still be to come."""
    with _lock:
        known = _REGIONS.get(name)
        _REGIONS[name] = Region(original, policy, verify, reference, unsaved=known is not None and known.unsaved)


def region(name: str) -> Region:
    """The region of that name; a process that did not compile the graph itself has only the reference."""
    found = _REGIONS.get(name)
    if found is None:
        with _lock:
            found = _REGIONS.setdefault(name, Region(None))
    return found


def reset() -> None:
    """Forget counts and broken kernels; regions stay, compiled graphs may still name them."""
    COUNTS.clear()
    for r in _REGIONS.values():
        r.broken = ""


def failed(r: Region, e: Exception) -> None:
    """Note that a layer's kernel failed: it is not tried again."""
    if r.policy == "error":
        raise e
    with _lock:
        first = not r.broken
        r.broken = r.broken or f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}"
    if first:
        message = f"moecompile: a kernel failed, the original code runs from now on: {r.broken}"
        log.info(message, exc_info=e)
        if r.policy == "warn":
            warnings.warn(message, RuntimeWarning, stacklevel=3)


Forward = Callable[[Tensor, "Tensor | None", Sequence[Tensor]], Tensor]


def original(r: Region, spec: ExpertsSpec, ids: Tensor, sizes: Sequence[int]) -> Forward:
    """The layer as its author wrote it, or the reference, as a function of what has gradients."""

    def forward(x: Tensor, weights: Tensor | None, params: Sequence[Tensor]) -> Tensor:
        if r.original is None:
            return reference.experts(spec, x, weights, ids, params)
        given = [x, *([] if weights is None else [weights]), ids, *params, *sizes]
        device, dtype, enabled = r.original.meta["autocast"]
        with torch.autocast(device, dtype, enabled, cache_enabled=False):  # as AOTAutograd traces it
            out = r.original(*given)
        assert isinstance(out, Tensor)
        return out.contiguous()

    return forward


def compare(r: Region, layer: str, what: str, got: Sequence[Tensor], want: Sequence[Tensor], length: int) -> None:
    """Note the largest difference in units of what the dtype explains; VerifyError where it is more."""
    worst = 0.0
    for a, b in zip(got, want, strict=True):
        if a.numel() == 0 or b.numel() == 0:
            continue
        eps = torch.finfo(b.dtype).eps
        x, y = a.double(), b.double()
        same = (x == y) | (x.isnan() & y.isnan())
        scale = y[y.isfinite()].abs().max() if bool(y.isfinite().any()) else torch.ones((), dtype=y.dtype)
        allowed = 8 * eps * max(length, 1) ** 0.5 * scale.clamp(min=1e-30)
        difference = torch.where(same, torch.zeros_like(x), (x - y).abs() / allowed)
        worst = max(worst, float(difference.nan_to_num(nan=float("inf")).max()))
    COUNTS["verified"] += 1
    r.verified[what] += 1
    r.worst = max(r.worst, worst)
    if worst > 1:
        message = f"verify: the {what} of {layer} differs from the original by {worst:.3g} times what its dtype explains"
        if r.policy == "error":
            raise VerifyError(message)
        log.info(message)
        if r.policy == "warn":
            warnings.warn(f"moecompile: {message}", RuntimeWarning, stacklevel=3)

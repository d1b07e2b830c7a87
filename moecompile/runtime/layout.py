"""Where the elements of a weight view lie in the parameters of this call.

A spec describes views of parameters laid out contiguously.  A parameter may have other strides: its view then follows them,
or, where it cannot (an axis of the view runs over two dimensions of the parameter), the parameter is copied.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import lru_cache

from torch import Tensor

from moecompile.ir.spec import ExpertsSpec, Weight

Strides = tuple[int, int, int, int]  # offset, e, n, k in elements


def sizes(spec: ExpertsSpec, w: Weight) -> tuple[int, int, int]:
    """E (1 for separate parameters), N and K of a weight or bias of the spec."""
    E = spec.num_experts if w.stacked else 1
    if w is spec.down:
        return E, spec.out_features, spec.intermediate
    if w is spec.down_bias:
        return E, spec.out_features, 1
    if any(w is p for p in spec.projections):
        return E, spec.intermediate, spec.hidden
    return E, spec.intermediate, 1


def strides(w: Weight, extent: tuple[int, int, int], p: Tensor) -> Strides | None:
    """Offset and strides of the view in a parameter as it lies in memory; None where only a contiguous copy has such a view."""
    if p.is_contiguous():
        return w.offset, w.e, w.n, w.k
    return _follow(w, extent, tuple(p.stride()))


@lru_cache(4096)
def _follow(w: Weight, extent: tuple[int, int, int], real: tuple[int, ...]) -> Strides | None:
    contiguous, step = [], 1
    for size in reversed(w.shape):
        contiguous.append(step)
        step *= size
    contiguous.reverse()

    def digits(distance: int) -> list[int]:
        found = []
        for s in contiguous:
            found.append(distance // s)
            distance %= s
        return found

    parts = [digits(distance) for distance in (w.offset, w.e, w.n, w.k)]
    last = list(parts[0])
    for axis, size in zip(parts[1:], extent, strict=True):
        last = [at + (size - 1) * step for at, step in zip(last, axis, strict=True)]
    if any(at >= size for at, size in zip(last, w.shape, strict=True)):
        return None
    offset, e, n, k = (sum(d * r for d, r in zip(part, real, strict=True)) for part in parts)
    return offset, e, n, k


def covered(spec: ExpertsSpec, position: int) -> int:
    """How many elements of a parameter the views of the spec cover."""
    total = 0
    for w in spec.weights():
        E, N, K = sizes(spec, w)
        total += E * N * K * sum(p == position for p in w.params)
    return total


def overlap(spec: ExpertsSpec) -> str | None:
    """Why the views could share elements, so that gradients would have to be added; None where each element is in one."""
    for position in range(spec.num_params):
        seen: list[tuple[int, int, list[tuple[int, int]]]] = []
        for w in spec.weights():
            used = sum(p == position for p in w.params)
            if not used:
                continue
            if used > 1:
                return f"parameter {position} serves {used} experts"
            E, N, K = sizes(spec, w)
            axes: list[tuple[int, int]] = sorted((s, d) for s, d in ((w.e, E), (w.n, N), (w.k, K)) if d > 1)
            seen.append((w.offset, w.offset + sum(s * (d - 1) for s, d in axes), axes))
            if not _distinct(axes):
                return f"a view of parameter {position} reads elements more than once"
        seen.sort(key=lambda view: view[0])
        for (a, a_last, axes), (b, _, others) in itertools.pairwise(seen):
            if a_last < b:
                continue
            if axes != others or not _distinct(sorted([*axes, (b - a, 2)])):
                both = [(s, max(d, dict(others).get(s, 1))) for s, d in axes] + [(b - a, 2)]
                if [s for s, _ in axes] != [s for s, _ in others] or not _distinct(sorted(both)):
                    return f"two views of parameter {position} may share elements"
    return None


def _distinct(axes: Sequence[tuple[int, int]]) -> bool:
    """Whether steps along axes (stride, size), ascending, reach every element once."""
    reach = 0
    for stride, size in axes:
        if stride <= reach:
            return False
        reach += stride * (size - 1)
    return True

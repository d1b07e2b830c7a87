"""What the dimensions of a tensor are indexed by.

An axis is a name and a size; a dimension is a row-major product of axes; axes of size 1 are left out, so that views which
only add or drop unit dimensions change nothing.  Names:

    t token     k slot (the k-th chosen expert)     e expert = (g group, m member)     p position in expert order
    s position among the pairs of one expert        c feature = (major, minor)      f, h the two feature axes of a gathered weight
    b broadcast (constant along it)                 0, 1, 2 .. the dimensions of a value nothing is known of

All sizes are plain ints.  In a graph with symbolic sizes each symbol stands for a large number that no other size shares
(walk.py), so two sizes that are equal here are equal for every value of the symbols.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

Axis = tuple[str, int]
Dim = tuple[Axis, ...]
Dims = tuple[Dim, ...]

_SPLIT = {"t": ("t", "t"), "e": ("g", "m"), "c": ("major", "minor")}
_WHOLE = {("t", "t"): "t", ("g", "m"): "e", ("major", "minor"): "c"}


def dim(*axes: Axis) -> Dim:
    """Axes in row-major order as one dimension: unit axes dropped, pieces of one axis merged."""
    out: list[Axis] = []
    for name, size in axes:
        if size == 1:
            continue
        whole = _WHOLE.get((out[-1][0], name)) if out else None
        if whole is not None:
            out[-1] = (whole, out[-1][1] * size)
        else:
            out.append((name, size))
    return tuple(out)


def fresh(shape: Sequence[int]) -> Dims:
    """The dimensions of a value nothing is known of."""
    return tuple(dim((str(i), int(s))) for i, s in enumerate(shape))


def axes(dims: Dims) -> list[Axis]:
    return [a for d in dims for a in d]


def sizes(dims: Dims) -> tuple[int, ...]:
    return tuple(math.prod(s for _, s in d) for d in dims)


def size_of(dims: Dims, name: str) -> int:
    """The size of the axis of that name (its pieces multiplied); 1 where there is none."""
    return math.prod(s for n, s in axes(dims) if n == name)


def in_pair_order(dims: Dims) -> bool:
    """Are the pair axes in the order token, slot, when the dimensions are flattened?"""
    found = [n for n, _ in axes(dims) if n in "tk"]
    return found == sorted(found, key="tk".index)


def in_natural_order(dims: Dims) -> bool:
    """Do the numbered axes of an unknown value come in the order of its own dimensions, when flattened?"""
    found = [int(n) for n, _ in axes(dims) if n.isdigit()]
    return found == sorted(found)


def names(dims: Dims) -> set[str]:
    return {n for n, _ in axes(dims)}


def regroup(dims: Dims, shape: Sequence[int], k: int = 0) -> Dims | None:
    """The dimensions after a row-major view to `shape`, or None where the view cuts an axis that has no parts.

    With `k`, an axis of token-slot pairs ("r") may be cut into tokens and k slots.
    """
    rest = axes(dims)
    if math.prod(shape) != math.prod(s for _, s in rest) or 0 in shape:
        return None
    out: list[Dim] = []
    for size in shape:
        taken: list[Axis] = []
        need = int(size)
        while need > 1:
            name, have = rest.pop(0)
            if need % have == 0:
                taken.append((name, have))
                need //= have
                continue
            parts = ("t", "k") if name == "r" and have // need == k else _SPLIT.get(name)
            if parts is None or have % need:
                return None
            taken.append((parts[0], need))
            rest.insert(0, (parts[1], have // need))
            need = 1
        out.append(dim(*taken))
    return tuple(out)


def broadcast(dims: Dims, shape: Sequence[int]) -> Dims | None:
    """The dimensions after expand() to `shape`: new extent is a broadcast axis. None where there would be two."""
    lead = len(shape) - len(dims)
    out: list[Dim] = []
    for d, size in zip(((),) * lead + dims, shape, strict=True):
        out.append(dim(("b", int(size))) if not d and size != 1 else d)
    return tuple(out) if sum(n == "b" for n, _ in axes(tuple(out))) <= 1 else None


def rename(dims: Dims, mapping: dict[str, str]) -> Dims:
    return tuple(dim(*((mapping.get(n, n), s) for n, s in d)) for d in dims)


def without(dims: Dims, positions: Iterable[int], keep: bool) -> Dims:
    """The dimensions after a reduction over `positions`."""
    gone = set(positions)
    return tuple(() if i in gone else d for i, d in enumerate(dims) if keep or i not in gone)


def align(a: Dims, b: Dims) -> Dims | None:
    """The dimensions of an elementwise op on values with dimensions a and b, or None where they do not agree.

    Broadcasts as PyTorch does; a broadcast axis takes the name of what it meets.
    """
    n = max(len(a), len(b))
    a, b = ((),) * (n - len(a)) + a, ((),) * (n - len(b)) + b
    out: list[Dim] = []
    for x, y in zip(a, b, strict=True):
        met = _meet(x, y)
        if met is None:
            return None
        out.append(met)
    return tuple(out)


def _meet(x: Dim, y: Dim) -> Dim | None:
    if x == y or not y:
        return x
    if not x:
        return y
    for one, other in ((x, y), (y, x)):
        if ("b" in {n for n, _ in one}) and math.prod(s for _, s in one) == math.prod(s for _, s in other):
            merged = _unify(one, other)
            if merged is not None:
                return merged
    return None


def _unify(x: Dim, y: Dim) -> Dim | None:
    """x, whose broadcast axes may take the names of axes of y."""
    if len(x) != len(y):
        return None
    out: list[Axis] = []
    for (n, s), (m, q) in zip(x, y, strict=True):
        if s != q or (n != m and "b" not in (n, m)):
            return None
        out.append((m if n == "b" else n, s))
    return dim(*out)

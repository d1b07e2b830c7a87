"""The dispatch mode that gives a role to every tensor an ATen op returns, and what rules may ask of it.

RULES says for each ATen overload packet how it maps the roles of its arguments to roles of its results: the first rule that has
an answer counts, and each rule answers only for roles it is about.  An op without a rule gives none.  Roles are read before a
write is counted, so an in-place op may carry its own role on.
"""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import pkgutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moecompile.ir.surgery import value_of
from moecompile.recognize import dims as D
from moecompile.recognize.roles import (
    Chosen,
    DenseWeights,
    Gathered,
    Ids,
    Inverse,
    Leaf,
    Mask,
    Pairs,
    PairSlot,
    PairToken,
    Perm,
    Ref,
    Role,
    Routing,
    SortedIds,
    Space,
    Stack,
    Sum,
    SumRows,
    holds,
)

aten = torch.ops.aten
Rule = Callable[..., Any]  # (walker, result, *args of the op) -> role, list of roles, or None
RULES: dict[object, list[Rule]] = {}


def rule(*packets: object) -> Callable[[Rule], Rule]:
    """Register a rule for overload packets, or for "namespace.name" of an op that another package may register."""

    def add(function: Rule) -> Rule:
        for packet in packets:
            RULES.setdefault(packet, []).append(function)
        return function

    return add


def load_rules() -> None:
    """Import every file of rules/: adding a rule is adding a file."""
    from moecompile.recognize import rules

    for module in pkgutil.iter_modules(rules.__path__):
        importlib.import_module(f"{rules.__name__}.{module.name}")


@dataclass
class Loss:
    """A value of a layer in the making reached an op that no rule follows."""

    node: fx.Node
    op: str
    role: Role


@dataclass
class Copy:
    """A tensor that was a copy of another, cast to `to` if not None, at these versions of the two storages."""

    of: Tensor
    to: torch.dtype | None
    versions: tuple[int, int]


def _storage(t: Tensor) -> int | None:
    """The identity of t's memory; None for a tensor of a functorch transform, which has none."""
    try:
        return int(t.untyped_storage()._cdata)
    except NotImplementedError:
        return None


class GenericSizes:
    """Plain ints for symbolic sizes: each symbol a large number with a prime of its own."""

    def __init__(self) -> None:
        self.symbols: dict[sympy.Symbol, int] = {}
        self.values: set[int] = set()  # numbers that stand for a symbolic size
        self.primes = (p for p in itertools.count(100_003, 2) if sympy.isprime(p))

    def next(self) -> int:
        return 16 * next(self.primes)

    def __call__(self, v: Any) -> Any:
        """v, or its value at the generic point if it is symbolic."""
        if isinstance(v, torch.SymFloat):  # a constant of the model: its value, which RoleMode.pinned remembers
            return float(v.node.hint) if v.node.has_hint() else float("nan")
        if isinstance(v, (torch.SymInt, torch.SymBool)):
            expr = v.node.expr
            for s in expr.free_symbols:
                if s not in self.symbols:
                    self.symbols[s] = self.next()
            value = expr.subs(self.symbols)
            if isinstance(v, torch.SymBool):
                return bool(value)
            if expr.free_symbols:
                self.values.add(int(value))
            return int(value)
        return v


def _telling(role: Role) -> bool:
    """Is the loss of this role worth a line to the user? Sorted integers and table look-ups alone are in any model."""
    if isinstance(role, (Gathered, SortedIds)):
        return role.routing.choice is not None
    if isinstance(role, Pairs):
        if role.space.kind == "token" and role.top_k == 1 and "'mm'" not in repr(role.expr):
            return False  # a value times the best score: in any classifier
        return (role.routing is not None and role.routing.choice is not None) or "'mm'" in repr(role.expr)
    return isinstance(role, SumRows) and role.added is not None


_INDEXING = (aten.index, aten.index_select, aten.gather, aten.index_put, aten.index_put_, aten.index_copy, aten.index_copy_)


def _index_lost(packet: object, x: Tensor, role: Role) -> bool:
    """Is this an op that takes or puts numbers by a router's choice, as the layers do? Integers are indexed in any model."""
    if packet not in _INDEXING or not x.is_floating_point() or getattr(role, "routing", None) is None:
        return False
    by_expert = isinstance(role, (PairToken, PairSlot, Perm, Inverse, Mask)) or (isinstance(role, Ids) and x.dim() > 2)
    return by_expert and role.routing.choice is not None  # type: ignore[attr-defined]


class RoleMode(TorchDispatchMode):
    """Watches ATen ops and gives roles to the tensors they return."""

    def __init__(self, sizes: GenericSizes) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sizes = sizes
        self.roles: dict[int, tuple[Role, int]] = {}  # id(tensor) -> role, version of its storage when it was given
        self.version: Counter[object] = Counter()  # storage -> writes seen
        self.written: dict[object, list[int]] = {}  # storage -> steps at which it was written
        self.written_at: dict[int, set[object]] = {}  # step -> storages written at it
        self.group: dict[int, object] = {}  # storage here -> storage of Dynamo's example values, which know all aliases
        self.alive: list[Any] = []  # ids are unique only among living tensors
        self.base: dict[int, Tensor] = {}  # id(tensor) -> what it is a view of, as far as gradients flow through
        self.copies: dict[int, Copy] = {}  # id(copy) -> what it is a copy of
        self.node_of: dict[int, fx.Node] = {}  # id(tensor) -> the node that first returned it
        self.refs: dict[tuple[int, int], Ref] = {}
        self.losses: list[Loss] = []
        self.counted: dict[Space, int] = {}  # the pairs of an expert -> how many there are
        self.steps = 0
        self.current: fx.Node | None = None
        self.symbolic = False  # the node being run has scalars without a value among its arguments
        self.floats: list[torch.SymFloat] = []  # those that have one and may have another in another call
        self.asked = False  # a rule has read such a value
        self.pinned: list[torch.SymFloat] = []  # what roles rest on: a rewrite must guard it
        self.follow = True  # False where the graph switched gradients off or on
        self.routed = False  # True once a moe.route was met: the graph has been rewritten before
        self.orders = itertools.count(1)
        self.routings = itertools.count(1)

    # ------------------------------------------------------------ what rules ask

    def key(self, t: Tensor) -> object:
        storage = _storage(t)
        return ("transformed", id(t)) if storage is None else self.group.get(storage, storage)

    def get(self, t: object) -> Role | None:
        """The role of a tensor, if it still holds."""
        found = self.roles.get(id(t))
        if found is None or not isinstance(t, Tensor) or found[1] != self.version[self.key(t)]:
            return None
        return found[0]

    def put(self, t: Tensor, role: Role | None) -> None:
        self.alive.append(t)
        if role is None:
            self.roles.pop(id(t), None)
        else:
            self.roles[id(t)] = (role, self.version[self.key(t)])

    def ref(self, t: Tensor) -> Ref | None:
        """The value as a live-in, if a node of the graph holds it."""
        node = self.node_of.get(id(t))
        if node is None:
            return None
        key = (id(t), self.version[self.key(t)])
        if key not in self.refs:
            self.refs[key] = Ref(node, t, self.key(t), self.steps)
        return self.refs[key]

    def leaf(self, t: object) -> Leaf | None:
        """The tensor as a live-in: seen through views and casts, or, whatever else it is, as the node that holds it."""
        if not isinstance(t, Tensor):
            return None
        role = self.get(t)
        if isinstance(role, Leaf):
            return role
        ref = self.ref(t)
        return None if ref is None else Leaf(D.fresh(t.shape), ref)

    def number(self, v: object) -> float | None:
        """A scalar argument that is a constant of the graph, not a symbolic size."""
        if not isinstance(v, (int, float)) or self.symbolic:
            return None
        self.asked = bool(self.floats)
        return float(v)

    def routing(self, t: Tensor, **facts: Any) -> Routing:
        return Routing(ids=self.ref(t), id=next(self.routings), **facts)

    def copied(self, out: Tensor, x: Tensor, to: torch.dtype | None = None) -> None:
        """Note that `out` is a copy of x, cast to `to`."""
        if self.follow and id(out) not in self.copies:
            self.copies[id(out)] = Copy(x, to, (self.version[self.key(x)], self.version[self.key(out)]))

    def stack(self, t: object, features: int) -> Stack | None:
        """t as E matrices (features = 2), E vectors (1) with a leading expert dimension, or without it a single one."""
        if not isinstance(t, Tensor) or t.dim() not in (features, features + 1) or not t.is_floating_point():
            return None
        cast: torch.dtype | None = None
        source, offset, strides = t, int(t.storage_offset()), t.stride()
        while True:
            root = self.base.get(id(source))
            if root is None:
                return None
            if self.node_of.get(id(root)) is not None and root.is_contiguous():
                break
            copy = self.copies.get(id(root))
            if copy is None or copy.versions != (self.version[self.key(copy.of)], self.version[self.key(root)]):
                return None
            if cast is not None and not holds(root.dtype, copy.of.dtype):  # rounded, and cast again
                return None
            found = _through(copy.of, root, offset, strides, t.shape)
            if found is None:
                return None
            cast = cast or copy.to
            offset, strides = found
            source = copy.of
        ref = self.ref(root)
        assert ref is not None
        e = int(strides[0]) if t.dim() > features else None
        return Stack(
            ref,
            tuple(root.shape),
            int(offset - root.storage_offset()),
            e,
            tuple(strides[-features:]),
            tuple(t.shape[-features:]),
            int(t.shape[0]) if t.dim() > features else 1,
            cast,
        )

    # ------------------------------------------------------------ the dispatch

    def wrote(self, t: Tensor) -> None:
        key = self.key(t)
        self.version[key] += 1
        self.written.setdefault(key, []).append(self.steps)
        self.written_at.setdefault(self.steps, set()).add(key)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        packet = func.overloadpacket
        if packet is aten.nonzero:  # a static fake mode cannot give its size
            out = args[0].new_empty((self._count(args[0]), args[0].dim()), dtype=torch.int64)
        elif packet is aten.bincount:
            out = args[0].new_empty((self._bins(args, kwargs),), dtype=torch.int64)
        elif packet is aten.index and any(isinstance(i, Tensor) and i.dtype == torch.bool for i in args[1]):
            out = self._index_by_mask(*args)
        else:
            out = func(*args, **kwargs)
        if packet is torch.ops.prim.device or packet is aten.sym_size:
            return out
        outs = list(out) if isinstance(out, (tuple, list)) else [out]
        for t in outs:
            if isinstance(t, Tensor) and id(t) not in self.base:
                self._descend(t, args, packet)
        found: list[Role | None] = [None]
        self.asked = False
        for function in RULES.get(packet) or RULES.get(str(packet)) or ():
            said = function(self, out, *args, **kwargs)
            found = said if isinstance(said, list) else [said]
            if any(found):
                break
        if self.asked and any(found):
            self.pinned += self.floats
        if not self.follow:  # integers carry no gradient: only they may cross a change of grad mode
            for role in found:
                if isinstance(role, Sum) and self.current is not None:
                    self.losses.append(Loss(self.current, "the experts run under another grad mode than the rest; it", role))
            found = [r if isinstance(t, Tensor) and not t.is_floating_point() else None for r, t in zip(found, outs, strict=False)]
        if not any(found) and self.current is not None:
            self._lost(packet, args)
        for argument, schema in zip(args, func._schema.arguments, strict=False):
            if schema.alias_info is not None and schema.alias_info.is_write:
                for t in tree_leaves(argument):
                    if isinstance(t, Tensor):
                        self.wrote(t)
        for schema in func._schema.arguments:
            if schema.kwarg_only and schema.alias_info is not None and schema.alias_info.is_write and schema.name in kwargs:
                self.wrote(kwargs[schema.name])
        for t, role in itertools.zip_longest(outs, found[: len(outs)]):
            if isinstance(role, (Chosen, DenseWeights)) and role.base is None:
                role = dataclasses.replace(role, base=t)
            if isinstance(t, Tensor) and (role is not None or id(t) not in self.node_of or func._schema.is_mutable):
                self.put(t, role)
        return out

    def _descend(self, t: Tensor, args: Any, packet: object) -> None:
        """Note what t is a view of. Where gradients do not flow from one to the other, t stands for itself."""
        self.alive.append(t)
        self.base[id(t)] = t
        if self.follow and packet is not aten.detach:
            storage = _storage(t)
            for a in tree_leaves(args):
                if isinstance(a, Tensor) and storage is not None and _storage(a) == storage:
                    self.base[id(t)] = self.base.get(id(a), a)
                    return

    def _lost(self, packet: Any, args: Any) -> None:
        for a in tree_leaves(args):
            role = self.get(a)
            if role is not None and (_telling(role) or _index_lost(packet, args[0], role)):
                assert self.current is not None
                self.losses.append(Loss(self.current, str(packet), role))
                return

    def _count(self, mask: Tensor) -> int:
        """How many ones a mask has: the size Dynamo gave the result of the node being run.

        Masks of the same pairs have the same number of them, although Dynamo calls it by several names.
        """
        role = self.get(mask)
        known = self.counted.get(role.space) if isinstance(role, Mask) else None
        size = 0
        for v in tree_leaves(value_of(self.current)) if self.current is not None else ():
            s = v.shape[0] if isinstance(v, Tensor) and v.dim() else None
            if isinstance(s, torch.SymInt) and not size:
                if known is not None and isinstance(s.node.expr, sympy.Symbol):
                    self.sizes.symbols.setdefault(s.node.expr, known)
                size = int(self.sizes(s))
        size = size or self.sizes.next()
        if isinstance(role, Mask):
            size = self.counted.setdefault(role.space, size)
        return size

    def _bins(self, args: Any, kwargs: Any) -> int:
        v = value_of(self.current) if self.current is not None else None
        if isinstance(v, Tensor) and v.dim() == 1:
            return int(self.sizes(v.shape[0]))
        return int(kwargs.get("minlength", args[2] if len(args) > 2 else 0)) or self.sizes.next()

    def _index_by_mask(self, x: Tensor, indices: Any) -> Tensor:
        first = next(i for i, m in enumerate(indices) if m is not None)
        mask = indices[first]
        if sum(m is not None for m in indices) != 1 or mask.dtype != torch.bool:
            raise NotImplementedError("a mask among several indices")
        shape = (*x.shape[:first], self._count(mask), *x.shape[first + mask.dim() :])
        return x.new_empty(shape)


def _through(
    of: Tensor, copy: Tensor, offset: int, strides: tuple[int, ...], sizes: Sequence[int]
) -> tuple[int, tuple[int, ...]] | None:
    """Offset and strides that find in `of` what the given ones find in its copy, which may lie otherwise in memory: a slice or
    an expansion is copied to a dense tensor. None where a step is no number of steps along one dimension of the copy."""
    if of.shape != copy.shape:
        return None
    begin, begin_copy = int(of.storage_offset()), int(copy.storage_offset())
    if of.stride() == copy.stride():
        return offset + begin - begin_copy, strides
    order = sorted((d for d in range(copy.dim()) if copy.shape[d] > 1), key=lambda d: copy.stride()[d], reverse=True)
    left, moved = offset - begin_copy, begin
    reached: dict[int, int] = {}  # the furthest coordinate along each dimension of the copy
    for d in order:
        reached[d], left = divmod(left, copy.stride(d))
        moved += reached[d] * of.stride(d)
    if left:
        return None
    steps: list[int] = []
    for stride, size in zip(strides, sizes, strict=True):
        along = next((d for d in order if 0 < copy.stride(d) <= stride), None)
        if size == 1:
            steps.append(0)
            continue
        if along is None:
            return None
        count, rest = divmod(stride, copy.stride(along))
        reached[along] += count * (size - 1)
        if rest:
            return None
        steps.append(count * of.stride(along))
    within = all(0 <= at < copy.shape[d] for d, at in reached.items())
    return (moved, tuple(steps)) if within else None

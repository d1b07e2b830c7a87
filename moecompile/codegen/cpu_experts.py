"""The call of a built expert kernel."""

from __future__ import annotations

import array
import ctypes
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moecompile.codegen import build_cpp, cpu_source
from moecompile.ir.spec import ExpertsSpec, OutOfRange, Weight, WeightOn, experts_from_text
from moecompile.runtime import kept_memory, layout

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as enum Dtype of call.h
_WEIGHT_ON = {WeightOn.NOWHERE: 0, WeightOn.OUTPUT: 1, WeightOn.INPUT: 2}
_ABSENT = (0, 0, 0, 0, 0, 0, 0)
_BAD_ID, _NO_MEMORY = 1, 2

_kernels: dict[tuple[str, tuple[str, ...]], ExpertsKernel] = {}
_lock = threading.Lock()


def kernel(spec: str, target: tuple[str, ...]) -> ExpertsKernel:
    found = _kernels.get((spec, target))
    if found is None:
        with _lock:
            found = _kernels.get((spec, target))
            if found is None:
                found = _kernels[spec, target] = ExpertsKernel(experts_from_text(spec), target)
    return found


class ExpertsKernel:
    """The built kernel of one spec, and the layout of its argument: struct Call of kernels/cpu/call.h."""

    def __init__(self, spec: ExpertsSpec, target: tuple[str, ...]) -> None:
        self.spec = spec
        self.saved_columns = len(spec.projections) * spec.intermediate
        library = build_cpp.load(cpu_source.source(spec), target)
        self._forward = build_cpp.entry(library, "forward")
        self.routed = build_cpp.entry(library, "routed")
        self._backward = build_cpp.entry(library, "backward")
        merged = cpu_source.interleaved(spec)
        self._merged = merged != 0
        order = -1 if merged < 0 else 1
        self._projections = spec.projections[::order]
        self._matrices = (*self._projections, spec.down)
        self._views: tuple[Weight | None, ...] = (*self._projections, *spec.projection_bias[::order], spec.down, spec.down_bias)
        self._extents = {id(w): layout.sizes(spec, w) for w in spec.weights()}
        self._matrix_params = frozenset(p for w in self._matrices for p in w.params)
        self._sizes = (spec.top_k, spec.hidden, spec.intermediate, spec.out_features, spec.num_experts)
        self._fixed = (_WEIGHT_ON[spec.weight_on], spec.out_of_range is OutOfRange.INDEX, self._merged)
        self._no_gradients = array.array("q", bytes(8 * (3 + 7 * len(self._views))))
        self._last: tuple[list[Any], array.array[int], list[Any]] | None = None  # parameters, their addresses, what holds those
        self._covered = tuple(layout.covered(spec, p) for p in range(spec.num_params))

    def run(self, x: Tensor, weights: Tensor | None, ids: Tensor, params: Sequence[Tensor], saved: Tensor | None) -> Tensor:
        """x [T,H], weights [T,K] or None, ids [T,K] -> out [T,O]; fills saved [R, P*F]."""
        kept: list[Any] = []
        weights, ids = _weights(weights), _ids(ids)
        out, call = self.call(x, weights, ids, params, saved, kept)
        self.check(self._forward(call), ids)
        return out

    def call(
        self, x: Tensor, weights: Tensor | None, ids: Tensor | None, params: Sequence[Tensor], saved: Tensor | None, kept: list[Any]
    ) -> tuple[Tensor, array.array[int]]:
        """The result, still empty, and struct Call; what it points into is appended to `kept`."""
        x, dtype = self._rows(x), self.spec.out_dtype
        kept.append(x)
        out = torch.empty((x.shape[0], self.spec.out_features), dtype=dtype)
        head = self._head(x, weights, ids, out.data_ptr(), DTYPES[dtype], saved)
        return out, head + self._addresses(params, kept) + self._no_gradients

    def run_backward(
        self,
        grad: Tensor,
        x: Tensor,
        weights: Tensor | None,
        ids: Tensor,
        params: Sequence[Tensor],
        saved: Tensor,
        needs: Sequence[bool],
    ) -> list[Tensor]:
        """Gradients of x, weights and params where needed, else empty tensors."""
        s = self.spec
        rows, w, ids = self._rows(x), _weights(weights), _ids(ids)
        grad = grad.to(s.dtype).contiguous()
        T, H = rows.shape
        dx = torch.empty((T, H), dtype=s.dtype) if needs[0] else None
        dw = torch.empty(ids.shape, dtype=torch.float32) if needs[1] and weights is not None else None
        gradients = [self._gradient(p, i, T) if needs[2 + i] else None for i, p in enumerate(params)]
        kept: list[Any] = []
        call = [*self._head(rows, w, ids, 0, 0, saved), *self._addresses(params, kept)]
        call += [grad.data_ptr(), 0 if dx is None else dx.data_ptr(), 0 if dw is None else dw.data_ptr()]
        for view in self._views:
            call += self._gradient_address(view, gradients, kept)
        if T:
            self.check(self._backward(call), ids)
        elif dw is not None:
            dw.zero_()
        empty = x.new_empty(0)
        found = [empty if dx is None else dx.to(x.dtype), empty if dw is None or weights is None else dw.to(weights.dtype)]
        return found + [empty if g is None else g.to(p.dtype) for g, p in zip(gradients, params, strict=True)]

    def _rows(self, x: Tensor) -> Tensor:
        if x.dtype is not self.spec.dtype:
            x = x.to(self.spec.dtype)
        return x if x.stride(1) == 1 else x.contiguous()

    def _head(
        self, x: Tensor, weights: Tensor | None, ids: Tensor | None, out: int, out_dtype: int, saved: Tensor | None
    ) -> array.array[int]:
        values = (
            *(x.shape[0], *self._sizes, torch.get_num_threads(), *self._fixed),
            *(x.data_ptr(), x.stride(0), *((0, 0) if ids is None else (ids.data_ptr(), ids.dtype == torch.int64))),
            *((0, 0) if weights is None else (weights.data_ptr(), DTYPES[weights.dtype])),
            *(out, out_dtype, 0 if saved is None else saved.data_ptr()),
        )
        return array.array("q", values)

    def _addresses(self, params: Sequence[Tensor], kept: list[Any]) -> array.array[int]:
        """struct View of every weight; what they point into is appended to `kept`.  As last time, where the parameters are."""
        given = [(p.data_ptr(), p.stride(), p.dtype) for p in params]
        last = self._last
        if last is None or last[0] != given:
            holds: list[Any] = []
            words = array.array("q", self._new_addresses(params, holds))
            last = (given, words, holds)
            if not any(isinstance(h, Tensor) for h in holds):  # a copy is of these values only
                self._last = last
        kept.append(last[2])
        return last[1]

    def _new_addresses(self, params: Sequence[Tensor], holds: list[Any]) -> list[int]:
        """Copies, where there have to be any, and tables are appended to `holds`."""
        found: list[int] = []
        given = self._converted(params)
        holds += [p for p, q in zip(given, params, strict=True) if p is not q]
        for w in self._views:
            if w is None:
                found += _ABSENT
            elif w.stacked:
                p = given[w.params[0]]
                at = layout.strides(w, self._extents[id(w)], p)
                if at is None or (self._merged and not p.is_contiguous()):
                    p = p.contiguous()
                    holds.append(p)
                    at = w.offset, w.e, w.n, w.k
                found += (p.data_ptr(), 0, at[1], at[2], at[3], at[0], DTYPES[p.dtype])
            else:
                found += self._table(w, [given[i] for i in w.params], holds)
        return found

    def _table(self, w: Weight, tensors: list[Tensor], holds: list[Any]) -> tuple[int, ...]:
        """One tensor per expert.  Where their strides differ they are copied."""
        at = {layout.strides(w, self._extents[id(w)], p) for p in tensors}
        if len(at) > 1 or None in at:
            tensors = [p.contiguous() for p in tensors]
            holds += tensors
            at = {(w.offset, w.e, w.n, w.k)}
        offset, _, n, k = at.pop() or (0, 0, 0, 0)
        table = (ctypes.c_int64 * len(tensors))(*[p.data_ptr() for p in tensors])
        holds.append(table)
        return 0, ctypes.addressof(table), 0, n, k, offset, DTYPES[tensors[0].dtype]

    def _converted(self, params: Sequence[Tensor]) -> Sequence[Tensor]:
        """Matrices in the dtype of the spec; biases in any dtype the kernel reads."""
        dtype = self.spec.dtype
        if all(p.dtype is dtype for p in params):
            return params
        return [p if i not in self._matrix_params and p.dtype in DTYPES else p.to(dtype) for i, p in enumerate(params)]

    def _gradient(self, p: Tensor, position: int, T: int) -> Tensor:
        dtype = p.dtype if position not in self._matrix_params and p.dtype in DTYPES else self.spec.dtype
        whole = self._covered[position] == p.numel() and T > 0
        return kept_memory.empty(p.shape, dtype) if whole else torch.zeros(p.shape, dtype=dtype)

    def _gradient_address(self, w: Weight | None, gradients: list[Tensor | None], kept: list[Any]) -> tuple[int, ...]:
        if w is None:
            return _ABSENT
        if w.stacked:
            g = gradients[w.params[0]]
            return _ABSENT if g is None else (g.data_ptr(), 0, w.e, w.n, w.k, w.offset, DTYPES[g.dtype])
        tensors = [gradients[i] for i in w.params]
        if all(g is None for g in tensors):
            return _ABSENT
        if any(g is None for g in tensors):  # some are frozen: the kernel fills the rest too, and they are dropped
            made = next(g for g in tensors if g is not None)
            tensors = [torch.empty_like(made) if g is None else g for g in tensors]
            kept.append(tensors)
        whole = [g for g in tensors if g is not None]
        table = (ctypes.c_int64 * len(whole))(*[g.data_ptr() for g in whole])
        kept.append(table)
        return 0, ctypes.addressof(table), 0, w.n, w.k, w.offset, DTYPES[whole[0].dtype]

    def check(self, status: int, ids: Tensor | None) -> None:
        """Raise what the status says. ids None: a router's own, which are in range."""
        if status == _BAD_ID and ids is not None:
            E = self.spec.num_experts
            raise IndexError(f"expert id out of range: found {int(ids.min())}..{int(ids.max())}, needs -{E}..{E - 1}")
        if status == _NO_MEMORY:
            raise MemoryError("the CPU expert kernel found no memory for its workspace")


def _weights(weights: Tensor | None) -> Tensor | None:
    if weights is None:
        return None
    return (weights if weights.dtype in DTYPES else weights.float()).contiguous()


def _ids(ids: Tensor) -> Tensor:
    return (ids if ids.dtype in (torch.int64, torch.int32) else ids.long()).contiguous()

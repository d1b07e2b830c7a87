"""The moe.* ops on CPU: what is supported, and the call of a built kernel."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moecompile.codegen import build_cpp, cpu_router, cpu_source
from moecompile.codegen.cpu_router import prepare_router, supports_router
from moecompile.ir.ops import PlainRouter
from moecompile.ir.spec import ExpertsSpec, OutOfRange, Weight, WeightOn, experts_from_text
from moecompile.runtime import kept_memory, layout

__all__ = ["CpuImplementation", "prepare_experts", "prepare_router", "supports_experts", "supports_router"]

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as enum Dtype of call.h
_WEIGHT_ON = {WeightOn.NOWHERE: 0, WeightOn.OUTPUT: 1, WeightOn.INPUT: 2}
_ABSENT = (0, 0, 0, 0, 0, 0, 0)
_BAD_ID, _NO_MEMORY = 1, 2


def supports_experts(spec: ExpertsSpec) -> str | None:
    """Why the CPU kernel cannot run the spec, or None."""
    for name, dtype in (("dtype", spec.dtype), ("output dtype", spec.out_dtype)):
        if dtype not in _DTYPES:
            return f"{name} {dtype} is not float32, bfloat16 or float16"
    if len(spec.projections) > 4:
        return f"{len(spec.projections)} projections, the CPU kernel is made for up to 4"
    return layout.overlap(spec)


def prepare_experts(spec: ExpertsSpec, train: bool) -> None:
    """Build and load the kernel of the spec now. Raises BuildError.  One library holds forward and backward."""
    _kernel(spec.text(), build_cpp.NATIVE)


class CpuImplementation(PlainRouter):
    """Satisfies ir.ops.Implementation.  `target`: the compiler's flags for the instruction set."""

    def __init__(self, target: tuple[str, ...] = build_cpp.NATIVE) -> None:
        self._target = target

    def route(self, logits: Tensor, bias: Tensor | None, spec: str) -> tuple[Tensor, Tensor]:
        return cpu_router.route(logits, bias, spec)

    def experts(
        self, x: Tensor, weights: Tensor | None, ids: Tensor, params: Sequence[Tensor], sizes: Sequence[int], spec: str, region: str
    ) -> Tensor:
        kernel = _kernel(spec, self._target)
        return kernel.run(x, weights, ids, params, None)

    def experts_train(
        self, x: Tensor, weights: Tensor | None, ids: Tensor, params: Sequence[Tensor], sizes: Sequence[int], spec: str, region: str
    ) -> tuple[Tensor, Tensor]:
        kernel = _kernel(spec, self._target)
        saved = x.new_empty(ids.numel(), kernel.saved_columns, dtype=kernel.spec.dtype)
        return kernel.run(x, weights, ids, params, saved), saved

    def experts_bwd(
        self,
        grad: Tensor,
        x: Tensor,
        weights: Tensor | None,
        ids: Tensor,
        params: Sequence[Tensor],
        sizes: Sequence[int],
        spec: str,
        region: str,
        saved: Tensor,
        needs: Sequence[bool],
    ) -> list[Tensor]:
        return _kernel(spec, self._target).run_backward(grad, x, weights, ids, params, saved, needs)


_kernels: dict[tuple[str, tuple[str, ...]], ExpertsKernel] = {}
_lock = threading.Lock()


def _kernel(spec: str, target: tuple[str, ...]) -> ExpertsKernel:
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
        self._backward = build_cpp.entry(library, "backward")
        merged = cpu_source.interleaved(spec)
        self._merged = merged != 0
        order = -1 if merged < 0 else 1
        self._projections = spec.projections[::order]
        self._matrices = (*self._projections, spec.down)
        self._views: tuple[Weight | None, ...] = (*self._projections, *spec.projection_bias[::order], spec.down, spec.down_bias)
        self._extents = {id(w): layout.sizes(spec, w) for w in spec.weights()}
        self._matrix_params = frozenset(p for w in self._matrices for p in w.params)
        self._covered = tuple(layout.covered(spec, p) for p in range(spec.num_params))

    def run(self, x: Tensor, weights: Tensor | None, ids: Tensor, params: Sequence[Tensor], saved: Tensor | None) -> Tensor:
        """x [T,H], weights [T,K] or None, ids [T,K] -> out [T,O]; fills saved [R, P*F]."""
        s = self.spec
        x, weights, ids = self._rows(x), _weights(weights), _ids(ids)
        out = torch.empty((x.shape[0], s.out_features), dtype=s.out_dtype)
        kept: list[Any] = []
        head = self._head(x, weights, ids, out, _DTYPES[s.out_dtype], saved)
        call = [*head, *self._addresses(params, kept), *self._no_gradients]
        self._check(self._forward(call), ids)
        return out

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
        call = [*self._head(rows, w, ids, None, 0, saved), *self._addresses(params, kept)]
        call += [grad.data_ptr(), 0 if dx is None else dx.data_ptr(), 0 if dw is None else dw.data_ptr()]
        for view in self._views:
            call += self._gradient_address(view, gradients, kept)
        if T:
            self._check(self._backward(call), ids)
        elif dw is not None:
            dw.zero_()
        empty = x.new_empty(0)
        found = [empty if dx is None else dx.to(x.dtype), empty if dw is None or weights is None else dw.to(weights.dtype)]
        return found + [empty if g is None else g.to(p.dtype) for g, p in zip(gradients, params, strict=True)]

    @property
    def _no_gradients(self) -> tuple[int, ...]:
        return (0,) * (3 + 7 * len(self._views))

    def _rows(self, x: Tensor) -> Tensor:
        if x.dtype is not self.spec.dtype:
            x = x.to(self.spec.dtype)
        return x if x.stride(1) == 1 else x.contiguous()

    def _head(
        self, x: Tensor, weights: Tensor | None, ids: Tensor, out: Tensor | None, out_dtype: int, saved: Tensor | None
    ) -> list[int]:
        s = self.spec
        return [
            *(x.shape[0], s.top_k, s.hidden, s.intermediate, s.out_features, s.num_experts),
            *(torch.get_num_threads(), _WEIGHT_ON[s.weight_on], s.out_of_range is OutOfRange.INDEX, self._merged),
            *(x.data_ptr(), x.stride(0), ids.data_ptr(), ids.dtype == torch.int64),
            *((0, 0) if weights is None else (weights.data_ptr(), _DTYPES[weights.dtype])),
            *(0 if out is None else out.data_ptr(), out_dtype, 0 if saved is None else saved.data_ptr()),
        ]

    def _addresses(self, params: Sequence[Tensor], kept: list[Any]) -> list[int]:
        """struct View of every weight; what they point into is appended to `kept`."""
        found: list[int] = []
        given = self._converted(params)
        kept.append(given)
        for w in self._views:
            if w is None:
                found += _ABSENT
            elif w.stacked:
                p = given[w.params[0]]
                at = layout.strides(w, self._extents[id(w)], p)
                if at is None or (self._merged and not p.is_contiguous()):
                    p = p.contiguous()
                    kept.append(p)
                    at = w.offset, w.e, w.n, w.k
                found += (p.data_ptr(), 0, at[1], at[2], at[3], at[0], _DTYPES[p.dtype])
            else:
                found += self._table(w, [given[i] for i in w.params], kept)
        return found

    def _table(self, w: Weight, tensors: list[Tensor], kept: list[Any]) -> tuple[int, ...]:
        """One tensor per expert.  Where their strides differ they are copied."""
        at = {layout.strides(w, self._extents[id(w)], p) for p in tensors}
        if len(at) > 1 or None in at:
            tensors = [p.contiguous() for p in tensors]
            at = {(w.offset, w.e, w.n, w.k)}
        offset, _, n, k = at.pop() or (0, 0, 0, 0)
        table = (ctypes.c_int64 * len(tensors))(*[p.data_ptr() for p in tensors])
        kept += [table, tensors]
        return 0, ctypes.addressof(table), 0, n, k, offset, _DTYPES[tensors[0].dtype]

    def _converted(self, params: Sequence[Tensor]) -> Sequence[Tensor]:
        """Matrices in the dtype of the spec; biases in any dtype the kernel reads."""
        dtype = self.spec.dtype
        if all(p.dtype is dtype for p in params):
            return params
        return [p if i not in self._matrix_params and p.dtype in _DTYPES else p.to(dtype) for i, p in enumerate(params)]

    def _gradient(self, p: Tensor, position: int, T: int) -> Tensor:
        dtype = p.dtype if position not in self._matrix_params and p.dtype in _DTYPES else self.spec.dtype
        whole = self._covered[position] == p.numel() and T > 0
        return kept_memory.empty(p.shape, dtype) if whole else torch.zeros(p.shape, dtype=dtype)

    def _gradient_address(self, w: Weight | None, gradients: list[Tensor | None], kept: list[Any]) -> tuple[int, ...]:
        if w is None:
            return _ABSENT
        if w.stacked:
            g = gradients[w.params[0]]
            return _ABSENT if g is None else (g.data_ptr(), 0, w.e, w.n, w.k, w.offset, _DTYPES[g.dtype])
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
        return 0, ctypes.addressof(table), 0, w.n, w.k, w.offset, _DTYPES[whole[0].dtype]

    def _check(self, status: int, ids: Tensor) -> None:
        if status == _BAD_ID:
            E = self.spec.num_experts
            raise IndexError(f"expert id out of range: found {int(ids.min())}..{int(ids.max())}, needs -{E}..{E - 1}")
        if status == _NO_MEMORY:
            raise MemoryError(f"the CPU expert kernel found no memory for {ids.shape[0]} tokens")


def _weights(weights: Tensor | None) -> Tensor | None:
    if weights is None:
        return None
    return (weights if weights.dtype in _DTYPES else weights.float()).contiguous()


def _ids(ids: Tensor) -> Tensor:
    return (ids if ids.dtype in (torch.int64, torch.int32) else ids.long()).contiguous()

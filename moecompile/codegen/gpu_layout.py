"""Where the weights of a layer really lie, and where their gradients go.

A spec describes parameters as if contiguous.  Here the same index map is put on the strides a parameter has; separate
parameters become a table of pointers, made once per set of parameters; gradients are laid out contiguously.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moecompile.codegen import gpu_weights
from moecompile.codegen.gpu_tables import table
from moecompile.codegen.gpu_weights import Layout, Layouts, interleaved
from moecompile.ir.spec import ExpertsSpec, Weight
from moecompile.kernels.gpu.config import Config, Operand


def restride(w: Weight, e_count: int, sizes: tuple[int, int], strides: Sequence[int]) -> tuple[int, int, int, int] | None:
    """(offset, e, n, k) of `w` on a parameter with these strides, or None where no strides say it."""
    contiguous = [math.prod(w.shape[i + 1 :]) for i in range(len(w.shape))]

    def moved(stride: int, extent: int) -> int | None:
        if extent == 1 or stride == 0:
            return 0
        for size, dense, real in zip(w.shape, contiguous, strides, strict=True):
            if size > 1 and stride % dense == 0 and (extent - 1) * (stride // dense) < size:
                return stride // dense * real
        return None

    offset, rest = 0, w.offset
    for dense, real in zip(contiguous, strides, strict=True):
        offset, rest = offset + rest // dense * real, rest % dense
    e = moved(w.e, e_count) if w.stacked else 0
    n, k = moved(w.n, sizes[0]), moved(w.k, sizes[1])
    return None if e is None or n is None or k is None else (offset, e, n, k)


def _sizes(spec: ExpertsSpec, name: str) -> tuple[int, int]:
    """(N, K) of a weight; K is 1 for a bias."""
    if name.startswith("d"):
        return spec.out_features, spec.intermediate if name == "d" else 1
    return spec.intermediate, spec.hidden if name.startswith("w") else 1


def read_layouts(spec: ExpertsSpec, params: Sequence[Tensor]) -> tuple[Layouts, Sequence[Tensor]]:
    """The layouts of `params`, and the parameters to use: copies of those whose strides cannot be said."""
    if all(p.dtype == spec.dtype and p.is_contiguous() and p.data_ptr() % 16 == 0 for p in params):
        return gpu_weights.contiguous_layouts(spec), params
    used, layouts = list(params), {}
    for name, w in gpu_weights.named(spec):
        ours = [used[i] for i in w.params]
        if len({(t.dtype, t.stride()) for t in ours}) > 1:
            raise ValueError(f"the experts' parameters of {name} differ in dtype or strides")
        first, found = ours[0], None
        if not first.is_contiguous():
            found = restride(w, spec.num_experts, _sizes(spec, name), first.stride())
        if found is None:
            found = (w.offset, w.e, w.n, w.k)
            for i in w.params:
                used[i] = used[i].contiguous()
        aligned = all(used[i].data_ptr() % 16 == 0 for i in w.params)
        layouts[name] = Layout(name, w.stacked, *found, dtype=first.dtype, aligned=aligned)
    return gpu_weights.collect(spec, layouts), used


def pointers(w: Weight, params: Sequence[Tensor]) -> Tensor:
    """What a kernel takes for a weight: the stacked parameter, or the table of the addresses of separate ones."""
    return params[w.params[0]] if w.stacked else table([params[i] for i in w.params])


def descriptor(spec: ExpertsSpec, layout: Layout, param: Tensor, config: Config, wide: int = 1) -> Operand:
    """The tensor descriptor of a weight for Layout.tile: made on the host and passed by value, so that a launch allocates
    nothing and a CUDA graph holds it."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    columns, length = _sizes(spec, layout.name)
    shape, strides = layout.described(spec.num_experts, columns * wide, length)
    base = param.as_strided(shape, strides, param.storage_offset() + layout.offset)
    return TensorDescriptor(base, list(shape), list(strides), layout.block(config, wide))


def no_descriptors(spec: ExpertsSpec, layouts: Layouts, family: str, config: Config) -> str | None:
    """Why the weights of up or down cannot be read by tensor descriptors, or None."""
    wide = 2 if family == "up" and interleaved(spec, layouts) else 1
    read = (layouts.projections[:1] if wide == 2 else layouts.projections) if family == "up" else (layouts.down,)
    for layout in read:
        if max(layout.block(config, wide)) > 256:
            return f"a block of {layout.name} has more than the 256 columns of a descriptor"
        if reason := layout.no_descriptor(spec.num_experts, wide):
            return reason
    return None


# ---------------------------------------------------------------- gradients


@dataclass(frozen=True)
class Gradients:
    """outputs: one tensor per parameter, empty where not needed or added to a main gradient; wanted: for each weight that
    needs one, by name, the tensor its gradient is written to (a parameter's gradient, the stack of separate ones, a main
    gradient or the addresses of separate ones); into: as gpu_text.experts_text has it, for each of `wanted`."""

    outputs: list[Tensor]
    wanted: dict[str, Tensor]
    into: dict[str, str]


def overlap(spec: ExpertsSpec) -> str | None:
    """Why gradients of these weights would be written over each other, or None."""
    taken: dict[int, list[tuple[str, frozenset[int]]]] = {}
    for name, w in gpu_weights.named(spec):
        for p in set(w.params):
            taken.setdefault(p, []).append((name, _first_elements(spec, name, w)))
    for uses in taken.values():
        for i, (name, mine) in enumerate(uses):
            for other, theirs in uses[:i]:
                if mine & theirs:
                    return (
                        f"the weights {other} and {name} share elements of one parameter, so their gradients cannot be kept apart"
                    )
    tuples = {w.params for _, w in gpu_weights.named(spec)}
    if sum(map(len, tuples)) > len({p for t in tuples for p in t}) + sum(len(t) - len(set(t)) for t in tuples):
        return "weights name the same parameters in different orders, so their gradients cannot be kept apart"
    for name, w in gpu_weights.named(spec):
        if len(set(w.params)) != len(w.params):
            return f"two experts share the parameter of {name}, so their gradients cannot be kept apart"
    return None


def _first_elements(spec: ExpertsSpec, name: str, w: Weight) -> frozenset[int]:
    """Offsets of a sample of the first expert's elements: its first row and first column."""
    n, k = _sizes(spec, name)
    return frozenset([*(w.offset + i * w.n for i in range(n)), *(w.offset + i * w.k for i in range(k))])


def gradients(spec: ExpertsSpec, params: Sequence[Tensor], needs: Sequence[bool], mains: Sequence[Tensor | None] = ()) -> Gradients:
    """Room for the gradients of the parameters that need one; zeroed where the weights do not cover a parameter.

    `mains`: for each parameter its main gradient, or None; none at all where the sequence is empty.
    """
    used = {p for _, w in gpu_weights.named(spec) for p in w.params}
    outputs = [t.new_zeros(t.shape if n and i not in used else 0) for i, (t, n) in enumerate(zip(params, needs, strict=True))]
    wanted: dict[str, Tensor] = {}
    into: dict[str, str] = {}
    covered: dict[int, int] = {}
    for name, w in gpu_weights.named(spec):
        for p in w.params:
            covered[p] = covered.get(p, 0) + math.prod(_sizes(spec, name)) * (spec.num_experts if w.stacked else 1)
    stacks: dict[tuple[int, ...], Tensor] = {}
    for name, w in gpu_weights.named(spec):
        if not any(needs[p] for p in w.params):
            continue
        if any(mains[p] is not None for p in w.params if mains):
            wanted[name], into[name] = _main(name, w, params, needs, mains)
            continue
        if w.params not in stacks:
            shape = params[w.params[0]].shape
            full = covered[w.params[0]] == math.prod(shape)
            make = torch.empty if full else torch.zeros
            first = params[w.params[0]]
            stack = make((len(w.params), *shape), dtype=first.dtype, device=first.device)
            stacks[w.params] = stack
            for i, p in enumerate(w.params):
                if needs[p]:
                    outputs[p] = stack[i]
        wanted[name], into[name] = stacks[w.params], ""
    return Gradients(outputs, wanted, into)


def _main(
    name: str, w: Weight, params: Sequence[Tensor], needs: Sequence[bool], mains: Sequence[Tensor | None]
) -> tuple[Tensor, str]:
    """What grad_matrix or grad_vector takes for the main gradients of a weight. ValueError where they cannot be added to."""
    found = [mains[p] for p in w.params if needs[p]]
    given = [m for m in found if m is not None]
    if len(given) < len(w.params):
        raise ValueError(f"main gradients of {name}: {len(given)} of {len(w.params)} parameters have one, needs all or none")
    for p, main in zip(w.params, given, strict=True):
        if main.dtype != torch.float32 or main.shape != params[p].shape or not main.is_contiguous():
            raise ValueError(
                f"main gradient of parameter {p}: needs a contiguous float32 tensor of shape {tuple(params[p].shape)}, got"
                f" {main.dtype} {tuple(main.shape)} with strides {main.stride()}"
            )
    if w.stacked:
        return given[0], "main"
    aligned = all(m.data_ptr() % 16 == 0 for m in given)
    return table(given), "mains" if aligned else "mains anywhere"

"""The moe.* ops on a GPU, NVIDIA or AMD: which generated Triton kernels run, in which order, on which buffers.

    experts        few tokens   decode_up, decode_down
                   else         permute, up, down, combine
    experts_train               permute, up (keeps the pre-activations), down, combine
    experts_bwd                 permute (again, from the ids), grad_z, grad_rows, combine, grad_matrix, grad_vector, grad_weights
    route, route_stats          router
    route_bwd                   grad_router

Nothing here waits for the device, and every grid follows from shapes, so all of it can be captured in a CUDA graph, after one
call where experts are separate parameters (gpu_tables).  Under TRITON_INTERPRET=1 the same texts run on CPU tensors.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from moecompile.codegen import gpu_choose, gpu_layout, gpu_router, gpu_text, gpu_tickets, gpu_weights
from moecompile.codegen.gpu_choose import ConfigSource, Target, choose
from moecompile.codegen.gpu_layout import pointers, read_layouts
from moecompile.codegen.gpu_load import load, on, triton_missing
from moecompile.codegen.gpu_router import prepare_router, supports_router
from moecompile.codegen.gpu_text import Style
from moecompile.codegen.gpu_weights import Layouts
from moecompile.errors import Unsupported
from moecompile.ir import expr
from moecompile.ir.ops import InTwoSteps
from moecompile.ir.spec import ExpertsSpec, WeightOn, experts_from_text, router_from_text
from moecompile.kernels.gpu import combine, decode, down, grad_params, grad_rows, grad_weights, grad_z, permute, up
from moecompile.kernels.gpu.config import Config, Kernel, Operand
from moecompile.kernels.gpu.permute import Routing

__all__ = [
    "Config",
    "GpuImplementation",
    "Target",
    "choose",
    "prepare_experts",
    "prepare_router",
    "set_config_source",
    "supports_experts",
    "supports_router",
    "triton_missing",
]


# ---------------------------------------------------------------- what can be built


def supports_experts(spec: ExpertsSpec, train: bool = False) -> str | None:
    """Why these kernels cannot run the experts of `spec` (with gradients, where `train`), or None."""
    if spec.dtype not in gpu_weights.TYPES or spec.out_dtype not in gpu_weights.TYPES:
        return f"the GPU kernels are for float16, bfloat16 and float32, got {spec.dtype} and {spec.out_dtype}"
    if not expr.inputs_of(spec.activation):
        return "the activation reads no projection"
    for name, w in gpu_weights.named(spec):
        extent = (spec.out_features if name.startswith("d") else spec.intermediate) * w.n
        extent += (spec.intermediate if name == "d" else spec.hidden) * w.k
        if extent >= 2**31:
            return f"one expert's part of {name} spans {extent} elements of its parameter, needs fewer than 2^31"
    if spec.num_experts > 4096:
        return f"the GPU kernels are for at most 4096 experts, got {spec.num_experts}"
    if train and (shared := gpu_layout.overlap(spec)):
        return shared
    return triton_missing()


def _style(precision: bool) -> Style:
    tf32 = precision and torch.get_float32_matmul_precision() != "highest"
    return Style(os.environ.get("TRITON_INTERPRET") == "1", "tf32" if tf32 else "ieee")


class _Builder:
    """Kernels of one layer for one load, all with row tiles of one height."""

    def __init__(self, spec: ExpertsSpec, layouts: Layouts, tokens: int, target: Target, tiled_by: str) -> None:
        self.spec, self.layouts, self.target = spec, layouts, target
        self.tokens = gpu_choose.representative(tokens, spec.top_k, spec.num_experts)
        self.style = _style(spec.dtype == torch.float32)
        self.kernels: dict[tuple[str, tuple[Any, ...]], Kernel] = {}
        self.block_m = choose(tiled_by, spec, self.tokens, target).block_m

    def config(self, family: str) -> Config:
        found = choose(family, self.spec, self.tokens, self.target)
        if family in ("up", "down", "grad_z", "grad_rows"):
            found = dataclasses.replace(found, block_m=self.block_m)
        return gpu_choose.allowed(family, self.spec, self.layouts, found, self.target)

    def get(self, family: str, **options: Any) -> Kernel:
        given = tuple(sorted(options.items()))
        if (family, given) not in self.kernels:
            config = self.config(family)
            text = gpu_text.experts_text(self.spec, self.layouts, family, config, self.style, given)
            self.kernels[family, given] = load(family, config, text, self.target.processors)
        return self.kernels[family, given]

    def route(self, ids: Tensor) -> Routing:
        """ids [T,K] -> which row is whose."""
        few = ids.numel() <= gpu_choose.FEW_PAIRS
        config = self.config("permute")
        if (few and config.block_m < ids.numel()) or (not few and config.block_m > 1024):
            config = gpu_choose.closed_form("permute", self.spec, ids.shape[0], self.target)
        kernel = load("permute", config, gpu_text.permute_text(self.spec, config, self.block_m))
        return permute.launch(kernel, ids, self.spec.num_experts, self.block_m, few)


@lru_cache(1024)
def _builder(spec: ExpertsSpec, layouts: Layouts, bucket: int, target: Target, tiled_by: str, precision: str) -> _Builder:
    return _Builder(spec, layouts, bucket, target, tiled_by)


def set_config_source(source: ConfigSource | None) -> None:
    """Ask `source(family, spec, tokens, target)` for the numbers of a kernel before the closed form; None: never mind.

    `family` is one of gpu_text.FAMILIES, `tokens` the representative of a bucket; the answer may be None.
    """
    gpu_choose.set_source(source)
    _builder.cache_clear()


# ---------------------------------------------------------------- the implementation


class GpuImplementation(InTwoSteps):
    """ir.ops.Implementation for device "cuda", and for "cpu" under TRITON_INTERPRET=1."""

    def route(self, logits: Tensor, bias: Tensor | None, spec: str) -> tuple[Tensor, Tensor]:
        """logits [..,E], bias [E] -> weights [..,K], ids [..,K] int64."""
        return gpu_router.route(logits, bias, spec)

    def differentiates(self, spec: str) -> bool:
        """Whether route_bwd is a kernel for this router."""
        return gpu_router.differentiates(router_from_text(spec)) is None

    def route_stats(self, logits: Tensor, bias: Tensor | None, spec: str) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """As route(), and counts [E] int64, the summed softmax [E] and the sum of squared logsumexp [], both float32."""
        return gpu_router.route_stats(logits, bias, spec)

    def route_bwd(
        self,
        grad: Tensor,
        logits: Tensor,
        bias: Tensor | None,
        ids: Tensor,
        dprobs: Tensor | None,
        dsquares: Tensor | None,
        spec: str,
        needs: Sequence[bool],
    ) -> list[Tensor]:
        """Gradients of logits and bias: contiguous, empty where not needed."""
        return gpu_router.route_bwd(grad, logits, bias, ids, dprobs, dsquares, spec, needs)

    def experts(
        self, x: Tensor, weights: Tensor | None, ids: Tensor, params: Sequence[Tensor], sizes: Sequence[int], spec: str, region: str
    ) -> Tensor:
        """x [T,H], weights [T,K] or None, ids [T,K] -> [T,O]."""
        s = experts_from_text(spec)
        if not gpu_choose.decodes(s, x.shape[0]):
            return self._forward(s, x, weights, ids, params, train=False)[0]
        out = x.new_empty((x.shape[0], s.out_features), dtype=s.out_dtype)
        if out.numel() == 0:
            return out
        x, weights, ids = _dense(x), _dense(weights), ids.contiguous()
        build, params = self._build(s, x, params, "up")
        layouts = build.layouts
        rows = x.new_empty((ids.numel(), s.intermediate), dtype=s.dtype)
        on_input = weights if s.weight_on is WeightOn.INPUT else None
        on_output = weights if s.weight_on is WeightOn.OUTPUT else None
        ups, downs = _operands(s, layouts, params)
        second = build.get("decode_down")
        first = build.get("decode_up", signals=bool(second.config.pdl))
        with on(x.device):
            # before the launches: between the two nothing may run, where the second is launched before the first has ended
            shared = gpu_tickets.shared(second.config, x, (x.shape[0], s.out_features), decode.tickets(second, out))
            decode.launch_up(first, s.intermediate, x, ups, on_input, ids, rows)
            decode.launch_down(second, rows, downs, on_output, ids, out, shared)
        return out

    def experts_train(
        self, x: Tensor, weights: Tensor | None, ids: Tensor, params: Sequence[Tensor], sizes: Sequence[int], spec: str, region: str
    ) -> tuple[Tensor, Tensor]:
        """As experts(), and the projections before the activation [R, P*F] in expert order."""
        out, z = self._forward(experts_from_text(spec), x, weights, ids, params, train=True)
        assert z is not None
        return out, z

    def _build(self, s: ExpertsSpec, x: Tensor, params: Sequence[Tensor], tiled_by: str) -> tuple[_Builder, Sequence[Tensor]]:
        if x.shape[0] * s.top_k >= 2**31:
            raise ValueError(f"{x.shape[0]} tokens for {s.top_k} experts each: the kernels count pairs in 32 bits")
        layouts, params = read_layouts(s, params)
        tokens = gpu_choose.representative(x.shape[0], s.top_k, s.num_experts)
        precision = torch.get_float32_matmul_precision()
        return _builder(s, layouts, tokens, gpu_choose.target_of(x.device), tiled_by, precision), params

    def _forward(
        self, s: ExpertsSpec, x: Tensor, weights: Tensor | None, ids: Tensor, params: Sequence[Tensor], train: bool
    ) -> tuple[Tensor, Tensor | None]:
        F, O, rows = s.intermediate, s.out_features, ids.numel()
        out = x.new_empty((x.shape[0], O), dtype=s.out_dtype)
        z = x.new_empty((rows, len(s.projections) * F), dtype=s.dtype) if train else None
        if out.numel() == 0:
            return out, z
        x, weights, ids = _dense(x), _dense(weights), ids.contiguous()
        build, params = self._build(s, x, params, "up")
        on_input = weights if s.weight_on is WeightOn.INPUT else None
        on_output = weights if s.weight_on is WeightOn.OUTPUT else None
        first, second = build.get("up", train=train), build.get("down")
        ups, downs = _operands(s, build.layouts, params, first.config, second.config)
        y1 = x.new_empty((rows, F), dtype=s.dtype)
        y2 = x.new_empty((rows, O), dtype=s.dtype)
        with on(x.device):
            routing = build.route(ids)
            up.launch(first, F, x, ups, on_input, routing, y1, z)
            shared = gpu_tickets.shared(second.config, x, (rows, O), down.tickets(second, O, routing))
            down.launch(second, O, y1, downs, routing, y2, shared)
            combine.launch(build.get("combine", width=O, scaled=on_output is not None), y2, routing.place, on_output, out)
        return out, z

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
        main_grads: Sequence[Tensor | None] = (),
    ) -> list[Tensor]:
        """Gradients of x, weights and each parameter: contiguous, empty where not needed.

        `main_grads`: for each parameter a contiguous float32 tensor of its shape to which its gradient is added instead (the
        returned one is then empty), or None; nothing of it changes where an expert has no rows.
        """
        s = experts_from_text(spec)
        found: list[Tensor] = [
            x.new_empty(t.shape) if n and t is not None else x.new_empty(0) for t, n in zip((x, weights), needs[:2], strict=True)
        ]
        if needs[1] and weights is not None:
            found[1] = torch.empty_like(weights, memory_format=torch.contiguous_format)
        stacks = gpu_layout.gradients(s, params, needs[2:], main_grads)
        if ids.numel() == 0:
            return [t.zero_() for t in (*found, *stacks.outputs)]
        with on(x.device):
            self._backward(s, grad.contiguous(), _dense(x), _dense(weights), ids.contiguous(), params, saved, needs, found, stacks)
        return [*found, *stacks.outputs]

    def _backward(
        self,
        s: ExpertsSpec,
        grad: Tensor,
        x: Tensor,
        weights: Tensor | None,
        ids: Tensor,
        params: Sequence[Tensor],
        z: Tensor,
        needs: Sequence[bool],
        found: list[Tensor],
        stacks: gpu_layout.Gradients,
    ) -> None:
        H, F, O, E, rows = s.hidden, s.intermediate, s.out_features, s.num_experts, ids.numel()
        wanted = stacks.wanted
        on_input = weights if s.weight_on is WeightOn.INPUT else None
        on_output = weights if s.weight_on is WeightOn.OUTPUT else None
        need_s = needs[1] and s.weight_on is not WeightOn.NOWHERE
        s_here, s_later = need_s and on_output is not None, need_s and on_input is not None
        build, params = self._build(s, x, params, "grad_z")
        ups, downs = _operands(s, build.layouts, params)
        routing = build.route(ids)

        def parts(family: str, columns: int) -> Tensor:
            return x.new_empty((rows, -(-columns // build.config(family).block_n)), dtype=torch.float32)

        dz = torch.empty_like(z)
        y = x.new_empty((rows, F), dtype=s.dtype) if "d" in wanted else None
        sums = parts("grad_z", F) if s_here else None
        kernel = build.get("grad_z", need_y=y is not None, parts=s_here)
        grad_z.launch(kernel, F, grad, downs[:1], on_output, z, routing, dz, y, sums)
        if needs[0] or s_later:
            drows = x.new_empty((rows, H), dtype=s.dtype)
            sums = parts("grad_rows", H) if s_later else sums
            matrices = ups[: len(s.projections)]
            grad_rows.launch(build.get("grad_rows", parts=s_later), H, dz, matrices, x, routing, drows, sums if s_later else None)
            if needs[0]:
                scaled = on_input is not None
                combine.launch(build.get("combine", width=H, scaled=scaled), drows, routing.place, on_input, found[0])
        if needs[1]:
            if sums is None:
                found[1].zero_()
            else:
                bias = downs[1:] if s_here else []
                kernel = build.get("grad_weights", num_parts=sums.shape[1])
                grad_weights.launch(kernel, sums, routing.place, grad, ids, bias, found[1])
        for which in gpu_weights.gradients(s, build.layouts):
            name = "w0" if which == "w" else which
            if name not in wanted:
                continue
            out, into = wanted[name], stacks.into[name]
            of_down = which.startswith("d")
            a = grad if of_down else dz
            if which == "d" or which.startswith("w"):
                size, b = ((O, F), y) if of_down else ((len(s.projections) * F if which == "w" else F, H), x)
                assert b is not None
                kernel, scale = build.get("grad_matrix", which=which, into=into), None if of_down else on_input
                grad_params.launch_matrix(kernel, size, E, a, b, scale, routing.order, routing.offsets, out)
            else:
                kernel, scale = build.get("grad_vector", which=which, into=into), on_output if of_down else None
                grad_params.launch_vector(kernel, O if of_down else F, E, a, scale, routing.order, routing.offsets, out)


def _dense(t: Any) -> Any:
    return None if t is None else t.contiguous()


def _operands(
    s: ExpertsSpec, layouts: Layouts, params: Sequence[Tensor], of_up: Config | None = None, of_down: Config | None = None
) -> tuple[list[Operand], list[Operand]]:
    """What the kernels take for weights: (projections then their biases), (down then its bias); for kernels with these configs,
    where they read weights by descriptors."""
    given: dict[str, Operand] = {name: pointers(w, params) for name, w in gpu_weights.named(s)}
    if of_up is not None and of_up.tma:
        wide = 2 if gpu_weights.interleaved(s, layouts) else 1
        for i, w in enumerate(layouts.projections):
            first = layouts.projections[0] if wide == 2 else w  # read for both, so that the other is never looked at
            given[w.name] = gpu_layout.descriptor(s, first, params[s.projections[i].params[0]], of_up, wide)
    if of_down is not None and of_down.tma:
        given["d"] = gpu_layout.descriptor(s, layouts.down, params[s.down.params[0]], of_down)
    ups = [given[f"w{i}"] for i in range(len(s.projections))] + [given[f"b{i}"] for i, b in enumerate(s.projection_bias) if b]
    return ups, [given["d"], *([given["db"]] if s.down_bias else [])]


# ---------------------------------------------------------------- ahead of the first call


def prepare_experts(spec: ExpertsSpec, train: bool) -> None:
    """Write and load the kernels of one token and of a large batch. Unsupported or BuildError where that fails."""
    if reason := supports_experts(spec, train):
        raise Unsupported(reason)
    layouts = gpu_weights.contiguous_layouts(spec)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    target = gpu_choose.target_of(device if device.index is not None or device.type == "cpu" else torch.device("cuda", 0))
    for rows in (0.5, 2048.0):
        build = _Builder(spec, layouts, max(1, math.ceil(rows * spec.num_experts / spec.top_k)), target, "up")
        build.get("up", train=train)
        build.get("down")
        build.get("combine", width=spec.out_features, scaled=spec.weight_on is WeightOn.OUTPUT)

"""The moe.* ops on CPU: what is supported, and which built kernel runs."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from moecompile.codegen import build_cpp, cpu_routed, cpu_router
from moecompile.codegen.cpu_experts import DTYPES, kernel
from moecompile.codegen.cpu_router import prepare_router, supports_router
from moecompile.ir.ops import PlainRouter
from moecompile.ir.spec import ExpertsSpec
from moecompile.runtime import layout

__all__ = ["CpuImplementation", "prepare_experts", "prepare_router", "supports_experts", "supports_router"]


def supports_experts(spec: ExpertsSpec) -> str | None:
    """Why the CPU kernel cannot run the spec, or None."""
    for name, dtype in (("dtype", spec.dtype), ("output dtype", spec.out_dtype)):
        if dtype not in DTYPES:
            return f"{name} {dtype} is not float32, bfloat16 or float16"
    if len(spec.projections) > 4:
        return f"{len(spec.projections)} projections, the CPU kernel is made for up to 4"
    return layout.overlap(spec)


def prepare_experts(spec: ExpertsSpec, train: bool) -> None:
    """Build and load the kernel of the spec now. Raises BuildError.  One library holds forward and backward."""
    kernel(spec.text(), build_cpp.NATIVE)


class CpuImplementation(PlainRouter):
    """Satisfies ir.ops.Implementation.  `target`: the compiler's flags for the instruction set."""

    def __init__(self, target: tuple[str, ...] = build_cpp.NATIVE) -> None:
        self._target = target

    def route(self, logits: Tensor, bias: Tensor | None, spec: str) -> tuple[Tensor, Tensor]:
        return cpu_router.route(logits, bias, spec)

    def experts(
        self, x: Tensor, weights: Tensor | None, ids: Tensor, params: Sequence[Tensor], sizes: Sequence[int], spec: str, region: str
    ) -> Tensor:
        return kernel(spec, self._target).run(x, weights, ids, params, None)

    def routed_experts(self, x, logits, bias, params, sizes, router, spec, region):  # type: ignore[no-untyped-def]
        out = cpu_routed.kernel(router, spec, self._target).run(x, logits, bias, params)
        return super().routed_experts(x, logits, bias, params, sizes, router, spec, region) if out is None else out

    def experts_train(
        self, x: Tensor, weights: Tensor | None, ids: Tensor, params: Sequence[Tensor], sizes: Sequence[int], spec: str, region: str
    ) -> tuple[Tensor, Tensor]:
        built = kernel(spec, self._target)
        saved = x.new_empty(ids.numel(), built.saved_columns, dtype=built.spec.dtype)
        return built.run(x, weights, ids, params, saved), saved

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
        return kernel(spec, self._target).run_backward(grad, x, weights, ids, params, saved, needs)

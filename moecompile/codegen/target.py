"""Which kernels a device has."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from moecompile.errors import BuildError
from moecompile.ir import ops
from moecompile.ir.spec import ExpertsSpec, RouterSpec
from moecompile.runtime.dispatch import Dispatch


@functools.cache
def bind_all() -> None:
    """Bind each device's kernels to the moe.* ops; once a process."""
    from moecompile.codegen.cpu import CpuImplementation

    ops.bind("cpu", Dispatch(CpuImplementation()))
    if torch.cuda.is_available():
        from moecompile.codegen.gpu import GpuImplementation

        ops.bind("cuda", Dispatch(GpuImplementation()))


def supports_experts(spec: ExpertsSpec, device: torch.device, train: bool, kernels: str) -> str | None:
    """Why no kernel runs the spec on the device, or None. Builds what can be built ahead."""
    if kernels == "reference":
        return None
    if device.type == "cpu":
        from moecompile.codegen import cpu

        return cpu.supports_experts(spec) or _built(lambda: cpu.prepare_experts(spec, train))
    if device.type == "cuda":
        from moecompile.codegen import gpu

        return gpu.triton_missing() or gpu.supports_experts(spec, train) or _built(lambda: gpu.prepare_experts(spec, train))
    return f"no kernels for {device.type} devices"


def supports_router(spec: RouterSpec, device: torch.device, kernels: str) -> str | None:
    """Why no kernel runs the router on the device, or None."""
    if kernels == "reference":
        return None
    if device.type == "cpu":
        from moecompile.codegen import cpu

        return cpu.supports_router(spec) or _built(lambda: cpu.prepare_router(spec))
    if device.type == "cuda":
        from moecompile.codegen import gpu

        return gpu.triton_missing() or gpu.supports_router(spec) or _built(lambda: gpu.prepare_router(spec))
    return f"no kernels for {device.type} devices"


def supports_statistics(spec: RouterSpec, device: torch.device, kernels: str) -> str | None:
    """Why no kernel of the router sums what balancing losses read, or None."""
    if kernels == "reference":
        return "the reference would compute the probabilities again"
    return None if ops.bound(device).differentiates(spec.text()) else f"no kernel on {device.type} sums them along with the choice"


def kernel_name(device: torch.device, kernels: str) -> str:
    """What runs a moe.* op on the device, for people."""
    if kernels == "reference":
        return "PyTorch reference, asked for"
    if device.type == "cpu":
        return "generated C++"
    return "generated Triton"


def _built(build: Callable[[], None]) -> str | None:
    """Why it could not be built, or None."""
    try:
        build()
    except BuildError as e:
        return str(e)
    return None

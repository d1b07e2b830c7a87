"""What a device can do: the ceilings and limits that the cost model and the choice of kernels need.

`flops` and `bandwidth` are what a dense matmul and a copy reach, not the data sheet; `measured` says whether they were
measured on the device or assumed to be 0.8 of the sheet's bf16 peak and 0.9 of its bandwidth.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import lru_cache

import torch


@dataclass(frozen=True)
class Machine:
    """One device: FLOP/s and bytes/s it sustains, and per SM (compute unit on AMD, core on CPU) its memories.

    shared      bytes of shared memory an SM has; one block may use `block_shared` of them
    registers   32-bit registers of an SM; a thread may use `thread_registers` of them
    warp        threads of a warp (wavefront)
    Zero where it has no meaning (CPU).
    """

    name: str
    arch: str
    flops: float
    bandwidth: float
    sms: int
    shared: int
    block_shared: int
    registers: int
    thread_registers: int
    warp: int
    measured: bool

    def __post_init__(self) -> None:
        if not (self.flops > 0 and self.bandwidth > 0 and self.sms > 0):
            raise ValueError(f"machine {self.name!r}: FLOP/s, bytes/s and SMs must be positive")

    def seconds(self, flops: float, bytes_: float) -> float:
        """Least time of work whose arithmetic and memory traffic overlap perfectly."""
        return max(flops / self.flops, bytes_ / self.bandwidth)

    def bound(self, flops: float, bytes_: float) -> str:
        return "compute" if flops / self.flops > bytes_ / self.bandwidth else "memory"


def _nvidia(name: str, arch: str, tflops: float, tbps: float, sms: int, shared_kb: int, measured: bool = False) -> Machine:
    return Machine(name, arch, tflops * 1e12, tbps * 1e12, sms, shared_kb * 1024, (shared_kb - 1) * 1024, 65536, 255, 32, measured)


# From the makers' data sheets: bf16 dense peak 312 / 989 / 989 / 2250 / 1307 TFLOP/s, memory 2.04 / 3.35 / 4.8 / 8.0 / 5.3 TB/s.
MACHINES: dict[str, Machine] = {
    m.name: m
    for m in (
        _nvidia("A100", "sm_80", 0.8 * 312, 0.9 * 2.039, 108, 164),
        _nvidia("H100", "sm_90", 700, 3.0, 132, 228),
        _nvidia("H200", "sm_90", 788, 4.3, 132, 228, measured=True),
        _nvidia("B200", "sm_100", 0.8 * 2250, 0.9 * 8.0, 148, 228),
        Machine("MI300X", "gfx942", 0.8 * 1307e12, 0.9 * 5.3e12, 304, 65536, 65536, 131072, 512, 64, False),
    )
}


def known(device_name: str) -> Machine | None:
    """The table's machine whose name is a word of `device_name`, such as "NVIDIA H100 80GB HBM3"; None if there is none."""
    words = device_name.upper().replace("-", " ").split()
    return next((m for m in MACHINES.values() if m.name in words), None)


def default_machine() -> Machine:
    """The GPU at hand, of the table or else measured; the CPU, measured in float32, where there is none."""
    if not torch.cuda.is_available():
        return measured("cpu")
    return known(torch.cuda.get_device_name()) or measured("cuda", torch.bfloat16, 8192)


@lru_cache(8)
def measured(device_type: str = "cpu", dtype: torch.dtype = torch.float32, size: int = 1024, rounds: int = 5) -> Machine:
    """The machine at hand by two numbers: the best of `rounds` matmuls of size^3 and of copies of 64 size^2 elements.

    Takes some tens of milliseconds on a CPU; asked for once per process.  RuntimeError where the device is absent.
    """
    device = torch.device(device_type)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    source = torch.randn(16 * size * size, device=device).to(dtype)
    target = torch.empty_like(source)
    matmul = min(_seconds(lambda: torch.mm(a, b), device) for _ in range(rounds))
    copy = min(_seconds(lambda: target.copy_(source), device) for _ in range(rounds))
    flops, bandwidth = 2 * size**3 / matmul, 2 * source.nbytes / copy
    if device.type == "cpu":
        return Machine("cpu", "cpu", flops, bandwidth, torch.get_num_threads(), 0, 0, 0, 0, 1, True)
    limits = torch.cuda.get_device_properties(device)
    shared = getattr(limits, "shared_memory_per_multiprocessor", 65536)
    block = getattr(limits, "shared_memory_per_block_optin", shared)
    amd = torch.version.hip is not None
    arch = limits.gcnArchName.split(":")[0] if amd else f"sm_{limits.major}{limits.minor}"
    registers = 131072 if amd else 65536
    return Machine(
        limits.name, arch, flops, bandwidth, limits.multi_processor_count, shared, block, registers, 512 if amd else 255,
        limits.warp_size, True,
    )  # fmt: skip


def _seconds(call, device: torch.device) -> float:  # type: ignore[no-untyped-def]
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start

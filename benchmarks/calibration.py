"""What a GPU can do, unit by unit.

The rates that limit attention, each measured by a loop that does nothing else: matrix products (mma.sync, wgmma),
exponentials with the clock of the SM meanwhile, instructions, maxima and packing to bfloat16, reads of shared memory
and of the L2 cache, and copies, plain and in the short segments that the heads of a qkv row are. The result replaces
the assumed rates of ``benchmarks.gpu_audit --rates FILE``.

The loops are CUDA C++ (``gpu_calibration.cu``), built by the nvcc that is there; without one, the steps that torch can
measure remain. Each step is a task of ``gpu_steps``.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.gpu_steps import Skip

SOURCE = Path(__file__).with_name("gpu_calibration.cu")
BUFFER_BYTES = 1 << 30  # far beyond any L2 cache
L2_BYTES = 7 << 20  # the dense bias of 3 heads and 8 border types
WINDOW_TOKENS = 392  # as in gpu_calibration.cu
GEMM_SIZE = 8192


class Measured(NamedTuple):
    """One kernel: time of the fastest run and of the mean one, what a run did, and clock of the SM in hertz."""

    fastest: float
    mean: float
    amount: float
    clock: float


def write_json(path: Path, value: object) -> None:
    """Write a file that is complete whenever somebody looks at it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(partial, path)


def slug(name: str) -> str:
    """Turn a name into part of a file name: "NVIDIA H200" to "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def describe_gpu() -> dict[str, Any]:
    """Say on what results were measured: GPU, driver, clocks and versions, and nothing about the machine around it."""
    found: dict[str, Any] = {"gpu": "none", "torch": torch.__version__, "cuda": torch.version.cuda}
    try:
        import triton

        found["triton"] = triton.__version__
    except ImportError:
        found["triton"] = None
    found |= {"python": ".".join(map(str, sys.version_info[:3])), "date": datetime.now(timezone.utc).date().isoformat()}
    if not torch.cuda.is_available():
        return found
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    found |= {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "sms": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": getattr(properties, "L2_cache_size", None),
    }
    fields = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit", "temperature.gpu")
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "--id=0"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
        found |= {name: value.strip() for name, value in zip(fields, answer.splitlines()[0].split(","))}
    except (OSError, subprocess.SubprocessError, IndexError):
        found["nvidia_smi"] = "not available"
    return found


def nvcc_arguments(arch: str) -> list[str]:
    """Give what nvcc takes to compile the loops to a shared library, but for its name.

    Args:
        arch: of the GPU, "80" say.
    """
    arch = {"90": "90a"}.get(arch, arch)  # which has wgmma
    arguments = ["-O3", "-std=c++17", "-shared", "-Xcompiler", "-fPIC", "-allow-unsupported-compiler"]
    return [*arguments, "-gencode", f"arch=compute_{arch},code=sm_{arch}", str(SOURCE)]


class Kernels:
    """The compiled kernels, and the buffers they read and write."""

    def __init__(self, library: Path, device: str = "cuda") -> None:
        """Load the library and fill the source buffer with random bfloat16: zeros would run faster than real data."""
        self._run = ctypes.CDLL(str(library)).run
        self._run.restype = ctypes.c_char_p
        size = BUFFER_BYTES if device == "cuda" else L2_BYTES
        self.source = torch.randn(size // 2, device=device, dtype=torch.bfloat16)
        self.target = torch.empty_like(self.source)
        self.clocks = torch.zeros(1 << 20, 2, device=device, dtype=torch.int64)

    def measure(
        self, name: str, blocks: int, repeats: int = 20, source_bytes: int = 0, heads: int = 1, segment: int = 1
    ) -> Measured:
        """Run one kernel.

        Args:
            name: as in ``run()`` of the source.
            blocks: grid.
            repeats: timed runs.
            source_bytes: how much of the source it reads, for kernels that ask.
            heads: of ``segments``: how many share a row.
            segment: of ``segments``: 16-byte words of a head in q, k or v.

        Raises:
            RuntimeError: CUDA reports an error.
        """
        self.clocks.zero_()
        if self.clocks.is_cuda:
            torch.cuda.synchronize()
        fastest, mean, amount = ctypes.c_double(), ctypes.c_double(), ctypes.c_double()
        error = self._run(
            name.encode(),
            ctypes.c_void_p(self.source.data_ptr()),
            ctypes.c_longlong(source_bytes),
            ctypes.c_void_p(self.target.data_ptr()),
            ctypes.c_void_p(self.clocks.data_ptr()),
            *(ctypes.c_int(value) for value in (blocks, heads, segment, repeats)),
            *(ctypes.byref(value) for value in (fastest, mean, amount)),
        )
        if error:
            raise RuntimeError(f"{name}: {error.decode()}")
        timed = [(cycles, time) for cycles, time in self.clocks[: min(blocks, 1 << 20)].tolist() if time > 0]
        clock = statistics.median(cycles / time for cycles, time in timed) * 1e9 if timed else 0.0
        return Measured(fastest.value, mean.value, amount.value, clock)


def _per_clock(measured: Measured, sms: int) -> float:
    """Operations per clock and SM; 0 when the clock is not known."""
    return measured.amount / measured.fastest / sms / measured.clock if measured.clock else 0.0


def mma_sync(kernels: Kernels, sms: int) -> dict[str, float]:
    measured = kernels.measure("mma_sync", 4 * sms, repeats=200)
    return {
        "mma_sync_flops_per_s": measured.amount / measured.fastest,
        "mma_sync_flops_per_s_sustained": measured.amount / measured.mean,
        "mma_sync_clock_hz": measured.clock,
    }


def wgmma(kernels: Kernels, sms: int) -> dict[str, float]:
    if torch.cuda.get_device_capability() != (9, 0):
        raise Skip("wgmma exists on compute capability 9.0 only")
    measured = kernels.measure("wgmma", 2 * sms, repeats=200)
    return {
        "wgmma_flops_per_s": measured.amount / measured.fastest,
        "wgmma_flops_per_s_sustained": measured.amount / measured.mean,
        "wgmma_clock_hz": measured.clock,
    }


def exponentials(kernels: Kernels, sms: int) -> dict[str, float]:
    measured = kernels.measure("exp2", 8 * sms)
    return {
        "exponentials_per_s": measured.amount / measured.fastest,
        "exponentials_per_clock_and_sm": _per_clock(measured, sms),
        "sm_clock_hz": measured.clock,
    }


def instructions(kernels: Kernels, sms: int) -> dict[str, float]:
    found = {}
    for key, name in (("instructions", "fma"), ("maxima", "max"), ("packings", "pack")):
        measured = kernels.measure(name, 8 * sms)
        found[f"{key}_per_s"] = measured.amount / measured.fastest
        found[f"{key}_per_clock_and_sm"] = _per_clock(measured, sms)
    return found


def shared_memory(kernels: Kernels, sms: int) -> dict[str, float]:
    """Bytes of loads, and wavefronts of one of 8 bytes whose lanes share addresses, in units of one of 4 bytes."""
    clocks, found = {}, {}
    for name in ("lds32", "lds64", "lds64_broadcast"):
        measured = kernels.measure(name, 8 * sms)
        per_clock = _per_clock(measured, sms)
        if not per_clock:
            raise RuntimeError("the clock of the SM is not known")
        clocks[name] = found[f"{name}_clocks"] = 1 / per_clock
        if name == "lds64":
            found["shared_bytes_per_s"] = 32 * 8 * measured.amount / measured.fastest
    return found | {"lds64_broadcast_wavefronts": clocks["lds64_broadcast"] / clocks["lds32"]}


def l2_reads(kernels: Kernels, sms: int) -> dict[str, float]:
    measured = kernels.measure("l2", 8 * sms, source_bytes=L2_BYTES)
    return {"l2_read_bytes_per_s": measured.amount / measured.fastest}


def segment_copies(kernels: Kernels, sms: int) -> dict[str, float]:
    """Attention's own traffic: heads of 64 bytes at Swin-T's first stage, heads of 128 bytes at ViT-B."""
    found = {}
    for size, heads in ((64, 3), (128, 12)):
        windows = BUFFER_BYTES // (3 * heads * size * WINDOW_TOKENS)
        measured = kernels.measure("segments", windows * heads, heads=heads, segment=size // 16)
        found[f"segment_{size}_copy_bytes_per_s"] = measured.amount / measured.fastest
    return found


def _fastest(call: Callable[[], object], repeats: int = 20) -> float:
    """Seconds of the fastest of some calls, by CUDA events."""
    times = []
    for _ in range(repeats + 2):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) * 1e-3)
    return min(times[2:])


def plain_copy(device: str) -> dict[str, float]:
    source = torch.randn(BUFFER_BYTES // 2, device=device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    return {"copy_bytes_per_s": 2 * BUFFER_BYTES / _fastest(lambda: target.copy_(source))}


def gemm(device: str) -> dict[str, float]:
    """The library's own matrix product, for comparison: what a whole kernel can reach on random data."""
    left, right = (torch.randn(GEMM_SIZE, GEMM_SIZE, device=device, dtype=torch.bfloat16) for _ in range(2))
    return {"gemm_flops_per_s": 2 * GEMM_SIZE**3 / _fastest(lambda: left @ right)}


TORCH_STEPS = {step.__name__: step for step in (plain_copy, gemm)}
KERNEL_STEPS = {
    step.__name__: step
    for step in (exponentials, instructions, mma_sync, wgmma, shared_memory, l2_reads, segment_copies)
}


@functools.cache
def _kernels(library: Path, device: str) -> Kernels:
    return Kernels(library, device)


def measure(step: str, library: Path, device: str) -> dict[str, float]:
    """Measure one thing.

    Args:
        step: a key of ``TORCH_STEPS`` or ``KERNEL_STEPS``.
        library: the loops, compiled.
        device: where.

    Returns:
        Rates by name; all of a run together are what ``Rates.load`` reads.
    """
    if step in TORCH_STEPS:
        return TORCH_STEPS[step](device)
    if not library.exists():
        raise Skip(f"{library.name} was not built")
    return KERNEL_STEPS[step](_kernels(library, device), torch.cuda.get_device_properties(0).multi_processor_count)

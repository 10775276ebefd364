"""What this CPU does at best: the rates that limit attention, measured beside it in the same rounds.

``gemm`` flatters where the platform's own matrix product is poor. Here are a loop of independent multiply-adds on
registers, a loop of exponentials, and loads and stores of short sequences without their arithmetic, all on as many
threads as torch has. They are C++ (``cpu_limits.cpp``), compiled at the first use, with the flags of the instruction
set that our kernels run on, which ``VIDATTN_CPU_ISA`` chooses.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.shapes import DividedCase

ROOT = Path(__file__).parents[1]
SOURCE = Path(__file__).with_suffix(".cpp")
INCLUDE = ROOT / "csrc" / "cpu"
LIBRARIES = ROOT / ".benchmarks"
AVX512 = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c"
# As in setup.py.
ISA_FLAGS = {
    "baseline": "",
    "avx2": "-mavx2 -mfma -mf16c",
    "avx512": AVX512,
    "avx512_bf16": f"{AVX512} -mavx512bf16",
    "avx512_amx": f"{AVX512} -mavx512bf16 -mamx-tile -mamx-bf16",
}
# One call of each loop, some 10 ms on two cores.
FMA_FLOPS = 2 * 10**9
EXPONENTIALS = 2**26
SHORT_FRAMES = 16  # sequences up to here are bound by memory


def cpu_isa() -> str:
    """Name the instruction set that the compiled CPU kernels use; "not built" without them."""
    try:
        return torch.ops.vidattn._cpu_isa()
    except (AttributeError, NotImplementedError, RuntimeError):
        return "not built"


def _openmp() -> list[str]:
    """Find the OpenMP library that torch has loaded: linked with it, the loops run on torch's own threads."""
    maps = Path("/proc/self/maps")
    mapped = {line.split()[-1] for line in maps.read_text().splitlines()} if maps.exists() else set()
    return sorted(path for path in mapped if Path(path).name.startswith(("libgomp", "libomp", "libiomp")))


@functools.cache
def _library() -> ctypes.CDLL:
    flags = ISA_FLAGS.get(cpu_isa(), "")
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    if shutil.which(compiler[0]) is None:
        raise RuntimeError(f"there is no {compiler[0]}, which measures what the CPU does at best")
    command = [*compiler, "-std=c++20", "-O3", "-ffp-contract=fast", "-w", "-shared", "-fPIC", "-fopenmp"]
    command += [*flags.split(), f"-I{INCLUDE}", f"-I{INCLUDE.parent}", str(SOURCE), "-Wl,--as-needed", *_openmp()]
    sources = b"".join(path.read_bytes() for path in (SOURCE, INCLUDE / "vec.h", INCLUDE / "tile.h"))
    name = hashlib.sha256(" ".join(command).encode() + sources).hexdigest()[:16]
    library = LIBRARIES / f"cpu_limits-{name}.so"
    if not library.exists():
        LIBRARIES.mkdir(exist_ok=True)
        partial = library.with_suffix(f".{os.getpid()}")
        done = subprocess.run([*command, "-o", str(partial)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{SOURCE.name} does not compile: {done.stderr[-1000:]}")
        os.replace(partial, library)
    loaded = ctypes.CDLL(str(library))
    loaded.fma_bf16.restype = ctypes.c_bool
    return loaded


def why_not() -> str | None:
    """Say why the limits cannot be measured here; None if they can."""
    try:
        _library()
    except (RuntimeError, OSError) as error:
        return str(error)
    return None


def fma(dtype: torch.dtype, direction: str) -> Callable[[], object]:
    """Give a loop of ``FMA_FLOPS`` operations: of products of a 16-bit type where a direction's kernels have them."""
    loops = _library()
    flops = ctypes.c_int64(FMA_FLOPS)
    loop = loops.fma32
    in_float32 = cpu_isa() == "avx512_amx" and direction not in ("forward", "inference")
    if dtype == torch.bfloat16 and not in_float32 and loops.fma_bf16(ctypes.c_int64(0), 1):
        loop = loops.fma_bf16
    return lambda: loop(flops, torch.get_num_threads())


def exponentials(dtype: torch.dtype) -> Callable[[], object]:
    """Give a loop of ``EXPONENTIALS`` of the kernels' own exponentials."""
    loop, count, half = _library().exponentials, ctypes.c_int64(EXPONENTIALS), dtype == torch.bfloat16
    return lambda: loop(count, torch.get_num_threads(), ctypes.c_bool(half))


def traffic(case: DividedCase, direction: str, dtype: torch.dtype) -> Callable[[], object] | None:
    """Give a loop that reads and writes what attention over time must, without its arithmetic.

    Args:
        case: sizes of the call.
        direction: "forward" | "forward_backward".
        dtype: of the tensors.

    Returns:
        A function; None for sequences that memory does not limit.
    """
    row_bytes = case.head_dim * dtype.itemsize
    if case.kind != "temporal" or case.has_cls or case.num_frames > SHORT_FRAMES or row_bytes % 8:
        return None
    loop = _library().traffic
    qkv = torch.zeros(case.qkv_shape, dtype=dtype)
    backward = direction == "forward_backward"
    context = torch.zeros_like(qkv.select(2, 0))
    gradient, gradients = (torch.zeros_like(x) if backward else x for x in (context, qkv))
    sizes = (case.batch, case.num_sites, case.num_frames, case.heads, row_bytes // 8)

    def call() -> None:
        out = torch.empty_like(context)
        into = torch.empty_like(gradients) if backward else gradients
        pointers = (ctypes.c_void_p(x.data_ptr()) for x in (qkv, gradient, out, into))
        numbers = (ctypes.c_int64(size) for size in sizes)
        flags = ctypes.c_bool(case.token_order == "hwt"), ctypes.c_bool(backward)
        loop(*pointers, *numbers, *flags, torch.get_num_threads())

    return call

"""Compiles what the GPU runs need, before they need it: tasks for worker processes, and the cache that they fill.

The extension with the CUDA kernels, two programs by nvcc, the Triton kernels of calls, and the rivals that torch
compiles. Triton kernels are compiled by running the calls on a GPU that launches nothing (``mocked_gpu``), so that as
many processes do it as there are cores, and none needs the GPU.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu_steps import Results, Skip, Task

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "vidattn"
LIBRARY = "_C.so"
NAME = "build"
SECONDS = {"extension": 480.0, "program": 120.0, "kernels": 240.0, "rival": 240.0}  # limits of its tasks
ERROR_CHARACTERS = 1500


class Cache:
    """Folders that later runs use again.

    Args:
        out: the folder of the results.
    """

    def __init__(self, out: Path) -> None:
        self.root = out.resolve() / "cache"
        self.extension, self.programs = self.root / "extension", self.root / "programs"

    @property
    def conformance(self) -> Path:
        """The program that prints what the primitives give."""
        return self.programs / "conformance"

    @property
    def calibration(self) -> Path:
        """The library of loops that measure rates."""
        return self.programs / "calibration.so"

    def environment(self) -> dict[str, str]:
        """Say where Triton, torch.compile and autotuning keep what they find; the rest makes processes share cores."""
        return {
            "TRITON_CACHE_DIR": str(self.root / "triton"),
            "TORCHINDUCTOR_CACHE_DIR": str(self.root / "inductor"),
            "VIDATTN_CACHE": str(self.root / "autotune"),
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
            "OMP_NUM_THREADS": "1",
            # torch demands it of anyone who asks for deterministic products on a GPU, as the tests do.
            "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        }

    def library(self) -> Path | None:
        """Find the extension that was built last."""
        built = self.extension / "lib" / "vidattn" / LIBRARY
        return built if built.is_file() else None

    def results(self, code: str, again: bool) -> Results:
        """Open the list of what is in the cache; an extension that has been removed since is not."""
        results, library = Results(self.root / "built.jsonl", code, again), self.library()
        if library is None or not _is_installed(library):
            results.forget(NAME, "extension")
        return results


def find_tool(name: str) -> str | None:
    """Find a tool of CUDA, in CUDA_HOME or on the path, or where it is often installed beside the path."""
    home = os.environ.get("CUDA_HOME")
    folders = [f"{home}/bin"] if home else [*os.environ.get("PATH", "").split(os.pathsep), "/usr/local/cuda/bin"]
    return shutil.which(name, path=os.pathsep.join(folders))


def program_tasks(cache: Cache, arch: str, processes: int, extension: bool) -> Iterator[Task]:
    """Give what nvcc compiles, what takes longest first.

    Args:
        cache: where it goes.
        arch: of the GPU, "90" say.
        processes: for the compilation of the extension.
        extension: whether to build that.
    """
    if extension:
        yield _task("extension", "extension", build_extension, cache.extension, processes)
    yield _task("conformance", "program", build_conformance, cache.conformance, arch)
    yield _task("calibration", "program", build_calibration, cache.calibration, arch)


def call_tasks(
    arch: str,
    kernels: Iterable[tuple[str, tuple[Any, ...]]],
    rivals: Iterable[tuple[str, ...]],
    compiles: bool,
) -> Iterator[Task]:
    """Give what Triton and torch compile.

    Args:
        arch: of the GPU.
        kernels: functions and arguments of calls whose Triton kernels are wanted.
        rivals: case, direction, dtype, contender and device of calls that torch compiles.
        compiles: False only counts the kernels.
    """
    for function, arguments in kernels:
        yield _task(f"kernels {' '.join(arguments)}", "kernels", compile_kernels, function, arguments, arch, compiles)
    for arguments in rivals:
        yield _task(f"rival {' '.join(arguments[:-1])}", "rival", compile_rival, *arguments)


def _task(name: str, kind: str, function: Callable[..., Any], *arguments: Any) -> Task:
    return Task(name, f"{__name__}:{function.__name__}", arguments, SECONDS[kind])


# ---- In a worker ----


def build_extension(folder: Path, processes: int) -> dict[str, Any]:
    """Build the extension with CUDA kernels and put it into the package, if that has another one."""
    if find_tool("nvcc") is None:
        raise Skip("no nvcc")
    if importlib.util.find_spec("setuptools") is None:
        raise Skip("not installed: setuptools")
    start = time.monotonic()
    library = folder / "lib"
    command = [sys.executable, "setup.py", "build_ext", f"--build-temp={folder / 'temp'}", f"--build-lib={library}"]
    _run(command, {"VIDATTN_BUILD_EXT": "1", "VIDATTN_BUILD_CUDA": "1", "MAX_JOBS": str(processes)})
    built = library / "vidattn" / LIBRARY
    if not _is_installed(built):
        partial = PACKAGE / f"{built.name}.partial"
        shutil.copy2(built, partial)
        os.replace(partial, PACKAGE / built.name)  # processes that have loaded the old one keep it
    return {"build_s": round(time.monotonic() - start, 1), "bytes": built.stat().st_size}


def _is_installed(library: Path) -> bool:
    installed = PACKAGE / library.name
    return installed.exists() and installed.read_bytes() == library.read_bytes()


def build_conformance(program: Path, arch: str) -> None:
    """Compile the program that prints what every primitive of the CUDA kernels gives."""
    source = ROOT / "tests" / "cuda_emulator" / "kernels" / "conformance_gpu.cu"
    _nvcc(program, ["-std=c++17", f"-arch=sm_{arch}", "-I", str(ROOT / "csrc" / "cuda"), str(source)])


def build_calibration(library: Path, arch: str) -> None:
    """Compile the loops that measure rates."""
    from benchmarks import calibration

    _nvcc(library, calibration.nvcc_arguments(arch))


def _nvcc(target: Path, arguments: Sequence[str]) -> None:
    nvcc = find_tool("nvcc")
    if nvcc is None:
        raise Skip("no nvcc")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.partial")
    _run([nvcc, *arguments, "-o", str(partial)])
    os.replace(partial, target)


def _run(command: Sequence[str], environment: dict[str, str] | None = None) -> None:
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, **(environment or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{Path(command[0]).name} failed: {done.stdout.strip()[-ERROR_CHARACTERS:]}")


def compile_kernels(function: str, arguments: Sequence[Any], arch: str, compiles: bool) -> dict[str, Any]:
    """Compile the Triton kernels of a call.

    Args:
        function: "module:function" that makes the call on the backend "triton" and on tensors of the CPU.
        arguments: what it takes.
        arch: of the GPU.
        compiles: False only counts them.
    """
    if importlib.util.find_spec("triton") is None:
        raise Skip("not installed: triton")
    from benchmarks.gpu_steps import resolve
    from benchmarks.mocked_gpu import mocked_gpu

    with mocked_gpu(capability=divmod(int(arch), 10), compiles=compiles) as gpu:
        resolve(function)(*arguments)
    return {"kernels": len(gpu.compiled)}


def compile_rival(case: str, direction: str, dtype: str, contender: str, device: str) -> None:
    """Run a contender that torch compiles once."""
    import torch

    from benchmarks import gpu_timing

    reason = gpu_timing.why_not(case, direction, dtype, contender)
    if reason is not None:
        raise Skip(reason)
    try:
        with gpu_timing.skipping_rivals(contender):
            gpu_timing.build_copies(case, direction, dtype, contender, device)[0]()
    finally:
        torch.cuda.empty_cache()  # other processes need the memory

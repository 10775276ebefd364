"""The machine code of csrc/cuda for GPUs that are not here: that of the built extension, or compiled for the purpose.

What was compiled is kept under build/, by its content.
"""

from __future__ import annotations

import ast
import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

from benchmarks.sass import Program, Resources, embedded, read_all

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
BUILD = ROOT / "build" / "cubins"
EXTENSION = ROOT / "vidattn" / "_C.so"

# Calls a planner of plan.h: numbers in, numbers out.
_PLANNER = """#include "cuda/plan.h"
using namespace vidattn::cuda;
extern "C" void plan(const int64_t* n, int64_t* out) {{
  {setup}
  {fields}
}}
"""


def nvcc() -> str | None:
    """Find the compiler; None without one."""
    from torch.utils.cpp_extension import CUDA_HOME

    return shutil.which("nvcc") or (shutil.which("nvcc", path=str(Path(CUDA_HOME, "bin"))) if CUDA_HOME else None)


def flags() -> list[str]:
    """Give the flags that setup.py compiles with, without those that choose GPUs."""
    for statement in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(statement, ast.Assign) and getattr(statement.targets[0], "id", "") == "NVCC_FLAGS":
            return [flag for flag in ast.literal_eval(statement.value) if not flag.startswith("-gencode")]
    raise LookupError("setup.py: expected NVCC_FLAGS")


def cubin(source: Path, arch: str) -> bytes:
    """Compile a file for one architecture.

    Args:
        source: a .cu file of csrc/cuda.
        arch: "sm_90", ...

    Returns:
        The cubin.
    """
    compiler = nvcc()
    if compiler is None:
        raise FileNotFoundError("no nvcc")
    command = [compiler, "-cubin", f"-arch={arch}", *flags(), str(source.relative_to(ROOT))]
    return _built(f"{source.stem}-{arch}", ".cubin", command).read_bytes()


def is_current(extension: Path) -> bool:
    """Say whether an extension is there and younger than all that it is built from."""
    sources = [ROOT / "setup.py", *(path for path in CSRC.rglob("*") if path.is_file())]
    return extension.is_file() and extension.stat().st_mtime > max(path.stat().st_mtime for path in sources)


def cubins_of(arch: str) -> dict[str, bytes]:
    """Give the kernels of csrc/cuda for one architecture: as the extension holds them, if it does, else compiled now.

    Args:
        arch: "sm_90", ...

    Returns:
        The cubins, one for each file, by a name.
    """
    if is_current(EXTENSION) and (built := embedded(EXTENSION, arch)):
        return built
    return {source.stem: cubin(source, arch) for source in sorted((CSRC / "cuda").glob("*.cu"))}


@functools.cache
def kernels(arch: str) -> Mapping[tuple[str, ...], tuple[Program, Resources]]:
    """Read the kernels of csrc/cuda, by name and template arguments: ("window_forward", "__half", "32")."""
    found = (kernel for compiled in cubins_of(arch).values() for kernel in read_all(compiled).items())
    return {_demangled(name): kernel for name, kernel in found}


@functools.cache
def planner(name: str, setup: str, fields: tuple[str, ...]) -> Callable[..., dict[str, int]]:
    """Give a function of plan.h as one of numbers.

    Args:
        name: what the compiled function is called.
        setup: C++ that makes a plan ``p`` of the numbers ``n``.
        fields: of the plan that are asked for; 0 for one that it does not have.

    Returns:
        A function of numbers that gives the fields by name.
    """
    getter = "[](const auto& p) -> int64_t {{ if constexpr (requires {{ p.{0}; }}) return p.{0}; return 0; }}(p)"
    lines = (f"out[{i}] = {getter.format(field)};" for i, field in enumerate(fields))
    text = _PLANNER.format(setup=setup, fields="\n  ".join(lines))
    source = BUILD / f"{name}.cpp"
    BUILD.mkdir(parents=True, exist_ok=True)
    source.write_text(text)
    command = [os.environ.get("CXX", "g++"), "-std=c++20", "-O1", "-shared", "-fPIC", f"-I{CSRC}", str(source)]
    function = ctypes.CDLL(str(_built(name, ".so", command))).plan

    def plan(*numbers: int) -> dict[str, int]:
        out = (ctypes.c_int64 * len(fields))()
        function((ctypes.c_int64 * len(numbers))(*numbers), out)
        return dict(zip(fields, out, strict=True))

    return plan


def _built(name: str, suffix: str, command: list[str]) -> Path:
    """Run a compiler, unless the same sources and flags have been compiled before."""
    digest = hashlib.sha256(repr(command).encode())
    digest.update(subprocess.run([command[0], "--version"], capture_output=True, check=True).stdout)
    for path in sorted([*CSRC.glob("*.h"), *(CSRC / "cuda").iterdir(), *map(Path, command[-1:])]):
        digest.update(path.name.encode() + (ROOT / path).read_bytes())
    target = BUILD / f"{name}-{digest.hexdigest()[:16]}{suffix}"
    if not target.is_file():
        BUILD.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(f".{os.getpid()}.partial")
        child = subprocess.run([*command, "-o", str(partial)], capture_output=True, text=True, cwd=ROOT, check=False)
        if child.returncode:
            raise RuntimeError(f"{command[0]} failed: {(child.stderr or child.stdout)[-2000:]}")
        os.replace(partial, target)
    return target


def _demangled(name: str) -> tuple[str, ...]:
    """Give the function's own name and its template arguments."""
    text = subprocess.run(["c++filt", name], capture_output=True, text=True, check=True).stdout.strip()
    text = text.replace("(anonymous namespace)::", "")
    function, _, rest = text.partition("(")[0].partition("<")
    arguments = rest.removesuffix(">").split(", ") if rest else []
    return (function.split()[-1].rpartition("::")[2], *arguments)

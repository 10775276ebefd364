"""Compiles the emulator, and CUDA sources for it. What was compiled is kept under a name made from its content."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sysconfig
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CSRC = ROOT / "csrc"
BUILD = ROOT / "build" / "cuda_emulator"
INCLUDE = HERE / "include"

# clang++ has other names for some of these.
COMPILER = os.environ.get("VIDATTN_EMULATOR_CXX", "g++")
FLAGS = ["-std=c++20", "-fPIC", "-g1", "-Wall", "-Wno-unknown-pragmas", "-Wno-unused-function", "-march=x86-64-v3"]
# Shared memory is used under one type after another.
KERNEL_FLAGS = ["-fno-strict-aliasing"]
CHECKED_FLAGS = [
    "-O1",
    "-fsanitize=thread",
    "--param=tsan-instrument-func-entry-exit=0",
    "-fno-tree-vectorize",  # an access stays as wide as it stands in the source
    "-ftrivial-auto-var-init=pattern",
    "-fsanitize=bounds,alignment,shift,signed-integer-overflow,integer-divide-by-zero",
]
PLAIN_FLAGS = ["-O1"]


def emulator() -> ModuleType:
    """Give the emulator's module, compiled if that has not happened yet."""
    return _load_emulator()


def shared_library(source: Path, checked: bool) -> Path:
    """Compile one CUDA source file that stands alone."""
    compiled = _compile(source, [*_mode(checked), *KERNEL_FLAGS, "-x", "c++"], INCLUDE.iterdir())
    return _link([compiled], source.stem, [str(_emulator_library())])


def backend_library(checked: bool, edits: Mapping[str, Callable[[str], str]] | None = None) -> tuple[str, Path]:
    """Compile the CUDA backend: the kernels, and the file that registers the native ops.

    Args:
        checked: whether every access of memory is checked.
        edits: what is done to the text of files of csrc/cuda before, by their names.

    Returns:
        The namespace that the ops are registered in, which no other library has, and the library.
    """
    from torch.utils import cpp_extension

    folder = _edited(edits) if edits else CSRC / "cuda"
    changed = set(edits or ())
    namespace = f"vidattn_emulated_{_key(_texts(folder), sorted(CSRC.glob('*.h')), sorted(INCLUDE.iterdir()), checked)}"
    headers = [*CSRC.glob("*.h"), *INCLUDE.iterdir()]
    named = BUILD / f"{namespace}.cpp"
    _write(named, f'extern "C" {{ extern const char emulated_namespace[] = "{namespace}"; }}\n')

    def compiled_alone(name: str, flags: list[str]) -> Path:
        names = _included(folder, name)
        home = folder if names & changed else CSRC / "cuda"  # what no edit reaches is compiled once for all
        return _compile(home / name, [*flags, f"-I{CSRC}"], [*(home / name for name in sorted(names)), *headers])

    def kernels(name: str) -> Path:
        return compiled_alone(name, [*_mode(checked), *KERNEL_FLAGS, "-x", "c++"])

    def ops(name: str) -> Path:
        flags = ["-O0", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
        return compiled_alone(name, flags + [f"-I{path}" for path in cpp_extension.include_paths()])

    with ThreadPoolExecutor(os.cpu_count()) as pool, ThreadPoolExecutor(1) as beside:
        library = beside.submit(_emulator_library)  # which takes as long
        objects = [pool.submit(kernels, path.name) for path in sorted(folder.glob("*.cu"))]
        objects += [pool.submit(ops, path.name) for path in sorted(folder.glob("*.cpp"))]
        objects.append(pool.submit(_compile, named, [], []))
        compiled = [each.result() for each in objects]
    libraries = [f"-L{path}" for path in cpp_extension.library_paths()] + ["-lc10", "-ltorch", "-ltorch_cpu"]
    return namespace, _link(compiled, "backend", [str(library.result()), *libraries])


def source_line(image: str, offset: int) -> str:
    """Say which line of the source an instruction of a library belongs to."""
    command = ["addr2line", "-i", "-e", image, hex(offset)]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")
    except (OSError, subprocess.CalledProcessError):
        return f"{image}+{offset:#x}"
    names = [line.split(" (")[0].rpartition("/")[2] for line in lines if line and not line.startswith("?")]
    return ", called at ".join(names[:4]) or f"{image}+{offset:#x}"


def _mode(checked: bool) -> list[str]:
    return CHECKED_FLAGS if checked else PLAIN_FLAGS


def _texts(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted(folder.iterdir()) if path.is_file()}


def _included(folder: Path, name: str) -> set[str]:
    """Name the files of a folder that a file of it is made of: itself and what it includes, and so on."""
    found, left = set(), [name]
    while left:
        one = left.pop()
        if one not in found and (folder / one).is_file():
            found.add(one)
            left += re.findall(r'^#include "([^"/]+)"', (folder / one).read_text(), re.MULTILINE)
    return found


def _edited(edits: Mapping[str, Callable[[str], str]]) -> Path:
    """Give a folder with copies of csrc/cuda, some of them changed."""
    texts = _texts(CSRC / "cuda")
    for name, edit in edits.items():
        changed = edit(texts[name])
        if changed == texts[name]:
            raise ValueError(f"backend_library: edits: expected a change of {name}, got none")
        texts[name] = changed
    folder = BUILD / f"edited-{_key(texts)}" / "cuda"
    for name, text in texts.items():
        if not (folder / name).is_file():
            _write(folder / name, text)
    return folder


@functools.cache
def _emulator_library() -> Path:
    if platform.machine().lower() not in ("x86_64", "amd64"):
        raise RuntimeError(f"cuda_emulator: expected an x86-64 machine, got {platform.machine()}")
    if shutil.which(COMPILER) is None:
        raise RuntimeError(f"cuda_emulator: expected {COMPILER} (or VIDATTN_EMULATOR_CXX), got none")
    from torch.utils import cpp_extension

    # torch brings the headers of pybind11.
    includes = [*cpp_extension.include_paths(), sysconfig.get_path("include")]
    flags = ["-fvisibility-inlines-hidden", *(f"-isystem{path}" for path in includes)]
    sources = sorted(HERE.glob("*.cpp"))

    def compile_one(source: Path) -> Path:
        optimised = "-O0" if source.stem == "module" else "-O3"
        return _compile(source, [optimised, *flags], [*HERE.glob("*.h"), *INCLUDE.iterdir()])

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sources))
    return _link(objects, "emulator", [])


@functools.cache
def _load_emulator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("_emulator", _emulator_library())
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _compile(source: Path, flags: list[str], headers: Iterable[Path]) -> Path:
    command = [*FLAGS, f"-I{INCLUDE}", *flags, "-c", str(source)]
    return _run(BUILD / f"{source.stem}-{_key(source, sorted(headers), command, _compiler())}.o", command)


def _link(objects: list[Path], name: str, libraries: list[str]) -> Path:
    output = BUILD / f"{name}-{_key([path.name for path in objects], libraries)}.so"
    # The soname lets the loader see that the emulator is loaded already.
    return _run(output, ["-shared", f"-Wl,-soname,{output.name}", *map(str, objects), *libraries])


def _run(output: Path, arguments: list[str]) -> Path:
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.with_suffix(".lock").open("w") as lock:  # processes that need the same share the work
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not output.exists():
            unfinished = _unfinished(output)
            done = subprocess.run([COMPILER, *arguments, "-o", str(unfinished)], capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"cuda_emulator: {COMPILER} failed:\n{done.stderr[-4000:]}")
            unfinished.replace(output)
    return output


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = _unfinished(path)
    unfinished.write_text(text)
    unfinished.replace(path)


def _unfinished(path: Path) -> Path:
    """Name a file to write before it takes its name: others may build the same at the same time."""
    return path.with_suffix(f".{os.getpid()}-{threading.get_ident()}{path.suffix}")


@functools.cache
def _compiler() -> str:
    return subprocess.run([COMPILER, "--version"], capture_output=True, text=True, check=True).stdout


def _key(*parts: object) -> str:
    digest = hashlib.sha256(sysconfig.get_config_var("EXT_SUFFIX").encode())

    def add(part: object) -> None:
        if isinstance(part, Path):
            digest.update(part.name.encode() + part.read_bytes())
        elif isinstance(part, Iterable) and not isinstance(part, (str, bytes, Mapping)):
            for one in part:
                add(one)
        else:
            digest.update(repr(part).encode())

    add(parts)
    return digest.hexdigest()[:16]

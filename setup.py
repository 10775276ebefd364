"""Builds vidattn/_C.so, the native kernels; everything else about the package stands in pyproject.toml.

It knows nothing of Python, and of torch only the stable ABI: one binary serves every torch >= 2.11 and every Python.

    VIDATTN_BUILD_EXT            0 = pure Python, 1 = require the extension, unset = build it if there is a C++ compiler
    VIDATTN_BUILD_CUDA           0 = no CUDA kernels, 1 = require them, unset = build them if nvcc is there and works
    VIDATTN_SANITIZE             address (undefined behaviour too) or thread: the CPU kernels with this sanitizer, for
                                 the instruction set of CXXFLAGS alone; see tests/sanitize.py
    CUDA_HOME                    where the CUDA toolkit is; unset = that of the nvcc on the path
    MAX_JOBS                     how many files are compiled at a time
    CXX                          the compiler: g++ or clang++; CXX="ccache g++" works
    CPPFLAGS, CXXFLAGS, LDFLAGS  flags that come before those of this file
"""

import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

COMPILER = os.environ.get("CXX", "c++")

# A source named *_<suffix>.cpp is compiled with these flags and runs only where the CPU has them (csrc/cpu/isa.cpp).
# They are spelled out rather than -march=...: the same object on every vendor's machine.
AVX512 = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c"
ISA_FLAGS = {
    "avx2": "-mavx2 -mfma -mf16c",
    "avx512": AVX512,
    "avx512amx": f"{AVX512} -mavx512bf16 -mamx-tile -mamx-bf16",
    "avx512bf16": f"{AVX512} -mavx512bf16",
}

FLAGS = [
    "-std=c++20",
    "-O3",
    "-fPIC",
    "-ffp-contract=fast",
    "-fvisibility=hidden",
    "-Wall",
    "-Wno-uninitialized",  # g++ 12 warns about its own AVX-512 header
    "-DNDEBUG",
    "-DTORCH_TARGET_VERSION=0x020b000000000000",  # 2.11
    "-Icsrc",
]

SANITIZERS = {
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
    "thread": ["-fsanitize=thread"],
}
SANITIZER = os.environ.get("VIDATTN_SANITIZE", "")
if SANITIZER:
    if SANITIZER not in SANITIZERS:
        raise SystemExit(f"VIDATTN_SANITIZE: expected one of {', '.join(SANITIZERS)}, or nothing, got {SANITIZER!r}")
    FLAGS += ["-O1", "-g1", "-fno-omit-frame-pointer", "-DVIDATTN_SANITIZED", *SANITIZERS[SANITIZER]]

# Kernels run on GPUs from sm_80 on; for those after sm_90 the driver compiles them. The CUDA runtime is linked in, so
# that the extension loads where there is none.
NVCC_FLAGS = [
    "-std=c++17",
    "-O3",
    "-gencode=arch=compute_80,code=sm_80",
    "-gencode=arch=compute_90,code=[sm_90,compute_90]",
    "--compress-mode=size",  # a fifth of the size; since 12.8; see _why_not_gpu in vidattn/ops/_library.py
    "-Xcompiler=-fPIC,-fvisibility=hidden",
    "-DNDEBUG",
    "-Icsrc",
    "-Icsrc/cuda",
]
CUDA_LIBRARIES = ["-lcudart_static", "-lrt", "-lpthread", "-ldl"]
MIN_CUDA = (12, 8)  # an older nvcc is none


def isa_of(source: str) -> str:
    """Name the instruction set that a file is for; "" if it runs everywhere."""
    suffix = Path(source).stem.rpartition("_")[2]
    return suffix if suffix in ISA_FLAGS else ""


class Cuda(NamedTuple):
    """What compiles csrc/cuda.

    Attributes:
        home: the toolkit; None if there is none.
        build: its version, or why there is none.
    """

    home: Path | None
    build: str


def cuda_wish() -> str:
    wanted = os.environ.get("VIDATTN_BUILD_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise SystemExit(f"VIDATTN_BUILD_CUDA: expected 0, 1 or nothing, got {wanted!r}")
    return wanted


def find_cuda(build_dir: Path) -> Cuda:
    """Find a CUDA toolkit that works, as VIDATTN_BUILD_CUDA asks for."""
    wanted = cuda_wish()
    if wanted == "0":
        return Cuda(None, "VIDATTN_BUILD_CUDA was 0")
    named, nvcc = os.environ.get("CUDA_HOME"), shutil.which("nvcc")
    homes = [Path(named)] if named else [*([Path(nvcc).resolve().parents[1]] if nvcc else []), Path("/usr/local/cuda")]
    problem = "no nvcc was found"
    for home in homes:
        if not (home / "bin" / "nvcc").is_file():
            continue
        version, problem = try_cuda(home, build_dir)
        if not problem:
            return Cuda(home, version)
    if wanted == "1":
        raise SystemExit(f"VIDATTN_BUILD_CUDA=1: {problem}; CUDA_HOME says where the CUDA toolkit is")
    print(f"vidattn: {problem}: building without CUDA kernels", file=sys.stderr)
    return Cuda(None, f"{problem}; with VIDATTN_BUILD_CUDA=1 a build without them fails")


def try_cuda(home: Path, build_dir: Path) -> tuple[str, str]:
    """Give the version of a toolkit, and what keeps it from compiling the kernels: nothing if it can."""
    nvcc = str(home / "bin" / "nvcc")
    found = re.search(r"release (\d+)\.(\d+)", run([nvcc, "--version"])[1])
    if not found:
        return "", f"{nvcc} does not tell its version"
    version = f"{found[1]}.{found[2]}"
    if (int(found[1]), int(found[2])) < MIN_CUDA:
        return version, f"{nvcc} is of CUDA {version}, which is older than {MIN_CUDA[0]}.{MIN_CUDA[1]}"
    if not list(home.glob("lib*/libcudart_static.a")):
        return version, f"{home} has no libcudart_static.a"
    # It may not take the C++ compiler that is here, or miss its own headers.
    probe = build_dir / "probe.cu"
    probe.write_text("#include <cuda_bf16.h>\n#include <cuda_fp16.h>\n#include <utility>\n__global__ void probe() {}\n")
    failed, text = run([nvcc, *NVCC_FLAGS, "-c", str(probe), "-o", str(probe.with_suffix(".o"))])
    first_line = re.sub(r"[^ -~]", "", (text.strip() or "it says nothing").splitlines()[0])
    return version, f"{nvcc} fails ({first_line[:200]})" if failed else ""


def run(command: list[str]) -> tuple[int, str]:
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    except OSError as error:
        return 1, str(error)
    return done.returncode, done.stdout


def sources(cuda: bool) -> list[str]:
    files = sorted(map(str, [*Path().glob("csrc/*.cpp"), *Path().glob("csrc/cpu/*.cpp")]))
    if cuda:
        files += sorted(map(str, [*Path().glob("csrc/cuda/*.cpp"), *Path().glob("csrc/cuda/*.cu")]))
    has_isas = platform.machine().lower() in ("x86_64", "amd64") and not SANITIZER
    return files if has_isas else [f for f in files if not isa_of(f)]


def ninja_file(cuda: Cuda, library: Path, build_dir: Path) -> str:
    """Write down how the library is made: one rule to compile, with a file's own flags, and one to link."""
    from torch.utils import cpp_extension

    def command(*arguments: str) -> str:
        return shlex.join(arguments).replace("$", "$$")

    def name(path: Path) -> str:
        return re.sub(r"([$ :])", r"$\1", str(path))

    env = {key: os.environ.get(key, "").replace("$", "$$") for key in ("CPPFLAGS", "CXXFLAGS", "LDFLAGS")}
    includes = [f"-I{path}" for path in cpp_extension.include_paths()]
    libraries = [f"-L{path}" for path in cpp_extension.library_paths()] + ["-lc10", "-ltorch", "-ltorch_cpu"]
    nvcc = "nvcc"
    if cuda.home:
        nvcc = str(cuda.home / "bin" / "nvcc")
        libraries += [f"-L{path.parent}" for path in cuda.home.glob("lib*/libcudart_static.a")] + CUDA_LIBRARIES
    how = shlex.join(SANITIZERS.get(SANITIZER, ["-s"]))
    lines = [
        f"builddir = {name(build_dir)}",
        f"cxx = {COMPILER}",
        "rule compile",
        f"  command = $cxx {env['CPPFLAGS']} {env['CXXFLAGS']} {command(*FLAGS, *includes)} $own_flags "
        "-MMD -MF $out.d -c $in -o $out",
        "  description = $in",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule compile_cuda",
        f"  command = {command(nvcc, *NVCC_FLAGS)} -MMD -MF $out.d -c $in -o $out",
        "  description = $in",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = $cxx -shared {how} {env['LDFLAGS']} $in {command(*libraries)} -Wl,--exclude-libs,ALL -o $out",
        "  description = $out",
    ]
    files = sources(cuda.home is not None)
    objects = [name((build_dir / file).with_suffix(".o")) for file in files]
    for file, compiled in zip(files, objects):
        if file.endswith(".cu"):
            lines.append(f"build {compiled}: compile_cuda {file}")
        else:
            flags = ISA_FLAGS.get(isa_of(file), "")
            if Path(file).parent.name == "cuda":
                flags = "-Icsrc/cuda"
            elif Path(file).name == "version.cpp":
                flags = command(f"-DVIDATTN_CUDA_BUILD={json.dumps(cuda.build)}")
            lines += [f"build {compiled}: compile {file}", f"  own_flags = {flags}"]
    lines += [f"build {name(library)}: link {' '.join(objects)}", ""]
    return "\n".join(lines)


# By library, the newest version that manylinux_2_28 and all later ones have.
VERSIONS = {"GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11), "GCC": (7, 0, 0)}


def manylinux(library: Path) -> str:
    """Name the oldest manylinux, from 2_28 on, that has all a binary asks for; "" if none, or no objdump to see it."""
    _, text = run(["objdump", "-p", str(library)])
    glibc = 0
    for name, version in re.findall(r" ([A-Z]+)_(\S+)$", text.partition("Version References")[2], re.MULTILINE):
        numbers = tuple(map(int, version.split("."))) if re.fullmatch(r"[\d.]+", version) else ()
        if name == "GLIBC" and numbers:
            glibc = max(glibc, 28, numbers[1])
        elif not numbers or numbers > VERSIONS.get(name, ()):
            return ""
    return f"manylinux_2_{glibc}" if glibc else ""


class BuildWithNinja(build_ext):
    """Compiles what has changed, the files of all instruction sets in one run, and shows how far it is."""

    def get_ext_filename(self, fullname: str) -> str:
        return f"{fullname.replace('.', '/')}.so"  # it is of no Python

    def build_extension(self, ext: Extension) -> None:
        ninja = [sys.executable, "-m", "ninja"] if importlib.util.find_spec("ninja") else ["ninja"]
        if ninja == ["ninja"] and not shutil.which("ninja"):
            raise SystemExit("vidattn: ninja is needed to build the native kernels: pip install ninja")
        build_dir = Path(self.build_temp)
        build_dir.mkdir(parents=True, exist_ok=True)
        file = build_dir / "build.ninja"
        file.write_text(ninja_file(find_cuda(build_dir), Path(self.get_ext_fullpath(ext.name)), build_dir))
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        sys.stdout.flush()
        if subprocess.run([*ninja, "-f", str(file), *jobs]).returncode:
            raise SystemExit(
                "vidattn: building the native kernels failed; VIDATTN_BUILD_CUDA=0 leaves out those of GPUs, "
                "VIDATTN_BUILD_EXT=0 all of them"
            )


def wants_extension() -> bool:
    cuda_wish()
    wanted = os.environ.get("VIDATTN_BUILD_EXT", "")
    if wanted in ("0", "1"):
        return wanted == "1"
    if wanted:
        raise SystemExit(f"VIDATTN_BUILD_EXT: expected 0, 1 or nothing, got {wanted!r}")
    if shutil.which(shlex.split(COMPILER)[-1]):
        return True
    print(f"vidattn: no C++ compiler ({COMPILER}) was found: installing without native kernels", file=sys.stderr)
    return False


class BuildWithNote(build_py):
    """Leaves a note in a copy without extension whether that was wanted (see vidattn/installation.py)."""

    def run(self):
        super().run()
        note = Path(self.build_lib) / "vidattn" / "pure_by_choice.txt"
        if self.editable_mode:
            return
        note.unlink(missing_ok=True)  # of an earlier build
        if os.environ.get("VIDATTN_BUILD_EXT") == "0":
            note.write_text("Installed with VIDATTN_BUILD_EXT=0: the reference runs, and no warning says so.\n")


class TaggedWheel(bdist_wheel):
    """A wheel for every Python, tagged with what its binary asks of Linux: a static CUDA runtime asks for more."""

    def get_tag(self) -> tuple[str, str, str]:
        platform_tag = super().get_tag()[2]
        built = Path(self.bdist_dir, "vidattn", "_C.so")
        return "py3", "none", re.sub("^linux(?=_)", manylinux(built) or "linux", platform_tag)


class SdistWithLink(sdist):
    """Keeps vidattn/kernels the link that it is: setuptools would put the files of kernels/ there a second time."""

    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        super().make_release_tree(base_dir, files)
        link = Path(base_dir, "vidattn", "kernels")
        shutil.rmtree(link)
        link.symlink_to(Path("..", "kernels"))


commands = {"build_ext": BuildWithNinja, "build_py": BuildWithNote, "bdist_wheel": TaggedWheel, "sdist": SdistWithLink}
native = [Extension("vidattn._C", sources(cuda=False))] if wants_extension() else []
setup(cmdclass=commands, ext_modules=native)

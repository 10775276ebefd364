"""Builds vidattn._C, the native kernels; everything else about the package stands in pyproject.toml.

Only the stable ABIs of LibTorch and CPython are used: one binary serves every torch >= 2.11 and every Python >= 3.10.

    VIDATTN_BUILD_EXT   0 = pure Python, 1 = require the extension, unset = build it if there is a C++ compiler
    MAX_JOBS, CXX       as in torch.utils.cpp_extension
"""

import copy
import os
import platform
import shutil
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # 2.11

# A source named *_<suffix>.cpp is compiled with these flags and runs only where the CPU has them (csrc/cpu/isa.cpp).
# They are spelled out rather than -march=...: the same object on every vendor's machine.
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"]
ISA_FLAGS = {"avx2": ["-mavx2", "-mfma", "-mf16c"], "avx512": AVX512, "avx512bf16": [*AVX512, "-mavx512bf16"]}


def sources(*patterns: str) -> list[str]:
    return sorted(str(path) for pattern in patterns for path in Path().glob(pattern))


def extension():
    from torch.utils import cpp_extension

    files = sources("csrc/*.c", "csrc/cpu/*.cpp")
    if platform.machine().lower() not in ("x86_64", "amd64"):
        files = [f for f in files if Path(f).stem.rpartition("_")[2] not in ISA_FLAGS]
    root = Path().resolve()
    flags = [
        "-O3",
        "-g0",
        "-ffp-contract=fast",
        "-fvisibility=hidden",
        "-Wno-uninitialized",  # g++ 12 warns about its own AVX-512 header
        f"-ffile-prefix-map={root}/=",  # error messages name files relative to the project
        TORCH_TARGET,
    ]
    return cpp_extension.CppExtension(
        "vidattn._C",
        files,
        py_limited_api=True,
        include_dirs=[str(root / "csrc")],
        depends=sources("csrc/**/*.h"),
        extra_compile_args={"cxx": flags},
        extra_link_args=["-Wl,--exclude-libs,ALL", "-s"],
    )


def build_command():
    from torch.utils import cpp_extension

    class BuildWithIsa(cpp_extension.BuildExtension):
        """Compiles the files of an instruction set with its flags; torch's command compiles the rest and links."""

        def build_extension(self, ext):
            for isa, isa_flags in ISA_FLAGS.items():
                files = [f for f in ext.sources if Path(f).stem.endswith(f"_{isa}")]
                if not files:
                    continue
                args = copy.deepcopy(ext.extra_compile_args)
                args["cxx"] += isa_flags
                ext.sources = [f for f in ext.sources if f not in files]
                ext.extra_objects += self.compiler.compile(
                    files,
                    output_dir=self.build_temp,
                    include_dirs=ext.include_dirs,
                    extra_postargs=args,
                    depends=ext.depends,
                )
            super().build_extension(ext)

    return BuildWithIsa


def wants_extension() -> bool:
    wanted = os.environ.get("VIDATTN_BUILD_EXT", "")
    if wanted in ("0", "1"):
        return wanted == "1"
    if wanted:
        raise SystemExit(f"VIDATTN_BUILD_EXT: expected 0, 1 or nothing, got {wanted!r}")
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler):
        return True
    print(f"vidattn: no C++ compiler ({compiler}) was found: installing without native kernels", file=sys.stderr)
    return False


class BuildPure(build_py):
    """Leaves a note in a copy without extension whether that was wanted (see vidattn/installation.py)."""

    def run(self):
        super().run()
        note = Path(self.build_lib) / "vidattn" / "pure_by_choice.txt"
        if self.editable_mode:
            return
        note.unlink(missing_ok=True)  # of an earlier build
        if os.environ.get("VIDATTN_BUILD_EXT") == "0":
            note.write_text("Installed with VIDATTN_BUILD_EXT=0: the reference runs, and no warning says so.\n")


def setup_arguments():
    if not wants_extension():
        return {"cmdclass": {"build_py": BuildPure}}
    return {
        "ext_modules": [extension()],
        "cmdclass": {"build_ext": build_command()},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


setup(**setup_arguments())

"""Builds vidattn._C, the native kernels; everything else about the package stands in pyproject.toml.

Only the stable ABIs of LibTorch and CPython are used, so one binary serves every torch >= 2.11 and every Python >= 3.10.

    VIDATTN_BUILD_EXT=0     pure Python: no extension
    MAX_JOBS, CXX           as in torch.utils.cpp_extension
"""

import copy
import os
import platform
from pathlib import Path

from setuptools import setup

TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # 2.11

# A source named *_<suffix>.cpp is compiled with these flags and runs only where the CPU has them (csrc/cpu/isa.cpp). They are spelled out
# rather than -march=...: the same object on every vendor's machine.
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"]
ISA_FLAGS = {"avx2": ["-mavx2", "-mfma", "-mf16c"], "avx512": AVX512, "avx512bf16": [*AVX512, "-mavx512bf16"]}


def sources(*patterns: str) -> list[str]:
    return sorted(str(path) for pattern in patterns for path in Path().glob(pattern))


def extension():
    from torch.utils import cpp_extension

    x86 = platform.machine().lower() in ("x86_64", "amd64")
    files = [f for f in sources("csrc/*.c", "csrc/cpu/*.cpp") if x86 or Path(f).stem.rpartition("_")[2] not in ISA_FLAGS]
    return cpp_extension.CppExtension(
        "vidattn._C",
        files,
        py_limited_api=True,
        include_dirs=[str(Path("csrc").resolve())],
        depends=sources("csrc/**/*.h"),
        # Absolute paths appear in error messages unless mapped to relative ones.
        extra_compile_args={"cxx": ["-O3", TORCH_TARGET, "-fvisibility=hidden", "-g0", "-Wno-uninitialized", f"-ffile-prefix-map={Path().resolve()}/="]},
        extra_link_args=["-Wl,--exclude-libs,ALL"],
    )


def build_command():
    from torch.utils import cpp_extension

    class BuildWithIsa(cpp_extension.BuildExtension):
        """Compiles the files of an instruction set with its flags; torch's command compiles the rest and links."""

        def build_extension(self, ext):
            groups = {isa: [f for f in ext.sources if Path(f).stem.endswith(f"_{isa}")] for isa in ISA_FLAGS}
            for isa, files in groups.items():
                args = copy.deepcopy(ext.extra_compile_args)
                args["cxx"] += ISA_FLAGS[isa]
                ext.sources = [f for f in ext.sources if f not in files]
                if files:
                    ext.extra_objects += self.compiler.compile(
                        files, output_dir=self.build_temp, include_dirs=ext.include_dirs, extra_postargs=args, depends=ext.depends
                    )
            super().build_extension(ext)

    return BuildWithIsa


def setup_arguments():
    if os.environ.get("VIDATTN_BUILD_EXT") == "0":
        return {}
    return {
        "ext_modules": [extension()],
        "cmdclass": {"build_ext": build_command()},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


setup(**setup_arguments())

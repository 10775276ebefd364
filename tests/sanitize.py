"""``make sanitize``: builds the CPU extension with sanitizers and runs tests of its kernels, which have to be clean.

``python -m tests.sanitize address`` (with undefined behaviour and leaks) or ``thread``. Each build has a folder of its
own, ``build/sanitize-address`` and ``build/sanitize-thread``, with a copy of the package. Then the kernels are made to
err, once for each kind of mistake, and have to be caught.

Neither Python nor torch is built with a sanitizer. So parallel loops run on threads of their own there
(``csrc/cpu/sanitized.h``), and a leak counts where one of the two functions that lead to it is the extension's.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COMPILER = os.environ.get("CXX", "c++").split()[-1]
# By kind: the library of the compiler, and the mistakes of make_mistake with what is said of them.
KINDS: dict[str, tuple[str, dict[str, str]]] = {
    "address": (
        "libasan.so",
        {
            "address": "AddressSanitizer: heap-use-after-free",
            "undefined": "runtime error: signed integer overflow",
            "leak": "LeakSanitizer: detected memory leaks",
        },
    ),
    "thread": ("libtsan.so", {"race": "ThreadSanitizer: data race"}),
}
PARITY = [f"tests/test_{name}.py" for name in ("window3d", "window3d_windows", "window3d_options", "divided", "mixing")]
SHORT = "cpu and not (seventy or beyond or every or published or many_windows or compile or transforms)"
# By name: the files, which tests, and more of the environment.
RUNS = {
    "parity": (PARITY, f"{SHORT} and not float64", {}),
    "float64": (PARITY, f"{SHORT} and float64", {}),
    "random calls": (["tests/test_fuzz_calls.py"], "random", {"VIDATTN_FUZZ": "150"}),
    "threads": (["tests/test_processes.py"], "(many_threads or data_loader)", {}),
}
CALL = """
import torch, vidattn
assert "sanitize-" in vidattn.__file__, vidattn.__file__
torch.set_num_threads(4)
for _ in range(3):
    vidattn.window3d_attention(torch.randn(2, 4, 8, 8, 3, 2, 16), window_size=(2, 4, 4), backend="cpu")
"""
# What Python and the libraries that it loads keep until they end. The names are those of their files.
LEAKS = "".join(
    f"leak:{name}\n"
    for name in ("python", "libtorch", "libc10", "numpy", "libcrypto", "ld-linux", "libc.so", "_ctypes")
)


def build(kind: str, folder: Path) -> None:
    """Compile the extension into a copy of the package, for AVX2 where this machine has it."""
    has_avx2 = re.search(r"^flags\b.*\bavx2\b", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    environment = {
        "CXXFLAGS": "-mavx2 -mfma -mf16c" if has_avx2 else "",
        **os.environ,
        "VIDATTN_SANITIZE": kind,
        "VIDATTN_BUILD_CUDA": "0",
        "VIDATTN_BUILD_EXT": "1",
    }
    command = [
        sys.executable,
        "setup.py",
        "-q",
        "build",
        "--build-base",
        str(folder),
        "--build-lib",
        str(folder / "lib"),
    ]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)


def run(kind: str, folder: Path, arguments: list[str], more: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run Python with the sanitizer's library and the built copy of the package."""
    suppressions = folder / "leaks"
    suppressions.write_text(LEAKS)
    libraries = [  # without the second, the first does not find what throws exceptions
        subprocess.run(
            [COMPILER, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in (KINDS[kind][0], "libstdc++.so")
    ]
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(str(Path(library).resolve()) for library in libraries),
        "PYTHONPATH": str(folder / "lib"),
        "ASAN_OPTIONS": "malloc_context_size=2",
        "LSAN_OPTIONS": f"suppressions={suppressions}:print_suppressions=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        # What OpenMP's threads copy within torch looks like a race: of libraries that were not built for this, nothing
        # is watched. The extension is, and what it calls.
        "TSAN_OPTIONS": "ignore_noninstrumented_modules=1",
        "OMP_NUM_THREADS": "4",
        **more,
    }
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder / "lib", env=environment, capture_output=True, text=True, check=False
    )


def test(kind: str, folder: Path, name: str) -> str:
    """Run one selection of tests, and say how it went."""
    files, selection, more = RUNS[name]
    if kind == "thread":  # this sanitizer does not follow a process that forks and then starts threads
        selection += " and not data_loader"
    began = time.monotonic()
    arguments = ["-m", "pytest", "-q", "-x", "-s", "-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml")]
    arguments += ["-o", "pythonpath=tests", "-k", selection, *(str(ROOT / file) for file in files)]
    child = run(kind, folder, arguments, more)
    if child.returncode:
        raise SystemExit(f"{kind}: {name}: status {child.returncode}\n{child.stdout[-5000:]}\n{child.stderr[-10000:]}")
    return f"{kind}: {name}: {child.stdout.splitlines()[-1]}, {time.monotonic() - began:.0f} s"


def main(kind: str) -> None:
    """Build, run all selections, then with a mistake of each kind."""
    folder = ROOT / "build" / f"sanitize-{kind}"
    build(kind, folder)
    clean = run(kind, folder, ["-c", CALL], {})
    if clean.returncode:
        raise SystemExit(f"{kind}: a call without a mistake: status {clean.returncode}\n{clean.stderr[-10000:]}")
    for mistake, said in KINDS[kind][1].items():
        child = run(kind, folder, ["-c", CALL], {"VIDATTN_MISTAKE": mistake})
        if child.returncode == 0 or said not in child.stderr:
            raise SystemExit(f"{kind}: the mistake {mistake} was not seen: {child.returncode}\n{child.stderr[-5000:]}")
        print(f"{kind}: the mistake {mistake} was seen", flush=True)
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", "2"))) as pool:
        for line in pool.map(lambda name: test(kind, folder, name), RUNS):
            print(line, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])

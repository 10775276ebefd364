"""``make package-test``: builds what is published, looks at it, and uses it in environments of its own.

``python -m tests.package_checks [PYTHON:TORCH[:triton] ...]`` makes the sdist and, out of it, the two wheels, in
``build/package``. Then each wheel is installed and used in new environments, without a GPU and in a home that cannot be
written to. Those that are not named are ENVIRONMENTS. One whose Python is not here is left out, and so is a torch with
CUDA, which is gigabytes, unless ``--cuda`` takes it. What pip is told by its configuration and environment counts.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "build" / "package"
INDEX = "https://download.pytorch.org/whl/cpu"
# Each Python and each torch, with triton and without. "newest" is what pip takes by itself; t is a Python without GIL.
ENVIRONMENTS = (
    "3.10:2.11.0",
    "3.11:2.13.0",
    "3.11:2.13.0:triton",
    "3.12:newest",
    "3.13:2.13.0",
    "3.13t:2.11.0",
    "3.14:newest",
    "3.14t:newest:triton",
)
# No other copy of the package is to be in reach.
CLEAN = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}

USE = """
import subprocess, sys
from pathlib import Path
import torch
import vidattn
from vidattn.models import create_model

backend, has_triton = sys.argv[1], "triton" in sys.argv
assert not torch.cuda.is_available()
assert "t" not in sys.abiflags or not sys._is_gil_enabled(), "something has turned the GIL on"
assert Path(vidattn.__file__).is_relative_to(sys.prefix), vidattn.__file__
torch.manual_seed(0)
qkv = torch.randn(2, 1 + 4 * 9, 3, 2, 16)
CALLS = {
    "window3d_attention": ([torch.randn(1, 4, 6, 5, 3, 2, 16), torch.randn(3 * 5 * 5, 2)],
                           {"window_size": (2, 3, 3), "shift_size": (1, 1, 1)}),
    "window_attention": ([torch.randn(4, 12, 3, 2, 16), torch.randn(2, 12, 12)], {}),
    "temporal_attention": ([qkv[:, 1:]], {"num_frames": 4}),
    "spatial_attention": ([qkv], {"num_frames": 4, "cls_token": "mean"}),
    "factorized_dot_product_attention": ([qkv[:, 1:]], {"num_frames": 4}),
    "space_time_mixing_attention": ([torch.randn(8, 10, 3, 2, 16)], {"num_frames": 4}),
    "temporal_shift": ([torch.randn(8, 5, 16)], {"num_frames": 4, "channel_shifts": [(0, 4, 1), (4, 8, -1)]}),
}

def results(name, backend, dtype):
    inputs, options = CALLS[name]
    leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
    out = getattr(vidattn, name)(*leaves, **options, backend=backend)
    out.square().sum().backward()
    return [out.detach(), *(x.grad for x in leaves)]

assert set(CALLS) == set(vidattn.ops.__all__)
for name in CALLS:
    for found, exact in zip(results(name, backend, torch.float32), results(name, "reference", torch.float64)):
        torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-5)
    assert has_triton != ("triton is not installed" in str(vidattn.why_not(name, backend="triton"))), name
    assert vidattn.why_not(name, backend="triton") and vidattn.why_not(name, backend="cuda"), name
    if backend == "reference" and name != "temporal_shift":  # which is plain PyTorch on a CPU anyway
        assert "vidattn/_C.so is not built" in vidattn.why_not(name, backend="cpu")[0]

model = create_model("video_swin_t", embed_dim=16, depths=(2, 2), num_heads=(2, 4), num_classes=5).eval()
video = torch.randn(1, 3, 4, 32, 32)
report = vidattn.accelerate(model, verify=video)
assert report.swapped and not report.skipped and report.max_difference < 1e-5, report

told = subprocess.run([Path(sys.executable).with_name("vidattn"), "info"], capture_output=True, text=True)
assert told.returncode == 0, told.stderr
kernels = next(line.split(None, 2)[2] for line in told.stdout.splitlines() if line.startswith("CPU kernels"))
assert ("none: not wanted" in kernels) == (backend == "reference"), told.stdout
print(f"kernels {kernels}")
"""


class Failed(Exception):
    """A step did not go as it has to; the message says how."""


def run(
    command: Sequence[str | Path], cwd: Path = ROOT, environment: Mapping[str, str] = CLEAN
) -> subprocess.CompletedProcess[str]:
    """Run a command, which must not fail."""
    words = list(map(str, command))
    child = subprocess.run(
        words, cwd=cwd, env=dict(environment), capture_output=True, text=True, errors="replace", check=False
    )
    if child.returncode:
        shown = " ".join(word if len(word) < 200 else "..." for word in words)
        raise Failed(f"{shown}: status {child.returncode}\n{child.stdout[-3000:]}\n{child.stderr[-5000:]}")
    return child


def say(name: str, outcome: str, began: float) -> None:
    """Print one line of what was done."""
    print(f"package-test: {name}: {outcome}, {time.monotonic() - began:.0f} s", flush=True)


def build() -> tuple[Path, Path, Path]:
    """Make the sdist, unpack it, and make the wheels from what was unpacked.

    Returns:
        The unpacked sdist with its extension built in place, the wheel with the extension, and the one without.
    """
    shutil.rmtree(OUT, ignore_errors=True)
    began = time.monotonic()
    module = [sys.executable, "-m", "build", "--no-isolation"]
    run([*module, "--sdist", "--outdir", OUT / "dist"])
    (archive,) = (OUT / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(OUT, filter="data")
    tree = OUT / archive.name.removesuffix(".tar.gz")
    say("sdist", f"{archive.name}, {archive.stat().st_size / 1e6:.1f} MB", began)
    began = time.monotonic()
    run([sys.executable, "setup.py", "build_ext", "--inplace"], tree, CLEAN | {"VIDATTN_BUILD_EXT": "1"})
    say("extension, from the sdist", "built", began)
    wheels = []
    for name, wanted in (("native", "1"), ("pure", "0")):
        began = time.monotonic()
        run([*module, "--wheel", "--outdir", OUT / name, tree], OUT, CLEAN | {"VIDATTN_BUILD_EXT": wanted})
        (wheel,) = (OUT / name).glob("*.whl")
        wheels.append(Path(shutil.move(wheel, OUT / "dist")))
        say(f"{name} wheel", f"{wheel.name}, {wheels[-1].stat().st_size / 1e6:.1f} MB", began)
    began = time.monotonic()
    run([sys.executable, "-m", "twine", "check", "--strict", *(OUT / "dist").iterdir()])
    say("twine check", "passed", began)
    return tree, wheels[0], wheels[1]


def check_tag(wheel: Path) -> None:
    """Ask auditwheel whether the tag of a wheel is what its binary needs, beside the libraries of torch."""
    began = time.monotonic()
    platform_tag = wheel.stem.rpartition("-")[2]
    if not wheel.stem.endswith(f"-py3-none-{platform_tag}") or not platform_tag.startswith("manylinux"):
        raise Failed(f"{wheel.name}: expected a tag py3-none-manylinux...")
    with tempfile.TemporaryDirectory() as folder:
        excluded = [f"--exclude={library}" for library in ("libtorch.so", "libtorch_cpu.so", "libc10.so")]
        command = [sys.executable, "-m", "auditwheel", "repair", "--patcher=none", "--only-plat", *excluded]
        run([*command, "--plat", platform_tag, "--wheel-dir", folder, wheel])
        (repaired,) = Path(folder).iterdir()
        if repaired.name != wheel.name:
            raise Failed(f"{wheel.name}: auditwheel names it {repaired.name}")
    say("auditwheel", f"{platform_tag} is right", began)


def check_tree(tree: Path) -> None:
    """Run tests and collect benchmarks in the unpacked sdist."""
    for name, arguments in (
        ("tests", ["tests/test_packaging.py", "tests/test_window3d.py", "-k", "packaging or padding or strides"]),
        ("benchmarks", ["benchmarks", "--collect-only"]),
    ):
        began = time.monotonic()
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
        child = run(command, tree)
        say(f"{name} of the sdist", child.stdout.splitlines()[-1].strip("= "), began)


def find_python(version: str) -> Path | None:
    """Find an interpreter on the path or among those of pyenv."""
    pyenv = Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser() / "versions"
    found = shutil.which(f"python{version}")
    free_threaded = version.endswith("t")
    number = version.removesuffix("t")
    more = sorted(pyenv.glob(f"{number}.*{'t' * free_threaded}/bin/python{version}"))
    for python in [*([Path(found)] if found else []), *more]:
        asked = [python, "-c", "import sys; print('%d.%d' % sys.version_info[:2] + sys.abiflags)"]
        child = subprocess.run(asked, capture_output=True, text=True, check=False)
        if child.stdout.strip() == version:
            return python
    return None


def check_environment(name: str, wheel: Path, pure: Path, cuda: bool) -> str:
    """Install a wheel into a new environment and use it there, then the pure one.

    Args:
        name: as in ENVIRONMENTS.
        wheel: with the extension.
        pure: without.
        cuda: whether a torch with CUDA will do.

    Returns:
        How it went.
    """
    version, torch, *more = name.split(":")
    python, venv, folder = find_python(version), OUT / "venv", OUT / "empty"
    if python is None:
        return f"LEFT OUT: there is no Python {version} here"
    run([python, "-m", "venv", "--clear", venv])
    # The index of torches without CUDA is passed over where it cannot be reached.
    install = [venv / "bin" / "pip", "--disable-pip-version-check", "install", "--quiet"]
    wanted = ["torch" if torch == "newest" else f"torch=={torch}"]
    wanted += ["--retries=1", f"--extra-index-url={INDEX}"]
    report = json.loads(run([*install, *wanted, "--dry-run", "--report=-"]).stdout)
    found = {item["metadata"]["name"]: item["metadata"]["version"] for item in report["install"]}
    libraries = [package for package in found if package.startswith(("nvidia-", "cuda-"))]
    if libraries and not cuda:
        return f"LEFT OUT: torch {found['torch']} comes with {len(libraries)} packages of CUDA; --cuda takes it"
    run([*install, *wanted, wheel])
    if "triton" in more and "triton" not in found:
        run([*install, "--no-deps", "triton"])
    elif "triton" not in more and "triton" in found:
        run([venv / "bin" / "pip", "uninstall", "--yes", "--quiet", "triton"])
    folder.mkdir(exist_ok=True)
    # Nobody, not even root, can make a file in /proc.
    environment = {"HOME": "/proc", "CUDA_VISIBLE_DEVICES": "", "PATH": os.defpath}
    told = []
    for backend, one in (("cpu", wheel), ("reference", pure)):
        run([*install, "--force-reinstall", "--no-deps", one])
        child = run([venv / "bin" / "python", "-I", "-c", USE, backend, *more], folder, environment)
        told.append(child.stdout.strip())
    return f"torch {found['torch']}, {' and '.join(told)}"


def main() -> None:
    """Take the steps, one line each; end with status 1 at the first that fails."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("environments", nargs="*", default=ENVIRONMENTS, metavar="PYTHON:TORCH[:triton]")
    parser.add_argument("--cuda", action="store_true", help="take a torch with CUDA where there is no other")
    options = parser.parse_args()
    try:
        tree, wheel, pure = build()
        check_tag(wheel)
        check_tree(tree)
        for name in options.environments:
            began = time.monotonic()
            say(name, check_environment(name, wheel, pure, options.cuda), began)
    except Failed as failure:
        raise SystemExit(f"package-test: FAILED: {failure}") from None
    finally:
        shutil.rmtree(OUT / "venv", ignore_errors=True)


if __name__ == "__main__":
    main()

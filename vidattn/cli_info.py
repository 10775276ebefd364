"""The command ``vidattn info``: versions, what is built, which backends can run and why not."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import vidattn.ops
from vidattn.installation import build_command, pure_by_choice
from vidattn.products import product_flops, product_seconds

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_PACKAGES = ("triton", "av", "numpy", "rich", "matplotlib", "safetensors", "transformers")
# What the reasons of the backends say, and the few words for a table.
_SHORT = (
    ("vidattn/_C.so is not built", "not built"),
    ("does not load", "broken"),
    ("built without", "not built"),
    ("built from other sources", "stale build"),
    ("this version has no", "no kernels"),
    ("triton is not installed", "no triton"),
    ("there is no GPU", "no GPU"),
    ("compute capability", "old GPU"),
    ("needs a driver", "old driver"),
    ("needs an NVIDIA GPU", "no NVIDIA"),
)


def run(options: argparse.Namespace, rest: Sequence[str]) -> int:
    """Prints the report, or with ``--json`` all of it for programs and bug reports."""
    found = _collect()
    if options.json:
        print(json.dumps(found, indent=2))
        return 0
    for name, value in _rows(found):
        print(f"{name:<13}{value}")
    print()
    _print_table(found["why_not"])
    if not found["instruction_set"] and not found["pure_by_choice"]:
        print(f"\nThe kernels for the CPU are missing. This builds them:\n  {build_command()}")
    if options.verbose:
        for op, reasons in found["why_not"].items():
            print(f"\n{op}")
            for backend, told in reasons.items():
                print(f"  {backend:<11}{'; '.join(told) or 'available'}")
        print()
        for name, version in found["packages"].items():
            print(f"{name:<13}{version or 'not installed'}")
        for name, value in found["environment"].items():
            print(f"{name}={value}")
    else:
        print("\n--verbose gives the reasons in full, --json everything for a bug report")
    return 0


def _collect() -> dict[str, Any]:
    ops, backends = vidattn.ops.__all__, vidattn.list_backends()
    reasons = {op: {backend: vidattn.why_not(op, backend=backend) for backend in backends} for op in ops}
    built = not any(reasons[op]["cpu"] for op in ops)
    seconds = product_seconds(_DTYPES)
    return {
        "vidattn": vidattn.__version__,
        "path": str(Path(vidattn.__file__).parent),
        "pure_by_choice": pure_by_choice(),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "devices": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "instruction_set": _told(lambda: torch.ops.vidattn._cpu_isa()) if built else None,
        "cuda_kernels": _told(lambda: torch.ops.vidattn._cuda_build()) if built else None,
        "instruction_sets": _told(lambda: torch.ops.vidattn._cpu_isas()).split(",") if built else [],
        "backend": _told(vidattn.current_backend),
        "product_gflops": {_name(dtype): round(product_flops() / seconds[dtype] / 1e9, 1) for dtype in _DTYPES},
        "packages": {name: _version(name) for name in _PACKAGES},
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith("VIDATTN_")},
        "why_not": reasons,
    }


def _rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    kernels = "none: not wanted (VIDATTN_BUILD_EXT=0)" if found["pure_by_choice"] else "none: not built"
    if found["instruction_set"]:
        kernels = f"{found['instruction_set']} (this machine runs {', '.join(found['instruction_sets'])})"
    gflops = found["product_gflops"]
    products = ", ".join(f"{name} {value:.0f}" for name, value in gflops.items())
    # A tenth is what two measurements of one speed may differ by.
    slower = [name for name, value in gflops.items() if 1.1 * value < gflops["float32"]]
    packages = found["packages"]
    return [
        ("vidattn", f"{found['vidattn']}, {found['path']}"),
        ("python", f"{found['python']}, {found['platform']}"),
        ("torch", f"{found['torch']}, {found['threads']} threads, built for CUDA {found['cuda'] or 'none'}"),
        ("GPUs", ", ".join(found["devices"]) or "none"),
        ("CPU kernels", kernels),
        ("CUDA kernels", _cuda_kernels(found["cuda_kernels"])),
        ("CPU products", f"{products} GFLOP/s" + (f"; slow here: {' and '.join(slower)}" if slower else "")),
        ("backend", f"{found['backend']} (VIDATTN_BACKEND, set_backend)"),
        ("packages", ", ".join(f"{name} {packages[name] or 'none'}" for name in ("triton", "av", "rich"))),
    ]


def _cuda_kernels(build: str | None) -> str:
    if build is None:
        return "none: not built"
    return f"built with CUDA {build}" if build[0].isdigit() else f"none: {build}"


def _print_table(why_not: dict[str, dict[str, list[str]]]) -> None:
    backends = vidattn.list_backends()
    tick = "✓" if (sys.stdout.encoding or "").lower().startswith("utf") else "yes"
    width = max(map(len, why_not)) + 2
    print(f"{'op':<{width}}" + "".join(f"{backend:<12}" for backend in backends).rstrip())
    for op, reasons in why_not.items():
        cells = [_shortened(reasons[backend]) if reasons[backend] else tick for backend in backends]
        print(f"{op:<{width}}" + "".join(f"{cell:<12}" for cell in cells).rstrip())


def _shortened(reasons: Sequence[str]) -> str:
    return next((short for fragment, short in _SHORT if fragment in reasons[0]), "no")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _told(question: Callable[[], str]) -> str:
    """Returns the answer, or why there is none: a wrong setting must not keep this report from appearing."""
    try:
        return question()
    except (RuntimeError, ValueError, AttributeError) as error:
        return str(error).splitlines()[0]

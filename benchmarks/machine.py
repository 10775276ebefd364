"""On what results were measured, and nothing about whose machine it is."""

from __future__ import annotations

import os
import platform
from typing import Any

import torch

import vidattn
from benchmarks.cpu_limits import cpu_isa


def details(device: str = "cpu") -> dict[str, Any]:
    """Say what pytest-benchmark does not: threads, instruction set, versions, and the GPU if that is the device."""
    found = {
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_isa": cpu_isa(),
        "torch": torch.__version__,
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "vidattn": vidattn.__version__,
        "platform": f"{platform.system()} {platform.machine()}",
    }
    if torch.device(device).type == "cuda":
        found["device"] = torch.cuda.get_device_name(torch.device(device))
    return found


def clean(machine_info: dict[str, Any]) -> dict[str, Any]:
    """Keep of pytest-benchmark's description of the machine what explains the numbers."""
    processor = machine_info.get("cpu", {}).get("brand_raw") or machine_info.get("processor") or "unknown"
    kept = ("cores", "threads", "cpu_isa", "device", "platform", "python_version", "torch", "torch_isa", "vidattn")
    return {"processor": processor} | {key: machine_info[key] for key in kept if key in machine_info}


def describe(device: str = "cpu") -> dict[str, Any]:
    """Describe this machine as results do."""
    from pytest_benchmark.plugin import pytest_benchmark_generate_machine_info

    return clean(pytest_benchmark_generate_machine_info() | details(device))

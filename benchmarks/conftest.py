"""Measures a whole group of benchmarks in interleaved rounds (see rounds.py) and gives each test its share."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from typing import Any

import pytest
import torch

import vidattn
from benchmarks.memory import peak_extra_bytes
from benchmarks.rounds import (
    BASELINES,
    CLOCK,
    COPY,
    COPY_BYTES,
    GEMM,
    GEMM_FLOPS,
    check_agreement,
    copy,
    gemm,
    interleave,
    summarise,
)
from benchmarks.shapes import DTYPES


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("vidattn")
    group.addoption("--smoke", action="store_true", help="tiny cases in place of the full-size ones")
    group.addoption("--no-peak-memory", action="store_true", help="leave out peak memory, which takes a process a test")


def cpu_isa() -> str:
    """The instruction set that the compiled CPU kernels use."""
    try:
        return torch.ops.vidattn._cpu_isa()
    except (AttributeError, NotImplementedError, RuntimeError):
        return "not built"


def backend_in_use() -> str:
    """The backend that runs our contenders: the one in force, or what "auto" comes to here."""
    name = vidattn.current_backend()
    if name != "auto":
        return name
    return "reference" if vidattn.why_not("window3d_attention", backend="cpu") else "cpu"


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info.pop("node", None)  # a result is made to be shown, and the name of the host is no part of it
    machine_info.update(
        cores=os.cpu_count(),
        threads=torch.get_num_threads(),
        cpu_isa=cpu_isa(),
        torch=torch.__version__,
        vidattn=vidattn.__version__,
        platform=f"{platform.system()} {platform.machine()}",
    )


@pytest.fixture(scope="session")
def measured_groups() -> dict[str, dict[str, list[float]]]:
    """Seconds of each round by group and contender, for all tests of the session."""
    return {}


@pytest.fixture
def contest(
    benchmark: Any, measured_groups: dict[str, dict[str, list[float]]], request: pytest.FixtureRequest
) -> Callable[..., None]:
    """Give the function that runs and reports the ``contender`` of a test among the collected tests of its group."""

    def run(group: str, build: Callable[..., Callable], arguments: dict[str, str], contender: str, flops: int, **info):
        """Report one contender.

        Args:
            group: name of the comparison.
            build: makes the call to time from ``arguments`` and ``contender=``; a module-level function.
            arguments: what all contenders of the group share, ``dtype`` among them.
            contender: the one to report.
            flops: operations of the call.
            info: what else the result should hold.
        """
        config = request.config
        benchmark.group = group
        if group not in measured_groups:
            # Tests that were not selected are not timed either.
            names = [
                item.callspec.params["contender"]
                for item in request.session.items
                if getattr(item, "function", None) is request.function
                and arguments.items() <= item.callspec.params.items()
            ]
            calls = {name: build(contender=name, **arguments) for name in names if name not in BASELINES}
            check_agreement({name: call() for name, call in calls.items()})
            calls |= {GEMM: gemm(DTYPES[arguments["dtype"]]), COPY: copy()}
            for baseline in BASELINES:
                calls[baseline]()
            rounds = config.getoption("benchmark_min_rounds") if benchmark.enabled else 1
            seconds = float(config.getoption("benchmark_max_time")) if benchmark.enabled else 0.0
            measured_groups[group] = interleave(calls, rounds, seconds)
        times = measured_groups[group]
        if contender in BASELINES:
            flops, info = (GEMM_FLOPS, {}) if contender == GEMM else (0, {"bytes": COPY_BYTES})
        elif benchmark.enabled and not config.getoption("no_peak_memory"):
            builder = f"{build.__module__}:{build.__name__}"
            info["peak_extra_bytes"] = peak_extra_bytes(builder, contender=contender, **arguments)
        benchmark.extra_info.update(arguments, contender=contender, flops=flops, **info)
        benchmark.extra_info.update(summarise(times, contender, flops, info.get("bytes", 0)))
        benchmark.extra_info.update(backend=backend_in_use(), cpu_isa=cpu_isa(), threads=torch.get_num_threads())
        CLOCK.replay(benchmark, times[contender])

    return run

"""Measures all contenders of a case in interleaved rounds (see rounds.py) and gives each test its share."""

from __future__ import annotations

import datetime
import os
import platform
import shutil
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from imported_copy import describe, why_refused

import vidattn
from benchmarks import report, selection, summary
from benchmarks.measure import Measured, measure
from benchmarks.rounds import CLOCK, summarise
from benchmarks.shapes import TITLES

ENTRIES = pytest.StashKey[list[dict[str, Any]]]()  # what was measured, in the form of a saved result


def pytest_addoption(parser: pytest.Parser) -> None:
    selection.add_options(parser)


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ENTRIES] = []
    refused = why_refused()
    if refused:
        raise pytest.UsageError(refused)
    selection.check_options(config)


def pytest_report_header(config: pytest.Config) -> str:
    return describe()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Drop functions that have no case in this run."""
    items[:] = [item for item in items if selection.key(item)]


def pytest_report_collectionfinish(config: pytest.Config, items: list[pytest.Item]) -> list[str]:
    """Say what will run and for how long."""
    cases = selection.cases_of(items)
    if not cases:
        return ["no case is left: --full adds all that are not in the default run"]
    terminal = config.pluginmanager.get_plugin("terminalreporter")
    terminal.showfspath = terminal._show_progress_info = False  # Progress tells more
    minutes = sum(selection.expected_seconds(case, names) for (_, case), names in cases.items()) / 60
    more = "" if config.getoption("full") or config.getoption("smoke") else "; --full runs all cases"
    number = f"{len(cases)} case{'s' * (len(cases) > 1)}, {len(items)} timings"
    duration = f"about {minutes:.0f} min" if minutes >= 1 else "less than a minute"
    return [
        f"{number}, {duration} on two cores{more}. "
        "Each output is compared with the float64 reference before it is timed."
    ]


def pytest_report_teststatus(report: pytest.TestReport) -> tuple[str, str, str] | None:
    """Show no dots: progress is told by case."""
    return (report.outcome, "", "") if report.when == "call" and not report.failed else None


def cpu_isa() -> str:
    """The instruction set that the compiled CPU kernels use."""
    try:
        return torch.ops.vidattn._cpu_isa()
    except (AttributeError, NotImplementedError, RuntimeError):
        return "not built"


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
    device = torch.device(config.getoption("device"))
    if device.type == "cuda":
        machine_info["device"] = torch.cuda.get_device_name(device)


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the table made for reading, below that of pytest-benchmark."""
    if config.stash[ENTRIES]:
        machine_info = config.hook.pytest_benchmark_generate_machine_info(config=config)
        config.hook.pytest_benchmark_update_machine_info(config=config, machine_info=machine_info)
        machine = report.clean_machine(machine_info)
        try:
            width = {"width": shutil.get_terminal_size().columns} if terminalreporter.isatty else {}
            table = summary.render(config.stash[ENTRIES], machine, bold=terminalreporter.hasmarkup, **width)
        except ImportError:  # no rich
            today = datetime.date.today().isoformat()
            table = report.tables({"machine": machine, "date": today, "benchmarks": config.stash[ENTRIES]})
        terminalreporter.write_line(f"\n{table}")


class Progress:
    """Tells which case is being measured, what is being done, and how long the rest will take."""

    def __init__(self, session: pytest.Session) -> None:
        self.terminal = session.config.pluginmanager.get_plugin("terminalreporter")
        self.capture = session.config.pluginmanager.get_plugin("capturemanager")
        cases = selection.cases_of(session.items)
        self.expected = [selection.expected_seconds(case, names) for (_, case), names in cases.items()]
        self.started = time.perf_counter()
        self.done = 0

    def write(self, text: str) -> None:
        with self.capture.global_and_fixture_disabled():
            self.terminal.write(text, flush=True)

    def begin(self, case: selection.Key) -> None:
        self.write(f"\n[{self.done + 1}/{len(self.expected)}] {selection.title(case)}:")

    def say(self, what: str) -> None:
        self.write(f" {TITLES.get(what, what)}")

    def end(self) -> None:
        self.done += 1
        passed = time.perf_counter() - self.started
        left = passed * sum(self.expected[self.done :]) / sum(self.expected[: self.done])
        self.write(f" ({passed:.0f} s passed, about {left:.0f} s left)")


@pytest.fixture(scope="session")
def progress(request: pytest.FixtureRequest) -> Progress:
    return Progress(request.session)


@pytest.fixture(scope="session")
def measured_cases() -> dict[str, Measured | Exception]:
    """What was measured in this session, or why it failed, by group."""
    return {}


@pytest.fixture
def contest(
    benchmark: Any, measured_cases: dict[str, Measured | Exception], progress: Progress, request: pytest.FixtureRequest
) -> Callable[..., None]:
    """Give the function that runs and reports the ``contender`` of a test among the collected tests of its case."""

    def run(family: str, build: Callable[..., Callable], parameters: tuple[str, str, str, str], flops: int, **info):
        """Report one contender.

        Args:
            family: of ops, or "models".
            build: makes the call to time from case, direction, dtype, device and ``contender=``; a module-level
                function.
            parameters: case, direction, dtype and contender.
            flops: operations of the call.
            info: what else the result should hold.
        """
        config = request.config
        *case, contender = parameters
        arguments = dict(zip(("case", "direction", "dtype"), case))
        benchmark.group = group = "/".join((family, *case))
        if group not in measured_cases:
            # Contenders that were not selected are not timed either.
            names = selection.cases_of(request.session.items)[request.node.originalname, tuple(case)]
            progress.begin(tuple(case))
            try:
                measured_cases[group] = measure(
                    build,
                    names,
                    arguments | {"device": config.getoption("device")},
                    rounds=config.getoption("benchmark_min_rounds") if benchmark.enabled else 1,
                    seconds=float(config.getoption("benchmark_max_time")) if benchmark.enabled else 0.0,
                    memory=benchmark.enabled and not config.getoption("no_peak_memory"),
                    say=progress.say,
                )
            except Exception as error:
                measured_cases[group] = error
                raise
            finally:
                progress.end()
        measured = measured_cases[group]
        if isinstance(measured, Exception):
            pytest.fail(f"{group} could not be measured: {measured}", pytrace=False)
        if contender in measured.not_run:
            pytest.skip(f"{group}: {contender}: {measured.not_run[contender]}")
        times = measured.times
        benchmark.extra_info.update(arguments, contender=contender, flops=flops, **info)
        benchmark.extra_info.update(summarise(times, contender, flops, info.get("bytes", 0)))
        benchmark.extra_info.update(measured.info[contender], not_run=measured.not_run)
        benchmark.extra_info.update(cpu_isa=cpu_isa(), threads=torch.get_num_threads())
        CLOCK.replay(benchmark, times[contender])
        config.stash[ENTRIES].append(
            {"group": group, "stats": summary.statistics_of(times[contender]), "info": dict(benchmark.extra_info)}
        )

    return run

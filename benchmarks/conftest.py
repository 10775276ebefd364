"""Measures all contenders of a case in interleaved rounds (see rounds.py) and gives each test its share."""

from __future__ import annotations

import datetime
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from imported_copy import describe, why_refused

from benchmarks import machine, report, selection, summary
from benchmarks.cpu_limits import cpu_isa
from benchmarks.measure import Measured, measure
from benchmarks.rounds import CLOCK
from benchmarks.shapes import MODEL_CASES, TITLES, Work
from benchmarks.store import Store

ENTRIES = pytest.StashKey[list[dict[str, Any]]]()  # what was measured, in the form of a saved result
STORE = pytest.StashKey[Store | None]()
RESULTS = Path(__file__).parents[1] / ".benchmarks"
NO_TIME = "there was no time left for it"


def pytest_addoption(parser: pytest.Parser) -> None:
    selection.add_options(parser)


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ENTRIES] = []
    refused = why_refused()
    if refused:
        raise pytest.UsageError(refused)
    selection.check_options(config)
    config.stash[STORE] = None
    if config.getoption("full") and not config.getoption("collectonly"):
        config.option.benchmark_quiet = True  # a table a case is for a short run


def pytest_sessionstart(session: pytest.Session) -> None:
    """Open the file that a full run goes on with."""
    config = session.config
    if config.getoption("full") and not config.getoption("collectonly"):
        kind = "smoke" if config.getoption("smoke") else "full"
        default = RESULTS / f"{kind}-{cpu_isa()}-{torch.get_num_threads()}-threads.json"
        here = machine.describe(config.getoption("device"))
        try:
            config.stash[STORE] = Store(config.getoption("results") or default, here)
        except ValueError as error:
            raise pytest.UsageError(f"--results: {error}") from None


def pytest_report_header(config: pytest.Config) -> str:
    return describe()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Drop functions that have no case in this run, and cases that an earlier one has measured."""
    items[:] = [item for item in items if selection.key(item)]
    store = config.stash[STORE]
    if store is not None:
        done = set(selection.measured_before(items, store))
        config.hook.pytest_deselected(items=list(done))
        items[:] = [item for item in items if item not in done]


def pytest_report_collectionfinish(config: pytest.Config, items: list[pytest.Item]) -> list[str]:
    """Say what will run and for how long."""
    cases = selection.cases_of(items)
    store = config.stash[STORE]
    if not cases:
        return [f"no case is left: all are in {store.path}" if store else "no case is left: --full adds more"]
    terminal = config.pluginmanager.get_plugin("terminalreporter")
    terminal.showfspath = terminal._show_progress_info = False  # Progress tells more
    full = config.getoption("full")
    minutes = sum(selection.expected_seconds(case, names, full) for (_, case), names in cases.items()) / 60
    more = "" if full or config.getoption("smoke") else "; --full runs all cases"
    number = f"{len(cases)} case{'s' * (len(cases) > 1)}, {len(items)} timings"
    duration = f"about {minutes:.0f} min" if minutes >= 1 else "less than a minute"
    lines = [f"results go to {store.path}; what is there already is not measured again"] if store else []
    return [
        *lines,
        f"{number}, {duration} on two cores{more}. "
        "Each output is compared with the float64 reference before it is timed.",
    ]


def pytest_report_teststatus(report: pytest.TestReport) -> tuple[str, str, str] | None:
    """Show no dots: progress is told by case."""
    return (report.outcome, "", "") if report.when == "call" and not report.failed else None


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info.pop("node", None)  # a result is made to be shown, and the name of the host is no part of it
    machine_info.update(machine.details(config.getoption("device")))


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the table made for reading, below that of pytest-benchmark, or where a full run has put its results."""
    store = config.stash[STORE]
    if store is not None:
        skipped = terminalreporter.stats.get("skipped", [])
        left = "; start again for the rest" if any(NO_TIME in str(skip.longrepr) for skip in skipped) else ""
        terminalreporter.write_line(f"\nresults: {store.path}{left}")
        terminalreporter.write_line(f"as tables: python -m benchmarks.report {store.path}")
    elif config.stash[ENTRIES]:
        here = machine.describe(config.getoption("device"))
        try:
            width = {"width": shutil.get_terminal_size().columns} if terminalreporter.isatty else {}
            table = summary.render(config.stash[ENTRIES], here, bold=terminalreporter.hasmarkup, **width)
        except ImportError:  # no rich
            today = datetime.date.today().isoformat()
            table = report.tables({"machine": here, "date": today, "benchmarks": config.stash[ENTRIES]})
        terminalreporter.write_line(f"\n{table}")


class Progress:
    """Tells which case is being measured, what is being done, and how long the rest will take."""

    def __init__(self, session: pytest.Session) -> None:
        self.terminal = session.config.pluginmanager.get_plugin("terminalreporter")
        self.capture = session.config.pluginmanager.get_plugin("capturemanager")
        option = session.config.getoption
        cases = selection.cases_of(session.items)
        self.expected = [selection.expected_seconds(case, names, option("full")) for (_, case), names in cases.items()]
        self.most = 60 * option("minutes") if option("full") else None
        self.started = time.perf_counter()
        self.done = 0

    def write(self, text: str) -> None:
        with self.capture.global_and_fixture_disabled():
            self.terminal.write(text, flush=True)

    def has_time(self) -> bool:
        """Tell whether another case may begin."""
        return self.most is None or time.perf_counter() - self.started < self.most

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
def measured_cases() -> dict[tuple[str, selection.Key], Measured | Exception]:
    """What was measured in this session, or why it failed, by family and case."""
    return {}


def measure_case(
    config: pytest.Config,
    build: Callable[..., Callable],
    names: Sequence[str],
    case: selection.Key,
    say: Callable[[str], None],
    enabled: bool,
    traffic: Callable[[], object] | None,
) -> Measured:
    """Measure the contenders of a case on as many threads as it asks for."""
    rounds = config.getoption("benchmark_min_rounds")
    if config.getoption("full") and case[0] not in MODEL_CASES:
        rounds = max(rounds, selection.FULL_ROUNDS)
    before = torch.get_num_threads()
    torch.set_num_threads(case[3])
    try:
        return measure(
            build,
            names,
            dict(zip(("case", "direction", "dtype"), case)) | {"device": config.getoption("device")},
            rounds=rounds if enabled else 1,
            seconds=float(config.getoption("benchmark_max_time")) if enabled else 0.0,
            memory=enabled and not config.getoption("no_peak_memory"),
            say=say,
            traffic=traffic,
        )
    finally:
        torch.set_num_threads(before)


@pytest.fixture
def contest(
    benchmark: Any,
    measured_cases: dict[tuple[str, selection.Key], Measured | Exception],
    progress: Progress,
    request: pytest.FixtureRequest,
) -> Callable[..., None]:
    """Give the function that runs and reports the ``contender`` of a test among the collected tests of its case."""

    def run(
        family: str,
        build: Callable[..., Callable],
        parameters: tuple[str, str, str, int, str],
        work: Work,
        traffic: Callable[[], Callable[[], object] | None] = lambda: None,
        **info: Any,
    ) -> None:
        """Report one contender.

        Args:
            family: of ops, or "models".
            build: makes the call to time from case, direction, dtype, device and ``contender=``; a module-level
                function.
            parameters: case, direction, dtype, threads and contender.
            work: what the call costs.
            traffic: makes what reads and writes as the call must, if there is such a thing.
            info: what else the result should hold.
        """
        config = request.config
        *key, contender = parameters
        case: selection.Key = tuple(key)  # type: ignore[assignment]
        alone = case[3] < torch.get_num_threads()
        benchmark.group = group = "/".join((family, *case[:3], *(["1 thread"] if alone else [])))
        if (family, case) not in measured_cases:
            if not progress.has_time():
                pytest.skip(NO_TIME)
            # Contenders that were not selected are not timed either.
            names = selection.cases_of(request.session.items)[request.node.originalname, case]
            progress.begin(case)
            try:
                there = traffic() if config.getoption("device") == "cpu" else None
                measured_cases[family, case] = measure_case(
                    config, build, names, case, progress.say, benchmark.enabled, there
                )
            except Exception as error:
                measured_cases[family, case] = error
                raise
            finally:
                progress.end()
            found = measured_cases[family, case].entries(group, case, work, {"cpu_isa": cpu_isa(), **info})
            config.stash[ENTRIES] += found
            if config.stash[STORE] is not None and benchmark.enabled:
                config.stash[STORE].put(case, found)
        measured = measured_cases[family, case]
        if isinstance(measured, Exception):
            pytest.fail(f"{group} could not be measured: {measured}", pytrace=False)
        if contender in measured.not_run:
            pytest.skip(f"{group}: {contender}: {measured.not_run[contender]}")
        (entry,) = (
            entry
            for entry in config.stash[ENTRIES]
            if entry["group"] == group and entry["info"]["contender"] == contender
        )
        benchmark.extra_info.update(entry["info"])
        CLOCK.replay(benchmark, measured.times[contender])

    return run

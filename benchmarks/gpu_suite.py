"""Runs the test suite of the kernels on a GPU, test files in shards; what has been tested once is left out.

The module is a pytest plugin too: it picks the tests of a shard, and notes each result at once.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu_build import ROOT
from benchmarks.gpu_steps import Skip, Task

FILES = (
    "tests/test_window3d.py",
    "tests/test_window3d_windows.py",
    "tests/test_divided.py",
    "tests/test_mixing.py",
    "tests/test_window3d_op.py",
    "tests/test_divided_op.py",
    "tests/test_mixing_op.py",
    "tests/test_window3d_triton.py",
    "tests/test_divided_triton.py",
    "tests/test_mixing_triton.py",
)
GOLDEN = ("tests/test_golden.py",)
SHARD, LINES = "VIDATTN_TEST_SHARD", "VIDATTN_TEST_LINES"  # "index/count" and the file of a test process
# In place of pyproject.toml, whose settings need a newer pytest than may be here.
PYTEST_INI = "[pytest]\nmarkers =\n    slow: longer sweeps\n    needs_triton: runs a Triton kernel\n"
NEEDS = ("pytest", "hypothesis")
OPTIONAL = {"torchvision": "tv_", "safetensors": "test_golden"}  # packages that only tests of these names need
KEPT_FAILURES = 20
SHARD_SECONDS = 3600.0
TEST_SECONDS = 90  # after which a test has ended its process
NORMAL = (0, 1, 5)  # exit statuses of pytest: all passed, some failed, none in this shard


# ---- A test process: these hooks make this module a pytest plugin ----


def pytest_collection_finish(session: Any) -> None:
    """Keep the tests of this shard that have no result: every so-manieth, so that neighbours, alike, spread."""
    if not session.items:
        _write_line({"test": "selection", "outcome": "failed", "message": "no test selected"})
    index, count = map(int, os.environ[SHARD].split("/"))
    known = results([Path(os.environ[LINES])])
    session.items[:] = [item for item in session.items[index::count] if item.nodeid not in known]


def pytest_runtest_logstart(nodeid: str) -> None:
    """Note what is about to run: it may end the process, and does so if it takes too long."""
    _write_line({"test": nodeid, "outcome": "started", "message": ""})
    signal.alarm(TEST_SECONDS)


def pytest_runtest_logfinish() -> None:
    """Call the alarm off."""
    signal.alarm(0)


def pytest_runtest_logreport(report: Any) -> None:
    """Note a result at once: the process may be killed."""
    if report.when == "call" or report.outcome != "passed":
        message = ""
        if report.outcome == "failed":
            crash = getattr(report.longrepr, "reprcrash", None)
            message = str(crash.message if crash else report.longrepr)[:400]
        elif report.outcome == "skipped" and isinstance(report.longrepr, tuple):
            message = str(report.longrepr[2])[:200]
        _write_line({"test": report.nodeid, "outcome": report.outcome, "message": message})


def pytest_collectreport(report: Any) -> None:
    """Note a file that cannot be imported."""
    if report.failed:
        _write_line({"test": report.nodeid, "outcome": "failed", "message": str(report.longrepr)[-400:]})


def _write_line(line: Mapping[str, object]) -> None:
    with open(os.environ[LINES], "a") as file:
        file.write(json.dumps(line) + "\n")


# ---- A task ----


def results(files: Iterable[Path]) -> dict[str, dict[str, str]]:
    """Read what came of each test that has come to an end."""
    return {test: line for test, line in _last_lines(files).items() if line["outcome"] != "started"}


def _last_lines(files: Iterable[Path]) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = {}
    for file in files:
        for text in file.read_text().splitlines() if file.exists() else ():
            with contextlib.suppress(ValueError, KeyError):  # the last line of a killed process
                line = json.loads(text)
                if found.get(line["test"], {}).get("outcome") != "failed":  # a test may fail when it is torn down
                    found[line["test"]] = line
    return found


def tasks(backends: Sequence[str], count: int, folder: Path) -> Iterator[Task]:
    """Give the shards of the tests of all backends, and of the recorded cases by one backend after the other."""

    def task(name: str, index: int, *arguments: Any) -> Task:
        shard = f"{index + 1} of {count}"
        return Task(f"{name} {shard}", f"{__name__}:run", (index, count, folder / name, *arguments), SHARD_SECONDS)

    for index in range(count):
        yield task("tests", index, " or ".join(backends), FILES)
    for backend in backends:
        for index in range(count):
            yield task(f"golden {backend}", index, "accelerated", GOLDEN, backend)


def run(
    index: int, count: int, folder: Path, select: str, files: Sequence[str], backend: str | None = None
) -> dict[str, Any]:
    """Run a shard of the suite; a test that ends its process has failed, and the others go on in a new one.

    Args:
        index: number of the shard.
        count: how many there are.
        folder: of the results, one file a shard.
        select: pytest's -k.
        files: test files.
        backend: the one in force; None for "auto".

    Returns:
        Counts by outcome.
    """
    absent = [name for name in NEEDS if importlib.util.find_spec(name) is None]
    if absent:
        raise Skip(f"not installed: {', '.join(absent)}")
    folder.mkdir(parents=True, exist_ok=True)
    lines, settings = folder / f"{index}-of-{count}.jsonl", folder / f"{index}.ini"
    settings.write_text(PYTEST_INI)
    left_out = [word for name, word in OPTIONAL.items() if importlib.util.find_spec(name) is None]
    words = " and ".join([f"({select})", *(f"not {word}" for word in left_out)])
    command = [sys.executable, "-m", "pytest", "-q", "-c", str(settings), f"--rootdir={ROOT}"]
    command += ["--import-mode=importlib", "-p", "benchmarks.gpu_suite", "-p", "no:cacheprovider", "--tb=short"]
    command += ["-m", "not slow", "-k", words, *files]
    paths = [str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {"PYTHONPATH": os.pathsep.join(paths), SHARD: f"{index}/{count}", LINES: str(lines)}
    environment["VIDATTN_BUILD_EXT"] = "0"  # without the extension, which may need an nvcc, Triton's kernels are tested
    environment |= {} if backend is None else {"VIDATTN_BACKEND": backend}
    while True:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            check=False,
        )
        if done.returncode in NORMAL:
            break
        tail = "\n".join(done.stdout.strip().splitlines()[-8:])
        started = [test for test, line in _last_lines([lines]).items() if line["outcome"] == "started"]
        if not started:
            raise RuntimeError(f"pytest ended with exit status {done.returncode}: {tail}")
        with lines.open("a") as file:
            for test in started:
                message = f"the process ended with exit status {done.returncode}: {tail[-300:]}"
                file.write(json.dumps({"test": test, "outcome": "failed", "message": message}) + "\n")
    found = results([lines])
    failed = {test: line["message"] for test, line in found.items() if line["outcome"] == "failed"}
    if failed:
        shown = [f"{test}: {(message.splitlines() or [''])[0][:160]}" for test, message in failed.items()]
        raise AssertionError(f"{len(failed)} of {len(found)} tests failed; {'; '.join(shown[:KEPT_FAILURES])}")
    return dict(Counter(line["outcome"] for line in found.values()))

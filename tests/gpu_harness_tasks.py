"""Tasks that end in every way that a task can, for the tests of what runs them; without torch they start at once."""

from __future__ import annotations

import contextlib
import functools
import os
import pkgutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from benchmarks.gpu_steps import Results, Run, Skip, Step, Task

_mark = ""


def fine(*given: Any) -> dict[str, Any]:
    return {"given": list(given), "pid": os.getpid(), "mark": _mark}


def fail() -> None:
    raise ValueError("expected nothing,\ngot this")


def say_too_much() -> dict[str, Any]:
    return {"what no file can hold": object()}


def skip() -> None:
    raise Skip("there is none of it")


def crash() -> None:
    print("the last words", flush=True)
    os.abort()


def hang(noted: str = "") -> None:
    """Start a process too, and note both."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    if noted:
        Path(noted).write_text(f"{os.getpid()} {child.pid}")
    time.sleep(60)


def hang_at_first(flag: str) -> dict[str, Any]:
    """Hang where the file is not there yet."""
    if not Path(flag).exists():
        Path(flag).touch()
        time.sleep(60)
    return fine()


def take(seconds: float) -> dict[str, float]:
    start = time.monotonic()
    time.sleep(seconds)
    return {"start": start, "end": time.monotonic()}


def break_gpu() -> dict[str, Any]:
    """Leave a GPU behind on which nothing can be computed."""

    def rand(*_: Any, **__: Any) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    sys.modules["torch"] = SimpleNamespace(cuda=SimpleNamespace(is_initialized=lambda: True), rand=rand)  # type: ignore[assignment]
    return fine()


@contextlib.contextmanager
def marked() -> Iterator[None]:
    global _mark
    _mark = "set up"
    yield


@contextlib.contextmanager
def _mocked_machine(*ailments: tuple[str, str, Callable[[], object]]) -> Iterator[None]:
    """A GPU that is not there, on which some tasks end badly: a function, something that it is given, what ends it."""
    from benchmarks.mocked_machine import mocked_machine  # with it comes torch

    with mocked_machine(), contextlib.ExitStack() as stack:
        for function, given, end in ailments:
            before = pkgutil.resolve_name(function)
            stack.enter_context(mock.patch(function, functools.partial(_ending, before, given, end)))
        yield


def _ending(function: Callable[..., Any], given: str, end: Callable[[], object], *arguments: Any) -> Any:
    if given in str(arguments):
        end()
    return function(*arguments)


COMPILE_KERNELS, COMPILE_RIVAL = "benchmarks.gpu_build.compile_kernels", "benchmarks.gpu_build.compile_rival"
CALIBRATE, MEASURE = "benchmarks.calibration.measure", "benchmarks.gpu_timing.measure"
ailing_machine = functools.partial(
    _mocked_machine,
    (COMPILE_KERNELS, "'smoke_temporal', 'forward'", crash),
    (CALIBRATE, "'exponentials'", hang),
    (MEASURE, "'smoke_temporal', 'forward', 'bfloat16', 'vidattn'", fail),
    (COMPILE_RIVAL, "'smoke_mixing', 'forward', 'bfloat16', 'flex'", crash),
    (MEASURE, "'smoke_mixing', 'forward', 'bfloat16', 'eager'", crash),
)
hanging_machine = functools.partial(_mocked_machine, (MEASURE, "'eager'", hang))


def main(folder: str) -> None:
    """Run one task that ends and one that does not, until somebody ends the process."""
    out = Path(folder)
    tasks = [Task("first", "gpu_harness_tasks:fine"), Task("second", "gpu_harness_tasks:hang", (str(out / "noted"),))]
    Run([Step("only", 60, lambda: tasks)], Results(out / "lines", "code"), 60, 1, out).run()


if __name__ == "__main__":
    main(sys.argv[1])

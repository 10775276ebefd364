"""Runs steps made of small tasks in worker processes, within a time limit, and goes on where the last run stopped.

A task has a limit of its own. One that crashes its worker, hangs in it or leaves the GPU unusable has failed, and a new
worker takes the next. What came of a task is a line of a file, written when the task ends; a task that has its line is
not run again. A step has a share of the time. What it does not use goes to those after it, and what they leave goes to
the steps that are not done, first ones first. So a run ends in time whatever happens, and its next call has less to do.

Nothing here knows of GPUs or attention, and importing it imports no torch.
"""

from __future__ import annotations

import contextlib
import faulthandler
import hashlib
import importlib
import json
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

LOG_LINES = 16  # of a worker's output that are kept when it dies
TRACE_CHARACTERS = 1500
LEAST_SECONDS = 1.0  # below it no task is started

Line = dict[str, Any]


class Skip(Exception):
    """A task cannot run here; the message says why."""


@dataclass(frozen=True)
class Task:
    """One thing to do in a worker.

    Attributes:
        name: what it is called; no two tasks of a step share one.
        function: "module:function"; it may return a dict that JSON can hold.
        arguments: what it is given.
        seconds: limit, the start of a worker included.
    """

    name: str
    function: str
    arguments: tuple[Any, ...] = ()
    seconds: float = 60.0


@dataclass(frozen=True)
class Step:
    """Tasks that belong together.

    Attributes:
        name: what it is called.
        seconds: its share of the time.
        tasks: gives all its tasks, the important ones first. Where one depends on what came of another, and
            ``processes`` is 1, it looks when it is asked for the next.
        processes: tasks at a time; None for as many as the run has.
        results: where its lines are; None for the file of the run.
        renews: whether what it does makes workers old: those after it are started anew.
        ready: tells whether it may start: what it needs has been built, or cannot be.
    """

    name: str
    seconds: float
    tasks: Callable[[], Iterable[Task]]
    processes: int | None = None
    results: Results | None = None
    renews: bool = False
    ready: Callable[[], bool] = lambda: True


def first_line(error: BaseException) -> str:
    """Shorten an exception to its type and the first line of its message."""
    line = next((line for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {line.strip()[:300]}".removesuffix(": ")


def resolve(name: str) -> Any:
    """Import what "module:name" says."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def digest(paths: Iterable[Path], *more: object) -> str:
    """Give a short name to the content of files and some other facts: results are those of one version of the code."""
    found = hashlib.sha256(repr(more).encode())
    for path in sorted(paths):
        found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()[:12]


class Results:
    """The lines of a file, by step and task; of lines for the same task the last one counts.

    Args:
        path: the file; it need not exist.
        code: lines of other code are left in the file, and not seen.
        again: whether to forget what did not pass.
    """

    def __init__(self, path: Path, code: str, again: bool = False) -> None:
        self.path, self.code = path, code
        self._lines: dict[tuple[str, str], Line] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_text() if path.exists() else ""
        if text and not text.endswith("\n"):  # the writer was killed
            with path.open("a") as file:
                file.write("\n")
        for row in text.splitlines():
            with contextlib.suppress(ValueError, KeyError):
                line = json.loads(row)
                if line["code"] == code:
                    self._lines[line["step"], line["task"]] = line
        if again:
            self._lines = {key: line for key, line in self._lines.items() if line["status"] == "passed"}

    def add(self, step: str, task: str, line: Line) -> None:
        """Write a line; it is on disk when this returns."""
        whole = {"code": self.code, "step": step, "task": task, **line}
        self._lines[step, task] = whole
        with self.path.open("a") as file:
            file.write(json.dumps(whole) + "\n")

    def find(self, step: str, task: str) -> Line | None:
        """Give the line of a task; None if there is none."""
        return self._lines.get((step, task))

    def forget(self, step: str, task: str) -> None:
        """Have a task done again."""
        self._lines.pop((step, task), None)

    def steps(self) -> list[str]:
        """Name the steps that have lines."""
        return list(dict.fromkeys(step for step, _ in self._lines))

    def of(self, step: str) -> dict[str, Line]:
        """Give the lines of a step by task."""
        return {task: line for (of, task), line in self._lines.items() if of == step}


# ---- A worker process ----


def _serve(connection: Connection, log: str, setup: str | None) -> None:
    """Do tasks until nobody asks; the entry of a worker."""
    os.setsid()  # so that a worker can be killed with what it has started
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    faulthandler.enable()
    with resolve(setup)() if setup else contextlib.nullcontext():
        while True:
            try:
                task = connection.recv()
            except EOFError:
                return
            connection.send(_do(task))


def _do(task: Task) -> Line:
    start = time.monotonic()
    line: Line = {"status": "passed", "seconds": 0.0}
    try:
        found = resolve(task.function)(*task.arguments)
        json.dumps(found)  # what a line cannot hold fails here
        line |= {"found": found} if found else {}
    except Skip as skip:
        line |= {"status": "skipped", "reason": str(skip)}
    except Exception as error:
        trace = traceback.format_exc()[-TRACE_CHARACTERS:]
        line |= {"status": "failed", "reason": first_line(error), "trace": trace}
    sys.stdout.flush()
    return line | {"seconds": round(time.monotonic() - start, 2), "broken": _gpu_is_broken()}


def _gpu_is_broken() -> bool:
    """Tell whether an error or a failed capture has left the GPU, or torch's generator on it, unusable."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    try:
        torch.rand(8, device="cuda").sum().item()
    except Exception:
        return True
    return False


class _Worker:
    """A process that does one task at a time."""

    def __init__(self, log: Path, setup: str | None) -> None:
        context = multiprocessing.get_context("spawn")
        self.log = log
        self.connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, str(log), setup), daemon=False)
        self._process.start()
        theirs.close()  # so that a dead worker reads as the end of the file

    def death(self) -> str:
        """Say how it ended, with the last lines of what it printed."""
        self._process.join(10)
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        last = [f"the process ended with exit status {self._process.exitcode}", *text.strip().splitlines()[-LOG_LINES:]]
        return "\n".join(filter(None, last))

    def stop(self) -> None:
        """End it and what it has started."""
        self.connection.close()
        try:
            os.killpg(self._process.pid, signal.SIGKILL)  # type: ignore[arg-type]
        except ProcessLookupError:  # it does not lead a group yet, or has ended
            self._process.kill()
        self._process.join()


class Pool:
    """Worker processes, started when they are needed.

    Args:
        logs: folder of what they print.
        setup: "module:function" of a context manager that they work in.
    """

    def __init__(self, logs: Path, setup: str | None = None) -> None:
        logs.mkdir(parents=True, exist_ok=True)
        self._logs, self._setup, self._started = logs, setup, 0
        self._idle: list[_Worker] = []

    def run(self, tasks: Iterator[Task], processes: int, deadline: float, done: Callable[[Task, Line], object]) -> None:
        """Do tasks until there are no more, or the time is over; then those that run are killed and have no line.

        Args:
            tasks: what to do; each is asked for when a worker is free.
            processes: tasks at a time.
            deadline: by ``time.monotonic()``.
            done: is told what came of a task.
        """
        running: dict[Connection, tuple[_Worker, Task, float]] = {}
        more = True
        try:
            while more or running:
                now = time.monotonic()
                while more and len(running) < processes and now + LEAST_SECONDS < deadline:
                    task = next(tasks, None)
                    if task is None:
                        more = False
                        break
                    worker = self._take(task)
                    running[worker.connection] = worker, task, now + task.seconds
                if not running or now >= deadline:
                    return
                until = min(deadline, *(limit for *_, limit in running.values()))
                for connection in wait(list(running), max(0.0, until - now)):
                    worker, task, _ = running.pop(connection)  # type: ignore[call-overload]
                    done(task, self._answer(worker))
                now = time.monotonic()
                for connection, (worker, task, limit) in list(running.items()):
                    if now >= limit:
                        del running[connection]
                        worker.stop()
                        line = {"status": "timed out", "seconds": task.seconds}
                        done(task, line | {"reason": f"no result within {task.seconds:.0f} s"})
        finally:
            for worker, *_ in running.values():
                worker.stop()

    def _take(self, task: Task) -> _Worker:
        while self._idle:
            worker = self._idle.pop()
            with contextlib.suppress(OSError):  # it has died meanwhile
                worker.connection.send(task)
                return worker
            worker.stop()
        self._started += 1
        worker = _Worker(self._logs / f"worker-{self._started}.log", self._setup)
        with contextlib.suppress(OSError):  # it has died at once, which the answer tells
            worker.connection.send(task)
        return worker

    def _answer(self, worker: _Worker) -> Line:
        try:
            line: Line = worker.connection.recv()
        except (EOFError, OSError):
            reason = worker.death()
            worker.stop()
            return {"status": "failed", "seconds": 0.0, "reason": reason}
        if line.pop("broken"):
            worker.stop()
        else:
            self._idle.append(worker)
        return line

    def stop(self) -> None:
        """End all workers."""
        while self._idle:
            self._idle.pop().stop()


# ---- The run ----


class Run:
    """Does steps within a time limit.

    Args:
        steps: in the order of importance.
        results: the file of their lines, but for steps that have one of their own.
        seconds: time limit.
        processes: tasks at a time.
        logs: folder of what workers print.
        setup: "module:function" of a context manager that workers work in.
        after_step: is called when a step has ended or its time is over.
    """

    def __init__(
        self,
        steps: Sequence[Step],
        results: Results,
        seconds: float,
        processes: int,
        logs: Path,
        setup: str | None = None,
        after_step: Callable[[], object] = lambda: None,
    ) -> None:
        self._steps, self._results, self._seconds, self._processes = steps, results, seconds, processes
        self._pool, self._after_step = Pool(logs, setup), after_step

    def run(self) -> None:
        """Give each step its share, then what is left to those that are not done."""
        start = due = time.monotonic()
        deadline = start + self._seconds
        # So that workers do not outlive this process.
        before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        try:
            for step in self._steps:
                due = min(due + step.seconds, deadline)
                self._do(step, due)
            for step in self._steps:
                self._do(step, deadline)
        finally:
            self._pool.stop()
            signal.signal(signal.SIGTERM, before)

    def left(self, step: Step) -> Iterator[Task]:
        """Give the tasks of a step that have no line."""
        results = step.results or self._results
        return (task for task in step.tasks() if results.find(step.name, task.name) is None)

    def status(self, step: Step) -> Counter[str]:
        """Count what came of the tasks of a step; "left" are those that have not come to an end."""
        counts = Counter(line["status"] for line in (step.results or self._results).of(step.name).values())
        left = sum(1 for _ in self.left(step))
        return counts + Counter(left=left)

    def _do(self, step: Step, deadline: float) -> None:
        if time.monotonic() + LEAST_SECONDS >= deadline or not step.ready() or next(self.left(step), None) is None:
            return
        results = step.results or self._results
        start = time.monotonic()

        def done(task: Task, line: Line) -> None:
            results.add(step.name, task.name, line)
            if line["status"] in ("failed", "timed out"):
                say(f"    {step.name}: {task.name}: {line['status']}: {line['reason'].splitlines()[0]}")

        self._pool.run(self.left(step), step.processes or self._processes, deadline, done)
        if step.renews:
            self._pool.stop()
        counts = ", ".join(f"{count} {status}" for status, count in self.status(step).items())
        say(f"{step.name:16} {time.monotonic() - start:6.1f} s  {counts}")
        self._after_step()


def say(text: str) -> None:
    """Print at once: what reads it may be killed."""
    print(text, flush=True)

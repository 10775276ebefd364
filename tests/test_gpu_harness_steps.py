"""What runs the steps on a GPU: every way in which a task can end, time that runs out, and what is on disk then."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gpu_harness_tasks
import pytest

from benchmarks.gpu_steps import Results, Run, Step, Task, digest

MODULE = "gpu_harness_tasks"


def task(function: str, *arguments: Any, name: str = "", seconds: float = 30.0) -> Task:
    return Task(name or function, f"{MODULE}:{function}", arguments, seconds)


def lines_of(path: Path) -> dict[str, dict[str, Any]]:
    """What is on disk, by task."""
    return {line["task"]: line for line in map(json.loads, path.read_text().splitlines())}


def is_alive(pid: int) -> bool:
    """Tell whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Run]:
    def run_steps(*steps: Step, seconds: float = 60.0, processes: int = 1, **more: Any) -> Run:
        made = Run(steps, Results(tmp_path / "lines", "code"), seconds, processes, tmp_path / "logs", **more)
        made.run()
        return made

    return run_steps


def step(*tasks: Task, name: str = "some", seconds: float = 60.0, **more: Any) -> Step:
    return Step(name, seconds, lambda: tasks, **more)


# ---- Ways to end ----


def test_a_task_ends_in_every_way_and_the_others_go_on(run, tmp_path, capsys):
    tasks = [
        task("fine", 1, name="before"),
        task("fail"),
        task("say_too_much"),
        task("skip"),
        task("fine", name="same worker"),
        task("crash"),
        task("hang", str(tmp_path / "noted"), seconds=3.0),
        task("fine", 2, name="after"),
    ]
    run(step(*tasks))
    lines = lines_of(tmp_path / "lines")
    assert {name: line["status"] for name, line in lines.items()} == {
        "before": "passed",
        "fail": "failed",
        "say_too_much": "failed",
        "skip": "skipped",
        "same worker": "passed",
        "crash": "failed",
        "hang": "timed out",
        "after": "passed",
    }
    assert lines["before"]["found"]["given"] == [1] and lines["after"]["found"]["given"] == [2]
    assert lines["before"]["found"]["pid"] == lines["same worker"]["found"]["pid"] != lines["after"]["found"]["pid"]
    assert lines["fail"]["reason"] == "ValueError: expected nothing," and "got this" in lines["fail"]["trace"]
    assert lines["say_too_much"]["reason"].startswith("TypeError")
    assert lines["skip"]["reason"] == "there is none of it"
    assert lines["crash"]["reason"].startswith("the process ended with exit status -6\nthe last words\n")
    assert "in crash" in lines["crash"]["reason"]
    assert lines["hang"]["reason"] == "no result within 3 s"
    worker, child = map(int, (tmp_path / "noted").read_text().split())
    assert not is_alive(worker) and not is_alive(child)
    printed = capsys.readouterr().out
    assert "some: crash: failed: the process ended" in printed
    assert "3 passed, 3 failed, 1 skipped, 1 timed out" in printed


def test_a_worker_that_leaves_the_gpu_unusable_is_replaced_and_its_result_stays(run, tmp_path):
    run(step(task("break_gpu"), task("fine")))
    lines = lines_of(tmp_path / "lines")
    assert lines["break_gpu"]["status"] == lines["fine"]["status"] == "passed"
    assert lines["break_gpu"]["found"]["pid"] != lines["fine"]["found"]["pid"]
    assert "broken" not in lines["break_gpu"]


def test_tasks_run_beside_each_other_where_they_may(run, tmp_path):
    run(step(*(task("take", 2.0, name=str(number)) for number in range(3))), processes=3)
    found = [line["found"] for line in lines_of(tmp_path / "lines").values()]
    assert len(found) == 3 and max(x["start"] for x in found) < min(x["end"] for x in found)
    apart = [task("fine", name=f"alone {number}") for number in range(3)]
    run(step(*apart, name="alone", processes=1), processes=3)
    lines = lines_of(tmp_path / "lines")
    assert len({lines[f"alone {number}"]["found"]["pid"] for number in range(3)}) == 1


def test_workers_are_set_up_and_started_anew_where_a_step_asks_for_it(run, tmp_path):
    first, second, third = (step(task("fine", name=name), name=name, renews=name == "b") for name in "abc")
    run(first, second, third, setup=f"{MODULE}:marked")
    lines = lines_of(tmp_path / "lines")
    pids = [lines[name]["found"]["pid"] for name in "abc"]
    assert pids[0] == pids[1] != pids[2]
    assert all(lines[name]["found"]["mark"] == "set up" for name in "abc")


def test_a_setup_that_fails_fails_the_tasks(run, tmp_path):
    run(step(task("fine")), setup=f"{MODULE}:no_such_thing")
    line = lines_of(tmp_path / "lines")["fine"]
    assert line["status"] == "failed" and "no_such_thing" in line["reason"]


def test_a_task_can_depend_on_what_came_of_the_one_before(run, tmp_path):
    results = Results(tmp_path / "lines", "code")

    def tasks():
        for name in ("fine", "skip"):
            yield task(name)
            if results.find("some", name)["status"] == "passed":
                yield task(name, name=f"{name} again")

    Run([Step("some", 60, tasks, processes=1)], results, 60, 1, tmp_path / "logs").run()
    assert list(lines_of(tmp_path / "lines")) == ["fine", "fine again", "skip"]


# ---- Time ----


def test_a_run_ends_in_time_and_the_next_one_goes_on(run, tmp_path):
    tasks = [task("fine", name="first"), task("hang_at_first", str(tmp_path / "flag")), task("fine", name="last")]
    later = step(task("fine", name="later"), name="later")
    start = time.monotonic()
    made = run(step(*tasks), later, seconds=4.0)
    assert time.monotonic() - start < 9.0
    assert list(lines_of(tmp_path / "lines")) == ["first"]  # what was under way has no line
    assert made.status(step(*tasks))["left"] == 2 and made.status(later)["left"] == 1
    before = lines_of(tmp_path / "lines")["first"]
    made = run(step(*tasks), later)
    lines = lines_of(tmp_path / "lines")
    assert lines["first"] == before and lines["hang_at_first"]["status"] == "passed"
    assert list(lines) == ["first", "hang_at_first", "last", "later"] and not made.status(step(*tasks))["left"]
    text = (tmp_path / "lines").read_text()
    run(step(*tasks), later)
    assert (tmp_path / "lines").read_text() == text  # nothing is done twice


def test_a_step_that_hangs_takes_no_time_of_the_others_and_gets_what_they_leave(run, tmp_path):
    hanging = step(task("hang_at_first", str(tmp_path / "flag")), name="hanging", seconds=3.0)
    others = [step(task("fine", name=name), name=name, seconds=10.0) for name in "ab"]
    run(hanging, *others, seconds=30.0)
    lines = lines_of(tmp_path / "lines")
    assert list(lines) == ["a", "b", "hang_at_first"]
    assert all(line["status"] == "passed" for line in lines.values())


def test_time_that_a_step_does_not_use_goes_to_the_next(run, tmp_path):
    before = step(task("fine"), name="before", seconds=20.0)
    run(before, step(task("take", 2.0), name="after", seconds=0.0), seconds=20.0)
    assert list(lines_of(tmp_path / "lines")) == ["fine", "take"]


def test_a_step_waits_for_what_it_needs(run, tmp_path):
    """It needs a task of the first step, which outlasts its share: then it gets its turn, or it is left."""
    results = Results(tmp_path / "lines", "code")
    first = step(task("hang_at_first", str(tmp_path / "flag")), name="first", seconds=3.0)
    waits = step(task("fine"), name="waits", ready=lambda: results.find("first", "hang_at_first") is not None)
    for seconds, expected in ((4.0, []), (30.0, ["hang_at_first", "fine"])):
        made = Run([first, waits], results, seconds, 1, tmp_path / "logs")
        made.run()
        found = list(lines_of(tmp_path / "lines")) if results.path.exists() else []
        assert found == expected and made.status(waits)["left"] == 1 - len(expected) // 2


def test_without_time_nothing_starts(run, tmp_path):
    run(step(task("fine")), seconds=0.5)
    assert not (tmp_path / "lines").exists()


@pytest.mark.parametrize("kill", [signal.SIGTERM, signal.SIGKILL])
def test_what_was_found_before_the_run_was_killed_is_on_disk(tmp_path, kill):
    root = Path(__file__).parent.parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), str(root / "tests")])}
    runner = subprocess.Popen([sys.executable, gpu_harness_tasks.__file__, str(tmp_path)], env=environment)
    noted = tmp_path / "noted"
    wait_until(lambda: noted.exists() and len(noted.read_text().split()) == 2)
    runner.send_signal(kill)
    runner.wait(20)
    lines = lines_of(tmp_path / "lines")
    assert list(lines) == ["first"] and lines["first"]["status"] == "passed"
    pids = list(map(int, noted.read_text().split()))
    if kill == signal.SIGTERM:
        wait_until(lambda: not any(map(is_alive, pids)))
    for pid in pids:  # nobody can tell the workers of a run that is gone
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


# ---- Lines ----


def _names(results: Results) -> Sequence[str]:
    return list(results.of("some"))


def test_lines_are_of_one_version_of_the_code_and_survive_a_cut(tmp_path):
    path = tmp_path / "folder" / "lines"
    for code, name in (("old", "a"), ("new", "b")):
        Results(path, code).add("some", name, {"status": "passed"})
    assert _names(Results(path, "old")) == ["a"] and _names(Results(path, "new")) == ["b"]
    with path.open("a") as file:
        file.write('{"code": "new", "step": "some", "ta')  # the writer was killed here
    results = Results(path, "new")
    results.add("some", "c", {"status": "failed"})
    assert _names(Results(path, "new")) == ["b", "c"]
    assert _names(Results(path, "new", again=True)) == ["b"]
    results.add("some", "c", {"status": "passed"})  # the last line counts
    assert _names(Results(path, "new", again=True)) == ["b", "c"]
    results.forget("some", "c")
    assert results.find("some", "c") is None and results.find("some", "b") is not None


def test_the_digest_is_of_names_contents_and_facts(tmp_path):
    first, second = tmp_path / "a", tmp_path / "b"
    first.write_text("x")
    second.write_text("y")
    found = digest([first, second], "gpu")
    assert found == digest([second, first], "gpu") and len(found) == 12
    assert found != digest([first, second], "other gpu")
    second.write_text("z")
    assert found != digest([first, second], "gpu")

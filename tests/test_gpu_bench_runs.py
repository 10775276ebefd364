"""Whole runs of `make gpu-bench` without a GPU: every step, and every way in which one ends."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
from gpu_harness_cases import CONFORMANCE, compiler, toolkit

pytest.importorskip("triton", reason="triton is not installed")

import vidattn
from benchmarks import gpu_bench, gpu_test

pytestmark = pytest.mark.skipif(
    bool(vidattn.why_not("window3d_attention", backend="cpu")),
    reason="on a GPU that is not there the CPU's kernels compute, which are not built",
)
MAIN, OTHER = "smoke_temporal", "smoke_mixing"
STEPS = ["build", "calibration", "speed", "build_more", "more"]


class Ran(NamedTuple):
    """What a run left.

    Attributes:
        status: its exit status.
        printed: what it said.
        steps: those that did something, in their order.
        result: the file that is to be sent.
        lines: what is on disk, by step and task.
    """

    status: int
    printed: str
    steps: list[str]
    result: dict[str, Any]
    lines: dict[tuple[str, str], dict[str, Any]]


pytestmark = pytest.mark.slow  # whole runs, of which every step is a process


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Run the program on a main case and another one, on a machine that some function of other tests makes."""
    out = tmp_path / "out"
    monkeypatch.setattr(gpu_bench, "MAIN_CASES", (MAIN,))
    monkeypatch.setenv("CUDA_HOME", str(toolkit(tmp_path / "cuda", nvcc=compiler(CONFORMANCE))))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)

    def run(*arguments: str, machine: str = gpu_test.MOCKED) -> Ran:
        monkeypatch.setattr(gpu_test, "MOCKED", machine)
        with mock.patch.dict(os.environ):  # to which the program adds
            status = gpu_bench.main(
                ["--mocked", "--processes", "2", "--out", str(out), "--case", MAIN, OTHER, *arguments]
            )
        printed = capsys.readouterr().out
        steps = re.findall(r"^(\w+) +[\d.]+ s  ", printed, re.MULTILINE)
        files = (out / "results.jsonl", out / "cache" / "built.jsonl")
        rows = [json.loads(row) for file in files if file.exists() for row in file.read_text().splitlines()]
        lines = {(row["step"], row["task"]): row for row in rows}
        return Ran(status, printed, steps, json.loads((out / "none.json").read_text()), lines)

    return run


def cases(ran: Ran, step: str) -> set[str]:
    """Cases that a step was about."""
    words = (re.split("[ /]", task) for of, task in ran.lines if of == step)
    return {word for split in words for word in split if word.startswith("smoke")}


def test_every_step_does_its_part_once(bench):
    ran = bench()
    assert ran.status == 0 and ran.steps == STEPS, ran.printed
    assert "0 failed; all is done" in ran.printed and ran.result["left"] == {}
    assert {line["status"] for line in ran.lines.values()} <= {"passed", "skipped"}
    for step, expected in {"build": {MAIN}, "speed": {MAIN}, "build_more": {OTHER}, "more": {OTHER}}.items():
        assert cases(ran, step) == expected
    assert ran.lines["build", "conformance"]["status"] == ran.lines["build", "calibration"]["status"] == "passed"
    assert ran.lines["build", f"kernels {MAIN} forward bfloat16"]["found"]["kernels"] > 0
    assert ran.lines["build_more", f"kernels {OTHER} forward_backward bfloat16"]["found"]["kernels"] > 0
    assert ran.result["rates"]["exponentials_per_s"] == 8 * 132 * 8e3 / 2e-3
    assert set(ran.result["speedups"]) == {
        f"{case}/{direction}/bfloat16" for case in (MAIN, OTHER) for direction in gpu_test.DIRECTIONS
    }
    again = bench()
    assert again.status == 0 and not again.steps and again.lines == ran.lines


def test_steps_end_badly_and_the_others_go_on(bench, monkeypatch):
    monkeypatch.setattr(gpu_test, "CALIBRATION_SECONDS", 25.0)  # of which a worker needs some to start
    ran = bench(machine="gpu_harness_tasks:ailing_machine")
    assert ran.status == 1 and ran.steps == STEPS and ran.result["left"] == {}, ran.printed
    bad = {key: line for key, line in ran.lines.items() if line["status"] not in ("passed", "skipped")}
    crashed = "the process ended with exit status -6"
    assert {key: (line["status"], line["reason"].splitlines()[0]) for key, line in bad.items()} == {
        ("build", f"kernels {MAIN} forward bfloat16"): ("failed", crashed),
        ("calibration", "exponentials"): ("timed out", "no result within 25 s"),
        ("speed", f"{MAIN}/forward/bfloat16/vidattn"): ("failed", "ValueError: expected nothing,"),
        ("build_more", f"rival {OTHER} forward bfloat16 flex"): ("failed", crashed),
        ("more", f"{OTHER}/forward/bfloat16/eager"): ("failed", crashed),
    }
    # Rivals may be what they like.
    told = re.findall(r"^FAILED (\w+): ", ran.printed, re.MULTILINE)
    assert sorted(told) == ["build", "calibration", "speed"] and "3 failed; all is done" in ran.printed
    assert "exponentials" in ran.result["checks"]["calibration"]["timed out"]
    assert f"{MAIN}/forward/bfloat16" not in ran.result["speedups"]
    assert set(ran.result["speedups"]) >= {f"{case}/forward_backward/bfloat16" for case in (MAIN, OTHER)}
    same = bench()
    assert same.status == 1 and not same.steps and same.lines == ran.lines
    mended = bench("--again")
    assert mended.status == 0 and mended.steps == STEPS and "0 failed; all is done" in mended.printed, mended.printed
    assert all(mended.lines[key]["status"] == "passed" for key in bad if "flex" not in key[1])
    passed = {key: line for key, line in ran.lines.items() if line["status"] == "passed"}
    assert passed.items() <= mended.lines.items()


def test_a_run_out_of_time_has_not_failed_and_leaves_what_it_found(bench):
    ran = bench("--seconds", "0")
    assert ran.status == 0 and not ran.steps and not ran.lines and list(ran.result["left"]) == STEPS
    start = time.monotonic()
    ran = bench("--step", "more", "--seconds", "20", machine="gpu_harness_tasks:hanging_machine")
    assert time.monotonic() - start < 30
    assert ran.status == 0 and ran.steps == ["more"] and "tasks are left: run it again" in ran.printed, ran.printed
    assert list(ran.result["left"]) == ["more"]
    assert set(ran.lines) <= {("more", f"{OTHER}/forward/bfloat16/{name}") for name in ("vidattn", "triton")}

"""The CUDA kernels on the emulated GPU: the tests of all backends, in processes that VIDATTN_BACKEND=cuda puts there.

By default a selection, which also has windows of 49, 144, 196, 343, 392 and 784 tokens and sequences of up to 198; the
whole of it is marked slow.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

HERE = Path(__file__).parent
PARITY = ["test_window3d.py", "test_window3d_windows.py"]
SOME = (
    "head_dims or window_lengths or padding or mask_values or adversarial or log_sum or strides or clipped or nan"
    " or each_input or pad_qkv or unused or real_windows or fully_masked or masks_repeat or bias_of"
    " or auto or scale or separate"
)
SHORT = "not (seventy or beyond or every or repeatable or published or 256 or 300)"  # what takes less than a second
# By name: files, which tests, and how many must have passed at least.
JOBS = {
    "numbers": (PARITY, f"cuda and ({SOME})", 120),
    "divided": (["test_divided.py"], f"cuda and {SHORT}", 376),
    "mixing": (["test_mixing.py"], f"cuda and {SHORT}", 97),
    "options": (["test_window3d_options.py"], "cuda and not real_windows and not many", 27),
    "golden": (["test_golden.py"], "accelerated", 54),
    "random": (["test_fuzz_calls.py"], "random", 7),
}
SLOW_JOBS = {
    "all_numbers": (PARITY, "cuda", 295),
    "all_divided": (["test_divided.py"], "cuda", 426),
    "all_mixing": (["test_mixing.py"], "cuda", 115),
    "all_options": (["test_window3d_options.py"], "cuda", 34),
    "ops": (["test_window3d_op.py", "test_divided_op.py", "test_mixing_op.py"], "cuda", 70),
    "more_random": (["test_fuzz_calls.py"], "random", 7),
}
# Further variables of a job's environment: other calls than those of "random", the same ones every time.
ENVIRONMENTS = {"more_random": {"VIDATTN_FUZZ": "600", "PYTEST_ADDOPTS": "--hypothesis-seed=1"}}


def _check(job: tuple[list[str], str, int], result: subprocess.CompletedProcess[str]) -> None:
    failed = re.findall(r"^(?:FAILED|ERROR) .*", result.stdout, re.MULTILINE)
    assert result.returncode == 0, "\n".join([*failed, result.stdout[-4000:], result.stderr[-2000:]])
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed is not None and int(passed[1]) >= job[2], result.stdout[-500:]


def _run(name: str) -> subprocess.CompletedProcess[str]:
    files, selection, _ = (JOBS | SLOW_JOBS)[name]
    environment = {**os.environ, "VIDATTN_BACKEND": "cuda", "PYTHONPATH": os.pathsep.join(sys.path)}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}  # the emulated GPU, even beside another
    environment |= ENVIRONMENTS.get(name, {})
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", selection]
    command += [*(["-m", ""] if name in SLOW_JOBS else []), *(str(HERE / file) for file in files)]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, cwd=HERE.parent, timeout=1200, check=False
    )


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest) -> Iterator[dict[str, Future[subprocess.CompletedProcess[str]]]]:
    """What becomes of the jobs that are selected, two of which run at a time."""
    chosen = {item.callspec.params["name"] for item in request.session.items if item.path == request.path}
    with ThreadPoolExecutor(2) as pool:
        yield {name: pool.submit(_run, name) for name in JOBS | SLOW_JOBS if name in chosen}


@pytest.mark.parametrize("name", [*JOBS, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW_JOBS)])
def test_same_numbers(results: dict[str, Future[subprocess.CompletedProcess[str]]], name: str) -> None:
    """Against the float64 reference and against the recorded outputs of the papers' code."""
    _check((JOBS | SLOW_JOBS)[name], results[name].result())

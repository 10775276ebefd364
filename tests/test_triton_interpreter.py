"""The Triton kernels on the CPU: the tests of all backends, in processes where Triton interprets its kernels.

Whether it does is decided when Triton is imported. The interpreter takes a thousand times as long as a compiled kernel,
so this is a selection; the whole of it is marked slow.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

pytest.importorskip("triton", reason="triton is not installed")

HERE = Path(__file__).parent


class Job(NamedTuple):
    """Tests that run in a process of their own."""

    files: list[str]
    selection: str
    least: int  # that must have passed
    share: int = 1  # of each test, every so many-th case runs
    backend: str | None = None  # in force


NUMBERS = (
    "window_lengths and (49 or 98 or 144) or padding or without_bias or mask_values or adversarial or hides"
    " or hidden or offset or log_sum or separate or dropout or nan or masks_repeat or fully_masked or minus_infinity"
    " or head_dims and (5 or 20 or 64)"
)
NUMBERS_OF_16_BITS = "window_lengths and 98 or adversarial or hides or separate or nan or head_dims and 20"
# Of float16, which has a range of its own, where there is bfloat16 too.
FLOAT16 = "not (float16 and not bfloat16 and not (adversarial or saturated or scale))"
OTHERS = (
    "every_short or clipped or shifted_and_cyclic or a_masked_key or table_of or pad_qkv or unused or empty"
    " or dropout_keeps or masks_and_biases or learned_bias or same_as or different_strides"
    " or saturated or bias_of or read_at or guards or planes or auto or inference_mode or saved"
)
PARITY = ["test_window3d.py", "test_window3d_windows.py"]
ALL = [*PARITY, "test_window3d_op.py", "test_window3d_triton.py"]
DIVIDED = ["test_divided.py", "test_divided_triton.py", "test_divided_op.py"]
MIXING = ["test_mixing.py", "test_mixing_triton.py", "test_mixing_op.py"]
SOME_DIVIDED = "not seventy and not (head_dims and not (5 or 20 or 64)) and not compile and not opcheck"
JOBS = {
    "others": Job(ALL, f"triton and not float16 and not float32 and not compile and ({OTHERS})", 36, share=4),
    "float32": Job(ALL, f"triton and float32 and ({NUMBERS})", 20, share=3),
    "bfloat16": Job(
        PARITY, f"triton and bfloat16 and ({NUMBERS_OF_16_BITS} or padding or log_sum or mask_values)", 10, share=2
    ),
    "float16": Job(PARITY, f"triton and float16 and not bfloat16 and ({NUMBERS_OF_16_BITS})", 6, share=2),
    "options": Job(
        ["test_window3d_options.py"],
        "triton and float32 and 1-triton or inf-triton or triton and (many or one_call or who)",
        6,
    ),
    "divided": Job(DIVIDED[:2], f"triton and not float16 and {SOME_DIVIDED}", 80, share=4),
    "divided_16_bits": Job(  # "float16" is in "bfloat16" too
        DIVIDED[::2],
        f"triton and {FLOAT16} and (float16 and {SOME_DIVIDED} or float32 and opcheck and (temporal or mean))",
        32,
        share=4,
    ),
    "mixing": Job(
        MIXING,
        f"triton and {FLOAT16} and not (seventy or compile or opcheck and float16 or adjoint or large or repeatable)",
        80,
        share=3,
    ),
    "mended": Job(["test_interpreted_bfloat16.py"], "", 5),
    "plans": Job(["test_plans.py"], "triton", 14),
    "golden": Job(["test_golden.py"], "accelerated and not model_tiny", 20, backend="triton"),
    "random": Job(["test_fuzz_calls.py"], "random", 7),
}
SLOW_JOBS = {
    "everything": Job(ALL, "triton and not seventy", 200),
    "everything_options": Job(["test_window3d_options.py"], "triton", 40),
    "everything_divided": Job(DIVIDED, "triton and not seventy", 450),
    "everything_mixing": Job(MIXING, "triton and not seventy", 215),
    "everything_golden": Job(["test_golden.py"], "accelerated", 27, backend="triton"),
}


def _run(name: str) -> subprocess.CompletedProcess[str]:
    job = (JOBS | SLOW_JOBS)[name]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    # The products of numpy are small; threads would only take the time of the other process.
    environment |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    if job.backend is not None:
        environment["VIDATTN_BACKEND"] = job.backend
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", job.selection]
    command += [f"--share={job.share}", *(["-m", ""] if name in SLOW_JOBS else [])]
    command += [str(HERE / file) for file in job.files]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, cwd=HERE.parent, timeout=3000, check=False
    )


def _check(name: str, result: subprocess.CompletedProcess[str]) -> None:
    failed = re.findall(r"^(?:FAILED|ERROR) .*", result.stdout, re.MULTILINE)
    assert result.returncode == 0, "\n".join([*failed, result.stdout[-4000:], result.stderr[-2000:]])
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed is not None and int(passed[1]) >= (JOBS | SLOW_JOBS)[name].least, result.stdout[-500:]


@pytest.fixture(scope="module")
def results() -> Iterator[dict[str, Future[subprocess.CompletedProcess[str]]]]:
    """What becomes of the jobs, two of which run at a time."""
    with ThreadPoolExecutor(2) as pool:
        yield {name: pool.submit(_run, name) for name in JOBS}


@pytest.mark.parametrize("name", JOBS)
def test_same_numbers(results: dict[str, Future[subprocess.CompletedProcess[str]]], name: str) -> None:
    """Against the float64 reference and against the recorded outputs of the papers' code."""
    _check(name, results[name].result())


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW_JOBS)
def test_all_numbers(name: str) -> None:
    _check(name, _run(name))


def test_bfloat16_is_refused() -> None:
    """The interpreter multiplies its bits as if they were an integer, and says nothing."""
    code = (
        "import torch, vidattn\n"
        "qkv = torch.ones(1, 2, 2, 2, 3, 1, 16, dtype=torch.bfloat16)\n"
        "vidattn.window3d_attention(qkv, window_size=2, backend='triton')\n"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert "computes bfloat16 products wrongly; it runs float32 and float16" in result.stderr

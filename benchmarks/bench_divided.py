"""Attention over time and over space: forward, and forward with backward, against what else there is on the CPU."""

from __future__ import annotations

import pytest

from benchmarks.cpu_limits import traffic, why_not
from benchmarks.divided_contenders import CASES, build, contenders
from benchmarks.rounds import CLOCK
from benchmarks.selection import parametrize
from benchmarks.shapes import DIVIDED_CASES, DTYPES, SMOKE_DIVIDED_CASES, work_of


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    parametrize(metafunc, DIVIDED_CASES, SMOKE_DIVIDED_CASES, contenders)


@pytest.mark.benchmark(timer=CLOCK)
def bench_divided_attention(contest, case: str, direction: str, dtype: str, threads: int, contender: str) -> None:
    shape = CASES[case]
    contest(
        "divided",
        build,
        (case, direction, dtype, threads, contender),
        work_of(shape, direction, DTYPES[dtype]),
        lambda: traffic(shape, direction, DTYPES[dtype]) if why_not() is None else None,
        num_frames=shape.num_frames,
        num_sites=shape.num_sites,
        token_order=shape.token_order,
        heads=shape.heads,
        head_dim=shape.head_dim,
        batch=shape.batch,
    )

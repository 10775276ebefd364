"""Window attention: forward, and forward with backward, against what else there is on the CPU."""

from __future__ import annotations

import pytest

from benchmarks.rounds import CLOCK
from benchmarks.selection import parametrize
from benchmarks.shapes import DTYPES, SMOKE_CASES, WINDOW_CASES, work_of
from benchmarks.window3d_contenders import CASES, build, contenders


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    parametrize(metafunc, WINDOW_CASES, SMOKE_CASES, contenders)


@pytest.mark.benchmark(timer=CLOCK)
def bench_window3d_attention(contest, case: str, direction: str, dtype: str, threads: int, contender: str) -> None:
    shape = CASES[case]
    contest(
        "window3d",
        build,
        (case, direction, dtype, threads, contender),
        work_of(shape, direction, DTYPES[dtype]),
        grid=shape.grid,
        window=shape.window,
        shift=shape.shift,
        heads=shape.heads,
        head_dim=shape.head_dim,
        batch=shape.batch,
    )

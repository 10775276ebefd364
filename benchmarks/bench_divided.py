"""Attention over time and over space: forward, and forward with backward, against what else there is on the CPU."""

from __future__ import annotations

import pytest

from benchmarks.divided_contenders import CASES, CONTENDERS, build
from benchmarks.rounds import CLOCK
from benchmarks.selection import parametrize
from benchmarks.shapes import DIVIDED_CASES, DTYPES, SMOKE_DIVIDED_CASES


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    parametrize(metafunc, DIVIDED_CASES, SMOKE_DIVIDED_CASES, lambda direction, dtype: CONTENDERS)


@pytest.mark.benchmark(timer=CLOCK)
def bench_divided_attention(contest, case: str, direction: str, dtype: str, contender: str) -> None:
    shape = CASES[case]
    contest(
        "divided",
        build,
        (case, direction, dtype, contender),
        shape.flops(direction),
        bytes=shape.bytes_moved(direction, DTYPES[dtype]),
        num_frames=shape.num_frames,
        num_sites=shape.num_sites,
        token_order=shape.token_order,
        heads=shape.heads,
        head_dim=shape.head_dim,
        batch=shape.batch,
    )

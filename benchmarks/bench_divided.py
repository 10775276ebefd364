"""Attention over time and over space: forward, and forward with backward, against what else there is on the CPU."""

from __future__ import annotations

import pytest

from benchmarks.divided_contenders import CASES, CONTENDERS, build
from benchmarks.rounds import BASELINES, CLOCK
from benchmarks.shapes import DIRECTIONS, DIVIDED_CASES, DTYPES, SMOKE_DIVIDED_CASES


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    cases = SMOKE_DIVIDED_CASES if metafunc.config.getoption("smoke") else DIVIDED_CASES
    metafunc.parametrize(
        ("case", "direction", "dtype", "contender"),
        [
            (case, direction, dtype, contender)
            for case in cases
            for direction in DIRECTIONS
            for dtype in DTYPES
            for contender in (*CONTENDERS, *BASELINES)
        ],
    )


@pytest.mark.benchmark(timer=CLOCK)
def bench_divided_attention(contest, case: str, direction: str, dtype: str, contender: str) -> None:
    shape = CASES[case]
    contest(
        f"divided/{case}/{direction}/{dtype}",
        build,
        {"case": case, "direction": direction, "dtype": dtype},
        contender,
        shape.flops(direction),
        bytes=shape.bytes_moved(direction, DTYPES[dtype]),
        num_frames=shape.num_frames,
        num_sites=shape.num_sites,
        token_order=shape.token_order,
        heads=shape.heads,
        head_dim=shape.head_dim,
        batch=shape.batch,
    )

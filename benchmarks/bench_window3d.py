"""Window attention: forward, and forward with backward, against what else there is on the CPU."""

from __future__ import annotations

import pytest

from benchmarks.rounds import BASELINES, CLOCK
from benchmarks.shapes import DIRECTIONS, DTYPES, SMOKE_CASES, WINDOW_CASES
from benchmarks.window3d_contenders import build, contenders


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    cases = SMOKE_CASES if metafunc.config.getoption("smoke") else WINDOW_CASES
    metafunc.parametrize(
        ("case", "direction", "dtype", "contender"),
        [
            (case, direction, dtype, contender)
            for case in cases
            for direction in DIRECTIONS
            for dtype in DTYPES
            for contender in (*contenders(direction, dtype), *BASELINES)
        ],
    )


@pytest.mark.benchmark(timer=CLOCK)
def bench_window3d_attention(contest, case: str, direction: str, dtype: str, contender: str) -> None:
    shape = (WINDOW_CASES | SMOKE_CASES)[case]
    contest(
        f"window3d/{case}/{direction}/{dtype}",
        build,
        {"case": case, "direction": direction, "dtype": dtype},
        contender,
        shape.flops(direction),
        bytes=shape.bytes_moved(direction, DTYPES["float32" if contender == "vidattn_float32" else dtype]),
        grid=shape.grid,
        window=shape.window,
        shift=shape.shift,
        heads=shape.heads,
        head_dim=shape.head_dim,
        batch=shape.batch,
    )

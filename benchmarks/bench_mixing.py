"""Space-time mixing attention, and temporal shift alone, against what else there is on the CPU."""

from __future__ import annotations

import pytest

from benchmarks.mixing_contenders import CASES, CONTENDERS, SHIFT_CONTENDERS, build, build_shift
from benchmarks.rounds import BASELINES, CLOCK
from benchmarks.shapes import DIRECTIONS, DTYPES, MIXING_CASES, SMOKE_MIXING_CASES


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    cases = SMOKE_MIXING_CASES if metafunc.config.getoption("smoke") else MIXING_CASES
    shifts = "direction" not in metafunc.fixturenames
    names = ("case", "dtype", "contender") if shifts else ("case", "direction", "dtype", "contender")
    metafunc.parametrize(
        names,
        [
            (case, dtype, contender) if shifts else (case, direction, dtype, contender)
            for case in cases
            for direction in (DIRECTIONS if not shifts else ("forward",))
            for dtype in DTYPES
            for contender in (*(SHIFT_CONTENDERS if shifts else CONTENDERS), *BASELINES)
        ],
    )


@pytest.mark.benchmark(timer=CLOCK)
def bench_mixing_attention(contest, case: str, direction: str, dtype: str, contender: str) -> None:
    shape = CASES[case]
    contest(
        f"mixing/{case}/{direction}/{dtype}",
        build,
        {"case": case, "direction": direction, "dtype": dtype},
        contender,
        shape.flops(direction),
        bytes=shape.bytes_moved(direction, DTYPES[dtype]),
        num_frames=shape.num_frames,
        num_tokens=shape.num_tokens,
        shift_div=shape.shift_div,
        heads=shape.heads,
        head_dim=shape.head_dim,
        clips=shape.clips,
    )


@pytest.mark.benchmark(timer=CLOCK)
def bench_temporal_shift(contest, case: str, dtype: str, contender: str) -> None:
    shape = CASES[case]
    contest(
        f"shift/{case}/{dtype}",
        build_shift,
        {"case": case, "dtype": dtype},
        contender,
        0,
        bytes=shape.bytes_moved("forward", DTYPES[dtype]) // 2,  # tokens in, tokens out
        direction="shift",
        num_frames=shape.num_frames,
        num_tokens=shape.num_tokens,
        channels=shape.channels,
    )

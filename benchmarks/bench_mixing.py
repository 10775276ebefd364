"""Space-time mixing attention, and temporal shift alone, against what else there is on the CPU."""

from __future__ import annotations

import pytest

from benchmarks.mixing_contenders import CASES, CONTENDERS, SHIFT_CONTENDERS, build, build_shift
from benchmarks.rounds import CLOCK
from benchmarks.selection import parametrize
from benchmarks.shapes import DIRECTIONS, DTYPES, MIXING_CASES, SMOKE_MIXING_CASES


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.function is bench_temporal_shift:
        names, directions = SHIFT_CONTENDERS, ("shift",)
    else:
        names, directions = CONTENDERS, DIRECTIONS
    parametrize(metafunc, MIXING_CASES, SMOKE_MIXING_CASES, lambda direction, dtype: names, directions)


@pytest.mark.benchmark(timer=CLOCK)
def bench_mixing_attention(contest, case: str, direction: str, dtype: str, contender: str) -> None:
    shape = CASES[case]
    contest(
        "mixing",
        build,
        (case, direction, dtype, contender),
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
def bench_temporal_shift(contest, case: str, direction: str, dtype: str, contender: str) -> None:
    shape = CASES[case]
    contest(
        "shift",
        build_shift,
        (case, direction, dtype, contender),
        0,
        bytes=shape.bytes_moved("forward", DTYPES[dtype]) // 2,  # tokens in, tokens out
        num_frames=shape.num_frames,
        num_tokens=shape.num_tokens,
        channels=shape.channels,
    )

"""Space-time mixing attention, and temporal shift alone, against what else there is on the CPU."""

from __future__ import annotations

import pytest

from benchmarks.mixing_contenders import CASES, SHIFT_CONTENDERS, build, build_shift, contenders
from benchmarks.rounds import CLOCK
from benchmarks.selection import parametrize
from benchmarks.shapes import DTYPES, MIXING_CASES, SMOKE_MIXING_CASES, Work, work_of


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.function is bench_temporal_shift:
        names = SHIFT_CONTENDERS
        parametrize(metafunc, MIXING_CASES, SMOKE_MIXING_CASES, lambda direction, dtype: names, ("shift",))
    else:
        parametrize(metafunc, MIXING_CASES, SMOKE_MIXING_CASES, contenders)


@pytest.mark.benchmark(timer=CLOCK)
def bench_mixing_attention(contest, case: str, direction: str, dtype: str, threads: int, contender: str) -> None:
    shape = CASES[case]
    contest(
        "mixing",
        build,
        (case, direction, dtype, threads, contender),
        work_of(shape, direction, DTYPES[dtype]),
        num_frames=shape.num_frames,
        num_tokens=shape.num_tokens,
        shift_div=shape.shift_div,
        heads=shape.heads,
        head_dim=shape.head_dim,
        clips=shape.clips,
    )


@pytest.mark.benchmark(timer=CLOCK)
def bench_temporal_shift(contest, case: str, direction: str, dtype: str, threads: int, contender: str) -> None:
    shape = CASES[case]
    contest(
        "shift",
        build_shift,
        (case, direction, dtype, threads, contender),
        Work(0, shape.bytes_moved("forward", DTYPES[dtype]) // 2),  # tokens in, tokens out
        num_frames=shape.num_frames,
        num_tokens=shape.num_tokens,
        channels=shape.channels,
    )

"""Results of benchmarks that nobody measured: right in form, with times that follow a rule."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import Any

from benchmarks import growth, rounds, shapes
from benchmarks.measure import Measured
from benchmarks.shapes import Work

MACHINE = {
    "processor": "Made up (R) CPU",
    "cores": 2,
    "threads": 2,
    "cpu_isa": "avx512",
    "python_version": "3.11",
    "torch": "2.13.0",
    "vidattn": "0.1.0",
}
# How long a round of each takes, as a multiple of ours.
TIMES = {"vidattn": 1.0, "eager": 6.0, "sdpa": 2.0, "compiled": 3.0}
# Two thousandths of noise, the same for all contenders of a round and different between them.
NOISE = (1.0, 1.001, 0.999, 1.002, 0.998)
BASELINES = {rounds.GEMM: 0.1, rounds.COPY: 0.005, rounds.FMA: 0.008, rounds.EXP: 0.01}


def entries(
    family: str,
    key: tuple[str, str, str, int],
    work: Work,
    slow: float = 1.0,
    count: int = 15,
    times: dict[str, float] = TIMES,
    not_run: dict[str, str] | None = None,
) -> list[dict[str, Any]]:
    """Make the entries of a case of which ours takes twice its limit, or ``slow`` times that."""
    limit = rounds.limit({name: [seconds] for name, seconds in BASELINES.items()}, work)[0]
    measured = Measured(not_run=not_run or {})
    for place, (name, factor) in enumerate(times.items()):
        seconds = 2 * limit * factor * (slow if name == "vidattn" else 1.0)
        measured.times[name] = [seconds * NOISE[(place + index) % len(NOISE)] for index in range(count)]
        measured.info[name] = {"error": 1e-7, "peak_extra_bytes": int(1e6 * factor)}
    measured.times |= {name: [seconds] * count for name, seconds in BASELINES.items()}
    return measured.entries("/".join((family, *key[:3])), key, work, {"cpu_isa": "avx512"})


def result(
    slow: float = 1.0, threads: int = 2, count: int = 15, names: Collection[str] | None = None
) -> dict[str, Any]:
    """Make a result of the cases of ops in float32: of all, unless some are named."""
    found = []
    tables = {"window3d": shapes.WINDOW_CASES, "divided": shapes.DIVIDED_CASES, "mixing": shapes.MIXING_CASES}
    for family, table in tables.items():
        for name, case in table.items():
            for direction in shapes.DIRECTIONS if names is None or name in names else ():
                work = shapes.work_of(case, direction, shapes.DTYPES["float32"])  # type: ignore[arg-type]
                found += entries(family, (name, direction, "float32", threads), work, slow, count)
    return {"machine": {**MACHINE, "threads": threads}, "date": "2026-01-31", "benchmarks": found}


FEW = ("swin_t_stage1", "temporal_8_frames", "xvit_b_div8")
few = partial(result, names=FEW)


def growth_result() -> dict[str, Any]:
    """Make a result of growth: eager runs out of memory at the largest sizes."""
    found = []
    for key, case in growth.points(growth.series(2), 2).items():
        times, not_run = TIMES, {}
        if growth.score_bytes(case, shapes.DTYPES["float32"]) > 2**28:
            times = {name: factor for name, factor in TIMES.items() if name != "eager"}
            not_run = {"eager": "out of memory: more than 4 GiB"}
        work = shapes.work_of(case, key[1], shapes.DTYPES["float32"])
        found += entries(f"growth/{key[0]}", key, work, times=times, not_run=not_run)
    return {"machine": MACHINE, "date": "2026-01-31", "benchmarks": found}

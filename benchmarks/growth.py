"""How time and peak memory grow with one size at a time: ``python -m benchmarks.growth --save FILE``.

Ours and every rival on the same axes, in the same interleaved rounds; memory first, each in a process of its own that
may add no more than ``--memory`` GiB: who asks for more is out of memory there, and is not timed. Sizes that are on
several axes are measured once. A second start with the same file goes on where the first one stopped.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import divided_contenders, machine, window3d_contenders
from benchmarks.calls import COMPILED, EXACT
from benchmarks.measure import Measured, measure
from benchmarks.memory import peak_extra_bytes
from benchmarks.shapes import DIRECTIONS, DTYPES, DividedCase, WindowCase, work_of
from benchmarks.store import Key, Store

CONTENDERS = ("eager", "sdpa", "compiled", "vidattn")
DTYPE = "float32"
MEMORY_GIB = 4.0
ROUNDS, SECONDS = 5, 0.5
EXACT_FLOPS = 5e9  # up to here the float64 reference is the judge, beyond it the numbers of ours
FLOPS_PER_SECOND, CALLS, SECONDS_POINT = 1e11, 60, 12.0  # for the expected time
Case = WindowCase | DividedCase


class Series(NamedTuple):
    """One size that grows.

    Attributes:
        op: what is called.
        axis: the size.
        unit: what its numbers count.
        cases: the call at each.
        threads: on how many threads, if that is what grows; all, if empty.
    """

    op: str
    axis: str
    unit: str
    cases: Mapping[int, Case]
    threads: tuple[int, ...] = ()


def series(most_threads: int) -> list[Series]:
    """Give all series: windows of Swin-T's first stage, shifted, and TimeSformer's attention, smaller."""
    window = WindowCase((8, 28, 28), (8, 7, 7), (4, 3, 3), 3)
    time_, space = DividedCase("temporal", 16, 196), DividedCase("spatial", 2, 196, "thw")
    threads = tuple(1 << power for power in range(8) if 1 << power <= most_threads)
    found = [
        Series("windows", "frames", "deep", {n: replace(window, grid=(n, 28, 28)) for n in (8, 16, 32, 64, 128)}),
        Series("windows", "resolution", "wide", {n: replace(window, grid=(8, n, n)) for n in (14, 28, 56, 112, 168)}),
        Series(
            "windows",
            "window",
            "tokens",
            {
                depth * 49: replace(window, grid=(16, 28, 28), window=(depth, 7, 7), shift=(depth // 2, 3, 3))
                for depth in (1, 2, 4, 8, 16)
            },
        ),
        Series("time", "frames", "frames", {n: replace(time_, num_frames=n) for n in (8, 16, 32, 64, 128, 256)}),
        Series("time", "resolution", "wide", {n: replace(time_, num_sites=n * n) for n in (7, 14, 28, 56)}),
        Series("space", "frames", "frames", {n: replace(space, num_frames=n) for n in (2, 8, 32, 64)}),
        Series("space", "resolution", "wide", {n: replace(space, num_sites=n * n) for n in (7, 14, 28, 56)}),
    ]
    for op, case in (("windows", window), ("time", time_), ("space", space)):
        found += [
            Series(op, "batch", "clips", {n: replace(case, batch=n) for n in (1, 2, 4, 8)}),
            Series(op, "head_dim", "channels", {n: replace(case, head_dim=n) for n in (16, 32, 64, 128)}),
            Series(op, "threads", "threads", dict.fromkeys(threads, case), threads),
        ]
    return found


def name_of(case: Case) -> str:
    """Name a case after what it is: equal ones have one name."""
    sizes = case.qkv_shape
    if isinstance(case, WindowCase):
        parts: tuple[object, ...] = ("windows", *sizes, "of", *case.window, "by", *case.shift)
    else:
        parts = (case.kind, case.num_frames, case.token_order, *sizes)
    return "_".join(map(str, parts))


def points(of: Sequence[Series], threads: int, directions: Sequence[str] = DIRECTIONS) -> dict[Key, Case]:
    """Give what is measured for some series, each once, on so many threads where these do not grow."""
    return {
        (name_of(case), direction, DTYPE, size if growing.threads else threads): case
        for growing in of
        for size, case in growing.cases.items()
        for direction in directions
    }


def build(
    case: str, direction: str, dtype: str, contender: str, device: str = "cpu"
) -> Callable[[], tuple[Tensor, ...]]:
    """Make inputs and the one call to time, of a case named as by ``name_of``."""
    (shape, *_) = (size for growing in series(1) for size in growing.cases.values() if name_of(size) == case)
    family = window3d_contenders if isinstance(shape, WindowCase) else divided_contenders
    return family.build_copies(shape, direction, dtype, contender, device)[0]  # type: ignore[no-any-return,attr-defined]


def result_bytes(case: Case, direction: str, dtype: torch.dtype) -> int:
    """Count what a call returns: the context, and in training the gradient of qkv."""
    tensors = 1 if direction == "forward" else 4
    return tensors * math.prod(case.qkv_shape) // 3 * dtype.itemsize


def score_bytes(case: Case, dtype: torch.dtype) -> int:
    """Count the scores of all heads, which rivals hold."""
    return case.scores * dtype.itemsize


def exponent(values: Mapping[float, float]) -> float | None:
    """Fit y = a x^b to positive numbers by least squares of the logarithms.

    Args:
        values: y by x.

    Returns:
        b; None for fewer than two numbers.
    """
    if len(values) < 2:
        return None
    xs, ys = [math.log(x) for x in values], [math.log(y) for y in values.values()]
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    above = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True))
    return above / sum((x - mean_x) ** 2 for x in xs)


def measure_point(key: Key, case: Case, most: int, say: Callable[[str], None]) -> Measured:
    """Measure the contenders of a case: peak memory, then time of those that have enough.

    Args:
        key: its name, direction, dtype and threads.
        case: the case.
        most: bytes that a call may add.
        say: is told what is being done.
    """
    name, direction, dtype, threads = key
    arguments = {"case": name, "direction": direction, "dtype": dtype, "device": "cpu"}
    peaks: dict[str, int | None] = {}
    too_much: dict[str, str] = {}
    say("memory")
    for contender in CONTENDERS:
        try:
            peaks[contender] = peak_extra_bytes(
                "benchmarks.growth:build", threads=threads, most=most, contender=contender, **arguments
            )
        except MemoryError:
            too_much[contender] = f"out of memory: more than {most / 2**30:.3g} GiB"
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        judge = EXACT if case.flops(direction) <= EXACT_FLOPS else "vidattn"
        measured = measure(
            build, list(peaks), arguments, rounds=ROUNDS, seconds=SECONDS, memory=False, say=say, judge=judge
        )
    finally:
        torch.set_num_threads(before)
    for contender in measured.info:
        measured.info[contender]["peak_extra_bytes"] = peaks[contender]
    measured.not_run |= too_much
    return measured


def expected_seconds(key: Key, case: Case) -> float:
    """Estimate how long a point takes, on two cores."""
    compiling = 20.0 * sum(contender in COMPILED for contender in CONTENDERS)
    return SECONDS_POINT + compiling + CALLS * case.flops(key[1]) / FLOPS_PER_SECOND


def run(store: Store, left: Mapping[Key, Case], most: int, minutes: float, say: Callable[[str], None]) -> bool:
    """Measure points into a store until they or the minutes are over.

    Args:
        store: where results go.
        left: what is to be measured.
        most: bytes that a call may add.
        minutes: begin no point after so many.
        say: is told what is being done.

    Returns:
        Whether all were measured.
    """
    expected = [expected_seconds(key, case) for key, case in left.items()]
    started = time.perf_counter()
    for done, (key, case) in enumerate(left.items()):
        passed = time.perf_counter() - started
        if passed > 60 * minutes:
            return False
        rest = sum(expected[done:]) * (passed / sum(expected[:done]) if done else 1.0)
        say(f"\n[{done + 1}/{len(left)}] {' '.join(map(str, key))} (about {rest / 60:.0f} min left):")
        measured = measure_point(key, case, most, lambda what: say(f" {what}"))
        info: dict[str, Any] = {"most_bytes": most}
        store.put(key, measured.entries(f"growth/{key[0]}", key, work_of(case, key[1], DTYPES[DTYPE]), info))
    return True


def main(arguments: list[str] | None = None) -> None:
    """Measure all that a file has not got yet."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.growth", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--save", type=Path, required=True, metavar="FILE", help="results; what is there is kept")
    parser.add_argument("--memory", type=float, default=MEMORY_GIB, metavar="GIB", help="what a call may add at most")
    parser.add_argument("--minutes", type=float, default=120.0, help="begin nothing after so many")
    parser.add_argument("--only", metavar="OP/AXIS", help="one series: windows/frames, say")
    parser.add_argument("--direction", action="append", choices=DIRECTIONS, help="one of both")
    options = parser.parse_args(arguments)
    threads = torch.get_num_threads()
    chosen = [growing for growing in series(threads) if options.only in (None, f"{growing.op}/{growing.axis}")]
    if not chosen:
        names = ", ".join(f"{growing.op}/{growing.axis}" for growing in series(threads))
        parser.error(f"--only: expected one of {names}, got {options.only}")
    try:
        store = Store(options.save, machine.describe())
    except ValueError as error:
        parser.error(f"--save: {error}")
    wanted = points(chosen, threads, options.direction or DIRECTIONS)
    left = {key: case for key, case in wanted.items() if not set(CONTENDERS) <= store.contenders(key)}
    print(f"{len(left)} of {len(wanted)} points to measure", end="", flush=True)
    finished = run(
        store, left, int(options.memory * 2**30), options.minutes, lambda what: print(what, end="", flush=True)
    )
    print(f"\nresults: {options.save}{'' if finished else '; start again for the rest'}")


if __name__ == "__main__":
    main()

"""Timing in interleaved rounds, and handing the result to pytest-benchmark.

pytest-benchmark times one callable to its end and then the next, but the speed of a shared machine moves by tens of per
cent within minutes, so a ratio of two such timings says little. Here all contenders of a group are called in turn, in a
new order every round, and ratios are taken within rounds. The measured rounds are then replayed to pytest-benchmark on
a clock of their own, so that its table, statistics, JSON and comparisons work as ever.
"""

from __future__ import annotations

import functools
import gc
import math
import random
import statistics
import time
import timeit
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from benchmarks.cpu_limits import EXPONENTIALS, FMA_FLOPS
from benchmarks.shapes import Work

# What the machine has to offer right now, measured in the same rounds: a matrix product, reading plus writing memory,
# and on a CPU multiply-adds on registers, exponentials, and what a call loads and stores (see cpu_limits.py).
GEMM, COPY, FMA, EXP, TRAFFIC = "gemm", "copy", "fma", "exp", "traffic"
BASELINES = (GEMM, COPY, FMA, EXP, TRAFFIC)
# After so many rounds, rivals that take at least so many times as long as ours are left out, if that saves time.
LEAVES = {1: 20.0, 5: 4.0}
WORTH_SECONDS = 0.1
GEMM_SIZE = 2048
GEMM_TRIAL_SIZE, GEMM_TIMES_FLOAT32 = 512, 5.0
GEMM_FLOPS = 2 * GEMM_SIZE**3
COPY_BYTES = 2 * 2**27  # 128 MiB in, as much out: several times a cache


class ReplayClock:
    """A clock for pytest-benchmark that shows the instants of rounds measured before."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def replay(self, benchmark, times: Sequence[float]) -> None:
        """Feed measured seconds, one a round, to the ``benchmark`` fixture of a test that has this clock as timer."""
        upcoming = iter(times)

        def tick() -> None:
            self.now = next(upcoming)

        def reset() -> None:
            self.now = 0.0

        benchmark.pedantic(tick, setup=reset, rounds=len(times), iterations=1)


CLOCK = ReplayClock()


def gemm(dtype: torch.dtype, device: str = "cpu") -> Callable[[], Tensor]:
    """A square matrix product of the given dtype."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(GEMM_SIZE, GEMM_SIZE, generator=generator).to(device, dtype) for _ in range(2))
    return lambda: left @ right


@functools.cache
def has_fast_gemm(dtype: torch.dtype) -> bool:
    """Say whether this processor's matrix product is a yardstick; a plain loop stands in for what it does not know."""

    def seconds(of: torch.dtype) -> float:
        left, right = (torch.ones(GEMM_TRIAL_SIZE, GEMM_TRIAL_SIZE, dtype=of) for _ in range(2))
        return min(timeit.repeat(lambda: left @ right, repeat=4, number=1))

    return dtype.itemsize > 2 or seconds(dtype) < GEMM_TIMES_FLOAT32 * seconds(torch.float32)


def copy(device: str = "cpu") -> Callable[[], Tensor]:
    """A copy between two buffers that exist."""
    source, target = (torch.ones(COPY_BYTES // 8, device=device) for _ in range(2))
    return lambda: target.copy_(source)


def largest_error(result: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Give the largest difference of tensors, as a share of each expected tensor's maximum; NaN if there is one."""
    worst = 0.0
    for ours, theirs in zip(result, expected, strict=True):
        exact = theirs.double()
        difference = (ours.double() - exact).abs().max().item()
        error = difference / exact.abs().max().item() if difference else 0.0
        worst = error if math.isnan(error) else max(worst, error)
    return worst


def allowed_error(dtype: torch.dtype, exact: torch.dtype = torch.float64) -> float:
    """Say what share of the maximum a contender may be off. The tests judge exactness; this finds blunders.

    Args:
        dtype: of the contender.
        exact: of the run that it is compared with. One in float32 rounds too: gradients of SwinUNETR, whose norms are
            over few values in places, move by up to 9e-4 when its attention is rounded another way.
    """
    if dtype != torch.float32:
        return 0.1
    return 1e-4 if exact == torch.float64 else 1e-3


def check_agreement(results: Mapping[str, Sequence[Tensor]]) -> None:
    """Refuse to time contenders that do not compute the same thing.

    Args:
        results: what each contender returned.

    Raises:
        AssertionError: one differs from the first by more than ``allowed_error``, or by NaN.
    """
    (first, expected), *others = results.items()
    for name, result in others:
        for ours, theirs in zip(result, expected, strict=True):
            allowed = max(allowed_error(ours.dtype), allowed_error(theirs.dtype))
            error = largest_error([ours], [theirs])
            if not error <= allowed:
                raise AssertionError(
                    f"{name} and {first} differ by {error:.3g} of the maximum, more than {allowed:.3g}"
                )


def interleave(
    contenders: Mapping[str, Callable[[], object]],
    min_rounds: int,
    seconds: float,
    wait: Callable[[], object] = lambda: None,
    ours: str | None = None,
    before: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Time contenders in turn.

    Args:
        contenders: what to call, by name; already warm.
        min_rounds: rounds at the least.
        seconds: after ``min_rounds``, rounds go on until this much time has passed since the start.
        wait: waits for the end of what a call has started.
        ours: a contender; rivals that are much slower leave after some rounds, as ``LEAVES`` says.
        before: runs before each call, untimed.

    Returns:
        Seconds by name; element ``i`` of every list belongs to round ``i``.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    order, shuffle = list(contenders), random.Random(0).shuffle
    deadline = time.perf_counter() + seconds
    done = 0
    collecting = gc.isenabled()
    gc.disable()
    try:
        while done < min_rounds or time.perf_counter() < deadline:
            shuffle(order)  # nobody always finds the caches as the same neighbour left them
            for name in order:
                before()
                wait()
                start = time.perf_counter()
                result = contenders[name]()
                wait()
                times[name].append(time.perf_counter() - start)
                del result  # freeing is not timed
            done += 1
            if done in LEAVES and ours in times:
                longest = max(WORTH_SECONDS, LEAVES[done] * statistics.median(times[ours]))
                order = [name for name in order if name in BASELINES or statistics.median(times[name]) < longest]
    finally:
        if collecting:
            gc.enable()
    return times


def statistics_of(times: Sequence[float]) -> dict[str, float]:
    """Sum up the seconds of all rounds."""
    quarters = statistics.quantiles(times, n=4) if len(times) > 1 else [times[0]] * 3
    return {
        "min": min(times),
        "median": statistics.median(times),
        "iqr": quarters[2] - quarters[0],
        "rounds": len(times),
    }


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Give an interval that holds the true median with 95 per cent, whatever the distribution (by order statistics).

    Args:
        values: of all rounds; of fewer than 6, the interval is all of them.
    """
    ordered, count = sorted(values), len(values)
    outside, rank = 0.0, 0  # how likely no more than `rank` values are below the median
    while rank < count // 2:
        outside += math.comb(count, rank) / 2**count
        if outside > 0.025:
            break
        rank += 1
    first = max(rank - 1, 0)
    return ordered[first], ordered[count - 1 - first]


def _shares(best: float, by_round: Sequence[float]) -> dict[str, float]:
    low, high = interval(by_round)
    return {"min": best, "median": statistics.median(by_round), "low": low, "high": high}


def ratio(times: Mapping[str, Sequence[float]], slower: str, faster: str) -> dict[str, float]:
    """Say how many times as fast ``faster`` is.

    Returns:
        ``min`` by the best rounds of both, ``median`` over the rounds that both have, ``low`` and ``high`` of the
        interval that this median is known to be in.
    """
    rounds = zip(times[slower], times[faster])
    return _shares(min(times[slower]) / min(times[faster]), [first / second for first, second in rounds])


def limit(times: Mapping[str, Sequence[float]], work: Work) -> list[float]:
    """Give the seconds below which no call can be, round by round.

    Products and exponentials take the same ports, so their times add up; bytes move meanwhile. Scores that a mask
    separates need neither.

    Args:
        times: seconds by name; FMA, EXP and COPY are among them.
        work: what the call costs.
    """
    flops = work.flops * work.visible / FMA_FLOPS
    exponentials, moved = work.exponentials / EXPONENTIALS, work.bytes / COPY_BYTES
    rounds = zip(times[FMA], times[EXP], times[COPY], strict=True)
    return [max(flops * fma + exponentials * exp, moved * copied) for fma, exp, copied in rounds]


def summarise(times: Mapping[str, Sequence[float]], name: str, work: Work) -> dict[str, object]:
    """Relate one contender to the machine's rates and to all others of the same rounds.

    Args:
        times: seconds by name, those of the baselines included.
        name: the contender.
        work: what the call costs.

    Returns:
        ``gflops`` (best round); ``share_of_copy`` (of its rate), where they were measured ``share_of_gemm``,
        ``share_of_limit`` and ``share_of_traffic``, and ``speedup_over`` (each other contender), all of which have the
        keys of ``ratio``; ``limit_seconds`` (median), what is the larger part of it, ``limited_by``, and the rates
        that make it.
    """

    def share(baseline: str, factor: float) -> dict[str, float]:
        return {key: value * factor for key, value in ratio(times, baseline, name).items()}

    found: dict[str, object] = {}
    if GEMM in times:
        found["gemm_gflops"] = GEMM_FLOPS / min(times[GEMM]) * 1e-9
        found["share_of_gemm"] = share(GEMM, work.flops / GEMM_FLOPS)
    if work.bytes:
        found["share_of_copy"] = share(COPY, work.bytes / COPY_BYTES)
    if TRAFFIC in times:
        found["share_of_traffic"] = ratio(times, TRAFFIC, name)
    if FMA in times:
        limits = limit(times, work)
        best = limit({baseline: [min(times[baseline])] for baseline in (FMA, EXP, COPY)}, work)[0]
        by_round = [least / taken for least, taken in zip(limits, times[name])]
        found["share_of_limit"] = _shares(best / min(times[name]), by_round)
        found["fma_gflops"] = FMA_FLOPS / min(times[FMA]) * 1e-9
        found["exponentials_per_second"] = EXPONENTIALS / min(times[EXP])
        found["limit_seconds"] = statistics.median(limits)
        only_bytes = statistics.median(limit(times, Work(0, work.bytes)))
        found["limited_by"] = "bytes" if only_bytes >= statistics.median(limits) else "arithmetic"
    return {
        "gflops": work.flops / min(times[name]) * 1e-9,
        "copy_gigabytes_per_second": COPY_BYTES / min(times[COPY]) * 1e-9,
        **found,
        "speedup_over": {other: ratio(times, other, name) for other in times if other not in (name, *BASELINES)},
    }

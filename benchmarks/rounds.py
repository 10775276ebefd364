"""Timing in interleaved rounds, and handing the result to pytest-benchmark.

pytest-benchmark times one callable to its end and then the next, but the speed of a shared machine moves by tens of per
cent within minutes, so a ratio of two such timings says little. Here all contenders of a group are called in turn, in a
new order every round, and ratios are taken within rounds. The measured rounds are then replayed to pytest-benchmark on
a clock of their own, so that its table, statistics, JSON and comparisons work as ever.
"""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

# What the machine has to offer right now, measured in the same rounds: arithmetic, and reading plus writing memory.
GEMM, COPY = "gemm", "copy"
BASELINES = (GEMM, COPY)
GEMM_SIZE = 2048
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
) -> dict[str, list[float]]:
    """Time contenders in turn.

    Args:
        contenders: what to call, by name; already warm.
        min_rounds: rounds at the least.
        seconds: after ``min_rounds``, rounds go on until this much time has passed since the start.
        wait: waits for the end of what a call has started.

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
                wait()
                start = time.perf_counter()
                result = contenders[name]()
                wait()
                times[name].append(time.perf_counter() - start)
                del result  # freeing is not timed
            done += 1
    finally:
        if collecting:
            gc.enable()
    return times


def ratio(times: Mapping[str, Sequence[float]], slower: str, faster: str) -> dict[str, float]:
    """Say how many times as fast ``faster`` is: by the best rounds of both, and as the median over the rounds."""
    rounds = zip(times[slower], times[faster], strict=True)
    return {
        "min": min(times[slower]) / min(times[faster]),
        "median": statistics.median(first / second for first, second in rounds),
    }


def summarise(times: Mapping[str, Sequence[float]], name: str, flops: int, moved: int) -> dict[str, object]:
    """Relate one contender to the machine's rates and to all others of the same rounds.

    Args:
        times: seconds by name, those of the baselines included.
        name: the contender.
        flops: its operations.
        moved: bytes that it reads and writes at least; 0 where nobody has counted.

    Returns:
        ``gflops`` (best round), ``share_of_gemm`` and ``share_of_copy`` (of their rates) and ``speedup_over`` (each
        other contender), the last three with the keys ``min`` (best rounds) and ``median`` (over rounds).
    """

    def share(baseline: str, factor: float) -> dict[str, float]:
        return {key: value * factor for key, value in ratio(times, baseline, name).items()}

    shares = {"share_of_gemm": share(GEMM, flops / GEMM_FLOPS)}
    if moved:
        shares["share_of_copy"] = share(COPY, moved / COPY_BYTES)
    return {
        "gflops": flops / min(times[name]) * 1e-9,
        "gemm_gflops": GEMM_FLOPS / min(times[GEMM]) * 1e-9,
        "copy_gigabytes_per_second": COPY_BYTES / min(times[COPY]) * 1e-9,
        **shares,
        "speedup_over": {other: ratio(times, other, name) for other in times if other not in (name, *BASELINES)},
    }

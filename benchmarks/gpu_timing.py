"""Times contenders on a GPU, in a worker process.

Times are medians over replays of a CUDA graph that holds several calls, each with inputs of its own, so that nothing is
found in the L2 cache that a model would not find there. What cannot be captured is timed by events, and the result says
why. ``launched_us`` is what a call takes without a graph, its launches included.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from benchmarks import divided_contenders, mixing_contenders, window3d_contenders
from benchmarks.calls import GPU_COMPILED as COMPILED
from benchmarks.gpu_steps import Skip, first_line
from benchmarks.measure import backends_taken
from benchmarks.rounds import check_agreement
from benchmarks.shapes import (
    GPU_DIVIDED_CASES,
    GPU_MIXING_CASES,
    GPU_WINDOW_CASES,
    SMOKE_CASES,
    SMOKE_DIVIDED_CASES,
    SMOKE_MIXING_CASES,
    DividedCase,
    MixingCase,
    WindowCase,
)
from benchmarks.window3d_contenders import computes_the_same

Case = WindowCase | DividedCase | MixingCase
OURS, BASELINE = ("vidattn", "triton"), "eager"
GPU_CASES: dict[str, Case] = {**GPU_WINDOW_CASES, **GPU_DIVIDED_CASES, **GPU_MIXING_CASES}
# What tries this without a GPU.
SMALL_CASES: dict[str, Case] = {
    "smoke": replace(SMOKE_CASES["smoke"], head_dim=32),
    **SMOKE_DIVIDED_CASES,
    "smoke_mixing": SMOKE_MIXING_CASES["smoke"],
}
CASES = GPU_CASES | SMALL_CASES
ROTATED_BYTES = 160e6  # inputs and outputs between two uses of the same ones: more than twice the largest L2 cache
REPLAYS = 20
GRAPH_SECONDS = 0.01  # calls that a graph holds beyond the copies must not take longer

Call = Callable[[], tuple[Tensor, ...]]
Sample = Callable[[int], list[float]]  # takes a number of samples, gives seconds per call


def _family(shape: Case) -> ModuleType:
    if isinstance(shape, WindowCase):
        return window3d_contenders
    return divided_contenders if isinstance(shape, DividedCase) else mixing_contenders


def contenders(case: str) -> tuple[str, ...]:
    """Name the contenders of a case."""
    return _family(CASES[case]).GPU_CONTENDERS  # type: ignore[no-any-return]


def why_not(case: str, direction: str, dtype: str, contender: str) -> str | None:
    """Say why a contender is left out of a comparison; None if it takes part."""
    shape = CASES[case]
    return _family(shape).why_not(shape, direction, dtype, contender)  # type: ignore[no-any-return]


def build_copies(case: str, direction: str, dtype: str, contender: str, device: str, copies: int = 1) -> list[Call]:
    """Make inputs and the calls to time, as the family's contenders are built."""
    shape = CASES[case]
    if contender in COMPILED:
        torch.compiler.reset()  # every case counts as the first
    return _family(shape).build_copies(shape, direction, dtype, contender, device, copies)  # type: ignore[no-any-return]


def call_triton(case: str, direction: str, dtype: str) -> None:
    """Make a call on the CPU by the backend "triton", for its kernels alone."""
    build_copies(case, direction, dtype, "triton", "cpu")[0]()


def count_copies(shape: Case, direction: str, dtype: str) -> int:
    """Say how many inputs to cycle through: two, or as many as it takes to push the first out of the L2 cache."""
    moved = shape.bytes_moved(direction, getattr(torch, dtype))
    return max(2, math.ceil(ROTATED_BYTES / moved))


def _between_events(enqueue: Callable[[], object], calls: int, count: int) -> list[float]:
    """Enqueue work repeatedly with events in between; the first interval, before which the GPU was idle, is dropped."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 2)]
    events[0].record()
    for event in events[1:]:
        enqueue()
        event.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) * 1e-3 / calls for a, b in itertools.pairwise(events)][1:]


def sample_by_graph(calls: Sequence[Call]) -> Sample:
    """Capture the calls, which have run before, in a CUDA graph."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [call() for call in calls]

    def sample(count: int) -> list[float]:
        assert results  # kept while the graph lives, so that each call writes to memory of its own
        return _between_events(graph.replay, len(calls), count)

    return sample


def sample_by_events(calls: Sequence[Call]) -> Sample:
    """Launch the calls one by one; short ones take as long as their launches."""

    def enqueue() -> None:
        for call in calls:
            call()

    return lambda count: _between_events(enqueue, len(calls), count)


class Measurer:
    """Prepares contenders and samples them; keeps those of the current group, for their second turn."""

    def __init__(self) -> None:
        self._group: tuple[str, ...] = ()
        self._samples: dict[str, Sample] = {}
        self._expected: tuple[Tensor, ...] | str = ()

    def measure(self, case: str, direction: str, dtype: str, contender: str, device: str) -> dict[str, Any]:
        """Time a contender; the first time for a case, direction and dtype, everything of those before is freed.

        Returns:
            ``us``, the median; the first time also what ``_prepare`` says.
        """
        reason = why_not(case, direction, dtype, contender)
        if reason is not None:
            raise Skip(reason)
        found: dict[str, Any] = {}
        if (case, direction, dtype) != self._group:
            self._samples.clear()
            self._expected, self._group = (), (case, direction, dtype)
            gc.collect()
            torch.cuda.empty_cache()
        if contender not in self._samples:
            found = self._prepare(contender, device)
        return found | {"us": statistics.median(self._samples[contender](REPLAYS)) * 1e6}

    def _prepare(self, contender: str, device: str) -> dict[str, Any]:
        start = time.perf_counter()
        case, direction, dtype = self._group
        copies = count_copies(CASES[case], direction, dtype)
        calls = build_copies(case, direction, dtype, contender, device, copies)
        found: dict[str, Any] = {}
        if contender in OURS:
            found["backends"] = sorted(backends_taken(calls[0]))
            if not found["backends"] or "reference" in found["backends"]:
                raise RuntimeError(f"expected kernels of ours, got {', '.join(found['backends']) or 'none'}")
        result = calls[0]()
        found |= self._compare(contender, device, result)
        del result
        stream = torch.cuda.Stream()  # what is captured must have run on another stream than the default one
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for call in calls:
                call()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        found["peak_extra_bytes"] = _peak_extra_bytes(calls[0])
        launched = sample_by_events(calls)
        estimate = statistics.median(launched(4))
        found["launched_us"] = estimate * 1e6
        # Short graphs are dominated by their own launch.
        rounds = max(1, min(math.ceil(8 / copies), int(GRAPH_SECONDS / (estimate * copies))))
        try:
            self._samples[contender] = sample_by_graph([*calls] * rounds)
            found["timer"] = "graph"
        except Exception as error:
            self._samples[contender] = launched
            found |= {"timer": "events", "not_captured": first_line(error)}
        return found | {"copies": copies, "prepared_s": time.perf_counter() - start}

    def _compare(self, contender: str, device: str, result: tuple[Tensor, ...]) -> dict[str, Any]:
        """Say whether a result is that of the module code; a wrong one is timed all the same, and marked."""
        if not computes_the_same(contender):
            return {"agrees": "computes something else"}
        if self._expected == ():
            try:
                self._expected = (
                    result if contender == BASELINE else build_copies(*self._group, BASELINE, device)[0]()  # type: ignore[call-arg]
                )
            except Exception as error:
                self._expected = f"not checked: {first_line(error)}"
        if isinstance(self._expected, str):
            return {"agrees": self._expected}
        try:
            check_agreement({BASELINE: self._expected, contender: result})
        except Exception as error:
            return {"agrees": first_line(error)}
        return {"agrees": True}


def _peak_extra_bytes(call: Call) -> int:
    """What a call adds to the allocated memory at its peak, its result included."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before


_measurer = Measurer()


def measure(case: str, direction: str, dtype: str, contender: str, device: str) -> dict[str, Any]:
    """Time a contender; a task. Those of one case, direction and dtype belong one after the other."""
    with skipping_rivals(contender):
        return _measurer.measure(case, direction, dtype, contender, device)


@contextlib.contextmanager
def skipping_rivals(contender: str) -> Iterator[None]:
    """Leave a rival out that cannot run a call, whatever its reason; ours fail."""
    try:
        yield
    except Exception as error:
        if contender in OURS or isinstance(error, Skip):
            raise
        raise Skip(first_line(error)) from error

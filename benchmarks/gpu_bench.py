"""Times attention on a GPU against what else there is: ``python -m benchmarks.gpu_bench [--seconds N]``.

Forward, and forward with backward, of the full-size cases in ``shapes``. Times are medians over replays of a CUDA graph
that holds several calls, each with inputs of its own, so that nothing is found in the L2 cache that a model would not
find there. What cannot be captured is timed by events, and the result says why. All contenders of a case are timed, and
then all once more: the two numbers show the noise.

The measuring is done in a process of its own. If a contender crashes or hangs it, that contender has failed, a new
process takes the next one, and what was measured stays. The result is written after every contender; cases that matter
most come first, and what does not fit into the time is left out with a note.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import math
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import vidattn
from benchmarks import divided_contenders, mixing_contenders, window3d_contenders
from benchmarks.calibration import RESULTS, describe_gpu, slug, write_json
from benchmarks.gpu_plans import all_pairs_floor, window3d_floor
from benchmarks.prediction import Cost, Rates
from benchmarks.rounds import check_agreement
from benchmarks.shapes import (
    DIRECTIONS,
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
from benchmarks.tables import print_table
from benchmarks.window3d_contenders import computes_the_same
from tests.imported_copy import describe

OURS, BASELINE = "vidattn", "eager"
COMPILED = ("compiled", "flex")  # contenders that take long to prepare
MAIN_CASES = (
    "swin_t_stage1", "swin_t_stage1_shifted", "timesformer_b_time", "timesformer_b_space", "xvit_b_16_frames_div8"
)  # fmt: skip
OTHER_DTYPE_CASES = ("swin_t_stage1_shifted", "timesformer_b_space", "xvit_b_16_frames_div8")  # one of each family
Case = WindowCase | DividedCase | MixingCase
GPU_CASES: dict[str, Case] = {**GPU_WINDOW_CASES, **GPU_DIVIDED_CASES, **GPU_MIXING_CASES}
CASES: dict[str, Case] = {
    **GPU_CASES,
    "smoke": replace(SMOKE_CASES["smoke"], head_dim=32),
    **SMOKE_DIVIDED_CASES,
    "smoke_mixing": SMOKE_MIXING_CASES["smoke"],
}
ROTATED_BYTES = 160e6  # inputs and outputs between two uses of the same ones: more than twice the largest L2 cache
REPLAYS = 20
GRAPH_SECONDS = 0.01  # calls that a graph holds beyond the copies must not take longer
# Seconds until a contender has failed, and those it needs at most as far as is known beforehand.
LIMITS, ESTIMATES = {False: 60.0, True: 120.0}, {False: 5.0, True: 40.0}


@dataclass(frozen=True)
class Task:
    """One contender on one case."""

    case: str
    direction: str
    dtype: str
    contender: str

    @property
    def group(self) -> tuple[str, str, str]:
        """What contenders have in common."""
        return self.case, self.direction, self.dtype

    @property
    def slow(self) -> bool:
        """Whether it has to be compiled by torch first."""
        return self.contender in COMPILED


def contenders(case: str) -> tuple[str, ...]:
    """Name the contenders of a case."""
    shape = CASES[case]
    if isinstance(shape, WindowCase):
        return window3d_contenders.GPU_CONTENDERS
    return divided_contenders.CONTENDERS if isinstance(shape, DividedCase) else mixing_contenders.CONTENDERS


def build_copies(shape: Case, *arguments: Any) -> list[Callable[[], tuple[Tensor, ...]]]:
    """Make inputs and the calls to time, as the family's contenders are built."""
    if isinstance(shape, DividedCase):
        return divided_contenders.build_copies(shape, *arguments)
    if isinstance(shape, MixingCase):
        return mixing_contenders.build_copies(shape, *arguments)
    return window3d_contenders.build_copies(shape, *arguments)


def why_not(case: str, direction: str, contender: str) -> str | None:
    """Say why a contender is left out of a comparison; None if it takes part."""
    shape = CASES[case]
    return window3d_contenders.why_not(shape, direction, contender) if isinstance(shape, WindowCase) else None


def plan(cases: Sequence[str]) -> list[list[Task]]:
    """Order what is to be timed by importance; tasks of one list are compared with each other."""
    main = [name for name in cases if name in MAIN_CASES]
    others = sorted((name for name in cases if name not in MAIN_CASES), key=_rank)
    other_dtypes = [name for name in OTHER_DTYPE_CASES if name in main]
    rounds = (
        (main, ("bfloat16",), False),
        (main, ("bfloat16",), True),
        (others, ("bfloat16",), False),
        (other_dtypes, ("float16", "float32"), False),
        (others, ("bfloat16",), True),
    )
    return [
        [Task(case, direction, dtype, name) for name in contenders(case) if (name in COMPILED) == slow]
        for names, dtypes, slow in rounds
        for case, direction, dtype in itertools.product(names, DIRECTIONS, dtypes)
    ]


def _rank(case: str) -> tuple[bool, str]:
    """Swin-T and the other families first, then the first stages of other Swins, which take longest."""
    return isinstance(CASES[case], WindowCase) and not case.startswith("swin_t_stage"), case.partition("stage")[2]


# ---- Measuring, in the worker process ----

Sample = Callable[[int], list[float]]  # takes a number of samples, gives seconds per call


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


def sample_by_graph(calls: Sequence[Callable[[], object]]) -> Sample:
    """Capture the calls, which have run before, in a CUDA graph."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [call() for call in calls]

    def sample(count: int) -> list[float]:
        assert results  # kept while the graph lives, so that each call writes to memory of its own
        return _between_events(graph.replay, len(calls), count)

    return sample


def sample_by_events(calls: Sequence[Callable[[], object]]) -> Sample:
    """Launch the calls one by one; short ones take as long as their launches."""

    def enqueue() -> None:
        for call in calls:
            call()

    return lambda count: _between_events(enqueue, len(calls), count)


def sample_by_clock(calls: Sequence[Callable[[], object]]) -> Sample:
    """Time calls on the CPU."""

    def sample(count: int) -> list[float]:
        times = []
        for _ in range(count):
            start = time.perf_counter()
            for call in calls:
                call()
            times.append((time.perf_counter() - start) / len(calls))
        return times

    return sample


def first_line(error: BaseException) -> str:
    """Shorten an exception to its type and the first line of its message."""
    line = next((line for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {line.strip()[:200]}".removesuffix(": ")


class Measurer:
    """Prepares contenders and samples them; keeps those of the current group, for their second turn."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._group: tuple[str, str, str] | None = None
        self._samples: dict[str, Sample] = {}
        self._expected: tuple[Tensor, ...] | str = ()

    def measure(self, task: Task) -> dict[str, Any]:
        """Time a contender.

        Args:
            task: what to time; the first time for a group, everything of the group before it is freed.

        Returns:
            ``us``, the median; the first time also what ``_prepare`` says.
        """
        found: dict[str, Any] = {}
        if task.group != self._group:
            self._samples.clear()
            self._expected, self._group = (), task.group
            gc.collect()
            if self._device == "cuda":
                torch.cuda.empty_cache()
        if task.contender not in self._samples:
            found = self._prepare(task)
        return found | {"us": statistics.median(self._samples[task.contender](REPLAYS)) * 1e6}

    def _prepare(self, task: Task) -> dict[str, Any]:
        start = time.perf_counter()
        shape = CASES[task.case]
        copies = count_copies(shape, task.direction, task.dtype) if self._device == "cuda" else 1
        calls = build_copies(shape, task.direction, task.dtype, task.contender, self._device, copies)
        result = calls[0]()
        found = self._compare(task, shape, result)
        del result
        if self._device != "cuda":
            self._samples[task.contender] = sample_by_clock(calls)
            return found | {"timer": "clock", "copies": copies, "prepared_s": time.perf_counter() - start}
        stream = torch.cuda.Stream()  # what is captured must have run on another stream than the default one
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for call in calls:
                call()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        found["peak_extra_bytes"] = _peak_extra_bytes(calls[0])
        estimate = sample_by_events(calls)(2)[-1]
        # Short graphs are dominated by their own launch.
        rounds = max(1, min(math.ceil(8 / copies), int(GRAPH_SECONDS / (estimate * copies))))
        try:
            self._samples[task.contender] = sample_by_graph([*calls] * rounds)
            found["timer"] = "graph"
        except Exception as error:
            self._samples[task.contender] = sample_by_events(calls)
            found |= {"timer": "events", "not_captured": first_line(error)}
        return found | {"copies": copies, "prepared_s": time.perf_counter() - start}

    def _compare(self, task: Task, shape: Case, result: tuple[Tensor, ...]) -> dict[str, Any]:
        """Say whether a result is that of the module code; a wrong one is timed all the same, and marked."""
        if not computes_the_same(task.contender):
            return {"agrees": "computes something else"}
        if self._expected == ():
            try:
                if task.contender == BASELINE:
                    self._expected = result
                else:
                    (call,) = build_copies(shape, task.direction, task.dtype, BASELINE, self._device)
                    self._expected = call()
            except Exception as error:
                self._expected = f"not checked: {first_line(error)}"
        if isinstance(self._expected, str):
            return {"agrees": self._expected}
        try:
            check_agreement({BASELINE: self._expected, task.contender: result})
        except Exception as error:
            return {"agrees": first_line(error)}
        return {"agrees": True}


def _peak_extra_bytes(call: Callable[[], object]) -> int:
    """What a call adds to the allocated memory at its peak, its result included."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before


def is_broken() -> bool:
    """Tell whether an error or a failed capture has left the GPU, or torch's generator on it, unusable."""
    try:
        torch.rand(8, device="cuda").sum().item()
    except Exception:
        return True
    return False


def work(connection: Connection, device: str) -> None:
    """Answer tasks until nobody asks or the GPU's state is beyond repair; the entry of the worker process."""
    if device == "cuda":
        vidattn.set_backend("triton")  # strict: the reference is not to be timed in its place
    measurer = Measurer(device)
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        try:
            answer = measurer.measure(task)
        except Exception as error:
            answer = {"error": first_line(error)}
        if device == "cuda" and ("error" in answer or "not_captured" in answer):
            answer["restart"] = is_broken()
        connection.send(answer)


# ---- Supervising ----


class Worker:
    """A measuring process that is replaced when it crashes, hangs or asks for it."""

    def __init__(self, device: str, target: Callable[[Connection, str], None] = work) -> None:
        self._device, self._target = device, target
        self._context = multiprocessing.get_context("spawn")
        self._process: multiprocessing.process.BaseProcess | None = None

    def measure(self, task: Task, seconds: float) -> dict[str, Any]:
        """Have a task measured, in at most so many seconds; ``error`` says why not."""
        if self._process is None:
            self._connection, theirs = self._context.Pipe()
            self._process = self._context.Process(target=self._target, args=(theirs, self._device), daemon=False)
            self._process.start()
            theirs.close()  # so that a dead worker reads as the end of the file
        try:
            self._connection.send(task)
            if not self._connection.poll(seconds):
                self.stop()
                return {"error": f"no result within {seconds:.0f} s"}
            answer = self._connection.recv()
        except (EOFError, OSError):
            self._process.join(10)
            code = self._process.exitcode
            self.stop()
            return {"error": f"the process ended with exit status {code}"}
        if answer.pop("restart", False):
            self.stop()
        return answer

    def stop(self) -> None:
        """End the process."""
        if self._process is not None:
            self._connection.close()
            self._process.kill()
            self._process.join()
            self._process = None


def floor_us(shape: Case, direction: str, dtype: str, rates: Rates) -> float | None:
    """Microseconds that the hardware needs at least; None for float32, whose matrix rate is not among the rates."""
    if dtype == "float32":
        return None
    parts = ("forward",) if direction == "forward" else ("forward", "backward")
    floor: Callable[..., Cost] = window3d_floor if isinstance(shape, WindowCase) else all_pairs_floor
    costs = (floor(shape, part, getattr(torch, dtype)) for part in parts)
    return sum(max(cost.microseconds(rates).values()) for cost in costs)


def figures(task: Task, us: Sequence[float], rates: Rates) -> dict[str, Any]:
    """Derive what is reported from the medians of the turns; rates are those of the better turn."""
    shape, seconds = CASES[task.case], min(us) * 1e-6
    scores = shape.flops("forward") // (2 * 2 * shape.head_dim)
    floor = floor_us(shape, task.direction, task.dtype, rates)
    return {
        "us": [round(value, 2) for value in us],
        "noise": max(us) / min(us) - 1,
        "gb_per_s": shape.bytes_moved(task.direction, getattr(torch, task.dtype)) / seconds * 1e-9,
        "tflops": shape.flops(task.direction) / seconds * 1e-12,
        "scores_per_s": scores / seconds,
        "floor_us": floor,
        "share_of_floor": None if floor is None else floor / min(us),
    }


class Bench:
    """Goes through the plan within a time limit and keeps the result file up to date."""

    def __init__(self, path: Path, rates: Rates, seconds: float, worker: Worker) -> None:
        self._path, self._rates, self._worker = path, rates, worker
        self._deadline = time.monotonic() + seconds
        self._estimates = dict(ESTIMATES)
        self._entries: dict[Task, dict[str, Any]] = {}
        self.result: dict[str, Any] = {"machine": describe_gpu(), "rates": asdict(rates), "measurements": []}

    def run(self, groups: Sequence[Sequence[Task]]) -> None:
        """Measure group after group, each of its contenders twice."""
        try:
            for group in groups:
                for task in group:
                    self._first_turn(task)
                    self._save()
                for task in group:
                    if "us" in self._entries[task]:
                        self._second_turn(task)
                self._save()
        finally:
            self._worker.stop()
            self._save()

    def _remaining(self) -> float:
        return self._deadline - time.monotonic()

    def _first_turn(self, task: Task) -> None:
        entry = self._entries[task] = asdict(task)
        reason = why_not(task.case, task.direction, task.contender)
        if reason is None and self._remaining() < self._estimates[task.slow]:
            reason = "no time left"
        if reason is not None:
            entry["skipped"] = reason
            return
        start = time.monotonic()
        answer = self._worker.measure(task, min(LIMITS[task.slow], self._remaining()))
        if "us" in answer:
            self._estimates[task.slow] = max(self._estimates[task.slow] * 0.8, time.monotonic() - start)
            answer |= figures(task, [answer["us"]], self._rates)
        entry |= answer

    def _second_turn(self, task: Task) -> None:
        entry = self._entries[task]
        if self._remaining() < self._estimates[task.slow]:
            return
        answer = self._worker.measure(task, min(LIMITS[task.slow], self._remaining()))
        if "us" in answer:
            entry |= figures(task, [*entry["us"], answer["us"]], self._rates)
        else:
            entry["second_turn"] = answer["error"]

    def _save(self) -> None:
        self.result["measurements"] = [_rounded(entry) for entry in self._entries.values()]
        self.result["speedups"] = speedups(self._entries)
        write_json(self._path, self.result)


def _rounded(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Keep four digits: a result file is for people too."""
    return {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in entry.items()}


def speedups(entries: Mapping[Task, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Say for each case how many times as fast as each other contender ours is, by the better turns."""
    times: dict[tuple[str, str, str], dict[str, float]] = {}
    for task, entry in entries.items():
        if "us" in entry:
            times.setdefault(task.group, {})[task.contender] = min(entry["us"])
    return {
        "/".join(group): {name: round(value / found[OURS], 3) for name, value in found.items() if name != OURS}
        for group, found in times.items()
        if OURS in found
    }


# ---- Printing ----

COLUMNS = (
    "case",
    "direction",
    "dtype",
    "contender",
    "us",
    "again",
    "GB/s",
    "TFLOP/s",
    "of floor",
    "MiB",
    "vs ours",
    "",
)


def rows(result: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """Give the lines of the table under ``COLUMNS``."""
    ratios = result["speedups"]
    for entry in result["measurements"]:
        names = tuple(entry[key] for key in ("case", "direction", "dtype", "contender"))
        if "us" not in entry:
            yield (*names, *[""] * 7, entry.get("skipped") or entry["error"])
            continue
        share, peak = entry["share_of_floor"], entry.get("peak_extra_bytes")
        ratio = ratios.get("/".join(names[:3]), {}).get(names[3])
        notes = [entry[key] for key in ("agrees", "not_captured", "second_turn") if entry.get(key, True) is not True]
        yield (
            *names,
            f"{entry['us'][0]:.1f}",
            f"{entry['us'][1]:.1f}" if len(entry["us"]) > 1 else "",
            f"{entry['gb_per_s']:.0f}",
            f"{entry['tflops']:.0f}",
            "" if share is None else f"{share:.0%}",
            "" if peak is None else f"{peak / 2**20:.0f}",
            "" if ratio is None else f"{ratio:.2f}x",
            "; ".join(notes),
        )


def show(result: Mapping[str, Any]) -> None:
    """Print the table."""
    machine = result["machine"]
    title = f"{machine['gpu']}, torch {machine['torch']}, triton {machine['triton']}, {machine['date']}"
    print_table(title, COLUMNS, rows(result))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_bench", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result, <gpu>.json (%(default)s)")
    parser.add_argument("--seconds", type=float, default=420.0, help="time limit (%(default)s)")
    parser.add_argument("--rates", type=Path, help="what benchmarks.calibration measured, for the floors")
    parser.add_argument("--case", nargs="+", choices=sorted(CASES), help="only these")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to try this program")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.exit(2, f"{parser.prog}: torch {torch.__version__} finds no GPU\n")
    print(describe())
    rates = Rates()
    if options.rates is not None:
        try:
            rates = Rates.load(options.rates)
        except (OSError, ValueError) as error:
            print(f"floors by assumed rates: {error}")
    name = slug(torch.cuda.get_device_name()) if options.device == "cuda" else "cpu"
    bench = Bench(options.out / f"{name}.json", rates, options.seconds, Worker(options.device))
    try:
        bench.run(plan(options.case or list(GPU_CASES)))
    finally:
        show(bench.result)


if __name__ == "__main__":
    main()

"""Which cases, dtypes and contenders a run has, and how long it will take."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path

import pytest
import torch

from benchmarks.calls import COMPILED
from benchmarks.shapes import (
    DEFAULT_CASES,
    DIRECTIONS,
    DIVIDED_CASES,
    DTYPES,
    MIXING_CASES,
    MODEL_CASES,
    MODULE_CASES,
    NAMED_CASES,
    TITLES,
    WINDOW_CASES,
)
from benchmarks.store import Key, Store

# On two cores that nobody else uses. A case of a full run takes as long as so many calls of ours, that do so many
# operations a second: first runs and peak memory, then rounds, which slow contenders leave early. To that come seconds
# to compile, for each contender, and for the case; for a contender of a whole model.
FLOPS_PER_SECOND = 1.2e11
CALLS = {"eager": 60.0, "sdpa": 60.0, "sdpa_prebuilt": 50.0, "vidattn": 21.0}
CALLS_OTHER, CALLS_REFERENCE = 70.0, 12.0
SECONDS_COMPILE, SECONDS_CONTENDER, SECONDS_CASE = 14.0, 2.0, 3.0
SECONDS_MODEL, SECONDS_MODEL_COMPILED = 40.0, {"inference": 75.0, "training": 110.0}
FULL_ROUNDS, FULL_MINUTES = 15, 170
ONE_THREAD = 1


def add_options(parser: pytest.Parser) -> None:
    """Add the options that choose what runs."""
    add = parser.getgroup("vidattn").addoption
    add("--full", action="store_true", help="all cases, for up to 3 hours; a second start goes on; -k chooses")
    add("--results", type=Path, metavar="FILE", help="what --full has measured (default: .benchmarks/full-*.json)")
    add("--minutes", type=float, default=FULL_MINUTES, help=f"--full begins no case after so many ({FULL_MINUTES})")
    add("--dtype", action="append", choices=list(DTYPES), help="repeat for several (default: float32; see --full)")
    add("--device", default="cpu", help="where to run: cpu (default) or cuda")
    add("--threads", type=int, metavar="N", help="threads of torch (default: its own choice)")
    add("--smoke", action="store_true", help="tiny cases in place of the full-size ones")
    add("--no-peak-memory", action="store_true", help="leave out peak memory")


def check_options(config: pytest.Config) -> None:
    """Raise pytest's error for a device or a number of threads that there is not; set the threads."""
    threads, device = config.getoption("threads"), config.getoption("device")
    if threads is not None:
        if threads < 1:
            raise pytest.UsageError(f"--threads: expected a whole number from 1, got {threads}")
        torch.set_num_threads(threads)
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise pytest.UsageError(f"--device: {device} cannot be used: {str(error).splitlines()[0]}") from None


def _variants(config: pytest.Config, case: str) -> list[tuple[str, int]]:
    """Name the (dtype, threads) that a case is measured with."""
    option, threads = config.getoption, torch.get_num_threads()
    named = option("full") and case in NAMED_CASES
    dtypes = option("dtype") or (DTYPES if option("smoke") or named else ["float32"])
    variants = [(dtype, threads) for dtype in dtypes]
    return [*variants, ("float32", ONE_THREAD)] if named and threads > ONE_THREAD and "float32" in dtypes else variants


def _takes_part(config: pytest.Config, case: str, dtype: str, threads: int, contender: str) -> bool:
    option = config.getoption
    if option("smoke") or case in MODEL_CASES or case in MODULE_CASES:
        return True
    if option("full") and contender in COMPILED:
        in_dtype = dtype == "float32" or (dtype == "bfloat16" and contender == "compiled")
        return case in NAMED_CASES and threads == torch.get_num_threads() and in_dtype
    if option("full"):
        return True
    return contender not in ("sdpa_prebuilt", "compiled_sdpa", "flex")  # the short run has the usual three rivals


def parametrize(
    metafunc: pytest.Metafunc,
    cases: Collection[str],
    smoke_cases: Collection[str],
    contenders: Callable[[str, str], Sequence[str]],
    directions: Iterable[str] = DIRECTIONS,
) -> None:
    """Give a benchmark function its (case, direction, dtype, threads, contender), as the options choose them.

    Args:
        metafunc: of the function.
        cases: full-size cases.
        smoke_cases: tiny ones.
        contenders: names them for a direction and a dtype.
        directions: those that the family has.
    """
    config = metafunc.config
    everything = config.getoption("smoke") or config.getoption("full")
    metafunc.parametrize(
        ("case", "direction", "dtype", "threads", "contender"),
        [
            (case, direction, dtype, threads, contender)
            for case in (smoke_cases if config.getoption("smoke") else cases)
            for direction in directions
            if everything or (case, direction) in DEFAULT_CASES
            for dtype, threads in _variants(config, case)
            for contender in contenders(direction, dtype)
            if _takes_part(config, case, dtype, threads, contender)
        ],
    )


def key(item: pytest.Item) -> Key | None:
    """Name the case that a benchmark belongs to; None if its function got no case."""
    parameters = item.callspec.params  # type: ignore[attr-defined]
    found = tuple(parameters[name] for name in ("case", "direction", "dtype", "threads"))
    return found if isinstance(found[0], str) else None  # type: ignore[return-value]


def cases_of(items: Iterable[pytest.Item]) -> dict[tuple[str, Key], list[str]]:
    """Group benchmarks: the contenders of each function and case, in order."""
    cases: dict[tuple[str, Key], list[str]] = {}
    for item in items:
        found = key(item)
        if found is not None:
            contender = item.callspec.params["contender"]  # type: ignore[attr-defined]
            cases.setdefault((item.originalname, found), []).append(contender)  # type: ignore[attr-defined]
    return cases


def measured_before(items: Iterable[pytest.Item], store: Store) -> list[pytest.Item]:
    """Pick the benchmarks of cases of which a store has all contenders."""
    done = {case for case, names in cases_of(items).items() if set(names) <= store.contenders(case[1])}
    return [item for item in items if (item.originalname, key(item)) in done]  # type: ignore[attr-defined]


def expected_seconds(case: Key, contenders: Iterable[str], full: bool = False) -> float:
    """Estimate how long a case takes."""
    name, direction, _, threads = case
    if name.startswith("smoke"):
        return 1.0
    if name in MODEL_CASES and (name, direction) not in DEFAULT_CASES:
        refused = direction == "training" and not MODEL_CASES[name].compiled_training
        compiled = 0.0 if refused else SECONDS_MODEL_COMPILED[direction]
        return sum(compiled if contender in COMPILED else SECONDS_MODEL for contender in contenders)
    shape = (WINDOW_CASES | DIVIDED_CASES | MIXING_CASES).get(name)
    flops = shape.flops(direction) if shape and direction in DIRECTIONS else 0
    once = flops / FLOPS_PER_SECOND * (2 if threads == ONE_THREAD else 1) * (1.0 if full else 0.6)
    if name not in WINDOW_CASES:
        once *= 0.6  # no mask and no bias: others are faster
    return (
        SECONDS_CASE
        + CALLS_REFERENCE * once
        + sum(
            SECONDS_CONTENDER
            + (SECONDS_COMPILE if contender in COMPILED else 0.0)
            + CALLS.get(contender, CALLS_OTHER) * once
            for contender in contenders
        )
    )


def title(case: Key) -> str:
    """Write a case for people."""
    name, direction, dtype, threads = case
    on = ", 1 thread" if threads == ONE_THREAD < torch.get_num_threads() else ""
    return f"{TITLES.get(name, name)}, {TITLES.get(direction, direction)}, {dtype}{on}"

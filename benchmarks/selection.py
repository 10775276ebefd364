"""Which cases, dtypes and contenders a run has, and how long it will take."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence

import pytest
import torch

from benchmarks.shapes import DEFAULT_CASES, DIRECTIONS, DTYPES, MODEL_CASES, TITLES

# Seconds of one contender and of the case around it, on two cores that nobody else uses; compiling takes the most.
SECONDS = {"compiled": 14.0, "vidattn_compiled": 14.0}
SECONDS_OTHER, SECONDS_CASE = 2.0, 3.0
SECONDS_MODEL, SECONDS_MODEL_COMPILED = 40.0, {"inference": 90.0, "training": 240.0}
Key = tuple[str, str, str]  # case, direction, dtype


def add_options(parser: pytest.Parser) -> None:
    """Add the options that choose what runs."""
    add = parser.getgroup("vidattn").addoption
    add("--full", action="store_true", help="all cases in float32 and bfloat16, for more than an hour; -k chooses")
    add("--dtype", action="append", choices=list(DTYPES), help="repeat for several (default: float32; --full: all)")
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


def parametrize(
    metafunc: pytest.Metafunc,
    cases: Collection[str],
    smoke_cases: Collection[str],
    contenders: Callable[[str, str], Sequence[str]],
    directions: Iterable[str] = DIRECTIONS,
) -> None:
    """Give a benchmark function its (case, direction, dtype, contender), as the options choose them.

    Args:
        metafunc: of the function.
        cases: full-size cases.
        smoke_cases: tiny ones.
        contenders: names them for a direction and a dtype.
        directions: those that the family has.
    """
    option = metafunc.config.getoption
    chosen = smoke_cases if option("smoke") else cases
    everything = option("smoke") or option("full")
    dtypes = option("dtype") or (DTYPES if everything else ["float32"])
    metafunc.parametrize(
        ("case", "direction", "dtype", "contender"),
        [
            (case, direction, dtype, contender)
            for case in chosen
            for direction in directions
            if everything or (case, direction) in DEFAULT_CASES
            for dtype in dtypes
            for contender in contenders(direction, dtype)
            if everything or contender != "sdpa_prebuilt"  # which is for inference engines
        ],
    )


def key(item: pytest.Item) -> Key | None:
    """Name the case that a benchmark belongs to; None if its function got no case."""
    parameters = item.callspec.params  # type: ignore[attr-defined]
    found = tuple(parameters[name] for name in ("case", "direction", "dtype"))
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


def expected_seconds(case: Key, contenders: Iterable[str]) -> float:
    """Estimate how long a case takes."""
    if case[0].startswith("smoke"):
        return 1.0
    if case[0] in MODEL_CASES and case[:2] not in DEFAULT_CASES:
        compiled = SECONDS_MODEL_COMPILED[case[1]]
        return sum(compiled if name in SECONDS else SECONDS_MODEL for name in contenders)
    return SECONDS_CASE + sum(SECONDS.get(name, SECONDS_OTHER) for name in contenders)


def title(case: Key | Sequence[str]) -> str:
    """Write a case for people."""
    name, direction, dtype = case
    return f"{TITLES.get(name, name)}, {TITLES.get(direction, direction)}, {dtype}"

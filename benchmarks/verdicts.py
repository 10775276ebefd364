"""What results say beyond their noise: who is slower than a rival, and what changed from one run to another."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks.shapes import TITLES
from benchmarks.store import key_of
from benchmarks.summary import OURS

ENOUGH_ROUNDS = 15
# The same code measured twice differs by so much, whatever the noise within a run.
BETWEEN_RUNS = 0.03
MORE_MEMORY = 0.05


class Rival(NamedTuple):
    """How many times as long the best rival of a case takes as ours: the median, and the interval that it is in."""

    name: str
    median: float
    low: float
    high: float


class Change(NamedTuple):
    """What became of a case: the speed of the new run as a multiple of the old one's, by the machine's own rates."""

    case: str
    speed: float
    verdict: str


def title(info: Mapping[str, Any]) -> str:
    """Write the case of an entry for people."""
    threads = info["threads"]
    case, direction = (TITLES.get(info[part], info[part]) for part in ("case", "direction"))
    return f"{case}, {direction}, {info['dtype']}, {threads} thread{'s' * (threads > 1)}"


def ours_of(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Keep the entries of vidattn, but for those of growth."""
    entries = [entry for entry in result["benchmarks"] if not entry["group"].startswith("growth/")]
    return [entry for entry in entries if entry["info"]["contender"] == OURS]


def best_rival(info: Mapping[str, Any]) -> Rival | None:
    """Give the fastest rival of vidattn's entry by the medians; None without a rival that computes the same.

    Where vidattn was compiled too, as in whole models, and is faster so, that is held against the compiled rival:
    ``torch.compile`` makes one of the operations between those of attention, which ``vidattn.accelerate`` leaves alone.
    """
    ratios = {
        name: Rival(name, ratio["median"], ratio.get("low", ratio["median"]), ratio.get("high", ratio["median"]))
        for name, ratio in info["speedup_over"].items()
    }
    rivals = {name: rival for name, rival in ratios.items() if not name.startswith(OURS) and name != "natten"}
    compiled = ratios.get(f"{OURS}_compiled")
    if compiled is not None and compiled.median < 1 and (rival := rivals.get("compiled")) is not None:
        rivals["compiled"] = Rival(
            "compiled", rival.median / compiled.median, rival.low / compiled.high, rival.high / compiled.low
        )
    return min(rivals.values(), key=lambda rival: rival.median, default=None)  # NATTEN has no bias and no shift


def slower(results: Sequence[Mapping[str, Any]]) -> str:
    """Answer whether a case is slower than its best rival beyond the noise.

    It is where the whole interval that holds the median of the ratios is below one, and the rounds were enough.

    Args:
        results: what ``report.clean`` gives; of a case that several have on the same machine the first counts.

    Returns:
        Markdown: a line for each such case, and how many were compared on how many threads; empty if none was.
    """
    compared: dict[int, int] = {}
    lines, unsure, seen = [], [], set()
    for result in results:
        for entry in ours_of(result):
            info, rival = entry["info"], best_rival(entry["info"])
            where_and_what = (result["machine"]["processor"], result["machine"].get("cpu_isa"), key_of(entry))
            if rival is None or where_and_what in seen:
                continue
            seen.add(where_and_what)
            compared[info["threads"]] = compared.get(info["threads"], 0) + 1
            speed = f"{rival.median:.2f} ({rival.low:.2f} to {rival.high:.2f})"
            line = f"- {title(info)}: {speed} times as fast as {TITLES.get(rival.name, rival.name)}"
            if rival.high < 1 and entry["stats"]["rounds"] >= ENOUGH_ROUNDS:
                lines.append(line)
            elif rival.high < 1:
                unsure.append(f"{line}, in {entry['stats']['rounds']} rounds only")
    if not compared:
        return ""
    counted = ", ".join(
        f"{count} on {threads} thread{'s' * (threads > 1)}" for threads, count in sorted(compared.items())
    )
    head = (
        f"Slower than the best rival, beyond the noise of {ENOUGH_ROUNDS} rounds: {len(lines) or 'none'} of "
        f"{sum(compared.values())} cases ({counted})."
    )
    parts = [head, *lines]
    if unsure:
        parts += ["", "Slower in too few rounds to tell:", *unsure]
    return "\n".join(parts)


def _speed(info: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, float]:
    """Give a share that both runs have: of the limit, else of a rate. Older results do not know its interval."""
    for share in ("share_of_limit", "share_of_gemm", "share_of_copy"):
        if share in info and share in other and info[share]["median"] > 0:
            return {"low": -math.inf, "high": math.inf, **info[share]}
    raise ValueError(f"{title(info)}: expected a share of a rate of the machine in both results")


def compare(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Change]:
    """Compare two runs case by case, by vidattn's shares of the machine's rates in the same rounds.

    A case is faster or slower where the two intervals do not meet and the medians differ by more than two runs of the
    same code do. Results before 2026-11-30 do not know their noise: all is unsure.

    Args:
        old: what ``report.clean`` gives.
        new: the same.

    Returns:
        The cases of both, those that changed most first.
    """
    before = {key_of(entry): entry["info"] for entry in ours_of(old)}
    changes = []
    for entry in ours_of(new):
        info = entry["info"]
        if key_of(entry) not in before:
            continue
        earlier = before[key_of(entry)]
        first, then = _speed(earlier, info), _speed(info, earlier)
        speed = then["median"] / first["median"]
        verdict = "same" if math.isfinite(first["low"] + then["low"]) else "unsure"
        if then["low"] > first["high"] and speed > 1 + BETWEEN_RUNS:
            verdict = "faster"
        elif then["high"] < first["low"] and speed < 1 - BETWEEN_RUNS:
            verdict = "slower"
        peaks = earlier.get("peak_extra_bytes"), info.get("peak_extra_bytes")
        if all(peaks) and peaks[1] > (1 + MORE_MEMORY) * peaks[0]:  # type: ignore[operator]
            verdict += f", {peaks[1] / peaks[0]:.2f} times the memory"
        changes.append(Change(title(info), speed, verdict))
    return sorted(changes, key=lambda change: -abs(change.speed - 1))

"""What ``benchmarks.growth`` found: curves, and exponents fitted to them beside the expected ones."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.growth import CONTENDERS, DTYPE, Series, exponent, name_of, result_bytes, score_bytes, series
from benchmarks.shapes import DIRECTIONS, DTYPES, TITLES
from benchmarks.store import Key, key_of
from benchmarks.summary import OURS


@dataclass
class Curves:
    """One series in one direction.

    Attributes:
        of: the series.
        direction: "forward" | "forward_backward".
        seconds: median by size, for each contender.
        peaks: bytes that a call adds at its peak, likewise.
        lost: why a contender was not measured, by size.
        limits: seconds below which no call can be, by size.
    """

    of: Series
    direction: str
    seconds: dict[str, dict[int, float]] = field(default_factory=dict)
    peaks: dict[str, dict[int, float]] = field(default_factory=dict)
    lost: dict[str, dict[int, str]] = field(default_factory=dict)
    limits: dict[int, float] = field(default_factory=dict)

    def expected(self, quantity: str, contender: str) -> float | None:
        """Give the exponent that is expected: of the limit for time; for memory of what a contender must hold.

        Ours holds its results, rivals the scores too.
        """
        if quantity == "seconds":
            return exponent(self.limits)
        dtype = DTYPES[DTYPE]
        if self.of.threads:
            return 0.0
        held = {
            size: result_bytes(case, self.direction, dtype) + (contender != OURS) * score_bytes(case, dtype)
            for size, case in self.of.cases.items()
        }
        return exponent(held)


def curves(result: Mapping[str, Any]) -> list[Curves]:
    """Sort a result into curves; series without a measured point are left out."""
    everything = result["machine"]["threads"]
    found: dict[Key, list[dict[str, Any]]] = {}
    for entry in result["benchmarks"]:
        found.setdefault(key_of(entry), []).append(entry)
    all_curves = []
    for growing in series(everything):
        for direction in DIRECTIONS:
            curve = Curves(growing, direction)
            for size, case in growing.cases.items():
                key = (name_of(case), direction, DTYPE, size if growing.threads else everything)
                for entry in found.get(key, []):
                    info, contender = entry["info"], entry["info"]["contender"]
                    curve.seconds.setdefault(contender, {})[size] = entry["stats"]["median"]
                    if info.get("peak_extra_bytes"):
                        curve.peaks.setdefault(contender, {})[size] = info["peak_extra_bytes"]
                    if "limit_seconds" in info:
                        curve.limits[size] = info["limit_seconds"]
                    for other, reason in info["not_run"].items():
                        curve.lost.setdefault(other, {})[size] = reason
            if curve.seconds:
                all_curves.append(curve)
    return all_curves


def _number(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{value:.2f}"


def _row(curve: Curves, quantity: str) -> list[str]:
    sizes = list(curve.of.cases)
    measured: dict[str, dict[int, float]] = getattr(curve, quantity)
    cells = [f"{curve.of.op}: {curve.of.axis}, {sizes[0]} to {sizes[-1]} {curve.of.unit}"]
    cells.append(TITLES.get(curve.direction, curve.direction))
    cells.append(_number(curve.expected(quantity, OURS)))
    if quantity == "peaks":
        cells.append(_number(curve.expected(quantity, "eager")))
    for contender in (OURS, *(name for name in CONTENDERS if name != OURS)):
        cell = _number(exponent(measured.get(contender, {})))
        lost = curve.lost.get(contender, {})
        if lost and quantity == "peaks":
            first = min(lost)
            cell += f" (none from {first}: {lost[first].partition(':')[0]})"
        cells.append(cell.strip())
    return cells


def tables(result: Mapping[str, Any]) -> str:
    """Write the exponents of a result, in Markdown: time, then memory."""
    names = [TITLES.get(name, name) for name in (OURS, *(name for name in CONTENDERS if name != OURS))]
    parts = []
    for quantity, heading, expected in (
        ("seconds", "Time", ["expected"]),
        ("peaks", "Peak memory", ["expected of vidattn", "expected of rivals"]),
    ):
        head = ["what grows", "direction", *expected, *names]
        lines = [head, ["---"] * len(head), *(_row(curve, quantity) for curve in curves(result))]
        text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        parts.append(f"### {heading}, exponent of the size that grows\n\n{text}")
    return "\n\n".join(parts)

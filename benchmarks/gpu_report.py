"""What GPU runs found, as one file that can be sent, and as a table."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

from benchmarks.calibration import slug, write_json
from benchmarks.gpu_build import ROOT
from benchmarks.gpu_plans import all_pairs_floor, window3d_floor
from benchmarks.gpu_steps import Line, Results
from benchmarks.gpu_timing import CASES, OURS, Case
from benchmarks.prediction import Cost, Rates
from benchmarks.shapes import WindowCase
from benchmarks.tables import print_table

CALIBRATION, SPEED = "calibration", ("speed", "more")  # steps that this module knows by name
VIDATTN = "vidattn"
AGAIN = "/again"  # ends the name of the second turn of a contender

COLUMNS = ("case", "direction", "dtype", "us", "again", "launched", "GB/s", "TFLOP/s", "of floor", "others take")


def measured_rates(results: Results) -> dict[str, float]:
    """Bring together what the steps of the calibration have measured."""
    return {name: value for line in results.of(CALIBRATION).values() for name, value in line.get("found", {}).items()}


def rates_of(measured: Mapping[str, float]) -> Rates:
    """Take assumed rates where none is measured."""
    return Rates(**{field.name: measured[field.name] for field in fields(Rates) if field.name in measured})


def floor_us(shape: Case, direction: str, dtype: str, rates: Rates) -> float | None:
    """Microseconds that the hardware needs at least; None for float32, whose matrix rate is not among the rates."""
    if dtype == "float32":
        return None
    parts = ("forward",) if direction == "forward" else ("forward", "backward")
    floor: Callable[..., Cost] = window3d_floor if isinstance(shape, WindowCase) else all_pairs_floor
    costs = (floor(shape, part, getattr(torch, dtype)) for part in parts)
    return sum(max(cost.microseconds(rates).values()) for cost in costs)


def figures(case: str, direction: str, dtype: str, us: Sequence[float], rates: Rates) -> dict[str, Any]:
    """Derive what is reported from the medians of the turns; rates are those of the better turn."""
    shape, seconds = CASES[case], min(us) * 1e-6
    scores = shape.flops("forward") // (2 * 2 * shape.head_dim)
    floor = floor_us(shape, direction, dtype, rates)
    return {
        "us": [round(value, 2) for value in us],
        "noise": max(us) / min(us) - 1,
        "gb_per_s": shape.bytes_moved(direction, getattr(torch, dtype)) / seconds * 1e-9,
        "tflops": shape.flops(direction) / seconds * 1e-12,
        "scores_per_s": scores / seconds,
        "floor_us": floor,
        "share_of_floor": None if floor is None else floor / min(us),
    }


def measurements(results: Results, rates: Rates) -> list[dict[str, Any]]:
    """Give an entry for each contender of each case that was tried: its figures, or why there are none."""
    lines = {task: line for step in SPEED for task, line in results.of(step).items()}
    entries = []
    for task, line in lines.items():
        if task.endswith(AGAIN):
            continue
        case, direction, dtype, contender = task.split("/")
        entry: dict[str, Any] = {"case": case, "direction": direction, "dtype": dtype, "contender": contender}
        if line["status"] == "passed":
            us, second = [line["found"]["us"]], lines.get(task + AGAIN)
            if second is not None and second["status"] == "passed":
                us.append(second["found"]["us"])
            elif second is not None:
                entry["second_turn"] = second["reason"]
            entry |= line["found"] | figures(case, direction, dtype, us, rates)
        else:
            entry[line["status"]] = line["reason"]
        entries.append({key: _rounded(value) for key, value in entry.items()})
    return entries


def _rounded(value: Any) -> Any:
    """Keep four digits: a result file is for people too."""
    return float(f"{value:.4g}") if isinstance(value, float) else value


def speedups(entries: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Say for each case how many times as fast as each other contender ours is, by the better turns."""
    times: dict[str, dict[str, float]] = {}
    for entry in entries:
        if "us" in entry:
            group = "/".join(entry[key] for key in ("case", "direction", "dtype"))
            times.setdefault(group, {})[entry["contender"]] = min(entry["us"])
    return {
        group: {name: round(value / found[VIDATTN], 3) for name, value in found.items() if name != VIDATTN}
        for group, found in times.items()
        if VIDATTN in found
    }


def checks(results: Sequence[Results]) -> dict[str, dict[str, Any]]:
    """Say of each step what came of its tasks, by status: all names of what passed, a reason for all else."""
    found: dict[str, dict[str, Any]] = {}
    for of in results:
        for step in of.steps():
            if step in SPEED:
                continue
            lines = of.of(step)
            found[step] = {
                "passed": {task: line.get("found", {}) for task, line in lines.items() if line["status"] == "passed"},
                **{
                    status: {task: line["reason"] for task, line in lines.items() if line["status"] == status}
                    for status in sorted({line["status"] for line in lines.values()} - {"passed"})
                },
            }
    return found


def _public(value: Any) -> Any:
    """Take names of folders out of what is to be sent."""
    if isinstance(value, str):
        for path, name in ((sys.prefix, "python"), (sys.base_prefix, "python"), (ROOT, "."), (Path.home(), "~")):
            value = value.replace(str(path), name)
    elif isinstance(value, dict):
        value = {key: _public(inner) for key, inner in value.items()}
    elif isinstance(value, list):
        value = [_public(inner) for inner in value]
    return value


def write(
    out: Path, machine: Mapping[str, Any], results: Sequence[Results], left: Mapping[str, int]
) -> tuple[Path, dict[str, Any]]:
    """Write the result file.

    Args:
        out: its folder.
        machine: what ``describe_gpu`` says.
        results: the lines of the run, and of what was built.
        left: how many tasks are not done, by step.

    Returns:
        The file, named after the GPU, and what is in it.
    """
    measured = measured_rates(results[0])
    rates = rates_of(measured)
    entries = measurements(results[0], rates)
    result = {
        "machine": dict(machine),
        "code": results[0].code,
        "left": {step: count for step, count in left.items() if count},
        "rates": asdict(rates),
        "checks": checks(results),
        "measurements": entries,
        "speedups": speedups(entries),
    }
    path = out / f"{slug(machine['gpu'])}.json"
    write_json(path, _public(result))
    if measured:
        write_json(out / "gpu-calibration.json", {"machine": dict(machine), **measured})
    return path, result


def rows(result: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """Give a line under ``COLUMNS`` for each case that ours was timed on; why a rival was not is in the file alone."""
    for entry in result["measurements"]:
        if entry["contender"] != VIDATTN or "us" not in entry:
            continue
        names = tuple(entry[key] for key in ("case", "direction", "dtype"))
        ratios = result["speedups"]["/".join(names)]
        others = sorted(ratios.items(), key=lambda ratio: ratio[1])
        share = entry["share_of_floor"]
        yield (
            *names,
            f"{entry['us'][0]:.1f}",
            f"{entry['us'][1]:.1f}" if len(entry["us"]) > 1 else "",
            f"{entry['launched_us']:.1f}",
            f"{entry['gb_per_s']:.0f}",
            f"{entry['tflops']:.0f}",
            "" if share is None else f"{share:.0%}",
            ", ".join(f"{name} {ratio:.2f}x" for name, ratio in others),
        )


def show(result: Mapping[str, Any]) -> None:
    """Print the table of times, if there are any."""
    lines = list(rows(result))
    if lines:
        machine = result["machine"]
        title = f"{machine['gpu']}, torch {machine['torch']}, triton {machine['triton']}, {machine['date']}"
        print_table(title, COLUMNS, lines)


def extension(line: Line | None) -> str:
    """Say how long the extension took to build."""
    if line is None:
        return "the extension has not been built here"
    if line["status"] != "passed":
        return f"the extension was not built: {line['reason'].splitlines()[0]}"
    return f"the extension took {line['found']['build_s']} s to build and has {line['found']['bytes']} bytes"


def failures(result: Mapping[str, Any], steps: Sequence[str]) -> list[Line]:
    """Give what did not pass in some steps: step, task and reason. A rival may crash; it is no failure of ours."""
    found = [
        {"step": step, "task": task, "reason": reason}
        for step, of in result["checks"].items()
        if step in steps
        for status in ("failed", "timed out")
        for task, reason in of.get(status, {}).items()
        if not task.startswith("rival ")
    ]
    for entry in result["measurements"] if set(SPEED).intersection(steps) else ():
        reason = entry.get("failed") or entry.get("timed out")
        wrong = entry.get("agrees", True)
        if entry["contender"] in OURS and (reason or wrong is not True):
            task = "/".join(entry[key] for key in ("case", "direction", "dtype", "contender"))
            found.append({"step": SPEED[0], "task": task, "reason": reason or wrong})
    return found

"""Pictures of benchmark runs: speed-ups, the roofline, the crossover and growth, with machine, versions and date."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from benchmarks import growth_report
from benchmarks.shapes import CROSSOVER, TITLES
from benchmarks.summary import OURS, Group, describe_machine, groups_of, short, times_ours
from benchmarks.verdicts import best_rival, ours_of

# Of the bars: the first six of which there is a result, in float32.
CASES = (
    "swin_t_stage1_shifted",
    "swin_t_stage3",
    "swinunetr_stage1_shifted",
    "temporal_8_frames",
    "spatial_cls_8_frames",
    "xvit_b_div8",
    "temporal_32_frames",
)
COUNT = 6
PANELS = {"forward": "Inference", "forward_backward": "Training (forward and backward)"}
RIVALS = {"eager": "#9a9a9a", "sdpa": "#e0a030", "compiled": "#4f8fc0"}
COLOURS = {**RIVALS, OURS: "#b03030"}
FAMILIES = {"window3d": "#3b6ea8", "divided": "#b5651d", "mixing": "#4c9a52", "models": "#7d5ba6", "shift": "#888888"}
AXES = ("frames", "resolution", "window", "batch", "head_dim", "threads")
Result = Mapping[str, Any]


def _figure(result: Result, says: str, width: float, height: float) -> Figure:
    matplotlib.rcParams["svg.hashsalt"] = "vidattn"  # the same picture is the same file
    matplotlib.rcParams["svg.fonttype"] = "none"  # text is text
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.supxlabel(f"{says}\n{describe_machine(result['machine'])}, {result['date']}", fontsize=9)
    return figure


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else {})


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)


def speed(result: Result, path: Path) -> bool:
    """Draw how many times as long rivals take in some cases; False, and no file, without such a case."""
    groups: dict[tuple[str, str], Group] = {}
    for group in groups_of(result["benchmarks"]).values():
        info = next(iter(group.values()))["info"]
        at_full = info["threads"] == result["machine"]["threads"]
        if OURS in group and len(group) > 1 and info["dtype"] == "float32" and at_full:
            groups[info["case"], info["direction"]] = group
    cases = [case for case in CASES if any((case, direction) in groups for direction in PANELS)][:COUNT]
    if not cases:
        return False
    says = "times as long as vidattn takes (longer bars: vidattn is faster); float32, median over interleaved rounds"
    figure = _figure(result, says, 11, 1.4 + 0.75 * len(cases))
    panels = figure.subplots(1, len(PANELS), sharex=True, sharey=True)
    for axes, (direction, title) in zip(panels, PANELS.items()):
        axes.set_title(title)
        for place, case in enumerate(cases):
            group = groups.get((case, direction), {})
            if not group:
                axes.text(1.05, place, "not in this run", va="center", fontsize=8, color="#777777")
            for offset, (rival, colour) in enumerate(RIVALS.items()):
                times = times_ours(group, rival)
                if times is not None:
                    height = place + 0.27 * (offset - 1)
                    axes.barh(height, times, 0.25, color=colour)
                    axes.text(times, height, f" {short(times)}", va="center", fontsize=8)
        axes.axvline(1.0, color=COLOURS[OURS])
        axes.set_yticks(range(len(cases)), [TITLES.get(case, case) for case in cases])
        _plain(axes)
    panels[0].invert_yaxis()
    panels[0].set_xlim(left=0)
    panels[0].margins(x=0.1)
    bars = [Patch(color=colour, label=TITLES.get(name, name)) for name, colour in RIVALS.items()]
    ours = Line2D([], [], color=COLOURS[OURS], label="vidattn = 1")
    figure.legend(handles=[*bars, ours], loc="outside upper center", ncols=len(bars) + 1, frameon=False)
    _save(figure, path)
    return True


def _float32(result: Result, direction: str) -> list[tuple[str, dict[str, Any]]]:
    """Give (family, info) of the float32 cases of ours on all threads."""
    return [
        (entry["group"].partition("/")[0], entry["info"])
        for entry in ours_of(result)
        if entry["info"]["dtype"] == "float32"
        and entry["info"]["direction"] == direction
        and entry["info"]["threads"] == result["machine"]["threads"]
    ]


def cases(result: Result, path: Path) -> bool:
    """Draw each case's best rival, with the interval of the median, slowest of ours first."""
    drawn = {}
    for direction in PANELS:
        found = [(family, best_rival(info)) for family, info in _float32(result, direction)]
        drawn[direction] = sorted(((r, f) for f, r in found if r), key=lambda pair: pair[0].median)
    if not any(drawn.values()):
        return False
    says = "every case in float32 beside its best rival, by speed-up; thin lines: 95 % interval of the median"
    figure = _figure(result, says, 11, 4.2)
    panels = figure.subplots(1, len(PANELS), sharey=True)
    for axes, (direction, title) in zip(panels, PANELS.items()):
        axes.set_title(f"{title}: {len(drawn[direction])} cases")
        for place, (rival, family) in enumerate(drawn[direction]):
            colour = FAMILIES.get(family, "#888888")
            axes.plot([place, place], [rival.low, rival.high], color=colour, linewidth=0.8)
            axes.plot(place, rival.median, "o", color=colour, markersize=3)
        axes.axhline(1.0, color=COLOURS[OURS])
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_xticks([])
        _plain(axes)
    panels[0].set_ylabel("times the speed of the best rival")
    _legend_of_families(figure)
    _save(figure, path)
    return True


def _legend_of_families(figure: Figure) -> None:
    names = {"window3d": "windows", "divided": "time and space", "mixing": "mixing"}
    handles = [Patch(color=FAMILIES[family], label=name) for family, name in names.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False)


def roofline(result: Result, path: Path) -> bool:
    """Draw operations a second over operations a byte, under the roofs of the machine."""
    points = [
        (family, direction, info)
        for direction in PANELS
        for family, info in _float32(result, direction)
        if "fma_gflops" in info and info.get("bytes") and info["flops"]
    ]
    if not points:
        return False
    says = "each point a float32 case; operations count the scores that no mask separates, bytes each tensor once"
    figure = _figure(result, says, 9, 5)
    axes = figure.subplots()
    intensities = []
    for family, direction, info in points:
        flops = info["flops"] * info["visible"]
        intensity = flops / info["bytes"]
        intensities.append(intensity)
        seconds = info["limit_seconds"] / info["share_of_limit"]["median"]
        marker = "o" if direction == "forward" else "^"
        axes.plot(intensity, flops / seconds * 1e-9, marker, color=FAMILIES.get(family, "#888888"), markersize=4)
    rates = {name: _median([info[name] for *_, info in points]) for name in ("fma_gflops", "gemm_gflops")}
    copy = _median([info["copy_gigabytes_per_second"] for *_, info in points])
    across = [min(intensities) / 1.5, max(intensities) * 1.5]
    knee = rates["fma_gflops"] / copy
    roof = sorted({*across, min(max(knee, across[0]), across[1])})
    axes.plot(roof, [min(rates["fma_gflops"], copy * x) for x in roof], color="#333333")
    axes.axhline(rates["gemm_gflops"], color="#333333", linestyle="--", linewidth=0.8)
    axes.text(across[1], rates["fma_gflops"], "multiply-adds on registers", ha="right", va="bottom", fontsize=8)
    axes.text(across[1], rates["gemm_gflops"], "gemm", ha="right", va="top", fontsize=8)
    axes.text(across[0], copy * across[0], " copy", va="top", fontsize=8)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("operations a byte (circles: inference, triangles: training)")
    axes.set_ylabel("GFLOP/s")
    _plain(axes)
    _legend_of_families(figure)
    _save(figure, path)
    return True


def _median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]


def crossover(result: Result, path: Path) -> bool:
    """Draw the time of sequences of all lengths, as a multiple of ours."""
    names = {f"sequences_of_{length}": length for length in CROSSOVER}
    found = {
        direction: sorted(
            (names[info["case"]], info) for _, info in _float32(result, direction) if info["case"] in names
        )
        for direction in PANELS
    }
    if not any(found.values()):
        return False
    says = "plain sequences of 12 heads x 64, some 4,096 tokens, float32; above the line vidattn is faster"
    figure = _figure(result, says, 11, 3.8)
    for axes, (direction, title) in zip(figure.subplots(1, len(PANELS), sharey=True), PANELS.items()):
        axes.set_title(title)
        axes.axhline(1.0, color=COLOURS[OURS])
        for rival, colour in RIVALS.items():
            line = [
                (length, info["speedup_over"][rival]["median"])
                for length, info in found[direction]
                if rival in info["speedup_over"]
            ]
            if line:
                axes.plot(*zip(*line), "o-", color=colour, markersize=4, label=TITLES.get(rival, rival))
        _log_axes(axes, CROSSOVER)
        axes.set_xlabel("tokens of a sequence")
        axes.legend(frameon=False)
        _plain(axes)
    _save(figure, path)
    return True


def _log_axes(axes: Axes, sizes: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    many = len(sizes) > 8
    axes.set_xticks(list(sizes), [str(size) for size in sizes], rotation=60 if many else 0, fontsize=8 if many else 10)
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")


def growth(result: Result, path: Path, quantity: str, direction: str = "forward_backward") -> bool:
    """Draw how time ("seconds") or peak memory ("peaks") grows; a cross is where memory did not suffice."""
    found = [curve for curve in growth_report.curves(result) if curve.direction == direction]
    if not found:
        return False
    what, unit, scale = ("time", "ms", 1e3) if quantity == "seconds" else ("peak memory of a call", "MiB", 2**-20)
    ops = list(dict.fromkeys(curve.of.op for curve in found))
    columns = [axis for axis in AXES if any(curve.of.axis == axis for curve in found)]
    says = f"{what}, {TITLES.get(direction, direction)}, float32; dashed: the limit; a cross: more memory than allowed"
    figure = _figure(result, says, 2.6 * len(columns) + 1, 2.3 * len(ops) + 1)
    panels = figure.subplots(len(ops), len(columns), squeeze=False)
    for row, op in zip(panels, ops):
        for axes, axis in zip(row, columns):
            (curve,) = [curve for curve in found if (curve.of.op, curve.of.axis) == (op, axis)] or [None]
            if curve is None:
                axes.set_visible(False)
                continue
            lines: dict[str, dict[int, float]] = getattr(curve, quantity)
            top = max((value for line in lines.values() for value in line.values()), default=1.0) * scale
            for contender, colour in COLOURS.items():
                line = sorted(lines.get(contender, {}).items())
                axes.plot([size for size, _ in line], [value * scale for _, value in line], "o-", color=colour, ms=3)
                lost = [size for size, reason in curve.lost.get(contender, {}).items() if "memory" in reason]
                axes.plot(lost, [2 * top] * len(lost), "x", color=colour)
            if quantity == "seconds" and curve.limits:
                sizes = sorted(curve.limits)
                axes.plot(sizes, [curve.limits[size] * scale for size in sizes], "--", color="#333333", linewidth=0.8)
            _log_axes(axes, list(curve.of.cases))
            axes.set_title(f"{op}: {axis}", fontsize=9)
            axes.tick_params(labelsize=7)
            _plain(axes)
        row[0].set_ylabel(unit)
    handles = [Line2D([], [], color=colour, label=TITLES.get(name, name)) for name, colour in COLOURS.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False)
    _save(figure, path)
    return True


def draw_all(results: Sequence[Result], folder: Path) -> list[Path]:
    """Draw all that results show.

    Args:
        results: what ``report.load`` gives.
        folder: where the pictures go; their names end in the instruction set.

    Returns:
        The files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for result in results:
        isa = result["machine"].get("cpu_isa", "cpu")
        todo: dict[str, Callable[[Result, Path], bool]] = {
            "speed": speed,
            "cases": cases,
            "roofline": roofline,
            "crossover": crossover,
            "growth-time": lambda result, path: growth(result, path, "seconds"),
            "growth-memory": lambda result, path: growth(result, path, "peaks"),
        }
        for name, draw in todo.items():
            path = folder / f"{name}-{isa}.svg"
            if draw(result, path):
                drawn.append(path)
    return drawn

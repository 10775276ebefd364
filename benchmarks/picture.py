"""A picture of a benchmark run: times vidattn against its rivals, inference beside training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.lines
import matplotlib.patches
from matplotlib.figure import Figure

from benchmarks.shapes import TITLES
from benchmarks.summary import OURS, Group, describe_machine, groups_of, short, times_ours

# The first six of which there is a result, in float32.
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


def draw(result: dict[str, Any], path: Path) -> bool:
    """Draw a result.

    Args:
        result: what ``report.clean`` returns.
        path: file to write; its ending says in which format.

    Returns:
        False, and no file, if no case has vidattn and a rival.
    """
    groups: dict[tuple[str, str], Group] = {}
    for group in groups_of(result["benchmarks"]).values():
        info = next(iter(group.values()))["info"]
        if OURS in group and len(group) > 1 and info["dtype"] == "float32":
            groups[info["case"], info["direction"]] = group
    cases = [case for case in CASES if any((case, direction) in groups for direction in PANELS)][:COUNT]
    if not cases:
        return False
    matplotlib.rcParams["svg.hashsalt"] = "vidattn"  # the same picture is the same file
    figure = Figure(figsize=(11, 1.4 + 0.75 * len(cases)), layout="constrained")
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
        axes.axvline(1.0, color="#b03030")
        axes.set_yticks(range(len(cases)), [TITLES.get(case, case) for case in cases])
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].invert_yaxis()
    panels[0].set_xlim(left=0)
    panels[0].margins(x=0.1)
    bars = [matplotlib.patches.Patch(color=colour, label=TITLES.get(name, name)) for name, colour in RIVALS.items()]
    ours = matplotlib.lines.Line2D([], [], color="#b03030", label="vidattn = 1")
    figure.legend(handles=[*bars, ours], loc="outside upper center", ncols=len(bars) + 1, frameon=False)
    figure.supxlabel(
        "times as long as vidattn takes (longer bars: vidattn is faster); float32, median over interleaved rounds\n"
        f"{describe_machine(result['machine'])}, {result['date']}",
        fontsize=9,
    )
    figure.savefig(path, dpi=150)
    return True

"""The table made for reading: a row for each case, a column for each contender."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.shapes import TITLES

OURS = "vidattn"
# In the order of the columns.
CONTENDERS = (
    "eager", "sdpa", "sdpa_prebuilt", "compiled", "compiled_sdpa", "flex", "flash_attn", "xformers", "natten",
    "vidattn", "vidattn_compiled", "vidattn_float32",
)  # fmt: skip
Group = dict[str, dict[str, Any]]


def groups_of(entries: Sequence[dict[str, Any]]) -> dict[str, Group]:
    """Sort the entries of a result by group and contender."""
    groups: dict[str, Group] = {}
    for entry in entries:
        groups.setdefault(entry["group"], {})[entry["info"]["contender"]] = entry
    return groups


def describe_machine(machine: Mapping[str, Any]) -> str:
    """Name processor, threads and versions in one line."""
    device = f"{machine['device']}, beside " if "device" in machine else ""
    torch_isa = f" for {machine['torch_isa']}" if "torch_isa" in machine else ""
    return (
        f"{device}{machine['processor']}, {machine.get('threads', '?')} threads of {machine.get('cores', '?')} cores, "
        f"{machine.get('cpu_isa', '?')} kernels, torch {machine.get('torch', '?')}{torch_isa}, "
        f"Python {machine.get('python_version', '?')}, vidattn {machine.get('vidattn', '?')}"
    )


def short(number: float) -> str:
    """Write a positive number with two or three digits that count."""
    return f"{number:.0f}" if number >= 99.5 else f"{number:.1f}" if number >= 9.95 else f"{number:.2f}"


def times_ours(group: Group, contender: str) -> float | None:
    """Say how many times as long a contender takes as vidattn: the median over the rounds; None without both."""
    if OURS not in group or contender not in group:
        return None
    if contender == OURS:
        return 1.0
    ratio = group[OURS]["info"]["speedup_over"].get(contender)
    return None if ratio is None else ratio["median"]


def bound_of(group: Group) -> str:
    """Name the rate that a case is measured by: the one of "gemm" and "copy" at which its minimum takes longer."""
    info = next(iter(group.values()))["info"]
    least_gemm = info["flops"] / (info["gemm_gflops"] * 1e9) if "gemm_gflops" in info else 0.0
    least_copy = info.get("bytes", 0) / (info.get("copy_gigabytes_per_second", 1.0) * 1e9)
    return "copy" if least_copy > least_gemm else "gemm"


def _cell(group: Group, contender: str) -> list[str]:
    """Write what is known of a contender, the time in the first line."""
    if contender not in group:
        return [""]
    info, median = group[contender]["info"], group[contender]["stats"]["median"]
    times = times_ours(group, contender)
    lines = [f"{short(median * 1e3)} ms" + (f"  {short(times)}x" if times and contender != OURS else "")]
    lines += [f"{short(info['flops'] / median * 1e-9)} GFLOP/s"] if info["flops"] else []
    for rate in (bound_of(group), "limit"):
        share = info.get(f"share_of_{rate}")
        lines += [f"{share['median']:.0%} of {rate}"] if share else []
    peak = info.get("peak_extra_bytes")
    return lines if peak is None else [*lines, f"{short(peak / 2**20)} MiB"]


def render(entries: Sequence[dict[str, Any]], machine: Mapping[str, Any], *, bold: bool, width: int = 160) -> str:
    """Lay out a result for the terminal.

    Args:
        entries: ``benchmarks`` of a result as ``report.clean`` gives it.
        machine: ``machine`` of it.
        bold: the terminal shows bold; else the fastest is marked by a star.
        width: columns of the terminal.

    Returns:
        Lines of text.
    """
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

    groups = groups_of(entries)
    names = [name for name in CONTENDERS if any(name in group for group in groups.values())]
    table = Table(
        Column("case", max_width=30), *(TITLES.get(name, name) for name in names), "gemm", "copy", show_lines=True
    )
    for group in groups.values():
        info = next(iter(group.values()))["info"]
        case, direction = (TITLES.get(info[part], info[part]) for part in ("case", "direction"))
        fastest = min((name for name in names if name in group), key=lambda name: group[name]["stats"]["median"])
        cells = []
        for name in names:
            time, *rest = _cell(group, name)
            time += "" if bold or name != fastest else " *"
            cells.append(Text("\n".join([time, *rest])))
            if bold and name == fastest:
                cells[-1].stylize("bold", 0, len(time))
        gemm = f"{short(info['gemm_gflops'])}\nGFLOP/s" if "gemm_gflops" in info else ""
        rates = gemm, f"{short(info['copy_gigabytes_per_second'])}\nGB/s"
        table.add_row(f"{case}\n{direction}\n{info['dtype']}", *cells, *rates)

    worst: dict[str, float] = {}
    for info in (entry["info"] for entry in entries):
        worst[info["dtype"]] = max(worst.get(info["dtype"], 0.0), info["error"])
    errors = ", ".join(f"{error:.0e} of the maximum in {dtype}" for dtype, error in worst.items())
    console = Console(file=io.StringIO(), force_terminal=bold, width=width, highlight=False)
    console.print(describe_machine(machine))
    console.print(
        f"Every output was compared with the float64 reference before it was timed; the largest error was {errors}."
    )
    console.print(table)
    console.print(
        f"Medians over interleaved rounds; the fastest is {'bold' if bold else 'marked *'}. 2.00x: takes 2.00 times as "
        "long as vidattn in the same round. GFLOP/s and shares count all scores, also those that a shifted window "
        "masks. gemm (2048 x 2048) and copy: the best of the same rounds; a share is of the one that sets "
        "the pace, and of the limit: the time that multiply-adds and exponentials on registers, or copying each tensor "
        "once, would take. MiB: what a call adds to memory at its peak, its result included."
    )
    reasons = {
        (group, name): reason
        for group, contenders in groups.items()
        for name, reason in next(iter(contenders.values()))["info"].get("not_run", {}).items()
    }
    for (group, name), reason in reasons.items():
        console.print(f"Not run: {group}, {TITLES.get(name, name)}: {reason}", markup=False)
    return console.file.getvalue().rstrip("\n")  # type: ignore[attr-defined]

"""Tables and a picture of a benchmark run: ``python -m benchmarks.report RESULT.json``.

Reads what ``pytest benchmarks/ --benchmark-only --benchmark-json=RESULT.json`` wrote, prints Markdown tables and draws
``RESULT.png``. ``--save`` keeps the numbers as ``benchmarks/results/<processor>-<date>.json``, without the name of the
host, the user or the commit; ``--targets`` compares them with what the project wants to reach.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

from benchmarks.shapes import TITLES
from benchmarks.summary import CONTENDERS, OURS, Group, describe_machine, groups_of
from benchmarks.targets import judge

RESULTS = Path(__file__).parent / "results"
FAMILIES = {
    "window3d": "Attention in (shifted) windows",
    "divided": "Attention over time and over space",
    "mixing": "Space-time mixing attention",
    "shift": "Temporal shift alone",
    "models": "Whole models",
}
MEMORY = (OURS, "eager", "sdpa", "compiled")


def clean_machine(machine_info: dict[str, Any]) -> dict[str, Any]:
    """Keep of pytest-benchmark's description of the machine what explains the numbers."""
    processor = machine_info.get("cpu", {}).get("brand_raw") or machine_info.get("processor") or "unknown"
    kept = ("cores", "threads", "cpu_isa", "device", "platform", "python_version", "torch", "vidattn")
    return {"processor": processor} | {key: machine_info[key] for key in kept if key in machine_info}


def clean(raw: dict[str, Any]) -> dict[str, Any]:
    """Keep the numbers of a pytest-benchmark result, and of the machine only what explains them.

    Args:
        raw: the JSON of pytest-benchmark, or a result of this function.

    Returns:
        ``machine``, ``date`` and ``benchmarks``: per benchmark ``group``, ``stats`` (seconds) and ``info``.
    """
    if "machine_info" not in raw:
        return raw
    return {
        "machine": clean_machine(raw["machine_info"]),
        "date": raw["datetime"][:10],
        "benchmarks": [
            {
                "group": benchmark["group"],
                "stats": {key: benchmark["stats"][key] for key in ("min", "median", "iqr", "rounds")},
                "info": benchmark["extra_info"],
            }
            for benchmark in raw["benchmarks"]
        ],
    }


def file_name(result: dict[str, Any]) -> str:
    """Name a cleaned result after the processor, the cores and the date: ``amd-epyc-9b14-2-cores-2026-01-31.json``."""
    machine = result["machine"]
    words = f"{machine['processor']} {machine.get('cores', '')} cores"
    return f"{re.sub(r'[^a-z0-9]+', '-', words.lower()).strip('-')}-{result['date']}.json"


def _row(group: Group) -> dict[str, str]:
    """Write the cells of a group that has a result of ours."""
    stats, info = group[OURS]["stats"], group[OURS]["info"]
    case, direction = (TITLES.get(info[part], info[part]) for part in ("case", "direction"))
    row = {"case": f"{case}, {direction}", "vidattn, ms": f"{stats['min'] * 1e3:.1f} / {stats['median'] * 1e3:.1f}"}
    for name in CONTENDERS:
        ratio = info["speedup_over"].get(name)
        if name != OURS:
            row[TITLES.get(name, name)] = f"{ratio['min']:.2f} / {ratio['median']:.2f}" if ratio else ""
    for rate in ("gemm", "copy"):
        share = info.get(f"share_of_{rate}")  # results before 2026-11-21 have none of copy
        counted = share and (info["flops"] or rate == "copy")
        row[f"share of {rate} rate"] = f"{share['min']:.0%} / {share['median']:.0%}" if counted else ""
    peaks = [group[name]["info"].get("peak_extra_bytes") if name in group else None for name in MEMORY]
    shown = ["-" if peak is None else f"{peak / 2**20:.0f}" for peak in peaks]
    row[f"MiB: {' / '.join(TITLES.get(name, name) for name in MEMORY)}"] = " / ".join(shown) if any(peaks) else ""
    return row


def _table(rows: list[dict[str, str]]) -> str:
    """Lay out rows, without the columns that are empty everywhere."""
    used = [heading for heading in rows[0] if any(row[heading] for row in rows)]
    lines = [used, ["---"] * len(used), *([row[heading] for heading in used] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def tables(result: dict[str, Any]) -> str:
    """Write the Markdown tables of a cleaned result.

    Args:
        result: what ``clean`` returns.

    Returns:
        One table for each family and dtype; pairs of numbers are best rounds / median over the rounds.
    """
    rows: dict[tuple[str, str], list[dict[str, str]]] = {}
    for name, group in groups_of(result["benchmarks"]).items():
        if OURS in group:
            heading = name.partition("/")[0], group[OURS]["info"]["dtype"]
            rows.setdefault(heading, []).append(_row(group))
    parts = [
        f"{describe_machine(result['machine'])}, {result['date']}. Pairs are best rounds / median over interleaved "
        "rounds; under the name of a rival stands how many times as fast vidattn is; memory is what a call adds at its "
        "peak, its result included."
    ]
    parts += [
        f"### {FAMILIES.get(family, family)}, {dtype}\n\n{_table(lines)}" for (family, dtype), lines in rows.items()
    ]
    return "\n\n".join(parts)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("result", type=Path, help="JSON file of pytest-benchmark, or one that --save wrote")
    parser.add_argument("--save", action="store_true", help=f"keep the cleaned numbers in {RESULTS.name}/")
    parser.add_argument("--targets", action="store_true", help="say which of the project's targets are reached")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="where the picture goes (default: RESULT.png)")
    options = parser.parse_args(arguments)
    try:
        result = clean(json.loads(options.result.read_text()))
        print(tables(result))
    except (OSError, ValueError, KeyError, TypeError) as error:
        parser.exit(2, f"{parser.prog}: expected a result of pytest-benchmark, got {options.result} ({error!r})\n")
    if options.targets:
        ours = [entry["info"] for entry in result["benchmarks"] if entry["info"]["contender"] == OURS]
        print("\n" + "\n".join(line for info in ours for line in judge(info)))
    if options.save:
        RESULTS.mkdir(exist_ok=True)
        target = RESULTS / file_name(result)
        target.write_text(json.dumps(result, indent=1) + "\n")
        print(f"\nsaved as {target.relative_to(Path.cwd()) if target.is_relative_to(Path.cwd()) else target}")
    if importlib.util.find_spec("matplotlib") is None:
        print("\nno picture: matplotlib is not installed")
        return
    from benchmarks.picture import draw

    picture = options.picture or options.result.with_suffix(".png")
    print(f"\npicture: {picture}" if draw(result, picture) else "\nno picture: it has no case with a rival")


if __name__ == "__main__":
    main()

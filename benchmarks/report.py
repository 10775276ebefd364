"""Summary of a benchmark run: ``python -m benchmarks.report RESULT.json [--save]``.

Reads what ``pytest benchmarks/ --benchmark-json=RESULT.json`` wrote and prints Markdown tables: time, shares of the
rates of a matrix product and of a copy in the same rounds, ratios to the rivals, peak memory, and the project's
targets. ``--save`` keeps the numbers as ``benchmarks/results/<processor>-<date>.json``, without the name of the host,
the user or the commit.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
OURS = "vidattn"

# What two AVX-512 cores are to reach, by case, direction and dtype. "best" is the faster of SDPA and compiled eager,
# "rivals" the fastest of the three.
TARGETS: dict[tuple[str, str, str], dict[str, float]] = {
    ("swin_t_stage1", "forward", "float32"): {"gemm": 0.75, "eager": 5.0, "best": 1.6},
    ("swin_t_stage1_shifted", "forward", "float32"): {"gemm": 0.75, "eager": 7.0, "best": 4.0},
    ("swin_t_stage3", "forward", "float32"): {"gemm": 0.75, "best": 1.5},
    ("swin_t_stage3_shifted", "forward", "float32"): {"gemm": 0.75, "best": 1.5},
    ("swin_t_stage1", "forward_backward", "float32"): {"gemm": 0.65, "eager": 3.2, "best": 2.2},
    ("swin_t_stage1_shifted", "forward_backward", "float32"): {"gemm": 0.65, "eager": 4.0, "best": 2.2},
    ("swin_t_stage3", "forward_backward", "float32"): {"gemm": 0.65, "best": 1.8},
    ("swin_t_stage3_shifted", "forward_backward", "float32"): {"gemm": 0.65, "best": 1.8},
    **{
        (f"swin_t_stage{stage}{shifted}", direction, "bfloat16"): {"float32": target}
        for stage in (1, 3)
        for shifted in ("", "_shifted")
        for direction, target in (("forward", 1.5), ("forward_backward", 1.4))
    },
    ("video_swin_t_32x224x224", "inference", "float32"): {"eager": 1.5},
    ("temporal_8_frames", "forward", "float32"): {"copy": 0.6, "rivals": 3.0},
    ("temporal_8_frames", "forward_backward", "float32"): {"rivals": 2.5},
    ("temporal_8_frames", "forward", "bfloat16"): {"rivals": 2.0},
    ("temporal_32_frames", "forward", "float32"): {"rivals": 1.8},
    ("temporal_32_frames", "forward_backward", "float32"): {"rivals": 2.0},
    ("temporal_32_frames", "forward", "bfloat16"): {"rivals": 1.5},
    ("temporal_96_frames", "forward", "float32"): {"rivals": 1.35},
    ("temporal_96_frames", "forward_backward", "float32"): {"rivals": 1.6},
    ("temporal_96_frames", "forward", "bfloat16"): {"rivals": 1.3},
    ("spatial_cls_8_frames", "forward", "float32"): {"gemm": 0.7, "rivals": 1.3},
    ("spatial_cls_8_frames", "forward_backward", "float32"): {"rivals": 1.15},
    ("spatial_cls_8_frames", "forward", "bfloat16"): {"rivals": 1.1},
    ("factorized_vivit_b", "forward", "float32"): {"rivals": 1.4},
    ("factorized_vivit_b", "forward_backward", "float32"): {"rivals": 1.4},
    ("factorized_vivit_b", "forward", "bfloat16"): {"rivals": 1.3},
}
# Column heading, key in TARGETS, contenders to compare with: the fastest of them counts, once all are measured.
RATIOS = (
    ("vs eager", "eager", ("eager",)),
    ("vs SDPA", "sdpa", ("sdpa",)),
    ("vs SDPA, mask prebuilt", "prebuilt", ("sdpa_prebuilt",)),
    ("vs compiled", "compiled", ("compiled",)),
    ("vs best of SDPA and compiled", "best", ("sdpa", "compiled")),
    ("vs best of the three", "rivals", ("eager", "sdpa", "compiled")),
    ("vs own float32", "float32", ("vidattn_float32",)),
)
MEMORY = (("vidattn, MiB", OURS), ("eager, MiB", "eager"), ("SDPA, MiB", "sdpa"), ("compiled, MiB", "compiled"))
TITLES = {
    "forward": "Forward",
    "forward_backward": "Forward and backward",
    "inference": "Inference of whole models",
    "training": "Training steps of whole models",
}


def clean(raw: dict[str, Any]) -> dict[str, Any]:
    """Keep the numbers of a pytest-benchmark result, and of the machine only what explains them.

    Args:
        raw: the JSON of pytest-benchmark, or a result of this function.

    Returns:
        ``machine``, ``date`` and ``benchmarks``: per benchmark ``group``, ``stats`` (seconds) and ``info``.
    """
    if "machine_info" not in raw:
        return raw
    machine, processor = raw["machine_info"], raw["machine_info"].get("cpu", {})
    kept = ("cores", "threads", "cpu_isa", "platform", "python_version", "torch", "vidattn")
    return {
        "machine": {"processor": processor.get("brand_raw") or machine.get("processor") or "unknown"}
        | {key: machine[key] for key in kept if key in machine},
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


def _judged(value: dict[str, float], target: float | None, form: str) -> str:
    """Show best rounds / median, and whether the best rounds reach the target."""
    shown = f"{value['min']:{form}} / {value['median']:{form}}"
    if target is None:
        return shown
    return f"{shown} (target {target:{form}}{'' if value['min'] >= target else ', missed'})"


def _row(group: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Write the cells of a group that has a result of ours."""
    stats, info = group[OURS]["stats"], group[OURS]["info"]
    targets = TARGETS.get((info["case"], info["direction"], info["dtype"]), {})
    row = {
        "case": info["case"],
        "dtype": info["dtype"],
        "vidattn, ms": f"{stats['min'] * 1e3:.1f} / {stats['median'] * 1e3:.1f}",
        "share of gemm rate": _judged(info["share_of_gemm"], targets.get("gemm"), ".0%"),
        "share of copy rate": "",
    }
    if "share_of_copy" in info:  # results before 2026-11-21 have none
        row["share of copy rate"] = _judged(info["share_of_copy"], targets.get("copy"), ".0%")
    for heading, target, rivals in RATIOS:
        row[heading] = ""
        if set(rivals) <= set(info["speedup_over"]):
            ratios = [info["speedup_over"][rival] for rival in rivals]
            least = {key: min(ratio[key] for ratio in ratios) for key in ("min", "median")}
            row[heading] = _judged(least, targets.get(target), ".2f")
    for heading, contender in MEMORY:
        peak = group[contender]["info"].get("peak_extra_bytes") if contender in group else None
        row[heading] = "" if peak is None else f"{peak / 2**20:.0f}"
    return row


def _table(rows: list[dict[str, str]]) -> str:
    """Lay out rows, without the columns that are empty everywhere."""
    used = [heading for heading in rows[0] if any(row[heading] for row in rows)]
    lines = [used, ["---"] * len(used), *([row[heading] for heading in used] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def tables(result: dict[str, Any]) -> str:
    """Write the Markdown tables of a cleaned result.

    Args:
        result: what :func:`clean` returns.

    Returns:
        One table for each direction; pairs of numbers are best rounds / median over the rounds.
    """
    groups: dict[str, dict[str, dict[str, Any]]] = {}
    for benchmark in result["benchmarks"]:
        groups.setdefault(benchmark["group"], {})[benchmark["info"]["contender"]] = benchmark
    machine = result["machine"]
    parts = [
        f"{machine['processor']}, {machine.get('threads', '?')} threads, {machine.get('cpu_isa', '?')} kernels, "
        f"torch {machine.get('torch', '?')}, {result['date']}. Pairs are best rounds / median over interleaved rounds; "
        "ratios say how many times as fast vidattn is; memory is what the call adds at its peak, its result included."
    ]
    for direction, title in TITLES.items():
        rows = [
            _row(group) for group in groups.values() if OURS in group and group[OURS]["info"]["direction"] == direction
        ]
        if rows:
            parts.append(f"### {title}\n\n{_table(rows)}")
    return "\n\n".join(parts)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("result", type=Path, help="JSON file of pytest-benchmark, or one that --save wrote")
    parser.add_argument("--save", action="store_true", help=f"keep the cleaned numbers in {RESULTS.name}/")
    options = parser.parse_args(arguments)
    try:
        result = clean(json.loads(options.result.read_text()))
        print(tables(result))
    except (OSError, ValueError, KeyError, TypeError) as error:
        parser.exit(2, f"{parser.prog}: expected a result of pytest-benchmark, got {options.result} ({error!r})\n")
    if options.save:
        RESULTS.mkdir(exist_ok=True)
        target = RESULTS / file_name(result)
        target.write_text(json.dumps(result, indent=1) + "\n")
        print(f"\nsaved as {target.relative_to(Path.cwd()) if target.is_relative_to(Path.cwd()) else target}")


if __name__ == "__main__":
    main()

"""Tables and pictures of benchmark runs: ``python -m benchmarks.report RESULT.json ...``.

Reads what ``pytest benchmarks/ --benchmark-only`` wrote (``--full`` into a file of its own, else by
``--benchmark-json=RESULT.json``) and what ``python -m benchmarks.growth`` did. Prints Markdown tables and which cases
are slower than their best rival beyond the noise. ``--pictures FOLDER`` draws; ``--compare OLD NEW`` says what changed;
``--save`` keeps the numbers under ``benchmarks/results/``, without the name of the host, the user or the commit, from
which ``python -m benchmarks.page`` makes docs/performance.md; ``--targets`` compares them with what the project wants
to reach.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from benchmarks import growth_report, machine, store
from benchmarks.shapes import TITLES
from benchmarks.summary import CONTENDERS, OURS, Group, describe_machine, groups_of
from benchmarks.targets import judge
from benchmarks.verdicts import compare, ours_of, slower

RESULTS = Path(__file__).parent / "results"
OF_A_RIVAL = (
    *("case", "direction", "dtype", "threads", "contender"),
    *("error", "peak_extra_bytes", "not_run"),
)
FAMILIES = {
    "window3d": "Attention in (shifted) windows",
    "divided": "Attention over time and over space",
    "mixing": "Space-time mixing attention",
    "shift": "Temporal shift alone",
    "models": "Whole models",
}
MEMORY = (OURS, "eager", "sdpa", "compiled")
LEGEND = (
    "Pairs are best rounds / median over interleaved rounds; under the name of a rival stands how many times as fast "
    "vidattn is; memory is what a call adds at its peak, its result included. The limit is what multiply-adds and "
    "exponentials on registers, or copying each tensor once, take in the same rounds, whichever takes longer."
)
SHARES = {
    "gemm": "share of gemm rate",
    "copy": "share of copy rate",
    "traffic": "share of its loads and stores",
    "limit": "share of the limit",
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
    return {
        "machine": machine.clean(raw["machine_info"]),
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


def load(path: Path) -> dict[str, Any]:
    """Read a result, cleaned, with the name of its ``file``.

    Raises:
        ValueError: the file is none.
    """
    try:
        result = store.rounded(clean(json.loads(path.read_text()))) | {"file": path.name}
        for entry in result["benchmarks"]:  # older results leave out what all or one kind have in common
            entry["info"] = {"threads": result["machine"].get("threads", 0), "direction": "shift"} | entry["info"]
        describe_machine(result["machine"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"expected a result of a benchmark, got {path} ({error!r})") from None
    return result


def without_repeats(result: dict[str, Any]) -> dict[str, Any]:
    """Leave out of a rival's ``info`` what vidattn's own says of the case."""
    groups = groups_of(result["benchmarks"])
    entries = [
        {**entry, "info": {key: value for key, value in entry["info"].items() if key in OF_A_RIVAL}}
        if OURS in groups[entry["group"]] and entry["info"]["contender"] != OURS
        else entry
        for entry in result["benchmarks"]
    ]
    return {**result, "benchmarks": entries}


def is_growth(result: dict[str, Any]) -> bool:
    """Tell whether a result is one of ``benchmarks.growth``."""
    return any(entry["group"].startswith("growth/") for entry in result["benchmarks"])


def file_name(result: dict[str, Any]) -> str:
    """Name a cleaned result after what it was measured on: ``amd-epyc-9b14-avx512-2-threads-2026-01-31.json``."""
    there = result["machine"]
    words = f"{there['processor']} {there.get('cpu_isa', '')} {there.get('threads', '')} threads"
    kind = "growth-" if is_growth(result) else ""
    return f"{kind}{re.sub(r'[^a-z0-9]+', '-', words.lower()).strip('-')}-{result['date']}.json"


def _row(group: Group) -> dict[str, str]:
    """Write the cells of a group that has a result of ours."""
    stats, info = group[OURS]["stats"], group[OURS]["info"]
    case, direction = (TITLES.get(info[part], info[part]) for part in ("case", "direction"))
    row = {"case": f"{case}, {direction}", "vidattn, ms": f"{stats['min'] * 1e3:.1f} / {stats['median'] * 1e3:.1f}"}
    for name in CONTENDERS:
        ratio = info["speedup_over"].get(name)
        if name != OURS:
            row[TITLES.get(name, name)] = f"{ratio['min']:.2f} / {ratio['median']:.2f}" if ratio else ""
    for rate, heading in SHARES.items():
        share = info.get(f"share_of_{rate}")
        counted = share and (info["flops"] or rate != "gemm")
        row[heading] = f"{share['min']:.0%} / {share['median']:.0%}" if counted else ""
    row["limit, ms"] = f"{info['limit_seconds'] * 1e3:.3g} ({info['limited_by']})" if "limit_seconds" in info else ""
    peaks = [group[name]["info"].get("peak_extra_bytes") if name in group else None for name in MEMORY]
    shown = ["-" if peak is None else f"{peak / 2**20:.0f}" for peak in peaks]
    row[f"MiB: {' / '.join(TITLES.get(name, name) for name in MEMORY)}"] = " / ".join(shown) if any(peaks) else ""
    return row


def _table(rows: list[dict[str, str]]) -> str:
    """Lay out rows, without the columns that are empty everywhere."""
    used = [heading for heading in rows[0] if any(row[heading] for row in rows)]
    lines = [used, ["---"] * len(used), *([row[heading] for heading in used] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def tables(result: dict[str, Any], cases: Collection[str] | None = None) -> str:
    """Write the Markdown tables of a cleaned result.

    Args:
        result: what ``clean`` returns.
        cases: which ones; None for all.

    Returns:
        One table for each family, dtype and number of threads; pairs of numbers are best rounds / median over the
        rounds.
    """
    rows: dict[tuple[str, str, int], list[dict[str, str]]] = {}
    for name, group in groups_of(result["benchmarks"]).items():
        if OURS in group and (cases is None or group[OURS]["info"]["case"] in cases):
            info = group[OURS]["info"]
            rows.setdefault((name.partition("/")[0], info["dtype"], info["threads"]), []).append(_row(group))
    return "\n\n".join(
        f"### {FAMILIES.get(family, family)}, {dtype}, {threads} thread{'s' * (threads != 1)}\n\n{_table(lines)}"
        for (family, dtype, threads), lines in rows.items()
    )


def report(results: Sequence[dict[str, Any]]) -> str:
    """Write all there is to say of results in Markdown."""
    parts = [slower([result for result in results if not is_growth(result)])]
    for result in results:
        parts.append(f"{describe_machine(result['machine'])}, {result['date']}. {LEGEND}")
        parts.append(growth_report.tables(result) if is_growth(result) else tables(result))
    return "\n\n".join(part for part in parts if part)


def _compare(parser: argparse.ArgumentParser, old: Path, new: Path) -> int:
    """Print what changed; give the exit status, 1 if a case is slower."""
    changes = compare(load(old), load(new))
    if not changes:
        parser.error(f"--compare: {old} and {new} have no case in common")
    for case, speed, verdict in changes:
        print(f"{verdict:>8}  {speed:.2f}x  {case}")
    found = [verdict.partition(",")[0] for _, _, verdict in changes]
    counts = {verdict: found.count(verdict) for verdict in ("faster", "slower", "same", "unsure")}
    print(", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count), "beyond the noise")
    return int("slower" in found)


def main(arguments: list[str] | None = None) -> None:
    """Print, compare, draw or keep results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("results", type=Path, nargs="*", help="of pytest-benchmark, --full, growth or --save")
    parser.add_argument("--compare", type=Path, nargs=2, metavar=("OLD", "NEW"), help="say what is faster or slower")
    parser.add_argument("--save", action="store_true", help=f"keep the cleaned numbers in {RESULTS.name}/")
    parser.add_argument("--targets", action="store_true", help="say which of the project's targets are reached")
    parser.add_argument("--pictures", type=Path, metavar="FOLDER", help="draw what the results show")
    options = parser.parse_args(arguments)
    if bool(options.results) == bool(options.compare):
        parser.error("expected results, or --compare with two of them")
    try:
        if options.compare:
            sys.exit(_compare(parser, *options.compare))
        results = [load(path) for path in options.results]
        print(report(results))
    except ValueError as error:
        parser.error(str(error))
    if options.targets:
        ours = [entry["info"] for result in results for entry in ours_of(result)]
        print("\n" + "\n".join(judge(ours)))
    if options.save:
        for result in results:
            target = RESULTS / file_name(result)
            store.write(target, without_repeats(result))
            print(f"\nsaved as {target.relative_to(Path.cwd()) if target.is_relative_to(Path.cwd()) else target}")
    if options.pictures:
        if importlib.util.find_spec("matplotlib") is None:
            parser.error("--pictures: expected matplotlib to be installed")
        from benchmarks.picture import draw_all

        print(
            "\npictures: " + (", ".join(map(str, draw_all(results, options.pictures))) or "none, no case has a rival")
        )


if __name__ == "__main__":
    main()

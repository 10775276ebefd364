"""Makes docs/performance.md, and its pictures, from the results that are kept: ``python -m benchmarks.page``.

Of the CPU the newest result of each instruction set is shown, on the most threads, beside the newest on one thread of
each processor and the newest growth; of GPUs the newest predictions. The words around the numbers are in ``page.md``,
the next steps here.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import growth_report, predicted, report
from benchmarks.cpu_limits import SHORT_FRAMES
from benchmarks.shapes import (
    ALIASES,
    CROSSOVER,
    DIVIDED_CASES,
    GPU_DIVIDED_CASES,
    GPU_MIXING_CASES,
    GPU_OTHER_WINDOW_CASES,
    GPU_WINDOW_CASES,
    MIXING_CASES,
    MODEL_CASES,
    MODULE_CASES,
    NAMED_CASES,
    TITLES,
    WINDOW_CASES,
    DividedCase,
    MixingCase,
    WindowCase,
)
from benchmarks.summary import describe_machine, short
from benchmarks.verdicts import Rival, best_rival, ours_of, slower

WORDS = Path(__file__).with_suffix(".md")
PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
PICTURES = PAGE.with_suffix("")
README_PICTURE = PAGE.with_name("speed.png")
CASES = {**WINDOW_CASES, **DIVIDED_CASES, **MIXING_CASES}
GPU_CASES = {**GPU_WINDOW_CASES, **GPU_OTHER_WINDOW_CASES, **GPU_DIVIDED_CASES, **GPU_MIXING_CASES}
ISAS = {"avx2": "AVX2", "avx512": "AVX-512", "avx512_bf16": "AVX-512 with bfloat16 products", "avx512_amx": "AMX"}
DIRECTIONS = ("forward", "forward_backward")
# Kinds of ops in the order of the tables, and the next step of each, by backend.
NEXT = {
    "windows": {
        "cpu": "overlap the exponentials of one block with the products of the next; keep the key gradients of the "
        "backward pass in registers for longer; leave out more of the masked tiles backward",
        "cuda": "measure on a GPU, then fewer instructions around the products forward, fewer operands from shared "
        "memory backward",
        "triton": "keep keys, values and bias of a window on the chip for all tiles of its queries",
    },
    f"time, up to {SHORT_FRAMES} frames": {
        "cpu": "wait less for memory: rows fetched in the order in which they lie",
        "cuda": "measure on a GPU",
        "triton": "measure on a GPU",
    },
    "time, longer": {
        "cpu": "prefetch in memory order; keys and values of 96 frames packed to fit the first cache",
        "cuda": "measure on a GPU",
        "triton": "read keys and values once",
    },
    "space": {
        "cpu": "overlap exponentials and products",
        "cuda": "measure on a GPU",
        "triton": "read keys and values once",
    },
    "half time, half space": {
        "cpu": "as time and as space",
        "cuda": "measure on a GPU",
        "triton": "read keys and values once",
    },
    "mixing": {
        "cpu": "overlap exponentials and products",
        "cuda": "measure on a GPU",
        "triton": "read keys and values once",
    },
    "temporal shift": {
        "cpu": "less Python around a small copy",
        "cuda": "measure on a GPU",
        "triton": "measure on a GPU",
    },
}
TERMS = {
    "arithmetic": "products and exponentials",
    "l2": "bytes across the L2 cache",
    "shared": "bytes in shared memory",
    "matrix": "matrix products",
}
Result = Mapping[str, Any]


class Shown(NamedTuple):
    """What the page shows of one instruction set: the main result, those of other processors and threads, growth."""

    result: Result
    others: list[Result]
    growth: Result | None


def shown(results: Sequence[Result]) -> list[Shown]:
    """Pick what to show: the newest of each processor, and first of an instruction set the newest on all threads."""
    kept: dict[str, dict[tuple[str, str, int], Result]] = {}
    grown: dict[str, Result] = {}
    for result in sorted(results, key=_age):
        machine = result["machine"]
        isa = "avx512" if machine["cpu_isa"].startswith("avx512") else machine["cpu_isa"]
        if report.is_growth(result):
            grown[isa] = result
        else:
            kept.setdefault(isa, {})[machine["processor"], machine["cpu_isa"], machine["threads"]] = result
    chosen = []
    for isa in sorted(kept, reverse=True):
        *others, result = sorted(kept[isa].values(), key=lambda one: (one["machine"]["threads"] > 1, _age(one)))
        chosen.append(Shown(result, others, grown.get(isa)))
    return chosen


def _age(result: Result) -> tuple[str, int]:
    return result["date"], len(result["benchmarks"])


def kind_of(shape: WindowCase | DividedCase | MixingCase | None, shift: bool) -> str | None:
    """Name the kind of op, a key of ``NEXT``, of a case, or of the shift alone of one; None for a model."""
    if isinstance(shape, WindowCase):
        return "windows"
    if isinstance(shape, MixingCase):
        return "temporal shift" if shift else "mixing"
    if shape is None or shape.kind != "temporal":
        return shape and {"spatial": "space", "factorized": "half time, half space"}[shape.kind]
    return f"time, up to {SHORT_FRAMES} frames" if shape.num_frames <= SHORT_FRAMES else "time, longer"


def _kind(info: Mapping[str, Any]) -> str | None:
    return kind_of(CASES.get(info["case"]), info["direction"] == "shift")


def _infos(result: Result) -> list[dict[str, Any]]:
    """Give vidattn's entries on all threads, in float32 or, without any, in what it was measured in."""
    threads, dtype = result["machine"]["threads"], _dtype(result)
    infos = [entry["info"] for entry in ours_of(result)]
    return [info for info in infos if info["dtype"] == dtype and info["threads"] == threads]


def _dtype(result: Result) -> str:
    dtypes = {entry["info"]["dtype"] for entry in ours_of(result)}
    return min(dtypes - {"float32"}) if dtypes and "float32" not in dtypes else "float32"


def _isa(result: Result) -> str:
    isa: str = result["machine"]["cpu_isa"]
    return ISAS.get(isa, isa) + (", 1 thread" if result["machine"]["threads"] == 1 else "")


def _cpu_name(result: Result) -> str:
    processor = re.sub(r" ?[(]R[)]| Processor", "", result["machine"]["processor"])
    dtype = _dtype(result)
    return f"{processor}, {_isa(result)}" + (f", {dtype}" if dtype != "float32" else "")


def _table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *lines])


def _range(values: Sequence[float], form: str) -> str:
    if not values:
        return ""
    middle, least, most = (form.format(value) for value in (statistics.median(values), min(values), max(values)))
    return middle if least == most else f"{middle} ({least} to {most})"


def _speeds(rivals: Sequence[Rival]) -> str:
    """Write the geometric mean of speed-ups, and the range."""
    if not rivals:
        return ""
    mean = math.exp(statistics.fmean(math.log(rival.median) for rival in rivals))
    least, most = min(rivals, key=lambda rival: rival.median), max(rivals, key=lambda rival: rival.median)
    return short(mean) + (f" ({short(least.median)} to {short(most.median)})" if len(rivals) > 1 else "")


def in_short(results: Sequence[Result]) -> str:
    """Write the table for two minutes: each kind of op against its best rivals, and beside its limit."""
    lines = []
    for result in results:
        kinds: dict[str, list[dict[str, Any]]] = {kind: [] for kind in (*NEXT, "whole models")}
        for info in _infos(result):
            kinds[_kind(info) or "whole models"].append(info)
        for kind, infos in kinds.items():
            cells = [_cpu_name(result), kind]
            cells.append(str(len({info["case"] for info in infos})))
            for direction in DIRECTIONS:
                of = [info for info in infos if _is(info, direction)]
                cells.append(_speeds([rival for info in of if (rival := best_rival(info))]))
                share = "share_of_limit" if any("share_of_limit" in info for info in of) else "share_of_gemm"
                shares = [info[share]["median"] for info in of if share in info and info[share]["median"]]
                cells.append(_range(shares, "{:.0%}") + (" of gemm" if shares and share == "share_of_gemm" else ""))
            if infos:
                lines.append(cells)
    head = ["CPU", "what", "cases", "forward, times the best rival", "of the limit", "with backward", "of the limit"]
    return _table(head, lines)


def _is(info: Mapping[str, Any], direction: str) -> bool:
    same = {"forward": ("forward", "inference", "shift"), "forward_backward": ("forward_backward", "training")}
    return info["direction"] in same[direction]


def limits(results: Sequence[Result], predictions: Mapping[str, Any]) -> str:
    """Write what limits each op on each backend, how near it comes, and the next step."""
    lines = []
    for kind, steps in NEXT.items():
        for result in results:
            infos = [info for info in _infos(result) if _kind(info) == kind and "limited_by" in info]
            both = [
                [(info["limited_by"], info["share_of_limit"]["median"]) for info in infos if _is(info, direction)]
                for direction in DIRECTIONS
            ]
            if infos:
                lines.append([kind, f"cpu, {_cpu_name(result)}", *_bounds(both), steps["cpu"]])
        for backend in ("cuda", "triton"):
            found = [
                case
                for case in predictions["cases"]
                if case["backend"] == backend
                and kind_of(GPU_CASES[case["case"].removesuffix("_shift")], case["case"].endswith("_shift")) == kind
            ]
            both = [
                [
                    (case["by"], case["floor_us"] / case["predicted_us"])
                    for case in found
                    if case["direction"] == direction
                ]
                for direction in ("forward", "backward")
            ]
            if found:
                lines.append([kind, f"{backend}, predicted", *_bounds(both), steps[backend]])
    return _table(["op", "backend", "limit forward", "share", "limit backward", "share", "next step"], lines)


def _bounds(both: Sequence[Sequence[tuple[str, float]]]) -> list[str]:
    """Write what limits most cases, and the shares, of both directions."""
    cells = []
    for found in both:
        cells += [_most(TERMS.get(by, by) for by, _ in found), _range([share for _, share in found], "{:.0%}")]
    return cells


def _most(names: Iterable[str]) -> str:
    """Name what occurs most often, and in how many of how many; nothing of none."""
    counted = Counter(names)
    total = sum(counted.values())
    return "".join(name if count == total else f"{name} ({count} of {total})" for name, count in counted.most_common(1))


def crossover(result: Result) -> str:
    """Say from which length on the best rival is at least as fast; nothing without such cases."""
    names = {f"sequences_of_{length}": length for length in CROSSOVER}
    parts = []
    for direction in DIRECTIONS:
        rivals = {
            names[info["case"]]: best_rival(info)
            for info in _infos(result)
            if info["case"] in names and info["direction"] == direction
        }
        behind = sorted(length for length, rival in rivals.items() if rival and rival.high < 1)
        if rivals:
            where = f"slower than a rival at {', '.join(map(str, behind))} tokens" if behind else "behind at no length"
            parts.append(f"{TITLES.get(direction, direction)}: {where}")
    return f"Plain sequences of {CROSSOVER[0]} to {CROSSOVER[-1]} tokens; {'; '.join(parts)}." if parts else ""


def _picture(name: str, result: Result, says: str) -> str:
    path = PICTURES / f"{name}-{result['machine']['cpu_isa']}.svg"
    return f"![{says}]({path.relative_to(PAGE.parent)})" if path.exists() else ""


def _cpu(one: Shown) -> list[str]:
    result, others, growth = one
    models = {*MODEL_CASES, *MODULE_CASES}
    parts = [
        f"## On a CPU with {_isa(result)}",
        f"{_source(result)} {report.LEGEND}",
        _picture("cases", result, "Every case beside its best rival"),
        _picture("speed", result, "Some cases against three rivals"),
        _picture("roofline", result, "Operations a second under the roofs of the machine"),
        crossover(result),
        _picture("crossover", result, "Sequences of all lengths against rivals"),
        report.tables(result, models),
        report.tables(result, NAMED_CASES),
    ]
    if growth is not None:
        parts += [
            "### Growth",
            f"{describe_machine(growth['machine'])}, {growth['date']}.",
            _picture("growth-time", growth, "How time grows"),
            _picture("growth-memory", growth, "How peak memory grows"),
            _folded("Fitted exponents beside the expected ones", growth_report.tables(growth)),
        ]
    parts.append(_folded("All other cases", report.tables(result, CASES.keys() - {*NAMED_CASES})))
    for other in others:
        ops = _folded("All ops", report.tables(other, {*CASES}))
        parts += [_source(other), crossover(other), report.tables(other, models), ops]
    return parts


def _source(result: Result) -> str:
    """Say where numbers come from."""
    return (
        f"{describe_machine(result['machine'])}, {result['date']}, from "
        f"[{result['file']}](../benchmarks/results/{result['file']})."
    )


def _folded(title: str, text: str) -> str:
    return f"<details>\n<summary>{title}</summary>\n\n{text}\n\n</details>" if text else ""


def render(results: Sequence[Result], predictions: Path) -> str:
    """Write the page.

    Args:
        results: all that are kept, as ``report.load`` gives them.
        predictions: the newest file of them.
    """
    chosen = shown(results)
    of_gpu = json.loads(predictions.read_text())
    everything = [result for one in chosen for result in (one.result, *one.others)]
    return WORDS.read_text().format(
        in_short=in_short(everything),
        slower=slower(everything),
        limits=limits(everything, of_gpu),
        cpus="\n\n".join(part for one in chosen for part in _cpu(one) if part),
        short_frames=SHORT_FRAMES,
        aliases="; ".join(f"{TITLES[first]} is {', '.join(others)} too" for first, others in ALIASES.items()),
        predictions=predictions.name,
        predicted=predicted.tables(of_gpu),
    )


def kept() -> list[Result]:
    """Read the results that are kept, those of CPUs."""
    paths = sorted(path for path in report.RESULTS.glob("*.json") if not path.name.startswith("predicted"))
    return [report.load(path) for path in paths]


def main() -> None:
    """Draw the pictures, then write the page that shows them."""
    from benchmarks import picture

    results = kept()
    for old in PICTURES.glob("*.svg"):
        old.unlink()
    chosen = shown(results)
    for one in chosen:
        picture.draw_all([result for result in (one.result, one.growth) if result], PICTURES)
    picture.speed(chosen[0].result, README_PICTURE)
    PAGE.write_text(render(results, predicted.newest()))


if __name__ == "__main__":
    main()

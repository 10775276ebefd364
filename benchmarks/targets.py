"""What the project wants to reach on a CPU, and whether a result does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.cpu_limits import SHORT_FRAMES
from benchmarks.shapes import DIVIDED_CASES, MIXING_CASES, WINDOW_CASES, DividedCase, WindowCase
from benchmarks.store import Key
from benchmarks.verdicts import best_rival, title

MODELS = {"inference": 2.2, "training": 1.8}  # of Video Swin, whose attention counts; others are never behind
HALF = 0.95  # of 16 bits where the CPU has no products of them, against our float32
SHIFTED = 0.85  # of the time of the same windows without the shift, at most
SCALING = 0.9  # of what more threads bring to gemm


def _of_windows(case: WindowCase, direction: str, wide: bool) -> dict[str, float]:
    """Targets of windows: of video in stages, and of those of fewer tokens or narrow heads."""
    shifted, training = any(case.geometry.shift), direction == "forward_backward"
    if case.window[0] == 1 or case.head_dim <= 16:
        return {"rival": 2.0 if shifted else 1.5}
    found = {}
    if not shifted:
        found["limit"] = (0.75 if wide else 0.70) if training else (0.80 if wide else 0.75)
    if not training:
        first = case.grid[1] == 56
        plain = (2.0 if wide else 1.6) if first else 1.5
        found["rival"] = (5.0 if first else 4.0) if shifted else plain
    return found


def _of_sequences(case: DividedCase, direction: str, wide: bool) -> dict[str, float]:
    """Targets of attention over time, over space, and over both."""
    training = direction == "forward_backward"
    if case.kind != "temporal":
        return {"rival": (1.6 if wide else 1.4) if training else (1.8 if wide else 1.5)}
    if case.num_frames <= SHORT_FRAMES:
        return {"copy": 0.5 if training else 0.6}
    if case.num_frames <= 32:
        return {"rival": (2.5 if wide else 2.0) if training else (2.0 if wide else 2.3)}
    return {"rival": (1.9 if wide else 1.8) if training else (1.5 if wide else 1.15)}


def targets_of(ours: Mapping[str, Any]) -> dict[str, float]:
    """Give what vidattn is to reach in a case.

    Args:
        ours: ``info`` of vidattn's entry.

    Returns:
        By what it is measured by: "limit", "copy" (shares of them), "rival" (times the speed of the best one) or
        "float32" (times the speed of our own).
    """
    name, direction, dtype, isa = (ours[key] for key in ("case", "direction", "dtype", "cpu_isa"))
    wide = isa.startswith("avx512")
    if dtype != "float32":
        has_products = dtype == "bfloat16" and isa in ("avx512_bf16", "avx512_amx")
        return {} if has_products or name not in WINDOW_CASES else {"float32": HALF}
    if direction == "shift":
        return {"copy": 0.8}
    if name in WINDOW_CASES:
        return _of_windows(WINDOW_CASES[name], direction, wide) if name.startswith("swin") else {}
    if name in DIVIDED_CASES:
        return {} if name.startswith("sequences") else _of_sequences(DIVIDED_CASES[name], direction, wide)
    if name in MIXING_CASES:
        return _of_sequences(DividedCase("spatial", 1, 1), direction, wide)
    return {"rival": MODELS[direction] if name == "video_swin_t_32x224x224" else 1.0}


def reached(ours: Mapping[str, Any], target: str) -> float | None:
    """Give what a result has of a target, by the median over the rounds; None if it was not measured."""
    if target in ("limit", "copy"):
        share = ours.get(f"share_of_{target}")
        return None if share is None else share["median"]
    if target == "float32":
        ratio = ours["speedup_over"].get("vidattn_float32")
        return None if ratio is None else ratio["median"]
    rival = best_rival(ours)
    return None if rival is None else rival.median


def _gemm(info: Mapping[str, Any] | None) -> float | None:
    """Give the share of gemm, the measure in which cases of other rounds and other threads compare."""
    share = None if info is None else info.get("share_of_gemm")
    return None if share is None else share["median"]


def judge(ours: Sequence[Mapping[str, Any]]) -> list[str]:
    """Compare vidattn's entries with their targets.

    Args:
        ours: ``info`` of each entry.

    Returns:
        One line for each target that was measured.
    """
    known: dict[Key, Mapping[str, Any]] = {
        (info["case"], info["direction"], info["dtype"], info["threads"]): info for info in ours
    }
    lines = []

    def tell(info: Mapping[str, Any], what: str, value: float, wanted: float, *, most: bool = False) -> None:
        verdict = "reached" if (value <= wanted if most else value >= wanted) else "missed"
        lines.append(f"{title(info)}: {what} {value:.2f}, target {wanted:.2f}: {verdict}")

    for (case, direction, dtype, threads), info in known.items():
        wanted = targets_of(info)
        for target, least in wanted.items():
            value = reached(info, target)
            if value is not None:
                tell(info, target, value, least)
        share = _gemm(info)
        plain = _gemm(known.get((case.removesuffix("_shifted"), direction, dtype, threads)))
        alone = _gemm(known.get((case, direction, dtype, 1)))
        if share and plain and case.endswith("_shifted"):
            tell(info, "time against no shift", plain / share, SHIFTED, most=True)
        if share and alone and threads > 1 and "copy" not in wanted:
            tell(info, "scaling against gemm", share / alone, SCALING)
    return lines

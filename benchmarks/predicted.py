"""What the audit of GPU kernels saved last, as tables of docs/performance.md, which ``benchmarks.page`` makes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
# What stands in the rows, for each table: title of its first columns, then title, size and case of each row.
WINDOWS = (
    ("Swin-T stage 1", "392", "swin_t_stage1"),
    ("stage 1 shifted", "392", "swin_t_stage1_shifted"),
    ("stage 2", "392", "swin_t_stage2"),
    ("stage 2 shifted", "392", "swin_t_stage2_shifted"),
    ("stage 3", "392", "swin_t_stage3"),
    ("stage 3 shifted", "392", "swin_t_stage3_shifted"),
    ("stage 4", "392", "swin_t_stage4"),
    ("Swin-B stage 1, window (16, 7, 7)", "784", "swin_b_ssv2_stage1"),
    ("Swin-T stage 1, 8 frames", "196", "swin_t_8frames_stage1"),
    ("SwinUNETR, two volumes", "343", "swinunetr"),
    ("2D Swin-B, window 12, 16 images", "144", "swin_2d_window12"),
    ("2D Swin-T, window 7, 64 images", "49", "swin_2d_window7"),
)
DIVIDED = (
    ("TimeSformer-B, time", "8", "timesformer_b_time"),
    ("TimeSformer-B, space with cls", "197", "timesformer_b_space"),
    ("TimeSformer-HR, time", "16", "timesformer_hr_time"),
    ("TimeSformer-HR, space with cls", "785", "timesformer_hr_space"),
    ("TimeSformer-L, time", "96", "timesformer_l_time"),
    ("TimeSformer-L, space with cls", "197", "timesformer_l_space"),
    ("ViViT-B model 3, time", "16", "vivit_b_model3_time"),
    ("ViViT-B model 3, space", "196", "vivit_b_model3_space"),
    ("ViViT-B model 4", "16 and 196", "vivit_b_model4"),
)
MIXING = (
    ("an eighth or a quarter of k and v each way", "16", "xvit_b_16_frames_div8"),
    ("the same", "8", "xvit_b_8_frames_div8"),
    ("the shift alone", "16", "xvit_b_16_frames_div8_shift"),
)


def newest() -> Path:
    """Give the predictions that were saved last."""
    return max(RESULTS.glob("predicted-*.json"))


def tables(predictions: dict[str, Any]) -> str:
    """Give the tables in Markdown.

    Args:
        predictions: what ``benchmarks.gpu_audit --save`` writes.
    """
    found = {(case["backend"], case["case"], case["direction"]): case for case in predictions["cases"]}

    def figure(key: str, *where: str) -> str:
        return _shown(found[where][key]) if where in found else ""

    def table(titles: str, cases: Sequence[tuple[str, str, str]]) -> list[str]:
        columns = "forward, us: Triton | CUDA | floor | backward, us: Triton | CUDA | floor"
        lines = [f"| {titles} | {columns} |", "| --- " * 8 + "|"]
        for title, size, case in cases:
            cells = [title, size]
            for direction in ("forward", "backward"):
                cells += [figure("predicted_us", backend, case, direction) for backend in ("triton", "cuda")]
                cells.append(figure("floor_us", "triton", case, direction))
            lines.append(f"| {' | '.join(cells)} |")
        return [*lines, ""]

    lines = [
        *table("attention in windows | tokens a window", WINDOWS),
        *table("TimeSformer and ViViT attention, 12 x 64 | keys", DIVIDED),
        *table("X-ViT-B, 12 x 64, 197 tokens | frames", MIXING),
    ]
    return "\n".join(lines[:-1])


def _shown(microseconds: float) -> str:
    return f"{microseconds:.0f}" if microseconds >= 30 else f"{microseconds:.1f}"

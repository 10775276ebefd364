"""What the project wants to reach, and whether a result does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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
    **{
        (f"xvit_b_div{div}", *kind): targets
        for div in (4, 8)
        for kind, targets in (
            (("forward", "float32"), {"gemm": 0.7, "rivals": 1.3}),
            (("forward_backward", "float32"), {"rivals": 1.15}),
            (("forward", "bfloat16"), {"rivals": 1.1}),
            (("shift", "float32"), {"copy": 0.8}),
            (("shift", "bfloat16"), {"copy": 0.8}),
        )
    },
}
RIVALS = {
    "eager": ("eager",),
    "best": ("sdpa", "compiled"),
    "rivals": ("eager", "sdpa", "compiled"),
    "float32": ("vidattn_float32",),
}


def reached(ours: Mapping[str, Any], target: str) -> float | None:
    """Give what a result has of a target, by the best rounds; None if it was not measured.

    Args:
        ours: ``info`` of vidattn's entry.
        target: a key of a value of ``TARGETS``.

    Returns:
        A share of a rate, or how many times as fast vidattn is as the fastest of the target's contenders.
    """
    if target in ("gemm", "copy"):
        share = ours.get(f"share_of_{target}")
        return None if share is None else share["min"]
    if not set(RIVALS[target]) <= set(ours["speedup_over"]):
        return None
    return min(ours["speedup_over"][rival]["min"] for rival in RIVALS[target])


def judge(ours: Mapping[str, Any]) -> list[str]:
    """Compare vidattn's entry of a case with its targets.

    Args:
        ours: ``info`` of the entry.

    Returns:
        One line for each target that was measured.
    """
    case = (ours["case"], ours["direction"], ours["dtype"])
    lines = []
    for target, wanted in TARGETS.get(case, {}).items():
        value = reached(ours, target)
        if value is not None:
            verdict = "reached" if value >= wanted else "missed"
            lines.append(f"{' '.join(case)}: {target} {value:.2f}, target {wanted:.2f}: {verdict}")
    return lines

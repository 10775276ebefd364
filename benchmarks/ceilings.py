"""The most that the figures of the audit may be."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from benchmarks.audited import CaseAudit


@dataclass(frozen=True)
class Ceiling:
    """The most that a figure may be, or for words exactly what.

    Attributes:
        where: pattern of "backend/family/case/direction".
        figure: of a launch (see ``LaunchAudit``), or of the case: ``microseconds``, the prediction,
            ``times_the_floor``, as many times the floor as that is, and ``times_triton``.
        limit: the ceiling.
        at_least: whether it is the least instead.
    """

    where: str
    figure: str
    limit: float | str
    at_least: bool = False

    def admits(self, value: float | str) -> bool:
        """Tell whether a value is within the ceiling."""
        if isinstance(self.limit, str):  # a loop of few steps is unrolled, and stands beside the narrow last tile
            return self.limit in str(value).split("+")
        return float(value) >= self.limit if self.at_least else float(value) <= self.limit


_N392 = "cuda/window3d/swin_[tb]_stage*"
_GENERIC = ("swin_2d_window7", "swin_2d_window12", "swin_t_8frames_stage1", "swinunetr")  # 49, 144, 196, 343 tokens
_SHORT = ("timesformer_b", "timesformer_hr", "timesformer_32_frames", "vivit_b_model3")  # 8, 16, 32, 16 frames
_SPACE = ("divided/timesformer_?_space", "divided/vivit_b_model3_space", "divided/vivit_b_model4", "mixing/*")
_SPILLS = ("spill_instructions", "local_bytes", "spills_on_sm_80")
CUDA_CEILINGS = (
    Ceiling("cuda/window3d/*", "matrix_instructions", "mma.sync"),
    Ceiling("cuda/window3d/*", "ldmatrix", 1, at_least=True),
    Ceiling("cuda/*", "wide_copies", 1, at_least=True),
    Ceiling("cuda/window3d/*", "times_triton", 1.0),
    *(Ceiling("cuda/*/forward", figure, 0) for figure in _SPILLS),
    Ceiling(f"{_N392}/forward", "shared_bytes", 82_944),  # so that two blocks share an SM, on sm_80 too
    Ceiling(f"{_N392}/forward", "registers_of_block", 32_768),
    Ceiling(f"{_N392}/forward", "blocks_per_sm", 2, at_least=True),
    Ceiling(f"{_N392}/forward", "hot_instructions_per_score", 6.8),
    Ceiling(f"{_N392}/forward", "instructions_per_score", 8.0),
    Ceiling("cuda/window3d/swin_t_stage1/forward", "microseconds", 165.0),
    *(Ceiling(f"cuda/window3d/{case}/forward", "hot_instructions_per_score", 9.0) for case in _GENERIC),
    Ceiling(f"{_N392}/backward", "warps", 7, at_least=True),
    *(Ceiling(f"{_N392}/backward", figure, 0) for figure in _SPILLS),
    Ceiling(f"{_N392}/backward", "hot_instructions_per_score", 16.0),
    Ceiling("cuda/window3d/swin_t_stage1/backward", "microseconds", 430.0),
    Ceiling("cuda/*/backward", "blocks_per_sm", 1, at_least=True),
    *(Ceiling(f"cuda/window3d/{case}/backward", "hot_instructions_per_score", 17.0) for case in _GENERIC[2:]),
    # 784 tokens come in blocks of keys. What that takes, so that no change makes it worse.
    Ceiling("cuda/window3d/swin_b_ssv2_stage*/backward", "instructions_per_score", 50.5),
    # Sequences of 96, 196 and 197 tokens.
    *(
        ceiling
        for case in (*_SPACE, "divided/timesformer_l_time")
        for ceiling in (
            *(Ceiling(f"cuda/{case}/*", figure, 0) for figure in _SPILLS),
            Ceiling(f"cuda/{case}/*", "times_triton", 1.02),  # some are where the bytes are
            Ceiling(f"cuda/{case}/forward", "times_the_floor", 1.25),
            Ceiling(f"cuda/{case}/backward", "times_the_floor", 1.7),
        )
    ),
    # What reads all it needs before it uses it.
    *(
        ceiling
        for where, times in (
            *((f"cuda/divided/{case}_time/*", 1.05) for case in _SHORT),
            ("cuda/shift/xvit_b_16_frames_*", 1.1),
            ("cuda/shift/xvit_b_8_frames_*", 1.2),
        )
        for ceiling in (
            *(Ceiling(where, figure, 0) for figure in _SPILLS),
            Ceiling(where, "wide_copies", 4, at_least=True),
            Ceiling(where, "bytes_under_way", 40 * 1024, at_least=True),
            Ceiling(where, "times_the_floor", times),
            Ceiling(where, "times_triton", 1.005),  # both are where the bytes are
        )
    ),
)
# Ceilings that the kernels do not keep yet. The audit prints them and passes; one that is kept belongs above.
GOALS = (
    *(Ceiling("cuda/*/backward", figure, 0) for figure in _SPILLS),
    Ceiling(f"{_N392}/backward", "hot_instructions_per_score", 12.0),
    *(Ceiling(f"cuda/window3d/{case}/backward", "hot_instructions_per_score", 17.0) for case in _GENERIC[:2]),
)
CEILED = ("sm_90", "bfloat16")  # what the ceilings are for
# Predictions of the Triton kernels are what the model gives, and a few per cent: their tiles of queries each read the
# keys from the L2 cache, which no ceiling below that can be held against. They only keep a change from making it worse.
CEILINGS = (
    Ceiling("triton/*", "spill_instructions", 0),
    Ceiling("triton/*", "local_bytes", 0),
    Ceiling("triton/*", "serialised_products", 0),
    # Tiles of 64 keys. Those of 128 take 9 instructions, but spill, and read as much from the L2 cache.
    Ceiling("triton/window3d/swin_[tb]_stage?/forward", "instructions_per_score", 10.25),  # N = 392
    Ceiling("triton/window3d/swin_[tb]_stage?_shifted/forward", "instructions_per_score", 11.25),
    Ceiling("triton/window3d/swin_b_ssv2_stage*/forward", "instructions_per_score", 11.25),  # N = 784
    Ceiling("triton/window3d/*/backward", "matrix_instructions", "wgmma"),
    Ceiling("triton/window3d/swin_[tb]_*", "narrow_tile_loads", 0),  # q, k, v, out, dout, bias: 16 bytes a lane
    Ceiling("triton/window3d/swin_t_stage1/forward", "microseconds", 450.0),
    Ceiling("triton/window3d/swin_t_stage1_shifted/forward", "microseconds", 400.0),
    Ceiling("triton/window3d/swin_t_stage1*/backward", "microseconds", 1725.0),
    Ceiling("triton/divided/*", "narrow_tile_loads", 0),
    *(
        Ceiling(f"triton/divided/{case}/{direction}", "times_the_floor", limit)
        for cases, limits in (
            ("timesformer_*_time vivit_b_model3_time", (1.1, 1.5)),
            ("timesformer_?_space vivit_b_model3_space", (2.55, 3.6)),
            ("vivit_b_model4", (1.6, 1.95)),
        )
        for case in cases.split()
        for direction, limit in zip(("forward", "backward"), limits)
    ),
    Ceiling("triton/mixing/*", "narrow_tile_loads", 0),
    Ceiling("triton/mixing/*/forward", "times_the_floor", 2.1),
    Ceiling("triton/mixing/*/backward", "times_the_floor", 3.1),
    Ceiling("triton/shift/*", "narrow_tile_loads", 0),
    Ceiling("triton/shift/xvit_b_16_frames_*", "times_the_floor", 1.15),
    Ceiling("triton/shift/xvit_b_8_frames_*", "times_the_floor", 1.3),
    *CUDA_CEILINGS,
)


def unmatched(places: Iterable[str], ceilings: Iterable[Ceiling]) -> list[str]:
    """List the patterns of ceilings that no case has; ``places`` are "backend/family/case/direction" of all cases."""
    known = list(places)
    return [ceiling.where for ceiling in ceilings if not any(fnmatchcase(place, ceiling.where) for place in known)]


def violations(cases: Sequence[CaseAudit], ceilings: Iterable[Ceiling]) -> list[str]:
    """List what is past a ceiling, and ceilings that no figure of their cases could be held against."""
    found: dict[str, list[str]] = {}
    for ceiling in ceilings:
        for case in cases:
            if not fnmatchcase(case.where, ceiling.where):
                continue
            if ceiling.figure in ("microseconds", "times_the_floor", "times_triton"):
                values: list[tuple[str, Any]] = [("prediction", getattr(case, ceiling.figure))]
            else:
                values = [(launch.kernel, getattr(launch, ceiling.figure, None)) for launch in case.launches]
            values = [(name, value) for name, value in values if value is not None]
            if not values:
                found.setdefault(f"{ceiling.figure}: nothing to hold against the ceiling", []).append(case.where)
            least = "at least" if ceiling.at_least else "ceiling"
            for name, value in values:
                if not ceiling.admits(value):
                    shown = f"{value:.2f}" if isinstance(value, float) else value
                    line = f"{name}: {ceiling.figure} {shown}, {least} {ceiling.limit}"
                    found.setdefault(line, []).append(case.where)
    return [f"{what} ({', '.join(where)})" for what, where in found.items()]

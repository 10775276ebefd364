"""Audits the GPU kernels without a GPU: ``python -m benchmarks.gpu_audit [--case NAME ...] [--save FILE]``.

Compiles every kernel that the full-size cases launch, reads its machine code, and prints what it occupies, how it
loads, what its main loop costs a score, and a predicted time beside the floor of each case. The prediction is the
largest of four terms, each at the rate that the hardware can sustain with nothing else going on: a lower bound. Waste
of tiles is in it. Exits with status 1 if a figure is past a ceiling; all that are get printed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import multiprocessing
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields
from datetime import date
from fnmatch import fnmatchcase
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.sass import Kernel, inspect
from benchmarks.shapes import (
    GPU_DIVIDED_CASES,
    GPU_MIXING_CASES,
    GPU_WINDOW_CASES,
    DividedCase,
    MixingCase,
    WindowCase,
)
from benchmarks.tables import print_table
from vidattn.calls import DividedCall, MixingCall, WindowCall
from vidattn.geometry import bias_extents, explain_windows
from vidattn.ops import _tensors as tensors
from vidattn.ops._arguments import draw_seed

if TYPE_CHECKING:
    from vidattn.kernels.launch import Launch

ARCHITECTURES = ("sm_90", "sm_80", "sm_100")
DIRECTIONS = ("forward", "backward")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


# ---- Ceilings ----


@dataclass(frozen=True)
class Ceiling:
    """The most that a figure may be, or for words exactly what.

    Attributes:
        where: pattern of "family/case/direction".
        figure: of a launch (see :class:`LaunchAudit`), or of the case: ``microseconds``, the prediction, and
            ``times_the_floor``, as many times the floor as that is.
        limit: the ceiling.
    """

    where: str
    figure: str
    limit: float | str

    def admits(self, value: float | str) -> bool:
        """Tell whether a value is within the ceiling."""
        if isinstance(self.limit, str):  # a loop of few steps is unrolled, and stands beside the narrow last tile
            return self.limit in str(value).split("+")
        return float(value) <= self.limit


CEILED = ("sm_90", "bfloat16")  # what the ceilings are for
CEILINGS = (
    Ceiling("*", "spill_instructions", 0),
    Ceiling("*", "local_bytes", 0),
    Ceiling("window3d/swin_[tb]_stage*/forward", "instructions_per_score", 10.0),  # N = 392
    Ceiling("window3d/swin_b_ssv2_stage*/forward", "instructions_per_score", 10.0),  # N = 784
    Ceiling("window3d/*/backward", "matrix_instructions", "wgmma"),
    Ceiling("window3d/*", "narrow_tile_loads", 0),  # q, k, v, out, dout, bias: 16 bytes a lane
    Ceiling("window3d/swin_t_stage1*/forward", "microseconds", 300.0),
    Ceiling("window3d/swin_t_stage1*/backward", "microseconds", 800.0),
    Ceiling("divided/*", "narrow_tile_loads", 0),
    *(
        Ceiling(f"divided/{case}/{direction}", "times_the_floor", limit)
        for cases, limits in (
            ("timesformer_b_time timesformer_hr_time timesformer_32_frames_time vivit_b_model3_time", (1.33, 1.4)),
            ("timesformer_l_time timesformer_?_space vivit_b_model3_space vivit_b_model4", (1.5, 2.0)),
        )
        for case in cases.split()
        for direction, limit in zip(("forward", "backward"), limits)
    ),
    Ceiling("mixing/*", "narrow_tile_loads", 0),
    Ceiling("mixing/*/forward", "times_the_floor", 1.5),
    Ceiling("mixing/*/backward", "times_the_floor", 2.0),
    Ceiling("shift/*", "narrow_tile_loads", 0),
    Ceiling("shift/*", "times_the_floor", 1.05),
)


# ---- Rates and costs ----


@dataclass(frozen=True)
class Rates:
    """What an H200 sustains: measured copies and matrix products; instructions and exponentials at 1.755 GHz."""

    copy_bytes_per_s: float = 4.3e12
    instructions_per_s: float = 2.96e13  # counted for each lane
    exponentials_per_s: float = 3.71e12
    wgmma_flops_per_s: float = 790e12
    mma_sync_flops_per_s: float = 500e12

    @classmethod
    def load(cls, path: Path) -> Rates:
        """Read what a calibration measured; what it does not say stays as assumed."""
        measured = json.loads(path.read_text())
        names = [field.name for field in fields(cls)]
        known = {name: float(measured[name]) for name in names if measured.get(name) is not None}
        if not known or min(known.values()) <= 0:
            raise ValueError(f"{path}: expected positive rates among {names}")
        return cls(**known)


@dataclass(frozen=True)
class Cost:
    """What a launch or a case does."""

    bytes: float
    instructions: float  # of all lanes
    exponentials: float
    flops: float
    matrix_instructions: str = "wgmma"

    def microseconds(self, rates: Rates) -> dict[str, float]:
        """Time of each term on its own."""
        slow = self.matrix_instructions == "mma.sync"
        return {
            "bytes": 1e6 * self.bytes / rates.copy_bytes_per_s,
            "instructions": 1e6 * self.instructions / rates.instructions_per_s,
            "exponentials": 1e6 * self.exponentials / rates.exponentials_per_s,
            "matrix": 1e6 * self.flops / (rates.mma_sync_flops_per_s if slow else rates.wgmma_flops_per_s),
        }


# ---- Families: which cases there are, what they launch, what they cost at least ----


@dataclass(frozen=True)
class Family:
    """A family of attention: its full-size cases, the launches of a case, and the least that a case can cost."""

    cases: Mapping[str, Any]
    plan: Callable[..., list[Launch]]  # (case, direction, dtype, arch)
    floor: Callable[..., Cost]  # (case, direction, dtype)


def plan_window3d(
    case: WindowCase,
    direction: str,
    dtype: torch.dtype,
    arch: str,
    *,
    has_bias: bool = True,
    has_pad: bool = True,
    mask_value: float = -100.0,
    dropout_p: float = 0.0,
) -> list[Launch]:
    """Launches of ``window3d_attention`` or its backward, on tensors without memory."""
    from vidattn.kernels import window3d

    windows = case.geometry
    with torch.device("meta"):
        qkv = torch.empty(case.qkv_shape, dtype=dtype)
        table = torch.empty(case.table_shape) if has_bias else None
        pad = torch.empty(3, case.heads, case.head_dim, dtype=dtype) if has_pad else None
    call = WindowCall(
        *qkv.unbind(-3),
        bias=table,
        bias_window=[*case.window, *bias_extents(case.window, windows, "prefix")] if has_bias else [],
        mask=None,
        pad_qkv=pad,
        seed=draw_seed(qkv, dropout_p),
        window=windows.window,
        shift=windows.shift,
        wrap=windows.wrap,
        scale=case.head_dim**-0.5,
        mask_value=mask_value,
        dropout_p=dropout_p,
    )
    out, lse = tensors.new_outputs(call)
    if direction == "forward":
        return window3d.plan_forward(call, out, lse, arch=arch)
    sums = (tensors.new_sum(x, call, x is not None) for x in (table, pad))
    dq, dk, dv = torch.empty_like(qkv).unbind(-3)
    return window3d.plan_backward(call, torch.empty_like(out), out, lse, dq, dk, dv, *sums, arch=arch)


def window3d_floor(case: WindowCase, direction: str, dtype: torch.dtype) -> Cost:
    """The pairs that no mask separates, each with one exponential, and every tensor moved once; no instructions."""
    windows = case.geometry
    pairs = case.batch * windows.num_windows * case.heads * windows.num_tokens**2
    visible = 1.0 - explain_windows(case.grid, case.window, case.shift).masked_share
    flops, moved = case.flops("forward"), case.bytes_moved("forward", dtype)
    if direction == "backward":
        lse_bytes = 4 * case.batch * math.prod(case.grid) * case.heads  # read; the forward wrote it
        flops = case.flops("forward_backward") - flops
        moved = case.bytes_moved("forward_backward", dtype) - moved - lse_bytes
    return Cost(moved, 0, pairs * visible, flops * visible)


def plan_divided(
    case: DividedCase, direction: str, dtype: torch.dtype, arch: str, *, dropout_p: float = 0.0
) -> list[Launch]:
    """Launches of one of the functions of divided attention or its backward, on tensors without memory."""
    from vidattn.kernels import divided

    frames, sites, heads, cls_rows = case.num_frames, case.num_sites, case.heads, int(case.has_cls)
    with torch.device("meta"):
        qkv = torch.empty(case.qkv_shape, dtype=dtype)
        cls = torch.empty(case.batch, frames, heads * case.head_dim) if case.has_cls else None
    context = torch.empty_like(qkv.select(-3, 0)).flatten(-2)
    out, cls_mean = context[:, cls_rows:], context[:, 0] if case.has_cls else None
    keys = max(frames * (case.temporal_heads > 0), (sites + cls_rows) * (case.temporal_heads < heads))
    lse = None
    if tensors.keeps_lse(keys, "triton"):
        lse = qkv.new_empty(case.batch, frames * (sites + cls_rows), heads, dtype=torch.float32)
    call = DividedCall(
        *qkv.unbind(-3),
        seed=draw_seed(qkv, dropout_p),
        num_frames=frames,
        time_fastest=case.token_order == "hwt",
        temporal_heads=case.temporal_heads,
        scale=case.head_dim**-0.5,
        dropout_p=dropout_p,
    )
    if direction == "forward":
        return divided.plan_forward(call, out, cls, cls_mean, lse, arch=arch)
    dout = torch.empty_like(context)[:, cls_rows:]
    dcls = None if cls is None else cls[:, :1].expand_as(cls)  # that of the mean
    kept = (None, None, None) if lse is None else (out, cls, lse)
    dq, dk, dv = torch.empty_like(qkv).unbind(-3)
    return divided.plan_backward(call, dout, dcls, *kept, dq, dk, dv, arch=arch)


def plan_mixing(
    case: MixingCase, direction: str, dtype: torch.dtype, arch: str, *, dropout_p: float = 0.0
) -> list[Launch]:
    """Launches of ``space_time_mixing_attention`` or its backward, on tensors without memory."""
    from vidattn.kernels import mixing

    with torch.device("meta"):
        qkv = torch.empty(case.qkv_shape, dtype=dtype)
    call = MixingCall(
        *qkv.unbind(-3),
        seed=draw_seed(qkv, dropout_p),
        num_frames=case.num_frames,
        channel_shifts=[value for shift in case.channel_shifts for value in shift],
        scale=case.head_dim**-0.5,
        dropout_p=dropout_p,
    )
    out, lse = tensors.new_outputs(call)
    kept = (out, lse) if tensors.keeps_lse(case.num_tokens, "triton") else (None, None)
    if direction == "forward":
        return mixing.plan_forward(call, out, kept[1], arch=arch)
    dq, dk, dv = torch.empty_like(qkv).unbind(-3)
    return mixing.plan_backward(call, torch.empty_like(out), *kept, dq, dk, dv, arch=arch)


def plan_shift(case: MixingCase, direction: str, dtype: torch.dtype, arch: str) -> list[Launch]:
    """Launches of ``temporal_shift`` of as many tokens, or of its gradient, the shift with the offsets negated."""
    from vidattn.kernels import mixing

    frames, tokens = case.qkv_shape[:2]
    sign = 1 if direction == "forward" else -1
    shifts = [value for first, last, offset in case.channel_shifts for value in (first, last, sign * offset)]
    x = torch.empty(frames, tokens, case.channels, 1, dtype=dtype, device="meta")
    return mixing.plan_shift(x, case.num_frames, shifts, torch.empty_like(x))


def shift_floor(case: MixingCase, direction: str, dtype: torch.dtype) -> Cost:
    """Tokens in, tokens out."""
    return Cost(case.bytes_moved("forward", dtype) / 2, 0, 0, 0)


def all_pairs_floor(case: DividedCase | MixingCase, direction: str, dtype: torch.dtype) -> Cost:
    """All pairs, each with one exponential, and every tensor moved once; no instructions."""
    flops, moved = case.flops("forward"), case.bytes_moved("forward", dtype)
    pairs = flops // (2 * 2 * case.head_dim)
    if direction == "backward":
        flops = case.flops("forward_backward") - flops
        moved = case.bytes_moved("forward_backward", dtype) - moved
    return Cost(moved, 0, pairs, flops)


FAMILIES = {
    "window3d": Family(GPU_WINDOW_CASES, plan_window3d, window3d_floor),
    "divided": Family(GPU_DIVIDED_CASES, plan_divided, all_pairs_floor),
    "mixing": Family(GPU_MIXING_CASES, plan_mixing, all_pairs_floor),
    "shift": Family({f"{name}_shift": case for name, case in GPU_MIXING_CASES.items()}, plan_shift, shift_floor),
}


# ---- Launches and cases ----


def specialisation(launch: Launch) -> str:
    """Name what a launch compiles to: two launches of the same name share their machine code."""
    source = launch.source()
    parts = (source.signature, source.constants, source.attrs, sorted(launch.options.items()), launch.work.scores > 0)
    return f"{launch.name}-{hashlib.sha256(repr(parts).encode()).hexdigest()[:8]}"


@dataclass(frozen=True)
class LaunchAudit:
    """One launch of a case. Helpers compute no scores and have no figures that are about scores.

    ``matrix_instructions`` is their kind in the main loop: a narrow last tile may leave no choice.
    """

    kernel: str
    grid: int
    work: Mapping[str, float]  # steps can be a mean over the programs
    spill_instructions: int
    local_bytes: int
    narrow_tile_loads: int
    matrix_instructions: str | None
    instructions_per_score: float | None
    cost: Cost
    terms: Mapping[str, float]  # microseconds
    microseconds: float


@dataclass(frozen=True)
class CaseAudit:
    """One direction of a case: its launches one after the other, and the floor."""

    family: str
    case: str
    direction: str
    launches: tuple[LaunchAudit, ...]
    microseconds: float
    floor_terms: Mapping[str, float]

    @property
    def where(self) -> str:
        """What the patterns of ceilings are matched with."""
        return f"{self.family}/{self.case}/{self.direction}"

    @property
    def times_the_floor(self) -> float:
        """The prediction over the largest term of the floor."""
        return self.microseconds / max(self.floor_terms.values())

    @property
    def terms(self) -> Counter[str]:
        """Microseconds of the launches by the term that is the largest of each."""
        total: Counter[str] = Counter()
        for launch in self.launches:
            total[_largest(launch.terms)] += launch.microseconds  # type: ignore[assignment]
        return total


def _largest(terms: Mapping[str, float]) -> str:
    return max(terms, key=lambda term: terms[term])


def audit_launch(launch: Launch, kernel: Kernel, rates: Rates) -> LaunchAudit:
    """Count what a launch executes: its main loop as often as it runs, all else once, even what a branch skips."""
    work = launch.work
    # The compiler may have unrolled the loop: its matrix instructions say how many steps one round does.
    expected = work.scores_per_step * work.flops / work.scores if work.scores else 0.0
    unrolled = max(1, round(kernel.loop_flops / expected)) if expected else 1
    # A loop that takes no steps is for values that are not finite; those of helpers are short.
    rounds = 0.0 if work.scores and not work.steps else max(1.0, work.steps / unrolled)
    lanes = launch.grid * kernel.threads
    cost = Cost(
        bytes=work.bytes,
        instructions=lanes * (kernel.outside_instructions + rounds * kernel.loop_instructions),
        exponentials=lanes * (kernel.outside_exponentials + rounds * kernel.loop_exponentials),
        flops=work.flops,
        matrix_instructions=kernel.loop_matrix_instructions,
    )
    terms = cost.microseconds(rates)
    per_score = None
    if work.scores:
        body, scores = kernel.loop_instructions, work.scores_per_step * unrolled
        if not body or not work.steps:
            # Without a loop the whole program is its body.
            body, scores = kernel.outside_instructions, work.scores // launch.grid
        per_score = body * kernel.threads / scores
    return LaunchAudit(
        kernel=specialisation(launch),
        grid=launch.grid,
        work=asdict(work),
        spill_instructions=kernel.spill_instructions,
        local_bytes=kernel.local_bytes,
        narrow_tile_loads=kernel.narrow_tile_loads,
        matrix_instructions=kernel.loop_matrix_instructions if work.scores else None,
        instructions_per_score=per_score,
        cost=cost,
        terms=terms,
        microseconds=max(terms.values()),
    )


def violations(cases: Sequence[CaseAudit], ceilings: Iterable[Ceiling]) -> list[str]:
    """List what is past a ceiling, and ceilings that no figure of their cases could be held against."""
    found: dict[str, list[str]] = {}
    for ceiling in ceilings:
        for case in cases:
            if not fnmatchcase(case.where, ceiling.where):
                continue
            if ceiling.figure in ("microseconds", "times_the_floor"):
                values: list[tuple[str, Any]] = [("prediction", getattr(case, ceiling.figure))]
            else:
                values = [(launch.kernel, getattr(launch, ceiling.figure)) for launch in case.launches]
            values = [(name, value) for name, value in values if value is not None]
            if not values:
                found.setdefault(f"{ceiling.figure}: nothing to hold against the ceiling", []).append(case.where)
            for name, value in values:
                if not ceiling.admits(value):
                    shown = f"{value:.2f}" if isinstance(value, float) else value
                    found.setdefault(f"{name}: {ceiling.figure} {shown}, ceiling {ceiling.limit}", []).append(
                        case.where
                    )
    return [f"{what} ({', '.join(where)})" for what, where in found.items()]


@cache
def _plan(family: str, case: str, direction: str, dtype: str, arch: str) -> list[Launch]:
    planner = FAMILIES[family]
    return planner.plan(planner.cases[case], direction, DTYPES[dtype], arch)


def _inspect_planned(place: tuple[str, str, str, str, str], index: int) -> tuple[Kernel, bytes]:
    """Work of a child process: kernels do not travel between processes, so the launch is planned anew."""
    return inspect(_plan(*place)[index], place[-1])


def audit(
    names: Iterable[str] | None, arch: str, dtype: str, rates: Rates, *, processes: int = 2
) -> tuple[list[CaseAudit], dict[str, Kernel], dict[str, bytes]]:
    """Compile the kernels of the cases and audit both directions of each.

    Args:
        names: cases; all by default.
        arch: one of :data:`ARCHITECTURES`.
        dtype: a key of :data:`DTYPES`.
        rates: what predictions divide by.
        processes: compilations at a time.

    Returns:
        The audited cases; figures and cubins by the name of the specialisation.
    """
    places = [
        (family, case, direction, dtype, arch)
        for family, of in FAMILIES.items()
        for case in of.cases
        for direction in DIRECTIONS
        if names is None or case in names
    ]
    wanted = {specialisation(launch): (place, index) for place in places for index, launch in enumerate(_plan(*place))}
    # Started afresh: a copy of this process would copy the locks of its threads.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(processes, len(wanted)), mp_context=context) as pool:
        inspected = dict(zip(wanted, pool.map(_inspect_planned, *zip(*wanted.values()))))
    kernels = {name: kernel for name, (kernel, _) in inspected.items()}
    cases = []
    for place in places:
        family, case, direction = place[:3]
        launches = tuple(audit_launch(launch, kernels[specialisation(launch)], rates) for launch in _plan(*place))
        floor = FAMILIES[family].floor(FAMILIES[family].cases[case], direction, DTYPES[dtype])
        total = sum(launch.microseconds for launch in launches)
        cases.append(CaseAudit(family, case, direction, launches, total, floor.microseconds(rates)))
    return cases, kernels, {name: cubin for name, (_, cubin) in inspected.items()}


# ---- Report ----


def _histogram(widths: Mapping[str, int]) -> str:
    return " ".join(f"{count}x{width}" for width, count in sorted(widths.items()))


def show(cases: Sequence[CaseAudit], kernels: Mapping[str, Kernel], title: str) -> None:
    """Print the table of kernels and the table of cases."""
    per_score = {
        launch.kernel: launch.instructions_per_score
        for case in cases
        for launch in case.launches
        if launch.instructions_per_score is not None
    }
    columns = ("kernel", "warps", "registers", "spills", "shared, B", "warps/SM", "matrix", "loads x bytes")
    rows = [
        (
            name,
            str(kernel.warps),
            str(kernel.registers),
            f"{kernel.spill_instructions} ({kernel.local_bytes} B)",
            str(kernel.shared_bytes),
            str(kernel.resident_warps),
            kernel.matrix_instructions,
            _histogram(kernel.load_widths),
            _histogram(kernel.store_widths),
            str(kernel.narrow_tile_loads),
            f"{per_score[name]:.2f}" if name in per_score else "",
        )
        for name, kernel in kernels.items()
    ]
    columns += ("stores x bytes", "narrow tiles", "instructions/score")
    print_table(f"Kernels, {title}", columns, rows)
    columns = ("case", "direction", "predicted, us", "by", "floor, us", "by", "floor/predicted", "launches, us")
    rows = [
        (
            case.case,
            case.direction,
            f"{case.microseconds:.1f}",
            case.terms.most_common(1)[0][0],
            f"{max(case.floor_terms.values()):.1f}",
            _largest(case.floor_terms),
            f"{1 / case.times_the_floor:.0%}",
            "\n".join(
                f"{launch.kernel.rpartition('-')[0]} {launch.microseconds:.1f} {_largest(launch.terms)}"
                for launch in case.launches
            ),
        )
        for case in cases
    ]
    print_table(f"Predicted times (lower bounds), {title}", columns, rows)


def predictions(cases: Iterable[CaseAudit]) -> list[dict[str, Any]]:
    """Give the times alone, as ``benchmarks/results`` keeps them."""

    def of_launch(launch: LaunchAudit) -> dict[str, Any]:
        per_score = launch.instructions_per_score
        return {"us": round(launch.microseconds, 1), "instructions_per_score": per_score and round(per_score, 2)}

    return [
        {
            "case": case.case,
            "direction": case.direction,
            "predicted_us": round(case.microseconds, 1),
            "floor_us": round(max(case.floor_terms.values()), 1),
            "floor_by": _largest(case.floor_terms),
            "launches": {launch.kernel.rpartition("-")[0]: of_launch(launch) for launch in case.launches},
        }
        for case in cases
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_audit", description=(__doc__ or "").partition("\n\n")[2]
    )
    names = [name for family in FAMILIES.values() for name in family.cases]
    parser.add_argument("--arch", choices=ARCHITECTURES, default="sm_90", help="ceilings are for sm_90")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bfloat16", help="ceilings are for bfloat16")
    parser.add_argument("--case", nargs="+", choices=names, metavar="NAME", help=f"of {', '.join(names)}")
    parser.add_argument("--dump", type=Path, metavar="DIR", help="write every cubin, and every figure to audit.json")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write the predicted times alone, as JSON")
    parser.add_argument("--rates", type=Path, metavar="FILE", help="JSON of a calibration, in place of assumed rates")
    options = parser.parse_args(arguments)

    from vidattn.kernels.launch import INTERPRETED

    if INTERPRETED:
        parser.error("expected TRITON_INTERPRET to be unset: the interpreter does not compile")
    rates = Rates.load(options.rates) if options.rates else Rates()
    cases, kernels, cubins = audit(options.case, options.arch, options.dtype, rates)
    show(cases, kernels, f"{options.arch}, {options.dtype}")
    shown = ", ".join(f"{name} {value:.3g}" for name, value in asdict(rates).items())
    rates_of = f"rates of {options.rates.name}" if options.rates else "assumed rates of an NVIDIA H200"
    print(f"{rates_of}: {shown}")
    ceilings = CEILINGS if (options.arch, options.dtype) == CEILED else ()
    past = violations(cases, ceilings)
    title = {"arch": options.arch, "dtype": options.dtype, "rates": asdict(rates)}
    if options.dump:
        options.dump.mkdir(parents=True, exist_ok=True)
        for name, cubin in cubins.items():
            (options.dump / f"{name}.cubin").write_bytes(cubin)
        figures = title | {
            "ceilings": [asdict(ceiling) for ceiling in ceilings],
            "kernels": {name: asdict(kernel) for name, kernel in kernels.items()},
            "cases": [asdict(case) for case in cases],
            "violations": past,
        }
        (options.dump / "audit.json").write_text(json.dumps(figures, indent=1) + "\n")
    if options.save:
        what = "predicted lower bounds from machine code (python -m benchmarks.gpu_audit), no measurement"
        about = {"what": what, "date": date.today().isoformat(), "triton": version("triton"), "gpu": rates_of}
        result = about | title | {"cases": predictions(cases)}
        options.save.write_text(json.dumps(result, indent=1) + "\n")
    for line in past:
        print(f"past a ceiling: {line}")
    if ceilings and not past:
        print(f"within all {len(ceilings)} ceilings")
    return 1 if past else 0


if __name__ == "__main__":
    sys.exit(main())

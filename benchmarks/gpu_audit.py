"""Audits the GPU kernels without a GPU: ``python -m benchmarks.gpu_audit [--case NAME ...] [--save FILE]``.

Compiles every kernel that the full-size cases launch, reads its machine code, and prints what it occupies, how it
loads, what its main loop costs a score, and a predicted time beside the floor of each case (benchmarks/prediction.py
says what is predicted how). Exits with status 1 if a figure is past a ceiling; all that are get printed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from datetime import date
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import cuda_audit, cuda_sequences, cuda_single_pass
from benchmarks.audited import CaseAudit, CudaLaunchAudit, LaunchAudit
from benchmarks.ceilings import CEILED, CEILINGS, GOALS, violations
from benchmarks.cubins import cubins_of, nvcc
from benchmarks.gpu_plans import DIRECTIONS, DTYPES, FAMILIES
from benchmarks.prediction import Cost, Grid, Rates, largest
from benchmarks.tables import print_table
from benchmarks.triton_kernels import Kernel, inspect

if TYPE_CHECKING:
    from vidattn.kernels.launch import Launch

ARCHITECTURES = ("sm_90", "sm_80", "sm_100")


# ---- Launches and cases ----


def specialisation(launch: Launch) -> str:
    """Name what a launch compiles to: two launches of the same name share their machine code."""
    source = launch.source()
    parts = (source.signature, source.constants, source.attrs, sorted(launch.options.items()), launch.work.scores > 0)
    return f"{launch.name}-{hashlib.sha256(repr(parts).encode()).hexdigest()[:8]}"


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
        # Helpers go over parts that are each read once.
        l2_bytes=max(work.bytes, kernel.traffic.of(launch)),
        shared_bytes=lanes * (kernel.outside_shared_bytes + rounds * kernel.loop_shared_bytes),
    )
    grid = Grid(launch.grid, kernel.resident_programs, kernel.traffic.copy_in)
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
        work=asdict(work),
        spill_instructions=kernel.spill_instructions,
        local_bytes=kernel.local_bytes,
        serialised_products=kernel.serialised_products,
        narrow_tile_loads=kernel.narrow_tile_loads,
        matrix_instructions=kernel.loop_matrix_instructions if work.scores else None,
        instructions_per_score=per_score,
        cost=cost,
        grid=grid,
        terms=terms,
        added=grid.added(terms, rates),
    )


@cache
def _plan(family: str, case: str, direction: str, dtype: str, arch: str) -> list[Launch]:
    planner = FAMILIES[family]
    return planner.plan(planner.cases[case], direction, DTYPES[dtype], arch)


def _inspect_planned(place: tuple[str, str, str, str, str], index: int) -> tuple[Kernel, bytes]:
    """Work of a child process: kernels do not travel between processes, so the launch is planned anew."""
    return inspect(_plan(*place)[index], place[-1])


def why_no_cuda(arch: str) -> str | None:
    """Say why the kernels of csrc/cuda cannot be audited; None if they can."""
    if arch not in cuda_audit.SHARED_LIMITS:
        return f"expected one of {', '.join(cuda_audit.SHARED_LIMITS)}, got {arch}"
    return None if nvcc() else "no nvcc"


def audit(
    names: Iterable[str] | None, arch: str, dtype: str, rates: Rates, *, processes: int = 2
) -> tuple[list[CaseAudit], dict[str, Kernel], dict[str, bytes]]:
    """Compile the kernels of the cases and audit both directions of each, those of csrc/cuda where there is nvcc.

    Args:
        names: cases; all by default.
        arch: one of ``ARCHITECTURES``.
        dtype: a key of ``DTYPES``.
        rates: what predictions divide by.
        processes: compilations at a time.

    Returns:
        The audited cases; figures and cubins of the Triton kernels by the name of the specialisation.
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
        cases.append(CaseAudit("triton", family, case, direction, launches, floor.microseconds(rates)))
    if why_no_cuda(arch) is None:
        triton = {(case.family, case.case, case.direction): case.microseconds for case in cases}
        for module in (cuda_audit, cuda_sequences, cuda_single_pass):
            for case in module.audit(names, arch, DTYPES[dtype], rates):
                cases.append(replace(case, triton_microseconds=triton[case.family, case.case, case.direction]))
    return cases, kernels, {name: cubin for name, (_, cubin) in inspected.items()}


# ---- Report ----


def _histogram(widths: Mapping[str, int]) -> str:
    return " ".join(f"{count}x{width}" for width, count in sorted(widths.items()))


def _short(kernel: str) -> str:
    return kernel.partition("-")[0]


def _added(launch: LaunchAudit) -> str:
    shown = {name: us for name, us in launch.added.items() if us >= max(0.5, 0.05 * launch.microseconds)}
    return "".join(f", {name} +{us:.1f}" for name, us in shown.items())


def _cuda_row(launch: LaunchAudit) -> tuple[str, ...]:
    if not isinstance(launch, CudaLaunchAudit):
        return ()
    per_score = (launch.hot_instructions_per_score, launch.instructions_per_score)
    return (
        launch.kernel,
        str(launch.warps),
        str(launch.registers),
        f"{launch.spill_instructions} ({launch.local_bytes} B); {launch.spills_on_sm_80}",
        str(launch.shared_bytes),
        str(launch.blocks_per_sm),
        str(launch.ldmatrix or ""),
        str(launch.wide_copies),
        *(f"{value:.2f}" if value else "" for value in per_score),
        f"{launch.instructions_around:.0f}",
    )


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
            kernel.matrix_instructions + " serialised" * (kernel.serialised_products > 0),
            _histogram(kernel.load_widths),
            _histogram(kernel.store_widths),
            str(kernel.narrow_tile_loads),
            f"{per_score[name]:.2f}" if name in per_score else "",
        )
        for name, kernel in kernels.items()
    ]
    columns += ("stores x bytes", "narrow tiles", "instructions/score")
    print_table(f"Triton kernels, {title}", columns, rows)
    if launches := {_cuda_row(launch): None for case in cases for launch in case.launches}.keys() - {()}:
        columns = ("CUDA kernel", "warps", "registers", "spills; on sm_80", "shared, B", "blocks/SM", "ldmatrix")
        columns += ("16-byte reads", "instructions/score, hot", "in all", "around, a thread")
        print_table(f"CUDA kernels, {title}", columns, sorted(launches))
    columns = ("backend", "case", "direction", "predicted, us", "by", "floor, us", "by", "of it")
    columns += ("launches, us, and what is added",)
    rows = [
        (
            case.backend,
            case.case,
            case.direction,
            f"{case.microseconds:.1f}",
            case.terms.most_common(1)[0][0],
            f"{max(case.floor_terms.values()):.1f}",
            largest(case.floor_terms),
            f"{1 / case.times_the_floor:.0%}",
            "\n".join(
                f"{_short(launch.kernel)} {launch.microseconds:.1f} {largest(launch.terms)}{_added(launch)}"
                for launch in case.launches
            ),
        )
        for case in cases
    ]
    print_table(f"Predicted times, {title}", columns, rows)


def _figures(case: CaseAudit) -> dict[str, Any]:
    """Give all that is known about a case."""
    launches = [asdict(launch) | {"microseconds": launch.microseconds} for launch in case.launches]
    return asdict(case) | {"microseconds": case.microseconds, "launches": launches}


def predictions(cases: Iterable[CaseAudit]) -> list[dict[str, Any]]:
    """Give the times alone, as ``benchmarks/results`` keeps them."""

    def of_launch(launch: LaunchAudit) -> dict[str, Any]:
        per_score = launch.instructions_per_score
        return {"us": round(launch.microseconds, 1), "instructions_per_score": per_score and round(per_score, 2)}

    return [
        {
            "backend": case.backend,
            "case": case.case,
            "direction": case.direction,
            "predicted_us": round(case.microseconds, 1),
            "floor_us": round(max(case.floor_terms.values()), 1),
            "by": case.terms.most_common(1)[0][0],
            "floor_by": largest(case.floor_terms),
            "launches": {_short(launch.kernel): of_launch(launch) for launch in case.launches},
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
    if reason := why_no_cuda(options.arch):
        print(f"the CUDA kernels are left out: {reason}")
    show(cases, kernels, f"{options.arch}, {options.dtype}")
    shown = ", ".join(f"{name} {value:.3g}" for name, value in asdict(rates).items())
    rates_of = f"rates of {options.rates.name}" if options.rates else "assumed rates of an NVIDIA H200"
    print(f"{rates_of}: {shown}")
    ceilings = CEILINGS if (options.arch, options.dtype) == CEILED else ()
    past = violations(cases, ceilings)
    missed = violations(cases, GOALS if ceilings else ())
    title = {"arch": options.arch, "dtype": options.dtype, "rates": asdict(rates)}
    if options.dump:
        options.dump.mkdir(parents=True, exist_ok=True)
        for name, cubin in cubins.items():
            (options.dump / f"{name}.cubin").write_bytes(cubin)
        if why_no_cuda(options.arch) is None:
            for name, cubin in cubins_of(options.arch).items():
                (options.dump / f"cuda-{name}.cubin").write_bytes(cubin)
        figures = title | {
            "ceilings": [asdict(ceiling) for ceiling in ceilings],
            "kernels": {name: asdict(kernel) for name, kernel in kernels.items()},
            "cases": [_figures(case) for case in cases],
            "violations": past,
            "missed_goals": missed,
        }
        (options.dump / "audit.json").write_text(json.dumps(figures, indent=1) + "\n")
    if options.save:
        what = "predictions from machine code (python -m benchmarks.gpu_audit), no measurement"
        about = {"what": what, "date": date.today().isoformat(), "triton": version("triton"), "gpu": rates_of}
        result = about | title | {"cases": predictions(cases)}
        options.save.write_text(json.dumps(result, indent=1) + "\n")
    for line in missed:
        print(f"goal missed: {line}")
    for line in past:
        print(f"past a ceiling: {line}")
    if ceilings and not past:
        print(f"within all {len(ceilings)} ceilings")
    return 1 if past else 0


if __name__ == "__main__":
    sys.exit(main())

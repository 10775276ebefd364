"""Audits the kernels of csrc/cuda whose groups are sequences: attention over time and over space, and mixing."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks import cubins
from benchmarks.audited import CaseAudit, CudaLaunchAudit
from benchmarks.cuda_audit import (
    SHARED_LIMITS,
    Block,
    ForwardShape,
    Work,
    audit_forward_launch,
    audit_launch,
    kernel,
)
from benchmarks.cuda_kernels import MainLoop
from benchmarks.cuda_single_pass import ELEMENTS, SHORT, audit_short
from benchmarks.gpu_plans import FAMILIES
from benchmarks.prediction import PARTITIONS, SMS, Cost, Rates
from benchmarks.sass import LANES
from benchmarks.shapes import DividedCase, MixingCase

_FIELDS = ("dim", "threads", "splits", "block_keys", "resident", "shared_bytes")
LONGEST = 400
_BACKWARD = """const auto plan = plan_sequence_backward(n[0], n[1], n[2]);
  struct : BackwardPlan { int64_t per_sm, job0, job1; } p{
    plan, walking_blocks(plan, n[2]), plan.job_warps[0], plan.job_warps[1]};"""
_BACKWARD_FIELDS = ("dim", "threads", "warps", "warp_keys", "query_tile", "rows", "walks", "shared_bytes", "per_sm")
_BACKWARD_FIELDS += ("job0", "job1", "helps", "key_warp")
_FORWARD = "const auto p = plan_sequence_forward(n[0], n[1], n[2], n[3]);"


@dataclass(frozen=True)
class Sequences:
    """Those that a launch is for."""

    keys: int
    groups: int  # sequences times heads
    head_dim: int
    share: float  # of the bytes of the case


def sequences_of(case: DividedCase | MixingCase) -> list[Sequences]:
    """Give those of a case: over time, then over space."""
    if isinstance(case, MixingCase):
        return [Sequences(case.num_tokens, case.qkv_shape[0] * case.heads, case.head_dim, 1.0)]
    found = []
    for heads, keys, groups in (
        (case.temporal_heads, case.num_frames, case.num_sites),
        (case.heads - case.temporal_heads, case.num_sites + case.has_cls, case.num_frames),
    ):
        if heads:
            found.append(Sequences(keys, case.batch * groups * heads, case.head_dim, heads / case.heads))
    return found


def audit(names: Iterable[str] | None, arch: str, dtype: torch.dtype, rates: Rates) -> list[CaseAudit]:
    """Audit the cases that have sequences of more rows than a warp has at a time, and room for two of them.

    Args:
        names: cases; all by default.
        arch: "sm_80" or "sm_90".
        dtype: float16 or bfloat16.
        rates: what predictions divide by.
    """
    found = []
    for family in ("divided", "mixing"):
        for name, case in FAMILIES[family].cases.items():
            sequences = sequences_of(case)
            longest = max(of.keys for of in sequences)
            if (names is not None and name not in names) or not SHORT < longest <= LONGEST:
                continue
            for direction, audited in (("forward", audit_forward), ("backward", audit_backward)):
                if direction == "backward" and not all(
                    of.keys <= SHORT or backward_plan(of, arch)["walks"] for of in sequences
                ):
                    continue
                launches = tuple(
                    audited(case, of, dtype, arch, rates)
                    if of.keys > SHORT
                    else audit_short(time_alone(case), direction, arch, dtype, rates)
                    for of in sequences
                )
                floor = FAMILIES[family].floor(case, direction, dtype).microseconds(rates)
                found.append(CaseAudit("cuda", family, name, direction, launches, floor))
    return found


def time_alone(case: DividedCase) -> DividedCase:
    """Give the heads of a case that attend over time."""
    return replace(case, kind="temporal", heads=case.temporal_heads)


def backward_plan(of: Sequences, arch: str) -> dict[str, int]:
    """Plan the backward pass for some sequences as a launch does."""
    return cubins.planner("plan_sequence_backward", _BACKWARD, _BACKWARD_FIELDS)(
        of.keys, of.head_dim, SHARED_LIMITS[arch]
    )


def forward_kernel(of: Sequences, dtype: torch.dtype, arch: str) -> tuple[tuple[Any, ...], dict[str, int]]:
    """Give the kernel that a forward pass launches for some sequences, and its plan."""
    plan = cubins.planner("plan_sequence_forward", _FORWARD, _FIELDS)(
        of.keys, of.head_dim, of.groups, SHARED_LIMITS[arch]
    )
    name = "sequence_forward" if plan["resident"] else "streamed_sequence_forward"
    return (name, ELEMENTS[dtype], plan["dim"]), plan


def backward_kernel(of: Sequences, dtype: torch.dtype, arch: str) -> tuple[tuple[Any, ...], dict[str, int]]:
    """The same of the backward pass."""
    plan = backward_plan(of, arch)
    return ("walking_sequence_backward" if plan["walks"] else "sequence_backward", ELEMENTS[dtype], plan["dim"]), plan


def audit_forward(
    case: DividedCase | MixingCase, of: Sequences, dtype: torch.dtype, arch: str, rates: Rates
) -> CudaLaunchAudit:
    """Audit the launch of a forward pass for some sequences of a case."""
    name, plan = forward_kernel(of, dtype, arch)
    moved = of.share * case.bytes_moved("forward", dtype) + 4 * of.groups * of.keys
    on_sm_80, _ = forward_kernel(of, dtype, "sm_80")
    return audit_forward_launch(name, plan, ForwardShape(of.keys, of.groups, moved), arch, rates, on_sm_80)


def audit_backward(
    case: DividedCase | MixingCase, of: Sequences, dtype: torch.dtype, arch: str, rates: Rates
) -> CudaLaunchAudit:
    """Audit the launch of a backward pass for some sequences of a case, whose keys come at once."""
    name, plan = backward_kernel(of, dtype, arch)
    assert plan["walks"], f"expected keys that come at once, got {of.keys}"
    dim, warps, threads, tile = plan["dim"], plan["warps"], plan["threads"], plan["query_tile"]
    program, _ = kernel(arch, *name)
    tiles, sixteens, slots = math.ceil(of.keys / tile), math.ceil(of.keys / 16), plan["rows"]
    per_sm, helps = plan["per_sm"], plan["helps"]
    blocks = min(of.groups, SMS * per_sm)
    walk = of.groups / blocks  # sequences of a block

    def copies(body: frozenset[int]) -> float:
        """In the main loop: once a tile, as many of the next sequence's keys; their log-sum-exps once a sequence."""
        if not program.is_in("main", body):
            return 0  # around it, only the first sequence and what has numbers of any size
        if program.narrow_copies(body):
            return of.keys / LANES / tiles
        return any(other < body for other in program.loops)

    def steps(body: frozenset[int]) -> float:
        """Of 32 queries and half of the elements; a last tile of 16 has a loop of its own."""
        alike = [program.flops(other) for other in program.loops if program.kind(other) == "steps"]
        most = max(alike)
        return 32 * dim * 16 * sixteens / most * (program.flops(body) == most)

    def rounds(body: frozenset[int]) -> float:
        """How often a loop runs; rows are aligned, and no channels are from other frames."""
        kind = program.kind(body)
        if kind == "copy":
            return copies(body)
        own_rows, pieces = math.ceil(slots / threads), tile * dim / 16 / LANES  # pieces: half of a row each
        in_main = program.is_in("main", body)
        if kind == "sums":  # two rows at a time: of half of dq; of dk and of dv
            return pieces / (2 if program.is_in("jobs", body) else 1) * program.is_aligned(body) if in_main else 2
        return {
            "group": walk,
            "keys": tiles,
            "jobs": 2 / warps,  # halves of dq
            "meet": 0 if dim == 64 else 1,  # by fewer queries than a tile
            "steps": steps(body),
            "statistics": own_rows,
            "records": max(1.0, 4 * tile / threads) if program.shuffles(body) else own_rows,
            "rows": 1,
            "inner": pieces if program.is_in("sums", body) and program.is_aligned(body) else 0,
        }.get(kind, 0)

    # Of a warp's tiles, the last may hold half as many queries, or keys.
    owners = warps - helps
    filled = sixteens / (2 * tiles) * sixteens / (2 * owners)
    summing = min(warps, 4 * tile // LANES)  # warps that find delta
    shares = {"products": filled * owners / warps, "copies": 1 / warps, "last": 1 / tiles, "sums": summing / warps}
    shares["floats"] = 1 / (tiles * warps)  # of a cls token
    loop = program.main_loop(rounds, shares=shares)
    assert loop is not None
    rounds_of_main = of.groups * tiles * warps
    computed = of.groups * (16 * sixteens) ** 2
    scores = computed / rounds_of_main
    work = Work(
        bytes=of.share * (case.bytes_moved("forward_backward", dtype) - case.bytes_moved("forward", dtype)),
        walked=rounds_of_main * LANES * loop.hot,
        scores=computed,
        flops_per_score=5 * 2 * dim,
        traffic=rounds_of_main * LANES * loop.bytes,
        shared=rounds_of_main * LANES * loop.shared_bytes,
    )
    # Of a warp's average, what each has to do of a kind.
    of_products = [sum(32 * w + 16 * t < of.keys for t in range(2)) * warps / sixteens for w in range(warps)]
    of_jobs = [((plan["job0"] == w) + (plan["job1"] == w)) * warps / 2 for w in range(warps)]
    of_copies = [((plan["key_warp"] == w) + (w == warps - 1)) * warps / 2 for w in range(warps)]
    of_sums = [(w < summing) * warps / summing for w in range(warps)]
    weights = {"products": of_products, "jobs": of_jobs, "copies": of_copies, "sums": of_sums}
    block = Block(blocks, warps, plan["shared_bytes"], 0, [1] * warps)
    on_sm_80, _ = backward_kernel(of, dtype, "sm_80")
    audited = audit_launch(name, arch, rates, rounds, work, block, (loop, scores), on_sm_80=on_sm_80)
    waits = waiting(audited, loop, weights, rounds_of_main, rates) - audited.added["unequal share"]
    return replace(audited, added={**audited.added, "barriers": max(0.0, waits)})


def waiting(
    audited: CudaLaunchAudit, loop: MainLoop, weights: Mapping[str, list[float]], rounds: float, rates: Rates
) -> float:
    """Give the microseconds that a launch takes beyond its longest term because of its barriers.

    From one barrier to the next, the busiest unit counts: shared memory, or in the busiest partition of an SM what
    issues instructions or multiplies. A warp that has nothing to do there waits.

    Args:
        audited: the launch; all warps do the same outside of its main loop.
        loop: its main loop.
        weights: for each kind of part, what each warp does of it, in units of the average; the same for all others.
        rounds: of the main loop, of all warps.
        rates: of the GPU.
    """
    warps = audited.warps
    inside = 0.0
    for phase in {part.phase for part in loop.parts}:
        parts = [part for part in loop.parts if part.phase == phase]
        busiest: dict[str, float] = {}
        for quantity in ("instructions", "exponentials", "flops"):
            done = [0.0] * PARTITIONS
            for number in range(audited.grid.together * warps):  # warps go to the partitions in turn
                for part in parts:
                    weight = weights[part.kind][number % warps] if part.kind in weights else 1.0
                    done[number % PARTITIONS] += weight * getattr(part, quantity)
            busiest[quantity] = rounds * PARTITIONS * max(done) / (audited.grid.together * warps)
        inside += max(
            Cost(
                bytes=0,
                instructions=LANES * busiest["instructions"],
                exponentials=LANES * busiest["exponentials"],
                flops=busiest["flops"],
                matrix_instructions="mma.sync",
                shared_bytes=LANES * rounds * sum(part.shared_bytes for part in parts),
            )
            .microseconds(rates)
            .values()
        )
    around = LANES * audited.instructions_around * audited.grid.blocks * warps / rates.instructions_per_s * 1e6
    return max(0.0, inside + around - max(audited.terms.values()))

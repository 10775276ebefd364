"""Audits the kernels of csrc/cuda that read all that they need before they use it: short sequences, temporal shift.

They run at the speed of memory if enough reads are under way: on each SM, those that a thread starts before it uses the
first of them, 16 bytes of each lane of the warps that fit.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence

import networkx  # type: ignore[import-untyped]  # torch depends on it
import torch

from benchmarks import cubins
from benchmarks.audited import CaseAudit, CudaLaunchAudit
from benchmarks.gpu_plans import DIRECTIONS, FAMILIES
from benchmarks.prediction import Cost, Grid, Rates
from benchmarks.sass import LANES, Instruction, Program, exponentials, resident_warps, spills
from benchmarks.shapes import DividedCase, MixingCase

ELEMENTS = {torch.bfloat16: "__nv_bfloat16", torch.float16: "__half"}
_WARPS = 4  # of a block
SHORT = 32  # rows
_SHIFT_WORDS = 4  # of a thread
_WIDE = 16  # bytes
_REGISTER = re.compile(r"\bR(\d+)")


def audit(names: Iterable[str] | None, arch: str, dtype: torch.dtype, rates: Rates) -> list[CaseAudit]:
    """Audit the cases that these kernels run.

    Args:
        names: cases; all by default.
        arch: "sm_80" or "sm_90".
        dtype: float16 or bfloat16.
        rates: what predictions divide by.
    """
    found = []
    for family, audited in (("divided", audit_short), ("shift", _audit_shift)):
        for name, case in FAMILIES[family].cases.items():
            if (names is not None and name not in names) or not (family == "shift" or _is_short(case)):
                continue
            for direction in DIRECTIONS:
                launch = audited(case, direction, arch, dtype, rates)
                floor = FAMILIES[family].floor(case, direction, dtype).microseconds(rates)
                found.append(CaseAudit("cuda", family, name, direction, (launch,), floor))
    return found


def _is_short(case: DividedCase) -> bool:
    """Tell whether all heads attend along one axis, of few rows."""
    if case.temporal_heads == case.heads:
        return case.num_frames <= SHORT
    return case.temporal_heads == 0 and not case.has_cls and case.num_sites <= SHORT


def audit_short(case: DividedCase, direction: str, arch: str, dtype: torch.dtype, rates: Rates) -> CudaLaunchAudit:
    """Audit the launch of a pass, where all heads attend along one axis of few rows."""
    length = case.num_frames if case.temporal_heads else case.num_sites
    rows = 16 if 2 * (16 // length) >= 32 // length else 32
    sequences = case.batch * case.num_frames * case.num_sites // length
    tiles = math.ceil(sequences / (rows // length)) * case.heads
    dim = 32 if case.head_dim <= 32 else 64
    name = f"short_{direction}", ELEMENTS[dtype], str(dim), str(rows)
    moved = FAMILIES["divided"].floor(case, direction, dtype).bytes
    return _audit(name, arch, rates, math.ceil(tiles / _WARPS), moved, scores=rows * rows)


def _audit_shift(case: MixingCase, direction: str, arch: str, dtype: torch.dtype, rates: Rates) -> CudaLaunchAudit:
    frames, tokens = case.qkv_shape[:2]
    words = tokens * case.channels * dtype.itemsize // _WIDE
    blocks = frames * math.ceil(words / (_WARPS * LANES * _SHIFT_WORDS))
    moved = FAMILIES["shift"].floor(case, direction, dtype).bytes
    return _audit(("shift_channels", "uint4", "int"), arch, rates, blocks, moved, rounds=len(case.channel_shifts))


def _audit(
    name: tuple[str, ...],
    arch: str,
    rates: Rates,
    blocks: int,
    moved: float,
    *,
    scores: int = 0,
    rounds: int = 1,
) -> CudaLaunchAudit:
    """Put together what is known of a launch: a warp computes so many scores; its one short loop has so many rounds."""
    program, resources = cubins.kernels(arch)[name]
    way = usual_way(program, rounds)
    reads = reads_under_way([instruction for instruction, _ in way])
    per_lane = sum(times for _, times in way)
    lanes, warps = blocks * _WARPS * LANES, resident_warps(arch, resources.registers, 0, _WARPS)
    cost = Cost(
        bytes=moved,
        instructions=lanes * per_lane,
        exponentials=lanes * sum(times * exponentials([instruction]) for instruction, times in way),
        flops=blocks * _WARPS * sum(times * instruction.matrix_flops for instruction, times in way),
        matrix_instructions="mma.sync",
        l2_bytes=moved,
    )
    grid, terms, executed = Grid(blocks, warps // _WARPS), cost.microseconds(rates), program.executed()
    return CudaLaunchAudit(
        kernel=f"{name[0]}<{', '.join(name[2:] if scores else name[1:])}>",
        work={"scores": blocks * _WARPS * scores},
        spill_instructions=spills(executed),
        local_bytes=resources.stack + resources.local,
        serialised_products=None,
        narrow_tile_loads=None,
        matrix_instructions="mma.sync" if scores else None,
        instructions_per_score=LANES * per_lane / scores if scores else None,
        cost=cost,
        grid=grid,
        terms=terms,
        added=grid.added(terms, rates),
        warps=_WARPS,
        registers=resources.registers,
        shared_bytes=0,
        spills_on_sm_80=spills(cubins.kernels("sm_80")[name][0].executed()),
        hot_instructions_per_score=None,
        instructions_around=per_lane,
        wide_copies=reads,
        ldmatrix=None,
        bytes_under_way=_WIDE * LANES * warps * reads,
    )


def usual_way(program: Program, rounds: int = 1) -> list[tuple[Instruction, int]]:
    """Give the instructions of the longest way on which all accesses have 16 bytes, each with how often it is executed.

    Args:
        program: a kernel.
        rounds: how often a loop that moves nothing runs.
    """
    narrow = {index for index, i in enumerate(program.instructions) if i.width is not None and i.width != _WIDE}
    graph = networkx.DiGraph(program.flow.subgraph(set(program.flow) - narrow))
    graph.remove_edges_from([(tail, head) for tail, head in list(graph.edges) if head <= tail])
    ends = [index for index in graph if program.instructions[index].name == "EXIT"]
    graph = graph.subgraph(networkx.descendants(graph, 0) & _before(graph, ends) | {0})
    idle = [loop for loop in program.loops if not any(program.instructions[index].width for index in loop)]
    times = {index: rounds if any(index in loop for loop in idle) else 1 for index in graph}
    weighted = networkx.DiGraph()
    weighted.add_nodes_from(graph)
    weighted.add_edges_from((tail, head, {"times": times[head]}) for tail, head in graph.edges)
    way = networkx.dag_longest_path(weighted, weight="times")
    return [(program.instructions[index], times[index]) for index in way]


def _before(graph: networkx.DiGraph, ends: Sequence[int]) -> set[int]:
    return set(ends).union(*(networkx.ancestors(graph, end) for end in ends))


def reads_under_way(way: Iterable[Instruction]) -> int:
    """Count the reads of 16 bytes that start before the first instruction that uses what one of them brings."""
    arriving: set[int] = set()
    reads = 0
    for instruction in way:
        registers = [int(number) for number in _REGISTER.findall(instruction.operands)]
        is_read = instruction.name == "LDG" and instruction.width == _WIDE
        writes_first = not instruction.name.startswith("ST")
        if arriving.intersection(registers[1:] if writes_first else registers):
            break
        if is_read:
            reads += 1
            arriving.update(range(registers[0], registers[0] + 4))
    return reads

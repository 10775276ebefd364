"""Audits the kernels of csrc/cuda for windows: which one a case launches and how, and what that costs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch

from benchmarks import cubins
from benchmarks.audited import CaseAudit, CudaLaunchAudit
from benchmarks.cuda_kernels import CudaProgram, MainLoop, Rounds
from benchmarks.cuda_single_pass import ELEMENTS
from benchmarks.gpu_plans import FAMILIES
from benchmarks.prediction import PARTITIONS, SMS, Cost, Grid, Rates
from benchmarks.sass import LANES, Resources, exponentials, resident_warps, spills
from benchmarks.shapes import WindowCase
from vidattn.geometry import WindowGeometry, bias_extents, num_bias_rows

SHARED_LIMITS = {"sm_80": 163 * 1024, "sm_90": 227 * 1024}  # of a block
# What makes a plan of the numbers of a case (see _numbers).
_SHAPE = """
  for (int i = 0; i < 3; ++i) shape.window[i] = n[i], shape.table_window[i] = n[9 + i];
  for (int i = 0; i < 2; ++i) shape.bias_extent[i] = n[12 + i];
  shape.head_dim = n[3], shape.table_rows = n[4], shape.plain_bias = n[5] != 0, shape.stride_sets = n[6];
  shape.blocks = n[7];"""
_FORWARD = f"WindowShape shape{{}};{_SHAPE}\n  const auto p = plan_forward(shape, n[8]);"
_FORWARD_FIELDS = ("dim", "threads", "splits", "block_keys", "resident", "depth_fastest", "shared_bytes")
_BACKWARD = f"""BackwardShape shape{{}};{_SHAPE}
  shape.table_gradient = shape.aligned_rows = true;
  const auto plan = plan_backward(shape, n[8]);
  struct : BackwardPlan {{ int64_t shares, whole_rows; }} p{{
    plan, backward_shares(n[7] / n[14], n[14], plan, n[4]), kWholeRowTokens}};"""
_BACKWARD_FIELDS = (
    "dim",
    "threads",
    "warp_keys",
    "query_tile",
    "blocks",
    "depth_fastest",
    "bias_floats",
    "table_floats",
)
_BACKWARD_FIELDS += ("short_window", "block_keys", "shared_bytes", "shares", "whole_rows")


@cache
def kernel(arch: str, *name: object) -> tuple[CudaProgram, Resources]:
    program, resources = cubins.kernels(arch)[tuple(map(str, name))]
    return CudaProgram(program, backward=str(name[0]).endswith("backward")), resources


def _numbers(case: WindowCase, arch: str, stride_sets: int) -> tuple[int, ...]:
    """Give what the planners need: shape, groups times heads, shared memory of a block, bias, heads."""
    windows, extents = case.geometry, bias_extents(case.window, case.geometry, "prefix")
    shape = (*windows.window, case.head_dim, num_bias_rows(case.window), int(extents == windows.window[1:]))
    return (*shape, stride_sets, _groups(case), SHARED_LIMITS[arch], *case.window, *extents, case.heads)


def plan_forward(case: WindowCase, arch: str) -> dict[str, int]:
    """Plan the forward pass of a case as a launch does; one stride leads from token to token."""
    return cubins.planner("plan_forward", _FORWARD, _FORWARD_FIELDS)(*_numbers(case, arch, 0))


def plan_backward(case: WindowCase, arch: str) -> dict[str, int]:
    """The same of the backward pass, with the gradient of the table."""
    return cubins.planner("plan_backward", _BACKWARD, _BACKWARD_FIELDS)(*_numbers(case, arch, 0))


def forward_kernel(case: WindowCase, dtype: torch.dtype, arch: str) -> tuple[tuple[Any, ...], dict[str, int]]:
    """Give the kernel that a forward pass launches, and its plan."""
    plan = plan_forward(case, arch)
    resident = "depth_fastest_window_forward" if plan["depth_fastest"] else "window_forward"
    return (resident if plan["resident"] else "streamed_window_forward", ELEMENTS[dtype], plan["dim"]), plan


def backward_kernel(case: WindowCase, dtype: torch.dtype, arch: str) -> tuple[tuple[Any, ...], dict[str, int]]:
    """The same of the backward pass."""
    plan = plan_backward(case, arch)
    if plan["short_window"]:
        return ("short_window_backward", ELEMENTS[dtype], plan["query_tile"]), plan
    name = "depth_fastest_window_backward" if plan["depth_fastest"] else "window_backward"
    return (name, ELEMENTS[dtype], plan["dim"]), plan


def audit_forward(case: WindowCase, dtype: torch.dtype, arch: str, rates: Rates) -> tuple[CudaLaunchAudit, ...]:
    """Audit the one launch of a forward pass."""
    (name, plan), windows = forward_kernel(case, dtype, arch), case.geometry
    groups, tokens, table_rows = _groups(case), windows.num_tokens, num_bias_rows(case.window)
    moved = case.bytes_moved("forward", dtype) + 4 * groups * tokens + 4 * table_rows * case.heads
    shape = ForwardShape(tokens, groups, moved, table_rows, border_share(windows))
    return (audit_forward_launch(name, plan, shape, arch, rates, forward_kernel(case, dtype, "sm_80")[0]),)


@dataclass(frozen=True)
class ForwardShape:
    """What a launch of a forward pass is for."""

    tokens: int  # of a group
    groups: int  # times heads
    bytes: float  # each tensor once
    table_rows: int = 0  # of the bias
    border: float = 0.0  # share of the groups with two regions


def audit_forward_launch(
    name: tuple[Any, ...],
    plan: Mapping[str, int],
    shape: ForwardShape,
    arch: str,
    rates: Rates,
    on_sm_80: tuple[Any, ...],
) -> CudaLaunchAudit:
    """Audit a launch of csrc/cuda/forward.cuh, by its kernel and its plan; ``on_sm_80`` as in ``audit_launch``."""
    tokens, warps, splits = shape.tokens, plan["threads"] // LANES, max(1, plan["splits"])
    slots = math.ceil(tokens / 16) * 16
    program, _ = kernel(arch, *name)
    blocks = math.ceil(tokens / plan["block_keys"])

    def of_warp(work: float) -> float:
        """Rounds of a warp, where a block's threads share some work."""
        return math.ceil(work / LANES) / warps

    def rounds(body: frozenset[int]) -> float:
        """How often a loop runs: a block's threads share rows, pieces of 16 bytes of keys and values, or the table."""
        kind = program.kind(body)
        return {
            "group": passes,
            "keys": blocks,
            "scores": blocks,  # of keys, around the main loop
            "copy": of_warp(2 * slots * plan["dim"] * 2 // 16 / max(1, program.copies(body))),
            "table": of_warp(shape.table_rows / max(1, program.copies(body))),
            "inner": 0,  # other strides than one
        }.get(kind, of_warp(slots))

    loop, masked = program.main_loop(rounds), program.main_loop(rounds, masked=True)
    assert loop is not None and masked is not None
    scores = loop.flops / (2 * 2 * plan["dim"])  # of a warp in one round
    rows = scores * plan["dim"] / 32 / (8 * loop.tiles)  # queries that a warp has at a time
    halves = any(2 * program.flops(body) == loop.flops for body in program.product_loops)  # for a last tile
    granule = rows / 2 if halves else rows
    tiles = math.ceil(tokens / granule)
    counts = [tiles // (warps * splits) + (warp < tiles % (warps * splits)) for warp in range(warps * splits)]
    passes = sum(math.ceil(count * granule / rows) for count in counts) / len(counts)

    groups, border = shape.groups, shape.border
    computed = groups * tiles * granule * math.ceil(tokens / 8) * 8
    hot = (1 - border) * loop.hot + border * masked.hot
    # A maximum is raised once for each tile of queries.
    walked = LANES * (computed * hot / scores + groups * tiles * granule / rows * (loop.all - loop.hot))
    shared = LANES * computed / scores * ((1 - border) * loop.shared_bytes + border * masked.shared_bytes)
    work = Work(shape.bytes, walked, computed, 2 * 2 * plan["dim"], 0.0, shared)
    copy_in = plan["block_keys"] * plan["dim"] * 2 * 2 + 4 * shape.table_rows
    block = Block(groups * splits, warps, plan["shared_bytes"], copy_in, counts, turns=True)
    return audit_launch(name, arch, rates, rounds, work, block, (loop, scores), border, on_sm_80=on_sm_80)


def audit_backward(case: WindowCase, dtype: torch.dtype, arch: str, rates: Rates) -> tuple[CudaLaunchAudit, ...]:
    """Audit the launches of a backward pass: one, and the sum of the tables that its blocks leave behind."""
    (name, plan), windows = backward_kernel(case, dtype, arch), case.geometry
    tokens, threads, shares, table_rows = (
        windows.num_tokens,
        plan["threads"],
        plan["shares"],
        num_bias_rows(case.window),
    )
    warps, tile, blocks, row_bytes = threads // LANES, plan["query_tile"], plan["blocks"], plan["dim"] * 2
    depth_fastest, whole_rows = bool(plan["depth_fastest"]), tokens <= plan["whole_rows"]
    block_keys = plan["block_keys"] if depth_fastest else math.ceil(tokens / blocks)
    slots, tiles = math.ceil(max(tokens, block_keys) / 32) * 32, math.ceil(tokens / tile)
    walk = case.batch * windows.num_windows / shares  # windows of a block
    program, _ = kernel(arch, *name)

    scores = tile * plan["warp_keys"]
    owners = block_keys // plan["warp_keys"] if depth_fastest else warps  # of keys
    last_jobs = 2 if owners % 2 else 4  # depth fastest: 32 queries each

    def copies(body: frozenset[int]) -> float:
        """Of two copies in a row the first one is of keys and values, the other of queries."""
        if depth_fastest:  # a row at a time, of keys, of values late or early; of the first window early
            alike, early = program.siblings(body), owners % 2
            return owners * ([1, 1 - early, early] if len(alike) > 1 else [early])[alike.index(body)]
        in_main = program.is_in("main", body)
        aligned = [loop for loop in program.siblings(body) if program.is_aligned(loop)]
        if body not in aligned:
            return 0
        of_queries = in_main or aligned.index(body) % 2 == 1
        at_a_time = threads * max(1, program.copies(body))
        copied = math.ceil(2 * (tile if of_queries else slots) * row_bytes // 16 / at_a_time)
        if in_main:  # of the next tile
            return copied * (tiles - 1) / tiles
        return copied * (blocks - 1) / blocks if program.is_in("keys", body) else copied

    def sums(body: frozenset[int]) -> float:
        """The table's, at the end or once a block of keys, then those of padding."""
        of_table, in_group = math.ceil(table_rows / threads), program.is_in("group", body)
        return of_table if in_group == (blocks > 1) and program.siblings(body).index(body) == 0 else 0

    def rows(body: frozenset[int]) -> float:
        """Tables of the tokens; before them zeros: for sums of the table, of padding, and for the bias."""
        if program.is_in("group", body):
            return math.ceil(slots / threads)
        index, tables = program.siblings(body).index(body), plan["table_floats"]
        if depth_fastest:
            floats = (tables, 0, plan["bias_floats"])
        else:
            floats = (tables * warps,)
        return math.ceil(floats[index] / threads) if index < len(floats) else 0

    def statistics(body: frozenset[int]) -> float:
        """Four threads read a row of the output; of whole rows, and depth fastest, a thread reads one number."""
        if depth_fastest:
            return math.ceil(block_keys / threads)
        if (program.copies(body) == 1) != whole_rows:
            return 0
        return math.ceil(slots * (1 if whole_rows else 4) / threads)

    def scores_of_rows(body: frozenset[int]) -> float:
        """A warp has 16 rows at a time and goes over the keys by 8; depth fastest, dq of the last rows of queries."""
        inner = program.is_in("scores", body)
        if depth_fastest:
            return owners if inner else last_jobs / warps
        return math.ceil(tokens / 8) if inner else math.ceil(slots / 16 / warps) * whole_rows

    def meet(body: frozenset[int]) -> float:
        """Depth fastest, a row of queries comes eight at a time, one for each depth."""
        return tile / 8 if depth_fastest else scores / (program.flops(body) / (4 * 2 * plan["dim"]))

    def jobs(body: frozenset[int]) -> float:
        """Products that are written, of a tile of queries: depth fastest, four for two rows, but for the last ones."""
        return (owners - 1) // 2 * 4 / (tiles * owners) if depth_fastest else tile / 8 / warps

    def steps(body: frozenset[int]) -> float:
        """The keys of a block, for half of the elements of 16 queries; depth fastest, a row of them at a time."""
        at_a_time = plan["warp_keys"] if depth_fastest else program.flops(body) / (2 * 16 * plan["dim"] / 2)
        return math.ceil(block_keys / at_a_time)

    def rounds(body: frozenset[int]) -> float:
        """As in a forward pass; no padding, and each tensor has one stride from token to token."""
        kind = program.kind(body)
        of_its_own = {"copy": copies, "sums": sums, "rows": rows, "meet": meet, "jobs": jobs, "steps": steps}
        of_its_own |= {"statistics": statistics, "scores": scores_of_rows}
        if kind in of_its_own:
            return of_its_own[kind](body)
        differences = 64 / 15 if depth_fastest else warps  # pairs of depths with one difference; sums of the warps
        return {
            "group": walk,
            "keys": blocks,
            "restart": 1,
            "table": math.ceil(table_rows / (threads * max(1, program.copies(body)))),
            "records": tokens <= 64,
            "inner": differences if program.is_in("sums", body) or program.is_in("records", body) else 0,
        }[kind]

    loop, masked = program.main_loop(rounds), program.main_loop(rounds, masked=True)
    assert loop is not None and masked is not None
    windows_and_heads = _groups(case)
    rounds_of_main = windows_and_heads * blocks * tiles * owners
    computed = rounds_of_main * scores
    border = border_share(windows)
    walked = rounds_of_main * LANES * ((1 - border) * loop.hot + border * masked.hot)
    moved = FAMILIES["window3d"].floor(case, "backward", dtype).bytes + 4 * shares * case.heads * table_rows
    traffic = rounds_of_main * LANES * loop.bytes
    shared = rounds_of_main * LANES * ((1 - border) * loop.shared_bytes + border * masked.shared_bytes)
    flops = loop.flops / scores
    if depth_fastest:  # dq of the last one or two rows of queries is behind the loop
        flops += last_jobs * 32 * block_keys * 2 * plan["dim"] / (tiles * owners * scores)
    work = Work(moved, walked, computed, flops, traffic, shared)
    copy_in, tasks = walk * 4 * slots * row_bytes, [1] * warps  # keys, values; context and its gradient, for delta
    if depth_fastest:  # delta is found beside the products, but for the first row of queries; dq is work for four warps
        copy_in = (2 * tokens + 3 * tile + (walk - 1) * tokens * (2 - owners % 2)) * row_bytes  # the rest comes early
        products, queries = round((2 * 64 / 56 + 2) * scores), 2 * 16 * tokens
        tasks = [products * owners * (warp < owners) for warp in range(warps)]  # of a window
        for warp in range(4):
            tasks[warp] += queries * (owners // 2 + owners % 2 * (warp < 2))
    block = Block(shares * case.heads, warps, plan["shared_bytes"], copy_in, tasks)
    on_sm_80, _ = backward_kernel(case, dtype, "sm_80")
    whole = audit_launch(name, arch, rates, rounds, work, block, (loop, scores), on_sm_80=on_sm_80)

    threads, columns, name = 256, case.heads * table_rows, ("sum_shares",)
    parts = 4.0 * (shares + 1) * columns
    block = Block(math.ceil(columns / 32), threads // LANES, 8 * threads, 0, [1] * (threads // LANES))
    total = audit_launch(
        name, arch, rates, lambda _: math.ceil(shares / 8), Work(parts, 0, 0, 0, parts, 0), block, None
    )
    return whole, total


@dataclass(frozen=True)
class Work:
    """What a launch does, apart from what is around the products."""

    bytes: float  # each tensor once
    walked: float  # instructions of the main loops, of all lanes
    scores: float  # those that only fill up a tile included
    flops_per_score: float
    traffic: float  # bytes that the main loops read and write
    shared: float  # and those in shared memory


@dataclass(frozen=True)
class Block:
    """How a launch lies on the GPU."""

    blocks: int
    warps: int
    shared_bytes: int
    copy_in: float
    tiles: list[int]  # of each warp, block by block
    turns: bool = False  # whether other warps have them in each block


def audit_launch(
    name: tuple[Any, ...],
    arch: str,
    rates: Rates,
    rounds: Rounds,
    work: Work,
    block: Block,
    loop: tuple[MainLoop, float] | None,
    border: float = 1.0,
    *,
    on_sm_80: tuple[Any, ...] | None = None,
) -> CudaLaunchAudit:
    """Put together what is known of a launch.

    ``loop`` has the scores of a warp in one round beside it; ``border`` is the share of windows with two regions;
    ``on_sm_80`` is the kernel that a GPU with less shared memory launches, the same by default.
    """
    program, resources = kernel(arch, *name)
    way, lanes = program.way(rounds, border), block.blocks * block.warps * LANES
    around = sum(times for _, times in way)
    cost = Cost(
        bytes=work.bytes,
        instructions=lanes * around + work.walked,
        exponentials=lanes * sum(times * exponentials([i]) for i, times in way) + work.scores,
        flops=work.scores * work.flops_per_score,
        matrix_instructions="mma.sync",
        l2_bytes=lanes * sum(times * (instruction.width or 0) for instruction, times in way) + work.traffic,
        shared_bytes=lanes * sum(times * instruction.shared_bytes for instruction, times in way) + work.shared,
    )
    per_sm = resident_warps(arch, resources.registers, block.shared_bytes, block.warps) // block.warps
    grid = Grid(block.blocks, per_sm, block.copy_in)
    # What is around the products is shared by all warps alike.
    unequal = share_of_busiest(block.tiles, block.warps, grid.together, turn=block.turns) - 1
    grid = replace(grid, share=1 + unequal * work.walked / cost.instructions)
    terms, executed = cost.microseconds(rates), program.program.executed()
    per_score = [LANES * count / loop[1] for count in (loop[0].hot, loop[0].all)] if loop else [None, None]
    wide = sum(i.name in ("LDG", "LDGSTS") and i.width == 16 for i in executed)
    return CudaLaunchAudit(
        kernel=f"{name[0]}<{name[2]}>" if loop else name[0],
        work={"scores": work.scores},
        spill_instructions=spills(executed),
        local_bytes=resources.stack + resources.local,
        serialised_products=None,
        narrow_tile_loads=None,
        matrix_instructions="mma.sync" if loop else None,
        instructions_per_score=per_score[1],
        cost=cost,
        grid=grid,
        terms=terms,
        added=grid.added(terms, rates),
        warps=block.warps,
        registers=resources.registers,
        shared_bytes=block.shared_bytes,
        spills_on_sm_80=spills(kernel("sm_80", *(on_sm_80 or name))[0].program.executed()),
        hot_instructions_per_score=per_score[0],
        instructions_around=around,
        wide_copies=wide if loop else None,
        ldmatrix=sum(i.name == "LDSM" for i in executed) if loop else None,
    )


def share_of_busiest(tiles: list[int], warps: int, blocks: int = 1, *, turn: bool = False) -> float:
    """Give what the busiest partition of an SM has to do, in units of its share: warps go to the partitions in turn.

    Args:
        tiles: what each warp has to do, block by block; further blocks do the same.
        warps: of a block.
        blocks: that an SM has at a time.
        turn: whether the shares go to other warps in each block, as ``Share`` of csrc/cuda/forward.cuh says.
    """
    busiest = 0
    for sm in range(SMS):
        done = [0] * PARTITIONS
        for number in range(blocks):
            block = sm + number * SMS
            first = block * warps % len(tiles)
            for warp in range(warps):
                share = (warp + (block ^ block >> 7)) % warps if turn else warp
                done[(number * warps + warp) % PARTITIONS] += tiles[first + share]
        busiest += max(done)
    return PARTITIONS * busiest / (SMS * blocks * warps * sum(tiles) / len(tiles))


def border_share(windows: WindowGeometry) -> float:
    """Give the share of the windows with more than one region."""
    inner = [1 - 1 / count for count, masked in zip(windows.counts, windows.masked_axes, strict=True) if masked]
    return 1 - math.prod(inner)


def audit(names: Iterable[str] | None, arch: str, dtype: torch.dtype, rates: Rates) -> list[CaseAudit]:
    """Audit the cases of windows.

    Args:
        names: cases; all by default.
        arch: "sm_80" or "sm_90".
        dtype: float16 or bfloat16.
        rates: what predictions divide by.
    """
    family, found = FAMILIES["window3d"], []
    for name, case in family.cases.items():
        if names is not None and name not in names:
            continue
        for direction, audited in (("forward", audit_forward), ("backward", audit_backward)):
            launches = audited(case, dtype, arch, rates)
            floor = family.floor(case, direction, dtype).microseconds(rates)
            found.append(CaseAudit("cuda", "window3d", name, direction, launches, floor))
    return found


def _groups(case: WindowCase) -> int:
    return case.batch * case.geometry.num_windows * case.heads

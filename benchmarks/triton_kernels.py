"""Compiles a launch of a Triton kernel for a GPU that is not here, and gives the figures of its code."""

from __future__ import annotations

import contextlib
import io
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from benchmarks.sass import (
    LANES,
    exponentials,
    load_widths,
    matrix_kind,
    read,
    resident_warps,
    shared_bytes,
    spills,
    store_widths,
)

if TYPE_CHECKING:
    from vidattn.kernels.launch import Launch

# What ptxas says where it makes warps wait for each product of theirs (wgmma) before the next instruction.
_SERIALISED = re.compile(r"\(C75\d\d\)")
# A load of a tile in Triton's GPU dialect: at least two dimensions, and what the pointers point to.
_TILE_LOAD = re.compile(r"(?:tt\.load|ttg\.async_copy_global_to_local)\b.*: tensor<((?:\d+x){2,})!tt\.ptr<(b?f\d+)>")
_HALF = ("f16", "bf16")
# An access of memory in Triton's own dialect: what it is, the extents of a tile, and what the pointers point to.
_ACCESS = re.compile(r"\btt\.(load|store) (.*) : (?:tensor<((?:\d+x)+))?!tt\.ptr<((?:bf|f|i)\d+)>")


@dataclass(frozen=True)
class Traffic:
    """Bytes that a program reads and writes: tiles as a whole, those that may be past the end of a sequence apart."""

    own: int  # masked, in front of the main loop and behind it: the rows that a program owns
    tail: int  # masked reads behind the main loop: the last, narrow tile
    once: int  # all else outside of the main loop
    step: int  # in each of its steps
    copy_in: int  # read before the first products

    @classmethod
    def parse(cls, ttir: str) -> Traffic:
        """Read a kernel in Triton's own dialect, where nothing is pipelined yet.

        The main loop is the one that ``benchmarks.sass.Program.main_loop`` means. Other loops with products take
        steps of the same work; those without count once.
        """
        around: list[int] = []  # the blocks that a line is in, each by its first line; 0 for what is no loop
        parents: dict[int, tuple[int, ...]] = {}
        products: Counter[int] = Counter()
        accesses: list[tuple[int, bool, bool, int, tuple[int, ...]]] = []  # line, reads, masked, bytes, loops
        for number, line in enumerate(ttir.splitlines(), start=1):
            if line.lstrip().startswith("}"):
                around.pop()
            loops = tuple(filter(None, around))
            if " tt.dot " in line:
                products.update(loops)
            elif match := _ACCESS.search(line):
                kind, operands, extents, element = match.groups()
                size = math.prod(int(extent) for extent in (extents or "").split("x") if extent)
                masked = operands.count(",") > (kind == "store")
                accesses.append((number, kind == "load", masked, size * int(element.lstrip("bfi")) // 8, loops))
            if line.endswith("{"):
                parents[number] = loops
                around.append(number if "scf.for" in line or "scf.while" in line else 0)
        most = max(products.values(), default=0)
        richest = [loop for loop in sorted(products) if products[loop] == most]
        main = next((loop for loop in richest if not any(loop in parents[other] for other in richest)), 0)
        counted = {loop for loop in parents if not products[loop]} | {main, *parents.get(main, ())}
        sums: Counter[str] = Counter()
        for line, reads, masked, size, loops in accesses:
            if counted.issuperset(loops):
                behind = reads and 0 < main < line
                sums["step" if main in loops else ("tail" if behind else "own") if masked else "once"] += size
                sums["copy_in"] += size * (reads and (main in loops or not behind))
        return cls(*(sums[name] for name in ("own", "tail", "once", "step", "copy_in")))

    def of(self, launch: Launch) -> float:
        """Give the bytes of all programs of a launch, without the rows that no sequence has."""
        return launch.grid * (self._rows(launch) + self.once + launch.work.steps * self.step)

    def _rows(self, launch: Launch) -> float:
        given = launch.arguments
        length = given["SHAPE"].length if "SHAPE" in given else given.get("NUM_TOKENS")
        if "TAIL" in given:
            rows, step = given["BLOCK_M"], given["BLOCK_N"]
            if launch.name.endswith("_keys"):  # whose programs own keys
                rows, step = step, rows
            behind = length - given.get("full_tiles", length // step) * step
            tail = self.tail * behind / given["TAIL"] if given["TAIL"] else 0.0
            return self.own * length / (-(-length // rows) * rows) + tail
        if "BLOCK" in given and length:  # whole sequences in a tile
            return (self.own + self.tail) * (given["BLOCK"] // length * length) / given["BLOCK"]
        return self.own + self.tail


@dataclass(frozen=True)
class Kernel:
    """Figures of a compiled kernel, from its machine code; instructions are those of one lane."""

    name: str
    options: Mapping[str, int]
    constants: Mapping[str, Any]
    warps: int
    registers: int
    local_bytes: int
    spill_instructions: int
    serialised_products: int  # reasons of ptxas to serialise wgmma, of which one is enough for all of a kernel
    shared_bytes: int
    resident_warps: int
    traffic: Traffic
    matrix_instructions: str
    load_widths: Mapping[str, int]
    store_widths: Mapping[str, int]
    narrow_tile_loads: int
    instructions: int
    outside_instructions: int  # in no main loop
    outside_exponentials: int
    loop_instructions: int
    loop_exponentials: int
    outside_shared_bytes: int  # of a lane
    loop_shared_bytes: int
    loop_opcodes: Mapping[str, int]
    loop_matrix_instructions: str  # of the whole program if there is no loop
    loop_flops: float  # of the matrix instructions of the main loop in one program; 0 if their opcodes do not say

    @property
    def threads(self) -> int:
        """Threads of one program."""
        return self.warps * LANES

    @property
    def resident_programs(self) -> int:
        """Programs that fit on a multiprocessor at a time."""
        return self.resident_warps // self.warps


def missing_wide_loads(ttgir: str, threads: int, widths: Mapping[str, int], *, single: bool) -> int:
    """Count the 16-byte loads a lane that tiles of floating-point numbers call for and the machine code lacks.

    Maps, log-sum-exps and other vectors are loaded by 4 bytes, and a tile that has less than 16 bytes for each thread
    cannot be loaded by 16, so it is the wide loads that are counted, not the narrow ones. Loads of rows that are known
    to be past the end of a sequence are left out, so without any narrow load nothing is missing.

    Args:
        ttgir: the kernel in Triton's GPU dialect.
        threads: threads of a program.
        widths: what ``load_widths`` counts.
        single: whether float32 tiles count too; those of a helper are gathered from tables.
    """
    expected = 0
    for extents, element in _TILE_LOAD.findall(ttgir):
        if single or element in _HALF:
            elements = math.prod(map(int, extents.rstrip("x").split("x")))
            expected += elements * int(element.lstrip("bf")) // 8 // (16 * threads)
    narrow = sum(count for width, count in widths.items() if width in ("1", "2", "4", "8"))
    return min(max(0, expected - widths.get("16", 0) - widths.get("32", 0)), narrow)


def ptxas_log(compiled: Any) -> str:
    """Give what ptxas says of a compiled kernel: Triton's own command runs again, for a cached kernel has no log."""
    import triton
    from triton.compiler import make_backend

    target, log = compiled.metadata.target, io.StringIO()
    backend = make_backend(target)
    options = backend.parse_options(compiled.metadata._asdict())
    with triton.knobs.nvidia.scope(), contextlib.redirect_stdout(log):
        triton.knobs.nvidia.dump_ptxas_log = True
        backend.make_cubin(compiled.asm["ptx"], {}, options, target.arch)
    return log.getvalue()


def serialised_products(log: str) -> int:
    """Count the reasons in a log of ptxas why products wait for each other."""
    return len(_SERIALISED.findall(log))


def inspect(launch: Launch, arch: str) -> tuple[Kernel, bytes]:
    """Compile a launch's kernel and read its machine code.

    Args:
        launch: what to compile.
        arch: one that there are limits for.

    Returns:
        Its figures and the cubin.
    """
    from vidattn.kernels.launch import TARGETS

    compiled = launch.compile(TARGETS[arch])
    cubin, warps = compiled.asm["cubin"], compiled.metadata.num_warps
    program, resources = read(cubin)
    executed, loop, outside = program.executed(), program.in_loop(), program.outside()
    loads = load_widths(executed)
    threads = warps * LANES
    kernel = Kernel(
        name=launch.name,
        options=dict(launch.options),
        constants={p.name: str(launch.arguments[p.name]) for p in launch.kernel.params if p.is_constexpr},
        warps=warps,
        registers=resources.registers,
        local_bytes=resources.stack + resources.local,
        spill_instructions=spills(executed),
        serialised_products=serialised_products(ptxas_log(compiled)),
        shared_bytes=compiled.metadata.shared,
        resident_warps=resident_warps(arch, resources.registers, compiled.metadata.shared, warps),
        traffic=Traffic.parse(compiled.asm["ttir"]),
        matrix_instructions=matrix_kind(executed),
        load_widths=dict(loads),
        store_widths=dict(store_widths(executed)),
        narrow_tile_loads=missing_wide_loads(compiled.asm["ttgir"], threads, loads, single=launch.work.scores > 0),
        instructions=len(executed),
        outside_instructions=len(outside),
        outside_exponentials=exponentials(outside),
        loop_instructions=len(loop),
        loop_exponentials=exponentials(loop),
        outside_shared_bytes=shared_bytes(outside),
        loop_shared_bytes=shared_bytes(loop),
        loop_opcodes=dict(Counter(instruction.name for instruction in loop).most_common()),
        loop_matrix_instructions=matrix_kind(loop or executed),
        loop_flops=warps * sum(instruction.matrix_flops for instruction in loop),
    )
    return kernel, cubin

"""Reads the machine code of a compiled NVIDIA kernel: instructions, loops, matrix instructions, widths of accesses.

Triton's wheel carries the disassembler, so no toolkit is needed, and no GPU.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import networkx  # type: ignore[import-untyped]  # torch depends on it

LANES = 32  # threads a warp: each executes every instruction of it

_SECTION = re.compile(r"^\s*\.section\s+\.text\.(\S+?),.*$", re.M)  # one a kernel
_LABEL = re.compile(r"^\s*(\.L_\w+|\$[\w$.]+):")
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][A-Z0-9_]*(?:\.\w+)*)\s*(.*?)\s*;")
_TARGET = re.compile(r"\.L_\w+|\$[\w$.]+")
_PREDICATE = re.compile(r"\bU?P\w")
_ENDS = ("EXIT", "RET", "KILL")
_SPILLS = ("LDL", "STL")
_ATOMICS = ("ATOM", "ATOMG", "ATOMS", "RED", "REDAS", "REDG", "UBLKRED", "UTMAREDG")
_LOADS = ("LDG", "LDGSTS")  # to registers; to shared memory
_STORES = ("STG",)
_BULK_LOADS = ("UBLKCP", "UTMALDG")
_BULK_STORES = ("UTMASTG", "UTMAREDG", "UBLKRED")
_SHAPE = re.compile(r"\.(\d+)x(\d+)x(\d+)\.|\.(16)(8)(4|8|16|32)\.")  # HGMMA.64x32x16.F32, HMMA.16816.F32


@dataclass(frozen=True)
class Instruction:
    """One instruction: ``guard`` is the predicate it depends on, if any."""

    opcode: str
    operands: str = ""
    guard: str | None = None

    @property
    def name(self) -> str:
        """The opcode without its modifiers."""
        return self.opcode.partition(".")[0]

    @property
    def matrix_kind(self) -> str | None:
        """Which unit multiplies: "wgmma" (sm_90), "tcgen05" (sm_100), "mma.sync" (a warp on its own), or none."""
        if self.name.startswith("UTC"):
            return "tcgen05" if self.name.endswith("MMA") else None
        if self.name.endswith("GMMA"):
            return "wgmma"
        return "mma.sync" if self.name.endswith("MMA") else None

    @property
    def matrix_flops(self) -> float:
        """Operations that one warp's issue of it stands for; 0 where the opcode does not say the shape."""
        if self.matrix_kind is None or not (match := _SHAPE.search(self.opcode + ".")):
            return 0.0
        rows, columns, depth = (int(size) for size in match.groups() if size)
        return 2.0 * rows * columns * depth / (4 if self.matrix_kind == "wgmma" else 1)  # four warps issue a wgmma

    @property
    def width(self) -> int | None:
        """Bytes a lane that a global load or store moves; none for other instructions."""
        return self._bytes if self.name in _LOADS + _STORES else None

    @property
    def shared_bytes(self) -> int:
        """Bytes a lane that an access to shared memory moves."""
        if self.name == "LDSM":  # a matrix is a word of each lane
            return 4 * int(self.opcode[-1]) if self.opcode[-2:] in (".2", ".4") else 4
        return self._bytes if self.name in ("LDS", "STS", "LDGSTS", "ATOMS") else 0

    @property
    def _bytes(self) -> int:
        modifiers = self.opcode.split(".")
        for modifier, width in (("256", 32), ("128", 16), ("64", 8), ("U16", 2), ("S16", 2), ("U8", 1), ("S8", 1)):
            if modifier in modifiers:
                return width
        return 4


@dataclass(frozen=True)
class Program:
    """The instructions of a kernel and where its labels point."""

    instructions: tuple[Instruction, ...]
    labels: dict[str, int]

    @classmethod
    def parse(cls, text: str) -> Program:
        """Read what ``nvdisasm -c`` prints."""
        instructions: list[Instruction] = []
        labels: dict[str, int] = {}
        for line in text.splitlines():
            if match := _LABEL.match(line):
                labels[match[1]] = len(instructions)
            elif match := _INSTRUCTION.match(line):
                guard, opcode, operands = match.groups()
                instructions.append(Instruction(opcode, operands, guard))
        return cls(tuple(instructions), labels)

    @cached_property
    def flow(self) -> networkx.DiGraph:
        """Which instruction can follow which, from the first on: what no path reaches is not in it."""
        graph = networkx.DiGraph()
        graph.add_node(0)
        meeting_points: dict[str, int] = {}  # of the threads that part, by barrier register
        for index, (instruction, following) in enumerate(
            zip(self.instructions, [*range(1, len(self.instructions)), None])
        ):
            targets = [self.labels[name] for name in _TARGET.findall(instruction.operands) if name in self.labels]
            barrier = instruction.operands.split(",")[0].strip()
            if instruction.name == "BSSY" and targets:
                meeting_points[barrier], targets = targets[0], []
            elif instruction.name == "BSYNC" and barrier in meeting_points:
                targets = [meeting_points[barrier]]
            elif instruction.name not in ("BRA", "BRX", "JMP", "CALL"):
                targets = []
            # A branch can depend on its guard, or on a predicate among its operands: BRA.U UP0, `(label).
            jumps = instruction.name in ("BRA", "BRX", "JMP", "BSYNC") and targets
            always = instruction.guard is None and (
                instruction.name in _ENDS or (jumps and not _PREDICATE.search(instruction.operands))
            )
            if following is not None and not (always and not instruction.opcode.startswith("BRA.DIV")):
                graph.add_edge(index, following)
            graph.add_edges_from((index, target) for target in targets if target < len(self.instructions))
        return graph.subgraph(networkx.descendants(graph, 0) | {0}).copy()

    @cached_property
    def loops(self) -> list[frozenset[int]]:
        """The instructions of each natural loop, those within it that were placed elsewhere included.

        The longest backward branch is not enough: where a warp waits for a barrier, the waiting is moved behind the end
        of the kernel and jumps back from there.
        """
        dominators = networkx.immediate_dominators(self.flow, 0)
        bodies: dict[int, set[int]] = {}
        for tail, head in self.flow.edges:
            if head > tail:  # blocks are never moved before the head of their loop
                continue
            above = tail
            while above > head and dominators.get(above, above) not in (None, above):
                above = dominators[above]
            if above != head:
                continue
            body, pending = bodies.setdefault(head, {head}), [tail]
            while pending:
                index = pending.pop()
                if index not in body:
                    body.add(index)
                    pending.extend(self.flow.predecessors(index))
        return [frozenset(body) for body in bodies.values()]

    @cached_property
    def _richest_loops(self) -> list[frozenset[int]]:
        """The innermost of the loops with most matrix instructions, in the order of the code."""

        def products(body: frozenset[int]) -> int:
            return sum(self.instructions[index].matrix_kind is not None for index in body)

        most = max(map(products, self.loops), default=0)
        richest = [body for body in self.loops if most and products(body) == most]
        return sorted((body for body in richest if not any(other < body for other in richest)), key=min)

    @cached_property
    def main_loop(self) -> frozenset[int]:
        """The loop with most matrix instructions; without any, the longest; empty without a loop.

        Of several equals it is the innermost, then the first: kernels place the loop that they always run in front.
        """
        return self._richest_loops[0] if self._richest_loops else max(self.loops, key=len, default=frozenset())

    @cached_property
    def other_main_loops(self) -> frozenset[int]:
        """Instructions of further loops that take steps of the same work, such as the tiles that a mask hides."""
        return frozenset().union(*self._richest_loops[1:]) - self.main_loop

    def executed(self) -> list[Instruction]:
        """All instructions that a path reaches."""
        return [self.instructions[index] for index in sorted(self.flow)]

    def in_loop(self) -> list[Instruction]:
        """The instructions of the main loop."""
        return [self.instructions[index] for index in sorted(self.main_loop)]

    def outside(self) -> list[Instruction]:
        """The instructions that are in no main loop."""
        return [self.instructions[i] for i in sorted(set(self.flow) - self.main_loop - self.other_main_loops)]


@dataclass(frozen=True)
class Resources:
    """What a kernel occupies: 32-bit registers a thread, bytes of stack and local memory a thread."""

    registers: int
    stack: int
    local: int

    @classmethod
    def parse(cls, text: str) -> Resources:
        """Read what ``cuobjdump --dump-resource-usage`` prints for a file with one kernel."""
        found = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text))
        return cls(*(int(found[name]) for name in ("REG", "STACK", "LOCAL")))


def read(cubin: bytes) -> tuple[Program, Resources]:
    """Disassemble a cubin with one kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        program = Program.parse(_tool("nvdisasm", "-c", file.name))
        return program, Resources.parse(_tool("cuobjdump", "--dump-resource-usage", file.name))


def read_all(cubin: bytes) -> dict[str, tuple[Program, Resources]]:
    """Disassemble a cubin with any number of kernels; gives them by their mangled names."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        listing = _SECTION.split(_tool("nvdisasm", "-c", file.name))
        usage = re.split(r"^ *Function (\S+):$", _tool("cuobjdump", "--dump-resource-usage", file.name), flags=re.M)
    resources = {name: Resources.parse(text) for name, text in zip(usage[1::2], usage[2::2])}
    return {name: (Program.parse(text), resources[name]) for name, text in zip(listing[1::2], listing[2::2])}


def embedded(library: Path, arch: str) -> dict[str, bytes]:
    """Give the cubins for one architecture that a shared library holds, by the names that the disassembler gives."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            _tool("cuobjdump", "--extract-elf", f".{arch}.", library.resolve(), folder=folder)
        except subprocess.CalledProcessError as error:
            if "does not contain device code" not in error.stdout + error.stderr:
                raise
        return {path.stem: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def _tool(name: str, *arguments: str | Path, folder: str | None = None) -> str:
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *arguments], cwd=folder, capture_output=True, text=True, check=True).stdout


def spills(instructions: Iterable[Instruction]) -> int:
    """Count accesses to local memory."""
    return sum(instruction.name in _SPILLS for instruction in instructions)


def atomics(instructions: Iterable[Instruction]) -> int:
    """Count what reads and changes memory in one step, by which a block could count others or wait for them."""
    return sum(instruction.name in _ATOMICS for instruction in instructions)


def matrix_kind(instructions: Iterable[Instruction]) -> str:
    """Name the kinds of matrix instructions, joined by "+"; "none" without any."""
    return "+".join(sorted({i.matrix_kind for i in instructions if i.matrix_kind})) or "none"


def exponentials(instructions: Iterable[Instruction]) -> int:
    """Count what the unit for exponentials does, reciprocals and logarithms included: they take the same turn."""
    return sum(instruction.name == "MUFU" for instruction in instructions)


def shared_bytes(instructions: Iterable[Instruction]) -> int:
    """Count bytes of a lane in shared memory, without what wgmma reads: that is made to keep up with the products."""
    return sum(instruction.shared_bytes for instruction in instructions)


def load_widths(instructions: Iterable[Instruction]) -> Counter[str]:
    """Count global loads by bytes a lane ("16"), copies of whole blocks as "bulk"."""
    return _widths(instructions, _LOADS, _BULK_LOADS)


def store_widths(instructions: Iterable[Instruction]) -> Counter[str]:
    """Count global stores by bytes a lane, copies of whole blocks as "bulk"."""
    return _widths(instructions, _STORES, _BULK_STORES)


def _widths(instructions: Iterable[Instruction], names: tuple[str, ...], bulk: tuple[str, ...]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for instruction in instructions:
        if instruction.name in names:
            counts[str(instruction.width)] += 1
        elif instruction.name in bulk:
            counts["bulk"] += 1
    return counts


# ---- What fits on a multiprocessor ----


@dataclass(frozen=True)
class _Multiprocessor:
    """Limits of one multiprocessor. Each block takes ``reserved`` bytes of shared memory more than it asks for."""

    shared: int
    warps: int = 64
    blocks: int = 32
    registers: int = 65536
    reserved: int = 1024


_MULTIPROCESSORS = {
    "sm_80": _Multiprocessor(164 * 1024),
    "sm_90": _Multiprocessor(228 * 1024),
    "sm_100": _Multiprocessor(228 * 1024),
}


def resident_warps(arch: str, registers: int, shared: int, warps: int) -> int:
    """Warps that fit on a multiprocessor at a time.

    Args:
        arch: one that there are limits for.
        registers: registers a thread.
        shared: bytes of shared memory a block.
        warps: warps a block.

    Returns:
        Warps of whole blocks.
    """
    limits = _MULTIPROCESSORS[arch]
    warp_registers = -(-registers // 8) * 8 * LANES  # handed out in units of 256 a warp
    by_registers = limits.registers // warp_registers // 4 * 4 // warps  # and by each of the four schedulers
    by_shared = limits.shared // (shared + limits.reserved)
    return warps * min(by_registers, by_shared, limits.warps // warps, limits.blocks)

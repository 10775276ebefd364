"""What a kernel of csrc/cuda executes, by its machine code: its main loop, and the way through all else.

Loops over scores are told by their products; in a backward pass, the one over tiles of queries has them all. What lies
between the products counts by the score, so a last chunk of few keys counts as what it is. All else counts along the
longest way from the first instruction to the last: a loop as often as its kind says, and of two ways that exclude each
other the longer one. Left out are ways that are rare (behind a vote, where a maximum is raised; functions of their own)
and those of rows that are not aligned.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import networkx  # type: ignore[import-untyped]  # torch depends on it

from benchmarks.sass import Instruction, Program, exponentials

Rounds = Callable[[frozenset[int]], float]


@dataclass(frozen=True)
class Part:
    """What stands in a main loop between two barriers and is for the same warps, on average over all warps.

    ``kind`` says for which: "products" with a warp's keys, "jobs" (products that are shared out otherwise), "copies",
    "sums" of rows over neighbouring lanes, "last" for what is behind a vote, "floats" that are stored, "all" for the
    rest.
    """

    phase: int  # what is behind the last barrier is before the first one
    kind: str
    instructions: float
    flops: float
    exponentials: float
    shared_bytes: float


@dataclass(frozen=True)
class MainLoop:
    """The main loop of a kernel: instructions of one lane in one round, on its longest way."""

    body: frozenset[int]
    hot: float  # without what is rare
    all: float
    exponentials: float  # of the hot ones
    flops: float  # of a warp
    tiles: int  # reads of matrices that are not transposed: in a forward pass, one for 8 keys of 32 elements
    bytes: float  # of global memory, of a lane
    shared_bytes: float
    parts: tuple[Part, ...]


class CudaProgram:
    """A kernel of csrc/cuda.

    Args:
        program: its machine code.
        backward: whether it is a backward pass, where all products are in the loop over tiles of queries.
    """

    def __init__(self, program: Program, *, backward: bool = False) -> None:
        self.program = program
        self.instructions = program.instructions
        self.backward = backward
        self._apart: dict[int, list[set[int]]] = {}
        self._kind_of: dict[frozenset[int], str] = {}

    @cached_property
    def _body(self) -> networkx.DiGraph:
        """The flow without the functions that it calls."""
        flow = self.program.flow.copy()
        for index in list(flow):
            call = self.instructions[index]
            if call.name == "CALL" and "$" in call.operands:  # else it is a far jump
                flow.remove_edges_from([(index, to) for to in list(flow.successors(index)) if to != index + 1])
        return flow.subgraph(networkx.descendants(flow, 0) | {0}).copy()

    @cached_property
    def loops(self) -> list[frozenset[int]]:
        """The loops outside of functions that are called."""
        return [body for body in self.program.loops if min(body) in self._body]

    @cached_property
    def product_loops(self) -> list[frozenset[int]]:
        """The loops over scores: next to their own products, those of loops within are few."""
        if self.backward:
            most = 0.75 * self._products(self._body)  # some are for statistics of rows, or dq of the last ones
            return sorted((body for body in self.loops if self._products(body) >= most), key=len)[:1]
        found = []
        for body in self.loops:
            within = self._products(self._within(body))
            own = self._products(body) - within
            if own > 0 and own >= 8 * within:
                found.append(body)
        return [body for body in found if not any(body < other for other in found)]

    def _within(self, body: frozenset[int]) -> frozenset[int]:
        return frozenset().union(*(other for other in self.loops if other < body))

    @cached_property
    def main_loops(self) -> list[frozenset[int]]:
        """Those with most products: one for each kind of group."""
        most = max(map(self._products, self.product_loops), default=0)
        return [body for body in self.product_loops if self._products(body) == most]

    @cached_property
    def _forward(self) -> networkx.DiGraph:
        """The flow of one round to a common end: what leads back to the head of a loop leads out of it instead."""
        graph = self._body.copy()
        graph.add_edges_from([(index, self._end) for index in self._body if self._exits(index)])
        for body in self.loops:
            head = min(body)
            tails = [tail for tail in graph.predecessors(head) if tail in body]
            behind = {after for index in body for after in self._body.successors(index)} - body
            graph.remove_edges_from([(tail, head) for tail in tails])
            graph.add_edges_from([(tail, after) for tail in tails for after in behind])
            if any(self._exits(index) for index in body):
                graph.add_edges_from([(tail, self._end) for tail in tails])
        while not networkx.is_directed_acyclic_graph(graph):  # what the compiler moved behind the end
            graph.remove_edges_from([max(networkx.find_cycle(graph), key=lambda edge: edge[0] - edge[1])])
        return graph

    @cached_property
    def _of_windows(self) -> bool:
        """Whether the main loop is that over windows: then what is hot lies between the first and the last product."""
        within = (body for main in self.main_loops for body in self.loops if body < main)
        return self.backward and not any(map(self._products, within))

    def main_loop(
        self, rounds: Rounds, *, masked: bool = False, shares: Mapping[str, float] | None = None
    ) -> MainLoop | None:
        """Give the loop over scores; None for a kernel without.

        Args:
            rounds: how often loops within it run.
            masked: the one for windows at a border, which looks at regions too.
            shares: how often a warp comes to what a branch leads to, by kind (see ``Part``).
        """
        if not self.main_loops:
            return None
        loops = sorted(self.main_loops, key=lambda loop: len(loop - self.rare))
        body = loops[-1 if masked else 0]
        own = body - self._within(body)
        usual = body & self._without_unaligned()
        if self._of_windows:
            usual &= self._between(self._forward)
        kinds = self._kinds(body) if shares else {}
        times = {index: (shares or {}).get(kind, 1.0) for index, kind in kinds.items()}
        way = self._longest(usual - self.rare - self._other_way(body, masked), body, rounds, times)
        hot = sum(times for _, times in way)
        return MainLoop(
            body,
            hot,
            hot + len(own & self.rare),
            sum(times * exponentials([self.instructions[index]]) for index, times in way),
            sum(times * self.instructions[index].matrix_flops for index, times in way),
            sum(i.name == "LDSM" and "MT88" not in i.opcode for i in (self.instructions[index] for index in own)),
            sum(times * (self.instructions[index].width or 0) for index, times in way),
            sum(times * self.instructions[index].shared_bytes for index, times in way),
            self._parts(way, kinds),
        )

    def _kinds(self, body: frozenset[int]) -> dict[int, str]:
        """Tell what some warps alone come to in a main loop, or all warps but not always."""
        jobs = frozenset().union(*(loop for loop in self.loops if loop < body and self.kind(loop) == "jobs"))
        own, products = body - self._within(body), set[int]()
        for index in own:
            for way in self._ways_apart(index):
                if self._products(way & own) and not self._products(way & jobs):
                    products |= way & body
        kinds = dict.fromkeys(products, "products")
        kinds |= dict.fromkeys(self._apart_with(self._votes) & body, "last")
        kinds |= dict.fromkeys(self._apart_with(self._copies), "copies")
        kinds |= dict.fromkeys(self._apart_with(self._shuffles), "sums")
        kinds |= dict.fromkeys(jobs, "jobs")
        return kinds | dict.fromkeys(self._apart_with(self._floats) & body, "floats")

    def _parts(self, way: list[tuple[int, float]], kinds: Mapping[int, str]) -> tuple[Part, ...]:
        barriers = sum(self.instructions[index].name == "BAR" for index, _ in way)
        passed, of = 0, dict[tuple[int, str], list[tuple[Instruction, float]]]()
        for index, times in way:
            instruction = self.instructions[index]
            passed += instruction.name == "BAR"
            of.setdefault((passed % max(1, barriers), kinds.get(index, "all")), []).append((instruction, times))
        return tuple(
            Part(
                *where,
                sum(times for _, times in part),
                sum(times * instruction.matrix_flops for instruction, times in part),
                sum(times * exponentials([instruction]) for instruction, times in part),
                sum(times * instruction.shared_bytes for instruction, times in part),
            )
            for where, part in of.items()
        )

    def _other_way(self, body: frozenset[int], masked: bool) -> frozenset[int]:
        """Give the products of a loop for the other kind of window, if there are two ways with the same products."""
        for index in sorted(body):
            ways = self._ways_apart(index)
            counts = [self._products(way & body) for way in ways]
            if len(ways) == 2 and counts[0] == counts[1] > 0:
                return frozenset((min if masked else max)(ways, key=len) & body)
        return frozenset()

    def _ways_apart(self, index: int) -> list[set[int]]:
        """Give what only one of the two ways leads to that part at a branch; nothing if there is none."""
        if index not in self._apart:
            self._apart[index] = self._find_ways_apart(index)
        return self._apart[index]

    def _find_ways_apart(self, index: int) -> list[set[int]]:
        if self.instructions[index].name != "BRA" or index not in self._body:
            return []
        ways = [{way} | networkx.descendants(self._forward, way) for way in self._forward.successors(index)]
        return [ways[0] - ways[1], ways[1] - ways[0]] if len(ways) == 2 else []

    @cached_property
    def rare(self) -> frozenset[int]:
        """What lanes do that have parted, and what is behind a vote and multiplies no matrices."""
        found: set[int] = set()
        votes: set[str] = set()  # predicates
        for index, instruction in enumerate(self.instructions):
            written = instruction.operands.split(",")[0].strip()
            if instruction.name in ("VOTE", "VOTEU"):
                votes.add(written)
            elif instruction.name.endswith("SETP") or instruction.name == "PLOP3":
                votes.discard(written)
            if not (alone := self._ways_apart(index)):
                continue
            if instruction.opcode.startswith("BRA.DIV"):
                found |= next(side for side in alone if index + 1 not in side)
            elif (instruction.guard or instruction.operands).strip("@!").split(",")[0] in votes:
                found |= min((side for side in alone if side and not self._products(side)), key=len, default=set())
        return frozenset(found)

    @cached_property
    def _exact_way(self) -> set[int]:
        """What only runs where the main loop did not do: around loops that take three times as long for a product."""
        pace = {body: len(body - self.rare) / self._products(body) for body in self.product_loops}
        best = min(pace.values(), default=0.0)
        slow = [body for body in self.product_loops if pace[body] > 3 * best]
        around = [body for body in self.loops if not any(main <= body for main in self.main_loops)]
        return {index for body in around if any(other <= body for other in slow) for index in body}

    @property
    def _end(self) -> int:
        return len(self.instructions)

    def _exits(self, index: int) -> bool:
        return self.instructions[index].name == "EXIT"

    def _products(self, body: Iterable[int]) -> int:
        return sum(self.instructions[index].matrix_kind is not None for index in body if index != self._end)

    @cached_property
    def _unaligned(self) -> frozenset[int]:
        """The ways of rows that are no multiple of 16 bytes: they have narrow accesses, and the way beside has none."""
        found: set[int] = set()
        for index in range(len(self.instructions)):
            for way, other in itertools.permutations(self._ways_apart(index), 2):
                if self._narrowest(way) < 4 <= self._narrowest(other) < 32:
                    found |= way
        for body in self.loops:  # of one that is for all rows, what moves 16 bytes
            for name in ("LDGSTS", "STG"):
                moves = {index for index in body - found if self.instructions[index].name == name}
                if (name == "STG" and self._within(body)) or all(self.instructions[i].width != 16 for i in moves):
                    continue
                found |= {index for index in moves if self.instructions[index].width != 16}
        return frozenset(found | {index for index in self._body if (self.instructions[index].width or 4) < 4})

    def _narrowest(self, way: Iterable[int]) -> int:
        """Give the fewest bytes that a way reads or writes in global memory at a time; 32 if it does not."""
        accesses = (self.instructions[index] for index in way if index != self._end)
        return min((i.width or 4 for i in accesses if i.name in ("LDG", "STG", "LDGSTS")), default=32)

    def _without_unaligned(self) -> set[int]:
        """The instructions without those for rows that are no multiple of 16 bytes."""
        return {*self._body, self._end} - self._unaligned

    def kind(self, body: frozenset[int]) -> str:
        """Say what a loop is for.

        Returns:
            Outside of the main loop "group" for the outermost of those around it, "keys" for those within, and "scores"
            for other products: of whole rows, for their statistics, or dq of the last ones. Within it "meet" for
            products of queries with keys, "jobs" whose products are written and, in these, "steps". Where the main loop
            is that over windows, it is "group", and what is around it "restart". For those without products "copy" into
            shared memory; "table" of the bias; "statistics" if such a loop is within "group"; "sums" that are written;
            "records" that others are made of; "rows" of tokens; "inner" for a loop within one of these.
        """
        if body not in self._kind_of:
            self._kind_of[body] = self._find_kind(body)
        return self._kind_of[body]

    def _find_kind(self, body: frozenset[int]) -> str:
        around = self._around(body)
        with_products = [other for other in around if self._products(other)]
        names = {self.instructions[index].name for index in body}
        if self._products(body):
            if self._of_windows:
                return "group" if body in self.main_loops else "restart"
            if any(body < main for main in self.main_loops):
                return "steps" if with_products[0] not in self.main_loops else "jobs" if "STG" in names else "meet"
            if not any(main <= body for main in self.main_loops):
                return "scores"
            return "keys" if with_products else "group"
        if len(with_products) < len(around):
            return "inner"
        if "LDGSTS" in names:
            return "copy"
        if {"LDG", "STS"} <= names:
            return "statistics" if around else "table"
        if "STG" in names and "STS" not in names:
            return "sums"
        return "records" if self.backward and {"LDS", "STS"} <= names else "rows"

    def _around(self, body: frozenset[int]) -> list[frozenset[int]]:
        """The loops that a loop is in, the innermost first."""
        return sorted((other for other in self.loops if body < other), key=len)

    def is_in(self, kind: str, body: frozenset[int]) -> bool:
        """Tell whether a loop is in one of this kind; "main" is the main loop."""
        return any(
            other in self.main_loops and not self._of_windows if kind == "main" else self.kind(other) == kind
            for other in self._around(body)
        )

    def siblings(self, body: frozenset[int]) -> list[frozenset[int]]:
        """Give the loops of the same kind that are in the same loops, in the order of the code, this one included."""
        alike = [loop for loop in self.loops if self.kind(loop) == self.kind(body)]
        return sorted((loop for loop in alike if self._around(loop) == self._around(body)), key=min)

    def flops(self, body: frozenset[int]) -> float:
        """Operations of the products of a loop."""
        return sum(self.instructions[index].matrix_flops for index in body)

    def is_aligned(self, body: frozenset[int]) -> bool:
        """Tell whether a loop is for rows that are multiples of 16 bytes alone."""
        return self._narrowest(body) >= 16

    def copies(self, body: frozenset[int]) -> int:
        """Count the reads of global memory in a loop, of copies those of 16 bytes alone."""
        loads = [self.instructions[index] for index in body if self.instructions[index].name in ("LDG", "LDGSTS")]
        copies = [load for load in loads if load.name == "LDGSTS" and load.width == 16]
        return len(copies or loads)

    def narrow_copies(self, body: frozenset[int]) -> bool:
        """Tell whether a loop copies fewer than 16 bytes at a time alone."""
        return self._copies(body) > 0 and all(
            self.instructions[index].width != 16 for index in body if self.instructions[index].name == "LDGSTS"
        )

    def shuffles(self, body: frozenset[int]) -> bool:
        """Tell whether lanes hand numbers to others in a loop."""
        return self._shuffles(body) > 0

    def way(self, rounds: Rounds, border: float = 1.0) -> list[tuple[Instruction, float]]:
        """Give the instructions of the longest way outside of the products, each with how often it is executed.

        Args:
            rounds: how often the body of a loop runs, each time that its program comes to it.
            border: share of the groups with two regions.
        """
        graph, between = self._usual
        found: list[tuple[Instruction, float]] = []
        for nodes, share in ((set(graph), border), (set(graph) - self._of_borders, 1 - border)):
            if share > 0:
                way = self._longest(nodes, frozenset(self.program.flow), rounds, dict.fromkeys(between, 0.0))
                found += [(self.instructions[index], share * times) for index, times in way]
        return found

    def _apart_with(self, count: Callable[[Iterable[int]], int]) -> frozenset[int]:
        """What only one way of a branch leads to, where that has some of these and the other way has not as many."""
        found: set[int] = set()
        for index in self._body:
            ways = self._ways_apart(index)
            for way, other in itertools.permutations(ways, 2):
                if count(way) > count(other) and (count == self._products or not self._products(way)):
                    found |= way
        return frozenset(found)

    def _copies(self, body: Iterable[int]) -> int:
        return sum(self.instructions[index].name == "LDGSTS" for index in body if index != self._end)

    def _calls(self, body: Iterable[int]) -> int:
        """Count calls of functions of the kernel's own, which are for numbers of any size."""
        instructions = (self.instructions[index] for index in body if index != self._end)
        return sum(i.name == "CALL" and "scan_rows" in i.operands for i in instructions)

    def _shuffles(self, body: Iterable[int]) -> int:
        return sum(self.instructions[index].name == "SHFL" for index in body if index != self._end)

    def _floats(self, body: Iterable[int]) -> int:
        """Count stores of four bytes, where there are no others: float32 of rows that other groups have too."""
        widths = [i.width for i in (self.instructions[x] for x in body if x != self._end) if i.name == "STG"]
        return len(widths) if all(width == 4 for width in widths) else 0

    def _votes(self, body: Iterable[int]) -> int:
        """Count barriers that tell what all threads say."""
        return sum(self.instructions[index].opcode.startswith("BAR.RED") for index in body if index != self._end)

    @cached_property
    def _of_borders(self) -> frozenset[int]:
        """What a forward pass does for groups of two regions: it measures rows, for which alone it widens elements."""
        found: set[int] = set()
        for index in range(0 if self.backward else len(self.instructions)):
            for way, other in itertools.permutations(self._ways_apart(index), 2):
                if self._widens(way) and not self._widens(other) and not self._products(way):
                    found |= way
        return frozenset(found)

    def _widens(self, way: Iterable[int]) -> bool:
        """Tell whether elements of 16 bits become float32."""
        instructions = (self.instructions[index] for index in way if index != self._end)
        return any(i.opcode == "HADD2.F32" or (i.name == "LOP3" and "0xffff0000" in i.operands) for i in instructions)

    @cached_property
    def _usual(self) -> tuple[networkx.DiGraph, frozenset[int]]:
        """The ways to the end that are usual, and what is between products on them."""
        exact = self._exact_way | (self._apart_with(self._calls) if self.backward else set())
        graph = self._forward.subgraph(self._without_unaligned() - self.rare - exact).copy()
        graph = graph.subgraph(networkx.ancestors(graph, self._end) | {self._end}).copy()
        between = frozenset() if self.backward and not self._of_windows else self._between(graph)
        return graph, between if self._of_windows else between.union(*self.product_loops)

    def _between(self, graph: networkx.DiGraph) -> frozenset[int]:
        """Give what is reached from a product and leads to one."""
        products = [index for index in graph if index != self._end and self.instructions[index].matrix_kind]
        return frozenset(_reached(graph.predecessors, products) & _reached(graph.successors, products))

    def _longest(
        self,
        nodes: Iterable[int],
        body: frozenset[int],
        rounds: Rounds,
        shares: Mapping[int, float],
    ) -> list[tuple[int, float]]:
        """Give the longest way through a loop or all of the kernel, where loops within run so many rounds."""
        graph = self._forward.subgraph(nodes).copy()
        times = {index: shares.get(index, 1.0) for index in graph}
        for loop in self.loops:
            if loop < body and (self._of_windows or loop not in self.product_loops):
                factor = rounds(loop)
                for index in loop & times.keys():
                    times[index] *= factor
        for tail, head in graph.edges:
            graph.edges[tail, head]["times"] = times[head]
        longest = networkx.dag_longest_path(graph, weight="times")
        return [(index, times[index]) for index in longest if index != self._end]


def _reached(neighbours: Callable[[int], Iterable[int]], starts: Iterable[int]) -> set[int]:
    """Give what can be reached from some instructions, these included."""
    seen: set[int] = set()
    pending = list(starts)
    while pending:
        index = pending.pop()
        if index not in seen:
            seen.add(index)
            pending.extend(neighbours(index))
    return seen

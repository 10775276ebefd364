"""What the audit finds out: the launches of a case, and the case."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.prediction import Cost, Grid, largest


@dataclass(frozen=True)
class LaunchAudit:
    """One launch of a case. Helpers compute no scores and have no figures that are about scores.

    ``matrix_instructions`` is their kind in the main loop: a narrow last tile may leave no choice.
    """

    kernel: str
    work: Mapping[str, float]  # steps can be a mean over the programs
    spill_instructions: int
    local_bytes: int
    serialised_products: int | None  # see triton_kernels.py
    narrow_tile_loads: int | None
    matrix_instructions: str | None
    instructions_per_score: float | None
    cost: Cost
    grid: Grid
    terms: Mapping[str, float]  # microseconds
    added: Mapping[str, float]  # microseconds

    @property
    def microseconds(self) -> float:
        """The prediction."""
        return max(self.terms.values()) + sum(self.added.values())


@dataclass(frozen=True)
class CudaLaunchAudit(LaunchAudit):
    """One launch of a kernel of csrc/cuda."""

    warps: int
    registers: int
    shared_bytes: int
    spills_on_sm_80: int  # of the kernel that such a GPU launches, which has less shared memory
    hot_instructions_per_score: float | None  # without what is rare
    instructions_around: float  # of a thread, outside of the products
    wide_copies: int | None  # reads of global memory of 16 bytes a lane
    ldmatrix: int | None
    bytes_under_way: int | None = None  # on an SM: what is read before the first of it is used

    @property
    def registers_of_block(self) -> int:
        """Registers times threads."""
        return 32 * self.warps * self.registers

    @property
    def blocks_per_sm(self) -> int:
        """Blocks that fit on a multiprocessor."""
        return self.grid.per_sm


@dataclass(frozen=True)
class CaseAudit:
    """One direction of a case by one backend: its launches one after the other, and the floor."""

    backend: str
    family: str
    case: str
    direction: str
    launches: tuple[LaunchAudit, ...]
    floor_terms: Mapping[str, float]
    triton_microseconds: float | None = None  # of the same case, where another backend is audited

    @property
    def where(self) -> str:
        """What the patterns of ceilings are matched with."""
        return f"{self.backend}/{self.family}/{self.case}/{self.direction}"

    @property
    def microseconds(self) -> float:
        """The prediction."""
        return sum(launch.microseconds for launch in self.launches)

    @property
    def times_the_floor(self) -> float:
        """The prediction over the largest term of the floor."""
        return self.microseconds / max(self.floor_terms.values())

    @property
    def times_triton(self) -> float | None:
        """The prediction over that of the Triton kernels; None for these."""
        return self.microseconds / self.triton_microseconds if self.triton_microseconds else None

    @property
    def terms(self) -> Counter[str]:
        """Microseconds of the launches by the term that is the largest of each."""
        total: Counter[str] = Counter()
        for launch in self.launches:
            total[largest(launch.terms)] += launch.microseconds  # type: ignore[assignment]
        return total

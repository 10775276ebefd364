"""How long a launch takes by its machine code: what its units do at the same time, and what nothing hides.

A launch keeps six things busy at a time, so the longest of these terms counts:

    bytes          each tensor crosses memory once
    l2             what all blocks read and write crosses the L2 cache: each tile of queries has its keys anew
    instructions   all lanes of all warps, waste of tiles and ways that a block does not take included
    exponentials
    shared         what all lanes read from shared memory and write there, 128 bytes a clock an SM; without conflicts
    matrix         products, by the tensor cores' instruction that the kernel uses

Three things are added, because nothing runs beside them:

    unequal share  an SM has four partitions, and a warp stays in one: what the busiest has to do beyond its share
    last wave      a grid is worked off in waves of as many blocks as fit; the SMs take as long for the last one as for
                   a full one (memory does not: it serves fewer blocks faster)
    copy-in        where fewer than two blocks share an SM, nothing computes while one fills its shared memory

The rates are what the hardware sustains with nothing else going on, and nothing waits: a real launch takes longer.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

SMS = 132  # of an H200
PARTITIONS = 4  # of an SM


@dataclass(frozen=True)
class Rates:
    """What an H200 sustains: measured copies and matrix products, an assumed L2 cache, the rest at 1.755 GHz."""

    copy_bytes_per_s: float = 4.3e12
    l2_read_bytes_per_s: float = 5.5e12
    instructions_per_s: float = 2.96e13  # counted for each lane
    exponentials_per_s: float = 3.71e12
    shared_bytes_per_s: float = 2.96e13
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
    l2_bytes: float = 0
    shared_bytes: float = 0

    def microseconds(self, rates: Rates) -> dict[str, float]:
        """Time of each term on its own."""
        slow = self.matrix_instructions == "mma.sync"
        return {
            "bytes": 1e6 * self.bytes / rates.copy_bytes_per_s,
            "l2": 1e6 * self.l2_bytes / rates.l2_read_bytes_per_s,
            "instructions": 1e6 * self.instructions / rates.instructions_per_s,
            "exponentials": 1e6 * self.exponentials / rates.exponentials_per_s,
            "shared": 1e6 * self.shared_bytes / rates.shared_bytes_per_s,
            "matrix": 1e6 * self.flops / (rates.mma_sync_flops_per_s if slow else rates.wgmma_flops_per_s),
        }


@dataclass(frozen=True)
class Grid:
    """How a launch lies on the GPU.

    Attributes:
        blocks: of threads; Triton calls them programs.
        per_sm: how many fit on an SM at a time.
        copy_in: bytes that a block reads before it can compute.
        share: how much the busiest partition of an SM has to do, in units of its share.
    """

    blocks: int
    per_sm: int
    copy_in: float = 0
    share: float = 1.0

    @property
    def together(self) -> int:
        """Blocks that share an SM, of those that there are."""
        return max(1, min(self.per_sm, math.ceil(self.blocks / SMS)))

    def added(self, terms: Mapping[str, float], rates: Rates) -> dict[str, float]:
        """Give the microseconds that come on top of the largest term.

        Args:
            terms: what ``Cost.microseconds`` gives.
            rates: of the GPU.
        """
        longest = max(terms.values())
        computing = self.share * max(terms[name] for name in ("instructions", "exponentials", "matrix"))
        computing = max(computing, terms["shared"])  # of which an SM has one
        waves = self.blocks / (SMS * self.together)
        copy_in = 0.0
        if self.together < 2:
            copy_in = math.ceil(waves) * self.copy_in / (1e-6 * rates.copy_bytes_per_s / SMS)
        return {
            "unequal share": max(0.0, computing - longest),
            "last wave": computing * (math.ceil(waves) / waves - 1) if waves else 0.0,
            "copy-in": max(computing + copy_in, longest) - max(computing, longest),
        }


def largest(terms: Mapping[str, float]) -> str:
    """Name the term that decides."""
    return max(terms, key=lambda term: terms[term])

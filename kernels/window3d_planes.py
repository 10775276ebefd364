"""What is added to the scores of a window, laid out for the window3d kernels: planes (N, pitch) float32.

There is one bias plane a head. Where a shift separates regions, the planes of each kind of border window hold its mask
as well; if those would take too much memory, and for masks given by the caller, the masks have planes of their own.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from vidattn.kernels.launch import Computation, Launch, Step, Work, new_workspace
from vidattn.kernels.window3d_bias import window3d_dense_bias
from vidattn.kernels.window3d_tables import BiasPositions, WindowTables
from vidattn.kernels.window3d_tiles import PITCH_UNIT

__all__ = ["Planes", "pitch_of", "plan_planes"]

COMBINED_LIMIT = 64 * 2**20  # bytes of planes that hold bias and mask, for every head and kind of window
_BLOCK = (16, 128)


@dataclass(frozen=True)
class Planes:
    """Planes, and the launches that fill them.

    Attributes:
        bias: float32 planes of bias, or of bias and mask; None without either.
        bias_kind: elements from a kind's planes to the next kind's, 0 where all kinds share them.
        bias_head: elements from a head's plane to the next.
        mask: float32 (kinds, N, pitch), added too; None without.
        bias_max: float32 (1,), the largest bias, where a mask may hide tiles; None without bias.
        launches: what has to run first.
    """

    bias: Tensor | None = None
    bias_kind: int = 0
    bias_head: int = 0
    mask: Tensor | None = None
    bias_max: Tensor | None = None
    launches: list[Step] = field(default_factory=list)


def pitch_of(num_tokens: int) -> int:
    """Elements from one row of a plane to the next."""
    unit = PITCH_UNIT.value
    return -(-num_tokens // unit) * unit


def plan_planes(
    bias: Tensor | None,
    positions: BiasPositions | None,
    mask: Tensor | None,
    tables: WindowTables,
    num_tokens: int,
    mask_value: float,
) -> Planes:
    """Lay out what is added to the scores.

    Nothing that is made from a table outlives the call: a table can change without any sign of it.

    Args:
        bias: bias table (rows, h) if ``positions`` are given, else dense bias (h, N, N); None without.
        positions: positions of the tokens in the table.
        mask: (kinds, N, N) given by the caller; None without.
        tables: tables of the grid, which hold its regions.
        num_tokens: tokens of a window.
        mask_value: what is added between regions.

    Returns:
        The planes.
    """
    pitch = pitch_of(num_tokens)
    size = num_tokens * pitch
    if positions is None or bias is None:
        if mask is not None or bias is not None:
            steps: list[Step] = []
            dense, given = (None if x is None else _plan_padded(x, pitch, steps) for x in (bias, mask))
            return Planes(dense, bias_head=size, mask=given, launches=steps)
        if tables.hidden is None:
            return Planes()
        alone, launch = _plan_dense(None, None, tables, num_tokens, mask_value, tables.num_kinds, tables.tokens)
        return Planes(alone, bias_kind=size, launches=[launch])

    heads = bias.shape[1]
    masked = tables.hidden is not None
    combined = masked and tables.num_kinds * heads * size * 4 <= COMBINED_LIMIT
    kinds = tables.num_kinds if combined else 1
    dense, launch = _plan_dense(bias, positions, tables, num_tokens, mask_value, kinds if combined else 0, bias)
    launches: list[Step] = [launch]
    largest = None
    if masked:
        largest = new_workspace(bias, (1,))
        launches.append(Computation(_largest, (largest, bias)))
    masks: Tensor | None = None
    if masked and not combined:
        masks, launch = _plan_dense(None, None, tables, num_tokens, mask_value, tables.num_kinds, tables.tokens)
        launches.append(launch)
    return Planes(
        dense,
        bias_kind=heads * size if combined else 0,
        bias_head=size,
        mask=masks,
        bias_max=largest,
        launches=launches,
    )


def _plan_dense(
    table: Tensor | None,
    positions: BiasPositions | None,
    tables: WindowTables,
    num_tokens: int,
    mask_value: float,
    num_kinds: int,
    like: Tensor,
) -> tuple[Tensor, Launch]:
    """Allocate the planes of ``num_kinds`` kinds, or of none in particular when 0, and plan their filling."""
    heads = 1 if table is None else table.shape[1]
    pitch = pitch_of(num_tokens)
    planes = new_workspace(like, (max(num_kinds, 1), heads, num_tokens, pitch))
    rows, columns = _BLOCK
    arguments = {
        "table": None if table is None else table.contiguous(),
        "positions": None if positions is None else positions.positions,
        "regions": tables.regions,
        "kind_bits": tables.kind_bits,
        "planes": planes,
        "heads": heads,
        "origin": 0 if positions is None else positions.origin,
        "mask_value": mask_value,
        "NUM_TOKENS": num_tokens,
        "BLOCK_M": rows,
        "BLOCK_N": columns,
        "HAS_TABLE": table is not None,
        "HAS_REGIONS": num_kinds > 0,
    }
    grid = planes.shape[0] * heads * -(-num_tokens // rows) * -(-pitch // columns)
    return planes, Launch(window3d_dense_bias, grid, arguments, work=Work(bytes=4 * planes.numel()))


def _plan_padded(planes: Tensor, pitch: int, steps: list[Step]) -> Tensor:
    """Plan to bring (planes, N, N) to (planes, N, pitch) float32, zeros in the padding."""
    padded = new_workspace(planes, (*planes.shape[:-1], pitch))
    steps.append(Computation(_pad, (padded, planes)))
    return padded


def _pad(padded: Tensor, planes: Tensor) -> None:
    size = planes.shape[-1]
    padded[..., size:].zero_()
    padded[..., :size].copy_(planes)


def _largest(largest: Tensor, bias: Tensor) -> None:
    largest.copy_(bias.amax())

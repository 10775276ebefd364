"""What is added to the scores of a window, laid out for the window3d kernels: planes (N, pitch) float32.

There is one bias plane a head. Where a shift separates regions, the planes of each kind of border window hold its mask
as well; if those would take too much memory, and for masks given by the caller, the masks have planes of their own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import triton
from torch import Tensor

from vidattn.calls import WindowCall
from vidattn.kernels.launch import Launch, Work, new_workspace
from vidattn.kernels.window3d_bias import window3d_copy_planes, window3d_dense_bias, window3d_largest_bias
from vidattn.kernels.window3d_tables import BiasPositions, WindowTables
from vidattn.kernels.window3d_tiles import PITCH_UNIT, Planes, Types

__all__ = ["PlannedPlanes", "pitch_of", "plan_planes"]

COMBINED_LIMIT = 64 * 2**20  # bytes of planes that hold bias and mask, for every head and kind of window
_BLOCK = (16, 128)


@dataclass(frozen=True)
class PlannedPlanes:
    """Planes, and the launches that fill them.

    Attributes:
        planes: argument of the kernels.
        bias_max: float32 (1,), the largest bias, where a mask may hide tiles; None without bias.
        launches: what has to run first.
    """

    planes: Planes
    bias_max: Tensor | None = None
    launches: tuple[Launch, ...] = ()

    @property
    def size(self) -> int:
        """Elements of the planes."""
        return sum(x.numel() for x in (self.planes.bias, self.planes.mask) if x is not None)


def pitch_of(num_tokens: int) -> int:
    """Elements from one row of a plane to the next."""
    unit = PITCH_UNIT.value
    return -(-num_tokens // unit) * unit


def plan_planes(call: WindowCall, tables: WindowTables, positions: BiasPositions | None) -> PlannedPlanes:
    """Lay out what is added to the scores.

    Nothing that is made from a table outlives the call: a table can change without any sign of it.

    Args:
        call: the call, whose bias and mask are contiguous; the caller's masks are those of the kinds of windows.
        tables: tables of the grid, which hold its regions.
        positions: positions of the tokens in the bias table; None for a dense bias, and without bias.

    Returns:
        The planes.
    """
    if call.bias is not None and positions is not None:
        return _plan_from_table(call, call.bias, tables, positions)
    size = tables.num_tokens * pitch_of(tables.num_tokens)
    if call.bias is None and call.mask is None:
        if tables.hidden is None:
            return PlannedPlanes(Planes(None, 0, 0, None))
        masks, launch = _plan_dense(call, tables, num_kinds=tables.num_kinds)
        return PlannedPlanes(Planes(masks, size, 0, None), launches=(launch,))
    if call.bias is None:
        masks, launch = _plan_copy(call.mask)  # type: ignore[arg-type]
        return PlannedPlanes(Planes(masks, size, 0, None), launches=(launch,))
    return _plan_from_dense(call, call.bias, tables)


def _plan_from_dense(call: WindowCall, bias: Tensor, tables: WindowTables) -> PlannedPlanes:
    """Lay out planes of a dense bias, one or one a type, beside those of masks: the caller's or of regions."""
    planes, launch = _plan_copy(bias)
    size, launches, masks, largest = planes.stride(-3), [launch], None, None
    if call.mask is not None or tables.hidden is not None:
        masks, launch = (
            _plan_copy(call.mask) if call.mask is not None else _plan_dense(call, tables, num_kinds=tables.num_kinds)
        )
        launches.append(launch)
    if tables.hidden is not None:
        largest, launch = _plan_largest(bias)
        launches.append(launch)
    types = None
    if call.window_types is not None:
        types = Types(call.window_types, call.window_types.shape[0], bias.shape[0], planes.stride(0))
    return PlannedPlanes(Planes(planes, 0, size, masks, types), largest, tuple(launches))


def _plan_from_table(call: WindowCall, table: Tensor, tables: WindowTables, positions: BiasPositions) -> PlannedPlanes:
    """Lay out planes of a bias table, and of the regions of a shifted grid."""
    heads, size = table.shape[1], tables.num_tokens * pitch_of(tables.num_tokens)
    if tables.hidden is None:
        dense, launch = _plan_dense(call, tables, positions)
        return PlannedPlanes(Planes(dense, 0, size, None), launches=(launch,))
    largest, find_largest = _plan_largest(table)
    if tables.num_kinds * heads * size * 4 <= COMBINED_LIMIT:
        dense, launch = _plan_dense(call, tables, positions, num_kinds=tables.num_kinds)
        return PlannedPlanes(Planes(dense, heads * size, size, None), largest, (launch, find_largest))
    dense, launch = _plan_dense(call, tables, positions)
    masks, fill_masks = _plan_dense(call, tables, num_kinds=tables.num_kinds)
    return PlannedPlanes(Planes(dense, 0, size, masks), largest, (launch, fill_masks, find_largest))


def _plan_dense(
    call: WindowCall, tables: WindowTables, positions: BiasPositions | None = None, *, num_kinds: int = 0
) -> tuple[Tensor, Launch]:
    """Allocate the planes of ``num_kinds`` kinds, or of none in particular when 0, and plan their filling.

    They hold the bias if ``positions`` are given, and the mask of the kinds if there are some.
    """
    table = None if positions is None else call.bias
    heads = 1 if table is None else table.shape[1]
    num_tokens, pitch = tables.num_tokens, pitch_of(tables.num_tokens)
    planes = new_workspace(call.q, (max(num_kinds, 1), heads, num_tokens, pitch))
    rows, columns = _BLOCK
    arguments = {
        "table": table,
        "positions": None if positions is None else positions.positions,
        "regions": tables.regions,
        "kind_bits": tables.kind_bits if num_kinds else None,
        "planes": planes,
        "heads": heads,
        "origin": 0 if positions is None else positions.origin,
        "mask_value": call.mask_value,
        "NUM_TOKENS": num_tokens,
        "BLOCK_M": rows,
        "BLOCK_N": columns,
    }
    grid = planes.shape[0] * heads * -(-num_tokens // rows) * -(-pitch // columns)
    return planes, Launch(window3d_dense_bias, grid, arguments, work=Work(bytes=4 * planes.numel()))


def _plan_copy(given: Tensor) -> tuple[Tensor, Launch]:
    """Allocate planes for (planes, N, N), and plan the copy."""
    *_, num_tokens = given.shape
    planes = new_workspace(given, (*given.shape[:-1], pitch_of(num_tokens)))
    arguments = {
        "source": given,
        "planes": planes,
        "NUM_TOKENS": num_tokens,
        "BLOCK": triton.next_power_of_2(planes.shape[-1]),
    }
    work = Work(bytes=given.numel() * given.itemsize + 4 * planes.numel())
    return planes, Launch(window3d_copy_planes, math.prod(given.shape[:-1]), arguments, work=work)


def _plan_largest(table: Tensor) -> tuple[Tensor, Launch]:
    """Allocate and plan the largest element of a table, by one program: few steps, many loads at a time."""
    largest = new_workspace(table, (1,))
    arguments = {"table": table, "largest": largest, "size": table.numel(), "BLOCK": 16384}
    work = Work(bytes=table.numel() * table.itemsize)
    return largest, Launch(window3d_largest_bias, 1, arguments, {"num_warps": 16, "num_stages": 1}, work)

"""What is added to the scores of a window, laid out for the window3d kernels: planes (N, pitch) float32.

There is one bias plane a head. Where a shift separates regions, the planes of each kind of border window hold its mask
as well; if those would take too much memory, and for masks given by the caller, the masks have planes of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.weak import WeakIdKeyDictionary

from vidattn.kernels.launch import Launch, Work, is_capturing
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
        launches: what has to run first; none if the planes are from an earlier call.
        keep: to be called when that has run, so that later calls find the planes.
    """

    bias: Tensor | None = None
    bias_kind: int = 0
    bias_head: int = 0
    mask: Tensor | None = None
    bias_max: Tensor | None = None
    launches: list[Launch] = field(default_factory=list)
    keep: Callable[[], None] = lambda: None


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
    keep_for: Hashable | None,
) -> Planes:
    """Lay out what is added to the scores.

    Args:
        bias: bias table (rows, h) if ``positions`` are given, else dense bias (h, N, N); None without.
        positions: positions of the tokens in the table.
        mask: (kinds, N, N) given by the caller; None without.
        tables: tables of the grid, which hold its regions.
        num_tokens: tokens of a window.
        mask_value: what is added between regions.
        keep_for: the planes may serve later calls with the same table and with an equal value here; None if not.

    Returns:
        The planes.
    """
    pitch, device = pitch_of(num_tokens), tables.device
    size = num_tokens * pitch
    if positions is None or bias is None:
        if mask is not None or bias is not None:
            dense = None if bias is None else _padded(bias, pitch)
            given = None if mask is None else _padded(mask, pitch)
            return Planes(dense, bias_head=size, mask=given)
        if tables.hidden is None:
            return Planes()
        alone, launch = _plan_dense(None, None, tables, num_tokens, mask_value, tables.num_kinds, device)
        return Planes(alone, bias_kind=size, launches=[launch])

    heads = bias.shape[1]
    masked = tables.hidden is not None
    combined = masked and tables.num_kinds * heads * size * 4 <= COMBINED_LIMIT
    kinds = tables.num_kinds if combined else 1
    # A graph must read the table at every replay, and an inference tensor has no version.
    keep = keep_for is not None and not is_capturing() and not bias.is_inference() and not bias.is_meta
    key = (keep_for, mask_value)
    dense, largest = _kept_planes.find(bias, key) if keep else (None, None)
    launches: list[Launch] = []
    if dense is None:
        dense, launch = _plan_dense(bias, positions, tables, num_tokens, mask_value, kinds if combined else 0, device)
        largest = bias.to(torch.float32).amax().reshape(1) if masked else None
        launches.append(launch)
    masks: Tensor | None = None
    if masked and not combined:
        masks, launch = _plan_dense(None, None, tables, num_tokens, mask_value, tables.num_kinds, device)
        launches.append(launch)
    return Planes(
        dense,
        bias_kind=heads * size if combined else 0,
        bias_head=size,
        mask=masks,
        bias_max=largest,
        launches=launches,
        keep=partial(_kept_planes.keep, bias, key, (dense, largest)) if keep else lambda: None,
    )


def _plan_dense(
    table: Tensor | None,
    positions: BiasPositions | None,
    tables: WindowTables,
    num_tokens: int,
    mask_value: float,
    num_kinds: int,
    device: torch.device,
) -> tuple[Tensor, Launch]:
    """Allocate the planes of ``num_kinds`` kinds, or of none in particular when 0, and plan their filling."""
    heads = 1 if table is None else table.shape[1]
    pitch = pitch_of(num_tokens)
    planes = torch.empty(max(num_kinds, 1), heads, num_tokens, pitch, dtype=torch.float32, device=device)
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


def _padded(planes: Tensor, pitch: int) -> Tensor:
    """Bring (planes, N, N) to (planes, N, pitch) float32, zeros in the padding."""
    return F.pad(planes.to(torch.float32), (0, pitch - planes.shape[-1])).contiguous()


class _KeptPlanes:
    """Planes of bias tables that have not changed since.

    A table counts as changed when its version counter, its memory, its dtype or its shape is another. As for autograd,
    writing through ``.data`` goes unnoticed. Planes serve the stream that filled them.
    """

    def __init__(self) -> None:
        self._of_table: Any = WeakIdKeyDictionary()  # the planes go with the table

    def find(self, table: Tensor, key: Hashable) -> tuple[Tensor | None, Tensor | None]:
        """Give the planes and the largest bias that were kept for a table as it is now."""
        state, kept = self._of_table.get(table, (None, None))
        return kept if state == (key, *self._state(table)) else (None, None)

    def keep(self, table: Tensor, key: Hashable, kept: tuple[Tensor, Tensor | None]) -> None:
        """Keep planes and the largest bias."""
        self._of_table[table] = (key, *self._state(table)), kept

    def _state(self, table: Tensor) -> tuple[object, ...]:
        stream = torch.cuda.current_stream(table.device).cuda_stream if table.is_cuda else 0
        return table._version, table.data_ptr(), table.dtype, table.device, tuple(table.shape), stream


_kept_planes = _KeptPlanes()

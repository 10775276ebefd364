"""What the window3d kernels look up instead of computing: made on the host once a shape, kept on the device."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from vidattn import geometry as geo
from vidattn.kernels.launch import is_capturing, new_table
from vidattn.kernels.rows import NO_TOKEN, PADDING
from vidattn.kernels.window3d_tiles import MAP_UNIT

__all__ = ["BiasPositions", "WindowTables", "bias_positions", "window_tables"]

_SHAPES_KEPT = 64


@dataclass(frozen=True)
class WindowTables:
    """Tables of one grid and batch, int32 on ``device``.

    Attributes:
        device: where they are.
        tokens: (windows of a batch element, N rounded up to 128), the grid token that each slot holds.
        regions: (N,), on which axes a token of a window at the border wrapped around, as bits.
        kind_bits: (kinds,), on which of these axes a window of the kind is the last.
        listed: (batch x windows, 2), (batch element, window of it), sorted by kind; on the host.
        windows: the same on ``device``.
        kinds: (batch x windows,), their kinds.
        starts: where each kind starts among them, and one past the last; on the host.
        kind_starts: the same on ``device``.
        has_padding: whether some slots hold padding.
        hidden: bool (kinds, N, N) on the host, the region mask of each kind; None without any.
    """

    device: torch.device
    tokens: Tensor
    regions: Tensor
    kind_bits: Tensor
    listed: Tensor
    windows: Tensor
    kinds: Tensor
    starts: tuple[int, ...]
    kind_starts: Tensor
    has_padding: bool
    hidden: Tensor | None
    _derived: dict[tuple[int, ...], Any] = field(default_factory=dict)

    @property
    def num_kinds(self) -> int:
        """Number of kinds of windows."""
        return len(self.starts) - 1

    @property
    def num_tokens(self) -> int:
        """Tokens of a window."""
        return self.regions.shape[0]

    def groups(self, size: int) -> tuple[Tensor, Tensor]:
        """Put windows of the same kind into groups of ``size``.

        The last group of a kind repeats its last window, which is then computed more than once, with the same result.

        Returns:
            int32 (groups, size, 2) windows and int32 (groups,) kinds.
        """
        if size == 1:
            return self.windows, self.kinds
        if (size,) not in self._derived:
            ranks, kinds = [], []
            for kind, (first, last) in enumerate(pairwise(self.starts)):
                count = -(-(last - first) // size)
                ranks.append(torch.arange(first, first + count * size).clamp_(max=last - 1))
                kinds.append(torch.full((count,), kind))
            grouped = self.listed[torch.cat(ranks)].view(-1, size, 2)
            self._derived[size,] = _on_device(grouped, self.device), _on_device(torch.cat(kinds), self.device)
        return self._derived[size,]

    def visible(self, rows: int, columns: int) -> tuple[Tensor | None, float]:
        """Give, for each tile of ``rows`` tokens, the full tiles of ``columns`` tokens that the mask does not hide.

        Returns:
            int32 (kinds, row tiles, 2), first and one past the last, at least one tile; None if no tile is hidden as a
            whole. And how many tiles are visible on average.
        """
        if self.hidden is None or self.hidden.shape[-1] < columns:
            return None, self.num_tokens // columns
        if (rows, columns) not in self._derived:
            count = self.hidden.shape[-1]
            full = count // columns
            padded = torch.ones(self.num_kinds, -(-count // rows) * rows, full * columns, dtype=torch.bool)
            padded[:, :count] = self.hidden[:, :, : full * columns]
            seen = ~padded.view(self.num_kinds, -1, rows, full, columns).all(4).all(2)  # (kinds, row tiles, full)
            numbers = torch.arange(full)
            # A tile of rows whose keys are all in the tail is given the last full tile too: kernels count on one.
            first = torch.where(seen, numbers, full - 1).amin(-1)
            last = torch.maximum(torch.where(seen, numbers + 1, 0).amax(-1), first + 1)
            hides = bool((last - first < full).any())
            ranges = torch.stack([first, last], -1)
            counts = torch.tensor(self.starts).diff()
            mean = ((last - first).double().mean(1) * counts).sum() / counts.sum()
            self._derived[rows, columns] = (_on_device(ranges, self.device), mean.item()) if hides else (None, full)
        return self._derived[rows, columns]


@dataclass(frozen=True)
class BiasPositions:
    """Token i has position A_i, and the pair (i, j) reads row A_i - A_j + origin of the bias table.

    Attributes:
        positions: int32 (N,).
        tokens_at: int32 (largest position + 1,), the token at a position, or -1.
        origin: row of a pair of equal tokens.
    """

    positions: Tensor
    tokens_at: Tensor
    origin: int


@lru_cache(_SHAPES_KEPT)
def window_tables(geometry: geo.WindowGeometry, batch: int, num_masks: int, device: torch.device) -> WindowTables:
    """Look up the tables of a grid.

    Args:
        geometry: effective geometry.
        batch: batch size.
        num_masks: of windows that are grids of their own, window ``g`` has the mask ``g % num_masks``; 0 for grids,
            whose windows differ by the regions they hold.
        device: where to keep them.

    Returns:
        The tables.

    Raises:
        RuntimeError: a CUDA graph is being captured and the shape is new.
    """
    slots = geo.source_tokens(geometry)  # (windows, N), -1 for padding
    count = geometry.num_tokens
    tokens = torch.full((slots.shape[0], -(-count // MAP_UNIT.value) * MAP_UNIT.value), NO_TOKEN.value)
    tokens[:, :count] = torch.where(slots < 0, PADDING.value, slots)
    bits, regions = geo.region_bits(geometry)
    if num_masks:
        bits = torch.arange(batch) % num_masks
    else:
        bits = bits.repeat(batch)
    kind_bits, kinds = bits.unique(return_inverse=True)
    order = kinds.argsort(stable=True)
    windows = torch.stack([order // slots.shape[0], order % slots.shape[0]], 1)
    starts = torch.cat([torch.zeros(1), torch.bincount(kinds).cumsum(0)])
    hidden = None
    if any(geometry.masked_axes):
        hidden = (kind_bits[:, None, None] & (regions[:, None] ^ regions[None, :])) != 0
    return WindowTables(
        device=device,
        tokens=_on_device(tokens, device),
        regions=_on_device(regions, device),
        kind_bits=_on_device(kind_bits, device),
        listed=windows,
        windows=_on_device(windows, device),
        kinds=_on_device(kinds[order], device),
        starts=tuple(int(start) for start in starts.tolist()),
        kind_starts=_on_device(starts, device),
        has_padding=bool((slots < 0).any()),
        hidden=hidden,
    )


@lru_cache(_SHAPES_KEPT)
def bias_positions(
    window_size: tuple[int, int, int], extents: tuple[int, int], num_tokens: int, device: torch.device
) -> BiasPositions:
    """Look up the positions of the tokens of a window in its bias table.

    Args:
        window_size: configured window, which lays out the table.
        extents: height and width that unravel a token number.
        num_tokens: tokens of the effective window.
        device: where to keep them.

    Returns:
        The positions.

    Raises:
        RuntimeError: a CUDA graph is being captured and the window is new.
    """
    flat = torch.arange(num_tokens)
    _, height, width = (2 * extent - 1 for extent in window_size)
    rows, columns = flat // extents[1] % extents[0], flat % extents[1]
    positions = (flat // (extents[0] * extents[1]) * height + rows) * width + columns
    tokens_at = torch.full((int(positions.max()) + 1,), -1)
    tokens_at[positions] = flat
    depth_half, height_half, width_half = (extent - 1 for extent in window_size)
    origin = (depth_half * height + height_half) * width + width_half
    return BiasPositions(_on_device(positions, device), _on_device(tokens_at, device), origin)


def _on_device(table: Tensor, device: torch.device) -> Tensor:
    if is_capturing():  # a copy from the host cannot be captured
        raise RuntimeError(
            "window3d: a CUDA graph is being captured and this shape has not run yet; run the model once before"
            " (vidattn.warmup does)"
        )
    return new_table(table, device)

"""Dropout as modules draw it that have their tokens partitioned into windows, for twins that partition nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from vidattn.geometry import resolve_windows
from vidattn.nn.windows import in_3d


def drop_in_windows(
    x: Tensor,
    drop: Callable[[Tensor], Tensor],
    window_size: Sequence[int],
    shift_size: Sequence[int],
    *,
    clip: bool = True,
) -> Tensor:
    """Drop of a token grid what a dropout of its windows, padding included, drops under the same seed.

    Args:
        x: tokens (B, D, H, W, C), or (B, H, W, C).
        drop: the dropout, which is active.
        window_size: configured window (Wd, Wh, Ww), or (Wh, Ww).
        shift_size: configured shift.
        clip: whether windows are clipped to the grid, or else the grid padded up to them.

    Returns:
        Tokens of the shape of ``x``.
    """
    batch, *grid, channels = x.shape
    windows = resolve_windows(in_3d(grid, 1), in_3d(window_size, 1), in_3d(shift_size, 0), clip=clip)
    # What ones become there is the factor of each number.
    factors = drop(x.new_ones(batch * windows.num_windows, windows.num_tokens, channels))
    factors = factors.view(batch, *windows.counts, *windows.window, channels).permute(0, 1, 4, 2, 5, 3, 6, 7)
    factors = factors.reshape(batch, *windows.padded, channels)
    if any(windows.shift):
        factors = factors.roll(windows.shift, dims=(1, 2, 3))
    depth, height, width = windows.grid
    return x * factors[:, :depth, :height, :width].reshape(x.shape)

"""What an op hands to the kernels of a backend: one value a family, made once a pass, in the order of its native ops.

A launch function takes the value, then the tensors that belong to the pass alone. Tensors have a dense last dimension.
Native ops take a packed tensor too, (..., 3, h, d) in the place of q and None for k and v, and so for their gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

__all__ = ["DividedCall", "MixingCall", "WindowCall"]


class WindowCall(NamedTuple):
    """Attention in the windows of a token grid; windows that came partitioned are grids (G, 1, 1, N) of one window.

    Attributes:
        q: (B, D, H, W, h, d).
        k: like ``q``.
        v: like ``q``.
        bias: table (rows, h) if ``bias_window`` is not empty, else dense (h, N, N), or (types, h, N, N) with
            ``window_types``; None without.
        bias_window: configured window, then the two extents that unravel a token number.
        mask: (nW, N, N), added to window g as ``mask[g % nW]``; None without.
        pad_qkv: (3, h, d), contiguous, what a padding token holds; None for zeros.
        seed: int64 (1,), key of the dropout mask; None without dropout.
        window: effective window.
        shift: effective shift.
        wrap: which axes are cyclic.
        scale: factor of q k^T.
        mask_value: added to the scores of tokens of different regions.
        dropout_p: dropout probability.
        window_types: int32 (nW,), window g takes ``bias[window_types[g % nW]]``; None where all take one.
        regions: int64 (D', H', W') on the shifted, padded grid, contiguous, the regions that the mask separates in
            place of those of the shift; None without. From here on only "cpu" takes anything.
        padding: tokens before and behind each axis; empty for behind it, as needed.
        shift_first: whether the grid is shifted before it is padded.
    """

    q: Tensor
    k: Tensor | None
    v: Tensor | None
    bias: Tensor | None
    bias_window: Sequence[int]
    mask: Tensor | None
    pad_qkv: Tensor | None
    seed: Tensor | None
    window: Sequence[int]
    shift: Sequence[int]
    wrap: Sequence[bool]
    scale: float
    mask_value: float
    dropout_p: float
    window_types: Tensor | None = None
    regions: Tensor | None = None
    padding: Sequence[int] = ()
    shift_first: bool = False


class DividedCall(NamedTuple):
    """Attention over the frames of each site with the first heads, over the sites of each frame with the others.

    Attributes:
        q: (B, S, h, d); S is T * N, one more with a cls token, which is row 0.
        k: like ``q``.
        v: like ``q``.
        seed: int64 (1,), key of the dropout mask; None without dropout.
        num_frames: T.
        time_fastest: whether the T frames of a site are neighbours, or the N sites of a frame.
        temporal_heads: heads that attend over time, the first ones; 0 with a cls token that attends to each frame.
        scale: factor of q k^T.
        dropout_p: dropout probability.
        cls_sees_all: whether row 0 is a cls token whose query attends to the whole clip; all heads attend alike.
    """

    q: Tensor
    k: Tensor | None
    v: Tensor | None
    seed: Tensor | None
    num_frames: int
    time_fastest: bool
    temporal_heads: int
    scale: float
    dropout_p: float
    cls_sees_all: bool = False


class MixingCall(NamedTuple):
    """Attention in each frame, with channels of keys and values from other frames.

    Attributes:
        q: (B * T, N, h, d).
        k: like ``q``.
        v: like ``q``.
        seed: int64 (1,), key of the dropout mask; None without dropout.
        num_frames: T, frames of a segment.
        channel_shifts: first, last and frame offset of each range of concatenated channels, in ascending order, flat.
        scale: factor of q k^T.
        dropout_p: dropout probability.
    """

    q: Tensor
    k: Tensor | None
    v: Tensor | None
    seed: Tensor | None
    num_frames: int
    channel_shifts: Sequence[int]
    scale: float
    dropout_p: float

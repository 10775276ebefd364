"""Windows of the Video Swin Transformer in plain PyTorch: partition, mask, position index (arXiv 2106.13230)."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor

Triple = tuple[int, int, int]

MASK_VALUE = -100.0
# A mask of the first stage takes 79 MB for 32 frames of 224 x 224: room for two models of four
# stages, no more.
_MASK_CACHE_ENTRIES = 8
_mask_cache: OrderedDict[tuple[Any, ...], Tensor] = OrderedDict()
_mask_lock = threading.Lock()


def _as_triple(axes: Sequence[int]) -> Triple:
    depth, height, width = axes
    return depth, height, width


def triple(name: str, value: int | Sequence[int], minimum: int) -> Triple:
    """Check a (time, height, width) argument given as three integers or as one for all axes."""
    axes = (value, value, value) if isinstance(value, int) else tuple(value)
    if len(axes) != 3 or any(isinstance(axis, bool) or not isinstance(axis, int) or axis < minimum for axis in axes):
        raise ValueError(f"{name} must be three integers (time, height, width) of at least {minimum}, got {value!r}")
    return _as_triple(axes)


@overload
def get_window_size(x_size: Sequence[int], window_size: Sequence[int], shift_size: None = None) -> Triple: ...


@overload
def get_window_size(
    x_size: Sequence[int], window_size: Sequence[int], shift_size: Sequence[int]
) -> tuple[Triple, Triple]: ...


def get_window_size(
    x_size: Sequence[int], window_size: Sequence[int], shift_size: Sequence[int] | None = None
) -> Triple | tuple[Triple, Triple]:
    """Clip a window, and its shift, to a token grid (arXiv 2106.13230, section 3.1).

    An axis no longer than the window is covered by one window of its own length and is not shifted.

    Args:
        x_size: Token grid (depth, height, width), before padding.
        window_size: Configured window (depth, height, width) in tokens.
        shift_size: Configured shift in tokens, or None.

    Returns:
        The effective window; with ``shift_size`` the pair (effective window, effective shift).

    Example:
        >>> get_window_size((4, 14, 7), (8, 7, 7), (4, 3, 3))
        ((4, 7, 7), (0, 3, 0))
    """
    # A comparison, not min(): a compiler then specialises on the case, and a window that is not clipped stays a number.
    window = [size if size <= axis else axis for size, axis in zip(x_size, window_size, strict=True)]
    if shift_size is None:
        return _as_triple(window)
    shift = [0 if size <= axis else offset for size, axis, offset in zip(x_size, window_size, shift_size, strict=True)]
    return _as_triple(window), _as_triple(shift)


def fit_window(
    grid: Sequence[int], window_size: Sequence[int], shift_size: Sequence[int]
) -> tuple[Triple, Triple, Triple]:
    """Return effective window, effective shift and padded grid (depth, height, width) of an unpadded token grid."""
    window, shift = get_window_size(grid, window_size, shift_size)
    padded = [-(-size // axis) * axis for size, axis in zip(grid, window, strict=True)]
    return window, shift, _as_triple(padded)


def window_partition(x: Tensor, window_size: Sequence[int]) -> Tensor:
    """Cut a token grid into windows (arXiv 2106.13230, section 3.1).

    Args:
        x: Tokens (B, D, H, W, C); each axis a multiple of its window.
        window_size: Effective window (depth, height, width) in tokens.

    Returns:
        Windows (B * number of windows, tokens of a window, C), the batch outermost.

    Example:
        >>> window_partition(torch.zeros(2, 4, 14, 14, 96), (4, 7, 7)).shape
        torch.Size([8, 196, 96])
    """
    batch, depth, height, width, channels = x.shape
    wd, wh, ww = window_size
    nd, nh, nw = depth // wd, height // wh, width // ww
    x = x.reshape(batch, nd, wd, nh, wh, nw, ww, channels)
    return x.permute(0, 1, 3, 5, 2, 4, 6, 7).reshape(batch * nd * nh * nw, wd * wh * ww, channels)


def window_reverse(windows: Tensor, window_size: Sequence[int], B: int, D: int, H: int, W: int) -> Tensor:
    """Put windows back into a token grid: the inverse of ``window_partition``.

    Args:
        windows: Windows (B * number of windows, tokens of a window, C).
        window_size: Effective window (depth, height, width) in tokens.
        B: Batch size.
        D: Depth of the (padded) grid.
        H: Height of the (padded) grid.
        W: Width of the (padded) grid.

    Returns:
        Tokens (B, D, H, W, C).

    Example:
        >>> window_reverse(torch.zeros(8, 196, 96), (4, 7, 7), 2, 4, 14, 14).shape
        torch.Size([2, 4, 14, 14, 96])
    """
    wd, wh, ww = window_size
    channels = windows.shape[-1]
    x = windows.reshape(B, D // wd, H // wh, W // ww, wd, wh, ww, channels)
    return x.permute(0, 1, 4, 2, 5, 3, 6, 7).reshape(B, D, H, W, channels)


def _build_mask(padded: Triple, window: Triple, shift: Triple, device: torch.device) -> Tensor:
    # Rolling brings tokens from the far end of an axis into its last window. Three labels an axis tell them apart:
    # positions before the last window, in it but not rolled around, rolled around. An axis without a shift has one
    # label.
    labels = torch.zeros(padded, dtype=torch.int64, device=device)
    for axis, (size, extent, offset) in enumerate(zip(padded, window, shift, strict=True)):
        if offset == 0:
            continue
        position = torch.arange(size, device=device)
        label = (position >= size - extent).long() + (position >= size - offset).long()
        labels = labels + label.view([-1 if other == axis else 1 for other in range(3)]) * 3**axis
    regions = window_partition(labels.view(1, *padded, 1), window).squeeze(-1)
    different = regions.unsqueeze(1) != regions.unsqueeze(2)
    return torch.zeros(different.shape, dtype=torch.float32, device=device).masked_fill_(different, MASK_VALUE)


def compute_mask(
    D: int,
    H: int,
    W: int,
    window_size: Sequence[int],
    shift_size: Sequence[int],
    device: torch.device | str,
) -> Tensor:
    """Build the additive mask of a shifted stage (arXiv 2106.13230, section 3.1, after figure 4 of arXiv 2103.14030).

    The most recent masks are kept: all blocks of a stage, and all clips of one size, share one tensor. Do not write
    to it.

    Args:
        D: Depth of the padded token grid.
        H: Height of the padded token grid.
        W: Width of the padded token grid.
        window_size: Effective window (depth, height, width) in tokens.
        shift_size: Effective shift in tokens.
        device: Where the mask lives.

    Returns:
        float32 mask (number of windows, N, N): 0 where query and key were neighbours before the shift, else -100.

    Example:
        >>> compute_mask(2, 4, 4, (2, 2, 2), (0, 1, 1), "cpu").shape
        torch.Size([4, 8, 8])
    """
    padded, window, shift = (D, H, W), _as_triple(window_size), _as_triple(shift_size)
    if torch.compiler.is_compiling():
        return _build_mask(padded, window, shift, torch.device(device))
    probe = torch.empty(0, device=device)
    # A fake or traced tensor must neither enter the cache nor meet a real one from it.
    if type(probe) is not torch.Tensor:
        return _build_mask(padded, window, shift, probe.device)
    key = (padded, window, shift, probe.device)
    with _mask_lock:
        mask = _mask_cache.pop(key, None)
    if mask is None:
        with torch.inference_mode(False):  # the mask outlives this call: a later training step may use it
            mask = _build_mask(padded, window, shift, probe.device)
    with _mask_lock:
        _mask_cache[key] = mask
        while len(_mask_cache) > _MASK_CACHE_ENTRIES:
            _mask_cache.popitem(last=False)
    return mask


def relative_position_index(window_size: Sequence[int]) -> Tensor:
    """Number the row of the position-bias table that each pair of tokens uses (arXiv 2106.13230, equation 1).

    Args:
        window_size: Configured window (depth, height, width) in tokens.

    Returns:
        int64 (N, N) index, query by key, into a table of (2 Wd - 1)(2 Wh - 1)(2 Ww - 1) rows.

    Example:
        >>> relative_position_index((1, 1, 3))
        tensor([[2, 1, 0],
                [3, 2, 1],
                [4, 3, 2]])
    """
    wd, wh, ww = window_size
    tokens = torch.stack(torch.meshgrid(torch.arange(wd), torch.arange(wh), torch.arange(ww), indexing="ij")).flatten(1)
    offset = tokens[:, :, None] - tokens[:, None, :]
    return ((offset[0] + wd - 1) * (2 * wh - 1) + offset[1] + wh - 1) * (2 * ww - 1) + offset[2] + ww - 1

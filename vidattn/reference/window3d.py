"""3D window attention in plain PyTorch (Video Swin Transformer, arXiv 2106.13230, sections 3.2 and 3.3).

The groups of [`vidattn.reference.attention`][] are windows of N = wd * wh * ww tokens, and equation 2 adds to their
scores

* B, the relative position bias, one row of a table per coordinate difference (section 3.3);
* M, ``mask_value`` (additive -100, not -inf, in the released code) for the pairs of a shifted window that the cyclic
  shift put side by side without their being neighbours (section 3.2).

Padding tokens are ordinary keys: they hold ``pad_qkv``, and no mask covers them, unless regions are given.

Other models give other tables: the rows that a pair reads may be given, and so may a table for each type of window.

Backward, the gradient of B is the sum of dS over windows. The gradient of the context is zero in rows of padding
queries. Padding slots add their dk and dv to the gradient of ``pad_qkv``; padding queries have no output, so its q part
gets 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from vidattn import geometry as geo
from vidattn.reference.attention import accumulator_dtype, attend, attend_backward, sum_by_number

__all__ = ["window3d_attention", "window3d_attention_backward", "window_attention", "window_attention_backward"]


def window3d_attention(
    qkv: Tensor | tuple[Tensor, Tensor, Tensor],
    bias_table: Tensor | None = None,
    *,
    window_size: Sequence[int],
    shift_size: Sequence[int] = (0, 0, 0),
    pad_qkv: Tensor | None = None,
    bias_index: str | Tensor = "prefix",
    mask_value: float = -100.0,
    wrap: Sequence[bool] = (False, False, False),
    window_types: Tensor | None = None,
    clip_window: bool = True,
    padding: Sequence[Sequence[int]] | None = None,
    padding_order: str = "before_shift",
    regions: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend inside the (shifted) 3D windows of a token grid, step by step as the paper's code does.

    Takes what [`vidattn.window3d_attention`][] takes, unvalidated, plus the two arguments below.

    Args:
        qkv: (B, D, H, W, 3, h, d) packed, or three tensors (B, D, H, W, h, d).
        bias_table: ((2Wd-1)(2Wh-1)(2Ww-1), h), (types, ..., h) with ``window_types``, or None.
        window_size: configured window.
        shift_size: configured shift.
        pad_qkv: (3, h, d), what a padding token holds; None for zeros.
        bias_index: "prefix", "geometric", or integers (N, N), the row of the table that each pair reads.
        mask_value: added to the scores of masked pairs.
        wrap: axes that are cyclic.
        window_types: integers (nW,), which table a window reads; None where there is one.
        clip_window: whether windows are clipped to the grid, or else the grid padded up to them.
        padding: ((before, behind),) * 3 tokens; None for behind, as needed.
        padding_order: "before_shift" or "after_shift".
        regions: integers (D', H', W') on the shifted, padded grid, in place of the regions of the shift; or None.
        scale: factor of q k^T, d**-0.5 when None.
        dropout_p: dropout probability.
        seed: int64 tensor with one element, needed when ``dropout_p > 0``.
        return_lse: return the log-sum-exp too.

    Returns:
        (B, D, H, W, h * d) in q's dtype, and with ``return_lse`` also (B, D, H, W, h) in float32 (float64 for float64).
    """
    q, k, v = qkv.unbind(-3) if isinstance(qkv, Tensor) else qkv
    dtype = q.dtype
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    windows = geo.resolve_windows(
        q.shape[1:4],
        window_size,
        shift_size,
        wrap,
        clip=clip_window,
        padding=padding,
        shift_first=padding_order == "after_shift",
    )
    bias = None
    if bias_table is not None:
        # Widened first: its gradient sums over all pairs with the same row.
        table = bias_table.to(accumulator_dtype(bias_table.dtype))
        bias = dense_bias(table, _rows(bias_index, window_size, windows, q.device))
    mask = _additive_mask(windows, mask_value, q, regions)
    q, k, v = _windows_of((q, k, v), pad_qkv, windows)
    out, lse = attend(q, k, v, bias, mask, scale=scale, dropout_p=dropout_p, seed=seed, window_types=window_types)
    out = _from_windows(out, windows).to(dtype).contiguous()
    if not return_lse:
        return out
    return out, _from_windows(lse, windows).contiguous()


def window_attention(
    qkv: Tensor | tuple[Tensor, Tensor, Tensor],
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    window_types: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend inside windows that are already partitioned.

    Takes what [`vidattn.window_attention`][] takes, unvalidated, plus the two arguments below.

    Args:
        qkv: (G, N, 3, h, d) packed, or three tensors (G, N, h, d).
        bias: (h, N, N), (types, h, N, N) with ``window_types``, or None.
        mask: (nW, N, N) or None, added to window g as ``mask[g % nW]``.
        window_types: integers (nW,): window g takes ``bias[window_types[g % nW]]``; None for one type.
        scale: factor of q k^T, d**-0.5 when None.
        dropout_p: dropout probability.
        seed: int64 tensor with one element, needed when ``dropout_p > 0``.
        return_lse: return the log-sum-exp too.

    Returns:
        (G, N, h * d) in q's dtype, and with ``return_lse`` also (G, N, h) in float32 (float64 for float64).
    """
    q, k, v = qkv.unbind(-3) if isinstance(qkv, Tensor) else qkv
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out, lse = attend(q, k, v, bias, mask, scale=scale, dropout_p=dropout_p, seed=seed, window_types=window_types)
    out = out.to(q.dtype)
    return (out, lse) if return_lse else out


def window3d_attention_backward(
    grad_out: Tensor,
    qkv: tuple[Tensor, Tensor, Tensor],
    bias_table: Tensor | None,
    pad_qkv: Tensor | None,
    *,
    window_size: Sequence[int],
    shift_size: Sequence[int],
    bias_index: str | Tensor,
    mask_value: float,
    wrap: Sequence[bool],
    window_types: Tensor | None,
    clip_window: bool,
    padding: Sequence[Sequence[int]] | None,
    padding_order: str,
    regions: Tensor | None,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Differentiate ``window3d_attention`` by its formulas.

    Args:
        grad_out: (B, D, H, W, h * d), gradient of the context.
        qkv: three tensors (B, D, H, W, h, d).
        bias_table: as in the forward pass.
        pad_qkv: as in the forward pass.
        window_size: as in the forward pass; so are all further arguments, with ``scale`` resolved.
        shift_size: configured shift.
        bias_index: "prefix", "geometric" or rows of the table.
        mask_value: added to the scores of masked pairs.
        wrap: axes that are cyclic.
        window_types: which table a window reads.
        clip_window: whether windows are clipped.
        padding: tokens before and behind each axis.
        padding_order: "before_shift" or "after_shift".
        regions: numbers of the regions.
        scale: factor of q k^T.
        dropout_p: dropout probability.
        seed: int64 tensor with one element.

    Returns:
        Gradients of q, k, v in q's dtype, of the bias table (None without one) and of ``pad_qkv`` (None without one)
        in float32 (float64 for float64).
    """
    q = qkv[0]
    windows = geo.resolve_windows(
        q.shape[1:4],
        window_size,
        shift_size,
        wrap,
        clip=clip_window,
        padding=padding,
        shift_first=padding_order == "after_shift",
    )
    rows = None if bias_table is None else _rows(bias_index, window_size, windows, q.device)
    bias = None if bias_table is None else dense_bias(bias_table, rows)  # type: ignore[arg-type]
    window_grads = attend_backward(
        _to_windows(grad_out, windows),
        *_windows_of(qkv, pad_qkv, windows),
        bias,
        _additive_mask(windows, mask_value, q, regions),
        scale=scale,
        dropout_p=dropout_p,
        seed=seed,
        window_types=window_types,
    )
    grad_pad = None
    if pad_qkv is not None:
        is_pad = geo.source_tokens(windows, q.device) < 0  # (windows, N)
        by_window = [grad.unflatten(0, (q.shape[0], -1))[:, is_pad].sum((0, 1)) for grad in window_grads[1:3]]
        grad_pad = torch.stack([torch.zeros_like(by_window[0]), *by_window])
    grad_table = None
    if bias_table is not None and window_grads[3] is not None:
        grad_table = table_gradient(window_grads[3], rows, bias_table.shape)  # type: ignore[arg-type]
    grad_q, grad_k, grad_v = (_from_windows(grad, windows).to(q.dtype) for grad in window_grads[:3])
    return grad_q, grad_k, grad_v, grad_table, grad_pad


def window_attention_backward(
    grad_out: Tensor,
    qkv: tuple[Tensor, Tensor, Tensor],
    bias: Tensor | None,
    mask: Tensor | None,
    *,
    window_types: Tensor | None,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Differentiate ``window_attention`` by its formulas.

    Args:
        grad_out: (G, N, h * d), gradient of the context.
        qkv: three tensors (G, N, h, d).
        bias: (h, N, N), (types, h, N, N) with ``window_types``, or None.
        mask: (nW, N, N) or None.
        window_types: which bias a window takes.
        scale: factor of q k^T.
        dropout_p: dropout probability.
        seed: int64 tensor with one element.

    Returns:
        Gradients of q, k, v, and that of the bias (None without one) in float32 (float64 for float64).
    """
    *grads, grad_bias = attend_backward(
        grad_out, *qkv, bias, mask, scale=scale, dropout_p=dropout_p, seed=seed, window_types=window_types
    )
    grad_q, grad_k, grad_v = (grad.to(qkv[0].dtype) for grad in grads)
    return grad_q, grad_k, grad_v, grad_bias


def dense_bias(table: Tensor, rows: Tensor) -> Tensor:
    """Expand a table (L, h), or those of all types (types, L, h), to (h, N, N) or (types, h, N, N).

    Args:
        table: the table.
        rows: integers (N, N), the row that each pair reads. One that the table has not is an error where it is read.

    Returns:
        The dense bias, contiguous.
    """
    by_head = table.transpose(-1, -2)
    numbers = rows.long().flatten().expand(*by_head.shape[:-1], rows.numel())
    return by_head.gather(-1, numbers).unflatten(-1, rows.shape)


def table_gradient(grad: Tensor, rows: Tensor, shape: Sequence[int]) -> Tensor:
    """Sum the gradient of ``dense_bias`` over the pairs of a row, in one order.

    Args:
        grad: gradient of the dense bias.
        rows: as in the forward pass.
        shape: of the table.

    Returns:
        The gradient of the table.
    """
    numbers = rows.long().flatten()
    if grad.device.type == "cpu":
        by_head = grad.new_zeros(*shape[:-2], shape[-1], shape[-2])
        by_head.scatter_add_(-1, numbers.expand(*by_head.shape[:-1], numbers.numel()), grad.flatten(-2))
        return by_head.transpose(-1, -2).contiguous()
    first = torch.arange(0, math.prod(shape[:-1]), shape[-2], device=grad.device)
    per_pair = grad.flatten(-2).transpose(-1, -2).reshape(-1, shape[-1])  # (types * N * N, h)
    return sum_by_number(per_pair, (first[:, None] + numbers).flatten(), math.prod(shape[:-1])).view(*shape)


def _rows(
    bias_index: str | Tensor, window_size: Sequence[int], windows: geo.WindowGeometry, device: torch.device
) -> Tensor:
    """Give the row of the table that each pair reads, (N, N)."""
    return geo.bias_rows(window_size, windows, bias_index, device) if isinstance(bias_index, str) else bias_index


def _additive_mask(
    windows: geo.WindowGeometry, mask_value: float, like: Tensor, regions: Tensor | None
) -> Tensor | None:
    """Region mask as what is added to the scores, (nW, N, N)."""
    separated = geo.region_mask(windows, like.device, regions)
    if separated is None:
        return None
    return torch.zeros(separated.shape, dtype=accumulator_dtype(like.dtype), device=like.device).masked_fill(
        separated, mask_value
    )


def _real_tokens(windows: geo.WindowGeometry, device: torch.device) -> Tensor:
    """Which tokens of the padded grid are not padding, bool (Dp, Hp, Wp)."""
    depth, height, width = (
        (place >= before) & (place < before + size)
        for place, before, size in (
            (torch.arange(padded, device=device), before, size)
            for padded, before, size in zip(windows.padded, windows.before, windows.grid, strict=True)
        )
    )
    return depth[:, None, None] & height[:, None] & width


def _windows_of(
    qkv: tuple[Tensor, Tensor, Tensor], pad_qkv: Tensor | None, windows: geo.WindowGeometry
) -> tuple[Tensor, Tensor, Tensor]:
    """Partition q, k and v, padding with what a padding token holds, in the accumulator's dtype."""
    dtype = accumulator_dtype(qkv[0].dtype)
    pads = (None, None, None) if pad_qkv is None else pad_qkv.to(qkv[0].dtype).to(dtype).unbind(0)
    q, k, v = (_to_windows(x.to(dtype), windows, pad) for x, pad in zip(qkv, pads, strict=True))
    return q, k, v


def _to_windows(x: Tensor, windows: geo.WindowGeometry, pad_value: Tensor | None = None) -> Tensor:
    """Pad, roll and partition a grid (B, D, H, W, ...) into windows (B * nW, N, ...)."""
    batch, tail = x.shape[0], x.shape[4:]
    x = x.flatten(4)  # what other libraries run has 8 dimensions at most
    back = [-s for s in windows.shift]
    x = _pad(x.roll(back, (1, 2, 3)), windows, pad_value) if windows.shift_first else _pad(x, windows, pad_value)
    if not windows.shift_first:
        x = x.roll(back, (1, 2, 3))
    (nd, nh, nw), (wd, wh, ww) = windows.counts, windows.window
    x = x.reshape(batch, nd, wd, nh, wh, nw, ww, x.shape[-1]).permute(0, 1, 3, 5, 2, 4, 6, 7)
    return x.reshape(batch * windows.num_windows, windows.num_tokens, *tail)


def _pad(x: Tensor, windows: geo.WindowGeometry, pad_value: Tensor | None) -> Tensor:
    """Pad a grid (B, D, H, W, C) with a value (C, ...), or zeros."""
    if windows.padded == windows.grid:
        return x
    pads = [0, 0]
    for axis in (2, 1, 0):
        before = windows.before[axis]
        pads += [before, windows.padded[axis] - windows.grid[axis] - before]
    x = F.pad(x, pads)
    return x if pad_value is None else torch.where(_real_tokens(windows, x.device)[..., None], x, pad_value.flatten())


def _from_windows(x: Tensor, windows: geo.WindowGeometry) -> Tensor:
    """Merge windows (B * nW, N, ...) back, undo the roll and drop the padding: the grid (B, D, H, W, ...)."""
    batch, tail = x.shape[0] // windows.num_windows, x.shape[2:]
    x = x.flatten(2)
    x = x.reshape(batch, *windows.counts, *windows.window, x.shape[-1]).permute(0, 1, 4, 2, 5, 3, 6, 7)
    x = x.reshape(batch, *windows.padded, x.shape[-1])  # from (B, nd, wd, nh, wh, nw, ww, C)
    if not windows.shift_first:
        x = x.roll(windows.shift, (1, 2, 3))
    (d, h, w), (depth, height, width) = windows.before, windows.grid
    x = x[:, d : d + depth, h : h + height, w : w + width]
    return (x.roll(windows.shift, (1, 2, 3)) if windows.shift_first else x).unflatten(-1, tail)

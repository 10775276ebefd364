"""3D window attention in plain PyTorch (Video Swin Transformer, arXiv 2106.13230, sections 3.2 and 3.3).

The groups of :mod:`vidattn.reference.attention` are windows of N = wd * wh * ww tokens, and equation 2 adds to their
scores

* B, the relative position bias, one row of a table per coordinate difference (section 3.3);
* M, ``mask_value`` (additive -100, not -inf, in the released code) for the pairs of a shifted window that the cyclic
  shift put side by side without their being neighbours (section 3.2).

Padding tokens are ordinary keys: they hold ``pad_qkv``, and no mask covers them.

Backward, the gradient of B is the sum of dS over windows. The gradient of the context is zero in rows of padding
queries. Padding slots add their dk and dv to the gradient of ``pad_qkv``; padding queries have no output, so its q part
gets 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from vidattn import geometry as geo
from vidattn.reference.attention import accumulator_dtype, attend, attend_backward

__all__ = ["window3d_attention", "window3d_attention_backward", "window_attention", "window_attention_backward"]


def window3d_attention(
    qkv: Tensor | tuple[Tensor, Tensor, Tensor],
    bias_table: Tensor | None = None,
    *,
    window_size: Sequence[int],
    shift_size: Sequence[int] = (0, 0, 0),
    pad_qkv: Tensor | None = None,
    bias_index: str = "prefix",
    mask_value: float = -100.0,
    wrap: Sequence[bool] = (False, False, False),
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend inside the (shifted) 3D windows of a token grid, step by step as the paper's code does.

    Takes what :func:`vidattn.window3d_attention` takes, unvalidated, plus the two arguments below.

    Args:
        qkv: (B, D, H, W, 3, h, d) packed, or three tensors (B, D, H, W, h, d).
        bias_table: ((2Wd-1)(2Wh-1)(2Ww-1), h) or None.
        window_size: configured window.
        shift_size: configured shift.
        pad_qkv: (3, h, d), what a padding token holds; None for zeros.
        bias_index: "prefix" or "geometric".
        mask_value: added to the scores of masked pairs.
        wrap: axes that are cyclic.
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
    windows = geo.resolve_windows(q.shape[1:4], window_size, shift_size, wrap)
    bias = _dense_bias(bias_table, window_size, windows, bias_index, q.device)
    mask = _additive_mask(windows, mask_value, q)
    q, k, v = _windows_of((q, k, v), pad_qkv, windows)
    out, lse = attend(q, k, v, bias, mask, scale=scale, dropout_p=dropout_p, seed=seed)
    out = _crop(_from_windows(out, windows), windows).to(dtype).contiguous()
    if not return_lse:
        return out
    return out, _crop(_from_windows(lse, windows), windows).contiguous()


def window_attention(
    qkv: Tensor | tuple[Tensor, Tensor, Tensor],
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend inside windows that are already partitioned.

    Takes what :func:`vidattn.window_attention` takes, unvalidated, plus the two arguments below.

    Args:
        qkv: (G, N, 3, h, d) packed, or three tensors (G, N, h, d).
        bias: (h, N, N) or None.
        mask: (nW, N, N) or None, added to window g as ``mask[g % nW]``.
        scale: factor of q k^T, d**-0.5 when None.
        dropout_p: dropout probability.
        seed: int64 tensor with one element, needed when ``dropout_p > 0``.
        return_lse: return the log-sum-exp too.

    Returns:
        (G, N, h * d) in q's dtype, and with ``return_lse`` also (G, N, h) in float32 (float64 for float64).
    """
    q, k, v = qkv.unbind(-3) if isinstance(qkv, Tensor) else qkv
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out, lse = attend(q, k, v, bias, mask, scale=scale, dropout_p=dropout_p, seed=seed)
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
    bias_index: str,
    mask_value: float,
    wrap: Sequence[bool],
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Differentiate :func:`window3d_attention` by its formulas.

    Args:
        grad_out: (B, D, H, W, h * d), gradient of the context.
        qkv: three tensors (B, D, H, W, h, d).
        bias_table: as in the forward pass.
        pad_qkv: as in the forward pass.
        window_size: as in the forward pass; so are all further arguments, with ``scale`` resolved.
        shift_size: configured shift.
        bias_index: "prefix" or "geometric".
        mask_value: added to the scores of masked pairs.
        wrap: axes that are cyclic.
        scale: factor of q k^T.
        dropout_p: dropout probability.
        seed: int64 tensor with one element.

    Returns:
        Gradients of q, k, v in q's dtype, of the bias table (None without one) and of ``pad_qkv`` (None without one)
        in float32 (float64 for float64).
    """
    q = qkv[0]
    windows = geo.resolve_windows(q.shape[1:4], window_size, shift_size, wrap)
    bias = _dense_bias(bias_table, window_size, windows, bias_index, q.device)
    mask = _additive_mask(windows, mask_value, q)
    window_grads = attend_backward(
        _to_windows(grad_out, windows),
        *_windows_of(qkv, pad_qkv, windows),
        bias,
        mask,
        scale=scale,
        dropout_p=dropout_p,
        seed=seed,
    )
    grids = [_from_windows(grad, windows) for grad in window_grads[:3]]
    grad_pad = None
    if pad_qkv is not None:
        is_pad = ~_real_tokens(windows, q.device)
        grad_pad = torch.stack([torch.zeros_like(grids[0][0, 0, 0, 0]), *(g[:, is_pad].sum((0, 1)) for g in grids[1:])])
    grad_table = None
    if bias_table is not None and window_grads[3] is not None:
        rows = geo.bias_rows(window_size, windows, bias_index, q.device).flatten()
        per_pair = window_grads[3].flatten(1).t()
        grad_table = per_pair.new_zeros(bias_table.shape)
        if grad_table.device.type == "cpu":
            grad_table.index_add_(0, rows, per_pair)
        else:  # the sort-based accumulation, whose order does not vary; index_add_ uses atomics there
            grad_table.index_put_((rows,), per_pair, accumulate=True)
    grad_q, grad_k, grad_v = (_crop(grad, windows).to(q.dtype) for grad in grids)
    return grad_q, grad_k, grad_v, grad_table, grad_pad


def window_attention_backward(
    grad_out: Tensor,
    qkv: tuple[Tensor, Tensor, Tensor],
    bias: Tensor | None,
    mask: Tensor | None,
    *,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Differentiate :func:`window_attention` by its formulas.

    Args:
        grad_out: (G, N, h * d), gradient of the context.
        qkv: three tensors (G, N, h, d).
        bias: (h, N, N) or None.
        mask: (nW, N, N) or None.
        scale: factor of q k^T.
        dropout_p: dropout probability.
        seed: int64 tensor with one element.

    Returns:
        Gradients of q, k, v, and that of the bias (None without one) in float32 (float64 for float64).
    """
    *grads, grad_bias = attend_backward(grad_out, *qkv, bias, mask, scale=scale, dropout_p=dropout_p, seed=seed)
    grad_q, grad_k, grad_v = (grad.to(qkv[0].dtype) for grad in grads)
    return grad_q, grad_k, grad_v, grad_bias


def _dense_bias(
    table: Tensor | None, window_size: Sequence[int], windows: geo.WindowGeometry, bias_index: str, device: torch.device
) -> Tensor | None:
    """Expand the table to (h, N, N)."""
    if table is None:
        return None
    rows = geo.bias_rows(window_size, windows, bias_index, device)
    # Widened first: its gradient sums over all pairs with the same row.
    return table.to(accumulator_dtype(table.dtype)).index_select(0, rows.flatten()).t().unflatten(1, rows.shape)


def _additive_mask(windows: geo.WindowGeometry, mask_value: float, like: Tensor) -> Tensor | None:
    """Region mask as what is added to the scores, (nW, N, N)."""
    separated = geo.region_mask(windows, like.device)
    if separated is None:
        return None
    return torch.zeros(separated.shape, dtype=accumulator_dtype(like.dtype), device=like.device).masked_fill(
        separated, mask_value
    )


def _real_tokens(windows: geo.WindowGeometry, device: torch.device) -> Tensor:
    """Which tokens of the padded grid are not padding, bool (Dp, Hp, Wp)."""
    depth, height, width = (
        torch.arange(padded, device=device) < size for padded, size in zip(windows.padded, windows.grid, strict=True)
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
    depth, height, width = (p - g for p, g in zip(windows.padded, windows.grid, strict=True))
    if depth or height or width:
        x = F.pad(x, (0, 0, 0, width, 0, height, 0, depth))
        if pad_value is not None:
            x = torch.where(_real_tokens(windows, x.device)[..., None], x, pad_value.flatten())
    x = x.roll([-s for s in windows.shift], (1, 2, 3))
    (nd, nh, nw), (wd, wh, ww) = windows.counts, windows.window
    x = x.reshape(batch, nd, wd, nh, wh, nw, ww, x.shape[-1]).permute(0, 1, 3, 5, 2, 4, 6, 7)
    return x.reshape(batch * windows.num_windows, windows.num_tokens, *tail)


def _from_windows(x: Tensor, windows: geo.WindowGeometry) -> Tensor:
    """Merge windows (B * nW, N, ...) back and undo the roll: the padded grid (B, Dp, Hp, Wp, ...)."""
    batch, tail = x.shape[0] // windows.num_windows, x.shape[2:]
    x = x.flatten(2)
    x = x.reshape(batch, *windows.counts, *windows.window, x.shape[-1]).permute(0, 1, 4, 2, 5, 3, 6, 7)
    x = x.reshape(batch, *windows.padded, x.shape[-1])  # from (B, nd, wd, nh, wh, nw, ww, C)
    return x.roll(windows.shift, (1, 2, 3)).unflatten(-1, tail)


def _crop(x: Tensor, windows: geo.WindowGeometry) -> Tensor:
    depth, height, width = windows.grid
    return x[:, :depth, :height, :width]

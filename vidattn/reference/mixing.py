"""Space-time mixing attention in plain PyTorch (X-ViT, arXiv 2106.05968, section 3.3, cut as in its released code).

The groups of [`vidattn.reference.attention`][] are the N tokens of one frame; frame number b * T + t. Nothing is added
to the scores, but k and v are mixed over time first: of the C = h * d concatenated channels, ranges come from the same
token of another frame:

    K~[t, n, c] = K[t + o(c), n, c] where 0 <= t + o(c) < T, else 0          and V~ likewise

with o(c) the frame offset of the range that c lies in, 0 outside of all ranges. The zeros are exact: they replace the
projection's bias as well. Queries stay. X-ViT takes the first C // shift_div channels from the next frame (o = +1) and
as many after them from the frame before (o = -1), cut without regard to heads.

For each channel the map t -> t + o(c) is injective, so the gradient of K is that of K~ moved back: the same shift with
the offsets negated, zeros where nobody has read.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vidattn.reference.attention import attend, attend_backward

__all__ = ["space_time_mixing_attention", "space_time_mixing_attention_backward", "temporal_shift"]

ChannelShifts = Sequence[tuple[int, int, int]]


def xvit_channel_shifts(channels: int, shift_div: int) -> list[tuple[int, int, int]]:
    """Give X-ViT's ranges: (first, last, frame offset) of the channels that come from other frames."""
    fold = channels // shift_div
    ranges = ((0, fold, 1), (fold, min(2 * fold, channels), -1))
    return [(first, last, offset) for first, last, offset in ranges if first < last]


def space_time_mixing_attention(
    qkv: Tensor | tuple[Tensor, Tensor, Tensor],
    num_frames: int,
    *,
    shift_div: int = 8,
    channel_shifts: ChannelShifts | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Attend inside each frame to keys and values of which channels come from neighbouring frames.

    Takes what [`vidattn.space_time_mixing_attention`][] takes, unvalidated, and the seed of the dropout.

    Args:
        qkv: (B * T, N, 3, h, d) packed, or three tensors (B * T, N, h, d).
        num_frames: T, frames of a segment.
        shift_div: share of the channels that come from the next frame, and from the one before, as a divisor.
        channel_shifts: (first, last, frame offset) of channel ranges; None for X-ViT's.
        scale: factor of q k^T, d**-0.5 when None.
        dropout_p: dropout probability.
        seed: int64 tensor with one element, needed when ``dropout_p > 0``.

    Returns:
        (B * T, N, h * d) in q's dtype.
    """
    q, k, v = qkv.unbind(-3) if isinstance(qkv, Tensor) else qkv
    if channel_shifts is None:
        channel_shifts = xvit_channel_shifts(q.shape[-2] * q.shape[-1], shift_div)
    k, v = (_shift_heads(x, num_frames, channel_shifts) for x in (k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return attend(q, k, v, scale=scale, dropout_p=dropout_p, seed=seed)[0].to(q.dtype)


def space_time_mixing_attention_backward(
    grad_out: Tensor,
    qkv: tuple[Tensor, Tensor, Tensor],
    seed: Tensor | None,
    num_frames: int,
    channel_shifts: ChannelShifts,
    scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Differentiate ``space_time_mixing_attention`` by its formulas.

    Args:
        grad_out: gradient of the context (B * T, N, h * d).
        qkv: three tensors (B * T, N, h, d).
        seed: int64 tensor with one element, needed when ``dropout_p > 0``.
        num_frames: T, frames of a segment.
        channel_shifts: (first, last, frame offset) of channel ranges.
        scale: factor of q k^T.
        dropout_p: dropout probability.

    Returns:
        Gradients of q, k and v in q's dtype.
    """
    q, k, v = qkv
    k, v = (_shift_heads(x, num_frames, channel_shifts) for x in (k, v))
    grad_q, grad_k, grad_v, _ = attend_backward(
        grad_out, q, k, v, None, None, scale=scale, dropout_p=dropout_p, seed=seed
    )
    back = [(first, last, -offset) for first, last, offset in channel_shifts]
    grad_k, grad_v = (_shift_heads(x, num_frames, back) for x in (grad_k, grad_v))
    return grad_q.to(q.dtype), grad_k.to(q.dtype), grad_v.to(q.dtype)


def temporal_shift(x: Tensor, num_frames: int, channel_shifts: ChannelShifts, *, dim: int = -1) -> Tensor:
    """Take ranges of channels from other frames; zeros beyond the first and the last.

    Takes what [`vidattn.temporal_shift`][] takes, unvalidated.

    Args:
        x: (B * T, ...).
        num_frames: T, frames of a segment.
        channel_shifts: (first, last, frame offset) of channel ranges that do not overlap.
        dim: dimension of the channels, not the first one.

    Returns:
        A tensor of the same shape and dtype.
    """
    frames = x.unflatten(0, (-1, num_frames)) if x.shape[0] > 0 else x.new_empty(0, num_frames, *x.shape[1:])
    axis = dim if dim < 0 else dim + 1
    parts, done = [], 0
    for first, last, offset in sorted(channel_shifts):
        parts += [frames.narrow(axis, done, first - done), _move(frames.narrow(axis, first, last - first), offset)]
        done = last
    parts.append(frames.narrow(axis, done, frames.shape[axis] - done))
    return torch.cat(parts, dim=axis).flatten(0, 1)


def _move(frames: Tensor, offset: int) -> Tensor:
    """Give ``frames[:, t + offset]`` at t, zeros where there is no such frame."""
    length = frames.shape[1]
    if abs(offset) >= length:
        return torch.zeros_like(frames)
    if offset >= 0:
        return torch.cat((frames[:, offset:], torch.zeros_like(frames[:, :offset])), dim=1)
    return torch.cat((torch.zeros_like(frames[:, offset:]), frames[:, :offset]), dim=1)


def _shift_heads(x: Tensor, num_frames: int, channel_shifts: ChannelShifts) -> Tensor:
    """Shift (B * T, N, h, d) by ranges of its h * d channels."""
    return temporal_shift(x.flatten(-2), num_frames, channel_shifts).unflatten(-1, x.shape[-2:])

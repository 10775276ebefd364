"""Launches space-time mixing attention and temporal shift.

The functions take a call, then the tensors of the pass, as the native ops ``_space_time_mixing_attention_forward /
_backward`` do, and what ``_temporal_shift`` takes. The tokens of a frame are a sequence of divided attention, and its
kernels attend in it: channels of keys and values that come from other frames are one more offset a column when they are
loaded, and when their gradients are stored.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton.language as tl
from torch import Tensor

from vidattn.calls import DividedCall, MixingCall
from vidattn.kernels import divided, plans
from vidattn.kernels.divided_sequences import Mixing
from vidattn.kernels.launch import Launch, Work
from vidattn.kernels.mixing_shift import temporal_shift as temporal_shift_kernel

__all__ = ["backward", "forward", "plan_backward", "plan_forward", "plan_shift", "temporal_shift"]

_WORDS = {1: tl.uint8, 2: tl.int16, 4: tl.int32, 8: tl.int64}
_BLOCK = 1024  # words of a program


def forward(call: MixingCall, out: Tensor, lse: Tensor | None) -> None:
    """Run the forward pass; arguments as of ``plan_forward``, results in ``out`` and ``lse``."""
    plans.run(plan_forward, call, out, lse)


def backward(
    call: MixingCall, dout: Tensor, out: Tensor | None, lse: Tensor | None, dq: Tensor, dk: Tensor, dv: Tensor
) -> None:
    """Run the backward pass; arguments as of ``plan_backward``, results in ``dq``, ``dk`` and ``dv``."""
    plans.run(plan_backward, call, dout, out, lse, dq, dk, dv)


def temporal_shift(x: Tensor, num_frames: int, channel_shifts: Sequence[int], dim: int, out: Tensor) -> None:
    """Shift (frames, ...), with channels in dimension ``dim``; else as ``plan_shift``, the result in ``out``."""
    size = x.shape
    shape = (size[0], size[1:dim].numel(), size[dim], size[dim + 1 :].numel())
    plans.run(plan_shift, x.view(shape), num_frames, channel_shifts, out.view(shape))


def plan_forward(call: MixingCall, out: Tensor, lse: Tensor | None, *, arch: str | None = None) -> list[Launch]:
    """Plan the forward pass.

    Args:
        call: inputs and options.
        out: (B * T, N, h * d), last dimension dense.
        lse: float32 (B * T, N, h), contiguous; None if not needed.
        arch: architecture to plan for; that of the device when None.

    Returns:
        The launches.
    """
    return divided.plan_forward(_in_each_frame(call), out, None, None, lse, mixing=_mixing(call), arch=arch)


def plan_backward(
    call: MixingCall,
    dout: Tensor,
    out: Tensor | None,
    lse: Tensor | None,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    *,
    arch: str | None = None,
) -> list[Launch]:
    """Plan the backward pass.

    Args:
        call: inputs and options.
        dout: like ``out``, any strides but a dense last dimension.
        out: context of the forward pass; it and ``lse`` may be None where rows are seen whole.
        lse: its log-sum-exp.
        dq: (B * T, N, h, d), last dimension dense, of the same strides as ``dk`` and ``dv``.
        dk: like ``dq``.
        dv: like ``dq``.
        arch: architecture to plan for; that of the device when None.

    Returns:
        The launches.
    """
    mixing = _mixing(call)
    return divided.plan_backward(_in_each_frame(call), dout, None, out, None, lse, dq, dk, dv, mixing=mixing, arch=arch)


def _in_each_frame(call: MixingCall) -> DividedCall:
    """Give the call of divided attention that attends in each frame: a clip of one frame."""
    return DividedCall(
        call.q,
        call.k,
        call.v,
        call.seed,
        num_frames=1,
        time_fastest=False,
        temporal_heads=0,
        scale=call.scale,
        dropout_p=call.dropout_p,
    )


def _mixing(call: MixingCall) -> Mixing:
    return Mixing(call.num_frames, _near(call.channel_shifts, call.num_frames))


def plan_shift(x: Tensor, num_frames: int, channel_shifts: Sequence[int], out: Tensor) -> list[Launch]:
    """Plan a temporal shift.

    Channels are taken in the largest groups that are shifted as one, and these in the largest words that they are made
    of: neither the dtype nor the number of channels makes another kernel.

    Args:
        x: (frames, outer, channels, inner), contiguous, of any dtype.
        num_frames: frames of a segment.
        channel_shifts: first, last and frame offset of each range of channels, in ascending order, flat.
        out: like ``x``.

    Returns:
        The launch.
    """
    frames, outer, channels, inner = x.shape
    shifts = _near(channel_shifts, num_frames)
    together = math.gcd(channels, *(cut for first, last, _ in shifts for cut in (first, last)))
    group_bytes = together * inner * x.itemsize
    width = math.gcd(16, group_bytes, x.data_ptr(), out.data_ptr())  # bytes that are moved at a time
    word = min(8, width)
    line = channels * inner * x.itemsize // word
    arguments = {
        "x": _bytes(x),  # a view as words would need an offset in the storage of whole words
        "out": _bytes(out),
        "segment": num_frames,
        "frame_size": outer * line,
        "line": line,
        "group": group_bytes // word,
        "SHIFTS": tuple(
            value for first, last, offset in shifts for value in (first // together, last // together, offset)
        ),
        "TOGETHER": width // word,
        "BLOCK": _BLOCK,
        "LONG": line > 2**31 - _BLOCK,
        "WORD": _WORDS[word],
    }
    work = Work(bytes=2 * x.numel() * x.itemsize)
    return [Launch(temporal_shift_kernel, frames * -(-outer * line // _BLOCK), arguments, work=work)]


def _near(channel_shifts: Sequence[int], num_frames: int) -> tuple[tuple[int, int, int], ...]:
    """Give the ranges with offsets that fit into 32 bits: beyond a segment, what counts is where they reach around."""
    triples = zip(channel_shifts[::3], channel_shifts[1::3], channel_shifts[2::3], strict=True)
    return tuple(
        (first, last, offset if abs(offset) < num_frames else num_frames + offset % num_frames)
        for first, last, offset in triples
    )


def _bytes(x: Tensor) -> Tensor:
    return x.view(-1).view(torch.uint8)

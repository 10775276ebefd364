"""The ways of computing space-time mixing attention that are timed against each other, on the CPU or a GPU.

All of them start from the packed output of the qkv projection (B * T, N, 3, h, d) and end with the context
(B * T, N, h * d), and for ``forward_backward`` with the gradient of qkv.

``eager`` is what the module code of X-ViT does: keys and values, split into heads, go to a layout with the channels in
front, are copied in three slices into zeros and back again; then scores, softmax, context. The others are those of
attention over time and over space.

The contenders of ``temporal_shift`` alone shift (B * T, N, C), tokens with their channels last.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import vidattn
from benchmarks.calls import (
    CONTENDERS,
    EXACT,
    GPU_CONTENDERS,
    Attend,
    build_calls,
    compiled,
    contenders,
    rival,
    why_absent,
)
from benchmarks.shapes import MIXING_CASES, SMOKE_MIXING_CASES, MixingCase

__all__ = [
    "CONTENDERS",
    "GPU_CONTENDERS",
    "SHIFT_CONTENDERS",
    "build",
    "build_copies",
    "build_shift",
    "contenders",
    "make_attend",
    "why_not",
]

CASES = MIXING_CASES | SMOKE_MIXING_CASES
SHIFT_CONTENDERS = ("eager", "compiled", "vidattn")


def _shift_slices(x: Tensor, case: MixingCase) -> Tensor:
    """Shift (B * T, ..., C) by copies of slices into zeros."""
    fold = case.channels // case.shift_div
    x = x.unflatten(0, (-1, case.num_frames))
    out = torch.zeros_like(x)
    out[:, :-1, ..., :fold] = x[:, 1:, ..., :fold]
    out[:, 1:, ..., fold : 2 * fold] = x[:, :-1, ..., fold : 2 * fold]
    out[..., 2 * fold :] = x[..., 2 * fold :]
    return out.flatten(0, 1)


def _shift_heads(x: Tensor, case: MixingCase) -> Tensor:
    """Shift (B * T, h, N, d) with the channels of all heads brought together in front of the tokens."""
    fold = case.channels // case.shift_div
    frames = x.transpose(2, 3).contiguous().view(-1, case.num_frames, case.channels, case.num_tokens)
    out = torch.zeros_like(frames)
    out[:, :-1, :fold] = frames[:, 1:, :fold]
    out[:, 1:, fold : 2 * fold] = frames[:, :-1, fold : 2 * fold]
    out[:, :, 2 * fold :] = frames[:, :, 2 * fold :]
    return out.view(-1, case.heads, case.head_dim, case.num_tokens).transpose(2, 3).contiguous()


def _shifted(qkv: Tensor, case: MixingCase, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    return attend(q, _shift_heads(k, case), _shift_heads(v, case)).transpose(1, 2).flatten(2)


def _vidattn(qkv: Tensor, case: MixingCase, backend: str | None = None) -> Tensor:
    return vidattn.space_time_mixing_attention(qkv, case.num_frames, shift_div=case.shift_div, backend=backend)


def why_not(case: MixingCase, direction: str, dtype: str, contender: str) -> str | None:
    """Say why a contender of ``GPU_CONTENDERS`` is left out of a comparison; None if it takes part."""
    qkv = torch.empty(case.qkv_shape, dtype=getattr(torch, dtype), device="meta")
    options = {"num_frames": case.num_frames, "shift_div": case.shift_div}
    return why_absent(contender, "space_time_mixing_attention", qkv, **options)


def _vidattn_shift(x: Tensor, case: MixingCase, backend: str | None = None) -> Tensor:
    return vidattn.temporal_shift(x, case.num_frames, case.channel_shifts, backend=backend)


def make_attend(shape: MixingCase, contender: str) -> Attend:
    """Give a contender's function of qkv.

    Args:
        shape: the call's sizes.
        contender: one of ``CONTENDERS`` or ``GPU_CONTENDERS``, or ``EXACT``.

    Returns:
        qkv -> context.
    """
    theirs = rival(contender, partial(_shifted, case=shape))
    if theirs is not None:
        return theirs
    return partial(_vidattn, case=shape, backend={EXACT: "reference", "triton": "triton"}.get(contender))


def build_copies(
    shape: MixingCase, direction: str, dtype: str, contender: str, device: str = "cpu", copies: int = 1
) -> list[Callable[[], tuple[Tensor, ...]]]:
    """Make inputs, the same ones for every contender, and the calls to time.

    Args:
        shape: sizes of the call.
        direction: "forward" | "forward_backward".
        dtype: "float32" | "bfloat16" | "float16".
        contender: one of ``CONTENDERS`` or ``GPU_CONTENDERS``, or ``EXACT``.
        device: where the inputs are.
        copies: how many calls, each with a qkv and an output gradient of its own.

    Returns:
        Functions that return (context,), or (context, gradient of qkv).
    """
    attend = make_attend(shape, contender)
    return build_calls(attend, shape.qkv_shape, direction, dtype, device, copies, contender == EXACT)


def build(
    case: str, direction: str, dtype: str, contender: str, device: str = "cpu"
) -> Callable[[], tuple[Tensor, ...]]:
    """Make inputs and the one call to time: that of a named case, else as in ``build_copies``."""
    return build_copies(CASES[case], direction, dtype, contender, device)[0]


def build_shift(
    case: str, direction: str, dtype: str, contender: str, device: str = "cpu"
) -> Callable[[], tuple[Tensor, ...]]:
    """Make tokens (B * T, N, C) and the shift to time.

    Args:
        case: name of the case.
        direction: "shift".
        dtype: "float32" | "bfloat16".
        contender: one of ``SHIFT_CONTENDERS``, or ``EXACT``.
        device: where the tokens are.

    Returns:
        A function that returns (shifted tokens,).
    """
    shape = CASES[case]
    generator = torch.Generator(device).manual_seed(0)
    size = (*shape.qkv_shape[:2], shape.channels)
    x = torch.randn(size, generator=generator, device=device).to(getattr(torch, dtype))
    eager = partial(_shift_slices, case=shape)
    if contender in ("vidattn", EXACT):
        shift: Attend = partial(_vidattn_shift, case=shape, backend="reference" if contender == EXACT else None)
    else:
        shift = compiled(eager) if contender == "compiled" else eager

    def call() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (shift(x),)

    return call

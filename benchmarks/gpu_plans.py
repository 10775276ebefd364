"""The launches of the full-size cases on tensors without memory, and the least that a case can cost, by family."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.prediction import Cost
from benchmarks.shapes import (
    GPU_DIVIDED_CASES,
    GPU_MIXING_CASES,
    GPU_OTHER_WINDOW_CASES,
    GPU_WINDOW_CASES,
    DividedCase,
    MixingCase,
    WindowCase,
)
from vidattn.calls import DividedCall, MixingCall, WindowCall
from vidattn.geometry import bias_extents, explain_windows
from vidattn.ops import _tensors as tensors
from vidattn.ops._arguments import draw_seed

if TYPE_CHECKING:
    from vidattn.kernels.launch import Launch

DIRECTIONS = ("forward", "backward")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Family:
    """A family of attention: its full-size cases, the launches of a case, and the least that a case can cost."""

    cases: Mapping[str, Any]
    plan: Callable[..., list[Launch]]  # (case, direction, dtype, arch)
    floor: Callable[..., Cost]  # (case, direction, dtype)


def plan_window3d(
    case: WindowCase,
    direction: str,
    dtype: torch.dtype,
    arch: str,
    *,
    has_bias: bool = True,
    has_pad: bool = True,
    mask_value: float = -100.0,
    dropout_p: float = 0.0,
) -> list[Launch]:
    """Launches of ``window3d_attention`` or its backward, on tensors without memory."""
    from vidattn.kernels import window3d

    windows = case.geometry
    with torch.device("meta"):
        qkv = torch.empty(case.qkv_shape, dtype=dtype)
        table = torch.empty(case.table_shape) if has_bias else None
        pad = torch.empty(3, case.heads, case.head_dim, dtype=dtype) if has_pad else None
    call = WindowCall(
        *qkv.unbind(-3),
        bias=table,
        bias_window=[*case.window, *bias_extents(case.window, windows, "prefix")] if has_bias else [],
        mask=None,
        pad_qkv=pad,
        seed=draw_seed(qkv, dropout_p),
        window=windows.window,
        shift=windows.shift,
        wrap=windows.wrap,
        scale=case.head_dim**-0.5,
        mask_value=mask_value,
        dropout_p=dropout_p,
    )
    out, lse = tensors.new_outputs(call)
    if direction == "forward":
        return window3d.plan_forward(call, out, lse, arch=arch)
    sums = (tensors.new_sum(x, call, x is not None) for x in (table, pad))
    dq, dk, dv = torch.empty_like(qkv).unbind(-3)
    return window3d.plan_backward(call, torch.empty_like(out), out, lse, dq, dk, dv, *sums, arch=arch)


def window3d_floor(case: WindowCase, direction: str, dtype: torch.dtype) -> Cost:
    """The pairs that no mask separates, each with one exponential, and every tensor moved once; no instructions."""
    windows = case.geometry
    pairs = case.batch * windows.num_windows * case.heads * windows.num_tokens**2
    visible = 1.0 - explain_windows(case.grid, case.window, case.shift).masked_share
    flops, moved = case.flops("forward"), case.bytes_moved("forward", dtype)
    if direction == "backward":
        lse_bytes = 4 * case.batch * math.prod(case.grid) * case.heads  # read; the forward wrote it
        flops = case.flops("forward_backward") - flops
        moved = case.bytes_moved("forward_backward", dtype) - moved - lse_bytes
    return Cost(moved, 0, pairs * visible, flops * visible)


def plan_divided(
    case: DividedCase, direction: str, dtype: torch.dtype, arch: str, *, dropout_p: float = 0.0
) -> list[Launch]:
    """Launches of one of the functions of divided attention or its backward, on tensors without memory."""
    from vidattn.kernels import divided

    frames, sites, heads, cls_rows = case.num_frames, case.num_sites, case.heads, int(case.has_cls)
    with torch.device("meta"):
        qkv = torch.empty(case.qkv_shape, dtype=dtype)
        cls = torch.empty(case.batch, frames, heads * case.head_dim) if case.has_cls else None
    context = torch.empty_like(qkv.select(-3, 0)).flatten(-2)
    out, cls_mean = context[:, cls_rows:], context[:, 0] if case.has_cls else None
    keys = max(frames * (case.temporal_heads > 0), (sites + cls_rows) * (case.temporal_heads < heads))
    lse = None
    if tensors.keeps_lse(keys, "triton"):
        lse = qkv.new_empty(case.batch, frames * (sites + cls_rows), heads, dtype=torch.float32)
    call = DividedCall(
        *qkv.unbind(-3),
        seed=draw_seed(qkv, dropout_p),
        num_frames=frames,
        time_fastest=case.token_order == "hwt",
        temporal_heads=case.temporal_heads,
        scale=case.head_dim**-0.5,
        dropout_p=dropout_p,
    )
    if direction == "forward":
        return divided.plan_forward(call, out, cls, cls_mean, lse, arch=arch)
    dout = torch.empty_like(context)[:, cls_rows:]
    dcls = None if cls is None else cls[:, :1].expand_as(cls)  # that of the mean
    kept = (None, None, None) if lse is None else (out, cls, lse)
    dq, dk, dv = torch.empty_like(qkv).unbind(-3)
    return divided.plan_backward(call, dout, dcls, *kept, dq, dk, dv, arch=arch)


def plan_mixing(
    case: MixingCase, direction: str, dtype: torch.dtype, arch: str, *, dropout_p: float = 0.0
) -> list[Launch]:
    """Launches of ``space_time_mixing_attention`` or its backward, on tensors without memory."""
    from vidattn.kernels import mixing

    with torch.device("meta"):
        qkv = torch.empty(case.qkv_shape, dtype=dtype)
    call = MixingCall(
        *qkv.unbind(-3),
        seed=draw_seed(qkv, dropout_p),
        num_frames=case.num_frames,
        channel_shifts=[value for shift in case.channel_shifts for value in shift],
        scale=case.head_dim**-0.5,
        dropout_p=dropout_p,
    )
    out, lse = tensors.new_outputs(call)
    kept = (out, lse) if tensors.keeps_lse(case.num_tokens, "triton") else (None, None)
    if direction == "forward":
        return mixing.plan_forward(call, out, kept[1], arch=arch)
    dq, dk, dv = torch.empty_like(qkv).unbind(-3)
    return mixing.plan_backward(call, torch.empty_like(out), *kept, dq, dk, dv, arch=arch)


def plan_shift(case: MixingCase, direction: str, dtype: torch.dtype, arch: str) -> list[Launch]:
    """Launches of ``temporal_shift`` of as many tokens, or of its gradient, the shift with the offsets negated."""
    from vidattn.kernels import mixing

    frames, tokens = case.qkv_shape[:2]
    sign = 1 if direction == "forward" else -1
    shifts = [value for first, last, offset in case.channel_shifts for value in (first, last, sign * offset)]
    x = torch.empty(frames, tokens, case.channels, 1, dtype=dtype, device="meta")
    return mixing.plan_shift(x, case.num_frames, shifts, torch.empty_like(x))


def shift_floor(case: MixingCase, direction: str, dtype: torch.dtype) -> Cost:
    """Tokens in, tokens out."""
    return Cost(case.bytes_moved("forward", dtype) / 2, 0, 0, 0)


def all_pairs_floor(case: DividedCase | MixingCase, direction: str, dtype: torch.dtype) -> Cost:
    """All pairs, each with one exponential, and every tensor moved once; no instructions."""
    flops, moved = case.flops("forward"), case.bytes_moved("forward", dtype)
    pairs = flops // (2 * 2 * case.head_dim)
    if direction == "backward":
        flops = case.flops("forward_backward") - flops
        moved = case.bytes_moved("forward_backward", dtype) - moved
    return Cost(moved, 0, pairs, flops)


FAMILIES = {
    "window3d": Family(GPU_WINDOW_CASES | GPU_OTHER_WINDOW_CASES, plan_window3d, window3d_floor),
    "divided": Family(GPU_DIVIDED_CASES, plan_divided, all_pairs_floor),
    "mixing": Family(GPU_MIXING_CASES, plan_mixing, all_pairs_floor),
    "shift": Family({f"{name}_shift": case for name, case in GPU_MIXING_CASES.items()}, plan_shift, shift_floor),
}

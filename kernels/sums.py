"""The second stage of sums over many programs: partial results, added in one fixed order."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from vidattn.kernels.launch import Launch, Work

__all__ = ["plan_sum", "plan_sum_frames", "plan_zeros", "sum_frames", "sum_parts"]


@triton.jit(do_not_specialize=["num_parts", "num_rows", "num_columns", "pitch"])
def sum_parts(  # type: ignore[no-untyped-def]
    parts, total, num_parts, num_rows, num_columns, pitch, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Sum float32 ``parts`` (num_parts, num_rows, pitch) into ``total`` (num_rows, num_columns)."""
    blocks = tl.cdiv(num_columns, BLOCK_C)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    columns = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    sums = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for first in range(0, num_parts, BLOCK_P):
        numbers = first + tl.arange(0, BLOCK_P)
        inside = (numbers < num_parts)[:, None] & (columns < num_columns)[None, :]
        starts = (numbers.to(tl.int64) * num_rows + row) * pitch
        sums += tl.load(parts + starts[:, None] + columns[None, :], mask=inside, other=0.0)
    tl.store(total + row * num_columns + columns, tl.sum(sums, 0), mask=columns < num_columns)


def plan_sum(parts: Tensor, total: Tensor, num_rows: int, num_columns: int, pitch: int) -> Launch:
    """Plan the sum of ``parts`` (any number, num_rows, pitch) into ``total`` (num_rows, num_columns), both float32."""
    return _plan_sum(parts, total, parts.shape[0], num_rows, num_columns, pitch)


def plan_zeros(total: Tensor) -> Launch:
    """Plan zeros in ``total``, float32 and contiguous: a sum of no parts."""
    return _plan_sum(total, total, 0, 1, total.numel(), total.numel())


def _plan_sum(parts: Tensor, total: Tensor, num_parts: int, num_rows: int, num_columns: int, pitch: int) -> Launch:
    block_p, block_c = 16, 128
    arguments = {
        "parts": parts,
        "total": total,
        "num_parts": num_parts,
        "num_rows": num_rows,
        "num_columns": num_columns,
        "pitch": pitch,
        "BLOCK_P": block_p,
        "BLOCK_C": block_c,
    }
    work = Work(bytes=4 * (num_parts * num_rows * pitch + total.numel()))
    return Launch(sum_parts, num_rows * -(-num_columns // block_c), arguments, work=work)


@triton.jit(do_not_specialize=["num_clips", "num_frames"])
def sum_frames(  # type: ignore[no-untyped-def]
    parts,
    first,
    second,
    third,
    num_clips,
    num_frames,
    width,
    factor,
    batch_stride,
    head_stride,
    HEAD_DIM: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sum float32 ``parts`` (one to three, num_clips, num_frames, width) over the frames, rounded once."""
    blocks = tl.cdiv(width, BLOCK_C)
    part = (tl.program_id(0) // blocks).to(tl.int64)  # of one of the totals
    columns = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    sums = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for frame in range(0, num_frames, BLOCK_P):
        numbers = frame + tl.arange(0, BLOCK_P)
        inside = (numbers < num_frames)[:, None] & (columns < width)[None, :]
        starts = (part * num_frames + numbers) * width
        sums += tl.load(parts + starts[:, None] + columns[None, :], mask=inside, other=0.0)
    total = first
    if part // num_clips == 1:
        total = second
    if part // num_clips == 2:
        total = third
    targets = part % num_clips * batch_stride + columns // HEAD_DIM * head_stride + columns % HEAD_DIM
    tl.store(total + targets, (tl.sum(sums, 0) * factor).to(first.dtype.element_ty), mask=columns < width)


def plan_sum_frames(parts: Tensor, totals: Sequence[Tensor], factor: float = 1.0) -> Launch:
    """Plan sums over frames, times ``factor``.

    Args:
        parts: float32 (one to three, clips, frames, heads * head_dim), contiguous.
        totals: as many (clips, heads, head_dim), all of the same strides, dense in the last dimension.
        factor: what the sums are multiplied by.

    Returns:
        The launch.
    """
    block_p, block_c = 8, 128
    count, num_clips, num_frames, width = parts.shape
    arguments = {
        "parts": parts,
        **dict(zip(("first", "second", "third"), [*totals, totals[0], totals[0]])),
        "num_clips": num_clips,
        "num_frames": num_frames,
        "width": width,
        "factor": factor,
        "batch_stride": totals[0].stride(0),
        "head_stride": totals[0].stride(1),
        "HEAD_DIM": totals[0].shape[-1],
        "BLOCK_P": block_p,
        "BLOCK_C": block_c,
    }
    work = Work(bytes=4 * parts.numel() + sum(total.numel() * total.itemsize for total in totals))
    return Launch(sum_frames, count * num_clips * -(-width // block_c), arguments, work=work)

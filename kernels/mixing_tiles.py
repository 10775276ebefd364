"""Channels of keys and values that come from other frames: where they lie, and where their gradients go.

``shifts`` of a kernel's shape are (first, last, frame offset) of ranges of concatenated channels, one after the other;
None where keys and values are those of the frame itself. For each channel the way to its source is the same in all
frames, so it is one more offset a column, and the columns of a range are neighbours in memory.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from vidattn.kernels.rows import load_rows, store_rows

__all__ = ["Columns", "HeadRows", "channel_offsets", "load_keys", "mixed_columns", "store_key_grads"]


class Columns(NamedTuple):
    """Where the channels of keys or values are taken from, (BLOCK or 1, BLOCK_D).

    Attributes:
        elements: elements from the first channel of the frame to each source.
        inside: whether a channel has a source.
    """

    elements: Any
    inside: Any


class HeadRows(NamedTuple):
    """Rows of one head.

    Attributes:
        base: pointer to the first one.
        token: elements from a row to the next.
        columns: where channels come from that are not those of the frame; None where all are.
    """

    base: Any
    token: Any
    columns: Any


@triton.jit
def channel_offsets(channels, SHIFTS: tl.constexpr):
    """Frame offsets of channels."""
    offsets = tl.zeros_like(channels)
    for i in tl.static_range(0, len(SHIFTS), 3):
        offsets = tl.where((channels >= SHIFTS[i]) & (channels < SHIFTS[i + 1]), SHIFTS[i + 2], offsets)
    return offsets


@triton.jit
def mixed_columns(frames, head, segment, stride, SHAPE: tl.constexpr):
    """Where the channels of a head are taken from; ``stride`` lies between frames.

    ``frames`` are places in the segment, (BLOCK, 1) or the same for all rows.
    """
    channels = tl.arange(0, SHAPE.block_d)[None, :]
    SHIFTS: tl.constexpr = SHAPE.shifts
    offsets = channel_offsets(head * SHAPE.head_dim + channels, SHIFTS)
    inside = (frames + offsets >= 0) & (frames + offsets < segment)
    if SHAPE.block_d != SHAPE.head_dim:
        inside = inside & (channels < SHAPE.head_dim)
    return Columns(elements=channels + offsets.to(tl.int64) * stride, inside=inside)


@triton.jit
def load_keys(source, tokens, offsets, SHAPE: tl.constexpr, MASKED: tl.constexpr):
    """Load rows (BLOCK, BLOCK_D) as ``load_rows`` does; a channel beyond the ends of the segment reads 0."""
    if source.columns is not None:
        inside = source.columns.inside
        if MASKED:
            inside = inside & (tokens >= 0)[:, None]
        rows = tl.load(source.base + offsets[:, None] + source.columns.elements, mask=inside, other=0.0)
    else:
        rows = load_rows(source.base, tokens, offsets, SHAPE.head_dim, SHAPE.block_d, MASKED)
    return rows


@triton.jit
def store_key_grads(base, tokens, offsets, rows, frames, head, segment, stride, SHAPE: tl.constexpr):
    """Store gradients of keys or values, (BLOCK, BLOCK_D), where those lie.

    Where a channel has no source, what the offset reaches around the ends of the segment is read by nobody, and gets
    the zeros: so every element is written, and once.
    """
    if SHAPE.shifts is not None:
        channels = tl.arange(0, SHAPE.block_d)[None, :]
        SHIFTS: tl.constexpr = SHAPE.shifts
        sources = frames + channel_offsets(head * SHAPE.head_dim + channels, SHIFTS)
        inside = (sources >= 0) & (sources < segment)
        around = tl.where(sources < 0, sources + segment, sources)  # offsets reach around no further than this
        around = tl.where(around >= segment, around - segment, around)
        around = tl.where(around >= segment, around - segment, around)
        elements = channels + (around - frames).to(tl.int64) * stride
        stored = (tokens >= 0)[:, None] & (channels < SHAPE.head_dim)
        pointers = base + offsets[:, None] + elements
        rows = rows.to(base.dtype.element_ty)
        tl.store(pointers, rows, mask=stored & inside)
        tl.store(pointers, tl.zeros_like(rows), mask=stored & (inside == 0))
    else:
        store_rows(base, tokens, offsets, rows, SHAPE.head_dim, SHAPE.block_d)

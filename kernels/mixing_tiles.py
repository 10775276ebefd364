"""Channels of keys and values that come from other frames: where they lie, and where their gradients go.

``SHIFTS`` holds (first, last, frame offset) of ranges of concatenated channels, one after the other; None where keys
and values are those of the frame itself. For each channel the way to its source is the same in all frames, so it is
one more offset a column, and the columns of a range are neighbours in memory.
"""

import triton
import triton.language as tl

from vidattn.kernels.rows import load_rows, store_rows

__all__ = ["channel_offsets", "load_keys", "mixed_columns", "store_key_grads"]


@triton.jit
def channel_offsets(channels, SHIFTS: tl.constexpr):
    """Frame offsets of channels."""
    offsets = tl.zeros_like(channels)
    for i in tl.static_range(0, len(SHIFTS), 3):
        offsets = tl.where((channels >= SHIFTS[i]) & (channels < SHIFTS[i + 1]), SHIFTS[i + 2], offsets)
    return offsets


@triton.jit
def mixed_columns(frames, head, segment, stride, SHIFTS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Where the channels of a head are taken from, for :func:`load_keys`; ``stride`` lies between frames.

    ``frames`` are places in the segment, (BLOCK, 1) or the same for all rows.
    """
    elements, inside = 0, 0
    if SHIFTS is not None:
        channels = tl.arange(0, BLOCK_D)[None, :]
        offsets = channel_offsets(head * HEAD_DIM + channels, SHIFTS)
        elements = channels + offsets.to(tl.int64) * stride
        inside = (frames + offsets >= 0) & (frames + offsets < segment)
        if BLOCK_D != HEAD_DIM:
            inside = inside & (channels < HEAD_DIM)
    return elements, inside


@triton.jit
def load_keys(
    base,
    tokens,
    offsets,
    columns,
    SHIFTS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Load rows of keys or values, as ``load_rows`` does; a channel beyond the ends of the segment reads 0."""
    if SHIFTS is not None:
        elements, inside = columns
        if MASKED:
            inside = inside & (tokens >= 0)[:, None]
        rows = tl.load(base + offsets[:, None] + elements, mask=inside, other=0.0)
    else:
        rows = load_rows(base, tokens, offsets, base, HEAD_DIM, BLOCK_D, MASKED, False)
    return rows


@triton.jit
def store_key_grads(
    base,
    tokens,
    offsets,
    rows,
    frames,
    head,
    segment,
    stride,
    SHIFTS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Store gradients of keys or values where those lie.

    Where a channel has no source, what the offset reaches around the ends of the segment is read by nobody, and gets
    the zeros: so every element is written, and once.
    """
    if SHIFTS is not None:
        channels = tl.arange(0, BLOCK_D)[None, :]
        sources = frames + channel_offsets(head * HEAD_DIM + channels, SHIFTS)
        inside = (sources >= 0) & (sources < segment)
        around = tl.where(sources < 0, sources + segment, sources)  # offsets reach around no further than this
        around = tl.where(around >= segment, around - segment, around)
        around = tl.where(around >= segment, around - segment, around)
        elements = channels + (around - frames).to(tl.int64) * stride
        stored = (tokens >= 0)[:, None] & (channels < HEAD_DIM)
        pointers = base + offsets[:, None] + elements
        rows = rows.to(base.dtype.element_ty)
        tl.store(pointers, rows, mask=stored & inside)
        tl.store(pointers, tl.zeros_like(rows), mask=stored & (inside == 0))
    else:
        store_rows(base, tokens, offsets, rows, HEAD_DIM, BLOCK_D)

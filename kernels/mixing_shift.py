"""The kernel of temporal shift, which moves bytes; mixing.py launches it and says what its arguments hold."""

import triton
import triton.language as tl

from vidattn.kernels.mixing_tiles import channel_offsets

__all__ = ["temporal_shift"]


@triton.jit(do_not_specialize=["segment"])
def temporal_shift(
    x,
    out,
    segment,
    frame_size,
    line,
    group,
    SHIFTS: tl.constexpr,
    TOGETHER: tl.constexpr,
    BLOCK: tl.constexpr,
    LONG: tl.constexpr,
    WORD: tl.constexpr,
):
    """Copy a block of a frame of ``out`` from where it lies in ``x``; ``SHIFTS`` counts groups of channels.

    A line is what the channels of one place hold, ``group`` what a group of channels holds of it, in words (``WORD``)
    of which ``TOGETHER`` are moved at a time. ``LONG`` says that 32 bits do not count the line.
    """
    x, out = x.to(tl.pointer_type(WORD)), out.to(tl.pointer_type(WORD))
    blocks = tl.cdiv(frame_size, BLOCK)
    frame = tl.program_id(0) // blocks
    numbers = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    start = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK % line
    if not LONG:  # division is slow in 64 bits
        start = start.to(tl.int32)
    offsets = channel_offsets((start + tl.arange(0, BLOCK)) % line // group, SHIFTS)
    sources = frame % segment + offsets
    targets = frame.to(tl.int64) * frame_size + numbers
    written = tl.max_constancy(numbers < frame_size, TOGETHER)
    inside = tl.max_constancy(written & (sources >= 0) & (sources < segment), TOGETHER)
    elements = tl.max_contiguous(tl.multiple_of(targets + offsets.to(tl.int64) * frame_size, TOGETHER), TOGETHER)
    moved = tl.load(x + elements, mask=inside, other=0)
    tl.store(out + tl.max_contiguous(tl.multiple_of(targets, TOGETHER), TOGETHER), moved, mask=written)

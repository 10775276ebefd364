"""The kernel of temporal shift, which moves bytes; mixing.py launches it and says what its arguments hold."""

import triton
import triton.language as tl

from vidattn.kernels.mixing_tiles import channel_offsets

__all__ = ["temporal_shift"]


@triton.jit(do_not_specialize=["segment"])
def temporal_shift(
    x, out, segment, frame_size, line, group, SHIFTS: tl.constexpr, BLOCK: tl.constexpr, LONG: tl.constexpr
):
    """Copy a block of a frame of ``out`` from where it lies in ``x``; ``SHIFTS`` counts groups of channels.

    A line is what the channels of one place hold, ``group`` what a group of channels holds of it. ``LONG`` says that
    32 bits do not count the line.
    """
    blocks = tl.cdiv(frame_size, BLOCK)
    frame = tl.program_id(0) // blocks
    first = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK
    numbers = tl.arange(0, BLOCK)
    start = first % line
    if not LONG:  # division is slow in 64 bits
        start = start.to(tl.int32)
    places = (start + numbers) % line
    offsets = channel_offsets(places // group, SHIFTS)
    sources = frame % segment + offsets
    written = first + numbers < frame_size
    inside = written & (sources >= 0) & (sources < segment)
    target = frame.to(tl.int64) * frame_size + first
    moved = tl.load(x + target + (offsets.to(tl.int64) * frame_size + numbers), mask=inside, other=0)
    tl.store(out + target + numbers, moved, mask=written)

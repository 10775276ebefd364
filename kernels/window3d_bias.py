"""Between a bias and its planes, the dense bias of one window, (N, pitch) a head: both directions.

Token i has a position A_i such that the pair (i, j) reads row A_i - A_j + origin of the table (``geometry.bias_rows``),
so neither direction needs an N x N map.
"""

import triton
import triton.language as tl

from vidattn.kernels.window3d_tiles import PITCH_UNIT

__all__ = ["window3d_copy_planes", "window3d_dense_bias", "window3d_fold_bias", "window3d_largest_bias"]


@triton.jit(do_not_specialize=["heads", "origin"])
def window3d_dense_bias(
    table,
    positions,
    regions,
    kind_bits,
    planes,
    heads,
    origin,
    mask_value,
    NUM_TOKENS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Write a tile of the plane of one kind of window and one head: its bias, plus the mask between its regions.

    Without ``table`` there is no bias, without ``kind_bits`` no mask.
    """
    PITCH: tl.constexpr = (NUM_TOKENS + PITCH_UNIT - 1) // PITCH_UNIT * PITCH_UNIT
    ROW_TILES: tl.constexpr = (NUM_TOKENS + BLOCK_M - 1) // BLOCK_M
    COLUMN_TILES: tl.constexpr = (PITCH + BLOCK_N - 1) // BLOCK_N
    program = tl.program_id(0)
    column_tile, row_tile = program % COLUMN_TILES, program // COLUMN_TILES % ROW_TILES
    number = program // COLUMN_TILES // ROW_TILES  # of the plane
    kind, head = number // heads, number % heads
    rows, columns = row_tile * BLOCK_M + tl.arange(0, BLOCK_M), column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (rows < NUM_TOKENS)[:, None] & (columns < NUM_TOKENS)[None, :]
    values = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if table is not None:
        of_rows = tl.load(positions + rows, mask=rows < NUM_TOKENS, other=0)
        of_columns = tl.load(positions + columns, mask=columns < NUM_TOKENS, other=0)
        read = (of_rows[:, None] - of_columns[None, :] + origin) * heads + head
        values = tl.load(table + read, mask=inside, other=0.0).to(tl.float32)
    if kind_bits is not None:
        bits = tl.load(kind_bits + kind)
        of_rows = tl.load(regions + rows, mask=rows < NUM_TOKENS, other=0) & bits
        of_columns = tl.load(regions + columns, mask=columns < NUM_TOKENS, other=0) & bits
        values += tl.where(inside & (of_rows[:, None] != of_columns[None, :]), mask_value, 0.0)
    written = (rows < NUM_TOKENS)[:, None] & (columns < PITCH)[None, :]
    offsets = number.to(tl.int64) * (NUM_TOKENS * PITCH) + rows[:, None] * PITCH + columns[None, :]
    tl.store(planes + offsets, values, mask=written)


@triton.jit
def window3d_copy_planes(source, planes, NUM_TOKENS: tl.constexpr, BLOCK: tl.constexpr):
    """Write a row (pitch,) of the planes from ``source`` (planes, N, N), contiguous; zeros past its end."""
    PITCH: tl.constexpr = (NUM_TOKENS + PITCH_UNIT - 1) // PITCH_UNIT * PITCH_UNIT
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    values = tl.load(source + row * NUM_TOKENS + columns, mask=columns < NUM_TOKENS, other=0.0)
    tl.store(planes + row * PITCH + columns, values.to(tl.float32), mask=columns < PITCH)


@triton.jit(do_not_specialize=["size"])
def window3d_largest_bias(table, largest, size, BLOCK: tl.constexpr):
    """Find the largest of ``size`` numbers, float32; NaN if there is one."""
    found = tl.full([BLOCK], float("-inf"), tl.float32)
    for first in range(0, size, BLOCK):
        places = first + tl.arange(0, BLOCK)
        values = tl.load(table + places, mask=places < size, other=float("-inf")).to(tl.float32)
        found = tl.maximum(found, values, propagate_nan=tl.PropagateNan.ALL)
    tl.store(largest, tl.max(found, 0) + tl.sum(tl.where(found != found, found, 0.0), 0))


@triton.jit(do_not_specialize=["heads", "num_rows", "num_parts", "num_positions", "origin"])
def window3d_fold_bias(
    parts,
    positions,
    tokens_at,
    grad_table,
    heads,
    num_rows,
    num_parts,
    num_positions,
    origin,
    NUM_TOKENS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Sum the partial gradients of the dense bias over parts and over all pairs that read a row of the table."""
    PITCH: tl.constexpr = (NUM_TOKENS + PITCH_UNIT - 1) // PITCH_UNIT * PITCH_UNIT
    head = tl.program_id(0) % heads
    rows = tl.program_id(0) // heads * BLOCK_R + tl.arange(0, BLOCK_R)
    total = tl.zeros([BLOCK_R, BLOCK_M], tl.float32)
    for first in range(0, NUM_TOKENS, BLOCK_M):
        queries = first + tl.arange(0, BLOCK_M)
        position = tl.load(positions + queries, mask=queries < NUM_TOKENS, other=0)[None, :] + origin - rows[:, None]
        inside = (queries < NUM_TOKENS)[None, :] & (rows < num_rows)[:, None]
        inside = inside & (position >= 0) & (position < num_positions)
        keys = tl.load(tokens_at + position, mask=inside, other=-1)  # -1: no token has this position
        inside = inside & (keys >= 0)
        for part in range(num_parts):
            plane = parts + (part * heads + head).to(tl.int64) * (NUM_TOKENS * PITCH)
            total += tl.load(plane + queries[None, :] * PITCH + keys, mask=inside, other=0.0)
    tl.store(grad_table + rows * heads + head, tl.sum(total, 1), mask=rows < num_rows)

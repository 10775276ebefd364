"""Sequences of divided attention: where their tokens lie, and what becomes of a cls token that frames share.

A sequence is a site over time or a frame over space. Its tokens stand in slots: sites or frames in order, then the cls
token if there is one. Standing last, it is in no full tile, and only tails have to look for it. For dropout, and for
everybody else, its position is 0 and that of the others one more than their slot.
"""

import triton
import triton.language as tl

from vidattn.kernels.mixing_tiles import load_keys
from vidattn.kernels.rows import NO_TOKEN, load_rows, row_offsets
from vidattn.kernels.softmax import dropout_factors, dropout_factors_at

__all__ = [
    "add_cls",
    "load_signed",
    "locate",
    "lse_rows",
    "positions",
    "signed",
    "slot_tokens",
    "store_cls",
    "tile_factors",
    "tile_keys",
    "tile_rows",
]


@triton.jit
def locate(first_head, heads, places, LENGTH: tl.constexpr, BLOCK: tl.constexpr):
    """(tile, head, group, clip, place in the clip) of this program: tiles of one head of a group are neighbours."""
    tiles: tl.constexpr = (LENGTH + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    group = program // tiles // heads
    return program % tiles, first_head + program // tiles % heads, group, (group // places).to(tl.int64), group % places


@triton.jit
def slot_tokens(slots, place, inside, steps, LENGTH: tl.constexpr, CLS: tl.constexpr):
    """Rows of slots in q, k, v, and in out, which lacks the cls token; NO_TOKEN for those that are not ``inside``.

    ``steps`` are the rows from one place to the next and from one slot to the next.
    """
    place_step, slot_step = steps
    rows = place * place_step + slots * slot_step
    tokens = rows
    if CLS:
        is_cls = slots == LENGTH - 1
        tokens = tl.where(is_cls, 0, rows + 1)
        rows = tl.where(is_cls, NO_TOKEN, rows)
    return tl.where(inside, tokens, NO_TOKEN), tl.where(inside, rows, NO_TOKEN)


@triton.jit
def tile_rows(
    base,
    first,
    place,
    steps,
    stride,
    LENGTH: tl.constexpr,
    SHIFT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    columns=None,
    SHIFTS: tl.constexpr = None,
):
    """Load a tile of slots, none of which is the cls token or past the end; ``SHIFT`` is the row of the first one.

    What differs from row to row does not differ from tile to tile, and is not computed again for each.
    """
    place_step, slot_step = steps
    numbers = tl.arange(0, BLOCK)
    tile = base + (place * place_step + first * slot_step + SHIFT).to(tl.int64) * stride
    offsets = row_offsets(numbers * slot_step, stride)
    return load_keys(tile, numbers, offsets, columns, SHIFTS, HEAD_DIM, BLOCK_D, False)


@triton.jit
def tile_keys(
    base,
    first,
    place,
    steps,
    stride,
    columns,
    LENGTH: tl.constexpr,
    CLS: tl.constexpr,
    SHIFTS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    IS_TAIL: tl.constexpr,
):
    """Load a tile of keys or values; only a tail may hold the cls token or end before the tile does."""
    if IS_TAIL:
        slots = first + tl.arange(0, BLOCK)
        tokens, _ = slot_tokens(slots, place, slots < LENGTH, steps, LENGTH, CLS)
        rows = load_keys(base, tokens, row_offsets(tokens, stride), columns, SHIFTS, HEAD_DIM, BLOCK_D, True)
    else:
        rows = tile_rows(base, first, place, steps, stride, LENGTH, CLS, HEAD_DIM, BLOCK_D, BLOCK, columns, SHIFTS)
    return rows


@triton.jit
def load_signed(base, tokens, offsets, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, SIGN: tl.constexpr):
    """Load queries times the sign of the scale."""
    return signed(load_rows(base, tokens, offsets, base, HEAD_DIM, BLOCK_D, True, False), SIGN)


@triton.jit
def signed(rows, SIGN: tl.constexpr):
    """Take queries, or keys, times the sign of the scale, which is exact: scores are in units of its magnitude."""
    if SIGN != 1:
        rows = (rows * SIGN).to(rows.dtype)
    return rows


@triton.jit
def positions(slots, LENGTH: tl.constexpr, CLS: tl.constexpr):
    """Positions in the sequence of slots."""
    if CLS:
        slots = tl.where(slots == LENGTH - 1, 0, slots + 1)
    return slots


@triton.jit
def lse_rows(slots, place, rows, cls_row, LENGTH: tl.constexpr, CLS: tl.constexpr):
    """Rows of slots in the log-sum-exp: those of the context, then one for the cls token of each frame."""
    if CLS:
        rows = tl.where(slots == LENGTH - 1, cls_row + place, rows)
    return rows


@triton.jit
def add_cls(rows, of_cls, slots, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, LENGTH: tl.constexpr):
    """Put what ``of_cls`` points to, a vector of one head, into the row of the cls token."""
    channels = tl.arange(0, BLOCK_D)
    vector = tl.load(of_cls + channels, mask=channels < HEAD_DIM, other=0.0).to(rows.dtype)
    return tl.where((slots == LENGTH - 1)[:, None], vector[None, :], rows)


@triton.jit
def store_cls(base, offsets, is_cls, rows, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Store the rows that hold a cls token, in float32."""
    channels = tl.arange(0, BLOCK_D)
    inside = is_cls[:, None] & (channels < HEAD_DIM)[None, :]
    tl.store(base + offsets[:, None] + channels[None, :], rows, mask=inside)


@triton.jit
def tile_factors(
    dropout, group, head, first_query, first_key,
    LENGTH: tl.constexpr, CLS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """What dropout multiplies a tile of one sequence by."""
    queries = positions(first_query + tl.arange(0, BLOCK_M), LENGTH, CLS)
    if CLS:  # a tile's keys do not start at a multiple of four
        keys = positions(first_key + tl.arange(0, BLOCK_N), LENGTH, CLS)
        factors = dropout_factors_at(dropout, group, head, queries[:, None], keys[None, :])
    else:
        factors = dropout_factors(dropout, group, head, queries, first_key, BLOCK_M, BLOCK_N)
    return factors

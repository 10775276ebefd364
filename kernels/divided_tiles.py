"""Sequences of divided attention: where their tokens lie, and what becomes of a cls token that frames share.

A sequence is a site over time or a frame over space. Its tokens stand in slots: sites or frames in order, then the cls
token if there is one. Standing last, it is in no full tile, and only tails have to look for it. For dropout, and for
everybody else, its position is 0 and that of the others one more than their slot.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from vidattn.kernels.mixing_tiles import HeadRows, load_keys
from vidattn.kernels.rows import NO_TOKEN, load_rows, row_offsets
from vidattn.kernels.softmax import dropout_factors, dropout_factors_at

__all__ = [
    "UNSPECIALISED",
    "ClsGradients",
    "Context",
    "Gradients",
    "Kept",
    "Sequence",
    "Shape",
    "Slots",
    "add_cls",
    "first_slot",
    "load_signed",
    "locate",
    "lse_rows",
    "positions",
    "signed",
    "slot_tokens",
    "store_cls",
    "tile_factors",
    "tile_rows",
]


# ---- Arguments of the kernels ----

# Numbers that change with the clip: Triton makes no variants of a kernel for them. In a NamedTuple it would.
UNSPECIALISED = (
    "places", "num_groups", "place_step", "slot_step", "first_head", "heads", "all_heads", "num_rows", "segment",
    "full_tiles",
)  # fmt: skip


class Shape(NamedTuple):
    """What a kernel is compiled for, as one argument.

    A field that stands in a list, or is no number and goes on to another function, is named as a constant first: there
    Triton takes no field.

    Attributes:
        length: tokens of a sequence, a cls token included.
        has_cls: whether the last slot is a cls token.
        shifts: (first, last, frame offset) of ranges of channels that come from other frames, flat; None without.
        head_dim: channels of a head.
        block_d: as many, rounded up to a power of two.
        sign: sign of the scale.
        precision: how products of float32 are taken.
    """

    length: int
    has_cls: bool
    shifts: tuple[int, ...] | None
    head_dim: int
    block_d: int
    sign: int
    precision: str


class Context(NamedTuple):
    """The context without that of the cls token, or its gradient: (B, T * N, h * d), heads side by side.

    Attributes:
        base: the tensor.
        batch: elements from a clip to the next.
        token: elements from a token to the next.
    """

    base: Any
    batch: Any
    token: Any


class Gradients(NamedTuple):
    """Gradients of q, k and v, (B, S, h, d), all of the same strides; None where another kernel gives it.

    Attributes:
        q: dq.
        k: dk.
        v: dv.
        batch: elements from a clip to the next.
        token: elements from a token to the next.
        head: elements from a head to the next.
    """

    q: Any
    k: Any
    v: Any
    batch: Any
    token: Any
    head: Any


class ClsGradients(NamedTuple):
    """The gradient of the cls token's context in each frame, and what the cls token gets from each; float32.

    Attributes:
        base: (B, T, h * d), the gradient that comes in.
        batch: elements from a clip to the next.
        frame: elements from a frame to the next.
        parts: (3, B, T, h * d), contiguous: parts of dq, dk and dv, to be summed over the frames.
        part: elements from those of dq to those of dk, and on to those of dv.
    """

    base: Any
    batch: Any
    frame: Any
    parts: Any
    part: Any


class Kept(NamedTuple):
    """What the backward pass reads of each row, float32, in the order of the log-sum-exp.

    Attributes:
        lse: log-sum-exp.
        delta: sum of the context times its gradient.
    """

    lse: Any
    delta: Any


# ---- Where tokens lie ----


class Sequence(NamedTuple):
    """One head of a sequence; of each row, if a tile holds several of them.

    Attributes:
        head: the head.
        group: number of the sequence in the batch.
        clip: clip that it is in, in 64 bits.
        place: its number in the clip.
        place_step: rows from one place to the next.
        slot_step: rows from one slot to the next.
    """

    head: Any
    group: Any
    clip: Any
    place: Any
    place_step: Any
    slot_step: Any


class Slots(NamedTuple):
    """Rows of slots, NO_TOKEN where they have none.

    Attributes:
        tokens: rows in q, k and v.
        rows: rows in the context, which lacks the cls token.
    """

    tokens: Any
    rows: Any


@triton.jit
def locate(first_head, heads, places, place_step, slot_step, SHAPE: tl.constexpr, BLOCK: tl.constexpr):
    """Sequence of this program: tiles of one head of a sequence are neighbours."""
    tiles: tl.constexpr = (SHAPE.length + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    group = program // tiles // heads
    return Sequence(
        head=first_head + program // tiles % heads,
        group=group,
        clip=(group // places).to(tl.int64),
        place=group % places,
        place_step=place_step,
        slot_step=slot_step,
    )


@triton.jit
def first_slot(SHAPE: tl.constexpr, BLOCK: tl.constexpr):
    """First slot of the tile that this program owns."""
    tiles: tl.constexpr = (SHAPE.length + BLOCK - 1) // BLOCK
    return tl.program_id(0) % tiles * BLOCK


@triton.jit
def slot_tokens(sequence, slots, inside, SHAPE: tl.constexpr):
    """Rows of slots, NO_TOKEN for those that are not ``inside``."""
    rows = sequence.place * sequence.place_step + slots * sequence.slot_step
    tokens = rows
    if SHAPE.has_cls:
        is_cls = slots == SHAPE.length - 1
        tokens = tl.where(is_cls, 0, rows + 1)
        rows = tl.where(is_cls, NO_TOKEN, rows)
    return Slots(tokens=tl.where(inside, tokens, NO_TOKEN), rows=tl.where(inside, rows, NO_TOKEN))


@triton.jit
def tile_rows(
    source,
    sequence,
    first,
    SHIFT: tl.constexpr,
    SHAPE: tl.constexpr,
    BLOCK: tl.constexpr,
    IS_TAIL: tl.constexpr,
):
    """Load a tile of slots (BLOCK, BLOCK_D); only a tail may hold the cls token or end before the tile does.

    ``SHIFT`` is the row of the first slot. In a full tile, what differs from row to row does not differ from tile to
    tile, and is not computed again for each.
    """
    numbers = tl.arange(0, BLOCK)
    if IS_TAIL:
        slots = first + numbers
        tokens = slot_tokens(sequence, slots, slots < SHAPE.length, SHAPE).tokens
        rows = load_keys(source, tokens, row_offsets(tokens, source.token), SHAPE, True)
    else:
        start = (sequence.place * sequence.place_step + first * sequence.slot_step + SHIFT).to(tl.int64)
        tile = HeadRows(source.base + start * source.token, source.token, source.columns)
        offsets = row_offsets(numbers * sequence.slot_step, source.token)
        rows = load_keys(tile, numbers, offsets, SHAPE, False)
    return rows


@triton.jit
def load_signed(base, tokens, offsets, SHAPE: tl.constexpr):
    """Load queries times the sign of the scale, (BLOCK, BLOCK_D)."""
    return signed(load_rows(base, tokens, offsets, SHAPE.head_dim, SHAPE.block_d, True), SHAPE)


@triton.jit
def signed(rows, SHAPE: tl.constexpr):
    """Take queries, or keys, times the sign of the scale, which is exact: scores are in units of its magnitude."""
    if SHAPE.sign != 1:
        rows = (rows * SHAPE.sign).to(rows.dtype)
    return rows


@triton.jit
def positions(slots, SHAPE: tl.constexpr):
    """Positions in the sequence of slots."""
    if SHAPE.has_cls:
        slots = tl.where(slots == SHAPE.length - 1, 0, slots + 1)
    return slots


@triton.jit
def lse_rows(sequence, slots, rows, places, num_rows, SHAPE: tl.constexpr):
    """Rows of slots in a clip's log-sum-exp: those of the context, then one for the cls token of each frame."""
    if SHAPE.has_cls:
        rows = tl.where(slots == SHAPE.length - 1, num_rows - places + sequence.place, rows)
    return rows


# ---- The cls token ----


@triton.jit
def add_cls(rows, of_cls, slots, SHAPE: tl.constexpr):
    """Put what ``of_cls`` points to, a vector of one head, into the row of the cls token."""
    channels = tl.arange(0, SHAPE.block_d)
    vector = tl.load(of_cls + channels, mask=channels < SHAPE.head_dim, other=0.0).to(rows.dtype)
    return tl.where((slots == SHAPE.length - 1)[:, None], vector[None, :], rows)


@triton.jit
def store_cls(base, offsets, is_cls, rows, SHAPE: tl.constexpr):
    """Store the rows that hold a cls token, in float32."""
    channels = tl.arange(0, SHAPE.block_d)
    inside = is_cls[:, None] & (channels < SHAPE.head_dim)[None, :]
    tl.store(base + offsets[:, None] + channels[None, :], rows, mask=inside)


# ---- Dropout ----


@triton.jit
def tile_factors(
    dropout, sequence, first_query, first_key,
    SHAPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """What dropout multiplies a tile of one sequence by, (BLOCK_M, BLOCK_N)."""
    queries = positions(first_query + tl.arange(0, BLOCK_M), SHAPE)
    if SHAPE.has_cls:  # a tile's keys do not start at a multiple of four
        keys = positions(first_key + tl.arange(0, BLOCK_N), SHAPE)
        factors = dropout_factors_at(dropout, sequence.group, sequence.head, queries[:, None], keys[None, :])
    else:
        factors = dropout_factors(dropout, sequence.group, sequence.head, queries, first_key, BLOCK_M, BLOCK_N)
    return factors

"""Whole sequences packed into one tile, of divided attention: queries and keys are the rows of the same tile.

Weights between different sequences are 0. Times an infinity or a NaN that is a NaN, so a program whose results are not
finite does its work again, for one sequence after the other with the rows of all others 0.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from vidattn.kernels.divided_tiles import Sequence, positions
from vidattn.kernels.rows import row_offsets
from vidattn.kernels.softmax import dropout_factors_at, softmax_rows

__all__ = ["Packed", "Weights", "attend_packed", "is_not_finite", "locate_packed", "packed_factors", "packed_offsets"]


class Packed(NamedTuple):
    """A tile that holds several sequences, by its rows.

    Attributes:
        sequence: of each row its sequence; all are of one head.
        slots: of each row its slot.
        numbers: of each row the number of its sequence in the tile.
        inside: whether a row is one.
    """

    sequence: Any
    slots: Any
    numbers: Any
    inside: Any


class Weights(NamedTuple):
    """What softmax makes of a tile.

    Attributes:
        weights: (BLOCK, BLOCK), exp(s - m) within the sequences.
        maximum: (BLOCK,), m.
        total: (BLOCK,), sum of exp(s - m).
    """

    weights: Any
    maximum: Any
    total: Any


@triton.jit
def locate_packed(
    first_head, heads, places, num_groups, place_step, slot_step, SHAPE: tl.constexpr, BLOCK: tl.constexpr
):
    """Rows of this program's tile.

    Neighbouring programs have different heads: those of a token are neighbours in memory.
    """
    PER_TILE: tl.constexpr = BLOCK // SHAPE.length
    program, rows = tl.program_id(0), tl.arange(0, BLOCK)
    numbers = rows // SHAPE.length
    group = program // heads * PER_TILE + numbers
    sequence = Sequence(
        head=first_head + program % heads,
        group=group,
        clip=(group // places).to(tl.int64),
        place=group % places,
        place_step=place_step,
        slot_step=slot_step,
    )
    inside = (numbers < PER_TILE) & (group < num_groups)
    return Packed(sequence=sequence, slots=rows % SHAPE.length, numbers=numbers, inside=inside)


@triton.jit
def packed_offsets(sequence, tokens, batch_stride, token_stride):
    """Elements from the first token of a tensor to each one."""
    return sequence.clip * batch_stride + row_offsets(tokens, token_stride)


@triton.jit
def attend_packed(q_rows, k_rows, packed, unit, SHAPE: tl.constexpr, BLOCK: tl.constexpr):
    """Attend within the sequences."""
    scores = tl.dot(q_rows, tl.trans(k_rows), input_precision=SHAPE.precision)
    if SHAPE.length != BLOCK:
        scores = tl.where(packed.numbers[:, None] == packed.numbers[None, :], scores, float("-inf"))
    weights, row_max, row_sum = softmax_rows(scores, unit)
    return Weights(weights=weights, maximum=row_max, total=row_sum)


@triton.jit
def packed_factors(dropout, packed, SHAPE: tl.constexpr):
    """What dropout multiplies the weights by, (BLOCK, BLOCK)."""
    sequence, of_rows = packed.sequence, positions(packed.slots, SHAPE)
    return dropout_factors_at(dropout, sequence.group[:, None], sequence.head, of_rows[:, None], of_rows[None, :])


@triton.jit
def is_not_finite(x):
    """Whether there is an infinity or a NaN among some numbers: 0 times that is a NaN."""
    return tl.sum(tl.ravel(x.to(tl.float32) * 0.0), 0) != 0.0

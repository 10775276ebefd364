"""Whole sequences packed into one tile, of divided attention: queries and keys are the rows of the same tile.

Weights between different sequences are 0. Times an infinity or a NaN that is a NaN, so a program whose results are not
finite does its work again, for one sequence after the other with the rows of all others 0.
"""

import triton
import triton.language as tl

from vidattn.kernels.divided_tiles import positions
from vidattn.kernels.softmax import dropout_factors_at, softmax_rows

__all__ = ["attend_packed", "is_not_finite", "locate_packed"]


@triton.jit
def locate_packed(first_head, heads, places, num_groups, LENGTH: tl.constexpr, BLOCK: tl.constexpr):
    """Head of this program's tile; of each row its group, place in the clip, slot, sequence in the tile, and if it is.

    Neighbouring programs have different heads: those of a token are neighbours in memory.
    """
    PER_TILE: tl.constexpr = BLOCK // LENGTH
    program, numbers = tl.program_id(0), tl.arange(0, BLOCK)
    sequences = numbers // LENGTH
    groups = program // heads * PER_TILE + sequences
    inside = (sequences < PER_TILE) & (groups < num_groups)
    return first_head + program % heads, groups, groups % places, numbers % LENGTH, sequences, inside


@triton.jit
def attend_packed(
    q_rows,
    k_rows,
    sequences,
    slots,
    groups,
    head,
    dropout,
    unit,
    LENGTH: tl.constexpr,
    CLS: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Weights exp(s - m) within the sequences, their maxima and sums, and what dropout multiplies them by."""
    scores = tl.dot(q_rows, tl.trans(k_rows), input_precision=PRECISION)
    if BLOCK != LENGTH:
        scores = tl.where(sequences[:, None] == sequences[None, :], scores, float("-inf"))
    weights, row_max, row_sum = softmax_rows(scores, unit)
    factors = 1.0
    if HAS_DROPOUT:
        of_rows = positions(slots, LENGTH, CLS)
        factors = dropout_factors_at(dropout, groups[:, None], head, of_rows[:, None], of_rows[None, :])
    return weights, row_max, row_sum, factors


@triton.jit
def is_not_finite(x):
    """Whether there is an infinity or a NaN among some numbers: 0 times that is a NaN."""
    return tl.sum(tl.ravel(x.to(tl.float32) * 0.0), 0) != 0.0

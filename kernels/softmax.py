"""Softmax over keys that come tile by tile, and its gradient: what all families share.

Scores are in natural units and float32. A row's state is its maximum m, its sum l of exp(s - m) and its accumulator
sum_j exp(s_j - m) v_j; the log-sum-exp that the backward pass reads is m + log l. exp(x - m) is taken as
2**(x log2 e - m log2 e): one fused multiply-add and one hardware instruction; or as 2**((x - m) log2 e), one
instruction more, where scores of thousands must not cost digits.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

__all__ = [
    "Dropout",
    "SoftmaxState",
    "dropout_factors",
    "dropout_factors_at",
    "dropout_of",
    "finish_rows",
    "normalise_rows",
    "score_gradients",
    "softmax_rows",
    "softmax_step",
    "start_rows",
]

LOG2E = tl.constexpr(1.4426950408889634)


class SoftmaxState(NamedTuple):
    """What rows keep of the keys that they have seen, float32.

    Attributes:
        maximum: (BLOCK_M,), the largest score.
        total: (BLOCK_M,), the sum of exp(s - m).
        context: (BLOCK_M, BLOCK_D), the same sum over the values.
    """

    maximum: Any
    total: Any
    context: Any


class Dropout(NamedTuple):
    """Dropout on the weights, as one argument of a kernel, which is None without.

    Attributes:
        seed: int64 (1,), the key of the mask, or a pointer to it.
        threshold: the probability in units of 2**-24, rounded up: a whole number, but as a float, for Triton would
            make a variant of the kernel for each kind of whole number in a tuple.
        kept: factor of a weight that is kept.
    """

    seed: Any
    threshold: float
    kept: float


def dropout_of(seed: Tensor | None, dropout_p: float) -> Dropout | None:
    """Give a kernel's argument for dropout.

    Args:
        seed: int64 (1,), key of the mask; may be None without dropout.
        dropout_p: dropout probability.

    Returns:
        The argument; None without dropout.
    """
    if dropout_p == 0:
        return None
    return Dropout(seed, float(math.ceil(dropout_p * 2**24)), 1.0 / (1.0 - dropout_p))


@triton.jit
def start_rows(BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """State of rows that have seen no key."""
    return SoftmaxState(
        tl.full([BLOCK_M], float("-inf"), tl.float32),
        tl.zeros([BLOCK_M], tl.float32),
        tl.zeros([BLOCK_M, BLOCK_D], tl.float32),
    )


@triton.jit
def softmax_step(state, scores, v, factors, PRECISION: tl.constexpr, unit=1.0):
    """Take a tile of keys in: ``scores`` (BLOCK_M, BLOCK_N), ``v`` (BLOCK_N, BLOCK_D).

    Scores and the state's maximum are in units of ``unit``, which is positive. ``factors`` (BLOCK_M, BLOCK_N) are those
    of dropout; None without.
    """
    state = SoftmaxState(*state)  # Triton 3.6 forgets the names of a state that was added to a tuple
    row_max = state.maximum
    new_max = tl.maximum(row_max, tl.max(scores, 1))
    # A row of -inf alone must give zeros, not the NaN of -inf - -inf: its maximum reads 0.
    offset = tl.where(new_max == float("-inf"), 0.0, new_max)
    weights = _exp_below(scores, offset[:, None], unit, v.dtype == tl.float32)
    shrink = _exp_below(row_max, offset, unit, v.dtype == tl.float32)
    total = state.total * shrink + tl.sum(weights, 1)
    if factors is not None:
        weights *= factors
    context = tl.dot(weights.to(v.dtype), v, state.context * shrink[:, None], input_precision=PRECISION)
    return SoftmaxState(new_max, total, context)


@triton.jit
def finish_rows(state, unit=1.0):
    """Context and log-sum-exp of rows that have seen all keys; 0 and -inf where every score is -inf."""
    state = SoftmaxState(*state)
    lse = tl.where(state.maximum == float("-inf"), 0.0, state.maximum * unit) + tl.log(state.total)
    return state.context / tl.where(state.total == 0.0, 1.0, state.total)[:, None], lse


@triton.jit
def _exp_below(scores, top, unit, EXACT: tl.constexpr):
    """exp(s - m), both in units of ``unit``."""
    if EXACT:
        weights = tl.exp2((scores - top) * (unit * LOG2E))
    else:
        weights = tl.exp2(scores * (unit * LOG2E) - top * (unit * LOG2E))
    return weights


@triton.jit
def probabilities(scores, lse, unit=1.0, EXACT: tl.constexpr = False):
    """Recompute the softmax from its scores and log-sum-exp; an ``lse`` of +inf makes a row of zeros."""
    lse = tl.where(lse == float("-inf"), 0.0, lse)[:, None]
    if EXACT:
        weights = tl.exp2((scores * unit - lse) * LOG2E)
    else:
        weights = tl.exp2(scores * (unit * LOG2E) - lse * LOG2E)
    return weights


@triton.jit
def softmax_rows(scores, unit=1.0):
    """Weights exp(s - m) of rows that are seen whole, their maxima m and sums; all 0 where every score is -inf."""
    row_max = tl.max(scores, 1)
    offset = tl.where(row_max == float("-inf"), 0.0, row_max)
    weights = _exp_below(scores, offset[:, None], unit, True)
    return weights, row_max, tl.sum(weights, 1)


@triton.jit
def normalise_rows(weights, row_sum):
    """P of rows that are seen whole, from their weights exp(s - m) and sums."""
    return weights * (1.0 / tl.where(row_sum == 0.0, 1.0, row_sum))[:, None]


@triton.jit
def score_gradients(
    scores,
    lse,
    delta,
    dout_rows,
    v_rows,
    factors,
    PRECISION: tl.constexpr,
    unit=1.0,
):
    """P as it multiplied v, dropout applied, and dS = P (dP - delta), both (BLOCK_M, BLOCK_N).

    ``lse`` and ``delta`` are None where rows are seen whole: P and delta are then taken from them, not from what was
    kept. ``factors`` are those of dropout; None without.
    """
    if lse is None:
        weights, _, row_sum = softmax_rows(scores, unit)
        weights = normalise_rows(weights, row_sum)
    else:
        weights = probabilities(scores, lse, unit, v_rows.dtype == tl.float32)
    grad_weights = tl.dot(dout_rows, tl.trans(v_rows), input_precision=PRECISION)
    if factors is not None:
        grad_weights *= factors
    if lse is None:
        delta = tl.sum(weights * grad_weights, 1)
    dropped = weights
    if factors is not None:
        dropped = weights * factors
    return dropped, weights * (grad_weights - delta[:, None])


@triton.jit
def dropout_factors(dropout, group, head, queries, first_key, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """What dropout multiplies a tile of weights by, from the numbers that every backend draws.

    (BLOCK_M, BLOCK_N); ``first_key`` is a multiple of 4.
    """
    quads = (first_key // 4 + tl.arange(0, BLOCK_N // 4))[None, :]
    c0 = tl.broadcast_to(quads, [BLOCK_M, BLOCK_N // 4]).to(tl.uint32)
    c1 = tl.broadcast_to(queries[:, None], [BLOCK_M, BLOCK_N // 4]).to(tl.uint32)
    c2 = tl.zeros_like(c0) + head.to(tl.uint32)
    c3 = tl.zeros_like(c0) + group.to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(tl.load(dropout.seed), c0, c1, c2, c3)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape([BLOCK_M, BLOCK_N])  # four neighbouring keys
    return _kept_words(words, dropout)


@triton.jit
def dropout_factors_at(dropout, groups, head, queries, keys):
    """The same for any queries and keys, (BLOCK_M, 1) and (1, BLOCK_N), at four times the work."""
    c0 = tl.zeros_like(queries + keys).to(tl.uint32) + (keys // 4).to(tl.uint32)
    c1, c2 = tl.zeros_like(c0) + queries.to(tl.uint32), tl.zeros_like(c0) + head.to(tl.uint32)
    c3 = tl.zeros_like(c0) + groups.to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(tl.load(dropout.seed), c0, c1, c2, c3)
    lanes = keys % 4
    words = tl.where(lanes < 2, tl.where(lanes == 0, w0, w1), tl.where(lanes == 2, w2, w3))
    return _kept_words(words, dropout)


@triton.jit
def _kept_words(words, dropout):
    return tl.where((words >> 8).to(tl.int32) >= tl.cast(dropout.threshold, tl.int32), dropout.kept, 0.0)

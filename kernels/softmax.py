"""Softmax over keys that come tile by tile, and its gradient: what all families share.

Scores are in natural units and float32. A row's state is its maximum m, its sum l of exp(s - m) and its accumulator
sum_j exp(s_j - m) v_j; the log-sum-exp that the backward pass reads is m + log l. exp(x - m) is taken as
2**(x log2 e - m log2 e): one fused multiply-add and one hardware instruction; or as 2**((x - m) log2 e), one
instruction more, where scores of thousands must not cost digits.
"""

import triton
import triton.language as tl

__all__ = [
    "dropout_factors",
    "dropout_factors_at",
    "finish_rows",
    "normalise_rows",
    "score_gradients",
    "softmax_rows",
    "softmax_step",
    "start_rows",
]

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def start_rows(BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """State of rows that have seen no key: (maximum, sum, accumulator)."""
    return (
        tl.full([BLOCK_M], float("-inf"), tl.float32),
        tl.zeros([BLOCK_M], tl.float32),
        tl.zeros([BLOCK_M, BLOCK_D], tl.float32),
    )


@triton.jit
def softmax_step(state, scores, v, factors, HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr, unit=1.0):
    """Take a tile of keys in: ``scores`` (BLOCK_M, BLOCK_N), ``v`` (BLOCK_N, BLOCK_D).

    Scores and the state's maximum are in units of ``unit``, which is positive.
    """
    row_max, row_sum, context = state
    new_max = tl.maximum(row_max, tl.max(scores, 1))
    # A row of -inf alone must give zeros, not the NaN of -inf - -inf: its maximum reads 0.
    offset = tl.where(new_max == float("-inf"), 0.0, new_max)
    weights = _exp_below(scores, offset[:, None], unit, v.dtype == tl.float32)
    shrink = _exp_below(row_max, offset, unit, v.dtype == tl.float32)
    row_sum = row_sum * shrink + tl.sum(weights, 1)
    if HAS_DROPOUT:
        weights *= factors
    context = tl.dot(weights.to(v.dtype), v, context * shrink[:, None], input_precision=PRECISION)
    return (new_max, row_sum, context)


@triton.jit
def finish_rows(state, unit=1.0):
    """Context and log-sum-exp of rows that have seen all keys; 0 and -inf where every score is -inf."""
    row_max, row_sum, context = state
    lse = tl.where(row_max == float("-inf"), 0.0, row_max * unit) + tl.log(row_sum)
    return context / tl.where(row_sum == 0.0, 1.0, row_sum)[:, None], lse


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
    WHOLE: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    unit=1.0,
):
    """P as it multiplied v, dropout applied, and dS = P (dP - delta).

    ``WHOLE`` says that the rows are seen whole: P and delta are then taken from them, not from what was kept.
    """
    if WHOLE:
        weights, _, row_sum = softmax_rows(scores, unit)
        weights = normalise_rows(weights, row_sum)
    else:
        weights = probabilities(scores, lse, unit, v_rows.dtype == tl.float32)
    grad_weights = tl.dot(dout_rows, tl.trans(v_rows), input_precision=PRECISION)
    if HAS_DROPOUT:
        grad_weights *= factors
    if WHOLE:
        delta = tl.sum(weights * grad_weights, 1)
    dropped = weights
    if HAS_DROPOUT:
        dropped = weights * factors
    return dropped, weights * (grad_weights - delta[:, None])


@triton.jit
def dropout_factors(dropout, group, head, queries, first_key, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """What dropout multiplies a tile of weights by, from the numbers that every backend draws.

    ``dropout`` holds a pointer to the seed, the probability in units of 2**-24, rounded up, and the factor of a weight
    that is kept. ``first_key`` is a multiple of 4.
    """
    seed, threshold, kept = dropout
    quads = (first_key // 4 + tl.arange(0, BLOCK_N // 4))[None, :]
    c0 = tl.broadcast_to(quads, [BLOCK_M, BLOCK_N // 4]).to(tl.uint32)
    c1 = tl.broadcast_to(queries[:, None], [BLOCK_M, BLOCK_N // 4]).to(tl.uint32)
    c2 = tl.zeros_like(c0) + head.to(tl.uint32)
    c3 = tl.zeros_like(c0) + group.to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(tl.load(seed), c0, c1, c2, c3)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape([BLOCK_M, BLOCK_N])  # four neighbouring keys
    return tl.where((words >> 8).to(tl.int32) >= threshold, kept, 0.0)


@triton.jit
def dropout_factors_at(dropout, groups, head, queries, keys):
    """The same for any queries and keys, (BLOCK_M, 1) and (1, BLOCK_N), at four times the work."""
    seed, threshold, kept = dropout
    c0 = tl.zeros_like(queries + keys).to(tl.uint32) + (keys // 4).to(tl.uint32)
    c1, c2 = tl.zeros_like(c0) + queries.to(tl.uint32), tl.zeros_like(c0) + head.to(tl.uint32)
    c3 = tl.zeros_like(c0) + groups.to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(tl.load(seed), c0, c1, c2, c3)
    lanes = keys % 4
    words = tl.where(lanes < 2, tl.where(lanes == 0, w0, w1), tl.where(lanes == 2, w2, w3))
    return tl.where((words >> 8).to(tl.int32) >= threshold, kept, 0.0)

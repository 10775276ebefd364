"""Softmax attention inside groups of tokens, in plain PyTorch: what every family of ops has in common.

One group holds N tokens with queries q, keys k and values v of head dimension d. Per group and head:

    S = scale * q k^T + B + M            scores; a family says what is added, if anything
    P = softmax_j(S)                     probabilities
    L = log sum_j exp(S_ij)              log-sum-exp of a row
    R = P * keep / (1 - p)               dropout, on the probabilities, not renormalised
    O = R v                              context

A row whose scores are all -inf gives context 0 and L = -inf.

Backward, with dO the gradient of the context:

    dv = R^T dO          dR = dO v^T          dP = dR * keep / (1 - p)
    dS = P * (dP - delta)                     delta_i = sum_j P_ij dP_ij
    dq = scale * dS k    dk = scale * dS^T q

delta_i is sum_e dO_ie O_ie as well, but only without rounding. Where one key has nearly all the weight, what is left of
dP - delta is small beside both: so delta is summed over the same dP, and P, normalised by its own sum, sums to 1. A
context that was rounded in between, or a P that is rebuilt from a rounded L, leaves noise in its place; a pass that
never has a whole row at hand has no choice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vidattn.reference.philox import dropout_keep_mask

__all__ = ["accumulator_dtype", "attend", "attend_backward", "sum_by_number"]


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of scores, softmax and sums: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    first_head: int = 0,
    window_types: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend inside groups, differentiably.

    Args:
        q: queries (G, N, h, d).
        k: keys (G, N, h, d).
        v: values (G, N, h, d).
        bias: (h, N, N), (types, h, N, N) with ``window_types``, or None.
        mask: (nW, N, N) or None, added to group g as ``mask[g % nW]``.
        scale: factor of q k^T.
        dropout_p: dropout probability.
        seed: int64 tensor with one element, needed when ``dropout_p > 0``.
        first_head: number of the first of the heads, for the dropout mask.
        window_types: integers (nW,): group g takes ``bias[window_types[g % nW]]``; None where all take one.

    Returns:
        Context (G, N, h * d) and log-sum-exp (G, N, h), both in the accumulator's dtype.
    """
    with torch.autocast(q.device.type, enabled=False):
        probabilities, lse = _softmax(_scores(q, k, bias, mask, scale, window_types))
        if dropout_p > 0:
            probabilities = probabilities * _keep_factors(probabilities, dropout_p, seed, first_head)
        out = probabilities @ _by_head(v)
    return out.transpose(1, 2).flatten(2), lse.transpose(1, 2).contiguous()


def attend_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    *,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    first_head: int = 0,
    window_types: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Differentiate ``attend`` by the formulas of this module.

    Args:
        grad_out: gradient of the context (G, N, h * d).
        q: as in the forward pass; so are the four arguments after it.
        k: keys.
        v: values.
        bias: bias or None.
        mask: mask or None.
        scale: as in the forward pass; so are the arguments after it.
        dropout_p: dropout probability.
        seed: int64 tensor with one element.
        first_head: number of the first of the heads.
        window_types: which bias a group takes.

    Returns:
        Gradients of q, k, v (G, N, h, d) and of the bias (None without one), in the accumulator's dtype.
    """
    with torch.autocast(q.device.type, enabled=False):
        probabilities, _ = _softmax(_scores(q, k, bias, mask, scale, window_types))
        grad_heads = _by_head(grad_out.unflatten(-1, q.shape[2:]))
        grad_probabilities = grad_heads @ _by_head(v).transpose(-2, -1)
        dropped = probabilities
        if dropout_p > 0:
            factors = _keep_factors(probabilities, dropout_p, seed, first_head)
            dropped, grad_probabilities = probabilities * factors, grad_probabilities * factors
        delta = (probabilities * grad_probabilities).sum(-1, keepdim=True)
        grad_scores = probabilities * (grad_probabilities - delta)
        grad_v = dropped.transpose(-2, -1) @ grad_heads
        grad_q = scale * (grad_scores @ _by_head(k))
        grad_k = scale * (grad_scores.transpose(-2, -1) @ _by_head(q))
        grad_bias = None if bias is None else _over_groups(grad_scores, bias, window_types)
    return grad_q.transpose(1, 2), grad_k.transpose(1, 2), grad_v.transpose(1, 2), grad_bias


def sum_by_number(x: Tensor, numbers: Tensor, count: int) -> Tensor:
    """Sum the rows of ``x`` that have the same number, in one order.

    Args:
        x: (rows, ...).
        numbers: integers (rows,), each below ``count``.
        count: rows of the result.

    Returns:
        (count, ...), zeros where no row has the number.
    """
    total = x.new_zeros(count, *x.shape[1:])
    if x.device.type == "cpu":
        return total.index_add_(0, numbers, x)
    # The sort-based accumulation, whose order does not vary; index_add_ uses atomics there.
    return total.index_put_((numbers.long(),), x, accumulate=True)


def _by_head(x: Tensor) -> Tensor:
    """Bring (G, N, h, d) to (G, h, N, d) in the accumulator's dtype."""
    return x.transpose(1, 2).to(accumulator_dtype(x.dtype))


def _scores(
    q: Tensor, k: Tensor, bias: Tensor | None, mask: Tensor | None, scale: float, window_types: Tensor | None
) -> Tensor:
    scores = scale * (_by_head(q) @ _by_head(k).transpose(-2, -1))  # (G, h, N, N)
    if bias is not None and window_types is None:
        scores = scores + bias.to(scores.dtype)
    elif bias is not None and window_types is not None:
        scores = _add_in_turn(scores, bias.to(scores.dtype).index_select(0, window_types))
    return scores if mask is None else _add_in_turn(scores, mask.to(scores.dtype)[:, None])


def _add_in_turn(scores: Tensor, added: Tensor) -> Tensor:
    """Add row ``g % rows`` to the scores of group g."""
    return (scores.unflatten(0, (scores.shape[0] // added.shape[0], added.shape[0])) + added).flatten(0, 1)


def _over_groups(grad_scores: Tensor, bias: Tensor, window_types: Tensor | None) -> Tensor:
    """Sum the gradient of the scores over the groups that took a bias."""
    if window_types is None:
        return grad_scores.sum(0)
    count = window_types.shape[0]
    by_window = grad_scores.unflatten(0, (grad_scores.shape[0] // count, count)).sum(0)
    return sum_by_number(by_window, window_types, bias.shape[0])


def _softmax(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Give probabilities, and the log-sum-exp of each row."""
    # A row of -inf alone must give zeros and zero gradients, not the NaN of -inf - -inf: its maximum reads 0.
    row_max = scores.detach().amax(-1, keepdim=True)
    row_max = row_max.masked_fill(row_max == float("-inf"), 0.0)
    weights = (scores - row_max).exp()
    row_sum = weights.sum(-1, keepdim=True)
    lse = (row_max + row_sum.log()).squeeze(-1)
    return weights / row_sum.masked_fill(row_sum == 0, 1.0), lse


def _keep_factors(probabilities: Tensor, dropout_p: float, seed: Tensor | None, first_head: int) -> Tensor:
    if seed is None:
        raise ValueError("seed: expected an int64 tensor with one element when dropout_p > 0, got None")
    keep = dropout_keep_mask(seed, dropout_p, *probabilities.shape, first_head=first_head)
    return keep.to(probabilities.dtype) / (1.0 - dropout_p)

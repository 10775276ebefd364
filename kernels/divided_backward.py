"""The backward kernels of divided attention; divided.py launches them and says what their arguments hold.

Whole sequences in a tile need nothing of the forward pass, and one program gives all three gradients. So it is where
only the keys of a sequence fit into a tile (``WHOLE``), and its queries come tile by tile. Longer ones recompute the
probabilities from the log-sum-exp, in two kernels that own what they sum: a tile of queries its dq, a tile of keys its
dk and dv. What the cls token of a clip gets from each frame is written apart, and summed in a fixed order.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from vidattn.kernels.divided_packed import (
    attend_packed,
    is_not_finite,
    locate_packed,
    packed_factors,
    packed_offsets,
)
from vidattn.kernels.divided_tiles import (
    UNSPECIALISED,
    Kept,
    add_cls,
    first_slot,
    load_signed,
    locate,
    lse_rows,
    signed,
    slot_tokens,
    store_cls,
    tile_factors,
    tile_rows,
)
from vidattn.kernels.mixing_tiles import HeadRows, load_keys, mixed_columns, store_key_grads
from vidattn.kernels.rows import head_of, load_rows, row_offsets, store_rows
from vidattn.kernels.softmax import normalise_rows, score_gradients

__all__ = ["divided_backward_keys", "divided_backward_packed", "divided_backward_queries"]


# ---- Sequences that fit into a tile ----


@triton.jit
def _backward_sequences(
    inside,
    packed,
    q,
    k,
    v,
    dout,
    dcls,
    grads,
    dropout,
    all_heads,
    segment,
    scale,
    unit,
    SHAPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradients in the sequences whose rows are ``inside``; tell whether something in them is not finite."""
    sequence, slots = packed.sequence, packed.slots
    head, clips = sequence.head, sequence.clip
    at = slot_tokens(sequence, slots, inside, SHAPE)
    frames = (sequence.group % segment)[:, None]
    k_columns, v_columns = None, None
    if SHAPE.shifts is not None:
        k_columns = mixed_columns(frames, head, segment, k.batch, SHAPE)
        v_columns = mixed_columns(frames, head, segment, v.batch, SHAPE)
    keys = HeadRows(k.base + head * k.head, k.token, k_columns)
    values = HeadRows(v.base + head * v.head, v.token, v_columns)
    q_offsets = packed_offsets(sequence, at.tokens, q.batch, q.token)
    q_rows = load_signed(q.base + head * q.head, at.tokens, q_offsets, SHAPE)  # (BLOCK, BLOCK_D), as all rows here
    k_rows = load_keys(keys, at.tokens, packed_offsets(sequence, at.tokens, k.batch, k.token), SHAPE, True)
    v_rows = load_keys(values, at.tokens, packed_offsets(sequence, at.tokens, v.batch, v.token), SHAPE, True)
    dout_base, dout_offsets = (
        dout.base + head * SHAPE.head_dim,
        packed_offsets(sequence, at.rows, dout.batch, dout.token),
    )
    dout_rows = load_rows(dout_base, at.rows, dout_offsets, SHAPE.head_dim, SHAPE.block_d, True)
    is_cls = inside & (slots == SHAPE.length - 1)
    if SHAPE.has_cls:
        cls_base = dcls.base + head * SHAPE.head_dim
        cls_offsets = clips * dcls.batch + row_offsets(sequence.place, dcls.frame)
        of_cls = load_rows(cls_base, tl.where(is_cls, 0, -1), cls_offsets, SHAPE.head_dim, SHAPE.block_d, True)
        dout_rows = tl.where(is_cls[:, None], of_cls.to(dout_rows.dtype), dout_rows)

    attended = attend_packed(q_rows, k_rows, packed, unit, SHAPE, BLOCK)
    weights = normalise_rows(attended.weights, attended.total)  # (BLOCK, BLOCK)
    grad_weights = tl.dot(dout_rows, tl.trans(v_rows), input_precision=SHAPE.precision)
    dropped = weights
    if dropout is not None:
        factors = packed_factors(dropout, packed, SHAPE)
        dropped = weights * factors
        grad_weights *= factors
    delta = tl.sum(weights * grad_weights, 1)
    grad_scores = (weights * (grad_weights - delta[:, None])).to(q_rows.dtype)

    stored, offsets = (
        at.rows if SHAPE.has_cls else at.tokens,
        packed_offsets(sequence, at.tokens, grads.batch, grads.token),
    )
    first = head * grads.head
    v_grad = tl.dot(tl.trans(dropped.to(q_rows.dtype)), dout_rows, input_precision=SHAPE.precision)
    store_key_grads(grads.v + first, stored, offsets, v_grad, frames, head, segment, grads.batch, SHAPE)
    k_grad = tl.dot(tl.trans(grad_scores), q_rows, input_precision=SHAPE.precision) * unit  # q has the scale's sign
    store_key_grads(grads.k + first, stored, offsets, k_grad, frames, head, segment, grads.batch, SHAPE)
    q_grad = tl.dot(grad_scores, k_rows, input_precision=SHAPE.precision) * scale
    store_rows(grads.q + first, stored, offsets, q_grad, SHAPE.head_dim, SHAPE.block_d)
    if SHAPE.has_cls:
        cls_offsets = sequence.group.to(tl.int64) * (all_heads * SHAPE.head_dim) + head * SHAPE.head_dim
        store_cls(dcls.parts, cls_offsets, is_cls, q_grad, SHAPE)
        store_cls(dcls.parts + dcls.part, cls_offsets, is_cls, k_grad, SHAPE)
        store_cls(dcls.parts + 2 * dcls.part, cls_offsets, is_cls, v_grad, SHAPE)
    # q, v and dout show in delta, if nowhere else; an infinite key can have weight 0 in all rows.
    return is_not_finite(delta) | is_not_finite(k_rows)


@triton.jit(do_not_specialize=UNSPECIALISED)
def divided_backward_packed(
    q,
    k,
    v,
    dout,
    dcls,
    grads,
    dropout,
    places,
    num_groups,
    place_step,
    slot_step,
    first_head,
    heads,
    all_heads,
    segment,
    scale,
    unit,
    SHAPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradients of one head in as many whole sequences as a tile holds."""
    PER_TILE: tl.constexpr = BLOCK // SHAPE.length
    packed = locate_packed(first_head, heads, places, num_groups, place_step, slot_step, SHAPE, BLOCK)
    apart = _backward_sequences(
        packed.inside, packed, q, k, v, dout, dcls, grads, dropout, all_heads, segment, scale, unit, SHAPE, BLOCK
    )
    if PER_TILE > 1:  # noqa: SIM102
        if apart:
            tl.debug_barrier()  # what is stored now comes after what was
            for number in range(0, tl.minimum(num_groups, PER_TILE)):  # of no known length, so not unrolled
                _backward_sequences(
                    packed.inside & (packed.numbers == number), packed, q, k, v, dout, dcls, grads, dropout,
                    all_heads, segment, scale, unit, SHAPE, BLOCK,
                )  # fmt: skip


# ---- Longer sequences ----


class _Queries(NamedTuple):
    """A tile of queries: rows (BLOCK_M, BLOCK_D) of q and of the context's gradient, and what is kept of each row."""

    first: Any
    q: Any
    dout: Any
    kept: Any


@triton.jit
def _queries_tile(
    total,
    first_key,
    queries,
    keys,
    values,
    sequence,
    dropout,
    unit,
    SHAPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK: tl.constexpr,
    IS_TAIL: tl.constexpr,
):
    """Add what ``BLOCK`` keys give to dq, (BLOCK_M, BLOCK_D)."""
    k_rows = tile_rows(keys, sequence, first_key, SHAPE.has_cls, SHAPE, BLOCK, IS_TAIL)  # (BLOCK, BLOCK_D)
    v_rows = tile_rows(values, sequence, first_key, SHAPE.has_cls, SHAPE, BLOCK, IS_TAIL)
    scores = tl.dot(queries.q, tl.trans(k_rows), input_precision=SHAPE.precision)  # (BLOCK_M, BLOCK)
    if IS_TAIL:
        inside = first_key + tl.arange(0, BLOCK) < SHAPE.length
        scores = tl.where(inside[None, :], scores, float("-inf"))
    factors = None
    if dropout is not None:
        factors = tile_factors(dropout, sequence, queries.first, first_key, SHAPE, BLOCK_M, BLOCK)
    PRECISION: tl.constexpr = SHAPE.precision
    _, grad_scores = score_gradients(
        scores, queries.kept.lse, queries.kept.delta, queries.dout, v_rows, factors, PRECISION, unit
    )
    return tl.dot(grad_scores.to(k_rows.dtype), k_rows, total, input_precision=SHAPE.precision)


@triton.jit(do_not_specialize=UNSPECIALISED)
def divided_backward_queries(
    q,
    k,
    v,
    out,
    cls,
    dout,
    dcls,
    kept,
    grads,
    dropout,
    places,
    place_step,
    slot_step,
    first_head,
    heads,
    all_heads,
    num_rows,
    segment,
    scale,
    unit,
    full_tiles,
    SHAPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TAIL: tl.constexpr,
):
    """Gradient of a tile of queries of one head in one sequence, and delta = sum(dout * out) of each."""
    FULL: tl.constexpr = (SHAPE.length - SHAPE.has_cls) // BLOCK_N
    sequence = locate(first_head, heads, places, place_step, slot_step, SHAPE, BLOCK_M)
    head, group, clip = sequence.head, sequence.group, sequence.clip
    first_query = first_slot(SHAPE, BLOCK_M)
    slots = first_query + tl.arange(0, BLOCK_M)
    at = slot_tokens(sequence, slots, slots < SHAPE.length, SHAPE)
    q_rows = load_signed(
        head_of(q, clip, head), at.tokens, row_offsets(at.tokens, q.token), SHAPE
    )  # (BLOCK_M, BLOCK_D)
    out_base = out.base + clip * out.batch + head * SHAPE.head_dim
    dout_base = dout.base + clip * dout.batch + head * SHAPE.head_dim
    dout_offsets, out_offsets = row_offsets(at.rows, dout.token), row_offsets(at.rows, out.token)
    dout_rows = load_rows(dout_base, at.rows, dout_offsets, SHAPE.head_dim, SHAPE.block_d, True)
    out_rows = load_rows(out_base, at.rows, out_offsets, SHAPE.head_dim, SHAPE.block_d, True).to(tl.float32)
    cls_part = (group.to(tl.int64) * all_heads + head) * SHAPE.head_dim
    if SHAPE.has_cls:
        dcls_base = dcls.base + clip * dcls.batch + sequence.place.to(tl.int64) * dcls.frame + head * SHAPE.head_dim
        dout_rows = add_cls(dout_rows, dcls_base, slots, SHAPE)
        out_rows = add_cls(out_rows, cls + cls_part, slots, SHAPE)
    kept_rows = clip * num_rows + lse_rows(sequence, slots, at.rows, places, num_rows, SHAPE)
    kept_rows = kept_rows * all_heads + head
    q_lse = tl.load(kept.lse + kept_rows, mask=slots < SHAPE.length, other=float("inf"))
    row_delta = tl.sum(dout_rows.to(tl.float32) * out_rows, 1)
    tl.store(kept.delta + kept_rows, row_delta, mask=slots < SHAPE.length)
    queries = _Queries(first=first_query, q=q_rows, dout=dout_rows, kept=Kept(lse=q_lse, delta=row_delta))
    k_columns, v_columns = None, None
    if SHAPE.shifts is not None:
        k_columns = mixed_columns(group % segment, head, segment, k.batch, SHAPE)
        v_columns = mixed_columns(group % segment, head, segment, v.batch, SHAPE)
    keys = HeadRows(head_of(k, clip, head), k.token, k_columns)
    values = HeadRows(head_of(v, clip, head), v.token, v_columns)

    BLOCK_D: tl.constexpr = SHAPE.block_d
    total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if FULL > 0:
        tl.assume(full_tiles > 0)
        for step in tl.range(0, full_tiles):
            total = _queries_tile(
                total, step * BLOCK_N, queries, keys, values, sequence, dropout, unit, SHAPE, BLOCK_M, BLOCK_N, False
            )
    if TAIL:
        total = _queries_tile(
            total, FULL * BLOCK_N, queries, keys, values, sequence, dropout, unit, SHAPE, BLOCK_M, TAIL, True
        )

    total *= scale
    stored, offsets = at.rows if SHAPE.has_cls else at.tokens, row_offsets(at.tokens, grads.token)
    dq_base = grads.q + clip * grads.batch + head * grads.head
    store_rows(dq_base, stored, offsets, total, SHAPE.head_dim, SHAPE.block_d)
    if SHAPE.has_cls:  # noqa: SIM102  # decided when it is compiled, the inner one by the program
        if first_query + BLOCK_M >= SHAPE.length:
            store_cls(dcls.parts + cls_part, slots * 0, slots == SHAPE.length - 1, total, SHAPE)


class _Keys(NamedTuple):
    """A tile of keys: rows (BLOCK_N, BLOCK_D) of k and v."""

    first: Any
    k: Any
    v: Any


class _KeyGrads(NamedTuple):
    """Gradients of a tile of keys, (BLOCK_N, BLOCK_D)."""

    k: Any
    v: Any


class _QuerySources(NamedTuple):
    """Where the queries of a head and sequence come from, and their gradients go.

    Attributes:
        q: their rows.
        dout: rows of the context's gradient.
        dcls: pointer to that of the cls token; None without one.
        kept: what is kept of them; None where a program sees their rows of scores whole, and gives dq.
        dq: rows of dq; None where another kernel gives it.
        cls_part: pointer to the part of dq that the cls token gets from this frame; None without either.
    """

    q: Any
    dout: Any
    dcls: Any
    kept: Any
    dq: Any
    cls_part: Any


@triton.jit
def _keys_tile(
    sums,
    first_query,
    queries,
    keys,
    sequence,
    dropout,
    places,
    all_heads,
    num_rows,
    unit,
    SHAPE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    IS_TAIL: tl.constexpr,
):
    """Add what ``BLOCK`` queries give to dk and dv; store their dq where it is complete."""
    q_lse, delta = None, None
    slots = first_query + tl.arange(0, BLOCK)
    # Rows that only fill up the tile weigh nothing.
    q_rows = tile_rows(queries.q, sequence, first_query, SHAPE.has_cls, SHAPE, BLOCK, IS_TAIL)  # (BLOCK, BLOCK_D)
    if IS_TAIL:
        at = slot_tokens(sequence, slots, slots < SHAPE.length, SHAPE)
        tokens, rows = at.tokens, at.rows
        dout_offsets = row_offsets(rows, queries.dout.token)
        dout_rows = load_keys(queries.dout, rows, dout_offsets, SHAPE, True)
        if SHAPE.has_cls:
            dout_rows = add_cls(dout_rows, queries.dcls, slots, SHAPE)
        if queries.kept is not None:
            kept_rows = row_offsets(lse_rows(sequence, slots, rows, places, num_rows, SHAPE), all_heads)
            q_lse = tl.load(queries.kept.lse + kept_rows, mask=slots < SHAPE.length, other=float("inf"))
            delta = tl.load(queries.kept.delta + kept_rows, mask=slots < SHAPE.length, other=0.0)
    else:
        rows = sequence.place * sequence.place_step + slots * sequence.slot_step
        tokens = rows + SHAPE.has_cls
        dout_rows = tile_rows(queries.dout, sequence, first_query, 0, SHAPE, BLOCK, False)
        if queries.kept is not None:
            kept_rows = row_offsets(rows, all_heads)
            q_lse, delta = tl.load(queries.kept.lse + kept_rows), tl.load(queries.kept.delta + kept_rows)
    scores = tl.dot(q_rows, tl.trans(keys.k), input_precision=SHAPE.precision)  # (BLOCK, BLOCK_N)
    if queries.kept is None and SHAPE.length != BLOCK_N:
        scores = tl.where((tl.arange(0, BLOCK_N) < SHAPE.length)[None, :], scores, float("-inf"))
    factors = None
    if dropout is not None:
        factors = tile_factors(dropout, sequence, first_query, keys.first, SHAPE, BLOCK, BLOCK_N)
    PRECISION: tl.constexpr = SHAPE.precision
    dropped, grad_scores = score_gradients(scores, q_lse, delta, dout_rows, keys.v, factors, PRECISION, unit)
    if queries.kept is None:
        dq = tl.dot(grad_scores.to(keys.k.dtype), keys.k, input_precision=SHAPE.precision) * unit  # k has the sign
        stored = rows if SHAPE.has_cls else tokens
        store_rows(queries.dq.base, stored, row_offsets(tokens, queries.dq.token), dq, SHAPE.head_dim, SHAPE.block_d)
        if SHAPE.has_cls and IS_TAIL:
            store_cls(queries.cls_part, slots * 0, slots == SHAPE.length - 1, dq, SHAPE)
    dv = tl.dot(tl.trans(dropped.to(dout_rows.dtype)), dout_rows, sums.v, input_precision=SHAPE.precision)
    dk = tl.dot(tl.trans(grad_scores.to(q_rows.dtype)), q_rows, sums.k, input_precision=SHAPE.precision)
    return _KeyGrads(k=dk, v=dv)


@triton.jit(do_not_specialize=UNSPECIALISED)
def divided_backward_keys(
    q,
    k,
    v,
    dout,
    dcls,
    kept,
    grads,
    dropout,
    places,
    place_step,
    slot_step,
    first_head,
    heads,
    all_heads,
    num_rows,
    segment,
    scale,
    unit,
    full_tiles,
    SHAPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TAIL: tl.constexpr,
):
    """Gradients of a tile of keys and values of one head in one sequence; if it holds all keys, of the queries too."""
    tl.static_assert(SHAPE.length <= BLOCK_N or kept is not None)
    FULL: tl.constexpr = (SHAPE.length - SHAPE.has_cls) // BLOCK_M
    sequence = locate(first_head, heads, places, place_step, slot_step, SHAPE, BLOCK_N)
    head, group, clip = sequence.head, sequence.group, sequence.clip
    first_key = first_slot(SHAPE, BLOCK_N)
    slots = first_key + tl.arange(0, BLOCK_N)
    at = slot_tokens(sequence, slots, slots < SHAPE.length, SHAPE)
    frame = group % segment
    k_columns, v_columns = None, None
    if SHAPE.shifts is not None:
        k_columns = mixed_columns(frame, head, segment, k.batch, SHAPE)
        v_columns = mixed_columns(frame, head, segment, v.batch, SHAPE)
    k_rows = load_keys(
        HeadRows(head_of(k, clip, head), k.token, k_columns), at.tokens, row_offsets(at.tokens, k.token), SHAPE, True
    )  # (BLOCK_N, BLOCK_D)
    v_rows = load_keys(
        HeadRows(head_of(v, clip, head), v.token, v_columns), at.tokens, row_offsets(at.tokens, v.token), SHAPE, True
    )
    keys = _Keys(first=first_key, k=signed(k_rows, SHAPE), v=v_rows)
    first_grad = clip * grads.batch + head * grads.head
    cls_part = (group.to(tl.int64) * all_heads + head) * SHAPE.head_dim
    dcls_base, kept_bases, dq, dq_part = None, None, None, None
    if SHAPE.has_cls:
        dcls_base = dcls.base + clip * dcls.batch + sequence.place.to(tl.int64) * dcls.frame + head * SHAPE.head_dim
    if kept is not None:
        first_row = clip * num_rows * all_heads + head
        kept_bases = Kept(lse=kept.lse + first_row, delta=kept.delta + first_row)
    else:
        dq = HeadRows(grads.q + first_grad, grads.token, None)
        if SHAPE.has_cls:
            dq_part = dcls.parts + cls_part
    queries = _QuerySources(
        q=HeadRows(head_of(q, clip, head), q.token, None),
        dout=HeadRows(dout.base + clip * dout.batch + head * SHAPE.head_dim, dout.token, None),
        dcls=dcls_base,
        kept=kept_bases,
        dq=dq,
        cls_part=dq_part,
    )

    BLOCK_D: tl.constexpr = SHAPE.block_d
    zeros = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    sums = _KeyGrads(k=zeros, v=zeros)
    if FULL > 0:
        tl.assume(full_tiles > 0)
        for step in tl.range(0, full_tiles):
            sums = _keys_tile(
                sums, step * BLOCK_M, queries, keys, sequence, dropout, places, all_heads, num_rows, unit,
                SHAPE, BLOCK_M, BLOCK_N, False,
            )  # fmt: skip
    if TAIL:
        sums = _keys_tile(
            sums, FULL * BLOCK_M, queries, keys, sequence, dropout, places, all_heads, num_rows, unit,
            SHAPE, TAIL, BLOCK_N, True,
        )  # fmt: skip

    k_grad, v_grad = sums.k * scale, sums.v
    stored, offsets = at.rows if SHAPE.has_cls else at.tokens, row_offsets(at.tokens, grads.token)
    store_key_grads(grads.k + first_grad, stored, offsets, k_grad, frame, head, segment, grads.batch, SHAPE)
    store_key_grads(grads.v + first_grad, stored, offsets, v_grad, frame, head, segment, grads.batch, SHAPE)
    if SHAPE.has_cls:  # noqa: SIM102
        if first_key + BLOCK_N >= SHAPE.length:
            part = dcls.parts + cls_part
            store_cls(part + dcls.part, slots * 0, slots == SHAPE.length - 1, k_grad, SHAPE)
            store_cls(part + 2 * dcls.part, slots * 0, slots == SHAPE.length - 1, v_grad, SHAPE)

"""The backward kernels of divided attention; divided.py launches them and says what their arguments hold.

Whole sequences in a tile need nothing of the forward pass, and one program gives all three gradients. So it is where
only the keys of a sequence fit into a tile (``WHOLE``), and its queries come tile by tile. Longer ones recompute the
probabilities from the log-sum-exp, in two kernels that own what they sum: a tile of queries its dq, a tile of keys its
dk and dv. What the cls token of a clip gets from each frame is written apart, and summed in a fixed order.
"""

import triton
import triton.language as tl

from vidattn.kernels.divided_packed import attend_packed, is_not_finite, locate_packed
from vidattn.kernels.divided_tiles import (
    add_cls,
    load_signed,
    locate,
    lse_rows,
    signed,
    slot_tokens,
    store_cls,
    tile_factors,
    tile_keys,
    tile_rows,
)
from vidattn.kernels.mixing_tiles import load_keys, mixed_columns, store_key_grads
from vidattn.kernels.rows import load_rows, row_offsets, store_rows
from vidattn.kernels.softmax import normalise_rows, score_gradients

__all__ = ["divided_backward_keys", "divided_backward_packed", "divided_backward_queries"]


# ---- Sequences that fit into a tile ----


@triton.jit
def _backward_sequences(
    inside,
    located,
    pointers,
    strides,
    grad_strides,
    steps,
    counts,
    dropout,
    scale,
    unit,
    LENGTH: tl.constexpr,
    CLS: tl.constexpr,
    SHIFTS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    SIGN: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients in the sequences whose rows are ``inside``; tell whether something in them is not finite."""
    head, groups, places_of, slots, sequences, _ = located
    q, k, v, dout, dcls, dq, dk, dv, cls_parts = pointers
    q_batch, q_token, k_batch, k_token, v_batch, v_token, dout_batch, dout_token, dcls_batch, dcls_frame = strides
    grad_batch, grad_token, part_size = grad_strides
    places, all_heads, segment = counts
    clips = (groups // places).to(tl.int64)
    tokens, rows = slot_tokens(slots, places_of, inside, steps, LENGTH, CLS)
    k_offsets = clips * k_batch + row_offsets(tokens, k_token)
    v_offsets = clips * v_batch + row_offsets(tokens, v_token)
    dout_offsets = clips * dout_batch + row_offsets(rows, dout_token)
    q_rows = load_signed(q, tokens, clips * q_batch + row_offsets(tokens, q_token), HEAD_DIM, BLOCK_D, SIGN)
    frames = (groups % segment)[:, None]
    k_columns = mixed_columns(frames, head, segment, k_batch, SHIFTS, HEAD_DIM, BLOCK_D)
    v_columns = mixed_columns(frames, head, segment, v_batch, SHIFTS, HEAD_DIM, BLOCK_D)
    k_rows = load_keys(k, tokens, k_offsets, k_columns, SHIFTS, HEAD_DIM, BLOCK_D, True)
    v_rows = load_keys(v, tokens, v_offsets, v_columns, SHIFTS, HEAD_DIM, BLOCK_D, True)
    dout_rows = load_rows(dout, rows, dout_offsets, dout, HEAD_DIM, BLOCK_D, True, False)
    is_cls = inside & (slots == LENGTH - 1)
    if CLS:
        cls_offsets = clips * dcls_batch + row_offsets(places_of, dcls_frame)
        cls_rows = load_rows(dcls, tl.where(is_cls, 0, -1), cls_offsets, dcls, HEAD_DIM, BLOCK_D, True, False)
        dout_rows = tl.where(is_cls[:, None], cls_rows.to(dout_rows.dtype), dout_rows)

    weights, _, row_sum, factors = attend_packed(
        q_rows, k_rows, sequences, slots, groups, head, dropout, unit, LENGTH, CLS, BLOCK, HAS_DROPOUT, PRECISION
    )
    weights = normalise_rows(weights, row_sum)
    grad_weights = tl.dot(dout_rows, tl.trans(v_rows), input_precision=PRECISION)
    dropped = weights
    if HAS_DROPOUT:
        dropped = weights * factors
        grad_weights *= factors
    delta = tl.sum(weights * grad_weights, 1)
    grad_scores = (weights * (grad_weights - delta[:, None])).to(q_rows.dtype)

    stored, offsets = rows if CLS else tokens, clips * grad_batch + row_offsets(tokens, grad_token)
    cls_offsets = groups.to(tl.int64) * (all_heads * HEAD_DIM) + head * HEAD_DIM
    v_grad = tl.dot(tl.trans(dropped.to(q_rows.dtype)), dout_rows, input_precision=PRECISION)
    store_key_grads(dv, stored, offsets, v_grad, frames, head, segment, grad_batch, SHIFTS, HEAD_DIM, BLOCK_D)
    k_grad = tl.dot(tl.trans(grad_scores), q_rows, input_precision=PRECISION) * unit  # q has the sign of the scale
    store_key_grads(dk, stored, offsets, k_grad, frames, head, segment, grad_batch, SHIFTS, HEAD_DIM, BLOCK_D)
    q_grad = tl.dot(grad_scores, k_rows, input_precision=PRECISION) * scale
    store_rows(dq, stored, offsets, q_grad, HEAD_DIM, BLOCK_D)
    if CLS:
        store_cls(cls_parts, cls_offsets, is_cls, q_grad, HEAD_DIM, BLOCK_D)
        store_cls(cls_parts + part_size, cls_offsets, is_cls, k_grad, HEAD_DIM, BLOCK_D)
        store_cls(cls_parts + 2 * part_size, cls_offsets, is_cls, v_grad, HEAD_DIM, BLOCK_D)
    # q, v and dout show in delta, if nowhere else; an infinite key can have weight 0 in all rows.
    return is_not_finite(delta) | is_not_finite(k_rows)


@triton.jit(
    do_not_specialize=[
        "places", "num_groups", "place_step", "slot_step", "first_head", "heads", "all_heads", "segment",
        "threshold",
    ]
)  # fmt: skip
def divided_backward_packed(
    q,
    k,
    v,
    seed,
    dout,
    dcls,
    dq,
    dk,
    dv,
    cls_parts,
    q_batch,
    q_token,
    q_head,
    k_batch,
    k_token,
    k_head,
    v_batch,
    v_token,
    v_head,
    dout_batch,
    dout_token,
    dcls_batch,
    dcls_frame,
    grad_batch,
    grad_token,
    grad_head,
    part_size,
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
    threshold,
    kept,
    LENGTH: tl.constexpr,
    CLS: tl.constexpr,
    SHIFTS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    SIGN: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of one head in as many whole sequences as a tile holds."""
    PER_TILE: tl.constexpr = BLOCK // LENGTH
    located = locate_packed(first_head, heads, places, num_groups, LENGTH, BLOCK)
    head, sequences, inside = located[0], located[4], located[5]
    if not CLS:
        dcls, cls_parts = dout, dq  # never touched; older Triton takes no None in a tuple
    pointers = (
        q + head * q_head, k + head * k_head, v + head * v_head, dout + head * HEAD_DIM, dcls + head * HEAD_DIM,
        dq + head * grad_head, dk + head * grad_head, dv + head * grad_head, cls_parts,
    )  # fmt: skip
    strides = (
        q_batch, q_token, k_batch, k_token, v_batch, v_token, dout_batch, dout_token, dcls_batch, dcls_frame
    )  # fmt: skip
    grad_strides, steps = (grad_batch, grad_token, part_size), (place_step, slot_step)
    counts = (places, all_heads, segment)
    dropout = (seed if HAS_DROPOUT else 0, threshold, kept)
    apart = _backward_sequences(
        inside, located, pointers, strides, grad_strides, steps, counts, dropout, scale, unit,
        LENGTH, CLS, SHIFTS, HEAD_DIM, BLOCK_D, BLOCK, SIGN, HAS_DROPOUT, PRECISION,
    )  # fmt: skip
    if PER_TILE > 1:  # noqa: SIM102
        if apart:
            tl.debug_barrier()  # what is stored now comes after what was
            for sequence in range(0, tl.minimum(num_groups, PER_TILE)):  # of no known length, so not unrolled
                _backward_sequences(
                    inside & (sequences == sequence), located, pointers, strides, grad_strides, steps, counts,
                    dropout, scale, unit, LENGTH, CLS, SHIFTS, HEAD_DIM, BLOCK_D, BLOCK, SIGN, HAS_DROPOUT, PRECISION,
                )  # fmt: skip


# ---- Longer sequences ----


@triton.jit
def _queries_tile(
    total,
    first_key,
    queries,
    keys,
    dropout,
    first_query,
    unit,
    LENGTH: tl.constexpr,
    CLS: tl.constexpr,
    SHIFTS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK: tl.constexpr,
    IS_TAIL: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add what ``BLOCK`` keys give to dq."""
    group, head, place, steps, q_rows, dout_rows, q_lse, delta = queries
    k_base, v_base, k_token, v_token, k_columns, v_columns = keys
    k_rows = tile_keys(
        k_base, first_key, place, steps, k_token, k_columns, LENGTH, CLS, SHIFTS, HEAD_DIM, BLOCK_D, BLOCK, IS_TAIL
    )
    v_rows = tile_keys(
        v_base, first_key, place, steps, v_token, v_columns, LENGTH, CLS, SHIFTS, HEAD_DIM, BLOCK_D, BLOCK, IS_TAIL
    )
    scores = tl.dot(q_rows, tl.trans(k_rows), input_precision=PRECISION)
    if IS_TAIL:
        inside = first_key + tl.arange(0, BLOCK) < LENGTH
        scores = tl.where(inside[None, :], scores, float("-inf"))
    factors = 1.0
    if HAS_DROPOUT:
        factors = tile_factors(dropout, group, head, first_query, first_key, LENGTH, CLS, BLOCK_M, BLOCK)
    _, grad_scores = score_gradients(
        scores, q_lse, delta, dout_rows, v_rows, factors, False, HAS_DROPOUT, PRECISION, unit
    )
    return tl.dot(grad_scores.to(k_rows.dtype), k_rows, total, input_precision=PRECISION)


@triton.jit(
    do_not_specialize=[
        "places", "place_step", "slot_step", "first_head", "heads", "all_heads", "num_rows", "segment", "threshold",
        "full_tiles",
    ]
)  # fmt: skip
def divided_backward_queries(
    q,
    k,
    v,
    seed,
    out,
    cls,
    lse,
    dout,
    dcls,
    delta,
    dq,
    cls_parts,
    q_batch,
    q_token,
    q_head,
    k_batch,
    k_token,
    k_head,
    v_batch,
    v_token,
    v_head,
    out_batch,
    out_token,
    dout_batch,
    dout_token,
    dcls_batch,
    dcls_frame,
    grad_batch,
    grad_token,
    grad_head,
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
    threshold,
    kept,
    full_tiles,
    LENGTH: tl.constexpr,
    CLS: tl.constexpr,
    SHIFTS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TAIL: tl.constexpr,
    SIGN: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradient of a tile of queries of one head in one sequence, and delta = sum(dout * out) of each."""
    tile, head, group, clip, place = locate(first_head, heads, places, LENGTH, BLOCK_M)
    steps = (place_step, slot_step)
    first_query = tile * BLOCK_M
    slots = first_query + tl.arange(0, BLOCK_M)
    tokens, rows = slot_tokens(slots, place, slots < LENGTH, steps, LENGTH, CLS)
    q_base = q + clip * q_batch + head * q_head
    out_base, dout_base = out + clip * out_batch + head * HEAD_DIM, dout + clip * dout_batch + head * HEAD_DIM
    q_rows = load_signed(q_base, tokens, row_offsets(tokens, q_token), HEAD_DIM, BLOCK_D, SIGN)
    dout_rows = load_rows(dout_base, rows, row_offsets(rows, dout_token), q, HEAD_DIM, BLOCK_D, True, False)
    out_rows = load_rows(out_base, rows, row_offsets(rows, out_token), q, HEAD_DIM, BLOCK_D, True, False).to(tl.float32)
    cls_part = (group.to(tl.int64) * all_heads + head) * HEAD_DIM
    cls_row = 0
    if CLS:
        dcls_base = dcls + clip * dcls_batch + place.to(tl.int64) * dcls_frame + head * HEAD_DIM
        dout_rows = add_cls(dout_rows, dcls_base, slots, HEAD_DIM, BLOCK_D, LENGTH)
        out_rows = add_cls(out_rows, cls + cls_part, slots, HEAD_DIM, BLOCK_D, LENGTH)
        cls_row = num_rows - places
    kept_rows = (clip * num_rows + lse_rows(slots, place, rows, cls_row, LENGTH, CLS)) * all_heads + head
    q_lse = tl.load(lse + kept_rows, mask=slots < LENGTH, other=float("inf"))
    row_delta = tl.sum(dout_rows.to(tl.float32) * out_rows, 1)
    tl.store(delta + kept_rows, row_delta, mask=slots < LENGTH)
    k_base, v_base = k + clip * k_batch + head * k_head, v + clip * v_batch + head * v_head
    k_columns = mixed_columns(group % segment, head, segment, k_batch, SHIFTS, HEAD_DIM, BLOCK_D)
    v_columns = mixed_columns(group % segment, head, segment, v_batch, SHIFTS, HEAD_DIM, BLOCK_D)
    queries = (group, head, place, steps, q_rows, dout_rows, q_lse, row_delta)
    keys = (k_base, v_base, k_token, v_token, k_columns, v_columns)
    dropout = (seed, threshold, kept)

    total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for step in tl.range(0, full_tiles):
        total = _queries_tile(
            total, step * BLOCK_N, queries, keys, dropout, first_query, unit,
            LENGTH, CLS, SHIFTS, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, False, HAS_DROPOUT, PRECISION,
        )  # fmt: skip
    if TAIL:
        total = _queries_tile(
            total, full_tiles * BLOCK_N, queries, keys, dropout, first_query, unit,
            LENGTH, CLS, SHIFTS, HEAD_DIM, BLOCK_D, BLOCK_M, TAIL, True, HAS_DROPOUT, PRECISION,
        )  # fmt: skip

    total *= scale
    stored = rows if CLS else tokens
    store_rows(
        dq + clip * grad_batch + head * grad_head, stored, row_offsets(tokens, grad_token), total, HEAD_DIM, BLOCK_D
    )
    if CLS:  # noqa: SIM102  # decided when it is compiled, the inner one by the program
        if first_query + BLOCK_M >= LENGTH:
            store_cls(cls_parts + cls_part, slots * 0, slots == LENGTH - 1, total, HEAD_DIM, BLOCK_D)


@triton.jit
def _keys_tile(
    sums,
    first_query,
    inputs,
    dropout,
    first_key,
    unit,
    LENGTH: tl.constexpr,
    CLS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    IS_TAIL: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    WHOLE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add what ``BLOCK`` queries give to dk and dv; store their dq where it is complete."""
    group, head, place, steps, k_rows, v_rows, q_base, dout_base, dcls_base, kept, found, strides = inputs
    q_token, dout_token, all_heads, cls_row, grad_token = strides
    lse_base, delta_base = kept
    dk, dv = sums
    q_lse, delta = 0.0, 0.0
    slots = first_query + tl.arange(0, BLOCK)
    if IS_TAIL:  # rows that only fill up the tile weigh nothing
        tokens, rows = slot_tokens(slots, place, slots < LENGTH, steps, LENGTH, CLS)
        q_rows = load_rows(q_base, tokens, row_offsets(tokens, q_token), q_base, HEAD_DIM, BLOCK_D, True, False)
        dout_rows = load_rows(dout_base, rows, row_offsets(rows, dout_token), q_base, HEAD_DIM, BLOCK_D, True, False)
        if CLS:
            dout_rows = add_cls(dout_rows, dcls_base, slots, HEAD_DIM, BLOCK_D, LENGTH)
        if not WHOLE:
            kept_rows = row_offsets(lse_rows(slots, place, rows, cls_row, LENGTH, CLS), all_heads)
            q_lse = tl.load(lse_base + kept_rows, mask=slots < LENGTH, other=float("inf"))
            delta = tl.load(delta_base + kept_rows, mask=slots < LENGTH, other=0.0)
    else:
        rows = place * steps[0] + slots * steps[1]
        tokens = rows + CLS
        q_rows = tile_rows(q_base, first_query, place, steps, q_token, LENGTH, CLS, HEAD_DIM, BLOCK_D, BLOCK)
        dout_rows = tile_rows(dout_base, first_query, place, steps, dout_token, LENGTH, 0, HEAD_DIM, BLOCK_D, BLOCK)
        if not WHOLE:
            kept_rows = row_offsets(rows, all_heads)
            q_lse, delta = tl.load(lse_base + kept_rows), tl.load(delta_base + kept_rows)
    scores = tl.dot(q_rows, tl.trans(k_rows), input_precision=PRECISION)
    if WHOLE and BLOCK_N != LENGTH:
        scores = tl.where((tl.arange(0, BLOCK_N) < LENGTH)[None, :], scores, float("-inf"))
    factors = 1.0
    if HAS_DROPOUT:
        factors = tile_factors(dropout, group, head, first_query, first_key, LENGTH, CLS, BLOCK, BLOCK_N)
    dropped, grad_scores = score_gradients(
        scores, q_lse, delta, dout_rows, v_rows, factors, WHOLE, HAS_DROPOUT, PRECISION, unit
    )
    if WHOLE:
        dq_base, cls_part = found
        dq = tl.dot(grad_scores.to(k_rows.dtype), k_rows, input_precision=PRECISION) * unit  # k has the scale's sign
        stored = rows if CLS else tokens
        store_rows(dq_base, stored, row_offsets(tokens, grad_token), dq, HEAD_DIM, BLOCK_D)
        if CLS and IS_TAIL:
            store_cls(cls_part, slots * 0, slots == LENGTH - 1, dq, HEAD_DIM, BLOCK_D)
    dv = tl.dot(tl.trans(dropped.to(dout_rows.dtype)), dout_rows, dv, input_precision=PRECISION)
    dk = tl.dot(tl.trans(grad_scores.to(q_rows.dtype)), q_rows, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(
    do_not_specialize=[
        "places", "place_step", "slot_step", "first_head", "heads", "all_heads", "num_rows", "segment", "threshold",
        "full_tiles",
    ]
)  # fmt: skip
def divided_backward_keys(
    q,
    k,
    v,
    seed,
    lse,
    dout,
    dcls,
    delta,
    dq,
    dk,
    dv,
    cls_parts,
    q_batch,
    q_token,
    q_head,
    k_batch,
    k_token,
    k_head,
    v_batch,
    v_token,
    v_head,
    dout_batch,
    dout_token,
    dcls_batch,
    dcls_frame,
    grad_batch,
    grad_token,
    grad_head,
    part_size,
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
    threshold,
    kept,
    full_tiles,
    LENGTH: tl.constexpr,
    CLS: tl.constexpr,
    SHIFTS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TAIL: tl.constexpr,
    SIGN: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    WHOLE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of a tile of keys and values of one head in one sequence; if it holds all keys, of the queries too."""
    tile, head, group, clip, place = locate(first_head, heads, places, LENGTH, BLOCK_N)
    steps = (place_step, slot_step)
    first_key = tile * BLOCK_N
    tl.static_assert(BLOCK_N >= LENGTH or not WHOLE)
    slots = first_key + tl.arange(0, BLOCK_N)
    tokens, rows = slot_tokens(slots, place, slots < LENGTH, steps, LENGTH, CLS)
    k_base, v_base = k + clip * k_batch + head * k_head, v + clip * v_batch + head * v_head
    frame = group % segment
    k_columns = mixed_columns(frame, head, segment, k_batch, SHIFTS, HEAD_DIM, BLOCK_D)
    v_columns = mixed_columns(frame, head, segment, v_batch, SHIFTS, HEAD_DIM, BLOCK_D)
    k_rows = load_keys(k_base, tokens, row_offsets(tokens, k_token), k_columns, SHIFTS, HEAD_DIM, BLOCK_D, True)
    k_rows = signed(k_rows, SIGN)
    v_rows = load_keys(v_base, tokens, row_offsets(tokens, v_token), v_columns, SHIFTS, HEAD_DIM, BLOCK_D, True)
    q_base, dout_base = q + clip * q_batch + head * q_head, dout + clip * dout_batch + head * HEAD_DIM
    first_row = clip * num_rows * all_heads + head
    dcls_base, cls_row = q_base, 0
    if CLS:
        dcls_base = dcls + clip * dcls_batch + place.to(tl.int64) * dcls_frame + head * HEAD_DIM
        cls_row = num_rows - places
    kept_of_rows, found = (q_base, q_base), (q_base, q_base)  # never touched; older Triton takes no None in a tuple
    if WHOLE:
        found = (dq + clip * grad_batch + head * grad_head, q_base)
        if CLS:
            found = (found[0], cls_parts + (group.to(tl.int64) * all_heads + head) * HEAD_DIM)
    else:
        kept_of_rows = (lse + first_row, delta + first_row)
    strides = (q_token, dout_token, all_heads, cls_row, grad_token)
    inputs = (
        group, head, place, steps, k_rows, v_rows, q_base, dout_base, dcls_base, kept_of_rows, found, strides
    )  # fmt: skip
    dropout = (seed, threshold, kept)

    sums = (tl.zeros([BLOCK_N, BLOCK_D], tl.float32), tl.zeros([BLOCK_N, BLOCK_D], tl.float32))
    for step in tl.range(0, full_tiles):
        sums = _keys_tile(
            sums, step * BLOCK_M, inputs, dropout, first_key, unit,
            LENGTH, CLS, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, False, HAS_DROPOUT, WHOLE, PRECISION,
        )  # fmt: skip
    if TAIL:
        sums = _keys_tile(
            sums, full_tiles * BLOCK_M, inputs, dropout, first_key, unit,
            LENGTH, CLS, HEAD_DIM, BLOCK_D, TAIL, BLOCK_N, True, HAS_DROPOUT, WHOLE, PRECISION,
        )  # fmt: skip

    k_grad, v_grad = sums[0] * scale, sums[1]
    stored, offsets = rows if CLS else tokens, row_offsets(tokens, grad_token)
    first_grad = clip * grad_batch + head * grad_head
    store_key_grads(
        dk + first_grad, stored, offsets, k_grad, frame, head, segment, grad_batch, SHIFTS, HEAD_DIM, BLOCK_D
    )
    store_key_grads(
        dv + first_grad, stored, offsets, v_grad, frame, head, segment, grad_batch, SHIFTS, HEAD_DIM, BLOCK_D
    )
    if CLS:  # noqa: SIM102
        if first_key + BLOCK_N >= LENGTH:
            part = cls_parts + (group.to(tl.int64) * all_heads + head) * HEAD_DIM
            store_cls(part + part_size, slots * 0, slots == LENGTH - 1, k_grad, HEAD_DIM, BLOCK_D)
            store_cls(part + 2 * part_size, slots * 0, slots == LENGTH - 1, v_grad, HEAD_DIM, BLOCK_D)

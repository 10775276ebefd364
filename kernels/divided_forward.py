"""The forward kernels of divided attention; divided.py launches them and says what their arguments hold."""

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
    first_slot,
    load_signed,
    locate,
    lse_rows,
    slot_tokens,
    store_cls,
    tile_factors,
    tile_rows,
)
from vidattn.kernels.mixing_tiles import HeadRows, load_keys, mixed_columns
from vidattn.kernels.rows import head_of, row_offsets, store_rows
from vidattn.kernels.softmax import finish_rows, softmax_step, start_rows

__all__ = ["divided_forward_packed", "divided_forward_stream"]


# ---- Sequences that fit into a tile ----


@triton.jit
def _forward_sequences(
    inside,
    packed,
    q,
    k,
    v,
    out,
    cls,
    lse,
    dropout,
    places,
    all_heads,
    num_rows,
    segment,
    unit,
    SHAPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Attend in the sequences whose rows are ``inside``; tell whether their results are not finite."""
    sequence, slots = packed.sequence, packed.slots
    head = sequence.head
    at = slot_tokens(sequence, slots, inside, SHAPE)
    k_columns, v_columns = None, None
    if SHAPE.shifts is not None:
        frames = (sequence.group % segment)[:, None]
        k_columns = mixed_columns(frames, head, segment, k.batch, SHAPE)
        v_columns = mixed_columns(frames, head, segment, v.batch, SHAPE)
    keys = HeadRows(k.base + head * k.head, k.token, k_columns)
    values = HeadRows(v.base + head * v.head, v.token, v_columns)
    q_offsets = packed_offsets(sequence, at.tokens, q.batch, q.token)
    q_rows = load_signed(q.base + head * q.head, at.tokens, q_offsets, SHAPE)  # (BLOCK, BLOCK_D)
    k_rows = load_keys(keys, at.tokens, packed_offsets(sequence, at.tokens, k.batch, k.token), SHAPE, True)
    v_rows = load_keys(values, at.tokens, packed_offsets(sequence, at.tokens, v.batch, v.token), SHAPE, True)
    attended = attend_packed(q_rows, k_rows, packed, unit, SHAPE, BLOCK)
    weights = attended.weights  # (BLOCK, BLOCK)
    if dropout is not None:
        weights *= packed_factors(dropout, packed, SHAPE)
    context = tl.dot(weights.to(v_rows.dtype), v_rows, input_precision=SHAPE.precision)  # (BLOCK, BLOCK_D)
    context = context / tl.where(attended.total == 0.0, 1.0, attended.total)[:, None]

    out_base = out.base + head * SHAPE.head_dim
    store_rows(
        out_base,
        at.rows,
        packed_offsets(sequence, at.rows, out.batch, out.token),
        context,
        SHAPE.head_dim,
        SHAPE.block_d,
    )
    if SHAPE.has_cls:
        offsets = sequence.group.to(tl.int64) * (all_heads * SHAPE.head_dim) + head * SHAPE.head_dim
        store_cls(cls, offsets, inside & (slots == SHAPE.length - 1), context, SHAPE)
    if lse is not None:
        kept_rows = sequence.clip * num_rows + lse_rows(sequence, slots, at.rows, places, num_rows, SHAPE)
        row_lse = tl.where(attended.maximum == float("-inf"), 0.0, attended.maximum * unit) + tl.log(attended.total)
        tl.store(lse + kept_rows * all_heads + head, row_lse, mask=inside)
    return is_not_finite(context)


@triton.jit(do_not_specialize=UNSPECIALISED)
def divided_forward_packed(
    q,
    k,
    v,
    out,
    cls,
    lse,
    dropout,
    places,
    num_groups,
    place_step,
    slot_step,
    first_head,
    heads,
    all_heads,
    num_rows,
    segment,
    unit,
    SHAPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Attend with one head in as many whole sequences as a tile holds."""
    PER_TILE: tl.constexpr = BLOCK // SHAPE.length
    packed = locate_packed(first_head, heads, places, num_groups, place_step, slot_step, SHAPE, BLOCK)
    apart = _forward_sequences(
        packed.inside, packed, q, k, v, out, cls, lse, dropout, places, all_heads, num_rows, segment, unit,
        SHAPE, BLOCK,
    )  # fmt: skip
    if PER_TILE > 1:  # noqa: SIM102
        if apart:
            tl.debug_barrier()  # what is stored now comes after what was
            for number in range(0, tl.minimum(num_groups, PER_TILE)):  # of no known length, so not unrolled
                _forward_sequences(
                    packed.inside & (packed.numbers == number), packed, q, k, v, out, cls, lse, dropout,
                    places, all_heads, num_rows, segment, unit, SHAPE, BLOCK,
                )  # fmt: skip


# ---- Longer sequences ----


@triton.jit
def _attend_tile(
    state,
    first_key,
    q_rows,
    keys,
    values,
    sequence,
    dropout,
    first_query,
    unit,
    SHAPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK: tl.constexpr,
    IS_TAIL: tl.constexpr,
):
    """Take ``BLOCK`` keys into the state of the queries."""
    k_rows = tile_rows(keys, sequence, first_key, SHAPE.has_cls, SHAPE, BLOCK, IS_TAIL)  # (BLOCK, BLOCK_D)
    v_rows = tile_rows(values, sequence, first_key, SHAPE.has_cls, SHAPE, BLOCK, IS_TAIL)
    scores = tl.dot(q_rows, tl.trans(k_rows), input_precision=SHAPE.precision)  # (BLOCK_M, BLOCK)
    if IS_TAIL:
        inside = first_key + tl.arange(0, BLOCK) < SHAPE.length
        scores = tl.where(inside[None, :], scores, float("-inf"))
    factors = None
    if dropout is not None:
        factors = tile_factors(dropout, sequence, first_query, first_key, SHAPE, BLOCK_M, BLOCK)
    PRECISION: tl.constexpr = SHAPE.precision
    return softmax_step(state, scores, v_rows, factors, PRECISION, unit)


@triton.jit(do_not_specialize=UNSPECIALISED)
def divided_forward_stream(
    q,
    k,
    v,
    out,
    cls,
    lse,
    dropout,
    places,
    place_step,
    slot_step,
    first_head,
    heads,
    all_heads,
    num_rows,
    segment,
    unit,
    full_tiles,
    SHAPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TAIL: tl.constexpr,
):
    """Attend with a tile of queries of one head in one sequence; the keys come tile by tile."""
    FULL: tl.constexpr = (SHAPE.length - SHAPE.has_cls) // BLOCK_N
    sequence = locate(first_head, heads, places, place_step, slot_step, SHAPE, BLOCK_M)
    head, group, clip = sequence.head, sequence.group, sequence.clip
    first_query = first_slot(SHAPE, BLOCK_M)
    slots = first_query + tl.arange(0, BLOCK_M)
    at = slot_tokens(sequence, slots, slots < SHAPE.length, SHAPE)
    q_rows = load_signed(
        head_of(q, clip, head), at.tokens, row_offsets(at.tokens, q.token), SHAPE
    )  # (BLOCK_M, BLOCK_D)
    k_columns, v_columns = None, None
    if SHAPE.shifts is not None:
        k_columns = mixed_columns(group % segment, head, segment, k.batch, SHAPE)
        v_columns = mixed_columns(group % segment, head, segment, v.batch, SHAPE)
    keys = HeadRows(head_of(k, clip, head), k.token, k_columns)
    values = HeadRows(head_of(v, clip, head), v.token, v_columns)

    state = start_rows(BLOCK_M, SHAPE.block_d)
    if FULL > 0:
        tl.assume(full_tiles > 0)
        for step in tl.range(0, full_tiles):
            state = _attend_tile(
                state, step * BLOCK_N, q_rows, keys, values, sequence, dropout, first_query, unit,
                SHAPE, BLOCK_M, BLOCK_N, False,
            )  # fmt: skip
    if TAIL:
        state = _attend_tile(
            state, FULL * BLOCK_N, q_rows, keys, values, sequence, dropout, first_query, unit,
            SHAPE, BLOCK_M, TAIL, True,
        )  # fmt: skip

    context, row_lse = finish_rows(state, unit)
    out_base = out.base + clip * out.batch + head * SHAPE.head_dim
    store_rows(out_base, at.rows, row_offsets(at.rows, out.token), context, SHAPE.head_dim, SHAPE.block_d)
    if SHAPE.has_cls:  # noqa: SIM102  # decided when it is compiled, the inner one by the program
        if first_query + BLOCK_M >= SHAPE.length:
            cls_base = cls + (group.to(tl.int64) * all_heads + head) * SHAPE.head_dim
            store_cls(cls_base, slots * 0, slots == SHAPE.length - 1, context, SHAPE)
    if lse is not None:
        kept_rows = clip * num_rows + lse_rows(sequence, slots, at.rows, places, num_rows, SHAPE)
        tl.store(lse + kept_rows * all_heads + head, row_lse, mask=slots < SHAPE.length)

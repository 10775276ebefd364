"""The forward kernels of divided attention; divided.py launches them and says what their arguments hold."""

import triton
import triton.language as tl

from vidattn.kernels.divided_packed import attend_packed, is_not_finite, locate_packed
from vidattn.kernels.divided_tiles import load_signed, locate, lse_rows, slot_tokens, store_cls, tile_factors, tile_keys
from vidattn.kernels.mixing_tiles import load_keys, mixed_columns
from vidattn.kernels.rows import row_offsets, store_rows
from vidattn.kernels.softmax import finish_rows, softmax_step, start_rows

__all__ = ["divided_forward_packed", "divided_forward_stream"]


# ---- Sequences that fit into a tile ----


@triton.jit
def _forward_sequences(
    inside,
    located,
    pointers,
    strides,
    steps,
    counts,
    dropout,
    unit,
    LENGTH: tl.constexpr,
    CLS: tl.constexpr,
    SHIFTS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    SIGN: tl.constexpr,
    HAS_LSE: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Attend in the sequences whose rows are ``inside``; tell whether their results are not finite."""
    head, groups, places_of, slots, sequences, _ = located
    q, k, v, out, cls, lse = pointers
    q_batch, q_token, k_batch, k_token, v_batch, v_token, out_batch, out_token = strides
    places, all_heads, num_rows, segment = counts
    clips = (groups // places).to(tl.int64)
    tokens, rows = slot_tokens(slots, places_of, inside, steps, LENGTH, CLS)
    k_offsets = clips * k_batch + row_offsets(tokens, k_token)
    v_offsets = clips * v_batch + row_offsets(tokens, v_token)
    q_rows = load_signed(q, tokens, clips * q_batch + row_offsets(tokens, q_token), HEAD_DIM, BLOCK_D, SIGN)
    frames = (groups % segment)[:, None]
    k_columns = mixed_columns(frames, head, segment, k_batch, SHIFTS, HEAD_DIM, BLOCK_D)
    v_columns = mixed_columns(frames, head, segment, v_batch, SHIFTS, HEAD_DIM, BLOCK_D)
    k_rows = load_keys(k, tokens, k_offsets, k_columns, SHIFTS, HEAD_DIM, BLOCK_D, True)
    v_rows = load_keys(v, tokens, v_offsets, v_columns, SHIFTS, HEAD_DIM, BLOCK_D, True)
    weights, row_max, row_sum, factors = attend_packed(
        q_rows, k_rows, sequences, slots, groups, head, dropout, unit, LENGTH, CLS, BLOCK, HAS_DROPOUT, PRECISION
    )
    if HAS_DROPOUT:
        weights *= factors
    context = tl.dot(weights.to(v_rows.dtype), v_rows, input_precision=PRECISION)
    context = context / tl.where(row_sum == 0.0, 1.0, row_sum)[:, None]

    store_rows(out, rows, clips * out_batch + row_offsets(rows, out_token), context, HEAD_DIM, BLOCK_D)
    if CLS:
        offsets = groups.to(tl.int64) * (all_heads * HEAD_DIM) + head * HEAD_DIM
        store_cls(cls, offsets, inside & (slots == LENGTH - 1), context, HEAD_DIM, BLOCK_D)
    if HAS_LSE:
        cls_row = num_rows - places if CLS else 0
        kept_rows = clips * num_rows + lse_rows(slots, places_of, rows, cls_row, LENGTH, CLS)
        row_lse = tl.where(row_max == float("-inf"), 0.0, row_max * unit) + tl.log(row_sum)
        tl.store(lse + kept_rows * all_heads + head, row_lse, mask=inside)
    return is_not_finite(context)


@triton.jit(
    do_not_specialize=[
        "places", "num_groups", "place_step", "slot_step", "first_head", "heads", "all_heads", "num_rows", "segment",
        "threshold",
    ]
)  # fmt: skip
def divided_forward_packed(
    q,
    k,
    v,
    seed,
    out,
    cls,
    lse,
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
    threshold,
    kept,
    LENGTH: tl.constexpr,
    CLS: tl.constexpr,
    SHIFTS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    SIGN: tl.constexpr,
    HAS_LSE: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Attend with one head in as many whole sequences as a tile holds."""
    PER_TILE: tl.constexpr = BLOCK // LENGTH
    located = locate_packed(first_head, heads, places, num_groups, LENGTH, BLOCK)
    head, sequences, inside = located[0], located[4], located[5]
    if not CLS:
        cls = out  # never written; older Triton takes no None in a tuple
    if not HAS_LSE:
        lse = out
    pointers = (q + head * q_head, k + head * k_head, v + head * v_head, out + head * HEAD_DIM, cls, lse)
    strides = (q_batch, q_token, k_batch, k_token, v_batch, v_token, out_batch, out_token)
    steps, counts = (place_step, slot_step), (places, all_heads, num_rows, segment)
    dropout = (seed if HAS_DROPOUT else 0, threshold, kept)
    apart = _forward_sequences(
        inside, located, pointers, strides, steps, counts, dropout, unit,
        LENGTH, CLS, SHIFTS, HEAD_DIM, BLOCK_D, BLOCK, SIGN, HAS_LSE, HAS_DROPOUT, PRECISION,
    )  # fmt: skip
    if PER_TILE > 1:  # noqa: SIM102
        if apart:
            tl.debug_barrier()  # what is stored now comes after what was
            for sequence in range(0, tl.minimum(num_groups, PER_TILE)):  # of no known length, so not unrolled
                _forward_sequences(
                    inside & (sequences == sequence), located, pointers, strides, steps, counts, dropout, unit,
                    LENGTH, CLS, SHIFTS, HEAD_DIM, BLOCK_D, BLOCK, SIGN, HAS_LSE, HAS_DROPOUT, PRECISION,
                )  # fmt: skip


# ---- Longer sequences ----


@triton.jit
def _attend_tile(
    state,
    first_key,
    q_rows,
    inputs,
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
    """Take ``BLOCK`` keys into the state of the queries."""
    group, head, place, steps, k_base, v_base, k_token, v_token, k_columns, v_columns = inputs
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
    return softmax_step(state, scores, v_rows, factors, HAS_DROPOUT, PRECISION, unit)


@triton.jit(
    do_not_specialize=[
        "places", "place_step", "slot_step", "first_head", "heads", "all_heads", "num_rows", "segment", "threshold",
        "full_tiles",
    ]
)  # fmt: skip
def divided_forward_stream(
    q,
    k,
    v,
    seed,
    out,
    cls,
    lse,
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
    places,
    place_step,
    slot_step,
    first_head,
    heads,
    all_heads,
    num_rows,
    segment,
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
    HAS_LSE: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Attend with a tile of queries of one head in one sequence; the keys come tile by tile."""
    tile, head, group, clip, place = locate(first_head, heads, places, LENGTH, BLOCK_M)
    steps = (place_step, slot_step)
    first_query = tile * BLOCK_M
    slots = first_query + tl.arange(0, BLOCK_M)
    tokens, rows = slot_tokens(slots, place, slots < LENGTH, steps, LENGTH, CLS)
    q_base = q + clip * q_batch + head * q_head
    q_rows = load_signed(q_base, tokens, row_offsets(tokens, q_token), HEAD_DIM, BLOCK_D, SIGN)
    k_base, v_base = k + clip * k_batch + head * k_head, v + clip * v_batch + head * v_head
    k_columns = mixed_columns(group % segment, head, segment, k_batch, SHIFTS, HEAD_DIM, BLOCK_D)
    v_columns = mixed_columns(group % segment, head, segment, v_batch, SHIFTS, HEAD_DIM, BLOCK_D)
    inputs = (group, head, place, steps, k_base, v_base, k_token, v_token, k_columns, v_columns)
    dropout = (seed, threshold, kept)

    state = start_rows(BLOCK_M, BLOCK_D)
    for step in tl.range(0, full_tiles):
        state = _attend_tile(
            state, step * BLOCK_N, q_rows, inputs, dropout, first_query, unit,
            LENGTH, CLS, SHIFTS, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, False, HAS_DROPOUT, PRECISION,
        )  # fmt: skip
    if TAIL:
        state = _attend_tile(
            state, full_tiles * BLOCK_N, q_rows, inputs, dropout, first_query, unit,
            LENGTH, CLS, SHIFTS, HEAD_DIM, BLOCK_D, BLOCK_M, TAIL, True, HAS_DROPOUT, PRECISION,
        )  # fmt: skip

    context, row_lse = finish_rows(state, unit)
    out_base = out + clip * out_batch + head * HEAD_DIM
    store_rows(out_base, rows, row_offsets(rows, out_token), context, HEAD_DIM, BLOCK_D)
    if CLS:  # noqa: SIM102  # decided when it is compiled, the inner one by the program
        if first_query + BLOCK_M >= LENGTH:
            cls_base = cls + (group.to(tl.int64) * all_heads + head) * HEAD_DIM
            store_cls(cls_base, slots * 0, slots == LENGTH - 1, context, HEAD_DIM, BLOCK_D)
    if HAS_LSE:
        cls_row = num_rows - places if CLS else 0
        kept_rows = clip * num_rows + lse_rows(slots, place, rows, cls_row, LENGTH, CLS)
        tl.store(lse + kept_rows * all_heads + head, row_lse, mask=slots < LENGTH)

"""The forward kernel of 3D window attention; window3d.py launches it and says what its arguments hold."""

import triton
import triton.language as tl

from vidattn.kernels.rows import load_rows, row_offsets, store_rows
from vidattn.kernels.softmax import dropout_factors, finish_rows, softmax_step, start_rows
from vidattn.kernels.window3d_tiles import (
    added_to_scores,
    hidden_keys_are_negligible,
    hidden_tile,
    locate,
    plane,
    position,
    scores_of,
    visible_tiles,
)

__all__ = ["window3d_forward"]


@triton.jit
def _attend_tile(
    states,
    first_key,
    inputs,
    added_planes,
    dropout,
    head,
    first_query,
    scale,
    NUM_TOKENS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK: tl.constexpr,
    WINDOWS: tl.constexpr,
    MASKED: tl.constexpr,
    IS_TAIL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_PAD: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Take ``BLOCK`` keys of every window into the states of its queries; the windows share what is added."""
    numbers, maps, q_rows, k_bases, v_bases, k_token, v_token, pad_k, pad_v = inputs
    keys = first_key + tl.arange(0, BLOCK)
    added = added_to_scores(
        added_planes[0], added_planes[1], first_query, first_key,
        NUM_TOKENS, BLOCK_M, BLOCK, NUM_TOKENS % BLOCK_M != 0, HAS_BIAS, HAS_MASK,
    )  # fmt: skip
    queries = first_query + tl.arange(0, BLOCK_M)
    updated = ()
    for w in tl.static_range(WINDOWS):
        tokens = tl.load(maps[w] + keys)
        k_offsets, v_offsets = row_offsets(tokens, k_token), row_offsets(tokens, v_token)
        k_rows = load_rows(k_bases[w], tokens, k_offsets, pad_k, HEAD_DIM, BLOCK_D, MASKED, HAS_PAD)
        v_rows = load_rows(v_bases[w], tokens, v_offsets, pad_v, HEAD_DIM, BLOCK_D, MASKED, HAS_PAD)
        scores = scores_of(q_rows[w], k_rows, added, scale, HAS_BIAS or HAS_MASK, PRECISION)
        if IS_TAIL:
            scores = tl.where((keys < NUM_TOKENS)[None, :], scores, float("-inf"))
        factors = 1.0
        if HAS_DROPOUT:
            factors = dropout_factors(dropout, numbers[w], head, queries, first_key, BLOCK_M, BLOCK)
        updated += (softmax_step(states[w], scores, v_rows, factors, HAS_DROPOUT, PRECISION),)
    return updated


@triton.jit(do_not_specialize=["heads", "num_windows", "grid_tokens", "threshold", "full_tiles"])
def window3d_forward(
    q,
    k,
    v,
    pad_qkv,
    bias,
    bias_max,
    mask,
    seed,
    out,
    lse,
    tokens,
    groups,
    kinds,
    visible,
    q_batch,
    q_token,
    q_head,
    k_batch,
    k_token,
    k_head,
    v_batch,
    v_token,
    v_head,
    bias_kind,
    bias_head,
    heads,
    num_windows,
    grid_tokens,
    scale,
    mask_value,
    threshold,
    kept,
    full_tiles,
    NUM_TOKENS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TAIL: tl.constexpr,
    WINDOWS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_PADDING: tl.constexpr,
    HAS_PAD: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    HIDES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Attend with a tile of queries of one head in ``WINDOWS`` windows of the same kind, which share the bias tiles."""
    FULL: tl.constexpr = NUM_TOKENS // BLOCK_N
    TILES: tl.constexpr = (NUM_TOKENS + BLOCK_M - 1) // BLOCK_M
    tile, head, group = position(heads, NUM_TOKENS, BLOCK_M)
    kind = tl.load(kinds + group)
    queries = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    maps, numbers, q_rows, k_bases, v_bases, states = (), (), (), (), (), ()
    for w in tl.static_range(WINDOWS):
        batch, token_map, number = locate(groups, group * WINDOWS + w, tokens, num_windows, NUM_TOKENS)
        q_tokens = tl.load(token_map + queries)
        q_base = q + batch * q_batch + head * q_head
        maps += (token_map,)
        numbers += (number,)
        q_rows += (load_rows(q_base, q_tokens, row_offsets(q_tokens, q_token), q, HEAD_DIM, BLOCK_D, True, False),)
        k_bases += (k + batch * k_batch + head * k_head,)
        v_bases += (v + batch * v_batch + head * v_head,)
        states += (start_rows(BLOCK_M, BLOCK_D),)
    pad_k, pad_v = pad_qkv + (heads + head) * HEAD_DIM, pad_qkv + (2 * heads + head) * HEAD_DIM
    inputs = (numbers, maps, q_rows, k_bases, v_bases, k_token, v_token, pad_k, pad_v)
    planes = plane(bias, mask, kind, head, bias_kind, bias_head, NUM_TOKENS, HAS_BIAS, HAS_MASK)
    dropout = (seed, threshold, kept)

    # The number of tiles is given at run time: with a loop of known length the compiler runs out of registers.
    first, last = visible_tiles(visible, kind, tile, full_tiles, TILES, HIDES)
    for step in tl.range(first, last):
        states = _attend_tile(
            states, step * BLOCK_N, inputs, planes, dropout, head, tile * BLOCK_M, scale,
            NUM_TOKENS, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, WINDOWS, HAS_PADDING, False,
            HAS_BIAS, HAS_MASK, HAS_PAD, HAS_DROPOUT, PRECISION,
        )  # fmt: skip
    if TAIL:
        states = _attend_tile(
            states, FULL * BLOCK_N, inputs, planes, dropout, head, tile * BLOCK_M, scale,
            NUM_TOKENS, HEAD_DIM, BLOCK_D, BLOCK_M, TAIL, WINDOWS, True, True,
            HAS_BIAS, HAS_MASK, HAS_PAD, HAS_DROPOUT, PRECISION,
        )  # fmt: skip
    if HIDES == 2:  # the mask is finite: a hidden key still counts if its score is far above all others
        hidden = FULL - (last - first)
        if hidden > 0:
            row_maxima = ()
            for w in tl.static_range(WINDOWS):
                row_maxima += (states[w][0],)
            proven = hidden_keys_are_negligible(
                q_rows, row_maxima, first, last, maps, k_bases, k_token, pad_k, bias_max, scale, mask_value,
                HEAD_DIM, BLOCK_D, BLOCK_N, FULL, WINDOWS, HAS_PADDING, HAS_PAD,
            )  # fmt: skip
            hidden = tl.where(proven == 1, 0, hidden)
        for rank in range(0, hidden):
            states = _attend_tile(
                states, hidden_tile(rank, first, last) * BLOCK_N, inputs, planes, dropout, head, tile * BLOCK_M, scale,
                NUM_TOKENS, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, WINDOWS, HAS_PADDING, False,
                HAS_BIAS, HAS_MASK, HAS_PAD, HAS_DROPOUT, PRECISION,
            )  # fmt: skip

    for w in tl.static_range(WINDOWS):
        context, row_lse = finish_rows(states[w])
        batch, token_map, _ = locate(groups, group * WINDOWS + w, tokens, num_windows, NUM_TOKENS)
        q_tokens = tl.load(token_map + queries)
        rows = row_offsets(q_tokens, heads)  # out and lse are contiguous
        first_row = batch * grid_tokens * heads + head
        store_rows(out + first_row * HEAD_DIM, q_tokens, rows * HEAD_DIM, context, HEAD_DIM, BLOCK_D)
        tl.store(lse + first_row + rows, row_lse, mask=q_tokens >= 0)

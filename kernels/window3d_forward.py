"""The forward kernel of 3D window attention; window3d.py launches it and says what its arguments hold."""

import triton
import triton.language as tl

from vidattn.kernels.rows import head_of, load_rows, row_offsets, store_rows
from vidattn.kernels.softmax import SoftmaxState, dropout_factors, finish_rows, softmax_step, start_rows
from vidattn.kernels.window3d_tiles import (
    Queries,
    added_to_scores,
    hidden_keys_are_negligible,
    hidden_tile,
    locate,
    meet_keys,
    plane_offsets,
    position,
    type_of,
    visible_tiles,
)

__all__ = ["window3d_forward"]


@triton.jit
def _attend_tile(
    states,
    first_key,
    queries,
    NUM_TOKENS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK: tl.constexpr,
    WINDOWS: tl.constexpr,
    MASKED: tl.constexpr,
    IS_TAIL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Take ``BLOCK`` keys of every window into the states of its queries; the windows share what is added."""
    added, planes = None, queries.planes
    if planes.bias is not None:
        past_end: tl.constexpr = NUM_TOKENS % BLOCK_M != 0
        added = added_to_scores(planes, queries.plane, queries.first, first_key, NUM_TOKENS, BLOCK_M, BLOCK, past_end)
    numbers = queries.first + tl.arange(0, BLOCK_M)
    updated = ()
    for w in tl.static_range(WINDOWS):
        keys = meet_keys(queries, w, first_key, added, NUM_TOKENS, HEAD_DIM, BLOCK_D, BLOCK, MASKED, IS_TAIL, PRECISION)
        factors = None
        if queries.dropout is not None:
            factors = dropout_factors(
                queries.dropout, queries.numbers[w], queries.head, numbers, first_key, BLOCK_M, BLOCK
            )
        updated += (softmax_step(states[w], keys.scores, keys.v, factors, PRECISION),)
    return updated


@triton.jit(do_not_specialize=["heads", "num_windows", "grid_tokens", "full_tiles"])
def window3d_forward(
    q,
    k,
    v,
    pad_qkv,
    planes,
    hiding,
    dropout,
    out,
    lse,
    windows,
    heads,
    num_windows,
    grid_tokens,
    scale,
    full_tiles,
    NUM_TOKENS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TAIL: tl.constexpr,
    WINDOWS: tl.constexpr,
    HAS_PADDING: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Attend with a tile of queries of one head in ``WINDOWS`` windows of the same kind, which share the bias tiles."""
    FULL: tl.constexpr = NUM_TOKENS // BLOCK_N
    TILES: tl.constexpr = (NUM_TOKENS + BLOCK_M - 1) // BLOCK_M
    place = position(heads, NUM_TOKENS, BLOCK_M)
    head, kind = place.head, tl.load(windows.kinds + place.group)
    query_numbers = place.tile * BLOCK_M + tl.arange(0, BLOCK_M)
    maps, numbers, q_rows, k_bases, v_bases, states = (), (), (), (), (), ()
    for w in tl.static_range(WINDOWS):
        window = locate(windows, place.group * WINDOWS + w, num_windows, NUM_TOKENS)
        tokens = tl.load(window.tokens + query_numbers)
        q_base, q_offsets = head_of(q, window.batch, head), row_offsets(tokens, q.token)
        maps += (window.tokens,)
        numbers += (window.number,)
        q_rows += (load_rows(q_base, tokens, q_offsets, HEAD_DIM, BLOCK_D, True),)  # (BLOCK_M, BLOCK_D)
        k_bases += (head_of(k, window.batch, head),)
        v_bases += (head_of(v, window.batch, head),)
        states += (start_rows(BLOCK_M, BLOCK_D),)
    pad_k, pad_v = None, None
    if pad_qkv is not None:
        pad_k, pad_v = pad_qkv + (heads + head) * HEAD_DIM, pad_qkv + (2 * heads + head) * HEAD_DIM
    queries = Queries(
        head=head, first=place.tile * BLOCK_M, numbers=numbers, maps=maps, rows=q_rows,
        k=k_bases, v=v_bases, k_token=k.token, v_token=v.token, pad_k=pad_k, pad_v=pad_v,
        planes=planes, plane=plane_offsets(planes, kind, type_of(planes, numbers[0]), head, NUM_TOKENS),
        dropout=dropout, scale=scale,
    )  # fmt: skip

    # The number of tiles is given at run time: with a loop of known length the compiler runs out of registers.
    tiles = visible_tiles(hiding, kind, place.tile, full_tiles, TILES)
    if FULL > 0:
        tl.assume(tiles.first < tiles.last)
        for step in tl.range(tiles.first, tiles.last):
            states = _attend_tile(
                states, step * BLOCK_N, queries,
                NUM_TOKENS, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, WINDOWS, HAS_PADDING, False, PRECISION,
            )  # fmt: skip
    if TAIL:
        states = _attend_tile(
            states, FULL * BLOCK_N, queries,
            NUM_TOKENS, HEAD_DIM, BLOCK_D, BLOCK_M, TAIL, WINDOWS, True, True, PRECISION,
        )  # fmt: skip
    if hiding.mask_value is not None:
        # The mask is finite: a hidden key still counts if its score is far above all others.
        hidden = FULL - (tiles.last - tiles.first)
        if hidden > 0:
            row_maxima = ()
            for w in tl.static_range(WINDOWS):
                row_maxima += (SoftmaxState(*states[w]).maximum,)
            proven = hidden_keys_are_negligible(
                queries, row_maxima, tiles, hiding, HEAD_DIM, BLOCK_D, BLOCK_N, FULL, WINDOWS, HAS_PADDING
            )
            hidden = tl.where(proven == 1, 0, hidden)
        for rank in range(0, hidden):
            states = _attend_tile(
                states, hidden_tile(rank, tiles) * BLOCK_N, queries,
                NUM_TOKENS, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, WINDOWS, HAS_PADDING, False, PRECISION,
            )  # fmt: skip

    for w in tl.static_range(WINDOWS):
        context, row_lse = finish_rows(states[w])
        window = locate(windows, place.group * WINDOWS + w, num_windows, NUM_TOKENS)
        tokens = tl.load(window.tokens + query_numbers)
        rows = row_offsets(tokens, heads)  # out and lse are contiguous
        first_row = window.batch * grid_tokens * heads + head
        store_rows(out + first_row * HEAD_DIM, tokens, rows * HEAD_DIM, context, HEAD_DIM, BLOCK_D)
        tl.store(lse + first_row + rows, row_lse, mask=tokens >= 0)

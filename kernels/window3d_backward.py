"""The backward kernels of 3D window attention; window3d.py launches them and says what their arguments hold.

Three kernels recompute the probabilities P. Each owns what it sums, so nothing is added atomically and every result has
one order of summation: a tile of queries its dq, a tile of keys its dk and dv, and a tile of the bias gradient its
share of the windows. Where a tile holds all keys (``WHOLE``), rows of scores are seen whole: the kernels need nothing
of the forward pass, and that of the keys gives dq as well.
"""

import triton
import triton.language as tl

from vidattn.kernels.rows import PADDING, load_rows, row_offsets, store_rows
from vidattn.kernels.softmax import dropout_factors, score_gradients
from vidattn.kernels.window3d_tiles import (
    PITCH_UNIT,
    added_to_scores,
    hidden_keys_are_negligible,
    hidden_tile,
    is_negligible,
    largest_norm,
    locate,
    plane,
    position,
    row_norms,
    scores_of,
    visible_tiles,
)

__all__ = ["window3d_backward_bias", "window3d_backward_keys", "window3d_backward_queries"]


# ---- Queries: dq, and delta = sum(dout * out) of each row, which the other kernels read ----


@triton.jit
def _queries_tile(
    sums,
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
    """Add what ``BLOCK`` keys give to dq of every window."""
    numbers, maps, q_rows, dout_rows, lses, deltas, k_bases, v_bases, k_token, v_token, pad_k, pad_v = inputs
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
        _, grad_scores = score_gradients(
            scores, lses[w], deltas[w], dout_rows[w], v_rows, factors, False, HAS_DROPOUT, PRECISION
        )
        updated += (tl.dot(grad_scores.to(k_rows.dtype), k_rows, sums[w], input_precision=PRECISION),)
    return updated


@triton.jit(do_not_specialize=["heads", "num_windows", "grid_tokens", "threshold"])
def window3d_backward_queries(
    q,
    k,
    v,
    pad_qkv,
    bias,
    bias_max,
    mask,
    seed,
    out,
    dout,
    lse,
    delta,
    dq,
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
    grad_token,
    bias_kind,
    bias_head,
    heads,
    num_windows,
    grid_tokens,
    scale,
    mask_value,
    threshold,
    kept,
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
    """Gradient of a tile of queries of one head in ``WINDOWS`` windows of the same kind, and their delta."""
    FULL: tl.constexpr = NUM_TOKENS // BLOCK_N
    TILES: tl.constexpr = (NUM_TOKENS + BLOCK_M - 1) // BLOCK_M
    tile, head, group = position(heads, NUM_TOKENS, BLOCK_M)
    kind = tl.load(kinds + group)
    queries = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    batches, maps, numbers, q_rows, dout_rows, lses, deltas = (), (), (), (), (), (), ()
    k_bases, v_bases, sums = (), (), ()
    for w in tl.static_range(WINDOWS):
        batch, token_map, number = locate(groups, group * WINDOWS + w, tokens, num_windows, NUM_TOKENS)
        q_tokens = tl.load(token_map + queries)
        q_base = q + batch * q_batch + head * q_head
        first_row, rows = batch * grid_tokens * heads + head, row_offsets(q_tokens, heads)
        given = load_rows(dout + first_row * HEAD_DIM, q_tokens, rows * HEAD_DIM, q, HEAD_DIM, BLOCK_D, True, False)
        found = load_rows(out + first_row * HEAD_DIM, q_tokens, rows * HEAD_DIM, q, HEAD_DIM, BLOCK_D, True, False)
        row_delta = tl.sum(given.to(tl.float32) * found.to(tl.float32), 1)
        tl.store(delta + first_row + rows, row_delta, mask=q_tokens >= 0)
        batches += (batch,)
        maps += (token_map,)
        numbers += (number,)
        q_rows += (load_rows(q_base, q_tokens, row_offsets(q_tokens, q_token), q, HEAD_DIM, BLOCK_D, True, False),)
        dout_rows += (given,)
        lses += (tl.load(lse + first_row + rows, mask=q_tokens >= 0, other=float("inf")),)
        deltas += (row_delta,)
        k_bases += (k + batch * k_batch + head * k_head,)
        v_bases += (v + batch * v_batch + head * v_head,)
        sums += (tl.zeros([BLOCK_M, BLOCK_D], tl.float32),)
    pad_k, pad_v = pad_qkv + (heads + head) * HEAD_DIM, pad_qkv + (2 * heads + head) * HEAD_DIM
    inputs = (numbers, maps, q_rows, dout_rows, lses, deltas, k_bases, v_bases, k_token, v_token, pad_k, pad_v)
    planes = plane(bias, mask, kind, head, bias_kind, bias_head, NUM_TOKENS, HAS_BIAS, HAS_MASK)
    dropout = (seed, threshold, kept)

    first, last = visible_tiles(visible, kind, tile, FULL, TILES, HIDES)
    for step in tl.range(first, last):
        sums = _queries_tile(
            sums, step * BLOCK_N, inputs, planes, dropout, head, tile * BLOCK_M, scale,
            NUM_TOKENS, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, WINDOWS, HAS_PADDING, False,
            HAS_BIAS, HAS_MASK, HAS_PAD, HAS_DROPOUT, PRECISION,
        )  # fmt: skip
    if TAIL:
        sums = _queries_tile(
            sums, FULL * BLOCK_N, inputs, planes, dropout, head, tile * BLOCK_M, scale,
            NUM_TOKENS, HEAD_DIM, BLOCK_D, BLOCK_M, TAIL, WINDOWS, True, True,
            HAS_BIAS, HAS_MASK, HAS_PAD, HAS_DROPOUT, PRECISION,
        )  # fmt: skip
    if HIDES == 2:
        hidden = FULL - (last - first)
        if hidden > 0:
            proven = hidden_keys_are_negligible(
                q_rows, lses, first, last, maps, k_bases, k_token, pad_k, bias_max, scale, mask_value,
                HEAD_DIM, BLOCK_D, BLOCK_N, FULL, WINDOWS, HAS_PADDING, HAS_PAD,
            )  # fmt: skip
            hidden = tl.where(proven == 1, 0, hidden)
        for rank in range(0, hidden):
            sums = _queries_tile(
                sums, hidden_tile(rank, first, last) * BLOCK_N, inputs, planes, dropout, head, tile * BLOCK_M, scale,
                NUM_TOKENS, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, WINDOWS, HAS_PADDING, False,
                HAS_BIAS, HAS_MASK, HAS_PAD, HAS_DROPOUT, PRECISION,
            )  # fmt: skip

    for w in tl.static_range(WINDOWS):
        q_tokens = tl.load(maps[w] + queries)
        base = dq + batches[w] * grid_tokens * grad_token + head * HEAD_DIM
        store_rows(base, q_tokens, row_offsets(q_tokens, grad_token), sums[w] * scale, HEAD_DIM, BLOCK_D)


# ---- Keys: dk and dv, and what the padding keys of the tile contribute to the gradient of pad_qkv ----


@triton.jit
def _keys_tile(
    sums,
    first_query,
    inputs,
    added_planes,
    dropout,
    head,
    first_key,
    scale,
    NUM_TOKENS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
    PAST_END: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    WHOLE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add what ``BLOCK`` queries give to dk and dv; store their dq where it is complete."""
    number, token_map, q_base, dout_base, lse_base, delta_base, strides, k_rows, v_rows, dq_base = inputs
    q_token, heads, grad_token = strides
    dk, dv = sums
    queries = first_query + tl.arange(0, BLOCK)
    added = added_to_scores(
        added_planes[0], added_planes[1], first_query, first_key,
        NUM_TOKENS, BLOCK, BLOCK_N, PAST_END, HAS_BIAS, HAS_MASK,
    )  # fmt: skip
    tokens = tl.load(token_map + queries)
    rows = row_offsets(tokens, heads)
    q_rows = load_rows(q_base, tokens, row_offsets(tokens, q_token), q_base, HEAD_DIM, BLOCK_D, MASKED, False)
    dout_rows = load_rows(dout_base, tokens, rows * HEAD_DIM, q_base, HEAD_DIM, BLOCK_D, MASKED, False)
    q_lse, delta = 0.0, 0.0
    if WHOLE:  # queries that are padding, or none, have a gradient of zeros
        pass
    elif MASKED:  # they weigh nothing
        q_lse = tl.load(lse_base + rows, mask=tokens >= 0, other=float("inf"))
        delta = tl.load(delta_base + rows, mask=tokens >= 0, other=0.0)
    else:
        q_lse, delta = tl.load(lse_base + rows), tl.load(delta_base + rows)
    scores = scores_of(q_rows, k_rows, added, scale, HAS_BIAS or HAS_MASK, PRECISION)
    if WHOLE and BLOCK_N != NUM_TOKENS:
        scores = tl.where((tl.arange(0, BLOCK_N) < NUM_TOKENS)[None, :], scores, float("-inf"))
    factors = 1.0
    if HAS_DROPOUT:
        factors = dropout_factors(dropout, number, head, queries, first_key, BLOCK, BLOCK_N)
    dropped, grad_scores = score_gradients(
        scores, q_lse, delta, dout_rows, v_rows, factors, WHOLE, HAS_DROPOUT, PRECISION
    )
    if WHOLE:
        dq = tl.dot(grad_scores.to(k_rows.dtype), k_rows, input_precision=PRECISION) * scale
        store_rows(dq_base, tokens, row_offsets(tokens, grad_token), dq, HEAD_DIM, BLOCK_D)
    dv = tl.dot(tl.trans(dropped.to(dout_rows.dtype)), dout_rows, dv, input_precision=PRECISION)
    dk = tl.dot(tl.trans(grad_scores.to(q_rows.dtype)), q_rows, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def _hidden_queries_are_negligible(
    largest,
    first,
    last,
    inputs,
    bias_max,
    scale,
    mask_value,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    FULL: tl.constexpr,
    MASKED: tl.constexpr,
):
    """1 if a bound on their scores proves that no hidden tile of queries gives these keys a weight that counts."""
    _, token_map, q_base, _, lse_base, _, strides, _, _, _ = inputs
    q_token, heads, _ = strides
    proven = 1
    for rank in range(0, FULL - (last - first)):
        tokens = tl.load(token_map + hidden_tile(rank, first, last) * BLOCK_M + tl.arange(0, BLOCK_M))
        q_rows = load_rows(q_base, tokens, row_offsets(tokens, q_token), q_base, HEAD_DIM, BLOCK_D, MASKED, False)
        q_lse = tl.load(lse_base + row_offsets(tokens, heads), mask=tokens >= 0, other=float("inf"))
        proven &= is_negligible(row_norms(q_rows), largest, q_lse, bias_max, scale, mask_value)
    return proven


@triton.jit(do_not_specialize=["heads", "num_windows", "grid_tokens", "threshold"])
def window3d_backward_keys(
    q,
    k,
    v,
    pad_qkv,
    bias,
    bias_max,
    mask,
    seed,
    dout,
    lse,
    delta,
    dq,
    dk,
    dv,
    pad_parts,
    tokens,
    windows,
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
    grad_token,
    bias_kind,
    bias_head,
    heads,
    num_windows,
    grid_tokens,
    scale,
    mask_value,
    threshold,
    kept,
    NUM_TOKENS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TAIL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_PADDING: tl.constexpr,
    HAS_PAD: tl.constexpr,
    NEEDS_PAD: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    HIDES: tl.constexpr,
    WHOLE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of a tile of keys and values of one head in one window; if it holds all keys, of the queries too."""
    FULL: tl.constexpr = NUM_TOKENS // BLOCK_M
    TILES: tl.constexpr = (NUM_TOKENS + BLOCK_N - 1) // BLOCK_N
    tile, head, rank = position(heads, NUM_TOKENS, BLOCK_N)
    kind = tl.load(kinds + rank)
    first_key = tile * BLOCK_N
    tl.static_assert(BLOCK_N >= NUM_TOKENS or not WHOLE)
    batch, token_map, number = locate(windows, rank, tokens, num_windows, NUM_TOKENS)
    k_tokens = tl.load(token_map + first_key + tl.arange(0, BLOCK_N))
    pad_k, pad_v = pad_qkv + (heads + head) * HEAD_DIM, pad_qkv + (2 * heads + head) * HEAD_DIM
    k_base, v_base = k + batch * k_batch + head * k_head, v + batch * v_batch + head * v_head
    k_rows = load_rows(k_base, k_tokens, row_offsets(k_tokens, k_token), pad_k, HEAD_DIM, BLOCK_D, True, HAS_PAD)
    v_rows = load_rows(v_base, k_tokens, row_offsets(k_tokens, v_token), pad_v, HEAD_DIM, BLOCK_D, True, HAS_PAD)
    first_row = batch * grid_tokens * heads + head
    q_base, dout_base = q + batch * q_batch + head * q_head, dout + first_row * HEAD_DIM
    lse_base, delta_base, dq_base = q_base, q_base, q_base  # never touched; older Triton takes no None in a tuple
    if WHOLE:
        dq_base = dq + batch * grid_tokens * grad_token + head * HEAD_DIM
    else:
        lse_base, delta_base = lse + first_row, delta + first_row
    strides = (q_token, heads, grad_token)
    inputs = (number, token_map, q_base, dout_base, lse_base, delta_base, strides, k_rows, v_rows, dq_base)
    planes = plane(bias, mask, kind, head, bias_kind, bias_head, NUM_TOKENS, HAS_BIAS, HAS_MASK)
    dropout = (seed, threshold, kept)
    sums = (tl.zeros([BLOCK_N, BLOCK_D], tl.float32), tl.zeros([BLOCK_N, BLOCK_D], tl.float32))

    first, last = visible_tiles(visible, kind, tile, FULL, TILES, HIDES)
    for step in tl.range(first, last):
        sums = _keys_tile(
            sums, step * BLOCK_M, inputs, planes, dropout, head, first_key, scale,
            NUM_TOKENS, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, HAS_PADDING, False,
            HAS_BIAS, HAS_MASK, HAS_DROPOUT, WHOLE, PRECISION,
        )  # fmt: skip
    if TAIL:
        sums = _keys_tile(
            sums, FULL * BLOCK_M, inputs, planes, dropout, head, first_key, scale,
            NUM_TOKENS, HEAD_DIM, BLOCK_D, TAIL, BLOCK_N, True, True,
            HAS_BIAS, HAS_MASK, HAS_DROPOUT, WHOLE, PRECISION,
        )  # fmt: skip
    if HIDES == 2:
        hidden = FULL - (last - first)
        if hidden > 0:
            proven = _hidden_queries_are_negligible(
                largest_norm(k_rows), first, last, inputs, bias_max, scale, mask_value,
                HEAD_DIM, BLOCK_D, BLOCK_M, FULL, HAS_PADDING,
            )  # fmt: skip
            hidden = tl.where(proven == 1, 0, hidden)
        for rank in range(0, hidden):
            sums = _keys_tile(
                sums, hidden_tile(rank, first, last) * BLOCK_M, inputs, planes, dropout, head, first_key, scale,
                NUM_TOKENS, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, HAS_PADDING, False,
                HAS_BIAS, HAS_MASK, HAS_DROPOUT, WHOLE, PRECISION,
            )  # fmt: skip

    k_grad, v_grad = sums[0] * scale, sums[1]
    first_grad, offsets = batch * grid_tokens * grad_token + head * HEAD_DIM, row_offsets(k_tokens, grad_token)
    store_rows(dk + first_grad, k_tokens, offsets, k_grad, HEAD_DIM, BLOCK_D)
    store_rows(dv + first_grad, k_tokens, offsets, v_grad, HEAD_DIM, BLOCK_D)
    if NEEDS_PAD:  # (windows, tiles, 2, heads, HEAD_DIM), summed over windows and tiles afterwards
        channels = tl.arange(0, BLOCK_D)
        is_padding = (k_tokens == PADDING)[:, None]
        part = pad_parts + ((number.to(tl.int64) * TILES + tile) * 2 * heads + head) * HEAD_DIM + channels
        inside = channels < HEAD_DIM
        tl.store(part, tl.sum(tl.where(is_padding, k_grad, 0.0), 0), mask=inside)
        tl.store(part + heads * HEAD_DIM, tl.sum(tl.where(is_padding, v_grad, 0.0), 0), mask=inside)


# ---- Bias: the gradient of a tile of the dense bias, summed over a share of the windows ----


@triton.jit(do_not_specialize=["heads", "num_windows", "grid_tokens", "threshold", "num_kinds", "num_ranks", "share"])
def window3d_backward_bias(
    q,
    k,
    v,
    pad_qkv,
    bias,
    mask,
    seed,
    dout,
    lse,
    delta,
    parts,
    tokens,
    windows,
    kind_starts,
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
    num_kinds,
    num_ranks,
    share,
    scale,
    threshold,
    kept,
    NUM_TOKENS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ONE_KIND: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_PADDING: tl.constexpr,
    HAS_PAD: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    WHOLE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Sum dS of a tile of one head over ``share`` windows, which are sorted by kind: the bias tile stays in place."""
    PITCH: tl.constexpr = (NUM_TOKENS + PITCH_UNIT - 1) // PITCH_UNIT * PITCH_UNIT
    ROW_TILES: tl.constexpr = (NUM_TOKENS + BLOCK_M - 1) // BLOCK_M
    column_tile, head_rows, part = position(heads * ROW_TILES, NUM_TOKENS, BLOCK_N)
    row_tile, head = head_rows % ROW_TILES, head_rows // ROW_TILES
    tl.static_assert(BLOCK_N >= NUM_TOKENS or not WHOLE)
    first_key = column_tile * BLOCK_N
    queries, keys = row_tile * BLOCK_M + tl.arange(0, BLOCK_M), first_key + tl.arange(0, BLOCK_N)
    pad_k, pad_v = pad_qkv + (heads + head) * HEAD_DIM, pad_qkv + (2 * heads + head) * HEAD_DIM
    begin, end = part * share, tl.minimum((part + 1) * share, num_ranks)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if ONE_KIND:  # known to the compiler, this saves it a quarter of the registers
        num_kinds = 1
    for kind in range(num_kinds):
        planes = plane(bias, mask, kind, head, bias_kind, bias_head, NUM_TOKENS, HAS_BIAS, HAS_MASK)
        added = added_to_scores(
            planes[0], planes[1], row_tile * BLOCK_M, first_key, NUM_TOKENS, BLOCK_M, BLOCK_N, True, HAS_BIAS, HAS_MASK
        )
        first = tl.maximum(begin, tl.load(kind_starts + kind))
        last = tl.minimum(end, tl.load(kind_starts + kind + 1))
        for rank in tl.range(first, last):
            batch, token_map, number = locate(windows, rank, tokens, num_windows, NUM_TOKENS)
            q_tokens, k_tokens = tl.load(token_map + queries), tl.load(token_map + keys)
            if not HAS_PADDING:
                # A row that only fills up the tile reaches nothing that is stored: any token will do in its place.
                q_tokens, k_tokens = tl.maximum(q_tokens, 0), tl.maximum(k_tokens, 0)
            q_base, k_base = q + batch * q_batch + head * q_head, k + batch * k_batch + head * k_head
            v_base, first_row = v + batch * v_batch + head * v_head, batch * grid_tokens * heads + head
            q_offsets, rows = row_offsets(q_tokens, q_token), row_offsets(q_tokens, heads)
            k_offsets, v_offsets = row_offsets(k_tokens, k_token), row_offsets(k_tokens, v_token)
            q_rows = load_rows(q_base, q_tokens, q_offsets, q, HEAD_DIM, BLOCK_D, HAS_PADDING, False)
            k_rows = load_rows(k_base, k_tokens, k_offsets, pad_k, HEAD_DIM, BLOCK_D, HAS_PADDING, HAS_PAD)
            v_rows = load_rows(v_base, k_tokens, v_offsets, pad_v, HEAD_DIM, BLOCK_D, HAS_PADDING, HAS_PAD)
            dout_rows = load_rows(
                dout + first_row * HEAD_DIM, q_tokens, rows * HEAD_DIM, q, HEAD_DIM, BLOCK_D, HAS_PADDING, False
            )
            q_lse, row_delta = 0.0, 0.0
            if WHOLE:
                pass
            elif HAS_PADDING:
                q_lse = tl.load(lse + first_row + rows, mask=q_tokens >= 0, other=float("inf"))
                row_delta = tl.load(delta + first_row + rows, mask=q_tokens >= 0, other=0.0)
            else:
                q_lse, row_delta = tl.load(lse + first_row + rows), tl.load(delta + first_row + rows)
            scores = scores_of(q_rows, k_rows, added, scale, HAS_BIAS or HAS_MASK, PRECISION)
            if WHOLE and BLOCK_N != NUM_TOKENS:
                scores = tl.where((keys < NUM_TOKENS)[None, :], scores, float("-inf"))
            factors = 1.0
            if HAS_DROPOUT:
                dropout = (seed, threshold, kept)
                factors = dropout_factors(dropout, number, head, queries, first_key, BLOCK_M, BLOCK_N)
            _, grad_scores = score_gradients(
                scores, q_lse, row_delta, dout_rows, v_rows, factors, WHOLE, HAS_DROPOUT, PRECISION
            )
            total += grad_scores
    base = parts + (part * heads + head).to(tl.int64) * (NUM_TOKENS * PITCH)
    inside = (queries < NUM_TOKENS)[:, None] & (keys < PITCH)[None, :]
    tl.store(base + queries[:, None] * PITCH + keys[None, :], total, mask=inside)

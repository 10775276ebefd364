"""The backward kernels of 3D window attention; window3d.py launches them and says what their arguments hold.

Three kernels recompute the probabilities P. Each owns what it sums, so nothing is added atomically and every result has
one order of summation: a tile of queries its dq, a tile of keys its dk and dv, and a tile of the bias gradient its
share of the windows. Where a tile holds all keys, rows of scores are seen whole: the kernels need nothing of the
forward pass (``kept`` is None), and that of the keys gives dq as well.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from vidattn.kernels.rows import PADDING, head_of, load_rows, row_offsets, store_rows
from vidattn.kernels.softmax import dropout_factors, score_gradients
from vidattn.kernels.window3d_tiles import (
    PITCH_UNIT,
    Queries,
    added_to_scores,
    hidden_keys_are_negligible,
    hidden_tile,
    is_negligible,
    largest_norm,
    locate,
    meet_keys,
    plane_offsets,
    position,
    row_norms,
    scores_of,
    type_of,
    visible_tiles,
)

__all__ = ["Gradients", "window3d_backward_bias", "window3d_backward_keys", "window3d_backward_queries"]


class Gradients(NamedTuple):
    """Gradients that a kernel writes, dense but for the stride from token to token.

    Attributes:
        dq: (B, D, H, W, h, d); None where another kernel writes it. So are the others.
        dk: like ``dq``.
        dv: like ``dq``.
        token: elements from a token to the next, batch elements too.
    """

    dq: Any
    dk: Any
    dv: Any
    token: Any


# ---- Queries: dq, and delta = sum(dout * out) of each row, which the other kernels read ----


class _QueryRows(NamedTuple):
    """Of the tile of queries in each window: dout (BLOCK_M, BLOCK_D), log-sum-exp and delta (BLOCK_M,)."""

    dout: Any
    lse: Any
    delta: Any


@triton.jit
def _queries_tile(
    sums,
    first_key,
    queries,
    given,
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
    """Add what ``BLOCK`` keys give to dq of every window."""
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
        _, grad_scores = score_gradients(
            keys.scores, given.lse[w], given.delta[w], given.dout[w], keys.v, factors, PRECISION
        )
        updated += (tl.dot(grad_scores.to(keys.k.dtype), keys.k, sums[w], input_precision=PRECISION),)
    return updated


@triton.jit(do_not_specialize=["heads", "num_windows", "grid_tokens"])
def window3d_backward_queries(
    q,
    k,
    v,
    pad_qkv,
    planes,
    hiding,
    dropout,
    out,
    dout,
    kept,
    gradients,
    windows,
    heads,
    num_windows,
    grid_tokens,
    scale,
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
    """Gradient of a tile of queries of one head in ``WINDOWS`` windows of the same kind, and their delta."""
    FULL: tl.constexpr = NUM_TOKENS // BLOCK_N
    TILES: tl.constexpr = (NUM_TOKENS + BLOCK_M - 1) // BLOCK_M
    place = position(heads, NUM_TOKENS, BLOCK_M)
    head, kind = place.head, tl.load(windows.kinds + place.group)
    query_numbers = place.tile * BLOCK_M + tl.arange(0, BLOCK_M)
    batches, maps, numbers, q_rows, dout_rows, lses, deltas = (), (), (), (), (), (), ()
    k_bases, v_bases, sums = (), (), ()
    for w in tl.static_range(WINDOWS):
        window = locate(windows, place.group * WINDOWS + w, num_windows, NUM_TOKENS)
        tokens = tl.load(window.tokens + query_numbers)
        first_row, rows = window.batch * grid_tokens * heads + head, row_offsets(tokens, heads)
        row_dout = load_rows(dout + first_row * HEAD_DIM, tokens, rows * HEAD_DIM, HEAD_DIM, BLOCK_D, True)
        row_out = load_rows(out + first_row * HEAD_DIM, tokens, rows * HEAD_DIM, HEAD_DIM, BLOCK_D, True)
        row_delta = tl.sum(row_dout.to(tl.float32) * row_out.to(tl.float32), 1)
        tl.store(kept.delta + first_row + rows, row_delta, mask=tokens >= 0)
        q_base, q_offsets = head_of(q, window.batch, head), row_offsets(tokens, q.token)
        batches += (window.batch,)
        maps += (window.tokens,)
        numbers += (window.number,)
        q_rows += (load_rows(q_base, tokens, q_offsets, HEAD_DIM, BLOCK_D, True),)  # (BLOCK_M, BLOCK_D)
        dout_rows += (row_dout,)
        lses += (tl.load(kept.lse + first_row + rows, mask=tokens >= 0, other=float("inf")),)
        deltas += (row_delta,)
        k_bases += (head_of(k, window.batch, head),)
        v_bases += (head_of(v, window.batch, head),)
        sums += (tl.zeros([BLOCK_M, BLOCK_D], tl.float32),)
    pad_k, pad_v = None, None
    if pad_qkv is not None:
        pad_k, pad_v = pad_qkv + (heads + head) * HEAD_DIM, pad_qkv + (2 * heads + head) * HEAD_DIM
    queries = Queries(
        head=head, first=place.tile * BLOCK_M, numbers=numbers, maps=maps, rows=q_rows,
        k=k_bases, v=v_bases, k_token=k.token, v_token=v.token, pad_k=pad_k, pad_v=pad_v,
        planes=planes, plane=plane_offsets(planes, kind, type_of(planes, numbers[0]), head, NUM_TOKENS),
        dropout=dropout, scale=scale,
    )  # fmt: skip
    given = _QueryRows(dout_rows, lses, deltas)

    tiles = visible_tiles(hiding, kind, place.tile, FULL, TILES)
    if FULL > 0:
        tl.assume(tiles.first < tiles.last)
        for step in tl.range(tiles.first, tiles.last):
            sums = _queries_tile(
                sums, step * BLOCK_N, queries, given,
                NUM_TOKENS, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, WINDOWS, HAS_PADDING, False, PRECISION,
            )  # fmt: skip
    if TAIL:
        sums = _queries_tile(
            sums, FULL * BLOCK_N, queries, given,
            NUM_TOKENS, HEAD_DIM, BLOCK_D, BLOCK_M, TAIL, WINDOWS, True, True, PRECISION,
        )  # fmt: skip
    if hiding.mask_value is not None:
        hidden = FULL - (tiles.last - tiles.first)
        if hidden > 0:
            proven = hidden_keys_are_negligible(
                queries, lses, tiles, hiding, HEAD_DIM, BLOCK_D, BLOCK_N, FULL, WINDOWS, HAS_PADDING
            )
            hidden = tl.where(proven == 1, 0, hidden)
        for rank in range(0, hidden):
            sums = _queries_tile(
                sums, hidden_tile(rank, tiles) * BLOCK_N, queries, given,
                NUM_TOKENS, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, WINDOWS, HAS_PADDING, False, PRECISION,
            )  # fmt: skip

    for w in tl.static_range(WINDOWS):
        tokens = tl.load(maps[w] + query_numbers)
        base = gradients.dq + batches[w] * grid_tokens * gradients.token + head * HEAD_DIM
        store_rows(base, tokens, row_offsets(tokens, gradients.token), sums[w] * scale, HEAD_DIM, BLOCK_D)


# ---- Keys: dk and dv, and what the padding keys of the tile contribute to the gradient of pad_qkv ----


class _Keys(NamedTuple):
    """A tile of keys of one head in one window, and what it takes to meet the queries.

    Attributes:
        head: number of the head.
        first: first key of the tile.
        window: the window.
        k: keys, (BLOCK_N, BLOCK_D).
        v: values, (BLOCK_N, BLOCK_D).
        q: pointer to the queries of the window.
        q_token: elements from a token's query to the next.
        dout: pointer to the output gradients.
        heads: rows from token to token of what is contiguous.
        lse: pointer to the log-sum-exp; None where rows are seen whole.
        delta: pointer to delta; None likewise.
        dq: pointer to the query gradients where rows are seen whole; None elsewhere.
        grad_token: elements from token to token of ``dq``.
        planes: argument of the kernel.
        plane: where the planes of this head and kind start in them.
        dropout: argument of the kernel.
        scale: factor of q k^T.
    """

    head: Any
    first: Any
    window: Any
    k: Any
    v: Any
    q: Any
    q_token: Any
    dout: Any
    heads: Any
    lse: Any
    delta: Any
    dq: Any
    grad_token: Any
    planes: Any
    plane: Any
    dropout: Any
    scale: Any


class _KeySums(NamedTuple):
    """dk and dv of a tile of keys, float32 (BLOCK_N, BLOCK_D)."""

    dk: Any
    dv: Any


@triton.jit
def _keys_tile(
    sums,
    first_query,
    keys,
    NUM_TOKENS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
    PAST_END: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add what ``BLOCK`` queries give to dk and dv; store their dq where it is complete."""
    queries = first_query + tl.arange(0, BLOCK)
    added = None
    if keys.planes.bias is not None:
        added = added_to_scores(
            keys.planes, keys.plane, first_query, keys.first, NUM_TOKENS, BLOCK, BLOCK_N, PAST_END
        )  # (BLOCK, BLOCK_N)
    tokens = tl.load(keys.window.tokens + queries)
    rows = row_offsets(tokens, keys.heads)
    q_rows = load_rows(keys.q, tokens, row_offsets(tokens, keys.q_token), HEAD_DIM, BLOCK_D, MASKED)  # (BLOCK, BLOCK_D)
    dout_rows = load_rows(keys.dout, tokens, rows * HEAD_DIM, HEAD_DIM, BLOCK_D, MASKED)
    q_lse, delta = None, None  # (BLOCK,)
    if keys.lse is not None:  # of rows seen whole, those that are padding, or none, have a gradient of zeros
        if MASKED:  # they weigh nothing
            q_lse = tl.load(keys.lse + rows, mask=tokens >= 0, other=float("inf"))
            delta = tl.load(keys.delta + rows, mask=tokens >= 0, other=0.0)
        else:
            q_lse, delta = tl.load(keys.lse + rows), tl.load(keys.delta + rows)
    scores = scores_of(q_rows, keys.k, added, keys.scale, PRECISION)  # (BLOCK, BLOCK_N)
    if keys.lse is None and BLOCK_N != NUM_TOKENS:
        scores = tl.where((tl.arange(0, BLOCK_N) < NUM_TOKENS)[None, :], scores, float("-inf"))
    factors = None
    if keys.dropout is not None:
        factors = dropout_factors(keys.dropout, keys.window.number, keys.head, queries, keys.first, BLOCK, BLOCK_N)
    dropped, grad_scores = score_gradients(scores, q_lse, delta, dout_rows, keys.v, factors, PRECISION)
    if keys.dq is not None:
        dq = tl.dot(grad_scores.to(keys.k.dtype), keys.k, input_precision=PRECISION) * keys.scale
        store_rows(keys.dq, tokens, row_offsets(tokens, keys.grad_token), dq, HEAD_DIM, BLOCK_D)
    dv = tl.dot(tl.trans(dropped.to(dout_rows.dtype)), dout_rows, sums.dv, input_precision=PRECISION)
    dk = tl.dot(tl.trans(grad_scores.to(q_rows.dtype)), q_rows, sums.dk, input_precision=PRECISION)
    return _KeySums(dk, dv)


@triton.jit
def _hidden_queries_are_negligible(
    keys,
    tiles,
    hiding,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    FULL: tl.constexpr,
    MASKED: tl.constexpr,
):
    """1 if a bound on their scores proves that no hidden tile of queries gives these keys a weight that counts."""
    proven, largest = 1, largest_norm(keys.k)
    for rank in range(0, FULL - (tiles.last - tiles.first)):
        tokens = tl.load(keys.window.tokens + hidden_tile(rank, tiles) * BLOCK_M + tl.arange(0, BLOCK_M))
        q_rows = load_rows(keys.q, tokens, row_offsets(tokens, keys.q_token), HEAD_DIM, BLOCK_D, MASKED)
        q_lse = tl.load(keys.lse + row_offsets(tokens, keys.heads), mask=tokens >= 0, other=float("inf"))
        proven &= is_negligible(row_norms(q_rows), largest, q_lse, hiding, keys.scale)
    return proven


@triton.jit(do_not_specialize=["heads", "num_windows", "grid_tokens"])
def window3d_backward_keys(
    q,
    k,
    v,
    pad_qkv,
    planes,
    hiding,
    dropout,
    dout,
    kept,
    gradients,
    pad_parts,
    windows,
    heads,
    num_windows,
    grid_tokens,
    scale,
    NUM_TOKENS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TAIL: tl.constexpr,
    HAS_PADDING: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of a tile of keys and values of one head in one window; if it holds all keys, of the queries too."""
    FULL: tl.constexpr = NUM_TOKENS // BLOCK_M
    TILES: tl.constexpr = (NUM_TOKENS + BLOCK_N - 1) // BLOCK_N
    tl.static_assert(BLOCK_N >= NUM_TOKENS or kept is not None)
    place = position(heads, NUM_TOKENS, BLOCK_N)
    head, kind = place.head, tl.load(windows.kinds + place.group)
    first_key = place.tile * BLOCK_N
    window = locate(windows, place.group, num_windows, NUM_TOKENS)
    tokens = tl.load(window.tokens + first_key + tl.arange(0, BLOCK_N))
    pad_k, pad_v = None, None
    if pad_qkv is not None:
        pad_k, pad_v = pad_qkv + (heads + head) * HEAD_DIM, pad_qkv + (2 * heads + head) * HEAD_DIM
    k_base, v_base = head_of(k, window.batch, head), head_of(v, window.batch, head)
    k_rows = load_rows(k_base, tokens, row_offsets(tokens, k.token), HEAD_DIM, BLOCK_D, True, pad_k)
    v_rows = load_rows(v_base, tokens, row_offsets(tokens, v.token), HEAD_DIM, BLOCK_D, True, pad_v)
    first_row = window.batch * grid_tokens * heads + head
    first_grad = window.batch * grid_tokens * gradients.token + head * HEAD_DIM
    lse, delta, dq = None, None, None
    if kept is not None:
        lse, delta = kept.lse + first_row, kept.delta + first_row
    if gradients.dq is not None:
        dq = gradients.dq + first_grad
    keys = _Keys(
        head=head, first=first_key, window=window, k=k_rows, v=v_rows,
        q=head_of(q, window.batch, head), q_token=q.token, dout=dout + first_row * HEAD_DIM, heads=heads,
        lse=lse, delta=delta, dq=dq, grad_token=gradients.token,
        planes=planes, plane=plane_offsets(planes, kind, type_of(planes, window.number), head, NUM_TOKENS),
        dropout=dropout, scale=scale,
    )  # fmt: skip
    sums = _KeySums(tl.zeros([BLOCK_N, BLOCK_D], tl.float32), tl.zeros([BLOCK_N, BLOCK_D], tl.float32))

    tiles = visible_tiles(hiding, kind, place.tile, FULL, TILES)
    if FULL > 0:
        tl.assume(tiles.first < tiles.last)
        for step in tl.range(tiles.first, tiles.last):
            sums = _keys_tile(
                sums, step * BLOCK_M, keys,
                NUM_TOKENS, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, HAS_PADDING, False, PRECISION,
            )  # fmt: skip
    if TAIL:
        sums = _keys_tile(
            sums, FULL * BLOCK_M, keys,
            NUM_TOKENS, HEAD_DIM, BLOCK_D, TAIL, BLOCK_N, True, True, PRECISION,
        )  # fmt: skip
    if hiding.mask_value is not None:
        hidden = FULL - (tiles.last - tiles.first)
        if hidden > 0:
            proven = _hidden_queries_are_negligible(keys, tiles, hiding, HEAD_DIM, BLOCK_D, BLOCK_M, FULL, HAS_PADDING)
            hidden = tl.where(proven == 1, 0, hidden)
        for rank in range(0, hidden):
            sums = _keys_tile(
                sums, hidden_tile(rank, tiles) * BLOCK_M, keys,
                NUM_TOKENS, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, HAS_PADDING, False, PRECISION,
            )  # fmt: skip

    k_grad, v_grad = sums.dk * scale, sums.dv
    offsets = row_offsets(tokens, gradients.token)
    store_rows(gradients.dk + first_grad, tokens, offsets, k_grad, HEAD_DIM, BLOCK_D)
    store_rows(gradients.dv + first_grad, tokens, offsets, v_grad, HEAD_DIM, BLOCK_D)
    if pad_parts is not None:  # (windows, tiles, 2, heads, HEAD_DIM), summed over windows and tiles afterwards
        channels = tl.arange(0, BLOCK_D)
        is_padding = (tokens == PADDING)[:, None]
        number = window.number.to(tl.int64) * TILES + place.tile
        part = pad_parts + (number * 2 * heads + head) * HEAD_DIM + channels
        inside = channels < HEAD_DIM
        tl.store(part, tl.sum(tl.where(is_padding, k_grad, 0.0), 0), mask=inside)
        tl.store(part + heads * HEAD_DIM, tl.sum(tl.where(is_padding, v_grad, 0.0), 0), mask=inside)


# ---- Bias: the gradient of a tile of the dense bias, summed over a share of the windows ----


@triton.jit
def _window_gradient(
    q,
    k,
    v,
    pad_k,
    pad_v,
    added,
    dropout,
    dout,
    kept,
    window,
    head,
    queries,
    keys,
    first_key,
    heads,
    grid_tokens,
    scale,
    NUM_TOKENS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_PADDING: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Give dS of a tile of one head in one window, (BLOCK_M, BLOCK_N)."""
    q_tokens, k_tokens = tl.load(window.tokens + queries), tl.load(window.tokens + keys)
    if not HAS_PADDING:
        # A row that only fills up the tile reaches nothing that is stored: any token will do in its place.
        q_tokens, k_tokens = tl.maximum(q_tokens, 0), tl.maximum(k_tokens, 0)
    q_base, k_base = head_of(q, window.batch, head), head_of(k, window.batch, head)
    v_base, first_row = head_of(v, window.batch, head), window.batch * grid_tokens * heads + head
    q_offsets, rows = row_offsets(q_tokens, q.token), row_offsets(q_tokens, heads)
    k_offsets, v_offsets = row_offsets(k_tokens, k.token), row_offsets(k_tokens, v.token)
    q_rows = load_rows(q_base, q_tokens, q_offsets, HEAD_DIM, BLOCK_D, HAS_PADDING)  # (BLOCK_M, BLOCK_D)
    k_rows = load_rows(k_base, k_tokens, k_offsets, HEAD_DIM, BLOCK_D, HAS_PADDING, pad_k)  # (BLOCK_N, BLOCK_D)
    v_rows = load_rows(v_base, k_tokens, v_offsets, HEAD_DIM, BLOCK_D, HAS_PADDING, pad_v)
    dout_rows = load_rows(dout + first_row * HEAD_DIM, q_tokens, rows * HEAD_DIM, HEAD_DIM, BLOCK_D, HAS_PADDING)
    q_lse, row_delta = None, None  # (BLOCK_M,)
    if kept is not None:
        if HAS_PADDING:
            q_lse = tl.load(kept.lse + first_row + rows, mask=q_tokens >= 0, other=float("inf"))
            row_delta = tl.load(kept.delta + first_row + rows, mask=q_tokens >= 0, other=0.0)
        else:
            q_lse, row_delta = tl.load(kept.lse + first_row + rows), tl.load(kept.delta + first_row + rows)
    scores = scores_of(q_rows, k_rows, added, scale, PRECISION)  # (BLOCK_M, BLOCK_N)
    if kept is None and BLOCK_N != NUM_TOKENS:
        scores = tl.where((keys < NUM_TOKENS)[None, :], scores, float("-inf"))
    factors = None
    if dropout is not None:
        factors = dropout_factors(dropout, window.number, head, queries, first_key, BLOCK_M, BLOCK_N)
    _, grad_scores = score_gradients(scores, q_lse, row_delta, dout_rows, v_rows, factors, PRECISION)
    return grad_scores


@triton.jit(do_not_specialize=["heads", "num_windows", "grid_tokens", "num_kinds", "share"])
def window3d_backward_bias(
    q,
    k,
    v,
    pad_qkv,
    planes,
    dropout,
    dout,
    kept,
    parts,
    windows,
    kind_starts,
    heads,
    num_windows,
    grid_tokens,
    num_kinds,
    share,
    scale,
    NUM_TOKENS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ONE_KIND: tl.constexpr,
    HAS_PADDING: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Sum dS of a tile of one head over ``share`` windows, which are sorted by kind: the bias tile stays in place.

    Where windows have types, a program passes over the windows of the share that are not of its type.
    """
    PITCH: tl.constexpr = (NUM_TOKENS + PITCH_UNIT - 1) // PITCH_UNIT * PITCH_UNIT
    ROW_TILES: tl.constexpr = (NUM_TOKENS + BLOCK_M - 1) // BLOCK_M
    tl.static_assert(BLOCK_N >= NUM_TOKENS or kept is not None)
    place = position(heads * ROW_TILES, NUM_TOKENS, BLOCK_N)  # the tiles of queries of a head are heads of their own
    row_tile, head, part = place.head % ROW_TILES, place.head // ROW_TILES, place.group
    own_type = 0
    if planes.types is not None:  # every type has all shares, with windows of its own in them
        part, own_type = place.group // planes.types.count, place.group % planes.types.count
    first_key = place.tile * BLOCK_N
    queries, keys = row_tile * BLOCK_M + tl.arange(0, BLOCK_M), first_key + tl.arange(0, BLOCK_N)
    pad_k, pad_v = None, None
    if pad_qkv is not None:
        pad_k, pad_v = pad_qkv + (heads + head) * HEAD_DIM, pad_qkv + (2 * heads + head) * HEAD_DIM
    begin, end = part * share, (part + 1) * share
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if ONE_KIND:  # known to the compiler, this saves it a quarter of the registers
        num_kinds = 1
    for kind in range(num_kinds):
        added = None
        if planes.bias is not None:
            plane = plane_offsets(planes, kind, own_type, head, NUM_TOKENS)
            added = added_to_scores(
                planes, plane, row_tile * BLOCK_M, first_key, NUM_TOKENS, BLOCK_M, BLOCK_N, True
            )  # (BLOCK_M, BLOCK_N)
        first = tl.maximum(begin, tl.load(kind_starts + kind))
        last = tl.minimum(end, tl.load(kind_starts + kind + 1))
        for rank in tl.range(first, last):
            window = locate(windows, rank, num_windows, NUM_TOKENS)
            if planes.types is None:
                total += _window_gradient(
                    q, k, v, pad_k, pad_v, added, dropout, dout, kept, window, head, queries, keys, first_key,
                    heads, grid_tokens, scale,
                    NUM_TOKENS, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, HAS_PADDING, PRECISION,
                )  # fmt: skip
            else:
                if type_of(planes, window.number) == own_type:
                    total += _window_gradient(
                        q, k, v, pad_k, pad_v, added, dropout, dout, kept, window, head, queries, keys, first_key,
                        heads, grid_tokens, scale,
                        NUM_TOKENS, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, HAS_PADDING, PRECISION,
                    )  # fmt: skip
    base = parts + (place.group * heads + head).to(tl.int64) * (NUM_TOKENS * PITCH)
    inside = (queries < NUM_TOKENS)[:, None] & (keys < PITCH)[None, :]
    tl.store(base + queries[:, None] * PITCH + keys[None, :], total, mask=inside)

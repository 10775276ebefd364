"""Tiles of scores of 3D window attention: which queries and keys, what is added, which the region mask hides."""

import triton
import triton.language as tl

from vidattn.kernels.rows import load_rows, row_offsets

__all__ = [
    "added_to_scores",
    "hidden_keys_are_negligible",
    "hidden_tile",
    "is_negligible",
    "largest_norm",
    "locate",
    "plane",
    "position",
    "row_norms",
    "scores_of",
    "visible_tiles",
]

# Rows of the dense bias and mask, and of the token maps, start on round element numbers.
PITCH_UNIT = tl.constexpr(64)
MAP_UNIT = tl.constexpr(128)
# Weights below exp(-40) of a row's largest are below float32's rounding of any sum with it, however many keys add up.
NEGLIGIBLE = tl.constexpr(-40.0)


@triton.jit
def position(heads, NUM_TOKENS: tl.constexpr, BLOCK: tl.constexpr):
    """(tile, head, group) of this program: tiles of one head of one group are neighbours, for they share keys."""
    tiles: tl.constexpr = (NUM_TOKENS + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    return program % tiles, program // tiles % heads, program // tiles // heads


@triton.jit
def locate(windows, rank, tokens, num_windows, NUM_TOKENS: tl.constexpr):
    """Batch element, token map and number (for dropout) of the window that a list of windows holds at ``rank``."""
    map_pitch: tl.constexpr = (NUM_TOKENS + MAP_UNIT - 1) // MAP_UNIT * MAP_UNIT
    batch, place = tl.load(windows + rank * 2), tl.load(windows + rank * 2 + 1)
    return batch.to(tl.int64), tokens + place * map_pitch, batch * num_windows + place


@triton.jit
def plane(
    bias,
    mask,
    kind,
    head,
    bias_kind,
    bias_head,
    NUM_TOKENS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_MASK: tl.constexpr,
):
    """Where the bias of this head and the mask of this kind of window start: (N, pitch) float32 each."""
    pitch: tl.constexpr = (NUM_TOKENS + PITCH_UNIT - 1) // PITCH_UNIT * PITCH_UNIT
    wide = tl.full([], 0, tl.int64) + kind
    if HAS_BIAS:
        bias = bias + wide * bias_kind + head.to(tl.int64) * bias_head
    else:
        bias = 0  # never read; older Triton returns no None
    if HAS_MASK:
        mask = mask + wide * (NUM_TOKENS * pitch)
    else:
        mask = 0
    return bias, mask


@triton.jit
def added_to_scores(
    bias,
    mask,
    first_query,
    first_key,
    NUM_TOKENS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PAST_END: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_MASK: tl.constexpr,
):
    """Bias plus mask of a tile, float32 (BLOCK_M, BLOCK_N), from their planes; 0 without any.

    ``PAST_END`` says that queries may lie past the last one; keys may reach into the padding of a plane's rows.
    """
    pitch: tl.constexpr = (NUM_TOKENS + PITCH_UNIT - 1) // PITCH_UNIT * PITCH_UNIT
    rows = tl.arange(0, BLOCK_M)
    if PAST_END:  # the last row is repeated, so that nothing outside is read
        rows, first_row = tl.minimum(first_query + rows, NUM_TOKENS - 1), 0
    else:
        first_row = first_query * pitch
    inside = rows[:, None] * pitch + (first_key + tl.arange(0, BLOCK_N))[None, :]
    added = 0.0
    if HAS_BIAS:
        added = tl.load((bias + first_row) + inside)
    if HAS_MASK:
        added += tl.load((mask + first_row) + inside)
    return added


@triton.jit
def scores_of(q_rows, k_rows, added, scale, HAS_ADDED: tl.constexpr, PRECISION: tl.constexpr):
    """Scores of a tile. The scale multiplies the float32 product: folded into q it would be rounded with it."""
    scores = tl.dot(q_rows, tl.trans(k_rows), input_precision=PRECISION) * scale
    if HAS_ADDED:
        scores += added
    return scores


@triton.jit
def visible_tiles(visible, kind, tile, full_tiles, TILES: tl.constexpr, HIDES: tl.constexpr):
    """First and one past the last tile that the region mask does not hide as a whole from tile number ``tile``."""
    first, last = 0, full_tiles
    if HIDES:
        first = tl.load(visible + (kind * TILES + tile) * 2)
        last = tl.load(visible + (kind * TILES + tile) * 2 + 1)
    return first, last


@triton.jit
def hidden_tile(rank, first, last):
    """The hidden tile number ``rank``: those in front of ``first``, then those from ``last`` on."""
    return tl.where(rank < first, rank, rank + last - first)


@triton.jit
def row_norms(rows):
    """Euclidean norm of each row, float32."""
    wide = rows.to(tl.float32)
    return tl.sqrt(tl.sum(wide * wide, 1))


@triton.jit
def largest_norm(rows):
    """Largest norm of a row; NaN if there is one, which a maximum alone would pass over."""
    norms = row_norms(rows)
    return tl.max(norms, 0) + 0.0 * tl.sum(norms, 0)


@triton.jit
def is_negligible(norms, other_norm, reference, bias_max, scale, mask_value):
    """1 if every masked score is so far below its row's ``reference`` (maximum or log-sum-exp) that it cannot count.

    By Cauchy-Schwarz a score is at most |scale| |q| |k| + the largest bias + the mask. A NaN proves nothing.
    """
    bound = tl.abs(scale) * norms * other_norm + mask_value
    if bias_max is not None:
        bound += tl.load(bias_max)
    return tl.min(tl.where(bound - reference < NEGLIGIBLE, 1, 0), 0)


@triton.jit
def hidden_keys_are_negligible(
    q_rows,
    references,
    first,
    last,
    maps,
    k_bases,
    k_token,
    pad_k,
    bias_max,
    scale,
    mask_value,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FULL: tl.constexpr,
    WINDOWS: tl.constexpr,
    MASKED: tl.constexpr,
    HAS_PAD: tl.constexpr,
):
    """1 if a bound on their scores proves that no hidden tile of keys counts; ``references`` as in is_negligible."""
    proven = 1
    for w in tl.static_range(WINDOWS):
        largest = 0.0
        for rank in range(0, FULL - (last - first)):
            keys = tl.load(maps[w] + hidden_tile(rank, first, last) * BLOCK_N + tl.arange(0, BLOCK_N))
            k_rows = load_rows(k_bases[w], keys, row_offsets(keys, k_token), pad_k, HEAD_DIM, BLOCK_D, MASKED, HAS_PAD)
            largest = tl.maximum(largest, largest_norm(k_rows), propagate_nan=tl.PropagateNan.ALL)
        norms = row_norms(q_rows[w])
        proven &= is_negligible(norms, largest, references[w], bias_max, scale, mask_value)
    return proven

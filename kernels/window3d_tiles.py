"""Tiles of scores of 3D window attention: which queries and keys, what is added, which the region mask hides."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from vidattn.kernels.rows import load_rows, row_offsets

__all__ = [
    "Hiding",
    "Kept",
    "KeyTile",
    "Place",
    "Planes",
    "Queries",
    "Tiles",
    "Types",
    "Window",
    "Windows",
    "added_to_scores",
    "hidden_keys_are_negligible",
    "hidden_tile",
    "is_negligible",
    "largest_norm",
    "locate",
    "meet_keys",
    "plane_offsets",
    "position",
    "row_norms",
    "scores_of",
    "type_of",
    "visible_tiles",
]

# Rows of the dense bias and mask, and of the token maps, start on round element numbers.
PITCH_UNIT = tl.constexpr(64)
MAP_UNIT = tl.constexpr(128)
# Weights below exp(-40) of a row's largest are below float32's rounding of any sum with it, however many keys add up.
NEGLIGIBLE = tl.constexpr(-40.0)


# ---- Arguments of the kernels ----


class Windows(NamedTuple):
    """Tables of window3d_tables.py, int32.

    Attributes:
        tokens: (windows of a batch element, pitch), the grid token that each slot holds.
        listed: (windows, 2), or (groups, windows of a group, 2): batch element, window of it.
        kinds: (windows,) or (groups,), their kinds.
    """

    tokens: Any
    listed: Any
    kinds: Any


class Planes(NamedTuple):
    """What is added to the scores (window3d_planes.py), float32 planes (N, pitch).

    Attributes:
        bias: planes of bias, of bias and mask, or of masks alone; None where nothing is added.
        kind: elements from a kind's planes to the next kind's, 0 where all kinds share them.
        head: elements from a head's plane to the next, 0 where all heads share it.
        mask: (kinds, N, pitch), added too; None without.
        types: windows of several types, whose planes of bias follow each other; None where there is one.
    """

    bias: Any
    kind: Any
    head: Any
    mask: Any
    types: Any = None


class Types(NamedTuple):
    """Which bias a window takes.

    Attributes:
        numbers: int32 (windows,), the type of window g is ``numbers[g % windows]``.
        windows: how many these are.
        count: number of types.
        plane: elements from a type's planes to the next type's.
    """

    numbers: Any
    windows: Any
    count: Any
    plane: Any


class Hiding(NamedTuple):
    """Tiles that the region mask hides as a whole.

    Attributes:
        visible: int32 (kinds, tiles, 2), first and one past the last full tile that a tile sees; None if it sees all.
        mask_value: what is added to hidden scores, which a proof may leave out; None where there are none, or where
            it is infinite and they need no proof.
        bias_max: float32 (1,), the largest bias, for the proof; None without bias.
    """

    visible: Any
    mask_value: Any
    bias_max: Any


class Kept(NamedTuple):
    """What the backward pass reads of each row, float32 (B, D, H, W, h); None where rows are seen whole.

    Attributes:
        lse: log-sum-exp of the forward pass.
        delta: sum(dout * out).
    """

    lse: Any
    delta: Any


# ---- Where a program is ----


class Place(NamedTuple):
    """Tile, head, and window or group of windows of a program."""

    tile: Any
    head: Any
    group: Any


class Window(NamedTuple):
    """A window: batch element (64 bits), pointer to its token map, and its number, for dropout."""

    batch: Any
    tokens: Any
    number: Any


@triton.jit
def position(heads, NUM_TOKENS: tl.constexpr, BLOCK: tl.constexpr):
    """Place of this program: tiles of one head of one group are neighbours, for they share keys."""
    tiles: tl.constexpr = (NUM_TOKENS + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    return Place(program % tiles, program // tiles % heads, program // tiles // heads)


@triton.jit
def locate(windows, rank, num_windows, NUM_TOKENS: tl.constexpr):
    """Window that the list of windows holds at ``rank``."""
    map_pitch: tl.constexpr = (NUM_TOKENS + MAP_UNIT - 1) // MAP_UNIT * MAP_UNIT
    batch, place = tl.load(windows.listed + rank * 2), tl.load(windows.listed + rank * 2 + 1)
    return Window(batch.to(tl.int64), windows.tokens + place * map_pitch, batch * num_windows + place)


# ---- Scores ----


class Queries(NamedTuple):
    """A tile of queries of one head in windows of one kind, and what it takes to meet their keys.

    Attributes:
        head: number of the head.
        first: first query of the tile.
        numbers: number of each window, for dropout.
        maps: token map of each window.
        rows: q of each window, (BLOCK_M, BLOCK_D).
        k: pointer to the keys of each window.
        v: pointer to the values of each window.
        k_token: elements from a token's key to the next.
        v_token: elements from a token's value to the next.
        pad_k: pointer to the key of padding tokens; None for zeros.
        pad_v: pointer to their value; None for zeros.
        planes: argument of the kernel.
        plane: where the planes of this head and kind start in them.
        dropout: argument of the kernel.
        scale: factor of q k^T.
    """

    head: Any
    first: Any
    numbers: Any
    maps: Any
    rows: Any
    k: Any
    v: Any
    k_token: Any
    v_token: Any
    pad_k: Any
    pad_v: Any
    planes: Any
    plane: Any
    dropout: Any
    scale: Any


class Plane(NamedTuple):
    """Elements to the bias of a head and to the mask of a kind of window."""

    bias: Any
    mask: Any


@triton.jit
def type_of(planes, number):
    """Type of a window, by its number; 0 where there is one type."""
    if planes.types is None:
        return 0
    else:
        return tl.load(planes.types.numbers + number % planes.types.windows)


@triton.jit
def plane_offsets(planes, kind, type, head, NUM_TOKENS: tl.constexpr):
    """Where the bias of this type and head and the mask of this kind of window start: (N, pitch) float32 each."""
    pitch: tl.constexpr = (NUM_TOKENS + PITCH_UNIT - 1) // PITCH_UNIT * PITCH_UNIT
    wide = tl.full([], 0, tl.int64) + kind
    bias = wide * planes.kind + head.to(tl.int64) * planes.head
    if planes.types is not None:
        bias += (tl.full([], 0, tl.int64) + type) * planes.types.plane
    return Plane(bias, wide * (NUM_TOKENS * pitch))


@triton.jit
def added_to_scores(
    planes,
    plane,
    first_query,
    first_key,
    NUM_TOKENS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PAST_END: tl.constexpr,
):
    """Bias plus mask of a tile, float32 (BLOCK_M, BLOCK_N), from their planes.

    ``PAST_END`` says that queries may lie past the last one; keys may reach into the padding of a plane's rows.
    """
    pitch: tl.constexpr = (NUM_TOKENS + PITCH_UNIT - 1) // PITCH_UNIT * PITCH_UNIT
    rows = tl.arange(0, BLOCK_M)
    if PAST_END:  # the last row is repeated, so that nothing outside is read
        rows, first_row = tl.minimum(first_query + rows, NUM_TOKENS - 1), 0
    else:
        first_row = first_query * pitch
    inside = rows[:, None] * pitch + (first_key + tl.arange(0, BLOCK_N))[None, :]
    added = tl.load((planes.bias + plane.bias + first_row) + inside)
    if planes.mask is not None:
        added += tl.load((planes.mask + plane.mask + first_row) + inside)
    return added


@triton.jit
def scores_of(q_rows, k_rows, added, scale, PRECISION: tl.constexpr):
    """Scores of a tile. The scale multiplies the float32 product: folded into q it would be rounded with it."""
    scores = tl.dot(q_rows, tl.trans(k_rows), input_precision=PRECISION) * scale
    if added is not None:
        scores += added
    return scores


class KeyTile(NamedTuple):
    """A tile of keys that queries meet.

    Attributes:
        k: keys, (BLOCK, BLOCK_D).
        v: values, (BLOCK, BLOCK_D).
        scores: (BLOCK_M, BLOCK), -inf past the last key.
    """

    k: Any
    v: Any
    scores: Any


@triton.jit
def meet_keys(
    queries,
    w: tl.constexpr,
    first_key,
    added,
    NUM_TOKENS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
    IS_TAIL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Load ``BLOCK`` keys and values of window number ``w`` of the queries, and take their scores.

    ``MASKED`` says that some may be no token, ``IS_TAIL`` that some are past the last.
    """
    keys = first_key + tl.arange(0, BLOCK)
    tokens = tl.load(queries.maps[w] + keys)
    k_offsets, v_offsets = row_offsets(tokens, queries.k_token), row_offsets(tokens, queries.v_token)
    k_rows = load_rows(queries.k[w], tokens, k_offsets, HEAD_DIM, BLOCK_D, MASKED, queries.pad_k)
    v_rows = load_rows(queries.v[w], tokens, v_offsets, HEAD_DIM, BLOCK_D, MASKED, queries.pad_v)
    scores = scores_of(queries.rows[w], k_rows, added, queries.scale, PRECISION)
    if IS_TAIL:
        scores = tl.where((keys < NUM_TOKENS)[None, :], scores, float("-inf"))
    return KeyTile(k_rows, v_rows, scores)


# ---- Tiles that the region mask hides ----


class Tiles(NamedTuple):
    """First and one past the last of the full tiles that a tile sees."""

    first: Any
    last: Any


@triton.jit
def visible_tiles(hiding, kind, tile, full_tiles, TILES: tl.constexpr):
    """Full tiles that the region mask does not hide as a whole from tile number ``tile``."""
    first, last = 0, full_tiles
    if hiding.visible is not None:
        first = tl.load(hiding.visible + (kind * TILES + tile) * 2)
        last = tl.load(hiding.visible + (kind * TILES + tile) * 2 + 1)
    return Tiles(first, last)


@triton.jit
def hidden_tile(rank, tiles):
    """The hidden tile number ``rank``: those in front of the visible ones, then those behind."""
    return tl.where(rank < tiles.first, rank, rank + tiles.last - tiles.first)


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
def is_negligible(norms, other_norm, reference, hiding, scale):
    """1 if every hidden score is so far below its row's ``reference`` (maximum or log-sum-exp) that it cannot count.

    By Cauchy-Schwarz a score is at most |scale| |q| |k| + the largest bias + the mask. A NaN proves nothing.
    """
    bound = tl.abs(scale) * norms * other_norm + hiding.mask_value
    if hiding.bias_max is not None:
        bound += tl.load(hiding.bias_max)
    return tl.min(tl.where(bound - reference < NEGLIGIBLE, 1, 0), 0)


@triton.jit
def hidden_keys_are_negligible(
    queries,
    references,
    tiles,
    hiding,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FULL: tl.constexpr,
    WINDOWS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """1 if a bound on their scores proves that no hidden tile of keys counts; ``references`` as in is_negligible."""
    proven = 1
    for w in tl.static_range(WINDOWS):
        largest = 0.0
        for rank in range(0, FULL - (tiles.last - tiles.first)):
            tokens = tl.load(queries.maps[w] + hidden_tile(rank, tiles) * BLOCK_N + tl.arange(0, BLOCK_N))
            offsets = row_offsets(tokens, queries.k_token)
            k_rows = load_rows(queries.k[w], tokens, offsets, HEAD_DIM, BLOCK_D, MASKED, queries.pad_k)
            largest = tl.maximum(largest, largest_norm(k_rows), propagate_nan=tl.PropagateNan.ALL)
        norms = row_norms(queries.rows[w])
        proven &= is_negligible(norms, largest, references[w], hiding, queries.scale)
    return proven

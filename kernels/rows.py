"""Rows of q, k, v and their gradients in memory: what all families load and store through a map of token numbers."""

import triton
import triton.language as tl

__all__ = ["NO_TOKEN", "PADDING", "load_rows", "row_offsets", "store_rows"]

# A map gives the number of the token that a row holds, or one of these.
PADDING = tl.constexpr(-1)  # a padding token: a key like any other, which holds `pad`, or zeros
NO_TOKEN = tl.constexpr(-2)  # a row that only fills up a tile


@triton.jit
def row_offsets(tokens, stride):
    """Elements from the first token to each one, in 64 bits: they may be further apart than 2**31."""
    return tokens.to(tl.int64) * stride


@triton.jit
def load_rows(
    base,
    tokens,
    offsets,
    pad,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr,
    HAS_PAD: tl.constexpr,
):
    """Load rows (BLOCK, BLOCK_D) of one head; what is no token, and channels past the head, read 0.

    ``MASKED`` says that some rows may be no token, ``HAS_PAD`` that padding tokens hold the vector at ``pad``.
    """
    channels = tl.arange(0, BLOCK_D)
    pointers = base + offsets[:, None] + channels[None, :]
    if BLOCK_D != HEAD_DIM:
        inside = (channels < HEAD_DIM)[None, :]
        if MASKED:
            inside = inside & (tokens >= 0)[:, None]
        rows = tl.load(pointers, mask=inside, other=0.0)
    elif MASKED:
        rows = tl.load(pointers, mask=(tokens >= 0)[:, None], other=0.0)
    else:
        rows = tl.load(pointers)
    if HAS_PAD:
        held = tl.load(pad + channels, mask=channels < HEAD_DIM, other=0.0)
        rows = tl.where((tokens == PADDING)[:, None], held[None, :], rows)
    return rows


@triton.jit
def store_rows(base, tokens, offsets, rows, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Store the rows that are tokens, rounded to the dtype in memory."""
    channels = tl.arange(0, BLOCK_D)
    inside = (tokens >= 0)[:, None]
    if BLOCK_D != HEAD_DIM:
        inside = inside & (channels < HEAD_DIM)[None, :]
    pointers = base + offsets[:, None] + channels[None, :]
    tl.store(pointers, rows.to(base.dtype.element_ty), mask=inside)

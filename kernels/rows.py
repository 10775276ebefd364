"""Rows of q, k, v and their gradients in memory: what all families load and store through a map of token numbers."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

__all__ = ["NO_TOKEN", "PADDING", "Rows", "head_of", "load_rows", "row_offsets", "store_rows"]

# A map gives the number of the token that a row holds, or one of these.
PADDING = tl.constexpr(-1)  # a padding token: a key like any other, which holds `pad`, or zeros
NO_TOKEN = tl.constexpr(-2)  # a row that only fills up a tile


class Rows(NamedTuple):
    """Rows of one tensor, as one argument of a kernel; strides in elements, those of the last dimension are 1.

    Triton makes variants of a kernel for strides of 1 and for multiples of 16, whatever ``do_not_specialize`` says of
    the argument: no number belongs in here that differs from call to call of one model.

    Attributes:
        base: the tensor, or a pointer to its first element.
        batch: from a batch element to the next.
        token: from a token to the next.
        head: from a head to the next.
    """

    base: Any
    batch: Any
    token: Any
    head: Any


@triton.jit
def head_of(rows, batch, head):
    """Pointer to the first token of one head of a batch element, which is in 64 bits."""
    return rows.base + batch * rows.batch + head * rows.head


@triton.jit
def row_offsets(tokens, stride):
    """Elements from the first token to each one, in 64 bits: they may be further apart than 2**31."""
    return tokens.to(tl.int64) * stride


@triton.jit
def load_rows(
    base,
    tokens,
    offsets,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr,
    pad=None,
):
    """Load rows (BLOCK, BLOCK_D) of one head; what is no token, and channels past the head, read 0.

    ``MASKED`` says that some rows may be no token; with ``pad`` padding tokens hold the vector that it points to.
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
    if pad is not None:
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

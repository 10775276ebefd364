"""Tensors that the implementations of the ops make and unmake."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor, arange, int32, stack

from vidattn.reference.attention import accumulator_dtype

WHOLE_ROW_KEYS = 128
# Of divided attention without a cls token, on CUDA: csrc/cuda/divided_short.h.
CUDA_WHOLE_ROW_KEYS = 32


def last_dim_dense(x: Tensor) -> Tensor:
    """Return ``x``, copied if its last dimension is strided."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


class Tokens(Protocol):
    """What the inputs of all attention ops begin with."""

    @property
    def q(self) -> Tensor:
        """Queries, or the packed qkv when k and v are None."""

    @property
    def k(self) -> Tensor | None:
        """Keys."""

    @property
    def v(self) -> Tensor | None:
        """Values."""


def separate(inputs: Tokens) -> tuple[Tensor, Tensor, Tensor]:
    """Give q, k, v as views of the packed tensor, or as they came; dense in the last dimension."""
    if inputs.k is None or inputs.v is None:
        q, k, v = last_dim_dense(inputs.q).unbind(-3)
        return q, k, v
    return last_dim_dense(inputs.q), last_dim_dense(inputs.k), last_dim_dense(inputs.v)


def for_kernels(inputs: Tokens, backend: str) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Give q, k and v as the kernels of a backend take them: native ones a packed tensor as it is, Triton's its views.

    To make three views takes an eighth of a small call.
    """
    if backend == "triton" or inputs.k is not None:
        return separate(inputs)
    return last_dim_dense(inputs.q), None, None


def shape_of_q(inputs: Tokens) -> list[int]:
    """Give the shape of q, whether it is packed or not."""
    shape = list(inputs.q.shape)
    return shape if inputs.k is not None else shape[:-3] + shape[-2:]


def new_outputs(inputs: Tokens) -> tuple[Tensor, Tensor]:
    """Allocate the context and its log-sum-exp for q (..., h, d)."""
    *grid, heads, head_dim = shape_of_q(inputs)
    q = inputs.q
    return q.new_empty(*grid, heads * head_dim), q.new_empty(*grid, heads, dtype=accumulator_dtype(q.dtype))


def new_gradients(inputs: Tokens) -> tuple[Tensor | None, ...]:
    """Allocate what the op returns for q, k and v."""
    return tuple(None if x is None else x.new_empty(x.shape) for x in (inputs.q, inputs.k, inputs.v))


def gradients_for_kernels(dqkv: Sequence[Tensor | None], backend: str) -> tuple[Tensor | None, ...]:
    """Give what ``new_gradients`` allocated as the kernels of a backend fill it: as ``for_kernels`` for q, k and v."""
    dq, dk, _ = dqkv
    assert dq is not None
    return dq.unbind(-3) if backend == "triton" and dk is None else tuple(dqkv)


def pack(inputs: Tokens, grads: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """Put the gradients of q, k and v into what the op returns for them."""
    if inputs.k is None:
        return stack(tuple(grads), -3), None, None
    return tuple(grad.contiguous() for grad in grads)


def new_sum(of: Tensor | None, inputs: Tokens, needed: bool) -> Tensor | None:
    """Allocate a gradient that sums over windows, in the accumulator's dtype; an empty grid has nothing to add."""
    if of is None or not needed:
        return None
    new = inputs.q.new_empty if inputs.q.numel() > 0 else inputs.q.new_zeros
    return new(of.shape, dtype=accumulator_dtype(inputs.q.dtype))


def as_input(grad: Tensor | None, of: Tensor | None, needed: bool) -> Tensor | None:
    return grad.to(of.dtype) if grad is not None and of is not None and needed else None


def accumulated(x: Tensor | None, q: Tensor, backend: str) -> Tensor | None:
    """Bring a table or mask to the accumulator's dtype, contiguous; Triton's launch functions do that themselves."""
    return x if x is None or backend == "triton" else x.to(accumulator_dtype(q.dtype)).contiguous()


def types_below(window_types: Tensor, bias: Tensor | None) -> Tensor:
    """Give the types of windows as int32 numbers of the biases that are there: others do not get past here."""
    assert bias is not None  # types without one were refused
    return arange(bias.shape[0], dtype=int32, device=bias.device).index_select(0, window_types)


def keeps_lse(keys: int, backend: str, cuda_whole_row_keys: int = 0) -> bool:
    """Say whether a backend's backward pass reads the context and log-sum-exp of rows of so many keys.

    The CPU has whole rows of scores at hand, and so has Triton up to ``WHOLE_ROW_KEYS``; CUDA where a family says so.
    """
    whole_row_keys = {"triton": WHOLE_ROW_KEYS, "cuda": cuda_whole_row_keys}
    return backend in whole_row_keys and keys > whole_row_keys[backend]


def fake_sum(of: Tensor | None, needed: bool) -> Tensor | None:
    """Shape of a gradient that sums over windows, in its input's dtype."""
    return of.new_empty(of.shape) if of is not None and needed else None

"""Tensors that the implementations of the ops make and unmake."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, stack

from vidattn.reference.attention import accumulator_dtype

WHOLE_ROW_KEYS = 128


def last_dim_dense(x: Tensor) -> Tensor:
    """Return ``x``, copied if its last dimension is strided."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def separate(q: Tensor, k: Tensor | None, v: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Give q, k, v as views of the packed tensor, or as they came; dense in the last dimension."""
    if k is None or v is None:
        q, k, v = last_dim_dense(q).unbind(-3)
        return q, k, v
    return last_dim_dense(q), last_dim_dense(k), last_dim_dense(v)


def new_outputs(q: Tensor) -> tuple[Tensor, Tensor]:
    *grid, heads, head_dim = q.shape
    return q.new_empty(*grid, heads * head_dim), q.new_empty(*grid, heads, dtype=accumulator_dtype(q.dtype))


def new_gradients(
    q: Tensor, k: Tensor | None, v: Tensor | None
) -> tuple[tuple[Tensor | None, ...], tuple[Tensor, ...]]:
    """Allocate what the op returns for q, k, v, and the three tensors in it that a kernel fills."""
    if k is None or v is None:
        packed = q.new_empty(q.shape)
        return (packed, None, None), packed.unbind(-3)
    separate = (q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape))
    return separate, separate


def pack(k: Tensor | None, grads: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    if k is None:
        return stack(tuple(grads), -3), None, None
    return tuple(grad.contiguous() for grad in grads)


def new_sum(of: Tensor | None, q: Tensor, needed: bool) -> Tensor | None:
    """Allocate a gradient that sums over windows, in the accumulator's dtype; an empty grid has nothing to add."""
    if of is None or not needed:
        return None
    new = q.new_empty if q.numel() > 0 else q.new_zeros
    return new(of.shape, dtype=accumulator_dtype(q.dtype))


def as_input(grad: Tensor | None, of: Tensor | None, needed: bool) -> Tensor | None:
    return grad.to(of.dtype) if grad is not None and of is not None and needed else None


def accumulated(x: Tensor | None, q: Tensor, backend: str) -> Tensor | None:
    """Bring a table or mask to the accumulator's dtype, contiguous; Triton's launch functions do that themselves."""
    return x if x is None or backend == "triton" else x.to(accumulator_dtype(q.dtype)).contiguous()


def keeps_lse(keys: int, backend: str) -> bool:
    """Say whether a backend's backward pass reads the context and log-sum-exp of rows of so many keys.

    The CPU has whole rows of scores at hand, and so has Triton up to ``WHOLE_ROW_KEYS``.
    """
    return backend == "triton" and keys > WHOLE_ROW_KEYS


def fake_outputs(q: Tensor, k: Tensor | None, *_: object) -> tuple[Tensor, Tensor]:
    """Shapes of an op's context and log-sum-exp, from its arguments."""
    return new_outputs(q.select(-3, 0) if k is None else q)


def fake_sum(of: Tensor | None, needed: bool) -> Tensor | None:
    """Shape of a gradient that sums over windows, in its input's dtype."""
    return of.new_empty(of.shape) if of is not None and needed else None

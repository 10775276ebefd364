"""The calls to time of ops that take a packed qkv alone: inputs made once, forward, and forward with backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

Attend = Callable[[Tensor], Tensor]
# The contender that all others are compared with: the reference, in float64 on the numbers that the others are given.
EXACT = "exact"


def build_calls(
    attend: Attend, qkv_shape: Sequence[int], direction: str, dtype: str, device: str, copies: int, exact: bool = False
) -> list[Callable[[], tuple[Tensor, ...]]]:
    """Make inputs, the same ones for every contender, and the calls to time.

    Args:
        attend: function of qkv that gives the context.
        qkv_shape: (..., 3, h, d); the context is (..., h * d).
        direction: "forward" | "forward_backward".
        dtype: "float32" | "bfloat16" | "float16".
        device: where the inputs are.
        copies: how many calls, each with a qkv and an output gradient of its own.
        exact: hand the numbers of that dtype over in float64.

    Returns:
        Functions that return (context,), or (context, gradient of qkv).
    """
    generator = torch.Generator(device).manual_seed(0)

    def random(*size: int) -> Tensor:
        numbers = torch.randn(size, generator=generator, device=device).to(getattr(torch, dtype))
        return numbers.double() if exact else numbers

    def forward(qkv: Tensor, gradient: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (attend(qkv),)

    def forward_backward(qkv: Tensor, gradient: Tensor) -> tuple[Tensor, ...]:
        context = attend(qkv)
        return (context, *torch.autograd.grad(context, qkv, gradient))

    *tokens, _, heads, head_dim = qkv_shape
    calls: list[Callable[[], tuple[Tensor, ...]]] = []
    for _ in range(copies):
        qkv, gradient = random(*qkv_shape), random(*tokens, heads * head_dim)
        if direction == "forward":
            calls.append(partial(forward, qkv, gradient))
        else:
            calls.append(partial(forward_backward, qkv.requires_grad_(), gradient))
    return calls

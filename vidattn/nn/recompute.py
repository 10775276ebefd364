"""Parts of a twin whose activations are not kept for the backward pass, but computed again in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def call_twice(function: Callable[[Tensor], Tensor], parts: list[nn.Module], x: Tensor) -> Tensor:
    """Call a function, and in the backward pass once more, in place of keeping what it computed in between.

    Where the second call could be seen, there is one call that keeps everything: with hooks, with buffers (which the
    first call may have changed), in a program that a tracer records, and under a transform of ``torch.func``.

    Args:
        function: of ``x``, on the ``parts``.
        parts: modules that it calls.
        x: tensor of any shape.

    Returns:
        ``function(x)``. Values and gradients are those of one call: random numbers are drawn from the same state.
    """
    recorded = torch.compiler.is_exporting() or torch.jit.is_tracing() or not isinstance(x, Tensor)
    transformed = torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0
    if not torch.is_grad_enabled() or recorded or transformed or not all(map(_is_silent, parts)):
        return function(x)
    result: Any = checkpoint(function, x, use_reentrant=False)
    return result


def _is_silent(part: nn.Module) -> bool:
    """Whether nobody can tell how often a module was called."""
    return not any(
        row._buffers or row._forward_hooks or row._forward_pre_hooks or row._backward_hooks or row._backward_pre_hooks
        for row in part.modules()
    )

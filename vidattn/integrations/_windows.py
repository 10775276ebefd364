"""What the twins of window attention modules share: when an op can stand in, and a bias that differs by window.

Each repository has a class of its own, of a few names for all of them. They differ in where q, k and v come from, in
how the bias is found and in what surrounds the attention: that is what their twins say, by these functions.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from torch import Tensor, nn

from vidattn.nn.parts import SOFTMAX, can_drop, is_number, is_plain
from vidattn.nn.windows import gathered_bias
from vidattn.ops import window_attention


def has_parts(module: Any, *names: str) -> bool:
    """Whether a module has parameters, buffers, children or attributes of these names."""
    return all(hasattr(module, name) for name in names)


def takes_arguments(module: nn.Module, *names: str) -> bool:
    """Whether the ``forward`` of a module's class has arguments of these names."""
    try:
        known = inspect.signature(type(module).forward).parameters
    except (TypeError, ValueError):  # compiled code
        return False
    return set(names) <= set(known)


def can_attend(module: Any, softmax: str | None = "softmax", dropout: str | None = "attn_drop") -> bool:
    """Whether scores, softmax and dropout are what the op computes, and no hook looks at what they return.

    Args:
        module: the twin.
        softmax: name of the module's softmax; None if it calls a function.
        dropout: name of the dropout of its probabilities; None if it has none, or calls a function.

    Returns:
        Whether the op may be called.
    """
    parts = module._modules
    if softmax is not None and not (is_plain(parts[softmax], SOFTMAX) and parts[softmax].dim == -1):
        return False
    return module.is_intact() and (dropout is None or can_drop(parts[dropout])) and is_number(module.scale)


def takes_mask(mask: Tensor | None, groups: int, tokens: int) -> bool:
    """Whether the op adds a mask as the originals do: a constant (nW, N, N) of floating dtype for windows (G, N, C)."""
    if mask is None:
        return True
    fits = mask.dim() == 3 and tuple(mask.shape[1:]) == (tokens, tokens) and mask.shape[0] > 0
    return fits and groups % mask.shape[0] == 0 and mask.is_floating_point() and not mask.requires_grad


def takes_whole_windows(module: Any, tokens: int) -> bool:
    """Whether windows have the tokens of the configured one, with a row of the table for each pair of them."""
    return tokens == math.prod(module.window_size) and module.relative_position_index.numel() == tokens**2


def whole_bias(module: Any, tokens: int) -> Tensor:
    """Gather the bias (h, N, N) of whole windows by the module's own index, whatever is in it."""
    index = module.relative_position_index.reshape(tokens, tokens)
    return gathered_bias(module.relative_position_bias_table, index)


def attend(
    module: Any,
    qkv: Tensor | tuple[Tensor, Tensor, Tensor],
    bias: Tensor | None,
    mask: Tensor | None,
    dropout_p: float = 0.0,
    window_types: Tensor | None = None,
) -> Tensor:
    """Attend inside windows, ``vidattn.window_attention``, with the scale and the backend of a module."""
    options = {"window_types": window_types, "scale": module.scale, "dropout_p": dropout_p}
    return window_attention(qkv, bias, mask, **options, backend=module.attention_backend)


def attend_by_type(
    module: Any, qkv: Tensor, bias: Tensor, mask: Tensor | None, *, repeats: int = 1, dropout_p: float = 0.0
) -> Tensor:
    """Attend inside windows of several types, each with a bias of its own.

    Args:
        module: the twin; its scale and backend are those of the call.
        qkv: (G, N, 3, h, d).
        bias: (types, h, N, N).
        mask: (nW, N, N) or None; window g takes ``mask[g % nW]``.
        repeats: windows in a row that have one type: window g has type ``g // repeats % types``.
        dropout_p: probability of dropping an attention weight.

    Returns:
        (G, N, h * d).
    """
    window_types = torch.arange(bias.shape[0], device=bias.device).repeat_interleave(repeats)
    return attend(module, qkv, bias, mask, dropout_p, window_types)

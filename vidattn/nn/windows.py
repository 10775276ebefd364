"""What the twins of window attention share: attention of windows that are partitioned already, position indices."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor

from vidattn.geometry import bias_rows, resolve_windows
from vidattn.nn.parts import SOFTMAX, can_drop, is_number, is_plain, rate_in_use, why_not_number
from vidattn.ops import window_attention
from vidattn.twins import Twin


class FusedWindowAttention(Twin):
    """Attention of windows that are already partitioned, on ``vidattn.window_attention``.

    For modules with the parts of the official code: ``qkv``, ``relative_position_bias_table``,
    ``relative_position_index``, ``scale``, ``softmax``, ``attn_drop``, ``proj``, ``proj_drop``; in 2D and 3D.
    """

    ops = ("window_attention",)

    @staticmethod
    def refuse(module: Any) -> str | None:
        """Say why a module cannot become this twin; None if it can."""
        return why_not_number(module)

    @staticmethod
    def dropout_in_use(attention: Any) -> float:
        """Tell the share of the attention weights that an attention module drops now."""
        return rate_in_use(attention.attn_drop)

    def forward(self: Any, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend inside each window.

        Args:
            x: windows (G, N, C), N at most the tokens of the configured window.
            mask: additive mask (nW, N, N) in any float dtype, or None; window g takes ``mask[g % nW]``.

        Returns:
            Windows (G, N, C).
        """
        learned = mask is not None and (mask.requires_grad or not mask.is_floating_point())
        tokens = x.shape[1]
        if learned or tokens > self.relative_position_index.shape[0] or not ops_can_attend(self):
            return self.replaced.forward(self, x, mask)
        qkv = self.qkv(x)
        index = self.relative_position_index[:tokens, :tokens]
        context = window_attention(
            qkv.unflatten(-1, (3, self.num_heads, -1)),
            gathered_bias(self.relative_position_bias_table, index),
            mask,
            scale=self.scale,
            dropout_p=self.dropout_in_use(self),
            backend=self.attention_backend,
        )
        return self.proj_drop(self.proj(context))

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; a new position index is looked at again."""
        if name == "relative_position_index":
            _seen_index.pop(self, None)  # type: ignore[call-overload]
        super().__setattr__(name, value)

    def _load_from_state_dict(self, *args: Any) -> None:
        _seen_index.pop(self, None)  # type: ignore[call-overload]
        super()._load_from_state_dict(*args)  # type: ignore[misc]


def gathered_bias(table: Tensor, index: Tensor) -> Tensor:
    """Give pairs of tokens their bias.

    Args:
        table: (L, h).
        index: integers (N, N), the row of the table that a pair reads.

    Returns:
        (h, N, N), contiguous: gathered head by head, which takes a fraction of the time of turning it afterwards.
    """
    return table.t().contiguous().index_select(1, index.reshape(-1)).unflatten(1, index.shape)


def ops_can_attend(attention: Any) -> bool:
    """Whether scores, softmax and dropout are what the ops compute, and no hook looks at what they return."""
    parts = attention._modules  # a module's attributes take three times as long to find
    return (
        (not isinstance(attention, Twin) or attention.is_intact())
        and is_plain(parts["softmax"], SOFTMAX)
        and parts["softmax"].dim == -1
        and can_drop(parts["attn_drop"])
        and is_number(attention.scale)
    )


# What was found of a tensor of a module: the tensor, its version and the sizes then, and the answer.
Seen = weakref.WeakKeyDictionary[nn.Module, tuple[weakref.ref[Tensor], tuple[Any, ...], bool]]
_seen_index: Seen = weakref.WeakKeyDictionary()


def has_standard_index(attention: Any) -> bool:
    """Whether pairs of tokens find their bias where the ops look for it. A tensor is read once, until it changes."""
    index = attention._buffers.get("relative_position_index")
    index = getattr(index, "_local_tensor", index)  # of a DTensor, which every process has whole
    return index is not None and is_still(
        _is_standard_index, _seen_index, attention, index, tuple(attention.window_size)
    )


def is_still(is_so: Callable[..., bool], seen: Seen, module: nn.Module, tensor: Tensor, *sizes: Any) -> bool:
    """Ask something of what a tensor of a module holds, once, until one of them changes.

    Args:
        is_so: the question, of the tensor and the sizes; a function that compilers are told to call.
        seen: what was found before.
        module: whose tensor it is.
        tensor: the tensor.
        sizes: what else the answer depends on.

    Returns:
        The answer; of a tensor that cannot be read the last one.
    """
    if torch.compiler.is_dynamo_compiling() or tensor.is_inference():
        return is_so(tensor, *sizes)
    last = seen.get(module)
    if type(tensor) is not Tensor or tensor.is_meta or is_functorch_wrapped_tensor(tensor):  # nothing to be read
        return tensor.is_meta or (last is not None and last[2])
    state = (tensor._version, *sizes)
    if last is None or last[0]() is not tensor or last[1] != state:
        last = weakref.ref(tensor), state, is_so(tensor, *sizes)
        seen[module] = last
    return last[2]


def _is_standard_index(index: Tensor, window_size: Sequence[int]) -> bool:
    window = in_3d(window_size, 1)
    rows = bias_rows(window, resolve_windows(window, window), device=index.device)
    return index.numel() == rows.numel() and torch.equal(index.reshape(rows.shape).to(rows.dtype), rows)


_is_standard_index._dynamo_marked_constant = True  # type: ignore[attr-defined]  # read while compiling, not in the graph


def in_3d(axes: Sequence[int], fill: int) -> tuple[int, int, int]:
    """Put an axis of time in front of two, of one token or not shifted; three stay as they are."""
    depth, height, width = (*(fill,) * (3 - len(axes)), *axes)
    return depth, height, width

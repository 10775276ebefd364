"""timm: Swin Transformer (``swin_tiny_patch4_window7_224``, ...) and the attention of its vision transformers."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vidattn.geometry import region_mask, resolve_windows
from vidattn.integrations import Counterpart, find
from vidattn.nn import windows
from vidattn.nn.parts import (
    DROPOUT,
    Affine,
    affine,
    attend,
    can_drop,
    is_number,
    is_plain,
    rate_in_use,
    why_not_number,
)
from vidattn.nn.window_dropout import drop_in_windows
from vidattn.ops import window3d_attention
from vidattn.twins import Twin, why_overridden


class FusedWindowAttention(windows.FusedWindowAttention):
    """``WindowAttention`` on ``vidattn.window_attention``, whether or not it was built for PyTorch's attention."""

    def forward(self: Any, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend inside each window: (G, N, C) to (G, N, C), N being the tokens of the window."""
        if not isinstance(x, Tensor) or x.shape[1] != self.window_area or not _is_usual(self):
            return self.replaced.forward(self, x, mask)
        return super().forward(x, mask)


class FusedSwinTransformerBlock(Twin):
    """``SwinTransformerBlock`` on ``vidattn.window3d_attention``: nothing is rolled, padded or partitioned.

    The original pads after it has rolled, so a grid that it pads on a shifted axis stays with it. So does one with a
    mask other than the standard one, or with something that hangs on its ``attn``. That has a twin of its own.
    """

    ops = ("window3d_attention", "window_attention")
    level = "block"

    @staticmethod
    def refuse(module: Any) -> str | None:
        """Say why a block cannot become this twin; None if it can."""
        attention = module.attn
        if not isinstance(attention, FusedWindowAttention):
            found = find(attention)  # tested or not: the code that a block is known by includes that of its attention
            if found is None or found.twin is None or not issubclass(found.twin, FusedWindowAttention):
                return f"its attn is a {type(attention).__name__}"
        reason = why_overridden(attention) or FusedWindowAttention.refuse(attention)
        return None if reason is None else f"its attn: {reason}"

    def _attn(self: Any, x: Tensor) -> Tensor:
        """Attend: (B, H, W, C) to (B, H, W, C)."""
        projection = _input_projection(self, x) if isinstance(x, Tensor) else None
        if projection is None:
            return self.replaced._attn(self, x)
        attention = self.attn
        window, shift = windows.in_3d(self.window_size, 1), windows.in_3d(self.shift_size, 0)
        context = window3d_attention(
            attention.qkv(x.unsqueeze(1)).unflatten(-1, (3, attention.num_heads, -1)),
            attention.relative_position_bias_table,
            window_size=window,
            shift_size=shift,
            pad_qkv=projection.constant,
            clip_window=False,
            scale=attention.scale,
            dropout_p=rate_in_use(attention.attn_drop),
            backend=self.attention_backend,
        )
        out = attention.proj(context)
        if rate_in_use(attention.proj_drop) > 0.0:
            out = drop_in_windows(out, attention.proj_drop, window, shift, clip=False)
        return out.squeeze(1)


class FusedAttention(Twin):
    """``Attention`` of vision transformers, whether or not it was built for PyTorch's attention."""

    ops = ("spatial_attention",)

    @staticmethod
    def refuse(module: Any) -> str | None:
        """Say why a module cannot become this twin; None if it can."""
        return why_not_number(module)

    def forward(self: Any, x: Tensor, *masks: Any, **named_masks: Any) -> Tensor:
        """Map tokens (B, N, C) to (B, N, C); any mask is left to the original."""
        masked = not all(mask is None or mask is False for mask in (*masks, *named_masks.values()))
        if masked or not isinstance(x, Tensor) or not (self.is_intact() and _is_usual(self) and _can_attend(self)):
            return self.replaced.forward(self, x, *masks, **named_masks)
        parts = self._modules  # not every version has all of them
        gate = parts.get("gate")
        factors = None if gate is None else gate(x).sigmoid()
        qkv: Any = parts["qkv"](x).unflatten(-1, (3, self.num_heads, -1))
        if type(parts["q_norm"]) is not nn.Identity or type(parts["k_norm"]) is not nn.Identity:
            query, key, value = qkv.unbind(2)
            norms = ((parts["q_norm"], query), (parts["k_norm"], key))
            qkv = *(norm(rows.transpose(1, 2)).transpose(1, 2) for norm, rows in norms), value
        context = attend(
            qkv, scale=self.scale, dropout_p=rate_in_use(parts["attn_drop"]), backend=self.attention_backend
        )
        if "norm" in parts:
            context = parts["norm"](context)
        if factors is not None:
            context = context * factors
        return parts["proj_drop"](parts["proj"](context))


def _can_attend(attention: Any) -> bool:
    return can_drop(attention._modules["attn_drop"]) and is_number(attention.scale)


def _is_usual(attention: Any) -> bool:
    """Whether an attention computes the same with PyTorch's attention, which reads less of it, as without."""
    if not getattr(attention, "fused_attn", False):
        return True
    head_dim = attention.qkv.weight.shape[0] // (3 * attention.num_heads)
    return attention._modules["attn_drop"].training == attention.training and attention.scale == head_dim**-0.5


def _input_projection(block: Any, x: Tensor) -> Affine | None:
    """Describe the qkv projection; None where the block may not do the work of its attention."""
    attention: Any = block._modules["attn"]
    if not (
        block.is_intact()
        and is_plain(attention, {type(attention): FusedWindowAttention.forward})
        and windows.ops_can_attend(attention)
        and _is_usual(attention)
        and is_plain(attention._modules["proj_drop"], DROPOUT)
        and tuple(attention.window_size) == tuple(block.window_size)
        and windows.has_standard_index(attention)
        and affine(attention._modules["proj"]) is not None
        and _is_cut_alike(x.shape[1:3], block.window_size, block.shift_size)
        and _has_standard_mask(block, x.shape[1:3])
    ):
        return None
    return affine(attention._modules["qkv"])


def _is_cut_alike(grid: Sequence[int], window_size: Sequence[int], shift_size: Sequence[int]) -> bool:
    """Whether the op cuts a grid into the windows that timm cuts it into, which pads what it has rolled."""
    return all(
        shift == 0 or (size > window > shift > 0 and size % window == 0)
        for size, window, shift in zip(grid, window_size, shift_size, strict=True)
    )


_seen_mask: windows.Seen = weakref.WeakKeyDictionary()


def _has_standard_mask(block: Any, grid: Sequence[int]) -> bool:
    """Whether the mask of a block is what the op adds. A tensor is read once, until it changes."""
    if getattr(block, "dynamic_mask", False) or not any(block.shift_size):
        return True
    mask, sizes = block.attn_mask, (tuple(block.input_resolution), tuple(block.window_size), tuple(block.shift_size))
    return (
        mask is not None
        and tuple(grid) == sizes[0]
        and windows.is_still(_is_standard_mask, _seen_mask, block, mask, *sizes)
    )


def _is_standard_mask(mask: Tensor, grid: Sequence[int], window: Sequence[int], shift: Sequence[int]) -> bool:
    geometry = resolve_windows(windows.in_3d(grid, 1), windows.in_3d(window, 1), windows.in_3d(shift, 0))
    masked = region_mask(geometry, mask.device)
    return masked is not None and mask.shape == masked.shape and torch.equal(mask, -100.0 * masked.to(mask.dtype))


_is_standard_mask._dynamo_marked_constant = True  # type: ignore[attr-defined]  # read while compiling, not in the graph


def _is_swin(module: Any) -> bool:
    return "relative_position_bias_table" in module._parameters and module._modules.get("softmax") is not None


def _is_vision_transformer(module: Any) -> bool:
    parts = ("qkv", "q_norm", "k_norm", "attn_drop", "proj", "proj_drop")
    return all(module._modules.get(name) is not None for name in parts)


_ATTENTION = ("WindowAttention.forward", "WindowAttention._get_rel_pos_bias")

COUNTERPARTS = (
    Counterpart(
        "WindowAttention",
        "timm",
        FusedWindowAttention,
        code=_ATTENTION,
        tested={"1f8e9fb74336be50": "0.9.16 to 1.0.31"},
        resembles=_is_swin,
    ),
    Counterpart(
        "SwinTransformerBlock",
        "timm",
        FusedSwinTransformerBlock,
        code=(
            "SwinTransformerBlock._attn",
            "SwinTransformerBlock.get_attn_mask",
            "window_partition",
            "window_reverse",
            *_ATTENTION,
        ),
        tested={
            "4fd796fd00625172": "1.0.31",
            "d1f511c37936b771": "1.0.24 to 1.0.30",
            "689534c454441d5a": "1.0.9 to 1.0.20",
        },
    ),
    Counterpart(
        "Attention",
        "timm",
        FusedAttention,
        code=("Attention.forward",),
        tested={
            "9d7d2988109d7bbd": "1.0.30 and 1.0.31",
            "1fb4a2e033d3727d": "1.0.24",
            "e5c5618c51875a9a": "1.0.20",
            "d5716fef9d6ec252": "0.9.16 to 1.0.15",
        },
        resembles=_is_vision_transformer,
    ),
)

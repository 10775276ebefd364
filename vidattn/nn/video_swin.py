"""Accelerated twins of the modules of Video Swin."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from vidattn.accelerate import Twin, why_overridden
from vidattn.geometry import bias_rows, region_mask, resolve_windows
from vidattn.models.video_swin import BasicLayer, SwinTransformerBlock3D, WindowAttention3D
from vidattn.models.video_swin_windows import MASK_VALUE, compute_mask, fit_window
from vidattn.nn.parts import dropout_is_watched, has_hooks, rate_in_use
from vidattn.ops import window3d_attention, window_attention

_Triple = tuple[int, int, int]


class RegionMask(NamedTuple):
    """Stands for the mask of a shifted stage, which a fused block has no need to read.

    Attributes:
        padded: padded token grid.
        window: effective window.
        shift: effective shift.
    """

    padded: _Triple
    window: _Triple
    shift: _Triple

    def build(self, device: torch.device) -> Tensor:
        """Make the mask itself, float32 (nW, N, N)."""
        return compute_mask(*self.padded, self.window, self.shift, device)


class FusedWindowAttention3D(Twin, WindowAttention3D):
    """:class:`~vidattn.models.video_swin.WindowAttention3D` on :func:`vidattn.window_attention`."""

    ops = ("window_attention",)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend inside each window.

        Args:
            x: windows (G, N, C), N at most the tokens of the configured window.
            mask: additive mask (nW, N, N) in any float dtype, or None; window g takes ``mask[g % nW]``.

        Returns:
            Windows (G, N, C).
        """
        learned = mask is not None and (mask.requires_grad or not mask.is_floating_point())
        tokens = x.shape[1]
        if learned or tokens > self.relative_position_index.shape[0] or _probabilities_are_watched(self):
            return super().forward(x, mask)
        qkv = self.qkv(x)
        index = self.relative_position_index[:tokens, :tokens]
        bias = self.relative_position_bias_table.index_select(0, index.reshape(-1)).t().unflatten(1, index.shape)
        context = window_attention(
            qkv.unflatten(-1, (3, self.num_heads, -1)),
            bias,
            mask,
            scale=self.scale,
            dropout_p=rate_in_use(self.attn_drop),
            backend=self.attention_backend,
        )
        return self.proj_drop(self.proj(context))


class FusedSwinTransformerBlock3D(Twin, SwinTransformerBlock3D):
    """:class:`~vidattn.models.video_swin.SwinTransformerBlock3D` on :func:`vidattn.window3d_attention`.

    The projections run on the unpadded, unrolled grid; nothing is rolled, padded or partitioned.
    """

    ops = ("window3d_attention", "window_attention")

    @staticmethod
    def refuse(module: Any) -> str | None:
        """Say why a block cannot become this twin; None if it can."""
        attention = module.attn
        if type(attention) not in (WindowAttention3D, FusedWindowAttention3D):
            return f"its attn is a {type(attention).__name__}"
        overridden = why_overridden(attention)
        if overridden is not None:
            return f"its attn: {overridden}"
        if tuple(attention.window_size) != tuple(module.window_size):
            return f"its window {module.window_size} is not that of its attn, {attention.window_size}"
        index = attention.relative_position_index
        window = attention.window_size
        if not index.is_meta and not torch.equal(
            index, bias_rows(window, resolve_windows(window, window), device=index.device)
        ):
            return "its relative_position_index is not the standard one"
        return None

    def forward_part1(self, x: Tensor, mask_matrix: Tensor | RegionMask | None) -> Tensor:
        """Normalise and attend: (B, D, H, W, C) to (B, D, H, W, C), before stochastic depth and the residual.

        Args:
            x: tokens (B, D, H, W, C).
            mask_matrix: additive mask (nW, N, N) of the padded, shifted grid, a :class:`RegionMask` that stands for the
                standard one, or None. Used only when some axis is really shifted; None then means nothing is masked.

        Returns:
            Tokens (B, D, H, W, C).
        """
        attention = self.attn
        grid = x.shape[1:4]
        window, shift, padded = fit_window(grid, self.window_size, self.shift_size)
        shifted = shift[0] > 0 or shift[1] > 0 or shift[2] > 0
        standard = not shifted or mask_matrix is None or _is_region_mask(mask_matrix, RegionMask(padded, window, shift))
        if not standard or has_hooks(attention) or _probabilities_are_watched(attention):
            # Partitioned by the original's code: any mask, and every hook, works there.
            mask = mask_matrix.build(x.device) if isinstance(mask_matrix, RegionMask) else mask_matrix
            return super().forward_part1(x, mask)
        qkv = attention.qkv(self.norm1(x))
        context = window3d_attention(
            qkv.unflatten(-1, (3, self.num_heads, -1)),
            attention.relative_position_bias_table,
            window_size=self.window_size,
            shift_size=self.shift_size,
            pad_qkv=_projected_zero(attention.qkv, qkv, self.dim),
            mask_value=MASK_VALUE,
            wrap=mask_matrix is None,
            scale=attention.scale,
            dropout_p=rate_in_use(attention.attn_drop),
            backend=self.attention_backend,
        )
        return attention.proj_drop(attention.proj(context))


class FusedBasicLayer(Twin, BasicLayer):
    """:class:`~vidattn.models.video_swin.BasicLayer` that does not build a mask when all its blocks are fused."""

    def make_mask(self, grid: Sequence[int], device: torch.device) -> Any:
        """Say which mask the blocks of the stage use; None when no block is shifted on this token grid."""
        if not all(isinstance(block, FusedSwinTransformerBlock3D) for block in self.blocks):
            return super().make_mask(grid, device)
        window, shift, padded = fit_window(grid, self.window_size, self.shift_size)
        return RegionMask(padded, window, shift)


def _probabilities_are_watched(attention: WindowAttention3D) -> bool:
    """Whether softmax or dropout are no longer what the ops compute, or a hook looks at what they return."""
    softmax = attention.softmax
    return type(softmax) is not nn.Softmax or has_hooks(softmax) or dropout_is_watched(attention.attn_drop)


def _projected_zero(projection: nn.Module, qkv: Tensor, channels: int) -> Tensor | None:
    """Give what a padding token, a zero vector, becomes in the qkv projection (3C,); None for zeros."""
    if type(projection) is nn.Linear and not has_hooks(projection):
        return projection.bias
    return projection(qkv.new_zeros(1, channels))[0]  # a projection of another kind: quantised, low-rank, ...


# Masks that were compared with the standard one, while they live: (version at that time, standard mask, equal).
_compared: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _is_region_mask(mask: Tensor | RegionMask, standard: RegionMask) -> bool:
    """Whether a mask equals the standard one of a grid. A big mask is compared once, not at every call."""
    if isinstance(mask, RegionMask):
        return mask == standard
    if torch.compiler.is_compiling() or type(mask) is not Tensor or mask.requires_grad or mask.is_inference():
        return False  # nothing to be known or remembered about it: computed with the mask as it is
    windows = resolve_windows(standard.padded, standard.window, standard.shift)
    shape = (windows.num_windows, windows.num_tokens, windows.num_tokens)
    if tuple(mask.shape) != shape or mask.is_meta:
        return tuple(mask.shape) == shape
    known = _compared.get(mask)
    if known is not None and known[:2] == (mask._version, standard):
        return known[2]
    separated = region_mask(windows, mask.device)
    equal = separated is not None and torch.equal(
        mask, torch.zeros_like(mask, memory_format=torch.contiguous_format).masked_fill_(separated, MASK_VALUE)
    )
    _compared[mask] = (mask._version, standard, equal)
    return equal

"""Accelerated twins of the modules of Video Swin."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vidattn.models.video_swin import BasicLayer, SwinTransformerBlock3D, WindowAttention3D
from vidattn.models.video_swin_windows import MASK_VALUE, compute_mask, fit_window
from vidattn.nn.parts import DROPOUT, Affine, affine, as_defined, is_plain, rate_in_use, why_not_number
from vidattn.nn.windows import FusedWindowAttention, has_standard_index, ops_can_attend
from vidattn.ops import window3d_attention
from vidattn.twins import Twin, why_overridden

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


class FusedWindowAttention3D(FusedWindowAttention, WindowAttention3D):
    """:class:`~vidattn.models.video_swin.WindowAttention3D` on :func:`vidattn.window_attention`."""


class FusedSwinTransformerBlock3D(Twin, SwinTransformerBlock3D):
    """:class:`~vidattn.models.video_swin.SwinTransformerBlock3D` on :func:`vidattn.window3d_attention`.

    The projections run on the unpadded, unrolled grid; nothing is rolled, padded or partitioned. That takes the
    place of calling ``attn``, so at every call the block looks whether anything hangs on it: a wrapper, an adapter, a
    hook, a ``forward`` of the instance, another position index. Then ``attn`` is called with the windows that the
    original hands it. A mask of the caller's own is also used there, as it is.
    """

    ops = ("window3d_attention", "window_attention")

    @staticmethod
    def refuse(module: Any) -> str | None:
        """Say why a block cannot become this twin; None if it can."""
        attention = module.attn
        if type(attention) not in _ATTENTIONS:
            return f"its attn is a {type(attention).__name__}"
        if tuple(attention.window_size) != tuple(module.window_size):
            return f"its window {module.window_size} is not that of its attn, {attention.window_size}"
        reason = why_overridden(attention) or why_not_number(attention)
        if reason is not None:
            return f"its attn: {reason}"
        if not has_standard_index(attention):
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
        standard = not shifted or mask_matrix is None or _same_mask(mask_matrix, RegionMask(padded, window, shift))
        projection = _input_projection(self) if standard else None
        if projection is None:
            # Partitioned by the original's code: any mask, and whatever hangs on the attention, works there.
            mask = mask_matrix.build(x.device) if isinstance(mask_matrix, RegionMask) else mask_matrix
            return super().forward_part1(x, mask)
        context = window3d_attention(
            attention.qkv(self.norm1(x)).unflatten(-1, (3, attention.num_heads, -1)),
            attention.relative_position_bias_table,
            window_size=self.window_size,
            shift_size=self.shift_size,
            pad_qkv=None if padded == tuple(grid) else projection.constant,
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
        if not self.is_intact() or not all(_takes_region_mask(block) for block in self.blocks):
            return super().make_mask(grid, device)
        window, shift, padded = fit_window(grid, self.window_size, self.shift_size)
        return RegionMask(padded, window, shift)


_ATTENTIONS = as_defined(WindowAttention3D, FusedWindowAttention3D)
_BLOCK_FORWARD = FusedSwinTransformerBlock3D.forward
# Where wrappers that hand their arguments on keep what they wrap: activation checkpointing, FSDP, torch.compile.
_WRAPPED = ("_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_orig_mod")


def _takes_region_mask(block: nn.Module) -> bool:
    """Whether nobody between a stage and the block that is fused looks at the mask."""
    while not isinstance(block, FusedSwinTransformerBlock3D):
        inner = next((block._modules[name] for name in _WRAPPED if name in block._modules), None)
        if inner is None:
            return False
        block = inner
    hooks = (*block._forward_pre_hooks.values(), *block._forward_hooks.values())
    return (
        type(block).forward is _BLOCK_FORWARD
        and "forward" not in block.__dict__
        and all(hook.__module__.startswith("torch.distributed.") for hook in hooks)  # FSDP's
    )


def _input_projection(block: FusedSwinTransformerBlock3D) -> Affine | None:
    """Describe the qkv projection; None where the block may not do the work of its attention.

    It may where nothing hangs on the attention and its projections map token by token.
    """
    attention: Any = block._modules["attn"]
    if not (
        block.is_intact()
        and is_plain(attention, _ATTENTIONS)
        and ops_can_attend(attention)
        and is_plain(attention._modules["proj_drop"], DROPOUT)
        and attention.window_size == block.window_size
        and has_standard_index(attention)
        and affine(attention._modules["proj"]) is not None
    ):
        return None
    return affine(attention._modules["qkv"])


def _same_mask(mask: Tensor | RegionMask, standard: RegionMask) -> bool:
    return isinstance(mask, RegionMask) and mask == standard

"""TransMorph (registration of medical volumes): window attention, with position bias or without.

Of the repository junyuchen245/TransMorph_Transformer_for_Medical_Image_Registration, its 2D and Bayesian models too.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from vidattn.integrations import Counterpart
from vidattn.integrations._windows import attend, can_attend, has_parts, takes_mask, takes_whole_windows, whole_bias
from vidattn.models.video_swin_windows import Triple
from vidattn.nn.parts import rate_in_use, why_not_number
from vidattn.nn.window_blocks import (
    RegionMask,
    WindowBlock,
    attend_on_grid,
    input_projection,
    same_mask,
    takes_region_mask,
)
from vidattn.twins import Twin


class FusedTransMorphWindowAttention(Twin):
    """``WindowAttention`` of TransMorph on ``vidattn.window_attention``.

    Without ``rpe`` nothing reads its table, which gets no gradient, as before.
    """

    ops = ("window_attention",)

    @staticmethod
    def refuse(module: Any) -> str | None:
        """Say why a module cannot become this twin; None if it can."""
        return why_not_number(module)

    def forward(self: Any, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend inside each window.

        Args:
            x: windows (G, N, C).
            mask: additive mask (nW, N, N), or None; window g takes ``mask[g % nW]``.

        Returns:
            Windows (G, N, C).
        """
        if not (_takes(self, x, mask) and can_attend(self)):
            return self.replaced.forward(self, x, mask)
        context = _attend(self, x, mask, rate_in_use(self.attn_drop))
        return self.proj_drop(self.proj(context))


class FusedTransMorphBlock(WindowBlock):
    """``SwinTransformerBlock`` of TransMorph on ``vidattn.window3d_attention``: nothing is rolled or partitioned.

    It shifts on all axes or, where one shift is 0, on none, and pads a grid up to the window. So where the windows that
    the op would fit to the grid are others, the original hands its windows to the attention.
    """

    attention_twin = FusedTransMorphWindowAttention

    @staticmethod
    def table_of(attention: Any) -> Tensor | None:
        """Give the table of the position bias of an attention module; None without ``rpe``."""
        return attention.relative_position_bias_table if attention.rpe else None

    def forward(self: Any, x: Tensor, mask_matrix: Tensor | RegionMask | None) -> Tensor:
        """Run the block.

        Args:
            x: tokens (B, H * W * T, C).
            mask_matrix: additive mask (nW, N, N) of the padded, shifted grid, a
                ``RegionMask`` that stands for the standard one, or None. Used only when
                the block shifts.

        Returns:
            Tokens of the shape of ``x``.
        """
        grid = (self.H, self.W, self.T)
        regions = _regions(grid, self.window_size, self.shift_size)
        shifted = regions.shift[0] > 0
        least = 1 if shifted else 0  # an axis of one window is shifted here, and not by the op
        standard = not shifted or mask_matrix is None or same_mask(mask_matrix, regions)
        fits = standard and all(size >= window + least for size, window in zip(grid, regions.window, strict=True))
        projection = input_projection(self) if fits and x.shape[1] == grid[0] * grid[1] * grid[2] else None
        if projection is None:
            if isinstance(mask_matrix, RegionMask):
                mask_matrix = mask_matrix.build(x.device) if shifted else None
            return self.replaced.forward(self, x, mask_matrix)
        attended = attend_on_grid(self, x.unflatten(1, grid), regions, projection, mask_matrix is None)
        x = x + self.drop_path(attended.flatten(1, 3))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class FusedTransMorphLayer(Twin):
    """``BasicLayer`` of TransMorph that does not build a mask when all its blocks are fused."""

    level = "layer"

    def forward(self: Any, x: Tensor, H: int, W: int, T: int) -> tuple[Any, ...]:
        """Map tokens (B, H * W * T, C) through all blocks and the downsampling; give them and their grids."""
        fused = self.is_intact() and all(takes_region_mask(block, FusedTransMorphBlock) for block in self.blocks)
        if self.use_checkpoint or not fused:
            return self.replaced.forward(self, x, H, W, T)
        mask = _regions((H, W, T), self.window_size, self.shift_size)
        for block in self.blocks:
            block.H, block.W, block.T = H, W, T
            x = block(x, mask)
        if self.downsample is None:
            return x, H, W, T, x, H, W, T
        return x, H, W, T, self.downsample(x, H, W, T), (H + 1) // 2, (W + 1) // 2, (T + 1) // 2


def _regions(grid: Triple, window_size: Any, shift_size: Any) -> RegionMask:
    """Lay windows on a grid as TransMorph does: never clipped, shifted on all axes or on none."""
    first, second, third = window_size
    padded = (-(-grid[0] // first) * first, -(-grid[1] // second) * second, -(-grid[2] // third) * third)
    shift: Triple = tuple(shift_size) if min(shift_size) > 0 else (0, 0, 0)  # type: ignore[assignment]
    return RegionMask(padded, (first, second, third), shift)


class FusedBayesianWindowAttention(Twin):
    """``WindowAttention`` of TransMorph-Bayes, which drops in evaluation too, on ``vidattn.window_attention``."""

    ops = ("window_attention",)

    @staticmethod
    def refuse(module: Any) -> str | None:
        """Say why a module cannot become this twin; None if it can."""
        return why_not_number(module)

    def forward(self: Any, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend inside each window, as ``FusedTransMorphWindowAttention`` does."""
        if not (_takes(self, x, mask) and 0.0 <= self.drop < 1.0 and can_attend(self, dropout=None)):
            return self.replaced.forward(self, x, mask)
        return functional.dropout(self.proj(_attend(self, x, mask, self.drop)), self.drop, training=True)


def _takes(module: Any, x: Tensor, mask: Tensor | None) -> bool:
    groups, tokens, _ = x.shape
    return takes_mask(mask, groups, tokens) and (not _has_bias(module) or takes_whole_windows(module, tokens))


def _has_bias(module: Any) -> bool:
    return bool(getattr(module, "rpe", True))


def _attend(module: Any, x: Tensor, mask: Tensor | None, dropout_p: float) -> Tensor:
    bias = whole_bias(module, x.shape[1]) if _has_bias(module) else None
    return attend(module, module.qkv(x).unflatten(-1, (3, module.num_heads, -1)), bias, mask, dropout_p)


def _is_block(module: Any) -> bool:
    return has_parts(module, "H", "W", "T", "window_size", "shift_size", "attn") and has_parts(module.attn, "rpe")


def _is_stage(module: Any) -> bool:
    blocks = module._modules.get("blocks")
    return has_parts(module, "use_checkpoint") and isinstance(blocks, nn.ModuleList) and all(map(_is_block, blocks))


COUNTERPARTS = (
    Counterpart(
        "WindowAttention",
        None,
        FusedTransMorphWindowAttention,
        code=("WindowAttention.forward",),
        tested={"3eaf530573ca71c5": "6357a1d", "0c35610366bf1af6": "6357a1d (2D)"},
        resembles=lambda module: has_parts(module, "qkv", "relative_position_bias_table", "rpe", "attn_drop"),
    ),
    Counterpart(
        "WindowAttention",
        None,
        FusedBayesianWindowAttention,
        code=("WindowAttention.forward",),
        tested={
            "eb11b1fd1babba17": "6357a1d",
            "7b9c8c78ab46a0d7": "6357a1d (2D)",
        },
        resembles=lambda module: (
            has_parts(module, "qkv", "relative_position_bias_table", "softmax")
            and isinstance(getattr(module, "drop", None), float)
        ),
    ),
    Counterpart(
        "SwinTransformerBlock",
        None,
        FusedTransMorphBlock,
        code=("SwinTransformerBlock.forward", "WindowAttention.forward", "window_partition", "window_reverse"),
        tested={"b72faf47c5bc8d30": "6357a1d"},
        resembles=_is_block,
    ),
    Counterpart(
        "BasicLayer",
        None,
        FusedTransMorphLayer,
        code=("BasicLayer.forward", "window_partition"),
        tested={"7dab01a40da6d7f8": "6357a1d"},
        resembles=_is_stage,
    ),
)

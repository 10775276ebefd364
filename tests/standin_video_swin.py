"""A stand-in for the official Video Swin and its copies: blocks that attend in windows, stages that make their mask.

Our own words for what https://github.com/SwinTransformer/Video-Swin-Transformer (db018fb),
https://github.com/open-mmlab/mmaction2 (4d6c934) and https://github.com/facebookresearch/omnivore (1d55abd) compute.
With the same weights and one seed outputs and gradients in float64 were the same bits, in eval and in training mode,
with dropout and with activation checkpointing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from vidattn.models.layers import DropPath, Mlp
from vidattn.models.video_swin import PatchEmbed3D, PatchMerging
from vidattn.models.video_swin_windows import (
    compute_mask,
    get_window_size,
    relative_position_index,
    window_partition,
    window_reverse,
)


class WindowAttention3D(nn.Module):
    def __init__(self, dim, window_size, num_heads, qkv_bias=True, attn_drop=0.0, proj_drop=0.0) -> None:
        super().__init__()
        self.dim, self.window_size, self.num_heads = dim, window_size, num_heads
        self.scale = (dim // num_heads) ** -0.5
        depth, height, width = window_size
        rows = (2 * depth - 1) * (2 * height - 1) * (2 * width - 1)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(rows, num_heads))
        self.register_buffer("relative_position_index", relative_position_index(window_size))
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        self.softmax = nn.Softmax(dim=-1)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        groups, tokens, _ = x.shape
        query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        index = self.relative_position_index[:tokens, :tokens]
        scores = (self.scale * query) @ key.mT + self.relative_position_bias_table[index].permute(2, 0, 1)
        if mask is not None:
            scores = (scores.unflatten(0, (-1, len(mask))) + mask[:, None]).flatten(0, 1)
        context = self.attn_drop(self.softmax(scores)) @ value
        return self.proj_drop(self.proj(context.transpose(1, 2).reshape(groups, tokens, -1)))


class SwinTransformerBlock3D(nn.Module):
    def __init__(
        self, dim, num_heads, window_size, shift_size, drop_path, drop=0.0, attn_drop=0.0, qkv_bias=True, flag=False
    ) -> None:
        super().__init__()
        self.window_size, self.shift_size, self.use_checkpoint = window_size, shift_size, flag
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention3D(dim, window_size, num_heads, qkv_bias, attn_drop, drop)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, 2 * dim, drop=drop)

    def forward_part1(self, x: Tensor, mask_matrix: Tensor | None) -> Tensor:
        batch, *grid, _ = x.shape
        window, shift = get_window_size(grid, self.window_size, self.shift_size)
        x = self.norm1(x)
        after = [-size % extent for size, extent in zip(grid, window, strict=True)]
        x = functional.pad(x, (0, 0, 0, after[2], 0, after[1], 0, after[0]))
        padded = x.shape[1:4]
        shifted = any(shift)
        if shifted:
            x = x.roll([-offset for offset in shift], (1, 2, 3))
        windows = self.attn(window_partition(x, window), mask=mask_matrix if shifted else None)
        x = window_reverse(windows, window, batch, *padded)
        if shifted:
            x = x.roll(shift, (1, 2, 3))
        return x[:, : grid[0], : grid[1], : grid[2]].contiguous()

    def forward_part2(self, x: Tensor) -> Tensor:
        return self.drop_path(self.mlp(self.norm2(x)))

    def forward(self, x: Tensor, mask_matrix: Tensor | None) -> Tensor:
        def run(part: Any, *args: Any) -> Tensor:
            return checkpoint(part, *args, use_reentrant=True) if self.use_checkpoint else part(*args)

        x = x + self.drop_path(run(self.forward_part1, x, mask_matrix))
        return x + run(self.forward_part2, x)


class OmnivoreBlock(SwinTransformerBlock3D):
    """Told at each call whether to recompute activations."""

    def forward(self, x: Tensor, mask_matrix: Tensor | None, use_checkpoint: bool = False) -> Tensor:
        def run(part: Any, *args: Any) -> Tensor:
            return checkpoint(part, *args, use_reentrant=False) if use_checkpoint else part(*args)

        x = x + self.drop_path(run(self.forward_part1, x, mask_matrix))
        return x + run(self.forward_part2, x)


class BasicLayer(nn.Module):
    block: type[nn.Module] = SwinTransformerBlock3D
    flag: str | None = "use_checkpoint"

    def __init__(self, dim, num_heads, window_size, drop_path, downsample, flag=False, **options: Any) -> None:
        super().__init__()
        self.window_size = window_size
        self.shift_size = tuple(extent // 2 for extent in window_size)
        if self.flag is not None:
            setattr(self, self.flag, flag)
            options["flag"] = flag
        self.blocks = nn.ModuleList(
            self.block(dim, num_heads, window_size, self.shift_size if number % 2 else (0, 0, 0), rate, **options)
            for number, rate in enumerate(drop_path)
        )
        self.downsample = PatchMerging(dim) if downsample else None

    def make_mask(self, x: Tensor) -> Tensor:
        grid = x.shape[2:]
        window, shift = get_window_size(grid, self.window_size, self.shift_size)
        padded = [-(-size // extent) * extent for size, extent in zip(grid, window, strict=True)]
        return compute_mask(*padded, window, shift, x.device)

    def forward(self, x: Tensor) -> Tensor:
        mask = self.make_mask(x)
        x = x.permute(0, 2, 3, 4, 1)
        for block in self.blocks:
            x = block(x, mask)
        if self.downsample is not None:
            x = self.downsample(x)
        return x.permute(0, 4, 1, 2, 3)


class MmactionBasicLayer(BasicLayer):
    """Channels last, before the downsampling if asked."""

    flag = "with_cp"

    def forward(self, x: Tensor, do_downsample: bool = True) -> Tensor:
        mask = self.make_mask(x)
        x = x.permute(0, 2, 3, 4, 1)
        for block in self.blocks:
            x = block(x, mask)
        return self.downsample(x) if self.downsample is not None and do_downsample else x


class OmnivoreBasicLayer(BasicLayer):
    """It hands a flag on to its blocks, and has another way for segmentation, which is left out here."""

    block = OmnivoreBlock
    flag = None

    def forward(self, x: Tensor, use_checkpoint: bool = False, H=None, W=None, use_seg: bool = False) -> Tensor:
        if use_seg:
            return x
        mask = self.make_mask(x)
        x = x.permute(0, 2, 3, 4, 1)
        for block in self.blocks:
            x = block(x, mask, use_checkpoint=use_checkpoint)
        if self.downsample is not None:
            x = self.downsample(x)
        return x.permute(0, 4, 1, 2, 3)


class SwinTransformer3D(nn.Module):
    """The backbone: video (B, 3, T, H, W) to features (B, C, D, h, w)."""

    def __init__(
        self, stage=BasicLayer, dim=24, depths=(2, 2), num_heads=(3, 3), window_size=(2, 3, 3), rate=0.2, **options: Any
    ) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed3D((2, 4, 4), 3, dim, nn.LayerNorm)
        rates = torch.linspace(0, rate, sum(depths)).tolist()
        self.layers = nn.ModuleList(
            stage(
                dim * 2**number,
                heads,
                window_size,
                rates[sum(depths[:number]) : sum(depths[: number + 1])],
                number < len(depths) - 1,
                **options,
            )
            for number, heads in enumerate(num_heads)
        )
        self.norm = nn.LayerNorm(dim * 2 ** (len(depths) - 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        for layer in self.layers:
            x = layer(x)
            if isinstance(layer, MmactionBasicLayer):
                x = x.permute(0, 4, 1, 2, 3)
        return self.norm(x.permute(0, 2, 3, 4, 1)).permute(0, 4, 1, 2, 3)

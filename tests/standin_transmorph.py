"""A stage of TransMorph with the structure of its repository's, in our own words.

With the same weights and inputs (float64; grids that are padded, of one window, smaller than it; a shift of 0; with and
without bias; dropout under one seed) outputs and gradients had the bits of the repository's own ``BasicLayer``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from standin_windows import Swin, join, masked
from torch import Tensor, nn
from torch.nn import functional
from torch.utils import checkpoint


def window_partition(x: Tensor, window: Sequence[int]) -> Tensor:
    """Cut (B, H, W, T, C) into windows (G, N, C)."""
    for axis, size in enumerate(window):
        x = x.unflatten(1 + 2 * axis, (-1, size))
    return x.permute(0, 1, 3, 5, 2, 4, 6, 7).flatten(0, 3).flatten(1, 3)


def window_reverse(windows: Tensor, window: Sequence[int], grid: Sequence[int]) -> Tensor:
    """Put windows (G, N, C) back into (B, H, W, T, C)."""
    counts = [extent // size for extent, size in zip(grid, window, strict=True)]
    x = windows.unflatten(1, tuple(window)).unflatten(0, (-1, *counts))
    return x.permute(0, 1, 4, 2, 5, 3, 6, 7).flatten(5, 6).flatten(3, 4).flatten(1, 2)


class WindowAttention(Swin):
    def __init__(self, dim: int, window_size: Sequence[int], num_heads: int, *, rpe: bool, **options: Any) -> None:
        super().__init__(dim, window_size, num_heads, **options)
        self.rpe = rpe
        if not rpe:
            del self.relative_position_index

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.split(self.qkv(x))
        scores = self.scale * q @ k.transpose(-2, -1)
        weights = self.softmax(masked(scores + self.bias() if self.rpe else scores, mask))
        return self.proj_drop(self.proj(join(self.attn_drop(weights) @ v)))


class Mlp(nn.Module):
    def __init__(self, dim: int, drop: float) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class SwinTransformerBlock(nn.Module):
    def __init__(
        self, dim: int, num_heads: int, window_size: Sequence[int], shift_size: Sequence[int], rpe: bool, drop: float
    ) -> None:
        super().__init__()
        self.window_size, self.shift_size = tuple(window_size), tuple(shift_size)
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, window_size, num_heads, rpe=rpe, proj_drop=drop)
        self.drop_path = nn.Identity()
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, drop)
        self.H = self.W = self.T = 0

    def forward(self, x: Tensor, mask_matrix: Tensor | None) -> Tensor:
        grid = (self.H, self.W, self.T)
        assert x.shape[1] == self.H * self.W * self.T, "another number of tokens"
        tokens = self.norm1(x).unflatten(1, grid)
        pads = [-extent % size for extent, size in zip(grid, self.window_size, strict=True)]
        tokens = functional.pad(tokens, (0, 0, 0, pads[2], 0, pads[1], 0, pads[0]))
        padded, shifts = tokens.shape[1:4], min(self.shift_size) > 0
        if shifts:
            tokens = tokens.roll([-shift for shift in self.shift_size], (1, 2, 3))
        windows = self.attn(window_partition(tokens, self.window_size), mask=mask_matrix if shifts else None)
        tokens = window_reverse(windows, self.window_size, padded)
        if shifts:
            tokens = tokens.roll(self.shift_size, (1, 2, 3))
        x = x + self.drop_path(tokens[:, : self.H, : self.W, : self.T].flatten(1, 3))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class BasicLayer(nn.Module):
    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: Sequence[int],
        *,
        rpe: bool = True,
        drop: float = 0.0,
        use_checkpoint: bool = False,
    ) -> None:
        super().__init__()
        self.window_size, self.shift_size = tuple(window_size), tuple(size // 2 for size in window_size)
        self.use_checkpoint = use_checkpoint
        shifts = ((0, 0, 0), self.shift_size)
        self.blocks = nn.ModuleList(
            SwinTransformerBlock(dim, num_heads, window_size, shift, rpe, drop) for shift in shifts
        )
        self.downsample = None

    def forward(self, x: Tensor, H: int, W: int, T: int) -> tuple[Any, ...]:
        sizes = zip((H, W, T), self.window_size, self.shift_size, strict=True)
        parts = []
        for extent, size, shift in sizes:
            padded = -(-extent // size) * size
            place = torch.arange(padded, device=x.device)
            parts.append((place >= padded - size).long() + (place >= padded - shift).long() * (shift > 0))
        region = 9 * parts[0][:, None, None] + 3 * parts[1][:, None] + parts[2]
        windows = window_partition(region[None, ..., None], self.window_size).squeeze(-1)
        mask = -100.0 * (windows[:, None] != windows[:, :, None])
        for block in self.blocks:
            block.H, block.W, block.T = H, W, T
            x = checkpoint.checkpoint(block, x, mask, use_reentrant=False) if self.use_checkpoint else block(x, mask)
        if self.downsample is None:
            return x, H, W, T, x, H, W, T
        return x, H, W, T, self.downsample(x, H, W, T), (H + 1) // 2, (W + 1) // 2, (T + 1) // 2

"""A stand-in for mmaction2's divided attention: modules that bring their norm and their residual.

Our own words for what https://github.com/open-mmlab/mmaction2 (4d6c934) computes. With the same weights and one seed
the two gave the same float64 numbers, to the bit: outputs and gradients, in eval and in training mode.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def drop_path(x: Tensor, rate: float, training: bool) -> Tensor:
    """Stochastic depth as mmcv draws it: one number a sample."""
    if not training or not rate:
        return x
    kept = (1 - rate + torch.rand((len(x),) + (1,) * (x.ndim - 1), dtype=x.dtype)).floor()
    return x / (1 - rate) * kept


class DropPath(nn.Module):
    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        return drop_path(x, self.drop_prob, self.training)


class _WithNorm(nn.Module):
    def __init__(self, embed_dims: int, num_heads: int, num_frames: int, proj_drop: float, drop: float) -> None:
        super().__init__()
        self.embed_dims, self.num_heads, self.num_frames = embed_dims, num_heads, num_frames
        self.norm = nn.LayerNorm(embed_dims)
        self.attn = nn.MultiheadAttention(embed_dims, num_heads, 0.0)
        self.proj_drop = nn.Dropout(proj_drop)
        self.dropout_layer = DropPath(drop)

    def attend(self, sequences: Tensor) -> Tensor:
        """Attend along the second dimension."""
        rows = self.norm(sequences).transpose(0, 1)
        return self.dropout_layer(self.proj_drop(self.attn(rows, rows, rows)[0].transpose(0, 1).contiguous()))


class DividedTemporalAttentionWithNorm(_WithNorm):
    def __init__(self, embed_dims: int, *rest: float) -> None:
        super().__init__(embed_dims, *rest)  # type: ignore[arg-type]
        self.temporal_fc = nn.Linear(embed_dims, embed_dims)

    def forward(self, query: Tensor, key=None, value=None, residual=None, **kwargs) -> Tensor:
        cls_token, patches = query[:, :1], query[:, 1:]
        added = self.temporal_fc(self.attend(patches.reshape(-1, self.num_frames, self.embed_dims)))
        return torch.cat((cls_token, patches + added.reshape(patches.shape)), 1)


class DividedSpatialAttentionWithNorm(_WithNorm):
    def forward(self, query: Tensor, key=None, value=None, residual=None, **kwargs) -> Tensor:
        frames = self.num_frames
        tokens = query[:, 1:].unflatten(1, (-1, frames)).transpose(1, 2)  # (B, T, N, C)
        shared = query[:, None, :1].expand(-1, frames, -1, -1)
        added = self.attend(torch.cat((shared, tokens), 2).flatten(0, 1)).unflatten(0, (-1, frames))
        patches = added[:, :, 1:].transpose(1, 2).flatten(1, 2)
        return query + torch.cat((added[:, :, 0].mean(1, keepdim=True), patches), 1)


class Layer(nn.Module):
    """Time, then space."""

    def __init__(self, embed_dims: int, num_heads: int, num_frames: int, proj_drop: float = 0.1) -> None:
        super().__init__()
        self.time = DividedTemporalAttentionWithNorm(embed_dims, num_heads, num_frames, proj_drop, 0.2)
        self.space = DividedSpatialAttentionWithNorm(embed_dims, num_heads, num_frames, proj_drop, 0.2)

    def forward(self, x: Tensor) -> Tensor:
        return self.space(self.time(x))

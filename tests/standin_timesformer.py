"""A TimeSformer with the structure of facebookresearch/TimeSformer, in our own words.

With the weights of the official code (at a5ef29a) it gives the same bits in float64, in training with one seed too.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def drop_path(x: Tensor, drop_prob: float, training: bool) -> Tensor:
    """Leave samples out at random, and scale the others."""
    if not training or drop_prob == 0.0:
        return x
    kept = (1 - drop_prob + torch.rand(x.shape[0], *(1,) * (x.ndim - 1), dtype=x.dtype, device=x.device)).floor()
    return x / (1 - drop_prob) * kept


class DropPath(nn.Module):
    """Stochastic depth."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        """Leave samples out at random, in training."""
        return drop_path(x, self.drop_prob, self.training)


class Mlp(nn.Module):
    """Two linear layers."""

    def __init__(self, dim: int, hidden: int, drop: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens."""
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class Attention(nn.Module):
    """Attention over all tokens of a sequence; without projections the tokens are queries, keys and values."""

    def __init__(
        self, dim: int, num_heads: int, qkv_bias: bool, attn_drop: float, proj_drop: float, with_qkv: bool = True
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.with_qkv = with_qkv
        if with_qkv:
            self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
            self.proj = nn.Linear(dim, dim)
            self.proj_drop = nn.Dropout(proj_drop)
        self.attn_drop = nn.Dropout(attn_drop)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, N, C) to (B, N, C)."""
        if self.with_qkv:
            q, k, v = (y.transpose(1, 2) for y in self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2))
        else:
            q = k = v = x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        weights = self.attn_drop((q @ k.mT * self.scale).softmax(-1))
        x = (weights @ v).transpose(1, 2).flatten(2)
        return self.proj_drop(self.proj(x)) if self.with_qkv else x


class Block(nn.Module):
    """Attention over time, then over space; or over all that there is."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        qkv_bias: bool = True,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.1,
        attention_type: str = "divided_space_time",
    ) -> None:
        super().__init__()
        self.attention_type = attention_type
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, num_heads, qkv_bias, attn_drop, drop)
        if attention_type == "divided_space_time":
            self.temporal_norm1 = nn.LayerNorm(dim)
            self.temporal_attn = Attention(dim, num_heads, qkv_bias, attn_drop, drop)
            self.temporal_fc = nn.Linear(dim, dim)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, 2 * dim, drop)

    def forward(self, x: Tensor, B: int, T: int, W: int) -> Tensor:
        """Map tokens (B, 1 + H * W * T, C), or (B * T, 1 + H * W, C), to the same shape."""
        if self.attention_type != "divided_space_time":
            x = x + self.drop_path(self.attn(self.norm1(x)))
            return x + self.drop_path(self.mlp(self.norm2(x)))
        cls_token, patches = x[:, :1], x[:, 1:]
        sites = patches.reshape(-1, T, x.shape[-1])
        over_time = self.drop_path(self.temporal_attn(self.temporal_norm1(sites)))
        patches = patches + self.temporal_fc(over_time.reshape(patches.shape))
        frames = patches.reshape(B, -1, T, x.shape[-1]).transpose(1, 2).flatten(0, 1)
        frames = torch.cat((cls_token.repeat_interleave(T, 0), frames), 1)
        over_space = self.drop_path(self.attn(self.norm1(frames)))
        added = over_space[:, :1].reshape(B, T, -1).mean(1, True)
        patches = patches + over_space[:, 1:].unflatten(0, (B, T)).transpose(1, 2).reshape(patches.shape)
        x = torch.cat((cls_token + added, patches), 1)
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    """A token for each patch of each frame."""

    def __init__(self, patch_size: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch_size, patch_size)

    def forward(self, x: Tensor) -> tuple[Tensor, int, int]:
        """Map (B, 3, T, H, W) to tokens (B * T, N, C), T and the patches of a row."""
        frames = self.proj(x.transpose(1, 2).flatten(0, 1))
        return frames.flatten(2).transpose(1, 2), x.shape[2], frames.shape[-1]


class VisionTransformer(nn.Module):
    """The network, for clips of one size."""

    def __init__(
        self,
        grid: tuple[int, int] = (2, 3),
        num_frames: int = 3,
        patch_size: int = 4,
        dim: int = 24,
        depth: int = 2,
        num_heads: int = 3,
        num_classes: int = 5,
        drop_path_rate: float = 0.2,
        attention_type: str = "divided_space_time",
        **options: object,
    ) -> None:
        super().__init__()
        self.attention_type = attention_type
        self.patch_embed = PatchEmbed(patch_size, dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, grid[0] * grid[1] + 1, dim))
        if attention_type != "space_only":
            self.time_embed = nn.Parameter(torch.zeros(1, num_frames, dim))
        rates = torch.linspace(0, drop_path_rate, depth).tolist()
        self.blocks = nn.ModuleList(
            Block(dim, num_heads, drop_path=rate, attention_type=attention_type, **options)  # type: ignore[arg-type]
            for rate in rates
        )
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map a clip (B, 3, T, H, W) to logits."""
        batch = x.shape[0]
        x, frames, width = self.patch_embed(x)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), 1) + self.pos_embed
        if self.attention_type != "space_only":
            cls_tokens, patches = x[:batch, :1], x[:, 1:]
            patches = patches.unflatten(0, (batch, frames)).transpose(1, 2) + self.time_embed
            x = torch.cat((cls_tokens, patches.flatten(1, 2)), 1)
        for block in self.blocks:
            x = block(x, batch, frames, width)
        if self.attention_type == "space_only":
            x = x.unflatten(0, (batch, frames)).mean(1)
        return self.head(self.norm(x)[:, 0])

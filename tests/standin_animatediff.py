"""A motion module with the structure of AnimateDiff's, in our own words.

With the weights of the official code (guoyww/AnimateDiff at e92bd56, on the CrossAttention of diffusers 0.11.1) it
gives the same bits in float64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional


class PositionalEncoding(nn.Module):
    """Sines and cosines of the frame, added."""

    def __init__(self, channels: int, frames: int) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.0)
        rates = torch.exp(torch.arange(0, channels, 2) / channels * -math.log(10000.0))
        angles = torch.arange(frames)[:, None] * rates
        self.register_buffer("pe", torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)[None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, C) to (B, T, C)."""
        return self.dropout(x + self.pe[:, : x.shape[1]])


class CrossAttention(nn.Module):
    """What the motion modules have from diffusers 0.11: projections, and attention by a matrix of scores."""

    def __init__(self, channels: int, heads: int, text_channels: int | None = None, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads = heads
        self.scale = (channels // heads) ** -0.5
        self.upcast_attention = self.upcast_softmax = self._use_memory_efficient_attention_xformers = False
        self._slice_size: int | None = None
        self.group_norm = self.added_kv_proj_dim = None
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(text_channels or channels, channels, bias=False)
        self.to_v = nn.Linear(text_channels or channels, channels, bias=False)
        self.to_out = nn.ModuleList((nn.Linear(channels, channels), nn.Dropout(dropout)))

    def reshape_heads_to_batch_dim(self, x: Tensor) -> Tensor:
        """Map (B, S, h * d) to (B * h, S, d)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2).flatten(0, 1)

    def reshape_batch_dim_to_heads(self, x: Tensor) -> Tensor:
        """Map (B * h, S, d) to (B, S, h * d)."""
        return x.unflatten(0, (-1, self.heads)).transpose(1, 2).flatten(2)

    def _attention(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        scores = self.scale * torch.bmm(query, key.mT)
        weights = (scores if mask is None else scores + mask).softmax(dim=-1)
        return self.reshape_batch_dim_to_heads(torch.bmm(weights.to(value.dtype), value))


class VersatileAttention(CrossAttention):
    """Attention over the frames of each site, or from them to a text."""

    def __init__(
        self, channels: int, heads: int, text_channels: int | None = None, dropout: float = 0.0, frames: int = 0
    ) -> None:
        super().__init__(channels, heads, text_channels, dropout)
        self.attention_mode = "Temporal"
        self.is_cross_attention = text_channels is not None
        self.pos_encoder = PositionalEncoding(channels, frames) if frames else None

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        video_length: int | None = None,
    ) -> Tensor:
        """Map (B * T, N, C) to (B * T, N, C)."""
        sites = hidden_states.shape[1]
        x = hidden_states.unflatten(0, (-1, video_length)).transpose(1, 2).flatten(0, 1)  # (B * N, T, C)
        x = x if self.pos_encoder is None else self.pos_encoder(x)
        source = x if encoder_hidden_states is None else encoder_hidden_states.repeat_interleave(sites, dim=0)
        projected = (self.to_q(x), self.to_k(source), self.to_v(source))
        query, key, value = (self.reshape_heads_to_batch_dim(row) for row in projected)
        x = self.to_out[0](self._attention(query, key, value, attention_mask))
        return self.to_out[1](x).unflatten(0, (-1, sites)).transpose(1, 2).flatten(0, 1)


class GEGLU(nn.Module):
    """A gated linear layer."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.proj = nn.Linear(channels, 8 * channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., C) to (..., 4 C)."""
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * functional.gelu(gate)


class TemporalTransformerBlock(nn.Module):
    """Two attentions over time, or one and one to a text, and a feed-forward network."""

    def __init__(
        self, channels: int, heads: int, frames: int, text_channels: int | None, dropout: float, attention: type
    ) -> None:
        super().__init__()
        self.attention_blocks = nn.ModuleList(
            attention(channels, heads, source, dropout, frames) for source in (None, text_channels)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for _ in range(2))
        self.ff = nn.ModuleDict(
            {"net": nn.Sequential(GEGLU(channels), nn.Dropout(dropout), nn.Linear(4 * channels, channels))}
        )
        self.ff_norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor, text: Tensor | None, video_length: int) -> Tensor:
        """Map (B * T, N, C) to (B * T, N, C)."""
        for attention, norm in zip(self.attention_blocks, self.norms, strict=True):
            source = text if attention.is_cross_attention else None
            x = x + attention(norm(x), encoder_hidden_states=source, video_length=video_length)
        return x + self.ff["net"](self.ff_norm(x))


class MotionModule(nn.Module):
    """``TemporalTransformer3DModel``: a clip, channels first, through blocks over time."""

    def __init__(
        self,
        channels: int = 32,
        heads: int = 4,
        depth: int = 1,
        frames: int = 24,
        text_channels: int | None = None,
        dropout: float = 0.0,
        attention: type = VersatileAttention,
    ) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(32, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels)
        self.transformer_blocks = nn.ModuleList(
            TemporalTransformerBlock(channels, heads, frames, text_channels, dropout, attention) for _ in range(depth)
        )
        self.proj_out = nn.Linear(channels, channels)

    def forward(self, clip: Tensor, text: Tensor | None = None) -> Tensor:
        """Map (B, C, T, H, W) to (B, C, T, H, W)."""
        frames, height = clip.shape[2:4]
        images = clip.transpose(1, 2).flatten(0, 1)
        x = self.proj_in(self.norm(images).flatten(2).mT)
        for block in self.transformer_blocks:
            x = block(x, text, frames)
        images = images + self.proj_out(x).mT.unflatten(2, (height, -1))
        return images.unflatten(0, (-1, frames)).transpose(1, 2)

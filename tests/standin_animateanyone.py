"""The attention of motion modules on later releases of diffusers, like AnimateAnyone's, in our own words.

With the weights of MooreThreads/Moore-AnimateAnyone (a914ef3) on diffusers 0.42 it gives the same bits in float64.
"""

from __future__ import annotations

import importlib
from typing import Any

import torchvision_swin  # noqa: F401  (before diffusers, which imports torchvision and cannot do so by itself here)
from standin_animatediff import PositionalEncoding
from torch import Tensor

processors: Any = importlib.import_module("diffusers.models.attention_processor")


class VersatileAttention(processors.Attention):
    """Attention over the frames of each site, which a processor of diffusers computes."""

    def __init__(
        self, channels: int, heads: int, text_channels: int | None = None, dropout: float = 0.0, frames: int = 0
    ) -> None:
        head_dim = channels // heads
        super().__init__(channels, text_channels, heads=heads, dim_head=head_dim, dropout=dropout)
        self.attention_mode = "Temporal"
        self.pos_encoder = PositionalEncoding(channels, frames) if frames else None

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        video_length: int | None = None,
        **cross_attention_kwargs: Any,
    ) -> Tensor:
        """Map (B * T, N, C) to (B * T, N, C)."""
        sites = hidden_states.shape[1]
        x = hidden_states.unflatten(0, (-1, video_length)).transpose(1, 2).flatten(0, 1)  # (B * N, T, C)
        x = x if self.pos_encoder is None else self.pos_encoder(x)
        text = None if encoder_hidden_states is None else encoder_hidden_states.repeat_interleave(sites, dim=0)
        x = self.processor(self, x, encoder_hidden_states=text, attention_mask=attention_mask, **cross_attention_kwargs)
        return x.unflatten(0, (-1, sites)).transpose(1, 2).flatten(0, 1)

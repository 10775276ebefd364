"""Accelerated twin of the attention of ViViT."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from vidattn.models.vivit_layers import MultiHeadDotProductAttention
from vidattn.nn.parts import attend
from vidattn.ops import factorized_dot_product_attention, spatial_attention, temporal_attention
from vidattn.twins import Twin

_BY_FRAMES: dict[str, Callable[..., Any]] = {
    "time": temporal_attention,
    "space": spatial_attention,
    "factorized": factorized_dot_product_attention,
}


class FusedMultiHeadDotProductAttention(Twin, MultiHeadDotProductAttention):
    """[`MultiHeadDotProductAttention`][vidattn.models.vivit_layers.MultiHeadDotProductAttention] on divided ops.

    They read queries, keys and values where the projection wrote them, whichever axis is attended over.
    """

    ops = ("temporal_attention", "spatial_attention", "factorized_dot_product_attention")

    def forward(self, x: Tensor) -> Tensor:
        """Attend: (..., S, C) or (B, T, N, C), as ``attention`` says, to the same shape."""
        dropout_p = self.dropout_rate if self.training else 0.0
        joint = self.attention == "joint"
        if not self.is_intact() or dropout_p >= 1.0 or not (joint or x.ndim == 4):
            return super().forward(x)
        sequences = x.shape[:-2] if joint else x.shape[:1]
        tokens = math.prod(x.shape[len(sequences) : -1])
        qkv = self.qkv(x)
        qkv = qkv.reshape(math.prod(sequences), tokens, 3, self.num_heads, qkv.shape[-1] // (3 * self.num_heads))
        if joint:
            context = attend(qkv, scale=None, dropout_p=dropout_p, backend=self.attention_backend)
        else:
            context = _BY_FRAMES[self.attention](
                qkv, x.shape[1], token_order="thw", dropout_p=dropout_p, backend=self.attention_backend
            )
        return self.proj(context.reshape(*x.shape[:-1], context.shape[-1]))

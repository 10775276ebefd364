"""Latte: the blocks of the official code, over space and over time in turn."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vidattn.integrations import Counterpart
from vidattn.nn.parts import attend, can_drop, is_number, rate_in_use, why_not_number
from vidattn.twins import Twin


class FusedLatteAttention(Twin):
    """``Attention`` of Latte on ``vidattn.spatial_attention``, in its mode "math".

    Its other modes run as in the original: "flash" puts the heads of its result together in another order, so that it
    computes something else.
    """

    ops = ("spatial_attention",)

    @staticmethod
    def refuse(module: Any) -> str | None:
        """Say why a module cannot become this twin; None if it can."""
        if module.attention_mode != "math":
            return f"its attention_mode is {module.attention_mode!r}; only 'math' has a twin"
        return why_not_number(module)

    def forward(self: Any, x: Tensor) -> Tensor:
        """Map tokens (B, N, C) to (B, N, C)."""
        if (
            not self.is_intact()
            or self.attention_mode != "math"
            or not can_drop(self.attn_drop)
            or not is_number(self.scale)
        ):
            return self.replaced.forward(self, x)  # type: ignore[no-any-return]
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
        context = attend(qkv, scale=self.scale, dropout_p=rate_in_use(self.attn_drop), backend=self.attention_backend)
        return self.proj_drop(self.proj(context))  # type: ignore[no-any-return]


COUNTERPARTS = (
    Counterpart(
        "Attention",
        None,
        FusedLatteAttention,
        code=("Attention.forward",),
        tested={
            "30dcdf19d34aa042": "Latte since April 2024",
            "41c75a0d62f78784": "Latte before, and its model for images",
        },
        resembles=lambda module: all(hasattr(module, name) for name in ("attention_mode", "qkv", "attn_drop", "scale")),
    ),
)

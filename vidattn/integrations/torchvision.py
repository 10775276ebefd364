"""torchvision: Video Swin (``swin3d_t``, ``swin3d_s``, ``swin3d_b``)."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional

from vidattn.integrations import Counterpart
from vidattn.nn.windows import has_standard_index
from vidattn.ops import window3d_attention
from vidattn.twins import Twin


class FusedShiftedWindowAttention3d(Twin):
    """``ShiftedWindowAttention3d`` on :func:`vidattn.window3d_attention`: nothing is rolled, padded or partitioned.

    The original reads the weights of its two projections and never calls them, and so does this.
    """

    ops = ("window3d_attention",)
    level = "block"

    @staticmethod
    def refuse(module: Any) -> str | None:
        """Say why a module cannot become this twin; None if it can."""
        if not has_standard_index(module):
            return "its relative_position_index is not the standard one"
        return None

    def forward(self: Any, x: Tensor) -> Tensor:
        """Map tokens (B, T, H, W, C) to (B, T, H, W, C)."""
        dropout_p = self.attention_dropout if self.training else 0.0
        if not self.is_intact() or not 0.0 <= dropout_p < 1.0 or not has_standard_index(self):
            return self.replaced.forward(self, x)
        qkv, proj = self.qkv, self.proj
        context = window3d_attention(
            functional.linear(x, qkv.weight, qkv.bias).unflatten(-1, (3, self.num_heads, -1)),
            self.relative_position_bias_table,
            window_size=self.window_size,
            shift_size=self.shift_size,
            pad_qkv=qkv.bias,
            dropout_p=dropout_p,
            backend=self.attention_backend,
        )
        out = functional.linear(context, proj.weight, proj.bias)
        return functional.dropout(out, p=self.dropout, training=self.training)


COUNTERPARTS = (
    Counterpart(
        "ShiftedWindowAttention3d",
        "torchvision",
        FusedShiftedWindowAttention3d,
        code=(
            "ShiftedWindowAttention3d.forward",
            "ShiftedWindowAttention3d.get_relative_position_bias",
            "_get_window_and_shift_size",
            "_get_relative_position_bias",
            "_compute_pad_size_3d",
            "_compute_attention_mask_3d",
            "shifted_window_attention_3d",
        ),
        tested={"335773b3c0c2dac0": "0.28"},
    ),
)

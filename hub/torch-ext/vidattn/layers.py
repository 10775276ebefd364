"""Layers for ``kernels.kernelize``, which puts their ``forward`` in place of a module's own.

The hub allows no state, no constructor and no other method: ``self`` is the module that is there.
"""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from .ops import window3d_attention


class ShiftedWindowAttention3d(nn.Module):
    """torchvision's class of this name (``swin3d_t``, ...), with nothing rolled, padded, cut up or masked by a tensor.

    Its ``dropout`` does not draw the same elements as the original, which draws before it takes the padding away.
    """

    has_backward = True
    can_torch_compile = True

    def forward(self: Any, x: Tensor) -> Tensor:
        """Map tokens (B, T, H, W, C) to (B, T, H, W, C)."""
        qkv = functional.linear(x, self.qkv.weight, self.qkv.bias).unflatten(-1, (3, self.num_heads, -1))
        context = window3d_attention(
            qkv,
            self.relative_position_bias_table,
            window_size=self.window_size,
            shift_size=self.shift_size,
            pad_qkv=self.qkv.bias,
            dropout_p=self.attention_dropout if self.training else 0.0,
        )
        out = functional.linear(context, self.proj.weight, self.proj.bias)
        return functional.dropout(out, self.dropout, self.training)

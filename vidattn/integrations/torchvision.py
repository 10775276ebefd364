"""torchvision: Swin in 2D (``swin_t``, ``swin_v2_t``, ...) and Video Swin (``swin3d_t``, ...)."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from vidattn.integrations import Counterpart
from vidattn.nn.window_dropout import drop_in_windows
from vidattn.nn.windows import has_standard_index, in_3d
from vidattn.ops import window3d_attention
from vidattn.twins import Twin


class FusedShiftedWindowAttention3d(Twin):
    """``ShiftedWindowAttention3d`` on ``vidattn.window3d_attention``: nothing is rolled, padded or partitioned.

    The original reads the weights of its two projections and never calls them, and so does this.
    """

    ops = ("window3d_attention",)
    level = "block"
    _factor: float | None = None  # of scores; None for that of the head dimension
    _clips: bool = True  # a window that is larger than the grid

    @staticmethod
    def refuse(module: Any) -> str | None:
        """Say why a module cannot become this twin; None if it can."""
        if not has_standard_index(module):
            return "its relative_position_index is not the standard one"
        if not all(0 <= shift < window for shift, window in zip(module.shift_size, module.window_size, strict=True)):
            return f"its shift {module.shift_size} is not below its window {module.window_size}"
        return None

    def forward(self: Any, x: Tensor) -> Tensor:
        """Map tokens (B, T, H, W, C) to (B, T, H, W, C)."""
        return self._attend(x) if self._ops_can_attend(x) else self.replaced.forward(self, x)

    def _ops_can_attend(self: Any, x: Tensor) -> bool:
        is_tensor = isinstance(x, Tensor)  # and no proxy of torch.fx, which sees the original's functions as a whole
        return is_tensor and self.is_intact() and 0.0 <= self._attention_dropout() < 1.0 and has_standard_index(self)

    def _attention_dropout(self: Any) -> float:
        return self.attention_dropout if self.training else 0.0

    def _attend(self: Any, x: Tensor) -> Tensor:
        """Map tokens (B, D, H, W, C) to (B, D, H, W, C), windows of two axes being one token deep."""
        window, shift = in_3d(self.window_size, 1), in_3d(self.shift_size, 0)
        qkv, padding = self._project(x)
        context = window3d_attention(
            qkv,
            self._bias_table(),
            window_size=window,
            shift_size=shift,
            pad_qkv=padding,
            clip_window=self._clips,
            scale=self._factor,
            dropout_p=self._attention_dropout(),
            backend=self.attention_backend,
        )
        out = functional.linear(context, self.proj.weight, self.proj.bias)
        if self.training and self.dropout > 0.0:
            return drop_in_windows(
                out, functools.partial(functional.dropout, p=self.dropout), window, shift, clip=self._clips
            )
        return out

    def _project(self: Any, x: Tensor) -> tuple[Any, Tensor | None]:
        """Give queries, keys and values of tokens, and of padding."""
        weight, bias = self.qkv.weight, self.qkv.bias
        return functional.linear(x, weight, bias).unflatten(-1, (3, self.num_heads, -1)), bias

    def _bias_table(self: Any) -> Tensor:
        return self.relative_position_bias_table


class FusedShiftedWindowAttention(FusedShiftedWindowAttention3d):
    """``ShiftedWindowAttention``, likewise; its windows are never clipped to the grid."""

    _clips = False

    def forward(self: Any, x: Tensor) -> Tensor:
        """Map tokens (B, H, W, C) to (B, H, W, C)."""
        if not self._ops_can_attend(x):
            return self.replaced.forward(self, x)
        return self._attend(x.unsqueeze(1)).squeeze(1)


class FusedShiftedWindowAttentionV2(FusedShiftedWindowAttention):
    """``ShiftedWindowAttentionV2``, likewise: cosine attention, and a bias that a small network makes."""

    _factor = 1.0

    def _project(self: Any, x: Tensor) -> tuple[Any, Tensor | None]:
        """Give scaled unit queries, unit keys and values of tokens, and of padding."""
        weight, bias = self.qkv.weight, self.qkv.bias
        padding = None
        if bias is not None:  # of keys it is nothing, whatever stands there
            query, _, value = bias.chunk(3)
            nothing = torch.zeros_like(query)
            bias, padding = torch.cat((query, nothing, value)), torch.cat((nothing, nothing, value))
        qkv = functional.linear(x, weight, bias).unflatten(-1, (3, self.num_heads, -1))
        heads, value = qkv[..., :2, :, :], qkv[..., 2, :, :]
        scale = torch.clamp(self.logit_scale, max=math.log(100.0)).exp().squeeze(-1)
        lengths = torch.linalg.vector_norm(heads, dim=-1, keepdim=True).clamp_min(1e-12)
        query, key = (heads * (torch.stack((scale, torch.ones_like(scale))) / lengths)).unbind(-3)
        return (query, key, value), padding

    def _bias_table(self: Any) -> Tensor:
        return 16 * torch.sigmoid(self.cpb_mlp(self.relative_coords_table).view(-1, self.num_heads))


_PLANE = ("_get_relative_position_bias", "shifted_window_attention")

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
        tested={"335773b3c0c2dac0": "0.17 to 0.28"},
    ),
    Counterpart(
        "ShiftedWindowAttention",
        "torchvision",
        FusedShiftedWindowAttention,
        code=("ShiftedWindowAttention.forward", "ShiftedWindowAttention.get_relative_position_bias", *_PLANE),
        tested={"0bb1e2e79a35a5c5": "0.17 to 0.28"},
    ),
    Counterpart(
        "ShiftedWindowAttentionV2",
        "torchvision",
        FusedShiftedWindowAttentionV2,
        code=("ShiftedWindowAttentionV2.forward", "ShiftedWindowAttentionV2.get_relative_position_bias", *_PLANE),
        tested={"e19fd2ee60a7a3bb": "0.17 to 0.28"},
    ),
)

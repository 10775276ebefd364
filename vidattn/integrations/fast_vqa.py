"""FAST-VQA and FasterVQA (video quality): window attention whose bias knows which fragment of a video a token is of.

Of the repository VQAssessment/FAST-VQA-and-FasterVQA, and of DOVER and others that have its file.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vidattn.integrations import Counterpart
from vidattn.integrations._windows import attend, attend_by_type, can_attend, has_parts, takes_arguments, takes_mask
from vidattn.nn.parts import rate_in_use, why_not_number
from vidattn.nn.windows import gathered_bias
from vidattn.twins import Twin


class FusedFragmentAttention(Twin):
    """``WindowAttention3D`` of FAST-VQA on ``vidattn.window_attention``."""

    ops = ("window_attention",)

    @staticmethod
    def refuse(module: Any) -> str | None:
        """Say why a module cannot become this twin; None if it can."""
        return why_not_number(module)

    def forward(
        self: Any,
        x: Tensor,
        mask: Tensor | None = None,
        fmask: Tensor | None = None,
        resized_window_size: Sequence[int] | None = None,
    ) -> Tensor:
        """Attend inside each window.

        Args:
            x: windows (G, N, C).
            mask: additive mask (nW, N, N), or None; window g takes ``mask[g % nW]``.
            fmask: fragments between two tokens, along each axis: (nW, N, N, 3), or None.
            resized_window_size: the window (d, h, w) of these tokens, for a bias by their distances; None for one by
                their numbers.

        Returns:
            Windows (G, N, C).
        """
        groups, tokens, _ = x.shape
        index = _index(self, tokens, resized_window_size)
        if (
            index.numel() != tokens**2
            or not takes_mask(mask, groups, tokens)
            or not _takes_fragments(fmask, groups, tokens)
            or not can_attend(self)
        ):
            return self.replaced.forward(self, x, mask, fmask, resized_window_size)
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
        dropout_p = rate_in_use(self.attn_drop)
        index = index.reshape(tokens, tokens)
        bias = gathered_bias(self.relative_position_bias_table, index)
        if fmask is None or not hasattr(self, "fragment_position_bias_table"):
            context = attend(self, qkv, bias, mask, dropout_p)
        else:
            gate = fmask.abs().sum(-1).unsqueeze(1).to(bias.dtype)  # (nW, 1, N, N)
            other = gathered_bias(self.fragment_position_bias_table, index)
            by_window = torch.addcmul(other, bias - other, gate)  # bias * gate + other * (1 - gate)
            context = attend_by_type(self, qkv, by_window, mask, dropout_p=dropout_p)
        return self.proj_drop(self.proj(context))


def _index(module: Any, tokens: int, window: Sequence[int] | None) -> Tensor:
    """Give the rows of the table that the pairs of a window read."""
    index = module.relative_position_index
    if window is None:
        return index[:tokens, :tokens]
    d, h, w = window
    return index.reshape(*module.window_size, *module.window_size)[:d, :h, :w, :d, :h, :w]


def _takes_fragments(fmask: Tensor | None, groups: int, tokens: int) -> bool:
    """Whether the fragments are those of each window, and constants."""
    if fmask is None:
        return True
    fits = fmask.dim() == 4 and tuple(fmask.shape[1:3]) == (tokens, tokens) and not fmask.requires_grad
    kinds = fmask.shape[0]
    return fits and kinds > 0 and groups % kinds == 0


COUNTERPARTS = (
    Counterpart(
        "WindowAttention3D",
        None,
        FusedFragmentAttention,
        code=("WindowAttention3D.forward",),
        tested={"78e23685c8189d2e": "FAST-VQA 9f264e4, DOVER f1ddc96"},
        resembles=lambda module: (
            has_parts(module, "qkv", "relative_position_bias_table", "relative_position_index", "attn_drop")
            and takes_arguments(module, "fmask", "resized_window_size")
        ),
    ),
)

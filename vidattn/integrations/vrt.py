"""VRT and RVRT (video restoration): attention inside windows, and of the two halves of a window to each other.

Of the repositories JingyunLiang/VRT and JingyunLiang/RVRT, and of others that have their files.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vidattn.integrations import Counterpart
from vidattn.integrations._windows import attend, can_attend, has_parts, takes_mask
from vidattn.nn.parts import why_not_number
from vidattn.nn.windows import gathered_bias
from vidattn.twins import Twin


class FusedVRTWindowAttention(Twin):
    """``WindowAttention`` of VRT and RVRT on ``vidattn.window_attention``."""

    ops = ("window_attention",)

    @staticmethod
    def refuse(module: Any) -> str | None:
        """Say why a module cannot become this twin; None if it can."""
        return why_not_number(module)

    def forward(self: Any, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend inside each window.

        Args:
            x: windows (G, N, C), N at most the tokens of the configured window.
            mask: additive mask (nW, M, M) with M at least N, or None; window g takes ``mask[g % nW, :N, :N]``.

        Returns:
            Windows (G, N, C).
        """
        groups, tokens, _ = x.shape
        index = self.relative_position_index
        fitting = None if mask is None else mask[..., :tokens, :tokens]
        softmax = "softmax" if "softmax" in self._modules else None
        if (
            tokens > index.shape[0]
            or not takes_mask(fitting, groups, tokens)
            or not can_attend(self, softmax, dropout=None)
        ):
            return self.replaced.forward(self, x, mask)
        bias = gathered_bias(self.relative_position_bias_table, index[:tokens, :tokens])
        context = attend(self, self.qkv_self(x).unflatten(-1, (3, self.num_heads, -1)), bias, fitting)
        if getattr(self, "mut_attn", False):
            mutual = _attend_to_the_other_half(self, x + self.position_bias.repeat(1, 2, 1), fitting)
            context = torch.cat((mutual, context), 2)
        return self.proj(context)


def _attend_to_the_other_half(module: Any, x: Tensor, mask: Tensor | None) -> Tensor:
    """Let the queries of each half of a window attend to the other half, as one call on twice as many windows.

    Args:
        module: the twin.
        x: windows (G, N, C).
        mask: (nW, N, N) or None; its first half is that of both halves.

    Returns:
        (G, N, C), in the order of the keys: what the second half found in the first one comes first.
    """
    half = x.shape[1] // 2
    halves = module.qkv_mut(x).unflatten(-1, (3, module.num_heads, -1)).unflatten(1, (2, half))  # (G, 2, N/2, 3, h, d)
    q, k, v = halves.unbind(3)
    mask = None if mask is None else mask[:, :half, :half].repeat_interleave(2, 0)
    context = attend(module, (q.flip(1).flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)), None, mask)
    return context.reshape(x.shape)


_ATTENTION = ("WindowAttention.forward", "WindowAttention.attention")

COUNTERPARTS = (
    Counterpart(
        "WindowAttention",
        None,
        FusedVRTWindowAttention,
        code=_ATTENTION,
        tested={"87a866f29b95b3a7": "VRT 94a5f50, KAIR fc1732f", "2e79c525f22d0cd4": "RVRT a5d406c, KAIR fc1732f"},
        resembles=lambda module: has_parts(module, "qkv_self", "relative_position_index"),
    ),
)

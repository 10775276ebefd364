"""TransMorph (registration of medical volumes): window attention, with position bias or without.

Of the repository junyuchen245/TransMorph_Transformer_for_Medical_Image_Registration, its 2D and Bayesian models too.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional

from vidattn.integrations import Counterpart
from vidattn.integrations._windows import (
    attend,
    can_attend,
    has_parts,
    takes_mask,
    takes_whole_windows,
    whole_bias,
)
from vidattn.nn.parts import rate_in_use, why_not_number
from vidattn.twins import Twin


class FusedTransMorphWindowAttention(Twin):
    """``WindowAttention`` of TransMorph on :func:`vidattn.window_attention`.

    Without ``rpe`` nothing reads its table, which gets no gradient, as before.
    """

    ops = ("window_attention",)

    @staticmethod
    def refuse(module: Any) -> str | None:
        """Say why a module cannot become this twin; None if it can."""
        return why_not_number(module)

    def forward(self: Any, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend inside each window.

        Args:
            x: windows (G, N, C).
            mask: additive mask (nW, N, N), or None; window g takes ``mask[g % nW]``.

        Returns:
            Windows (G, N, C).
        """
        if not (_takes(self, x, mask) and can_attend(self)):
            return self.replaced.forward(self, x, mask)
        context = _attend(self, x, mask, rate_in_use(self.attn_drop))
        return self.proj_drop(self.proj(context))


class FusedBayesianWindowAttention(Twin):
    """``WindowAttention`` of TransMorph-Bayes, which drops in evaluation too, on :func:`vidattn.window_attention`."""

    ops = ("window_attention",)

    @staticmethod
    def refuse(module: Any) -> str | None:
        """Say why a module cannot become this twin; None if it can."""
        return why_not_number(module)

    def forward(self: Any, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend inside each window, as :class:`FusedTransMorphWindowAttention` does."""
        if not (_takes(self, x, mask) and 0.0 <= self.drop < 1.0 and can_attend(self, dropout=None)):
            return self.replaced.forward(self, x, mask)
        return functional.dropout(self.proj(_attend(self, x, mask, self.drop)), self.drop, training=True)


def _takes(module: Any, x: Tensor, mask: Tensor | None) -> bool:
    groups, tokens, _ = x.shape
    return takes_mask(mask, groups, tokens) and (not _has_bias(module) or takes_whole_windows(module, tokens))


def _has_bias(module: Any) -> bool:
    return bool(getattr(module, "rpe", True))


def _attend(module: Any, x: Tensor, mask: Tensor | None, dropout_p: float) -> Tensor:
    bias = whole_bias(module, x.shape[1]) if _has_bias(module) else None
    return attend(module, module.qkv(x).unflatten(-1, (3, module.num_heads, -1)), bias, mask, dropout_p)


COUNTERPARTS = (
    Counterpart(
        "WindowAttention",
        None,
        FusedTransMorphWindowAttention,
        code=("WindowAttention.forward",),
        tested={"3eaf530573ca71c5": "6357a1d", "0c35610366bf1af6": "6357a1d (2D)"},
        resembles=lambda module: has_parts(module, "qkv", "relative_position_bias_table", "rpe", "attn_drop"),
    ),
    Counterpart(
        "WindowAttention",
        None,
        FusedBayesianWindowAttention,
        code=("WindowAttention.forward",),
        tested={
            "eb11b1fd1babba17": "6357a1d",
            "7b9c8c78ab46a0d7": "6357a1d (2D)",
        },
        resembles=lambda module: (
            has_parts(module, "qkv", "relative_position_bias_table", "softmax")
            and isinstance(getattr(module, "drop", None), float)
        ),
    ),
)

"""nnFormer (segmentation of medical volumes): window attention, and that of a decoder with queries from elsewhere.

Of the repository 282857341/nnFormer and of copies. Its position index is not the standard one: several distances share
a row of the table. It is honoured as it is.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vidattn.integrations import Counterpart
from vidattn.integrations._windows import (
    attend,
    can_attend,
    has_parts,
    takes_arguments,
    takes_mask,
    takes_whole_windows,
    whole_bias,
)
from vidattn.nn.parts import rate_in_use, why_not_number
from vidattn.twins import Twin


class FusedNNFormerWindowAttention(Twin):
    """``WindowAttention`` of nnFormer on ``vidattn.window_attention``."""

    ops = ("window_attention",)

    @staticmethod
    def refuse(module: Any) -> str | None:
        """Say why a module cannot become this twin; None if it can."""
        return why_not_number(module)

    def forward(self: Any, x: Tensor, mask: Tensor | None = None, pos_embed: Tensor | None = None) -> Tensor:
        """Attend inside each window.

        Args:
            x: windows (G, N, C).
            mask: additive mask (nW, N, N), or None; window g takes ``mask[g % nW]``.
            pos_embed: added to the context, or None.

        Returns:
            Windows (G, N, C).
        """
        if not _takes(self, x, mask):
            return self.replaced.forward(self, x, mask, **_given(pos_embed))
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
        return _finish(self, qkv, mask, pos_embed)


class FusedNNFormerDecoderAttention(Twin):
    """``WindowAttention_kv`` of nnFormer on ``vidattn.window_attention``."""

    ops = ("window_attention",)

    @staticmethod
    def refuse(module: Any) -> str | None:
        """Say why a module cannot become this twin; None if it can."""
        return why_not_number(module)

    def forward(
        self: Any, skip: Tensor, x_up: Tensor, pos_embed: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Attend inside each window.

        Args:
            skip: windows (G, N, C) of the encoder, of which keys and values are made.
            x_up: windows (G, N, C) of the decoder: the queries.
            pos_embed: added to the context, or None.
            mask: additive mask (nW, N, N), or None; window g takes ``mask[g % nW]``.

        Returns:
            Windows (G, N, C).
        """
        if not _takes(self, skip, mask) or x_up.shape != skip.shape:
            return self.replaced.forward(self, skip, x_up, mask=mask, **_given(pos_embed))
        key, value = self.kv(skip).unflatten(-1, (2, self.num_heads, -1)).unbind(2)
        return _finish(self, (x_up.unflatten(-1, (self.num_heads, -1)), key, value), mask, pos_embed)


class FusedNNFormerACDCDecoderAttention(FusedNNFormerDecoderAttention):
    """``WindowAttention_kv`` of the network for ACDC, without ``pos_embed``."""

    def forward(self: Any, skip: Tensor, x_up: Tensor, mask: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """Attend inside each window, as ``FusedNNFormerDecoderAttention`` does."""
        return super().forward(skip, x_up, mask=mask)


def _given(pos_embed: Tensor | None) -> dict[str, Tensor]:
    """Hand on an argument that not every version has."""
    return {} if pos_embed is None else {"pos_embed": pos_embed}


def _takes(module: Any, x: Tensor, mask: Tensor | None) -> bool:
    groups, tokens, _ = x.shape
    return takes_mask(mask, groups, tokens) and takes_whole_windows(module, tokens) and can_attend(module)


def _finish(
    module: Any, qkv: Tensor | tuple[Tensor, Tensor, Tensor], mask: Tensor | None, pos_embed: Tensor | None
) -> Tensor:
    tokens = (qkv if isinstance(qkv, Tensor) else qkv[0]).shape[1]
    context = attend(module, qkv, whole_bias(module, tokens), mask, rate_in_use(module.attn_drop))
    if pos_embed is not None:
        context = context + pos_embed
    return module.proj_drop(module.proj(context))


def _resembles(module: Any) -> bool:
    parts = ("relative_position_bias_table", "relative_position_index", "softmax", "attn_drop", "proj_drop")
    return has_parts(module, *parts) and isinstance(module.window_size, (tuple, list)) and len(module.window_size) == 3


COUNTERPARTS = (
    Counterpart(
        "WindowAttention",
        None,
        FusedNNFormerWindowAttention,
        code=("WindowAttention.forward",),
        tested={"f4fbb3c7d62d98d4": "nnFormer d48aaeb", "29c7f5c224ec4f2e": "its copy in TransMorph 6357a1d"},
        resembles=lambda module: _resembles(module) and has_parts(module, "qkv"),
    ),
    Counterpart(
        "WindowAttention_kv",
        None,
        FusedNNFormerDecoderAttention,
        code=("WindowAttention_kv.forward",),
        tested={"6f14a184f2365962": "nnFormer d48aaeb"},
        resembles=lambda module: _resembles(module) and takes_arguments(module, "pos_embed"),
    ),
    Counterpart(
        "WindowAttention_kv",
        None,
        FusedNNFormerACDCDecoderAttention,
        code=("WindowAttention_kv.forward",),
        tested={"54fc9675aabac049": "nnFormer d48aaeb"},
        resembles=lambda module: _resembles(module) and not takes_arguments(module, "pos_embed"),
    ),
)

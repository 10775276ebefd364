"""Accelerated twins of the modules of TimeSformer."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vidattn.models.timesformer import Attention, Block, DropPath
from vidattn.nn.divided import Branch, Divided, FusedDividedBlock, maps_tokens
from vidattn.nn.parts import as_defined, attend, can_drop, is_number, is_plain, rate_in_use, why_not_number
from vidattn.twins import Twin, why_overridden


class FusedTimeSformerAttention(Twin):
    """Attention of TimeSformer without a matrix of scores in memory.

    For modules with the parts of the paper's code: ``qkv``, ``proj`` and ``proj_drop`` (unless ``with_qkv`` is false),
    ``attn_drop``, ``num_heads``, ``scale``.
    """

    ops = ("spatial_attention",)

    @staticmethod
    def refuse(module: Any) -> str | None:
        """Say why a module cannot become this twin; None if it can."""
        return why_not_number(module)

    def forward(self: Any, x: Tensor) -> Tensor:
        """Map tokens (B, N, C) to (B, N, C)."""
        if not (self.is_intact() and can_drop(self._modules["attn_drop"]) and is_number(self.scale)):
            return self.replaced.forward(self, x)
        heads = (self.num_heads, -1)
        qkv = self.qkv(x).unflatten(-1, (3, *heads)) if self.with_qkv else (x.unflatten(-1, heads),) * 3
        context = attend(qkv, scale=self.scale, dropout_p=rate_in_use(self.attn_drop), backend=self.attention_backend)
        return self.proj_drop(self.proj(context)) if self.with_qkv else context


class FusedTimeSformerBlock(FusedDividedBlock):
    """A block whose parts have the names of the paper's code."""

    folded = ("temporal_attn.proj", "temporal_fc")

    def takes(self, attention: Any) -> bool:
        """Whether an attention, which the block does the work of, is one that it knows, and nothing hangs on it."""
        raise NotImplementedError

    def find_parts(self: Any) -> Divided | None:
        """Find the parts of the block; None where a module between them is not what the twin does the work of."""
        parts: dict[str, Any] = self._modules  # a module's attributes take three times as long to find
        attentions = (parts["temporal_attn"], parts["attn"])
        if not all(map(self.takes, attentions)) or not all(attention.with_qkv for attention in attentions):
            return None
        over_time, over_space = map(_branch, (parts["temporal_norm1"], parts["norm1"]), attentions)
        return Divided(over_time, parts["temporal_fc"], over_space, parts["drop_path"])


def _branch(norm: nn.Module, attention: Any) -> Branch:
    parts: dict[str, Any] = attention._modules
    layers = (parts["qkv"], parts["attn_drop"], parts["proj"], parts["proj_drop"])
    return Branch(norm, *layers, attention.num_heads, attention.scale)


class FusedAttention(FusedTimeSformerAttention, Attention):
    """[`Attention`][vidattn.models.timesformer.Attention] without a matrix of scores in memory."""


class FusedBlock(FusedTimeSformerBlock, Block):
    """[`Block`][vidattn.models.timesformer.Block]; divided attention is two ops on the tokens as they lie.

    See ``vidattn.nn.divided.FusedDividedBlock``.
    """

    @staticmethod
    def refuse(module: Any) -> str | None:
        """Say why a block cannot become this twin; None if it can."""
        if module.attention_type != "divided_space_time":
            return None
        for name in ("temporal_attn", "attn"):
            attention = getattr(module, name)
            if type(attention) not in _ATTENTIONS:
                return f"its {name} is a {type(attention).__name__}"
            reason = why_overridden(attention) or why_not_number(attention)
            if reason is not None:
                return f"its {name}: {reason}"
            if not attention.with_qkv:
                return f"its {name} has no projections"
        for name in ("temporal_norm1", "norm1"):
            norm = getattr(module, name)
            if not maps_tokens(norm):
                return f"its {name} is a {type(norm).__name__}, which may look at several tokens"
        return None

    def takes(self, attention: Any) -> bool:
        """Whether an attention, which the block does the work of, is one that it knows, and nothing hangs on it."""
        return is_plain(attention, _ATTENTIONS) and (not isinstance(attention, Twin) or attention.is_intact())

    def find_parts(self) -> Divided | None:
        """Find the parts of the block; None where a module between them is not what the twin does the work of."""
        parts = super().find_parts()
        return parts if parts is not None and is_plain(parts.drop_path, _DROPS) else None

    def _attend_divided(self, x: Tensor, batch: int, num_frames: int) -> Tensor:
        attended = self.attend_divided(x, batch, num_frames)
        return super()._attend_divided(x, batch, num_frames) if attended is None else attended


_ATTENTIONS = as_defined(Attention, FusedAttention)
_DROPS = as_defined(nn.Identity, nn.Dropout, DropPath)

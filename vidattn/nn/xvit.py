"""Accelerated twins of the attention of X-ViT."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from vidattn.models.xvit_layers import AfterReconstruction, Attention, TemporalShift
from vidattn.nn.parts import as_defined, attend, can_drop, is_number, is_plain, rate_in_use, why_not_number
from vidattn.ops import space_time_mixing_attention
from vidattn.twins import Twin


class FusedMixing(Twin):
    """X-ViT's attention on [`vidattn.space_time_mixing_attention`][].

    What is shifted is found at every call where the paper's code puts it after construction: keys in
    ``control_point_query``, values in ``control_point_value``. Nothing is shifted in memory. Keys and values shifted
    differently, summary tokens, a hook on a shift and modules of other kinds in its places are computed as the original
    does.
    """

    ops = ("space_time_mixing_attention", "spatial_attention")

    @staticmethod
    def refuse(module: Any) -> str | None:
        """Say why a module cannot become this twin; None if it can."""
        return why_not_number(module)

    @staticmethod
    def what_it_does(place: Any) -> tuple[int, ...] | None:
        """Describe what is in a place for a shift: () leaves everything where it is, None may do anything."""
        raise NotImplementedError

    @staticmethod
    def channel_shifts(shift: Any, num_heads: int, head_dim: int) -> Sequence[tuple[int, int, int]]:
        """List the ranges of channels that a shift takes from other frames."""
        raise NotImplementedError

    def forward(self: Any, x: Tensor) -> Tensor:
        """Map tokens (B * T, N, C) to (B * T, N, C)."""
        if not self._ops_can_attend():
            return self.replaced.forward(self, x)
        if self.insert_control_point:
            x = self.control_point(x)
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
        options = {"scale": self.scale, "dropout_p": rate_in_use(self.attn_drop), "backend": self.attention_backend}
        shift = self.control_point_query if self.insert_control_point else None
        if shift is not None and self.what_it_does(shift):
            ranges = self.channel_shifts(shift, *qkv.shape[-2:])
            context = space_time_mixing_attention(qkv, shift.n_segment, channel_shifts=ranges, **options)
        else:
            context = attend(qkv, **options)
        return self.proj_drop(self.proj(context))

    def _ops_can_attend(self: Any) -> bool:
        """Whether all parts are what the ops compute, and keys and values are shifted alike, or not at all."""
        if (
            not self.is_intact()
            or getattr(self, "summary_frames", False)
            or not can_drop(self.attn_drop)
            or not is_number(self.scale)
        ):
            return False
        if not self.insert_control_point:
            return True
        keys, values = (self.what_it_does(place) for place in (self.control_point_query, self.control_point_value))
        return keys is not None and keys == values


class FusedMixingAttention(FusedMixing, Attention):
    """[`Attention`][vidattn.models.xvit_layers.Attention] on ``space_time_mixing_attention``."""

    @staticmethod
    def what_it_does(place: Any) -> tuple[int, ...] | None:
        """Describe what is in a place for a shift: () leaves everything where it is, None may do anything."""
        if is_plain(place, _STILL):
            return ()
        if not is_plain(place, _SHIFT) or not is_plain(place.net, _STILL):
            return None
        return place.n_segment, place.fold_div, place.per_head, place.window

    @staticmethod
    def channel_shifts(shift: Any, num_heads: int, head_dim: int) -> Sequence[tuple[int, int, int]]:
        """List the ranges of channels that a shift takes from other frames."""
        return shift.channel_shifts(num_heads, head_dim)


_STILL = as_defined(AfterReconstruction, nn.Identity)
_SHIFT = as_defined(TemporalShift)

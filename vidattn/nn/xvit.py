"""Accelerated twins of the attention of X-ViT."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vidattn.models.xvit_layers import AfterReconstruction, Attention, TemporalShift
from vidattn.nn.parts import as_defined, attend, can_drop, is_number, is_plain, rate_in_use, why_not_number
from vidattn.ops import space_time_mixing_attention
from vidattn.twins import Twin

# Frames of a segment, and the ranges of channels that come from other frames; () where nothing is shifted.
Shift = tuple[()] | tuple[int, tuple[tuple[int, int, int], ...]]


class FusedMixing(Twin):
    """X-ViT's attention on :func:`vidattn.space_time_mixing_attention`.

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
    def shift_of(place: Any, num_heads: int, head_dim: int) -> Shift | None:
        """Describe what is in a place for a shift; None if it may do anything."""
        raise NotImplementedError

    def forward(self: Any, x: Tensor) -> Tensor:
        """Map tokens (B * T, N, C) to (B * T, N, C)."""
        shift = self._shift(x.shape[-1] // self.num_heads)
        if shift is None:
            return self.replaced.forward(self, x)
        if self.insert_control_point:
            x = self.control_point(x)
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
        options = {"scale": self.scale, "dropout_p": rate_in_use(self.attn_drop), "backend": self.attention_backend}
        if shift:
            context = space_time_mixing_attention(qkv, shift[0], channel_shifts=shift[1], **options)
        else:
            context = attend(qkv, **options)
        return self.proj_drop(self.proj(context))

    def _shift(self: Any, head_dim: int) -> Shift | None:
        """Describe how keys and values are shifted, both alike; None if the ops cannot do what the original does."""
        if (
            not self.is_intact()
            or getattr(self, "summary_frames", False)
            or not can_drop(self.attn_drop)
            or not is_number(self.scale)
        ):
            return None
        if not self.insert_control_point:
            return ()
        places = self.control_point_query, self.control_point_value
        keys, values = (self.shift_of(place, self.num_heads, head_dim) for place in places)
        return keys if keys == values else None


class FusedMixingAttention(FusedMixing, Attention):
    """:class:`~vidattn.models.xvit_layers.Attention` on :func:`vidattn.space_time_mixing_attention`."""

    @staticmethod
    def shift_of(place: Any, num_heads: int, head_dim: int) -> Shift | None:
        """Describe what is in a place for a shift; None if it may do anything."""
        if is_plain(place, _STILL):
            return ()
        if not is_plain(place, _SHIFT) or not is_plain(place.net, _STILL):
            return None
        return place.n_segment, place.channel_shifts(num_heads, head_dim)


_STILL = as_defined(AfterReconstruction, nn.Identity)
_SHIFT = as_defined(TemporalShift)

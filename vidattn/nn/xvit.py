"""Accelerated twin of the attention of X-ViT."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vidattn.models.xvit_layers import AfterReconstruction, Attention, TemporalShift
from vidattn.nn.parts import as_defined, attend, can_drop, is_number, is_plain, rate_in_use, why_not_number
from vidattn.ops import space_time_mixing_attention
from vidattn.twins import Twin


class FusedMixingAttention(Twin, Attention):
    """X-ViT's attention, :class:`vidattn.models.xvit_layers.Attention`, on :func:`vidattn.space_time_mixing_attention`.

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

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (B * T, N, C) to (B * T, N, C)."""
        if not self._ops_can_attend():
            return super().forward(x)
        if self.insert_control_point:
            x = self.control_point(x)
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
        dropout_p = rate_in_use(self.attn_drop)
        shift = self.control_point_query if self.insert_control_point else None
        if isinstance(shift, TemporalShift):
            context = space_time_mixing_attention(
                qkv,
                shift.n_segment,
                channel_shifts=shift.channel_shifts(*qkv.shape[-2:]),
                scale=self.scale,
                dropout_p=dropout_p,
                backend=self.attention_backend,
            )
        else:
            context = attend(qkv, scale=self.scale, dropout_p=dropout_p, backend=self.attention_backend)
        return self.proj_drop(self.proj(context))

    def _ops_can_attend(self) -> bool:
        """Whether all parts are what the ops compute, and no hook looks at what one of them returns."""
        return (
            self.is_intact()
            and not self.summary_frames
            and can_drop(self.attn_drop)
            and is_number(self.scale)
            and self._shifts_alike()
        )

    def _shifts_alike(self) -> bool:
        """Whether keys and values are shifted alike, or not at all, by modules that the op can stand in for."""
        if not self.insert_control_point:
            return True
        keys, values = (_what_it_does(place) for place in (self.control_point_query, self.control_point_value))
        return keys is not None and keys == values


_STILL = as_defined(AfterReconstruction, nn.Identity)
_SHIFT = as_defined(TemporalShift)


def _what_it_does(place: Any) -> tuple[int, ...] | None:
    """Describe a place for a shift: () leaves everything where it is, None may do anything."""
    if is_plain(place, _STILL):
        return ()
    if not is_plain(place, _SHIFT) or _what_it_does(place.net) != ():
        return None
    return place.n_segment, place.fold_div, place.per_head, place.window

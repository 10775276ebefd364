"""X-ViT's own repository (1adrianb/video-transformers), and copies of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from vidattn.integrations import Counterpart, Part
from vidattn.nn.parts import is_plain
from vidattn.nn.xvit import FusedMixing

# It is put into an attention after its construction.
_SHIFT = Part("TemporalShift", ("TemporalShift.forward",), {"cbc18565448c9d15": "82ca176"})
PARTS = (_SHIFT,)


class FusedMixingAttention(FusedMixing):
    """``Attention`` with control points, where keys and values are shifted over time."""

    @staticmethod
    def what_it_does(place: Any) -> tuple[int, ...] | None:
        """Describe what is in a place for a shift: () leaves everything where it is, None may do anything."""
        if _is_still(place):
            return ()
        kind = type(place)
        if not (is_plain(place, {kind: kind.forward}) and _SHIFT.is_tested(kind) and _is_still(place.net)):
            return None
        return place.n_segment, place.fold_div

    @staticmethod
    def channel_shifts(shift: Any, num_heads: int, head_dim: int) -> Sequence[tuple[int, int, int]]:
        """List the ranges of channels that a shift takes from other frames."""
        channels = num_heads * head_dim
        fold = channels // shift.fold_div
        return (0, fold, 1), (fold, min(2 * fold, channels), -1)


def _is_still(place: Any) -> bool:
    """Whether a place leaves everything as it is: an identity, or a class of its own that is nothing else."""
    kind = type(place)
    return isinstance(place, nn.Identity) and is_plain(place, {kind: nn.Identity.forward})


def _has_control_points(module: Any) -> bool:
    return hasattr(module, "insert_control_point") and hasattr(module, "qkv")


COUNTERPARTS = (
    Counterpart(
        "Attention",
        None,
        FusedMixingAttention,
        code=("Attention.forward",),
        tested={"742a8086f9bf8edd": "82ca176"},
        resembles=_has_control_points,
    ),
)

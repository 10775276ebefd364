"""Frozen in Time and its relatives (EgoVLP, LaViLa, HierVL, lucidrains' TimeSformer): a cls token that sees the clip.

Patches attend over time or over space, as two patterns of einops say, and to the cls token; its query attends to all.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from vidattn.integrations import Counterpart
from vidattn.nn.parts import is_number, why_not_number
from vidattn.ops import spatial_attention, temporal_attention
from vidattn.twins import Twin

_TOKENS = "b (f n) d"
# Devices whose kernels know a cls token that attends to the whole clip.
_IN_ONE = ("cpu",)
_SEQUENCES = {"(b f) n d": "space", "(b n) f d": "time"}


class FusedVarAttention(Twin):
    """``VarAttention`` on ``vidattn.temporal_attention`` or ``vidattn.spatial_attention``.

    The original has a dropout of the probabilities and never calls it, and so does this.
    """

    ops = ("temporal_attention", "spatial_attention")

    @staticmethod
    def refuse(module: Any) -> str | None:
        """Say why a module cannot become this twin; None if it can."""
        return why_not_number(module)

    def forward(self: Any, x: Tensor, einops_from: str, einops_to: str, *args: Any, **sizes: Any) -> Tensor:
        """Map tokens (B, 1 + T * N, C), frame by frame, to the same; LaViLa hands the sizes over as one argument."""
        sequences = _sequences(x, einops_from, einops_to, {**sizes, **(args[0] if args else {})})
        if sequences is None or not self.is_intact() or not is_number(self.scale):
            return self.replaced.forward(self, x, einops_from, einops_to, *args, **sizes)
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
        return self.proj_drop(self.proj(_attend(qkv, *sequences, self.scale, self.attention_backend)))


class FusedAttention(Twin):
    """lucidrains' ``Attention``; masks and rotary embeddings are the original's work."""

    ops = ("temporal_attention", "spatial_attention")

    @staticmethod
    def refuse(module: Any) -> str | None:
        """Say why a module cannot become this twin; None if it can."""
        return why_not_number(module)

    def forward(
        self: Any,
        x: Tensor,
        einops_from: str,
        einops_to: str,
        mask: Any = None,
        cls_mask: Any = None,
        rot_emb: Any = None,
        **sizes: Any,
    ) -> Tensor:
        """Map tokens (B, 1 + T * N, C), frame by frame, to the same."""
        sequences = _sequences(x, einops_from, einops_to, sizes)
        plain = mask is None and cls_mask is None and rot_emb is None
        if not plain or sequences is None or not self.is_intact() or not is_number(self.scale):
            return self.replaced.forward(self, x, einops_from, einops_to, mask, cls_mask, rot_emb, **sizes)
        qkv = self.to_qkv(x).unflatten(-1, (3, self.heads, -1))
        return self.to_out(_attend(qkv, *sequences, self.scale, self.attention_backend))


def _sequences(x: Tensor, einops_from: str, einops_to: str, sizes: dict[str, Any]) -> tuple[str, int] | None:
    """Tell what patches attend over, "time" or "space", and the number of frames; None for any other pattern."""
    over = _SEQUENCES.get(" ".join(einops_to.split()))
    if " ".join(einops_from.split()) != _TOKENS or over is None or len(sizes) != 1 or x.ndim != 3:
        return None
    ((axis, size),) = sizes.items()
    patches = x.shape[1] - 1
    if axis not in ("f", "n") or not isinstance(size, int) or size < 1 or patches < 1 or patches % size:
        return None
    return over, size if axis == "f" else patches // size


def _attend(qkv: Tensor, over: str, num_frames: int, scale: float, backend: str | None) -> Tensor:
    """Attend (B, 1 + T * N, 3, h, d) over time or space, and with the cls token over all: (B, 1 + T * N, h * d)."""
    if qkv.device.type in _IN_ONE or backend == "reference":
        attention = temporal_attention if over == "time" else spatial_attention
        return attention(qkv, num_frames, cls_query="all", scale=scale, backend=backend)  # type: ignore[return-value]
    # Other kernels know one that attends to each frame by itself. Over time, a site is the frame.
    groups = num_frames if over == "space" else (qkv.shape[1] - 1) // num_frames
    order = "thw" if over == "space" else "hwt"
    patches, _ = spatial_attention(qkv, groups, token_order=order, cls_token="per_frame", scale=scale, backend=backend)
    query, key, value = (x.transpose(1, 2) for x in qkv.unbind(2))
    cls_token = functional.scaled_dot_product_attention(query[:, :, :1], key, value, scale=scale)
    return torch.cat((cls_token.transpose(1, 2).flatten(2), patches), dim=1)


COUNTERPARTS = (
    Counterpart(
        "VarAttention",
        None,
        FusedVarAttention,
        code=("VarAttention.forward", "attn"),
        tested={
            "9b9b3b735253bade": "Frozen in Time e1f13e1, EgoVLP 928406c, HierVL 998a852, Region_Learner edd3d1c",
            "0c9f013953913b47": "LaViLa 8002b5a",
        },
    ),
    Counterpart(
        "Attention",
        None,
        FusedAttention,
        code=("Attention.forward", "attn"),
        tested={"20fff0fe8875b9b5": "9a20466"},
        resembles=lambda module: hasattr(module, "to_qkv") and hasattr(module, "heads"),
    ),
)

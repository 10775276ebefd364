"""facebookresearch/TimeSformer: ``timesformer.models.vit``, and copies of that file."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vidattn.integrations import Counterpart
from vidattn.nn.divided import Divided
from vidattn.nn.parts import DROPOUT, is_part, is_plain
from vidattn.nn.timesformer import FusedTimeSformerAttention, FusedTimeSformerBlock


class FusedOfficialBlock(FusedTimeSformerBlock):
    """``Block``; divided attention is two ops on the tokens as they lie."""

    def takes(self, attention: Any) -> bool:
        """Whether an attention, which the block does the work of, is one that it knows, and nothing hangs on it."""
        return is_part(attention, self)

    def find_parts(self) -> Divided | None:
        """Find the parts of the block; None where a module between them is not what the twin does the work of."""
        parts = super().find_parts()
        return parts if parts and (is_plain(parts.drop_path, DROPOUT) or is_part(parts.drop_path, self)) else None

    def forward(self: Any, x: Tensor, B: int, T: int, W: int) -> Tensor:
        """Map tokens (B, 1 + N * T, C), time fastest, to the same shape; W is the number of patches in a row."""
        divides = self.attention_type == "divided_space_time" and (x.shape[1] - 1) % (T * W) == 0
        attended = self.attend_divided(x, B, T) if divides else None
        if attended is None:
            return self.replaced.forward(self, x, B, T, W)
        return attended + self.drop_path(self.mlp(self.norm2(attended)))


def _is_attention(module: Any) -> bool:
    return hasattr(module, "with_qkv") and "attn_drop" in module._modules


def _is_block(module: Any) -> bool:
    return hasattr(module, "attention_type") and {"attn", "norm1", "norm2", "mlp"} <= module._modules.keys()


COUNTERPARTS = (
    Counterpart(
        "Attention",
        None,
        FusedTimeSformerAttention,
        code=("Attention.forward",),
        tested={"bcd4e0327f701f22": "a5ef29a"},
        resembles=_is_attention,
    ),
    Counterpart(
        "Block",
        None,
        FusedOfficialBlock,
        code=("Block.forward", "Attention.forward", "DropPath.forward", "drop_path"),
        tested={"9834ca35f0a451b4": "a5ef29a"},
        resembles=_is_block,
    ),
)

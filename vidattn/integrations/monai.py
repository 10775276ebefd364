"""MONAI: SwinUNETR in 3D and 2D."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from vidattn.integrations import Counterpart
from vidattn.nn.recompute import call_twice
from vidattn.nn.window_blocks import FusedWindowBlock, FusedWindowStage
from vidattn.nn.windows import FusedWindowAttention


class FusedSwinAttention(FusedWindowAttention):
    """``WindowAttention`` on ``vidattn.window_attention``."""

    @staticmethod
    def dropout_in_use(attention: Any) -> float:
        """Tell the share of the attention weights that are dropped now: none where the flash flag acts."""
        flash = getattr(attention, "use_flash_attention", False) and not torch.is_grad_enabled()
        return 0.0 if flash else FusedWindowAttention.dropout_in_use(attention)


class FusedSwinTransformerBlock(FusedWindowBlock):
    """``SwinTransformerBlock`` on ``vidattn.window3d_attention``.

    Most of what a training step of SwinUNETR keeps in its transformer are activations of the MLPs, four times as wide
    as the tokens, while nearly all of its time goes to convolutions. So the MLPs are computed again in the backward
    pass, and their activations are not kept.
    """

    dropout_in_use = staticmethod(FusedSwinAttention.dropout_in_use)

    def forward_part2(self: Any, x: Tensor) -> Tensor:
        """Map tokens through the normalised MLP, before the residual."""
        part2 = partial(self.replaced.forward_part2, self)
        if self.use_checkpoint:  # the caller computes it again already
            return part2(x)
        return call_twice(part2, [self.norm2, self.mlp], x)


class FusedBasicLayer(FusedWindowStage):
    """``BasicLayer`` that does not build a mask when all its blocks are fused."""


def _has_windows(stage: Any) -> bool:
    """Whether a stage attends in windows; one of Hyena blocks has nothing to fuse."""
    return not getattr(stage, "use_hyena", False)


COUNTERPARTS = (
    Counterpart(
        "WindowAttention",
        "monai",
        FusedSwinAttention,
        code=("WindowAttention.forward",),
        tested={"7425b9f316188f9d": "1.3.2, 1.4.0, 1.5.2, 1.6.0", "96240340ab32e628": "1.6.1"},
    ),
    Counterpart(
        "SwinTransformerBlock",
        "monai",
        FusedSwinTransformerBlock,
        code=(
            "SwinTransformerBlock.forward_part1",
            "SwinTransformerBlock.forward_part2",
            "SwinTransformerBlock.forward",
            "WindowAttention.forward",
            "window_partition",
            "window_reverse",
            "get_window_size",
        ),
        tested={"9436ad0f0291e6d7": "1.3.2", "ec1db78f32ef62cb": "1.4.0, 1.5.2, 1.6.0", "9fe82f57b66cd59f": "1.6.1"},
    ),
    Counterpart(
        "BasicLayer",
        "monai",
        FusedBasicLayer,
        code=("BasicLayer.forward", "compute_mask", "window_partition", "get_window_size"),
        tested={
            "519d8bc724759ded": "1.3.2",
            "25f486569474fd13": "1.4.0, 1.5.2",
            "e155035e0d747716": "1.6.0",
            "95901733ceadb52f": "1.6.1",
        },
        resembles=_has_windows,
    ),
)

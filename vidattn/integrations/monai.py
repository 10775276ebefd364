"""MONAI: SwinUNETR in 3D and 2D."""

from __future__ import annotations

from typing import Any

import torch

from vidattn.integrations import Counterpart
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
    """``SwinTransformerBlock`` on ``vidattn.window3d_attention``."""

    dropout_in_use = staticmethod(FusedSwinAttention.dropout_in_use)


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
            "SwinTransformerBlock.forward",
            "WindowAttention.forward",
            "window_partition",
            "window_reverse",
            "get_window_size",
        ),
        tested={"6e0928e26ce38826": "1.3.2", "3964cdf4537129ec": "1.4.0, 1.5.2, 1.6.0", "7ddd76981403cc7c": "1.6.1"},
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

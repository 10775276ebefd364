"""Accelerated twins of the bundled modules of Video Swin."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from vidattn.models.video_swin import BasicLayer, SwinTransformerBlock3D, WindowAttention3D
from vidattn.nn.window_blocks import FusedWindowBlock, region_mask
from vidattn.nn.windows import FusedWindowAttention
from vidattn.twins import Twin, Watched


class FusedWindowAttention3D(FusedWindowAttention, WindowAttention3D):
    """[`WindowAttention3D`][vidattn.models.video_swin.WindowAttention3D] on ``window_attention``."""


class FusedSwinTransformerBlock3D(FusedWindowBlock, SwinTransformerBlock3D):
    """[`SwinTransformerBlock3D`][vidattn.models.video_swin.SwinTransformerBlock3D] on ``window3d_attention``."""


FusedSwinTransformerBlock3D._watched += (Watched(WindowAttention3D, "forward", WindowAttention3D.forward),)


class FusedBasicLayer(Twin, BasicLayer):
    """[`BasicLayer`][vidattn.models.video_swin.BasicLayer] that does not build a mask when all its blocks are fused."""

    level = "layer"

    def make_mask(self, grid: Sequence[int], device: torch.device) -> Any:
        """Say which mask the blocks of the stage use; None when no block is shifted on this token grid."""
        return region_mask(self, grid) or super().make_mask(grid, device)

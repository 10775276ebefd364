"""torchvision's models with their attention swapped."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from integration_cases import Integration, Target
from torch import nn
from torchvision_swin import torchvision_swin3d

import vidattn


def swin3d(depths: tuple[int, ...], heads: tuple[int, ...], window: tuple[int, int, int]) -> nn.Module:
    return torchvision_swin3d.SwinTransformer3d(
        [2, 4, 4], 24, list(depths), list(heads), list(window), stochastic_depth_prob=0.2, num_classes=5
    )


def clip(*shape: int) -> dict[str, Any]:
    return {"x": torch.randn(shape)}


_swin3d = partial(Target, "torchvision", attention=("ShiftedWindowAttention3d",), integration="torchvision")
TARGETS = [
    # Stages of 3 x 7 x 9, 3 x 4 x 5 and 3 x 2 x 3 tokens: windows that are padded, shifted and clipped.
    _swin3d("swin3d, padded", partial(swin3d, (2, 2, 2), (3, 3, 3), (2, 3, 3)), partial(clip, 2, 3, 6, 28, 36)),
    _swin3d("swin3d, clipped", partial(swin3d, (2, 2), (2, 4), (4, 5, 7)), partial(clip, 1, 3, 10, 18, 52)),
]


@pytest.mark.parametrize("target", TARGETS, ids=str)
class TestTargets(Integration):
    pass


def test_a_permuted_position_index_stays_original() -> None:
    model = TARGETS[0].make()
    first = next(module for module in model.modules() if hasattr(module, "relative_position_index"))
    first.relative_position_index.copy_(first.relative_position_index.flip(0).clone())
    report = vidattn.accelerate(model)
    assert [row.reason for row in report.skipped] == ["its relative_position_index is not the standard one"]
    assert len(report.swapped) == 5

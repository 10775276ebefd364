"""transformers' models with their attention swapped, and its attention interface."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torchvision_swin  # noqa: F401  (before transformers, which imports torchvision and cannot do so by itself here)
import transformers
from integration_cases import Integration, Target
from torch import nn

SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 32, "num_labels": 5}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
OF_SWIN = {"image_size": 36, "patch_size": 4, "embed_dim": 12, "depths": [2, 2], "num_heads": [3, 3], "window_size": 4,
           "drop_path_rate": 0.2, "num_labels": 5}  # fmt: skip
OF_TIMESFORMER = {**SIZES, **NO_DROPOUT, "patch_size": 8, "image_size": 24, "num_frames": 3}
OF_VIVIT = {**SIZES, **NO_DROPOUT, "image_size": 16, "num_frames": 4, "tubelet_size": [2, 8, 8]}
OF_VIDEOMAE = {**SIZES, **NO_DROPOUT, "image_size": 16, "num_frames": 4, "tubelet_size": 2, "patch_size": 8}


def build(model: str, **options: Any) -> nn.Module:
    """Make a model, whose name tells that of its configuration."""
    config = getattr(transformers, model.partition("For")[0].removesuffix("Model") + "Config")
    return getattr(transformers, model)(config(**options))


def pixels(*shape: int) -> dict[str, Any]:
    return {"pixel_values": torch.randn(shape)}


def timesformer(**options: Any) -> nn.Module:
    return build("TimesformerForVideoClassification", **OF_TIMESFORMER, **options)


_target = partial(Target, "transformers", integration="transformers")
TARGETS = [
    _target(
        "TimeSformer",
        timesformer,
        partial(pixels, 2, 3, 3, 24, 24),
        ("TimesformerSelfAttention",),
    ),
    _target(
        "ViViT",
        partial(build, "VivitForVideoClassification", **OF_VIVIT, attn_implementation="sdpa"),
        partial(pixels, 2, 4, 3, 16, 16),
        ("VivitAttention",),
    ),
    _target(
        "VideoMAE",
        partial(build, "VideoMAEForVideoClassification", **OF_VIDEOMAE, attn_implementation="sdpa"),
        partial(pixels, 2, 4, 3, 16, 16),
        ("VideoMAESelfAttention",),
    ),
    # Stages of 9 x 9 and 5 x 5 tokens in windows of 4 x 4: padded and shifted.
    _target(
        "Swin",
        partial(build, "SwinForImageClassification", **OF_SWIN, attn_implementation="sdpa"),
        partial(pixels, 2, 3, 36, 36),
        ("SwinAttention",),
    ),
    _target(
        "Swin V2",
        partial(build, "Swinv2ForImageClassification", **OF_SWIN),
        partial(pixels, 2, 3, 36, 36),
        ("Swinv2SelfAttention",),
    ),
]


@pytest.mark.parametrize("target", TARGETS, ids=str)
class TestTargets(Integration):
    pass

"""Every bundled architecture, tiny."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vidattn.models import create_model

_TIMESFORMER = {
    "img_size": 32,
    "num_classes": 5,
    "embed_dim": 12,
    "depth": 1,
    "num_heads": 2,
    "num_frames": 2,
    "drop_path_rate": 0.0,
}
_VIVIT = {
    "hidden_size": 12,
    "num_layers": 1,
    "num_heads": 2,
    "mlp_dim": 8,
    "num_classes": 5,
    "patches": (16, 16, 1),
    "num_frames": 2,
    "image_size": 32,
}
MODELS: dict[str, dict[str, Any]] = {
    "video_swin_t": {
        "num_classes": 5,
        "embed_dim": 12,
        "depths": (2, 1),
        "num_heads": (2, 3),
        "window_size": (1, 3, 3),
        "patch_size": (1, 8, 8),
    },
    "timesformer_base": _TIMESFORMER,
    "timesformer_joint": _TIMESFORMER,
    "timesformer_space_only": _TIMESFORMER,
    "vivit_b_joint": _VIVIT,
    "vivit_b_factorized_encoder": {**_VIVIT, "temporal_num_layers": 1},
    "vivit_b_factorized_self_attention": _VIVIT,
    "vivit_b_factorized_dot_product": _VIVIT,
    "xvit_b16_8f": {
        "img_size": 32,
        "num_classes": 5,
        "embed_dim": 12,
        "depth": 1,
        "num_heads": 2,
        "num_frames": 2,
        "num_segments": 2,
        "temporal_heads": 2,
        "temporal_mlp_dim": 8,
    },
}


def tiny(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = create_model(name, **MODELS[name]).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # as initialised, some heads are zero and attention hardly counts
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def clips(batch: int) -> Tensor:
    return torch.randn(batch, 3, 2, 32, 32, generator=torch.Generator().manual_seed(batch))

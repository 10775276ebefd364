"""Shrunken models that several processes train, for the tests of everything distributed."""

from __future__ import annotations

from typing import Any

import torch
from integration_cases import spread
from torch import Tensor, nn

from vidattn.models import create_model

# Heads and hidden channels that 2 and 4 processes can share; no dropout, which draws by process.
BUNDLED: dict[str, tuple[str, dict[str, Any]]] = {
    "video_swin": (
        "video_swin_t",
        {
            "patch_size": (2, 4, 4),
            "embed_dim": 16,
            "depths": (2, 2),
            "num_heads": (4, 8),
            "window_size": (2, 3, 3),
            "drop_path_rate": 0.0,
            "dropout_ratio": 0.0,
        },
    ),
    "timesformer": (
        "timesformer_base",
        {
            "img_size": 32,
            "patch_size": 8,
            "embed_dim": 16,
            "depth": 2,
            "num_heads": 4,
            "num_frames": 4,
            "drop_path_rate": 0.0,
        },
    ),
    "vivit": (
        "vivit_b_factorized_self_attention",
        {
            "hidden_size": 16,
            "num_layers": 2,
            "num_heads": 4,
            "mlp_dim": 16,
            "patches": (8, 8, 1),
            "num_frames": 4,
            "image_size": 32,
        },
    ),
    "xvit": (
        "xvit_b16_8f",
        {
            "img_size": 32,
            "patch_size": 8,
            "embed_dim": 16,
            "depth": 2,
            "num_heads": 4,
            "num_frames": 4,
            "num_segments": 4,
            "temporal_heads": 4,
            "temporal_mlp_dim": 16,
            "dropout_rate": 0.0,
        },
    ),
}


def build(name: str) -> nn.Module:
    """Make a model in training mode, the same on every process, with weights that matter."""
    torch.manual_seed(0)
    variant, overrides = BUNDLED[name]
    return spread(create_model(variant, num_classes=5, **overrides)).train()


def clips(count: int) -> Tensor:
    """Make clips (count, 3, 4, 32, 32), the same on every process."""
    return torch.randn(count, 3, 4, 32, 32, generator=torch.Generator().manual_seed(1))


def step(model: nn.Module, video: Tensor) -> list[Tensor]:
    """Take a step of SGD; give the output and the input's gradient."""
    video = video.detach().requires_grad_()
    out = model(video)
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)).sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert video.grad is not None
    return [out.detach(), video.grad]

"""Shrunken models that several processes train, for the tests of everything distributed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from integration_cases import spread
from torch import Tensor, nn
from torch.nn import functional

from vidattn.models import create_model

CLASSES = 5
_VIVIT: dict[str, Any] = {
    "hidden_size": 16,
    "num_layers": 2,
    "num_heads": 4,
    "mlp_dim": 16,
    "patches": (8, 8, 1),
    "num_frames": 4,
    "image_size": 32,
}
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
    "vivit": ("vivit_b_factorized_self_attention", _VIVIT),
    "vivit_dot_product": ("vivit_b_factorized_dot_product", _VIVIT),
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


def _torchvision() -> nn.Module:
    from torchvision_swin import torchvision_swin3d

    return torchvision_swin3d.SwinTransformer3d(
        [2, 4, 4], 16, [2, 1], [2, 4], [2, 3, 3], stochastic_depth_prob=0.0, num_classes=CLASSES
    )


def _transformers() -> nn.Module:
    import torchvision_swin  # noqa: F401  # which transformers imports too
    from transformers import TimesformerConfig, TimesformerForVideoClassification

    sizes = {"image_size": 32, "patch_size": 8, "num_frames": 4, "hidden_size": 16, "intermediate_size": 32}
    config = TimesformerConfig(
        **sizes, num_hidden_layers=2, num_attention_heads=2, num_labels=CLASSES, attention_probs_dropout_prob=0.0
    )
    return TimesformerForVideoClassification(config)


FOREIGN: dict[str, Callable[[], nn.Module]] = {"torchvision": _torchvision, "transformers": _transformers}


def build(name: str) -> nn.Module:
    """Make a model in training mode, the same on every process, with weights that matter."""
    torch.manual_seed(0)
    if name in FOREIGN:
        return spread(FOREIGN[name]()).train()
    variant, overrides = BUNDLED[name]
    return spread(create_model(variant, num_classes=CLASSES, **overrides)).train()


def logits(model: nn.Module, video: Tensor) -> Tensor:
    """Call a model, of whatever library, on clips (B, 3, T, H, W)."""
    if "Timesformer" in type(getattr(model, "module", model)).__name__:
        return model(video.transpose(1, 2)).logits
    return model(video)


def clips(count: int) -> Tensor:
    """Make clips (count, 3, 4, 32, 32), the same on every process."""
    return torch.randn(count, 3, 4, 32, 32, generator=torch.Generator().manual_seed(1))


def learn(
    model: nn.Module, optimizer: torch.optim.Optimizer, video: Tensor, first: int = 0, autocast: bool = False
) -> Tensor:
    """Take a step of an optimizer on clips that are numbered from ``first``; give the loss."""
    optimizer.zero_grad()
    labels = (first + torch.arange(len(video), device=video.device)) % CLASSES
    with torch.autocast(video.device.type, torch.bfloat16, enabled=autocast):
        loss = functional.cross_entropy(logits(model, video), labels)
    loss.backward()
    optimizer.step()
    return loss.detach()


def step(model: nn.Module, video: Tensor) -> list[Tensor]:
    """Take a step of SGD; give the output and the input's gradient."""
    video = video.detach().requires_grad_()
    out = model(video)
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)).sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert video.grad is not None
    return [out.detach(), video.grad]

"""Models of other libraries, full size, as functions of one tensor: what a user of each library runs."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

__all__ = ["LIBRARY_MODELS", "create"]


class _PixelValues(nn.Module):
    """A model of transformers that takes a video as all others here, and gives logits."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, video: Tensor) -> Tensor:
        return self.model(pixel_values=video.transpose(1, 2)).logits


def _import(name: str) -> Any:
    if importlib.util.find_spec("torchvision") is not None:
        importlib.import_module("tests.torchvision_swin")  # with it torchvision loads beside a CPU build of torch
    return importlib.import_module(name)


def _swin3d_t(**options: Any) -> nn.Module:
    torchvision_swin3d = _import("torchvision.models.video.swin_transformer")
    model = torchvision_swin3d.swin3d_t(weights=None, progress=False, **options)
    for module in model.modules():
        if type(module).__name__ == "StochasticDepth":
            module.p = 0.0
    return model


def _swin_unetr(**options: Any) -> nn.Module:
    unetr = _import("monai.networks.nets.swin_unetr")
    return unetr.SwinUNETR(in_channels=1, out_channels=14, **{"feature_size": 48, **options})


def _timesformer(**options: Any) -> nn.Module:
    transformers = _import("transformers")
    given = {"num_labels": 400, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, **options}
    return _PixelValues(transformers.TimesformerForVideoClassification(transformers.TimesformerConfig(**given)))


# Each takes the options of its constructor.
LIBRARY_MODELS: dict[str, Callable[..., nn.Module]] = {
    "torchvision_swin3d_t": _swin3d_t,
    "monai_swin_unetr": _swin_unetr,
    "transformers_timesformer": _timesformer,
}


def create(name: str, **options: Any) -> nn.Module:
    """Make a model of another library, or one that is bundled here, with random weights."""
    if name in LIBRARY_MODELS:
        return LIBRARY_MODELS[name](**options)
    from vidattn.models import create_model

    return create_model(name, **options)

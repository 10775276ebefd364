"""Models of other libraries, full size, and their attention alone, as functions of one tensor: what their users run."""

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


def _timm_swin_t(**options: Any) -> nn.Module:
    return _import("timm").create_model("swin_tiny_patch4_window7_224", **options)  # type: ignore[no-any-return]


def _torchvision_attention(**options: Any) -> nn.Module:
    given = {"dim": 96, "window_size": [8, 7, 7], "shift_size": [4, 3, 3], "num_heads": 3, **options}
    swin = _import("torchvision.models.video.swin_transformer")
    return swin.ShiftedWindowAttention3d(**given)  # type: ignore[no-any-return]


class _MonaiBlock(nn.Module):
    """A block of SwinUNETR with the mask that its layer makes for it."""

    def __init__(self, size: int = 48, **options: Any) -> None:
        super().__init__()
        unetr = _import("monai.networks.nets.swin_unetr")
        given = {"dim": 48, "num_heads": 3, "window_size": (7, 7, 7), "shift_size": (3, 3, 3), **options}
        self.block = unetr.SwinTransformerBlock(**given)
        padded = [-(-size // window) * window for window in given["window_size"]]
        mask = unetr.compute_mask(padded, given["window_size"], given["shift_size"], None)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x, self.mask)  # type: ignore[no-any-return]


class _TimesformerLayer(nn.Module):
    """A layer of transformers' TimeSformer, which gives the tokens alone."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        code = _import("transformers.models.timesformer.modeling_timesformer")
        given = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, **options}
        self.layer = code.TimesformerLayer(_import("transformers").TimesformerConfig(**given), 0)

    def forward(self, x: Tensor) -> Tensor:
        result = self.layer(x)
        return result if isinstance(result, Tensor) else result[0]  # type: ignore[no-any-return]


def _timm_block(**options: Any) -> nn.Module:
    code = _import("timm.models.swin_transformer")
    given = {"dim": 96, "input_resolution": (56, 56), "num_heads": 3, "window_size": 7, "shift_size": 3, **options}
    return code.SwinTransformerBlock(**given)  # type: ignore[no-any-return]


# Each takes the options of its constructor.
LIBRARY_MODELS: dict[str, Callable[..., nn.Module]] = {
    "torchvision_swin3d_t": _swin3d_t,
    "monai_swin_unetr": _swin_unetr,
    "transformers_timesformer": _timesformer,
    "timm_swin_t": _timm_swin_t,
    "torchvision_attention": _torchvision_attention,
    "monai_block": _MonaiBlock,
    "transformers_layer": _TimesformerLayer,
    "timm_block": _timm_block,
}


def create(name: str, **options: Any) -> nn.Module:
    """Make a model of another library, or one that is bundled here, with random weights."""
    if name in LIBRARY_MODELS:
        return LIBRARY_MODELS[name](**options)
    from vidattn.models import create_model

    return create_model(name, **options)

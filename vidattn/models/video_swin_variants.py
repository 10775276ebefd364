"""The published sizes of the Video Swin Transformer (arXiv 2106.13230, section 3.2) and how their clips are sampled."""

from __future__ import annotations

import inspect
from typing import Any

from vidattn.models.registry import InputSpec, register_model
from vidattn.models.video_swin import I3DHead, Recognizer3D, SwinTransformer3D


def video_swin(num_classes: int = 400, dropout_ratio: float = 0.5, **backbone: Any) -> Recognizer3D:
    """Build a Video Swin classifier.

    Args:
        num_classes: Classes.
        dropout_ratio: Dropout before the classification layer.
        **backbone: Arguments of ``SwinTransformer3D``.

    Returns:
        The classifier, randomly initialised.
    """
    model = SwinTransformer3D(**backbone)
    return Recognizer3D(model, I3DHead(num_classes, model.num_features, dropout_ratio=dropout_ratio))


_OPTIONS = ("num_classes", "dropout_ratio", *inspect.signature(SwinTransformer3D).parameters)
_COMMON = {"patch_size": (2, 4, 4), "window_size": (8, 7, 7), "patch_norm": True}
_SMALL = {"embed_dim": 96, "num_heads": (3, 6, 12, 24)}
_BASE = {"embed_dim": 128, "num_heads": (4, 8, 16, 32), "depths": (2, 2, 18, 2)}
_LARGE = {"embed_dim": 192, "num_heads": (6, 12, 24, 48), "depths": (2, 2, 18, 2)}
_UNIFORM = InputSpec(frame_stride=1, sampling="uniform", num_classes=174, test_views=(1, 3))
_WIDE = InputSpec(short_side=384, crop=384, test_views=(10, 5))

for _name, _spec, _variant in (
    ("video_swin_t", InputSpec(), {**_SMALL, "depths": (2, 2, 6, 2), "drop_path_rate": 0.1}),
    ("video_swin_s", InputSpec(), {**_SMALL, "depths": (2, 2, 18, 2), "drop_path_rate": 0.1}),
    ("video_swin_b", InputSpec(), {**_BASE, "drop_path_rate": 0.3}),
    ("video_swin_l", InputSpec(), {**_LARGE, "drop_path_rate": 0.4}),
    ("video_swin_l_384", _WIDE, {**_LARGE, "drop_path_rate": 0.4, "window_size": (8, 12, 12)}),
    ("video_swin_b_ssv2", _UNIFORM, {**_BASE, "drop_path_rate": 0.4, "window_size": (16, 7, 7)}),
):
    register_model(_name, video_swin, _OPTIONS, _spec, {**_COMMON, **_variant, "num_classes": _spec.num_classes})

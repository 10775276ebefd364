"""The published sizes of TimeSformer (arXiv 2102.05095, sections 4.1 and 4.4) and how their clips are sampled."""

from __future__ import annotations

import inspect

from vidattn.models.registry import InputSpec, register_model
from vidattn.models.timesformer import TimeSformer, VisionTransformer

# The paper's code normalises all channels alike, on 0..1: mean 0.45, deviation 0.225.
_MEAN = (114.75, 114.75, 114.75)
_STD = (57.375, 57.375, 57.375)
_OPTIONS = tuple(
    dict.fromkeys(
        name
        for model in (TimeSformer, VisionTransformer)
        for name in inspect.signature(model).parameters
        if name != "kwargs"
    )
)


def _spec(num_frames: int, frame_stride: int, size: int = 224) -> InputSpec:
    return InputSpec(num_frames, frame_stride, "spaced", size, size, _MEAN, _STD, num_classes=400, test_views=(1, 3))


_SSV2 = InputSpec(64, 1, "uniform", mean=_MEAN, std=_STD, num_classes=174, test_views=(1, 3))

for _name, _input_spec, _attention_type in (
    ("timesformer_base", _spec(8, 32), "divided_space_time"),
    ("timesformer_hr", _spec(16, 16, 448), "divided_space_time"),
    ("timesformer_large", _spec(96, 4), "divided_space_time"),
    ("timesformer_large_ssv2", _SSV2, "divided_space_time"),
    ("timesformer_joint", _spec(8, 32), "joint_space_time"),
    ("timesformer_space_only", _spec(8, 32), "space_only"),
):
    register_model(
        _name,
        TimeSformer,
        _OPTIONS,
        _input_spec,
        {
            "img_size": _input_spec.crop,
            "num_classes": _input_spec.num_classes,
            "num_frames": _input_spec.num_frames,
            "attention_type": _attention_type,
            "patch_size": 16,
            "embed_dim": 768,
            "depth": 12,
        },
    )

"""The published sizes of X-ViT (arXiv 2106.05968, section 4) and how their clips are sampled."""

from __future__ import annotations

import inspect

from vidattn.models.registry import InputSpec, register_model
from vidattn.models.xvit import XViT


def _spec(num_frames: int, frame_stride: int, sampling: str = "spaced", num_classes: int = 400) -> InputSpec:
    return InputSpec(
        num_frames,
        frame_stride,
        sampling,
        mean=(127.5, 127.5, 127.5),  # pixels from -1 to 1
        std=(127.5, 127.5, 127.5),
        num_classes=num_classes,
        test_views=(1, 3),
    )


_SSV2 = _spec(16, 1, "uniform", num_classes=174)

for _name, _input_spec, _num_segments, _shift_div in (
    # No configuration was published for 8 frames; this one spans the time of those for 16.
    ("xvit_b16_8f", _spec(8, 32), 8, 8),
    ("xvit_b16_16f", _spec(16, 16), 8, 8),  # two segments of 8, as published
    ("xvit_b16_16f_ssv2", _SSV2, 16, 4),
):
    register_model(
        _name,
        XViT,
        tuple(inspect.signature(XViT).parameters),
        _input_spec,
        {
            "img_size": _input_spec.crop,
            "num_classes": _input_spec.num_classes,
            "num_frames": 8,  # time embeddings, for 16 frames too
            "num_segments": _num_segments,
            "shift_div": _shift_div,
            "consensus_type": "vit",
            "patch_size": 16,
            "embed_dim": 768,
            "depth": 12,
        },
    )

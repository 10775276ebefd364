"""Configurations of X-ViT's code (arXiv 2106.05968) as arguments of the bundled model."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

# Keys that are arguments as they are.
_ARGUMENTS = {
    "MODEL.NUM_CLASSES": "num_classes",
    "MODEL.DROPOUT_RATE": "dropout_rate",
    "SOLVER.FREEZE_BACKBONE": "freeze_backbone",
    "XVIT.NUM_SEGMENTS": "num_segments",
    "XVIT.SHIFT_DIV": "shift_div",
    "XVIT.LOCATIONS_LIST": "locations_list",
    "XVIT.USE_XVIT": "use_xvit",
    "XVIT.CONSENSUS_TYPE": "consensus_type",
    "XVIT.BEFORE_SOFTMAX": "before_softmax",
    "XVIT.BACKBONE.DROP_PATH_RATE": "drop_path_rate",
    "XVIT.BACKBONE.DROP_ATTN_RATE": "attn_drop_rate",
    "TEMPORAL_HEAD.NUM_ATTENTION_HEADS": "temporal_heads",
    "TEMPORAL_HEAD.NUM_HIDDEN_LAYERS": "temporal_layers",
    "TEMPORAL_HEAD.MLP_DIM": "temporal_mlp_dim",
    "TEMPORAL_HEAD.ATTENTION_PROBS_DROPOUT_PROB": "temporal_attn_drop",
    "TEMPORAL_HEAD.HIDDEN_DROPOUT_PROB": "temporal_drop",
}
# Keys that mean something else, or nothing, here; a key of these sections that is in neither table is a mistake.
_OTHERS = {"XVIT.BASE_MODEL", "XVIT.PRETRAIN", "XVIT.BACKBONE.NORM_LAYER", "TEMPORAL_HEAD.HIDDEN_DIM"}
_SECTIONS = ("XVIT.", "TEMPORAL_HEAD.")
_SIZES = {
    "base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "large": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
}


def _flatten(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def read_config(config: Mapping[str, Any], **overrides: Any) -> dict[str, Any]:
    """Translate a configuration of the paper's code.

    Args:
        config: The configuration, flat or nested, as ``vidattn.models.xvit.XViT.from_config`` takes it.
        **overrides: Arguments of ``vidattn.models.xvit.XViT`` that differ.

    Returns:
        Arguments of ``vidattn.models.xvit.XViT``.

    Raises:
        ValueError: A value is not known, or a key in the sections XVIT or TEMPORAL_HEAD.

    Example:
        >>> read_config({"XVIT": {"BASE_MODEL": "vit_base_patch32_224_in21k"}})["patch_size"]
        32
    """
    flat = dict(_flatten(config))
    unknown = [key for key in flat if key.startswith(_SECTIONS) and key not in _ARGUMENTS.keys() | _OTHERS]
    if unknown:
        raise ValueError(f"config must have keys of the paper's code, got {', '.join(unknown)}")
    name = flat.get("XVIT.BASE_MODEL", "vit_base_patch16_224_in21k")
    size = re.fullmatch(r"vit_(base|large)_patch(16|32)_(224|384)(_in21k)?", str(name))
    if size is None:
        raise ValueError(f"XVIT.BASE_MODEL must be vit_base or vit_large with patch16 or patch32, got {name!r}")
    # The code names others, which normalise over its second axis; that axis is the tokens, not the channels.
    if flat.get("XVIT.BACKBONE.NORM_LAYER", "LN") != "LN":
        raise ValueError(f"XVIT.BACKBONE.NORM_LAYER must be LN, got {flat['XVIT.BACKBONE.NORM_LAYER']!r}")
    for_testing = flat.get("TEST.ENABLE", True) and not flat.get("TRAIN.ENABLE", True)
    crop = flat.get("DATA.TEST_CROP_SIZE", 256) if for_testing else flat.get("DATA.TRAIN_CROP_SIZE", 224)
    arguments = {"img_size": crop, "patch_size": int(size[2]), "locations_list": (9, 10, 11), **_SIZES[size[1]]}
    arguments.update({_ARGUMENTS[key]: value for key, value in flat.items() if key in _ARGUMENTS})
    if arguments.get("consensus_type") == "rnn":
        arguments["consensus_type"] = "identity"  # another name of the same
    arguments.update(overrides)
    width = arguments.get("representation_size") or arguments["embed_dim"]
    if flat.get("TEMPORAL_HEAD.HIDDEN_DIM", width) != width:
        raise ValueError(
            f"TEMPORAL_HEAD.HIDDEN_DIM must be {width}, the channels of the backbone, "
            f"got {flat['TEMPORAL_HEAD.HIDDEN_DIM']}"
        )
    return arguments

"""The published sizes of ViViT (arXiv 2103.15691, section 4.1) and how their clips are sampled."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from vidattn.models.registry import InputSpec, register_model
from vidattn.models.vivit import SpaceTimeViViT, ViViT
from vidattn.models.vivit_layers import LAYER_NORM_EPS


def _tokens(
    patches: Sequence[int], kernel_init_method: str | None, sampled_frames: int | None
) -> tuple[Sequence[int], dict[str, Any]]:
    if sampled_frames is None:
        return patches, {"method": "3d_conv", "kernel_init_method": kernel_init_method}
    return patches[:2], {"method": "temporal_sampling", "n_sampled_frames": sampled_frames}


def vivit(
    hidden_size: int = 768,
    num_layers: int = 12,
    num_heads: int = 12,
    mlp_dim: int = 3072,
    num_classes: int = 400,
    patches: Sequence[int] = (16, 16, 2),
    num_frames: int = 32,
    image_size: int | Sequence[int] = 224,
    attention: str = "spacetime",
    attention_order: str = "time_space",
    classifier: str = "gap",
    representation_size: int | None = None,
    kernel_init_method: str | None = "central_frame_initializer",
    sampled_frames: int | None = None,
    dropout_rate: float = 0.0,
    attention_dropout_rate: float = 0.0,
    stochastic_droplayer_rate: float = 0.0,
    qkv_bias: bool = True,
    gelu: str = "tanh",
    layer_norm_eps: float = LAYER_NORM_EPS,
) -> ViViT:
    """Build ViViT model 1, 3 or 4.

    Args:
        hidden_size: Channels of a token.
        num_layers: Blocks.
        num_heads: Attention heads.
        mlp_dim: Hidden channels of the MLPs.
        num_classes: Classes.
        patches: (height, width, frames) of a tubelet in pixels.
        num_frames: Frames of a clip.
        image_size: Pixels of a frame, one number or (height, width).
        attention: "spacetime", "factorized_self_attention_block" or "factorized_dot_product_attention".
        attention_order: "time_space" or "space_time", for factorized self-attention.
        classifier: "token" ("spacetime" only), "gap", "gmp" or "gsp".
        representation_size: Channels of the pre-logits layer; None: no such layer.
        kernel_init_method: How the tubelet embedding starts, and is made from an image's; None: as one kernel.
        sampled_frames: Embed that many uniformly sampled frames instead of tubelets.
        dropout_rate: Dropout after the position embedding, the attentions and in the MLPs.
        attention_dropout_rate: Dropout of the attention probabilities.
        stochastic_droplayer_rate: Stochastic depth of the last block.
        qkv_bias: Whether queries, keys and values have a bias.
        gelu: "tanh" (the paper's) or "erf".
        layer_norm_eps: What LayerNorms add to the variance.

    Returns:
        The classifier, randomly initialised.
    """
    patches, encoding = _tokens(patches, kernel_init_method, sampled_frames)
    config = {"type": attention}
    if attention == "factorized_self_attention_block":
        config["attention_order"] = attention_order
    return ViViT(
        mlp_dim,
        num_layers,
        num_heads,
        num_classes,
        patches,
        hidden_size,
        encoding,
        config,
        representation_size=representation_size,
        dropout_rate=dropout_rate,
        attention_dropout_rate=attention_dropout_rate,
        stochastic_droplayer_rate=stochastic_droplayer_rate,
        classifier=classifier,
        num_frames=num_frames,
        image_size=image_size,
        qkv_bias=qkv_bias,
        gelu=gelu,
        layer_norm_eps=layer_norm_eps,
    )


def space_time_vivit(
    hidden_size: int = 768,
    num_layers: int = 12,
    temporal_num_layers: int = 4,
    num_heads: int = 12,
    mlp_dim: int = 3072,
    num_classes: int = 400,
    patches: Sequence[int] = (16, 16, 2),
    num_frames: int = 32,
    image_size: int | Sequence[int] = 224,
    classifier: str = "token",
    spatial_only_baseline: bool = False,
    representation_size: int | None = None,
    kernel_init_method: str | None = "central_frame_initializer",
    sampled_frames: int | None = None,
    dropout_rate: float = 0.0,
    attention_dropout_rate: float = 0.0,
    stochastic_droplayer_rate: float = 0.0,
    qkv_bias: bool = True,
    gelu: str = "tanh",
    layer_norm_eps: float = LAYER_NORM_EPS,
    temporal_num_heads: int | None = None,
    temporal_mlp_dim: int | None = None,
) -> SpaceTimeViViT:
    """Build ViViT model 2, the factorized encoder; unless said, both encoders have the same heads and MLPs.

    Args:
        hidden_size: Channels of a token.
        num_layers: Blocks of the spatial encoder.
        temporal_num_layers: Blocks of the temporal encoder.
        num_heads: Attention heads.
        mlp_dim: Hidden channels of the MLPs.
        num_classes: Classes.
        patches: (height, width, frames) of a tubelet in pixels.
        num_frames: Frames of a clip.
        image_size: Pixels of a frame, one number or (height, width).
        classifier: "token", "gap", "gmp" or "gsp".
        spatial_only_baseline: Average the frames instead of encoding them, the paper's "Ave. pool".
        representation_size: Channels of the pre-logits layer; None: no such layer.
        kernel_init_method: How the tubelet embedding starts, and is made from an image's; None: as one kernel.
        sampled_frames: Embed that many uniformly sampled frames instead of tubelets.
        dropout_rate: Dropout after the position embeddings, the attentions and in the MLPs.
        attention_dropout_rate: Dropout of the attention probabilities.
        stochastic_droplayer_rate: Stochastic depth of the last block of each encoder.
        qkv_bias: Whether queries, keys and values have a bias.
        gelu: "tanh" (the paper's) or "erf".
        layer_norm_eps: What LayerNorms add to the variance.
        temporal_num_heads: Attention heads of the temporal encoder; None: ``num_heads``.
        temporal_mlp_dim: Hidden channels of the MLPs of the temporal encoder; None: ``mlp_dim``.

    Returns:
        The classifier, randomly initialised.
    """
    patches, encoding = _tokens(patches, kernel_init_method, sampled_frames)
    return SpaceTimeViViT(
        mlp_dim,
        num_layers,
        num_heads,
        mlp_dim if temporal_mlp_dim is None else temporal_mlp_dim,
        temporal_num_layers,
        num_heads if temporal_num_heads is None else temporal_num_heads,
        num_classes,
        patches,
        hidden_size,
        encoding,
        {"type": "factorized_encoder", "spatial_only_baseline": spatial_only_baseline},
        representation_size=representation_size,
        dropout_rate=dropout_rate,
        attention_dropout_rate=attention_dropout_rate,
        stochastic_droplayer_rate=stochastic_droplayer_rate,
        classifier=classifier,
        num_frames=num_frames,
        image_size=image_size,
        qkv_bias=qkv_bias,
        gelu=gelu,
        layer_norm_eps=layer_norm_eps,
    )


_SPEC = InputSpec(  # pixels from -1 to 1
    short_side=256, mean=(127.5, 127.5, 127.5), std=(127.5, 127.5, 127.5), fixed_length=True
)
_LARGE_SPEC = replace(_SPEC, test_views=(1, 3))
_LARGE = {"hidden_size": 1024, "num_layers": 24, "num_heads": 16, "mlp_dim": 4096}

_Build = Callable[..., ViViT | SpaceTimeViViT]
_PUBLISHED: tuple[tuple[str, _Build, InputSpec, Mapping[str, Any]], ...] = (
    ("vivit_b_joint", vivit, _SPEC, {"classifier": "token"}),
    ("vivit_b_factorized_encoder", space_time_vivit, _SPEC, {}),
    ("vivit_b_factorized_self_attention", vivit, _SPEC, {"attention": "factorized_self_attention_block"}),
    ("vivit_b_factorized_dot_product", vivit, _SPEC, {"attention": "factorized_dot_product_attention"}),
    # Of its Kinetics weights; those of Something-Something v2 have 4 temporal blocks and frames of 256 pixels.
    ("vivit_l_factorized_encoder", space_time_vivit, _LARGE_SPEC, {**_LARGE, "temporal_num_layers": 24}),
)

for _name, _build, _spec, _variant in _PUBLISHED:
    _options = inspect.signature(_build).parameters
    register_model(
        _name, _build, tuple(_options), _spec, {**{key: value.default for key, value in _options.items()}, **_variant}
    )

"""Checkpoint layouts of X-ViT, and image ViT files to start from (arXiv 2106.05968, section 4).

Two layouts are read. "official" has the names of the bundled models, or those of their network alone. "image" is a
two-dimensional ViT, as timm saves it: the time embeddings start as zeros, the classifiers as they are.

Position embeddings of an image model are resized bilinearly here, once, to those of 224 x 224 pixels, as the paper's
code does when it loads. (At run time a model resizes those to its frames, bicubically.)
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from vidattn.models.checkpoint import Conversion, State, not_recognised, register_converter
from vidattn.models.checkpoint_names import rename
from vidattn.models.registry import matching_models
from vidattn.models.xvit import VisionTransformer, XViT

_PREFIX = "base_model."
_PATCH = "patch_embed.proj.weight"
_ESSENTIAL = {_PATCH, "cls_token", "pos_embed", "blocks.0.attn.qkv.weight"}
_KNOWN = re.compile(r"(cls_token|pos_embed|temp_embed)$|(patch_embed|blocks|norm|pre_logits|head)\.")
# Weights of the clip's classifiers: the last layer of the temporal head, and the one that reads single frames.
_CLASSIFIERS = ("consensus.mlp_head.4.", "new_fc.", "base_model.head.")


def resize_positions(table: Tensor, rows: int) -> Tensor:
    """Resize position embeddings of one square grid to another, bilinearly.

    Args:
        table: Embeddings (1, 1 + old side ** 2, C); the first row is the cls token's, and stays.
        rows: Rows of the result, one more than a square.

    Returns:
        Embeddings (1, rows, C).

    Raises:
        ValueError: The rows of either are not one more than a square.

    Example:
        >>> resize_positions(torch.tensor([9.0, 1, 1, 3, 3]).view(1, 5, 1), 10).flatten().tolist()
        [9.0, 1.0, 1.0, 1.0, 2.0, 2.0, 2.0, 3.0, 3.0, 3.0]
    """
    old, new = math.isqrt(table.shape[1] - 1), math.isqrt(rows - 1)
    if (old * old, new * new) != (table.shape[1] - 1, rows - 1):
        raise ValueError(f"pos_embed must be of square grids, got {table.shape[1]} rows to resize to {rows}")
    plane = table[:, 1:].transpose(1, 2).unflatten(2, (old, old))
    plane = functional.interpolate(plane, size=(new, new), mode="bilinear")
    return torch.cat((table[:, :1], plane.flatten(2).transpose(1, 2)), dim=1)


def _describe(state: Mapping[str, Tensor]) -> str:
    """Say what X-ViT a state dict of ours (with or without ``base_model.``) belongs to."""
    shapes = {name.removeprefix(_PREFIX): tensor.shape for name, tensor in state.items()}
    found: dict[str, Any] = {}
    if len(shapes.get(_PATCH, ())) == 4:
        found["embed_dim"], _, found["patch_size"], _ = shapes[_PATCH]
    found["depth"] = len({match[1] for match in map(re.compile(r"blocks\.(\d+)\.").match, shapes) if match})
    if len(shapes.get("temp_embed", ())) == 4:
        found["num_frames"] = shapes["temp_embed"][1]
    for name in ("consensus.mlp_head.4.weight", "new_fc.weight", "head.weight"):
        if name in shapes:
            found["num_classes"] = shapes[name][0]
            break
    temporal = "consensus.cls_token" in shapes
    published = matching_models(**found, consensus_type="vit") if temporal else []
    text = ", ".join(f"{name}={value}" for name, value in found.items())
    text += f", {'with' if temporal else 'without'} a temporal head"
    return text + (f" ({' or '.join(published)})" if published else "")


def _start_from_image(state: State, network: VisionTransformer, conversion: Conversion) -> State:
    """Fit an image model's tensors, by the names of the network, to it."""
    own = {name: tensor.shape for name, tensor in network.state_dict().items()}
    classifiers = ("head.", "pre_logits.")
    conversion.ignored = [
        name for name, tensor in state.items() if name.startswith(classifiers) and own.get(name) != tensor.shape
    ]
    state = {name: tensor for name, tensor in state.items() if name not in conversion.ignored}
    state["temp_embed"] = state["cls_token"].new_zeros(own["temp_embed"])
    if state[_PATCH].ndim == 2 and state[_PATCH].numel() == own[_PATCH].numel():  # a linear layer on flattened patches
        state[_PATCH] = state[_PATCH].reshape(own[_PATCH])
    old, new = state["pos_embed"].shape[1], own["pos_embed"][1]
    if old != new:
        state["pos_embed"] = resize_positions(state["pos_embed"], new)
        conversion.resized.append(f"pos_embed from {old} to {new} rows")
    return state


def _convert(model: nn.Module, state: State) -> Conversion:
    network = model.base_model if isinstance(model, XViT) else model
    assert isinstance(network, VisionTransformer)
    prefix = _PREFIX if network is not model else ""
    names = {name.removeprefix(_PREFIX) for name in state}
    if not names >= _ESSENTIAL or any("temporal_attn." in name or name == "time_embed" for name in names):
        raise not_recognised(state, "an X-ViT or an image ViT")
    # The network's own names, with the prefix that they have in the model.
    state = rename(state, lambda name: name.removeprefix(_PREFIX))
    if "temp_embed" in state:
        conversion = Conversion({}, "official", head=_CLASSIFIERS if prefix else "head.")
        if not prefix:  # the network alone has no place for what reads its results
            conversion.ignored = [name for name in state if name.startswith(("consensus.", "new_fc."))]
            state = {name: tensor for name, tensor in state.items() if name not in conversion.ignored}
            conversion.optional = "head."
    else:
        conversion = Conversion({}, "image", resizes=True, optional=("consensus.", "new_fc.", f"{prefix}head."))
        state = _start_from_image(state, network, conversion)
    theirs = _describe(state)
    conversion.describe = lambda tensors: theirs if tensors is conversion.state else _describe(tensors)
    conversion.state = {prefix + name if _KNOWN.match(name) else name: tensor for name, tensor in state.items()}
    return conversion


register_converter(XViT, _convert)
register_converter(VisionTransformer, _convert)

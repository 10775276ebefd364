"""Checkpoint layouts of TimeSformer, and image ViT files to start from (arXiv 2102.05095, section 4).

Three layouts are read. "official" has the names of the bundled models. "huggingface" has the same tensors under other
names. "image" is a two-dimensional ViT, as timm saves it: attention over time starts as a copy of attention over
space, behind a ``temporal_fc`` of zeros, and the time embeddings start as zeros.

Tables of another size are resized as the paper's code does when it loads: position embeddings are taken from the
nearest row of the flattened list of patches. (At run time a model takes them from the nearest patch of the plane.)
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from vidattn.models.checkpoint import Conversion, State, describe_layers, not_recognised, register_converter
from vidattn.models.checkpoint_names import rename
from vidattn.models.registry import matching_models
from vidattn.models.timesformer import TimeSformer, VisionTransformer

Value = TypeVar("Value")

SOURCES = ("official", "huggingface")
_PREFIX = "model."
_PATCH = "patch_embed.proj.weight"
# Ours and Hugging Face's, outside of the blocks and inside.
_OUTER = (
    ("cls_token", "timesformer.embeddings.cls_token"),
    ("pos_embed", "timesformer.embeddings.position_embeddings"),
    ("time_embed", "timesformer.embeddings.time_embeddings"),
    ("patch_embed.proj.", "timesformer.embeddings.patch_embeddings.projection."),
    ("norm.", "timesformer.layernorm."),
    ("head.", "classifier."),
)
_INNER = (
    ("attn.qkv.", "attention.attention.qkv."),
    ("attn.proj.", "attention.output.dense."),
    ("temporal_attn.qkv.", "temporal_attention.attention.qkv."),
    ("temporal_attn.proj.", "temporal_attention.output.dense."),
    ("temporal_fc.", "temporal_dense."),
    ("norm1.", "layernorm_before."),
    ("temporal_norm1.", "temporal_layernorm."),
    ("norm2.", "layernorm_after."),
    ("mlp.fc1.", "intermediate.dense."),
    ("mlp.fc2.", "output.dense."),
)


def _swap(name: str, pairs: list[tuple[str, str]]) -> str | None:
    """Replace the beginning of a name, or return None where no pair applies."""
    return next((new + name[len(old) :] for old, new in pairs if name.startswith(old)), None)


def convert_state_dict(state: Mapping[str, Value], source: str) -> dict[str, Value]:
    """Rename the entries of a TimeSformer state dict to the names of the bundled classifier.

    Only names change, so gradients or shapes can be converted as well. Names that the layout does not know stay.

    Args:
        state: Anything by the names of the source layout, with or without its ``model.`` or ``timesformer.`` prefix.
        source: "official" or "huggingface".

    Returns:
        The same values by the names of ``TimeSformer``.

    Raises:
        ValueError: ``source`` is not known.

    Example:
        >>> convert_state_dict({"timesformer.encoder.layer.3.temporal_dense.bias": 0}, "huggingface")
        {'model.blocks.3.temporal_fc.bias': 0}
    """
    _check_source(source)
    return rename(state, _RENAMES[source])


def revert_state_dict(state: Mapping[str, Value], source: str) -> dict[str, Value]:
    """Rename entries back to a source layout: the inverse of ``convert_state_dict``.

    Args:
        state: Anything by the names of ``TimeSformer``.
        source: "official" or "huggingface".

    Returns:
        The same values by the names of the source layout.

    Raises:
        ValueError: ``source`` is not known.

    Example:
        >>> revert_state_dict({"model.head.bias": 0}, "huggingface")
        {'classifier.bias': 0}
    """
    _check_source(source)
    if source == "official":
        return dict(state)
    return {_to_huggingface(name): value for name, value in state.items()}


def _check_source(source: str) -> None:
    if source not in SOURCES:
        raise ValueError(f"source must be one of {', '.join(SOURCES)}, got {source!r}")


def _from_official(name: str) -> str:
    known = re.match(r"(cls_token|pos_embed|time_embed)$|(patch_embed|blocks|norm|head)\.", name)
    return _PREFIX + name if known else name


def _from_huggingface(name: str) -> str:
    # The network alone, without its classifier, has no prefix.
    full = f"timesformer.{name}" if re.match(r"(embeddings|encoder|layernorm)\.", name) else name
    block = re.match(r"timesformer\.encoder\.layer\.(\d+)\.(.*)", full)
    if block:
        inner = _swap(block[2], [(theirs, ours) for ours, theirs in _INNER])
        return name if inner is None else f"{_PREFIX}blocks.{block[1]}.{inner}"
    outer = _swap(full, [(theirs, ours) for ours, theirs in _OUTER])
    return name if outer is None else _PREFIX + outer


_RENAMES = {"official": _from_official, "huggingface": _from_huggingface}


def _to_huggingface(name: str) -> str:
    ours = name.removeprefix(_PREFIX)
    block = re.match(r"blocks\.(\d+)\.(.*)", ours)
    if block:
        inner = _swap(block[2], list(_INNER))
        return name if inner is None else f"timesformer.encoder.layer.{block[1]}.{inner}"
    return _swap(ours, list(_OUTER)) or name


def resize_rows(table: Tensor, rows: int, *, keep_first: bool = False) -> Tensor:
    """Give a table of embeddings another number of rows, each the nearest of the old.

    Args:
        table: Embeddings (1, old rows, C).
        rows: Rows of the result.
        keep_first: Whether the first row is the cls token's, which is no part of the order and stays.

    Returns:
        Embeddings (1, rows, C).

    Example:
        >>> resize_rows(torch.arange(3.0).view(1, 3, 1), 5, keep_first=True).flatten().tolist()
        [0.0, 1.0, 1.0, 2.0, 2.0]
    """
    first = int(keep_first)
    line = functional.interpolate(table[:, first:].transpose(1, 2), size=rows - first, mode="nearest")
    return torch.cat((table[:, :first], line.transpose(1, 2)), dim=1)


def start_from_image(state: Mapping[str, Tensor], num_frames: int, attention_type: str) -> State:
    """Add what an image ViT lacks of a TimeSformer, so that the video model starts as the image model of each frame.

    Args:
        state: Tensors of the image model, by the names of ``VisionTransformer``.
        num_frames: Frames of the video model.
        attention_type: Attention of the video model.

    Returns:
        The tensors, with those of attention over time copied from attention over space, and zeros for ``temporal_fc``
        and the time embeddings.

    Example:
        >>> image = {"cls_token": torch.zeros(1, 1, 8), "blocks.0.norm1.bias": torch.ones(8)}
        >>> sorted(start_from_image(image, 4, "divided_space_time"))
        ['blocks.0.norm1.bias', 'blocks.0.temporal_norm1.bias', 'cls_token', 'time_embed']
    """
    started = dict(state)
    if attention_type == "space_only":
        return started
    if "time_embed" not in state and "cls_token" in state:
        width = state["cls_token"].shape[-1]
        started["time_embed"] = state["cls_token"].new_zeros(1, num_frames, width)
    if attention_type == "divided_space_time":
        for name, tensor in state.items():
            spatial = re.match(r"(blocks\.\d+\.)(attn\.|norm1\.)(.*)", name)
            if spatial is None:
                continue
            twin = f"{spatial[1]}temporal_{spatial[2]}{spatial[3]}"
            started[twin] = tensor.clone()
            if name.endswith(".attn.proj.weight"):
                started[f"{spatial[1]}temporal_fc.weight"] = torch.zeros_like(tensor)
            elif name.endswith(".attn.proj.bias"):
                started[f"{spatial[1]}temporal_fc.bias"] = torch.zeros_like(tensor)
    return started


def _adapt_channels(weight: Tensor, channels: int) -> Tensor:
    """Fit the patch embedding of RGB images to another number of channels, keeping its scale."""
    if channels == 1:
        return weight.sum(dim=1, keepdim=True)
    return weight.repeat(1, math.ceil(channels / 3), 1, 1)[:, :channels] * (3 / channels)


def _describe(state: Mapping[str, Tensor]) -> str:
    """Say what TimeSformer a state dict of ours (with or without ``model.``) belongs to."""
    names = {name.removeprefix(_PREFIX): tensor.shape for name, tensor in state.items()}
    found: dict[str, Any] = {}
    if len(names.get(_PATCH, ())) == 4:
        found["embed_dim"], _, found["patch_size"], _ = names[_PATCH]
    found["depth"] = len({match[1] for match in map(re.compile(r"blocks\.(\d+)\.").match, names) if match})
    if len(names.get("pos_embed", ())) == 3 and "patch_size" in found:
        found["img_size"] = found["patch_size"] * math.isqrt(names["pos_embed"][1] - 1)
    if len(names.get("time_embed", ())) == 3:
        found["num_frames"] = names["time_embed"][1]
    divided = "blocks.0.temporal_attn.qkv.weight" in names
    found["attention_type"] = (
        "divided_space_time" if divided else "joint_space_time" if "time_embed" in names else "space_only"
    )
    published = matching_models(**found)
    if "head.weight" in names:
        found["num_classes"] = names["head.weight"][0]
    text = ", ".join(f"{name}={value}" for name, value in found.items())
    return text + (f" ({' or '.join(published)})" if published else "")


def _sniff(state: State) -> tuple[str, State]:
    """Name the layout of a state dict, and rename its entries to those of ``VisionTransformer``."""
    for source in SOURCES:
        renamed = convert_state_dict(state, source)
        names = {name.removeprefix(_PREFIX) if name.startswith(_PREFIX) else name for name in renamed}
        if "temp_embed" in names:  # an X-ViT has all of these names too
            break
        if names >= {_PATCH, "cls_token", "pos_embed", "blocks.0.attn.qkv.weight"}:
            return source, rename(renamed, lambda name: name.removeprefix(_PREFIX))
    raise not_recognised(state, "a TimeSformer (official or huggingface) or an image ViT")


def _resize(conversion: Conversion, state: State, network: VisionTransformer) -> None:
    """Resize in place what the loader of the paper's code resizes, and say so."""
    for name, keep_first in (("pos_embed", True), ("time_embed", False)):
        table, own = state.get(name), getattr(network, name, None)
        if table is None or own is None or table.ndim != 3 or table.shape[1] == own.shape[1]:
            continue
        state[name] = resize_rows(table, own.shape[1], keep_first=keep_first)
        conversion.resized.append(f"{name} from {table.shape[1]} to {own.shape[1]} rows")
    weight, own = state[_PATCH], network.patch_embed.proj.weight
    if weight.ndim == 2 and weight.shape[1] == 3 * math.prod(own.shape[2:]):  # a linear layer on flattened patches
        weight = weight.reshape(-1, 3, *own.shape[2:])
    if weight.ndim == 4 and weight.shape[1] == 3 and own.shape[1] != 3:
        weight = _adapt_channels(weight, own.shape[1])
        conversion.resized.append(f"{_PATCH} from 3 to {own.shape[1]} channels")
    state[_PATCH] = weight


def _convert(model: nn.Module, state: State) -> Conversion:
    network = model.model if isinstance(model, TimeSformer) else model
    assert isinstance(network, VisionTransformer)
    prefix = _PREFIX if network is not model else ""
    source, state = _sniff(state)
    # A file of attention over space alone cannot be told from an image model; for a model of that kind it need not be.
    if "time_embed" not in state and network.attention_type != "space_only":
        source = "image"
    conversion = Conversion({}, source, head=f"{prefix}head.")
    if source == "image":
        conversion.resizes = True
        conversion.optional = conversion.head
        head = state.get("head.weight")
        fits = head is not None and head.shape[0] == network.num_classes
        conversion.ignored = [
            name for name in state if name.startswith("pre_logits.") or (name.startswith("head.") and not fits)
        ]
        state = {name: tensor for name, tensor in state.items() if name not in conversion.ignored}
        rows = network.time_embed.shape[1]
        state = start_from_image(state, rows, network.attention_type)
    theirs = _describe(state)  # before its tables are resized
    conversion.describe = lambda tensors: theirs if tensors is conversion.state else _describe(tensors)
    _resize(conversion, state, network)
    conversion.state = {
        prefix + name if _from_official(name) != name else name: tensor for name, tensor in state.items()
    }
    return conversion


def _configuration(model: nn.Module) -> dict[str, Any]:
    """Say what a configuration of Hugging Face would."""
    network = model.model if isinstance(model, TimeSformer) else model
    assert isinstance(network, VisionTransformer)
    found: dict[str, Any] = {
        "model_type": "timesformer",
        "attention_type": network.attention_type,
        "patch_size": network.patch_embed.patch_size,
        "image_size": network.patch_embed.img_size,
        **describe_layers(network.blocks, network.norm),
    }
    if network.attention_type != "space_only":
        found["num_frames"] = network.time_embed.shape[1]
    return found


register_converter(TimeSformer, _convert, _configuration)
register_converter(VisionTransformer, _convert, _configuration)

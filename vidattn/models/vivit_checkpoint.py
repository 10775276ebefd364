"""Checkpoint layouts of ViViT, and its start from the weights of an image transformer (arXiv 2103.15691, section 3.4).

Layouts: "vidattn" has the names of the bundled models. "scenic" is the parameter tree of the paper's code, with "/"
between the names of a path. "transformers" is how Hugging Face's model 1 names its parameters since version 5,
"transformers-hub" how its files do. "image" is a flax tree of a vision transformer, which starts a ViViT.

Names are translated piece by piece into ours with separate queries, keys and values; then those are packed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from vidattn.models.checkpoint import Conversion, State, describe_layers, not_recognised, register_converter
from vidattn.models.registry import matching_models
from vidattn.models.vivit import PatchEmbed, SpaceTimeViViT, ViViT, inflate_kernel

SOURCES = ("vidattn", "scenic", "transformers", "transformers-hub")

_HUB = (
    ("vivit.embeddings.cls_token", "transformer.cls_token"),
    ("vivit.embeddings.position_embeddings", "transformer.pos_embed"),
    ("vivit.embeddings.patch_embeddings.projection.", "patch_embed.proj."),
    ("vivit.layernorm.", "transformer.norm."),
    ("vivit.encoder.layer.", "transformer.blocks."),
    ("classifier.", "head."),
    (".layernorm_before.", ".norm1."),
    (".layernorm_after.", ".norm2."),
    (".attention.attention.", ".attn."),
    (".attention.output.dense.", ".attn.proj."),
    (".intermediate.dense.", ".mlp.fc1."),
    (".output.dense.", ".mlp.fc2."),
)
_IN_MEMORY = (
    *_HUB[:4],
    ("vivit.layers.", "transformer.blocks."),
    *_HUB[5:8],
    (".attention.q_proj.", ".attn.query."),
    (".attention.k_proj.", ".attn.key."),
    (".attention.v_proj.", ".attn.value."),
    (".attention.o_proj.", ".attn.proj."),
)
_TRANSFORMERS = {"transformers": _IN_MEMORY, "transformers-hub": _HUB}

_QKV = ("query", "key", "value")
_ENCODERS = {
    "Transformer": "transformer",
    "SpatialTransformer": "spatial_transformer",
    "TemporalTransformer": "temporal_transformer",
}
# Pieces of a path in scenic and ours; "kernel", "scale" and "embedding" depend on their neighbours.
_PIECES = {
    **_ENCODERS,
    "encoder_norm": "norm",
    "LayerNorm_0": "norm1",
    "LayerNorm_1": "norm2",
    "MultiHeadDotProductAttention_0": "attn",
    "MlpBlock_0": "mlp",
    "Dense_0": "fc1",
    "Dense_1": "fc2",
    "out": "proj",
    "output_projection": "head",
    **{f"LayerNorm_{axis}": f"norm_{axis}" for axis in ("time", "space", "mlp")},
    **{f"MultiHeadDotProductAttention_{axis}": f"attn_{axis}" for axis in ("time", "space")},
    "posembed_input/pos_embedding": "pos_embed",
    "embedding": "patch_embed.proj",
    "scale": "weight",
    "kernel": "weight",
}
_CLS = {"cls": "transformer.cls_token", **{f"cls_{theirs}": f"{ours}.cls_token" for theirs, ours in _ENCODERS.items()}}


def convert_state_dict(state: Mapping[str, Tensor], source: str) -> State:
    """Rename and reshape the tensors of a ViViT state dict to those of the bundled models.

    A block's state dict, without what comes before its names, is converted as well. Names that the layout does not
    know stay.

    Args:
        state: Tensors by the names of the source layout.
        source: "vidattn", "scenic", "transformers" or "transformers-hub".

    Returns:
        The tensors by our names; queries, keys and values are packed, others are views.

    Raises:
        ValueError: ``source`` is not known.

    Example:
        >>> kernel = torch.zeros(32, 4, 8)
        >>> state = {f"MultiHeadDotProductAttention_0/{name}/kernel": kernel for name in ("query", "key", "value")}
        >>> {name: tuple(tensor.shape) for name, tensor in convert_state_dict(state, "scenic").items()}
        {'attn.qkv.weight': (96, 32)}
    """
    _check_source(source)
    if source == "vidattn":
        return dict(state)
    renamed: State = {}
    for name, tensor in state.items():
        if source == "scenic":
            renamed[_from_scenic(name)] = _to_torch_layout(name, tensor)
            continue
        for theirs, ours in _TRANSFORMERS[source]:
            name = name.replace(theirs, ours)
        renamed[name] = tensor
    return _pack(renamed)


def revert_state_dict(
    state: Mapping[str, Tensor], source: str, *, num_heads: int, temporal_num_heads: int | None = None
) -> State:
    """Rename and reshape tensors back to a source layout: the inverse of ``convert_state_dict``.

    Args:
        state: Tensors by our names: weights, or gradients.
        source: "vidattn", "scenic", "transformers" or "transformers-hub".
        num_heads: Attention heads, which flax keeps apart.
        temporal_num_heads: Attention heads of the temporal encoder; None: as many.

    Returns:
        The tensors by the names and in the shapes of the source layout.

    Raises:
        ValueError: ``source`` is not known.

    Example:
        >>> [*revert_state_dict({"attn.qkv.bias": torch.zeros(96)}, "transformers-hub", num_heads=4)][0]
        'attn.query.bias'
    """
    _check_source(source)
    if source == "vidattn":
        return dict(state)
    # Model 3 alone names the norm of its MLP, and numbers neither.
    numbered = not any("norm_mlp." in name for name in state)
    reverted: State = {}
    for name, tensor in _unpack(state).items():
        if source == "scenic":
            heads = temporal_num_heads if temporal_num_heads and name.startswith("temporal_") else num_heads
            path = _to_scenic(name, tensor, numbered)
            reverted[path] = _to_flax_layout(path, tensor, heads)
            continue
        for theirs, ours in reversed(_TRANSFORMERS[source]):
            name = name.replace(ours, theirs)
        reverted[name] = tensor
    return reverted


def _check_source(source: str) -> None:
    if source not in SOURCES:
        raise ValueError(f"source must be one of {', '.join(SOURCES)}, got {source!r}")


def _from_scenic(path: str) -> str:
    if path in _CLS:
        return _CLS[path]
    path = path.replace("posembed_input/pos_embedding", "pos_embed").replace("MlpBlock/", "MlpBlock_0/")
    pieces = [re.sub(r"^encoderblock_(\d+)$", r"blocks.\1", _PIECES.get(piece, piece)) for piece in path.split("/")]
    return ".".join(pieces)


def _to_scenic(name: str, tensor: Tensor, numbered: bool) -> str:
    for theirs, ours in _CLS.items():
        if name == ours and theirs != "cls_Transformer":
            return theirs
    norm = re.search(r"norm[^.]*\.weight$", name) is not None
    name = re.sub(r"\bblocks\.(\d+)\b", r"encoderblock_\1", name.replace("patch_embed.proj.", "embedding."))
    inverse = {ours: theirs for theirs, ours in _PIECES.items()}
    inverse["weight"] = "scale" if norm else "kernel"
    inverse["mlp"] = "MlpBlock_0" if numbered else "MlpBlock"
    return "/".join(inverse.get(piece, piece) for piece in name.split("."))


def _parent(path: str) -> str:
    return (path.split("/")[-2:-1] or [""])[0]


def _to_torch_layout(path: str, tensor: Tensor) -> Tensor:
    """Reshape a flax array: kernels have their inputs first and keep heads apart."""
    if _parent(path) in _QKV:
        return tensor.flatten(1).t() if path.endswith("kernel") and tensor.ndim == 3 else tensor.flatten()
    if not path.endswith("/kernel"):
        return tensor
    if tensor.ndim == 5:
        return tensor.permute(4, 3, 0, 1, 2)
    if tensor.ndim == 4:
        return tensor.permute(3, 2, 0, 1)
    return tensor.flatten(0, -2).t()


def _to_flax_layout(path: str, tensor: Tensor, heads: int) -> Tensor:
    if _parent(path) in _QKV:
        return tensor.unflatten(0, (heads, -1)).movedim(-1, 0) if tensor.ndim == 2 else tensor.unflatten(0, (heads, -1))
    if not path.endswith("/kernel"):
        return tensor
    if tensor.ndim == 5:
        return tensor.permute(2, 3, 4, 1, 0)
    if tensor.ndim == 4:
        return tensor.permute(2, 3, 1, 0)
    return tensor.t().unflatten(0, (heads, -1)) if _parent(path) == "out" else tensor.t()


def _pack(state: State) -> State:
    """Join queries, keys and values where all three are there."""
    packed: State = {}
    for name, tensor in state.items():
        match = re.match(r"(.*)\.(query|key|value)\.(weight|bias)$", name)
        parts = [f"{match[1]}.{part}.{match[3]}" for part in _QKV] if match else []
        if match is None or not all(part in state for part in parts):
            packed[name] = tensor
        elif match[2] == _QKV[0]:
            packed[f"{match[1]}.qkv.{match[3]}"] = torch.cat([state[part] for part in parts])
    return packed


def _unpack(state: Mapping[str, Tensor]) -> State:
    unpacked: State = {}
    for name, tensor in state.items():
        match = re.match(r"(.*)\.qkv\.(weight|bias)$", name)
        if match is None:
            unpacked[name] = tensor
            continue
        for part, piece in zip(_QKV, tensor.chunk(3), strict=True):
            unpacked[f"{match[1]}.{part}.{match[2]}"] = piece
    return unpacked


def resize_position_embedding(embedding: Tensor, frames: int, grid: Sequence[int]) -> Tensor:
    """Make position embeddings of a clip from those of an image: repeat them for every frame, after a resize if needed.

    The resize is bilinear and keeps the corners where they are.

    Args:
        embedding: Embeddings (1, N, C) of a square image, without a class token.
        frames: Frames T' of tokens.
        grid: Tokens of a frame (height, width).

    Returns:
        Embeddings (1, T' * height * width, C), time slowest.

    Raises:
        ValueError: The image is not square, and not of the size that is asked for either.

    Example:
        >>> image = torch.tensor([0.0, 1.0, 3.0, 4.0]).view(1, 4, 1)
        >>> resize_position_embedding(image, 1, (4, 2)).round().flatten().tolist()
        [0.0, 1.0, 1.0, 2.0, 2.0, 3.0, 3.0, 4.0]
    """
    height, width = grid
    tokens, channels = embedding.shape[1:]
    if tokens != height * width:
        side = math.isqrt(tokens)
        if side * side != tokens:
            raise ValueError(f"embedding must be that of a square image, got {tokens} tokens")
        plane = embedding.float().transpose(1, 2).reshape(1, channels, side, side)
        plane = functional.interpolate(plane, size=(height, width), mode="bilinear", align_corners=True)
        embedding = plane.flatten(2).transpose(1, 2).to(embedding.dtype)
    return embedding.repeat(1, frames, 1)


def _sniff(model: ViViT | SpaceTimeViViT, state: State) -> tuple[str, State]:
    """Name the layout of a state dict, and rename its entries."""
    if "embedding/kernel" in state:
        # The authors of the vision transformer count the modules of a block through, those of scenic each kind.
        counted = {"LayerNorm_2": "LayerNorm_1", "MultiHeadDotProductAttention_1": "MultiHeadDotProductAttention_0"}
        counted["MlpBlock_3"] = "MlpBlock_0"
        if any("/MlpBlock_3/" in name for name in state):
            for old, new in counted.items():
                state = {name.replace(f"/{old}/", f"/{new}/"): tensor for name, tensor in state.items()}
        converted = convert_state_dict(state, "scenic")
        of_images = state["embedding/kernel"].ndim == 4 and "transformer.pos_embed" in converted
        own = model.transformer.pos_embed.shape if isinstance(model, ViViT) else None
        if of_images and (model.patch_embed.sampled_frames is None or converted["transformer.pos_embed"].shape != own):
            return "image", converted
        return "scenic", converted
    if "embeddings.cls_token" in state:  # the model without its classifier
        state = {f"vivit.{name}": tensor for name, tensor in state.items()}
    if "vivit.embeddings.cls_token" in state:
        source = "transformers-hub" if any(".encoder.layer." in name for name in state) else "transformers"
        return source, convert_state_dict(state, source)
    if "patch_embed.proj.weight" in state and any(name.endswith("transformer.pos_embed") for name in state):
        return "vidattn", state
    raise not_recognised(state, "a ViViT (of scenic or Hugging Face) or an image transformer of flax")


def _start_from_image(model: ViViT | SpaceTimeViViT, conversion: Conversion) -> None:
    """Turn the converted tensors of an image transformer into the start of a ViViT."""
    state, own = conversion.state, model.state_dict()
    embed: PatchEmbed = model.patch_embed
    frames = 1 if isinstance(model, SpaceTimeViViT) else embed.temporal_dims
    target = "spatial_transformer." if isinstance(model, SpaceTimeViViT) else "transformer."
    rows, columns = (side // patch for side, patch in zip(embed.image_size, embed.patches))
    position, cls_token = state.pop("transformer.pos_embed"), state.pop("transformer.cls_token", None)
    if embed.sampled_frames is None:
        method = embed.kernel_init_method or "central_frame_initializer"
        state["patch_embed.proj.weight"] = inflate_kernel(state["patch_embed.proj.weight"], embed.patches[2], method)
    conversion.ignored = [name for name in state if name.startswith(("head.", "pre_logits."))]
    started = {name: tensor for name, tensor in state.items() if name not in conversion.ignored}
    started = {re.sub(r"^transformer\.", target, name): tensor for name, tensor in started.items()}
    if "transformer.blocks.0.norm_mlp.weight" in own:
        _split_axes(started)
    patches = position if cls_token is None else position[:, 1:]
    side = math.isqrt(patches.shape[1])
    if patches.shape[1] != rows * columns:
        conversion.resized.append(f"{target}pos_embed from {side} x {side} to {rows} x {columns} patches")
        conversion.resizes = True
    positions = [resize_position_embedding(patches, frames, (rows, columns))]
    if f"{target}cls_token" in own:
        if cls_token is None:
            raise ValueError("checkpoint of an image transformer has no class token, which this classifier needs")
        positions.insert(0, position[:, :1])
        started[f"{target}cls_token"] = cls_token
    started[f"{target}pos_embed"] = torch.cat(positions, dim=1)
    conversion.state = started
    # The temporal encoder, and the norms before attention over time, start from scratch.
    without = [name for name in own if ".norm_time." in name]
    conversion.optional = ("head.", "pre_logits.", "temporal_transformer.", *without)


def _split_axes(state: State) -> None:
    """Give both attentions of the blocks of model 3 the weights of the image's, and the norms to space and the MLP."""
    for name in list(state):
        if ".norm1." in name:
            state[name.replace(".norm1.", ".norm_space.")] = state.pop(name)
        elif ".norm2." in name:
            state[name.replace(".norm2.", ".norm_mlp.")] = state.pop(name)
        elif ".attn." in name:
            tensor = state.pop(name)
            for axis in ("time", "space"):
                state[name.replace(".attn.", f".attn_{axis}.")] = tensor


def _check_heads(model: ViViT | SpaceTimeViViT, state: State) -> None:
    """Compare the heads that flax keeps apart with those of the model, whose tensors do not show them."""
    for path, tensor in state.items():
        if not path.endswith("/query/kernel") or tensor.ndim != 3:
            continue
        name = _ENCODERS.get(path.split("/")[0], "")
        if isinstance(model, SpaceTimeViViT) and name == "transformer":  # of an image
            name = "spatial_transformer"
        encoder = getattr(model, name, None)
        heads = None if encoder is None else describe_layers(encoder.blocks, encoder.norm).get("num_attention_heads")
        if heads is not None and tensor.shape[1] != heads:
            raise ValueError(
                f"load_checkpoint: path_or_state: expected {heads} attention heads in {name}, as the model has, got "
                f"{tensor.shape[1]} in {path}"
            )


def _describe(state: Mapping[str, Tensor]) -> str:
    """Say what ViViT a state dict of ours belongs to."""
    width = state["patch_embed.proj.weight"].shape[0] if "patch_embed.proj.weight" in state else "?"
    known: dict[str, object] = {"hidden_size": width}
    text = f"hidden_size={width}"
    for encoder, depth in (
        ("transformer", "num_layers"),
        ("spatial_transformer", "num_layers"),
        ("temporal_transformer", "temporal_num_layers"),
    ):
        layers = {name.split(".")[2] for name in state if name.startswith(f"{encoder}.blocks.")}
        if layers:
            known[depth] = len(layers)
            text += f", {depth}={len(layers)}"
        if f"{encoder}.pos_embed" in state:
            text += f", {state[f'{encoder}.pos_embed'].shape[1]} positions"
    if "head.weight" in state:
        text += f", num_classes={state['head.weight'].shape[0]}"
    published = matching_models(**known)
    return text + (f" ({' or '.join(published)})" if published else "")


def _convert(model: nn.Module, state: State) -> Conversion:
    assert isinstance(model, ViViT | SpaceTimeViViT)
    _check_heads(model, state)
    source, state = _sniff(model, state)
    conversion = Conversion(state, source, head="head.", describe=_describe)
    if source == "image":
        _start_from_image(model, conversion)
    elif source.startswith("transformers"):
        pooler = {name for name in state if name.startswith("vivit.pooler.")}
        conversion.ignored = sorted(pooler)
        conversion.state = {name: tensor for name, tensor in state.items() if name not in pooler}
    # A model on the meta device takes the tensors as they are.
    conversion.state = {name: tensor.contiguous() for name, tensor in conversion.state.items()}
    return conversion


def _configuration(model: nn.Module) -> dict[str, Any]:
    """Say what a configuration of Hugging Face would: of model 1, which alone they have."""
    assert isinstance(model, ViViT | SpaceTimeViViT)
    found: dict[str, Any] = {
        "model_type": "vivit",
        "image_size": model.patch_embed.image_size,
        "num_frames": model.patch_embed.num_frames,
    }
    if isinstance(model, ViViT):
        found |= describe_layers(model.transformer.blocks, model.transformer.norm)
    if model.patch_embed.sampled_frames is None:
        height, width, frames = model.patch_embed.patches
        found["tubelet_size"] = (frames, height, width)
    return found


register_converter(ViViT, _convert, _configuration)
register_converter(SpaceTimeViViT, _convert, _configuration)

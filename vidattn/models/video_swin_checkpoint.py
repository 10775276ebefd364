"""Checkpoint layouts of the Video Swin Transformer, and inflation of image Swin files (arXiv 2106.13230, section 3.3).

Four layouts are read. "official" has the names of the bundled models. "mmaction2" calls the last norm by its stage.
"torchvision" numbers stages and downsamplings through. "image" is a two-dimensional Swin, as its authors' code or
timm saves it: its patch embedding is spread over the frames of a patch, its bias tables are repeated over all
temporal offsets.

The buffers ``relative_position_index`` and ``attn_mask`` follow from the configuration and are not loaded; the former
tells the window of the file and is checked, because other numberings of the same shape exist.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from vidattn.models.checkpoint import Conversion, State, not_recognised, register_converter
from vidattn.models.checkpoint_names import rename
from vidattn.models.registry import matching_models
from vidattn.models.video_swin import Recognizer3D, SwinTransformer3D, WindowAttention3D
from vidattn.models.video_swin_windows import Triple, relative_position_index

Value = TypeVar("Value")

_TABLE = "relative_position_bias_table"
_INDEX = "relative_position_index"
_PATCH = "backbone.patch_embed.proj.weight"
_HEAD = "cls_head."
SOURCES = ("official", "mmaction2", "torchvision")


def _last_stage(names: Mapping[str, object]) -> int:
    return max(
        (int(match[1]) for match in map(re.compile(r"backbone\.layers\.(\d+)\.").match, names) if match), default=0
    )


def convert_state_dict(state: Mapping[str, Value], source: str) -> dict[str, Value]:
    """Rename the entries of a Video Swin state dict to the names of the bundled classifier.

    Only names change, so gradients or shapes can be converted as well. Names that the layout does not know stay.

    Args:
        state: Anything by the names of the source layout, with or without its ``backbone.`` prefix.
        source: "official", "mmaction2" or "torchvision".

    Returns:
        The same values by the names of ``Recognizer3D``.

    Raises:
        ValueError: ``source`` is not known.

    Example:
        >>> convert_state_dict({"features.0.1.mlp.3.bias": 0}, "torchvision")
        {'backbone.layers.0.blocks.1.mlp.fc2.bias': 0}
    """
    _check_source(source)
    if source == "torchvision":
        return rename(state, _from_torchvision)
    renamed = rename(state, lambda name: re.sub(r"^(?=(?:patch_embed|layers|norm\d*)\.)", "backbone.", name))
    if source == "mmaction2":
        old, new = f"backbone.norm{_last_stage(renamed)}.", "backbone.norm."
        renamed = rename(renamed, lambda name: new + name[len(old) :] if name.startswith(old) else name)
    return renamed


def revert_state_dict(state: Mapping[str, Value], source: str) -> dict[str, Value]:
    """Rename entries back to a source layout: the inverse of ``convert_state_dict``.

    Args:
        state: Anything by the names of ``Recognizer3D``.
        source: "official", "mmaction2" or "torchvision".

    Returns:
        The same values by the names of the source layout.

    Raises:
        ValueError: ``source`` is not known.

    Example:
        >>> revert_state_dict({"backbone.layers.0.downsample.norm.bias": 0}, "torchvision")
        {'features.1.norm.bias': 0}
    """
    _check_source(source)
    if source == "torchvision":
        return {_to_torchvision(name): value for name, value in state.items()}
    if source == "mmaction2":
        last = _last_stage(state)
        return {re.sub(r"^backbone\.norm\.", f"backbone.norm{last}.", name): value for name, value in state.items()}
    return dict(state)


def _check_source(source: str) -> None:
    if source not in SOURCES:
        raise ValueError(f"source must be one of {', '.join(SOURCES)}, got {source!r}")


def _from_torchvision(name: str) -> str:
    stage = re.match(r"features\.(\d+)\.(.*)", name)
    if stage is None:
        return re.sub(r"^head\.", "cls_head.fc_cls.", re.sub(r"^(patch_embed|norm)\.", r"backbone.\1.", name))
    number, rest = int(stage[1]), stage[2]
    if number % 2:
        return f"backbone.layers.{number // 2}.downsample.{rest}"
    rest = re.sub(r"^(\d+)\.mlp\.0\.", r"\1.mlp.fc1.", re.sub(r"^(\d+)\.mlp\.3\.", r"\1.mlp.fc2.", rest))
    return f"backbone.layers.{number // 2}.blocks.{rest}"


def _to_torchvision(name: str) -> str:
    stage = re.match(r"backbone\.layers\.(\d+)\.(blocks|downsample)\.(.*)", name)
    if stage is None:
        return re.sub(r"^cls_head\.fc_cls\.", "head.", name.removeprefix("backbone."))
    number, rest = int(stage[1]) * 2, stage[3]
    if stage[2] == "downsample":
        return f"features.{number + 1}.{rest}"
    rest = re.sub(r"^(\d+)\.mlp\.fc1\.", r"\1.mlp.0.", re.sub(r"^(\d+)\.mlp\.fc2\.", r"\1.mlp.3.", rest))
    return f"features.{number}.{rest}"


def inflate_state_dict(state: Mapping[str, Tensor], *, patch_frames: int, window_size: Sequence[int]) -> State:
    """Turn the tensors of an image Swin into those of a Video Swin (arXiv 2106.13230, section 3.3).

    The patch embedding is repeated over the frames of a patch and divided by their number, so that a still video
    gives what its image gave. A bias table is interpolated (bicubic) where the image window differs and repeated over
    the temporal offsets.

    Args:
        state: Tensors by name; names are kept.
        patch_frames: Frames of a patch.
        window_size: Window (depth, height, width) of the Video Swin.

    Returns:
        The inflated tensors, without the buffers that follow from the configuration.

    Raises:
        ValueError: A table is not that of a square window, and not of the size that is asked for either.

    Example:
        >>> image = {"attn.relative_position_bias_table": torch.zeros(169, 3)}
        >>> [*inflate_state_dict(image, patch_frames=2, window_size=(8, 7, 7)).values()][0].shape
        torch.Size([2535, 3])
    """
    wd, wh, ww = window_size
    inflated = {}
    for name, tensor in state.items():
        if name.endswith((_INDEX, "attn_mask")):
            continue
        if name.endswith("patch_embed.proj.weight"):
            tensor = tensor.unsqueeze(2).repeat(1, 1, patch_frames, 1, 1) / patch_frames
        elif name.endswith(_TABLE):
            rows, heads = tensor.shape
            if rows != (2 * wh - 1) * (2 * ww - 1):
                side = math.isqrt(rows)
                if side * side != rows:
                    raise ValueError(f"{name} must be the table of a square window, got {rows} rows")
                plane = tensor.t().reshape(1, heads, side, side)
                plane = functional.interpolate(plane.float(), size=(2 * wh - 1, 2 * ww - 1), mode="bicubic")
                tensor = plane.reshape(heads, -1).t().to(tensor.dtype)
            tensor = tensor.repeat(2 * wd - 1, 1)
        inflated[name] = tensor
    return inflated


def resize_bias_table(table: Tensor, old_window: Sequence[int], new_window: Sequence[int]) -> Tensor:
    """Interpolate a position-bias table to another window.

    Height and width bicubically, as image Swin tables are when inflated; time linearly. Offset 0 stays at offset 0.

    Args:
        table: Table ((2 Wd - 1)(2 Wh - 1)(2 Ww - 1), heads) of the old window.
        old_window: Old window (depth, height, width) in tokens.
        new_window: New window in tokens.

    Returns:
        The table of the new window, in the dtype of the old.

    Example:
        >>> resize_bias_table(torch.zeros(15 * 13 * 13, 3), (8, 7, 7), (16, 7, 7)).shape
        torch.Size([5239, 3])
    """
    heads = table.shape[1]
    old = [2 * axis - 1 for axis in old_window]
    new = [2 * axis - 1 for axis in new_window]
    planes = table.float().t().reshape(heads, *old)
    if old[1:] != new[1:]:
        planes = functional.interpolate(planes, size=new[1:], mode="bicubic")
    if old[0] != new[0]:
        lines = planes.reshape(heads, old[0], -1).transpose(1, 2)
        planes = functional.interpolate(lines, size=new[0], mode="linear").transpose(1, 2)
    return planes.reshape(heads, -1).t().to(table.dtype).contiguous()


def _describe(state: Mapping[str, Tensor]) -> str:
    """Say what Video Swin a state dict of ours (with or without ``backbone.``) belongs to."""
    names = {name.removeprefix("backbone."): tensor.shape for name, tensor in state.items()}
    depths: list[int] = []
    heads: list[int] = []
    while f"layers.{len(depths)}.blocks.0.attn.{_TABLE}" in names:
        stage = len(depths)
        heads.append(names[f"layers.{stage}.blocks.0.attn.{_TABLE}"][1])
        depths.append(
            len({name for name in names if re.match(rf"layers\.{stage}\.blocks\.\d+\.attn\.{_TABLE}$", name)})
        )
    width = names["patch_embed.proj.weight"][0] if "patch_embed.proj.weight" in names else "?"
    text = f"embed_dim={width}, depths={tuple(depths)}, num_heads={tuple(heads)}"
    if "cls_head.fc_cls.weight" in names:
        text += f", num_classes={names['cls_head.fc_cls.weight'][0]}"
    published = matching_models(embed_dim=width, depths=tuple(depths), num_heads=tuple(heads))
    return text + (f" ({' or '.join(published)})" if published else "")


def _sniff(state: State) -> tuple[str, State]:
    """Name the layout of a state dict, and rename its entries."""
    if "features.0.0.attn.qkv.weight" in state and "patch_embed.proj.weight" in state:
        return "torchvision", convert_state_dict(state, "torchvision")
    renamed = convert_state_dict(state, "official")
    if _PATCH not in renamed or "backbone.layers.0.blocks.0.attn.qkv.weight" not in renamed:
        raise not_recognised(state, "a Video Swin (official, mmaction2 or torchvision) or an image Swin")
    if renamed[_PATCH].ndim == 4:
        return "image", _from_image(renamed)
    if any(re.match(r"backbone\.norm\d+\.", name) for name in renamed):
        return "mmaction2", convert_state_dict(state, "mmaction2")
    return "official", renamed


def _from_image(state: State) -> State:
    if any(name.startswith("backbone.layers.0.downsample.") for name in state):
        return state
    # timm keeps a downsampling with the stage that follows it.
    return {
        re.sub(r"(backbone\.layers\.)(\d+)(\.downsample\.)", lambda m: f"{m[1]}{int(m[2]) - 1}{m[3]}", name): tensor
        for name, tensor in state.items()
    }


def _file_window(name: str, rows: int, index: Tensor | None, window: Triple, known: dict[Triple, Tensor]) -> Triple:
    """Find the window that a table was made for, from its position index or else by likeness to ours."""
    if index is None:
        plane = (2 * window[1] - 1) * (2 * window[2] - 1)
        if rows % plane == 0 and (rows // plane) % 2:
            return (rows // plane + 1) // 2, window[1], window[2]
        side = math.isqrt(rows // (2 * window[0] - 1))
        if side * side * (2 * window[0] - 1) == rows and side % 2:
            return window[0], (side + 1) // 2, (side + 1) // 2
        raise ValueError(
            f"{name} has {rows} rows, and without {_INDEX} its window cannot be told: window {window} expected"
        )
    # Windows are found by trying the divisors of its length, so that must not be any number.
    tokens = index.shape[0] if index.ndim == 2 and index.shape[0] == index.shape[1] else 0
    candidates = [window] + [
        (depth, height, tokens // depth // height)
        for depth in range(1, tokens + 1)
        if tokens % depth == 0
        for height in range(1, tokens // depth + 1)
        if tokens // depth % height == 0
    ]
    for candidate in candidates:
        if math.prod(candidate) != tokens or math.prod(2 * axis - 1 for axis in candidate) != rows:
            continue
        if candidate not in known:
            known[candidate] = relative_position_index(candidate)
        if index.is_meta or torch.equal(index.cpu(), known[candidate]):
            return candidate
    raise ValueError(
        f"{name.replace(_TABLE, _INDEX)} is not the numbering of Video Swin: the checkpoint is of a variant whose "
        "tables mean something else"
    )


def _convert(model: nn.Module, state: State) -> Conversion:
    whole = isinstance(model, Recognizer3D)
    backbone = model.backbone if isinstance(model, Recognizer3D) else model
    assert isinstance(backbone, SwinTransformer3D)
    source, state = _sniff(state)
    conversion = Conversion({}, source, head=_HEAD if whole else "", describe=_describe)
    if source == "image":
        conversion.optional = _HEAD
        conversion.ignored = [name for name in state if re.match(r"(backbone\.)?head\.", name)]
        state = {name: tensor for name, tensor in state.items() if name not in conversion.ignored}
        conversion.resizes = True
        plane = math.prod(2 * axis - 1 for axis in backbone.window_size[1:])
        conversion.resized = [
            f"{name} from {tensor.shape[0]} to {plane} spatial offsets"
            for name, tensor in state.items()
            if name.endswith(_TABLE) and tensor.shape[0] != plane
        ]
        state = inflate_state_dict(state, patch_frames=backbone.patch_size[0], window_size=backbone.window_size)
    if not whole:
        conversion.ignored += [name for name in state if name.startswith(_HEAD)]
    known: dict[Triple, Tensor] = {}
    for name, tensor in state.items():
        if name in conversion.ignored or name.endswith((_INDEX, "attn_mask")):
            continue
        if name.endswith(_TABLE) and tensor.ndim == 2:
            index = state.get(name.replace(_TABLE, _INDEX))
            rows = math.prod(2 * axis - 1 for axis in backbone.window_size)
            if index is not None or tensor.shape[0] != rows:
                window = _file_window(name, tensor.shape[0], index, backbone.window_size, known)
                if window != backbone.window_size:
                    tensor = resize_bias_table(tensor, window, backbone.window_size)
                    conversion.resized.append(f"{name} from window {window} to {backbone.window_size}")
        conversion.state[name if whole else name.removeprefix("backbone.")] = tensor
    for name, module in model.named_modules():
        if isinstance(module, WindowAttention3D):
            table = conversion.state.get(f"{name}.{_TABLE}")
            if table is not None:
                if module.window_size not in known:
                    known[module.window_size] = relative_position_index(module.window_size)
                conversion.state[f"{name}.{_INDEX}"] = known[module.window_size].to(table.device, copy=True)
    return conversion


register_converter(SwinTransformer3D, _convert)
register_converter(Recognizer3D, _convert)

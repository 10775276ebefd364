"""Names of the bundled models: what builds each one, and what input it expects."""

from __future__ import annotations

import difflib
import operator
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from vidattn.messages import describe


@dataclass(frozen=True)
class InputSpec:
    """How the clips that a model was trained on are cut from a video.

    Attributes:
        num_frames: Frames of a clip.
        frame_stride: Distance of two sampled frames; not used by uniform sampling.
        sampling: "dense" takes every ``frame_stride``-th frame; "spaced" spreads ``num_frames`` over
            ``num_frames * frame_stride`` frames, the first and the last included; "uniform" over the whole video.
        short_side: Pixels that the shorter side is resized to.
        crop: Pixels of the square crop.
        mean: Mean of the RGB channels, on 0..255.
        std: Deviation of the RGB channels, on 0..255.
        num_classes: Classes of the published weights.
        test_views: (clips, crops) that published accuracies average over.
        fixed_length: Whether a model sees clips of one length only, which it is built for with ``num_frames``.
    """

    num_frames: int = 32
    frame_stride: int = 2
    sampling: str = "dense"
    short_side: int = 224
    crop: int = 224
    mean: tuple[float, float, float] = (123.675, 116.28, 103.53)
    std: tuple[float, float, float] = (58.395, 57.12, 57.375)
    num_classes: int = 400
    test_views: tuple[int, int] = (4, 3)
    fixed_length: bool = False


@dataclass(frozen=True)
class _Entry:
    build: Callable[..., nn.Module]
    options: tuple[str, ...]
    input_spec: InputSpec
    defaults: Mapping[str, Any]


_entries: dict[str, _Entry] = {}


def register_model(
    name: str,
    build: Callable[..., nn.Module],
    options: Collection[str],
    input_spec: InputSpec,
    defaults: Mapping[str, Any],
) -> None:
    """Add a model to ``create_model``.

    Args:
        name: Name of the model.
        build: Called with the defaults and the caller's overrides as keyword arguments.
        options: Names of all arguments that ``build`` takes.
        input_spec: What clips the model expects.
        defaults: Arguments that make this model of its family.
    """
    _entries[name] = _Entry(build, tuple(options), input_spec, dict(defaults))


def _hint(name: str, known: Collection[str]) -> str:
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    return f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(known)}"


def _find(function: str, name: str) -> _Entry:
    if not isinstance(name, str):
        raise TypeError(f"{function}: name: expected one of vidattn.models.list_models(), got {describe(name)}")
    if name not in _entries:
        raise ValueError(
            f"{function}: name: expected one of vidattn.models.list_models(), got {describe(name)}; "
            f"{_hint(name[:100], _entries)}"
        )
    return _entries[name]


def create_model(name: str, **overrides: Any) -> nn.Module:
    """Build a video classifier: video (B, 3, T, H, W) in, logits (B, num_classes) out.

    ``forward_features`` of the model gives the feature map instead.

    Under ``torch.device("meta")`` nothing is allocated; [`load_checkpoint`][] then fills the model without
    initialising it first.

    Args:
        name: One of [`list_models`][].
        **overrides: Arguments of the family's constructor that differ from the published model, ``num_classes`` first
            of all.

    Returns:
        The model, randomly initialised, in training mode.

    Raises:
        ValueError: ``name`` is not known, or ``num_classes`` no number of classes.
        TypeError: ``name`` is no string, or an override no argument of this model.

    Example:
        >>> import torch
        >>> model = create_model("video_swin_t", num_classes=10, embed_dim=24, depths=(1, 1), num_heads=(1, 2))
        >>> model(torch.zeros(1, 3, 4, 32, 32)).shape
        torch.Size([1, 10])
    """
    entry = _find("create_model", name)
    for override in overrides:
        if override not in entry.options:
            raise TypeError(
                f"create_model: **overrides: expected arguments of {name}, got another: "
                f"{name} takes no argument {override!r}; {_hint(override, entry.options)}"
            )
    if "num_classes" in overrides:
        overrides["num_classes"] = _number_of_classes(overrides["num_classes"])
    return entry.build(**{**entry.defaults, **overrides})


def _number_of_classes(value: Any) -> int:
    try:
        classes = operator.index(value)
    except (TypeError, ValueError):
        classes = None
    if classes is None or isinstance(value, bool):
        raise TypeError(f"create_model: num_classes: expected an integer, got {describe(value)}")
    if not 0 <= classes < 2**31:
        raise ValueError(f"create_model: num_classes: expected a number of classes, got {describe(value)}")
    return classes


def list_models() -> list[str]:
    """List the names that [`create_model`][] knows.

    Returns:
        The names, sorted.

    Example:
        >>> "video_swin_t" in list_models()
        True
    """
    return sorted(_entries)


def matching_models(**arguments: Any) -> list[str]:
    """List the published models that were built with these arguments."""
    return [
        name
        for name in list_models()
        if all(_entries[name].defaults.get(key) == value for key, value in arguments.items())
    ]


def get_input_spec(name: str) -> InputSpec:
    """Look up what clips a model expects.

    Args:
        name: One of [`list_models`][].

    Returns:
        The published sampling, size and normalisation.

    Raises:
        ValueError: ``name`` is not known.

    Example:
        >>> get_input_spec("video_swin_b_ssv2").sampling
        'uniform'
    """
    return _find("get_input_spec", name).input_spec

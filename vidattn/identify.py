"""What a checkpoint says of its model: which of the published ones it fits, and its number of classes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

import vidattn.models
from vidattn.models.checkpoint import Conversion, convert_checkpoint, fill_model, not_recognised
from vidattn.models.checkpoint_names import NotRecognisedError, unwrap


class Match(NamedTuple):
    """A published model that a checkpoint fits.

    Attributes:
        name: of the model.
        num_classes: of the classifier in the checkpoint; None if it has none, or that of images.
        of_images: whether the checkpoint is of an image model, which can only start this one.
    """

    name: str
    num_classes: int | None
    of_images: bool


def match_model(name: str, content: Any, config: Mapping[str, Any] | None = None, **options: Any) -> Match:
    """Hold a checkpoint against a model, without allocating the model.

    Args:
        name: one of ``vidattn.models.list_models()``.
        content: what the file holds.
        config: the ``config.json`` beside it, if any.
        **options: arguments of ``create_model`` besides the number of classes.

    Returns:
        The match.

    Raises:
        ValueError: the checkpoint does not fit the model, whatever its number of classes.

    Example:
        >>> model = vidattn.models.create_model("timesformer_space_only", embed_dim=12, depth=1, num_classes=7)
        >>> match_model("timesformer_space_only", model.state_dict(), embed_dim=12, depth=1)
        Match(name='timesformer_space_only', num_classes=7, of_images=False)
    """
    with torch.device("meta"):
        model = vidattn.models.create_model(name, **options)
    conversion = convert_checkpoint(model, content, config)
    of_images = conversion.converted_from == "image"
    num_classes = None if of_images else _num_classes(conversion, model)
    if num_classes is not None:
        with torch.device("meta"):
            model = vidattn.models.create_model(name, num_classes=num_classes, **options)
        conversion = convert_checkpoint(model, content, config)
    if not of_images:  # what an image model lacks is no reason against it
        fill_model(model, conversion, strict=True)
    return Match(name, num_classes, of_images)


def _num_classes(conversion: Conversion, model: torch.nn.Module) -> int | None:
    """Read the number of classes from the classifiers of a checkpoint; None if there is none, or they disagree."""
    own = model.state_dict()
    heads = [
        tensor
        for name, tensor in conversion.state.items()
        if conversion.head and name.startswith(conversion.head) and name in own and tensor.ndim == 2
    ]
    classes = {head.shape[0] for head in heads}
    return classes.pop() if len(classes) == 1 else None


def find_model(
    content: Any,
    config: Mapping[str, Any] | None = None,
    options: Callable[[str], Mapping[str, Any]] = lambda name: {},
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Match:
    """Find the only published model that a checkpoint fits.

    Args:
        content: what the file holds.
        config: the ``config.json`` beside it, if any.
        options: takes the name of a model, and gives arguments of ``create_model`` for it.
        progress: called after each model with (done, total).

    Returns:
        The match.

    Raises:
        ValueError: it fits none, or several that its tensors cannot tell apart; the message names them.

    Example:
        >>> model = vidattn.models.create_model("video_swin_t", num_classes=7)
        >>> find_model(model.state_dict())
        Match(name='video_swin_t', num_classes=7, of_images=False)
    """
    state = unwrap(content)
    names = vidattn.models.list_models()
    matches: list[Match] = []
    near: list[str] = []
    for done, name in enumerate(names, start=1):
        try:
            matches.append(match_model(name, state, config, **options(name)))
        except NotRecognisedError:
            pass
        except (ValueError, TypeError):  # a TypeError is an option that does not fit the model
            near.append(name)
        progress(done, len(names))
    if len(matches) == 1 and not matches[0].of_images:
        return matches[0]
    if any(not match.of_images for match in matches):
        fitting = ", ".join(match.name for match in matches)
        raise ValueError(f"the checkpoint fits {fitting}, which its tensors do not tell apart; name one by --model")
    if matches:
        fitting = ", ".join(match.name for match in matches)
        raise ValueError(f"the checkpoint is of an image model, which can start {fitting}; name one by --model")
    if near:
        raise ValueError(
            "the checkpoint is of no published size, so name by --model the one it comes from: "
            f"{', '.join(near)}; the error then says what differs"
        )
    raise not_recognised(state, "a bundled model")

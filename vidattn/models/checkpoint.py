"""Checkpoints: read the files of several projects into the bundled models, and say what happened.

A family registers one converter, which recognises the layouts of its files and renames and reshapes their tensors.
Reading (``checkpoint_files``), what training scripts put around a state dict (``checkpoint_names``), the comparison
with the model and the report are the same for all.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from vidattn.messages import describe, shorten
from vidattn.models.checkpoint_files import read_checkpoint
from vidattn.models.checkpoint_names import NotRecognisedError, State, convert, join_names, unwrap

# What the keys of other people's checkpoints look like: the first fragment found names the architecture.
_ARCHITECTURES = (
    ("temporal_attn.", "TimeSformer"),
    ("temporal_attention.", "a TimeSformer of Hugging Face"),
    ("vivit.", "a ViViT of Hugging Face"),
    ("temp_embed", "an X-ViT"),
    ("encoderblock_0/", "a vision transformer of flax"),
    ("swin.encoder.", "an image Swin of Hugging Face"),
    ("cpb_mlp.", "a Swin V2"),
    ("relative_position_bias_table", "another model with window attention"),
    ("layer1.0.conv1", "a ResNet"),
    ("blocks.0.attn.", "a plain vision transformer"),
)


@dataclass(frozen=True)
class LoadReport:
    """What [`load_checkpoint`][] did.

    Attributes:
        converted_from: Layout of the file.
        loaded: Names of the model's tensors that were filled.
        missing: Names of the model's tensors that the file has nothing for; they are as they were.
        unexpected: Names in the file that the model has no place for.
        resized: Position tables that were interpolated to another window or size, with both.
        ignored: Names in the file that are left out on purpose: what this conversion has no use for, such as the
            classifier of an image model, and what training scripts keep beside a model (``n_averaged``, losses).
    """

    converted_from: str
    loaded: tuple[str, ...]
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    resized: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"loaded {len(self.loaded)} tensors from a checkpoint of layout {self.converted_from!r}"]
        for kind in ("missing", "unexpected", "resized", "ignored"):
            names = getattr(self, kind)
            if names:
                lines.append(f"  {kind} ({len(names)}): {join_names(names)}")
        return "\n".join(lines)


@dataclass
class Conversion:
    """A file's tensors under the names and in the shapes of a model, as a family's converter returns it.

    Attributes:
        state: Tensors by the model's names; what the model has no place for keeps the file's name.
        converted_from: Layout of the file.
        resized: Tables interpolated from another window, described.
        resizes: Whether interpolating tables belongs to this conversion; if not, it is an error when strict.
        ignored: Names that the conversion leaves out on purpose.
        optional: Prefix, or prefixes, of the model's names that files of this layout never hold ("" for none).
        head: Prefix, or prefixes, of the classifier's names, whose shape may differ when not strict ("" for none).
        describe: Says what model a state dict, of the file or of the model itself, belongs to.
        outside: Names of the file that lack the prefix of its other names.
    """

    state: State
    converted_from: str
    resized: list[str] = field(default_factory=list)
    resizes: bool = False
    ignored: list[str] = field(default_factory=list)
    optional: str | tuple[str, ...] = ""
    head: str | tuple[str, ...] = ""
    describe: Callable[[Mapping[str, Tensor]], str] | None = None
    outside: list[str] = field(default_factory=list)


Converter = Callable[[nn.Module, State], Conversion]
Configuration = Callable[[nn.Module], Mapping[str, Any]]
_converters: dict[type[nn.Module], tuple[Converter, Configuration | None]] = {}
# Of a configuration, what resizing tables may change.
_RESIZABLE = ("num_frames", "image_size")


def register_converter(
    model_class: type[nn.Module], converter: Converter, configuration: Configuration | None = None
) -> None:
    """Tell ``load_checkpoint`` how files become state dicts of ``model_class`` (and of its subclasses).

    Args:
        model_class: Class of the models.
        converter: Takes a model and a state dict, and gives the latter by the names of the model.
        configuration: Says of a model what a ``config.json`` of Hugging Face would, ``model_type`` first of all: what
            the state dict does not tell. A list is a choice of values that mean the same.
    """
    _converters[model_class] = converter, configuration


def not_recognised(state: Mapping[str, Any], expected: str) -> NotRecognisedError:
    """Build the error for a state dict of another architecture, naming what it seems to be."""
    keys = sorted(state)
    looks = next(
        (
            f"that looks like {architecture}"
            for fragment, architecture in _ARCHITECTURES
            if any(fragment in key for key in keys)
        ),
        "with other names",
    )
    return NotRecognisedError(
        f"load_checkpoint: path_or_state: expected a checkpoint of {expected}, got one {looks} ({join_names(keys)})"
    )


def load_checkpoint(
    model: nn.Module, path_or_state: str | os.PathLike[str] | Mapping[str, Any], *, strict: bool = True
) -> LoadReport:
    """Load the weights of a checkpoint, of whatever project, into a bundled model.

    Files are PyTorch's (tensors and arrays only: nothing in them is executed), safetensors, NumPy's .npz, or flax's
    msgpack where flax is installed; parameter trees of flax, nested or flattened, are read from each. An index of
    shards and a folder of Hugging Face are read as well; the folder's ``config.json`` must then agree with the model in
    what tensors do not tell (heads, epsilon, tubelets, frames). What training scripts put around a state dict
    (``state_dict``, ``model``) and around names (``module.``, ``net.``, ``_orig_mod.``, in any order) is removed. The
    model is changed only if everything fits; one that was built under ``torch.device("meta")`` takes over the file's
    tensors.

    Args:
        model: A model of ``create_model``, or its backbone.
        path_or_state: A file or folder, or what was read from one.
        strict: Raise unless every tensor of the model is filled and every tensor of the file is used. Position-bias
            tables of another window are then an error too. Otherwise those are interpolated, a classifier with
            another number of classes is left as it is, and names that do not match are only reported; any other shape
            that differs still raises. What a conversion leaves out by its nature (the classifier of an image model)
            and what is clearly none of the model's weights (counters, losses) is never an error, and reported.

    Returns:
        What was loaded, missing, unexpected, resized and ignored.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file cannot be read, or does not fit the model; the message says what it seems to be.
        TypeError: ``model`` is not a bundled model, or ``path_or_state`` neither a path nor a mapping.
        MemoryError: What the file holds, or says that it does, does not fit in memory.

    Example:
        >>> from vidattn.models import create_model
        >>> model = create_model("video_swin_t", embed_dim=24, depths=(1, 1), num_heads=(1, 2))
        >>> print(load_checkpoint(model, {"state_dict": model.state_dict()}))
        loaded 39 tensors from a checkpoint of layout 'official'
    """
    _find_converter(model)
    config = None
    if isinstance(path_or_state, Mapping):
        content: Any = path_or_state
    elif isinstance(path_or_state, (str, os.PathLike)):
        content, config = read_checkpoint(os.fspath(path_or_state))
    else:
        raise TypeError(
            f"load_checkpoint: path_or_state: expected a path or a state dict, got {describe(path_or_state)}"
        )
    return fill_model(model, convert_checkpoint(model, content, config, strict), strict)


def convert_checkpoint(
    model: nn.Module, content: Any, config: Mapping[str, Any] | None = None, strict: bool = True
) -> Conversion:
    """Bring what a file holds under the names of a model, for ``fill_model``; both as ``load_checkpoint``."""
    converter, configuration = _find_converter(model)
    state = unwrap(content)
    try:
        conversion, beside, outside = convert(state, lambda state: converter(model, state))
    except (IndexError, RuntimeError, TypeError) as error:  # a name promises a number of dimensions
        raise ValueError(
            f"load_checkpoint: path_or_state: expected weights of {type(model).__name__}, got tensors of other shapes "
            f"under its names ({type(error).__name__}: {shorten(str(error))})"
        ) from error
    except ValueError as error:
        if str(error).startswith("load_checkpoint: "):
            raise
        raise ValueError(f"load_checkpoint: path_or_state: {error}") from error
    conversion.ignored += beside
    conversion.outside += outside
    if config is not None and configuration is not None:
        _check_config(model, config, configuration(model), strict)
    return conversion


def _find_converter(model: nn.Module) -> tuple[Converter, Configuration | None]:
    registered = next((_converters[base] for base in type(model).__mro__ if base in _converters), None)
    if registered is None:
        known = ", ".join(sorted(known_class.__name__ for known_class in _converters))
        raise TypeError(f"load_checkpoint: model: expected one of {known}, got {type(model).__name__}")
    return registered


def describe_layers(blocks: nn.Module, norm: nn.Module) -> dict[str, Any]:
    """Say of the blocks of a transformer, and of its last norm, what configurations of Hugging Face do.

    Args:
        blocks: Blocks with an ``attn`` or ``attn_space`` of ``num_heads`` and an ``mlp`` with an ``act``.
        norm: The last norm.

    Returns:
        Heads, epsilon and activation by the names of a configuration, as far as there are any.
    """
    found: dict[str, Any] = {}
    for module in blocks.modules():
        if hasattr(module, "num_heads"):
            found["num_attention_heads"] = module.num_heads
        act = getattr(module, "act", None)
        if isinstance(act, nn.GELU):
            tanh = ["gelu_fast", "gelu_new", "gelu_pytorch_tanh", "gelu_accurate"]
            found["hidden_act"] = tanh if act.approximate == "tanh" else ["gelu", "gelu_python"]
    if isinstance(norm, nn.LayerNorm):
        found["layer_norm_eps"] = norm.eps
    return found


def _check_config(model: nn.Module, config: Mapping[str, Any], ours: Mapping[str, Any], strict: bool) -> None:
    """Refuse weights of a configuration that means something else than the model."""
    if config.get("model_type") != ours["model_type"]:
        return  # the names of the tensors tell that
    differing = [
        f"{name}={describe(config[name])} (the model: {value[0] if isinstance(value, list) else value!r})"
        for name, value in ours.items()
        if name in config and not _agrees(config[name], value) and (strict or name not in _RESIZABLE)
    ]
    if differing:
        raise ValueError(
            f"load_checkpoint: path_or_state: expected a config.json that agrees with this {type(model).__name__}, got "
            f"{', '.join(differing)}"
        )


def _agrees(theirs: Any, ours: Any) -> bool:
    if isinstance(ours, list):
        return theirs in ours
    if isinstance(ours, tuple):
        return ours == (tuple(theirs) if isinstance(theirs, list) else (theirs,) * len(ours))
    return bool(theirs == ours)


def fill_model(model: nn.Module, conversion: Conversion, strict: bool) -> LoadReport:
    """Compare a converted state dict with the model, and load it if it fits."""
    own = model.state_dict()
    state, ignored = dict(conversion.state), list(conversion.ignored)
    differing = [name for name in state if name in own and state[name].shape != own[name].shape]
    if conversion.head and not strict:
        heads = [name for name in differing if name.startswith(conversion.head)]
        if heads:  # weight and bias go together
            left_out = [name for name in state if name.startswith(conversion.head)]
            ignored += left_out
            state = {name: value for name, value in state.items() if name not in left_out}
            differing = [name for name in differing if name not in heads]
    if differing:
        raise ValueError(_explain_shapes(conversion, own, differing))
    for name in state:
        if name in own:
            _check_tensor(name, state[name], own[name])
    loaded = [name for name in state if name in own]
    missing = [name for name in own if name not in state]
    unexpected = [name for name in state if name not in own] + conversion.outside
    if not loaded:
        raise ValueError(
            f"load_checkpoint: path_or_state: expected weights of {type(model).__name__}, got none of its tensors but "
            f"{join_names(unexpected)}"
        )
    lacking = [name for name in missing if not (conversion.optional and name.startswith(conversion.optional))]
    if strict:
        problems = [
            f"{what} {join_names(names)}"
            for what, names in (
                ("it lacks", lacking),
                ("the model has no place for", unexpected),
                ("tables would have to be resized:", [] if conversion.resizes else conversion.resized),
            )
            if names
        ]
        if problems:
            raise ValueError(
                f"load_checkpoint: path_or_state: expected weights that fill this {type(model).__name__}, got a "
                f"checkpoint (layout {conversion.converted_from!r}) that does not fit: "
                f"{'; '.join(problems)}. {_compare(conversion, own)}strict=False accepts this and reports it"
            )
    unfilled = [name for name in missing if own[name].is_meta]
    if unfilled:
        raise ValueError(
            "load_checkpoint: model: expected a real device, but the model is on the meta device and the checkpoint "
            f"lacks {join_names(unfilled)}: "
            "build the model on a real device, so that these are initialised"
        )
    assign = any(tensor.is_meta for tensor in own.values())
    matching = {name: state[name].detach() for name in loaded}
    if assign:
        matching = {name: tensor.to(own[name].dtype) for name, tensor in matching.items()}
    model.load_state_dict(matching, strict=False, assign=assign)
    return LoadReport(
        converted_from=conversion.converted_from,
        loaded=tuple(loaded),
        missing=tuple(missing),
        unexpected=tuple(unexpected),
        resized=tuple(conversion.resized),
        ignored=tuple(ignored),
    )


def _check_tensor(name: str, theirs: Tensor, ours: Tensor) -> None:
    if theirs.is_floating_point() != ours.is_floating_point() or theirs.is_complex():
        raise ValueError(f"load_checkpoint: {name}: expected a dtype like {ours.dtype}, got {theirs.dtype}")
    if theirs.is_meta and not ours.is_meta:
        raise ValueError(f"load_checkpoint: {name}: expected a tensor with data, got one on the meta device")


def _compare(conversion: Conversion, own: Mapping[str, Tensor]) -> str:
    if conversion.describe is None:
        return ""
    try:
        theirs, ours = conversion.describe(conversion.state), conversion.describe(own)
    except IndexError:  # a tensor of theirs has fewer dimensions than that of any model
        return ""
    return "" if theirs == ours else f"The checkpoint is of {theirs}; the model is {ours}. "


def _explain_shapes(conversion: Conversion, own: Mapping[str, Tensor], differing: list[str]) -> str:
    first = differing[0]
    text = (
        f"load_checkpoint: path_or_state: expected weights of the shapes of the model, but the checkpoint "
        f"(layout {conversion.converted_from!r}) and the model differ in {len(differing)} shapes, first in "
        f"{first}: {tuple(conversion.state[first].shape)} in the file, {tuple(own[first].shape)} in the model. "
        f"{_compare(conversion, own)}"
    )
    if conversion.head and all(name.startswith(conversion.head) for name in differing):
        text += "strict=False keeps the model's own classifier"
    return text.rstrip()

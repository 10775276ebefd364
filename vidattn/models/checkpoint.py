"""Checkpoints: read the files of several projects into the bundled models, and say what happened.

A family registers one converter, which recognises the layouts of its files and renames and reshapes their tensors.
Reading, the wrappers that training scripts put around a state dict, the comparison with the model and the report are
the same for all.
"""

from __future__ import annotations

import os
import pickle
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vidattn.models.flax_trees import flatten_flax_tree, is_msgpack, is_npz, read_msgpack, read_npz

State = dict[str, Tensor]

_WRAPPERS = ("state_dict", "model", "module", "model_state", "model_state_dict", "state_dict_ema")
_PREFIXES = ("module.", "_orig_mod.", "model.")
_SHOWN = 6
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
    """What :func:`load_checkpoint` did.

    Attributes:
        converted_from: Layout of the file.
        loaded: Names of the model's tensors that were filled.
        missing: Names of the model's tensors that the file has nothing for; they are as they were.
        unexpected: Names in the file that the model has no place for.
        resized: Position tables that were interpolated to another window or size, with both.
        ignored: Names in the file that this conversion leaves out on purpose, such as the classifier of an image model.
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
                lines.append(f"  {kind} ({len(names)}): {_shorten(names)}")
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
    """

    state: State
    converted_from: str
    resized: list[str] = field(default_factory=list)
    resizes: bool = False
    ignored: list[str] = field(default_factory=list)
    optional: str | tuple[str, ...] = ""
    head: str | tuple[str, ...] = ""
    describe: Callable[[Mapping[str, Tensor]], str] | None = None


Converter = Callable[[nn.Module, State], Conversion]
_converters: dict[type[nn.Module], Converter] = {}


def register_converter(model_class: type[nn.Module], converter: Converter) -> None:
    """Tell :func:`load_checkpoint` how files become state dicts of ``model_class`` (and of its subclasses)."""
    _converters[model_class] = converter


def not_recognised(state: Mapping[str, Any], expected: str) -> ValueError:
    """Build the error for a state dict of another architecture, naming what it seems to be."""
    keys = sorted(state)
    for fragment, architecture in _ARCHITECTURES:
        if any(fragment in key for key in keys):
            return ValueError(
                f"checkpoint must be of {expected}; this one looks like {architecture} ({_shorten(keys)})"
            )
    return ValueError(f"checkpoint must be of {expected}; this one has other names ({_shorten(keys)})")


def load_checkpoint(
    model: nn.Module, path_or_state: str | os.PathLike[str] | Mapping[str, Any], *, strict: bool = True
) -> LoadReport:
    """Load the weights of a checkpoint, of whatever project, into a bundled model.

    Files are PyTorch's (tensors only: nothing in them is executed), safetensors, NumPy's .npz, or flax's msgpack where
    flax is installed; parameter trees of flax, nested or flattened, are read from each. Wrappers (``state_dict``,
    ``model``, ``module.``, ``backbone.``) are removed. The model is changed only if everything fits; one that was
    built under ``torch.device("meta")`` takes over the file's tensors.

    Args:
        model: A model of :func:`create_model`, or its backbone.
        path_or_state: A file, or what was read from one.
        strict: Raise unless every tensor of the model is filled and every tensor of the file is used. Position-bias
            tables of another window are then an error too. Otherwise those are interpolated, a classifier with
            another number of classes is left as it is, and names that do not match are only reported; any other shape
            that differs still raises. What a conversion leaves out by its nature (the classifier of an image model)
            is never an error.

    Returns:
        What was loaded, missing, unexpected, resized and ignored.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file cannot be read, or does not fit the model; the message says what it seems to be.
        TypeError: ``model`` is not a bundled model, or ``path_or_state`` neither a path nor a mapping.

    Example:
        >>> from vidattn.models import create_model
        >>> model = create_model("video_swin_t", embed_dim=24, depths=(1, 1), num_heads=(1, 2))
        >>> print(load_checkpoint(model, {"state_dict": model.state_dict()}))
        loaded 39 tensors from a checkpoint of layout 'official'
    """
    converter = next((_converters[base] for base in type(model).__mro__ if base in _converters), None)
    if converter is None:
        known = ", ".join(sorted(known_class.__name__ for known_class in _converters))
        raise TypeError(f"model must be one of {known}, got {type(model).__name__}")
    if isinstance(path_or_state, Mapping):
        content: Any = path_or_state
    elif isinstance(path_or_state, str | os.PathLike):
        content = _read(os.fspath(path_or_state))
    else:
        raise TypeError(f"path_or_state must be a path or a state dict, got {type(path_or_state).__name__}")
    return _fill(model, converter(model, _unwrap(content)), strict)


def _shorten(names: Any) -> str:
    names = list(names)
    return ", ".join(names[:_SHOWN]) + (f", ... ({len(names)} in all)" if len(names) > _SHOWN else "")


def _read(path: str) -> Any:
    if not os.path.isfile(path):
        raise FileNotFoundError(f"checkpoint not found: {path}")
    with open(path, "rb") as file:
        start = file.read(9)
    # A safetensors file starts with the length of its JSON header, in eight bytes.
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < os.path.getsize(path):
        return _read_safetensors(path)
    for recognised, reader in ((is_npz, read_npz), (is_msgpack, read_msgpack)):
        if recognised(path):
            try:
                return reader(path)
            except (ImportError, MemoryError):
                raise
            except Exception as error:
                raise _unreadable(path, error) from error
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Detected pickle protocol")
            return torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:
        refused = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if refused is None:
            raise _unreadable(path, error) from error
        raise ValueError(
            f"{path} holds Python objects besides tensors ({refused[1]}), which could run code and are not loaded: "
            "where you trust the file, save its state dict alone (torch.save(checkpoint['state_dict'], new_path))"
        ) from error


def _read_safetensors(path: str) -> State:
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise ImportError(f"reading {path} needs safetensors: pip install safetensors") from error
    try:
        return load_file(path)
    except Exception as error:
        raise _unreadable(path, error) from error


def _unreadable(path: str, error: Exception) -> ValueError:
    # The text of an unpickling error is a page about trusting files, which is not the matter here.
    text = "" if isinstance(error, pickle.UnpicklingError) else str(error).strip()
    reason = f": {text.splitlines()[0]}" if text else ""
    return ValueError(
        f"{path} cannot be read as a PyTorch or safetensors file, it may be damaged ({type(error).__name__}{reason})"
    )


def _unwrap(content: Any) -> State:
    """Strip what training scripts put around a state dict, and around its names."""
    tree = flatten_flax_tree(content)
    if tree is not None:
        content = tree
    while isinstance(content, Mapping):
        inner = next((content[name] for name in _WRAPPERS if isinstance(content.get(name), Mapping)), None)
        if inner is None:
            break
        content = inner
    if not isinstance(content, Mapping) or not any(isinstance(value, Tensor) for value in content.values()):
        found = _shorten(map(str, content)) if isinstance(content, Mapping) else type(content).__name__
        raise ValueError(f"checkpoint must hold a state dict, found {found or 'nothing'}")
    odd = [str(name) for name, value in content.items() if not isinstance(name, str) or not isinstance(value, Tensor)]
    if odd:
        raise ValueError(f"checkpoint must map names to tensors, but these are something else: {_shorten(odd)}")
    state = dict(content)
    while True:
        prefix = next((prefix for prefix in _PREFIXES if all(name.startswith(prefix) for name in state)), None)
        if prefix is None:
            return state
        state = {name[len(prefix) :]: value for name, value in state.items()}


def _fill(model: nn.Module, conversion: Conversion, strict: bool) -> LoadReport:
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
        if name in own and state[name].is_floating_point() != own[name].is_floating_point():
            raise ValueError(
                f"{name} must be of a dtype like {own[name].dtype}, the checkpoint has {state[name].dtype}"
            )
    loaded = [name for name in state if name in own]
    missing = [name for name in own if name not in state]
    unexpected = [name for name in state if name not in own]
    if not loaded:
        raise ValueError(f"checkpoint fits no tensor of {type(model).__name__}: it has {_shorten(unexpected)}")
    lacking = [name for name in missing if not (conversion.optional and name.startswith(conversion.optional))]
    if strict:
        problems = [
            f"{what} {_shorten(names)}"
            for what, names in (
                ("it lacks", lacking),
                ("the model has no place for", unexpected),
                ("tables would have to be resized:", [] if conversion.resizes else conversion.resized),
            )
            if names
        ]
        if problems:
            raise ValueError(
                f"checkpoint (layout {conversion.converted_from!r}) does not fit {type(model).__name__}: "
                f"{'; '.join(problems)}. {_compare(conversion, own)}strict=False accepts this and reports it"
            )
    unfilled = [name for name in missing if own[name].is_meta]
    if unfilled:
        raise ValueError(
            f"the model is on the meta device and the checkpoint lacks {_shorten(unfilled)}: "
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


def _compare(conversion: Conversion, own: Mapping[str, Tensor]) -> str:
    if conversion.describe is None:
        return ""
    theirs, ours = conversion.describe(conversion.state), conversion.describe(own)
    return "" if theirs == ours else f"The checkpoint is of {theirs}; the model is {ours}. "


def _explain_shapes(conversion: Conversion, own: Mapping[str, Tensor], differing: list[str]) -> str:
    first = differing[0]
    text = (
        f"checkpoint (layout {conversion.converted_from!r}) and model differ in {len(differing)} shapes, first in "
        f"{first}: {tuple(conversion.state[first].shape)} in the file, {tuple(own[first].shape)} in the model. "
        f"{_compare(conversion, own)}"
    )
    if conversion.head and all(name.startswith(conversion.head) for name in differing):
        text += "strict=False keeps the model's own classifier"
    return text.rstrip()

"""What training scripts put around a state dict, around its names, and beside its weights."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from vidattn.messages import describe, shorten
from vidattn.models.flax_trees import flatten_flax_tree, tensor_of

State = dict[str, Tensor]
Converted = TypeVar("Converted")
Value = TypeVar("Value")

_SHOWN = 6
_DEEPEST = 4  # words in front of the names of a model
_WRAPPERS = ("state_dict", "model", "module", "model_state", "model_state_dict", "state_dict_ema")
# Wrappers of whole modules and of parts, which PyTorch names; none of the models has a part of such a name.
_WRAPPED = re.compile(
    r"(?:(?<=\.)|^)(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\."
)
# Parts of a training module that are no part of its model: losses, metrics, augmentation and so on...
_BESIDE = re.compile(
    r"(?:\w+_)?(?:criterion|criteria|loss|losses|loss_fn|loss_func|metrics?|auroc|confmat|"
    r"acc(?:uracy)?(?:_?(?:top)?_?\d+)?)|mixup|cutmix|optimizers?|scheduler|lr_schedulers?|grad_scaler|"
    r"(?:data_)?preprocessor|normali[sz]e|augmentations?|transforms?"
)
# ... and numbers that are kept beside it.
_COUNTERS = re.compile(
    r"n_averaged|num_averaged|num_updates|decay|initted|steps?|global_steps?|epochs?|iters?|iterations?|_extra_state|"
    r"(?:pixel_|image_)?(?:mean|std)"
)


class NotRecognisedError(ValueError):
    """A state dict is of no layout that a converter knows."""


def join_names(names: Any) -> str:
    """Show the first of many names, and how many there are."""
    names = list(map(str, names))
    text = ", ".join(shorten(name) for name in names[:_SHOWN])
    return text + (f", ... ({len(names)} in all)" if len(names) > _SHOWN else "")


def unwrap(content: Any) -> State:
    """Find the state dict in what a file holds, with tensors for arrays and without the names of wrappers.

    Args:
        content: a state dict, or mappings around one; a parameter tree of flax.

    Returns:
        The state dict. What else the names have in front of them stays.

    Raises:
        ValueError: there is none, or more than one.
    """
    tree = flatten_flax_tree(content)
    if tree is not None:
        content = tree
    while isinstance(content, Mapping):
        inner = next((content[name] for name in _WRAPPERS if isinstance(content.get(name), Mapping)), None)
        if inner is None and not _has_arrays(content):
            states = [
                name for name, value in content.items() if not _BESIDE.fullmatch(str(name)) and _holds_a_state(value)
            ]
            if len(states) > 1:
                raise ValueError(
                    f"load_checkpoint: path_or_state: expected one state dict, got several, pass one of them: "
                    f"{join_names(states)}"
                )
            inner = content[states[0]] if states else None
        if inner is None:
            break
        content = inner
    if not isinstance(content, Mapping) or not any(map(_is_array, content.values())):
        got = f"a mapping of {join_names(content) or 'nothing'}" if isinstance(content, Mapping) else describe(content)
        raise ValueError(f"load_checkpoint: path_or_state: expected a state dict, got {got}")
    state: State = {}
    odd = []
    for name, value in content.items():
        tensor = tensor_of(value) if _is_array(value) else None
        if isinstance(name, str) and tensor is not None:
            if tensor.is_nested or tensor.layout != torch.strided:
                form = "a nested tensor" if tensor.is_nested else f"layout {tensor.layout}"
                raise ValueError(f"load_checkpoint: {shorten(name)}: expected a dense tensor, got {form}")
            state[name] = tensor
        elif not (isinstance(name, str) and name.endswith("_extra_state")):
            odd.append(f"{shorten(str(name))} ({describe(value)})")
    if odd:
        raise ValueError(
            f"load_checkpoint: path_or_state: expected a mapping of names to tensors, got something else: "
            f"{join_names(odd)}"
        )
    return rename(state, lambda name: _WRAPPED.sub("", name))


def _is_array(value: Any) -> bool:
    return isinstance(value, Tensor) or (hasattr(value, "__array__") and hasattr(value, "dtype"))


def _has_arrays(content: Mapping[Any, Any]) -> bool:
    """Tell a state dict from what is put around one: that may hold a number or two as well."""
    return any(_is_array(value) and value.ndim > 0 for value in content.values())


def _holds_a_state(value: Any, depth: int = 3) -> bool:
    if not isinstance(value, Mapping) or "param_groups" in value:  # the state of an optimizer
        return False
    return _has_arrays(value) or (depth > 0 and any(_holds_a_state(inner, depth - 1) for inner in value.values()))


def rename(state: Mapping[str, Value], new_name: Callable[[str], str]) -> dict[str, Value]:
    """Rename the entries of a state dict; two that would have one name are an error, not one of them.

    Args:
        state: anything by name.
        new_name: gives the new name of an old one.

    Returns:
        The same values by the new names.

    Raises:
        ValueError: two have one name.
    """
    origins: dict[str, str] = {}
    for name in state:
        first = origins.setdefault(new_name(name), name)
        if first != name:
            raise ValueError(
                f"load_checkpoint: path_or_state: expected each tensor once, got {shorten(first)} and {shorten(name)}"
            )
    return {new: state[name] for new, name in origins.items()}


def convert(state: State, converter: Callable[[State], Converted]) -> tuple[Converted, list[str], list[str]]:
    """Convert a state dict whose names may stand behind a prefix of any words, which only those of the model have.

    Args:
        state: tensors by name.
        converter: takes tensors by the names of a layout; raises ``NotRecognisedError`` for others.

    Returns:
        What the converter made, names that are clearly none of a model's weights (losses, metrics, counters), and other
        names that do not have the prefix.

    Raises:
        NotRecognisedError: no part of the state dict is what the converter knows.
        ValueError: two parts are, and differ.
    """
    beside = [name for name in state if _is_beside(name)]
    state = {name: tensor for name, tensor in state.items() if name not in set(beside)}
    try:
        return converter(state), beside, []
    except NotRecognisedError as error:
        refusal = error
    found: dict[str, tuple[Converted, State, list[str]]] = {}
    for prefix in _prefixes(state):
        if any(prefix.startswith(known) for known in found):
            continue
        inner = {name[len(prefix) :]: tensor for name, tensor in state.items() if name.startswith(prefix)}
        skipped = [name for name in inner if _is_beside(name)]
        inner = {name: tensor for name, tensor in inner.items() if name not in skipped}
        try:
            found[prefix] = converter(inner), inner, [prefix + name for name in skipped]
        except NotRecognisedError:
            continue
    if not found:
        raise refusal
    (prefix, (converted, inner, skipped)), *others = found.items()
    for other, (_, again, _) in others:
        if again.keys() != inner.keys() or not all(_same(tensor, again[name]) for name, tensor in inner.items()):
            raise ValueError(
                "load_checkpoint: path_or_state: expected the weights of one model, got different ones under "
                f"{prefix} and {other}: pass those of one, {{name[{len(prefix)}:]: tensor for name, tensor in "
                f"state.items() if name.startswith({prefix!r})}} or so"
            )
    outside = [name for name in state if not name.startswith(tuple(found))]
    clear = [name for name in outside if _is_clearly_beside(name, prefix, state[name])]
    return converted, beside + skipped + clear, [name for name in outside if name not in set(clear)]


def _is_beside(name: str) -> bool:
    """Tell what is clearly no weight of a model, by the first word of its name, or by its only word."""
    first, _, rest = name.partition(".")
    return (_BESIDE if rest else _COUNTERS).fullmatch(first) is not None


def _is_clearly_beside(name: str, prefix: str, tensor: Tensor) -> bool:
    """Tell the same of a name that does not have the prefix of the model, but may have the beginning of it."""
    words, common = name.split("."), prefix.split(".")
    while len(words) > 1 and common and words[0] == common[0]:
        words, common = words[1:], common[1:]
    if _is_beside(".".join(words)):
        return True
    # A counter of something else: of a moving average, of a metric.
    return tensor.ndim == 0 and (_COUNTERS.fullmatch(words[-1]) is not None or not tensor.is_floating_point())


def _prefixes(state: Mapping[str, Tensor]) -> Iterator[str]:
    """List what may stand in front of the names of a model, the shortest first."""
    words = {tuple(name.split(".")[:-1]) for name in state}
    starts = {part[:length] for part in words for length in range(1, min(len(part), _DEEPEST) + 1)}
    for start in sorted(starts, key=lambda part: (len(part), part)):
        yield ".".join(start) + "."


def _same(one: Tensor, other: Tensor) -> bool:
    if one is other:
        return True
    return one.shape == other.shape and one.dtype == other.dtype and not one.is_meta and torch.equal(one, other)

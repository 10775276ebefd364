"""Parameter trees of flax as state dicts, with "/" between the names of a path, and the files they come in."""

from __future__ import annotations

import importlib
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

# Where training states keep their parameters, the optimizer's copy first: the rest of such a state has the same names.
_ROOTS = ("optimizer/target/", "opt/target/", "target/", "params/")
# A file can have a mapping within itself, or one twice in one that is twice in the next. No training state is so.
_DEEPEST, _MOST = 64, 1_000_000


def flatten_flax_tree(content: Any) -> dict[str, Tensor] | None:
    """Turn a parameter tree of flax into a flat state dict.

    Args:
        content: Nested or flattened ("a/b/kernel") mappings of arrays: parameters, or a training state with them.

    Returns:
        Floating-point tensors by path, or None for anything that is no such tree.

    Raises:
        ValueError: mappings lie within mappings without end.

    Example:
        >>> flatten_flax_tree({"params": {"head": {"kernel": torch.ones(2, 3)}}})["head/kernel"].shape
        torch.Size([2, 3])
    """
    if not isinstance(content, Mapping):
        return None
    arrays = dict(find_arrays(content))
    if not any(path.endswith("/kernel") for path in arrays):
        return None
    while True:
        root = next((root for root in _ROOTS if any(path.startswith(root) for path in arrays)), None)
        if root is None:
            break
        arrays = {path[len(root) :]: value for path, value in arrays.items() if path.startswith(root)}
    tensors = {path: tensor_of(value) for path, value in arrays.items()}
    return {path: tensor for path, tensor in tensors.items() if tensor is not None and tensor.is_floating_point()}


def find_arrays(content: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    """Go through the tensors and arrays of nested mappings.

    Args:
        content: The mapping.

    Yields:
        Paths, with "/" between the names, and what is there.

    Raises:
        ValueError: mappings lie within mappings without end.

    Example:
        >>> [path for path, _ in find_arrays({"params": {"head": {"kernel": torch.ones(2, 3)}}, "epoch": 3})]
        ['params/head/kernel']
    """
    for count, (path, value) in enumerate(_leaves(content, "", _DEEPEST)):
        if count == _MOST:
            raise _endless(f"more than {_MOST} entries")
        if isinstance(value, Tensor) or hasattr(value, "__array__"):
            yield path, value


def _leaves(tree: Mapping[Any, Any], prefix: str, deeper: int) -> Iterator[tuple[str, Any]]:
    if deeper == 0:
        raise _endless(f"more than {_DEEPEST} mappings within each other")
    for name, value in tree.items():
        yield f"{prefix}{name}", value  # a mapping of mappings counts too
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}/", deeper - 1)


def _endless(got: str) -> ValueError:
    return ValueError(f"load_checkpoint: path_or_state: expected a state dict, got {got}")


def tensor_of(value: Any) -> Tensor | None:
    """Copy an array of another library into a tensor; None where no tensor has its type.

    Args:
        value: a tensor, which is returned, or what NumPy can read.

    Returns:
        The tensor.

    Example:
        >>> tensor_of([1.0, 2.0])
        tensor([1., 2.], dtype=torch.float64)
    """
    if isinstance(value, Tensor):
        return value
    import numpy

    array = numpy.asarray(value)
    array = array.astype(array.dtype.newbyteorder("="))  # a copy: arrays of jax are read-only
    # NumPy has bfloat16 from another package, and writes it to files as two bytes of no type.
    if array.dtype.name in ("bfloat16", "void16"):
        return torch.from_numpy(array.view(numpy.int16)).view(torch.bfloat16)
    try:
        return torch.from_numpy(array)
    except TypeError:
        return None


def is_npz(path: str) -> bool:
    """Tell NumPy's archives from PyTorch's, which are zip files too."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    return bool(names) and all(name.endswith(".npy") for name in names)


def read_npz(path: str) -> dict[str, Any]:
    """Read the arrays of a NumPy archive; pickled objects in it are refused."""
    import numpy

    with numpy.load(path, allow_pickle=False) as archive:
        return dict(archive)


def is_msgpack(path: str) -> bool:
    """Whether a file starts like a non-empty map of msgpack; no pickle, zip or safetensors file does."""
    with open(path, "rb") as file:
        first = file.read(1)
    return first != b"" and (0x81 <= first[0] <= 0x8F or first[0] in (0xDE, 0xDF))


def read_msgpack(path: str) -> Any:
    """Read a checkpoint that flax wrote."""
    try:
        serialization = importlib.import_module("flax.serialization")
    except ImportError as error:
        raise ImportError(f"reading {path} needs flax: pip install flax (or save the parameters as .npz)") from error
    with open(path, "rb") as file:
        return serialization.msgpack_restore(file.read())

"""Checkpoint files and folders: read without running anything in them, or named for what they are instead."""

from __future__ import annotations

import codecs
import json
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor

from vidattn.messages import describe, shorten
from vidattn.models.flax_trees import find_arrays, is_msgpack, read_msgpack, read_npz

_INDEX = ".index.json"
# In the order in which Hugging Face looks for them.
_IN_FOLDERS = ("model.safetensors", f"model.safetensors{_INDEX}", "pytorch_model.bin", f"pytorch_model.bin{_INDEX}")
_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt", ".pyth", ".ckpt", ".npz", ".msgpack")
_LARGEST_HEADER = 100_000_000  # of safetensors
# How files start that are no checkpoints, and what they are.
_STARTS = (
    (b"version https://git-lfs", "a pointer of Git LFS, not the file that it stands for: fetch that (git lfs pull)"),
    (b"\x1f\x8b", "a gzip archive: unpack it first (gunzip)"),
    (b"BZh", "a bzip2 archive: unpack it first"),
    (b"\xfd7zXZ\0", "an xz archive: unpack it first"),
    (b"\x28\xb5\x2f\xfd", "a zstandard archive: unpack it first"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive: unpack it first"),
    (b"Rar!", "a RAR archive: unpack it first"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file, as Keras writes them"),
    (b"GGUF", "a GGUF file"),
    (b"\x93NUMPY", "a single array of NumPy"),
    (b"%PDF", "a PDF document"),
)


def read_checkpoint(path: str) -> tuple[Any, dict[str, Any] | None]:
    """Read a file, an index of files, or a folder of Hugging Face.

    Args:
        path: a file of PyTorch, safetensors, NumPy (.npz) or flax (msgpack); an index of the shards beside it; a folder
            with one of them.

    Returns:
        What it holds, and the ``config.json`` of the folder, if that was named or the file has Hugging Face's name.

    Raises:
        FileNotFoundError: there is nothing, or no weights in the folder.
        ValueError: it is something else; the message says what.
    """
    given = path
    if os.path.isdir(path):
        path = _find_weights(path)
    elif not os.path.isfile(path):
        raise FileNotFoundError(
            f"load_checkpoint: path_or_state: expected a file or a folder, checkpoint not found: {shorten(path, 300)}"
        )
    config = os.path.join(os.path.dirname(path), "config.json")
    has_config = (path != given or os.path.basename(path) in _IN_FOLDERS) and os.path.isfile(config)
    return _read_file(path), _read_json(config) if has_config else None


def _refuse(path: str, got: str) -> NoReturn:
    raise ValueError(f"load_checkpoint: {path}: expected weights, got {got}")


def _find_weights(folder: str) -> str:
    names = sorted(os.listdir(folder))
    found = next((name for name in _IN_FOLDERS if name in names), None)
    if found is None:
        files = [name for name in names if name.endswith(_SUFFIXES)]
        if len(files) != 1:
            held = f"several files, name one: {', '.join(files[:6])}" if files else ", ".join(names[:6]) or "nothing"
            raise FileNotFoundError(
                f"load_checkpoint: {folder}: expected a folder with {' or '.join(_IN_FOLDERS)}, checkpoint not found: "
                f"it holds {shorten(held, 200)}"
            )
        found = files[0]
    return os.path.join(folder, found)


def _read_json(path: str) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"load_checkpoint: {path}: expected JSON, got {_start_of(path)} ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"load_checkpoint: {path}: expected a JSON object, got {describe(content)}")
    return content


def _read_file(path: str) -> Any:
    size = os.path.getsize(path)
    if size == 0:
        _refuse(path, "an empty file")
    with open(path, "rb") as file:
        start = file.read(1024)
    known = next((what for magic, what in _STARTS if start.startswith(magic)), None)
    if known is not None:
        _refuse(path, known)
    if start[257:262] == b"ustar":
        _refuse(path, "a tar archive: unpack it first")
    text = _as_text(start)
    if text is not None:
        return _read_text(path, text)
    length = int.from_bytes(start[:8], "little")  # of the header of a safetensors file
    if start[8:9] == b"{" and 0 < length <= _LARGEST_HEADER:
        return _read_safetensors(path, length, size)
    if start.startswith(b"PK"):
        return _read_zip(path)
    if is_msgpack(path):
        return _guarded(path, read_msgpack)
    return _read_torch(path)


def _as_text(start: bytes) -> str | None:
    try:
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(start)  # may end within a character
    except UnicodeDecodeError:
        return None
    return text if text and all(character.isprintable() or character in "\t\n\f\r" for character in text) else None


def _read_text(path: str, text: str) -> Any:
    """Read an index of shards; name every other text."""
    start = text.lstrip().lower()
    if start.startswith(("{", "[")):
        try:
            with open(path, encoding="utf-8-sig") as file:
                content = json.load(file)
        except (ValueError, RecursionError):
            content = None
        if isinstance(content, dict) and "weight_map" in content:
            return _read_shards(path, content["weight_map"])
    _refuse(path, _name_text(text))


def _name_text(text: str) -> str:
    start = text.lstrip().lower()
    if start.startswith("<") and ("<html" in start or "<!doctype html" in start):
        title = re.search(r"<title[^>]*>\s*(.*?)\s*</title>", text, re.DOTALL | re.IGNORECASE)
        return "an HTML page" + (f" with the title {shorten(title[1])!r}" if title else f": {shorten(text.strip())}")
    if start.startswith("<"):
        return f"an XML document: {shorten(' '.join(text.split()), 200)}"
    if start.startswith(("{", "[")):
        return f"a JSON document that is no index of shards: {shorten(' '.join(text.split()), 200)}"
    return f"a text: {shorten(text.strip())!r}"


def _start_of(path: str) -> str:
    """Name a file that should have been JSON."""
    with open(path, "rb") as file:
        start = file.read(1024)
    known = next((what for magic, what in _STARTS if start.startswith(magic)), None)
    text = _as_text(start)
    return known or (_name_text(text) if text else "an empty file" if not start else "a file that is no text")


def _read_shards(path: str, weight_map: Any) -> dict[str, Any]:
    """Read the files that an index names, which lie beside it."""
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise ValueError(
            f"load_checkpoint: {path}: expected a weight_map of names to files, got {describe(weight_map)}"
        )
    state: dict[str, Any] = {}
    for file in sorted(set(weight_map.values())):
        if os.path.basename(file) != file or file in ("", ".", ".."):
            raise ValueError(f"load_checkpoint: {path}: expected names of files beside it, got {shorten(file)!r}")
        shard_path = os.path.join(os.path.dirname(path), file)
        if not os.path.isfile(shard_path):
            raise FileNotFoundError(
                f"load_checkpoint: {path}: expected all its shards, checkpoint not found: {shard_path}"
            )
        shard = _read_file(shard_path)
        expected = {name for name, holder in weight_map.items() if holder == file}
        held = set(shard) if isinstance(shard, Mapping) else set()
        if held != expected:
            lacks, more = (
                ", ".join(map(str, sorted(map(str, names))[:4])) for names in (expected - held, held - expected)
            )
            raise ValueError(
                f"load_checkpoint: {shard_path}: expected the tensors that {os.path.basename(path)} says, "
                f"got a file that lacks {lacks or 'none'} and has {more or 'none'} besides"
            )
        state.update(shard)
    return state


def _read_safetensors(path: str, length: int, size: int) -> dict[str, Tensor]:
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise ImportError(f"reading {path} needs safetensors: pip install safetensors") from error
    needed = 8 + length
    if needed <= size:
        try:
            with open(path, "rb") as file:
                file.seek(8)
                entries = json.loads(file.read(length))
            needed += max(
                (entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"), default=0
            )
        except Exception:
            pass  # safetensors says what is wrong with its header
    if needed > size:
        _refuse(path, f"a safetensors file that is cut short: {size} of {needed} bytes")
    return _guarded(path, load_file)


def _read_zip(path: str) -> Any:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError):
        size = os.path.getsize(path)
        _refuse(
            path,
            f"a zip archive, as PyTorch writes them, that is cut short or damaged: its end is not in its {size} bytes",
        )
    if names and all(name.endswith(".npy") for name in names):
        return _guarded(path, read_npz)
    if not any(name.endswith("data.pkl") for name in names):
        held = shorten(", ".join(names[:6]), 200) or "nothing"
        _refuse(path, f"a zip archive that is no checkpoint, it holds {held}: unpack it first")
    if any(name.endswith("constants.pkl") for name in names):
        _refuse(
            path, "a TorchScript program, which is code: save the state_dict of the module that torch.jit.load gives"
        )
    return _read_torch(path)


def _read_torch(path: str) -> Any:
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(_numpy_arrays()):
            warnings.filterwarnings("ignore", message="Detected pickle protocol")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError as error:
        raise _too_large(path, error) from error
    except Exception as error:
        refused = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if refused is None:
            raise _unreadable(path, error) from error
        raise ValueError(
            f"load_checkpoint: {path}: expected tensors alone, but it holds Python objects besides tensors "
            f"({refused[1]}), which could run code and are not loaded: where you trust the file, save its state dict "
            "alone (torch.save(checkpoint['state_dict'], new_path))"
        ) from error
    if isinstance(content, Mapping):
        _check_sizes(path, content)
    return content


def _check_sizes(path: str, content: Mapping[Any, Any]) -> None:
    """Refuse tensors that are larger than the file, before anything copies one: PyTorch believes what a file says."""
    size = os.path.getsize(path)
    for name, value in find_arrays(content):
        if getattr(value, "is_meta", False):  # which the model will be asked about
            continue
        found = value.numel() * value.element_size() if isinstance(value, Tensor) else getattr(value, "nbytes", 0)
        if found > size:
            _refuse(path, f"a file of {size} bytes with {shorten(name)}, which would be {found}: it may be damaged")


def _numpy_arrays() -> list[Any]:
    """List what a pickled array of NumPy is made of; nothing of it can run code."""
    try:
        import numpy
    except ImportError:
        return []
    array = numpy.zeros(1)
    reconstruct, scalar = array.__reduce__()[0], numpy.float64(0).__reduce__()[0]
    # Files name these functions by the module that they are in, which NumPy 2 has renamed.
    functions = [
        (function, f"numpy.{core}.multiarray.{name}")
        for core in ("core", "_core")
        for function, name in ((reconstruct, "_reconstruct"), (scalar, "scalar"))
    ]
    return [*functions, numpy.ndarray, numpy.dtype, *{type(numpy.dtype(code)) for code in "?bhilqBHILQefd"}]


def _guarded(path: str, reader: Any) -> Any:
    try:
        return reader(path)
    except ImportError:
        raise
    except MemoryError as error:
        raise _too_large(path, error) from error
    except Exception as error:
        raise _unreadable(path, error) from error


def _too_large(path: str, error: MemoryError) -> MemoryError:
    size = os.path.getsize(path)
    return MemoryError(f"load_checkpoint: {path}: expected what fits in memory, got a file of {size} bytes ({error})")


def _unreadable(path: str, error: Exception) -> ValueError:
    # The text of an unpickling error is a page about trusting files, which is not the matter here.
    text = "" if isinstance(error, pickle.UnpicklingError) else str(error).strip()
    reason = f": {shorten(text.splitlines()[0], 300)}" if text else ""
    return ValueError(
        f"load_checkpoint: {path}: expected weights, but it cannot be read as a PyTorch or safetensors file, it may be "
        f"damaged ({type(error).__name__}{reason})"
    )

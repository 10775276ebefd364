"""Checkpoints as they lie about: in pieces, in folders, cut short, or something else under the name of one."""

from __future__ import annotations

import bz2
import doctest
import gzip
import io
import json
import lzma
import re
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import save_file
from test_checkpoint import State, assert_same_weights, tiny

from vidattn.models import create_model, flax_trees, load_checkpoint
from vidattn.models.timesformer_checkpoint import revert_state_dict as revert_timesformer
from vidattn.models.vivit_checkpoint import revert_state_dict as revert_vivit


def zip_of(**files: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def tar_of(name: str, content: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        entry = tarfile.TarInfo(name)
        entry.size = len(content)
        archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def saved(content: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:abcdef\nsize 112233\n"
FILES = {
    "empty": (b"", "an empty file"),
    "pointer": (POINTER, r"a pointer of Git LFS.* \(git lfs pull\)"),
    "page": (b"\n<!DOCTYPE html>\n<html><head><title>Sign in</title>", "an HTML page with the title 'Sign in'"),
    "small page": (b"<HTML>404 not found</HTML>\n", "an HTML page: <HTML>404 not found</HTML>"),
    "xml": (b'<?xml version="1.0"?>\n<Error><Code>AccessDenied</Code></Error>', "an XML document: .*AccessDenied"),
    "json": (b'{"error":\n "Repository not found"}', 'a JSON document that is no index of shards: .*"Repository not'),
    "text": (b"Not found\n" * 1000, "a text: 'Not found...'"),
    "gzip": (gzip.compress(b"x"), "a gzip archive: unpack it first"),
    "bzip2": (bz2.compress(b"x"), "a bzip2 archive"),
    "xz": (lzma.compress(b"x"), "an xz archive"),
    "tar": (tar_of("weights.pth", b"x"), "a tar archive"),
    "zip": (zip_of(**{"weights.pth": b"x", "a.txt": b""}), r"a zip archive that is no checkpoint, it holds weights\."),
    "script": (zip_of(**{"m/data.pkl": b"", "m/constants.pkl": b"", "m/code/m.py": b""}), "a TorchScript program"),
    "keras": (b"\x89HDF\r\n\x1a\n\0\0", "an HDF5 file"),
    "array": (b"\x93NUMPY\x01\0", "a single array of NumPy"),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_what_is_no_checkpoint_is_named(name: str, tmp_path: Path) -> None:
    content, expected = FILES[name]
    for suffix in (".pth", ".safetensors", ".npz"):
        file = tmp_path / f"weights{suffix}"
        file.write_bytes(content)
        with pytest.raises(
            ValueError, match=f"load_checkpoint: {re.escape(str(file))}: expected weights, got {expected}"
        ) as caught:
            load_checkpoint(tiny(), file)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_interrupted_downloads_and_damaged_files(tmp_path: Path) -> None:
    state = tiny().state_dict()
    save_file(state, tmp_path / "whole.safetensors")
    tensors = (tmp_path / "whole.safetensors").read_bytes()
    whole, old = saved(state), saved(state, _use_new_zipfile_serialization=False)
    noise = torch.randint(256, (5000,), generator=torch.Generator().manual_seed(0), dtype=torch.uint8).numpy().tobytes()
    damaged = bytearray(whole)
    start = whole.index(b"data.pkl")
    damaged[start + 30 : start + 200] = bytes(170)
    cases = {
        "half.pth": (
            whole[: len(whole) // 2],
            "a zip archive, as PyTorch writes them, that is cut short or damaged",
        ),
        "almost.pth": (whole[:-10], "cut short or damaged"),
        "half.safetensors": (tensors[: len(tensors) // 2], r"a safetensors file that is cut short: \d+ of \d+ bytes"),
        "almost.safetensors": (tensors[:-1], rf"cut short: {len(tensors) - 1} of {len(tensors)} bytes"),
        "start.safetensors": (tensors[:100], "a safetensors file that is cut short: 100 of"),
        "header.safetensors": (tensors[:8] + b"{" + noise * 10, "it may be damaged"),
        "noise.pth": (noise, "cannot be read as a PyTorch or safetensors file, it may be damaged"),
        "old.pth": (old[: len(old) // 2], "cannot be read as a PyTorch or safetensors file, it may be damaged"),
        "zeroed.pth": (bytes(damaged), "it may be damaged"),
        "zeros.pth": (bytes(4096), "it may be damaged"),
    }
    for name, (content, expected) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"load_checkpoint: .*{name}: expected weights,.* {expected}") as caught:
            load_checkpoint(tiny(), tmp_path / name)
        assert "\n" not in str(caught.value), name
    with pytest.raises(FileNotFoundError, match=r"checkpoint not found: .*missing"):
        load_checkpoint(tiny(), tmp_path / "missing.pth")


class Reduced:
    """Unpickles to what a function returns."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.reduced = function, args

    def __reduce__(self) -> tuple[Any, ...]:
        return self.reduced


def test_files_that_lie_about_what_they_hold(tmp_path: Path) -> None:
    state = tiny().state_dict()
    name = "backbone.patch_embed.proj.weight"
    itself: dict[str, Any] = {"state_dict": state}
    itself["itself"] = itself
    doubled: dict[str, Any] = {"x": 1}
    for _ in range(40):
        doubled = {"a": doubled, "b": doubled}
    new_array = numpy.zeros(1).__reduce__()[0]
    cases = {
        "petabytes": (
            {**state, name: torch.zeros(1).expand(2**48)},
            f"a file of .* with {name}, which would be {2**50}",
        ),
        "array": (
            {**state, name: Reduced(new_array, numpy.ndarray, (2**20,), b"d")},
            f"with {name}, which would be 8388608",
        ),
        "itself": (itself, "expected a state dict, got more than 64 mappings within each other"),
        "doubled": (doubled, "expected a state dict, got more than 1000000 entries"),
        "scalar": ({**state, name: torch.zeros(())}, "got tensors of other shapes|differ in 1 shapes"),
        "table": (
            {
                **state,
                "backbone.layers.0.blocks.0.attn.relative_position_index": torch.zeros(2**20, 1, dtype=torch.int8),
            },
            "load_checkpoint: path_or_state: .* is not the numbering of Video Swin",
        ),
    }
    for case, (content, expected) in cases.items():
        (tmp_path / case).write_bytes(saved(content))
        model = tiny()
        with pytest.raises(ValueError, match=expected) as caught:
            load_checkpoint(model, tmp_path / case)
        assert str(caught.value).startswith("load_checkpoint: ") and "\n" not in str(caught.value)
        assert_same_weights(model, state)
    (tmp_path / "huge").write_bytes(saved({**state, name: Reduced(new_array, numpy.ndarray, (2**59,), b"d")}))
    with pytest.raises(
        MemoryError, match=r"load_checkpoint: .*huge: expected what fits in memory, got a file of \d+ byt"
    ):
        load_checkpoint(tiny(), tmp_path / "huge")


@pytest.mark.parametrize("form", ["zip", "old", "npz"])
def test_arrays_of_numpy_in_files(form: str, tmp_path: Path) -> None:
    source, model = tiny(seed=1), tiny()
    arrays = {name: tensor.numpy() for name, tensor in source.state_dict().items()}
    if form == "npz":
        numpy.savez(tmp_path / "weights", **arrays)
        (tmp_path / "weights.npz").rename(tmp_path / "weights")
    else:
        content = {"state_dict": arrays, "best": numpy.float64(3.5), "epoch": numpy.int64(3)}
        (tmp_path / "weights").write_bytes(saved(content, _use_new_zipfile_serialization=form == "zip"))
    load_checkpoint(model, tmp_path / "weights")
    assert_same_weights(model, source.state_dict())


def test_examples() -> None:
    assert doctest.testmod(flax_trees).failed == 0


# Shards and folders


def write_shards(folder: Path, state: State, kind: str = "model.safetensors") -> Path:
    """Write two shards and their index, as Hugging Face names them."""
    stem, suffix = kind.split(".")
    weight_map = {}
    for place in range(2):
        shard = dict(list(state.items())[place::2])
        name = f"{stem}-0000{place + 1}-of-00002.{suffix}"
        save_file(shard, folder / name) if suffix == "safetensors" else torch.save(shard, folder / name)
        weight_map |= dict.fromkeys(shard, name)
    index = folder / f"{kind}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return index


@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin"])
def test_shards(kind: str, tmp_path: Path) -> None:
    source = tiny(seed=1)
    index = write_shards(tmp_path, source.state_dict(), kind)
    for path in (index, tmp_path):
        model = tiny()
        load_checkpoint(model, path)
        assert_same_weights(model, source.state_dict())


def test_shards_that_are_no_set_are_named(tmp_path: Path) -> None:
    source = tiny(seed=1).state_dict()
    index = write_shards(tmp_path, source)
    first, second = sorted(tmp_path.glob("*.safetensors"))
    whole = second.read_bytes()
    names = list(source)
    save_file({name: source[name] for name in [*names[3::2], names[0]]}, second)
    with pytest.raises(
        ValueError,
        match=re.escape(
            f"{second}: expected the tensors that {index.name} says, got a file that lacks {names[1]} "
            f"and has {names[0]} besides"
        ),
    ):
        load_checkpoint(tiny(), tmp_path)
    second.write_bytes(POINTER)
    with pytest.raises(ValueError, match=f"{re.escape(str(second))}: expected weights, got a pointer of Git LFS"):
        load_checkpoint(tiny(), tmp_path)
    second.unlink()
    with pytest.raises(FileNotFoundError, match=f"expected all its shards, checkpoint not found: .*{second.name}"):
        load_checkpoint(tiny(), tmp_path)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / second.name).write_bytes(whole)
    index.write_text(index.read_text().replace(second.name, f"sub/{second.name}"))
    with pytest.raises(ValueError, match="expected names of files beside it, got 'sub/model-00002"):
        load_checkpoint(tiny(), index)
    index.write_text('{"weight_map": [1, 2]}')
    with pytest.raises(ValueError, match=r"expected a weight_map of names to files, got \[1, 2\]"):
        load_checkpoint(tiny(), index)
    with pytest.raises(ValueError, match="does not fit: it lacks"):
        load_checkpoint(tiny(), first)


def test_folders_without_weights(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"expected a folder with model\.safetensors or .* it holds nothing"):
        load_checkpoint(tiny(), tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"checkpoint not found: it holds config\.json"):
        load_checkpoint(tiny(), tmp_path)
    source, model = tiny(seed=1), tiny()
    torch.save(source.state_dict(), tmp_path / "epoch_30.pth")
    load_checkpoint(model, tmp_path)  # the only one
    assert_same_weights(model, source.state_dict())
    torch.save(source.state_dict(), tmp_path / "epoch_29.pth")
    with pytest.raises(FileNotFoundError, match=r"several files, name one: epoch_29\.pth, epoch_30\.pth"):
        load_checkpoint(tiny(), tmp_path)


VIVIT = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "mlp_dim": 24, "num_classes": 5, "image_size": (16, 24)}
VIVIT |= {"patches": (8, 8, 2), "num_frames": 6}
VIVIT_CONFIG = {
    "model_type": "vivit", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "hidden_act": "gelu_fast", "layer_norm_eps": 1e-6, "tubelet_size": [2, 8, 8], "image_size": [16, 24],
    "num_frames": 6,
}  # fmt: skip
TIMESFORMER = {"embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 5, "img_size": 16, "patch_size": 8}
TIMESFORMER |= {"num_frames": 4}
TIMESFORMER_CONFIG = {
    "model_type": "timesformer", "hidden_size": 16, "num_attention_heads": 2, "hidden_act": "gelu", "patch_size": 8,
    "layer_norm_eps": 1e-6, "image_size": 16, "num_frames": 4, "attention_type": "divided_space_time",
}  # fmt: skip


def folder_of(path: Path, state: State, config: dict[str, Any]) -> Path:
    path.mkdir(exist_ok=True)
    save_file({name: tensor.contiguous().clone() for name, tensor in state.items()}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize(
    "differing",
    [
        {"num_attention_heads": 4},
        {"layer_norm_eps": 1e-12},
        {"hidden_act": "gelu"},
        {"tubelet_size": [2, 16, 4]},
        {"num_frames": 7},
        {"image_size": 20},
        {"hidden_act": {"name": "gelu"}, "num_attention_heads": 8},
    ],
    ids=str,
)
def test_a_folder_of_vivit_must_agree_with_the_model(differing: dict[str, Any], tmp_path: Path) -> None:
    source, model = (create_model("vivit_b_joint", **VIVIT) for _ in range(2))
    torch.nn.init.normal_(source.head.weight)
    folder = folder_of(tmp_path, revert_vivit(source.state_dict(), "transformers-hub", num_heads=2), VIVIT_CONFIG)
    for path in (folder, folder / "model.safetensors"):
        assert load_checkpoint(model, path).converted_from == "transformers-hub"
        assert_same_weights(model, source.state_dict())
    (folder / "config.json").write_text(json.dumps({**VIVIT_CONFIG, **differing}))
    names = ".*".join(name for name in VIVIT_CONFIG if name in differing) if len(differing) == 1 else "hidden_act"
    with pytest.raises(
        ValueError, match=rf"expected a config\.json that agrees with this ViViT, got .*{names}=.* \(the model: "
    ):
        load_checkpoint(model, folder)
    sizes = {"num_frames", "image_size"}  # the shapes of tables tell those
    if not differing.keys() <= sizes:
        with pytest.raises(ValueError, match=names):
            load_checkpoint(model, folder, strict=False)


def test_the_epsilon_of_a_configuration(tmp_path: Path) -> None:
    config = {**VIVIT_CONFIG, "layer_norm_eps": 1e-12}
    source = create_model("vivit_b_joint", **VIVIT, layer_norm_eps=1e-12)
    folder = folder_of(tmp_path, revert_vivit(source.state_dict(), "transformers", num_heads=2), config)
    load_checkpoint(create_model("vivit_b_joint", **VIVIT, layer_norm_eps=1e-12), folder)
    with pytest.raises(ValueError, match=r"layer_norm_eps=1e-12 \(the model: 1e-06\)"):
        load_checkpoint(create_model("vivit_b_joint", **VIVIT), folder)


@pytest.mark.parametrize(
    "differing",
    [
        {"num_attention_heads": 4},
        {"layer_norm_eps": 1e-5},
        {"hidden_act": "gelu_new"},
        {"attention_type": "joint_space_time"},
        {"patch_size": 4},
        {"num_frames": 8},
    ],
    ids=str,
)
def test_a_folder_of_timesformer_must_agree_with_the_model(differing: dict[str, Any], tmp_path: Path) -> None:
    source, model = (create_model("timesformer_base", **TIMESFORMER) for _ in range(2))
    state = revert_timesformer(source.state_dict(), "huggingface")
    folder = folder_of(tmp_path, state, TIMESFORMER_CONFIG)
    assert load_checkpoint(model, folder).converted_from == "huggingface"
    assert_same_weights(model, source.state_dict())
    (name,) = differing
    folder_of(tmp_path, state, {**TIMESFORMER_CONFIG, **differing})
    with pytest.raises(ValueError, match=rf"agrees with this TimeSformer, got {name}="):
        load_checkpoint(model, folder)


def test_configurations_of_others_are_no_matter(tmp_path: Path) -> None:
    source, model = tiny(seed=1), tiny()
    folder = folder_of(tmp_path, source.state_dict(), {"architecture": "swin_tiny", "num_attention_heads": 99})
    load_checkpoint(model, folder)
    assert_same_weights(model, source.state_dict())
    for content, got in (("<html>", "an HTML page"), ("{", "a JSON document"), ("", "an empty file")):
        (folder / "config.json").write_text(content)
        with pytest.raises(ValueError, match=rf"config\.json: expected JSON, got {got}"):
            load_checkpoint(model, folder)
    (folder / "config.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match=r"config\.json: expected a JSON object, got \[1, 2\]"):
        load_checkpoint(model, folder)

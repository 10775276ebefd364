"""Reads damaged and malicious files one after the other, in a process of limited memory that ends if one takes long.

``python tests/fuzz_files.py videos 0 50 FOLDER`` reads the first 50 and leaves the last one in the folder. The same
number is the same file, so ``videos 17 1 FOLDER`` reads number 17 alone. Each is bytes of a whole file flipped, zeroed,
cut, doubled or mixed with another's; checkpoints are also written with code or lies in them.
"""

from __future__ import annotations

import collections
import io
import json
import os
import pickle
import random
import resource
import signal
import struct
import sys
import time
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor
from torch._utils import _rebuild_parameter, _rebuild_tensor_v2
from video_files import numbered_frames, write_video

from vidattn.models import create_model, load_checkpoint
from vidattn.video import VideoError, load_views

SECONDS = 20  # after which a file ends the process
MEGABYTES = 600  # of address space that reading one may take
LIES = (0, 1, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**50, 2**62, 2**63 - 1, 2**63, 2**64 - 1)


# ---- Bytes ----


def damaged(rng: random.Random, whole: list[bytes]) -> bytes:
    """Damage one of some files in one to three ways."""
    data = bytearray(rng.choice(whole))
    for _ in range(rng.randint(1, 3)):
        # Headers are at the ends of a file, and matter most.
        last = rng.choice((64, 1024, len(data)))
        place = rng.choice((rng.randrange(min(last, len(data))), len(data) - 1 - rng.randrange(min(last, len(data)))))
        length = min(int(2 ** rng.uniform(0, 14)), len(data) - place)
        other = rng.choice(whole)
        start = rng.randrange(len(other))
        kind = rng.randrange(7)
        if kind == 0:
            for _ in range(rng.choice((1, 3, 30))):
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[place : place + length] = bytes(length)
        elif kind == 2:
            data[place : place + length] = rng.randbytes(length)
        elif kind == 3:
            del data[place : place + length if rng.random() < 0.5 else len(data)]
        elif kind == 4:
            data[place:place] = data[place : place + length]
        elif kind == 5:
            data[place : place + length] = other[start : start + length]
        else:
            number = rng.choice(LIES)
            size = 8 if number >= 2**32 else 4
            data[place : place + size] = number.to_bytes(size, rng.choice(("little", "big")))
        data = data or bytearray(1)
    return bytes(data)


# ---- Videos ----

FORMATS = {
    "mkv": ("ffv1", "bgr0"),
    "mp4": ("libx264", "yuv420p"),
    "mov": ("mjpeg", "yuvj420p"),
    "webm": ("libvpx-vp9", "yuv420p"),
    "avi": ("mpeg4", "yuv420p"),
}
SPEC = SimpleNamespace(
    num_frames=4, frame_stride=2, sampling="dense", short_side=20, crop=20, mean=(0.0,) * 3, std=(1.0,) * 3
)


def whole_videos(folder: Path) -> list[bytes]:
    """Write a small video in each format."""
    found = []
    for suffix, (codec, pixel_format) in FORMATS.items():
        path = write_video(
            folder / f"whole.{suffix}", numbered_frames(12, 32, 48), codec=codec, pixel_format=pixel_format
        )
        found.append(path.read_bytes())
        path.unlink()
    return found


def read_video(path: Path) -> None:
    views = load_views(path, SPEC)  # type: ignore[arg-type]
    batch = views.stack()
    assert batch.shape == (1, 3, 4, 20, 20) and batch.isfinite().all() and batch.min() >= 0 and batch.max() <= 255


# ---- Checkpoints ----


class Reduced:
    """Unpickles to what a function returns."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.reduced = function, args

    def __reduce__(self) -> tuple[Any, ...]:
        return self.reduced


def attack(rng: random.Random, marker: str) -> Reduced:
    """Make what would leave a file or a folder if it were run."""
    code = f"open({marker!r}, 'w').close()"
    return rng.choice(
        (
            Reduced(os.mkdir, marker),
            Reduced(os.system, f"touch {marker}"),
            Reduced(exec, code),
            Reduced(eval, code),
            Reduced(open, marker, "w"),
            Reduced(getattr, Reduced(__import__, "os"), "mkdir"),
            Reduced(np.save, marker, 0),
            Reduced(torch.save, 0, marker),
            Reduced(torch.hub.download_url_to_file, f"file://{__file__}", marker),
            Reduced(Path(marker).touch),
        )
    )


def lie(rng: random.Random) -> Any:
    """Make what unpickles to a tensor, or an array, of a size or with an offset that its memory does not have."""
    storage = torch.zeros(4).untyped_storage()
    typed = torch.storage.TypedStorage(wrap_storage=storage, dtype=torch.float32, _internal=True)
    size, step = rng.choice(LIES[:-2]), rng.choice((0, 1, -1, 2**40))
    tensor = Reduced(
        _rebuild_tensor_v2, typed, rng.choice((0, -1, 2**50)), (size, 3), (step, 1), False, collections.OrderedDict()
    )
    parameter = Reduced(_rebuild_parameter, tensor, True, collections.OrderedDict())
    reconstruct = np.zeros(1).__reduce__()[0]
    return rng.choice(
        (
            tensor,
            parameter,
            Reduced(reconstruct, np.ndarray, (size,), b"d"),  # type: ignore[arg-type]
            Reduced(np.ndarray, (size, 4)),
            Reduced(np.dtype, f"V{size}"),
            Reduced(collections.OrderedDict, [(name, size) for name in "ab"]),
        )
    )


def deep(rng: random.Random) -> dict[str, Any]:
    """Make mappings within mappings, thousands of them or one in itself."""
    inner: dict[str, Any] = {"kernel": torch.zeros(1)}
    content: dict[str, Any] = inner
    for _ in range(rng.choice((3, 50, 5000))):
        content = {rng.choice(("a", "state_dict", "model")): content}
    if rng.random() < 0.3:
        inner["again"] = content
    return content


MISSHAPES: tuple[Callable[[Tensor], Tensor], ...] = (
    Tensor.flatten,
    lambda x: x[None],
    Tensor.sum,
    lambda x: x.reshape(-1)[:0],
    Tensor.double,
    Tensor.bool,
    lambda x: x.to(torch.complex64),
    lambda x: x.long() * 2**40,
    Tensor.to_sparse,
    lambda x: x.to("meta"),
    lambda x: torch.zeros(2_000_000, 1, dtype=torch.int8),
    lambda x: torch.stack([x, x]),
    lambda x: x.transpose(0, -1) if x.ndim else x,
)


def misshapen(rng: random.Random, state: dict[str, Tensor]) -> dict[str, Any]:
    """Give a state dict some of whose tensors are of another shape, dtype, kind or device, or have gone."""
    state = dict(state)
    for _ in range(rng.choice((1, 3))):
        name = rng.choice(list(state))
        x = state[name]
        if x.layout == torch.strided and not x.is_meta:
            state[name] = rng.choice(MISSHAPES)(x)
        if rng.random() < 0.3:
            del state[rng.choice(list(state))]
    return state


def saved(rng: random.Random, content: Any) -> bytes:
    """Write something as PyTorch does, today or before 2020, or as a bare pickle."""
    kind, buffer = rng.randrange(3), io.BytesIO()
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(100_000)
    try:
        if kind == 2:
            return pickle.dumps(content, protocol=rng.randint(0, 5))
        torch.save(content, buffer, _use_new_zipfile_serialization=kind == 0)
    finally:
        sys.setrecursionlimit(limit)
    return buffer.getvalue()


def rezipped(rng: random.Random, data: bytes, replaced: bytes) -> bytes:
    """Write a zip file again with members left out, doubled, shortened, or with another pickle in place of its own."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w") as new, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names that come twice
        for name in old.namelist():
            content, fate = old.read(name), rng.randrange(40)
            if name.endswith("data.pkl") and rng.random() < 0.3:
                content = replaced
            elif fate == 0:
                continue
            elif fate == 1:
                content = content[: rng.randrange(len(content) + 1)]
            elif fate == 2:
                new.writestr(name, rng.randbytes(16))
            elif fate == 3:
                name = rng.choice(("../" * 9 + "evil", "/evil", name + "/x", "a" * 5000))
            new.writestr(name, content, rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)))
    return buffer.getvalue()


def lying_safetensors(rng: random.Random, state: dict[str, Tensor]) -> bytes:
    """Write a safetensors file whose header says what is not so."""
    data = save(state)
    length = struct.unpack("<Q", data[:8])[0]
    header: dict[str, Any] = json.loads(data[8 : 8 + length])
    for _ in range(rng.choice((1, 1, 5))):
        entry: Any = header[rng.choice(list(header))]
        what = rng.choice(("shape", "data_offsets", "dtype", "gone", "more"))
        if what == "shape":
            entry[what] = [rng.choice(LIES) for _ in range(rng.choice((0, 1, 2, 40)))]
        elif what == "data_offsets":
            entry[what] = rng.choice(([0], [-1, 4], [rng.choice(LIES), rng.choice(LIES)], "0", [[0], [4]], [0.5, 4]))
        elif what == "dtype":
            entry[what] = rng.choice(("F8_E8M0", "C64", "object", 7, None, "F64"))
        elif what == "gone":
            entry.pop(rng.choice(list(entry)), None)
        else:
            entry[rng.choice(("__reduce__", "x"))] = rng.choice(LIES)
    text = json.dumps(header).encode()
    if rng.random() < 0.1:
        text = b"{" + b'"a":{' * rng.choice((10, 100_000))
    said = rng.choice((len(text),) * 8 + LIES)
    return struct.pack("<Q", said) + text + data[8 + length :]


def lying_npz(rng: random.Random, state: dict[str, Tensor]) -> bytes:
    """Write an archive of NumPy with a member whose header says what is not so."""
    buffer = io.BytesIO()
    np.savez(buffer, **{name: x.numpy() for name, x in list(state.items())[:5]})
    shape = rng.choice((f"({rng.choice(LIES)},)", "(-1,)", "()", "(1,) * 9", "__import__('os').mkdir('x')"))
    kind = rng.choice(("<f8", "|O", "<f4", "V9999999999", "<M8[ns]", "x" * 3000))
    header = f"{{'descr': '{kind}', 'fortran_order': {rng.choice((True, False, 3))}, 'shape': {shape}, }}".encode()
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.writestr("more.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(64))
    return buffer.getvalue()


def tiny_model() -> torch.nn.Module:
    return create_model("video_swin_t", num_classes=5, embed_dim=8, depths=(2, 1), num_heads=(1, 2), window_size=2)


def checkpoint(rng: random.Random, state: dict[str, Tensor], marker: str) -> bytes:
    """Make the bytes of a checkpoint that is damaged, malicious or whole."""
    whole = [saved(random.Random(seed), state) for seed in (0, 1, 2, 3)]
    kind = rng.randrange(9)
    if kind == 8:
        return saved(random.Random(kind), misshapen(rng, state))
    if kind < 2:
        npz = io.BytesIO()
        np.savez(npz, **{name: x.numpy() for name, x in state.items()})
        return damaged(rng, [*whole, save(state), npz.getvalue()])
    evil = rng.choice((attack(rng, marker), lie(rng), deep(rng)))
    content = rng.choice(
        (
            {**state, "more": evil},
            {**state, rng.choice(list(state)): evil},
            {"state_dict": evil},
            evil,
            {"state_dict": state, "extra": [evil]},
        )
    )
    if kind < 4:
        return saved(rng, content)
    if kind == 4:
        torch.save(state, zipped := io.BytesIO())
        bare = pickle.dumps({"state_dict": attack(rng, marker)}, protocol=2)
        return rezipped(rng, zipped.getvalue(), bare)
    if kind == 5:
        return damaged(rng, [saved(rng, content)])
    return lying_safetensors(rng, state) if kind == 6 else lying_npz(rng, state)


# ---- The process ----


def main(kind: str, first: int, count: int, folder: Path) -> None:
    """Read files and print how it went, as JSON in the last line."""
    folder.mkdir(parents=True, exist_ok=True)
    path, marker = folder / ("clip" if kind == "videos" else "weights"), folder / "marker"
    if kind == "videos":
        videos = whole_videos(folder)
    else:
        torch.manual_seed(0)
        model = tiny_model()
        state = {name: x.clone() for name, x in model.state_dict().items()}
    refused: collections.Counter[str] = collections.Counter()
    read, longest = 0, 0.0
    limit_memory()
    for number in range(first, first + count):
        print(f"{kind} {number}", flush=True)
        rng = random.Random(f"{kind} {number}")
        path.write_bytes(damaged(rng, videos) if kind == "videos" else checkpoint(rng, state, str(marker)))
        began = time.monotonic()
        signal.alarm(SECONDS)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                read_video(path) if kind == "videos" else load_checkpoint(model, path)
            read += 1
            if kind != "videos":
                model.load_state_dict(state)
        except (ValueError, FileNotFoundError, MemoryError) as error:
            text = str(error)
            named = isinstance(error, VideoError) if kind == "videos" else text.startswith("load_checkpoint: ")
            if not named or "\n" in text or len(text) > 2000:
                raise
            refused[text.replace(str(path), "PATH")[:60]] += 1
            if kind != "videos":
                assert all(same(x, state[name]) for name, x in model.state_dict().items()), "a model half filled"
        signal.alarm(0)
        longest = max(longest, time.monotonic() - began)
        assert set(folder.iterdir()) <= {path}, "something was run"
    print(json.dumps({"read": read, "refused": refused.total(), "kinds": dict(refused), "seconds": longest}))


def same(one: Tensor, other: Tensor) -> bool:
    return one.numpy().tobytes() == other.numpy().tobytes()


def limit_memory() -> None:
    """Let this process have little more than it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEGABYTES * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]).resolve())

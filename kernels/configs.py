"""Launch configurations: a static table per architecture, or what autotuning measured here before.

Autotuning is opt-in (``VIDATTN_AUTOTUNE=1``): the first call of a shape times every candidate, and the best is
remembered on disk (``VIDATTN_CACHE``, by default ``~/.cache/vidattn``).
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import torch
import triton
from torch import Tensor

from vidattn.kernels.launch import INTERPRETED, Launch, is_capturing

__all__ = [
    "Config",
    "Cuts",
    "Entry",
    "Table",
    "architecture",
    "entries",
    "over_all_keys",
    "padded_head_dim",
    "product_precision",
    "table_arch",
    "tuned",
]

Entry = TypeVar("Entry")


class Config(NamedTuple):
    """How a kernel is cut into tiles.

    Attributes:
        block_m: queries of a tile.
        block_n: keys of a tile.
        windows: windows, or other groups, that one program works on.
        num_warps: warps of a program.
        num_stages: stages of the software pipeline of the main loop.
    """

    block_m: int
    block_n: int
    windows: int = 1
    num_warps: int = 4
    num_stages: int = 2


@dataclass(frozen=True)
class Cuts(Generic[Entry]):
    """Entries of a table for heads of up to 32, 64 and 128 channels.

    Attributes:
        lean: of calls without options that take registers: dropout, padding.
        full: of calls with one.
    """

    lean: tuple[Entry, Entry, Entry]
    full: tuple[Entry, Entry, Entry]

    def of(self, block_d: int, *, lean: bool) -> Entry:
        """Give the entry for a head dimension, rounded up to a power of two."""
        return (self.lean if lean else self.full)[0 if block_d <= 32 else 1 if block_d == 64 else 2]


# By architecture, kind of products, and kernel.
Table = dict[tuple[str, str, str], Cuts[Entry]]


def table_arch(arch: str) -> str:
    """Name the architecture whose entries another one takes: gfx942 has none of its own."""
    return "sm_80" if arch == "gfx942" else arch


def entries(table: Table[Entry], kernel: str) -> set[Entry]:
    """Collect what a table has for a kernel, for all architectures.

    Args:
        table: the table.
        kernel: name of the kernel.

    Returns:
        The entries.
    """
    return {entry for (*_, name), cuts in table.items() if name == kernel for entry in (*cuts.lean, *cuts.full)}


def over_all_keys(keys: int, block_d: int, itemsize: int) -> Config:
    """Make a tile of all keys of a row, and as few queries as the registers hold beside its gradients.

    Args:
        keys: their number, rounded up to a power of two.
        block_d: head dimension, rounded up likewise.
        itemsize: bytes of an element of q.

    Returns:
        The configuration; it was found by compiling.
    """
    large = max(keys, block_d) > 64
    return Config(16 if large or itemsize == 4 else keys, keys, num_warps=8 if large else keys // 16, num_stages=1)


def architecture(device: torch.device) -> str:
    """Name the architecture of a device, as in ``TARGETS``.

    Args:
        device: a CUDA or ROCm device, or any other where Triton is interpreted.

    Returns:
        "sm_80", "sm_90", "sm_100", "gfx942" or "interpreter"; a newer device counts as the newest before it.
    """
    if INTERPRETED:
        return "interpreter"
    if torch.version.hip:
        return "gfx942"
    major, _ = torch.cuda.get_device_capability(device)
    return "sm_80" if major < 9 else "sm_90" if major == 9 else "sm_100"


def padded_head_dim(q: Tensor) -> int:
    """Give the channels of a tile's rows: the head dimension, rounded up to what products take."""
    return max(16, triton.next_power_of_2(q.shape[-1]))


def product_precision(q: Tensor) -> str:
    """Say how products of float32 are taken: as torch's own, by ``torch.set_float32_matmul_precision``."""
    if q.dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest":
        return "ieee"
    return "tf32"


def tuned(
    name: str,
    shape: Sequence[Hashable],
    default: Config,
    candidates: Callable[[], Sequence[Config]],
    launch: Callable[[Config], Launch],
    device: torch.device,
) -> Config:
    """Choose a configuration: ``default``, or the fastest candidate where autotuning is on.

    Args:
        name: name of the kernel.
        shape: what the choice may depend on.
        default: entry of the static table.
        candidates: gives what else to try.
        launch: makes the launch with a configuration; launching it must do no harm.
        device: where it runs.

    Returns:
        The configuration.

    Raises:
        RuntimeError: a shape is new while a CUDA graph is being captured.
        Exception: no configuration compiles; what the first one raised.
    """
    if os.environ.get("VIDATTN_AUTOTUNE", "0") != "1" or INTERPRETED or device.type != "cuda":
        return default
    file = _cache_file(torch.cuda.get_device_name(device))
    key = f"{name} {' '.join(map(str, shape))}"
    known = _read(file)
    if key in known:
        return Config(*known[key])
    if is_capturing():
        raise RuntimeError(
            f"{name}: autotuning cannot run while a CUDA graph is being captured; run the model once before"
            " (vidattn.warmup does)"
        )
    found = {config: _seconds(launch(config)) for config in dict.fromkeys([default, *candidates()])}
    times = {config: value for config, value in found.items() if not isinstance(value, Exception)}
    if not times:
        raise next(error for error in found.values() if isinstance(error, Exception))
    best = min(times, key=lambda config: times[config])
    _remember(file, key, best)
    return best


def _seconds(launch: Launch) -> float | Exception:
    """Time a launch; gives the error instead if its kernel does not compile, or takes more than the device has.

    What fails when it runs is no matter of the configuration, and raises.
    """
    try:
        launch.prepare()
    except Exception as error:
        return error
    try:
        return triton.testing.do_bench(launch.run, warmup=10, rep=50, return_mode="min")
    except triton.runtime.errors.OutOfResources as error:  # found out when it is loaded
        return error


@lru_cache
def _cache_file(device_name: str) -> Path:
    root = os.environ.get("VIDATTN_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "vidattn")
    slug = "".join(letter if letter.isalnum() else "-" for letter in device_name.lower())
    return Path(root).expanduser() / f"autotune-{slug}-triton-{triton.__version__}.json"


_known: dict[Path, dict[str, Any]] = {}


def _read(file: Path) -> dict[str, Any]:
    if file not in _known:
        try:
            _known[file] = json.loads(file.read_text())
        except (OSError, ValueError):  # none yet, or one that was cut short: measured again
            _known[file] = {}
    return _known[file]


def _remember(file: Path, key: str, config: Config) -> None:
    known = _read(file)
    known[key] = list(config)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as temporary:
            json.dump(known, temporary, indent=1)
        os.replace(temporary.name, file)  # readers in other processes see the old file or the new one
    except OSError:
        pass  # a read-only home: this process remembers

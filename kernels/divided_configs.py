"""How the divided kernels are cut into tiles, by architecture and shape class.

The table was made by compiling: of the cuts whose registers do not spill, the one with the fewest instructions a score.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import triton

from vidattn.kernels.configs import Config, over_all_keys

__all__ = ["ShapeClass", "candidate_configs", "default_config", "packed_config", "padded_length"]


class ShapeClass(NamedTuple):
    """What the choice of a configuration depends on.

    Attributes:
        arch: architecture, as in ``TARGETS``.
        itemsize: bytes of an element of q.
        tensor_cores: whether products run on them; float32 at full precision does not.
        block_d: head dimension, rounded up to a power of two.
        length: tokens of a sequence, a cls token included.
        dropout: whether there is dropout, which takes registers.
        mixed: whether channels of keys and values come from other sequences, which takes a few more.
        whole: whether the backward pass takes rows of scores as a whole.
    """

    arch: str
    itemsize: int
    tensor_cores: bool
    block_d: int
    length: int
    dropout: bool
    mixed: bool = False
    whole: bool = False

    @property
    def products(self) -> str:
        """Kind of products."""
        return "half" if self.itemsize == 2 else "tf32" if self.tensor_cores else "ieee"


# By (architecture, kind of products) and kernel: entries for heads of up to 32, 64 and 128 channels, each without and
# with dropout, which takes registers. Here the most rows of a tile that holds whole sequences. Tiles are as small as
# the sequence allows: several in a larger one would need more instructions a row, and wait for each other.
_PACKED = {
    ("sm_80", "half"): {
        "divided_forward_packed": "128 128 128 128 64 64",
        "divided_backward_packed": "128 128 64 64 64 64",
    },
    ("sm_90", "half"): {
        "divided_forward_packed": "128 128 128 128 128 128",
        "divided_backward_packed": "128 128 128 128 128 64",
    },
    ("sm_100", "half"): {
        "divided_forward_packed": "128 128 128 128 128 128",
        "divided_backward_packed": "128 128 128 128 128 128",
    },
    ("sm_90", "tf32"): {
        "divided_forward_packed": "128 128 128 128 64 64",
        "divided_backward_packed": "64 64 64 64 32 32",
    },
}
_PACKED["gfx942", "half"] = _PACKED["sm_80", "half"]
# Of longer sequences the cuts. "64x128/8": 64 queries, 128 keys, 8 warps.
_STREAM = {
    ("sm_80", "half"): {
        "divided_forward_stream": "64x128 64x128 64x64 64x64 32x64 32x64",
        "divided_backward_queries": "64x32 64x64 64x64 64x64 32x32 32x32/8",
        "divided_backward_keys": "64x64 32x32 32x32 32x32 64x64/8 32x32",
    },
    ("sm_90", "half"): {
        "divided_forward_stream": "64x128 64x128 64x128 64x128 64x128 64x64",
        "divided_backward_queries": "64x64 64x64 64x64 64x64 64x64 64x32",
        "divided_backward_keys": "64x64 32x64 64x64 32x64 32x32 32x32",
    },
    ("sm_100", "half"): {
        "divided_forward_stream": "64x128 64x32 64x128 64x64 64x64 64x32",
        "divided_backward_queries": "64x64 64x64 64x64 64x64 64x64 64x32",
        "divided_backward_keys": "64x64 64x64 64x64 64x64 64x64 32x32",
    },
    ("sm_90", "tf32"): {
        "divided_forward_stream": "64x128 64x128 64x64 64x64 64x32 32x32",
        "divided_backward_queries": "64x64 64x64 64x32 64x32 32x32 32x32",
        "divided_backward_keys": "64x64 32x64 32x64 32x32 32x32 32x32",
    },
}
_STREAM["gfx942", "half"] = _STREAM["sm_80", "half"]
# Mixed channels have cuts of their own only where those above would spill.
_MIXED = {
    ("sm_80", "half"): {
        "divided_forward_stream": "64x128 64x128 64x64 64x32 32x64 32x64",
        "divided_backward_queries": "64x32 64x64 64x32 64x32 128x32/8 128x32/8",
        "divided_backward_keys": "64x64 32x32 32x32 64x32 64x64/8 64x64/8",
    },
}
# Products of float32 at full precision are multiply-adds, unrolled: larger tiles take minutes to compile.
_SMALL = Config(32, 32)


def packed_config(kernel: str, shape: ShapeClass) -> Config | None:
    """Look up how whole sequences are packed into tiles of ``block_m`` rows; None where they do not fit."""
    interpreted, exact = shape.arch == "interpreter", shape.products == "ieee"
    most = 128 if interpreted else int(_column(_PACKED, kernel, shape) or 16)
    rows = max(64 if interpreted else 16, triton.next_power_of_2(shape.length))
    # Products of float32 at full precision are multiply-adds: fewer rows a warp.
    return Config(rows, rows, num_warps=rows // (8 if exact else 16), num_stages=1) if rows <= most else None


@lru_cache
def default_config(kernel: str, shape: ShapeClass) -> Config:
    """Look up how a kernel that goes through longer sequences tile by tile is cut."""
    if shape.arch == "interpreter":
        full = max(16, min(64, 2 ** (shape.length.bit_length() - 1)))
        config = Config(full, 64) if kernel == "divided_backward_keys" else Config(64, full)
    else:
        entry = (shape.mixed and _column(_MIXED, kernel, shape)) or _column(_STREAM, kernel, shape)
        config = _cut(entry) if entry else _SMALL
    return _fit(kernel, config, shape)


def candidate_configs(kernel: str, shape: ShapeClass) -> list[Config]:
    """List what autotuning tries: every cut of the kernel in the table, and smaller ones."""
    cuts = {_SMALL, Config(64, 32), Config(32, 64)}
    for table in (*_STREAM.values(), *_MIXED.values()):
        cuts.update(map(_cut, table[kernel].split()))
    return sorted({_fit(kernel, config, shape) for config in cuts})


def _column(table: dict[tuple[str, str], dict[str, str]], kernel: str, shape: ShapeClass) -> str:
    """Look up an entry of a table; nothing where there is none."""
    entries = table.get((shape.arch, shape.products), {}).get(kernel, "").split()
    return entries[2 * (max(32, shape.block_d).bit_length() - 6) + shape.dropout] if entries else ""


def _cut(entry: str) -> Config:
    tile, _, warps = entry.partition("/")
    block_m, block_n = map(int, tile.split("x"))
    return Config(block_m, block_n, num_warps=int(warps or 4))


def padded_length(length: int, has_cls: bool, step: int) -> tuple[int, int]:
    """Cut a sequence into full tiles of ``step`` slots, without the cls token, and a shorter tail or 0."""
    full = (length - has_cls) // step
    rest = length - full * step
    return full, max(16, triton.next_power_of_2(rest)) if rest else 0


def _fit(kernel: str, config: Config, shape: ShapeClass) -> Config:
    """Shrink tiles to short sequences, and where wide ones would waste more than they save."""
    length = shape.length
    longest = max(16, triton.next_power_of_2(length))
    if shape.whole and kernel == "divided_backward_keys":
        return over_all_keys(longest, shape.block_d, shape.itemsize)
    block_m, block_n = min(config.block_m, longest), min(config.block_n, longest)
    while block_n > 64:
        wide, narrow = (
            full * step + tail for step in (block_n, block_n // 2) for full, tail in [padded_length(length, True, step)]
        )
        if wide <= 1.05 * narrow:
            break
        block_n //= 2
    num_warps = min(config.num_warps, max(1, block_m * block_n // 512))
    return config._replace(block_m=block_m, block_n=block_n, num_warps=num_warps)

"""How the divided kernels are cut into tiles, by architecture and shape class.

The table was made by compiling: of the cuts whose registers do not spill, the one with the fewest instructions a score.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import triton

from vidattn.kernels.configs import Config, Cuts, Entry, Table, entries, over_all_keys, table_arch

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


# Here the most rows of a tile that holds whole sequences. Tiles are as small as the sequence allows: several in a
# larger one would need more instructions a row, and wait for each other.
_PACKED: Table[int] = {
    ("sm_80", "half", "divided_forward_packed"): Cuts(lean=(128, 128, 64), full=(128, 128, 64)),
    ("sm_80", "half", "divided_backward_packed"): Cuts(lean=(128, 64, 64), full=(128, 64, 64)),
    ("sm_90", "half", "divided_forward_packed"): Cuts(lean=(128, 128, 128), full=(128, 128, 128)),
    ("sm_90", "half", "divided_backward_packed"): Cuts(lean=(128, 128, 128), full=(128, 128, 64)),
    ("sm_100", "half", "divided_forward_packed"): Cuts(lean=(128, 128, 128), full=(128, 128, 128)),
    ("sm_100", "half", "divided_backward_packed"): Cuts(lean=(128, 128, 128), full=(128, 128, 128)),
    ("sm_90", "tf32", "divided_forward_packed"): Cuts(lean=(128, 128, 64), full=(128, 128, 64)),
    ("sm_90", "tf32", "divided_backward_packed"): Cuts(lean=(64, 64, 32), full=(64, 64, 32)),
}
# Of longer sequences the cuts.
_STREAM: Table[Config] = {
    ("sm_80", "half", "divided_forward_stream"): Cuts(
        lean=(Config(64, 128), Config(64, 64), Config(32, 64)),
        full=(Config(64, 128), Config(64, 64), Config(32, 64)),
    ),
    ("sm_80", "half", "divided_backward_queries"): Cuts(
        lean=(Config(64, 32), Config(64, 64), Config(32, 32)),
        full=(Config(64, 64), Config(64, 64), Config(32, 32, num_warps=8)),
    ),
    ("sm_80", "half", "divided_backward_keys"): Cuts(
        lean=(Config(64, 64), Config(32, 32), Config(64, 64, num_warps=8)),
        full=(Config(32, 32), Config(32, 32), Config(32, 32)),
    ),
    ("sm_90", "half", "divided_forward_stream"): Cuts(
        lean=(Config(64, 128), Config(64, 128), Config(64, 128)),
        full=(Config(64, 128), Config(64, 128), Config(64, 64)),
    ),
    ("sm_90", "half", "divided_backward_queries"): Cuts(
        lean=(Config(64, 64), Config(64, 64), Config(64, 64)),
        full=(Config(64, 64), Config(64, 64), Config(64, 32)),
    ),
    ("sm_90", "half", "divided_backward_keys"): Cuts(
        lean=(Config(64, 64), Config(64, 64), Config(32, 32)),
        full=(Config(32, 64), Config(32, 64), Config(32, 32)),
    ),
    ("sm_100", "half", "divided_forward_stream"): Cuts(
        lean=(Config(64, 128), Config(64, 128), Config(64, 64)),
        full=(Config(64, 32), Config(64, 64), Config(64, 32)),
    ),
    ("sm_100", "half", "divided_backward_queries"): Cuts(
        lean=(Config(64, 64), Config(64, 64), Config(64, 64)),
        full=(Config(64, 64), Config(64, 64), Config(64, 32)),
    ),
    ("sm_100", "half", "divided_backward_keys"): Cuts(
        lean=(Config(64, 64), Config(64, 64), Config(64, 64)),
        full=(Config(64, 64), Config(64, 64), Config(32, 32)),
    ),
    ("sm_90", "tf32", "divided_forward_stream"): Cuts(
        lean=(Config(64, 128), Config(64, 64), Config(64, 32)),
        full=(Config(64, 128), Config(64, 64), Config(32, 32)),
    ),
    ("sm_90", "tf32", "divided_backward_queries"): Cuts(
        lean=(Config(64, 64), Config(64, 32), Config(32, 32)),
        full=(Config(64, 64), Config(64, 32), Config(32, 32)),
    ),
    ("sm_90", "tf32", "divided_backward_keys"): Cuts(
        lean=(Config(64, 64), Config(32, 64), Config(32, 32)),
        full=(Config(32, 64), Config(32, 32), Config(32, 32)),
    ),
}
# Mixed channels have cuts of their own only where those above would spill; on gfx942 they do not.
_MIXED: Table[Config] = {
    ("sm_80", "half", "divided_forward_stream"): Cuts(
        lean=(Config(64, 128), Config(64, 64), Config(32, 64)),
        full=(Config(64, 128), Config(64, 32), Config(32, 64)),
    ),
    ("sm_80", "half", "divided_backward_queries"): Cuts(
        lean=(Config(64, 32), Config(64, 32), Config(128, 32, num_warps=8)),
        full=(Config(64, 64), Config(64, 32), Config(128, 32, num_warps=8)),
    ),
    ("sm_80", "half", "divided_backward_keys"): Cuts(
        lean=(Config(64, 64), Config(32, 32), Config(64, 64, num_warps=8)),
        full=(Config(32, 32), Config(64, 32), Config(64, 64, num_warps=8)),
    ),
    ("sm_90", "half", "divided_backward_keys"): Cuts(
        lean=(Config(64, 64), Config(64, 64, num_stages=1), Config(32, 32)),
        full=(Config(32, 64), Config(32, 64), Config(32, 32)),
    ),
}
# Products of float32 at full precision are multiply-adds, unrolled: larger tiles take minutes to compile.
_SMALL = Config(32, 32)


def packed_config(kernel: str, shape: ShapeClass) -> Config | None:
    """Look up how whole sequences are packed into tiles of ``block_m`` rows; None where they do not fit."""
    interpreted, exact = shape.arch == "interpreter", shape.products == "ieee"
    most = 128 if interpreted else _entry(_PACKED, table_arch(shape.arch), kernel, shape) or 16
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
        mixed = _entry(_MIXED, shape.arch, kernel, shape) if shape.mixed else None
        config = mixed or _entry(_STREAM, table_arch(shape.arch), kernel, shape) or _SMALL
    return _fit(kernel, config, shape)


def candidate_configs(kernel: str, shape: ShapeClass) -> list[Config]:
    """List what autotuning tries: every cut of the kernel in the table, and smaller ones."""
    cuts = {_SMALL, Config(64, 32), Config(32, 64), *entries(_STREAM, kernel), *entries(_MIXED, kernel)}
    return sorted({_fit(kernel, config, shape) for config in cuts})


def _entry(table: Table[Entry], arch: str, kernel: str, shape: ShapeClass) -> Entry | None:
    cuts = table.get((arch, shape.products, kernel))
    return None if cuts is None else cuts.of(shape.block_d, lean=not shape.dropout)


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

"""How the window3d kernels are cut into tiles, by architecture and shape class.

The table was made by compiling: of the cuts whose registers do not spill, the one with the fewest instructions a score.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import triton

from vidattn.kernels.configs import Config, Cuts, Table, entries, over_all_keys, table_arch

__all__ = ["ShapeClass", "candidate_configs", "default_config", "padded_length"]


class ShapeClass(NamedTuple):
    """What the choice of a configuration depends on.

    Attributes:
        arch: architecture, as in ``TARGETS``.
        itemsize: bytes of an element of q.
        tensor_cores: whether products run on them; float32 at full precision does not.
        block_d: head dimension, rounded up to a power of two.
        num_tokens: tokens of a window.
        lean: neither padding nor dropout, which take registers.
        whole: whether the backward pass takes rows of scores as a whole.
    """

    arch: str
    itemsize: int
    tensor_cores: bool
    block_d: int
    num_tokens: int
    lean: bool
    whole: bool = False


_TABLE: Table[Config] = {
    ("sm_80", "half", "window3d_forward"): Cuts(
        lean=(Config(64, 64), Config(64, 64), Config(32, 64)),
        full=(Config(64, 32), Config(32, 64), Config(32, 16)),
    ),
    ("sm_80", "half", "window3d_backward_queries"): Cuts(
        lean=(Config(64, 32, windows=2), Config(64, 32), Config(32, 32)),
        full=(Config(64, 32), Config(32, 32), Config(32, 32, num_warps=8)),
    ),
    ("sm_80", "half", "window3d_backward_keys"): Cuts(
        lean=(Config(64, 64), Config(64, 32), Config(64, 64, num_warps=8)),
        full=(Config(64, 32), Config(64, 32), Config(32, 64, num_warps=8)),
    ),
    ("sm_80", "half", "window3d_backward_bias"): Cuts(
        lean=(Config(64, 64), Config(64, 64), Config(32, 64)),
        full=(Config(32, 64), Config(32, 64), Config(32, 32, num_warps=8)),
    ),
    ("sm_90", "half", "window3d_forward"): Cuts(
        lean=(Config(64, 64, windows=2), Config(64, 64, windows=2), Config(64, 64)),
        full=(Config(64, 64), Config(64, 64), Config(64, 32)),
    ),
    ("sm_90", "half", "window3d_backward_queries"): Cuts(
        lean=(Config(64, 64, windows=2), Config(64, 64), Config(64, 64, num_warps=8)),
        full=(Config(64, 32), Config(64, 32), Config(64, 32)),
    ),
    ("sm_90", "half", "window3d_backward_keys"): Cuts(
        lean=(Config(64, 64), Config(64, 64, num_warps=8), Config(32, 64, num_warps=8)),
        full=(Config(64, 64, num_warps=8), Config(32, 64), Config(32, 64, num_warps=8)),
    ),
    ("sm_90", "half", "window3d_backward_bias"): Cuts(
        lean=(Config(64, 64), Config(64, 64), Config(64, 64)),
        full=(Config(64, 64, num_warps=8), Config(64, 64, num_warps=8), Config(64, 64, num_warps=8)),
    ),
    # Triton 3.7 fails on the layouts of 64 rows in tensor memory, so the forward takes 32, without it.
    ("sm_100", "half", "window3d_forward"): Cuts(
        lean=(Config(32, 64), Config(32, 64), Config(32, 64)),
        full=(Config(32, 64), Config(32, 64), Config(32, 16)),
    ),
    ("sm_100", "half", "window3d_backward_queries"): Cuts(
        lean=(Config(64, 64, windows=2), Config(64, 64, windows=2), Config(128, 64, num_warps=8)),
        full=(Config(128, 64, num_warps=8), Config(64, 64), Config(64, 32)),
    ),
    ("sm_100", "half", "window3d_backward_keys"): Cuts(
        lean=(Config(64, 64), Config(64, 64), Config(64, 64)),
        full=(Config(64, 64), Config(64, 64, num_warps=8), Config(32, 64)),
    ),
    ("sm_100", "half", "window3d_backward_bias"): Cuts(
        lean=(Config(64, 64), Config(64, 64), Config(64, 64, num_warps=8)),
        full=(Config(64, 64), Config(64, 64), Config(64, 64, num_warps=8)),
    ),
    ("sm_90", "tf32", "window3d_forward"): Cuts(
        lean=(Config(64, 64, windows=2), Config(64, 64), Config(64, 32)),
        full=(Config(64, 64), Config(64, 32), Config(32, 32, num_warps=8)),
    ),
    ("sm_90", "tf32", "window3d_backward_queries"): Cuts(
        lean=(Config(64, 64), Config(64, 32), Config(32, 32, num_warps=8)),
        full=(Config(64, 32), Config(64, 16), Config(32, 32, num_warps=8)),
    ),
    ("sm_90", "tf32", "window3d_backward_keys"): Cuts(
        lean=(Config(64, 64, num_warps=8), Config(32, 64), Config(32, 32, num_warps=8)),
        full=(Config(32, 64), Config(32, 64, num_warps=8), Config(32, 32, num_warps=8)),
    ),
    ("sm_90", "tf32", "window3d_backward_bias"): Cuts(
        lean=(Config(64, 64), Config(64, 64), Config(32, 32)),
        full=(Config(64, 64, num_warps=8), Config(64, 64, num_warps=8), Config(32, 32, num_warps=8)),
    ),
}
# Products of float32 at full precision are multiply-adds, unrolled: larger tiles take minutes to compile.
_SMALL = Config(32, 32)
# Kernels of the backward pass whose tiles hold all keys of a short window.
_OVER_ALL_KEYS = ("window3d_backward_keys", "window3d_backward_bias")


@lru_cache
def default_config(kernel: str, shape: ShapeClass) -> Config:
    """Look up how a kernel is cut into tiles.

    Args:
        kernel: name of the kernel.
        shape: the shape class.

    Returns:
        The configuration.
    """
    if shape.arch == "interpreter":  # as many full tiles, shared tiles and tails as a short window can have
        full = max(16, min(64, 2 ** (shape.num_tokens.bit_length() - 1)))
        by_keys = kernel == "window3d_backward_keys"
        config = Config(full, 64) if by_keys else Config(64, full, 2)
    else:
        products = "half" if shape.itemsize == 2 else "tf32" if shape.tensor_cores else "ieee"
        cuts = _TABLE.get((table_arch(shape.arch), products, kernel))
        config = _SMALL if cuts is None else cuts.of(shape.block_d, lean=shape.lean)
    return _fit(kernel, config, shape)


def candidate_configs(kernel: str, shape: ShapeClass) -> list[Config]:
    """List what autotuning tries: every cut of the kernel in the table, and smaller ones."""
    cuts = {_SMALL, Config(64, 32), Config(32, 64), *entries(_TABLE, kernel)}
    if kernel in ("window3d_forward", "window3d_backward_queries"):
        cuts |= {config._replace(windows=2) for config in cuts}
    return sorted({_fit(kernel, config, shape) for config in cuts})


def padded_length(num_tokens: int, step: int) -> tuple[int, int]:
    """Cut a window into full tiles of ``step`` tokens and a shorter tail: their number, and its length or 0."""
    full, rest = divmod(num_tokens, step)
    return full, max(16, triton.next_power_of_2(rest)) if rest else 0


def _fit(kernel: str, config: Config, shape: ShapeClass) -> Config:
    """Shrink tiles to short windows."""
    longest = max(16, triton.next_power_of_2(shape.num_tokens))
    if shape.whole and kernel in _OVER_ALL_KEYS:
        found = over_all_keys(longest, shape.block_d, shape.itemsize)
        if kernel == "window3d_backward_bias":  # which has no other gradients in its registers
            found = found._replace(block_m=min(longest, 4096 // longest), num_warps=longest // 16)
        return found
    block_m, block_n = min(config.block_m, longest), min(config.block_n, longest)
    num_warps = min(config.num_warps, max(1, block_m * block_n // 512))
    return config._replace(block_m=block_m, block_n=block_n, num_warps=num_warps)

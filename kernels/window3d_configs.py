"""How the window3d kernels are cut into tiles, by architecture and shape class.

The table was made by compiling: of the cuts whose registers do not spill, the one with the fewest instructions a score.
"""

from __future__ import annotations

from typing import NamedTuple

import triton

from vidattn.kernels.configs import Config

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
    """

    arch: str
    itemsize: int
    tensor_cores: bool
    block_d: int
    num_tokens: int
    lean: bool


# By kernel and (architecture, tensor cores, head dimension up to, lean): queries x keys of a tile, windows, warps.
_TABLE: dict[str, dict[tuple[str, bool, int, bool], Config]] = {
    "window3d_forward": {
        ("sm_90", True, 32, True): Config(64, 128, 2),
        ("sm_90", True, 32, False): Config(64, 64),
        ("sm_90", True, 64, True): Config(64, 64, 2),
        ("sm_90", True, 64, False): Config(64, 64),
        ("sm_90", True, 128, True): Config(64, 64),
    },
    "window3d_backward_queries": {
        ("sm_90", True, 32, True): Config(64, 64, 2),
        ("sm_90", True, 32, False): Config(64, 32),
        ("sm_90", True, 64, True): Config(64, 64),
        ("sm_90", True, 64, False): Config(64, 32),
        ("sm_90", True, 128, True): Config(64, 64),
    },
    "window3d_backward_keys": {
        ("sm_90", True, 32, True): Config(64, 64),
        ("sm_90", True, 32, False): Config(64, 64, num_warps=8),
        ("sm_90", True, 64, True): Config(64, 64),
        ("sm_90", True, 64, False): Config(32, 64),
        ("sm_90", True, 128, True): Config(32, 64, num_warps=8),
    },
    "window3d_backward_bias": {
        ("sm_90", True, 32, True): Config(64, 64),
        ("sm_90", True, 32, False): Config(64, 64, num_warps=8),
        ("sm_90", True, 64, True): Config(64, 64),
        ("sm_90", True, 64, False): Config(64, 64, num_warps=8),
        ("sm_90", True, 128, True): Config(64, 64),
    },
}
_SMALL = Config(32, 32)


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
        found = _TABLE[kernel].get((shape.arch, shape.tensor_cores, max(32, shape.block_d), shape.lean))
        config = found or _SMALL
    return _fit(config, shape.num_tokens)


def candidate_configs(kernel: str, shape: ShapeClass) -> list[Config]:
    """List what autotuning tries beside the default: every cut in the table of the kernel, and smaller ones."""
    cuts = {*_TABLE[kernel].values(), _SMALL, Config(64, 32), Config(32, 64), Config(128, 64, num_warps=8)}
    if kernel in ("window3d_forward", "window3d_backward_queries"):
        cuts |= {config._replace(windows=2) for config in cuts}
    return sorted({_fit(config, shape.num_tokens) for config in cuts})


def padded_length(num_tokens: int, step: int) -> tuple[int, int]:
    """Cut a window into full tiles of ``step`` tokens and a shorter tail: their number, and its length or 0."""
    full, rest = divmod(num_tokens, step)
    return full, max(16, triton.next_power_of_2(rest)) if rest else 0


def _fit(config: Config, num_tokens: int) -> Config:
    """Shrink tiles to short windows, and where wide ones would waste more than they save."""
    longest = max(16, triton.next_power_of_2(num_tokens))
    block_m, block_n = min(config.block_m, longest), min(config.block_n, longest)
    while block_n > 64:
        wide, narrow = (
            full * step + tail for step in (block_n, block_n // 2) for full, tail in [padded_length(num_tokens, step)]
        )
        if wide <= 1.05 * narrow:
            break
        block_n //= 2
    num_warps = min(config.num_warps, max(1, block_m * block_n // 512))
    return config._replace(block_m=block_m, block_n=block_n, num_warps=num_warps)

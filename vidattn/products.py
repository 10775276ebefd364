"""How fast this machine multiplies matrices in each dtype, measured by small products."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch.nn import functional

_TOKENS, _CHANNELS = 512, 768
_ROUNDS = 6
# A dtype must be faster by so much to be chosen: two dtypes of about one speed are not worth fewer digits.
_WORTHWHILE = 1.2


def product_seconds(dtypes: Sequence[torch.dtype], device: str = "cpu") -> dict[torch.dtype, float]:
    """Time a product as in a linear layer, 512 x 768 by 768 x 768, in each dtype.

    Args:
        dtypes: floating-point dtypes.
        device: where to multiply.

    Returns:
        Seconds by dtype: the best of a few rounds, in each of which every dtype has its turn.

    Example:
        >>> product_seconds([torch.float32])[torch.float32] > 0
        True
    """
    generator = torch.Generator().manual_seed(0)  # the random numbers of the caller stay as they are
    shapes = ((_TOKENS, _CHANNELS), (_CHANNELS, _CHANNELS))
    operands = {
        dtype: [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes] for dtype in dtypes
    }
    best = dict.fromkeys(dtypes, float("inf"))
    with torch.inference_mode():
        for turn in range(_ROUNDS + 1):  # the first sets up what a first call sets up
            for dtype, (tokens, weight) in operands.items():
                started = time.perf_counter()
                functional.linear(tokens, weight)
                if device == "cuda":
                    torch.cuda.synchronize()
                if turn:
                    best[dtype] = min(best[dtype], time.perf_counter() - started)
    return best


def product_flops() -> int:
    """Count the floating-point operations of the product that is timed."""
    return 2 * _TOKENS * _CHANNELS**2


def choose_dtype(device: str = "cpu") -> torch.dtype:
    """Return bfloat16 where its products are clearly faster than those of float32, else float32."""
    seconds = product_seconds([torch.float32, torch.bfloat16], device)
    faster = seconds[torch.float32] / seconds[torch.bfloat16]
    return torch.bfloat16 if faster >= _WORTHWHILE else torch.float32


def float32_speedup(dtype: torch.dtype, device: str = "cpu") -> float:
    """Tell how many times as fast as those of a dtype the products of float32 are."""
    seconds = product_seconds([torch.float32, dtype], device)
    return seconds[dtype] / seconds[torch.float32]

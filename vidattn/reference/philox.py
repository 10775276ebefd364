"""The dropout mask that every backend draws: philox4x32-10, keyed by the seed, counted by logical indices.

Philox is the counter-based generator of Salmon, Moraes, Dror and Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3"
(SC 2011). Because its output is a function of (key, counter) alone, forward, backward, every backend and every
instruction set see the same mask without storing it.

* key: low and high 32 bits of the int64 seed;
* counter: ``(key_token // 4, query_token, head, group)``; the four outputs belong to four neighbouring key tokens;
* an entry is kept when the upper 24 bits of its output, as a fraction of 2**24, are at least ``dropout_p``.
"""

from __future__ import annotations

import torch

__all__ = ["dropout_keep_mask", "philox4x32"]

_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_LOW_BITS = 0xFFFFFFFF


def philox4x32(
    counter: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], key: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Evaluate philox4x32-10.

    Args:
        counter: four int64 tensors of 32-bit words, broadcastable against each other.
        key: two int64 tensors of 32-bit words, broadcastable too.

    Returns:
        Four int64 tensors of 32-bit words.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # int64 products wrap modulo 2**64, which leaves the bits of both halves right; the mask removes the sign bits.
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (product1 >> 32 & _LOW_BITS) ^ c1 ^ k0,
            product1 & _LOW_BITS,
            (product0 >> 32 & _LOW_BITS) ^ c3 ^ k1,
            product0 & _LOW_BITS,
        )
        k0, k1 = (k0 + _KEY_STEPS[0]) & _LOW_BITS, (k1 + _KEY_STEPS[1]) & _LOW_BITS
    return c0, c1, c2, c3


def dropout_keep_mask(
    seed: torch.Tensor, dropout_p: float, groups: int, heads: int, queries: int, keys: int, *, first_head: int = 0
) -> torch.Tensor:
    """Draw the entries of the probability matrices that dropout keeps.

    Args:
        seed: int64 tensor with one element.
        dropout_p: probability of dropping an entry, ``0 <= dropout_p < 1``.
        groups: number of attention groups (windows, sites or frames of the whole batch).
        heads: number of heads.
        queries: query tokens of a group.
        keys: key tokens of a group.
        first_head: number of the first head.

    Returns:
        bool (groups, heads, queries, keys) on the seed's device, true where kept.
    """
    seed = seed.reshape(())
    lanes = philox4x32(
        (
            torch.arange(-(-keys // 4), device=seed.device),
            torch.arange(queries, device=seed.device)[:, None],
            torch.arange(first_head, first_head + heads, device=seed.device)[:, None, None],
            torch.arange(groups, device=seed.device)[:, None, None, None],
        ),
        (seed & _LOW_BITS, seed >> 32 & _LOW_BITS),
    )
    words = torch.stack(lanes, dim=-1).flatten(-2)[..., :keys]
    return (words >> 8).double() * 2.0**-24 >= dropout_p

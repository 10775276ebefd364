"""The layers that the reference architectures share."""

from __future__ import annotations

import math

import torch

from vidattn.models.layers import DropPath


def test_drop_path_drops_whole_samples_at_its_rate() -> None:
    torch.manual_seed(0)
    samples, rate = 20_000, 0.3
    layer = DropPath(rate)
    out = layer(torch.ones(samples, 2, 3))
    per_sample = out.flatten(1)
    assert torch.equal(per_sample.amin(1), per_sample.amax(1))
    kept = per_sample[:, 0] != 0
    torch.testing.assert_close(per_sample[kept], torch.full_like(per_sample[kept], 1 / (1 - rate)))
    deviation = math.sqrt(rate * (1 - rate) / samples)
    assert abs(kept.float().mean().item() - (1 - rate)) < 5 * deviation
    # independent from sample to sample
    pairs = (kept[::2] & kept[1::2]).float().mean().item()
    assert abs(pairs - (1 - rate) ** 2) < 5 * math.sqrt(0.25 / (samples / 2))
    x = torch.randn(4, 3)
    assert layer.eval()(x) is x
    assert not DropPath(1.0)(x).any()

"""Small layers that the video transformers share, under the names and state-dict keys of their papers' code."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from vidattn.tracing import is_symbolic


class DropPath(nn.Module):
    """Stochastic depth: drop a residual branch for whole samples, scale kept ones by 1 / (1 - p) (arXiv 1603.09382).

    Args:
        drop_prob: Probability p of dropping the branch of a sample; active in training only.
    """

    def __init__(self, drop_prob: float = 0.0) -> None:
        super().__init__()
        if not 0.0 <= drop_prob <= 1.0:
            raise ValueError(f"drop_prob must be between 0 and 1, got {drop_prob}")
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        """Drop the branch ``x`` (B, ...) of each sample independently."""
        if self.drop_prob == 0.0 or not self.training:
            return x
        keep = 1.0 - self.drop_prob
        kept = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1))
        if is_symbolic(keep):  # each block of a model has a rate of its own
            kept = torch.bernoulli(torch.ones_like(kept, dtype=torch.float64) * keep).to(x.dtype)
        else:
            kept.bernoulli_(keep)
        return x * (kept / keep if keep > 0.0 else kept)

    def extra_repr(self) -> str:
        """Show the probability."""
        return f"drop_prob={self.drop_prob:g}"


class Mlp(nn.Module):
    """Two linear layers with an activation between them, and dropout after it and at the end.

    Args:
        in_features: Channels in.
        hidden_features: Channels between the layers; ``in_features`` by default.
        out_features: Channels out; ``in_features`` by default.
        act_layer: Activation, called without arguments.
        drop: Dropout probability.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        drop: float = 0.0,
    ) -> None:
        super().__init__()
        hidden_features = hidden_features or in_features
        self.fc1 = nn.Linear(in_features, hidden_features)
        self.act = act_layer()
        self.fc2 = nn.Linear(hidden_features, out_features or in_features)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features)."""
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))

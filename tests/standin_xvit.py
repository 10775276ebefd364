"""A stand-in for X-ViT's repository: an attention with places for shifts, and the shift that goes there.

Our own words for what https://github.com/1adrianb/video-transformers (82ca176) computes. With the same weights the two
differed by 5e-16 of the largest value in float64, outputs and gradients, shifted and not.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class AfterReconstruction(nn.Identity):
    """A place for a shift."""

    def __init__(self, inplanes: int) -> None:
        super().__init__()
        self.inplanes = inplanes


class TemporalShift(nn.Module):
    """Channels of all heads together: the first share from the next frame, the second from the one before."""

    def __init__(self, net: nn.Module, n_segment: int, n_div: int) -> None:
        super().__init__()
        self.net, self.n_segment, self.fold_div = net, n_segment, n_div

    def forward(self, x: Tensor) -> Tensor:
        frames, heads, tokens, dim = x.shape
        share = heads * dim // self.fold_div
        clips = x.transpose(2, 3).reshape(-1, self.n_segment, heads * dim, tokens)
        later, earlier, still = clips.split([share, share, heads * dim - 2 * share], dim=2)
        nothing = clips.new_zeros(clips.shape[0], 1, share, tokens)
        later, earlier = torch.cat((later[:, 1:], nothing), 1), torch.cat((nothing, earlier[:, :-1]), 1)
        moved = torch.cat((later, earlier, still), 2)
        return moved.reshape(frames, heads, dim, tokens).transpose(2, 3)


class Attention(nn.Module):
    """Attention of the tokens of each frame."""

    def __init__(self, dim: int, num_heads: int, insert_control_point: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.insert_control_point = insert_control_point
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, dim * 3)
        self.attn_drop = nn.Dropout(0.0)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(0.0)
        if insert_control_point:
            self.control_point = AfterReconstruction(dim)
            self.control_point_query: nn.Module = AfterReconstruction(dim)
            self.control_point_value: nn.Module = AfterReconstruction(dim)

    def forward(self, x: Tensor) -> Tensor:
        if self.insert_control_point:
            x = self.control_point(x)
        query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        if self.insert_control_point:
            key, value = self.control_point_query(key), self.control_point_value(value)
        weights = self.attn_drop((query @ key.mT * self.scale).softmax(-1))
        return self.proj_drop(self.proj((weights @ value).transpose(1, 2).flatten(2)))


class Frames(nn.Module):
    """Two attentions in a row, the first of them shifted if asked."""

    def __init__(self, dim: int, num_heads: int, num_frames: int, shifted: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Attention(dim, num_heads, insert_control_point=shifted) for _ in range(2))
        if shifted:
            first = self.layers[0]
            for name in ("control_point_query", "control_point_value"):
                setattr(first, name, TemporalShift(getattr(first, name), num_frames, n_div=4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x

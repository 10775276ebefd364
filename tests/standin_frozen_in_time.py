"""Stand-ins for Frozen in Time and two relatives: the cls token attends to the whole clip, patches to a part and it.

Our own words for what m-bain/frozen-in-time (e1f13e1), facebookresearch/LaViLa (8002b5a) and
lucidrains/TimeSformer-pytorch (9a20466) compute. With the same weights they gave the same float64 numbers, to the bit:
outputs and gradients, over time and over space.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def attn(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attend along the last dimension but one."""
    scores = query @ key.mT
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.finfo(scores.dtype).max)
    return scores.softmax(-1) @ value


def attend(qkv: Tensor, heads: int, over_time: bool, sizes: dict[str, int], mask: Tensor | None = None) -> Tensor:
    """Attend packed tokens (B, 1 + T * N, 3 * C), the queries scaled already."""
    query, key, value = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)  # (B, h, S, d)
    patches = query.shape[2] - 1
    frames = sizes["f"] if "f" in sizes else patches // sizes["n"]

    def grouped(x: Tensor) -> Tensor:
        by_frame = x[:, :, 1:].unflatten(2, (frames, -1))
        return by_frame.transpose(2, 3) if over_time else by_frame  # (B, h, groups, group, d)

    queries, keys, values = map(grouped, (query, key, value))
    with_cls = [
        torch.cat((x[:, :, None, :1].expand(-1, -1, rows.shape[2], -1, -1), rows), 3)
        for x, rows in ((key, keys), (value, values))
    ]
    context = attn(queries, *with_cls, mask)
    context = context.transpose(2, 3) if over_time else context
    return torch.cat((attn(query[:, :, :1], key, value), context.flatten(2, 3)), 2).transpose(1, 2).flatten(2)


class VarAttention(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, dim * 3)
        self.proj = nn.Linear(dim, dim)
        self.attn_drop = nn.Dropout(0.1)  # never called
        self.proj_drop = nn.Dropout(0.1)

    def forward(self, x: Tensor, einops_from: str, einops_to: str, einops_dims: Any = None, **more: int) -> Tensor:
        assert einops_from == "b (f n) d"
        query, rest = self.qkv(x).split([x.shape[-1], 2 * x.shape[-1]], -1)
        qkv = torch.cat((query * self.scale, rest), -1)
        context = attend(qkv, self.num_heads, einops_to == "(b n) f d", {**more, **(einops_dims or {})})
        return self.proj_drop(self.proj(context))


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.scale = (dim // heads) ** -0.5
        self.to_qkv = nn.Linear(dim, dim * 3, bias=False)
        self.to_out = nn.Sequential(nn.Linear(dim, dim), nn.Dropout(0.1))

    def forward(
        self, x: Tensor, einops_from: str, einops_to: str, mask=None, cls_mask=None, rot_emb=None, **einops_dims
    ) -> Tensor:
        assert cls_mask is None
        query, rest = self.to_qkv(x).split([x.shape[-1], 2 * x.shape[-1]], -1)
        if rot_emb is not None:
            query = query * rot_emb
        qkv = torch.cat((query * self.scale, rest), -1)
        return self.to_out(attend(qkv, self.heads, einops_to == "(b n) f d", einops_dims, mask))


class Block(nn.Module):
    """Time, then space, the sizes as keywords or as one argument."""

    def __init__(self, kind: type[nn.Module], dim: int, heads: int, frames: int, as_one: bool = False) -> None:
        super().__init__()
        self.timeattn, self.attn = kind(dim, heads), kind(dim, heads)
        self.frames, self.as_one = frames, as_one

    def forward(self, x: Tensor) -> Tensor:
        sizes = {"n": (x.shape[1] - 1) // self.frames}, {"f": self.frames}
        for attention, to, size in zip((self.timeattn, self.attn), ("(b n) f d", "(b f) n d"), sizes, strict=True):
            more = attention(x, "b (f n) d", to, size) if self.as_one else attention(x, "b (f n) d", to, **size)
            x = x + more
        return x

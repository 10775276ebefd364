"""Window attention modules with the structure of those of repositories that are no packages, in our own words.

Each namespace is one repository. With the same weights and inputs (float64, windows with a mask and without) outputs
and gradients differed from those of the repository's own modules by at most 3e-16 of each tensor's largest value.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


def position_index(window: Sequence[int], steps: Sequence[int] | None = None) -> Tensor:
    """Number the distances of all pairs of tokens; the standard way unless the steps along each axis are given."""
    tokens = torch.tensor(list(product(*map(range, window))))
    steps = steps or [prod(2 * size - 1 for size in window[axis + 1 :]) for axis in range(len(window))]
    distances = tokens[:, None] - tokens[None] + torch.tensor(window) - 1
    return (distances * torch.tensor(steps)).sum(-1)


def earth_index(window: Sequence[int]) -> Tensor:
    """Number pairs of tokens by both levels, both latitudes and their distance in longitude."""
    tokens = torch.tensor(list(product(*map(range, window))))
    number = torch.zeros(len(tokens), len(tokens), dtype=torch.int64)
    for axis, size in enumerate(window[:-1]):
        number = (number * size + tokens[None, :, axis]) * size + tokens[:, None, axis]
    return number * (2 * window[-1] - 1) + tokens[:, None, -1] - tokens[None, :, -1] + window[-1] - 1


def masked(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Add a mask (nW, N, N) to the scores (G, h, N, N)."""
    if mask is None:
        return scores
    return (scores.unflatten(0, (-1, mask.shape[0])) + mask[:, None]).flatten(0, 1)


class Swin(nn.Module):
    """What most of them have."""

    def __init__(
        self,
        dim: int,
        window_size: Sequence[int],
        num_heads: int,
        *,
        steps: Sequence[int] | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.window_size, self.num_heads, self.scale = tuple(window_size), num_heads, (dim // num_heads) ** -0.5
        rows = prod(2 * size - 1 for size in window_size)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(rows, num_heads))
        self.register_buffer("relative_position_index", position_index(window_size, steps))
        self.qkv = nn.Linear(dim, 3 * dim)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        self.softmax = nn.Softmax(dim=-1)

    def bias(self) -> Tensor:
        return self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)

    def split(self, x: Tensor, parts: int = 3) -> Tensor:
        return x.unflatten(-1, (parts, self.num_heads, -1)).permute(2, 0, 3, 1, 4)


def join(context: Tensor) -> Tensor:
    return context.transpose(1, 2).flatten(2)


class vrt:
    class WindowAttention(nn.Module):
        def __init__(self, dim: int, window_size: Sequence[int], num_heads: int, mut_attn: bool = True) -> None:
            super().__init__()
            self.num_heads, self.scale, self.mut_attn = num_heads, (dim // num_heads) ** -0.5, mut_attn
            rows = prod(2 * size - 1 for size in window_size)
            self.relative_position_bias_table = nn.Parameter(torch.zeros(rows, num_heads))
            self.register_buffer("relative_position_index", position_index(window_size))
            self.qkv_self = nn.Linear(dim, 3 * dim)
            self.proj = nn.Linear(dim, dim)
            if mut_attn:
                places = torch.linspace(0.0, 6.0, prod(window_size[1:]) * dim)
                self.register_buffer("position_bias", places.view(1, -1, dim).sin())
                self.qkv_mut = nn.Linear(dim, 3 * dim)
                self.proj = nn.Linear(2 * dim, dim)
            self.softmax = nn.Softmax(dim=-1)

        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            heads = (3, self.num_heads, -1)
            q, k, v = self.qkv_self(x).unflatten(-1, heads).permute(2, 0, 3, 1, 4)
            out = self.attention(q, k, v, mask, True)
            if self.mut_attn:
                mutual = self.qkv_mut(x + self.position_bias.repeat(1, 2, 1)).unflatten(-1, heads)
                q, k, v = mutual.permute(2, 0, 3, 1, 4)
                (q1, q2), (k1, k2), (v1, v2) = q.chunk(2, 2), k.chunk(2, 2), v.chunk(2, 2)
                first, last = self.attention(q2, k1, v1, mask, False), self.attention(q1, k2, v2, mask, False)
                out = torch.cat((torch.cat((first, last), 1), out), 2)
            return self.proj(out)

        def attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, with_bias: bool) -> Tensor:
            tokens = q.shape[2]
            scores = self.scale * q @ k.transpose(-2, -1)
            if with_bias:
                index = self.relative_position_index[:tokens, :tokens]
                scores = scores + self.relative_position_bias_table[index].permute(2, 0, 1)
            scores = masked(scores, None if mask is None else mask[:, :tokens, :tokens])
            return join(self.softmax(scores) @ v)


class rvrt:
    class WindowAttention(nn.Module):
        def __init__(self, dim: int, window_size: Sequence[int], num_heads: int) -> None:
            super().__init__()
            self.num_heads, self.scale = num_heads, (dim // num_heads) ** -0.5
            rows = prod(2 * size - 1 for size in window_size)
            self.relative_position_bias_table = nn.Parameter(torch.zeros(rows, num_heads))
            self.register_buffer("relative_position_index", position_index(window_size))
            self.qkv_self = nn.Linear(dim, 3 * dim)
            self.proj = nn.Linear(dim, dim)

        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            q, k, v = self.qkv_self(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
            return self.proj(self.attention(q, k, v, mask))

        def attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
            tokens = q.shape[2]
            index = self.relative_position_index[:tokens, :tokens]
            scores = self.scale * q @ k.transpose(-2, -1) + self.relative_position_bias_table[index].permute(2, 0, 1)
            scores = masked(scores, None if mask is None else mask[:, :tokens, :tokens])
            return join(scores.softmax(-1, dtype=q.dtype) @ v)


class Adapter(nn.Module):
    """Aurora's ``LoRARollout``, one for all steps up to a last one."""

    def __init__(self, dim: int, out: int, max_steps: int = 40, dropout: float = 0.0) -> None:
        super().__init__()
        self.max_steps = max_steps
        self.lora_dropout = nn.Dropout(dropout)
        self.lora_A = nn.Parameter(torch.randn(4, dim))
        self.lora_B = nn.Parameter(torch.randn(out, 4))

    def forward(self, x: Tensor, step: int) -> Tensor | int:
        return 2 * (self.lora_dropout(x) @ self.lora_A.t() @ self.lora_B.t()) if step < self.max_steps else 0


def no_adapter(*_: Any) -> int:
    return 0


def fp16_safe_scaled_dot_product_attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0
) -> Tensor:
    scores = q @ (k.transpose(-2, -1) * q.shape[-1] ** -0.5)
    weights = (scores if attn_mask is None else scores + attn_mask).softmax(-1)
    return torch.dropout(weights, dropout_p, train=True) @ v


class aurora:
    class WindowAttention(nn.Module):
        def __init__(
            self, dim: int, num_heads: int, *, use_lora: bool, attn_drop: float = 0.0, drop: float = 0.0
        ) -> None:
            super().__init__()
            self.num_heads, self.head_dim, self.attn_drop = num_heads, dim // num_heads, attn_drop
            self.use_fp16_safe_attention = False
            self.qkv = nn.Linear(dim, 3 * dim)
            self.proj = nn.Linear(dim, dim)
            self.proj_drop = nn.Dropout(drop)
            self.lora_proj: Callable[..., Any] = Adapter(dim, dim, dropout=drop) if use_lora else no_adapter
            self.lora_qkv: Callable[..., Any] = Adapter(dim, 3 * dim, dropout=drop) if use_lora else no_adapter

        def forward(self, x: Tensor, mask: Tensor | None = None, rollout_step: int = 0) -> Tensor:
            qkv = self.qkv(x) + self.lora_qkv(x, rollout_step)
            q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
            if mask is not None:
                mask = mask[None, :, None].repeat(q.shape[0] // mask.shape[0], 1, 1, 1, 1).flatten(0, 1)
            usual = functional.scaled_dot_product_attention
            attend = fp16_safe_scaled_dot_product_attention if self.use_fp16_safe_attention else usual
            out = join(attend(q, k, v, attn_mask=mask, dropout_p=self.attn_drop if self.training else 0.0))
            return self.proj_drop(self.proj(out) + self.lora_proj(out, rollout_step))


class bayesian:
    class WindowAttention(Swin):
        def __init__(self, dim: int, window_size: Sequence[int], num_heads: int, drop: float = 0.0) -> None:
            super().__init__(dim, window_size, num_heads)
            del self.attn_drop, self.proj_drop
            self.drop = drop

        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            q, k, v = self.split(self.qkv(x))
            weights = self.softmax(masked(self.scale * q @ k.transpose(-2, -1) + self.bias(), mask))
            weights = functional.dropout(weights, self.drop, training=True)
            return functional.dropout(self.proj(join(weights @ v)), self.drop, training=True)


class nnformer:
    class WindowAttention(Swin):
        def __init__(self, dim: int, window_size: Sequence[int], num_heads: int, **options: Any) -> None:
            side = window_size[1]
            super().__init__(dim, window_size, num_heads, steps=(3 * side - 1, 2 * side - 1, 1), **options)

        def forward(self, x: Tensor, mask: Tensor | None = None, pos_embed: Tensor | None = None) -> Tensor:
            q, k, v = self.split(self.qkv(x))
            weights = self.softmax(masked(self.scale * q @ k.transpose(-2, -1) + self.bias(), mask))
            out = join(self.attn_drop(weights) @ v)
            return self.proj_drop(self.proj(out if pos_embed is None else out + pos_embed))

    class WindowAttention_kv(Swin):
        def __init__(self, dim: int, window_size: Sequence[int], num_heads: int, **options: Any) -> None:
            side = window_size[1]
            super().__init__(dim, window_size, num_heads, steps=(3 * side - 1, 2 * side - 1, 1), **options)
            del self.qkv
            self.kv = nn.Linear(dim, 2 * dim)

        def forward(
            self, skip: Tensor, x_up: Tensor, pos_embed: Tensor | None = None, mask: Tensor | None = None
        ) -> Tensor:
            (q,) = self.split(x_up, 1)
            k, v = self.split(self.kv(skip), 2)
            weights = self.softmax(masked(self.scale * q @ k.transpose(-2, -1) + self.bias(), mask))
            out = join(self.attn_drop(weights) @ v)
            return self.proj_drop(self.proj(out if pos_embed is None else out + pos_embed))


class acdc:
    class WindowAttention_kv(nnformer.WindowAttention_kv):
        def forward(self, skip: Tensor, x_up: Tensor, mask: Tensor | None = None) -> Tensor:  # type: ignore[override]
            (q,) = self.split(x_up, 1)
            k, v = self.split(self.kv(skip), 2)
            weights = self.softmax(masked(self.scale * q @ k.transpose(-2, -1) + self.bias(), mask))
            return self.proj_drop(self.proj(join(self.attn_drop(weights) @ v)))


class physicsnemo:
    class EarthAttention3D(nn.Module):
        def __init__(
            self,
            dim: int,
            types: int,
            window_size: Sequence[int],
            num_heads: int,
            proj_drop: float = 0.0,
            attn_drop: float = 0.0,
        ) -> None:
            super().__init__()
            self.num_heads, self.scale, self.type_of_windows = num_heads, (dim // num_heads) ** -0.5, types
            rows = prod(size**2 for size in window_size[:-1]) * (2 * window_size[-1] - 1)
            self.earth_position_bias_table = nn.Parameter(torch.zeros(rows, types, num_heads))
            self.register_buffer("earth_position_index", earth_index(window_size))
            self.qkv = nn.Linear(dim, 3 * dim)
            self.attn_drop = nn.Dropout(attn_drop)
            self.proj = nn.Linear(dim, dim)
            self.proj_drop = nn.Dropout(proj_drop)
            self.softmax = nn.Softmax(dim=-1)

        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(3, 0, 4, 1, 2, 5)
            bias = self.earth_position_bias_table[self.earth_position_index]
            scores = self.scale * q @ k.transpose(-2, -1) + bias.permute(3, 2, 0, 1)
            if mask is not None:
                scores = (scores.unflatten(0, (-1, mask.shape[0])) + mask[:, None]).flatten(0, 1)
            out = self.attn_drop(self.softmax(scores)) @ v
            return self.proj_drop(self.proj(out.permute(0, 2, 3, 1, 4).flatten(3)))

    class EarthAttention2D(EarthAttention3D):
        pass


class mfai:
    class EarthAttention3D(nn.Module):
        def __init__(
            self, dim: int, num_windows: int, window_size: Sequence[int], num_heads: int, dropout: float = 0.0
        ) -> None:
            super().__init__()
            self.head_number, self.scale, self.num_windows = num_heads, (dim // num_heads) ** -0.5, num_windows
            rows = prod(size**2 for size in window_size[:-1]) * (2 * window_size[-1] - 1)
            self.earth_specific_bias = nn.Parameter(torch.zeros(rows, num_windows, num_heads))
            self.register_buffer("position_index", earth_index(window_size).flatten())
            self.linear1 = nn.Linear(dim, 3 * dim)
            self.linear2 = nn.Linear(dim, dim)
            self.softmax = nn.Softmax(dim=-1)
            self.dropout = nn.Dropout(dropout)

        def forward(self, x: Tensor, mask: Tensor | None, batch_size: int) -> Tensor:
            q, k, v = self.linear1(x).unflatten(-1, (3, self.head_number, -1)).permute(2, 0, 3, 1, 4)
            self.attention = self.scale * q @ k.transpose(-2, -1)
            tokens = x.shape[1]
            bias = self.earth_specific_bias[self.position_index].unflatten(0, (tokens, tokens)).permute(2, 3, 0, 1)
            scores = self.attention.unflatten(0, (batch_size, self.num_windows, -1)) + bias[:, None]
            self.attention2 = masked(scores.flatten(0, 2), mask)
            weights = self.dropout(self.softmax(self.attention2))
            return self.dropout(self.linear2(join(weights @ v)))


class fast_vqa:
    class WindowAttention3D(Swin):
        def __init__(
            self, dim: int, window_size: Sequence[int], num_heads: int, *, frag_bias: bool = False, **options: Any
        ) -> None:
            super().__init__(dim, window_size, num_heads, **options)
            if frag_bias:
                self.fragment_position_bias_table = nn.Parameter(torch.zeros_like(self.relative_position_bias_table))

        def forward(
            self,
            x: Tensor,
            mask: Tensor | None = None,
            fmask: Tensor | None = None,
            resized_window_size: Sequence[int] | None = None,
        ) -> Tensor:
            tokens = x.shape[1]
            q, k, v = self.split(self.qkv(x))
            index = self.relative_position_index[:tokens, :tokens]
            if resized_window_size is not None:
                d, h, w = resized_window_size
                by_axis = self.relative_position_index.reshape(self.window_size * 2)
                index = by_axis[:d, :h, :w, :d, :h, :w].reshape(tokens, tokens)
            bias = self.relative_position_bias_table[index].permute(2, 0, 1)
            scores = self.scale * q @ k.transpose(-2, -1)
            if fmask is not None and hasattr(self, "fragment_position_bias_table"):
                gate = fmask.abs().sum(-1)[:, None]
                bias = bias * gate + self.fragment_position_bias_table[index].permute(2, 0, 1) * (1 - gate)
                scores = (scores.unflatten(0, (-1, len(gate))) + bias).flatten(0, 1)
            else:
                scores = scores + bias
            weights = self.softmax(masked(scores, mask))
            return self.proj_drop(self.proj(join(self.attn_drop(weights) @ v)))

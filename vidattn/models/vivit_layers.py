"""Attention and blocks of ViViT (arXiv 2103.15691); the models made of them are in vivit.py."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from vidattn.models.layers import Mlp

_GELU: dict[str, Callable[[], nn.Module]] = {"tanh": partial(nn.GELU, approximate="tanh"), "erf": nn.GELU}
LAYER_NORM_EPS = 1e-6


def dot_product_attention(query: Tensor, key: Tensor, value: Tensor, dropout_rate: float = 0.0) -> Tensor:
    """Attend over the tokens of (..., tokens, heads, head_dim); the scale is head_dim ** -0.5.

    Args:
        query: Queries (..., tokens, heads, head_dim), divided by sqrt(head_dim) before the product.
        key: Keys of the same shape.
        value: Values of the same shape.
        dropout_rate: Dropout of the attention probabilities, active whenever above 0.

    Returns:
        Context (..., tokens, heads, head_dim).

    Example:
        >>> dot_product_attention(*torch.randn(3, 2, 5, 4, 8)).shape
        torch.Size([2, 5, 4, 8])
    """
    query, key, value = (tensor.transpose(-3, -2) for tensor in (query, key, value))  # (..., heads, tokens, head_dim)
    scores = (query / math.sqrt(query.shape[-1])) @ key.transpose(-2, -1)
    probabilities = functional.dropout(scores.softmax(dim=-1), dropout_rate)
    return (probabilities @ value).transpose(-3, -2)


def _time_attention(query: Tensor, key: Tensor, value: Tensor, dropout_rate: float) -> Tensor:
    """Attend over the frames of (B, T, N, heads, head_dim), each site on its own."""
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return dot_product_attention(query, key, value, dropout_rate).transpose(1, 2)


def factorized_dot_product_attention(query: Tensor, key: Tensor, value: Tensor, dropout_rate: float = 0.0) -> Tensor:
    """Attend over time with the first half of the heads, over space with the rest (arXiv 2103.15691, model 4).

    Args:
        query: Queries (B, T, N, heads, head_dim): T frames of N tokens.
        key: Keys of the same shape.
        value: Values of the same shape.
        dropout_rate: Dropout of the attention probabilities, active whenever above 0.

    Returns:
        Context (B, T, N, heads, head_dim).

    Raises:
        ValueError: The number of heads is odd.

    Example:
        >>> factorized_dot_product_attention(*torch.randn(3, 2, 4, 9, 6, 8)).shape
        torch.Size([2, 4, 9, 6, 8])
    """
    heads = query.shape[-2]
    if heads % 2:
        raise ValueError(f"query must have an even number of heads, half for time and half for space, got {heads}")
    (time_query, query), (time_key, key), (time_value, value) = (
        tensor.chunk(2, dim=-2) for tensor in (query, key, value)
    )
    time = _time_attention(time_query, time_key, time_value, dropout_rate)
    return torch.cat([time, dot_product_attention(query, key, value, dropout_rate)], dim=-2)


class MultiHeadDotProductAttention(nn.Module):
    """Multi-head self-attention; which tokens see each other is chosen by ``attention``.

    Args:
        dim: Channels C.
        num_heads: Attention heads; divides ``dim``.
        attention: "joint" takes tokens (..., S, C), and all S see each other. The others take T frames of N tokens
            (B, T, N, C): "space" attends inside a frame, "time" over the frames of a site, "factorized" over time with
            the first half of the heads and over space with the rest.
        dropout_rate: Dropout of the attention probabilities.
        qkv_bias: Whether queries, keys and values have a bias.
        kernel_init_method: "xavier", or "zero" for all four projections.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        attention: str = "joint",
        dropout_rate: float = 0.0,
        qkv_bias: bool = True,
        kernel_init_method: str = "xavier",
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"dim must be a multiple of num_heads, got dim={dim} and num_heads={num_heads}")
        if attention not in ("joint", "space", "time", "factorized"):
            raise ValueError(f"attention must be joint, space, time or factorized, got {attention!r}")
        if attention == "factorized" and num_heads % 2:
            raise ValueError(f"num_heads must be even, half for time and half for space, got {num_heads}")
        if kernel_init_method not in ("xavier", "zero"):
            raise ValueError(f"kernel_init_method must be xavier or zero, got {kernel_init_method!r}")
        self.num_heads = num_heads
        self.attention = attention
        self.dropout_rate = dropout_rate
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        for weight in (*self.qkv.weight.chunk(3), self.proj.weight):  # xavier of each projection, not of the packed one
            with torch.no_grad():
                nn.init.xavier_uniform_(weight) if kernel_init_method == "xavier" else nn.init.zeros_(weight)
        for linear in (self.qkv, self.proj):
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Attend: (..., S, C) or (B, T, N, C), as ``attention`` says, to the same shape."""
        if self.attention != "joint" and x.ndim != 4:
            raise ValueError(f"x must be (batch, frames, tokens, channels), got {tuple(x.shape)}")
        query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(-3)
        dropout_rate = self.dropout_rate if self.training else 0.0
        attend = {"time": _time_attention, "factorized": factorized_dot_product_attention}
        context = attend.get(self.attention, dot_product_attention)(query, key, value, dropout_rate)
        return self.proj(context.flatten(-2))


class DropLayer(nn.Module):
    """Stochastic depth as the paper's code has it: whole samples are dropped, kept ones are not scaled.

    Args:
        drop_prob: Probability of dropping the branch of a sample; active in training only.
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
        return x * x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(1.0 - self.drop_prob)

    def extra_repr(self) -> str:
        """Show the probability."""
        return f"drop_prob={self.drop_prob:g}"


def _mlp(dim: int, mlp_dim: int, dropout_rate: float, gelu: str) -> Mlp:
    if gelu not in _GELU:
        raise ValueError(f"gelu must be one of {', '.join(_GELU)}, got {gelu!r}")
    mlp = Mlp(dim, mlp_dim, act_layer=_GELU[gelu], drop=dropout_rate)
    for linear in (mlp.fc1, mlp.fc2):
        nn.init.xavier_uniform_(linear.weight)
        nn.init.normal_(linear.bias, std=1e-6)
    return mlp


class EncoderBlock(nn.Module):
    """A pre-norm block: attention, then an MLP, each with a residual (arXiv 2103.15691, equations 2 and 3).

    Args:
        dim: Channels C.
        mlp_dim: Hidden channels of the MLP.
        num_heads: Attention heads.
        attention: "joint" or "factorized", as in ``MultiHeadDotProductAttention``.
        dropout_rate: Dropout after the attention and in the MLP.
        attention_dropout_rate: Dropout of the attention probabilities.
        droplayer_p: Stochastic depth of both branches.
        qkv_bias: Whether queries, keys and values have a bias.
        gelu: "tanh" (the paper's) or "erf".
        layer_norm_eps: What LayerNorms add to the variance.
    """

    def __init__(
        self,
        dim: int,
        mlp_dim: int,
        num_heads: int,
        attention: str = "joint",
        dropout_rate: float = 0.1,
        attention_dropout_rate: float = 0.1,
        droplayer_p: float = 0.0,
        qkv_bias: bool = True,
        gelu: str = "tanh",
        layer_norm_eps: float = LAYER_NORM_EPS,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, layer_norm_eps)
        self.attn = MultiHeadDotProductAttention(dim, num_heads, attention, attention_dropout_rate, qkv_bias)
        self.dropout = nn.Dropout(dropout_rate)
        self.drop_layer = DropLayer(droplayer_p)
        self.norm2 = nn.LayerNorm(dim, layer_norm_eps)
        self.mlp = _mlp(dim, mlp_dim, dropout_rate, gelu)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (B, ..., S, C), or (B, T, N, C) for "factorized", to the same shape."""
        x = x + self.drop_layer(self.dropout(self.attn(self.norm1(x))))
        return x + self.drop_layer(self.mlp(self.norm2(x)))


class EncoderFactorizedSelfAttentionBlock(nn.Module):
    """Attention over one axis, then over the other, then an MLP, each with a residual (arXiv 2103.15691, model 3).

    Args:
        dim: Channels C.
        mlp_dim: Hidden channels of the MLP.
        num_heads: Attention heads of each of the two attentions.
        attention_order: "time_space" or "space_time".
        attention_kernel_init_method: "xavier", or "zero" for the projections of both attentions. With "zero" nothing
            but the bias of the output projections has a gradient, until those have moved.
        dropout_rate: Dropout after the attentions and in the MLP.
        attention_dropout_rate: Dropout of the attention probabilities.
        qkv_bias: Whether queries, keys and values have a bias.
        gelu: "tanh" (the paper's) or "erf".
        layer_norm_eps: What LayerNorms add to the variance.
    """

    def __init__(
        self,
        dim: int,
        mlp_dim: int,
        num_heads: int,
        attention_order: str = "time_space",
        attention_kernel_init_method: str = "xavier",
        dropout_rate: float = 0.1,
        attention_dropout_rate: float = 0.1,
        qkv_bias: bool = True,
        gelu: str = "tanh",
        layer_norm_eps: float = LAYER_NORM_EPS,
    ) -> None:
        super().__init__()
        if attention_order not in ("time_space", "space_time"):
            raise ValueError(f"attention_order must be time_space or space_time, got {attention_order!r}")
        self.attention_order = attention_order
        options = (attention_dropout_rate, qkv_bias, attention_kernel_init_method)
        self.norm_time = nn.LayerNorm(dim, layer_norm_eps)
        self.attn_time = MultiHeadDotProductAttention(dim, num_heads, "time", *options)
        self.norm_space = nn.LayerNorm(dim, layer_norm_eps)
        self.attn_space = MultiHeadDotProductAttention(dim, num_heads, "space", *options)
        self.dropout = nn.Dropout(dropout_rate)
        self.norm_mlp = nn.LayerNorm(dim, layer_norm_eps)
        self.mlp = _mlp(dim, mlp_dim, dropout_rate, gelu)

    def forward(self, x: Tensor) -> Tensor:
        """Map frames of tokens (B, T, N, C) to the same shape."""
        axes = [(self.norm_time, self.attn_time), (self.norm_space, self.attn_space)]
        for norm, attention in axes if self.attention_order == "time_space" else axes[::-1]:
            x = x + self.dropout(attention(norm(x)))
        return x + self.mlp(self.norm_mlp(x))

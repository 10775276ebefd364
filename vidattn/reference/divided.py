"""Attention over time or over space in plain PyTorch (TimeSformer, arXiv 2102.05095; ViViT, arXiv 2103.15691).

A clip is T frames of N sites. The groups of [`vidattn.reference.attention`][] are

* over time, the T frames of one site; group number b * N + n;
* over space, the N sites of one frame; group number b * T + t. With a cls token the group is that token and the sites,
  in this order. The T frames of a clip share the token: it is a key and a query in each of them, its context is that of
  each frame, or their mean (the released code of TimeSformer repeats the token and averages what comes out), and its
  gradient is the sum over the frames.

Frozen in Time (arXiv 2104.00650) lets the query of the cls token see the whole clip, ``cls_query="all"``. A group is
then the cls token and the frames of a site, or the sites of a frame; the token is a key there and no query. Its one
query attends to all rows of the clip, itself included, and the gradient of its key and value is the sum over the groups
and this query. In the dropout mask the groups have the numbers from above and the cls token is position 0 in them, so
that query 0 is free; the query that sees the whole clip b is query 0 of group b, and its key j is row j of the input.

The first ``temporal_heads`` heads attend over time and the others over space: all of them in ``temporal_attention``,
none in ``spatial_attention``, half in ViViT's model 4. Nothing is added to the scores.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vidattn.reference.attention import accumulator_dtype, attend, attend_backward

__all__ = [
    "divided_attention",
    "divided_attention_backward",
    "factorized_dot_product_attention",
    "spatial_attention",
    "temporal_attention",
]

QKV = Tensor | tuple[Tensor, Tensor, Tensor]


def temporal_attention(
    qkv: QKV,
    num_frames: int,
    *,
    token_order: str = "thw",
    cls_query: str = "own",
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Attend over the frames of each site, and over a cls token that sees the whole clip if there is one.

    Takes what [`vidattn.temporal_attention`][] takes, unvalidated, and the seed of the dropout.

    Args:
        qkv: (B, S, 3, h, d) packed, or three tensors (B, S, h, d).
        num_frames: T.
        token_order: "thw" or "hwt".
        cls_query: "own" or "all".
        scale: factor of q k^T, d**-0.5 when None.
        dropout_p: dropout probability.
        seed: int64 tensor with one element, needed when ``dropout_p > 0``.

    Returns:
        (B, S, h * d) in q's dtype.
    """
    q, k, v = qkv.unbind(-3) if isinstance(qkv, Tensor) else qkv
    heads, cls_token = q.shape[-2], "all" if cls_query == "all" else None
    return divided_attention(q, k, v, seed, num_frames, token_order, heads, cls_token, _scale(q, scale), dropout_p)[0]


def spatial_attention(
    qkv: QKV,
    num_frames: int,
    *,
    token_order: str = "thw",
    cls_token: str | None = None,
    cls_query: str = "own",
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend over the sites of each frame, and over a cls token that the frames share.

    Takes what [`vidattn.spatial_attention`][] takes, unvalidated, and the seed of the dropout.

    Args:
        qkv: (B, S, 3, h, d) packed, or three tensors (B, S, h, d).
        num_frames: T.
        token_order: "thw" or "hwt".
        cls_token: None, "mean" or "per_frame".
        cls_query: "own" or "all".
        scale: factor of q k^T, d**-0.5 when None.
        dropout_p: dropout probability.
        seed: int64 tensor with one element, needed when ``dropout_p > 0``.

    Returns:
        (B, S, h * d) in q's dtype; for "per_frame" the patches (B, T * N, h * d) and the cls contexts (B, T, h * d).
    """
    q, k, v = qkv.unbind(-3) if isinstance(qkv, Tensor) else qkv
    cls_token = "all" if cls_query == "all" else cls_token
    out, cls = divided_attention(q, k, v, seed, num_frames, token_order, 0, cls_token, _scale(q, scale), dropout_p)
    return (out, cls) if cls_token == "per_frame" else out


def factorized_dot_product_attention(
    qkv: QKV,
    num_frames: int,
    *,
    token_order: str = "thw",
    num_temporal_heads: int | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Attend over time with the first heads and over space with the others.

    Takes what [`vidattn.factorized_dot_product_attention`][] takes, unvalidated, and the seed of the dropout.

    Args:
        qkv: (B, S, 3, h, d) packed, or three tensors (B, S, h, d).
        num_frames: T.
        token_order: "thw" or "hwt".
        num_temporal_heads: heads that attend over time, half of them when None.
        scale: factor of q k^T, d**-0.5 when None.
        dropout_p: dropout probability.
        seed: int64 tensor with one element, needed when ``dropout_p > 0``.

    Returns:
        (B, S, h * d) in q's dtype.
    """
    q, k, v = qkv.unbind(-3) if isinstance(qkv, Tensor) else qkv
    heads = q.shape[-2] // 2 if num_temporal_heads is None else num_temporal_heads
    return divided_attention(q, k, v, seed, num_frames, token_order, heads, None, _scale(q, scale), dropout_p)[0]


def divided_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seed: Tensor | None,
    num_frames: int,
    token_order: str,
    temporal_heads: int,
    cls_token: str | None,
    scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """Attend over time with the first heads and over space with the others: what the three functions above share.

    Args:
        q: queries (B, S, h, d), S = T * N, and 1 more in front with a cls token.
        k: keys.
        v: values.
        seed: int64 tensor with one element, needed when ``dropout_p > 0``.
        num_frames: T.
        token_order: "thw" or "hwt".
        temporal_heads: heads that attend over time; 0 with a cls token, but all or none if its query sees all.
        cls_token: None, "mean", "per_frame", or "all" for one whose query sees the whole clip.
        scale: factor of q k^T.
        dropout_p: dropout probability.

    Returns:
        Context (B, S, h * d) in q's dtype, without the cls token for "per_frame"; and the context of the cls token in
        each frame (B, T, h * d), in q's dtype for "per_frame" and in the accumulator's for "mean", else empty.
    """
    groups = _Groups(q, num_frames, token_order, cls_token is not None)
    parts, cls = [], q.new_empty(q.shape[0], 0, q.shape[-2] * q.shape[-1])
    for over_time, heads in _shares(q, temporal_heads):
        sequences = (groups.sequences(x[..., heads, :], over_time) for x in (q, k, v))
        context, _ = attend(*sequences, scale=scale, dropout_p=dropout_p, seed=seed, first_head=heads.start)
        if cls_token in ("mean", "per_frame"):
            cls = groups.by_clip(context, over_time)[:, :, 0]
        parts.append(groups.tokens(context, over_time))
    out = torch.cat(parts, dim=-1)
    if cls_token == "per_frame":
        return out.to(q.dtype), cls.to(q.dtype)
    if cls_token == "mean":
        out = torch.cat((cls.mean(1, keepdim=True), out), dim=1)
    if cls_token == "all":
        whole, _ = attend(q[:, :1], k, v, scale=scale, dropout_p=dropout_p, seed=seed)
        out = torch.cat((whole, out), dim=1)
    return out.to(q.dtype), cls


def divided_attention_backward(
    grad_out: Tensor,
    grad_cls: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seed: Tensor | None,
    num_frames: int,
    token_order: str,
    temporal_heads: int,
    cls_token: str | None,
    scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Differentiate ``divided_attention`` by the formulas of ``vidattn.reference.attention``.

    Args:
        grad_out: gradient of the context.
        grad_cls: gradient of the cls token's context in each frame (B, T, h * d) for "per_frame", else None.
        q: as in the forward pass; so are all further arguments.
        k: keys.
        v: values.
        seed: int64 tensor with one element.
        num_frames: T.
        token_order: "thw" or "hwt".
        temporal_heads: heads that attend over time.
        cls_token: None, "mean", "per_frame" or "all".
        scale: factor of q k^T.
        dropout_p: dropout probability.

    Returns:
        Gradients of q, k and v in q's dtype.
    """
    groups = _Groups(q, num_frames, token_order, cls_token is not None)
    grad_out = grad_out.to(accumulator_dtype(q.dtype))
    whole = grad_out[:, :1]
    if cls_token == "mean":
        grad_cls = (whole / num_frames).expand(-1, num_frames, -1)
    if cls_token in ("mean", "all"):
        grad_out = grad_out[:, 1:]
    parts = []
    for over_time, heads in _shares(q, temporal_heads):
        q_part, k_part, v_part = (groups.sequences(x[..., heads, :], over_time) for x in (q, k, v))
        if cls_token == "all":
            grad_cls = torch.zeros_like(whole).expand(-1, groups.number(over_time), -1)
        grad = groups.sequences_of(grad_out.unflatten(-1, q.shape[-2:])[..., heads, :].flatten(-2), grad_cls, over_time)
        *grads, _ = attend_backward(
            grad,
            q_part,
            k_part,
            v_part,
            None,
            None,
            scale=scale,
            dropout_p=dropout_p,
            seed=seed,
            first_head=heads.start,
        )
        parts.append([groups.sum_of_copies(x, over_time) for x in grads])
    found = [torch.cat(heads, dim=-2) for heads in zip(*parts, strict=True)]
    if cls_token == "all":
        grad_q, *of_keys, _ = attend_backward(
            whole, q[:, :1], k, v, None, None, scale=scale, dropout_p=dropout_p, seed=seed
        )
        found = [torch.cat((grad_q, found[0][:, 1:]), dim=1), *(a + b for a, b in zip(found[1:], of_keys, strict=True))]
    grad_q, grad_k, grad_v = (x.to(q.dtype) for x in found)
    return grad_q, grad_k, grad_v


def _scale(q: Tensor, scale: float | None) -> float:
    return q.shape[-1] ** -0.5 if scale is None else scale


def _shares(q: Tensor, temporal_heads: int) -> list[tuple[bool, slice]]:
    """Give (do they attend over time, which heads) of those that attend alike."""
    shares = [(True, slice(0, temporal_heads)), (False, slice(temporal_heads, q.shape[-2]))]
    return [(over_time, heads) for over_time, heads in shares if heads.stop > heads.start]


class _Groups:
    """Which tokens attend together, for one shape of q."""

    def __init__(self, q: Tensor, num_frames: int, token_order: str, has_cls: bool) -> None:
        self.batch, self.num_frames = q.shape[0], num_frames
        self.has_cls = int(has_cls)
        self.num_sites = (q.shape[1] - self.has_cls) // num_frames
        self.time_fastest = token_order == "hwt"

    def number(self, over_time: bool) -> int:
        """Count the groups of a clip."""
        return self.num_sites if over_time else self.num_frames

    def sequences(self, x: Tensor, over_time: bool) -> Tensor:
        """Pick sequences (G, n, ...) from tokens (B, S, ...), the cls token once in each group."""
        cls = x[:, :1].expand(-1, self.number(over_time), *x.shape[2:]) if self.has_cls else None
        return self.sequences_of(x[:, self.has_cls :], cls, over_time)

    def sequences_of(self, patches: Tensor, cls: Tensor | None, over_time: bool) -> Tensor:
        """Arrange patches (B, T * N, ...), and a cls token (B, groups, ...) in front of each group's, as sequences."""
        if self.time_fastest:
            grid = patches.unflatten(1, (self.num_sites, self.num_frames))
        else:
            grid = patches.unflatten(1, (self.num_frames, self.num_sites))
        if self.time_fastest != over_time:
            grid = grid.transpose(1, 2)
        if cls is not None:
            grid = torch.cat((cls.unsqueeze(2), grid), dim=2)
        return grid.flatten(0, 1)

    def by_clip(self, sequences: Tensor, over_time: bool) -> Tensor:
        """View sequences (G, n, ...) as (B, groups, n, ...)."""
        return sequences.unflatten(0, (self.batch, self.number(over_time)))

    def tokens(self, sequences: Tensor, over_time: bool) -> Tensor:
        """Put the patches of sequences back in their places: (B, T * N, ...)."""
        grid = self.by_clip(sequences[:, self.has_cls :], over_time)
        return (grid.transpose(1, 2) if self.time_fastest != over_time else grid).flatten(1, 2)

    def sum_of_copies(self, sequences: Tensor, over_time: bool) -> Tensor:
        """Undo ``sequences``: tokens (B, S, ...), what belongs to the cls token summed over the groups."""
        patches = self.tokens(sequences, over_time)
        if not self.has_cls:
            return patches
        return torch.cat((self.by_clip(sequences, over_time)[:, :, 0].sum(1, keepdim=True), patches), dim=1)

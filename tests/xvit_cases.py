"""What X-ViT computes, written down a second time: one head, one channel, one token, one frame after the other."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from vidattn.models.xvit import Attention, Block, TemporalShift, XViT

TINY = {
    "img_size": 32,
    "num_classes": 5,
    "embed_dim": 24,
    "depth": 2,
    "num_heads": 3,
    "num_frames": 2,
    "num_segments": 4,
    "temporal_heads": 2,
    "temporal_mlp_dim": 10,
}


def roughen(module: nn.Module) -> nn.Module:
    """Make every branch visible: as initialised, residual branches hardly count, or are zero."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module


def tiny(**overrides: object) -> XViT:
    torch.manual_seed(0)
    return roughen(XViT(**{**TINY, **overrides}))


def naive_source(channel: int, heads: int, head_dim: int, n_div: int, per_head: bool, window: int) -> int:
    """Frame offset that a channel is read with."""
    share = (head_dim if per_head else heads * head_dim) // (n_div * window)
    place = channel % head_dim if per_head else channel
    offsets = [sign * distance for distance in range(1, window + 1) for sign in (1, -1)]
    return offsets[place // share] if share and place // share < len(offsets) else 0


def naive_shift(x: Tensor, frames: int, n_div: int, per_head: bool = False, window: int = 1) -> Tensor:
    """Shift (B * T, heads, N, head_dim)."""
    rows, heads, _, head_dim = x.shape
    result = torch.zeros_like(x)
    for row in range(rows):
        for channel in range(heads * head_dim):
            source = row % frames + naive_source(channel, heads, head_dim, n_div, per_head, window)
            if 0 <= source < frames:
                head, place = divmod(channel, head_dim)
                result[row, head, :, place] = x[row - row % frames + source, head, :, place]
    return result


def naive_attention(attention: Attention, clip: Tensor) -> Tensor:
    """Attention of the frames (T, N, C) of one segment."""
    frames, tokens, channels = clip.shape
    size = channels // attention.num_heads
    qkv = nn.functional.linear(clip, attention.qkv.weight, attention.qkv.bias)
    query, key, value = (part.unflatten(2, (-1, size)).transpose(1, 2) for part in qkv.split(channels, dim=2))
    summaries = []
    if attention.summary_frames:
        means = [frame[1:].mean(dim=0) for frame in clip]
        projected = [nn.functional.linear(mean, attention.qkv.weight, attention.qkv.bias) for mean in means]
        summaries = [row.split(channels)[1:] for row in projected]
    if attention.insert_control_point and isinstance(attention.control_point_query, TemporalShift):
        shift = attention.control_point_query
        key, value = (naive_shift(part, frames, shift.fold_div, shift.per_head, shift.window) for part in (key, value))
    context = torch.zeros(frames, tokens, channels, dtype=clip.dtype)
    for frame in range(frames):
        for head in range(attention.num_heads):
            part = slice(head * size, (head + 1) * size)
            keys = torch.stack([*key[frame, head], *(row[0][part] for row in summaries)])
            values = torch.stack([*value[frame, head], *(row[1][part] for row in summaries)])
            for row in range(tokens):
                weights = (keys @ query[frame, head, row] / math.sqrt(size)).exp()
                context[frame, row, part] = (weights / weights.sum()) @ values
    return attention.proj(context)


def naive_block(block: Block, x: Tensor) -> Tensor:
    x = x + naive_attention(block.attn, block.norm1(x))
    return x + block.mlp(block.norm2(x))


def naive_model(model: XViT, clip: Tensor) -> Tensor:
    """Logits of one clip (3, T, H, W)."""
    network = model.base_model
    frames = clip.shape[1]
    side = model.base_model.img_size // 16
    positions = network.pos_embed[0]
    if side != 14:
        plane = positions[1:].T.reshape(1, -1, 14, 14)
        plane = nn.functional.interpolate(plane, size=(side, side), mode="bicubic")
        positions = torch.cat((positions[:1], plane.reshape(-1, side * side).T))
    images = []
    for frame in range(frames):
        patches = network.patch_embed.proj(clip[None, :, frame])[0]  # (C, h, w)
        rows = [patches[:, y, x] for y in range(side) for x in range(side)]
        image = torch.stack([network.cls_token[0, 0], *rows]) + positions
        images.append(image + network.temp_embed[0, frame % network.num_frames])
    x = torch.stack(images)
    for block in network.blocks:
        x = torch.cat([naive_block(block, segment) for segment in x.split(model.num_segments)])
    features = network.norm(x)[:, 0]
    if model.consensus_type == "vit":
        sequence = torch.cat((model.consensus.cls_token[0], features))
        for block in model.consensus.temporal_encoder:
            sequence = naive_block(block, sequence[None])[0]
        norm, hidden, act, _, classify = model.consensus.mlp_head
        return classify(act(hidden(norm(sequence[0]))))
    logits = (model.new_fc or network.head)(features)
    if not model.before_softmax:
        logits = logits.softmax(dim=-1)
    return logits.mean(dim=0) if model.consensus_type == "avg" else logits

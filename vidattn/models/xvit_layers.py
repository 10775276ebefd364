"""Attention, blocks and the temporal head of X-ViT (arXiv 2106.05968); the models made of them are in xvit.py."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional

from vidattn.models.layers import DropPath, Mlp

ChannelShifts = tuple[tuple[int, int, int], ...]


def shift_channels(x: Tensor, num_frames: int, channel_shifts: Iterable[tuple[int, int, int]]) -> Tensor:
    """Read ranges of channels from neighbouring frames; zeros where there is no such frame.

    Args:
        x: Tokens (B * T, N, C), the frames of a clip one after the other.
        num_frames: Frames T of a clip.
        channel_shifts: ``(first, last, offset)`` for each range: channels first to last - 1 of frame t are those of
            frame t + offset. Channels of no range stay.

    Returns:
        Tokens of the same shape.

    Example:
        >>> frames = torch.arange(1, 4).view(3, 1, 1).expand(3, 1, 3)
        >>> shift_channels(frames, 3, [(0, 1, 1), (1, 2, -1)])[:, 0].tolist()
        [[2, 0, 1], [3, 1, 2], [0, 2, 3]]
    """
    clips = x.unflatten(0, (-1, num_frames))  # (B, T, N, C)
    shifted = clips.clone()
    for first, last, offset in channel_shifts:
        offset = max(-num_frames, min(offset, num_frames))
        # Negative padding drops the frames that nobody reads.
        shifted[..., first:last] = functional.pad(clips[..., first:last], (0, 0, 0, 0, -offset, offset))
    return shifted.flatten(0, 1)


class AfterReconstruction(nn.Identity):
    """A place in ``Attention`` that ``make_temporal_shift`` can put a shift into.

    Args:
        inplanes: Channels C that pass through.
    """

    def __init__(self, inplanes: int) -> None:
        super().__init__()
        self.inplanes = inplanes


class TemporalShift(nn.Module):
    """Read part of the channels of keys or values from the frames before and after (arXiv 2106.05968, equation 10).

    The paper cuts the channels of each head; its code, and the released weights, cut those of all heads together: the
    first C // n_div come from the next frame and as many from the one before, so that whole heads see no token of their
    own frame. Beyond the first and last frame there are zeros.

    Args:
        net: What was in this place before; it is applied to the result.
        n_segment: Frames that are shifted among each other, T.
        n_div: One n-th of the channels comes from the frames after, and one from those before; kept as ``fold_div``.
        per_head: Cut the channels of each head, as the paper says. No weights were published for this.
        window: Frames t_w to each side that channels come from, in equal shares and nearest first. No weights were
            published for more than 1.
    """

    def __init__(
        self, net: nn.Module, n_segment: int = 3, n_div: int = 8, per_head: bool = False, window: int = 1
    ) -> None:
        super().__init__()
        for name, value in (("n_segment", n_segment), ("n_div", n_div), ("window", window)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.net = net
        self.n_segment = n_segment
        self.fold_div = n_div
        self.per_head = per_head
        self.window = window

    def channel_shifts(self, num_heads: int, head_dim: int) -> ChannelShifts:
        """List which channels come from which frame.

        Args:
            num_heads: Attention heads h.
            head_dim: Channels d of a head.

        Returns:
            ``(first, last, offset)`` for each range of the h * d channels that is not read from the own frame.

        Example:
            >>> TemporalShift(nn.Identity(), n_segment=8, n_div=8).channel_shifts(12, 64)
            ((0, 96, 1), (96, 192, -1))
        """
        channels = num_heads * head_dim
        period = head_dim if self.per_head else channels
        fold = period // (self.fold_div * self.window)
        offsets = [offset for distance in range(1, self.window + 1) for offset in (distance, -distance)]
        ranges = (
            (start + place * fold, start + min((place + 1) * fold, period), offset)
            for start in range(0, channels, period)
            for place, offset in enumerate(offsets)
        )
        return tuple((first, last, offset) for first, last, offset in ranges if first < last)

    def forward(self, x: Tensor) -> Tensor:
        """Shift keys or values (B * T, heads, N, head_dim)."""
        if x.shape[0] % self.n_segment:
            raise ValueError(f"x must hold whole segments of {self.n_segment} frames, got {x.shape[0]} frames")
        heads, _, head_dim = x.shape[1:]
        tokens = shift_channels(x.transpose(1, 2).flatten(2), self.n_segment, self.channel_shifts(heads, head_dim))
        return self.net(tokens.unflatten(2, (heads, head_dim)).transpose(1, 2))

    def extra_repr(self) -> str:
        """Show what is shifted."""
        text = f"n_segment={self.n_segment}, n_div={self.fold_div}"
        return (
            text + (", per_head=True" if self.per_head else "") + (f", window={self.window}" if self.window > 1 else "")
        )


class Attention(nn.Module):
    """Multi-head self-attention inside each frame, whose keys and values may have been shifted over time.

    ``control_point_query`` is where keys are shifted and ``control_point_value`` where values are, by a
    ``TemporalShift`` in place of an identity. Queries are never shifted.

    Args:
        dim: Channels C.
        num_heads: Attention heads; divides ``dim``.
        qkv_bias: Whether the qkv projection has a bias.
        qk_scale: Scale of the scores; None or 0 means head_dim ** -0.5.
        attn_drop: Dropout of the attention probabilities.
        proj_drop: Dropout after the output projection.
        insert_control_point: Whether there are places for shifts.

    Attributes:
        summary_frames: Frames of a clip whose summary tokens are keys and values of all its frames (arXiv 2106.05968,
            section 3.3); 0 for none. Ours, as the paper leaves it open: a summary is the mean of the frame's patches
            as they enter the projection, it is projected by the same weights, and not shifted. No weights were
            published for this.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        insert_control_point: bool = False,
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"dim must be a multiple of num_heads, got dim={dim} and num_heads={num_heads}")
        self.num_heads = num_heads
        self.scale = qk_scale or (dim // num_heads) ** -0.5
        self.insert_control_point = insert_control_point
        self.summary_frames = 0
        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        if insert_control_point:
            self.control_point = AfterReconstruction(dim)
            self.control_point_query: nn.Module = AfterReconstruction(dim)
            self.control_point_value: nn.Module = AfterReconstruction(dim)

    def _summaries(self, tokens: Tensor) -> Tensor:
        """Give each frame of (B * T, heads, N, head_dim) the means (B * T, heads, T, head_dim) of its clip's frames."""
        frames = self.summary_frames
        if tokens.shape[0] % frames:
            raise ValueError(f"x must hold whole clips of {frames} frames, got {tokens.shape[0]} frames")
        # The projection is affine, so the mean of what it gives is what it gives for the mean.
        means = tokens[:, :, 1:].mean(dim=2).unflatten(0, (-1, frames)).transpose(1, 2)  # (B, heads, T, head_dim)
        return means.repeat_interleave(frames, dim=0)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (B * T, N, C) to (B * T, N, C)."""
        if self.insert_control_point:
            x = self.control_point(x)
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)  # (B * T, heads, N, head_dim)
        summaries = [self._summaries(tokens) for tokens in (key, value)] if self.summary_frames else []
        if self.insert_control_point:
            key, value = self.control_point_query(key), self.control_point_value(value)
        if summaries:
            key, value = (torch.cat(pair, dim=2) for pair in zip((key, value), summaries, strict=True))
        scores = (query @ key.transpose(-2, -1)) * self.scale
        probabilities = self.attn_drop(scores.softmax(dim=-1))
        context = (probabilities @ value).transpose(1, 2).flatten(2)
        return self.proj_drop(self.proj(context))


class Block(nn.Module):
    """A pre-norm block: attention, then an MLP, each with a residual.

    Args:
        dim: Channels C.
        num_heads: Attention heads.
        mlp_ratio: Hidden channels of the MLP over ``dim``.
        qkv_bias: Whether the qkv projection has a bias.
        qk_scale: Scale of the scores; None or 0 means head_dim ** -0.5.
        drop: Dropout after the output projection and inside the MLP.
        attn_drop: Dropout of the attention probabilities.
        drop_path: Stochastic depth; what is dropped is the branch of a single frame, not of a clip.
        act_layer: Activation of the MLP.
        norm_layer: Normalisation, called with ``dim``.
        insert_control_point: Whether the attention has places for shifts.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        norm_layer: Callable[[int], nn.Module] = nn.LayerNorm,
        insert_control_point: bool = False,
    ) -> None:
        super().__init__()
        self.insert_control_point = insert_control_point
        self.norm1 = norm_layer(dim)
        self.attn = Attention(dim, num_heads, qkv_bias, qk_scale, attn_drop, drop, insert_control_point)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.norm2 = norm_layer(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer=act_layer, drop=drop)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (B * T, N, C) to (B * T, N, C)."""
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


def make_temporal_shift(
    net: nn.Module,
    n_segment: int,
    n_div: int = 8,
    locations_list: Iterable[int] = (),
    per_head: bool = False,
    window: int = 1,
    summary_token: bool = False,
) -> None:
    """Put shifts into the listed blocks of a network.

    Args:
        net: Network whose ``blocks`` have places for shifts.
        n_segment: Frames that are shifted among each other.
        n_div: One n-th of the channels comes from the frames after, and one from those before.
        locations_list: Numbers of the blocks, from 0. Those that the network does not have are passed over: the
            published configuration lists 15 for a network of 12.
        per_head: See ``TemporalShift``.
        window: See ``TemporalShift``.
        summary_token: Whether the frames' summaries are keys and values too; see ``Attention``.

    Raises:
        ValueError: A number is negative, or a size is less than 1.
    """
    locations = set(locations_list)
    if any(location < 0 for location in locations):
        raise ValueError(f"locations_list must hold numbers of blocks, from 0, got {sorted(locations)}")
    for location, block in enumerate(net.blocks):  # type: ignore[arg-type]
        if location in locations:
            for place in ("control_point_query", "control_point_value"):
                shift = TemporalShift(getattr(block.attn, place), n_segment, n_div, per_head, window)
                setattr(block.attn, place, shift)
            block.attn.summary_frames = n_segment if summary_token else 0


class VitHead(nn.Module):
    """Classify a clip by attention over its frames and a cls token of the clip's (arXiv 2106.05968, section 3.3).

    There is no position embedding: the order of the frames does not matter.

    Args:
        embed_dim: Channels C of a frame.
        num_classes: Classes.
        num_heads: Attention heads.
        num_layers: Blocks.
        mlp_dim: Hidden channels of the classifier.
        attn_drop: Dropout of the attention probabilities.
        drop: Dropout and stochastic depth of the blocks.
        dropout_rate: Dropout in the classifier.
    """

    def __init__(
        self,
        embed_dim: int = 768,
        num_classes: int = 400,
        num_heads: int = 12,
        num_layers: int = 1,
        mlp_dim: int = 768,
        attn_drop: float = 0.0,
        drop: float = 0.0,
        dropout_rate: float = 0.5,
    ) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.temporal_encoder = nn.Sequential(
            *(Block(embed_dim, num_heads, attn_drop=attn_drop, drop=drop, drop_path=drop) for _ in range(num_layers))
        )
        self.mlp_head = nn.Sequential(
            nn.LayerNorm(embed_dim),
            nn.Linear(embed_dim, mlp_dim),
            nn.GELU(),
            nn.Dropout(dropout_rate),
            nn.Linear(mlp_dim, num_classes),
        )

    def forward(self, x: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """Map frames (B, T, C) to logits (B, num_classes). ``position_ids`` is not used."""
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
        return self.mlp_head(self.temporal_encoder(x)[:, 0])

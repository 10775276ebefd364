"""X-ViT of which each rank computes some frames: only the channels that a shift reads beyond them are exchanged."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from vidattn.distributed._sharding import Layout, Part, ShardedDrop, ShardedModel, ShardedModule
from vidattn.models import xvit, xvit_layers
from vidattn.nn.parts import attend, can_drop, is_number
from vidattn.twins import Twin


def _source(time: int, offset: int, segment: int) -> int | None:
    """Tell which frame of the clip a frame reads by a shift; None if there is none in its segment."""
    source = time + offset
    return source if source // segment == time // segment else None


def _frames_read(layout: Layout, reader: int, owner: int, offset: int, segment: int) -> list[int]:
    """List which frames of one rank another one reads by a shift, in the order of the frames that read them."""
    sources = (_source(time, offset, segment) for time in layout.times(reader))
    return [source for source in sources if source is not None and source in layout.times(owner)]


class ShardedShift(ShardedModule):
    """X-ViT's shift of keys or values."""

    def forward(self: Any, x: Tensor) -> Tensor:
        """Shift keys or values (B * own T, heads, N, head_dim)."""
        ranks, layout = self.clip.ranks, self.layout
        heads, _, head_dim = x.shape[1:]
        shifts = self.channel_shifts(heads, head_dim)
        if not shifts:
            return self.net(x)
        tokens = x.transpose(1, 2).flatten(2).unflatten(0, (-1, layout.tokens[ranks.rank]))  # (B, own T, N, C)
        batch, _, sites, _ = tokens.shape
        others = [rank for rank in range(ranks.size) if rank != ranks.rank]
        start = layout.own.start

        pieces, arriving = [tokens.new_empty(0)] * ranks.size, [[0]] * ranks.size
        for other in others:
            rows = []
            sizes = []
            for first, last, offset in shifts:
                sent = _frames_read(layout, other, ranks.rank, offset, self.n_segment)
                rows.append(tokens[:, [time - start for time in sent], :, first:last].flatten())
                read = _frames_read(layout, ranks.rank, other, offset, self.n_segment)
                sizes.append(batch * len(read) * sites * (last - first))
            pieces[other], arriving[other] = torch.cat(rows), sizes
        arrived = ranks.exchange(pieces, [[sum(sizes)] for sizes in arriving])
        halos = {other: arrived[other].split(arriving[other]) for other in others}

        shifted = tokens.clone()
        for number, (first, last, offset) in enumerate(shifts):
            width = last - first
            # What is read lies in a row: the own frames, then those of others, then zeros for frames that are none.
            held = [*layout.times(ranks.rank)]
            row = [tokens[..., first:last]]
            for other in others:
                read = _frames_read(layout, ranks.rank, other, offset, self.n_segment)
                row.append(halos[other][number].view(batch, len(read), sites, width))
                held += read
            row.append(tokens.new_zeros(batch, 1, sites, width))
            sources = [_source(time, offset, self.n_segment) for time in layout.times(ranks.rank)]
            places = [len(held) if source is None else held.index(source) for source in sources]
            index = torch.tensor(places, device=x.device)
            shifted[..., first:last] = torch.cat(row, dim=1).index_select(1, index)
        return self.net(shifted.flatten(0, 1).unflatten(2, (heads, head_dim)).transpose(1, 2))


class ShardedMixing(ShardedModule):
    """X-ViT's attention with shifted keys and values."""

    def forward(self: Any, x: Tensor) -> Tensor:
        """Map this rank's tokens (B * own T, N, C) to the same shape."""
        fused = issubclass(type(self), Twin) and can_drop(self.attn_drop) and is_number(self.scale)
        if not fused or self.summary_frames:
            return super().forward(x)  # type: ignore[misc]
        # The twin does not know the shifts of this file, so it would compute as the original does.
        qkv = self.qkv(self.control_point(x)).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = qkv.unbind(2)
        key, value = (
            shift(tokens.transpose(1, 2)).transpose(1, 2)
            for shift, tokens in ((self.control_point_query, key), (self.control_point_value, value))
        )
        context = attend((query, key, value), scale=self.scale, dropout_p=0.0, backend=self.attention_backend)
        return self.proj(context)

    def _summaries(self: Any, tokens: Tensor) -> Tensor:
        """Give each frame of (B * own T, heads, N, head_dim) the means (B * own T, heads, T, d) of its segment."""
        layout = self.layout
        means = tokens[:, :, 1:].mean(dim=2).unflatten(0, (-1, layout.tokens[layout.rank]))  # (B, own T, heads, d)
        means = self.clip.ranks.gather(means, 1, layout.tokens).unflatten(1, (-1, self.summary_frames))
        segments = [time // self.summary_frames for time in layout.times(layout.rank)]
        return means[:, segments].flatten(0, 1).transpose(1, 2)


class ShardedFrames(ShardedModule):
    """X-ViT's network, which sees each frame as an image."""

    def _time_embedding(self: Any, frames: int) -> Tensor:
        """Give the embedding (1, own T, 1, C) of the times of this rank's frames."""
        layout = self.layout
        every: Tensor = self.temp_embed.repeat(1, layout.total // self.num_frames, 1, 1)
        return every[:, layout.own]


class ShardedXViT(ShardedModel):
    """``XViT`` whose clip is cut. What is classified of each frame is sent to every rank."""

    def parts(self: Any) -> Iterator[Part]:
        """List the modules inside the model that have to change."""
        yield Part(self.base_model, xvit.VisionTransformer, ShardedFrames)
        for block in self.base_model.blocks:
            places = (block.attn.control_point_query, block.attn.control_point_value)
            shifts = [place for place in places if type(place) is not xvit_layers.AfterReconstruction]
            if shifts:
                yield Part(block.attn, xvit_layers.Attention, ShardedMixing)
            for shift in shifts:
                yield Part(shift, xvit_layers.TemporalShift, ShardedShift)
            if type(block.drop_path) is not nn.Identity:
                yield Part(block.drop_path, xvit.DropPath, ShardedDrop)
        if type(self.base_model.head) is not nn.Linear:
            yield Part(self.base_model.head, nn.Dropout, ShardedDrop)

    def after_the_ranks(self: Any) -> tuple[nn.Module, ...]:
        """Name the modules that see the same on every rank, or draw for all of them."""
        return self.base_model.head, self.consensus

    def logits(self: Any, part: Tensor) -> Tensor:
        """Map this rank's frames to the logits of the whole clip."""
        layout = self.layout
        multiple = math.lcm(self.base_model.num_frames, self.num_segments if self.use_xvit else 1)
        if layout.total % multiple:
            raise ValueError(
                f"video must have a multiple of {multiple} frames (num_frames={self.base_model.num_frames}, "
                f"num_segments={self.num_segments}), got {layout.total}"
            )
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze_backbone):
            features = self.base_model(part.transpose(1, 2).flatten(0, 1)).unflatten(0, (part.shape[0], -1))
            features = self.clip.ranks.gather(features, 1, layout.tokens)  # (B, T, C)
        if self.consensus_type != "vit":
            if self.new_fc is not None:
                features = self.new_fc(features)
            if not self.before_softmax:
                features = features.softmax(dim=-1)
        return self.consensus(features)

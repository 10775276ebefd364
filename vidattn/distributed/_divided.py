"""TimeSformer and ViViT of which each rank computes some frames.

Attention over time needs all frames of a site, so an all-to-all turns parts that hold some frames of all sites into
parts that hold all frames of some sites, and another one turns them back. Attention over the whole clip does the same
with heads in place of sites. Attention over space, norms and MLPs stay where the frames are, and a cls token of the
clip is at every rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vidattn.distributed._exchange import evenly
from vidattn.distributed._sharding import Part, ShardedDrop, ShardedModel, ShardedModule, backend_of
from vidattn.models import timesformer, vivit, vivit_layers
from vidattn.nn.parts import attend, draws
from vidattn.ops import spatial_attention, temporal_attention


def _attend_jointly(module: Any, qkv: Tensor, copies: int, scale: float | None) -> Tensor:
    """Attend over all tokens of a clip, each rank with some of the heads.

    Args:
        module: the attention.
        qkv: (B, copies + rows, 3, h, d): what every rank has, then the tokens of this rank's frames.
        copies: how many every rank has.
        scale: factor of the scores; d**-0.5 when None.

    Returns:
        Context (B, copies + rows, h * d).
    """
    ranks, layout = module.clip.ranks, module.layout
    everywhere, tokens = qkv.split((copies, qkv.shape[1] - copies), dim=1)
    sites = tokens.shape[1] // layout.tokens[ranks.rank]
    rows = [frames * sites for frames in layout.tokens]
    heads = evenly(qkv.shape[3], ranks.size)
    tokens = ranks.reshard(tokens, 1, rows, 3, heads)  # (B, S, 3, own heads, d)
    everywhere = everywhere.split(heads, dim=3)[ranks.rank]
    mine = torch.cat((everywhere, tokens), dim=1)
    if heads[ranks.rank]:
        context = attend(mine, scale=scale, dropout_p=0.0, backend=backend_of(module)).view(mine[:, :, 0].shape)
    else:
        context = mine[:, :, 0]  # empty, but the way back must lead through here on every rank
    everywhere = ranks.gather(context[:, :copies], 2, heads)
    tokens = ranks.reshard(context[:, copies:], 2, heads, 1, rows)
    return torch.cat((everywhere, tokens), dim=1).flatten(2)


class ShardedAttention(ShardedModule):
    """TimeSformer's attention over all tokens of a clip."""

    def forward(self: Any, x: Tensor) -> Tensor:
        """Map the cls token and the patches of this rank's frames (B, 1 + N * T, C) to the same shape."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
        return self.proj(_attend_jointly(self, qkv, 1, self.scale))


class ShardedBlock(ShardedModule):
    """TimeSformer's block of divided attention."""

    def _attend_divided(self: Any, x: Tensor, batch: int, num_frames: int) -> Tensor:
        """Attend over the frames of each patch, then over the patches of each frame, residuals included."""
        ranks, layout = self.clip.ranks, self.layout
        cls_token, patches = x[:, :1], x[:, 1:].unflatten(1, (-1, num_frames))  # (B, N, own T, C)
        sites = patches.shape[1]
        parts = evenly(sites, ranks.size)
        own = ranks.reshard(patches, 2, layout.tokens, 1, parts)  # (B, own N, T, C)
        over_time = self.temporal_attn(self.temporal_norm1(own.flatten(0, 1))).view(own.shape)
        if draws(self.drop_path):  # patches, those of all ranks on each
            over_time = over_time * self._factors(x, sites).split(parts, dim=1)[ranks.rank]
        over_time = self.temporal_fc(over_time)
        patches = patches + ranks.reshard(over_time, 1, parts, 2, layout.tokens)

        copies = cls_token.unsqueeze(1).expand(-1, num_frames, -1, -1)
        frames = torch.cat((copies, patches.transpose(1, 2)), dim=2)  # (B, own T, 1 + N, C)
        over_space = self.attn(self.norm1(frames.flatten(0, 1))).view(frames.shape)
        if draws(self.drop_path):  # frames
            over_space = over_space * self._factors(x, layout.total)[:, layout.own]
        cls_token = cls_token + ranks.sum(over_space[:, :, 0].mean(dim=1, keepdim=True) * layout.share)
        patches = patches + over_space[:, :, 1:].transpose(1, 2)
        return torch.cat((cls_token, patches.flatten(1, 2)), dim=1)

    def _factors(self: Any, x: Tensor, count: int) -> Tensor:
        """Draw what stochastic depth makes of ``count`` things of each clip: factors (B, count, 1, 1)."""
        return self.drop_path(x.new_ones(x.shape[0] * count, 1, 1)).view(-1, count, 1, 1)


class ShardedVisionTransformer(ShardedModule):
    """TimeSformer's network."""

    def _time_embedding(self: Any, num_frames: int) -> Tensor:
        """Fit the time embeddings to the clip, and take those of this rank's frames (1, own T, C)."""
        return super()._time_embedding(self.layout.total)[:, self.layout.own]  # type: ignore[misc]

    def forward_features(self: Any, x: Tensor) -> Tensor:
        """Map this rank's frames to the normalised cls token (B, C) of the clip."""
        if self.attention_type != "space_only":
            return super().forward_features(x)  # type: ignore[misc]
        cls_tokens = self.forward_tokens(x)[0][:, 0].unflatten(0, (x.shape[0], -1))  # (B, own T, C)
        return self.norm(self.clip.ranks.sum(cls_tokens.mean(dim=1) * self.layout.share))


class ShardedTimeSformer(ShardedModel):
    """``TimeSformer`` whose clip is cut."""

    def parts(self: Any) -> Iterator[Part]:
        """List the modules inside the model that have to change."""
        yield Part(self.model, timesformer.VisionTransformer, ShardedVisionTransformer)
        for block in self.model.blocks:
            if self.attention_type == "divided_space_time":
                yield Part(block, timesformer.Block, ShardedBlock)
            elif self.attention_type == "joint_space_time":
                yield Part(block.attn, timesformer.Attention, ShardedAttention)
            elif type(block.drop_path) is not nn.Identity:
                yield Part(block.drop_path, timesformer.DropPath, ShardedDrop)

    def logits(self: Any, part: Tensor) -> Tensor:
        """Map this rank's frames to the logits of the whole clip."""
        return self.model(part)


class ShardedTimeAttention(ShardedModule):
    """ViViT's attention over the frames of a site."""

    def forward(self: Any, x: Tensor) -> Tensor:
        """Attend: this rank's frames of tokens (B, own T, N, C) to the same shape."""
        ranks, layout = self.clip.ranks, self.layout
        parts = evenly(x.shape[2], ranks.size)
        own = ranks.reshard(x, 1, layout.tokens, 2, parts)  # (B, T, own N, C)
        return ranks.reshard(super().forward(own), 2, parts, 1, layout.tokens)  # type: ignore[misc]


class ShardedFactorizedAttention(ShardedModule):
    """ViViT's attention over time with the first half of the heads, over space with the rest."""

    def forward(self: Any, x: Tensor) -> Tensor:
        """Attend: this rank's frames of tokens (B, own T, N, C) to the same shape."""
        ranks, layout, backend = self.clip.ranks, self.layout, backend_of(self)
        time, space = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).chunk(2, dim=-2)
        parts = evenly(x.shape[2], ranks.size)
        time = ranks.reshard(time, 1, layout.tokens, 2, parts)  # (B, T, own N, 3, h / 2, d)
        over_time = temporal_attention(time.flatten(1, 2), layout.total, backend=backend)
        over_time = over_time.view(*time.shape[:3], x.shape[-1] // 2)
        over_time = ranks.reshard(over_time, 2, parts, 1, layout.tokens)
        over_space = spatial_attention(space.flatten(1, 2), x.shape[1], backend=backend)
        assert isinstance(over_space, Tensor)  # there is no cls token
        return self.proj(torch.cat((over_time, over_space.view(over_time.shape)), dim=-1))


class ShardedJointAttention(ShardedModule):
    """ViViT's attention over all tokens of a clip."""

    copies: ClassVar[int] = 0

    def forward(self: Any, x: Tensor) -> Tensor:
        """Attend: the class token, if there is one, and this rank's tokens (B, copies + own T * N, C) to the same."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
        return self.proj(_attend_jointly(self, qkv, self.copies, None))


class ShardedJointAttentionWithClass(ShardedJointAttention):
    """The same behind a class token, which every rank has."""

    copies = 1


class ShardedPatchEmbed(ShardedModule):
    """ViViT's patch embedding, which checks that clips have the size that it was made for."""

    def _grid(self: Any, frames: int, height: int, width: int) -> tuple[int, ...]:
        """Count the patches of the whole clip, and check that they are those that the model was built for."""
        whole = sum(self.layout.frames)
        grid = super()._grid(whole, height, width)  # type: ignore[misc]
        if grid != self.grid:
            raise ValueError(
                f"part: expected parts of a clip of {self.grid} patches, for which the position embedding was made, "
                f"got {grid} patches in {whole} frames of {height} x {width} on all ranks"
            )
        return grid


class ShardedEncoder(ShardedModule):
    """ViViT's encoder of all tokens of a clip."""

    def forward(self: Any, x: Tensor) -> Tensor:
        """Encode this rank's tokens (B, own T * N, C); the class token is added in front."""
        layout = self.layout
        frames = layout.tokens[layout.rank]
        copies = 0 if self.cls_token is None else 1
        position = self.pos_embed[:, copies:].unflatten(1, (layout.total, -1))[:, layout.own].flatten(1, 2)
        if self.cls_token is not None:
            x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
            position = torch.cat((self.pos_embed[:, :1], position), dim=1)
        x = x + position
        shape = x.shape
        if self.temporal_dims is not None:
            x = x.unflatten(1, (frames, -1))
        for block in self.blocks:
            x = block(x)
        return self.norm(x.reshape(shape))


class _ShardedClassifier(ShardedModel):
    """What the two architectures of ViViT share."""

    def frames_used(self: Any, video: Tensor) -> Tensor:
        """Select the frames that are sampled, where the model samples frames."""
        sampled = self.patch_embed.sampled_frames
        return video if sampled is None else vivit.sample_frames_uniformly(video, sampled)

    def tokens_of(self: Any, frames: int) -> int:
        """Tell how many tokens along time a number of frames becomes."""
        return frames // self.unit(frames)

    def unit(self: Any, frames: int) -> int:
        """Tell how many frames may not be cut apart: those of a tubelet."""
        return 1 if self.patch_embed.sampled_frames is not None else self.patch_embed.patches[2]

    def parts(self: Any) -> Iterator[Part]:
        """List the modules inside the model that have to change."""
        embed = self.patch_embed
        if embed.sampled_frames is not None and embed.image_size[0] % embed.patches[0]:
            raise ValueError(
                f"shard_frames: model: expected frames of a multiple of {embed.patches[0]} pixels in height, so that "
                f"no patch is of two frames, got {embed.image_size[0]}"
            )
        yield Part(embed, vivit.PatchEmbed, ShardedPatchEmbed)


class ShardedViViT(_ShardedClassifier):
    """``ViViT`` whose clip is cut."""

    def parts(self: Any) -> Iterator[Part]:
        """List the modules inside the model that have to change."""
        yield from _ShardedClassifier.parts(self)
        yield Part(self.transformer, vivit.Encoder, ShardedEncoder)
        kinds: dict[str, type] = {"time": ShardedTimeAttention, "factorized": ShardedFactorizedAttention}
        kinds["joint"] = ShardedJointAttention if self.classifier != "token" else ShardedJointAttentionWithClass
        for module in self.transformer.modules():
            if isinstance(module, vivit_layers.MultiHeadDotProductAttention) and module.attention in kinds:
                yield Part(module, vivit_layers.MultiHeadDotProductAttention, kinds[module.attention])

    def logits(self: Any, part: Tensor) -> Tensor:
        """Map this rank's frames to the logits of the whole clip."""
        tokens, ranks = self.transformer(self.patch_embed(part)), self.clip.ranks
        if self.classifier == "token":
            return self._classify(tokens[:, 0])
        if self.classifier == "gmp":
            return self._classify(_maximum(self, tokens))
        pooled = tokens.mean(dim=1) * self.layout.share if self.classifier == "gap" else tokens.sum(dim=1)
        return self._classify(ranks.sum(pooled))


def _maximum(model: ShardedModel, tokens: Tensor) -> Tensor:
    """Give the maximum of the tokens (B, rows, C) of all ranks; tokens that are equal share its gradient."""
    ranks = model.clip.ranks
    largest = ranks.maximum(tokens.detach().amax(dim=1))
    found = tokens == largest.unsqueeze(1)
    share = ranks.sum((tokens * found).sum(dim=1)) / ranks.sum(found.sum(dim=1).to(tokens.dtype))
    return largest + (share - share.detach())


class ShardedSpaceTimeViViT(_ShardedClassifier):
    """``SpaceTimeViViT`` whose clip is cut.

    Frames are encoded where they are, and what becomes of each is sent to every rank, which encodes the clip.
    """

    def after_the_ranks(self: Any) -> tuple[nn.Module, ...]:
        """Name the modules that see the same on every rank: the temporal encoder."""
        return () if self.temporal_transformer is None else (self.temporal_transformer,)

    def logits(self: Any, part: Tensor) -> Tensor:
        """Map this rank's frames to the logits of the whole clip."""
        layout = self.layout
        frames = self.patch_embed(part).unflatten(1, (layout.tokens[layout.rank], -1))  # (B, own T, N, C)
        frames = vivit._pool(self.spatial_transformer(frames), self.classifier)
        frames = self.clip.ranks.gather(frames, 1, layout.tokens)
        if self.temporal_transformer is None:
            return self._classify(vivit._pool(frames, "gap"))
        return self._classify(vivit._pool(self.temporal_transformer(frames), self.classifier))

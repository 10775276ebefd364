"""TimeSformer in plain PyTorch (arXiv 2102.05095).

The classes, their constructors and their state-dict keys are those of the paper's code, so its checkpoints load
strictly. What the released weights depend on is kept exactly, surprising as some of it is:

- Time is the fastest index: a clip is one cls token, then row 1 + n * T + t for patch n of frame t.
- In divided attention the cls token takes no part over time, neither as query nor as key (equation 13 says otherwise).
  Over space each frame attends together with the cls token as it entered the block, and the mean of the cls token's
  results over the frames is added to it.
- Stochastic depth drops the temporal branch of single patches, before ``temporal_fc`` (whose bias stays), and the
  spatial branch of single frames.
- Position embeddings of another grid are taken from the nearest patch. Whether to do so is decided by the number of
  patches alone, so a 2 x 8 grid on a model for 4 x 4 uses them in their order, unresized.
- Scores are scaled after the product of queries and keys, and LayerNorms of the published models have epsilon 1e-6.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from vidattn.models.layers import DropPath, Mlp
from vidattn.tracing import traced_for_one_size

if TYPE_CHECKING:
    from os import PathLike

__all__ = ["Attention", "Block", "DropPath", "Mlp", "PatchEmbed", "TimeSformer", "VisionTransformer"]

ATTENTION_TYPES = ("divided_space_time", "joint_space_time", "space_only")


def _check_attention_type(attention_type: str) -> None:
    if attention_type not in ATTENTION_TYPES:
        raise ValueError(f"attention_type must be one of {', '.join(ATTENTION_TYPES)}, got {attention_type!r}")


def _pair(name: str, value: int | Sequence[int]) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or not all(isinstance(axis, int) and axis >= 1 for axis in pair):
        raise ValueError(f"{name} must be one or two integers, at least 1, got {value!r}")
    return pair[0], pair[1]


class Attention(nn.Module):
    """Multi-head self-attention over all tokens of a sequence.

    Args:
        dim: Channels C.
        num_heads: Attention heads; divides ``dim``.
        qkv_bias: Whether the qkv projection has a bias.
        qk_scale: Scale of the scores; None or 0 means head_dim ** -0.5.
        attn_drop: Dropout of the attention probabilities.
        proj_drop: Dropout after the output projection.
        with_qkv: Without it there are no projections: the tokens are queries, keys and values.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        with_qkv: bool = True,
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"dim must be a multiple of num_heads, got dim={dim} and num_heads={num_heads}")
        self.num_heads = num_heads
        self.scale = qk_scale or (dim // num_heads) ** -0.5
        self.with_qkv = with_qkv
        if with_qkv:
            self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias)
            self.proj = nn.Linear(dim, dim)
            self.proj_drop = nn.Dropout(proj_drop)
        self.attn_drop = nn.Dropout(attn_drop)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (B, N, C) to (B, N, C)."""
        batch, tokens, channels = x.shape
        heads = self.num_heads
        if self.with_qkv:
            qkv = self.qkv(x).reshape(batch, tokens, 3, heads, channels // heads).permute(2, 0, 3, 1, 4)
            query, key, value = qkv.unbind(0)
        else:
            query = key = value = x.reshape(batch, tokens, heads, channels // heads).transpose(1, 2)
        scores = (query @ key.transpose(-2, -1)) * self.scale
        probabilities = self.attn_drop(scores.softmax(dim=-1))
        context = (probabilities @ value).transpose(1, 2).reshape(batch, tokens, channels)
        return self.proj_drop(self.proj(context)) if self.with_qkv else context


class Block(nn.Module):
    """A pre-norm block: attention over space and time, then an MLP, each with a residual (arXiv 2102.05095, section 3).

    Args:
        dim: Channels C.
        num_heads: Attention heads.
        mlp_ratio: Hidden channels of the MLP over ``dim``.
        qkv_bias: Whether the qkv projections have a bias.
        qk_scale: Scale of the scores; None or 0 means head_dim ** -0.5.
        drop: Dropout after the projections and inside the MLP.
        attn_drop: Dropout of the attention probabilities.
        drop_path: Stochastic depth of the residual branches.
        act_layer: Activation of the MLP.
        norm_layer: Normalisation, called with ``dim``.
        attention_type: "divided_space_time" attends over time, then over space; "joint_space_time" and "space_only"
            over all tokens they are given.
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
        drop_path: float = 0.1,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        norm_layer: Callable[[int], nn.Module] = nn.LayerNorm,
        attention_type: str = "divided_space_time",
    ) -> None:
        super().__init__()
        _check_attention_type(attention_type)
        self.attention_type = attention_type
        self.norm1 = norm_layer(dim)
        self.attn = Attention(dim, num_heads, qkv_bias, qk_scale, attn_drop, drop)
        if attention_type == "divided_space_time":
            self.temporal_norm1 = norm_layer(dim)
            self.temporal_attn = Attention(dim, num_heads, qkv_bias, qk_scale, attn_drop, drop)
            self.temporal_fc = nn.Linear(dim, dim)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.norm2 = norm_layer(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer=act_layer, drop=drop)

    def _attend_divided(self, x: Tensor, batch: int, num_frames: int) -> Tensor:
        """Attend over the frames of each patch, then over the patches of each frame, residuals included."""
        cls_token, patches = x[:, :1], x[:, 1:]
        rows, channels = patches.shape[1:]
        if num_frames < 1 or rows % num_frames or x.shape[0] != batch:
            raise ValueError(
                f"x must be ({batch}, 1 + patches * {num_frames}, channels) for B={batch} and T={num_frames}, "
                f"got {tuple(x.shape)}"
            )
        sites = rows // num_frames
        over_time = self.temporal_norm1(patches.reshape(batch * sites, num_frames, channels))
        over_time = self.drop_path(self.temporal_attn(over_time))
        patches = patches + self.temporal_fc(over_time.reshape(batch, rows, channels))

        frames = patches.reshape(batch, sites, num_frames, channels).transpose(1, 2)
        copies = cls_token.unsqueeze(1).expand(batch, num_frames, 1, channels)
        frames = torch.cat((copies, frames), dim=2).reshape(batch * num_frames, 1 + sites, channels)
        over_space = self.drop_path(self.attn(self.norm1(frames))).reshape(batch, num_frames, 1 + sites, channels)
        cls_token = cls_token + over_space[:, :, 0].mean(dim=1, keepdim=True)
        patches = patches + over_space[:, :, 1:].transpose(1, 2).reshape(batch, rows, channels)
        return torch.cat((cls_token, patches), dim=1)

    def forward(self, x: Tensor, B: int, T: int, W: int) -> Tensor:
        """Run the block.

        Args:
            x: Tokens (B, 1 + N * T, C), the cls token first, then time fastest; (B * T, 1 + N, C) for "space_only".
            B: Clips.
            T: Frames.
            W: Patches of a row, as the paper's code passes them; which of the N patches are in a row does not matter.

        Returns:
            Tokens of the same shape.
        """
        if self.attention_type == "divided_space_time":
            x = self._attend_divided(x, B, T)
        else:
            x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    """Cut each frame into patches and project each to a token.

    Args:
        img_size: Height and width in pixels that ``num_patches`` is counted for, or one number for both.
        patch_size: Patch (height, width) in pixels, or one number for both.
        in_chans: Channels of the video.
        embed_dim: Channels C of a token.
    """

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        patch_size: int | Sequence[int] = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
    ) -> None:
        super().__init__()
        self.img_size = _pair("img_size", img_size)
        self.patch_size = _pair("patch_size", patch_size)
        self.num_patches = math.prod(size // patch for size, patch in zip(self.img_size, self.patch_size, strict=True))
        self.in_chans = in_chans
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=self.patch_size, stride=self.patch_size)

    def forward(self, x: Tensor) -> tuple[Tensor, int, int]:
        """Embed a video.

        Args:
            x: Video (B, in_chans, T, H, W). What does not fill a patch on the right and at the bottom is left out.

        Returns:
            Tokens (B * T, N, C) of each frame, row by row, the number of frames T, and the patches of a row.
        """
        height, width = self.patch_size
        if x.ndim != 5 or x.shape[1] != self.in_chans or x.shape[2] < 1 or x.shape[3] < height or x.shape[4] < width:
            raise ValueError(
                f"video must be (batch, {self.in_chans}, frames, height, width), at least one frame of "
                f"{height} x {width}, got {tuple(x.shape)}"
            )
        num_frames = x.shape[2]
        x = self.proj(x.transpose(1, 2).flatten(0, 1))
        return x.flatten(2).transpose(1, 2), num_frames, x.shape[-1]


class VisionTransformer(nn.Module):
    """The network of TimeSformer: video (B, in_chans, T, H, W) to logits (B, num_classes) (arXiv 2102.05095).

    The defaults are those of the paper's code, which are not its published models: those are [`TimeSformer`][].

    Args:
        img_size: Height and width in pixels, or one number for both.
        patch_size: Patch (height, width) in pixels, or one number for both.
        in_chans: Channels of the video.
        num_classes: Classes; 0 leaves the classifier out.
        embed_dim: Channels C.
        depth: Blocks.
        num_heads: Attention heads.
        mlp_ratio: Hidden channels of an MLP over C.
        qkv_bias: Whether the qkv projections have a bias.
        qk_scale: Scale of the scores; None or 0 means head_dim ** -0.5.
        drop_rate: Dropout of the tokens, after projections and inside the MLPs.
        attn_drop_rate: Dropout of the attention probabilities.
        drop_path_rate: Stochastic depth of the last block; it grows linearly from 0 in the first.
        hybrid_backbone: Kept from the paper's constructor, which does not use it; must be None.
        norm_layer: Normalisation, called with the number of channels.
        num_frames: Frames that there are time embeddings for.
        attention_type: "divided_space_time", "joint_space_time" or "space_only".
        dropout: Kept from the paper's constructor, which does not use it.

    Example:
        >>> model = VisionTransformer(img_size=32, num_classes=5, embed_dim=24, depth=2, num_heads=2, num_frames=4)
        >>> model(torch.zeros(1, 3, 4, 32, 32)).shape
        torch.Size([1, 5])
    """

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        patch_size: int | Sequence[int] = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        hybrid_backbone: None = None,
        norm_layer: Callable[[int], nn.Module] = nn.LayerNorm,
        num_frames: int = 8,
        attention_type: str = "divided_space_time",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        _check_attention_type(attention_type)
        if hybrid_backbone is not None:
            raise ValueError(f"hybrid_backbone must be None, got {hybrid_backbone!r}")
        if num_frames < 1:
            raise ValueError(f"num_frames must be at least 1, got {num_frames}")
        self.attention_type = attention_type
        self.depth = depth
        self.dropout = nn.Dropout(dropout)
        self.num_classes = num_classes
        self.num_features = self.embed_dim = embed_dim
        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, embed_dim)
        if self.patch_embed.num_patches < 1:
            raise ValueError(f"img_size must hold a patch of {self.patch_embed.patch_size}, got {img_size}")
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, self.patch_embed.num_patches + 1, embed_dim))
        self.pos_drop = nn.Dropout(drop_rate)
        if attention_type != "space_only":
            self.time_embed = nn.Parameter(torch.zeros(1, num_frames, embed_dim))
            self.time_drop = nn.Dropout(drop_rate)
        self.blocks = nn.ModuleList(
            Block(
                dim=embed_dim,
                num_heads=num_heads,
                mlp_ratio=mlp_ratio,
                qkv_bias=qkv_bias,
                qk_scale=qk_scale,
                drop=drop_rate,
                attn_drop=attn_drop_rate,
                drop_path=drop_path_rate * block / max(depth - 1, 1),
                norm_layer=norm_layer,
                attention_type=attention_type,
            )
            for block in range(depth)
        )
        self.norm = norm_layer(embed_dim)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes > 0 else nn.Identity()
        self.init_weights()

    def init_weights(self) -> None:
        """Initialise as the paper's code does.

        Linear layers, the cls token and the position embeddings get a truncated normal of deviation 0.02, biases and
        time embeddings zero, LayerNorms one and zero; the convolution keeps PyTorch's default. Each ``temporal_fc`` is
        zero, so that a new model of divided attention starts as one that attends over space alone.
        """
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        if self.attention_type != "space_only":
            nn.init.zeros_(self.time_embed)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, Block) and module.attention_type == "divided_space_time":
                nn.init.zeros_(module.temporal_fc.weight)
                nn.init.zeros_(module.temporal_fc.bias)

    def no_weight_decay(self) -> set[str]:
        """Name the parameters that are trained without weight decay."""
        return {"pos_embed", "cls_token", "time_embed"}

    def get_classifier(self) -> nn.Module:
        """Return the classification layer."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str = "") -> None:
        """Replace the classification layer by a new one; 0 classes leave it out. ``global_pool`` is not used."""
        self.num_classes = num_classes
        self.head = nn.Linear(self.embed_dim, num_classes) if num_classes > 0 else nn.Identity()

    def _position_embedding(self, grid: tuple[int, int]) -> Tensor:
        """Fit the position embeddings (1, 1 + N, C) to a grid of patches (height, width)."""
        patches = self.pos_embed.shape[1] - 1
        if math.prod(grid) == patches:
            return self.pos_embed
        side = math.isqrt(patches)
        if side * side != patches:
            raise ValueError(
                f"video must give {patches} patches, got {grid[0]} x {grid[1]}: position embeddings are resized only "
                f"where img_size is square, not {self.patch_embed.img_size}"
            )
        plane = self.pos_embed[:, 1:].transpose(1, 2).unflatten(2, (side, side))
        plane = functional.interpolate(plane, size=grid, mode="nearest")
        return torch.cat((self.pos_embed[:, :1], plane.flatten(2).transpose(1, 2)), dim=1)

    def _time_embedding(self, num_frames: int) -> Tensor:
        """Fit the time embeddings (1, T, C) to a number of frames."""
        if num_frames == self.time_embed.shape[1]:
            return self.time_embed
        line = functional.interpolate(self.time_embed.transpose(1, 2), size=num_frames, mode="nearest")
        return line.transpose(1, 2)

    def forward_tokens(self, x: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
        """Run everything before the last norm.

        Args:
            x: Video (B, in_chans, T, H, W), of any length and resolution.

        Returns:
            Tokens as the blocks have them (``Block.forward``), and the grid (T, h, w) of patches.
        """
        batch = x.shape[0]
        x, num_frames, width = self.patch_embed(x)
        patches = x.shape[1]
        grid = (num_frames, patches // width, width)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
        x = self.pos_drop(x + self._position_embedding(grid[1:]))
        if self.attention_type != "space_only":
            # All frames have the same cls token (but for dropout): one of them is the clip's.
            cls_token = x[:batch, :1]
            x = x[:, 1:].reshape(batch, num_frames, patches, self.embed_dim).transpose(1, 2)
            x = self.time_drop(x + self._time_embedding(num_frames))  # (B, N, T, C)
            x = torch.cat((cls_token, x.flatten(1, 2)), dim=1)
        for block in self.blocks:
            x = block(x, batch, num_frames, width)
        return x, grid

    def forward_features(self, x: Tensor) -> Tensor:
        """Map a video (B, in_chans, T, H, W) to the normalised cls token (B, C), which the classifier reads."""
        batch = x.shape[0]
        x, (num_frames, _, _) = self.forward_tokens(x)
        if self.attention_type == "space_only":
            x = x.reshape(batch, num_frames, *x.shape[1:]).mean(dim=1)
        return self.norm(x)[:, 0]

    @traced_for_one_size
    def forward(self, x: Tensor) -> Tensor:
        """Map a video (B, in_chans, T, H, W) to logits (B, num_classes)."""
        return self.head(self.forward_features(x))


class TimeSformer(nn.Module):
    """TimeSformer with ViT-B/16 as its network, under the keys of released checkpoints (``model.*``).

    Args:
        img_size: Height and width in pixels, or one number for both.
        patch_size: Patch (height, width) in pixels, or one number for both.
        num_classes: Classes.
        num_frames: Frames that there are time embeddings for.
        attention_type: "divided_space_time", "joint_space_time" or "space_only".
        pretrained_model: Checkpoint to start from, of a TimeSformer or of an image ViT; "" for random weights (the
            paper's code then downloads an image ViT, which this does not).
        **kwargs: Other arguments of [`VisionTransformer`][], to differ from ViT-B.

    Example:
        >>> model = TimeSformer(img_size=32, num_classes=5, num_frames=4, embed_dim=24, depth=2, num_heads=2)
        >>> model(torch.zeros(1, 3, 4, 32, 32)).shape
        torch.Size([1, 5])
    """

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        patch_size: int | Sequence[int] = 16,
        num_classes: int = 400,
        num_frames: int = 8,
        attention_type: str = "divided_space_time",
        pretrained_model: str | PathLike[str] = "",
        **kwargs: Any,
    ) -> None:
        super().__init__()
        vit_base: dict[str, Any] = {"qkv_bias": True, "norm_layer": partial(nn.LayerNorm, eps=1e-6)}
        self.model = VisionTransformer(
            img_size=img_size,
            patch_size=patch_size,
            num_classes=num_classes,
            num_frames=num_frames,
            attention_type=attention_type,
            **{**vit_base, **kwargs},
        )
        self.attention_type = attention_type
        self.num_patches = self.model.patch_embed.num_patches
        if pretrained_model:
            from vidattn.models.checkpoint import load_checkpoint

            load_checkpoint(self, pretrained_model, strict=False)

    def forward_features(self, video: Tensor) -> Tensor:
        """Map a video (B, in_chans, T, H, W) to the normalised tokens of its patches (B, C, T, h, w)."""
        batch = video.shape[0]
        tokens, (num_frames, height, width) = self.model.forward_tokens(video)
        patches = self.model.norm(tokens)[:, 1:]
        if self.attention_type == "space_only":
            frames = patches.reshape(batch, num_frames, height, width, self.model.embed_dim)
            return frames.permute(0, 4, 1, 2, 3)
        return patches.reshape(batch, height, width, num_frames, self.model.embed_dim).permute(0, 4, 3, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Map a video (B, in_chans, T, H, W), of any length and resolution, to logits (B, num_classes)."""
        return self.model(x)

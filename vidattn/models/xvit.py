"""X-ViT, space-time mixing attention, in plain PyTorch (arXiv 2106.05968).

The classes and their state-dict keys are those of the paper's code, so its checkpoints load strictly. Code and paper
differ; what the released weights depend on is kept, and it is the code:

- Every frame is an image of its own with its own cls token. Attention stays inside the frame, but in the listed blocks
  part of the channels of all its keys and values, cls included, are those of the frame before or after.
- The channels are cut over all heads together, not inside each; beyond a segment's first and last frame are zeros, not
  the projection's bias.
- A segment may be shorter than the clip: the published Kinetics models see 16 frames as two segments of 8, which only
  the temporal head brings together. Time embeddings likewise repeat after 8 frames.
- Position embeddings are always those of 224 x 224 pixels, resized at every run for any other ``img_size``.
- Stochastic depth drops single frames of a branch.

Slips of the code that change no result of the published models are left out: ``train()`` and ``eval()`` return the
model; ``torch.no_grad()`` is respected; clips of a batch are never mixed, nor cut into several results, where they are
shorter or longer than a segment; frames of another shape with as many patches are refused; any block can shift.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from vidattn.models.layers import DropPath, Mlp
from vidattn.models.xvit_config import read_config
from vidattn.models.xvit_layers import (
    AfterReconstruction,
    Attention,
    Block,
    TemporalShift,
    VitHead,
    make_temporal_shift,
    shift_channels,
)
from vidattn.tracing import traced_for_one_size

if TYPE_CHECKING:
    from os import PathLike

    from typing_extensions import Self

__all__ = [
    "AfterReconstruction",
    "Attention",
    "Block",
    "ConsensusModule",
    "DropPath",
    "Mlp",
    "PatchEmbed",
    "TemporalShift",
    "VisionTransformer",
    "VitHead",
    "XViT",
    "make_temporal_shift",
    "shift_channels",
]

CONSENSUS_TYPES = ("vit", "avg", "identity")
# The size in pixels that position embeddings are made for, and the patches that their resizing counts in.
_TABLE_SIZE = 224
_TABLE_PATCH = 16


class PatchEmbed(nn.Module):
    """Cut each frame into patches and project each to a token, row by row.

    Args:
        img_size: Height and width in pixels that ``num_patches`` is counted for.
        patch_size: Height and width of a patch in pixels.
        in_chans: Channels of a frame.
        embed_dim: Channels C of a token.
    """

    def __init__(self, img_size: int = 224, patch_size: int = 16, in_chans: int = 3, embed_dim: int = 768) -> None:
        super().__init__()
        self.img_size = img_size
        self.patch_size = patch_size
        self.num_patches = (img_size // patch_size) ** 2
        self.in_chans = in_chans
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """Map frames (B * T, in_chans, H, W) to tokens (B * T, N, C); pixels that fill no patch are left out."""
        return self.proj(x).flatten(2).transpose(1, 2)


class VisionTransformer(nn.Module):
    """The network that sees the frames: (B * T, in_chans, H, W) to logits of each frame (B * T, num_classes).

    Its blocks have places for shifts; ``make_temporal_shift`` fills them. Without shifts it sees each frame alone.

    Args:
        img_size: Height and width of a frame in pixels.
        patch_size: Height and width of a patch in pixels.
        in_chans: Channels of a frame.
        num_frames: Time embeddings; they repeat after that many frames.
        num_classes: Classes; 0 leaves the classifier out.
        embed_dim: Channels C.
        depth: Blocks.
        num_heads: Attention heads.
        mlp_ratio: Hidden channels of an MLP over C.
        qkv_bias: Whether the qkv projections have a bias.
        qk_scale: Scale of the scores; None or 0 means head_dim ** -0.5.
        representation_size: Channels of a layer before the classifier; None: no such layer.
        drop_rate: Dropout of the tokens, after projections and inside the MLPs.
        attn_drop_rate: Dropout of the attention probabilities.
        drop_path_rate: Stochastic depth of the last block; it grows linearly from 0 in the first.
        hybrid_backbone: Kept from the paper's constructor; must be None.
        norm_layer: Normalisation, called with the number of channels; None: LayerNorm with epsilon 1e-6.

    Example:
        >>> network = VisionTransformer(img_size=32, num_classes=5, embed_dim=24, depth=2, num_heads=2)
        >>> network(torch.zeros(8, 3, 32, 32)).shape
        torch.Size([8, 5])
    """

    def __init__(
        self,
        img_size: int = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_frames: int = 8,
        num_classes: int = 1000,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        representation_size: int | None = None,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        hybrid_backbone: None = None,
        norm_layer: Callable[[int], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("img_size", img_size), ("patch_size", patch_size), ("num_frames", num_frames)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer, at least 1, got {value!r}")
        if hybrid_backbone is not None:
            raise ValueError(f"hybrid_backbone must be None, got {hybrid_backbone!r}")
        norm_layer = norm_layer or partial(nn.LayerNorm, eps=1e-6)
        self.img_size = img_size
        self.num_frames = num_frames
        self.num_classes = num_classes
        self.embed_dim = embed_dim
        self.num_features = representation_size or embed_dim
        self.patch_embed = PatchEmbed(_TABLE_SIZE, patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, self.patch_embed.num_patches + 1, embed_dim))
        self.temp_embed = nn.Parameter(torch.zeros(1, num_frames, 1, embed_dim))
        self.pos_drop = nn.Dropout(drop_rate)
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
                insert_control_point=True,
            )
            for block in range(depth)
        )
        self.norm = norm_layer(embed_dim)
        self.pre_logits: nn.Module = nn.Identity()
        if representation_size:
            layers = OrderedDict(fc=nn.Linear(embed_dim, representation_size), act=nn.Tanh())
            self.pre_logits = nn.Sequential(layers)
        self.head: nn.Module
        self.reset_classifier(num_classes)
        self.init_weights()

    def init_weights(self) -> None:
        """Initialise as the paper's code does.

        Linear layers, the cls token and the position embeddings get a truncated normal of deviation 0.02, biases and
        time embeddings zero, LayerNorms one and zero; the convolution keeps PyTorch's default.
        """
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.zeros_(self.temp_embed)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)

    def no_weight_decay(self) -> set[str]:
        """Name the parameters that are trained without weight decay."""
        return {"pos_embed", "cls_token", "temp_embed"}

    def get_classifier(self) -> nn.Module:
        """Return the classification layer."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str = "") -> None:
        """Replace the classification layer by a new one; 0 classes leave it out. ``global_pool`` is not used."""
        self.num_classes = num_classes
        self.head = nn.Linear(self.num_features, num_classes) if num_classes > 0 else nn.Identity()

    def _position_embedding(self) -> tuple[Tensor, int]:
        """Fit the position embeddings (1, 1 + N, C) to ``img_size``; also return the patches of a side."""
        side = math.isqrt(self.pos_embed.shape[1] - 1)
        if self.img_size == _TABLE_SIZE:
            return self.pos_embed, side
        plane = self.pos_embed[:, 1:].transpose(1, 2).unflatten(2, (side, side))
        # A factor, not a size: where patches do not fill the frame, the two give different numbers.
        factor = (self.img_size / _TABLE_PATCH) / (_TABLE_SIZE / _TABLE_PATCH)
        plane = functional.interpolate(plane, scale_factor=factor, mode="bicubic")
        return torch.cat((self.pos_embed[:, :1], plane.flatten(2).transpose(1, 2)), dim=1), plane.shape[-1]

    def _time_embedding(self, frames: int) -> Tensor:
        """Give the embedding (1, T, 1, C) of the times of as many frames, those of all clips of a batch."""
        if frames % self.num_frames:
            raise ValueError(f"frames must be a multiple of num_frames={self.num_frames}, got {frames}")
        return self.temp_embed

    def forward_tokens(self, x: Tensor) -> Tensor:
        """Run everything before the last norm: frames (B * T, in_chans, H, W) to tokens (B * T, 1 + N, C)."""
        patch, channels = self.patch_embed.patch_size, self.patch_embed.in_chans
        if x.ndim != 4 or x.shape[1] != channels:
            raise ValueError(f"frames must be (batch * frames, {channels}, height, width), got {tuple(x.shape)}")
        times = self._time_embedding(x.shape[0])
        position, side = self._position_embedding()
        grid = (x.shape[2] // patch, x.shape[3] // patch)
        if grid != (side, side):
            raise ValueError(
                f"frames must give {side} x {side} patches of {patch} pixels, for which img_size={self.img_size} has "
                f"position embeddings, got {grid[0]} x {grid[1]} patches of frames {x.shape[2]} x {x.shape[3]}"
            )
        x = self.patch_embed(x)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
        x = self.pos_drop(x + position)
        x = (x.unflatten(0, (-1, times.shape[1])) + times).flatten(0, 1)
        for block in self.blocks:
            x = block(x)
        return x

    def forward_features(self, x: Tensor) -> Tensor:
        """Map frames (B * T, in_chans, H, W) to what the classifier reads of each, its normalised cls token."""
        return self.pre_logits(self.norm(self.forward_tokens(x))[:, 0])

    def forward(self, x: Tensor) -> Tensor:
        """Map frames (B * T, in_chans, H, W) to logits (B * T, num_classes)."""
        return self.head(self.forward_features(x))


class ConsensusModule(nn.Module):
    """Make one result of those of a clip's frames, without parameters.

    Args:
        consensus_type: "avg" for their mean, "identity" for all of them.
    """

    def __init__(self, consensus_type: str) -> None:
        super().__init__()
        self.consensus_type = consensus_type

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, classes) to (B, classes), or leave it as it is."""
        return x.mean(dim=1) if self.consensus_type == "avg" else x

    def extra_repr(self) -> str:
        """Show the type."""
        return self.consensus_type


class XViT(nn.Module):
    """X-ViT: a vision transformer whose frames exchange channels of keys and values (arXiv 2106.05968).

    The defaults are the published model with ViT-B/16 for Kinetics-400.

    Args:
        img_size: Height and width of a frame in pixels.
        patch_size: Height and width of a patch in pixels.
        in_chans: Channels of the video.
        num_classes: Classes.
        embed_dim: Channels C.
        depth: Blocks.
        num_heads: Attention heads.
        mlp_ratio: Hidden channels of an MLP over C.
        qkv_bias: Whether the qkv projections have a bias.
        qk_scale: Scale of the scores; None or 0 means head_dim ** -0.5.
        representation_size: Channels of a layer after the backbone; None: no such layer.
        num_frames: Time embeddings; they repeat after that many frames. 8 in all published configurations, also in
            those for 16 frames.
        num_segments: Frames that are shifted among each other. The frames of a clip are a multiple of it and of
            ``num_frames``.
        shift_div: One n-th of the channels comes from the next frame, and one from the one before.
        locations_list: Numbers of the blocks that shift, from 0; None: all.
        use_xvit: Without it no block shifts, which is attention over space alone.
        consensus_type: "vit" for the temporal head, "avg" for the mean of the frames' logits, "identity" for the logits
            (B, T, num_classes) of all frames.
        before_softmax: Without it ("avg" only) probabilities of the frames are averaged, not logits.
        dropout_rate: Dropout after the backbone and in the temporal head. At 0, except for "vit", the classifier is
            ``base_model.head`` and not ``new_fc``.
        drop_rate: Dropout of the tokens, after projections and inside the MLPs.
        attn_drop_rate: Dropout of the attention probabilities.
        drop_path_rate: Stochastic depth of the last block; it grows linearly from 0 in the first.
        norm_layer: Normalisation of the backbone, called with C; None: LayerNorm with epsilon 1e-6.
        temporal_heads: Attention heads of the temporal head.
        temporal_layers: Blocks of the temporal head.
        temporal_mlp_dim: Hidden channels of its classifier.
        temporal_attn_drop: Dropout of its attention probabilities.
        temporal_drop: Dropout and stochastic depth of its blocks.
        freeze_backbone: Compute no gradients of the backbone.
        shift_per_head: From the paper, without published weights: cut the channels of each head, not of all together.
        shift_window: From the paper, without published weights: frames t_w to each side that channels come from.
        summary_token: From the paper, without published weights: in the blocks that shift, a mean of each frame of
            the segment is a key and value of all its frames. See ``Attention``.
        pretrained_model: Checkpoint to start from, of an X-ViT or of an image ViT; "" for random weights (the paper's
            code then downloads an image ViT, which this does not).

    Example:
        >>> model = XViT(img_size=32, num_classes=5, embed_dim=24, depth=2, num_heads=2, temporal_heads=2)
        >>> model(torch.zeros(1, 3, 8, 32, 32)).shape
        torch.Size([1, 5])
    """

    def __init__(
        self,
        img_size: int = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 400,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        representation_size: int | None = None,
        num_frames: int = 8,
        num_segments: int = 8,
        shift_div: int = 8,
        locations_list: Iterable[int] | None = None,
        use_xvit: bool = True,
        consensus_type: str = "vit",
        before_softmax: bool = True,
        dropout_rate: float = 0.5,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_layer: Callable[[int], nn.Module] | None = None,
        temporal_heads: int = 12,
        temporal_layers: int = 1,
        temporal_mlp_dim: int = 768,
        temporal_attn_drop: float = 0.0,
        temporal_drop: float = 0.0,
        freeze_backbone: bool = False,
        shift_per_head: bool = False,
        shift_window: int = 1,
        summary_token: bool = False,
        pretrained_model: str | PathLike[str] = "",
    ) -> None:
        super().__init__()
        if consensus_type not in CONSENSUS_TYPES:
            raise ValueError(f"consensus_type must be one of {', '.join(CONSENSUS_TYPES)}, got {consensus_type!r}")
        if not before_softmax and consensus_type != "avg":
            raise ValueError(f"before_softmax must be True unless consensus_type is 'avg', got {consensus_type!r}")
        if num_segments < 1:
            raise ValueError(f"num_segments must be at least 1, got {num_segments}")
        self.num_segments = num_segments
        self.use_xvit = use_xvit
        self.consensus_type = consensus_type
        self.before_softmax = before_softmax
        self.freeze_backbone = freeze_backbone
        self.base_model = VisionTransformer(
            img_size=img_size,
            patch_size=patch_size,
            in_chans=in_chans,
            num_frames=num_frames,
            num_classes=0,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            qkv_bias=qkv_bias,
            qk_scale=qk_scale,
            representation_size=representation_size,
            drop_rate=drop_rate,
            attn_drop_rate=attn_drop_rate,
            drop_path_rate=drop_path_rate,
            norm_layer=norm_layer,
        )
        if use_xvit:
            locations = range(depth) if locations_list is None else tuple(locations_list)
            make_temporal_shift(
                self.base_model, num_segments, shift_div, locations, shift_per_head, shift_window, summary_token
            )
        elif summary_token:
            raise ValueError("summary_token must be False where use_xvit is")

        width = self.base_model.num_features
        classifier = nn.Linear(width, num_classes)
        nn.init.normal_(classifier.weight, std=0.001)
        nn.init.zeros_(classifier.bias)
        self.base_model.num_classes = num_classes
        self.new_fc: nn.Linear | None = None
        if dropout_rate > 0 or consensus_type == "vit":
            self.base_model.head = nn.Dropout(dropout_rate)
            self.new_fc = classifier  # released checkpoints of "vit" have it as well, though nothing reads it
        else:
            self.base_model.head = classifier
        self.consensus: nn.Module = ConsensusModule(consensus_type)
        if consensus_type == "vit":
            self.consensus = VitHead(
                width,
                num_classes,
                temporal_heads,
                temporal_layers,
                temporal_mlp_dim,
                temporal_attn_drop,
                temporal_drop,
                dropout_rate,
            )
        if pretrained_model:
            from vidattn.models.checkpoint import load_checkpoint

            load_checkpoint(self, pretrained_model, strict=False)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **overrides: Any) -> Self:
        """Build the model that a configuration of the paper's code describes.

        Args:
            config: The configuration, flat ({"XVIT.SHIFT_DIV": 4}) or nested ({"XVIT": {"SHIFT_DIV": 4}}). What is
                missing has the default of the paper's code (but ``XVIT.BASE_MODEL``, whose default it cannot build, is
                "vit_base_patch16_224_in21k"); keys about training and data are not used.
            **overrides: Arguments of this class that differ.

        Returns:
            The model, randomly initialised: ``XVIT.PRETRAIN`` is not used either.

        Raises:
            ValueError: A value is not known, or a key in the sections XVIT or TEMPORAL_HEAD.

        Example:
            >>> config = {"XVIT.SHIFT_DIV": 4, "XVIT.NUM_SEGMENTS": 16, "MODEL.NUM_CLASSES": 174}
            >>> model = XViT.from_config(config, img_size=32, embed_dim=24, depth=2)
            >>> model.new_fc.out_features
            174
        """
        return cls(**read_config(config, **overrides))

    def _frames(self, x: Tensor | Sequence[Any]) -> tuple[Tensor, int]:
        """Find the clip in the input, and lay its frames out as (B * T, in_chans, H, W); also return T."""
        while isinstance(x, list | tuple):  # [clip, index], or that in a list
            if not x:
                raise ValueError("video must be a tensor, or a list that starts with one, got an empty list")
            x = x[0]
        assert isinstance(x, Tensor)
        channels = self.base_model.patch_embed.in_chans
        if x.ndim != 5 or x.shape[1] != channels:
            raise ValueError(f"video must be (batch, {channels}, frames, height, width), got {tuple(x.shape)}")
        num_frames = x.shape[2]
        multiple = math.lcm(self.base_model.num_frames, self.num_segments if self.use_xvit else 1)
        if num_frames < 1 or num_frames % multiple:
            raise ValueError(
                f"video must have a multiple of {multiple} frames (num_frames={self.base_model.num_frames}, "
                f"num_segments={self.num_segments}), got {num_frames}"
            )
        return x.transpose(1, 2).flatten(0, 1), num_frames

    def forward_features(self, video: Tensor | Sequence[Any]) -> Tensor:
        """Map a video (B, in_chans, T, H, W) to the normalised tokens of its patches (B, C, T, h, w)."""
        frames, num_frames = self._frames(video)
        patches = self.base_model.norm(self.base_model.forward_tokens(frames))[:, 1:]
        side = math.isqrt(patches.shape[1])
        return patches.unflatten(1, (side, side)).unflatten(0, (-1, num_frames)).permute(0, 4, 1, 2, 3)

    @traced_for_one_size
    def forward(self, x: Tensor | Sequence[Any]) -> Tensor:
        """Classify a video.

        Args:
            x: Video (B, in_chans, T, H, W), or ``[video, index]`` as the paper's code has it; the index is not used.

        Returns:
            Logits (B, num_classes); (B, T, num_classes) for "identity".
        """
        frames, num_frames = self._frames(x)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze_backbone):
            features = self.base_model(frames)
        if self.consensus_type != "vit":
            if self.new_fc is not None:
                features = self.new_fc(features)
            if not self.before_softmax:
                features = features.softmax(dim=1)
        return self.consensus(features.unflatten(0, (-1, num_frames)))

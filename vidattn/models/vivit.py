"""ViViT, the Video Vision Transformer, in plain PyTorch (arXiv 2103.15691).

The classes have the names and arguments of the paper's code, plus the size of the clips, because position embeddings
are made for one size. The names of the parameters are ours; ``vidattn.models.vivit_checkpoint`` translates. What the
released weights depend on is kept:

- Tokens are ordered (time, height, width), time slowest, and a class token comes before them.
- GELU is the tanh approximation; LayerNorm adds 1e-6 (``layer_norm_eps``).
- Patches are (height, width, frames), time last. Pixels that fill no patch are dropped.
- Uniform frame sampling puts the frames below each other and cuts the tall picture into patches, so frames whose
  height is no multiple of a patch's share patches.
- Dropped branches of stochastic depth are not compensated for by scaling the kept ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vidattn.models.vivit_layers import (
    LAYER_NORM_EPS,
    EncoderBlock,
    EncoderFactorizedSelfAttentionBlock,
    MultiHeadDotProductAttention,
    dot_product_attention,
    factorized_dot_product_attention,
)
from vidattn.tracing import traced_for_one_size

__all__ = [
    "Encoder",
    "EncoderBlock",
    "EncoderFactorizedSelfAttentionBlock",
    "MultiHeadDotProductAttention",
    "PatchEmbed",
    "SpaceTimeViViT",
    "ViViT",
    "dot_product_attention",
    "factorized_dot_product_attention",
    "inflate_kernel",
    "sample_frames_uniformly",
]

CLASSIFIERS = ("token", "gap", "gmp", "gsp")
KERNEL_INIT_METHODS = ("central_frame_initializer", "average_frame_initializer", "average_arp_frame_initializer")
_FACTORIZED = ("factorized_self_attention_block", "factorized_dot_product_attention")


class Encoder(nn.Module):
    """Position embedding, blocks and a final norm, with a class token in front if there is one.

    Args:
        dim: Channels C.
        num_tokens: Tokens that come in; the class token is not counted.
        mlp_dim: Hidden channels of the MLPs.
        num_layers: Blocks.
        num_heads: Attention heads.
        attention_config: ``type`` is "spacetime", "factorized_encoder" (the same block),
            "factorized_self_attention_block" (with ``attention_order`` and ``attention_kernel_init_method``) or
            "factorized_dot_product_attention". None: "spacetime".
        temporal_dims: Frames among the tokens; needed by the factorized types only.
        class_token: Whether there is a class token.
        dropout_rate: Dropout after the position embedding, the attentions and in the MLPs.
        attention_dropout_rate: Dropout of the attention probabilities.
        stochastic_droplayer_rate: Stochastic depth of the last block; it grows linearly from 0 in the first. Blocks of
            factorized self-attention have none.
        qkv_bias: Whether queries, keys and values have a bias.
        gelu: "tanh" (the paper's) or "erf".
        layer_norm_eps: What LayerNorms add to the variance.
    """

    def __init__(
        self,
        dim: int,
        num_tokens: int,
        mlp_dim: int,
        num_layers: int,
        num_heads: int,
        attention_config: Mapping[str, Any] | None = None,
        temporal_dims: int | None = None,
        class_token: bool = False,
        dropout_rate: float = 0.1,
        attention_dropout_rate: float = 0.1,
        stochastic_droplayer_rate: float = 0.0,
        qkv_bias: bool = True,
        gelu: str = "tanh",
        layer_norm_eps: float = LAYER_NORM_EPS,
    ) -> None:
        super().__init__()
        config = dict(attention_config or {})
        kind = config.pop("type", "spacetime")
        if kind not in ("spacetime", "factorized_encoder", *_FACTORIZED):
            raise ValueError(
                "attention_config must have a type of spacetime, factorized_encoder, "
                f"{' or '.join(_FACTORIZED)}, got {kind!r}"
            )
        if kind in _FACTORIZED and (class_token or not temporal_dims or num_tokens % temporal_dims):
            raise ValueError(
                f"attention of type {kind} needs whole frames without a class token, got {num_tokens} tokens, "
                f"temporal_dims={temporal_dims} and class_token={class_token}"
            )
        self.temporal_dims = temporal_dims if kind in _FACTORIZED else None
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim)) if class_token else None
        self.pos_embed = nn.Parameter(torch.empty(1, num_tokens + class_token, dim))
        nn.init.normal_(self.pos_embed, std=0.02)
        self.pos_drop = nn.Dropout(dropout_rate)
        options: dict[str, Any] = {
            "dropout_rate": dropout_rate,
            "attention_dropout_rate": attention_dropout_rate,
            "qkv_bias": qkv_bias,
            "gelu": gelu,
            "layer_norm_eps": layer_norm_eps,
        }
        blocks: list[nn.Module] = []
        for layer in range(num_layers):
            if kind == "factorized_self_attention_block":
                blocks.append(EncoderFactorizedSelfAttentionBlock(dim, mlp_dim, num_heads, **config, **options))
                continue
            attention = "factorized" if kind == "factorized_dot_product_attention" else "joint"
            rate = stochastic_droplayer_rate * layer / max(num_layers - 1, 1)
            blocks.append(EncoderBlock(dim, mlp_dim, num_heads, attention, droplayer_p=rate, **options))
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(dim, layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        """Encode tokens (B, ..., num_tokens, C); the class token is added in front."""
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(*x.shape[:-2], 1, -1), x], dim=-2)
        x = self.pos_drop(x + self.pos_embed)
        shape = x.shape
        if self.temporal_dims is not None:
            x = x.unflatten(1, (self.temporal_dims, -1))
        for block in self.blocks:
            x = block(x)
        return self.norm(x.reshape(shape))


def sample_frames_uniformly(video: Tensor, num_frames: int) -> Tensor:
    """Take frames at equal distances from each other and from both ends (arXiv 2103.15691, section 3.2).

    Args:
        video: Video (B, channels, T, H, W).
        num_frames: Frames to take; a video with no more of them is returned whole.

    Returns:
        Video (B, channels, min(T, num_frames), H, W).

    Example:
        >>> sample_frames_uniformly(torch.arange(32).view(1, 1, 32, 1, 1), 8).flatten().tolist()
        [4, 7, 11, 14, 18, 21, 25, 28]
    """
    frames = video.shape[2]
    if num_frames >= frames:
        return video
    chosen = [min(round(step * frames / (num_frames + 1)), frames - 1) for step in range(1, num_frames + 1)]
    return video[:, :, chosen]


def inflate_kernel(kernel: Tensor, num_frames: int, method: str = "central_frame_initializer") -> Tensor:
    """Make the weight of a tubelet embedding from that of an image's patch embedding (arXiv 2103.15691, section 3.4).

    Args:
        kernel: Weight (C, channels, fh, fw).
        num_frames: Frames ft of a tubelet.
        method: "central_frame_initializer" uses it for frame ft // 2 and zero for the others;
            "average_frame_initializer" repeats it and divides by ft, so that a still video gives what its image gave;
            "average_arp_frame_initializer" weighs the repeated frames as approximate rank pooling does
            (arXiv 1612.00738, equation 3).

    Returns:
        Weight (C, channels, ft, fh, fw).

    Raises:
        ValueError: ``method`` is not known.

    Example:
        >>> inflate_kernel(torch.ones(1, 1, 1, 1), 4).flatten().tolist()
        [0.0, 0.0, 1.0, 0.0]
    """
    if method == "central_frame_initializer":
        weights = [float(frame == num_frames // 2) for frame in range(num_frames)]
    elif method == "average_frame_initializer":
        weights = [1.0 / num_frames] * num_frames
    elif method == "average_arp_frame_initializer":
        harmonic = [sum(1.0 / step for step in range(1, count + 1)) for count in range(num_frames + 1)]
        weights = [
            (2 * (num_frames - frame) - (num_frames + 1) * (harmonic[-1] - harmonic[frame])) / num_frames
            for frame in range(num_frames)
        ]
    else:
        raise ValueError(f"method must be one of {', '.join(KERNEL_INIT_METHODS)}, got {method!r}")
    return torch.stack([kernel * weight for weight in weights], dim=2)


class PatchEmbed(nn.Module):
    """Cut a clip into tokens: tubelets, or patches of uniformly sampled frames (arXiv 2103.15691, section 3.2).

    Args:
        patches: (height, width, frames) of a tubelet in pixels, or (height, width) with uniform frame sampling.
        hidden_size: Channels C of a token.
        temporal_encoding_config: ``method`` is "3d_conv" for tubelets, with the ``kernel_init_method``
            "central_frame_initializer", "average_frame_initializer", "average_arp_frame_initializer" or None, or
            "temporal_sampling" with ``n_sampled_frames``. None: "3d_conv".
        num_frames: Frames of a clip.
        image_size: Pixels of a frame, one number or (height, width).
        in_channels: Channels of the video.

    Attributes:
        temporal_dims: Frames of tokens T'.
        grid: Patches of a clip, (time, height, width), or (rows of all frames, width) where frames are sampled.
        num_tokens: All tokens of a clip.
    """

    def __init__(
        self,
        patches: Sequence[int],
        hidden_size: int,
        temporal_encoding_config: Mapping[str, Any] | None = None,
        num_frames: int = 32,
        image_size: int | Sequence[int] = 224,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        config = {"method": "3d_conv", **(temporal_encoding_config or {})}
        sizes = {"3d_conv": 3, "temporal_sampling": 2}
        method = config["method"]
        if method not in sizes:
            raise ValueError(f"temporal_encoding_config must have a method of {' or '.join(sizes)}, got {method!r}")
        if len(patches) != sizes[method] or min(patches) < 1:
            raise ValueError(f"patches must be {sizes[method]} positive numbers for {method}, got {tuple(patches)}")
        self.patches = tuple(patches)
        self.in_channels = in_channels
        self.kernel_init_method: str | None = config.get("kernel_init_method")
        self.sampled_frames: int | None = None
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        self.image_size = (height, width)
        self.num_frames = num_frames
        fh, fw = self.patches[:2]
        self.proj: nn.Conv2d | nn.Conv3d
        if method == "temporal_sampling":
            self.sampled_frames = int(config["n_sampled_frames"])
            self.temporal_dims = min(self.sampled_frames, num_frames)
            self.proj = nn.Conv2d(in_channels, hidden_size, (fh, fw), stride=(fh, fw))
        else:
            ft = self.patches[2]
            self.temporal_dims = num_frames // ft
            self.proj = nn.Conv3d(in_channels, hidden_size, (ft, fh, fw), stride=(ft, fh, fw))
        self.grid = self._grid(num_frames, height, width)
        self.num_tokens = math.prod(self.grid)
        if self.num_tokens == 0:
            raise ValueError(
                f"patches must fit into the clip, got {self.patches} for {num_frames} frames of {(height, width)}"
            )
        self._init_weights()

    def _grid(self, frames: int, height: int, width: int) -> tuple[int, ...]:
        """Count patches: (time, height, width), or (rows of all frames, width) where frames are sampled."""
        fh, fw = self.patches[:2]
        if self.sampled_frames is None:
            return frames // self.patches[2], height // fh, width // fw
        return min(self.sampled_frames, frames) * height // fh, width // fw

    @torch.no_grad()
    def _init_weights(self) -> None:
        weight, bias = self.proj.weight, self.proj.bias
        assert bias is not None
        # A normal cut off at two deviations, of variance 1 / inputs after the cut.
        std = math.sqrt(1.0 / weight[0].numel()) / 0.87962566103423978
        nn.init.trunc_normal_(weight, std=std, a=-2.0 * std, b=2.0 * std)
        nn.init.zeros_(bias)
        if self.kernel_init_method is not None and weight.ndim == 5:
            # The image kernel has the deviation of the whole tubelet's, and an average starts from the sum of frames.
            frames = weight.shape[2]
            scale = frames if self.kernel_init_method == "average_frame_initializer" else 1
            weight.copy_(inflate_kernel(weight[:, :, 0] * scale, frames, self.kernel_init_method))

    def forward(self, video: Tensor) -> Tensor:
        """Map a video (B, in_channels, T, H, W) to tokens (B, num_tokens, C), ordered (time, height, width)."""
        if video.ndim != 5 or video.shape[1] != self.in_channels or 0 in video.shape[2:]:
            raise ValueError(
                f"video must be (batch, {self.in_channels}, frames, height, width), no axis empty, "
                f"got {tuple(video.shape)}"
            )
        frames, height, width = video.shape[2:]
        grid = self._grid(frames, height, width)
        if grid != self.grid:
            raise ValueError(
                f"video must give a grid of {self.grid} patches, for which the position embedding was made, "
                f"got {grid} from {frames} frames of {height} x {width}"
            )
        if self.sampled_frames is not None:
            video = sample_frames_uniformly(video, self.sampled_frames).flatten(2, 3)  # (B, in_channels, T * H, W)
        return self.proj(video).flatten(2).transpose(1, 2)


def _pool(tokens: Tensor, classifier: str) -> Tensor:
    """Reduce tokens (..., S, C) to what is classified (..., C)."""
    if classifier == "token":
        return tokens[..., 0, :]
    if classifier == "gap":
        return tokens.mean(dim=-2)
    return tokens.amax(dim=-2) if classifier == "gmp" else tokens.sum(dim=-2)


class _Classifier(nn.Module):
    """What both architectures share: the patch embedding below, pre-logits and classification layer above."""

    def __init__(
        self,
        num_classes: int,
        classifier: str,
        representation_size: int | None,
        patch_embed: PatchEmbed,
        hidden_size: int,
    ) -> None:
        super().__init__()
        if classifier not in CLASSIFIERS:
            raise ValueError(f"classifier must be one of {', '.join(CLASSIFIERS)}, got {classifier!r}")
        self.num_classes = num_classes
        self.hidden_size = hidden_size
        self.classifier = classifier
        self.patch_embed = patch_embed
        features = representation_size or hidden_size
        self.pre_logits = nn.Linear(hidden_size, features) if representation_size else None
        self.head = nn.Linear(features, num_classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def _classify(self, representation: Tensor) -> Tensor:
        if self.pre_logits is not None:
            representation = torch.tanh(self.pre_logits(representation))
        return self.head(representation)


class ViViT(_Classifier):
    """Models 1, 3 and 4: video (B, in_channels, T, H, W) to logits (B, num_classes) (arXiv 2103.15691, section 3.3).

    Args:
        mlp_dim: Hidden channels of the MLPs.
        num_layers: Blocks.
        num_heads: Attention heads.
        num_classes: Classes.
        patches: (height, width, frames) of a tubelet in pixels, or (height, width) with uniform frame sampling.
        hidden_size: Channels of a token.
        temporal_encoding_config: How a clip is cut into tokens: see ``PatchEmbed``.
        attention_config: ``type`` is "spacetime" (model 1), "factorized_self_attention_block" (model 3, with
            ``attention_order``) or "factorized_dot_product_attention" (model 4): see ``Encoder``.
        representation_size: Channels of a layer with tanh before the classification layer; None: no such layer.
        dropout_rate: Dropout after the position embedding, the attentions and in the MLPs.
        attention_dropout_rate: Dropout of the attention probabilities.
        stochastic_droplayer_rate: Stochastic depth of the last block; it grows linearly from 0 in the first.
        classifier: What is classified: "token" a class token (model 1 only), or "gap" the mean, "gmp" the maximum,
            "gsp" the sum of all tokens.
        num_frames: Frames of a clip.
        image_size: Pixels of a frame, one number or (height, width).
        in_channels: Channels of the video.
        qkv_bias: Whether queries, keys and values have a bias.
        gelu: "tanh" (the paper's) or "erf".
        layer_norm_eps: What LayerNorms add to the variance.

    Example:
        >>> model = ViViT(64, 2, 4, 10, (8, 8, 2), 32, num_frames=4, image_size=16)
        >>> model(torch.zeros(1, 3, 4, 16, 16)).shape
        torch.Size([1, 10])
    """

    def __init__(
        self,
        mlp_dim: int,
        num_layers: int,
        num_heads: int,
        num_classes: int,
        patches: Sequence[int],
        hidden_size: int,
        temporal_encoding_config: Mapping[str, Any] | None = None,
        attention_config: Mapping[str, Any] | None = None,
        representation_size: int | None = None,
        dropout_rate: float = 0.1,
        attention_dropout_rate: float = 0.1,
        stochastic_droplayer_rate: float = 0.0,
        classifier: str = "gap",
        num_frames: int = 32,
        image_size: int | Sequence[int] = 224,
        in_channels: int = 3,
        qkv_bias: bool = True,
        gelu: str = "tanh",
        layer_norm_eps: float = LAYER_NORM_EPS,
    ) -> None:
        embed = PatchEmbed(patches, hidden_size, temporal_encoding_config, num_frames, image_size, in_channels)
        super().__init__(num_classes, classifier, representation_size, embed, hidden_size)
        if (attention_config or {}).get("type") == "factorized_encoder":
            raise ValueError("attention_config of type factorized_encoder belongs to SpaceTimeViViT")
        self.transformer = Encoder(
            hidden_size,
            embed.num_tokens,
            mlp_dim,
            num_layers,
            num_heads,
            attention_config,
            embed.temporal_dims,
            class_token=classifier == "token",
            dropout_rate=dropout_rate,
            attention_dropout_rate=attention_dropout_rate,
            stochastic_droplayer_rate=stochastic_droplayer_rate,
            qkv_bias=qkv_bias,
            gelu=gelu,
            layer_norm_eps=layer_norm_eps,
        )

    def forward_features(self, video: Tensor) -> Tensor:
        """Map a video (B, in_channels, T, H, W) to tokens (B, S, C), the class token first if there is one."""
        return self.transformer(self.patch_embed(video))

    @traced_for_one_size
    def forward(self, video: Tensor) -> Tensor:
        """Map a video (B, in_channels, T, H, W) to logits (B, num_classes)."""
        return self._classify(_pool(self.forward_features(video), self.classifier))


class SpaceTimeViViT(_Classifier):
    """Model 2, the factorized encoder: frames are encoded on their own, then the clip (arXiv 2103.15691, section 3.3).

    Args:
        spatial_mlp_dim: Hidden channels of the MLPs of the spatial encoder.
        spatial_num_layers: Blocks of the spatial encoder.
        spatial_num_heads: Attention heads of the spatial encoder.
        temporal_mlp_dim: Hidden channels of the MLPs of the temporal encoder.
        temporal_num_layers: Blocks of the temporal encoder.
        temporal_num_heads: Attention heads of the temporal encoder.
        num_classes: Classes.
        patches: (height, width, frames) of a tubelet in pixels, or (height, width) with uniform frame sampling.
        hidden_size: Channels of a token.
        temporal_encoding_config: How a clip is cut into tokens: see ``PatchEmbed``.
        attention_config: ``spatial_only_baseline`` replaces the temporal encoder by the mean of the frames.
        representation_size: Channels of a layer with tanh before the classification layer; None: no such layer.
        dropout_rate: Dropout after the position embeddings, the attentions and in the MLPs.
        attention_dropout_rate: Dropout of the attention probabilities.
        stochastic_droplayer_rate: Stochastic depth of the last block of each encoder.
        classifier: What becomes of a frame, and of the clip: "token" a class token, "gap" the mean, "gmp" the maximum,
            "gsp" the sum of the tokens.
        num_frames: Frames of a clip.
        image_size: Pixels of a frame, one number or (height, width).
        in_channels: Channels of the video.
        qkv_bias: Whether queries, keys and values have a bias.
        gelu: "tanh" (the paper's) or "erf".
        layer_norm_eps: What LayerNorms add to the variance.
    """

    def __init__(
        self,
        spatial_mlp_dim: int,
        spatial_num_layers: int,
        spatial_num_heads: int,
        temporal_mlp_dim: int,
        temporal_num_layers: int,
        temporal_num_heads: int,
        num_classes: int,
        patches: Sequence[int],
        hidden_size: int,
        temporal_encoding_config: Mapping[str, Any] | None = None,
        attention_config: Mapping[str, Any] | None = None,
        representation_size: int | None = None,
        dropout_rate: float = 0.1,
        attention_dropout_rate: float = 0.1,
        stochastic_droplayer_rate: float = 0.0,
        classifier: str = "gap",
        num_frames: int = 32,
        image_size: int | Sequence[int] = 224,
        in_channels: int = 3,
        qkv_bias: bool = True,
        gelu: str = "tanh",
        layer_norm_eps: float = LAYER_NORM_EPS,
    ) -> None:
        embed = PatchEmbed(patches, hidden_size, temporal_encoding_config, num_frames, image_size, in_channels)
        super().__init__(num_classes, classifier, representation_size, embed, hidden_size)
        config = {"type": "factorized_encoder", **(attention_config or {})}
        if config["type"] != "factorized_encoder":
            raise ValueError(f"attention_config must be of type factorized_encoder, got {config['type']!r}")
        if embed.num_tokens % embed.temporal_dims:
            raise ValueError(
                f"image_size must be a multiple of patches={tuple(patches)} in height where frames are sampled "
                f"uniformly, got {image_size}"
            )
        options: dict[str, Any] = {
            "class_token": classifier == "token",
            "dropout_rate": dropout_rate,
            "attention_dropout_rate": attention_dropout_rate,
            "stochastic_droplayer_rate": stochastic_droplayer_rate,
            "qkv_bias": qkv_bias,
            "gelu": gelu,
            "layer_norm_eps": layer_norm_eps,
        }
        sites = embed.num_tokens // embed.temporal_dims
        self.spatial_transformer = Encoder(
            hidden_size, sites, spatial_mlp_dim, spatial_num_layers, spatial_num_heads, **options
        )
        self.temporal_transformer: Encoder | None = None
        if not config.get("spatial_only_baseline", False):
            self.temporal_transformer = Encoder(
                hidden_size, embed.temporal_dims, temporal_mlp_dim, temporal_num_layers, temporal_num_heads, **options
            )

    def forward_features(self, video: Tensor) -> Tensor:
        """Map a video to the tokens of its frames (B, T', C), the clip's class token first if there is one."""
        frames = self.patch_embed(video).unflatten(1, (self.patch_embed.temporal_dims, -1))  # (B, T', N, C)
        frames = _pool(self.spatial_transformer(frames), self.classifier)
        return frames if self.temporal_transformer is None else self.temporal_transformer(frames)

    @traced_for_one_size
    def forward(self, video: Tensor) -> Tensor:
        """Map a video (B, in_channels, T, H, W) to logits (B, num_classes)."""
        tokens = self.forward_features(video)
        return self._classify(_pool(tokens, "gap" if self.temporal_transformer is None else self.classifier))

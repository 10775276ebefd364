"""Video Swin Transformer in plain PyTorch (arXiv 2106.13230).

The classes, their constructors and their state-dict keys are those of the paper's code, so its checkpoints load
strictly. What the released weights depend on is kept exactly, surprising as some of it is:

- A window axis at least as long as the token grid is clipped to it and loses its shift, each axis on its own (section
  3.1).
- Padding comes after the norm, so a padding token enters ``qkv`` as zero and leaves it as the projection's bias; it
  is attended.
- The shift mask is additive and finite (-100), and float32 whatever the model's dtype.
- A clipped window takes the first N rows and columns of the full window's position index (a prefix, not the geometric
  offsets).
- Time is never downsampled after the patch embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from vidattn.models.layers import DropPath, Mlp
from vidattn.models.video_swin_windows import (
    compute_mask,
    fit_window,
    get_window_size,
    relative_position_index,
    triple,
    window_partition,
    window_reverse,
)
from vidattn.tracing import traced_for_one_size

if TYPE_CHECKING:
    from os import PathLike

    from typing_extensions import Self

__all__ = [
    "BasicLayer",
    "DropPath",
    "I3DHead",
    "Mlp",
    "PatchEmbed3D",
    "PatchMerging",
    "Recognizer3D",
    "SwinTransformer3D",
    "SwinTransformerBlock3D",
    "WindowAttention3D",
    "compute_mask",
    "get_window_size",
    "relative_position_index",
    "window_partition",
    "window_reverse",
]


class WindowAttention3D(nn.Module):
    """Multi-head self-attention inside windows, with relative position bias (arXiv 2106.13230, equation 1).

    Args:
        dim: Channels C.
        window_size: Configured window (depth, height, width) in tokens.
        num_heads: Attention heads; divides ``dim``.
        qkv_bias: Whether the qkv projection has a bias.
        qk_scale: Scale of the scores; None or 0 means head_dim ** -0.5.
        attn_drop: Dropout of the attention probabilities.
        proj_drop: Dropout after the output projection.
    """

    def __init__(
        self,
        dim: int,
        window_size: Sequence[int],
        num_heads: int,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"dim must be a multiple of num_heads, got dim={dim} and num_heads={num_heads}")
        self.dim = dim
        self.window_size = triple("window_size", window_size, minimum=1)
        self.num_heads = num_heads
        self.scale = qk_scale or (dim // num_heads) ** -0.5
        wd, wh, ww = self.window_size
        self.relative_position_bias_table = nn.Parameter(
            torch.zeros((2 * wd - 1) * (2 * wh - 1) * (2 * ww - 1), num_heads)
        )
        self.relative_position_index: Tensor
        self.register_buffer("relative_position_index", relative_position_index(self.window_size))
        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        self.softmax = nn.Softmax(dim=-1)
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend inside each window.

        Args:
            x: Windows (G, N, C), N at most the tokens of the configured window.
            mask: Additive mask (nW, N, N) in any float dtype, or None. Window g takes mask[g % nW]; nW divides G.

        Returns:
            Windows (G, N, C).
        """
        groups, tokens, channels = x.shape
        heads = self.num_heads
        if tokens > self.relative_position_index.shape[0]:
            raise ValueError(f"x has {tokens} tokens a window, more than window_size={self.window_size} holds")
        qkv = self.qkv(x).reshape(groups, tokens, 3, heads, channels // heads).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        scores = (query * self.scale) @ key.transpose(-2, -1)
        index = self.relative_position_index[:tokens, :tokens].reshape(-1)
        bias = self.relative_position_bias_table[index].view(tokens, tokens, heads).permute(2, 0, 1).contiguous()
        scores = scores + bias
        if mask is not None:
            types = mask.shape[0]
            if mask.shape[1:] != (tokens, tokens) or types == 0 or groups % types:
                raise ValueError(
                    f"mask must be (nW, {tokens}, {tokens}) with nW a divisor of {groups}, got {tuple(mask.shape)}"
                )
            scores = scores.view(groups // types, types, heads, tokens, tokens) + mask[None, :, None]
            scores = scores.view(groups, heads, tokens, tokens)
        # A float32 mask or table makes the probabilities of a half-precision model float32: back to the dtype of the
        # values.
        probabilities = self.attn_drop(self.softmax(scores).to(value.dtype))
        context = (probabilities @ value).transpose(1, 2).reshape(groups, tokens, channels)
        return self.proj_drop(self.proj(context))


class SwinTransformerBlock3D(nn.Module):
    """A pre-norm block: (shifted) window attention, then an MLP, each with a residual (arXiv 2106.13230, equation 2).

    Args:
        dim: Channels C.
        num_heads: Attention heads.
        window_size: Configured window (depth, height, width) in tokens.
        shift_size: Configured shift, each axis at least 0 and less than the window.
        mlp_ratio: Hidden channels of the MLP over ``dim``.
        qkv_bias: Whether the qkv projection has a bias.
        qk_scale: Scale of the scores; None or 0 means head_dim ** -0.5.
        drop: Dropout after the projections and inside the MLP.
        attn_drop: Dropout of the attention probabilities.
        drop_path: Stochastic depth of both residual branches.
        act_layer: Activation of the MLP.
        norm_layer: Normalisation, called with ``dim``.
        use_checkpoint: Recompute the attention half and the MLP half, each on its own, in the backward pass.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: Sequence[int] = (2, 7, 7),
        shift_size: Sequence[int] = (0, 0, 0),
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        norm_layer: Callable[[int], nn.Module] = nn.LayerNorm,
        use_checkpoint: bool = False,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.num_heads = num_heads
        self.window_size = triple("window_size", window_size, minimum=1)
        self.shift_size = triple("shift_size", shift_size, minimum=0)
        if any(shift >= window for shift, window in zip(self.shift_size, self.window_size, strict=True)):
            raise ValueError(f"shift_size must be less than window_size={self.window_size}, got {self.shift_size}")
        self.mlp_ratio = mlp_ratio
        self.use_checkpoint = use_checkpoint
        self.norm1 = norm_layer(dim)
        self.attn = WindowAttention3D(dim, self.window_size, num_heads, qkv_bias, qk_scale, attn_drop, drop)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.norm2 = norm_layer(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer=act_layer, drop=drop)

    def forward_part1(self, x: Tensor, mask_matrix: Tensor | None) -> Tensor:
        """Normalise and attend: (B, D, H, W, C) to (B, D, H, W, C), before stochastic depth and the residual."""
        batch, depth, height, width, _ = x.shape
        window, shift, padded = fit_window((depth, height, width), self.window_size, self.shift_size)
        x = self.norm1(x)
        if padded != (depth, height, width):
            x = functional.pad(x, (0, 0, 0, padded[2] - width, 0, padded[1] - height, 0, padded[0] - depth))
        shifted = any(offset > 0 for offset in shift)
        if shifted:
            x = torch.roll(x, shifts=(-shift[0], -shift[1], -shift[2]), dims=(1, 2, 3))
        x = self.attn(window_partition(x, window), mask=mask_matrix if shifted else None)
        x = window_reverse(x, window, batch, *padded)
        if shifted:
            x = torch.roll(x, shifts=shift, dims=(1, 2, 3))
        return x[:, :depth, :height, :width].contiguous() if padded != (depth, height, width) else x

    def forward_part2(self, x: Tensor) -> Tensor:
        """Normalise, apply the MLP and stochastic depth: (B, D, H, W, C) to (B, D, H, W, C), before the residual."""
        return self.drop_path(self.mlp(self.norm2(x)))

    def forward(self, x: Tensor, mask_matrix: Tensor | None) -> Tensor:
        """Run the block.

        Args:
            x: Tokens (B, D, H, W, C).
            mask_matrix: Additive mask (nW, N, N) of the padded, shifted grid, as ``compute_mask`` makes it. Used
                only when some axis is really shifted; None then means that nothing is masked.

        Returns:
            Tokens (B, D, H, W, C).
        """
        if self.use_checkpoint:
            x = x + self.drop_path(checkpoint(self.forward_part1, x, mask_matrix, use_reentrant=False))
            return x + checkpoint(self.forward_part2, x, use_reentrant=False)
        x = x + self.drop_path(self.forward_part1(x, mask_matrix))
        return x + self.forward_part2(x)


class PatchMerging(nn.Module):
    """Halve height and width: join 2 x 2 tokens, normalise, project 4C channels to 2C (arXiv 2106.13230, section 3.1).

    Args:
        dim: Channels C.
        norm_layer: Normalisation, called with 4C.
    """

    def __init__(self, dim: int, norm_layer: Callable[[int], nn.Module] = nn.LayerNorm) -> None:
        super().__init__()
        self.dim = dim
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.norm = norm_layer(4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (B, D, H, W, C) to (B, D, ceil(H / 2), ceil(W / 2), 2C)."""
        height, width = x.shape[2:4]
        if height % 2 or width % 2:
            x = functional.pad(x, (0, 0, 0, width % 2, 0, height % 2))
        x = torch.cat([x[:, :, row::2, column::2] for column in (0, 1) for row in (0, 1)], dim=-1)
        return self.reduction(self.norm(x))


class BasicLayer(nn.Module):
    """One stage: blocks that alternate between unshifted and shifted windows, then an optional downsampling.

    Args:
        dim: Channels C.
        depth: Number of blocks.
        num_heads: Attention heads.
        window_size: Configured window (depth, height, width) in tokens; odd blocks are shifted by half of it.
        mlp_ratio: Hidden channels of an MLP over ``dim``.
        qkv_bias: Whether the qkv projections have a bias.
        qk_scale: Scale of the scores; None or 0 means head_dim ** -0.5.
        drop: Dropout after the projections and inside the MLPs.
        attn_drop: Dropout of the attention probabilities.
        drop_path: Stochastic depth, one rate for all blocks or one a block.
        norm_layer: Normalisation, called with the number of channels.
        downsample: Module class at the end of the stage (``PatchMerging``), or None.
        use_checkpoint: Whether the blocks recompute their activations in the backward pass.
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        num_heads: int,
        window_size: Sequence[int] = (1, 7, 7),
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float | Sequence[float] = 0.0,
        norm_layer: Callable[[int], nn.Module] = nn.LayerNorm,
        downsample: Callable[..., nn.Module] | None = None,
        use_checkpoint: bool = False,
    ) -> None:
        super().__init__()
        rates = [float(drop_path)] * depth if isinstance(drop_path, int | float) else list(drop_path)
        if len(rates) != depth:
            raise ValueError(f"drop_path must be one rate or {depth} rates, one a block, got {len(rates)}")
        self.window_size = triple("window_size", window_size, minimum=1)
        self.shift_size = tuple(axis // 2 for axis in self.window_size)
        self.depth = depth
        self.use_checkpoint = use_checkpoint
        self.blocks = nn.ModuleList(
            SwinTransformerBlock3D(
                dim=dim,
                num_heads=num_heads,
                window_size=self.window_size,
                shift_size=(0, 0, 0) if block % 2 == 0 else self.shift_size,
                mlp_ratio=mlp_ratio,
                qkv_bias=qkv_bias,
                qk_scale=qk_scale,
                drop=drop,
                attn_drop=attn_drop,
                drop_path=rates[block],
                norm_layer=norm_layer,
                use_checkpoint=use_checkpoint,
            )
            for block in range(depth)
        )
        self.downsample = downsample(dim=dim, norm_layer=norm_layer) if downsample is not None else None

    def make_mask(self, grid: Sequence[int], device: torch.device) -> Tensor | None:
        """Build the mask that all blocks of the stage receive, or None when no block is shifted on this token grid."""
        window, shift, padded = fit_window(grid, self.window_size, self.shift_size)
        if self.depth < 2 or not any(offset > 0 for offset in shift):
            return None
        return compute_mask(*padded, window, shift, device)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, D, H, W) to the same shape, or to (B, 2C, D, ceil(H / 2), ceil(W / 2)) with a downsampling."""
        mask = self.make_mask(x.shape[2:], x.device)
        x = x.permute(0, 2, 3, 4, 1)
        for block in self.blocks:
            x = block(x, mask)
        if self.downsample is not None:
            x = self.downsample(x)
        return x.permute(0, 4, 1, 2, 3)


class PatchEmbed3D(nn.Module):
    """Cut a video into patches and project each to a token (arXiv 2106.13230, section 3.1).

    Args:
        patch_size: Patch (frames, height, width) in pixels.
        in_chans: Channels of the video.
        embed_dim: Channels E of a token.
        norm_layer: Normalisation of the tokens, called with ``embed_dim``, or None.
    """

    def __init__(
        self,
        patch_size: Sequence[int] = (2, 4, 4),
        in_chans: int = 3,
        embed_dim: int = 96,
        norm_layer: Callable[[int], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.patch_size = triple("patch_size", patch_size, minimum=1)
        self.in_chans = in_chans
        self.embed_dim = embed_dim
        self.proj = nn.Conv3d(in_chans, embed_dim, kernel_size=self.patch_size, stride=self.patch_size)
        self.norm = norm_layer(embed_dim) if norm_layer is not None else None

    def forward(self, x: Tensor) -> Tensor:
        """Map a video (B, in_chans, T, H, W) of any size to tokens (B, E, ceil(T / pt), ceil(H / ph), ceil(W / pw))."""
        if x.ndim != 5 or x.shape[1] != self.in_chans or 0 in x.shape[2:]:
            raise ValueError(
                f"video must be (batch, {self.in_chans}, frames, height, width), no axis empty, got {tuple(x.shape)}"
            )
        pad = [-size % patch for size, patch in zip(x.shape[2:], self.patch_size, strict=True)]
        if any(pad):
            x = functional.pad(x, (0, pad[2], 0, pad[1], 0, pad[0]))
        x = self.proj(x)
        return x if self.norm is None else self.norm(x.permute(0, 2, 3, 4, 1)).permute(0, 4, 1, 2, 3)


class SwinTransformer3D(nn.Module):
    """The Video Swin backbone: video (B, in_chans, T, H, W) to features (B, C, D, h, w) (arXiv 2106.13230).

    Args:
        pretrained: Checkpoint that ``init_weights`` loads: a file of this model, or of an image Swin to inflate.
            None: random.
        pretrained2d: Kept from the paper's constructor; which of the two a checkpoint is, is read from the file itself.
        patch_size: Patch (frames, height, width) in pixels.
        in_chans: Channels of the video.
        embed_dim: Channels of the first stage; they double from stage to stage.
        depths: Blocks of each stage.
        num_heads: Attention heads of each stage.
        window_size: Window (depth, height, width) in tokens.
        mlp_ratio: Hidden channels of an MLP over its width.
        qkv_bias: Whether the qkv projections have a bias.
        qk_scale: Scale of the scores; None or 0 means head_dim ** -0.5.
        drop_rate: Dropout of the tokens, after projections and inside the MLPs.
        attn_drop_rate: Dropout of the attention probabilities.
        drop_path_rate: Stochastic depth of the last block; it grows linearly from 0 in the first.
        norm_layer: Normalisation, called with the number of channels.
        patch_norm: Whether the patch embedding is normalised.
        frozen_stages: -1 trains everything; 0 freezes the patch embedding; n also freezes the first n stages.
        use_checkpoint: Whether the blocks recompute their activations in the backward pass.

    Example:
        >>> model = SwinTransformer3D(embed_dim=24, depths=[2, 2], num_heads=[2, 4], window_size=(2, 7, 7))
        >>> model(torch.zeros(1, 3, 8, 56, 56)).shape
        torch.Size([1, 48, 2, 7, 7])
    """

    def __init__(
        self,
        pretrained: str | PathLike[str] | None = None,
        pretrained2d: bool = True,
        patch_size: Sequence[int] = (4, 4, 4),
        in_chans: int = 3,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: Sequence[int] = (2, 7, 7),
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.2,
        norm_layer: Callable[[int], nn.Module] = nn.LayerNorm,
        patch_norm: bool = False,
        frozen_stages: int = -1,
        use_checkpoint: bool = False,
    ) -> None:
        super().__init__()
        if len(depths) == 0 or len(depths) != len(num_heads):
            raise ValueError(
                f"depths and num_heads must name the same stages, got {list(depths)} and {list(num_heads)}"
            )
        if frozen_stages > len(depths):
            raise ValueError(f"frozen_stages must be at most the {len(depths)} stages, got {frozen_stages}")
        self.pretrained = pretrained
        self.pretrained2d = pretrained2d
        self.num_layers = len(depths)
        self.embed_dim = embed_dim
        self.patch_norm = patch_norm
        self.frozen_stages = frozen_stages
        self.window_size = triple("window_size", window_size, minimum=1)
        self.patch_size = triple("patch_size", patch_size, minimum=1)
        self.num_features = embed_dim * 2 ** (self.num_layers - 1)
        self.patch_embed = PatchEmbed3D(self.patch_size, in_chans, embed_dim, norm_layer if patch_norm else None)
        self.pos_drop = nn.Dropout(drop_rate)
        blocks = sum(depths)
        rates = [drop_path_rate * block / max(blocks - 1, 1) for block in range(blocks)]
        self.layers = nn.ModuleList(
            BasicLayer(
                dim=embed_dim * 2**stage,
                depth=depth,
                num_heads=num_heads[stage],
                window_size=self.window_size,
                mlp_ratio=mlp_ratio,
                qkv_bias=qkv_bias,
                qk_scale=qk_scale,
                drop=drop_rate,
                attn_drop=attn_drop_rate,
                drop_path=rates[sum(depths[:stage]) : sum(depths[: stage + 1])],
                norm_layer=norm_layer,
                downsample=PatchMerging if stage < self.num_layers - 1 else None,
                use_checkpoint=use_checkpoint,
            )
            for stage, depth in enumerate(depths)
        )
        self.norm = norm_layer(self.num_features)
        self._freeze_stages()

    def _freeze_stages(self) -> None:
        frozen: list[nn.Module] = [self.patch_embed] if self.frozen_stages >= 0 else []
        if self.frozen_stages >= 1:
            frozen += [self.pos_drop, *self.layers[: self.frozen_stages]]
        for module in frozen:
            module.eval()
            module.requires_grad_(False)

    def train(self, mode: bool = True) -> Self:
        """Switch between training and evaluation; frozen stages stay in evaluation, without gradients."""
        super().train(mode)
        self._freeze_stages()
        return self

    def init_weights(self, pretrained: str | PathLike[str] | None = None) -> None:
        """Initialise as the paper's code does, or load a checkpoint.

        Linear layers and bias tables get a truncated normal of deviation 0.02 and zero biases, LayerNorms one and
        zero; convolutions keep PyTorch's default.

        Args:
            pretrained: Checkpoint file; None takes the one given to the constructor, and random weights where that is
                None too.

        Raises:
            ValueError: The file does not fit this backbone.
        """
        self.pretrained = pretrained or self.pretrained
        if self.pretrained is not None:
            from vidattn.models.checkpoint import load_checkpoint

            load_checkpoint(self, self.pretrained)
            return
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, WindowAttention3D):
                nn.init.trunc_normal_(module.relative_position_bias_table, std=0.02)

    @traced_for_one_size
    def forward(self, x: Tensor) -> Tensor:
        """Map a video (B, in_chans, T, H, W) of any length and resolution to features (B, C, D, h, w)."""
        x = self.pos_drop(self.patch_embed(x))
        for layer in self.layers:
            x = layer(x)
        return self.norm(x.permute(0, 2, 3, 4, 1)).permute(0, 4, 1, 2, 3)


class I3DHead(nn.Module):
    """Classification head: average over time and space, dropout, linear.

    Args:
        num_classes: Classes.
        in_channels: Channels of the features.
        spatial_type: "avg" averages; anything else flattens the features as they are.
        dropout_ratio: Dropout before the linear layer; 0 leaves it out.
        init_std: Deviation of the linear layer's normal initialisation.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        *,
        spatial_type: str | None = "avg",
        dropout_ratio: float = 0.5,
        init_std: float = 0.01,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.in_channels = in_channels
        self.spatial_type = spatial_type
        self.dropout_ratio = dropout_ratio
        self.init_std = init_std
        self.avg_pool = nn.AdaptiveAvgPool3d((1, 1, 1)) if spatial_type == "avg" else None
        self.dropout = nn.Dropout(dropout_ratio) if dropout_ratio != 0 else None
        self.fc_cls = nn.Linear(in_channels, num_classes)

    def init_weights(self) -> None:
        """Initialise the linear layer: normal weight, zero bias."""
        nn.init.normal_(self.fc_cls.weight, std=self.init_std)
        nn.init.zeros_(self.fc_cls.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map features (B, in_channels, D, h, w) to logits (B, num_classes)."""
        if self.avg_pool is not None:
            x = self.avg_pool(x)
        x = x.flatten(1)
        return self.fc_cls(x if self.dropout is None else self.dropout(x))


class Recognizer3D(nn.Module):
    """A video classifier with the keys of released checkpoints (``backbone.*``, ``cls_head.fc_cls.*``).

    Args:
        backbone: Video (B, 3, T, H, W) to features (B, C, D, h, w).
        cls_head: Features to logits (B, num_classes).
    """

    def __init__(self, backbone: SwinTransformer3D, cls_head: I3DHead) -> None:
        super().__init__()
        self.backbone = backbone
        self.cls_head = cls_head
        self.init_weights()

    def init_weights(self) -> None:
        """Initialise backbone and head."""
        self.backbone.init_weights()
        self.cls_head.init_weights()

    def forward_features(self, video: Tensor) -> Tensor:
        """Map a video (B, 3, T, H, W) to features (B, C, D, h, w)."""
        return self.backbone(video)

    def forward(self, video: Tensor) -> Tensor:
        """Map a video (B, 3, T, H, W) to logits (B, num_classes)."""
        return self.cls_head(self.backbone(video))

    def predict(self, views: Tensor) -> Tensor:
        """Average the class probabilities of several views of a video (arXiv 2106.13230, section 4.1).

        Args:
            views: Views (B, V, 3, T, H, W), run one view at a time.

        Returns:
            Probabilities (B, num_classes).
        """
        if views.ndim != 6 or views.shape[1] == 0:
            raise ValueError(f"views must be (batch, views, channels, frames, height, width), got {tuple(views.shape)}")
        return torch.stack([self(view).softmax(dim=-1) for view in views.unbind(1)]).mean(dim=0)

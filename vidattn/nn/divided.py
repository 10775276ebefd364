"""What the twins of TimeSformer's block share, whatever the parts of a block are called."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional

from vidattn.nn.parts import (
    DROPOUT,
    LINEAR,
    PER_TOKEN_NORM,
    affine,
    can_drop,
    draws,
    is_number,
    is_plain,
    rate_in_use,
)
from vidattn.ops import spatial_attention, temporal_attention
from vidattn.twins import Twin

__all__ = ["Branch", "Divided", "FusedDividedBlock", "maps_tokens"]


class Branch(NamedTuple):
    """One of the two attentions of a block, and the layers around it.

    Attributes:
        norm: before the projection to queries, keys and values.
        qkv: that projection, packed.
        attn_drop: dropout of the attention probabilities.
        proj: projection of the context.
        proj_drop: dropout after it.
        num_heads: attention heads.
        scale: factor of the scores.
    """

    norm: nn.Module
    qkv: nn.Module
    attn_drop: nn.Module
    proj: nn.Module
    proj_drop: nn.Module
    num_heads: int
    scale: float

    def can_be_fused(self) -> bool:
        """Whether nothing hangs on the layers, and the ops can do the work between them."""
        return (
            maps_tokens(self.norm)
            and affine(self.qkv) is not None
            and can_drop(self.attn_drop)
            and affine(self.proj) is not None
            and is_plain(self.proj_drop, DROPOUT)
            and is_number(self.scale)
        )

    def project(self, x: Tensor) -> Tensor:
        """Map tokens (B, S, C) to their queries, keys and values (B, S, 3, h, d)."""
        return self.qkv(self.norm(x)).unflatten(-1, (3, self.num_heads, -1))


class Divided(NamedTuple):
    """The parts of a block of divided attention.

    Attributes:
        time: attention over the frames of a patch.
        temporal_fc: layer after it.
        space: attention over the patches of a frame and the cls token.
        drop_path: stochastic depth of both.
    """

    time: Branch
    temporal_fc: nn.Module
    space: Branch
    drop_path: nn.Module


class FusedDividedBlock(Twin):
    """A block whose divided attention is two ops on the tokens as they lie.

    The cls token is normalised and projected once, not once per frame, and nothing is repeated, regrouped or put back
    in order. What is random is drawn as the original draws it: the same seed drops the same patches, frames and
    channels. (Dropout of the attention probabilities has a generator of its own.)

    That takes the place of calling the two attentions and their norms on the original's sequences, so at every call
    the block looks whether anything hangs on one of them: a wrapper, an adapter that is not linear, a hook, a
    ``forward`` of the instance. Then it computes as the original does. So do joint attention and attention over space
    alone, whose attention has a twin of its own.

    In inference the output projection of the attention over time and ``temporal_fc``, which follows it, are multiplied
    into one matrix, where there are enough tokens to make that worth its price. It is not kept, unless the model was
    accelerated with ``frozen=True``.

    Attributes:
        folded: names of the two layers.
    """

    ops = ("temporal_attention", "spatial_attention")
    level = "layer"
    folded: ClassVar[tuple[str, str]]

    def find_parts(self) -> Divided | None:
        """Find the parts of the block; None where a module between them is not what the twin does the work of."""
        raise NotImplementedError

    @classmethod
    def learned_if_frozen(cls, module: Any) -> list[str]:  # type: ignore[override]
        """Name the parameters that ``frozen=True`` would fold and that require a gradient."""
        if module.attention_type != "divided_space_time":
            return []
        return [
            f"{layer}.{name}"
            for layer in cls.folded
            for name, parameter in module.get_submodule(layer).named_parameters()
            if parameter.requires_grad
        ]

    def drop_derived(self) -> None:
        """Forget the folded projection of a frozen block."""
        _folded.pop(self, None)

    def train(self, mode: bool = True) -> Any:
        """Set the mode, as every module does."""
        self.drop_derived()
        return super().train(mode)  # type: ignore[misc]

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self.drop_derived()
        return super()._apply(*args, **kwargs)  # type: ignore[misc]

    def _load_from_state_dict(self, *args: Any) -> None:
        self.drop_derived()
        super()._load_from_state_dict(*args)  # type: ignore[misc]

    def attend_divided(self, x: Tensor, batch: int, num_frames: int) -> Tensor | None:
        """Attend over the frames of each patch, then over the patches of each frame, residuals included.

        Args:
            x: tokens (B, 1 + N * T, C), the cls token first, then time fastest.
            batch: B.
            num_frames: T.

        Returns:
            Tokens of the same shape; None where the original has to do the work.
        """
        rows = x.shape[1] - 1
        if not (x.shape[0] == batch and num_frames >= 1 and rows >= 1 and rows % num_frames == 0 and self.is_intact()):
            return None
        parts = self.find_parts()
        if parts is None or not (parts.time.can_be_fused() and parts.space.can_be_fused()):
            return None
        cls_token, patches = x.split((1, rows), dim=1)
        x = torch.cat((cls_token, patches + self._attend_over_time(patches, num_frames, parts)), dim=1)
        return x + self._attend_over_space(x, num_frames, parts.space, parts.drop_path)

    def _attend_over_time(self, patches: Tensor, num_frames: int, parts: Divided) -> Tensor:
        """Map patches (B, N * T, C) to what attention over the frames adds to them."""
        branch, after = parts.time, parts.temporal_fc
        context = temporal_attention(
            branch.project(patches),
            num_frames,
            token_order="hwt",
            scale=branch.scale,
            dropout_p=rate_in_use(branch.attn_drop),
            backend=self.attention_backend,
        )
        if not draws(parts.drop_path) and not draws(branch.proj_drop):
            folded = _fold(self, context, branch.proj, after)
            return after(branch.proj(context)) if folded is None else functional.linear(context, *folded)
        sites = branch.proj(context).reshape(-1, num_frames, context.shape[-1])  # (B * N, T, C): dropped by sites
        return after(parts.drop_path(branch.proj_drop(sites)).reshape(patches.shape))

    def _attend_over_space(self, x: Tensor, num_frames: int, branch: Branch, drop_path: nn.Module) -> Tensor:
        """Map tokens (B, 1 + N * T, C) to what attention over the patches of each frame adds to them."""
        qkv = branch.project(x)
        options: dict[str, Any] = {
            "token_order": "hwt",
            "scale": branch.scale,
            "dropout_p": rate_in_use(branch.attn_drop),
            "backend": self.attention_backend,
        }
        projection = affine(branch.proj)
        if not (draws(drop_path) or draws(branch.proj_drop) or projection is None or projection.draws):
            # The mean of the cls token's results comes before the projection, not after: the same, as that is affine.
            return branch.proj(spatial_attention(qkv, num_frames, cls_token="mean", **options))
        patches, cls_tokens = spatial_attention(qkv, num_frames, cls_token="per_frame", **options)
        patches, cls_tokens = branch.proj(patches), branch.proj(cls_tokens)
        # Dropped by frames (B * T, 1 + N, C): what ones become there is the factor of each number, or of each frame.
        batch, rows, channels = patches.shape
        sites = rows // num_frames
        each = (1 + sites, channels) if draws(branch.proj_drop) else (1, 1)
        factors = drop_path(branch.proj_drop(patches.new_ones(batch * num_frames, *each)))
        factors = factors.unflatten(0, (batch, num_frames)).expand(-1, -1, 1 + sites, channels)
        cls_token = (cls_tokens * factors[:, :, 0]).mean(dim=1, keepdim=True)
        patches = patches.unflatten(1, (sites, num_frames)) * factors[:, :, 1:].transpose(1, 2)
        return torch.cat((cls_token, patches.flatten(1, 2)), dim=1)


def maps_tokens(norm: Any) -> bool:
    """Whether a norm treats each token by itself."""
    return is_plain(norm, PER_TOKEN_NORM) and len(getattr(norm, "normalized_shape", (1,))) == 1


class _Folded(NamedTuple):
    """Two linear layers in one, and the parameters it was made of.

    Those are views: while they live, nothing else can come to lie where the parameters lay.
    """

    parameters: tuple[Tensor, ...]
    versions: tuple[int, ...]
    weight: Tensor
    bias: Tensor


# Filled for models accelerated with frozen=True alone. Outside of the modules, so that neither copies nor pickles nor
# state dicts hold any.
_folded: WeakKeyDictionary[FusedDividedBlock, _Folded] = WeakKeyDictionary()

# Multiplying two C x C matrices costs as much as C tokens save; smaller products run slower, so a margin pays.
_FOLD_TOKENS = 2


def _fold(block: FusedDividedBlock, context: Tensor, first: Any, second: Any) -> tuple[Tensor, Tensor] | None:
    """Give weight and bias of one layer that does the work of two; None where two layers are better or known.

    Args:
        block: the block.
        context: (B, N * T, C), what the two are about to be applied to.
        first: projection of the attention over time.
        second: layer after it.

    Returns:
        Weight (C, C) and bias (C,), for this call, or None.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or type(context) is not Tensor:
        return None
    if not is_plain(first, LINEAR) or not is_plain(second, LINEAR):
        return None
    parameters = (first.weight, first.bias, second.weight, second.bias)
    if any(type(x) is not nn.Parameter or x.is_inference() or x.dtype != first.weight.dtype for x in parameters):
        return None
    if block.frozen and not any(x.requires_grad for x in parameters) and not _is_captured(context):
        return _kept(block, parameters)
    channels = context.shape[-1]
    if torch.is_grad_enabled() or context.numel() < _FOLD_TOKENS * channels * channels:
        return None
    w1, b1, w2, b2 = parameters
    return w2 @ w1, torch.addmv(b2, w2, b1)


def _kept(block: FusedDividedBlock, parameters: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Give the folded layer of a frozen block, made again where a parameter is another one or counts a change."""
    versions = tuple(x._version for x in parameters)
    known = _folded.get(block)
    if known is None or known.versions != versions or not all(map(_same_place, parameters, known.parameters)):
        views = tuple(x.detach() for x in parameters)
        w1, b1, w2, b2 = (x.double() for x in views)
        known = _Folded(views, versions, (w2 @ w1).to(views[0].dtype), (w2 @ b1 + b2).to(views[0].dtype))
        _folded[block] = known
    return known.weight, known.bias


def _is_captured(x: Tensor) -> bool:
    """Whether a CUDA graph is being recorded, which owns all memory that is allocated meanwhile."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _same_place(x: Tensor, old: Tensor) -> bool:
    return (x.data_ptr(), x.dtype, x.device, x.shape, x.stride()) == (
        old.data_ptr(), old.dtype, old.device, old.shape, old.stride(),
    )  # fmt: skip

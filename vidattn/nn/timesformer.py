"""Accelerated twins of the modules of TimeSformer."""

from __future__ import annotations

from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional

from vidattn.models.timesformer import Attention, Block, DropPath
from vidattn.nn.parts import (
    DROPOUT,
    LINEAR,
    PER_TOKEN_NORM,
    Affine,
    affine,
    as_defined,
    attend,
    can_drop,
    is_number,
    is_plain,
    rate_in_use,
    why_not_number,
)
from vidattn.ops import spatial_attention, temporal_attention
from vidattn.twins import Twin, why_overridden


class FusedAttention(Twin, Attention):
    """:class:`~vidattn.models.timesformer.Attention` without a matrix of scores in memory."""

    ops = ("spatial_attention",)

    @staticmethod
    def refuse(module: Any) -> str | None:
        """Say why a module cannot become this twin; None if it can."""
        return why_not_number(module)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (B, N, C) to (B, N, C)."""
        if not _ops_can_attend(self):
            return super().forward(x)
        heads = None if self.with_qkv else x.unflatten(-1, (self.num_heads, -1))
        qkv = _project(self, x) if heads is None else (heads, heads, heads)
        context = attend(qkv, scale=self.scale, dropout_p=rate_in_use(self.attn_drop), backend=self.attention_backend)
        return self.proj_drop(self.proj(context)) if self.with_qkv else context


class FusedBlock(Twin, Block):
    """:class:`~vidattn.models.timesformer.Block`; divided attention is two ops on the tokens as they lie.

    The cls token is normalised and projected once, not once per frame, and nothing is repeated, regrouped or put back
    in order. What is random is drawn as the original draws it: the same seed drops the same patches, frames and
    channels. (Dropout of the attention probabilities has a generator of its own.)

    That takes the place of calling the two attentions and their norms on the original's sequences, so at every call
    the block looks whether anything hangs on one of them: a wrapper, an adapter that is not linear, a hook, a
    ``forward`` of the instance. Then it computes as the original does. So do joint attention and attention over space
    alone, whose ``attn`` has a twin of its own.

    In inference the output projection of the attention over time and ``temporal_fc``, which follows it, are multiplied
    into one matrix, where there are enough tokens to make that worth its price. It is not kept, unless the model was
    accelerated with ``frozen=True``.
    """

    ops = ("temporal_attention", "spatial_attention")

    @staticmethod
    def refuse(module: Any) -> str | None:
        """Say why a block cannot become this twin; None if it can."""
        if module.attention_type != "divided_space_time":
            return None
        for name in ("temporal_attn", "attn"):
            attention = getattr(module, name)
            if type(attention) not in _ATTENTIONS:
                return f"its {name} is a {type(attention).__name__}"
            reason = why_overridden(attention) or why_not_number(attention)
            if reason is not None:
                return f"its {name}: {reason}"
            if not attention.with_qkv:
                return f"its {name} has no projections"
        for name in ("temporal_norm1", "norm1"):
            norm = getattr(module, name)
            if not _maps_tokens(norm):
                return f"its {name} is a {type(norm).__name__}, which may look at several tokens"
        return None

    @staticmethod
    def learned_if_frozen(module: Any) -> list[str]:
        """Name the parameters that ``frozen=True`` would fold and that require a gradient."""
        if module.attention_type != "divided_space_time":
            return []
        layers = {"temporal_attn.proj": module.temporal_attn.proj, "temporal_fc": module.temporal_fc}
        return [
            f"{layer_name}.{name}"
            for layer_name, layer in layers.items()
            for name, parameter in layer.named_parameters()
            if parameter.requires_grad
        ]

    def drop_derived(self) -> None:
        """Forget the folded projection of a frozen block."""
        _folded.pop(self, None)

    def train(self, mode: bool = True) -> FusedBlock:
        """Set the mode, as every module does."""
        self.drop_derived()
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> FusedBlock:
        self.drop_derived()
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any) -> None:
        self.drop_derived()
        super()._load_from_state_dict(*args)

    def _attend_divided(self, x: Tensor, batch: int, num_frames: int) -> Tensor:
        rows = x.shape[1] - 1
        divides = x.shape[0] == batch and num_frames >= 1 and rows >= 1 and rows % num_frames == 0
        projection = self._output_projection() if divides else None
        if projection is None:
            return super()._attend_divided(x, batch, num_frames)
        cls_token, patches = x.split((1, rows), dim=1)
        x = torch.cat((cls_token, patches + self._attend_over_time(patches, num_frames)), dim=1)
        return x + self._attend_over_space(x, num_frames, projection)

    def _output_projection(self) -> Affine | None:
        """Describe the projection of the attention over space; None where the original has to do the work."""
        parts: dict[str, Any] = self._modules  # a module's attributes take three times as long to find
        if not (
            self.is_intact()
            and _maps_tokens(parts["temporal_norm1"])
            and _maps_tokens(parts["norm1"])
            and is_plain(parts["drop_path"], _DROPS)
        ):
            return None
        projection = None
        for attention in (parts["temporal_attn"], parts["attn"]):
            if not is_plain(attention, _ATTENTIONS) or not _ops_can_attend(attention):
                return None
            projection = affine(attention._modules["proj"])
            if (
                projection is None
                or affine(attention._modules["qkv"]) is None
                or not is_plain(attention._modules["proj_drop"], DROPOUT)
            ):
                return None
        return projection

    def _attend_over_time(self, patches: Tensor, num_frames: int) -> Tensor:
        """Map patches (B, N * T, C) to what attention over the frames adds to them."""
        attention = self.temporal_attn
        context = temporal_attention(
            _project(attention, self.temporal_norm1(patches)),
            num_frames,
            token_order="hwt",
            scale=attention.scale,
            dropout_p=rate_in_use(attention.attn_drop),
            backend=self.attention_backend,
        )
        if not _draws(self.drop_path) and not _draws(attention.proj_drop):
            folded = _fold(self, context)
            return self.temporal_fc(attention.proj(context)) if folded is None else functional.linear(context, *folded)
        sites = attention.proj(context).reshape(-1, num_frames, context.shape[-1])  # (B * N, T, C): dropped by sites
        return self.temporal_fc(self.drop_path(attention.proj_drop(sites)).reshape(patches.shape))

    def _attend_over_space(self, x: Tensor, num_frames: int, projection: Affine) -> Tensor:
        """Map tokens (B, 1 + N * T, C) to what attention over the patches of each frame adds to them."""
        attention = self.attn
        qkv = _project(attention, self.norm1(x))
        options: dict[str, Any] = {
            "token_order": "hwt",
            "scale": attention.scale,
            "dropout_p": rate_in_use(attention.attn_drop),
            "backend": self.attention_backend,
        }
        if not (_draws(self.drop_path) or _draws(attention.proj_drop) or projection.draws):
            # The mean of the cls token's results comes before the projection, not after: the same, as that is affine.
            return attention.proj(spatial_attention(qkv, num_frames, cls_token="mean", **options))
        patches, cls_tokens = spatial_attention(qkv, num_frames, cls_token="per_frame", **options)
        patches, cls_tokens = attention.proj(patches), attention.proj(cls_tokens)
        # Dropped by frames (B * T, 1 + N, C): what ones become there is the factor of each number, or of each frame.
        batch, rows, channels = patches.shape
        sites = rows // num_frames
        each = (1 + sites, channels) if _draws(attention.proj_drop) else (1, 1)
        factors = self.drop_path(attention.proj_drop(patches.new_ones(batch * num_frames, *each)))
        factors = factors.unflatten(0, (batch, num_frames)).expand(-1, -1, 1 + sites, channels)
        cls_token = (cls_tokens * factors[:, :, 0]).mean(dim=1, keepdim=True)
        patches = patches.unflatten(1, (sites, num_frames)) * factors[:, :, 1:].transpose(1, 2)
        return torch.cat((cls_token, patches.flatten(1, 2)), dim=1)


_ATTENTIONS = as_defined(Attention, FusedAttention)
_DROPS = as_defined(nn.Identity, nn.Dropout, DropPath)


def _ops_can_attend(attention: Any) -> bool:
    """Whether the dropout of the probabilities is what the ops compute, and no hook looks at what it returns."""
    return FusedAttention.is_intact() and can_drop(attention._modules["attn_drop"]) and is_number(attention.scale)


def _maps_tokens(norm: Any) -> bool:
    """Whether a norm treats each token by itself."""
    return is_plain(norm, PER_TOKEN_NORM) and len(getattr(norm, "normalized_shape", (1,))) == 1


def _project(attention: Attention, x: Tensor) -> Tensor:
    """Map tokens (B, S, C) to their queries, keys and values (B, S, 3, h, d)."""
    return attention.qkv(x).unflatten(-1, (3, attention.num_heads, -1))


def _draws(part: nn.Module) -> bool:
    """Whether a dropout or a stochastic depth is active."""
    if isinstance(part, DropPath):
        return part.training and part.drop_prob > 0.0
    return rate_in_use(part) > 0.0


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
_folded: WeakKeyDictionary[FusedBlock, _Folded] = WeakKeyDictionary()

# Multiplying two C x C matrices costs as much as C tokens save; smaller products run slower, so a margin pays.
_FOLD_TOKENS = 2


def _fold(block: FusedBlock, context: Tensor) -> tuple[Tensor, Tensor] | None:
    """Give weight and bias of ``temporal_fc`` after ``temporal_attn.proj``; None where two layers are better or known.

    Args:
        block: the block.
        context: (B, N * T, C), what the two are about to be applied to.

    Returns:
        Weight (C, C) and bias (C,) of one layer that does the work of both, for this call, or None.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or type(context) is not Tensor:
        return None
    first, second = block.temporal_attn.proj, block.temporal_fc
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


def _kept(block: FusedBlock, parameters: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
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

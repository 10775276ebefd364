"""Accelerated twins of the modules of TimeSformer."""

from __future__ import annotations

from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional

from vidattn.accelerate import Twin, why_overridden
from vidattn.models.timesformer import Attention, Block, DropPath
from vidattn.nn.parts import attend, dropout_is_watched, has_hooks, rate_in_use
from vidattn.ops import spatial_attention, temporal_attention

_PER_TOKEN_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.Identity)


class FusedAttention(Twin, Attention):
    """:class:`~vidattn.models.timesformer.Attention` without a matrix of scores in memory."""

    ops = ("spatial_attention",)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (B, N, C) to (B, N, C)."""
        if dropout_is_watched(self.attn_drop):
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

    Without gradients and dropout the output projection of the attention over time and ``temporal_fc``, which follows
    it, are one matrix. It is made again when one of their parameters changes, and after :meth:`train` or ``eval()``.
    The one change that cannot be seen is an assignment to elements of ``parameter.data``, which PyTorch does not count.

    A hook on an attention, or on a part of one, makes the block compute as the original does. So do joint attention and
    attention over space alone, whose ``attn`` has a twin of its own.
    """

    ops = ("temporal_attention", "spatial_attention")

    @staticmethod
    def refuse(module: Any) -> str | None:
        """Say why a block cannot become this twin; None if it can."""
        if module.attention_type != "divided_space_time":
            return None
        for name in ("temporal_attn", "attn"):
            attention = getattr(module, name)
            if type(attention) not in (Attention, FusedAttention):
                return f"its {name} is a {type(attention).__name__}"
            overridden = why_overridden(attention)
            if overridden is not None:
                return f"its {name}: {overridden}"
            if not attention.with_qkv:
                return f"its {name} has no projections"
        for name in ("temporal_norm1", "norm1"):
            norm = getattr(module, name)
            if type(norm) not in _PER_TOKEN_NORMS or len(getattr(norm, "normalized_shape", (1,))) != 1:
                return f"its {name} is a {type(norm).__name__}, which may look at several tokens"
        return None

    def train(self, mode: bool = True) -> FusedBlock:
        """Set the mode, as every module does."""
        _folded.pop(self, None)
        return super().train(mode)

    def _attend_divided(self, x: Tensor, batch: int, num_frames: int) -> Tensor:
        rows = x.shape[1] - 1
        if x.shape[0] != batch or num_frames < 1 or rows < 1 or rows % num_frames or self._is_watched():
            return super()._attend_divided(x, batch, num_frames)
        cls_token, patches = x.split((1, rows), dim=1)
        x = torch.cat((cls_token, patches + self._attend_over_time(patches, num_frames)), dim=1)
        return x + self._attend_over_space(x, num_frames)

    def _is_watched(self) -> bool:
        """Whether a hook would see that a part is not called, or not as by the original; or a part is unknown."""
        for attention in (self.temporal_attn, self.attn):
            parts = (attention, attention.qkv, attention.proj, attention.proj_drop)
            if has_hooks(*parts) or dropout_is_watched(attention.attn_drop) or _is_unknown(attention.proj_drop):
                return True
        return has_hooks(self.temporal_norm1, self.norm1, self.drop_path) or _is_unknown(self.drop_path)

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
            folded = _fold(self) if _may_fold(context) else None
            return self.temporal_fc(attention.proj(context)) if folded is None else functional.linear(context, *folded)
        sites = attention.proj(context).reshape(-1, num_frames, context.shape[-1])  # (B * N, T, C): dropped by sites
        return self.temporal_fc(self.drop_path(attention.proj_drop(sites)).reshape(patches.shape))

    def _attend_over_space(self, x: Tensor, num_frames: int) -> Tensor:
        """Map tokens (B, 1 + N * T, C) to what attention over the patches of each frame adds to them."""
        attention = self.attn
        qkv = _project(attention, self.norm1(x))
        options: dict[str, Any] = {
            "token_order": "hwt",
            "scale": attention.scale,
            "dropout_p": rate_in_use(attention.attn_drop),
            "backend": self.attention_backend,
        }
        if not _draws(self.drop_path) and not _draws(attention.proj_drop):
            # The mean of the cls token's results comes before the projection, not after: the same, as that is linear.
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


def _project(attention: Attention, x: Tensor) -> Tensor:
    """Map tokens (B, S, C) to their queries, keys and values (B, S, 3, h, d)."""
    return attention.qkv(x).unflatten(-1, (3, attention.num_heads, -1))


def _draws(part: nn.Module) -> bool:
    """Whether a dropout or a stochastic depth is active."""
    if isinstance(part, DropPath):
        return part.training and part.drop_prob > 0.0
    return rate_in_use(part) > 0.0


def _is_unknown(part: nn.Module) -> bool:
    return type(part) not in (nn.Identity, nn.Dropout, DropPath)


class _Folded(NamedTuple):
    """Two linear layers in one, and the parameters it was made of.

    Those are views: while they live, nothing else can come to lie where the parameters lay.
    """

    parameters: tuple[Tensor, ...]
    versions: tuple[int, ...]
    weight: Tensor
    bias: Tensor


# Outside of the modules, so that neither copies nor pickles nor state dicts hold any.
_folded: WeakKeyDictionary[FusedBlock, _Folded] = WeakKeyDictionary()


def _may_fold(context: Tensor) -> bool:
    """Whether nothing but the numbers is asked for: no gradient, and no recording that outlives the parameters."""
    return not (
        torch.is_grad_enabled()
        or type(context) is not Tensor
        or context.device.type not in ("cpu", "cuda")
        or torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or (context.is_cuda and torch.cuda.is_current_stream_capturing())
    )


def _fold(block: FusedBlock) -> tuple[Tensor, Tensor] | None:
    """Give weight and bias of ``temporal_fc`` after ``temporal_attn.proj``; None where they are no plain layers."""
    first, second = block.temporal_attn.proj, block.temporal_fc
    if any(type(layer) is not nn.Linear or has_hooks(layer) or why_overridden(layer) for layer in (first, second)):
        return None
    parameters = (first.weight, first.bias, second.weight, second.bias)
    if any(type(x) is not nn.Parameter or x.is_inference() or x.dtype != first.weight.dtype for x in parameters):
        return None
    versions = tuple(x._version for x in parameters)
    known = _folded.get(block)
    if known is not None and known.versions == versions and all(map(_same_place, parameters, known.parameters)):
        return known.weight, known.bias
    views = tuple(x.detach() for x in parameters)
    w1, b1, w2, b2 = (x.double() for x in views)
    folded = _Folded(views, versions, (w2 @ w1).to(views[0].dtype), (w2 @ b1 + b2).to(views[0].dtype))
    _folded[block] = folded
    return folded.weight, folded.bias


def _same_place(x: Tensor, old: Tensor) -> bool:
    return (x.data_ptr(), x.dtype, x.device, x.shape, x.stride()) == (
        old.data_ptr(), old.dtype, old.device, old.shape, old.stride(),
    )  # fmt: skip

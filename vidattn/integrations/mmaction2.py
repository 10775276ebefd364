"""mmaction2's divided attention: two modules on ``nn.MultiheadAttention``, with their norms and residuals."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from vidattn.integrations import Counterpart, Part
from vidattn.nn.parts import DROPOUT, PER_TOKEN_NORM, as_defined, is_plain, rate_in_use
from vidattn.ops import spatial_attention, temporal_attention
from vidattn.twins import Twin

_MULTIHEAD = as_defined(nn.MultiheadAttention)


class _FusedOnMultihead(Twin):
    """What the two twins share: the projections of an ``nn.MultiheadAttention``, which is not called itself."""

    level = "layer"

    @staticmethod
    def refuse(module: Any) -> str | None:
        """Say why a module cannot become this twin; None if it can."""
        return None if _ops_can_attend(module.attn) else "its attn is no plain nn.MultiheadAttention of one width"

    def _takes(self: Any, query: Any, residual: Any) -> bool:
        """Whether the ops can do what the original does; of all arguments it reads the query alone."""
        return (
            residual is None
            and isinstance(query, Tensor)
            and query.ndim == 3
            and query.shape[1] > 1
            and (query.shape[1] - 1) % self.num_frames == 0
            and self.is_intact()
            and _ops_can_attend(self.attn)
            and is_plain(self.norm, PER_TOKEN_NORM)
            and len(getattr(self.norm, "normalized_shape", (1,))) == 1
        )

    def _project(self: Any, x: Tensor) -> Tensor:
        """Map tokens (B, S, C) to their queries, keys and values (B, S, 3, h, d)."""
        inner = self.attn
        return functional.linear(self.norm(x), inner.in_proj_weight, inner.in_proj_bias).unflatten(
            -1, (3, inner.num_heads, -1)
        )

    def _project_out(self: Any, context: Tensor) -> Tensor:
        return functional.linear(context, self.attn.out_proj.weight, self.attn.out_proj.bias)

    def _options(self: Any) -> dict[str, Any]:
        inner = self.attn
        return {
            "token_order": "hwt",
            "dropout_p": inner.dropout if inner.training else 0.0,
            "backend": self.attention_backend,
        }


class FusedDividedTemporalAttentionWithNorm(_FusedOnMultihead):
    """``DividedTemporalAttentionWithNorm`` on ``vidattn.temporal_attention``."""

    ops = ("temporal_attention",)

    def forward(
        self: Any, query: Tensor, key: Any = None, value: Any = None, residual: Any = None, **more: Any
    ) -> Tensor:
        """Map tokens (B, 1 + N * T, C), time fastest, to the same, residual included."""
        if not self._takes(query, residual):
            return self.replaced.forward(self, query, key, value, residual, **more)
        cls_token, patches = query[:, :1], query[:, 1:]
        context = temporal_attention(self._project(patches), self.num_frames, **self._options())
        sites = self._project_out(context).reshape(-1, self.num_frames, query.shape[-1])  # dropped by sites
        added = self.temporal_fc(self.dropout_layer(self.proj_drop(sites)))
        return torch.cat((cls_token, patches + added.reshape(patches.shape)), dim=1)


class FusedDividedSpatialAttentionWithNorm(_FusedOnMultihead):
    """``DividedSpatialAttentionWithNorm`` on ``vidattn.spatial_attention``; the cls token is not repeated."""

    ops = ("spatial_attention",)

    def forward(
        self: Any, query: Tensor, key: Any = None, value: Any = None, residual: Any = None, **more: Any
    ) -> Tensor:
        """Map tokens (B, 1 + N * T, C), time fastest, to the same, residual included."""
        if not self._takes(query, residual):
            return self.replaced.forward(self, query, key, value, residual, **more)
        frames, qkv = self.num_frames, self._project(query)
        if _drops_nothing(self.proj_drop) and _drops_nothing(self.dropout_layer):
            # The mean of the cls token's results comes before the projection: the same, as that is affine.
            return query + self._project_out(spatial_attention(qkv, frames, cls_token="mean", **self._options()))
        patches, cls_tokens = spatial_attention(qkv, frames, cls_token="per_frame", **self._options())
        by_frame = self._project_out(patches).unflatten(1, (-1, frames)).transpose(1, 2)  # (B, T, N, C)
        joined = torch.cat((self._project_out(cls_tokens).unsqueeze(2), by_frame), dim=2).flatten(0, 1)
        joined = self.dropout_layer(self.proj_drop(joined)).unflatten(0, (-1, frames))  # dropped by frames
        patches = joined[:, :, 1:].transpose(1, 2).flatten(1, 2)
        return query + torch.cat((joined[:, :, 0].mean(1, keepdim=True), patches), dim=1)


def _drops_nothing(layer: Any) -> bool:
    """Whether a dropout or a stochastic depth gives what it is given."""
    kind = type(layer)
    if is_plain(layer, DROPOUT):
        return rate_in_use(layer) == 0.0
    return is_plain(layer, {kind: kind.forward}) and not layer.training and _DROP_PATH.is_tested(kind)


# Stochastic depth of mmcv and timm.
_DROP_PATH = Part(
    "DropPath", ("DropPath.forward", "drop_path"), {"6e1658d8984266fe": "mmcv", "dc2739ae73dcffb1": "timm"}
)
PARTS = (_DROP_PATH,)


def _ops_can_attend(inner: Any) -> bool:
    """Whether a module is PyTorch's attention as the original uses it, with all of its options left alone."""
    return (
        is_plain(inner, _MULTIHEAD)
        and not inner.batch_first
        and inner._qkv_same_embed_dim
        and inner.in_proj_weight is not None
        and inner.bias_k is None
        and inner.bias_v is None
        and not inner.add_zero_attn
        and 0.0 <= inner.dropout < 1.0
    )


COUNTERPARTS = tuple(
    Counterpart(
        name,
        None,
        twin,
        code=(f"{name}.forward",),
        tested=tested,
        resembles=lambda module: isinstance(getattr(module, "attn", None), nn.MultiheadAttention),
    )
    for name, twin, tested in (
        ("DividedTemporalAttentionWithNorm", FusedDividedTemporalAttentionWithNorm, {"7642d63eb03c850e": "4d6c934"}),
        ("DividedSpatialAttentionWithNorm", FusedDividedSpatialAttentionWithNorm, {"0943356dcb794466": "4d6c934"}),
    )
)

"""AnimateDiff: the motion modules of the official code, and of MagicAnimate, which has them too."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vidattn.integrations import Counterpart
from vidattn.nn.parts import DROPOUT, affine, is_number, is_plain, rate_in_use, why_not_number
from vidattn.ops import temporal_attention
from vidattn.twins import Twin

_PROJECTIONS = ("to_q", "to_k", "to_v")


class FusedVersatileAttention(Twin):
    """``VersatileAttention`` on :func:`vidattn.temporal_attention`: the tokens of all frames are read where they lie.

    The original regroups them into one sequence a site, and back. Its projections see the tokens in another order than
    here, so that they have to be layers that treat each by itself. Attention to a text, masks, slices of attention and
    xFormers run as in the original.
    """

    ops = ("temporal_attention",)

    @staticmethod
    def refuse(module: Any) -> str | None:
        """Say why a module cannot become this twin; None if it can."""
        if module.is_cross_attention:
            return "it attends to another sequence"
        return why_not_number(module)

    def forward(
        self: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        video_length: int | None = None,
    ) -> Tensor:
        """Attend to the same site in all frames.

        Args:
            hidden_states: (B * T, N, C).
            encoder_hidden_states: None; otherwise the original runs.
            attention_mask: None; otherwise the original runs.
            video_length: frames T.

        Returns:
            (B * T, N, C).
        """
        if (
            encoder_hidden_states is not None
            or attention_mask is not None
            or not video_length
            or hidden_states.shape[0] % video_length != 0
            or not _ops_can_attend(self)
        ):
            return self.replaced.forward(  # type: ignore[no-any-return]
                self, hidden_states, encoder_hidden_states, attention_mask, video_length
            )
        tokens = hidden_states.unflatten(0, (-1, video_length))  # (B, T, N, C)
        if self.pos_encoder is not None:
            tokens = tokens + self.pos_encoder.pe[:, :video_length].unsqueeze(2)
        tokens = tokens.flatten(1, 2)
        query, key, value = (self._modules[name](tokens).unflatten(-1, (self.heads, -1)) for name in _PROJECTIONS)
        context = temporal_attention(
            (query, key, value), video_length, scale=self.scale, backend=self.attention_backend
        )
        out: Tensor = self.to_out[0](context)
        return out.view(*hidden_states.shape[:2], out.shape[-1])


def _ops_can_attend(module: Any) -> bool:
    """Whether nothing happens to the tokens but positions, projections of each and attention over time."""
    projection, dropout = module.to_out
    layers = [affine(module._modules[name]) for name in _PROJECTIONS] + [affine(projection)]
    return (
        module.is_intact()
        and module.attention_mode == "Temporal"
        and module.group_norm is None
        and module.added_kv_proj_dim is None
        and not module._use_memory_efficient_attention_xformers
        and module._slice_size is None
        and is_number(module.scale)
        and all(layer is not None and not layer.draws for layer in layers)
        and is_plain(dropout, DROPOUT)
        and rate_in_use(dropout) == 0.0
        and _adds_positions(module)
    )


def _adds_positions(module: Any) -> bool:
    """Whether the positions, if there are any, are added as the watched function does it, and nothing else is done."""
    encoder = module.pos_encoder
    if encoder is None:
        return True
    known = {row.namespace: row.function for row in module._watched if row.namespace is type(encoder)}
    return is_plain(encoder, known) and is_plain(encoder.dropout, DROPOUT) and rate_in_use(encoder.dropout) == 0.0


COUNTERPARTS = (
    Counterpart(
        "VersatileAttention",
        None,
        FusedVersatileAttention,
        code=(
            "VersatileAttention.forward",
            "VersatileAttention._attention",
            "VersatileAttention.reshape_heads_to_batch_dim",
            "VersatileAttention.reshape_batch_dim_to_heads",
            "PositionalEncoding.forward",
        ),
        tested={"a0c9df7de39325ef": "AnimateDiff v1 to v3, MagicAnimate"},
        resembles=lambda module: all(
            hasattr(module, name)
            for name in ("attention_mode", "is_cross_attention", "pos_encoder", "scale", "_slice_size")
        ),
    ),
)

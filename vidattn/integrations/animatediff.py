"""AnimateDiff: the motion modules of the official code, and of the many repositories that have them too."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vidattn.integrations import Counterpart
from vidattn.integrations.diffusers import HELPERS, MAX_HEAD_DIM, is_plain_attention, processor_name
from vidattn.nn.parts import DROPOUT, affine, is_number, is_plain, rate_in_use, why_not_number
from vidattn.ops import temporal_attention
from vidattn.twins import Twin

_PROJECTIONS = ("to_q", "to_k", "to_v")
_PROCESSORS = ("AttnProcessor", "AttnProcessor2_0")


class FusedVersatileAttention(Twin):
    """``VersatileAttention`` on ``vidattn.temporal_attention``: the tokens of all frames are read where they lie.

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
        head_dim = getattr(module.to_q, "out_features", 0) // module.heads
        if head_dim > MAX_HEAD_DIM:
            return f"its heads have {head_dim} channels, for which there is no kernel (up to {MAX_HEAD_DIM})"
        return why_not_number(module)

    def forward(
        self: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        video_length: int | None = None,
        **cross_attention_kwargs: Any,
    ) -> Tensor:
        """Attend to the same site in all frames.

        Args:
            hidden_states: (B * T, N, C).
            encoder_hidden_states: None; otherwise the original runs.
            attention_mask: None; otherwise the original runs.
            video_length: frames T.
            **cross_attention_kwargs: none; otherwise the original runs.

        Returns:
            (B * T, N, C).
        """
        by_processor = hasattr(self, "processor")
        if (
            encoder_hidden_states is not None
            or attention_mask is not None
            or not video_length
            or hidden_states.shape[0] % video_length != 0
            or cross_attention_kwargs
            or not _maps_each_token(self)
            or not (_attends_by_processor(self) if by_processor else _attends_by_scores(self))
        ):
            return self.replaced.forward(  # type: ignore[no-any-return]
                self, hidden_states, encoder_hidden_states, attention_mask, video_length, **cross_attention_kwargs
            )
        tokens = hidden_states.unflatten(0, (-1, video_length))  # (B, T, N, C)
        if self.pos_encoder is not None:
            tokens = tokens + self.pos_encoder.pe[:, :video_length].unsqueeze(2)
        tokens = tokens.flatten(1, 2)
        query, key, value = (self._modules[name](tokens).unflatten(-1, (self.heads, -1)) for name in _PROJECTIONS)
        scale = None if by_processor and processor_name(self) == "AttnProcessor2_0" else self.scale
        context = temporal_attention((query, key, value), video_length, scale=scale, backend=self.attention_backend)
        out: Tensor = self.to_out[0](context)
        return out.view(*hidden_states.shape[:2], out.shape[-1])


def _maps_each_token(module: Any) -> bool:
    """Whether nothing happens around the attention but that positions are added, and each token is projected."""
    projection, dropout = module.to_out
    layers = [affine(module._modules[name]) for name in _PROJECTIONS] + [affine(projection)]
    return (
        module.is_intact()
        and module.attention_mode == "Temporal"
        and module.group_norm is None
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


def _attends_by_scores(module: Any) -> bool:
    """Whether a module on the first releases of diffusers computes all scores at once."""
    return (
        module.added_kv_proj_dim is None
        and not module._use_memory_efficient_attention_xformers
        and module._slice_size is None
    )


def _attends_by_processor(module: Any) -> bool:
    """Whether a module on later releases of diffusers has one of its own processors, and only that."""
    return (
        processor_name(module) in _PROCESSORS
        and is_plain_attention(module)
        and getattr(module, "norm_q", None) is None  # old releases have none
        and getattr(module, "norm_k", None) is None
        and module.rescale_output_factor == 1
    )


_KNOWN_BY = ("attention_mode", "is_cross_attention", "pos_encoder", "scale", "heads", "to_q")

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
        resembles=lambda module: all(hasattr(module, name) for name in (*_KNOWN_BY, "_slice_size")),
    ),
    Counterpart(
        "VersatileAttention",
        None,
        FusedVersatileAttention,
        code=(
            "VersatileAttention.forward",
            "PositionalEncoding.forward",
            *(f"VersatileAttention.{name}" for name in HELPERS),
            *(f"{name}.__call__" for name in _PROCESSORS),
        ),
        tested={
            "7793828931bb910c": "AnimateAnyone, Champ, EchoMimic, Hallo, MusePose on diffusers 0.42",
            "7c7a643042cd0319": "the same on 0.32",
            "70f8edb130e0abfb": "the same on 0.27",
            "4ad7c910a0b351b6": "the same on 0.24",
            "750a86fcd199fd22": "animatediff-cli on diffusers 0.42",
            "43d5558777dfea01": "animatediff-cli on 0.32",
            "dffc6b2c6b23cf7c": "animatediff-cli on 0.27",
            "86e1dab89148cb92": "animatediff-cli on 0.24",
        },
        resembles=lambda module: all(hasattr(module, name) for name in (*_KNOWN_BY, "set_processor")),
    ),
)

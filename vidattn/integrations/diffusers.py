"""diffusers: self-attention of its ``Attention``, in models of video and of images.

AnimateDiff's motion modules, ``TransformerTemporalModel``, Latte and Stable Video Diffusion regroup their tokens into
sequences around a whole block, once, together with the change from channels first to last; these sequences are
attended to as they come. CogVideoX attends to text and video together.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vidattn.integrations import Counterpart
from vidattn.nn.parts import PER_TOKEN_NORM, attend, is_plain
from vidattn.twins import Twin

# More channels in a head have no kernel: the library's own processor is faster.
MAX_HEAD_DIM = 128
# Processors that the twin does the work of. In their names: text and video in one sequence; one packed projection.
_JOINT, _PACKED = "CogVideoX", "Fused"
_PROCESSORS = (
    "AttnProcessor",
    "AttnProcessor2_0",
    "FusedAttnProcessor2_0",
    "CogVideoXAttnProcessor2_0",
    "FusedCogVideoXAttnProcessor2_0",
)


class FusedDiffusersAttention(Twin):
    """``Attention`` on ``vidattn.spatial_attention``, with the processors that diffusers itself puts there.

    The processor is looked at in every call. One of the user, of an adapter or of xFormers runs as it would in the
    original, and so do masks, cross-attention and what only some image models have (norms over the channels of an
    image, residual connections). Projections, norms of queries and keys, and the dropout are called as modules.
    """

    ops = ("spatial_attention",)

    @staticmethod
    def refuse(module: Any) -> str | None:
        """Say why a module cannot become this twin; None if it can."""
        if module.is_cross_attention:
            return "it attends to another sequence"
        if not is_plain_attention(module):
            return "it has parts for images or several sources, which stay as they are"
        processor = type(module.processor).__name__
        if processor not in _PROCESSORS:
            return f"its processor is a {processor}"
        head_dim = module.inner_dim // module.heads
        if head_dim > MAX_HEAD_DIM:
            return f"its heads have {head_dim} channels, for which there is no kernel (up to {MAX_HEAD_DIM})"
        return None

    def forward(
        self: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **cross_attention_kwargs: Any,
    ) -> Any:
        """Attend to all tokens of each sequence.

        Args:
            hidden_states: (B, S, C).
            encoder_hidden_states: the text (B, S', C) for a processor that joins the two; otherwise the original runs.
            attention_mask: None; otherwise the original runs.
            **cross_attention_kwargs: ``image_rotary_emb`` for a processor that joins two sequences; with any other, the
                original runs.

        Returns:
            (B, S, C); from a processor that joins two sequences the pair (B, S, C), (B, S', C).
        """
        processor = processor_name(self)
        joint = processor is not None and _JOINT in processor
        rotary = cross_attention_kwargs.get("image_rotary_emb") if joint else None
        rotate = None if rotary is None else _rotation(self)
        if (
            processor is None
            or attention_mask is not None
            or hidden_states.ndim != 3
            or joint == (encoder_hidden_states is None)
            or not cross_attention_kwargs.keys() <= ({"image_rotary_emb"} if joint else set())
            or (rotary is not None and rotate is None)
            or not is_plain_attention(self)
        ):
            return self.replaced.forward(
                self, hidden_states, encoder_hidden_states, attention_mask, **cross_attention_kwargs
            )
        text = encoder_hidden_states
        text_tokens = 0 if text is None else text.shape[1]
        tokens = hidden_states if text is None else torch.cat((text, hidden_states), dim=1)
        qkv = _project(self, tokens, _PACKED in processor)
        if rotate is not None:
            query, key, value = qkv.unbind(2) if isinstance(qkv, Tensor) else qkv
            for x in (query, key):  # as the original does it: in place, and in float32
                video = x[:, text_tokens:].transpose(1, 2)  # (B, h, S, d)
                video.copy_(rotate(video, rotary))
            qkv = query, key, value
        context = attend(
            qkv,
            scale=self.scale if processor == "AttnProcessor" else None,
            dropout_p=0.0,
            backend=self.attention_backend,
        )
        out = self.to_out[1](self.to_out[0](context))
        if text is not None:
            text, video = out.split((text_tokens, out.shape[1] - text_tokens), dim=1)
            return video, text
        return out if self.rescale_output_factor == 1 else out / self.rescale_output_factor


def is_plain_attention(module: Any) -> bool:
    """Whether nothing happens to the tokens but projections and attention, and no method is another one."""
    return (
        module.group_norm is None
        and module.spatial_norm is None
        and module.added_kv_proj_dim is None
        and not module.residual_connection
        and not getattr(module, "pre_only", False)  # this and the next are not in old releases
        and getattr(module, "inner_kv_dim", module.inner_dim) == module.inner_dim
        and not any(name in module.__dict__ for name in HELPERS)
    )


def processor_name(module: Any) -> str | None:
    """Name the class of the processor, if the twin does its work and nobody has changed what that is."""
    kind = type(module.processor)
    if not module.is_intact() or not any(row.namespace is kind for row in module._watched):
        return None
    return kind.__name__


def _rotation(module: Any) -> Callable[[Tensor, Any], Tensor] | None:
    """Find the library's rotary embedding where the original finds it, when it is called."""
    package, _, _ = type(module.processor).__module__.rpartition(".")
    return getattr(sys.modules.get(f"{package}.embeddings"), "apply_rotary_emb", None)


def _project(module: Any, x: Tensor, packed: bool) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """Map tokens (B, S, C) to (B, S, 3, h, d), or to three of (B, S, h, d)."""
    heads = module.heads
    norms = module.norm_q, module.norm_k
    if packed:
        qkv = module.to_qkv(x).unflatten(-1, (3, heads, -1))
        if norms == (None, None):
            return qkv  # type: ignore[no-any-return]
        query, key, value = qkv.unbind(2)
    else:
        query, key, value = (layer(x).unflatten(-1, (heads, -1)) for layer in (module.to_q, module.to_k, module.to_v))
    return _normalise(norms[0], query), _normalise(norms[1], key), value


def _normalise(norm: nn.Module | None, x: Tensor) -> Tensor:
    """Normalise queries or keys (B, S, h, d); a module that may look at more than a head sees what it always does."""
    if norm is None:
        return x
    if is_plain(norm, PER_TOKEN_NORM) and len(getattr(norm, "normalized_shape", ())) == 1:
        out: Tensor = norm(x)
        return out
    by_head: Tensor = norm(x.transpose(1, 2))
    return by_head.transpose(1, 2)


# Methods of ``Attention`` that the eager processor calls.
HELPERS = ("get_attention_scores", "head_to_batch_dim", "batch_to_head_dim", "prepare_attention_mask")

COUNTERPARTS = (
    Counterpart(
        "Attention",
        "diffusers",
        FusedDiffusersAttention,
        code=(
            "Attention.forward",
            *(f"Attention.{name}" for name in HELPERS),
            *(f"{name}.__call__" for name in _PROCESSORS),
        ),
        tested={"6d13838b22602382": "0.35, 0.42", "45fa2bb0aec4041a": "0.32"},
        resembles=lambda module: all(
            hasattr(module, name) for name in ("set_processor", "processor", "to_q", "heads", "rescale_output_factor")
        ),
    ),
)

"""Hugging Face transformers: TimeSformer, ViViT, VideoMAE; the attention interface "vidattn"."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from vidattn.integrations import Counterpart
from vidattn.nn.divided import Branch, Divided, FusedDividedBlock
from vidattn.nn.parts import (
    DROPOUT,
    attend,
    can_drop,
    is_number,
    is_part,
    is_plain,
    rate_in_use,
    why_not_number,
)
from vidattn.twins import Twin

NAME = "vidattn"


def register() -> None:
    """Make ``attn_implementation="vidattn"`` known to transformers, for all models that use its attention interface.

    Attention without a mask, each token to all, runs on the ops of this package, or on PyTorch's attention where that
    is faster. All other calls (masks, causal models, groups of heads that share keys, a cache) are what "sdpa" makes of
    them. Calling this twice changes nothing. TimeSformer and Swin V2 do not use the interface, and Swin hands it a
    mask: those, and whoever wants one model changed and not a name registered, take ``vidattn.accelerate``.

    Raises:
        ImportError: transformers is not installed.

    Reference:
        https://huggingface.co/docs/transformers/attention_interface

    Example:
        >>> from transformers import VivitConfig, VivitModel
        >>> from vidattn.integrations.transformers import register
        >>> register()
        >>> config = VivitConfig(image_size=32, num_frames=4, num_hidden_layers=1)
        >>> model = VivitModel._from_config(config, attn_implementation="vidattn")  # or .from_pretrained(name, ...)
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)  # without one of its own, a model's masks would be dropped


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attend, as an attention function of transformers.

    Args:
        module: who calls; one that is causal and does not say so with the call has ``is_causal``.
        query: (B, h, S, d).
        key: (B, h, S, d).
        value: (B, h, S, d).
        attention_mask: a mask, or None.
        dropout: probability of dropping an attention weight.
        scaling: factor of q k^T; d**-0.5 when None.
        is_causal: whether a token attends to those before it alone; None for what the module says.
        kwargs: what else the model hands on.

    Returns:
        Context (B, S, h, d), and None for the attention weights.

    Raises:
        ValueError: the model wants attention sinks.
    """
    for name in ("s_aux", "sinks"):
        if kwargs.get(name) is not None:
            raise ValueError(f"attn_implementation='{NAME}': {name}: expected a model without attention sinks")
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    if (
        attention_mask is not None
        or causal
        or query.ndim != 4
        or not query.shape == key.shape == value.shape
        or getattr(module, "num_key_value_groups", 1) != 1
        or not 0.0 <= dropout < 1.0
        or (scaling is not None and not is_number(scaling))
        or not _says_no_more(kwargs)
    ):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal=is_causal, **kwargs
        )
    qkv = (query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
    context = attend(qkv, scale=scaling, dropout_p=dropout, backend=None, in_place_of_sdpa=True)
    return context.unflatten(-1, (query.shape[1], query.shape[3])), None


# What a model hands to its attention and no implementation looks at.
_IRRELEVANT = {"output_hidden_states", "return_dict", "num_items_in_batch", "interpolate_pos_encoding", "use_cache"}


def _says_no_more(options: dict[str, Any]) -> bool:
    return all(value is None or value is False or name in _IRRELEVANT for name, value in options.items())


def asks_for_context_alone(attention: Any, options: dict[str, Any]) -> bool:
    """Whether an attention module uses an implementation that is known here, and nobody asks for the weights."""
    name = attention.config._attn_implementation
    if attention.is_causal or not is_number(attention.scaling) or not _says_no_more(options):
        return False
    if name != "eager":
        return name in ("sdpa", NAME) and _is_known_function(type(attention), name)
    return not _collects_weights() and not is_watched(attention)


def _is_known_function(kind: Any, name: str) -> bool:
    """Whether an attention implementation is still that of transformers, or of this file."""
    original = kind.replaced if issubclass(kind, Twin) else kind
    functions = inspect.unwrap(original.forward).__globals__["ALL_ATTENTION_FUNCTIONS"]
    return functions[name].__module__ in ("transformers.integrations.sdpa_attention", __name__)


_is_known_function._dynamo_marked_constant = True  # type: ignore[attr-defined]  # read while compiling, not in the graph


def is_watched(module: Any) -> bool:
    """Whether somebody else than transformers looks at what a module gives besides its context."""
    return "forward" in vars(module) or any(hook.__module__ != _CAPTURING for hook in module._forward_hooks.values())


_CAPTURING = "transformers.utils.output_capturing"


def _collects_weights() -> bool:
    """Whether the model that runs was asked for attention weights (``output_attentions=True``)."""
    capturing: Any = sys.modules.get(_CAPTURING)
    if capturing is None:
        return False
    collector = capturing._active_collector
    if torch.compiler.is_compiling() and not collector.compiling:
        return False
    return "attentions" in (collector.get() or {})


class FusedTimesformerSelfAttention(Twin):
    """``TimesformerSelfAttention`` without a matrix of scores in memory."""

    ops = ("spatial_attention",)

    @staticmethod
    def refuse(module: Any) -> str | None:
        """Say why a module cannot become this twin; None if it can."""
        return why_not_number(module)

    def forward(self: Any, hidden_states: Tensor, output_attentions: bool = False) -> tuple[Tensor, ...]:
        """Map tokens (B, N, C) to a tuple of their context (B, N, C)."""
        dropout = self._modules["attn_drop"]
        if output_attentions or not (self.is_intact() and can_drop(dropout) and is_number(self.scale)):
            return self.replaced.forward(self, hidden_states, output_attentions)
        qkv = self.qkv(hidden_states).unflatten(-1, (3, self.num_heads, -1))
        return (attend(qkv, scale=self.scale, dropout_p=rate_in_use(dropout), backend=self.attention_backend),)


class FusedTimesformerLayer(FusedDividedBlock):
    """``TimesformerLayer``; divided attention is two ops on the tokens as they lie."""

    folded = ("temporal_attention.output.dense", "temporal_dense")

    def find_parts(self: Any) -> Divided | None:
        """Find the parts of the layer; None where a module between them is not what the twin does the work of."""
        parts: dict[str, Any] = self._modules
        over_time = self._branch(parts["temporal_layernorm"], parts["temporal_attention"])
        over_space = self._branch(parts["layernorm_before"], parts["attention"])
        drop_path = parts["drop_path"]
        if over_time is None or over_space is None or not (is_plain(drop_path, DROPOUT) or is_part(drop_path, self)):
            return None
        return Divided(over_time, parts["temporal_dense"], over_space, drop_path)

    def _branch(self, norm: nn.Module, attention: Any) -> Branch | None:
        if not is_part(attention, self):
            return None
        inner, output = attention._modules["attention"], attention._modules["output"]
        if not (is_part(inner, self) and is_part(output, self)):
            return None
        return Branch(norm, inner.qkv, inner.attn_drop, output.dense, output.dropout, inner.num_heads, inner.scale)

    def forward(self: Any, hidden_states: Tensor, output_attentions: bool = False) -> tuple[Tensor, ...]:
        """Map tokens (B, 1 + N * T, C), time fastest, to a tuple of tokens of the same shape."""
        attended = None
        if self.attention_type == "divided_space_time" and not output_attentions:
            frames = self.config.num_frames
            row = self.config.image_size // self.config.patch_size
            if (hidden_states.shape[1] - 1) % (frames * row) == 0:
                attended = self.attend_divided(hidden_states, hidden_states.shape[0], frames)
        if attended is None:
            return self.replaced.forward(self, hidden_states, output_attentions)
        return (attended + self.drop_path(self.output(self.intermediate(self.layernorm_after(attended)))),)


def _attend(attention: Any, qkv: tuple[Tensor, Tensor, Tensor], dropout_p: float) -> Tensor:
    """Attend over whole sequences, in place of the attention interface."""
    return attend(
        qkv,
        scale=attention.scaling,
        dropout_p=dropout_p,
        backend=attention.attention_backend,
        in_place_of_sdpa=attention.config._attn_implementation != "eager",
    )


class FusedVivitAttention(Twin):
    """``VivitAttention`` on the attention of this package, or PyTorch's where that is faster."""

    ops = ("spatial_attention",)

    def forward(
        self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Map tokens (B, N, C) to (B, N, C), and None for the weights."""
        dropout_p = self.attention_dropout if self.training else 0.0
        if not (
            self.is_intact()
            and attention_mask is None
            and hidden_states.ndim == 3
            and 0.0 <= dropout_p < 1.0
            and asks_for_context_alone(self, kwargs)
        ):
            return self.replaced.forward(self, hidden_states, attention_mask, **kwargs)
        heads = (-1, self.head_dim)
        query, key, value = (
            part(hidden_states).unflatten(-1, heads) for part in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.o_proj(_attend(self, (query, key, value), dropout_p)), None


class FusedSelfAttention(Twin):
    """``VideoMAESelfAttention`` and ``VivitSelfAttention``: ``FusedVivitAttention`` without its last layer."""

    ops = ("spatial_attention",)

    def _project(self: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        key, value = self.key(x), self.value(x)
        return self.query(x), key, value

    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Map tokens (B, N, C) to (B, N, C), and None for the weights."""
        dropout_p = self.dropout_prob if self.training else 0.0
        if not (
            self.is_intact()
            and all(mask is None for mask in args)
            and hidden_states.ndim == 3
            and 0.0 <= dropout_p < 1.0
            and asks_for_context_alone(self, kwargs)
        ):
            return self.replaced.forward(self, hidden_states, *args, **kwargs)
        heads = (-1, self.attention_head_size)
        query, key, value = (x.unflatten(-1, heads) for x in self._project(hidden_states))
        return _attend(self, (query, key, value), dropout_p), None


class FusedVideoMAESelfAttention(FusedSelfAttention):
    """``VideoMAESelfAttention`` of versions that keep the biases beside the projections, which they never call."""

    def _project(self: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = self.query.weight, self.key.weight, self.value.weight
        return (
            functional.linear(x, query, self.q_bias),
            functional.linear(x, key),
            functional.linear(x, value, self.v_bias),
        )


# What a twin does the work of. A name that another version does without is in a row of its own.
_TIMESFORMER = ("TimesformerSelfAttention.forward",)
_TIMESFORMER_LAYER = (
    "TimesformerLayer.forward",
    "TimeSformerAttention.forward",
    "TimesformerSelfOutput.forward",
    *_TIMESFORMER,
)


def counterpart(
    twin: type[Twin], code: tuple[str, ...], tested: dict[str, str], resembles: Callable[[Any], bool] = lambda _: True
) -> Counterpart:
    """Make the entry of a class, which the first of the functions in ``code`` belongs to."""
    return Counterpart(code[0].partition(".")[0], "transformers", twin, code, tested, resembles)


COUNTERPARTS = (
    counterpart(FusedTimesformerSelfAttention, _TIMESFORMER, {"7f0f68962248a7a4": "4.57 to 5.24"}),
    counterpart(
        FusedTimesformerLayer,
        (*_TIMESFORMER_LAYER, "TimesformerDropPath.forward"),
        {"225ee02c9c7db0e8": "5.12 to 5.24"},
    ),
    counterpart(
        FusedTimesformerLayer,
        (*_TIMESFORMER_LAYER, "TimeSformerDropPath.forward", "drop_path"),
        {"5a15b3d7e3287290": "4.57 to 5.0"},
    ),
    counterpart(
        FusedVivitAttention,
        ("VivitAttention.forward", "eager_attention_forward"),
        {"c514c5e38825922f": "5.12 to 5.24"},
        lambda module: hasattr(module, "q_proj"),  # the name of another class before
    ),
    counterpart(
        FusedSelfAttention,
        ("VivitSelfAttention.forward", "eager_attention_forward"),
        {"84c8a30a10d11ae2": "5.0", "9b515e7464e920dd": "4.57"},
    ),
    counterpart(
        FusedSelfAttention,
        ("VideoMAESelfAttention.forward", "eager_attention_forward"),
        {"7755b3dc1123905b": "5.12 to 5.24"},
        lambda module: not hasattr(module, "q_bias"),
    ),
    counterpart(
        FusedVideoMAESelfAttention,
        ("VideoMAESelfAttention.forward", "eager_attention_forward"),
        {"a3033e44591f725a": "5.0", "ed3ed1c6605272b7": "4.57"},
        lambda module: hasattr(module, "q_bias"),
    ),
)

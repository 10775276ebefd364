"""Hugging Face transformers: Swin and Swin V2."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from vidattn.integrations.transformers import asks_for_context_alone, counterpart, is_watched
from vidattn.nn.parts import DROPOUT, affine, can_drop, is_part, is_plain, rate_in_use
from vidattn.nn.windows import has_standard_index
from vidattn.ops import window3d_attention, window_attention
from vidattn.twins import Twin

MASK_VALUE = -100.0  # between the regions of a shifted window


class FusedSwinAttention(Twin):
    """``SwinAttention``, of windows that are partitioned, on ``vidattn.window_attention``."""

    ops = ("window_attention",)

    def forward(
        self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Map windows (G, N, C) to (G, N, C), and None for the weights; the mask is (nW, N, N) or None."""
        dropout_p = self.attention_dropout if self.training else 0.0
        if not (
            self.is_intact()
            and _is_window_mask(attention_mask)
            and 0.0 <= dropout_p < 1.0
            and hidden_states.shape[1] == self.relative_position_bias.window_area
            and asks_for_context_alone(self, kwargs)
        ):
            return self.replaced.forward(self, hidden_states, attention_mask, **kwargs)
        heads = (-1, self.head_dim)
        context = window_attention(
            tuple(part(hidden_states).unflatten(-1, heads) for part in (self.q_proj, self.k_proj, self.v_proj)),
            self.relative_position_bias().squeeze(0),
            attention_mask,
            scale=self.scaling,
            dropout_p=dropout_p,
            backend=self.attention_backend,
        )
        return self.o_proj(context), None


class FusedSwinLayer(Twin):
    """``SwinLayer`` whose attention runs on the grid as it lies: nothing is padded, rolled or partitioned.

    That takes the place of calling its attention, so at every call the layer looks whether anything hangs on that.
    """

    ops = ("window3d_attention",)
    level = "block"

    def forward(
        self: Any,
        hidden_states: Tensor,
        input_dimensions: tuple[int, int],
        always_partition: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Map tokens (B, H * W, C) to the same shape, and None for the weights."""
        attended = None
        if self.is_intact() and not torch.jit.is_tracing():
            if not always_partition:
                self.set_shift_and_window_size(input_dimensions)
            attended = self._attend(hidden_states, input_dimensions, kwargs)
        if attended is None:
            return self.replaced.forward(self, hidden_states, input_dimensions, always_partition, **kwargs)
        hidden_states = hidden_states + self.drop_path(attended)
        return hidden_states + self.dropout(self.mlp(self.layernorm_after(hidden_states))), None

    def _attend(self: Any, x: Tensor, grid: tuple[int, int], options: dict[str, Any]) -> Tensor | None:
        attention: Any = self._modules["attention"]
        if not (is_part(attention, self) and _fits(self, x, grid) and _keeps_all(self._modules["dropout"])):
            return None
        position: Any = attention._modules["relative_position_bias"]
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        dropout_p = attention.attention_dropout if attention.training else 0.0
        if not (
            is_part(position, self)
            and position.window_size == (self.window_size, self.window_size)
            and has_standard_index(position)
            and all(map(_is_linear, (*projections, attention.o_proj)))
            and 0.0 <= dropout_p < 1.0
            and asks_for_context_alone(attention, options)
            and not (attention.config._attn_implementation == "eager" and is_watched(self))
        ):
            return None
        heads = (attention.num_attention_heads, attention.head_dim)
        context = _attend_on_grid(
            self,
            grid,
            _on_grid(self.layernorm_before(x), projections, heads),
            position.relative_position_bias_table,
            pads=_biases(projections, heads),
            mask_value=MASK_VALUE,
            scale=attention.scaling,
            dropout_p=dropout_p,
        )
        return attention.o_proj(context)


class FusedSwinv2SelfAttention(Twin):
    """``Swinv2SelfAttention``, of windows that are partitioned, on ``vidattn.window_attention``."""

    ops = ("window_attention",)

    def forward(
        self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, output_attentions: bool | None = False
    ) -> tuple[Tensor, ...]:
        """Map windows (G, N, C) to a tuple of their context; the mask is (nW, N, N) or None."""
        tokens = self.window_size[0] * self.window_size[1]
        if (
            output_attentions
            or not (self.is_intact() and can_drop(self._modules["dropout"]) and _is_window_mask(attention_mask))
            or hidden_states.shape[1] != tokens
        ):
            return self.replaced.forward(self, hidden_states, attention_mask, output_attentions)
        heads = (self.num_attention_heads, self.attention_head_size)
        query, key, value = (part(hidden_states).unflatten(-1, heads) for part in (self.query, self.key, self.value))
        bias = _bias_table(self)[self.relative_position_index.view(-1)].view(tokens, tokens, -1).permute(2, 0, 1)
        context = window_attention(
            (*_cosine(self, query, key), value),
            bias,
            None if attention_mask is None else 2 * attention_mask,  # the original adds it twice
            scale=1.0,
            dropout_p=rate_in_use(self.dropout),
            backend=self.attention_backend,
        )
        return (context,)


class FusedSwinv2Layer(Twin):
    """``Swinv2Layer`` whose attention runs on the grid as it lies: nothing is padded, rolled or partitioned.

    That takes the place of calling its attention, so at every call the layer looks whether anything hangs on that.
    """

    ops = ("window3d_attention",)
    level = "block"

    def forward(
        self: Any,
        hidden_states: Tensor,
        input_dimensions: tuple[int, int],
        output_attentions: bool | None = False,
    ) -> tuple[Tensor, ...]:
        """Map tokens (B, H * W, C) to a tuple of tokens of the same shape."""
        attended = None
        if self.is_intact() and not output_attentions:
            attended = self._attend(hidden_states, input_dimensions)
        if attended is None:
            return self.replaced.forward(self, hidden_states, input_dimensions, output_attentions)
        hidden_states = hidden_states + self.drop_path(self.layernorm_before(attended))
        out = self.layernorm_after(self.output(self.intermediate(hidden_states)))
        return (hidden_states + self.drop_path(out),)

    def _attend(self: Any, x: Tensor, grid: tuple[int, int]) -> Tensor | None:
        parts: Any = self._modules["attention"]
        if not (is_part(parts, self) and _fits(self, x, grid)):
            return None
        attention, output = parts._modules["self"], parts._modules["output"]
        if not (is_part(attention, self) and is_part(output, self) and _keeps_all(output.dropout)):
            return None
        projections = (attention.query, attention.key, attention.value)
        if not (
            tuple(attention.window_size) == (self.window_size, self.window_size)
            and has_standard_index(attention)
            and all(map(_is_linear, (*projections, output.dense)))
            and can_drop(attention.dropout)
        ):
            return None
        heads = (attention.num_attention_heads, attention.attention_head_size)
        query, key, value = _on_grid(x, projections, heads)
        pads = _biases(projections, heads)
        context = _attend_on_grid(
            self,
            grid,
            (*_cosine(attention, query, key), value),
            _bias_table(attention),
            pads=None if pads is None else (*_cosine(attention, *pads[:2]), pads[2]),
            mask_value=2 * MASK_VALUE,  # the original adds it twice
            scale=1.0,
            dropout_p=rate_in_use(attention.dropout),
        )
        return output.dense(context)


_Tensors = tuple[Tensor, Tensor, Tensor]


def _is_window_mask(mask: Tensor | None) -> bool:
    return mask is None or (mask.ndim == 3 and mask.is_floating_point() and not mask.requires_grad)


def _fits(layer: Any, x: Tensor, grid: tuple[int, int]) -> bool:
    """Whether the op lays windows as the layer does, which never clips one or drops the shift of one axis alone."""
    window, shift = layer.window_size, layer.shift_size
    return (
        grid[0] * grid[1] == x.shape[1]
        and all(axis > window or (axis == window and shift == 0) for axis in grid)
        and not _HELPERS & vars(layer).keys()
    )


# Methods of a layer that the twin does not call; somebody may have put others on the instance.
_HELPERS = {"get_attn_mask", "maybe_pad", "cyclic_shift"}


def _keeps_all(dropout: Any) -> bool:
    """Whether a dropout, which the original calls on windows, does nothing now."""
    return is_plain(dropout, DROPOUT) and rate_in_use(dropout) == 0.0


def _is_linear(part: Any) -> bool:
    """Whether a projection maps token by token and draws nothing, so that it may come before the windows."""
    layer = affine(part)
    return layer is not None and not layer.draws


def _on_grid(x: Tensor, projections: tuple[Any, Any, Any], heads: tuple[int, int]) -> _Tensors:
    """Map tokens (B, H * W, C) to queries, keys and values (B, H * W, h, d)."""
    query, key, value = projections
    return query(x).unflatten(-1, heads), key(x).unflatten(-1, heads), value(x).unflatten(-1, heads)


def _biases(projections: tuple[Any, ...], heads: tuple[int, int]) -> _Tensors | None:
    """Give what a zero token becomes: three of (h, d); None for zeros."""
    constants = [layer.constant for layer in map(affine, projections) if layer is not None]
    known = next((row for row in constants if row is not None), None)
    if known is None:
        return None
    query, key, value = ((torch.zeros_like(known) if row is None else row).view(heads) for row in constants)
    return query, key, value


def _attend_on_grid(
    layer: Any,
    grid: tuple[int, int],
    qkv: _Tensors,
    table: Tensor,
    *,
    pads: _Tensors | None,
    mask_value: float,
    scale: float,
    dropout_p: float,
) -> Tensor:
    """Attend in the windows of a layer: queries, keys and values (B, H * W, h, d) to (B, H * W, C)."""
    window, shift = layer.window_size, layer.shift_size
    query, key, value = (x.unflatten(1, (1, *grid)) for x in qkv)
    padded = pads is not None and any(axis % window for axis in grid)
    context = window3d_attention(
        (query, key, value),
        table,
        window_size=(1, window, window),
        shift_size=(0, shift, shift),
        pad_qkv=torch.stack(pads) if padded and pads is not None else None,
        mask_value=mask_value,
        scale=scale,
        dropout_p=dropout_p,
        backend=layer.attention_backend,
    )
    return context.flatten(1, 3)


def _cosine(attention: Any, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Make of queries and keys (..., h, d) those whose products are the scores of cosine attention."""
    scale = torch.clamp(attention.logit_scale, max=math.log(1.0 / 0.01)).exp().view(-1, 1)
    return functional.normalize(query, dim=-1) * scale, functional.normalize(key, dim=-1)


def _bias_table(attention: Any) -> Tensor:
    """Compute the bias of each offset in a window and each head."""
    table = attention.continuous_position_bias_mlp(attention.relative_coords_table)
    return 16 * torch.sigmoid(table.view(-1, attention.num_attention_heads))


# What a twin does the work of.
_SWIN = ("SwinAttention.forward", "SwinRelativePositionBias.forward", "eager_attention_forward")
_SWIN_LAYER = (
    "SwinLayer.forward",
    "SwinLayer.get_attn_mask",
    "SwinLayer.maybe_pad",
    "SwinLayer.cyclic_shift",
    "SwinLayer.set_shift_and_window_size",
    "window_partition",
    "window_reverse",
    *_SWIN,
)
_SWIN_V2 = ("Swinv2SelfAttention.forward",)
_SWIN_V2_LAYER = (
    "Swinv2Layer.forward",
    "Swinv2Layer.get_attn_mask",
    "Swinv2Layer.maybe_pad",
    "window_partition",
    "window_reverse",
    "Swinv2Attention.forward",
    "Swinv2SelfOutput.forward",
    *_SWIN_V2,
)

COUNTERPARTS = (
    counterpart(FusedSwinAttention, _SWIN, {"4630a867d6a914f6": "5.12 to 5.24"}),
    counterpart(FusedSwinLayer, _SWIN_LAYER, {"85dff2eb53bd72e2": "5.23 to 5.24", "cc4c93cb92ff3fe7": "5.12"}),
    counterpart(FusedSwinv2SelfAttention, _SWIN_V2, {"53a5473016cb0af2": "5.0 to 5.24"}),
    counterpart(
        FusedSwinv2Layer,
        _SWIN_V2_LAYER,
        {"a48dfd9fe2f4a5a0": "5.23 to 5.24", "469f2836469d47e1": "5.12", "f1728c1fe3265910": "5.0"},
    ),
)

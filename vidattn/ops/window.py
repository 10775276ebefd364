"""Attention inside windows that are already partitioned: ``window_attention``, its op, gradient and cost.

The kernels are those of ``window3d_attention``, run on a grid of one window (1, 1, N) per window.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vidattn import reference
from vidattn.calls import WindowCall
from vidattn.ops import _arguments as arguments
from vidattn.ops import _tensors as tensors
from vidattn.ops._library import CUDA_WINDOW, LIBRARY, TAGS, call_attention, register_attention, register_function
from vidattn.ops.window3d import NATIVE_FORWARD, launch_functions
from vidattn.reference.window3d import window_attention_backward
from vidattn.tracing import traced_for_one_size

__all__ = ["window_attention"]

NAME = "window_attention"


@traced_for_one_size
def window_attention(
    qkv: Tensor | tuple[Tensor, Tensor, Tensor],
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    window_types: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """Attend inside windows that are already partitioned, with any additive mask.

    Gradients flow to ``qkv`` and ``bias``, each in its own dtype; a mask is a constant. A row whose scores are all
    -inf gives 0, with zero gradients. Scores, softmax and sums are float32 (float64 for float64) whatever the dtype of
    q. Under autocast q, k and v are cast, bias and mask are not.

    Args:
        qkv: (G, N, 3, h, d), any strides (a strided last dimension is copied once); or a tuple (q, k, v) of
            (G, N, h, d). float32, bfloat16, float16 or float64. A non-finite value may reach every token of its window
            and head, a masked one too.
        bias: (h, N, N), row = query, column = key, any floating dtype.
        mask: (nW, N, N), any floating dtype; ``mask[g % nW]`` is added to the scores of window g; nW divides G.
        window_types: int32 or int64 (nW,), where not all windows have one bias, which then is (types, h, N, N): window
            g takes ``bias[window_types[g % nW]]``; nW divides G, and need not be that of the mask. A type that the bias
            does not have raises on the CPU; on a GPU it ends in a device-side assertion.
        scale: factor of q k^T; d**-0.5 when None.
        dropout_p: probability of dropping an attention weight, ``0 <= dropout_p < 1``; active whenever above 0.
        backend: backend of this call, strict; None for the one in force.

    Returns:
        (G, N, h * d), contiguous, in q's dtype.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a shape or device does not fit, the mask requires a gradient, or the named backend cannot run the
            call.

    Reference:
        Video Swin Transformer, arXiv 2106.13230, section 3.3, equation 2.

    Example:
        >>> import torch, vidattn
        >>> qkv = torch.randn(6, 49, 3, 4, 32)
        >>> vidattn.window_attention(qkv, bias=torch.zeros(4, 49, 49), mask=torch.zeros(2, 49, 49)).shape
        torch.Size([6, 49, 128])
    """
    inputs = Inputs(*arguments.split_qkv(NAME, qkv, "(G, N, 3, h, d)", "(G, N, h, d)"), bias, mask, window_types)
    _check(inputs)
    head_dim = inputs.q.shape[-1]
    options = Options(arguments.check_scale(NAME, scale, head_dim), arguments.check_dropout(NAME, dropout_p))
    return call_attention(NAME, NAME, inputs, options, backend, inputs.q.shape[1], "dense")[0]


# ---- What the op takes, in the order of its schema ----


class Inputs(NamedTuple):
    q: Tensor  # the packed qkv when k and v are None
    k: Tensor | None
    v: Tensor | None
    bias: Tensor | None
    mask: Tensor | None
    window_types: Tensor | None = None
    seed: Tensor | None = None


class Options(NamedTuple):
    scale: float
    dropout_p: float


def _check(inputs: Inputs) -> None:
    q, _, _, bias, mask, window_types, _ = inputs
    groups, tokens = q.shape[:2]
    heads = q.shape[-2]
    if bias is not None and window_types is None:
        arguments.check_companion(NAME, "bias", bias, q, (heads, tokens, tokens), "(h, N, N)")
    elif bias is not None:
        types = max(1, bias.shape[0]) if isinstance(bias, Tensor) and bias.dim() == 4 else 1
        arguments.check_companion(NAME, "bias", bias, q, (types, heads, tokens, tokens), "(types, h, N, N)")
    if window_types is not None:
        if bias is None:
            raise ValueError(f"{NAME}: window_types: expected a bias beside it, got None")
        count = window_types.shape[0] if isinstance(window_types, Tensor) and window_types.dim() == 1 else 1
        arguments.check_numbers(NAME, "window_types", window_types, q, (count,), "(nW,)")
        if count == 0 or groups % count != 0:
            raise ValueError(
                f"{NAME}: window_types: expected the number of windows {groups} to be a multiple of nW, got {count}"
            )
    if mask is not None:
        arguments.check_dense(NAME, "mask", mask)
        kinds = mask.shape[0] if isinstance(mask, Tensor) and mask.dim() == 3 else 1
        arguments.check_companion(NAME, "mask", mask, q, (kinds, tokens, tokens), "(nW, N, N)")
        if kinds == 0 or groups % kinds != 0:
            raise ValueError(
                f"{NAME}: mask: expected the number of windows {groups} to be a multiple of nW, got {kinds}"
            )
        if mask.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{NAME}: mask: expected a constant, got one that requires a gradient; pass what is learned as bias"
            )


# ---- Schemas ----

_INPUTS = "Tensor q, Tensor? k, Tensor? v, Tensor? bias, Tensor? mask, Tensor? window_types, Tensor? seed"
_OPTIONS = "float scale, float dropout_p"
LIBRARY.define(f"{NAME}({_INPUTS}, {_OPTIONS}, str backend) -> (Tensor out, Tensor lse)", tags=TAGS)
LIBRARY.define(
    f"{NAME}_backward(Tensor grad_out, {_INPUTS}, Tensor? out, Tensor? lse, {_OPTIONS}, bool needs_bias, str backend)"
    " -> (Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_bias)",
    tags=TAGS,
)


# ---- Implementations ----


def _call(inputs: Inputs, options: Options, backend: str) -> WindowCall:
    q, k, v = map(_as_grid, tensors.for_kernels(inputs, backend))
    return WindowCall(
        q,
        k,
        v,
        bias=tensors.accumulated(inputs.bias, q, backend),
        bias_window=(),
        mask=tensors.accumulated(inputs.mask, q, backend),
        pad_qkv=None,
        seed=inputs.seed,
        window=(1, 1, inputs.q.shape[1]),
        shift=(0, 0, 0),
        wrap=(False, False, False),
        scale=options.scale,
        mask_value=0.0,
        dropout_p=options.dropout_p,
        window_types=None if inputs.window_types is None else tensors.types_below(inputs.window_types, inputs.bias),
    )


def _forward(inputs: Inputs, options: Options, backend: str) -> tuple[Tensor, Tensor]:
    if inputs.bias is not None and inputs.window_types is not None:
        arguments.check_range(NAME, "window_types", inputs.window_types, inputs.bias.shape[0])
    if backend == "reference" and inputs.q.numel() > 0:
        given = {"seed": inputs.seed, "window_types": inputs.window_types, **options._asdict()}
        qkv = tensors.separate(inputs)
        return reference.window_attention(qkv, inputs.bias, inputs.mask, **given, return_lse=True)  # type: ignore[return-value]
    out, lse = tensors.new_outputs(inputs)
    if out.numel() > 0:
        launch, _ = launch_functions(backend)
        launch(_call(inputs, options, backend), _as_grid(out), _as_grid(lse))
    return out, lse


def _backward(
    grads: Sequence[Tensor],
    inputs: Inputs,
    outputs: Sequence[Tensor | None],
    options: Options,
    needs: Sequence[bool],
    backend: str,
) -> tuple[Tensor | None, ...]:
    dout, (needs_bias,) = grads[0], needs
    if backend == "reference" and dout.numel() > 0:
        given = {"seed": inputs.seed, "window_types": inputs.window_types, **options._asdict()}
        *found, dbias = window_attention_backward(dout, tensors.separate(inputs), inputs.bias, inputs.mask, **given)
        dqkv = tensors.pack(inputs, found)
    else:
        dqkv = tensors.new_gradients(inputs)
        dbias = tensors.new_sum(inputs.bias, inputs, needs_bias)
        if dout.numel() > 0:
            _, launch = launch_functions(backend)
            views = tensors.gradients_for_kernels(dqkv, backend)
            given_grids = map(_as_grid, (tensors.last_dim_dense(dout), *outputs, *views))
            launch(_call(inputs, options, backend), *given_grids, dbias, None)
    return (*dqkv, tensors.as_input(dbias, inputs.bias, needs_bias))


def _save(ctx: Any, inputs: Inputs, output: Sequence[Tensor], options: Options, backend: str) -> None:
    """Keep the op's tensors, and its outputs only where the backward pass rebuilds rows from a log-sum-exp."""
    kept = tensors.keeps_lse(output[0].shape[1], backend)
    ctx.save_for_backward(*inputs, *(output if kept else (None, None)))
    ctx.mark_non_differentiable(output[-1])
    ctx.set_materialize_grads(False)


def _as_grid(x: Any) -> Any:
    """View windows (G, N, ...) as grids (G, 1, 1, N, ...)."""
    return None if x is None else x.unsqueeze(1).unsqueeze(1)


def _flops(shape: Sequence[int], options: Options) -> int:
    """Count q k^T and P v, a multiplication and an addition each."""
    groups, tokens = shape[:2]
    heads, head_dim = shape[-2:]
    return 4 * groups * heads * tokens**2 * head_dim


register_function(window_attention, native=NATIVE_FORWARD, cuda_tokens=CUDA_WINDOW)
register_attention(
    NAME,
    inputs=Inputs,
    options=Options,
    forward=_forward,
    backward=_backward,
    fake=lambda inputs, options, backend: tensors.new_outputs(inputs),
    flops=_flops,
    save=_save,
)

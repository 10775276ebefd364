"""Attention inside windows that are already partitioned: ``window_attention``, its op, gradient and cost.

The kernels are those of ``window3d_attention``, run on a grid of one window (1, 1, N) per window.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vidattn import reference
from vidattn.backends import choose_backend
from vidattn.ops import _arguments as arguments
from vidattn.ops import _tensors as tensors
from vidattn.ops._library import LIBRARY, TAGS, describe_call, register_attention, register_function
from vidattn.ops._transforms import call_op
from vidattn.ops.window3d import NATIVE_FORWARD, launch_functions
from vidattn.reference.window3d import window_attention_backward
from vidattn.tracing import traced_for_one_size

__all__ = ["window_attention"]


@traced_for_one_size
def window_attention(
    qkv: Tensor | tuple[Tensor, Tensor, Tensor],
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    *,
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
    inputs, options = _arguments(qkv, bias, mask, scale=scale, dropout_p=dropout_p)
    chosen = choose_backend(describe_call("window_attention", inputs.q), backend)
    seed = arguments.draw_seed(inputs.q, options.dropout_p)
    return call_op("window_attention", *inputs, seed, *options, chosen)[0]


# ---- Arguments: validated, with autocast applied, in the order of the schema ----


class _Inputs(NamedTuple):
    q: Tensor  # the packed qkv when k and v are None
    k: Tensor | None
    v: Tensor | None
    bias: Tensor | None
    mask: Tensor | None


class _Options(NamedTuple):
    scale: float
    dropout_p: float


def _arguments(
    qkv: Tensor | tuple[Tensor, Tensor, Tensor],
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> tuple[_Inputs, _Options]:
    name = "window_attention"
    q, k, v = arguments.split_qkv(name, qkv, "(G, N, 3, h, d)", "(G, N, h, d)")
    groups, tokens = q.shape[:2]
    heads, head_dim = q.shape[-2:]
    if bias is not None:
        arguments.check_companion(name, "bias", bias, q, (heads, tokens, tokens), "(h, N, N)")
    if mask is not None:
        arguments.check_dense(name, "mask", mask)
        kinds = mask.shape[0] if isinstance(mask, Tensor) and mask.dim() == 3 else 1
        arguments.check_companion(name, "mask", mask, q, (kinds, tokens, tokens), "(nW, N, N)")
        if kinds == 0 or groups % kinds != 0:
            raise ValueError(
                f"{name}: mask: expected the number of windows {groups} to be a multiple of nW, got {kinds}"
            )
        if mask.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name}: mask: expected a constant, got one that requires a gradient; pass what is learned as bias"
            )
    return _Inputs(q, k, v, bias, mask), _Options(
        arguments.check_scale(name, scale, head_dim), arguments.check_dropout(name, dropout_p)
    )


# ---- Schemas ----

_INPUTS = "Tensor q, Tensor? k, Tensor? v, Tensor? bias, Tensor? mask, Tensor? seed"
LIBRARY.define(
    f"window_attention({_INPUTS}, float scale, float dropout_p, str backend) -> (Tensor out, Tensor lse)",
    tags=TAGS,
)
LIBRARY.define(
    f"window_attention_backward(Tensor grad_out, {_INPUTS}, Tensor? out, Tensor? lse, float scale,"
    " float dropout_p, bool needs_bias, str backend)"
    " -> (Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_bias)",
    tags=TAGS,
)


# ---- Implementations ----


def _forward(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    seed: Tensor | None,
    scale: float,
    dropout_p: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    qkv = tensors.separate(q, k, v)
    out, lse = tensors.new_outputs(qkv[0])
    if out.numel() == 0:
        return out, lse
    if backend == "reference":
        return reference.window_attention(  # type: ignore[return-value]
            qkv, bias, mask, scale=scale, dropout_p=dropout_p, seed=seed, return_lse=True
        )
    launch_forward, _ = launch_functions(backend)
    launch_forward(
        *_as_grids(*qkv),
        tensors.accumulated(bias, q, backend),
        [],
        tensors.accumulated(mask, q, backend),
        None,
        seed,
        [1, 1, out.shape[1]],
        [0, 0, 0],
        [0, 0, 0],
        scale,
        0.0,
        dropout_p,
        *_as_grids(out, lse),
    )
    return out, lse


def _backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    seed: Tensor | None,
    out: Tensor | None,
    lse: Tensor | None,
    scale: float,
    dropout_p: float,
    needs_bias: bool,
    backend: str,
) -> tuple[Tensor | None, ...]:
    qkv = tensors.separate(q, k, v)
    if backend == "reference" and grad_out.numel() > 0:
        *found, grad_bias = window_attention_backward(
            grad_out, qkv, bias, mask, scale=scale, dropout_p=dropout_p, seed=seed
        )
        grads = tensors.pack(k, found)
    else:
        grads, views = tensors.new_gradients(q, k, v)
        grad_bias = tensors.new_sum(bias, q, needs_bias)
        if grad_out.numel() > 0:
            _, launch_backward = launch_functions(backend)
            launch_backward(
                *_as_grids(tensors.last_dim_dense(grad_out), *qkv),
                tensors.accumulated(bias, q, backend),
                [],
                tensors.accumulated(mask, q, backend),
                None,
                seed,
                *((None, None) if out is None or lse is None else _as_grids(out, lse)),
                [1, 1, q.shape[1]],
                [0, 0, 0],
                [0, 0, 0],
                scale,
                0.0,
                dropout_p,
                *_as_grids(*views),
                grad_bias,
                None,
            )
    return (*grads, tensors.as_input(grad_bias, bias, needs_bias))


def _save(ctx: Any, inputs: Sequence[Tensor | None], output: Sequence[Tensor]) -> None:
    """Keep the op's tensors, and its outputs only where the backward pass rebuilds rows from a log-sum-exp."""
    kept = tensors.keeps_lse(output[0].shape[1], ctx.options[-1])
    ctx.save_for_backward(*inputs, *(output if kept else (None, None)))
    ctx.mark_non_differentiable(output[-1])
    ctx.set_materialize_grads(False)


def _as_grids(*tensors: Tensor) -> list[Tensor]:
    """View windows (G, N, ...) as grids (G, 1, 1, N, ...)."""
    return [x.unsqueeze(1).unsqueeze(1) for x in tensors]


def _fake_backward(
    grad_out: Tensor, q: Tensor, k: Tensor | None, v: Tensor | None, bias: Tensor | None, *rest: Any
) -> tuple[Tensor | None, ...]:
    *_, needs_bias, _ = rest
    return (*tensors.new_gradients(q, k, v)[0], tensors.fake_sum(bias, needs_bias))


def _flops(shapes: Sequence[Any], options: Sequence[Any]) -> int:
    """Count q k^T and P v, a multiplication and an addition each."""
    groups, tokens = shapes[0][:2]
    heads, head_dim = shapes[0][-2:]
    return 4 * groups * heads * tokens**2 * head_dim


register_function("window_attention", arguments=_arguments, native=NATIVE_FORWARD)
register_attention(
    "window_attention",
    forward=_forward,
    backward=_backward,
    fake=tensors.fake_outputs,
    fake_backward=_fake_backward,
    flops=_flops,
    num_tensors=6,
    save=_save,
)

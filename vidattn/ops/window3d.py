"""3D window attention on a token grid: ``window3d_attention``, its op, gradient and cost.

From a call to its kernel: :func:`window3d_attention` validates, applies autocast and picks the backend;
``torch.ops.vidattn.window3d_attention`` is opaque to autograd and compilers and routes by the backend's name to
``reference/window3d.py``, to ``kernels/window3d.py`` or to the native op that the extension registers for the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vidattn import geometry as geo
from vidattn import reference
from vidattn.backends import choose_backend
from vidattn.messages import describe
from vidattn.ops import _arguments as arguments
from vidattn.ops import _tensors as tensors
from vidattn.ops._library import LIBRARY, TAGS, describe_call, register_attention, register_function
from vidattn.ops._transforms import call_op
from vidattn.reference.window3d import window3d_attention_backward
from vidattn.tracing import traced_for_one_size

__all__ = ["window3d_attention"]


@traced_for_one_size
def window3d_attention(
    qkv: Tensor | tuple[Tensor, Tensor, Tensor],
    bias_table: Tensor | None = None,
    *,
    window_size: int | Sequence[int],
    shift_size: int | Sequence[int] = (0, 0, 0),
    pad_qkv: Tensor | None = None,
    bias_index: str = "prefix",
    mask_value: float = -100.0,
    wrap: bool | Sequence[bool] = (False, False, False),
    scale: float | None = None,
    dropout_p: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """Attend inside the (shifted) 3D windows of a token grid, without rolling, padding or partitioning it.

    Windows are clipped to the grid, lose their shift and are padded per axis as in the papers' code;
    :func:`vidattn.explain_windows` prints what comes out. Padding tokens are keys like any other. Gradients flow to
    ``qkv``, ``bias_table`` and ``pad_qkv``, each in its own dtype. Scores, softmax and sums are float32 (float64 for
    float64) whatever the dtype of q. Under autocast q, k, v and ``pad_qkv`` are cast, the table is not.

    Args:
        qkv: (B, D, H, W, 3, h, d), a view of the projection's output on the unpadded, unshifted grid, with any strides
            (a strided last dimension is copied once, for triton also a grid that one stride does not count through);
            or a tuple (q, k, v) of (B, D, H, W, h, d). float32, bfloat16, float16 or float64. A non-finite value stays
            within its window and head, where it may reach every token.
        bias_table: relative position bias ((2Wd-1)(2Wh-1)(2Ww-1), h) of the configured window, any floating dtype.
        window_size: configured window in tokens, one int or (depth, height, width).
        shift_size: configured shift in tokens, one int or three, ``0 <= shift < window``.
        pad_qkv: (3, h, d) or (3 * h * d,), what a padding token holds: the bias of the qkv projection. None for zeros.
        bias_index: how a token of a clipped window finds its bias: "prefix" (the released code: its full index cut to
            ``[:N, :N]``) or "geometric" (by coordinates in the clipped window).
        mask_value: added to the scores of pairs that the shift put side by side without their being neighbours. The
            released code adds -100, so with scores further apart than that a masked key still counts; -inf excludes it.
        wrap: axes that are cyclic (longitude, say): a shift does not separate their two ends. One bool or three.
        scale: factor of q k^T; d**-0.5 when None.
        dropout_p: probability of dropping an attention weight, ``0 <= dropout_p < 1``; active whenever above 0.
        backend: backend of this call, strict; None for the one in force.

    Returns:
        (B, D, H, W, h * d), contiguous, in q's dtype and the input's token order.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a shape, size, device or option does not fit, or the named backend cannot run the call.

    Reference:
        Video Swin Transformer, arXiv 2106.13230, sections 3.2 (shifted windows) and 3.3 (relative position bias).

    Example:
        >>> import torch, vidattn
        >>> x = torch.randn(1, 8, 14, 14, 96)
        >>> projection = torch.nn.Linear(96, 3 * 96)
        >>> qkv = projection(x).unflatten(-1, (3, 3, 32))
        >>> table = torch.zeros(15 * 13 * 13, 3, requires_grad=True)
        >>> context = vidattn.window3d_attention(
        ...     qkv, table, window_size=(8, 7, 7), shift_size=(4, 3, 3), pad_qkv=projection.bias
        ... )
        >>> context.shape
        torch.Size([1, 8, 14, 14, 96])
    """
    inputs, options = _arguments(
        qkv,
        bias_table,
        window_size=window_size,
        shift_size=shift_size,
        pad_qkv=pad_qkv,
        bias_index=bias_index,
        mask_value=mask_value,
        wrap=wrap,
        scale=scale,
        dropout_p=dropout_p,
    )
    chosen = choose_backend(describe_call("window3d_attention", inputs.q), backend)
    seed = arguments.draw_seed(inputs.q, options.dropout_p)
    return call_op("window3d_attention", *inputs, seed, *options, chosen)[0]


# ---- Arguments: validated, with autocast applied, in the order of the schema ----


class _Inputs(NamedTuple):
    q: Tensor  # the packed qkv when k and v are None
    k: Tensor | None
    v: Tensor | None
    bias_table: Tensor | None
    pad_qkv: Tensor | None


class _Options(NamedTuple):
    window_size: Sequence[int]
    shift_size: Sequence[int]
    wrap: Sequence[bool]
    bias_index: str
    mask_value: float
    scale: float
    dropout_p: float


def _arguments(
    qkv: Tensor | tuple[Tensor, Tensor, Tensor],
    bias_table: Tensor | None = None,
    *,
    window_size: int | Sequence[int],
    shift_size: int | Sequence[int] = (0, 0, 0),
    pad_qkv: Tensor | None = None,
    bias_index: str = "prefix",
    mask_value: float = -100.0,
    wrap: bool | Sequence[bool] = (False, False, False),
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> tuple[_Inputs, _Options]:
    name = "window3d_attention"
    q, k, v = arguments.split_qkv(name, qkv, "(B, D, H, W, 3, h, d)", "(B, D, H, W, h, d)")
    window, shift = geo.window_sizes(name, window_size, shift_size)
    heads, head_dim = q.shape[-2:]
    if bias_table is not None:
        rows = geo.num_bias_rows(window)
        arguments.check_companion(name, "bias_table", bias_table, q, (rows, heads), "((2Wd-1)(2Wh-1)(2Ww-1), h)")
    if pad_qkv is not None:
        arguments.check_dense(name, "pad_qkv", pad_qkv)
        if isinstance(pad_qkv, Tensor) and pad_qkv.dim() == 1 and pad_qkv.shape[0] == 3 * heads * head_dim:
            pad_qkv = pad_qkv.reshape(3, heads, head_dim)
        arguments.check_companion(name, "pad_qkv", pad_qkv, q, (3, heads, head_dim), "(3, h, d)")
        pad_qkv = pad_qkv.to(q.dtype)  # rounded as the projection would have rounded it
    arguments.check_choice(name, "bias_index", bias_index, geo.BIAS_INDEX_MODES)
    axes = (wrap,) * 3 if isinstance(wrap, bool) else wrap
    if not isinstance(axes, (tuple, list)) or len(axes) != 3 or not all(isinstance(axis, bool) for axis in axes):
        raise TypeError(f"{name}: wrap: expected a bool or three, got {describe(wrap)}")
    return _Inputs(q, k, v, bias_table, pad_qkv), _Options(
        window,
        shift,
        axes,
        bias_index,
        arguments.finite_number(name, "mask_value", mask_value, minus_infinity=True),
        arguments.check_scale(name, scale, head_dim),
        arguments.check_dropout(name, dropout_p),
    )


# ---- Schemas ----

_OPTIONS = (
    "int[] window_size, int[] shift_size, bool[] wrap, str bias_index, float mask_value, float scale, float dropout_p"
)
_INPUTS = "Tensor q, Tensor? k, Tensor? v, Tensor? bias_table, Tensor? pad_qkv, Tensor? seed"
LIBRARY.define(f"window3d_attention({_INPUTS}, {_OPTIONS}, str backend) -> (Tensor out, Tensor lse)", tags=TAGS)
# Without k and v, grad_q is the gradient of the packed qkv. Gradients that were not asked for are undefined tensors.
# out and lse are there if the backward pass needs them.
LIBRARY.define(
    f"window3d_attention_backward(Tensor grad_out, {_INPUTS}, Tensor? out, Tensor? lse, {_OPTIONS},"
    " bool needs_bias, bool needs_pad, str backend)"
    " -> (Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_bias, Tensor grad_pad)",
    tags=TAGS,
)
# Implemented by the extension per device. bias_window is [] for a dense bias (h, N, N), else the configured window and
# the extents that unravel a token number. window and shift are effective; wrap has 1 on cyclic axes.
NATIVE_FORWARD = "_window3d_attention_forward"
_NATIVE_INPUTS = "Tensor? bias, int[] bias_window, Tensor? mask, Tensor? pad_qkv, Tensor? seed"
_NATIVE_OPTIONS = "int[] window, int[] shift, int[] wrap, float scale, float mask_value, float dropout_p"
LIBRARY.define(
    f"{NATIVE_FORWARD}(Tensor q, Tensor k, Tensor v, {_NATIVE_INPUTS}, {_NATIVE_OPTIONS},"
    " Tensor(a!) out, Tensor(b!) lse) -> ()"
)
LIBRARY.define(
    f"_window3d_attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, {_NATIVE_INPUTS}, Tensor? out,"
    f" Tensor? lse, {_NATIVE_OPTIONS}, Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv, Tensor(d!)? dbias,"
    " Tensor(e!)? dpad) -> ()"
)


# ---- Implementations ----


def launch_functions(backend: str) -> tuple[Callable[..., None], Callable[..., None]]:
    """Give the forward and backward pass of a backend, both with the arguments of the native ops.

    Args:
        backend: "cpu", "cuda" or "triton".

    Returns:
        Two functions that write into the tensors they are given last.
    """
    if backend == "triton":
        from vidattn.kernels import window3d  # Triton is imported on first use, if ever

        return window3d.forward, window3d.backward
    return torch.ops.vidattn._window3d_attention_forward, torch.ops.vidattn._window3d_attention_backward


def _forward(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    bias_table: Tensor | None,
    pad_qkv: Tensor | None,
    seed: Tensor | None,
    window_size: Sequence[int],
    shift_size: Sequence[int],
    wrap: Sequence[bool],
    bias_index: str,
    mask_value: float,
    scale: float,
    dropout_p: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    qkv = tensors.separate(q, k, v)
    out, lse = tensors.new_outputs(qkv[0])
    if out.numel() == 0:
        return out, lse
    if backend == "reference":
        return reference.window3d_attention(  # type: ignore[return-value]
            qkv,
            bias_table,
            window_size=window_size,
            shift_size=shift_size,
            pad_qkv=pad_qkv,
            bias_index=bias_index,
            mask_value=mask_value,
            wrap=wrap,
            scale=scale,
            dropout_p=dropout_p,
            seed=seed,
            return_lse=True,
        )
    windows = geo.resolve_windows(out.shape[1:4], window_size, shift_size, wrap)
    launch_forward, _ = launch_functions(backend)
    launch_forward(
        *qkv,
        tensors.accumulated(bias_table, q, backend),
        _bias_window(bias_table, window_size, windows, bias_index),
        None,
        None if pad_qkv is None else pad_qkv.contiguous(),
        seed,
        windows.window,
        windows.shift,
        wrap,
        scale,
        mask_value,
        dropout_p,
        out,
        lse,
    )
    return out, lse


def _backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    bias_table: Tensor | None,
    pad_qkv: Tensor | None,
    seed: Tensor | None,
    out: Tensor | None,
    lse: Tensor | None,
    window_size: Sequence[int],
    shift_size: Sequence[int],
    wrap: Sequence[bool],
    bias_index: str,
    mask_value: float,
    scale: float,
    dropout_p: float,
    needs_bias: bool,
    needs_pad: bool,
    backend: str,
) -> tuple[Tensor | None, ...]:
    qkv = tensors.separate(q, k, v)
    if backend == "reference" and grad_out.numel() > 0:
        *found, grad_bias, grad_pad = window3d_attention_backward(
            grad_out,
            qkv,
            bias_table,
            pad_qkv,
            window_size=window_size,
            shift_size=shift_size,
            bias_index=bias_index,
            mask_value=mask_value,
            wrap=wrap,
            scale=scale,
            dropout_p=dropout_p,
            seed=seed,
        )
        grads = tensors.pack(k, found)
    else:
        grads, views = tensors.new_gradients(q, k, v)
        grad_bias, grad_pad = tensors.new_sum(bias_table, q, needs_bias), tensors.new_sum(pad_qkv, q, needs_pad)
        if grad_out.numel() > 0:
            windows = geo.resolve_windows(q.shape[1:4], window_size, shift_size, wrap)
            _, launch_backward = launch_functions(backend)
            launch_backward(
                tensors.last_dim_dense(grad_out),
                *qkv,
                tensors.accumulated(bias_table, q, backend),
                _bias_window(bias_table, window_size, windows, bias_index),
                None,
                None if pad_qkv is None else pad_qkv.contiguous(),
                seed,
                out,
                lse,
                windows.window,
                windows.shift,
                wrap,
                scale,
                mask_value,
                dropout_p,
                *views,
                grad_bias,
                grad_pad,
            )
    return (*grads, tensors.as_input(grad_bias, bias_table, needs_bias), tensors.as_input(grad_pad, pad_qkv, needs_pad))


def _save(ctx: Any, inputs: Sequence[Tensor | None], output: Sequence[Tensor]) -> None:
    """Keep the op's tensors, and its outputs only where the backward pass may rebuild rows from a log-sum-exp."""
    window_size, backend = ctx.options[0], ctx.options[-1]
    kept = tensors.keeps_lse(math.prod(window_size), backend)  # no window is larger
    ctx.save_for_backward(*inputs, *(output if kept else (None, None)))
    ctx.mark_non_differentiable(output[-1])
    ctx.set_materialize_grads(False)


def _bias_window(
    table: Tensor | None, window_size: Sequence[int], windows: geo.WindowGeometry, bias_index: str
) -> list[int]:
    return [] if table is None else [*window_size, *geo.bias_extents(window_size, windows, bias_index)]


def _fake_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    bias_table: Tensor | None,
    pad_qkv: Tensor | None,
    *rest: Any,
) -> tuple[Tensor | None, ...]:
    *_, needs_bias, needs_pad, _ = rest
    grads, _ = tensors.new_gradients(q, k, v)
    return (*grads, tensors.fake_sum(bias_table, needs_bias), tensors.fake_sum(pad_qkv, needs_pad))


def _flops(shapes: Sequence[Any], options: Sequence[Any]) -> int:
    """Count q k^T and P v on the padded windows, a multiplication and an addition each."""
    q_shape, window_size = shapes[0], options[0]
    if math.prod(q_shape) == 0:
        return 0
    heads, head_dim = q_shape[-2:]
    windows = geo.resolve_windows(q_shape[1:4], window_size)
    return 4 * q_shape[0] * windows.num_windows * heads * windows.num_tokens**2 * head_dim


register_function("window3d_attention", arguments=_arguments, native=NATIVE_FORWARD)
register_attention(
    "window3d_attention",
    forward=_forward,
    backward=_backward,
    fake=tensors.fake_outputs,
    fake_backward=_fake_backward,
    flops=_flops,
    num_tensors=6,
    save=_save,
)

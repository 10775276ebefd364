"""3D window attention on a token grid: ``window3d_attention``, its op, gradient and cost.

From a call to its kernel: :func:`window3d_attention` validates, applies autocast and picks the backend;
``torch.ops.vidattn.window3d_attention`` is opaque to autograd and compilers and routes by the backend's name to
``reference/window3d.py``, to ``kernels/window3d.py`` or to the native op that the extension registers for the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from vidattn import geometry as geo
from vidattn import reference
from vidattn.calls import WindowCall
from vidattn.messages import describe
from vidattn.ops import _arguments as arguments
from vidattn.ops import _tensors as tensors
from vidattn.ops._library import (
    CUDA_WINDOW,
    LIBRARY,
    TAGS,
    call_attention,
    native_pass,
    register_attention,
    register_function,
)
from vidattn.reference.window3d import window3d_attention_backward
from vidattn.tracing import traced_for_one_size

__all__ = ["window3d_attention"]

NAME = "window3d_attention"


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
    inputs = Inputs(*arguments.split_qkv(NAME, qkv, "(B, D, H, W, 3, h, d)", "(B, D, H, W, h, d)"), bias_table, pad_qkv)
    options = Options(window_size, shift_size, wrap, bias_index, mask_value, scale, dropout_p)  # type: ignore[arg-type]
    inputs, options = _validated(inputs, options)
    _, depth, height, width, *_ = inputs.q.shape
    window = options.window_size
    group_tokens = min(window[0], depth) * min(window[1], height) * min(window[2], width)
    return call_attention(NAME, NAME, inputs, options, backend, group_tokens, "table")[0]


# ---- What the op takes, in the order of its schema ----


class Inputs(NamedTuple):
    q: Tensor  # the packed qkv when k and v are None
    k: Tensor | None
    v: Tensor | None
    bias_table: Tensor | None
    pad_qkv: Tensor | None
    seed: Tensor | None = None


class Options(NamedTuple):
    window_size: Sequence[int]
    shift_size: Sequence[int]
    wrap: Sequence[bool]
    bias_index: str
    mask_value: float
    scale: float
    dropout_p: float


def _validated(inputs: Inputs, options: Options) -> tuple[Inputs, Options]:
    q, k, v, bias_table, pad_qkv, _ = inputs
    heads, head_dim = q.shape[-2:]
    window, shift = geo.window_sizes(NAME, options.window_size, options.shift_size)
    if bias_table is not None:
        rows = geo.num_bias_rows(window)
        arguments.check_companion(NAME, "bias_table", bias_table, q, (rows, heads), "((2Wd-1)(2Wh-1)(2Ww-1), h)")
    if pad_qkv is not None:
        arguments.check_dense(NAME, "pad_qkv", pad_qkv)
        if isinstance(pad_qkv, Tensor) and pad_qkv.dim() == 1 and pad_qkv.shape[0] == 3 * heads * head_dim:
            pad_qkv = pad_qkv.reshape(3, heads, head_dim)
        arguments.check_companion(NAME, "pad_qkv", pad_qkv, q, (3, heads, head_dim), "(3, h, d)")
        pad_qkv = pad_qkv.to(q.dtype)  # rounded as the projection would have rounded it
    arguments.check_choice(NAME, "bias_index", options.bias_index, geo.BIAS_INDEX_MODES)
    wrap: Any = options.wrap
    wrap = (wrap,) * 3 if isinstance(wrap, bool) else wrap
    if not isinstance(wrap, (tuple, list)) or len(wrap) != 3 or not all(isinstance(axis, bool) for axis in wrap):
        raise TypeError(f"{NAME}: wrap: expected a bool or three, got {describe(options.wrap)}")
    return Inputs(q, k, v, bias_table, pad_qkv), Options(
        window,
        shift,
        wrap,
        options.bias_index,
        arguments.finite_number(NAME, "mask_value", options.mask_value, minus_infinity=True),
        arguments.check_scale(NAME, options.scale, head_dim),
        arguments.check_dropout(NAME, options.dropout_p),
    )


# ---- Schemas ----

_OPTIONS = (
    "int[] window_size, int[] shift_size, bool[] wrap, str bias_index, float mask_value, float scale, float dropout_p"
)
_INPUTS = "Tensor q, Tensor? k, Tensor? v, Tensor? bias_table, Tensor? pad_qkv, Tensor? seed"
LIBRARY.define(f"{NAME}({_INPUTS}, {_OPTIONS}, str backend) -> (Tensor out, Tensor lse)", tags=TAGS)
# Without k and v, grad_q is the gradient of the packed qkv. Gradients that were not asked for are undefined tensors.
# out and lse are there if the backward pass needs them.
LIBRARY.define(
    f"{NAME}_backward(Tensor grad_out, {_INPUTS}, Tensor? out, Tensor? lse, {_OPTIONS},"
    " bool needs_bias, bool needs_pad, str backend)"
    " -> (Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_bias, Tensor grad_pad)",
    tags=TAGS,
)
# Implemented by the extension per device, with the fields of a WindowCall first.
NATIVE_FORWARD = "_window3d_attention_forward"
_CALL = (
    "Tensor q, Tensor k, Tensor v, Tensor? bias, int[] bias_window, Tensor? mask, Tensor? pad_qkv, Tensor? seed,"
    " int[] window, int[] shift, int[] wrap, float scale, float mask_value, float dropout_p"
)
LIBRARY.define(f"{NATIVE_FORWARD}({_CALL}, Tensor(a!) out, Tensor(b!) lse) -> ()")
LIBRARY.define(
    f"_window3d_attention_backward({_CALL}, Tensor dout, Tensor? out, Tensor? lse,"
    " Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv, Tensor(d!)? dbias, Tensor(e!)? dpad) -> ()"
)

_NATIVE = native_pass(NATIVE_FORWARD), native_pass("_window3d_attention_backward")


# ---- Implementations ----


def launch_functions(backend: str) -> tuple[Callable[..., None], Callable[..., None]]:
    """Give the passes of a backend: (call, out, lse) and (call, dout, out, lse, dq, dk, dv, dbias, dpad).

    Args:
        backend: "cpu", "cuda" or "triton".

    Returns:
        The forward and the backward pass, which write into the tensors that they are given last.
    """
    if backend == "triton":
        from vidattn.kernels import window3d  # Triton is imported on first use, if ever

        return window3d.forward, window3d.backward
    return _NATIVE


def _call(inputs: Inputs, options: Options, backend: str) -> WindowCall:
    q, k, v = tensors.separate(inputs)
    windows = geo.resolve_windows(q.shape[1:4], options.window_size, options.shift_size, options.wrap)
    bias_window = []
    if inputs.bias_table is not None:
        bias_window = [
            *options.window_size,
            *geo.bias_extents(options.window_size, windows, options.bias_index),
        ]
    bias = tensors.accumulated(inputs.bias_table, q, backend)
    if bias is not None and backend == "cuda":
        bias = bias.t().contiguous().t()  # each block reads the table of one head
    return WindowCall(
        q,
        k,
        v,
        bias=bias,
        bias_window=bias_window,
        mask=None,
        pad_qkv=None if inputs.pad_qkv is None else inputs.pad_qkv.contiguous(),
        seed=inputs.seed,
        window=windows.window,
        shift=windows.shift,
        wrap=options.wrap,
        scale=options.scale,
        mask_value=options.mask_value,
        dropout_p=options.dropout_p,
    )


def _forward(inputs: Inputs, options: Options, backend: str) -> tuple[Tensor, Tensor]:
    if backend == "reference" and inputs.q.numel() > 0:
        qkv = tensors.separate(inputs)
        given = {"pad_qkv": inputs.pad_qkv, "seed": inputs.seed, **options._asdict()}
        return reference.window3d_attention(qkv, inputs.bias_table, **given, return_lse=True)  # type: ignore[return-value]
    out, lse = tensors.new_outputs(inputs)
    if out.numel() > 0:
        launch, _ = launch_functions(backend)
        launch(_call(inputs, options, backend), out, lse)
    return out, lse


def _backward(
    grads: Sequence[Tensor],
    inputs: Inputs,
    outputs: Sequence[Tensor | None],
    options: Options,
    needs: Sequence[bool],
    backend: str,
) -> tuple[Tensor | None, ...]:
    dout, companions = grads[0], (inputs.bias_table, inputs.pad_qkv)
    if backend == "reference" and dout.numel() > 0:
        *found, dbias, dpad = window3d_attention_backward(
            dout, tensors.separate(inputs), *companions, seed=inputs.seed, **options._asdict()
        )
        dqkv = tensors.pack(inputs, found)
    else:
        dqkv, views = tensors.new_gradients(inputs)
        dbias, dpad = (tensors.new_sum(x, inputs, needed) for x, needed in zip(companions, needs, strict=True))
        if dout.numel() > 0:
            _, launch = launch_functions(backend)
            launch(_call(inputs, options, backend), tensors.last_dim_dense(dout), *outputs, *views, dbias, dpad)
    return (*dqkv, *map(tensors.as_input, (dbias, dpad), companions, needs))


def _save(ctx: Any, inputs: Inputs, output: Sequence[Tensor], options: Options, backend: str) -> None:
    """Keep the op's tensors, and its outputs only where the backward pass may rebuild rows from a log-sum-exp."""
    kept = tensors.keeps_lse(math.prod(options.window_size), backend)  # no window is larger
    ctx.save_for_backward(*inputs, *(output if kept else (None, None)))
    ctx.mark_non_differentiable(output[-1])
    ctx.set_materialize_grads(False)


def _flops(shape: Sequence[int], options: Options) -> int:
    """Count q k^T and P v on the padded windows, a multiplication and an addition each."""
    batch, *grid = shape[:4]
    heads, head_dim = shape[-2:]
    if 0 in shape:
        return 0
    windows = geo.resolve_windows(grid, options.window_size)
    return 4 * batch * windows.num_windows * heads * windows.num_tokens**2 * head_dim


register_function(window3d_attention, native=NATIVE_FORWARD, cuda_tokens=CUDA_WINDOW)
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

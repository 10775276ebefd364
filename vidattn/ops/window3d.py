"""3D window attention on a token grid: ``window3d_attention``, its op, gradient and cost.

From a call to its kernel: ``window3d_attention`` validates, applies autocast and picks the backend;
``torch.ops.vidattn.window3d_attention`` is opaque to autograd and compilers and routes by the backend's name to
``reference/window3d.py``, to ``kernels/window3d.py`` or to the native op that the extension registers for the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
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
from vidattn.reference.window3d import dense_bias, table_gradient, window3d_attention_backward
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
    bias_index: str | Tensor = "prefix",
    mask_value: float = -100.0,
    wrap: bool | Sequence[bool] = (False, False, False),
    window_types: Tensor | None = None,
    clip_window: bool = True,
    padding: Sequence[Sequence[int]] | None = None,
    padding_order: str = "before_shift",
    regions: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """Attend inside the (shifted) 3D windows of a token grid, without rolling, padding or partitioning it.

    Windows are clipped to the grid, lose their shift and are padded per axis as in the papers' code;
    [`vidattn.explain_windows`][] prints what comes out. Padding tokens are keys like any other. Gradients flow to
    ``qkv``, ``bias_table`` and ``pad_qkv``, each in its own dtype. Scores, softmax and sums are float32 (float64 for
    float64) whatever the dtype of q. Under autocast q, k, v and ``pad_qkv`` are cast, the table is not.

    Args:
        qkv: (B, D, H, W, 3, h, d), a view of the projection's output on the unpadded, unshifted grid, with any strides
            (a strided last dimension is copied once, for triton also a grid that one stride does not count through);
            or a tuple (q, k, v) of (B, D, H, W, h, d). float32, bfloat16, float16 or float64. A non-finite value stays
            within its window and head, where it may reach every token.
        bias_table: relative position bias ((2Wd-1)(2Wh-1)(2Ww-1), h) of the configured window, any floating dtype. With
            rows given by ``bias_index``, (L, h) with any L; with ``window_types`` there are more: (types, ..., h).
        window_size: configured window in tokens, one int or (depth, height, width).
        shift_size: configured shift in tokens, one int or three, ``0 <= shift < window``.
        pad_qkv: (3, h, d) or (3 * h * d,), what a padding token holds: the bias of the qkv projection. None for zeros.
        bias_index: how a pair of tokens finds its row of the table: "prefix" (the released code: where the window is
            clipped, its full index cut to ``[:N, :N]``), "geometric" (by coordinates in the clipped window), or the
            rows themselves, int32 or int64 (N, N) for the N tokens of a window, clipped if it is. Rows that the table
            does not have, and types too, raise on the CPU; on a GPU they end in a device-side assertion, as those of
            ``torch.gather`` do.
        mask_value: added to the scores of pairs that the shift put side by side without their being neighbours. The
            released code adds -100, so with scores further apart than that a masked key still counts; -inf excludes it.
        wrap: axes that are cyclic (longitude, say): a shift does not separate their two ends. One bool or three.
        window_types: int32 or int64 (nW,), for models whose windows do not all have one table: window w of a grid, in
            row-major order, reads ``bias_table[window_types[w]]``.
        clip_window: whether a window that is larger than the grid is clipped to it; if not, the grid is padded up to
            it, as in torchvision's 2D Swin. A single window on an axis has no shift in either case.
        padding: tokens (before, behind) each of the three axes, which fill whole windows; None for what is needed,
            behind. The window and the shift of an axis go by the padded grid. Reference and CPU only, if this is not
            what None gives.
        padding_order: "before_shift" or "after_shift" (Aurora): whether the shift rolls the padded grid or the padding
            goes around the shifted one. Reference and CPU only, if something is shifted.
        regions: int32 or int64 (D', H', W') on the shifted, padded grid: ``mask_value`` is added to pairs whose numbers
            differ, padding included, and to no others. None for the regions that the shift makes. Reference and CPU
            only.
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
    rows = bias_index if isinstance(bias_index, Tensor) else None
    inputs = Inputs(
        *arguments.split_qkv(NAME, qkv, "(B, D, H, W, 3, h, d)", "(B, D, H, W, h, d)"),
        bias_table,
        pad_qkv,
        rows,
        window_types,
        regions,
    )
    options = Options(
        window_size,  # type: ignore[arg-type]
        shift_size,  # type: ignore[arg-type]
        wrap,  # type: ignore[arg-type]
        bias_index if rows is None else "prefix",  # type: ignore[arg-type]
        mask_value,
        scale,  # type: ignore[arg-type]
        dropout_p,
        clip_window,
        padding,  # type: ignore[arg-type]
        padding_order,
    )
    inputs, options = _validated(inputs, options)
    if options.clip_window and not options.padding:
        _, depth, height, width, *_ = inputs.q.shape
        window = options.window_size
        group_tokens = min(window[0], depth) * min(window[1], height) * min(window[2], width)
    else:
        group_tokens = math.prod(_windows(inputs.q.shape[1:4], options).window)
    bias = "dense" if _has_dense_bias(inputs) else "table"
    found = _grid_options(inputs, options)
    return call_attention(NAME, NAME, inputs, options, backend, group_tokens, bias, grid_options=found)[0]


# ---- What the op takes, in the order of its schema ----


class Inputs(NamedTuple):
    q: Tensor  # the packed qkv when k and v are None
    k: Tensor | None
    v: Tensor | None
    bias_table: Tensor | None
    pad_qkv: Tensor | None
    bias_rows: Tensor | None = None  # bias_index, if it is a tensor
    window_types: Tensor | None = None
    regions: Tensor | None = None
    seed: Tensor | None = None


class Options(NamedTuple):
    window_size: Sequence[int]
    shift_size: Sequence[int]
    wrap: Sequence[bool]
    bias_index: str
    mask_value: float
    scale: float
    dropout_p: float
    clip_window: bool = True
    padding: Sequence[int] | None = None  # before and behind each axis; None for as needed
    padding_order: str = "before_shift"


def _validated(inputs: Inputs, options: Options) -> tuple[Inputs, Options]:
    q, k, v, bias_table, pad_qkv, bias_rows, window_types, regions, _ = inputs
    heads, head_dim = q.shape[-2:]
    window, shift = geo.window_sizes(NAME, options.window_size, options.shift_size)
    if bias_table is not None:
        rows = geo.num_bias_rows(window)
        if bias_rows is None and window_types is None:
            arguments.check_companion(NAME, "bias_table", bias_table, q, (rows, heads), "((2Wd-1)(2Wh-1)(2Ww-1), h)")
        else:
            _check_special_table(inputs, rows)
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
    if not isinstance(options.clip_window, bool):
        raise TypeError(f"{NAME}: clip_window: expected a bool, got {describe(options.clip_window)}")
    options = Options(
        window,
        shift,
        wrap,
        options.bias_index,
        arguments.finite_number(NAME, "mask_value", options.mask_value, minus_infinity=True),
        arguments.check_scale(NAME, options.scale, head_dim),
        arguments.check_dropout(NAME, options.dropout_p),
        options.clip_window,
        None if options.padding is None else _flat_padding(options.padding),
        options.padding_order,
    )
    if options.padding or options.padding_order != "before_shift":
        options = _without_idle_padding(options, q.shape[1:4])
    if bias_rows is not None or window_types is not None or regions is not None:
        _check_by_window(inputs, options)
    return Inputs(q, k, v, bias_table, pad_qkv, bias_rows, window_types, regions), options


_PADDING_ORDERS = ("before_shift", "after_shift")


def _check_special_table(inputs: Inputs, rows: int) -> None:
    """Check a bias table of any length, or one a type."""
    q, table, types = inputs.q, inputs.bias_table, inputs.window_types
    heads = q.shape[-2]
    layout = "(L, h)" if inputs.bias_rows is not None else "((2Wd-1)(2Wh-1)(2Ww-1), h)"
    layout = layout if types is None else f"(types, {layout[1:]}"
    shape = [rows, heads] if types is None else [1, rows, heads]
    if isinstance(table, Tensor) and table.dim() == len(shape):  # what is free takes any size
        if types is not None:
            shape[0] = max(1, table.shape[0])
        if inputs.bias_rows is not None:
            shape[-2] = max(1, table.shape[-2])
    arguments.check_companion(NAME, "bias_table", table, q, shape, layout)  # type: ignore[arg-type]


def _without_idle_padding(options: Options, grid: Sequence[int]) -> Options:
    """Check the order, and that padding fills windows; drop what changes nothing: all backends run the call then."""
    arguments.check_choice(NAME, "padding_order", options.padding_order, _PADDING_ORDERS)
    if 0 in grid:
        return options._replace(padding=None, padding_order="before_shift")
    windows = _windows(grid, options)
    if options.padding:
        pairs = zip(options.padding[::2], options.padding[1::2], strict=True)
        whole = tuple(before + size + behind for size, (before, behind) in zip(grid, pairs, strict=True))
        if whole != windows.padded:
            raise ValueError(
                f"{NAME}: padding: expected whole windows {windows.window} on the padded grid, got one of {whole}"
            )
    if not windows.shift_first:
        if options.padding_order == "after_shift":  # which moved nothing: a roll by all of an axis
            options = options._replace(padding_order="before_shift", shift_size=(0, 0, 0))
        if windows == _windows(grid, options._replace(padding=None)):
            options = options._replace(padding=None)
    return options


def _flat_padding(given: Any) -> Sequence[int]:
    """Return the padding before and behind each axis."""
    pairs = given if isinstance(given, (tuple, list)) else ()
    if len(pairs) != 3 or not all(isinstance(pair, (tuple, list)) and len(pair) == 2 for pair in pairs):
        raise TypeError(
            f"{NAME}: padding: expected three pairs of ints (before, behind) or None, got {describe(given)}"
        )
    flat = [arguments.integer(NAME, "padding", tokens) for pair in pairs for tokens in pair]
    if min(flat) < 0:
        raise ValueError(f"{NAME}: padding: expected numbers of at least 0, got {describe(given)}")
    return flat


def _check_by_window(inputs: Inputs, options: Options) -> None:
    """Check the tensors whose shapes follow from the windows."""
    q, grid = inputs.q, inputs.q.shape[1:4]
    for name, value in (("bias_index", inputs.bias_rows), ("window_types", inputs.window_types)):
        if value is not None and inputs.bias_table is None:
            raise ValueError(f"{NAME}: {name}: expected a bias_table beside it, got None")
    windows = None if 0 in grid else _windows(grid, options)
    for name, value, layout in (
        ("bias_index", inputs.bias_rows, "(N, N)"),
        ("window_types", inputs.window_types, "(nW,)"),
        ("regions", inputs.regions, "(D', H', W')"),
    ):
        if value is None:
            continue
        shape: Sequence[int]
        if windows is None or not isinstance(value, Tensor):  # a grid without tokens has no windows
            shape = getattr(value, "shape", ())
        elif name == "bias_index":
            shape = (windows.num_tokens, windows.num_tokens)
        else:
            shape = (windows.num_windows,) if name == "window_types" else windows.padded
        arguments.check_numbers(NAME, name, value, q, shape, layout)


def _has_dense_bias(inputs: Inputs) -> bool:
    """Whether the table is expanded before the kernels see it."""
    return inputs.bias_rows is not None or inputs.window_types is not None


def _grid_options(inputs: Inputs, options: Options) -> tuple[str, ...]:
    """Name the options that kernels for GPUs do not have."""
    if not options.padding and inputs.regions is None and options.padding_order == "before_shift":
        return ()
    used = {
        "padding": bool(options.padding),
        "padding_order": options.padding_order == "after_shift",
        "regions": inputs.regions is not None,
    }
    return tuple(name for name, given in used.items() if given)


def _pairs(padding: Sequence[int] | None) -> list[Sequence[int]] | None:
    return [padding[axis : axis + 2] for axis in (0, 2, 4)] if padding else None


def _windows(grid: Sequence[int], options: Options) -> geo.WindowGeometry:
    return geo.resolve_windows(
        grid,
        options.window_size,
        options.shift_size,
        options.wrap,
        clip=options.clip_window,
        padding=_pairs(options.padding),
        shift_first=options.padding_order == "after_shift",
    )


# ---- Schemas ----

_OPTIONS = (
    "int[] window_size, int[] shift_size, bool[] wrap, str bias_index, float mask_value, float scale, float dropout_p,"
    " bool clip_window, int[]? padding, str padding_order"
)
_INPUTS = (
    "Tensor q, Tensor? k, Tensor? v, Tensor? bias_table, Tensor? pad_qkv, Tensor? bias_rows, Tensor? window_types,"
    " Tensor? regions, Tensor? seed"
)
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
    "Tensor q, Tensor? k, Tensor? v, Tensor? bias, int[] bias_window, Tensor? mask, Tensor? pad_qkv, Tensor? seed,"
    " int[] window, int[] shift, int[] wrap, float scale, float mask_value, float dropout_p,"
    " Tensor? window_types, Tensor? regions, int[] padding, bool shift_first"
)
LIBRARY.define(f"{NATIVE_FORWARD}({_CALL}, Tensor(a!) out, Tensor(b!) lse) -> ()")
LIBRARY.define(
    f"_window3d_attention_backward({_CALL}, Tensor dout, Tensor? out, Tensor? lse,"
    " Tensor(a!) dq, Tensor(b!)? dk, Tensor(c!)? dv, Tensor(d!)? dbias, Tensor(e!)? dpad) -> ()"
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
    q, k, v = tensors.for_kernels(inputs, backend)
    windows, bias_window = _known_windows(
        tuple(q.shape[1:4]),
        tuple(options.window_size),
        tuple(options.shift_size),
        tuple(options.wrap),
        options.bias_index,
        options.clip_window,
        tuple(options.padding) if options.padding else None,
        options.padding_order,
    )
    bias = tensors.accumulated(inputs.bias_table, q, backend)
    if bias is None:
        bias_window = ()
    elif _has_dense_bias(inputs):
        bias, bias_window = dense_bias(bias, _rows(inputs, options)), ()
    elif backend == "cuda":
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
        window_types=None
        if inputs.window_types is None
        else tensors.types_below(inputs.window_types, inputs.bias_table),
        regions=None if inputs.regions is None else inputs.regions.long().contiguous(),
        padding=options.padding or (),
        shift_first=windows.shift_first,
    )


@lru_cache(512)
def _known_windows(
    grid: tuple[int, ...],
    window_size: tuple[int, ...],
    shift_size: tuple[int, ...],
    wrap: tuple[bool, ...],
    bias_index: str,
    *others: Any,
) -> tuple[geo.WindowGeometry, tuple[int, ...]]:
    """Give the windows of a grid, and the window of a bias table and how tokens unravel in it, kept by sizes."""
    windows = _windows(grid, Options(window_size, shift_size, wrap, bias_index, 0.0, 0.0, 0.0, *others))
    return windows, (*window_size, *geo.bias_extents(window_size, windows, bias_index))


def _rows(inputs: Inputs, options: Options) -> Tensor:
    """Give the row of the table that each pair reads."""
    if inputs.bias_rows is not None:
        return inputs.bias_rows
    windows = _windows(inputs.q.shape[1:4], options)
    return geo.bias_rows(options.window_size, windows, options.bias_index, inputs.q.device)


def _for_reference(inputs: Inputs, options: Options) -> dict[str, Any]:
    return options._asdict() | {
        "bias_index": options.bias_index if inputs.bias_rows is None else inputs.bias_rows,
        "window_types": inputs.window_types,
        "padding": _pairs(options.padding),
        "regions": inputs.regions,
        "seed": inputs.seed,
    }


def _forward(inputs: Inputs, options: Options, backend: str) -> tuple[Tensor, Tensor]:
    table = inputs.bias_table
    if table is not None and inputs.bias_rows is not None:
        arguments.check_range(NAME, "bias_index", inputs.bias_rows, table.shape[-2])
    if table is not None and inputs.window_types is not None:
        arguments.check_range(NAME, "window_types", inputs.window_types, table.shape[0])
    if backend == "reference" and inputs.q.numel() > 0:
        given = {"pad_qkv": inputs.pad_qkv, **_for_reference(inputs, options)}
        return reference.window3d_attention(tensors.separate(inputs), table, **given, return_lse=True)  # type: ignore[return-value]
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
            dout, tensors.separate(inputs), *companions, **_for_reference(inputs, options)
        )
        dqkv = tensors.pack(inputs, found)
    else:
        dqkv = tensors.new_gradients(inputs)
        dbias, dpad = (tensors.new_sum(x, inputs, needed) for x, needed in zip(companions, needs, strict=True))
        if dout.numel() > 0:
            _, launch = launch_functions(backend)
            call = _call(inputs, options, backend)
            expanded = dbias is not None and _has_dense_bias(inputs)
            into = tensors.new_sum(call.bias, inputs, True) if expanded else dbias
            views = tensors.gradients_for_kernels(dqkv, backend)
            launch(call, tensors.last_dim_dense(dout), *outputs, *views, into, dpad)
            if expanded:
                dbias = table_gradient(into, _rows(inputs, options), dbias.shape)  # type: ignore[arg-type, union-attr]
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
    windows = _windows(grid, options)
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

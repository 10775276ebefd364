"""Space-time mixing attention and temporal shift: public functions, ops, gradients and cost.

From a call to its kernel: the public function validates, applies autocast and picks the backend; the op of the same
name in ``torch.ops.vidattn`` is opaque to autograd and compilers and routes by the backend's name to
``reference/mixing.py``, to ``kernels/mixing.py`` or to the native op that the extension registers for the device.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vidattn.backends import choose_backend
from vidattn.calls import MixingCall
from vidattn.messages import describe
from vidattn.ops import _arguments as arguments
from vidattn.ops import _tensors as tensors
from vidattn.ops._library import (
    CUDA_SEQUENCE,
    LIBRARY,
    TAGS,
    call_attention,
    describe_call,
    native_pass,
    register_attention,
    register_function,
)
from vidattn.ops._transforms import call_op, register_transforms
from vidattn.reference import mixing as reference
from vidattn.reference.attention import accumulator_dtype
from vidattn.tracing import traced_for_one_size

__all__ = ["space_time_mixing_attention", "temporal_shift"]

NAME = "space_time_mixing_attention"


@traced_for_one_size
def space_time_mixing_attention(
    qkv: Tensor | tuple[Tensor, Tensor, Tensor],
    num_frames: int,
    *,
    shift_div: int = 8,
    channel_shifts: Sequence[Sequence[int]] | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """Attend inside each frame to keys and values of which channels come from neighbouring frames.

    The channels are taken from where they lie while keys and values are loaded: nothing is shifted in memory. Beyond
    the first and the last frame of a segment they are exact zeros, bias included. Queries are never shifted. The
    gradient comes back in the layout of ``qkv``. Scores, softmax and sums are float32 (float64 for float64) whatever
    the dtype of q. Under autocast q, k and v are cast.

    Args:
        qkv: (B * T, N, 3, h, d), a view of the projection's output, with any strides (a strided last dimension is
            copied once); or a tuple (q, k, v) of (B * T, N, h, d). float32, bfloat16, float16 or float64. All N tokens
            take part, a cls token too.
        num_frames: frames T of a segment, across whose ends nothing is mixed: those of the clip, or a divisor of them.
        shift_div: X-ViT's amount of mixing: C // shift_div of the C = h * d channels come from the next frame, as many
            after them from the frame before. 8 in its Kinetics models, 4 in those of Something-Something.
        channel_shifts: (first, last, frame offset) of the ranges of concatenated channels that come from other frames,
            in place of ``shift_div``'s: channels first to last - 1 of frame t are those of frame t + offset.
        scale: factor of q k^T; d**-0.5 when None.
        dropout_p: probability of dropping an attention weight, ``0 <= dropout_p < 1``; active whenever above 0.
        backend: backend of this call, strict; None for the one in force.

    Returns:
        (B * T, N, h * d), contiguous, in q's dtype.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a shape, size, device or option does not fit, or the named backend cannot run the call.

    Reference:
        Space-time Mixing Attention for Video Transformer, arXiv 2106.05968, section 3.3, equations 9 and 10, with the
        channels cut as in the released code.

    Example:
        >>> import torch, vidattn
        >>> x = torch.randn(2 * 8, 197, 96)  # two clips of eight frames
        >>> qkv = torch.nn.Linear(96, 3 * 96)(x).unflatten(-1, (3, 3, 32))
        >>> vidattn.space_time_mixing_attention(qkv, 8, shift_div=4).shape
        torch.Size([16, 197, 96])
    """
    inputs = Inputs(*arguments.split_qkv(NAME, qkv, "(B * T, N, 3, h, d)", "(B * T, N, h, d)"))
    heads, head_dim = inputs.q.shape[-2:]
    if channel_shifts is None:
        divisor = arguments.integer(NAME, "shift_div", shift_div)
        if divisor < 1:
            raise ValueError(f"{NAME}: shift_div: expected at least 1, got {divisor}")
        channel_shifts = reference.xvit_channel_shifts(heads * head_dim, divisor)
    options = Options(
        _check_frames(NAME, "qkv", inputs.q, num_frames),
        _check_shifts(NAME, channel_shifts, heads * head_dim),
        arguments.check_scale(NAME, scale, head_dim),
        arguments.check_dropout(NAME, dropout_p),
    )
    ranges = len(options.channel_shifts) // 3
    return call_attention(NAME, NAME, inputs, options, backend, inputs.q.shape[1], channel_ranges=ranges)[0]


@traced_for_one_size
def temporal_shift(
    x: Tensor,
    num_frames: int,
    channel_shifts: Sequence[Sequence[int]],
    *,
    dim: int = -1,
    backend: str | None = None,
) -> Tensor:
    """Take ranges of channels from other frames, with zeros beyond the first and the last frame of a segment.

    Data movement alone, exact in any dtype. The gradient is the same shift with the offsets negated.

    Args:
        x: (B * T, ...), any dtype and strides; one dense in memory keeps its memory format.
        num_frames: frames T of a segment.
        channel_shifts: (first, last, frame offset) of the ranges of channels that come from other frames: channels
            first to last - 1 of frame t are those of frame t + offset. The ranges do not overlap.
        dim: dimension of the channels, not the first one.
        backend: backend of this call, strict; None for the one in force.

    Returns:
        A tensor of the shape and dtype of ``x``.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a shape, size or option does not fit, or the named backend cannot run the call.

    Reference:
        TSM: Temporal Shift Module for Efficient Video Understanding, arXiv 1811.08383, section 3.

    Example:
        >>> import torch, vidattn
        >>> x = torch.randn(2 * 8, 64, 7, 7)  # activations of a convolution, two clips of eight frames
        >>> vidattn.temporal_shift(x, 8, [(0, 8, 1), (8, 16, -1)], dim=1).shape
        torch.Size([16, 64, 7, 7])
    """
    name = "temporal_shift"
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: x: expected a tensor (B * T, ...), got {describe(x)}")
    arguments.check_dense(name, "x", x)
    if x.dim() < 2:
        raise ValueError(f"{name}: x: expected shape (B * T, ...) with a dimension of channels, got {tuple(x.shape)}")
    axis = arguments.integer(name, "dim", dim)
    if not -x.dim() < axis < x.dim() or axis == 0:
        raise ValueError(
            f"{name}: dim: expected a dimension from 1 to {x.dim() - 1} or {1 - x.dim()} to -1, got {axis}"
        )
    axis %= x.dim()
    frames = _check_frames(name, "x", x, num_frames)
    shifts = _check_shifts(name, channel_shifts, x.shape[axis])
    return call_op(name, x, frames, shifts, axis, choose_backend(describe_call(name, x), backend))


# ---- What the op of attention takes, in the order of its schema ----


class Inputs(NamedTuple):
    q: Tensor  # the packed qkv when k and v are None
    k: Tensor | None
    v: Tensor | None
    seed: Tensor | None = None


class Options(NamedTuple):
    num_frames: int
    channel_shifts: list[int]  # first, last and offset of each range, in ascending order, none of them empty or still
    scale: float
    dropout_p: float


def _check_frames(name: str, of: str, x: Tensor, num_frames: int) -> int:
    frames = arguments.integer(name, "num_frames", num_frames)
    if frames < 1:
        raise ValueError(f"{name}: num_frames: expected at least 1, got {frames}")
    if x.shape[0] % frames != 0:
        raise ValueError(f"{name}: {of}: expected B * num_frames = B * {frames} frames, got {x.shape[0]}")
    return frames


def _check_shifts(name: str, channel_shifts: Sequence[Sequence[int]], channels: int) -> list[int]:
    """Return the ranges that move something, in ascending order, flat."""
    expected = f"{name}: channel_shifts: expected ranges (first, last, frame offset)"
    if not isinstance(channel_shifts, (tuple, list)):
        raise TypeError(f"{expected}, got {describe(channel_shifts)}")
    ranges: list[tuple[int, int, int]] = []
    for entry in channel_shifts:
        if not isinstance(entry, (tuple, list)) or len(entry) != 3:
            raise TypeError(f"{expected}, got {describe(entry)}")
        first, last, offset = (arguments.integer(name, "channel_shifts", value) for value in entry)
        if not 0 <= first <= last <= channels:
            raise ValueError(f"{expected} with 0 <= first <= last <= {channels} channels, got {describe(tuple(entry))}")
        if abs(offset) >= 2**63:  # and so that its negative, which the gradient needs, is a number of 64 bits too
            raise ValueError(f"{expected} with an offset below 2**63 in size, got {describe(tuple(entry))}")
        if first < last:
            place = sum([before[0] < first for before in ranges])  # torch.compile cannot sort numbers it has not fixed
            # No clip has 2**40 frames, and a kernel can add this to one.
            ranges.insert(place, (first, last, max(-(2**40), min(offset, 2**40))))
    for before, after in itertools.pairwise(ranges):
        if before[1] > after[0]:
            raise ValueError(f"{expected} that do not overlap, got {before} and {after}")
    return [value for entry in ranges if entry[2] != 0 for value in entry]


def _triples(channel_shifts: Sequence[int]) -> list[tuple[int, int, int]]:
    return list(zip(channel_shifts[::3], channel_shifts[1::3], channel_shifts[2::3], strict=True))


# ---- Schemas ----

_INPUTS = "Tensor q, Tensor? k, Tensor? v, Tensor? seed"
_OPTIONS = "SymInt num_frames, int[] channel_shifts, float scale, float dropout_p"
# lse is empty where no backward needs it.
LIBRARY.define(f"{NAME}({_INPUTS}, {_OPTIONS}, str backend) -> (Tensor out, Tensor lse)", tags=TAGS)
# Without k and v, grad_q is the gradient of the packed qkv. out and lse are there if the forward pass kept an lse.
LIBRARY.define(
    f"{NAME}_backward(Tensor grad_out, {_INPUTS}, Tensor? out, Tensor? lse, {_OPTIONS}, str backend)"
    " -> (Tensor grad_q, Tensor grad_k, Tensor grad_v)",
    tags=TAGS,
)
LIBRARY.define(
    "temporal_shift(Tensor x, SymInt num_frames, int[] channel_shifts, int dim, str backend) -> Tensor", tags=TAGS
)
# Implemented by the extension per device, with the fields of a MixingCall first. out, dout: (B * T, N, h * d);
# lse: (B * T, N, h) in the accumulator's dtype.
NATIVE_FORWARD = "_space_time_mixing_attention_forward"
_CALL = (
    "Tensor q, Tensor? k, Tensor? v, Tensor? seed, int num_frames, int[] channel_shifts, float scale, float dropout_p"
)
LIBRARY.define(f"{NATIVE_FORWARD}({_CALL}, Tensor(a!) out, Tensor(b!)? lse) -> ()")
LIBRARY.define(
    f"_space_time_mixing_attention_backward({_CALL}, Tensor dout, Tensor? out, Tensor? lse,"
    " Tensor(a!) dq, Tensor(b!)? dk, Tensor(c!)? dv) -> ()"
)
# x, out: (frames, ...), contiguous, of any dtype, with the channels in dimension `dim`.
NATIVE_SHIFT = "_temporal_shift"
LIBRARY.define(f"{NATIVE_SHIFT}(Tensor x, int num_frames, int[] channel_shifts, int dim, Tensor(a!) out) -> ()")

_NATIVE = (
    native_pass(NATIVE_FORWARD),
    native_pass("_space_time_mixing_attention_backward"),
    getattr(torch.ops.vidattn, NATIVE_SHIFT).default,
)


# ---- Implementations ----


def launch_functions(backend: str) -> tuple[Callable[..., None], Callable[..., None], Callable[..., None]]:
    """Give the passes of a backend, (call, out, lse) and (call, dout, out, lse, dq, dk, dv), and its temporal shift.

    Args:
        backend: "cpu", "cuda" or "triton".

    Returns:
        Three functions that write into the tensors that they are given last.
    """
    if backend == "triton":
        from vidattn.kernels import mixing  # Triton is imported on first use, if ever

        return mixing.forward, mixing.backward, mixing.temporal_shift
    return _NATIVE


def _call(inputs: Inputs, options: Options, backend: str) -> MixingCall:
    return MixingCall(*tensors.for_kernels(inputs, backend), seed=inputs.seed, **options._asdict())


def _new_outputs(inputs: Inputs, options: Options, backend: str) -> tuple[Tensor, Tensor]:
    """Allocate out and lse."""
    frames, tokens, heads, head_dim = tensors.shape_of_q(inputs)
    rows, q = tokens if tensors.keeps_lse(tokens, backend) else 0, inputs.q
    lse = q.new_empty(frames, rows, heads, dtype=accumulator_dtype(q.dtype))
    return q.new_empty(frames, tokens, heads * head_dim), lse


def _forward(inputs: Inputs, options: Options, backend: str) -> tuple[Tensor, Tensor]:
    out, lse = _new_outputs(inputs, options, backend)
    if out.numel() == 0:
        return out, lse
    if backend == "reference":
        given = options._asdict() | {"channel_shifts": _triples(options.channel_shifts), "seed": inputs.seed}
        return reference.space_time_mixing_attention(tensors.separate(inputs), **given), lse
    launch, _, _ = launch_functions(backend)
    launch(_call(inputs, options, backend), out, lse if lse.shape[1] > 0 else None)
    return out, lse


def _backward(
    grads: Sequence[Tensor],
    inputs: Inputs,
    outputs: Sequence[Tensor | None],
    options: Options,
    needs: Sequence[bool],
    backend: str,
) -> tuple[Tensor | None, ...]:
    dout = tensors.last_dim_dense(grads[0])
    if backend == "reference" and dout.numel() > 0:
        given = options._replace(channel_shifts=_triples(options.channel_shifts))  # type: ignore[arg-type]
        qkv = tensors.separate(inputs)
        return tensors.pack(
            inputs,
            reference.space_time_mixing_attention_backward(dout, qkv, inputs.seed, *given),  # type: ignore[arg-type]
        )
    dqkv = tensors.new_gradients(inputs)
    if dout.numel() > 0:
        _, launch, _ = launch_functions(backend)
        views = tensors.gradients_for_kernels(dqkv, backend)
        launch(_call(inputs, options, backend), dout, *outputs, *views)
    return dqkv


def _save(ctx: Any, inputs: Inputs, output: Sequence[Tensor], options: Options, backend: str) -> None:
    """Keep q, k, v and the seed, and the outputs only where the backward pass rebuilds rows from a log-sum-exp."""
    _, lse = output
    ctx.save_for_backward(*inputs, *(output if lse.shape[1] > 0 else (None, None)))
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)


def _flops(shape: Sequence[int], options: Options) -> int:
    """Count q k^T and P v, a multiplication and an addition each; moving channels is no arithmetic."""
    frames, tokens = shape[:2]
    heads, head_dim = shape[-2:]
    return 4 * frames * heads * tokens**2 * head_dim


def _plain_shift(x: Tensor, num_frames: int, channel_shifts: Sequence[int], dim: int, backend: str) -> Tensor:
    return reference.temporal_shift(x, num_frames, _triples(channel_shifts), dim=dim)


def _fake_shift(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)


def _shift(x: Tensor, num_frames: int, channel_shifts: Sequence[int], dim: int, backend: str) -> Tensor:
    out = torch.empty_like(x)  # keeps the memory format of a dense tensor
    if backend == "reference":
        return out.copy_(_plain_shift(x, num_frames, channel_shifts, dim, backend))
    if out.numel() == 0:
        return out
    _, _, launch = launch_functions(backend)
    if x.is_contiguous():
        launch(x, num_frames, channel_shifts, dim, out)
        return out
    # Kernels take the dimensions in the order in which they lie in memory.
    order = sorted(range(1, x.dim()), key=lambda axis: (out.stride(axis), out.shape[axis] > 1), reverse=True)
    physical = out.permute(0, *order)
    if not physical.is_contiguous():  # frames are not the outermost dimension
        return out.copy_(_shift(x.contiguous(), num_frames, channel_shifts, dim, backend))
    source = x if x.stride() == out.stride() else torch.empty_like(out).copy_(x)
    launch(source.permute(0, *order), num_frames, channel_shifts, order.index(dim) + 1, physical)
    return out


def _save_shift(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.options = inputs[1:]


def _shift_autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    num_frames, channel_shifts, dim, backend = ctx.options
    back = [-value if place % 3 == 2 else value for place, value in enumerate(channel_shifts)]
    return call_op("temporal_shift", grad, num_frames, back, dim, backend), None, None, None, None


register_function(space_time_mixing_attention, native=NATIVE_FORWARD, cuda_tokens=CUDA_SEQUENCE)
register_attention(
    NAME,
    inputs=Inputs,
    options=Options,
    forward=_forward,
    backward=_backward,
    fake=_new_outputs,
    flops=_flops,
    save=_save,
)
register_function(temporal_shift, native=NATIVE_SHIFT, attends=False)
register_transforms(
    LIBRARY,
    "temporal_shift",
    implementation=_shift,
    plain=_plain_shift,
    fake=_fake_shift,
    setup_context=_save_shift,
    backward=_shift_autograd,
    batched=(0,),
)

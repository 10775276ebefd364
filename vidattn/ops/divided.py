"""Attention over time, over space, or over both with different heads: three functions, one op, its gradient and cost.

From a call to its kernel: the public function validates, applies autocast and picks the backend;
``torch.ops.vidattn.divided_attention`` is opaque to autograd and compilers and routes by the backend's name to
``reference/divided.py``, to ``kernels/divided.py`` or to the native op that the extension registers for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from vidattn.calls import DividedCall
from vidattn.ops import _arguments as arguments
from vidattn.ops import _tensors as tensors
from vidattn.ops._library import (
    CUDA_SEQUENCE,
    LIBRARY,
    TAGS,
    call_attention,
    native_pass,
    register_attention,
    register_function,
)
from vidattn.reference import divided as reference
from vidattn.reference.attention import accumulator_dtype
from vidattn.tracing import traced_for_one_size

__all__ = ["factorized_dot_product_attention", "spatial_attention", "temporal_attention"]

TOKEN_ORDERS = ("thw", "hwt")
CLS_TOKENS = (None, "mean", "per_frame")
CLS_QUERIES = ("own", "all")
ATTENDS_TO_FRAMES = ("mean", "per_frame")  # the cls token, to each for itself


@traced_for_one_size
def temporal_attention(
    qkv: Tensor | tuple[Tensor, Tensor, Tensor],
    num_frames: int,
    *,
    token_order: str = "thw",
    cls_query: str = "own",
    scale: float | None = None,
    dropout_p: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """Attend over the frames of each site of a clip, reading the tokens where they lie.

    The gradient comes back in the layout of ``qkv``. Scores, softmax and sums are float32 (float64 for float64)
    whatever the dtype of q. Under autocast q, k and v are cast.

    Args:
        qkv: (B, S, 3, h, d), a view of the projection's output, with any strides (a strided last dimension is copied
            once); or a tuple (q, k, v) of (B, S, h, d). float32, bfloat16, float16 or float64. S is T * N; with
            ``cls_query="all"`` it is 1 + T * N, and row 0 is a cls token.
        num_frames: frames T of the clip.
        token_order: order of the patches, "thw" (ViViT, diffusion models: t * N + n) or "hwt" (TimeSformer: n * T + t).
        cls_query: "own": tokens attend to what is in their sequences. There is no cls token: slice it off, which copies
            nothing. "all" (Frozen in Time): the patches of a site attend to the cls token too, and its query attends
            to all tokens of the clip, itself included; row 0 of the result is its context. On the CPU and by the
            reference.
        scale: factor of q k^T; d**-0.5 when None.
        dropout_p: probability of dropping an attention weight, ``0 <= dropout_p < 1``; active whenever above 0.
        backend: backend of this call, strict; None for the one in force.

    Returns:
        (B, S, h * d), contiguous, in q's dtype and the input's token order.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a shape, size, device or option does not fit, or the named backend cannot run the call.

    Reference:
        Is Space-Time Attention All You Need for Video Understanding?, arXiv 2102.05095, section 3, equation 11 without
        the cls token as key, like the released code; ViViT, arXiv 2103.15691, section 3.3 (model 3); with
        ``cls_query="all"`` Frozen in Time, arXiv 2104.00650, section 3.1, like the released code.

    Example:
        >>> import torch, vidattn
        >>> x = torch.randn(2, 1 + 196 * 8, 96)  # TimeSformer: a cls token, then the frames of each patch
        >>> qkv = torch.nn.Linear(96, 3 * 96)(x[:, 1:]).unflatten(-1, (3, 3, 32))
        >>> vidattn.temporal_attention(qkv, 8, token_order="hwt").shape
        torch.Size([2, 1568, 96])
    """
    name = "temporal_attention"
    cls_token = _cls_token(name, None, cls_query)
    options = Options(num_frames, token_order, 0, cls_token, scale, dropout_p)  # type: ignore[arg-type]
    return _attend(name, qkv, options, backend, lambda heads: heads)[0]


@traced_for_one_size
def spatial_attention(
    qkv: Tensor | tuple[Tensor, Tensor, Tensor],
    num_frames: int,
    *,
    token_order: str = "thw",
    cls_token: str | None = None,
    cls_query: str = "own",
    scale: float | None = None,
    dropout_p: float = 0.0,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend over the sites of each frame of a clip, and over a cls token that its frames share without copies of it.

    The gradient comes back in the layout of ``qkv``; that of the cls token is summed over the frames in a fixed order.
    Scores, softmax and sums are float32 (float64 for float64) whatever the dtype of q. Under autocast q, k and v are
    cast.

    Args:
        qkv: (B, S, 3, h, d), a view of the projection's output, with any strides (a strided last dimension is copied
            once); or a tuple (q, k, v) of (B, S, h, d). float32, bfloat16, float16 or float64. S is T * N, and with a
            cls token 1 + T * N: row 0 is the token.
        num_frames: frames T of the clip.
        token_order: order of the patches, "thw" (ViViT, diffusion models: t * N + n) or "hwt" (TimeSformer: n * T + t).
        cls_token: None; "mean" (TimeSformer: row 0 of the result is the mean over the frames of what the token attends
            to in each) or "per_frame" (the same input; these contexts apart, so that each frame can be dropped or
            projected by itself).
        cls_query: "own": a query attends to what is in its frame, the cls token's to each frame for itself. "all"
            (Frozen in Time; ``cls_token`` stays None, row 0 is the token): the query of the cls token attends to all
            tokens of the clip, itself included, and row 0 of the result is its context; the patches of a frame attend
            to their frame and the cls token. On the CPU and by the reference.
        scale: factor of q k^T; d**-0.5 when None.
        dropout_p: probability of dropping an attention weight, ``0 <= dropout_p < 1``; active whenever above 0.
        backend: backend of this call, strict; None for the one in force.

    Returns:
        (B, S, h * d), contiguous, in q's dtype and the input's token order. For "per_frame" a pair: the patches
        (B, T * N, h * d) and the contexts of the cls token (B, T, h * d).

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a shape, size, device or option does not fit, or the named backend cannot run the call.

    Reference:
        Is Space-Time Attention All You Need for Video Understanding?, arXiv 2102.05095, section 3, equation 12; ViViT,
        arXiv 2103.15691, section 3.3 (models 2 and 3); with ``cls_query="all"`` Frozen in Time, arXiv 2104.00650,
        section 3.1, like the released code.

    Example:
        >>> import torch, vidattn
        >>> x = torch.randn(2, 1 + 196 * 8, 96)
        >>> qkv = torch.nn.Linear(96, 3 * 96)(x).unflatten(-1, (3, 3, 32))
        >>> vidattn.spatial_attention(qkv, 8, token_order="hwt", cls_token="mean").shape
        torch.Size([2, 1569, 96])
    """
    name = "spatial_attention"
    cls_token = _cls_token(name, cls_token, cls_query)
    options = Options(num_frames, token_order, 0, cls_token, scale, dropout_p)  # type: ignore[arg-type]
    out, cls = _attend(name, qkv, options, backend)
    return (out, cls) if cls_token == "per_frame" else out


@traced_for_one_size
def factorized_dot_product_attention(
    qkv: Tensor | tuple[Tensor, Tensor, Tensor],
    num_frames: int,
    *,
    token_order: str = "thw",
    num_temporal_heads: int | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """Attend over the frames of each site with the first heads, over the sites of each frame with the others.

    The gradient comes back in the layout of ``qkv``. Scores, softmax and sums are float32 (float64 for float64)
    whatever the dtype of q. Under autocast q, k and v are cast.

    Args:
        qkv: (B, T * N, 3, h, d), a view of the projection's output, with any strides (a strided last dimension is
            copied once); or a tuple (q, k, v) of (B, T * N, h, d). float32, bfloat16, float16 or float64.
        num_frames: frames T of the clip.
        token_order: "thw" (ViViT: token t * N + n) or "hwt" (token n * T + t).
        num_temporal_heads: heads that attend over time, 0 to h; None for half of an even number.
        scale: factor of q k^T; d**-0.5 when None.
        dropout_p: probability of dropping an attention weight, ``0 <= dropout_p < 1``; active whenever above 0.
        backend: backend of this call, strict; None for the one in force.

    Returns:
        (B, T * N, h * d), contiguous, in q's dtype and the input's token order: no heads to concatenate.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a shape, size, device or option does not fit, the number of heads is odd and not divided by
            ``num_temporal_heads``, or the named backend cannot run the call.

    Reference:
        ViViT: A Video Vision Transformer, arXiv 2103.15691, section 3.3 (model 4), equation 7 and after.

    Example:
        >>> import torch, vidattn
        >>> qkv = torch.randn(1, 16 * 196, 3, 12, 64)
        >>> vidattn.factorized_dot_product_attention(qkv, 16).shape
        torch.Size([1, 3136, 768])
    """
    name = "factorized_dot_product_attention"

    def temporal_heads(heads: int) -> int:
        if num_temporal_heads is None:
            if heads % 2:
                raise ValueError(
                    f"{name}: qkv: expected an even number of heads, half for time and half for space, got {heads};"
                    " num_temporal_heads divides them otherwise"
                )
            return heads // 2
        chosen = arguments.integer(name, "num_temporal_heads", num_temporal_heads)
        if not 0 <= chosen <= heads:
            raise ValueError(f"{name}: num_temporal_heads: expected 0 to {heads}, the number of heads, got {chosen}")
        return chosen

    options = Options(num_frames, token_order, 0, None, scale, dropout_p)  # type: ignore[arg-type]
    return _attend(name, qkv, options, backend, temporal_heads)[0]


# ---- What the op takes, in the order of its schema ----


class Inputs(NamedTuple):
    q: Tensor  # the packed qkv when k and v are None
    k: Tensor | None
    v: Tensor | None
    seed: Tensor | None = None


class Options(NamedTuple):
    num_frames: int
    token_order: str
    temporal_heads: int  # the first so many attend over time, the others over space
    cls_token: str | None  # "all" for one whose query sees the whole clip
    scale: float
    dropout_p: float


def _cls_token(name: str, cls_token: str | None, cls_query: str) -> str | None:
    """Check both options and give the one that the op has for them."""
    arguments.check_choice(name, "cls_token", cls_token, CLS_TOKENS)
    arguments.check_choice(name, "cls_query", cls_query, CLS_QUERIES)
    if cls_query == "own":
        return cls_token
    if cls_token is not None:
        raise ValueError(f"{name}: cls_token: expected None with cls_query 'all', got {cls_token!r}")
    return "all"


def _attend(
    name: str,
    qkv: Tensor | tuple[Tensor, Tensor, Tensor],
    options: Options,
    backend: str | None,
    temporal_heads: Callable[[int], int] = lambda heads: 0,
) -> tuple[Tensor, Tensor]:
    """Validate and call; ``temporal_heads`` takes the number of heads and gives how many attend over time."""
    inputs = Inputs(*arguments.split_qkv(name, qkv, "(B, S, 3, h, d)", "(B, S, h, d)"))
    tokens, (heads, head_dim) = inputs.q.shape[1], inputs.q.shape[-2:]
    frames = arguments.integer(name, "num_frames", options.num_frames)
    if frames < 1:
        raise ValueError(f"{name}: num_frames: expected at least 1, got {frames}")
    if options.cls_token is None and tokens % frames != 0:
        raise ValueError(f"{name}: qkv: expected num_frames * N = {frames} * N tokens, got {tokens}")
    if options.cls_token is not None and (tokens <= 1 or (tokens - 1) % frames != 0):
        raise ValueError(
            f"{name}: qkv: expected a cls token and num_frames * N = 1 + {frames} * N tokens with N >= 1, got {tokens}"
        )
    arguments.check_choice(name, "token_order", options.token_order, TOKEN_ORDERS)
    options = Options(
        frames,
        options.token_order,
        temporal_heads(heads),
        options.cls_token,
        arguments.check_scale(name, options.scale, head_dim),
        arguments.check_dropout(name, options.dropout_p),
    )
    longest = max(_keys(tokens, heads, options))
    cls_query = "all" if options.cls_token == "all" else "own"
    out, cls, _ = call_attention(name, "divided_attention", inputs, options, backend, longest, cls_query=cls_query)
    return out, cls


# ---- Schemas ----

_INPUTS = "Tensor q, Tensor? k, Tensor? v, Tensor? seed"
_OPTIONS = "SymInt num_frames, str token_order, int temporal_heads, str? cls_token, float scale, float dropout_p"
# cls is the context of the cls token in each frame (B, T, h * d), empty without one and with "all". It is an output of
# "per_frame"; with "mean" it is in the accumulator's dtype, and row 0 of out is its mean. lse is empty where no
# backward needs it.
LIBRARY.define(
    f"divided_attention({_INPUTS}, {_OPTIONS}, str backend) -> (Tensor out, Tensor cls, Tensor lse)", tags=TAGS
)
# Without k and v, grad_q is the gradient of the packed qkv. out, cls and lse are there if the forward pass kept an lse.
LIBRARY.define(
    f"divided_attention_backward(Tensor grad_out, Tensor? grad_cls, {_INPUTS}, Tensor? out, Tensor? cls, Tensor? lse,"
    f" {_OPTIONS}, str backend) -> (Tensor grad_q, Tensor grad_k, Tensor grad_v)",
    tags=TAGS,
)
# Implemented by the extension per device, with the fields of a DividedCall first. out, dout: patches (B, T * N, h * d)
# in token order. cls, dcls: (B, T, h * d) in the accumulator's dtype, given if and only if row 0 of q, k, v, dq, dk and
# dv is a cls token that attends to each frame. cls_mean: (B, h * d), where the mean of cls goes. lse: of the patches in
# token order, then of the cls token in each frame. With cls_sees_all row 0 of out and dout is the cls token's too.
NATIVE_FORWARD = "_divided_attention_forward"
_CALL = (
    "Tensor q, Tensor? k, Tensor? v, Tensor? seed,"
    " int num_frames, bool time_fastest, int temporal_heads, float scale, float dropout_p, bool cls_sees_all"
)
LIBRARY.define(
    f"{NATIVE_FORWARD}({_CALL}, Tensor(a!) out, Tensor(b!)? cls, Tensor(c!)? cls_mean, Tensor(d!)? lse) -> ()"
)
LIBRARY.define(
    f"_divided_attention_backward({_CALL}, Tensor dout, Tensor? dcls, Tensor? out, Tensor? cls, Tensor? lse,"
    " Tensor(a!) dq, Tensor(b!)? dk, Tensor(c!)? dv) -> ()"
)

_NATIVE = native_pass(NATIVE_FORWARD), native_pass("_divided_attention_backward")


# ---- Implementations ----


def launch_functions(backend: str) -> tuple[Callable[..., None], Callable[..., None]]:
    """Give the passes of a backend: (call, out, cls, cls_mean, lse), (call, dout, dcls, out, cls, lse, dq, dk, dv).

    Args:
        backend: "cpu", "cuda" or "triton".

    Returns:
        The forward and the backward pass, which write into the tensors that they are given last.
    """
    if backend == "triton":
        from vidattn.kernels import divided  # Triton is imported on first use, if ever

        return divided.forward, divided.backward
    return _NATIVE


def _keys(tokens: int, heads: int, options: Options) -> tuple[int, int]:
    """Count the tokens of a sequence over time and of one over space, 0 where no head attends along it."""
    cls = 0 if options.cls_token is None else 1
    over_time = cls + options.num_frames if options.temporal_heads > 0 else 0
    return over_time, cls + (tokens - cls) // options.num_frames if options.temporal_heads < heads else 0


def _call(inputs: Inputs, options: Options, backend: str) -> DividedCall:
    return DividedCall(
        *tensors.for_kernels(inputs, backend),
        seed=inputs.seed,
        num_frames=options.num_frames,
        time_fastest=options.token_order == "hwt",
        temporal_heads=options.temporal_heads,
        scale=options.scale,
        dropout_p=options.dropout_p,
        cls_sees_all=options.cls_token == "all",
    )


def _new_outputs(inputs: Inputs, options: Options, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate out, cls and lse."""
    batch, tokens, heads, head_dim = tensors.shape_of_q(inputs)
    cls_token, q = options.cls_token, inputs.q
    accumulator = accumulator_dtype(q.dtype)
    cls_frames = options.num_frames if cls_token in ATTENDS_TO_FRAMES else 0
    patches = tokens if cls_token is None else tokens - 1
    out = q.new_empty(batch, patches if cls_token == "per_frame" else tokens, heads * head_dim)
    cls_dtype = q.dtype if cls_token == "per_frame" else accumulator
    cls = q.new_empty(batch, cls_frames, heads * head_dim, dtype=cls_dtype)
    whole_row_keys = tensors.CUDA_WHOLE_ROW_KEYS if cls_token is None else 0
    kept = tensors.keeps_lse(max(_keys(tokens, heads, options)), backend, whole_row_keys)
    rows = patches + cls_frames if kept else 0
    lse = q.new_empty(batch, rows, heads, dtype=accumulator)
    return out, cls, lse


def _forward(inputs: Inputs, options: Options, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    out, cls, lse = _new_outputs(inputs, options, backend)
    if out.numel() == 0:
        return out, cls, lse
    if backend == "reference":
        out, cls = reference.divided_attention(*tensors.separate(inputs), inputs.seed, **options._asdict())
        return out.contiguous(), cls.contiguous(), lse
    has_mean = options.cls_token == "mean"
    exact_cls = cls.to(lse.dtype) if options.cls_token in ATTENDS_TO_FRAMES else None
    launch, _ = launch_functions(backend)
    launch(
        _call(inputs, options, backend),
        out[:, 1:] if has_mean else out,
        exact_cls,
        out[:, 0] if has_mean else None,
        lse if lse.shape[1] > 0 else None,
    )
    if exact_cls is not None and exact_cls is not cls:
        cls.copy_(exact_cls)
    return out, cls, lse


def _backward(
    grads: Sequence[Tensor | None],
    inputs: Inputs,
    outputs: Sequence[Tensor | None],
    options: Options,
    needs: Sequence[bool],
    backend: str,
) -> tuple[Tensor | None, ...]:
    dout, dcls = grads
    out, cls, lse = outputs
    assert dout is not None
    if backend == "reference" and dout.numel() > 0:
        qkv = tensors.separate(inputs)
        found = reference.divided_attention_backward(dout, dcls, *qkv, inputs.seed, **options._asdict())
        return tensors.pack(inputs, found)
    dqkv = tensors.new_gradients(inputs)
    if dout.numel() == 0:
        return dqkv
    accumulator = accumulator_dtype(inputs.q.dtype)
    dout = tensors.last_dim_dense(dout)
    if options.cls_token == "mean":
        share = dout[:, :1].to(accumulator) / options.num_frames
        dcls, dout = share.expand(-1, options.num_frames, -1), dout[:, 1:]
        out = None if out is None else out[:, 1:]
    elif dcls is not None:
        dcls = tensors.last_dim_dense(dcls.to(accumulator))
    cls = None if cls is None or options.cls_token not in ATTENDS_TO_FRAMES else cls.to(accumulator)
    _, launch = launch_functions(backend)
    launch(_call(inputs, options, backend), dout, dcls, out, cls, lse, *tensors.gradients_for_kernels(dqkv, backend))
    return dqkv


def _save(ctx: Any, inputs: Inputs, output: Sequence[Tensor], options: Options, backend: str) -> None:
    """Keep q, k, v and the seed, and the outputs only where the backward pass rebuilds rows from a log-sum-exp."""
    _, cls, lse = output
    per_frame = options.cls_token == "per_frame"
    ctx.save_for_backward(*inputs, *(output if lse.shape[1] > 0 else (None, None, None)))
    ctx.mark_non_differentiable(*((lse,) if per_frame else (cls, lse)))
    ctx.set_materialize_grads(per_frame)


def _flops(shape: Sequence[int], options: Options) -> int:
    """Count q k^T and P v, a multiplication and an addition each."""
    batch, tokens = shape[:2]
    heads, head_dim = shape[-2:]
    frames, temporal_heads = options.num_frames, options.temporal_heads
    cls = 0 if options.cls_token is None else 1
    patches = tokens - cls
    sites = patches // frames
    if options.cls_token == "all":
        over_time, over_space = (patches * (1 + length) + tokens for length in (frames, sites))
    else:
        over_time, over_space = sites * frames**2, frames * (cls + sites) ** 2
    return 4 * batch * head_dim * (temporal_heads * over_time + (heads - temporal_heads) * over_space)


for function in (temporal_attention, spatial_attention, factorized_dot_product_attention):
    register_function(function, native=NATIVE_FORWARD, cuda_tokens=CUDA_SEQUENCE)
register_attention(
    "divided_attention",
    inputs=Inputs,
    options=Options,
    forward=_forward,
    backward=_backward,
    fake=_new_outputs,
    flops=_flops,
    save=_save,
    num_outputs=3,
    num_gradients=2,
)

"""The ``torch.ops.vidattn`` namespace and the compiled extension that implements part of it."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from vidattn.backends import TRITON_INTERPRETED, AttentionCall, choose_backend, register_kernel, register_op
from vidattn.installation import EXTENSION
from vidattn.ops._arguments import draw_seed
from vidattn.ops._tensors import fake_sum, new_gradients
from vidattn.ops._transforms import WITH_NUMBERS, call_op, call_with_numbers, gradients, register_transforms

__all__ = [
    "LIBRARY",
    "TAGS",
    "call_attention",
    "describe_call",
    "native_pass",
    "register_attention",
    "register_function",
]

_MAX_HEAD_DIM = 128
# What csrc/cuda/plan.h allows.
CUDA_WINDOW, CUDA_SEQUENCE = 1200, 400
_CUDA_HEAD_DIM, _CUDA_RANGES = 64, 64

# What Triton's interpreter computes with wrongly, without an error. Tests that mend it take it out.
MISINTERPRETED = [torch.bfloat16]

# Of the mode that make_fx and export record with.
_PROXY = torch._C._TorchDispatchModeKey.PROXY

# Registrations live as long as this object.
LIBRARY = torch.library.Library("vidattn", "FRAGMENT")
TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)

# Grows with every change of what native ops take. An extension built from other sources would read other arguments.
_NATIVE_VERSION = 7
LIBRARY.define("_native_version() -> int")
# The version of CUDA that compiled the kernels, "13.0" say; or, without any, why there are none.
LIBRARY.define("_cuda_build() -> str")
# Implemented by the extension: the instruction set in use, and a comma-separated list of those it could use here.
LIBRARY.define("_cpu_isa() -> str")
LIBRARY.define("_cpu_isas() -> str")


def _load_extension() -> str | None:
    """Load the extension, which registers its kernels, and say what is wrong with it, if anything is."""
    if not EXTENSION.is_file():
        return f"the compiled extension vidattn/{EXTENSION.name} is not built"
    try:
        torch.ops.load_library(EXTENSION)
    except OSError as error:  # torch names the file, and what it was raised from the reason
        return f"the compiled extension vidattn/{EXTENSION.name} does not load ({error.__cause__ or error})"
    try:
        version = torch.ops.vidattn._native_version()
    except NotImplementedError:
        version = None
    if version != _NATIVE_VERSION:
        return f"the compiled extension vidattn/{EXTENSION.name} was built from other sources; build it again"
    return None


_extension_error = _load_extension()


def native_kernel_missing(op: str, dispatch_key: str) -> str | None:
    """Say why the extension has no kernel for a native op.

    Args:
        op: name of the native op, defined in the ``vidattn`` namespace.
        dispatch_key: "CPU" or "CUDA".

    Returns:
        The reason, or None if it has one.
    """
    if _extension_error is not None:
        return _extension_error
    if torch._C._dispatch_has_kernel_for_dispatch_key(f"vidattn::{op}", dispatch_key):
        return None
    if dispatch_key == "CUDA":
        return f"the compiled extension was built without CUDA kernels: {torch.ops.vidattn._cuda_build()}"
    return f"the compiled extension was built without {dispatch_key} kernels"


def describe_call(op: str, q: Tensor, *more: Any) -> AttentionCall:
    """Say what kind of call an op's first tensor makes; the other fields follow, from the number of tokens on."""
    if q.is_cpu:  # a device takes long to tell its type
        return AttentionCall(op, "cpu", q.dtype, q.shape[-1], None, *more)
    device = q.device
    return AttentionCall(op, device.type, q.dtype, q.shape[-1], device.index, *more)


def call_attention(
    function: str,
    op: str,
    inputs: Any,
    options: Any,
    backend: str | None,
    group_tokens: int = 0,
    bias: str = "none",
    channel_ranges: int = 0,
    cls_query: str = "own",
    grid_options: tuple[str, ...] = (),
) -> Any:
    """Call an op of attention with validated arguments: choose the backend and draw the seed of the dropout.

    Args:
        function: name of the public function.
        op: name of the op.
        inputs: its tensors, the seed last, which is None so far.
        options: its options.
        backend: the call's own ``backend`` argument.
        group_tokens: see ``vidattn.backends.AttentionCall``.
        bias: kind of the tensor behind v, if it is there: "table" or "dense"; "none" if it is no bias.
        channel_ranges: as ``group_tokens``.
        cls_query: as ``group_tokens``.
        grid_options: as ``group_tokens``.

    Returns:
        What the op returns.
    """
    if inputs[3] is None:
        bias = "none"
    needs_bias_grad = bias != "none" and _may_need_gradient(inputs[3])
    call = describe_call(
        function,
        inputs.q,
        group_tokens,
        options.dropout_p,
        bias,
        needs_bias_grad,
        channel_ranges,
        cls_query,
        grid_options,
    )
    chosen = choose_backend(call, backend)
    if _listener is not None:
        _listener(function, op, inputs, options)
    seed = draw_seed(inputs.q, options.dropout_p)
    return call_op(op, *inputs[:-1], seed, *options, chosen)


# Told of every call of an attention function: function, op, inputs and options. Dynamo guards on a plain global.
_listener: Callable[[str, str, Any, Any], None] | None = None


@contextlib.contextmanager
def listening(listener: Callable[[str, str, Any, Any], None]) -> Iterator[None]:
    """Tell a function of every call of an attention function inside a ``with`` block."""
    global _listener
    previous, _listener = _listener, listener
    try:
        yield
    finally:
        _listener = previous


def _may_need_gradient(x: Tensor) -> bool:
    """Say whether a gradient of a tensor may be asked for.

    ``torch.compile`` guards on what tensors say. A transform, or a program that is recorded for later, does not.
    """
    if torch.compiler.is_compiling():
        hidden = torch.compiler.is_exporting()
    else:
        hidden = torch._C._are_functorch_transforms_active() or torch._C._get_dispatch_mode(_PROXY) is not None
    return hidden or (torch.is_grad_enabled() and x.requires_grad)


def native_pass(op: str) -> Callable[..., None]:
    """Give a native op as a launch function: it takes the value of ``vidattn.calls`` as one argument."""
    native = getattr(torch.ops.vidattn, op).default
    return lambda call, *rest: native(*call, *rest)


def register_function(function: Callable[..., Any], *, native: str, attends: bool = True, cuda_tokens: int = 0) -> None:
    """Make a public function known to the choice of backends, with its reference, native and Triton kernels.

    Args:
        function: the function, which asks ``vidattn.backends.choose_backend``.
        native: name of the native op of the extension, defined in the ``vidattn`` namespace.
        attends: whether it computes attention; what only moves data runs in any dtype.
        cuda_tokens: tokens of the longest group that csrc/cuda attends in.
    """
    name, missing = function.__name__, native_kernel_missing(native, "CPU")
    register_op(function)
    register_kernel(name, "cpu", lambda: missing, _check_head_dim if attends else None)
    register_kernel(name, "triton", _triton_missing, _check_triton if attends else _check_triton_gpu)
    cuda_missing = native_kernel_missing(native, "CUDA")
    check = (lambda call: _check_cuda(call, cuda_tokens)) if attends else _check_cuda_gpu
    register_kernel(name, "cuda", lambda: cuda_missing or _cuda_gpu_missing(), check)


def register_attention(
    name: str,
    *,
    inputs: Callable[..., Any],
    options: Callable[..., Any],
    forward: Callable[..., Any],
    backward: Callable[..., Any],
    fake: Callable[..., Any],
    flops: Callable[..., int],
    save: Callable[..., None],
    num_outputs: int = 2,
    num_gradients: int = 1,
) -> None:
    """Give the ops ``name`` and ``name_backward``, whose schemas are defined, all they need besides kernels.

    This is the one place where the flat arguments of the schemas become values. The op takes its inputs, its options
    and the backend. The backward op takes gradients, the inputs, the outputs (None where they were not saved), the
    options, which of the inputs between v and the seed need a gradient, and the backend. It returns gradients of the
    inputs in front of the seed.

    Args:
        name: name of the op.
        inputs: NamedTuple of the op's tensors: q, k, v, what the windows share, the seed.
        options: NamedTuple of its options.
        forward: takes inputs, options and the backend, and routes by the latter.
        backward: takes gradients, inputs, outputs, options, needs and the backend.
        fake: allocates the op's outputs; takes what ``forward`` takes.
        flops: takes the shape of q and the options, and counts floating point operations of the forward pass.
        save: takes the context, inputs, outputs, options and the backend, and saves the tensors, or None for outputs
            that the backward op needs not: never an (N, N) tensor, a mask, a rolled or padded copy.
        num_outputs: number of outputs of the op.
        num_gradients: number of gradients that the backward op is given, those of the first outputs.
    """
    num_tensors, num_options = len(inputs._fields), len(options._fields)  # type: ignore[attr-defined]
    num_inputs = num_gradients + num_tensors
    first_option = num_inputs + num_outputs
    schema = getattr(torch.ops.vidattn, f"{name}_backward").default._schema
    num_needs = len(schema.arguments) - first_option - num_options - 1

    def values(args: Sequence[Any]) -> tuple[Any, Any, str]:
        return inputs(*args[:num_tensors]), options(*args[num_tensors:-1]), args[-1]

    def forward_op(*args: Any) -> Any:
        return forward(*values(args))

    def backward_op(*args: Any) -> tuple[Tensor | None, ...]:
        rest = args[first_option:]
        return backward(
            args[:num_gradients],
            inputs(*args[num_gradients:num_inputs]),
            args[num_inputs:first_option],
            options(*rest[:num_options]),
            rest[num_options:-1],
            args[-1],
        )

    def fake_op(*args: Any) -> Any:
        return fake(*values(args))

    def fake_backward_op(*args: Any) -> tuple[Tensor | None, ...]:
        given, needs = inputs(*args[num_gradients:num_inputs]), args[first_option + num_options : -1]
        return (*new_gradients(given), *map(fake_sum, given[3:-1], needs))

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.options = inputs[num_tensors:]
        given, chosen, backend = values(inputs)
        save(ctx, given, output, chosen, backend)

    def autograd(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if grads[0] is None:
            return (None,) * len(ctx.needs_input_grad)
        needs = ctx.needs_input_grad[3 : 3 + num_needs]
        args = (*grads[:num_gradients], *ctx.saved_tensors, *ctx.options[:-1], *needs, ctx.options[-1])
        if getattr(ctx, "numbers", None) is None:
            found = call_op(f"{name}_backward", *args)
        else:
            found = call_with_numbers(f"{name}_backward", *args, ctx.numbers)
        return (*found, *(None,) * (len(ctx.needs_input_grad) - len(found)))

    def plain(*args: Any) -> Any:
        return forward_op(*args[:-1], "reference")

    def plain_backward(*args: Any) -> list[Tensor | None]:
        grads, given, rest = args[:num_gradients], args[num_gradients:num_inputs], args[first_option:]
        chosen, needs = rest[:num_options], rest[num_options:-1]
        return gradients(lambda *x: plain(*x, *chosen, None), given, grads, (True, True, True, *needs))

    # The outputs of the forward pass are functions of its inputs: their share is in the derivatives for those.
    def setup_second(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
        ctx.rest = (None,) * num_outputs + inputs[first_option:]
        ctx.save_for_backward(*inputs[:num_inputs])
        ctx.set_materialize_grads(False)

    def second(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[:num_inputs]
        found = gradients(lambda *x: plain_backward(*x, *ctx.rest), ctx.saved_tensors, grads, needed)
        return (*found, *(None,) * (len(ctx.needs_input_grad) - num_inputs))

    register_transforms(
        LIBRARY,
        name,
        implementation=forward_op,
        plain=plain,
        fake=fake_op,
        setup_context=setup_context,
        backward=autograd,
        batched=range(3),
        folds=lambda args: args[num_tensors - 1] is None,
    )
    register_transforms(
        LIBRARY,
        f"{name}_backward",
        implementation=backward_op,
        plain=plain_backward,
        fake=fake_backward_op,
        setup_context=setup_second,
        backward=second,
        batched=(*range(num_gradients + 3), *range(num_inputs, first_option)),
        # A gradient of something that the whole batch shares is a sum over it.
        folds=lambda args: args[num_inputs - 1] is None and not any(args[first_option + num_options : -1]),
    )

    # Formulas see the shape of a tensor in its place. Numbers of options that a program keeps open come after those.
    def forward_flops(*args: Any, **_: Any) -> int:
        return flops(args[0] if args[1] is not None else _unpacked(args[0]), options(*args[num_tensors:][:num_options]))

    def backward_flops(*args: Any, **_: Any) -> int:
        # Five products (the scores again, dv, dP, dq, dk) where the forward pass has two.
        return forward_flops(*args[num_gradients:num_inputs], *args[first_option:]) * 5 // 2

    for suffix in ("", WITH_NUMBERS):
        register_flop_formula(getattr(torch.ops.vidattn, name + suffix))(forward_flops)
        register_flop_formula(getattr(torch.ops.vidattn, f"{name}_backward{suffix}"))(backward_flops)


def _unpacked(shape: Sequence[int]) -> list[int]:
    """Give the shape of q from that of a packed qkv."""
    return [*shape[:-3], *shape[-2:]]


def _triton_missing() -> str | None:
    return _why_no_triton()


# Dynamo need not, and cannot, follow how the answer comes about. torch.compiler.assume_constant_result sets the same,
# but imports Dynamo, which would make importing vidattn slow.
_triton_missing._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def _why_no_triton() -> str | None:
    try:
        found = importlib.util.find_spec("triton") is not None
    except ImportError:
        found = False
    if not found:
        return "the package triton is not installed"
    if TRITON_INTERPRETED:
        return None
    if not torch.cuda.is_available():
        return "there is no GPU (with TRITON_INTERPRET=1 the kernels run on the CPU, for tests)"
    return _of_all(_triton_gpus())


def _triton_gpus() -> tuple[str | None, ...]:
    return _why_no_triton_on_gpus()


# As above; what such a function is given must be constant for Dynamo too, so it is given nothing.
_triton_gpus._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def _why_no_triton_on_gpus() -> tuple[str | None, ...]:
    """Say for each GPU why the Triton kernels cannot run on it, None if they can."""
    any_runs = TRITON_INTERPRETED or torch.version.hip is not None
    return tuple(None if any_runs else _too_old(index) for index in range(torch.cuda.device_count()))


def _too_old(index: int) -> str | None:
    capability = torch.cuda.get_device_capability(index)
    if capability < (8, 0):
        return f"needs a GPU of compute capability 8.0 or later, got {capability[0]}.{capability[1]}"
    return None


def _of_all(reasons: tuple[str | None, ...]) -> str | None:
    """Give the reason why kernels run on none of the GPUs; None if they run on one."""
    return None if None in reasons else reasons[0]


def _of_device(call: AttentionCall, reasons: tuple[str | None, ...]) -> list[str]:
    """Give the reason why kernels that run on some GPU do not on that of the call's tensors, if there is one."""
    if call.device_type != "cuda" or call.device_index is None or None not in reasons:
        return []
    reason = reasons[call.device_index]
    return [] if reason is None else [reason]


def _cuda_gpus() -> tuple[str | None, ...]:
    return _why_not_gpus()


_cuda_gpus._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def _why_not_gpus() -> tuple[str | None, ...]:
    """Say for each GPU why the extension's CUDA kernels cannot run on it, None if they can."""
    if torch.version.hip is not None:
        return ("needs an NVIDIA GPU, this torch is built for AMD's",)
    if not torch.cuda.is_available():
        return ("there is no GPU",)
    return tuple(map(_why_not_gpu, range(torch.cuda.device_count())))


def _why_not_gpu(index: int) -> str | None:
    """Say why the kernels, which are built, cannot run on a GPU.

    Machine code for 8.0 and 9.0 is in it, which the others of the same major version run too, with every driver of the
    toolkit's major version or later that can unpack it (12.4). For GPUs after those the driver compiles the PTX, which
    an older one cannot read.
    """
    if too_old := _too_old(index):
        return too_old
    capability = torch.cuda.get_device_capability(index)
    major, minor = map(int, torch.ops.vidattn._cuda_build().split("."))
    needed = max((12, 4), (major, minor if capability >= (10, 0) else 0))
    version = torch._C._cuda_getDriverVersion()  # type: ignore[attr-defined]  # 13020 for 13.2
    driver = version // 1000, version % 1000 // 10
    if driver < needed:
        return f"needs a driver for CUDA {needed[0]}.{needed[1]} or later, got one for {driver[0]}.{driver[1]}"
    return None


def _cuda_gpu_missing() -> str | None:
    return _of_all(_cuda_gpus())


def _check_cuda(call: AttentionCall, tokens: int) -> list[str]:
    reasons = _check_cuda_gpu(call) + _check_what_gpus_lack(call)
    if call.dtype not in (torch.float16, torch.bfloat16):
        reasons.append(f"runs float16 and bfloat16, got {call.dtype}")
    if call.head_dim > _CUDA_HEAD_DIM:
        reasons.append(f"runs head dimensions up to {_CUDA_HEAD_DIM}, got {call.head_dim}")
    if call.group_tokens > tokens:
        reasons.append(f"runs groups of up to {tokens} tokens, got {call.group_tokens}")
    if call.dropout_p != 0.0:
        reasons.append(f"has no dropout, got dropout_p {call.dropout_p}")
    if call.bias == "dense" and call.needs_bias_grad:
        reasons.append("gives no gradient of a dense bias, which this call may need")
    if call.channel_ranges > _CUDA_RANGES:
        reasons.append(f"runs up to {_CUDA_RANGES} ranges of channels, got {call.channel_ranges}")
    return reasons


def _check_what_gpus_lack(call: AttentionCall) -> list[str]:
    """Give the reasons of options that only the reference and the CPU have."""
    reasons = []
    if call.grid_options:
        reasons.append(f"has no {', '.join(call.grid_options)}")
    if call.cls_query != "own":
        reasons.append(f"runs cls_query 'own', got {call.cls_query!r}")
    return reasons


def _check_cuda_gpu(call: AttentionCall) -> list[str]:
    return _of_device(call, _cuda_gpus())


def _check_triton(call: AttentionCall) -> list[str]:
    reasons = _check_head_dim(call) + _check_triton_gpu(call) + _check_what_gpus_lack(call)
    if call.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        reasons.append(f"runs float32, bfloat16 and float16, got {call.dtype}")
    elif TRITON_INTERPRETED and call.dtype in MISINTERPRETED:
        reasons.append("Triton's interpreter computes bfloat16 products wrongly; it runs float32 and float16")
    return reasons


def _check_triton_gpu(call: AttentionCall) -> list[str]:
    return _of_device(call, _triton_gpus())


def _check_head_dim(call: AttentionCall) -> list[str]:
    if call.head_dim > _MAX_HEAD_DIM:
        return [f"runs head dimensions up to {_MAX_HEAD_DIM}, got {call.head_dim}"]
    return []

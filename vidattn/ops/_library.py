"""The ``torch.ops.vidattn`` namespace and the compiled extension that implements part of it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from vidattn.backends import TRITON_INTERPRETED, AttentionCall, register_kernel, register_op
from vidattn.ops._transforms import WITH_NUMBERS, call_op, call_with_numbers, gradients, register_transforms

__all__ = ["LIBRARY", "TAGS", "describe_call", "register_attention", "register_function"]

_MAX_HEAD_DIM = 128

# Registrations live as long as this object.
LIBRARY = torch.library.Library("vidattn", "FRAGMENT")
TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)

# Implemented by the extension: the instruction set in use, and a comma-separated list of those it could use here.
LIBRARY.define("_cpu_isa() -> str")
LIBRARY.define("_cpu_isas() -> str")

_extension_error: str | None = None
try:
    import vidattn._C  # type: ignore[import-not-found]  # noqa: F401  # importing it registers its kernels
except ImportError as error:
    _extension_error = f"the compiled extension vidattn._C is not built or does not load ({error})"


def native_kernel_missing(op: str, dispatch_key: str) -> str | None:
    """Say why the extension has no kernel for a native op.

    Args:
        op: name of the native op, defined in the ``vidattn`` namespace.
        dispatch_key: "CPU" or "CUDA".

    Returns:
        The reason, or None if it has one.
    """
    if torch._C._dispatch_has_kernel_for_dispatch_key(f"vidattn::{op}", dispatch_key):
        return None
    return _extension_error or f"the compiled extension was built without {dispatch_key} kernels"


def describe_call(op: str, q: Tensor) -> AttentionCall:
    """Say what kind of call an op's first tensor makes."""
    return AttentionCall(op, q.device.type, q.dtype, q.shape[-1])


def register_function(name: str, *, arguments: Callable[..., Any], native: str, attends: bool = True) -> None:
    """Make a public function known to the choice of backends, with its reference, native and Triton kernels.

    Args:
        name: name of the function.
        arguments: takes the function's arguments and returns its validated tensors first.
        native: name of the native op of the extension, defined in the ``vidattn`` namespace.
        attends: whether it computes attention; what only moves data runs in any dtype.
    """
    missing = native_kernel_missing(native, "CPU")
    register_op(name, lambda *args, **kwargs: describe_call(name, arguments(*args, **kwargs)[0][0]))
    register_kernel(name, "cpu", lambda: missing, _check_head_dim if attends else None)
    register_kernel(name, "triton", _triton_missing, _check_triton if attends else None)


def register_attention(
    name: str,
    *,
    forward: Callable[..., Any],
    backward: Callable[..., Any],
    fake: Callable[..., Any],
    fake_backward: Callable[..., Any],
    flops: Callable[..., int],
    save: Callable[..., None],
    num_tensors: int,
    num_outputs: int = 2,
    num_gradients: int = 1,
) -> None:
    """Give the ops ``name`` and ``name_backward``, whose schemas are defined, all they need besides kernels.

    The arguments of the backward op are gradients, the op's tensors, its outputs, the op's options, which of the
    tensors from the fourth on need a gradient, and the backend. It returns the gradients of the first tensors.

    Args:
        name: name of the op.
        forward: implementation of the op on every device, which routes by its last argument, the backend.
        backward: the same of the backward op.
        fake: allocates the op's outputs.
        fake_backward: allocates the backward op's outputs.
        flops: takes the shapes and options of the op, and counts floating point operations of the forward pass.
        num_tensors: number of tensor arguments of the op, which come first.
        num_outputs: number of outputs of the op.
        num_gradients: number of gradients that the backward op is given, those of the first outputs.
        save: takes the context, the op's tensors and its outputs, and saves them, or None for outputs that the backward
            op needs not: never an (N, N) tensor, a mask, a rolled or padded copy. ``ctx.options`` has the rest.
    """
    num_inputs = num_gradients + num_tensors
    first_option = num_inputs + num_outputs
    num_options = _num_arguments(name) - num_tensors - 1
    num_needs = _num_arguments(f"{name}_backward") - first_option - num_options - 1

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.options = inputs[num_tensors:]
        save(ctx, inputs[:num_tensors], output)

    def autograd(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if grads[0] is None:
            return (None,) * len(ctx.needs_input_grad)
        options, needs = ctx.options[:num_options], ctx.needs_input_grad[3 : 3 + num_needs]
        args = (*grads[:num_gradients], *ctx.saved_tensors, *options, *needs, *ctx.options[num_options:])
        if getattr(ctx, "numbers", None) is None:
            found = call_op(f"{name}_backward", *args)
        else:
            found = call_with_numbers(f"{name}_backward", *args, ctx.numbers)
        return (*found, *(None,) * (len(ctx.needs_input_grad) - len(found)))

    def plain(*args: Any) -> Any:
        return forward(*args[:-1], "reference")

    def plain_backward(*args: Any) -> list[Tensor | None]:
        grads, inputs, rest = args[:num_gradients], args[num_gradients:num_inputs], args[first_option:]
        options, needs = rest[:num_options], rest[num_options:-1]
        return gradients(lambda *x: forward(*x, *options, "reference"), inputs, grads, (True, True, True, *needs))

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
        implementation=forward,
        plain=plain,
        fake=fake,
        setup_context=setup_context,
        backward=autograd,
        batched=range(3),
        folds=lambda args: args[num_tensors - 1] is None,
    )
    register_transforms(
        LIBRARY,
        f"{name}_backward",
        implementation=backward,
        plain=plain_backward,
        fake=fake_backward,
        setup_context=setup_second,
        backward=second,
        batched=(*range(num_gradients + 3), *range(num_inputs, first_option)),
        # A gradient of something that the whole batch shares is a sum over it.
        folds=lambda args: args[num_inputs - 1] is None and not any(args[first_option + num_options : -1]),
    )

    def forward_flops(*args: Any, **_: Any) -> int:
        return flops(args[:num_tensors], args[num_tensors:])

    def backward_flops(*args: Any, **_: Any) -> int:
        # Five products (the scores again, dv, dP, dq, dk) where the forward pass has two.
        tensors, rest = args[num_gradients:][:num_tensors], args[num_gradients + num_tensors + num_outputs :]
        return flops(tensors, rest) * 5 // 2

    for suffix in ("", WITH_NUMBERS):
        register_flop_formula(getattr(torch.ops.vidattn, name + suffix))(forward_flops)
        register_flop_formula(getattr(torch.ops.vidattn, f"{name}_backward{suffix}"))(backward_flops)


def _num_arguments(op: str) -> int:
    return len(getattr(torch.ops.vidattn, op).default._schema.arguments)


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
    major, minor = torch.cuda.get_device_capability()
    if torch.version.hip is None and major < 8:
        return f"needs a GPU of compute capability 8.0 or later, got {major}.{minor}"
    return None


def _check_triton(call: AttentionCall) -> list[str]:
    reasons = _check_head_dim(call)
    if call.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        reasons.append(f"runs float32, bfloat16 and float16, got {call.dtype}")
    elif TRITON_INTERPRETED and call.dtype == torch.bfloat16:
        reasons.append("Triton's interpreter computes bfloat16 products wrongly; it runs float32 and float16")
    return reasons


def _check_head_dim(call: AttentionCall) -> list[str]:
    if call.head_dim > _MAX_HEAD_DIM:
        return [f"runs head dimensions up to {_MAX_HEAD_DIM}, got {call.head_dim}"]
    return []

"""Which implementation runs an attention call: cpu, cuda, triton or reference; who is chosen, and why not.

A backend named by argument, by ``use_backend`` / ``set_backend`` or by ``VIDATTN_BACKEND`` is strict: a call it
cannot run raises with all the reasons. Only "auto" falls through to the next. The argument of a call goes before
``use_backend``, which goes before the environment variable.

Kernels compute values and first derivatives: forward mode, second derivatives, traces and ONNX programs are computed by
the reference whatever the backend, in the memory that it needs.

A family of ops adds itself with ``register_op``, and each of its kernels with ``register_kernel``; nothing in
this file names a family.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from vidattn.installation import PACKAGE, build_command, pure_by_choice
from vidattn.messages import describe, shorten

__all__ = ["current_backend", "list_backends", "set_backend", "use_backend", "warmup", "why_not"]


class Backend(NamedTuple):
    """One way of running the ops.

    Attributes:
        name: what users call it.
        device_types: devices it runs on; None for any.
        when_named: further devices it runs on, but too slowly for "auto".
    """

    name: str
    device_types: tuple[str, ...] | None
    when_named: tuple[str, ...] = ()


class AttentionCall(NamedTuple):
    """What decides whether a backend can run a call; a kernel's check function reads it.

    Attributes:
        op: name of the public function.
        device_type: as in ``torch.device``.
        dtype: of q, k and v.
        head_dim: channels of a head.
        device_index: which device of this type; None where that is not known.
        group_tokens: tokens of the longest group that attends to itself, padding included; 0 if nobody asks.
        dropout_p: dropout probability.
        bias: "none" | "table" | "dense".
        needs_bias_grad: whether a gradient of the bias may be asked for.
        channel_ranges: how many ranges of channels come from other frames.
        cls_query: what the query of a cls token attends to: "own", what its group has; or "all" tokens of the clip.
        grid_options: names of the options of windows that only the reference and the CPU have.
    """

    op: str
    device_type: str
    dtype: torch.dtype
    head_dim: int
    device_index: int | None = None
    group_tokens: int = 0
    dropout_p: float = 0.0
    bias: str = "none"
    needs_bias_grad: bool = False
    channel_ranges: int = 0
    cls_query: str = "own"
    grid_options: tuple[str, ...] = ()


# Triton's own switch: its kernels then run on the CPU, one program after the other, to be tested there.
TRITON_INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")

# In the order in which "auto" tries them.
_BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("cpu", ("cpu",)),
        Backend("cuda", ("cuda",)),
        Backend("triton", ("cuda",), ("cpu",) if TRITON_INTERPRETED else ()),
        Backend("reference", None),
    )
}
_functions: dict[str, Callable[..., Any]] = {}
_kernel_missing: dict[tuple[str, str], Callable[[], str | None]] = {}
_kernel_check: dict[tuple[str, str], Callable[[AttentionCall], list[str]]] = {}

# A plain module global: Dynamo guards on it, while it cannot trace a ContextVar.
_selected: str = os.environ.get("VIDATTN_BACKEND", "auto") or "auto"
_selected_by = "VIDATTN_BACKEND"
_warned_about_fallback = False

# Given to a public function as its backend, it makes the function say what kind of call its arguments make.
_QUESTION = "?"


class _Answer(Exception):  # no error: it carries the call out of the function
    def __init__(self, call: AttentionCall) -> None:
        super().__init__()
        self.call = call


def register_op(function: Callable[..., Any]) -> None:
    """Make an op known.

    Args:
        function: the public function. It validates its arguments, then asks ``choose_backend``.
    """
    _functions[function.__name__] = function
    register_kernel(function.__name__, "reference")


def register_kernel(
    op: str,
    backend: str,
    missing: Callable[[], str | None] = lambda: None,
    check: Callable[[AttentionCall], list[str]] | None = None,
) -> None:
    """Say that an op has an implementation in a backend.

    Args:
        op: name of the public function.
        backend: name of the backend.
        missing: tells why it cannot run here (not built, a package or a device is absent); None if it can.
        check: gives the reasons why a call cannot run, beyond its device and dtype; None if there are none.
    """
    _kernel_missing[op, backend] = missing
    if check is not None:
        _kernel_check[op, backend] = check


def list_backends() -> list[str]:
    """List the names that [`use_backend`][] takes besides "auto", in the order in which "auto" tries them.

    Whether one can run is what [`why_not`][] tells.

    Returns:
        The names.

    Example:
        >>> list_backends()
        ['cpu', 'cuda', 'triton', 'reference']
    """
    return list(_BACKENDS)


def current_backend() -> str:
    """Tell the backend in force: the innermost [`use_backend`][], else [`set_backend`][] or ``VIDATTN_BACKEND``.

    Returns:
        A backend's name, or "auto".

    Raises:
        ValueError: ``VIDATTN_BACKEND`` holds an unknown name.

    Example:
        >>> with use_backend("reference"):
        ...     current_backend()
        'reference'
    """
    return _check_name(_selected, _selected_by)


def set_backend(name: str) -> None:
    """Choose the backend of all calls that do not name one, until the next ``set_backend``.

    Args:
        name: a name from [`list_backends`][], or "auto" (per call, the first backend that can run it).

    Raises:
        TypeError: the name is no string.
        ValueError: the name is unknown.

    Example:
        >>> set_backend("auto")
    """
    global _selected, _selected_by
    _selected, _selected_by = _check_name(name, "set_backend: name"), "set_backend"


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Choose the backend of the calls inside a ``with`` block; works inside and around compiled functions.

    Like any process-wide setting it is not private to a thread.

    Args:
        name: a name from [`list_backends`][], or "auto".

    Raises:
        TypeError: the name is no string.
        ValueError: the name is unknown.

    Example:
        >>> import torch, vidattn
        >>> qkv = torch.randn(1, 4, 8, 8, 3, 2, 16)
        >>> with vidattn.use_backend("reference"):
        ...     vidattn.window3d_attention(qkv, window_size=(2, 4, 4)).shape
        torch.Size([1, 4, 8, 8, 32])
    """
    global _selected, _selected_by
    _check_name(name, "use_backend: name")
    outer, outer_by = _selected, _selected_by
    _selected, _selected_by = name, "use_backend"
    try:
        yield
    finally:
        _selected, _selected_by = outer, outer_by


def why_not(op: str | Callable[..., Any], *args: Any, backend: str | None = None, **kwargs: Any) -> list[str]:
    """Explain why a backend cannot run an op, or a certain call of it.

    Args:
        op: a public attention function of this package, or its name.
        *args: arguments of the call; without any, only the installation is judged.
        backend: a backend's name; None for the one in force. For "auto" the reasons are those why no kernel runs the
            call, which then ends on the reference.
        **kwargs: keyword arguments of the call.

    Returns:
        The reasons; empty if the call can run.

    Raises:
        ValueError: the op or the backend is unknown, or the call is not valid at all.
        TypeError: the call is not valid at all.

    Example:
        >>> why_not("window3d_attention", backend="reference")
        []
    """
    name = op if isinstance(op, str) else getattr(op, "__name__", None)
    if not isinstance(name, str) or name not in _functions:
        got = shorten(name) if isinstance(name, str) else describe(op)
        raise ValueError(f"why_not: op: expected one of {', '.join(sorted(_functions))}, got {got}")
    chosen = current_backend() if backend is None else _check_name(backend, "why_not: backend")
    call = _describe_call(_functions[name], args, kwargs) if args or kwargs else None
    if chosen != "auto":
        return _reasons(name, chosen, call)
    reasons = []
    for candidate in _BACKENDS:
        if candidate != "reference":
            found = _reasons(name, candidate, call)
            if not found:
                return []
            reasons += [f"{candidate}: {reason}" for reason in found]
    return reasons


def choose_backend(call: AttentionCall, backend: str | None = None) -> str:
    """Pick the backend of a call that is about to run; "auto" warns once where only the reference is left.

    Args:
        call: what is to be run.
        backend: the call's own ``backend`` argument; None for the one in force.

    Returns:
        A backend's name, never "auto".

    Raises:
        ValueError: the name is unknown, or the named backend cannot run the call.
    """
    chosen = find_backend(call, backend)
    if chosen == "reference" and not torch.compiler.is_compiling() and (backend or _selected) == "auto":
        _warn_about_fallback(call)
    return chosen


def find_backend(call: AttentionCall, backend: str | None = None) -> str:
    """Tell which backend a call would take; like ``choose_backend``, without its warning."""
    if backend is _QUESTION:
        raise _Answer(call)
    name = _check_name(_selected, _selected_by) if backend is None else _check_name(backend, f"{call.op}: backend")
    if name != "auto":
        reasons = _reasons(call.op, name, call)
        if reasons:
            by = "" if backend is not None else f" (chosen by {_selected_by})"
            raise ValueError(f"{call.op}: backend {name!r}{by} cannot run this call: {'; '.join(reasons)}")
        return name
    for candidate in _BACKENDS:
        if call.device_type in _BACKENDS[candidate].when_named or candidate == "reference":
            continue
        if not _reasons(call.op, candidate, call):
            return candidate
    return "reference"


def why_reference(call: AttentionCall) -> str:
    """Say why "auto" leaves a call to the reference, and which command builds the kernels that are missing.

    Args:
        call: a call for which ``find_backend`` gives "reference".

    Returns:
        The reasons of the backends for its device; without a command where nobody wanted kernels.
    """
    reasons = [
        f"{name}: {reason}"
        for name, backend in _BACKENDS.items()
        if backend.device_types is not None and call.device_type in backend.device_types
        for reason in _reasons(call.op, name, call)
    ]
    text = "; ".join(reasons) or f"no backend has kernels for {call.device_type}"
    missing = _kernel_missing.get((call.op, "cpu"), lambda: None)()
    if call.device_type == "cpu" and missing is not None and not pure_by_choice():
        text += f". This builds them: {build_command()}"
    return text


def warmup(model: torch.nn.Module, batch: Any) -> None:
    """Run a model once on a batch, so that whatever is set up at the first call is set up.

    In training mode a backward pass runs too; parameter gradients and the training state are left as they were.

    Args:
        model: any module.
        batch: what it takes: a tensor, a tuple of positional or a dict of keyword arguments.

    Raises:
        TypeError: the model is none.

    Example:
        >>> import torch
        >>> warmup(torch.nn.Linear(4, 2).eval(), torch.randn(1, 4))
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"warmup: model: expected a torch.nn.Module, got {describe(model)}")
    if not model.training:
        with torch.no_grad():
            call_model(model, batch)
        return
    state = [buffer.detach().clone() for buffer in model.buffers()]  # batch statistics must not see the batch twice
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with torch.enable_grad():
        outputs = tensor_leaves(call_model(model, batch))
        differentiable = [output for output in outputs if output.requires_grad]
        if differentiable and parameters:
            loss = torch.stack([output.float().sum() for output in differentiable]).sum()
            torch.autograd.grad(loss, parameters, allow_unused=True)
    with torch.no_grad():
        for buffer, value in zip(model.buffers(), state, strict=True):
            buffer.copy_(value)


def call_model(model: torch.nn.Module, batch: Any) -> Any:
    """Call a model on a tensor, on a tuple or list of arguments, or on a dict of keyword arguments."""
    if isinstance(batch, dict):
        return model(**batch)
    if isinstance(batch, (tuple, list)):
        return model(*batch)
    return model(batch)


def tensor_leaves(output: Any) -> list[Tensor]:
    """Collect the tensors of a nested output."""
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


def _describe_call(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> AttentionCall:
    """Say what kind of call a public function would make of its arguments, which it validates."""
    try:
        inspect.signature(function).bind(*args, **kwargs)
    except TypeError as error:
        name = function.__name__
        raise TypeError(f"why_not: *args: expected the arguments of {name}, got others: {error}") from error
    try:
        function(*args, **kwargs, backend=_QUESTION)
    except _Answer as answer:
        return answer.call
    raise AssertionError(f"{function.__name__} did not ask for a backend")


def _check_name(name: str, source: str) -> str:
    if not isinstance(name, str):
        raise TypeError(f"{source}: expected one of auto, {', '.join(_BACKENDS)}, got {describe(name)}")
    if name != "auto" and name not in _BACKENDS:
        raise ValueError(f"{source}: expected one of auto, {', '.join(_BACKENDS)}, got {describe(name)}")
    return name


def _reasons(op: str, name: str, call: AttentionCall | None) -> list[str]:
    """Give all the reasons why a backend cannot run a call, or any call at all when ``call`` is None."""
    if (op, name) not in _kernel_missing:
        return [f"this version has no {name} kernels for {op}"]
    reasons = []
    missing = _kernel_missing[op, name]()
    if missing is not None:
        reasons.append(missing)
    if call is None:
        return reasons
    device_types = _BACKENDS[name].device_types
    if device_types is not None:
        device_types += _BACKENDS[name].when_named
    # Meta tensors hold no data, so any backend "runs" them: only shapes are computed.
    if device_types is not None and call.device_type != "meta" and call.device_type not in device_types:
        reasons.append(f"runs {' and '.join(device_types)} tensors, got a {call.device_type} tensor")
    check = _kernel_check.get((op, name))
    if check is not None:
        reasons += check(call)
    return reasons


def _warn_about_fallback(call: AttentionCall) -> None:
    global _warned_about_fallback
    wanted = call.device_type == "cuda" or (call.device_type == "cpu" and not pure_by_choice())
    if _warned_about_fallback or not wanted:
        return
    _warned_about_fallback = True
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(str(PACKAGE)):
        level, frame = level + 1, frame.f_back
    warnings.warn(
        f"{call.op}: no kernel runs this call on {call.device_type}, so it takes the reference, which is slow and needs"
        f" much memory ({why_reference(call)}). Who wants the reference names it: VIDATTN_BACKEND=reference,"
        " vidattn.use_backend. This warning is shown once",
        stacklevel=level,  # of the caller's own code
    )

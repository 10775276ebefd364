"""What ``torch.func``, forward mode, tracing and export do with the ops.

Kernels compute values and first derivatives. Everything else goes through the reference, whatever the backend:

* forward mode (``torch.func.jvp``, ``jacfwd``, dual tensors) and recordings (``torch.jit.trace``, ONNX) take plain
  PyTorch in the place of the op;
* the other transforms of ``torch.func`` keep the op, with a ``torch.autograd.Function`` that tells them how;
* second derivatives differentiate the gradient of the plain PyTorch, so the first pass saves nothing for them.

Plain PyTorch needs memory for all scores.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._decomp import register_decomposition
from torch._library.utils import get_layout_constraint_tag
from torch.autograd import forward_ad

from vidattn.tracing import is_symbolic

__all__ = ["call_op", "gradients", "register_transforms"]


class _Op(NamedTuple):
    """How a transform sees an op.

    Attributes:
        op: itself.
        plain: takes the op's arguments and computes it in differentiable PyTorch.
        function: the op with its derivative, for the transforms of ``torch.func``.
        numbers: places of its floating point arguments.
    """

    op: Callable[..., Any]
    plain: Callable[..., Any]
    function: type[torch.autograd.Function]
    numbers: tuple[int, ...]


# Of the variant of an op that call_with_numbers calls.
WITH_NUMBERS = "_with_numbers"

_ops: dict[str, _Op] = {}


def call_op(name: str, *args: Any) -> Any:
    """Call an op of ``torch.ops.vidattn``, or what a transform that is active can see through.

    Args:
        name: name of the op.
        *args: all its arguments.

    Returns:
        What the op returns.
    """
    if type(args[0]).__name__ == "DTensor":
        from vidattn.distributed.rules import call_by_heads  # how DTensors are sharded, which takes long to import

        found = call_by_heads(name, args)
        if found is not None:
            return found
    transformed = torch._C._are_functorch_transforms_active()
    if forward_ad._current_level >= 0 or torch.jit.is_tracing() or (transformed and torch.compiler.is_compiling()):
        return _ops[name].plain(*args)
    if transformed:
        return _ops[name].function.apply(*args)
    if torch.compiler.is_compiling():
        numbers = [args[place] for place in _ops[name].numbers]
        if is_symbolic(*numbers):
            one = torch.ones((), dtype=torch.float64)
            return call_with_numbers(name, *args, torch.stack([one * number for number in numbers]))
    elif not torch.is_grad_enabled():
        with torch._C._AutoDispatchBelowAutograd():  # its step would be Python, which takes long when no cache has it
            return _ops[name].op(*args)
    return _ops[name].op(*args)


def call_with_numbers(name: str, *args: Any) -> Any:
    """Call an op whose floating point arguments are in a tensor, which comes last: see ``is_symbolic``.

    Args:
        name: name of the op.
        *args: all its arguments and the tensor.

    Returns:
        What the op returns.
    """
    places = _ops[name].numbers
    known = (0.0 if place in places else arg for place, arg in enumerate(args))
    return getattr(torch.ops.vidattn, name + WITH_NUMBERS)(*known)


def gradients(
    plain: Callable[..., Any],
    tensors: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
    needed: Sequence[bool],
) -> list[Tensor | None]:
    """Differentiate plain PyTorch, differentiably.

    Args:
        plain: takes the tensors.
        tensors: its arguments.
        grads: gradients of its first results; None for those that do not count.
        needed: which of the first tensors get a gradient, if they are there.

    Returns:
        One gradient for each entry of ``needed``; None where it is not wanted.
    """
    places = [place for place, wanted in enumerate(needed) if wanted and tensors[place] is not None]
    given = tuple(grad for grad in grads if grad is not None)
    if not places or not given:
        return [None] * len(needed)

    def counted(*values: Tensor) -> tuple[Tensor, ...]:
        arguments = list(tensors)
        for place, value in zip(places, values, strict=True):
            arguments[place] = value
        return tuple(result for result, grad in zip(plain(*arguments), grads) if grad is not None)

    _, pull_back, *_ = torch.func.vjp(counted, *(tensors[place] for place in places))
    found = dict(zip(places, pull_back(given), strict=True))
    return [found.get(place) for place in range(len(needed))]


def register_transforms(
    library: torch.library.Library,
    name: str,
    *,
    implementation: Callable[..., Any],
    plain: Callable[..., Any],
    fake: Callable[..., Any],
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
    batched: Sequence[int],
    folds: Callable[[Sequence[Any]], bool] = lambda args: True,
) -> None:
    """Register an op, its fake and its derivative, and tell the transforms about it.

    Args:
        library: what its schema was defined with.
        name: name of the op.
        implementation: of the op, on every device.
        plain: takes the op's arguments and computes it in differentiable PyTorch.
        fake: allocates the op's outputs.
        setup_context: as ``torch.library.register_autograd`` takes it; ``ctx.numbers`` is set.
        backward: the same.
        batched: places of the arguments whose first dimension is the batch, as it is that of all outputs.
        folds: takes the op's arguments, and says whether a call of a bigger batch gives what calls for its parts give.
    """
    op = getattr(torch.ops.vidattn, name).default

    def vmap(info: Any, in_dims: Sequence[Any], *args: Any) -> tuple[Any, Any]:
        mapped = [place for place, dim in enumerate(in_dims) if isinstance(dim, int)]
        if folds(args) and all(place in batched for place in mapped):
            folded = list(args)
            for place in batched:
                if args[place] is not None:
                    folded[place] = _first(args[place], in_dims[place], info.batch_size).flatten(0, 1)
            results = op(*folded)
            split = _over(results, lambda x: x.unflatten(0, (info.batch_size, x.shape[0] // info.batch_size)))
        else:
            rows = []
            for number in range(info.batch_size):
                row = list(args)
                for place in mapped:
                    row[place] = args[place].select(in_dims[place], number)
                rows.append(op(*row))
            if isinstance(rows[0], Tensor):
                return torch.stack(rows), 0
            split = tuple(None if column[0] is None else torch.stack(column) for column in zip(*rows, strict=True))
        return split, _over(split, lambda x: 0)

    function = type(
        f"{name}_function",
        (torch.autograd.Function,),
        {
            "forward": staticmethod(lambda *args: op(*args)),
            "setup_context": staticmethod(setup_context),
            "backward": staticmethod(backward),
            "generate_vmap_rule": True,
        },
    )
    numbers = tuple(place for place, arg in enumerate(op._schema.arguments) if str(arg.type) == "float")
    _ops[name] = _Op(op, plain, function, numbers)
    _register(library, name, implementation, plain, fake, setup_context, backward)
    torch.library.register_vmap(f"vidattn::{name}", vmap, lib=library)
    # ONNX has standard operators alone. Fake tensors would take a decomposition too if there were no meta function.
    register_decomposition(op)(plain)
    register_decomposition(op, type="meta")(fake)
    if not numbers:
        return

    def filled(args: Sequence[Any], known: Sequence[Any]) -> list[Any]:
        found = dict(zip(numbers, known, strict=True))
        return [found.get(place, arg) for place, arg in enumerate(args)]

    def setup_with_numbers(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.numbers = inputs[-1]
        setup_context(ctx, tuple(filled(inputs[:-1], inputs[-1].unbind())), output)

    schema = str(op._schema).replace(name, name + WITH_NUMBERS, 1).replace(") ->", ", Tensor numbers) ->", 1)
    library.define(schema.removeprefix("vidattn::"), tags=op.tags)
    _register(
        library,
        name + WITH_NUMBERS,
        lambda *args: implementation(*filled(args[:-1], args[-1].tolist())),
        lambda *args: plain(*filled(args[:-1], args[-1].unbind())),
        lambda *args: fake(*args[:-1]),
        setup_with_numbers,
        backward,
    )


def _register(
    library: torch.library.Library,
    name: str,
    implementation: Callable[..., Any],
    plain: Callable[..., Any],
    fake: Callable[..., Any],
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
) -> None:
    op = getattr(torch.ops.vidattn, name).default

    def fake_and_kept(*args: Any) -> Any:
        _keep_op(op)
        return fake(*args)

    library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"vidattn::{name}", fake_and_kept, lib=library)
    below = torch._C._after_autograd_keyset

    def forward(ctx: Any, *args: Any) -> Any:
        inputs, keyset = args[:-1], args[-1]
        with torch._C._AutoDispatchBelowAutograd():
            results = op.redispatch(keyset & below, *inputs)
        setup_context(ctx, inputs, results)
        return results

    # torch.library.register_autograd makes the same, but reads the schema anew in every call, a third of its time.
    recorded: Any = type(
        f"{name}_recorded",
        (torch.autograd.Function,),
        {
            "forward": staticmethod(forward),
            "backward": staticmethod(lambda ctx, *grads: (*backward(ctx, *grads), None)),  # none for the keyset
        },
    )

    # What autograd sees of a call that came by no public function.
    def autograd(keyset: Any, *args: Any) -> Any:
        if forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
            return plain(*args)
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args):
            return recorded.apply(*args, keyset)
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & below, *args)

    library.impl(name, autograd, "Autograd", with_keyset=True)


def _keep_op(op: torch._ops.OpOverload) -> None:
    """Tell inductor to call an op, where the environment has ``CI``.

    Inductor calls an op that it cannot lower. With ``CI`` set (as GitHub Actions does) it raises instead where the op
    has a decomposition, even one that only ONNX asks for. It traces the op before, so that the fake is in time to say
    so; the package does not load inductor itself, which takes a second.
    """
    lowering = sys.modules.get("torch._inductor.lowering")
    if lowering is not None and op not in lowering.lowerings:
        constraint = lowering.tag_to_layout_constraint(get_layout_constraint_tag(op, with_default=True))
        lowering.make_fallback(op, layout_constraint=constraint, warn=False)


def _first(x: Tensor, dim: int | None, size: int) -> Tensor:
    return x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)


def _over(results: Any, do: Callable[[Tensor], Any]) -> Any:
    if isinstance(results, Tensor):
        return do(results)
    return tuple(None if x is None else do(x) for x in results)

"""Swap the attention of an existing model for its accelerated twin: in place, per instance, reversibly.

A twin (see :mod:`vidattn.nn`) is a subclass of the module it replaces, with the same parameters and buffers, so
swapping is an assignment to the instance's ``__class__``: parents, hooks, state dict, optimizers and device moves do
not notice.
"""

from __future__ import annotations

import contextlib
import copy
import pkgutil
from collections.abc import Iterator
from types import TracebackType
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from vidattn.backends import call_model, current_backend, tensor_leaves, why_not

__all__ = ["Acceleration", "SkippedModule", "SwappedModule", "Twin", "accelerate", "register_twin"]


class Twin:
    """What every accelerated twin is, besides a subclass of the module it replaces.

    Attributes:
        ops: public attention functions it calls.
        attention_backend: backend of its calls; None for the one in force.
    """

    ops: ClassVar[tuple[str, ...]] = ()
    attention_backend: str | None = None

    @staticmethod
    def refuse(module: Any) -> str | None:
        """Say why an instance of the original class cannot become this twin; None if it can."""
        return None


class SwappedModule(NamedTuple):
    """A module that was swapped: its name in the model, its class before and after."""

    name: str
    original: type
    twin: type


class SkippedModule(NamedTuple):
    """A module that could have been swapped and was not: its name in the model, its class, and why."""

    name: str
    kind: type
    reason: str


# By qualified name, so that neither a foreign library nor a twin is imported before a model needs it.
_twins: dict[str, str] = {}


def register_twin(original: str, twin: str) -> None:
    """Make a twin known to :func:`accelerate`.

    Args:
        original: qualified name of the class to replace, ``"package.module.Class"``.
        twin: where its twin is, ``"package.module:Class"``; a subclass of :class:`Twin` and of the original.

    Example:
        >>> register_twin("vidattn.models.video_swin.BasicLayer", "vidattn.nn:FusedBasicLayer")
    """
    _twins[original] = twin


class Acceleration:
    """What :func:`accelerate` did to a model; ``str()`` lists it, ``revert()`` or the end of a ``with`` undoes it.

    Attributes:
        swapped: modules that were swapped.
        skipped: modules that could have been swapped and were not, with the reason.
        max_difference: largest absolute difference between the outputs before and after; None without ``verify``.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.swapped: list[SwappedModule] = []
        self.skipped: list[SkippedModule] = []
        self.max_difference: float | None = None
        self._undo: list[tuple[nn.Module, type, type, str | None]] = []

    def revert(self) -> None:
        """Give every swapped module its class (and, if it was accelerated before, its backend) back."""
        for module, twin, previous, backend in reversed(self._undo):
            if type(module) is not twin:  # somebody else has changed it since
                continue
            module.__class__ = previous
            module.__dict__.pop("attention_backend", None)
            if backend is not None:
                module.__dict__["attention_backend"] = backend
        self._undo.clear()

    def __enter__(self) -> Acceleration:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.revert()

    def __str__(self) -> str:
        model = type(self.model).__name__
        if not self.swapped and not self.skipped:
            return f"accelerate({model}): nothing to swap, the model holds no attention module with a twin"
        lines = [f"accelerate({model}): {len(self.swapped)} swapped, {len(self.skipped)} skipped"]
        width = max(len(name) for name in [row.name for row in self.swapped] + [row.name for row in self.skipped])
        lines += [f"  {row.name:{width}}  {row.original.__name__} -> {row.twin.__name__}" for row in self.swapped]
        lines += [f"  {row.name:{width}}  {row.kind.__name__} skipped: {row.reason}" for row in self.skipped]
        if self.max_difference is not None:
            lines.append(f"  verified: largest difference of the outputs {self.max_difference:.2e}")
        return "\n".join(lines)

    __repr__ = __str__


def accelerate(model: nn.Module, *, backend: str | None = None, verify: Any = None) -> Acceleration:
    """Swap the attention modules of a model for their accelerated twins, in place.

    Parameters, buffers, state dict, hooks, training mode and devices stay as they are, and the model computes the same
    function. Modules of a subclass, with overridden methods or with a position index of their own are skipped. A module
    whose attention probabilities somebody watches with a hook keeps computing them. Accelerating twice changes nothing.
    Stochastic depth draws the random numbers that it drew before; dropout inside an attention may draw others.

    Args:
        model: any module; the root too may be swapped.
        backend: backend of all swapped modules, strict; None for the one in force at each call.
        verify: a batch (a tensor, a tuple of positional or a dict of keyword arguments) on which the outputs before and
            after are compared, in eval mode without gradients. They may be off a float64 copy of the model by twice as
            much as the original's are, plus four units in the last place of the largest output.

    Returns:
        A report: ``print()`` it, ``revert()`` it, or use it in a ``with`` statement.

    Raises:
        ValueError: the backend is unknown or cannot run here.
        TypeError: ``model`` is not a module.
        RuntimeError: the outputs differ by more than that or are not finite; the model is left as it was.

    Reference:
        Video Swin Transformer, arXiv 2106.13230, section 3.2; TimeSformer, arXiv 2102.05095, section 3; ViViT, arXiv
        2103.15691, section 3.3: for the modules bundled here.

    Example:
        >>> import torch, vidattn
        >>> from vidattn.models.video_swin import SwinTransformer3D
        >>> model = SwinTransformer3D(embed_dim=12, depths=(2,), num_heads=(2,), window_size=(2, 3, 3)).eval()
        >>> with vidattn.accelerate(model, verify=torch.randn(1, 3, 4, 16, 16)) as acceleration:
        ...     len(acceleration.swapped), len(acceleration.skipped)
        (5, 0)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"accelerate: model: expected a torch.nn.Module, got {type(model).__name__}")
    if backend is None:
        current_backend()  # an unknown name in the environment shall raise here rather than in the middle of a step
    result = Acceleration(model)
    plan = _plan(model, backend, result)
    for op in sorted({op for _, _, twin in plan for op in twin.ops}):
        reasons = [] if backend in (None, "auto") else why_not(op, backend=backend)
        if reasons:
            raise ValueError(f"accelerate: backend {backend!r} cannot run {op}: {'; '.join(reasons)}")
    before = None if verify is None else _outputs(model, verify)
    exact = None if verify is None else _exact_outputs(model, verify)
    for name, module, twin in plan:
        previous: type = type(module)
        result._undo.append((module, twin, previous, module.__dict__.get("attention_backend")))
        result.swapped.append(SwappedModule(name, previous, twin))
        module.__class__ = twin  # type: ignore[assignment]  # of this module's class too
        module.__dict__.pop("attention_backend", None)
        if backend is not None:
            module.__dict__["attention_backend"] = backend
    if before is not None and exact is not None:
        try:
            result.max_difference = _compare(before, _outputs(model, verify), exact)
        except BaseException:
            result.revert()
            raise
    return result


def _plan(model: nn.Module, backend: str | None, result: Acceleration) -> list[tuple[str, nn.Module, type[Twin]]]:
    """Find what to swap, and note in the result what is skipped."""
    if backend not in (None, "auto"):
        why_not("window3d_attention", backend=backend)  # raises for an unknown name even if there is nothing to swap
    plan: list[tuple[str, nn.Module, type[Twin]]] = []
    for name, module in model.named_modules():
        kind: type = type(module)
        if issubclass(kind, Twin):
            if backend is None or module.attention_backend == backend:
                result.skipped.append(SkippedModule(name, kind, "accelerated already"))
            else:
                plan.append((name, module, kind))
            continue
        registered = _twins.get(_qualified_name(kind))
        if registered is None:
            base = next((base for base in kind.__mro__[1:] if _qualified_name(base) in _twins), None)
            if base is not None:
                result.skipped.append(SkippedModule(name, kind, f"a subclass of {base.__name__}, which may differ"))
            continue
        twin = pkgutil.resolve_name(registered)
        reason = why_overridden(module) or twin.refuse(module)
        if reason is None:
            plan.append((name, module, twin))
        else:
            result.skipped.append(SkippedModule(name, kind, reason))
    return plan


def why_overridden(module: nn.Module) -> str | None:
    """Say which methods of its class an instance replaces; None if it replaces none."""
    names = [name for name in vars(module) if callable(getattr(type(module), name, None))]
    return f"the instance overrides {', '.join(sorted(names))}" if names else None


def _qualified_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module in eval mode, and each back as it was (``train()`` would not know frozen stages)."""
    modes = [(module, module.training) for module in model.modules()]
    for module, _ in modes:
        module.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def _outputs(model: nn.Module, batch: Any) -> list[Tensor]:
    with _evaluating(model):
        return [leaf for leaf in tensor_leaves(call_model(model, batch)) if leaf.is_floating_point()]


def _exact_outputs(model: nn.Module, batch: Any) -> list[Tensor]:
    """Run a float64 copy of the model."""

    def widen(value: Any) -> Any:
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    try:
        return _outputs(copy.deepcopy(model).double(), tree_map(widen, batch))
    except RuntimeError as error:
        raise RuntimeError(
            f"accelerate: verify needs to run a float64 copy of the model, which failed: {error}"
        ) from error


def _compare(before: list[Tensor], after: list[Tensor], exact: list[Tensor]) -> float:
    """Hold the accelerated outputs against the exact ones; return their largest difference from those before."""
    largest = 0.0
    for index, (old, new, true) in enumerate(zip(before, after, exact, strict=True)):
        if old.numel() == 0:
            continue
        floor = 4 * torch.finfo(old.dtype).eps * true.abs().max().item()
        allowed = 2 * (old.double() - true).abs().max().item() + floor
        error = (new.double() - true).abs().max().item()
        if not error <= allowed:  # a NaN compares false
            raise RuntimeError(
                f"accelerate: verify: expected output {index} within {allowed:.3e} of a float64 run, got {error:.3e}"
            )
        largest = max(largest, (new.double() - old.double()).abs().max().item())
    return largest


register_twin("vidattn.models.video_swin.BasicLayer", "vidattn.nn:FusedBasicLayer")
register_twin("vidattn.models.video_swin.SwinTransformerBlock3D", "vidattn.nn:FusedSwinTransformerBlock3D")
register_twin("vidattn.models.video_swin.WindowAttention3D", "vidattn.nn:FusedWindowAttention3D")
register_twin("vidattn.models.timesformer.Attention", "vidattn.nn:FusedAttention")
register_twin("vidattn.models.timesformer.Block", "vidattn.nn:FusedBlock")
register_twin(
    "vidattn.models.vivit_layers.MultiHeadDotProductAttention", "vidattn.nn:FusedMultiHeadDotProductAttention"
)
register_twin("vidattn.models.xvit_layers.Attention", "vidattn.nn:FusedMixingAttention")

"""Swap the attention of an existing model for its accelerated twin: in place, per instance, reversibly.

A twin (see ``vidattn.nn``) is a subclass of the module it replaces, with the same parameters and buffers, so
swapping is an assignment to the instance's ``__class__``: parents, hooks, state dict, optimizers and device moves do
not notice.
"""

from __future__ import annotations

import contextlib
import pkgutil
import warnings
from collections.abc import Iterator
from types import TracebackType
from typing import Any, NamedTuple

from torch import Tensor, nn

from vidattn import integrations
from vidattn.backends import AttentionCall, current_backend, find_backend, list_backends, why_not, why_reference
from vidattn.twins import TWINS, Twin, register_twin, why_overridden
from vidattn.verify import Verification

__all__ = ["Acceleration", "SkippedModule", "SwappedModule", "accelerate"]


class SwappedModule(NamedTuple):
    """A module that was swapped: its name in the model, its class before and after."""

    name: str
    original: type
    twin: type[Twin]


class SkippedModule(NamedTuple):
    """A module that could have been swapped and was not: its name in the model, its class, and why."""

    name: str
    kind: type
    reason: str


class Acceleration:
    """What [`accelerate`][] did to a model; ``str()`` lists it, ``revert()`` or the end of a ``with`` undoes it.

    Attributes:
        swapped: modules that were swapped.
        skipped: modules that could have been swapped and were not, with the reason.
        max_difference: largest absolute difference between the outputs before and after; None without ``verify``.
        kept: modules that ``revert()`` could not give their class back, with the reason.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.swapped: list[SwappedModule] = []
        self.skipped: list[SkippedModule] = []
        self.max_difference: float | None = None
        self.kept: list[SkippedModule] = []
        self._undo: list[tuple[str, Any, type, type, dict[str, Any]]] = []

    def revert(self) -> None:
        """Give every swapped module its class (and, if it was accelerated before, its settings) back.

        A module whose class or ``forward`` somebody has changed since stays as it is, for what they put there may call
        the twin: a warning, ``kept`` and the report name it.

        Warns:
            UserWarning: some modules could not be reverted.
        """
        kept = []
        for name, module, twin, previous, settings in reversed(self._undo):
            reason = None if type(module) is twin else f"somebody made it a {type(module).__name__}"
            reason = reason or why_overridden(module)
            if reason is not None:
                kept.append(SkippedModule(name, type(module), reason))
                continue
            module.drop_derived()
            module.__class__ = previous
            _change_settings(module, settings)
        self._undo.clear()
        self.kept += kept
        if kept:
            rows = "; ".join(f"{row.name or 'the model itself'}: {row.reason}" for row in kept)
            warnings.warn(f"accelerate: revert: {len(kept)} modules stay as they are: {rows}", stacklevel=2)

    @contextlib.contextmanager
    def _alone(self, name: str) -> Iterator[None]:
        """Leave one module swapped; the others are what they were."""
        others = [(module, twin, previous) for row, module, twin, previous, _ in self._undo if row != name]
        for module, _, previous in others:
            module.__class__ = previous
        try:
            yield
        finally:
            for module, twin, _ in others:
                module.__class__ = twin

    def __enter__(self) -> Acceleration:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.revert()

    @property
    def backends(self) -> dict[str, str]:
        """What will compute the attention of each swapped module that computes any, for its device and dtype now.

        The name of a backend, several with "and" between them, or why none can.
        """
        found = {row.name: [backend for backend, _ in self._calls(row)] for row in self.swapped}
        return {name: " and ".join(dict.fromkeys(backends)) for name, backends in found.items() if backends}

    def _calls(self, row: SwappedModule) -> Iterator[tuple[str, AttentionCall]]:
        """Yield the calls that a swapped module may make, each behind the backend that would run it."""
        try:
            module: Any = self.model.get_submodule(row.name)
        except AttributeError:  # somebody has moved it since
            return
        weight = next((parameter for parameter in module.parameters() if parameter.is_floating_point()), None)
        if weight is None or not issubclass(type(module), row.twin):
            return
        for op in row.twin.ops:  # type: ignore[attr-defined]
            call = AttentionCall(op, weight.device.type, weight.dtype, _head_dim(module), weight.device.index)
            if weight.is_meta:
                yield "chosen when it has a device", call
                continue
            try:
                yield find_backend(call, getattr(module, "attention_backend", None)), call
            except ValueError as error:
                yield f"none: {error}", call

    def why_no_kernel(self) -> str | None:
        """Say why modules take the reference, on which the model is no faster than it was; None if none does."""
        for row in self.swapped:
            for backend, call in self._calls(row):
                if backend == "reference":
                    named = getattr(self.model.get_submodule(row.name), "attention_backend", None) or current_backend()
                    return "it was named" if named != "auto" else why_reference(call)
        return None

    def __str__(self) -> str:
        model = type(self.model).__name__
        if not self.swapped and not self.skipped:
            return "\n".join([f"accelerate({model}): nothing to swap", *_what_is_known(self.model)])
        lines = [f"accelerate({model}): {len(self.swapped)} swapped, {len(self.skipped)} skipped"]
        width = max(len(name) for name in [row.name for row in self.swapped] + [row.name for row in self.skipped])
        backends = {name: f", backend {backend}" for name, backend in self.backends.items()}
        lines += [
            f"  {row.name:{width}}  {row.original.__name__} -> {row.twin.title}{backends.get(row.name, '')}"
            for row in self.swapped
        ]
        lines += [f"  {row.name:{width}}  {row.kind.__name__} skipped: {row.reason}" for row in self.skipped]
        lines += [f"  {row.name:{width}}  {row.kind.__name__} not reverted: {row.reason}" for row in self.kept]
        reason = self.why_no_kernel()
        if reason is not None:
            lines.append(f"  the reference computes the same, but no faster than the model did before: {reason}")
        if self.max_difference is not None:
            lines.append(f"  verified: largest difference of the outputs {self.max_difference:.2e}")
        return "\n".join(lines)

    __repr__ = __str__


def accelerate(
    model: nn.Module,
    *,
    backend: str | None = None,
    verify: Any = None,
    verify_gradients: bool = False,
    frozen: bool = False,
    accept_untested: bool = False,
) -> Acceleration:
    """Swap the attention modules of a model for their accelerated twins, in place.

    Parameters, buffers, state dict, hooks, training mode and devices stay as they are, and the model computes the same
    function. It may be a model that is bundled here, or one of another library in a version that was tested, see
    ``vidattn.integrations``. Modules of a subclass, with overridden methods or with a position index of their own
    are skipped. A module whose attention probabilities somebody watches with a hook keeps computing them. Accelerating
    twice changes nothing. Stochastic depth draws the random numbers that it drew before; dropout inside an attention
    may draw others.

    What happens to a module afterwards is found out at every call: hooks, wrappers, adapters, a ``forward`` or a class
    that somebody changes, weights that are moved or replaced. Where a module is no longer what its twin stands for, the
    original's code runs, with the ops where they are still exact. Changes after ``torch.compile`` are those that it
    sees itself.

    Args:
        model: any module; the root too may be swapped.
        backend: backend of all swapped modules, strict; None for the one in force at each call.
        verify: a batch (a tensor, a tuple of positional or a dict of keyword arguments) on which the outputs before and
            after are compared, in eval mode without gradients. They may be off a float64 copy of the model by twice as
            much as the original's are, plus four units in the last place of the largest output. Otherwise an error
            names the module that is furthest off.
        verify_gradients: compare the gradients of inputs and parameters too, in eval mode; they may be off by three
            times as much as the original's.
        frozen: allow the twins to keep what they derive from parameters: for TimeSformer in inference, one matrix in
            place of two projections in a row. ``load_state_dict``, ``.to()``, ``train()`` and ``revert()`` drop it, and
            so does a parameter that is replaced, or changed in a way that PyTorch counts. What it cannot see: fused
            optimizers, writes through ``.data``, NumPy views and memory shared with another process. Without it nothing
            that is made of parameters outlives a call.
        accept_untested: swap modules of other libraries too whose code has the fingerprint of no version that was
            tested. It needs ``verify``.

    Returns:
        A report: ``print()`` it, ``revert()`` it, or use it in a ``with`` statement.

    Raises:
        ValueError: the backend is unknown or cannot run here, ``frozen`` and a parameter requires a gradient, or an
            option that needs ``verify`` comes without it.
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
    elif backend not in (known := ["auto", *list_backends()]):
        raise ValueError(f"accelerate: backend: expected one of {', '.join(known)}, got {backend!r}")
    result = Acceleration(model)
    if verify is None:
        for argument, value in {"verify_gradients": verify_gradients, "accept_untested": accept_untested}.items():
            if value:
                raise ValueError(f"accelerate: {argument}: expected a batch as verify with it, got none")
    plan = _plan(model, backend, frozen, accept_untested, result)
    for op in sorted({op for _, _, twin in plan for op in twin.ops}):
        reasons = [] if backend in (None, "auto") else why_not(op, backend=backend)
        if reasons:
            raise ValueError(f"accelerate: backend {backend!r} cannot run {op}: {'; '.join(reasons)}")
    if frozen:
        learned = [f"{name}.{row}".lstrip(".") for name, module, twin in plan for row in twin.learned_if_frozen(module)]
        if learned:
            raise ValueError(
                "accelerate: frozen: expected parameters without gradients, call model.requires_grad_(False) first; got"
                f" {len(learned)} that require one, the first is {learned[0]}"
            )
    verification = None if verify is None else Verification(model, verify, verify_gradients)
    for name, module, twin in plan:
        previous: type = type(module)
        settings = {key: module.__dict__[key] for key in _SETTINGS if key in module.__dict__}
        result._undo.append((name, module, twin, previous, settings))
        result.swapped.append(SwappedModule(name, previous, twin))
        module.__class__ = twin  # type: ignore[assignment]  # of this module's class too
        _change_settings(module, {"attention_backend": backend, "frozen": frozen})
    if verification is not None:
        try:
            result.max_difference = verification.check(result._alone, [row.name for row in result.swapped])
        except BaseException:
            result.revert()
            raise
    return result


_SETTINGS = ("attention_backend", "frozen")


def _change_settings(module: nn.Module, settings: dict[str, Any]) -> None:
    """Give a module these settings and no others; what is a twin's default is not written."""
    for key in _SETTINGS:
        module.__dict__.pop(key, None)
        if settings.get(key) not in (None, False):
            module.__dict__[key] = settings[key]


def _plan(
    model: nn.Module, backend: str | None, frozen: bool, accept_untested: bool, result: Acceleration
) -> list[tuple[str, nn.Module, type[Twin]]]:
    """Find what to swap, and note in the result what is skipped."""
    plan: list[tuple[str, nn.Module, type[Twin]]] = []
    for name, module in model.named_modules():
        kind: type = type(module)
        if issubclass(kind, Twin):
            if (backend is None or module.attention_backend == backend) and module.frozen == frozen:
                result.skipped.append(SkippedModule(name, kind, "accelerated already"))
            else:
                plan.append((name, module, kind))
            continue
        found = _find(module)
        if found is None:
            continue
        reason = why_overridden(module)
        if reason is None and found.twin is not None:
            reason = found.twin.refuse(module)
        if reason is None and not (found.tested or (accept_untested and found.twin is not None)):
            reason = found.reason
        if reason is None and found.twin is not None:
            plan.append((name, module, found.twin))
        else:
            result.skipped.append(SkippedModule(name, kind, str(reason)))
    return plan


def _find(module: nn.Module) -> integrations.Found | None:
    """Find the twin of a bundled module, or of one of another library."""
    kind: type = type(module)
    registered = TWINS.get(_qualified_name(kind))
    if registered is not None:
        return integrations.Found(pkgutil.resolve_name(registered), None, True)
    base = next((base for base in kind.__mro__[1:] if _qualified_name(base) in TWINS), None)
    if base is not None:
        return integrations.Found(None, f"a subclass of {base.__name__}, which may differ", False)
    return integrations.find(module)


def _head_dim(module: nn.Module) -> int:
    """Tell the channels of a head from the first module that says so, or has a packed projection; 1 where none does."""
    for part in module.modules():
        size = getattr(part, "head_dim", getattr(part, "attention_head_size", None))  # as transformers calls it
        if isinstance(size, int):
            return size
        heads, weight = getattr(part, "num_heads", None), getattr(getattr(part, "qkv", None), "weight", None)
        if isinstance(heads, int) and isinstance(weight, Tensor) and weight.ndim == 2:
            return weight.shape[0] // (3 * heads)
    return 1


# How attention modules of most libraries call their projections.
_PROJECTIONS = ("qkv", "q_proj", "to_q", "query", "query_key_value", "in_proj", "in_proj_weight", "Wqkv", "c_attn")


def _what_is_known(model: nn.Module) -> list[str]:
    """Say, for a model with nothing to swap, which classes have a twin and which modules look like attention."""
    lines = [f"  classes that have a twin: {', '.join(TWINS)}"]
    kinds: dict[type, list[str]] = {}
    for name, module in model.named_modules():
        if any(hasattr(module, projection) for projection in _PROJECTIONS):
            kinds.setdefault(type(module), []).append(name or "the model itself")
    lines += [
        f"  looks like attention, but has none: {_qualified_name(kind)} ({len(names)}, the first is {names[0]})"
        for kind, names in kinds.items()
    ]
    return lines if kinds else [*lines, "  no module of the model looks like attention"]


def _qualified_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


register_twin("vidattn.models.video_swin.BasicLayer", "vidattn.nn:FusedBasicLayer")
register_twin("vidattn.models.video_swin.SwinTransformerBlock3D", "vidattn.nn:FusedSwinTransformerBlock3D")
register_twin("vidattn.models.video_swin.WindowAttention3D", "vidattn.nn:FusedWindowAttention3D")
register_twin("vidattn.models.timesformer.Attention", "vidattn.nn:FusedAttention")
register_twin("vidattn.models.timesformer.Block", "vidattn.nn:FusedBlock")
register_twin(
    "vidattn.models.vivit_layers.MultiHeadDotProductAttention", "vidattn.nn:FusedMultiHeadDotProductAttention"
)
register_twin("vidattn.models.xvit_layers.Attention", "vidattn.nn:FusedMixingAttention")

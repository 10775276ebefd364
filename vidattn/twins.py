"""What an accelerated twin is: a subclass of the module it replaces, to which an instance is turned in place."""

from __future__ import annotations

import weakref
from typing import Any, ClassVar, NamedTuple

from torch import nn

__all__ = ["Twin", "Watched", "make_twin", "register_twin", "why_overridden"]


class Watched(NamedTuple):
    """A function that a twin does the work of, where it was found.

    Attributes:
        namespace: a class, or the globals of a module.
        name: its name there.
        function: the function itself.
    """

    namespace: Any
    name: str
    function: Any

    def is_there(self) -> bool:
        """Whether it is still found where it was."""
        if isinstance(self.namespace, dict):
            found = self.namespace.get(self.name)
        else:
            found = getattr(self.namespace, self.name, None)
        return found is self.function or _is_recorder(found, self.function)


def _is_recorder(found: Any, function: Any) -> bool:
    """Whether ``torch.fx`` stands before a function while it traces, which ``torch.fx.wrap`` asks for."""
    names = getattr(found, "__globals__", {})
    return getattr(found, "__wrapped__", None) is function and names.get("__name__") == "torch.fx._symbolic_trace"


class Twin:
    """What every accelerated twin is, besides a subclass of the module it replaces.

    A twin of one class names both as its bases. One of several classes (copies of an architecture, or a class of a
    library that may not be installed) has this class as its base alone; ``make_twin`` puts the two together.

    Attributes:
        ops: public attention functions it calls.
        level: what it computes in one call: a "layer", a "block" or the "attention" alone.
        replaced: the class that it stands for.
        title: what a report calls it.
        attention_backend: backend of its calls; None for the one in force.
        frozen: whether it may keep what it derives from its parameters, see ``vidattn.accelerate``.
    """

    ops: ClassVar[tuple[str, ...]] = ()
    level: ClassVar[str] = "attention"
    replaced: ClassVar[Any] = nn.Module
    title: ClassVar[str] = ""
    attention_backend: str | None = None
    frozen: bool = False
    _watched: ClassVar[tuple[Watched, ...]] = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        first, *rest = cls.__bases__
        if not issubclass(first, Twin) or len(rest) != 1:  # of many classes, or made of a twin by a parametrization
            return
        cls.replaced, cls.title = rest[0], cls.__name__
        twins = cls.__mro__[: cls.__mro__.index(Twin)]
        own = {name for kind in twins for name, value in vars(kind).items() if callable(value)}
        cls._watched = tuple(
            Watched(cls.replaced, name, getattr(cls.replaced, name))
            for name in sorted(own)
            if getattr(cls.replaced, name, None) is not getattr(nn.Module, name, None)
        )

    def is_intact(self) -> bool:
        """Whether the functions that the twin does the work of are still those of the original, in its class and here.

        Who puts a ``forward`` on an instance decides for himself what it calls; other methods would not be called.
        """
        own = self.__dict__
        return all(row.is_there() and (row.name == "forward" or row.name not in own) for row in self._watched)

    @staticmethod
    def refuse(module: Any) -> str | None:
        """Say why an instance of the original class cannot become this twin; None if it can."""
        return None

    @staticmethod
    def learned_if_frozen(module: Any) -> list[str]:
        """Name the parameters that ``frozen=True`` would make something of that is kept, and that are being learned."""
        return []

    def drop_derived(self) -> None:
        """Forget what was made of parameters and kept."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copy and pickle a twin that ``make_twin`` made: its class has no name by which it could be found."""
        reduced: Any = super().__reduce_ex__(protocol)
        kind: type = type(self)
        if kind not in _made:
            return reduced
        _, (_, *arguments), *rest = reduced
        return _rebuild, (*_made[kind], *arguments), *rest


# What each class that make_twin made was made of: the twin, the original.
_made: weakref.WeakKeyDictionary[type, tuple[type[Twin], type]] = weakref.WeakKeyDictionary()


def make_twin(twin: type[Twin], original: type[nn.Module], watched: tuple[Watched, ...] = ()) -> type[Twin]:
    """Give the class that is a twin of one original class; the same one each time.

    Args:
        twin: what stands for many classes.
        original: one of them.
        watched: functions that it does the work of, besides the methods that it has its own of.

    Returns:
        A subclass of both.
    """
    for known, parts in _made.items():
        if parts == (twin, original):
            return known  # type: ignore[return-value]
    # FSDP's policies and others find classes by name, so it keeps that of the original.
    kind: Any = type(original.__name__, (twin, original), {"__module__": twin.__module__, "__doc__": twin.__doc__})
    kind.title = twin.__name__
    names = {row.name for row in kind._watched if row.namespace is original}
    more = tuple(row for row in watched if row.namespace is not original or row.name not in names)
    kind._watched = kind._watched + more
    _made[kind] = twin, original
    return kind


def _rebuild(twin: type[Twin], original: type[nn.Module], *arguments: Any) -> Any:
    """Make an empty instance of a twin again, while a copy or a pickle is read."""
    from vidattn.integrations import twin_of  # it knows what the twin does the work of

    kind: Any = twin_of(twin, original)
    return kind.__new__(kind, *arguments)


def why_overridden(module: nn.Module) -> str | None:
    """Say which methods of its class an instance replaces; None if it replaces none."""
    names = [name for name in vars(module) if callable(getattr(type(module), name, None))]
    return f"the instance overrides {', '.join(sorted(names))}" if names else None


# The bundled modules, by qualified name, so that no twin is imported before a model needs it.
TWINS: dict[str, str] = {}


def register_twin(original: str, twin: str) -> None:
    """Make a twin of one class known to ``vidattn.accelerate``.

    Args:
        original: qualified name of the class to replace, ``"package.module.Class"``.
        twin: where its twin is, ``"package.module:Class"``; a subclass of ``Twin`` and of the original.

    Example:
        >>> register_twin("vidattn.models.video_swin.BasicLayer", "vidattn.nn:FusedBasicLayer")
    """
    TWINS[original] = twin

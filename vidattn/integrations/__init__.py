"""Models of other libraries: which of their classes have an accelerated twin, and how one is recognised.

One file a library, found by being here. Each lists its ``Counterpart`` values in ``COUNTERPARTS``. None of them
imports the library that it is about: what is looked at came with the model.

What is recognised is what was tested. A module becomes a twin only if its class has the right name, its instance the
right parts, and the source of all functions that the twin does the work of the fingerprint of a version that was
tested. So a copy of a library's file is recognised as well, and a subclass that overrides one of the functions is not.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import nn

from vidattn.integrations._fingerprint import fingerprint, resolve
from vidattn.twins import Twin, Watched, make_twin

__all__ = ["Counterpart", "Found", "Part", "find", "is_known", "twin_of"]


class Counterpart(NamedTuple):
    """A class of another library that has a twin.

    Attributes:
        name: name of the class.
        package: library that has it, the first part of its module's name; None for code that people copy. Its other
            versions are reported as untested.
        twin: the twin, with ``Twin`` alone as its base.
        code: functions that the twin does the work of: ``"Class.method"`` for those of the class, ``"function"`` or
            ``"Other.method"`` for those that its methods, or the functions listed before, see under that name.
        tested: fingerprints of the code, each with the versions that have it.
        resembles: whether an instance has the parts that one is known by, for a name that says little.
    """

    name: str
    package: str | None
    twin: type[Twin]
    code: tuple[str, ...]
    tested: dict[str, str]
    resembles: Callable[[Any], bool] = lambda module: True


class Part(NamedTuple):
    """A class that has no twin, and that a twin does the work of where it is a part of its module.

    Attributes:
        name: name of the class.
        code: as in ``Counterpart``.
        tested: as in ``Counterpart``.
    """

    name: str
    code: tuple[str, ...]
    tested: dict[str, str]

    def is_tested(self, kind: type) -> bool:
        """Whether the code of a class is one that was tested."""
        watched = resolve(kind, self.name, self.code)
        return watched is not None and fingerprint(watched) in self.tested


class Found(NamedTuple):
    """What is known of a module's class.

    Attributes:
        twin: class to turn it to; None where it has to stay.
        reason: why it has to stay, or may be admitted by ``accept_untested`` only; None if it was tested.
        tested: whether a version with this code was tested.
    """

    twin: type[Twin] | None
    reason: str | None
    tested: bool


def find(module: nn.Module) -> Found | None:
    """Look for the twin of a module of another library.

    Args:
        module: any module, no twin.

    Returns:
        What is known; None where no integration knows the class.
    """
    kind: type = type(module)
    seen: Found | None = None
    for row in _candidates(module):
        watched = resolve(kind, row.name, row.code)
        found = None if watched is None else fingerprint(watched)
        if watched is not None and found in row.tested:
            return Found(make_twin(row.twin, kind, watched), None, True)
        if seen is None and (row.package == kind.__module__.partition(".")[0] or row.package is None):
            seen = _untested(kind, row, watched, found)
    return seen


def _untested(kind: type, row: Counterpart, watched: tuple[Watched, ...] | None, found: str | None) -> Found:
    if watched is None:
        return Found(None, "untested version: it lacks a function that all tested versions have", False)
    if found is None:
        return Found(None, "untested version: its source cannot be read", False)
    versions = ", ".join(dict.fromkeys(row.tested.values()))
    reason = f"untested version: its code has the fingerprint {found}; tested: {versions}"
    return Found(make_twin(row.twin, kind, watched), reason, False)


def is_known(module: Any, twin: type[Twin]) -> bool:
    """Whether a module is, or could become, an instance of a twin; for twins that do the work of their parts."""
    if isinstance(module, twin):
        return True
    found = find(module)
    return found is not None and found.tested and found.twin is not None and issubclass(found.twin, twin)


def twin_of(twin: type[Twin], original: type[nn.Module]) -> type[Twin]:
    """Give the class that is a twin of one original class.

    Args:
        twin: what stands for many classes.
        original: one of them.

    Returns:
        A subclass of both, which watches the functions that it does the work of.
    """
    names = {base.__name__ for base in original.__mro__}
    best: tuple[Watched, ...] = ()
    for row in _all():
        watched = resolve(original, row.name, row.code) if row.twin is twin and row.name in names else None
        if watched is not None and fingerprint(watched) in row.tested:
            return make_twin(twin, original, watched)
        best = best or watched or ()
    return make_twin(twin, original, best)


@functools.cache
def _all() -> tuple[Counterpart, ...]:
    names = [name for _, name, _ in pkgutil.iter_modules(__path__) if not name.startswith("_")]
    files = [importlib.import_module(f"{__name__}.{name}") for name in names]
    return tuple(row for file in files for row in getattr(file, "COUNTERPARTS", ()))


@functools.cache
def _by_name() -> dict[str, tuple[Counterpart, ...]]:
    names = dict.fromkeys(row.name for row in _all())
    return {name: tuple(row for row in _all() if row.name == name) for name in names}


def _candidates(module: nn.Module) -> Iterator[Counterpart]:
    """Yield the entries for a module by the names of its class and bases, and by its parts."""
    for base in type(module).__mro__:
        if base is nn.Module:
            return
        yield from (row for row in _by_name().get(base.__name__, ()) if row.resembles(module))

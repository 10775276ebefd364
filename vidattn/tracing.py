"""What tracers and compilers have to be told."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

__all__ = ["is_symbolic", "traced_for_one_size"]

P = ParamSpec("P")
R = TypeVar("R")


def traced_for_one_size(function: Callable[P, R]) -> Callable[P, R]:
    """Keep ``torch.jit.trace`` from warning at every look at a size in a function.

    A trace holds what was decided on the sizes of its example; only the batch may be another.
    """

    @functools.wraps(function)
    def quietly(*args: P.args, **kwargs: P.kwargs) -> R:
        if not torch.jit.is_tracing():
            return function(*args, **kwargs)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", torch.jit.TracerWarning)
            return function(*args, **kwargs)

    return quietly


def is_symbolic(*numbers: float) -> bool:
    """Whether ``torch.compile`` has left one of the numbers open, for a program that serves many values.

    It fixes those that go to an op of ours or to a generator of random numbers, and then makes a program for each
    value; past eight it gives up. Products of a tensor and such a number it keeps open.
    """
    if not torch.compiler.is_compiling():
        return False
    from torch.fx.experimental.symbolic_shapes import has_static_value  # loaded by whatever compiles

    return not all(has_static_value(number) for number in numbers)

"""What ``torch.jit.trace`` has to be told."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

__all__ = ["traced_for_one_size"]

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

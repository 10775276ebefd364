"""What the tests of all twins share: weights that matter, results with all gradients, and their comparison."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

Module = TypeVar("Module", bound=nn.Module)


def spread(module: Module) -> Module:
    """Give every parameter values that matter."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.5 if parameter.dim() > 1 else 0.3))
    return module


def results(module: nn.Module, x: Tensor, *rest: Any, seed: int = 11) -> list[Tensor]:
    """Output, and the gradients of the first input and of all parameters; drawn numbers start from a seed."""
    leaf = x.detach().clone().requires_grad_()
    module.zero_grad()
    torch.manual_seed(seed)
    out = module(leaf, *rest)
    weights = torch.linspace(-1, 1, out.numel(), device=out.device).view(out.shape).to(out.dtype)
    (out * weights).sum().backward()
    assert leaf.grad is not None
    return [out.detach(), leaf.grad, *(p.grad for p in module.parameters() if p.grad is not None)]


def assert_same(actual: Iterable[Tensor], expected: Iterable[Tensor], tolerance: float = 2e-5) -> None:
    """Compare tensors, each by its largest value."""
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        assert (one - other).abs().max() <= tolerance * other.abs().max().clamp(min=1e-3)


class CalledOps(TorchDispatchMode):
    """Names of the operators that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))

"""Compare what a model computes before and after its attention is swapped, each with a float64 copy of it."""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from vidattn.backends import call_model, tensor_leaves

__all__ = ["Verification"]

_ROUNDINGS = 8  # runs of the original that say how large its error may be by chance
# Share of the parameters that move in each: enough for all that follows to be rounded another way, and so few that what
# they change by themselves is below what rounding does, in 16 bits too.
_CHANGED = 1 / 64

_Results = dict[str, Tensor]  # outputs and gradients by what they are called in messages


class _Excess(NamedTuple):
    """A result that is further off than it may be: its name, its error and the error allowed."""

    name: str
    error: float
    allowed: float


class Verification:
    """What a model computes on a batch before a swap, for a comparison after it.

    Args:
        model: the model, before the swap.
        batch: a tensor, a tuple of positional or a dict of keyword arguments.
        gradients: whether to compare gradients of the parameters and of the inputs too.

    Raises:
        RuntimeError: a float64 copy of the model cannot run.
    """

    def __init__(self, model: nn.Module, batch: Any, gradients: bool) -> None:
        def widen(value: Any) -> Any:
            return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

        self.model, self.batch, self.gradients = model, batch, gradients
        failure = "accelerate: verify needs to run a float64 copy of the model, which failed"
        self._dtypes = {name: row.dtype for name, row in _tensors(model)}
        try:  # before the run: a model that keeps what it computed, with its graph, has no copy afterwards
            self._wide = copy.deepcopy(model).double()
        except RuntimeError as error:
            raise RuntimeError(f"{failure}: {error}") from error
        self.before = _run(model, batch, gradients)
        try:
            self.exact = _run(self._wide, tree_map(widen, batch), gradients)
        except RuntimeError as error:
            raise RuntimeError(f"{failure}: {error}") from error

    def check(self, alone: Callable[[str], contextlib.AbstractContextManager[None]], names: list[str]) -> float:
        """Compare the swapped model with what it was.

        Args:
            alone: gives a context in which one module is swapped, by its name, and no other.
            names: the swapped modules.

        Returns:
            Largest difference of the outputs from those before.

        Raises:
            RuntimeError: a result differs by more than it may, or is not finite; the module furthest off is named.
        """
        after = _run(self.model, self.batch, self.gradients)
        allowed = self._allowed()
        excess = self._excess(after, allowed)
        if excess is not None:  # the original may have been lucky
            allowed = self._allowed(self._roundings())
            excess = self._excess(after, allowed)
        if excess is not None:
            furthest = ""
            if len(names) > 1:
                furthest = f"; furthest off is {self._furthest(alone, names, allowed)}"
            raise RuntimeError(
                f"accelerate: verify: expected {excess.name} within {excess.allowed:.3e} of a float64 run, got"
                f" {excess.error:.3e}{furthest}"
            )
        outputs = [name for name in after if name.startswith("output")]
        return max((_distance(after[name], self.before[name]) for name in outputs), default=0.0)

    def _excess(self, after: _Results, allowances: dict[str, float]) -> _Excess | None:
        """Find the result that is furthest off, measured by what it may be."""
        found: tuple[float, _Excess] | None = None
        if list(after) != list(self.before):
            changed = sorted(set(after) ^ set(self.before))
            return _Excess(f"the same results ({', '.join(changed[:3])})", float("nan"), 0.0)
        for name, allowed in allowances.items():
            error = _distance(after[name], self.exact[name])
            if not error <= allowed:  # a NaN compares false
                ratio = error / allowed if error == error and allowed > 0.0 else float("inf")
                if found is None or ratio > found[0]:
                    found = ratio, _Excess(name, error, allowed)
        return None if found is None else found[1]

    def _allowed(self, errors: dict[str, float] | None = None) -> dict[str, float]:
        """Tell the error that each result may have: the original's, or these, twice; three times for a gradient."""
        allowed = {}
        for name, old in self.before.items():
            if old.numel() == 0:
                continue
            true = self.exact[name]
            factor = 2 if name.startswith("output") else 3
            floor = 4 * torch.finfo(old.dtype).eps * true.abs().max().item()
            allowed[name] = factor * (_distance(old, true) if errors is None else errors[name]) + floor
        return allowed

    def _roundings(self) -> dict[str, float]:
        """Measure the largest error that the original makes when some parameters move by one unit in the last place.

        A norm over few values enlarges rounding a thousandfold, so one run of the original says little about what
        rounding does to such a model. Call it once: it uses up the copy.
        """
        original = self._wide
        for name, row in _tensors(original):
            row.data = row.data.to(self._dtypes[name])
        parameters = {name: row for name, row in original.named_parameters() if row.is_floating_point()}
        kept = {name: row.detach().clone() for name, row in parameters.items()}
        largest = {name: _distance(row, self.exact[name]) for name, row in self.before.items()}
        for seed in range(_ROUNDINGS):
            generator = torch.Generator().manual_seed(seed)
            for name, row in parameters.items():
                draws = torch.rand(row.shape, generator=generator).to(row.device)
                ulp = torch.finfo(row.dtype).eps
                up, down = draws < _CHANGED / 2, draws > 1 - _CHANGED / 2
                factor = torch.where(up, 1 + ulp, torch.where(down, 1 - ulp, 1.0)).to(row.dtype)
                row.data = kept[name] * factor
            for name, moved in _run(original, self.batch, self.gradients).items():
                largest[name] = max(largest[name], _distance(moved, self.exact[name]))
        return largest

    def _furthest(
        self,
        alone: Callable[[str], contextlib.AbstractContextManager[None]],
        names: list[str],
        allowances: dict[str, float],
    ) -> str:
        """Swap one module at a time, and name the one with which the model is furthest off."""
        worst: tuple[float, str] = (-1.0, names[0])
        for name in names:
            with alone(name):
                after = _run(self.model, self.batch, self.gradients)
            share = 0.0
            for result, allowed in allowances.items():
                error = _distance(after[result], self.exact[result]) if result in after else float("inf")
                share = max(share, error / allowed if error == error and allowed > 0.0 else float("inf"))
            worst = max(worst, (share, name), key=lambda row: row[0])
        return f"{worst[1] or 'the model itself'}, alone {worst[0]:.1f} times what is allowed"


def _run(model: nn.Module, batch: Any, gradients: bool) -> _Results:
    with _evaluating(model), torch.set_grad_enabled(gradients):
        if not gradients:
            return _outputs(call_model(model, batch))
        leaves: list[Tensor] = []

        def as_leaf(value: Any) -> Any:
            if not (isinstance(value, Tensor) and value.is_floating_point()):
                return value
            leaves.append(value.detach().clone().requires_grad_())
            return leaves[-1]

        outputs = _outputs(call_model(model, tree_map(as_leaf, batch)))
        given = [row for row in outputs.values() if row.requires_grad]
        # Weights that differ, so that no part of a gradient cancels another.
        weights = [torch.linspace(-1, 1, row.numel(), dtype=row.dtype, device=row.device).view_as(row) for row in given]
        learned = {name: row for name, row in model.named_parameters() if row.requires_grad}
        before = {name: row.grad for name, row in learned.items()}
        model.zero_grad(set_to_none=True)
        try:  # backward, not grad, for which reentrant checkpointing has no answer
            torch.autograd.backward(given, weights)
            found = {f"the gradient of input {index}": leaf.grad for index, leaf in enumerate(leaves)}
            found |= {f"the gradient of {name}": row.grad for name, row in learned.items()}
        finally:
            for name, row in learned.items():
                row.grad = before[name]
        gradients_found = {name: row for name, row in found.items() if row is not None}
        return {name: row.detach() for name, row in outputs.items()} | gradients_found


def _outputs(result: Any) -> _Results:
    leaves = [leaf for leaf in tensor_leaves(result) if leaf.is_floating_point()]
    return {f"output {index}": leaf for index, leaf in enumerate(leaves)}


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Go through what ``model.to(dtype)`` changes."""
    for name, row in itertools.chain(model.named_parameters(), model.named_buffers()):
        if row.is_floating_point():
            yield name, row


def _distance(one: Tensor, other: Tensor) -> float:
    return (one.double() - other.double()).abs().max().item() if one.numel() else 0.0


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module in eval mode, and each back as it was (``train()`` would not know frozen stages)."""
    modes = [(module, module.training) for module in model.modules()]
    for module, _ in modes:
        module.training = False
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training

"""Golden cases: files with inputs, weights, outputs and gradients of the papers' own code, and how they are compared.

A file says in its metadata what made it. The architecture it names picks the module ``golden_<architecture>``, which
knows

- ``build(case)``: the modules, blocks and models of its architecture, as a ``GoldenRun``;
- ``check_function(case)``: functions that are not modules;
- ``measured_by(name)``, where gradients vanish by construction: another gradient whose largest value measures the
  error of this one, or None.

The first two raise ``UnknownCaseError`` for what they do not know: an unknown case fails, it is never left out.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import safe_open
from tolerance import GRADIENT_FACTOR, OUTPUT_FACTOR, assert_close
from torch import Tensor, nn

OUTPUT_TOLERANCE = 2e-5
GRADIENT_TOLERANCE = 1e-4
FLOAT64_TOLERANCE = 1e-10
FACTORS = OUTPUT_FACTOR, GRADIENT_FACTOR
LEVELS = ("module", "block", "model", "function")


class UnknownCaseError(Exception):
    """Nobody knows how to build what a golden file was made from."""


@dataclass(frozen=True)
class GoldenCase:
    """One golden file."""

    path: Path
    name: str

    @property
    def metadata(self) -> dict[str, str]:
        with safe_open(self.path, framework="pt") as file:
            return file.metadata() or {}

    @property
    def architecture(self) -> str:
        return self.metadata.get("arch", "")

    @property
    def level(self) -> str:
        return self.metadata.get("level", "")

    @property
    def config(self) -> dict[str, Any]:
        return json.loads(self.metadata["config"])

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """Read the tensors whose names start with a prefix, without it."""
        with safe_open(self.path, framework="pt") as file:
            names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118 (not a mapping)
            return {name[len(prefix) :]: file.get_tensor(name) for name in names}

    def family(self) -> ModuleType:
        """Import the module that knows this architecture."""
        name = f"golden_{self.architecture}"
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:
                raise
            raise UnknownCaseError(f"{self.name}: no {name}.py for architecture {self.architecture!r}") from error


@dataclass
class GoldenRun:
    """How to run a case.

    Attributes:
        module: What was built, with the file's weights.
        inputs: Inputs by name, in the file's dtypes.
        call: Runs the module and gives its outputs under the names of the file.
        main: Name of the output that the cotangent belongs to.
        source_gradients: Renames gradients by our parameters' names to the file's.
        swaps: Whether ``vidattn.accelerate`` must find something to swap.
        data: Names of the inputs that follow the module's dtype; others, such as masks, keep theirs.
    """

    module: nn.Module
    inputs: dict[str, Any]
    call: Callable[[nn.Module, Mapping[str, Any]], dict[str, Tensor]]
    main: str = "out"
    source_gradients: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] = dict
    swaps: bool = True
    data: tuple[str, ...] = ("x",)


def find_cases(folders: str | None = None) -> list[GoldenCase]:
    """Find all golden files below folders separated by ":"; by default those of ``VIDATTN_GOLDEN``, else our own."""
    if folders is None:
        folders = os.environ.get("VIDATTN_GOLDEN") or str(Path(__file__).parent / "golden")
    cases = []
    for folder in filter(None, folders.split(":")):
        root = Path(folder)
        files = sorted(root.rglob("*.safetensors"))
        if not files:
            raise FileNotFoundError(f"VIDATTN_GOLDEN: no *.safetensors below {root.absolute()}")
        cases += [GoldenCase(file, f"{root.name}/{file.relative_to(root).with_suffix('')}") for file in files]
    return cases


def run_case(
    case: GoldenCase, run: GoldenRun, dtype: torch.dtype, device: torch.device
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Run a case forward and, where the file has a cotangent, backward.

    Returns:
        Outputs and gradients, by the names they have in the file.
    """
    recorded = case.tensors("grad.input.")
    inputs: dict[str, Any] = {
        name: value.to(device, dtype if name in run.data else None) if isinstance(value, Tensor) else value
        for name, value in run.inputs.items()
    }
    for name in recorded:
        inputs[name] = inputs[name].clone().requires_grad_()
    run.module.to(device, dtype).eval()
    run.module.zero_grad(set_to_none=True)
    outputs = run.call(run.module, inputs)
    cotangent = case.tensors("input.cotangent").get("")
    if cotangent is None:
        return outputs, {}
    (outputs[run.main] * cotangent.to(device, dtype)).sum().backward()
    ours = {name: parameter.grad for name, parameter in run.module.named_parameters() if parameter.grad is not None}
    gradients = {f"state.{name}": gradient for name, gradient in run.source_gradients(ours).items()}
    gradients.update({f"input.{name}": inputs[name].grad for name in recorded})
    return outputs, gradients


def compare_case(case: GoldenCase, outputs: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> None:
    """Compare a run with everything the file recorded."""
    expected = case.tensors("output.")
    assert expected, f"{case.name} records no output"
    assert expected.keys() <= outputs.keys(), f"not computed: {sorted(expected.keys() - outputs.keys())}"
    for name, tensor in expected.items():
        assert_golden(f"output.{name}", outputs[name], tensor, OUTPUT_TOLERANCE)
    recorded = case.tensors("grad.")
    measured_by = getattr(case.family(), "measured_by", lambda name: None)
    for name, tensor in recorded.items():
        if name not in gradients:  # a frozen parameter may be recorded as zero
            assert not tensor.any(), f"grad.{name} is missing"
            continue
        measure = measured_by(name)
        largest = None if measure is None else recorded[measure].abs().max().item()
        assert_golden(f"grad.{name}", gradients[name], tensor, GRADIENT_TOLERANCE, largest)
    if recorded:
        unrecorded = sorted(gradients.keys() - recorded.keys())
        assert not unrecorded, f"gradients where the original has none: {unrecorded}"


Results = tuple[Mapping[str, Tensor], Mapping[str, Tensor]]


def compare_with_plain(case: GoldenCase, found: Results, plain: Results) -> None:
    """Hold results in 16 bits to the error that plain PyTorch makes, both measured by what the file recorded."""
    for prefix, factor, ours, theirs in zip(("output.", "grad."), FACTORS, found, plain, strict=True):
        assert ours.keys() == theirs.keys()
        for name, exact in case.tensors(prefix).items():
            if name in ours:
                values = (x.detach().cpu() for x in (ours[name], theirs[name]))
                assert_close(prefix + name, *values, exact.double(), ours[name].dtype, factor)


def assert_golden(name: str, actual: Tensor, expected: Tensor, tolerance: float, largest: float | None = None) -> None:
    """Compare a tensor with its golden value, stored in float32.

    In float32 the error may be ``tolerance`` times the largest expected value, or ``largest`` where that is given. In
    float64 it may be 1e-10 times that, beside the rounding of each stored value.
    """
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    wide, golden = actual.detach().cpu().double(), expected.double()
    assert wide.isfinite().all(), f"{name} is not finite"
    if expected.numel() == 0:
        return
    if largest is None:
        largest = golden.abs().max().item()
    error = (wide - golden).abs()
    if actual.dtype == torch.float64:
        allowed = golden.abs() * 2.0**-24 + FLOAT64_TOLERANCE * largest
    else:
        allowed = torch.full_like(golden, tolerance * largest)
    worst = (error - allowed).argmax()
    assert (error <= allowed).all(), (
        f"{name} ({actual.dtype}): error {error.flatten()[worst]:.3g} where {allowed.flatten()[worst]:.3g} is allowed, "
        f"largest expected value {largest:.3g}"
    )

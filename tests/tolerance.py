"""How far a result may be from the exact one: the one rule of all tests."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

# The exact values are float64 themselves, so what they cannot measure is held to a share of the tensor's maximum.
FLOAT64_ERROR = 1e-12
OUTPUT_FACTOR = 2.0
GRADIENT_FACTOR = 3.0
FLOOR_ULP = 4.0


def ulp(value: float, dtype: torch.dtype) -> float:
    """Unit in the last place of a number in a dtype."""
    info = torch.finfo(dtype)
    return max(info.eps * 2.0 ** (math.frexp(value)[1] - 1), info.smallest_normal)


def assert_close(
    name: str, actual: Tensor, reference: Tensor, exact: Tensor, compute_dtype: torch.dtype, factor: float
) -> None:
    """Check a result against the error that the reference makes in the same dtype.

    Args:
        name: what is compared, for the message.
        actual: the result under test.
        reference: what the reference gives for the same inputs in the same dtype.
        exact: what the float64 reference gives for the same inputs.
        compute_dtype: dtype of q, k, v: a float32 bias gradient of bfloat16 products is no more exact than those.
        factor: how many times the reference's error is allowed.
    """
    assert actual.shape == reference.shape == exact.shape, f"{name}: {actual.shape} {reference.shape} {exact.shape}"
    assert actual.dtype == reference.dtype, f"{name}: {actual.dtype} {reference.dtype}"
    assert exact.dtype == torch.float64
    if actual.numel() == 0:
        return
    assert bool(exact.isfinite().all()), f"{name}: the case itself is not finite"
    error = (actual.double() - exact).abs().max().item()
    largest = exact.abs().max().item()
    allowed = factor * (reference.double() - exact).abs().max().item()
    allowed += FLOAT64_ERROR * largest if compute_dtype == torch.float64 else FLOOR_ULP * ulp(largest, compute_dtype)
    assert error <= allowed, f"{name}: off by {error:.3e}, allowed {allowed:.3e}"  # a NaN compares false


def assert_all_close(
    actual: Mapping[str, Tensor | None],
    reference: Mapping[str, Tensor | None],
    exact: Mapping[str, Tensor | None],
    compute_dtype: torch.dtype,
) -> None:
    """Check a set of results, "out" by the factor of outputs and the rest by that of gradients."""
    assert actual.keys() == reference.keys() == exact.keys()
    for name, value in actual.items():
        expected, true = reference[name], exact[name]
        if value is None or expected is None or true is None:
            assert value is expected is true, name
            continue
        assert_close(name, value, expected, true, compute_dtype, OUTPUT_FACTOR if name == "out" else GRADIENT_FACTOR)

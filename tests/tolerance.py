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
        compute_dtype: dtype that limits what can be expected.
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


def assert_as_exact_as_plain(
    actual: Mapping[str, Tensor | None], plain: Mapping[str, Tensor | None], exact: Mapping[str, Tensor | None]
) -> None:
    """Hold float32 results to the error of plain PyTorch, gradients of q and k apart from the larger ones of v."""
    for name, value in actual.items():
        results = (value, plain[name], exact[name])
        parts = {name: results}
        if name == "qkv":
            parts = {"dq, dk": tuple(x[..., :2, :, :] for x in results), "dv": tuple(x[..., 2, :, :] for x in results)}  # type: ignore[index]
        for part, (found, expected, true) in parts.items():
            assert found is not None and expected is not None and true is not None
            assert_close(part, found, expected, true, torch.float32, GRADIENT_FACTOR)


def assert_all_close(
    actual: Mapping[str, Tensor | None],
    reference: Mapping[str, Tensor | None],
    exact: Mapping[str, Tensor | None],
    compute_dtype: torch.dtype,
    *,
    whole_rows: bool = True,
) -> None:
    """Check a set of results, "out" by the factor of outputs and the rest by that of gradients.

    Args:
        actual: the results under test, by name.
        reference: what the reference gives for the same inputs in the same dtype.
        exact: what the float64 reference gives for the same inputs.
        compute_dtype: dtype of q, k, v.
        whole_rows: whether the backward pass saw rows of scores as a whole. Then nothing on the way to the gradient of
            a bias is rounded to 16 bits, and it is as exact as its own dtype; else it has the error of the context.
    """
    assert actual.keys() == reference.keys() == exact.keys()
    for name, value in actual.items():
        expected, true = reference[name], exact[name]
        if value is None or expected is None or true is None:
            assert value is expected is true, name
            continue
        judged = compute_dtype
        if whole_rows and name in ("bias", "bias_table") and compute_dtype.itemsize == 2:
            judged = value.dtype if value.dtype.itemsize == 2 else torch.float32  # float64 is summed in float32
        assert_close(name, value, expected, true, judged, OUTPUT_FACTOR if name == "out" else GRADIENT_FACTOR)

"""What the tests of the CUDA kernels of sequences share: views of their tensors, and how results are compared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from divided_cases import expected_and_exact
from tolerance import assert_all_close
from torch import Tensor

KB = 1024
BF16, F16 = torch.bfloat16, torch.float16
View = Callable[[Tensor], Any]

# Of qkv (batch, rows, 3, heads, head_dim).
VIEWS: dict[str, View] = {
    "three dense tensors": lambda x: tuple(part.contiguous() for part in x.unbind(-3)),
    "three tensors of different strides": lambda x: (
        x[..., 0, :, :].contiguous(),
        x[..., 1, :, :],
        x[..., 2, :, :].transpose(1, 2).contiguous().transpose(1, 2),
    ),
    "a base at an odd element": lambda x: _behind(x, 1),
    "rows of 4 bytes": lambda x: _behind(x, 2),
    "tokens first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "every other row": lambda x: torch.stack([x, torch.full_like(x, float("nan"))], 2).flatten(1, 2)[:, ::2],
}
# Of the gradient (batch, rows, channels) that comes in.
GRADIENT_VIEWS: dict[str, View] = {
    "one row for all": lambda x: x[:1, :1].expand_as(x),
    "tokens first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "at an odd element": lambda x: torch.cat([x[..., :1], x], -1)[..., 1:],
}


def _behind(x: Tensor, elements: int) -> Tensor:
    flat = x.flatten(-3)
    return torch.cat([flat[..., :elements], flat], -1)[..., elements:].unflatten(-1, x.shape[-3:])


def attend(case: Any, qkv: Tensor, grad_out: Tensor, view: View = lambda x: x) -> dict[str, Tensor]:
    """Run a case of divided attention or mixing on the CUDA kernels, forward and backward."""
    leaf = qkv.detach().clone().requires_grad_()
    out = case.function()(view(leaf), **case.options(), backend="cuda")
    (grad,) = torch.autograd.grad(out, leaf, grad_out)
    return _parts({"out": out.detach(), "qkv": grad})


def judge(
    case: Any,
    dtype: torch.dtype = BF16,
    *,
    view: View = lambda x: x,
    view_gradient: View = lambda x: x,
    inputs: dict[str, Tensor] | None = None,
    bits: list[Tensor] | None = None,
) -> None:
    """Compare context and gradients with those of the reference, in this dtype and in float64.

    Args:
        case: a case of divided attention or mixing.
        dtype: dtype of q, k and v.
        view: makes what the function is given of qkv.
        view_gradient: makes the gradient that comes in.
        inputs: what to give instead of the case's own.
        bits: takes what the kernels gave.
    """
    inputs = case.inputs(dtype) if inputs is None else inputs
    inputs["grad_out"] = view_gradient(inputs["grad_out"])
    found = attend(case, **inputs, view=view)
    assert_all_close(found, *map(_parts, expected_and_exact(case, inputs)), dtype)
    if bits is not None:
        bits.extend(found.values())


def _parts(results: dict[str, Any]) -> dict[str, Tensor]:
    """Judge gradients of q, k and v apart: one may be much larger than the others."""
    return {"out": results["out"], **dict(zip(("dq", "dk", "dv"), results["qkv"].unbind(-3), strict=True))}


def differs(one: Tensor, other: Tensor) -> Tensor:
    """Where two tensors differ; NaN is like NaN."""
    return (one != other) & ~(one.isnan() & other.isnan())

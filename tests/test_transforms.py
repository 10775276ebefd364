"""Derivatives of higher order, forward mode and the transforms of torch.func, of every op and of whole models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import vidattn
from vidattn import reference


def _window3d(ops: Any, qkv: Tensor, table: Tensor, pad: Tensor) -> Tensor:
    return ops.window3d_attention(qkv, table, window_size=(1, 2, 2), shift_size=(0, 1, 0), pad_qkv=pad)


def _window(ops: Any, qkv: Tensor, bias: Tensor) -> Tensor:
    mask = torch.zeros(2, 3, 3, dtype=qkv.dtype)
    mask[1, 0, 1:] = -torch.inf
    return ops.window_attention(qkv, bias, mask)


def _separate(ops: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ops.temporal_attention((q, k, v), 2, token_order="hwt")


def _per_frame(ops: Any, qkv: Tensor) -> Tensor:
    patches, cls = ops.spatial_attention(qkv, 2, cls_token="per_frame")
    return torch.cat((patches.sin(), cls.exp()), 1)


# The function, and the shapes of its tensors.
CASES: dict[str, tuple[Callable[..., Tensor], list[tuple[int, ...]]]] = {
    "window3d": (_window3d, [(1, 1, 3, 2, 3, 1, 2), (9, 1), (3, 1, 2)]),
    "window": (_window, [(4, 3, 3, 2, 2), (2, 3, 3)]),
    "temporal": (lambda ops, qkv: ops.temporal_attention(qkv, 3), [(2, 6, 3, 2, 3)]),
    "separate": (_separate, [(2, 4, 2, 2)] * 3),
    "spatial": (lambda ops, qkv: ops.spatial_attention(qkv, 2, token_order="hwt", scale=0.4), [(2, 6, 3, 1, 3)]),
    "cls mean": (lambda ops, qkv: ops.spatial_attention(qkv, 2, cls_token="mean"), [(2, 5, 3, 2, 2)]),
    "cls per frame": (_per_frame, [(2, 5, 3, 2, 2)]),
    "factorized": (lambda ops, qkv: ops.factorized_dot_product_attention(qkv, 2), [(2, 4, 3, 2, 2)]),
    "mixing": (lambda ops, qkv: ops.space_time_mixing_attention(qkv, 2, shift_div=3), [(4, 3, 3, 2, 2)]),
    "shift": (lambda ops, x: ops.temporal_shift(x, 2, [(0, 1, 1), (2, 3, -1)], dim=1).sin(), [(4, 3, 2)]),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[Callable[..., Tensor], Callable[..., Tensor], tuple[Tensor, ...]]:
    """Give a function of tensors, the same in plain PyTorch, and the tensors."""
    function, shapes = CASES[request.param]
    torch.manual_seed(0)
    inputs = tuple(torch.randn(shape, dtype=torch.float64) for shape in shapes)
    return lambda *x: function(vidattn, *x), lambda *x: function(reference, *x), inputs


def _scalar(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *x: function(*x).square().sum()


def _places(inputs: tuple[Tensor, ...]) -> tuple[int, ...]:
    return tuple(range(len(inputs)))


def test_forward_mode_gives_the_tangent(case: Any) -> None:
    function, plain, inputs = case
    tangents = tuple(torch.randn_like(x) for x in inputs)
    expected = torch.func.jvp(plain, inputs, tangents)
    assert expected[1].abs().max() > 1e-3
    torch.testing.assert_close(torch.func.jvp(function, inputs, tangents), expected)
    with forward_ad.dual_level():
        dual = function(*(forward_ad.make_dual(x, t) for x, t in zip(inputs, tangents, strict=True)))
        torch.testing.assert_close(tuple(forward_ad.unpack_dual(dual)), expected)


TRANSFORMS: dict[str, Callable[..., Any]] = {
    "grad": lambda f, x: torch.func.grad(_scalar(f), _places(x))(*x),
    "vjp": lambda f, x: torch.func.vjp(f, *x)[1](torch.ones_like(f(*x))),
    "jacrev": lambda f, x: torch.func.jacrev(f, _places(x))(*x),
    "jacfwd": lambda f, x: torch.func.jacfwd(f, _places(x))(*x),
    "hessian": lambda f, x: torch.func.hessian(_scalar(f))(*x),
    "jacrev of jacrev": lambda f, x: torch.func.jacrev(torch.func.jacrev(_scalar(f)))(*x),
    "jacrev of jacfwd": lambda f, x: torch.func.jacrev(torch.func.jacfwd(_scalar(f)))(*x),
    "third derivative": lambda f, x: torch.func.grad(
        lambda *x: torch.func.grad(lambda *x: torch.func.grad(_scalar(f))(*x).square().sum())(*x).square().sum()
    )(*x),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_of_every_op(case: Any, transform: str) -> None:
    function, plain, inputs = case
    found, expected = TRANSFORMS[transform](function, inputs), TRANSFORMS[transform](plain, inputs)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("which", ["first", "others", "all"])
def test_vmap_of_every_op(case: Any, which: str) -> None:
    """The mapped dimension is joined with the batch, or each call is made by itself; results do not tell."""
    function, plain, inputs = case
    mapped = [which == "all" or (place == 0) == (which == "first") for place in _places(inputs)]
    if not any(mapped):
        mapped[0] = True
    stacked = tuple(
        torch.stack([x, x.flip(0), x * 2], 1) if is_mapped else x for x, is_mapped in zip(inputs, mapped, strict=True)
    )
    in_dims = tuple(1 if is_mapped else None for is_mapped in mapped)
    for transform in (lambda f: f, lambda f: torch.func.grad(_scalar(f), _places(inputs)), torch.func.jacrev):
        found = torch.func.vmap(transform(function), in_dims, out_dims=-1)(*stacked)
        torch.testing.assert_close(found, torch.func.vmap(transform(plain), in_dims, out_dims=-1)(*stacked))


def test_second_and_third_derivatives_by_autograd(case: Any) -> None:
    function, _, inputs = case
    leaves = tuple(x.clone().requires_grad_() for x in inputs)
    assert torch.autograd.gradcheck(function, leaves, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True, check_fwd_over_rev=True)

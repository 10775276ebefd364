"""Derivatives of higher order, forward mode and the transforms of torch.func, of every op and of whole models."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from attention_cases import BACKENDS_WITH_FLOAT32, device_of, full_precision
from model_cases import clips, tiny
from torch import Tensor, nn
from torch._inductor import lowering
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

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


def test_derivatives_by_autograd_are_those_of_differences(case: Any) -> None:
    function, _, inputs = case
    leaves = tuple(x.clone().requires_grad_() for x in inputs)
    assert torch.autograd.gradcheck(function, leaves, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True, check_fwd_over_rev=True)


def _penalty(function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Gradients of the squared gradients, as in a gradient penalty."""
    leaves = tuple(x.detach().clone().requires_grad_() for x in inputs)
    grads = torch.autograd.grad(function(*leaves).square().sum(), leaves, create_graph=True)
    return torch.autograd.grad(sum(grad.square().sum() for grad in grads), leaves)


@pytest.mark.parametrize("backend", BACKENDS_WITH_FLOAT32)
def test_second_derivatives_on_every_backend(case: Any, backend: str) -> None:
    function, plain, inputs = case
    if inputs[0].dtype != full_precision(backend):
        inputs = tuple(x.to(device_of(backend), torch.float32) for x in inputs)
    with vidattn.use_backend(backend):
        found = _penalty(function, inputs)
    torch.testing.assert_close(found, _penalty(plain, inputs))
    with vidattn.use_backend(backend):
        again = _penalty(lambda *x: checkpoint(function, *x, use_reentrant=False), inputs)
    torch.testing.assert_close(again, found)


def test_the_first_pass_saves_nothing_for_second_derivatives(case: Any) -> None:
    """Nothing bigger than an input, that is, though there are more scores than that."""
    function, _, inputs = case
    saved: list[int] = []
    leaves = tuple(torch.cat([x] * 3).requires_grad_() if len(inputs) == 1 else x.clone() for x in inputs)
    leaves[0].requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):  # type: ignore[func-returns-value]
        out = function(*leaves)
        torch.autograd.grad(out.sum(), leaves[0], create_graph=True)
    assert saved and max(saved) <= leaves[0].numel()


def test_dropout_of_second_derivatives_and_tangents_is_that_of_the_first_pass() -> None:
    qkv = torch.randn(2, 6, 3, 2, 4, dtype=torch.float64)

    def function(x: Tensor) -> Tensor:
        torch.manual_seed(3)
        return vidattn.temporal_attention(x, 3, dropout_p=0.4)

    torch.manual_seed(3)
    seed = torch.randint(0, 2**63 - 1, (1,))

    def plain(x: Tensor) -> Tensor:
        return reference.temporal_attention(x, 3, dropout_p=0.4, seed=seed)

    torch.testing.assert_close(_penalty(function, (qkv,)), _penalty(plain, (qkv,)))
    for attend in (function, plain):
        torch.testing.assert_close(TRANSFORMS["grad"](attend, (qkv,)), TRANSFORMS["grad"](plain, (qkv,)))
        found = torch.func.jacfwd(attend, randomness="same")(qkv)
        torch.testing.assert_close(found, torch.func.jacfwd(plain)(qkv))


def test_dropout_of_vmap_follows_its_randomness() -> None:
    """The same mask for each call, or one for each, as ``randomness`` says."""
    qkv = torch.randn(1, 6, 3, 2, 4).expand(2, 1, 6, 3, 2, 4)

    def function(x: Tensor) -> Tensor:
        return vidattn.temporal_attention(x, 3, dropout_p=0.4)

    one, other = torch.func.vmap(function, randomness="same")(qkv)
    assert torch.equal(one, other)
    one, other = torch.func.vmap(function, randomness="different")(qkv)
    assert not torch.equal(one, other)


def test_second_derivatives_under_autocast() -> None:
    qkv = torch.randn(2, 6, 3, 2, 8)

    def function(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return vidattn.temporal_attention(x, 3).float()

    found = _penalty(function, (qkv,))
    expected = _penalty(lambda x: reference.temporal_attention(x.bfloat16(), 3).float(), (qkv,))
    torch.testing.assert_close(found, expected, rtol=2**-7, atol=2**-7 * float(expected[0].abs().max()))


def test_a_gradient_that_is_not_asked_for_is_none() -> None:
    """Of two gradients one goes on: the other is no tensor when the second derivative is taken."""
    function, shapes = CASES["window3d"]
    qkv, table, pad = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    leaves = qkv.requires_grad_(), table.requires_grad_()
    for which in (0, 1):
        found, expected = (
            torch.autograd.grad(
                torch.autograd.grad(function(ops, qkv, table, pad).square().sum(), leaves[which], create_graph=True)[0]
                .square()
                .sum(),
                leaves,
            )
            for ops in (vidattn, reference)
        )
        torch.testing.assert_close(found, expected)


def test_direct_calls_of_ops_in_forward_mode() -> None:
    qkv, tangent = torch.randn(1, 8, 3, 2, 4), torch.randn(1, 8, 3, 2, 4)

    def direct(x: Tensor) -> Tensor:
        op = torch.ops.vidattn.divided_attention
        return op(x, None, None, None, 4, "thw", 2, None, 0.5, 0.0, "reference")[0]

    expected = torch.func.jvp(lambda x: reference.temporal_attention(x, 4, scale=0.5), (qkv,), (tangent,))
    torch.testing.assert_close(torch.func.jvp(direct, (qkv,), (tangent,)), expected)
    torch.testing.assert_close(torch.func.vmap(direct)(qkv[None])[0], expected[0])
    compiled = torch.compile(lambda x, t: torch.func.jvp(direct, (x,), (t,)), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(qkv, tangent), expected)


@pytest.mark.parametrize("name", ["window3d", "temporal", "mixing", "shift"])
def test_transforms_inside_a_compiled_function(name: str) -> None:
    attend, shapes = CASES[name]
    inputs = tuple(torch.randn(shape) for shape in shapes)

    def transforms(ops: Any, x: tuple[Tensor, ...]) -> Any:
        function = partial(attend, ops)
        return torch.func.jvp(function, x, x), torch.func.grad(_scalar(function))(*x)

    torch._dynamo.reset()
    compiled = torch.compile(lambda x: transforms(vidattn, x), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(inputs), transforms(reference, inputs))


@pytest.mark.parametrize("name", ["window3d", "window", "temporal", "spatial", "mixing", "shift"])
def test_compile_where_the_environment_has_ci(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor refuses there to call an op that has a decomposition, unless it was told to."""
    attend, shapes = CASES[name]
    inputs = tuple(torch.randn(shape, requires_grad=True) for shape in shapes)
    monkeypatch.setenv("CI", "true")
    for op in [op for op in lowering.lowerings if str(op).startswith("vidattn")]:
        monkeypatch.delitem(lowering.lowerings, op)
    torch._dynamo.reset()
    with torch._inductor.config.patch(fx_graph_cache=False), torch._functorch.config.patch(enable_autograd_cache=False):
        compiled = torch.compile(partial(attend, vidattn), fullgraph=True)
        results = torch.autograd.grad(compiled(*inputs).square().sum(), inputs)
    torch.testing.assert_close(results, torch.autograd.grad(attend(vidattn, *inputs).square().sum(), inputs))
    assert any(str(op).startswith("vidattn") for op in lowering.lowerings)


FAMILIES = ("video_swin_t", "timesformer_base", "vivit_b_factorized_self_attention", "xvit_b16_8f")


@pytest.mark.parametrize("name", FAMILIES)
def test_transforms_of_accelerated_models(name: str) -> None:
    model, fast = tiny(name), tiny(name)
    assert vidattn.accelerate(fast).swapped
    x, tangent = clips(2), clips(2).flip(0)
    close = {"rtol": 1e-3, "atol": 1e-4}
    torch.testing.assert_close(torch.func.jvp(fast, (x,), (tangent,)), torch.func.jvp(model, (x,), (tangent,)), **close)
    values = {key: value.detach() for key, value in model.named_parameters()}

    def loss(module: nn.Module, clip: Tensor) -> Callable[[dict[str, Tensor]], Tensor]:
        return lambda parameters: torch.func.functional_call(module, parameters, (clip[None],)).square().sum()

    def per_sample(module: nn.Module) -> dict[str, Tensor]:
        return torch.func.vmap(lambda clip: torch.func.grad(loss(module, clip))(values))(x)

    torch.testing.assert_close(per_sample(fast), per_sample(model), **close)
    torch.testing.assert_close(_penalty(fast, (x,)), _penalty(model, (x,)), **close)

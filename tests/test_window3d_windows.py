"""Numbers of window_attention: windows that are already partitioned, dense biases, arbitrary masks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from attention_cases import (
    BACKEND_DTYPES,
    BACKENDS,
    BACKENDS_THAT_LEARN_A_DENSE_BIAS,
    BACKENDS_WITH_FLOAT32,
    BACKENDS_WITH_FLOAT64,
    DROPOUT_DTYPES,
    DTYPES,
    SUPPORTED,
    about,
    device_of,
    evaluate,
    full_precision,
    half_precision,
    on_cpu,
    seed_of,
    seeds_from_the_host,
    separated,
    single_precision,
    to,
    with_head_dims,
)
from tolerance import assert_all_close, assert_as_exact_as_plain
from torch import Tensor
from window3d_cases import SHORT_WINDOWS, check_window, window_inputs

import vidattn
from vidattn import reference
from vidattn.backends import TRITON_INTERPRETED

backends = pytest.mark.parametrize("backend", BACKENDS)
learn_a_dense_bias = pytest.mark.parametrize("backend", BACKENDS_THAT_LEARN_A_DENSE_BIAS)
backends_and_dtypes = pytest.mark.parametrize(("backend", "dtype"), BACKEND_DTYPES)


@pytest.mark.parametrize(("backend", "dtype", "head_dim"), with_head_dims([1, 5, 16, 24, 32, 64, 128]))
def test_head_dims(backend: str, dtype: torch.dtype, head_dim: int) -> None:
    check_window(window_inputs(6, 27, 2, head_dim, dtype), backend)


@backends
@pytest.mark.parametrize("tokens", SHORT_WINDOWS)
def test_every_short_window(backend: str, tokens: int) -> None:
    mask = torch.randn(2, tokens, tokens)
    for dtype in (single_precision(backend), half_precision(backend)):
        check_window(window_inputs(4, tokens, 1, 8, dtype), backend, mask.to(dtype))


@backends_and_dtypes
@pytest.mark.parametrize("tokens", [98, 392])
def test_real_windows(backend: str, dtype: torch.dtype, tokens: int) -> None:
    check_window(window_inputs(2, tokens, 3, 32, dtype), backend, torch.randn(2, tokens, tokens).to(dtype))


@pytest.mark.parametrize("backend", BACKENDS_WITH_FLOAT32)
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
@pytest.mark.parametrize("spread", [2.0, 30.0])
def test_saturated_softmax(backend: str, spread: float, dropout_p: float) -> None:
    """One key has nearly all the weight: the gradients of q and k are what rounding would hide first.

    Scores are exact: what is compared is what follows them.
    """
    device = device_of(backend)
    for tokens in (5, 33) if TRITON_INTERPRETED else (5, 33, 100, *((130, 200) if backend != "triton" else ())):
        inputs = window_inputs(12, tokens, 2, 16, torch.float32)
        inputs["qkv"][:, :, :2] = (inputs["qkv"][:, :, :2] * spread).round()
        inputs["bias"] = inputs["bias"].round()
        inputs["grad_out"] *= 100.0
        mask = torch.randn(2, tokens, tokens).round()
        mask[0, 1], mask[1, :, 0] = -math.inf, -100.0  # a row that is masked as a whole, a key that hardly counts
        options = {"mask": mask, "dropout_p": dropout_p, "seed": seed_of(1)}
        plain = evaluate(reference.window_attention, inputs, options)
        options = dict(options, mask=mask.double())
        exact = evaluate(reference.window_attention, to(inputs, torch.float64), options)
        torch.manual_seed(1)
        with seeds_from_the_host():
            options = {"mask": mask.to(device), "dropout_p": dropout_p, "backend": backend}
            actual = evaluate(vidattn.window_attention, to(inputs, device), options)
        assert_as_exact_as_plain(on_cpu(actual), plain, exact)


@pytest.mark.needs_triton
def test_saturated_softmax_of_rows_that_are_streamed() -> None:
    """The limit that the documentation states: dq and dk are off by the rounding of sum(dO O), and by no more."""
    tokens, head_dim = 144, 8
    inputs = window_inputs(2, tokens, 1, head_dim, torch.float32, bias=False)
    inputs["qkv"][:, :, :2] = (inputs["qkv"][:, :, :2] * 30).round()
    inputs["grad_out"] *= 100.0
    exact = evaluate(reference.window_attention, to(inputs, torch.float64), {})
    actual = on_cpu(evaluate(vidattn.window_attention, to(inputs, device_of("triton")), {"backend": "triton"}))
    delta = (inputs["grad_out"].double() * exact["out"]).abs().sum(-1).max()
    other = inputs["qkv"][:, :, :2].double().abs().max()
    allowed = 4 * torch.finfo(torch.float32).eps * head_dim**-0.5 * delta * other * tokens**0.5
    error = (actual["qkv"].double() - exact["qkv"])[:, :, :2].abs().max()
    assert error <= allowed, f"off by {error:.3e}, allowed {allowed:.3e}"


@backends
@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.float64])
def test_bias_of_another_dtype(backend: str, bias_dtype: torch.dtype) -> None:
    """The gradient of a float32 bias is not rounded on its way, though q, k and v have 16 bits."""
    for dtype in (dtype for dtype in SUPPORTED[backend] if dtype.itemsize == 2):
        for tokens in (1, 2, 5, 33, 65) if TRITON_INTERPRETED else (1, 2, 5, 33, 128, 130):
            inputs = window_inputs(6, tokens, 2, 8, dtype)
            inputs["bias"] = torch.randn(2, tokens, tokens, dtype=bias_dtype)
            check_window(inputs, backend, torch.randn(3, tokens, tokens))


@backends_and_dtypes
def test_without_bias_or_mask(backend: str, dtype: torch.dtype) -> None:
    check_window(window_inputs(3, 20, 2, 16, dtype, bias=False), backend)
    check_window(window_inputs(4, 20, 2, 16, dtype, bias=False), backend, torch.randn(4, 20, 20).to(dtype), scale=0.7)


@backends_and_dtypes
@pytest.mark.parametrize("kinds", [1, 2, 3, 6])
def test_masks_repeat_over_the_batch(backend: str, dtype: torch.dtype, kinds: int) -> None:
    """Window g takes mask g modulo nW, whatever the values: shallow, deep, positive, minus infinity."""
    mask = 5 * torch.randn(kinds, 20, 20)
    mask[torch.rand(kinds, 20, 20) < 0.3] = -100.0
    mask[torch.rand(kinds, 20, 20) < 0.2] = -math.inf
    mask.diagonal(dim1=1, dim2=2).zero_()
    check_window(window_inputs(6, 20, 2, 16, dtype), backend, mask.to(dtype))


@backends_and_dtypes
def test_fully_masked_rows(backend: str, dtype: torch.dtype) -> None:
    """Rows without a key give 0, log-sum-exp -inf and zero gradients; the others what they give anyway."""
    inputs = window_inputs(4, 20, 2, 16, dtype)
    mask = torch.zeros(2, 20, 20, dtype=dtype)
    mask[0, 3], mask[0, 19], mask[1] = -math.inf, -math.inf, -math.inf
    mask[0, :, 7] = -math.inf
    check_window(inputs, backend, mask)
    device = device_of(backend)
    out, lse = torch.ops.vidattn.window_attention(
        inputs["qkv"].to(device), None, None, inputs["bias"].to(device), mask.to(device), None, None, 0.25, 0.0, backend
    )
    grads = evaluate(vidattn.window_attention, to(inputs, device), {"mask": mask.to(device), "backend": backend})
    empty = torch.zeros(4, 20, dtype=torch.bool)
    empty[0::2, 3], empty[0::2, 19], empty[1::2] = True, True, True
    assert (out.cpu()[empty] == 0).all() and (lse.cpu()[empty] == -math.inf).all()
    assert lse.cpu()[~empty].isfinite().all()
    grad_q, grad_k, grad_v = on_cpu(grads)["qkv"].unbind(-3)  # type: ignore[union-attr]
    assert (grad_q[empty] == 0).all()
    assert (grad_k[0::2, 7] == 0).all() and (grad_v[0::2, 7] == 0).all()  # a key that nobody sees
    assert (grad_k[1::2] == 0).all() and (grad_v[1::2] == 0).all()


@backends_and_dtypes
def test_minus_infinity_in_the_bias(backend: str, dtype: torch.dtype) -> None:
    inputs = window_inputs(4, 20, 2, 16, dtype)
    inputs["bias"][1, 4] = -math.inf
    inputs["bias"][0, :, 2] = -math.inf
    check_window(inputs, backend)


@learn_a_dense_bias
@pytest.mark.parametrize("mask_dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_masks_and_biases_of_another_dtype(backend: str, mask_dtype: torch.dtype) -> None:
    device = device_of(backend)
    dtype = half_precision(backend)
    inputs = to(window_inputs(4, 20, 2, 16, dtype), device)
    mask = torch.randn(2, 20, 20, device=device).to(mask_dtype)
    bias = inputs["bias"].to(mask_dtype).requires_grad_()
    out = vidattn.window_attention(inputs["qkv"], bias, mask, backend=backend)
    same = vidattn.window_attention(inputs["qkv"], bias.float(), mask.float(), backend=backend)
    assert out.dtype == dtype and torch.equal(out, same)
    (grad,) = torch.autograd.grad(out, bias, inputs["grad_out"])
    assert grad.dtype == mask_dtype


@pytest.mark.parametrize(("backend", "dtype"), DROPOUT_DTYPES)
@pytest.mark.parametrize("dropout_p", [0.1, 0.6])
def test_dropout(backend: str, dtype: torch.dtype, dropout_p: float) -> None:
    mask = torch.randn(2, 21, 21).to(dtype)
    check_window(window_inputs(6, 21, 3, 16, dtype), backend, mask, dropout_p=dropout_p)


@backends
def test_separate_and_strided_tensors(backend: str) -> None:
    device = device_of(backend)
    inputs = to(window_inputs(4, 20, 2, 16, single_precision(backend)), device)
    options = {"backend": backend, "mask": torch.randn(2, 20, 20, device=device)}
    expected = evaluate(vidattn.window_attention, inputs, options)
    apart = evaluate(separated(vidattn.window_attention), inputs, options)

    def strided(qkv: Tensor, bias: Tensor, **kwargs: Any) -> Tensor:
        mask = kwargs.pop("mask").transpose(1, 2).contiguous().transpose(1, 2)
        by_head = qkv.permute(2, 3, 0, 1, 4).contiguous().permute(2, 3, 0, 1, 4)
        return vidattn.window_attention(by_head, bias.permute(1, 2, 0).contiguous().permute(2, 0, 1), mask, **kwargs)

    for actual in (apart, evaluate(strided, inputs, options)):
        for name, value in actual.items():
            assert torch.equal(value, expected[name]), name  # type: ignore[arg-type]


@learn_a_dense_bias
def test_each_input_alone_requires_a_gradient(backend: str) -> None:
    inputs = to(window_inputs(4, 20, 2, 16, single_precision(backend)), device_of(backend))
    expected = evaluate(vidattn.window_attention, inputs, {"backend": backend})
    for alone in ("qkv", "bias"):
        leaves = {name: inputs[name].clone().requires_grad_(name == alone) for name in ("qkv", "bias")}
        vidattn.window_attention(**leaves, backend=backend).backward(inputs["grad_out"])
        assert torch.equal(leaves[alone].grad, expected[alone])  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
@pytest.mark.parametrize("shape", [(0, 5), (4, 0)], ids=str)
def test_empty_inputs(backend: str, shape: tuple[int, int]) -> None:
    groups, tokens = shape
    inputs = to(window_inputs(groups, tokens, 2, 8, single_precision(backend)), device_of(backend))
    for attend in (vidattn.window_attention, separated(vidattn.window_attention)):
        results = evaluate(attend, inputs, {"backend": backend})
        assert results["out"].shape == (groups, tokens, 16)  # type: ignore[union-attr]
        assert results["qkv"].shape == inputs["qkv"].shape  # type: ignore[union-attr]
        assert (results.get("bias", torch.zeros(1)) == 0).all()  # type: ignore[union-attr]


@backends
def test_seventy_thousand_windows(backend: str) -> None:
    check_window(window_inputs(70_000, 3, 1, 2, single_precision(backend)), backend, torch.randn(7, 3, 3))


@backends
def test_same_as_a_grid_of_whole_windows(backend: str) -> None:
    """Partitioned by hand, with the table expanded, it is window3d_attention."""
    device = device_of(backend)
    dtype = single_precision(backend)
    qkv = torch.randn(2, 4, 6, 6, 3, 2, 8, dtype=dtype, device=device)
    table = torch.randn(3 * 5 * 5, 2, device=device)
    windows = vidattn.geometry.resolve_windows((4, 6, 6), (2, 3, 3))
    bias = table[vidattn.geometry.bias_rows((2, 3, 3), windows).to(device)].permute(2, 0, 1)
    tokens = vidattn.geometry.source_tokens(windows).to(device)
    partitioned = qkv.flatten(1, 3)[:, tokens].flatten(0, 1)
    out = vidattn.window_attention(partitioned, bias, backend=backend)
    grid = vidattn.window3d_attention(qkv, table, window_size=(2, 3, 3), backend=backend)
    torch.testing.assert_close(out, grid.flatten(1, 3)[:, tokens].flatten(0, 1), **about(dtype, 1e-6))


@pytest.mark.parametrize("backend", BACKENDS_WITH_FLOAT64)
def test_float64_gradcheck(backend: str) -> None:
    qkv = torch.randn(2, 5, 3, 2, 2, dtype=torch.float64, device=device_of(backend), requires_grad=True)
    bias = torch.randn(2, 5, 5, dtype=torch.float64, device=device_of(backend), requires_grad=True)
    mask = torch.randn(2, 5, 5, device=device_of(backend))
    mask[0, 3], mask[:, :, 1] = -math.inf, -math.inf

    def attend(qkv: Tensor, bias: Tensor, dropout_p: float) -> Tensor:
        torch.manual_seed(5)
        return vidattn.window_attention(qkv, bias, mask, dropout_p=dropout_p, backend=backend)

    for dropout_p in (0.0, 0.4):
        assert torch.autograd.gradcheck(attend, (qkv, bias, dropout_p))


@learn_a_dense_bias
def test_a_learned_bias_of_one_kind_for_all_heads(backend: str) -> None:
    """A bias broadcast over the heads gets the sum of their gradients."""
    device = device_of(backend)
    dtype = full_precision(backend)
    inputs = window_inputs(4, 20, 2, 16, dtype, bias=False)
    shared = torch.randn(1, 20, 20, dtype=dtype)

    def attend(qkv: Tensor, shared: Tensor, **options: Any) -> Tensor:
        function = vidattn.window_attention if "backend" in options else reference.window_attention
        return function(qkv, shared.expand(2, -1, -1), **options)  # type: ignore[operator]

    given = dict(inputs, shared=shared)
    expected, exact = evaluate(attend, given, {}), evaluate(attend, to(given, torch.float64), {})
    assert_all_close(on_cpu(evaluate(attend, to(given, device), {"backend": backend})), expected, exact, dtype)

"""Numbers of window3d_attention: every backend that runs here against the float64 reference, forward and backward."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from attention_cases import (
    BACKEND_DTYPES,
    BACKENDS,
    BACKENDS_WITH_DROPOUT,
    BACKENDS_WITH_FLOAT64,
    DROPOUT_DTYPES,
    SUPPORTED,
    about,
    device_of,
    evaluate,
    full_precision,
    half_precision,
    on_cpu,
    single_precision,
    to,
    with_head_dims,
)
from tolerance import assert_all_close, assert_close
from torch import Tensor
from window3d_cases import SHORT_WINDOWS, Case, check, expected_and_exact, subsets

import vidattn
from vidattn import reference
from vidattn.backends import TRITON_INTERPRETED
from vidattn.geometry import resolve_windows

backends = pytest.mark.parametrize("backend", BACKENDS)
backends_and_dtypes = pytest.mark.parametrize(("backend", "dtype"), BACKEND_DTYPES)
HEAD_DIMS = (1, 5, 8, 16, 20, 24, 30, 32, 48, 64, 96, 128)
# Windows of 1, 8, 49, 98, 144, 196, 343, 392 and 784 tokens.
WINDOWS = ((1, 1, 1), (2, 2, 2), (1, 7, 7), (2, 7, 7), (4, 6, 6), (4, 7, 7), (7, 7, 7), (8, 7, 7), (16, 7, 7))
SHIFTED = Case((3, 5, 7), (2, 3, 3), (1, 1, 1))


@pytest.mark.parametrize(("backend", "dtype", "head_dim"), with_head_dims(HEAD_DIMS))
def test_head_dims(backend: str, dtype: torch.dtype, head_dim: int) -> None:
    check(replace(SHIFTED, head_dim=head_dim), dtype, backend)


@backends_and_dtypes
@pytest.mark.parametrize("window", WINDOWS, ids=lambda window: str(math.prod(window)))
def test_window_lengths(backend: str, dtype: torch.dtype, window: tuple[int, int, int]) -> None:
    # One axis has two windows, the second partly padding; the others are a single window.
    grid = (window[0], window[1], window[2] + max(1, window[2] // 2))
    shift = (0, 0, min(1, window[2] - 1))
    check(Case(grid, window, shift, batch=1, heads=2, head_dim=16), dtype, backend)


@backends
@pytest.mark.parametrize("tokens", SHORT_WINDOWS)
def test_every_short_window(backend: str, tokens: int) -> None:
    """Lengths around every multiple of a vector or tile, with all keys real."""
    case = Case((1, 1, tokens), (1, 1, tokens), batch=2, heads=1, head_dim=8, pad=False)
    for dtype in (single_precision(backend), half_precision(backend)):
        check(case, dtype, backend)


@backends
@pytest.mark.parametrize("bias_index", ["prefix", "geometric"])
@pytest.mark.parametrize("grid", subsets((2, 3, 2), (5, 7, 8)), ids=str)
def test_clipped_axes(backend: str, bias_index: str, grid: tuple[int, int, int]) -> None:
    """Each subset of axes shorter than the window, with a shift configured on all of them."""
    case = Case(grid, (4, 5, 3), (2, 1, 2), bias_index=bias_index)
    for dtype in {single_precision(backend), full_precision(backend)}:
        check(case, dtype, backend)


def test_bias_indexings_differ_where_the_window_is_clipped() -> None:
    case = Case((4, 3, 8), (4, 5, 3), pad=False)
    inputs = case.inputs(torch.float64)
    results = [
        vidattn.window3d_attention(inputs["qkv"], inputs["bias_table"], **dict(case.options(), bias_index=bias_index))
        for bias_index in ("prefix", "geometric")
    ]
    assert (results[0] - results[1]).abs().max() > 0.1


@backends
@pytest.mark.parametrize("shift", subsets((1, 2, 3), (0, 0, 0)), ids=str)
def test_shifted_and_cyclic_axes(backend: str, shift: tuple[int, int, int]) -> None:
    """Each subset of shifted axes, with each subset of cyclic ones."""
    for bits in range(8) if not TRITON_INTERPRETED else (0, 6):
        wrap = (bits % 2 == 1, bits // 2 % 2 == 1, bits // 4 == 1)
        check(Case((4, 6, 9), (2, 3, 4), shift, batch=1, wrap=wrap), full_precision(backend), backend)
    check(Case((4, 6, 9), (2, 3, 4), shift), single_precision(backend), backend)


@backends_and_dtypes
@pytest.mark.parametrize("shift", [(0, 0, 0), (1, 1, 2)], ids=["unshifted", "shifted"])
@pytest.mark.parametrize("pad", [True, False], ids=["pad", "zero"])
def test_padding(backend: str, dtype: torch.dtype, shift: tuple[int, int, int], pad: bool) -> None:
    """Padding on each axis, as values of the projection's bias and as zeros; its gradient too."""
    check(Case((3, 4, 5), (2, 3, 4), shift, pad=pad), dtype, backend)


@backends_and_dtypes
def test_without_bias(backend: str, dtype: torch.dtype) -> None:
    check(replace(SHIFTED, bias_index=None), dtype, backend)


@backends_and_dtypes
def test_scale(backend: str, dtype: torch.dtype) -> None:
    for scale in (0.05, 1.7, 0.0, -0.3):
        check(replace(SHIFTED, scale=scale), dtype, backend)


@backends_and_dtypes
@pytest.mark.parametrize("mask_value", [-100.0, -math.inf, -1e4, 0.0, 3.0])
def test_mask_values(backend: str, dtype: torch.dtype, mask_value: float) -> None:
    check(replace(SHIFTED, mask_value=mask_value), dtype, backend)


@backends_and_dtypes
@pytest.mark.parametrize("mask_value", [-100.0, -math.inf])
def test_adversarial_logits(backend: str, dtype: torch.dtype, mask_value: float) -> None:
    """Scores of -150, 0 and 150, further apart than the mask is deep: masked keys that win must win.

    They are products of one-hot vectors, exact in every dtype: what is compared is what follows them.
    """
    case = replace(SHIFTED, head_dim=16, scale=1.0, mask_value=mask_value)
    inputs = case.inputs(dtype)
    tokens = (case.batch, *case.grid, case.heads)
    for which in range(2):
        sign = torch.randint(0, 2, tokens) * 2.0 - 1.0
        one_hot = torch.nn.functional.one_hot(torch.randint(0, 3, tokens), case.head_dim)
        inputs["qkv"][..., which, :, :] = (12.25 * sign[..., None] * one_hot).to(dtype)
    expected, exact = expected_and_exact(inputs, case.options())
    actual = evaluate(vidattn.window3d_attention, to(inputs, device_of(backend)), dict(case.options(), backend=backend))
    assert_all_close(on_cpu(actual), expected, exact, dtype, whole_rows=case.has_whole_rows(backend))


@backends_and_dtypes
@pytest.mark.parametrize("mask_value", [-100.0, -math.inf])
@pytest.mark.parametrize("shift", [(4, 0, 0), (4, 3, 3)])
def test_tiles_that_the_mask_hides(
    backend: str, dtype: torch.dtype, mask_value: float, shift: tuple[int, int, int]
) -> None:
    """Windows long enough that whole tiles of keys lie in another region; with ordinary scores they may be left out."""
    case = Case((16, 7, 10), (8, 7, 7), shift, batch=1, heads=2, head_dim=16, mask_value=mask_value)
    if TRITON_INTERPRETED:
        case = replace(case, grid=(16, 4, 6), window=(8, 4, 4), shift=(4, min(shift[1], 1), min(shift[2], 1)), heads=1)
    check(case, dtype, backend)


@backends_and_dtypes
@pytest.mark.parametrize("mask_value", [-100.0, -math.inf])
def test_a_tile_whose_full_tiles_are_all_hidden(backend: str, dtype: torch.dtype, mask_value: float) -> None:
    """The last six tokens of 70 see each other alone."""
    case = Case((1, 1, 140), (1, 1, 70), (0, 0, 6), batch=1, heads=1, head_dim=16, mask_value=mask_value)
    check(case, dtype, backend)


@backends_and_dtypes
@pytest.mark.parametrize("key", [5.0, 50.0, 150.0, math.nan])
def test_hidden_tiles_count_when_they_can_win(backend: str, dtype: torch.dtype, key: float) -> None:
    """Leaving tiles out must depend on the scores: a masked key 150 above the rest takes all the weight."""
    device = device_of(backend)
    qkv = torch.zeros(1, 8, 8, 8, 3, 1, 1, device=device)
    qkv[..., 0, :, :] = 1.0
    qkv[0, :4, :, :, 2] = 1.0  # the values of the first half of the frames
    # Windows of 4 frames, shift 2: the last window holds frames 6 and 7, whose values are 0, then frames 0 and 1.
    qkv[0, 0, 0, 0, 1] = key
    out = vidattn.window3d_attention(
        qkv.to(dtype), window_size=(4, 8, 8), shift_size=(2, 0, 0), scale=1.0, backend=backend
    )
    expected = {5.0: 0.0, 50.0: 0.0, 150.0: 1.0}.get(key, math.nan)
    torch.testing.assert_close(out[0, 6:].float(), torch.full_like(out[0, 6:].float(), expected), equal_nan=True)


@backends
def test_a_masked_key_that_wins(backend: str) -> None:
    """A hundred is added, not minus infinity: a masked key whose score is 150 above the rest takes all the weight."""
    device = device_of(backend)
    qkv = torch.zeros(1, 1, 1, 4, 3, 1, 1, dtype=single_precision(backend), device=device)
    # Windows of 2, shift 1: the last window holds tokens 3 and 0, which the mask separates.
    qkv[0, 0, 0, :, 0], qkv[0, 0, 0, 0, 1], qkv[0, 0, 0, :, 2, 0, 0] = 1.0, 150.0, torch.arange(4.0, device=device)
    call = {"window_size": (1, 1, 2), "shift_size": (0, 0, 1), "scale": 1.0, "backend": backend}
    assert vidattn.window3d_attention(qkv, **call)[0, 0, 0, 3].item() < 1e-20
    assert vidattn.window3d_attention(qkv, mask_value=-math.inf, **call)[0, 0, 0, 3].item() == 3.0
    qkv[0, 0, 0, 0, 1] = 50.0
    assert abs(vidattn.window3d_attention(qkv, **call)[0, 0, 0, 3].item() - 3.0) < 1e-6


@backends_and_dtypes
def test_offset_logits(backend: str, dtype: torch.dtype) -> None:
    """A bias table whose entries are all far from zero changes no probability."""
    case = replace(SHIFTED, table_spread=0.1)
    inputs = case.inputs(dtype, torch.float32)
    for offset in (-300.0, 300.0):
        moved = dict(inputs, bias_table=inputs["bias_table"] + offset)
        expected, exact = expected_and_exact(moved, case.options())
        actual = evaluate(
            vidattn.window3d_attention, to(moved, device_of(backend)), dict(case.options(), backend=backend)
        )
        assert_all_close(on_cpu(actual), expected, exact, dtype, whole_rows=case.has_whole_rows(backend))


@backends_and_dtypes
def test_log_sum_exp(backend: str, dtype: torch.dtype) -> None:
    case = SHIFTED
    inputs = case.inputs(dtype)
    options = case.options()
    qkv, table, pad = inputs["qkv"], inputs["bias_table"], inputs["pad_qkv"]
    _, expected = reference.window3d_attention(qkv, table, pad_qkv=pad, return_lse=True, **options)
    _, exact = reference.window3d_attention(
        qkv.double(), table.double(), pad_qkv=pad.double(), return_lse=True, **options
    )
    device = device_of(backend)
    _, actual = torch.ops.vidattn.window3d_attention(
        qkv.to(device), None, None, table.to(device), pad.to(device), None, None, None, None,
        case.window, case.shift, case.wrap, "prefix", case.mask_value, case.head_dim**-0.5, 0.0,
        True, (), "before_shift", backend,
    )  # fmt: skip
    assert_close("lse", actual.cpu(), expected, exact, expected.dtype, 3.0)


@backends_and_dtypes
def test_separate_tensors(backend: str, dtype: torch.dtype) -> None:
    check(SHIFTED, dtype, backend, separate=True)


@backends
@pytest.mark.parametrize("table_dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_table_of_another_dtype(backend: str, table_dtype: torch.dtype) -> None:
    for dtype in SUPPORTED[backend]:
        check(SHIFTED, dtype, backend, table_dtype=table_dtype)


@backends
def test_a_table_is_read_at_every_call(backend: str) -> None:
    """Whatever writes to a table, also what no version counter counts: nothing made from it is kept."""
    dtype = single_precision(backend)
    qkv = torch.randn(1, 4, 4, 4, 3, 2, 8, dtype=dtype, device=device_of(backend))
    table = torch.nn.Parameter(torch.randn(27, 2, device=device_of(backend)))
    with torch.no_grad():
        for shift in (0, 1):
            for value in (1.0, -2.0):
                table.data[:9] = value
                call = {"window_size": 2, "shift_size": shift}
                found = vidattn.window3d_attention(qkv, table, **call, backend=backend)
                expected = vidattn.window3d_attention(qkv, table.clone(), **call, backend="reference")
                torch.testing.assert_close(found, expected, **about(dtype))


def _strided(x: Tensor, kind: str) -> Tensor:
    """The same values with other strides."""
    if kind == "permuted":
        return x.movedim(1, -2).contiguous().movedim(-2, 1)
    if kind == "sliced":
        wide = x.new_full((*x.shape[:-1], x.shape[-1] + 3), float("nan"))
        wide[..., :-3] = x
        return wide[..., :-3]
    if kind == "every second":
        wide = x.new_full((x.shape[0], 2 * x.shape[1], *x.shape[2:]), float("nan"))
        wide[:, ::2] = x
        return wide[:, ::2]
    if kind == "channels first":  # the last dimension is strided, so it is copied
        return x.movedim(-1, 1).contiguous().movedim(1, -1)
    raise AssertionError(kind)


@backends
@pytest.mark.parametrize("kind", ["permuted", "sliced", "every second", "channels first"])
def test_strides(backend: str, kind: str) -> None:
    """Strided inputs and gradients give what contiguous ones give."""
    case = SHIFTED
    for dtype in (single_precision(backend), half_precision(backend)):
        inputs = to(case.inputs(dtype), device_of(backend))
        options = dict(case.options(), backend=backend)
        expected = evaluate(vidattn.window3d_attention, inputs, options)
        for form in ("packed", "apart"):
            leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.items() if name != "grad_out"}
            qkv = _strided(leaves["qkv"], kind)
            assert not qkv.is_contiguous()
            given: Any = qkv if form == "packed" else tuple(_strided(x, kind) for x in leaves["qkv"].unbind(-3))
            out = vidattn.window3d_attention(given, leaves["bias_table"], pad_qkv=leaves["pad_qkv"], **options)
            grads = torch.autograd.grad(out, list(leaves.values()), _strided(inputs["grad_out"], kind))
            for name, value in (("out", out), *zip(leaves, grads, strict=True)):
                assert torch.equal(value, expected[name]), name  # type: ignore[arg-type]


@backends
def test_tensors_of_different_strides(backend: str) -> None:
    case = SHIFTED
    inputs = to(case.inputs(single_precision(backend)), device_of(backend))
    options = dict(case.options(), backend=backend)
    expected = evaluate(vidattn.window3d_attention, inputs, options)

    def attend(qkv: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        q, k, v = qkv.unbind(-3)
        mixed = (_strided(q, "permuted"), _strided(k, "every second"), _strided(v, "sliced"))
        return vidattn.window3d_attention(mixed, *args, **kwargs)

    actual = evaluate(attend, inputs, options)
    for name, value in actual.items():
        assert torch.equal(value, expected[name]), name  # type: ignore[arg-type]


@backends
def test_expanded_tensors(backend: str) -> None:
    """A broadcast batch and the gradient of a sum, whose strides are zero."""
    case = replace(SHIFTED, batch=3)
    inputs = to(case.inputs(single_precision(backend)), device_of(backend))
    qkv = inputs["qkv"][:1].expand_as(inputs["qkv"]).requires_grad_()
    table = inputs["bias_table"].requires_grad_()
    options = dict(case.options(), backend=backend)
    results = []
    for given, ones in ((qkv, None), (qkv.contiguous(), torch.ones_like(inputs["grad_out"]))):
        out = vidattn.window3d_attention(given, table, pad_qkv=inputs["pad_qkv"], **options)
        loss = out.sum() if ones is None else (out * ones).sum()
        results.append((out, *torch.autograd.grad(loss, (qkv, table))))
    for actual, expected in zip(*results, strict=True):
        assert torch.equal(actual, expected)
    grad = inputs["grad_out"][:1].expand_as(inputs["grad_out"])
    out = vidattn.window3d_attention(qkv, table, pad_qkv=inputs["pad_qkv"], **options)
    first = torch.autograd.grad(out, (qkv, table), grad, retain_graph=True)
    second = torch.autograd.grad(out, (qkv, table), grad.contiguous())
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@backends
@pytest.mark.parametrize("form", ["packed", "apart"])
def test_each_input_alone_requires_a_gradient(backend: str, form: str) -> None:
    case = SHIFTED
    inputs = to(case.inputs(single_precision(backend)), device_of(backend))
    options = dict(case.options(), backend=backend)
    expected = evaluate(vidattn.window3d_attention, inputs, options)
    q, k, v = inputs["qkv"].unbind(-3)
    values = {name: inputs[name] for name in ("bias_table", "pad_qkv")}
    values |= {"qkv": inputs["qkv"]} if form == "packed" else {"q": q, "k": k, "v": v}
    for alone in values:
        leaves = {name: x.detach().clone().requires_grad_(name == alone) for name, x in values.items()}
        given = leaves["qkv"] if form == "packed" else (leaves["q"], leaves["k"], leaves["v"])
        out = vidattn.window3d_attention(given, leaves["bias_table"], pad_qkv=leaves["pad_qkv"], **options)
        out.backward(inputs["grad_out"])
        for name, leaf in leaves.items():
            assert (leaf.grad is None) == (name != alone), name
        true = expected["qkv"].unbind(-3)["qkv".index(alone)] if alone in "qkv" and alone != "qkv" else expected[alone]  # type: ignore[union-attr]
        assert torch.equal(leaves[alone].grad, true), alone  # type: ignore[arg-type]


@backends
def test_pad_qkv_as_the_projection_holds_it(backend: str) -> None:
    """The bias of a Linear, flat and in another dtype, is taken and gets its gradient in that dtype."""
    case = SHIFTED
    inputs = to(case.inputs(half_precision(backend)), device_of(backend))
    flat = inputs["pad_qkv"].float().flatten().requires_grad_()
    options = dict(case.options(), backend=backend)
    out = vidattn.window3d_attention(inputs["qkv"], inputs["bias_table"], pad_qkv=flat, **options)
    expected = vidattn.window3d_attention(inputs["qkv"], inputs["bias_table"], pad_qkv=inputs["pad_qkv"], **options)
    assert torch.equal(out, expected)
    out.float().sum().backward()
    assert flat.grad is not None and flat.grad.dtype == torch.float32 and flat.grad.abs().max() > 0
    assert flat.grad.view(3, -1)[0].abs().max() == 0  # padding queries have no output


@backends
def test_unused_rows_of_the_table_get_zero(backend: str) -> None:
    case = Case((2, 3, 4), (4, 5, 3))
    inputs = to(case.inputs(single_precision(backend)), device_of(backend))
    grad = evaluate(vidattn.window3d_attention, inputs, dict(case.options(), backend=backend))["bias_table"]
    assert grad is not None and torch.isfinite(grad).all() and (grad.abs().sum(1) == 0).any()


@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
@pytest.mark.parametrize("grid", [(0, 4, 4, 4), (2, 0, 4, 4), (2, 4, 0, 4), (2, 4, 4, 0)], ids=str)
def test_empty_inputs(backend: str, grid: tuple[int, ...]) -> None:
    device = device_of(backend)
    for dtype in (single_precision(backend), torch.float16):
        qkv = torch.randn(*grid, 3, 2, 8, dtype=dtype, device=device, requires_grad=True)
        table = torch.randn(5 * 5 * 5, 2, device=device, requires_grad=True)
        pad = torch.randn(3, 2, 8, dtype=dtype, device=device, requires_grad=True)
        for given in (qkv, tuple(qkv.unbind(-3))):
            out = vidattn.window3d_attention(given, table, window_size=3, shift_size=1, pad_qkv=pad, backend=backend)
            assert out.shape == (*grid, 16) and out.dtype == dtype
            grads = torch.autograd.grad(out.sum(), (qkv, table, pad))
            assert grads[0].shape == qkv.shape
            assert all((grad == 0).all() for grad in grads)


@backends
def test_seventy_thousand_windows(backend: str) -> None:
    """More windows than a 16-bit grid dimension counts."""
    case = Case((70, 200, 10), (1, 1, 2), (0, 0, 1), batch=1, heads=1, head_dim=2)
    assert resolve_windows(case.grid, case.window, case.shift).num_windows == 70_000
    check(case, single_precision(backend), backend)


@backends
def test_offsets_beyond_two_to_the_31(backend: str) -> None:
    """Tokens further apart than an int32 counts elements; untouched pages of the storage cost no memory."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    device = device_of(backend)
    step = 2**31 + 8
    dtype = half_precision(backend)
    storage = torch.empty(step + 4096, dtype=dtype, device=device)
    compact = torch.randn(2, 1, 2, 4, 3, 2, 8, dtype=dtype, device=device)
    far = storage.as_strided(compact.shape, (step, *compact.stride()[1:])).copy_(compact)
    call = {"window_size": (1, 2, 2), "shift_size": (0, 0, 1), "backend": backend}
    assert torch.equal(vidattn.window3d_attention(far, **call), vidattn.window3d_attention(compact, **call))


@pytest.mark.parametrize(("backend", "dtype"), DROPOUT_DTYPES)
@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 0.95])
def test_dropout(backend: str, dtype: torch.dtype, dropout_p: float) -> None:
    """The mask of the reference, in the forward and in the backward pass."""
    check(replace(SHIFTED, dropout_p=dropout_p), dtype, backend)
    check(Case((1, 1, 37), (1, 1, 37), dropout_p=dropout_p, heads=3), dtype, backend, separate=True)


@pytest.mark.parametrize("backend", BACKENDS_WITH_DROPOUT)
def test_dropout_keeps_the_expected_share(backend: str) -> None:
    """With values of one and no bias every output is a share of kept weights: mean 1, and each mask is another."""
    qkv = torch.randn(4, 4, 8, 8, 3, 2, 8, device=device_of(backend))
    qkv[..., 2, :, :] = 1.0
    outs = [vidattn.window3d_attention(qkv, window_size=(2, 4, 4), dropout_p=0.3, backend=backend) for _ in range(2)]
    assert not torch.equal(*outs)
    assert abs(torch.stack(outs).mean().item() - 1.0) < 0.01
    torch.manual_seed(3)
    first = vidattn.window3d_attention(qkv, window_size=(2, 4, 4), dropout_p=0.3, backend=backend)
    torch.manual_seed(3)
    assert torch.equal(first, vidattn.window3d_attention(qkv, window_size=(2, 4, 4), dropout_p=0.3, backend=backend))


@backends
def test_bitwise_repeatable(backend: str) -> None:
    """Outputs and gradients, the table's too, repeat bit by bit, whatever the number of threads."""
    case = Case((4, 14, 10), (2, 7, 4), (1, 3, 2), batch=3, heads=3, head_dim=16)
    for dtype in (single_precision(backend), half_precision(backend)):
        inputs = to(case.inputs(dtype, torch.float32), device_of(backend))
        options = dict(case.options(), backend=backend)
        threads = torch.get_num_threads()
        try:
            results = []
            for count in (1, 2, 3, 1, 2, 3):
                torch.set_num_threads(count)
                results.append(evaluate(vidattn.window3d_attention, inputs, options))
        finally:
            torch.set_num_threads(threads)
        for result in results[1:]:
            if backend == "reference":  # the matrix products of torch may depend on the number of threads
                continue
            assert all(torch.equal(result[name], results[0][name]) for name in result)  # type: ignore[arg-type]
        again = evaluate(vidattn.window3d_attention, inputs, options)
        once_more = evaluate(vidattn.window3d_attention, inputs, options)
        assert all(torch.equal(again[name], once_more[name]) for name in again)  # type: ignore[arg-type]


@backends_and_dtypes
def test_a_nan_stays_in_its_window_and_head(backend: str, dtype: torch.dtype) -> None:
    """A NaN in q reaches its row, in v its channel, in k the rows of its window and head: no more, and no less."""
    for which in range(3):
        qkv = torch.randn(2, 2, 4, 4, 3, 2, 8, device=device_of(backend)).to(dtype)
        qkv[1, 1, 2, 3, which, 1, 5] = float("nan")
        out = vidattn.window3d_attention(qkv, window_size=2, backend=backend)
        poisoned = torch.zeros_like(out, dtype=torch.bool).unflatten(-1, (2, 8))
        window = poisoned[1, 0:2, 2:4, 2:4, 1]  # (2, 2, 2, 8)
        if which == 0:
            window[1, 0, 1] = True
        elif which == 1:
            window[:] = True
        else:
            window[..., 5] = True
        assert torch.equal(out.isnan(), poisoned.flatten(-2)), f"in {'qkv'[which]}"


@pytest.mark.parametrize("backend", BACKENDS_WITH_FLOAT64)
def test_float64_gradcheck(backend: str) -> None:
    """Gradients of the op itself by finite differences, with and without dropout."""
    device = device_of(backend)
    case = Case((3, 1, 3), (2, 1, 2), (1, 0, 1), batch=1, heads=2, head_dim=2)
    inputs = to(case.inputs(torch.float64), device)
    leaves = [inputs[name].requires_grad_() for name in ("qkv", "bias_table", "pad_qkv")]

    def attend(qkv: Tensor, table: Tensor, pad: Tensor, dropout_p: float) -> Tensor:
        torch.manual_seed(5)
        options = dict(case.options(), dropout_p=dropout_p, backend=backend)
        return vidattn.window3d_attention(qkv, table, pad_qkv=pad, **options)

    for dropout_p in (0.0, 0.4):
        assert torch.autograd.gradcheck(attend, (*leaves, dropout_p))

"""Windows as other models have them: rows of the bias table, a table for each type, no clipping, padding, regions.

First the reference against a plain statement of each option and against torchvision, then every backend against the
reference.
"""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from attention_cases import (
    BACKEND_DTYPES,
    BACKENDS,
    BACKENDS_THAT_LEARN_A_DENSE_BIAS,
    BACKENDS_WITH_DROPOUT,
    BACKENDS_WITH_FLOAT64,
    about,
    device_of,
    evaluate,
    full_precision,
    half_precision,
    single_precision,
    to,
)
from tolerance import OUTPUT_FACTOR, assert_close
from torch import Tensor
from torch.nn import functional as F
from window3d_cases import Case, check, check_window, expected_and_exact, options_on, window_inputs

import vidattn
from vidattn import reference
from vidattn.backends import TRITON_INTERPRETED
from vidattn.geometry import bias_rows

backends = pytest.mark.parametrize("backend", BACKENDS)
backends_and_dtypes = pytest.mark.parametrize(("backend", "dtype"), BACKEND_DTYPES)
# Padding and regions are for these alone.
flexible = pytest.mark.parametrize(
    ("backend", "dtype"), [p for p in BACKEND_DTYPES if p.values[0] in ("reference", "cpu")]
)
ROWS = Case((3, 5, 7), (2, 3, 3), (1, 1, 1), table_rows=9)
TYPES = Case((3, 5, 7), (2, 3, 3), (1, 1, 1), types=3)


# ---- The reference ----


def _partition(x: Tensor, window: tuple[int, ...]) -> Tensor:
    """Cut (B, D, H, W, ...) into (B, windows, tokens, ...)."""
    batch, tail = x.shape[0], x.shape[4:]
    counts = [size // extent for size, extent in zip(x.shape[1:4], window, strict=True)]
    x = x.view(batch, counts[0], window[0], counts[1], window[1], counts[2], window[2], *tail)
    x = x.permute(0, 1, 3, 5, 2, 4, 6, *range(7, x.dim()))
    return x.reshape(batch, math.prod(counts), math.prod(window), *tail)


def _plainly(case: Case, inputs: dict[str, Tensor], options: dict[str, Any]) -> Tensor:
    """Pad, roll (or the other way), partition, add table[type][row] and the mask, and undo it."""
    window, shift = list(case.window), list(case.shift)
    pads, needed = [], case.padding is None
    for axis, size in enumerate(case.grid):
        before, behind = (0, 0) if needed else case.padding[axis]  # type: ignore[index]
        whole = before + size + behind
        if whole <= window[axis]:
            shift[axis] = 0
            window[axis] = whole if case.clip_window else window[axis]
        pads.append((before, behind if not needed else -size % window[axis]))
    flat_pads = [0, 0] * 3 + [p for pair in reversed(pads) for p in pair]
    first = case.padding_order == "after_shift"
    back = [-s for s in shift]

    def arranged(x: Tensor) -> Tensor:
        x = x.roll(back, (1, 2, 3)) if first else x
        x = F.pad(x, flat_pads)
        return x if first else x.roll(back, (1, 2, 3))

    qkv = inputs["qkv"]
    is_real = arranged(torch.ones(1, *case.grid, 1, 1, 1)) > 0
    held = torch.where(is_real, arranged(qkv), inputs["pad_qkv"] if case.pad else torch.zeros((), dtype=qkv.dtype))
    q, k, v = _partition(held, tuple(window)).transpose(2, 4).unbind(3)  # (B, nW, h, N, d)
    scores = (q @ k.transpose(-1, -2)) * (case.head_dim**-0.5 if case.scale is None else case.scale)
    if "bias_table" in inputs:
        rows = options["bias_index"]
        if isinstance(rows, str):
            rows = bias_rows(case.window, case.geometry, rows)
        tables = inputs["bias_table"] if case.types else inputs["bias_table"][None]
        types = options["window_types"].long() if case.types else torch.zeros(q.shape[1], dtype=torch.int64)
        scores = scores + tables[types][:, rows].permute(0, 3, 1, 2)
    if case.regions:
        regions = options["regions"][None]
    else:  # numbers of the stretches that a shift put side by side, those of the padding like its neighbours'
        regions = torch.zeros(1, *held.shape[1:4], dtype=torch.int64)
        for axis, (size, moved) in enumerate(zip(case.grid, shift, strict=True)):
            if moved and not case.wrap[axis]:
                length = held.shape[axis + 1]
                end = pads[axis][0] + size - moved % size if first else length - moved
                late = (torch.arange(length) >= end).long()
                regions = regions * 2 + late.view([-1 if a == axis else 1 for a in range(3)])
    labels = _partition(regions[..., None], tuple(window))[0, ..., 0]
    differs = labels[:, None, :, None] != labels[:, None, None, :]
    weights = (scores + torch.where(differs, case.mask_value, 0.0).to(scores.dtype)).softmax(-1)
    context = (weights @ v).transpose(2, 3).flatten(3)  # (B, nW, N, C)
    places = _partition(torch.arange(math.prod(held.shape[1:4])).view(1, *held.shape[1:4]), tuple(window)).flatten()
    grid = torch.empty_like(context.flatten(1, 2)).index_copy(1, places, context.flatten(1, 2))
    grid = grid.unflatten(1, held.shape[1:4])
    grid = grid if first else grid.roll(shift, (1, 2, 3))
    cropped = (slice(before, before + size) for (before, _), size in zip(pads, case.grid, strict=True))
    grid = grid[(slice(None), *cropped)]
    return grid.roll(shift, (1, 2, 3)) if first else grid


AFTER = replace(ROWS, table_rows=0, padding_order="after_shift")
PLAIN_CASES = [
    ROWS,
    replace(ROWS, grid=(2, 2, 8), table_rows=40),  # clipped
    replace(ROWS, window=(1, 1, 1), shift=(0, 0, 0), table_rows=1),
    TYPES,
    replace(TYPES, bias_index="geometric", grid=(2, 2, 8)),
    replace(TYPES, table_rows=9, types=30),  # some types have no window
    replace(TYPES, types=1),
    replace(ROWS, clip_window=False, grid=(1, 2, 7), shift=(1, 2, 1)),
    replace(TYPES, clip_window=False, grid=(1, 2, 2), bias_index="geometric"),
    Case((3, 5, 7), (2, 3, 3), (1, 1, 1), padding=((1, 0), (0, 1), (1, 1))),
    Case(
        (3, 5, 7),
        (2, 3, 3),
        (1, 1, 1),
        padding=((0, 3), (4, 0), (1, 1)),
        wrap=(False, False, True),
        mask_value=-math.inf,
    ),
    Case((1, 2, 2), (2, 3, 4), (1, 2, 3), padding=((0, 0), (1, 0), (1, 1)), pad=False),  # clipped to the padded grid
    Case((1, 2, 3), (4, 3, 2), (3, 2, 1), padding=((3, 4), (0, 1), (0, 1)), padding_order="after_shift"),
    Case((1, 2, 3), (4, 3, 2), (3, 2, 0), padding=((3, 4), (0, 1), (0, 1)), padding_order="after_shift"),  # moves none
    AFTER,
    replace(AFTER, padding=((1, 0), (0, 1), (1, 1))),
    replace(AFTER, padding=((1, 0), (4, 0), (0, 2)), wrap=(True, False, True), shift=(1, 2, 2)),
    replace(AFTER, regions=3, padding=((0, 1), (1, 0), (1, 1))),
    replace(ROWS, regions=4),
    replace(TYPES, regions=2, mask_value=-math.inf, shift=(0, 0, 0)),
]


@pytest.mark.parametrize("case", PLAIN_CASES, ids=repr)
def test_reference_is_the_plain_statement(case: Case) -> None:
    inputs, options = case.inputs(torch.float64), case.options()
    expected = evaluate(lambda **x: _plainly(case, x, options), inputs, {})
    actual = evaluate(reference.window3d_attention, inputs, options)
    by_formulas = evaluate(vidattn.window3d_attention, inputs, dict(options, backend="reference"))
    for found in (actual, by_formulas):
        for name, x in expected.items():
            given = torch.zeros_like(inputs[name]) if found[name] is None else found[name]
            x = torch.zeros_like(given) if x is None else x
            torch.testing.assert_close(given, x, rtol=1e-12, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("size", [(9, 10), (3, 10), (4, 4), (2, 3)], ids=str)
@pytest.mark.parametrize("shift", [(0, 0), (2, 1)], ids=str)
def test_windows_that_are_not_clipped_are_those_of_torchvision(size: tuple[int, int], shift: tuple[int, int]) -> None:
    import torchvision_swin  # noqa: F401  # makes torchvision importable
    from torchvision.models.swin_transformer import ShiftedWindowAttention

    torch.manual_seed(0)
    module = ShiftedWindowAttention(12, [4, 4], list(shift), 3).double()
    x = torch.randn(2, *size, 12, dtype=torch.float64)
    expected = module(x)
    qkv = module.qkv(x).unflatten(-1, (3, 3, 4)).unsqueeze(1)
    context = vidattn.window3d_attention(
        qkv,
        module.relative_position_bias_table,
        window_size=(1, 4, 4),
        shift_size=(0, *shift),
        pad_qkv=module.qkv.bias,
        bias_index=module.relative_position_index.view(16, 16),
        clip_window=False,
        backend="reference",
    )
    torch.testing.assert_close(module.proj(context[:, 0]), expected)


# ---- All backends ----


@backends_and_dtypes
def test_rows_of_the_table(backend: str, dtype: torch.dtype) -> None:
    for case in (ROWS, replace(ROWS, grid=(2, 2, 8), table_rows=40), replace(ROWS, table_rows=1, shift=(0, 0, 0))):
        check(case, dtype, backend)
    check(ROWS, dtype, backend, table_dtype=torch.float32 if dtype != torch.float64 else dtype)


@backends_and_dtypes
@pytest.mark.parametrize("types", [1, 2, 30])
def test_a_table_for_each_type(backend: str, dtype: torch.dtype, types: int) -> None:
    """With 30 types some have no window."""
    check(replace(TYPES, types=types), dtype, backend)
    check(replace(TYPES, types=types, table_rows=9, shift=(0, 0, 0)), dtype, backend)


@backends_and_dtypes
@pytest.mark.parametrize("window", [(2, 7, 7), (4, 6, 6), (8, 7, 7)][: 2 if TRITON_INTERPRETED else 3], ids=str)
def test_types_of_real_windows(backend: str, dtype: torch.dtype, window: tuple[int, int, int]) -> None:
    depth, height, width = window
    case = Case((depth, height + 2, width + 3), window, (0, 3, 3), batch=1, types=2, head_dim=16)
    check(replace(case, heads=1) if TRITON_INTERPRETED else case, dtype, backend)


@backends
def test_types_of_many_windows(backend: str) -> None:
    """More than one share of the windows of a type."""
    counts = (1, 5, 9) if TRITON_INTERPRETED else (3, 25, 31)
    case = Case(tuple(2 * n for n in counts), (2, 2, 2), (0, 1, 0), batch=2, heads=1, types=3)  # type: ignore[arg-type]
    for dtype in {single_precision(backend), full_precision(backend)}:
        check(case, dtype, backend)


@backends_and_dtypes
@pytest.mark.parametrize("grid", [(1, 2, 7), (2, 5, 2), (1, 1, 1)], ids=str)
def test_windows_that_are_not_clipped(backend: str, dtype: torch.dtype, grid: tuple[int, int, int]) -> None:
    case = Case(grid, (2, 3, 4), (1, 2, 3), clip_window=False, batch=16)  # windows with few tokens, so many of them
    for given in ({}, {"bias_index": "geometric"}, {"types": 2, "table_rows": 5, "pad": False}):
        check(replace(case, **given), dtype, backend)  # type: ignore[arg-type]


@backends
@pytest.mark.parametrize("mask_value", [-100.0, -math.inf, 3.0])
def test_masks_beside_rows(backend: str, mask_value: float) -> None:
    """Windows long enough that whole tiles are hidden, and biases that could make up for that."""
    dtype, device = single_precision(backend), device_of(backend)
    case = Case(
        (1, 1, 283), (1, 1, 144), (0, 0, 72), batch=1, heads=1 if TRITON_INTERPRETED else 2, table_rows=288,
        mask_value=mask_value,
    )  # fmt: skip
    for types in (0, 2):
        check(replace(case, types=types), dtype, backend)
        # Rows that one key has nearly all of: the gradients of those have little that is exact.
        saturated = replace(case, types=types, table_spread=60.0)
        inputs, options = saturated.inputs(dtype), saturated.options()
        expected, exact = expected_and_exact(inputs, options)
        given = {name: x for name, x in to(inputs, device).items() if name != "grad_out"}
        out = vidattn.window3d_attention(**given, **options_on(device, options), backend=backend)  # type: ignore[arg-type]
        assert_close("out", out.cpu(), expected["out"], exact["out"], dtype, OUTPUT_FACTOR)  # type: ignore[arg-type]


@flexible
@pytest.mark.parametrize(
    "case",
    [case for case in PLAIN_CASES if case.padding or case.regions or case.padding_order != "before_shift"],
    ids=repr,
)
def test_padding_and_regions(backend: str, dtype: torch.dtype, case: Case) -> None:
    check(case, dtype, backend)
    long = replace(case, head_dim=24, heads=3)
    check(long, dtype, backend, separate=True)


@flexible
def test_regions_of_long_windows(backend: str, dtype: torch.dtype) -> None:
    for regions in (1, 2, 400):
        check(Case((4, 9, 16), (4, 5, 8), (0, 2, 3), batch=1, regions=regions), dtype, backend)


@pytest.mark.parametrize("backend", BACKENDS_WITH_DROPOUT)
def test_dropout(backend: str) -> None:
    for case in (ROWS, TYPES, replace(TYPES, clip_window=False, grid=(1, 2, 7))):
        check(replace(case, dropout_p=0.4), single_precision(backend), backend)


@backends_and_dtypes
def test_types_of_partitioned_windows(backend: str, dtype: torch.dtype) -> None:
    inputs = window_inputs(12, 20, 2, 8, dtype)
    inputs["bias"] = torch.randn(3, 2, 20, 20, dtype=torch.float64).to(dtype)
    mask = torch.randn(4, 20, 20, dtype=torch.float64).to(dtype)
    types = torch.tensor([2, 0, 2, 2, 0, 0])
    check_window(inputs, backend, window_types=types)
    check_window(inputs, backend, mask, window_types=types.int())
    check_window(inputs, backend, mask[:1], window_types=torch.tensor([1]))


@backends
def test_types_agree_with_one_call_a_type(backend: str) -> None:
    """Bit for bit: a window does not see the others."""
    dtype, device = half_precision(backend), device_of(backend)
    inputs = to(window_inputs(6, 30, 2, 16, dtype), device)
    biases = torch.randn(2, 2, 30, 30, device=device)
    types = torch.tensor([1, 0, 0], device=device)
    out = vidattn.window_attention(inputs["qkv"], biases, window_types=types, backend=backend)
    for window in range(6):
        alone = inputs["qkv"][window : window + 1]
        expected = vidattn.window_attention(alone, biases[int(types[window % 3])], backend=backend)
        torch.testing.assert_close(out[window : window + 1], expected, rtol=0, atol=0)


@backends
def test_usual_rows_agree_with_the_usual_index(backend: str) -> None:
    case = Case((3, 5, 7), (2, 3, 3), (1, 1, 1))
    dtype, device = full_precision(backend), device_of(backend)
    inputs, options = to(case.inputs(dtype), device), case.options()
    rows = bias_rows(case.window, case.geometry).to(device)
    results = [
        evaluate(vidattn.window3d_attention, inputs, dict(options, backend=backend, **given))
        for given in ({}, {"bias_index": rows}, {"bias_index": rows.int()})
    ]
    for found in results[1:]:
        for name, x in found.items():
            torch.testing.assert_close(x, results[0][name], **about(dtype))
    assert torch.equal(results[1]["out"], results[2]["out"])  # type: ignore[arg-type]


@backends
def test_padding_that_changes_nothing_is_for_all_backends(backend: str) -> None:
    case = Case((3, 5, 8), (2, 3, 4), (1, 1, 0))
    inputs = to(case.inputs(half_precision(backend)), device_of(backend))
    given, table = inputs["qkv"], inputs["bias_table"].float()
    usual = vidattn.window3d_attention(given, table, **case.options(), backend=backend)
    padding = ((0, 1), (0, 1), (0, 0))
    said = vidattn.window3d_attention(given, table, **case.options(), padding=padding, backend=backend)
    assert torch.equal(said, usual)
    still = dict(case.options(), shift_size=0)
    usual = vidattn.window3d_attention(given, table, **still, backend=backend)
    said = vidattn.window3d_attention(given, table, **still, padding_order="after_shift", backend=backend)
    assert torch.equal(said, usual)


@backends
def test_who_runs_padding_and_regions(backend: str) -> None:
    case = Case((3, 5, 7), (2, 3, 3), (1, 1, 1), padding=((1, 0), (1, 0), (1, 1)))
    qkv = case.inputs(half_precision(backend))["qkv"].to(device_of(backend))
    regions = torch.zeros(4, 6, 9, dtype=torch.int64, device=qkv.device)
    options = {"window_size": case.window, "shift_size": case.shift}
    for given, reason in (
        ({"padding": case.padding}, "has no padding"),
        ({"padding_order": "after_shift"}, "has no padding_order"),
        ({"regions": regions}, "has no regions"),
        ({"regions": regions, "padding": case.padding}, "has no padding, regions"),
    ):
        reasons = vidattn.why_not("window3d_attention", qkv, **options, **given, backend=backend)
        assert reasons == ([] if backend in ("reference", "cpu") else [reason])


@backends
def test_who_learns_rows_and_types(backend: str) -> None:
    for case in (ROWS, TYPES):
        inputs = to(case.inputs(half_precision(backend)), device_of(backend))
        options = options_on(device_of(backend), case.options())
        table = inputs["bias_table"].requires_grad_()
        reasons = vidattn.why_not("window3d_attention", inputs["qkv"], table, **options, backend=backend)
        learns = backend in BACKENDS_THAT_LEARN_A_DENSE_BIAS
        assert reasons == ([] if learns else ["gives no gradient of a dense bias, which this call may need"])
        assert not vidattn.why_not("window3d_attention", inputs["qkv"], table.detach(), **options, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS_WITH_FLOAT64)
def test_float64_gradcheck(backend: str) -> None:
    case = Case((2, 3, 2), (2, 2, 2), (0, 1, 0), batch=1, heads=1, head_dim=3, types=2, table_rows=5)
    inputs, options = case.inputs(torch.float64), case.options()
    leaves = [inputs[name].requires_grad_() for name in ("qkv", "bias_table", "pad_qkv")]

    def attend(qkv: Tensor, table: Tensor, pad: Tensor) -> Tensor:
        return vidattn.window3d_attention(qkv, table, pad_qkv=pad, **options, backend=backend)

    assert torch.autograd.gradcheck(attend, leaves)


@backends
def test_compiled(backend: str) -> None:
    dtype, device = half_precision(backend), device_of(backend)
    for case in (replace(ROWS, clip_window=False), replace(TYPES, padding=((0, 1), (0, 1), (0, 2)))):
        inputs = to(case.inputs(dtype), device)
        options = options_on(device, case.options())

        attend = functools.partial(vidattn.window3d_attention, **options, backend=backend)
        given = inputs["qkv"], inputs["bias_table"]
        assert torch.equal(torch.compile(attend, fullgraph=True, backend="aot_eager")(*given), attend(*given))


@backends
def test_transforms(backend: str) -> None:
    """torch.func sees rows and types as the constants that they are."""
    dtype, device = full_precision(backend), device_of(backend)
    case = Case((2, 3, 4), (2, 2, 2), (0, 1, 1), types=2, table_rows=5)
    inputs, options = to(case.inputs(dtype), device), options_on(device, case.options())
    attend = functools.partial(vidattn.window3d_attention, **options, backend=backend)
    qkv, table = inputs["qkv"], inputs["bias_table"]
    if backend in BACKENDS_THAT_LEARN_A_DENSE_BIAS:
        by_function = torch.func.grad(lambda qkv, table: attend(qkv, table).square().sum(), (0, 1))(qkv, table)
        leaves = qkv.clone().requires_grad_(), table.clone().requires_grad_()
        by_tape = torch.autograd.grad(attend(*leaves).square().sum(), leaves)
        assert all(map(torch.equal, by_function, by_tape))
        clips = torch.stack([qkv, 2 * qkv])
        mapped = torch.func.vmap(lambda qkv: attend(qkv, table))(clips)
        torch.testing.assert_close(mapped, torch.stack([attend(clip, table) for clip in clips]), **about(dtype))
    else:  # a transform does not say whether a gradient may be asked for
        with pytest.raises(ValueError, match="gives no gradient of a dense bias"):
            torch.func.vmap(lambda qkv: attend(qkv, table))(qkv[None])


@backends
def test_same_bits_from_run_to_run(backend: str) -> None:
    """Gradients of tables are sums in a fixed order."""
    if backend not in BACKENDS_THAT_LEARN_A_DENSE_BIAS:
        backend = "reference"
    for case in (ROWS, replace(TYPES, types=2)):
        inputs, options = to(case.inputs(single_precision(backend)), device_of(backend)), case.options()
        options = dict(options_on(device_of(backend), options), backend=backend)
        first = evaluate(vidattn.window3d_attention, inputs, options)
        again = evaluate(vidattn.window3d_attention, inputs, options)
        assert torch.equal(first["bias_table"], again["bias_table"])  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name in ("reference", "cpu")])
def test_numbers_that_the_table_does_not_have(backend: str) -> None:
    qkv, table = torch.randn(1, 2, 2, 4, 3, 2, 8), torch.randn(3, 5, 2)
    windows, biases = torch.randn(4, 8, 3, 2, 8), torch.zeros(3, 2, 8, 8)
    rows, types = torch.zeros(8, 8, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    options: dict[str, Any] = {"window_size": 2, "backend": backend}
    for wrong in (-1, 5):
        rows[3, 4] = wrong
        with pytest.raises(ValueError, match="bias_index: expected numbers from 0 to 4, got"):
            vidattn.window3d_attention(qkv, table[0], bias_index=rows, **options)
    rows[3, 4] = 4
    for wrong in (-1, 3):
        types[1] = wrong
        with pytest.raises(ValueError, match="window_attention: window_types: expected numbers from 0 to 2, got"):
            vidattn.window_attention(windows, biases, window_types=types, backend=backend)
        with pytest.raises(ValueError, match="window3d_attention: window_types: expected numbers from 0 to 2, got"):
            vidattn.window3d_attention(qkv, table, bias_index=rows, window_types=types, **options)


QKV = torch.zeros(1, 2, 2, 4, 3, 2, 8)
INDEX, NUMBERS = torch.zeros(8, 8, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
TABLE = torch.zeros(27, 2)


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (ValueError, "bias_index: expected one of .*, got 7", {"bias_index": 7}),
        (TypeError, "bias_index: expected dtype int32 or int64, got torch.float32", {"bias_index": INDEX.float()}),
        (ValueError, r"bias_index: expected shape \(N, N\) = \(8, 8\), got \(8, 7\)", {"bias_index": INDEX[:, :7]}),
        (ValueError, "bias_index: expected device cpu", {"bias_index": INDEX.to("meta")}),
        (ValueError, "bias_index: expected a bias_table", {"bias_index": INDEX, "bias_table": None}),
        (ValueError, "bias_table: expected shape .L, h. = .27, 2.", {"bias_index": INDEX, "bias_table": TABLE[:, :1]}),
        (ValueError, r"bias_table: expected shape \(L, h\) = \(1, 2\)", {"bias_index": INDEX, "bias_table": TABLE[:0]}),
        (TypeError, "bias_table: expected a tensor", {"bias_index": INDEX, "bias_table": 0.5}),
        (ValueError, r"bias_table: expected shape \(types, .*, h\) = \(1, 27, 2\)", {"window_types": NUMBERS}),
        (ValueError, "window_types: expected a bias_table", {"window_types": NUMBERS, "bias_table": None}),
        (
            ValueError,
            r"window_types: expected shape \(nW,\) = \(2,\), got \(1,\)",
            {"window_types": NUMBERS[:1], "bias_table": TABLE[None]},
        ),
        (TypeError, "window_types: expected dtype", {"window_types": NUMBERS > 0, "bias_table": TABLE[None]}),
        (TypeError, "window_types: expected a tensor", {"window_types": [0, 0], "bias_table": TABLE[None]}),
        (TypeError, "clip_window: expected a bool, got 1", {"clip_window": 1}),
        (TypeError, "padding: expected three pairs of ints", {"padding": 1}),
        (TypeError, "padding: expected three pairs of ints", {"padding": ()}),
        (TypeError, "padding: expected three pairs of ints", {"padding": ((0, 0), (0, 0))}),
        (TypeError, "padding: expected three pairs of ints", {"padding": (0, 0, 0)}),
        (TypeError, "padding: expected three pairs of ints", {"padding": torch.zeros(3, 2)}),
        (TypeError, "padding: expected an integer, got 0.5", {"padding": ((0, 0), (0, 0), (0.5, 0))}),
        (ValueError, "padding: expected numbers of at least 0", {"padding": ((0, 0), (0, 0), (-1, 1))}),
        (ValueError, "padding: expected whole windows .* got one of .2, 2, 5", {"padding": ((0, 0), (0, 0), (0, 1))}),
        (ValueError, "padding_order: expected one of .* got 'before'", {"padding_order": "before"}),
        (ValueError, r"regions: expected shape .* = \(2, 2, 4\)", {"regions": torch.zeros(2, 2, 3).long()}),
        (TypeError, "regions: expected dtype", {"regions": torch.zeros(2, 2, 4)}),
        (TypeError, "regions: expected a tensor", {"regions": 0}),
    ],
)  # fmt: skip
def test_errors(error: type[Exception], message: str, options: dict[str, Any]) -> None:
    with pytest.raises(error, match=f"window3d_attention: {message}"):
        vidattn.window3d_attention(QKV, **{"bias_table": TABLE, "window_size": 2, **options})


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (ValueError, "window_types: expected a bias", {"window_types": NUMBERS}),
        (ValueError, "bias: expected shape .types, h, N, N", {"window_types": NUMBERS, "bias": torch.zeros(2, 3, 3)}),
        (
            ValueError,
            "multiple of nW, got 3",
            {"window_types": torch.zeros(3).long(), "bias": torch.zeros(1, 2, 3, 3)},
        ),
        (ValueError, "multiple of nW, got 0", {"window_types": NUMBERS[:0], "bias": torch.zeros(1, 2, 3, 3)}),
        (TypeError, "expected dtype", {"window_types": torch.zeros(2), "bias": torch.zeros(1, 2, 3, 3)}),
    ],
)  # fmt: skip
def test_errors_of_partitioned_windows(error: type[Exception], message: str, options: dict[str, Any]) -> None:
    with pytest.raises(error, match=f"window_attention: .*{message}"):
        vidattn.window_attention(torch.zeros(4, 3, 3, 2, 8), **options)


@backends
def test_empty_inputs(backend: str) -> None:
    dtype, device = half_precision(backend), device_of(backend)
    for shape in ((0, 2, 4, 4), (2, 0, 4, 4)):
        qkv = torch.zeros(*shape, 3, 2, 8, dtype=dtype, device=device, requires_grad=True)
        table = torch.zeros(2, 5, 2, dtype=dtype, device=device)
        table.requires_grad_(backend in BACKENDS_THAT_LEARN_A_DENSE_BIAS)
        types = torch.zeros(8, dtype=torch.int64, device=device)
        rows = torch.zeros(4, 4, dtype=torch.int64, device=device)
        out = vidattn.window3d_attention(
            qkv, table, window_size=(1, 2, 2), bias_index=rows, window_types=types, backend=backend
        )
        out.sum().backward()
        assert out.shape == (*shape, 16)
        assert table.grad is None or not table.grad.any()

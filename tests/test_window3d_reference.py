"""The reference: against loops over windows and tokens, philox against its published answers, second derivatives."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from attention_cases import evaluate, seed_of, to
from torch import Tensor
from window3d_cases import Case

from vidattn import reference
from vidattn.reference.philox import dropout_keep_mask, philox4x32


def _effective(size: int, window: int, shift: int) -> tuple[int, int, int]:
    """Window, shift and padded size of one axis."""
    if size <= window:
        return size, 0, size
    return window, shift, -(-size // window) * window


def _by_loops(case: Case, inputs: dict[str, Tensor]) -> Tensor:
    """Attend token by token, from the definition: what each slot holds, what region it is of, what bias it has."""
    axes = [_effective(*axis) for axis in zip(case.grid, case.window, case.shift, strict=True)]
    window = [axis[0] for axis in axes]
    qkv, table = inputs["qkv"], inputs.get("bias_table")
    pad = inputs.get("pad_qkv", torch.zeros(3, case.heads, case.head_dim, dtype=qkv.dtype))
    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    out = torch.full((case.batch, *case.grid, case.heads, case.head_dim), math.nan, dtype=qkv.dtype)
    counts = [padded // extent for extent, _, padded in axes]
    slots = [(i, j, k) for i in range(window[0]) for j in range(window[1]) for k in range(window[2])]
    full = case.window if case.bias_index == "prefix" else window

    def unravel(n: int) -> tuple[int, int, int]:
        return n // (full[1] * full[2]), n // full[2] % full[1], n % full[2]

    for block in [(a, b, c) for a in range(counts[0]) for b in range(counts[1]) for c in range(counts[2])]:
        places, regions = [], []
        for slot in slots:
            rolled = [n * extent + i for n, extent, i in zip(block, window, slot, strict=True)]
            places.append([(r + s) % p for r, (_, s, p) in zip(rolled, axes, strict=True)])
            # The released code labels three stretches of the rolled axis: [:-w], [-w:-s], [-s:].
            regions.append([
                0 if s == 0 or cyclic else (r >= p - w) + (r >= p - s)
                for r, (w, s, p), cyclic in zip(rolled, axes, case.wrap, strict=True)
            ])  # fmt: skip
        real = [all(x < size for x, size in zip(place, case.grid, strict=True)) for place in places]
        for batch in range(case.batch):
            held = [qkv[(batch, *place)] if there else pad for place, there in zip(places, real, strict=True)]
            for i, place in enumerate(places):
                if not real[i]:
                    continue
                for head in range(case.heads):
                    scores = []
                    for j in range(len(places)):
                        score = scale * (held[i][0, head] @ held[j][1, head])
                        if table is not None:
                            row = 0
                            for a, b, w in zip(unravel(i), unravel(j), case.window, strict=True):
                                row = row * (2 * w - 1) + a - b + w - 1
                            score = score + table[row, head]
                        scores.append(score + (case.mask_value if regions[i] != regions[j] else 0.0))
                    weights = torch.stack(scores).softmax(0)
                    values = torch.stack([slot[2, head] for slot in held])
                    out[(batch, *place, head)] = weights @ values
    return out.flatten(-2)


@pytest.mark.parametrize(
    "case",
    [
        Case((2, 4, 4), (2, 2, 2), batch=2),
        Case((3, 4, 5), (2, 2, 3), (1, 1, 2), batch=1),
        Case((3, 2, 5), (2, 3, 3), (1, 2, 1), batch=1, heads=1),
        Case((3, 2, 5), (2, 3, 3), (1, 2, 1), batch=1, heads=1, bias_index="geometric"),
        Case((4, 1, 6), (2, 4, 2), (1, 1, 1), batch=1, heads=1, wrap=(True, False, False), mask_value=-math.inf),
        Case((3, 3, 3), (2, 2, 2), (1, 1, 1), batch=1, pad=False, bias_index=None, wrap=(False, True, True), scale=0.7),
    ],
    ids=str,
)
def test_against_loops(case: Case) -> None:
    inputs = case.inputs(torch.float64)
    options = case.options()
    tensors = {name: x for name, x in inputs.items() if name != "grad_out"}
    actual = reference.window3d_attention(**tensors, **options)  # type: ignore[arg-type]
    torch.testing.assert_close(actual, _by_loops(case, inputs), rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter: tuple[int, ...], key: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """The answers published with Random123."""
    words = philox4x32(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))  # type: ignore[arg-type]
    assert tuple(int(word) for word in words) == expected


def test_keep_mask_is_a_function_of_logical_indices() -> None:
    """An entry depends on seed, group, head, query and key alone, not on how many there are."""
    seed = torch.tensor([-(2**62) + 12345])
    large = dropout_keep_mask(seed, 0.3, groups=5, heads=3, queries=9, keys=11)
    small = dropout_keep_mask(seed, 0.3, groups=2, heads=1, queries=4, keys=6)
    assert torch.equal(large[:2, :1, :4, :6], small)
    assert abs(large.double().mean().item() - 0.7) < 0.03
    assert not torch.equal(large, dropout_keep_mask(seed + 2**32, 0.3, 5, 3, 9, 11))
    assert dropout_keep_mask(seed, 0.0, 2, 2, 2, 2).all()


def test_second_derivatives() -> None:
    case = Case((3, 1, 3), (2, 1, 2), (1, 0, 1), batch=1, heads=1, head_dim=2)
    inputs = case.inputs(torch.float64)
    leaves = [inputs[name].requires_grad_() for name in ("qkv", "bias_table", "pad_qkv")]

    def attend(qkv: Tensor, table: Tensor, pad: Tensor) -> Tensor:
        return reference.window3d_attention(qkv, table, pad_qkv=pad, **case.options())  # type: ignore[return-value]

    assert torch.autograd.gradcheck(attend, leaves)
    assert torch.autograd.gradgradcheck(attend, leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_softmax_and_sums_are_float32(dtype: torch.dtype) -> None:
    """Low-precision inputs are widened once and rounded once, with or without autocast."""
    case = Case((3, 5, 7), (2, 3, 3), (1, 1, 1))
    inputs = case.inputs(dtype)
    exact = evaluate(reference.window3d_attention, to(inputs, torch.float64), case.options())
    for enabled in (False, True):

        def attend(*args: Any, enabled: bool = enabled, **options: Any) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                return reference.window3d_attention(*args, **options)  # type: ignore[return-value]

        actual = evaluate(attend, inputs, case.options())
        for name, value in actual.items():
            assert value is not None and exact[name] is not None and value.dtype == dtype
            rounding = torch.finfo(dtype).eps / 2 * exact[name].abs()  # type: ignore[union-attr]
            assert ((value.double() - exact[name]).abs() <= rounding + 3e-5).all(), name


def test_dropout_needs_a_seed() -> None:
    with pytest.raises(ValueError, match="seed"):
        reference.window_attention(torch.randn(2, 4, 3, 1, 4), dropout_p=0.5)
    torch.manual_seed(1)
    seed = seed_of(1)
    first, second = (reference.window_attention(torch.ones(2, 4, 3, 1, 4), dropout_p=0.5, seed=seed) for _ in range(2))
    assert torch.equal(first, second)  # type: ignore[arg-type]


def test_empty_batch() -> None:
    qkv = torch.randn(0, 2, 2, 2, 3, 1, 4, requires_grad=True)
    out, lse = reference.window3d_attention(qkv, window_size=(2, 2, 2), return_lse=True)
    assert out.shape == (0, 2, 2, 2, 4) and lse.shape == (0, 2, 2, 2, 1)

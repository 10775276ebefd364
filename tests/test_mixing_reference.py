"""The reference of space-time mixing attention: against loops over channels, tokens and heads; second derivatives."""

from __future__ import annotations

import pytest
import torch
from attention_cases import seed_of
from mixing_cases import Case
from torch import Tensor

from vidattn import reference
from vidattn.reference.mixing import xvit_channel_shifts
from vidattn.reference.philox import dropout_keep_mask


def _mixed(x: Tensor, case: Case, shifts: list[tuple[int, int, int]]) -> Tensor:
    """Keys or values (B * T, N, C) with each channel taken from the frame that the ranges say."""
    out = torch.zeros_like(x)
    for frame in range(x.shape[0]):
        clip, t = divmod(frame, case.num_frames)
        for channel in range(x.shape[2]):
            offset = next((offset for first, last, offset in shifts if first <= channel < last), 0)
            if 0 <= t + offset < case.num_frames:
                out[frame, :, channel] = x[clip * case.num_frames + t + offset, :, channel]
    return out


def _by_loops(case: Case, qkv: Tensor, seed: Tensor) -> Tensor:
    """Attend frame by frame, head by head and query by query."""
    fold = case.heads * case.head_dim // case.shift_div
    shifts = [(0, fold, 1), (fold, 2 * fold, -1)] if case.channel_shifts is None else list(case.channel_shifts)
    q, k, v = qkv.unbind(2)
    k, v = (_mixed(x.flatten(2), case, shifts).view_as(x) for x in (k, v))
    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    keep = dropout_keep_mask(seed, case.dropout_p, q.shape[0], case.heads, case.num_tokens, case.num_tokens)
    out = torch.empty_like(q)
    for frame in range(q.shape[0]):
        for head in range(case.heads):
            for i in range(case.num_tokens):
                weights = (scale * (k[frame, :, head] @ q[frame, i, head])).softmax(0)
                weights = weights * keep[frame, head, i] / (1 - case.dropout_p)
                out[frame, i, head] = weights @ v[frame, :, head]
    return out.flatten(2)


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize(
    "case",
    [
        Case(3, 4),
        Case(3, 4, shift_div=3, heads=5),  # ends inside heads, and three kinds of channels in one
        Case(1, 4),
        Case(2, 4, shift_div=1),
        Case(2, 4, shift_div=2, scale=0.7),
        Case(4, 3, channel_shifts=((1, 5, 2), (5, 9, -3), (20, 32, 1)), clips=1),
        Case(2, 3, channel_shifts=((0, 8, 2),)),
    ],
    ids=str,
)
def test_against_loops(case: Case, dropout_p: float) -> None:
    case = Case(**{**case.__dict__, "dropout_p": dropout_p})
    qkv = case.inputs(torch.float64)["qkv"]
    actual = case.function(reference)(qkv, **case.options(), seed=seed_of(1))
    torch.testing.assert_close(actual, _by_loops(case, qkv, seed_of(1)), rtol=0, atol=1e-13)


def test_ranges_of_the_published_models() -> None:
    assert xvit_channel_shifts(768, 8) == [(0, 96, 1), (96, 192, -1)]
    assert xvit_channel_shifts(768, 4) == [(0, 192, 1), (192, 384, -1)]
    assert xvit_channel_shifts(40, 3) == [(0, 13, 1), (13, 26, -1)]
    assert xvit_channel_shifts(40, 1) == [(0, 40, 1)]
    assert xvit_channel_shifts(40, 41) == []


def test_second_derivatives() -> None:
    case = Case(2, 2, 3, clips=1, heads=2, head_dim=3)
    qkv = case.inputs(torch.float64)["qkv"].requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: case.function(reference)(x, **case.options()), (qkv,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_softmax_and_sums_are_float32(dtype: torch.dtype) -> None:
    """Low-precision inputs are widened once and rounded once."""
    case = Case(3, 7)
    qkv = case.inputs(dtype)["qkv"]
    actual = case.function(reference)(qkv, **case.options())
    exact = case.function(reference)(qkv.double(), **case.options())
    assert actual.dtype == dtype
    assert ((actual.double() - exact).abs() <= torch.finfo(dtype).eps / 2 * exact.abs() + 3e-6).all()

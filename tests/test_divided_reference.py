"""The reference of attention over time and over space: against loops over tokens, modules, second derivatives."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from attention_cases import seed_of
from divided_cases import KINDS, SEES_ALL, Case
from torch import Tensor

from vidattn import reference
from vidattn.models.timesformer import Attention
from vidattn.models.vivit_layers import factorized_dot_product_attention
from vidattn.reference.philox import dropout_keep_mask


def _row(case: Case, frame: int, site: int) -> int:
    """Row of a patch, from the definition of the token orders."""
    place = frame * case.num_sites + site if case.token_order == "thw" else site * case.num_frames + frame
    return place + case.has_cls


def _by_loops(case: Case, qkv: Tensor, seed: Tensor) -> Tensor:
    """Attend sequence by sequence and query by query; last comes a cls token's query that sees all."""
    frames, sites, heads = case.num_frames, case.num_sites, case.heads
    split = {
        "temporal": heads,
        "temporal_all": heads,
        "factorized": heads // 2 if case.num_temporal_heads is None else case.num_temporal_heads,
    }
    temporal_heads = split.get(case.kind, 0)
    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    out = torch.full((*qkv.shape[:2], heads, case.head_dim), math.nan, dtype=qkv.dtype)
    cls = torch.full((case.batch, frames, heads, case.head_dim), math.nan, dtype=qkv.dtype)
    for batch in range(case.batch):
        for head in range(heads):
            over_time = head < temporal_heads
            for group in range(sites if over_time else frames):
                if over_time:
                    rows = [_row(case, frame, group) for frame in range(frames)]
                else:
                    rows = [_row(case, group, site) for site in range(sites)]
                rows = [0] * case.has_cls + rows
                number = batch * (sites if over_time else frames) + group
                keep = dropout_keep_mask(seed, case.dropout_p, number + 1, heads, len(rows), len(rows))[number, head]
                for i, row in enumerate(rows):
                    if row == 0 and case.kind in SEES_ALL:
                        continue
                    scores = torch.stack([scale * (qkv[batch, row, 0, head] @ qkv[batch, j, 1, head]) for j in rows])
                    weights = scores.softmax(0) * keep[i] / (1 - case.dropout_p)
                    context = weights @ torch.stack([qkv[batch, j, 2, head] for j in rows])
                    if row == 0 and case.has_cls:
                        cls[batch, group, head] = context
                    else:
                        out[batch, row, head] = context
    for batch, head in itertools.product(range(case.batch), range(heads)) if case.kind in SEES_ALL else ():
        tokens = qkv[batch, :, :, head].unbind(1)
        keep = dropout_keep_mask(seed, case.dropout_p, case.batch, heads, 1, qkv.shape[1])[batch, head, 0]
        weights = (scale * tokens[1] @ tokens[0][0]).softmax(0) * keep / (1 - case.dropout_p)
        out[batch, 0, head] = weights @ tokens[2]
    if case.kind == "mean":
        out[:, 0] = cls.mean(1)
    if case.kind == "per_frame":
        out = torch.cat((cls, out[:, 1:]), dim=1)
    return out.flatten(2)


@pytest.mark.parametrize("token_order", ["thw", "hwt"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("kind", KINDS)
def test_against_loops(kind: str, dropout_p: float, token_order: str) -> None:
    for case in (
        Case(kind, 3, 4, token_order, dropout_p=dropout_p),
        Case(kind, 4, 3, token_order, heads=4, scale=0.7, dropout_p=dropout_p),
        Case(kind, 1, 1, token_order, dropout_p=dropout_p),
    ):
        qkv = case.inputs(torch.float64)["qkv"]
        actual = case.function(reference)(qkv, **case.options(), seed=seed_of(1))
        torch.testing.assert_close(actual, _by_loops(case, qkv, seed_of(1)), rtol=0, atol=1e-13)


def test_heads_over_time_by_loops() -> None:
    for heads in (0, 1, 3):
        case = Case("factorized", 3, 4, "hwt", heads=3, num_temporal_heads=heads)
        qkv = case.inputs(torch.float64)["qkv"]
        actual = case.function(reference)(qkv, **case.options())
        torch.testing.assert_close(actual, _by_loops(case, qkv, seed_of(1)), rtol=0, atol=1e-13)


def test_the_models_attend_like_it() -> None:
    """What the reference models compute with their own rearrangements."""
    batch, frames, sites, heads, head_dim = 2, 3, 5, 4, 6
    attention = Attention(heads * head_dim, heads, qkv_bias=True).double()
    attention.proj = torch.nn.Identity()  # type: ignore[assignment]
    x = torch.randn(batch, 1 + sites * frames, heads * head_dim, dtype=torch.float64)
    qkv = attention.qkv(x).unflatten(-1, (3, heads, head_dim))
    over_time = attention(x[:, 1:].reshape(batch * sites, frames, -1)).reshape(batch, sites * frames, -1)
    torch.testing.assert_close(reference.temporal_attention(qkv[:, 1:], frames, token_order="hwt"), over_time)
    repeated = x[:, :1].repeat_interleave(frames, 0)
    patches = x[:, 1:].unflatten(1, (sites, frames)).transpose(1, 2).flatten(0, 1)
    over_space = attention(torch.cat((repeated, patches), 1)).unflatten(0, (batch, frames))
    expected = torch.cat(
        (over_space[:, :, 0].mean(1, keepdim=True), over_space[:, :, 1:].transpose(1, 2).flatten(1, 2)), 1
    )
    actual = reference.spatial_attention(qkv, frames, token_order="hwt", cls_token="mean")
    torch.testing.assert_close(actual, expected)
    grid = qkv[:, 1:].unflatten(1, (frames, sites)).unbind(-3)
    torch.testing.assert_close(
        reference.factorized_dot_product_attention(qkv[:, 1:], frames),
        factorized_dot_product_attention(*grid).flatten(1, 2).flatten(2),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_second_derivatives(kind: str) -> None:
    case = Case(kind, 2, 2, batch=1, head_dim=2)
    qkv = case.inputs(torch.float64)["qkv"].requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: case.function(reference)(x, **case.options()), (qkv,))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_softmax_and_sums_are_float32(kind: str, dtype: torch.dtype) -> None:
    """Low-precision inputs are widened once and rounded once, the mean of the cls contexts too."""
    case = Case(kind, 5, 7)
    qkv = case.inputs(dtype)["qkv"]
    actual = case.function(reference)(qkv, **case.options())
    exact = case.function(reference)(qkv.double(), **case.options())
    assert actual.dtype == dtype
    assert ((actual.double() - exact).abs() <= torch.finfo(dtype).eps / 2 * exact.abs() + 3e-6).all()

"""Conflicts of banks in the CUDA kernels: the emulated GPU counts the turns that each access takes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import divided_cases
import mixing_cases
import pytest
import torch
from sequence_cases import BF16, attend

import tests.cuda_emulator as emulated
import vidattn
from vidattn import geometry as geo
from vidattn.ops import window3d


@pytest.fixture(autouse=True, scope="module")
def emulated_gpu() -> Iterator[None]:
    emulated.install(checked=False)
    yield
    emulated.uninstall()


@pytest.mark.parametrize("head_dim", [32, 64])
@pytest.mark.parametrize(
    ("grid", "window", "turns"),
    [
        ((8, 7, 7), (8, 7, 7), {}),  # pairs of neighbours, at the same distance for all lanes
        ((16, 7, 7), (16, 7, 7), {64: 0.3}),  # too large for pairs, and for a table with gaps
        ((1, 7, 7), (1, 7, 7), {32: 0.1, 64: 0.1}),
        ((1, 12, 12), (1, 12, 12), {32: 0.15, 64: 0.15}),
        ((4, 7, 7), (8, 7, 7), {32: 0.3, 64: 0.3}),
        ((7, 7, 7), (7, 7, 7), {32: 0.3, 64: 0.3}),
    ],
)
def test_matrices_are_read_without_conflicts(grid, window, turns, head_dim, record_property):
    """Of the loads of the bias, so many take a turn more, where lanes read single entries of the table."""
    torch.manual_seed(0)
    inputs = window3d.Inputs(
        torch.randn(1, *grid, 3, 1, head_dim, dtype=torch.bfloat16),
        None,
        None,
        bias_table=torch.randn(geo.num_bias_rows(window), 1),
        pad_qkv=None,
    )
    options = window3d.Options(window, (0, 0, 0), (False,) * 3, "prefix", -100.0, head_dim**-0.5, 0.0)
    before = emulated.counts()
    window3d._forward(inputs, options, "cuda")
    found = {name: count - before[name] for name, count in emulated.counts().items()}
    assert found["blocks"] > 0 and found["ldmatrix_conflicts"] == 0
    loads = geo.resolve_windows(grid, window).num_tokens ** 2 / 32  # of a warp, one for each score of a lane
    record_property("load_conflicts", found["load_conflicts"])
    print(f"{found['load_conflicts']} turns more in {loads:.0f} loads of the bias")
    assert found["load_conflicts"] <= turns.get(head_dim, 0) * loads


@pytest.mark.parametrize("head_dim", [32, 64])
@pytest.mark.parametrize(
    ("window", "turns"),
    [
        ((8, 7, 7), {64: 0.25}),  # 32 channels leave room for pairs
        ((4, 7, 7), {64: 0.25}),
        ((7, 7, 7), {64: 0.25}),
        ((1, 7, 7), {32: 0.1, 64: 0.25}),
        ((1, 12, 12), {32: 0.15, 64: 0.25}),
    ],
)
def test_gradients_of_windows_meet_few_banks_twice(window, turns, head_dim):
    """Backward, the single entries of a table alone take more turns: so many times for each score of a lane."""
    torch.manual_seed(0)
    qkv = torch.randn(1, *window, 3, 1, head_dim, dtype=torch.bfloat16, requires_grad=True)
    table = torch.randn(geo.num_bias_rows(window), 1, requires_grad=True)
    out = vidattn.window3d_attention(qkv, window_size=window, bias_table=table, backend="cuda")
    before = emulated.counts()
    torch.autograd.grad(out, (qkv, table), torch.randn_like(out))
    found = {name: count - before[name] for name, count in emulated.counts().items()}
    assert found["blocks"] > 0 and found["ldmatrix_conflicts"] == 0
    assert found["load_conflicts"] <= turns.get(head_dim, 0) * math.prod(window) ** 2 / 32


SEQUENCES: dict[str, Any] = {
    "a frame": divided_cases.Case("spatial", 1, 196, batch=1, heads=1),
    "a frame and a cls token": divided_cases.Case("mean", 1, 196, "hwt", batch=1, heads=1),
    "96 frames": divided_cases.Case("temporal", 96, 2, batch=1, heads=1),
    "50 frames, read twice": divided_cases.Case("temporal", 50, 2, "hwt", batch=1, heads=1),
    "two blocks of keys": divided_cases.Case("temporal", 400, 1, batch=1, heads=1),
    "channels from other frames": mixing_cases.Case(2, 197, 8, clips=1, heads=1),
    "odd channels": mixing_cases.Case(2, 97, clips=1, heads=1, channel_shifts=((3, 9, 1), (11, 14, -1))),
}


@pytest.mark.parametrize("head_dim", [32, 64])
@pytest.mark.parametrize("name", SEQUENCES)
def test_sequences_meet_no_bank_twice(name, head_dim):
    """In both passes."""
    case = replace(SEQUENCES[name], head_dim=head_dim)
    before = emulated.counts()
    attend(case, **case.inputs(BF16))
    found = {name: count - before[name] for name, count in emulated.counts().items()}
    assert found["blocks"] > 1 and found["ldmatrix_conflicts"] == found["load_conflicts"] == 0

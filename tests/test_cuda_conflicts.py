"""Conflicts of banks in the CUDA kernels of windows: the emulated GPU counts the turns that each access takes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import tests.cuda_emulator as emulated
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

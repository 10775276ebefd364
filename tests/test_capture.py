"""Attention maps: those of the original's softmax, laid out on the token grid."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vidattn
from examples import attention_maps
from vidattn.models.timesformer import TimeSformer
from vidattn.models.video_swin import SwinTransformer3D
from vidattn.models.video_swin_windows import fit_window, window_partition
from vidattn.models.xvit import XViT


def probabilities(model: nn.Module, name: str, *inputs: Any) -> dict[str, Tensor]:
    """What the modules of a name give, by the name of their parent: the softmax of the original."""
    found: dict[str, Tensor] = {}
    handles = [
        module.register_forward_hook(lambda _, __, out, path=path: found.update({path.rpartition(".")[0]: out}))
        for path, module in model.named_modules()
        if path.endswith(f".{name}")
    ]
    with torch.no_grad():
        model(*inputs)
    for handle in handles:
        handle.remove()
    return found


def test_divided_attention() -> None:
    torch.manual_seed(0)
    model = TimeSformer(img_size=32, num_frames=3, embed_dim=24, depth=2, num_heads=2).eval()
    video = torch.randn(2, 3, 3, 32, 32)
    plain = probabilities(model, "attn_drop", video)
    with torch.no_grad(), vidattn.capture_attention(model) as captured:
        expected = model(video)
    assert [call.function for call in captured.calls] == ["temporal_attention", "spatial_attention"] * 2
    assert not any(isinstance(module, vidattn.twins.Twin) for module in model.modules())
    torch.testing.assert_close(model(video), expected)
    for block in ("model.blocks.0", "model.blocks.1"):
        over_time = captured.maps[f"{block}.temporal_attention"]  # (B, h, N * T, N * T), token n * T + t
        assert captured.grids[f"{block}.temporal_attention"] == (3, 2, 2)
        sites = plain[f"{block}.temporal_attn"].unflatten(0, (2, 4))  # (B, N, h, T, T)
        expected = torch.zeros(2, 2, 4, 3, 4, 3)
        for site in range(4):
            expected[:, :, site, :, site] = sites[:, site]
        torch.testing.assert_close(over_time, expected.flatten(4).flatten(2, 3))
        over_space = captured.maps[f"{block}.spatial_attention"]  # (B, h, 1 + N * T, 1 + N * T)
        frames = plain[f"{block}.attn"].unflatten(0, (2, 3))  # (B, T, h, 1 + N, 1 + N)
        expected = torch.zeros(2, 2, 13, 13)
        inner = expected[:, :, 1:, 1:].view(2, 2, 4, 3, 4, 3)
        for frame in range(3):
            inner[:, :, :, frame, :, frame] = frames[:, frame, :, 1:, 1:]
            expected[:, :, 1 + frame :: 3, 0] = frames[:, frame, :, 1:, 0]
            expected[:, :, 0, 1 + frame :: 3] = frames[:, frame, :, 0, 1:] / 3
            expected[:, :, 0, 0] += frames[:, frame, :, 0, 0] / 3
        expected[:, :, 1:, 1:] = inner.reshape(2, 2, 12, 12)
        torch.testing.assert_close(over_space, expected)


@pytest.mark.parametrize("size", [(4, 32, 24), (4, 36, 24)], ids=["whole windows", "padded"])
def test_windows(size: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    model = SwinTransformer3D(
        patch_size=(2, 4, 4), embed_dim=12, depths=(2,), num_heads=(2,), window_size=(2, 4, 3)
    ).eval()
    for name, parameter in model.named_parameters():
        if "bias" in name:
            nn.init.normal_(parameter)
    video = torch.randn(1, 3, *size)
    grid = size[0] // 2, size[1] // 4, size[2] // 4
    plain = probabilities(model, "softmax", video)
    with torch.no_grad(), vidattn.capture_attention(model) as captured:
        model(video)
    number = torch.arange(grid[0] * grid[1] * grid[2]).view(1, *grid, 1)
    for index, shift in enumerate(((0, 0, 0), (1, 2, 1))):
        window, shift, padded = fit_window(grid, (2, 4, 3), shift)
        tokens = torch.full((1, *padded, 1), -1).index_put_(
            tuple(torch.meshgrid(torch.tensor([0]), *map(torch.arange, grid), torch.tensor([0]), indexing="ij")),
            number,
        )
        tokens = window_partition(tokens.roll([-x for x in shift], (1, 2, 3)), window)[..., 0]  # (nW, N)
        found = captured.maps[f"layers.0.blocks.{index}"]
        assert captured.grids[f"layers.0.blocks.{index}"] == grid
        expected = torch.zeros_like(found)
        for rows, weights in zip(tokens, plain[f"layers.0.blocks.{index}.attn"], strict=True):
            here = rows >= 0
            real = rows[here]
            expected[0, :, real[:, None], real] = weights[:, here][:, :, here]
        torch.testing.assert_close(found, expected)


def test_mixing() -> None:
    """Its keys are those that the shift puts together; the maps of frames are a batch."""
    torch.manual_seed(0)
    model = XViT(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2, num_frames=4, num_segments=4).eval()
    video = torch.randn(2, 3, 4, 32, 32)
    plain = probabilities(model, "attn_drop", video)
    with torch.no_grad(), vidattn.capture_attention(model) as captured:
        model(video)
    mixing = {call.module for call in captured.calls if call.function == "space_time_mixing_attention"}
    assert len(mixing) == 2 and mixing <= set(plain)
    for path in mixing:
        torch.testing.assert_close(captured.maps[path], plain[path])


def test_chosen_queries_and_grid() -> None:
    torch.manual_seed(0)
    model = TimeSformer(
        img_size=32, num_frames=3, embed_dim=24, depth=1, num_heads=2, attention_type="joint_space_time"
    ).eval()
    video = torch.randn(1, 3, 3, 32, 32)
    with torch.no_grad():
        with vidattn.capture_attention(model, grid=(3, 2, 2)) as captured:
            model(video)
        with vidattn.capture_attention(model, queries=[4, -1]) as chosen:
            model(video)
    ((name, rows),) = captured.maps.items()
    assert captured.grids[name] == (3, 2, 2) and rows.shape == (1, 2, 13, 13)
    torch.testing.assert_close(rows.sum(-1), torch.ones(1, 2, 13))
    torch.testing.assert_close(chosen.maps[name], rows[:, :, [4, -1]])
    with (
        pytest.raises(ValueError, match="queries: expected numbers below 13, got"),
        vidattn.capture_attention(model, queries=[13]),
    ):
        model(video)
    assert vidattn.ops._library._listener is None


def test_the_example_draws_what_a_token_looks_at(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = TimeSformer(img_size=32, num_frames=3, embed_dim=24, depth=2, num_heads=2).eval()
    video = torch.randn(1, 3, 3, 32, 32)
    options = argparse.Namespace(model="timesformer_base", row=0.9, column=0.1, layers=2)
    maps = attention_maps.look(model, video, options)
    assert list(maps) == ["model.blocks.1.temporal_attention", "model.blocks.1.spatial_attention"]
    over_time, over_space = maps.values()
    assert over_time.shape == over_space.shape == (3, 2, 2)
    assert bool((over_time[:, 1, 0] > 0).all()) and over_time.sum() == over_time[:, 1, 0].sum()  # its own site
    assert bool((over_space[1] > 0).all()) and over_space.sum() == over_space[1].sum()  # its own frame
    attention_maps.draw(video, maps, tmp_path / "maps.png")
    assert (tmp_path / "maps.png").stat().st_size > 10_000


def test_bad_arguments() -> None:
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got int"):
        vidattn.capture_attention(3).__enter__()  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="grid: expected"):
        vidattn.capture_attention(nn.Identity(), grid=(3, 2)).__enter__()
    with pytest.raises(ValueError, match="queries: expected"):
        vidattn.capture_attention(nn.Identity(), queries=[]).__enter__()

"""TransMorph: a stand-in of its stages with their blocks swapped."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from integration_cases import Integration, Target, admit, assert_as_before, run
from standin_transmorph import BasicLayer
from torch import Tensor, nn

import vidattn

REPOSITORY = "junyuchen245/TransMorph_Transformer_for_Medical_Image_Registration"
DIM, HEADS = 12, 3


class Stage(nn.Module):
    """A stage on one token grid."""

    def __init__(self, grid: tuple[int, int, int], window: tuple[int, int, int], **options: Any) -> None:
        super().__init__()
        self.grid = grid
        self.layer = BasicLayer(DIM, HEADS, window, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, *self.grid)[0]


def tokens(*grid: int) -> dict[str, Tensor]:
    return {"x": torch.randn(2, grid[0] * grid[1] * grid[2], DIM)}


def target(model: str, grid: tuple[int, int, int], window: tuple[int, int, int], **options: Any) -> Target:
    build = partial(Stage, grid, window, **options)
    return Target(
        REPOSITORY, f"TransMorph, {model}", build, partial(tokens, *grid), ("WindowAttention",), "transmorph", True
    )


TARGETS = [target("padded", (5, 7, 9), (2, 3, 4), drop=0.2)]


@pytest.mark.parametrize("target", TARGETS, ids=str)
class TestTargets(Integration):
    pass


# Grids of one window on some axis, which the op would not shift; smaller than a window, which it would not pad; a shift
# of 0, with which no axis is shifted.
OTHERS = {
    "one window": ((4, 3, 5), (4, 3, 2)),
    "smaller": ((2, 6, 8), (3, 3, 4)),
    "flat": ((3, 6, 5), (1, 3, 2)),
    "flat and smaller": ((3, 2, 5), (1, 3, 2)),
}


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Callable[..., nn.Module]:
    def make(grid: tuple[int, int, int], window: tuple[int, int, int], **options: Any) -> nn.Module:
        model = target("", grid, window, **options).make(torch.float64)
        admit(model, "transmorph", monkeypatch)
        return model

    return make


def compared(model: nn.Module, x: Tensor) -> dict[str, int]:
    """Hold a model to what it computed before; tell the ops that it called then."""
    before = run(model, {"x": x})
    vidattn.accelerate(model)
    after = run(model, {"x": x})
    assert_as_before(after, before, None)
    return dict(after.ops.calls)


@pytest.mark.parametrize("name", OTHERS)
def test_other_grids(name: str, stage: Callable[..., nn.Module]) -> None:
    grid, window = OTHERS[name]
    calls = compared(stage(grid, window), tokens(*grid)["x"].double().requires_grad_())
    on_grid = {"one window": 1, "smaller": 0, "flat": 2, "flat and smaller": 0}[name]
    assert calls.get("window3d_attention", 0) == on_grid
    assert calls.get("window_attention", 0) == 2 - on_grid


def test_without_position_bias(stage: Callable[..., nn.Module]) -> None:
    calls = compared(stage((5, 7, 9), (2, 3, 4), rpe=False), tokens(5, 7, 9)["x"].double().requires_grad_())
    assert calls["window3d_attention"] == 2


def _hook_on_attention(model: nn.Module) -> None:
    model.layer.blocks[1].attn.register_forward_hook(lambda module, args, out: out * 1.5)


def _hook_on_block(model: nn.Module) -> None:
    model.layer.blocks[1].register_forward_pre_hook(lambda module, args: (args[0], args[1] * 0.5))


def _permuted(model: nn.Module) -> None:
    index = model.layer.blocks[1].attn.relative_position_index
    index.copy_(index.flip(0).clone())


def _other_downsampling(model: nn.Module) -> None:
    class Halving(nn.Module):
        def forward(self, x: Tensor, H: int, W: int, T: int) -> Tensor:
            return x[:, ::2]

    model.layer.downsample = Halving()


# What is changed, and how many of the two attentions still run on the grid.
CHANGES = {"attention": (_hook_on_attention, 1), "block": (_hook_on_block, 1), "index": (_permuted, 1)}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("later", [False, True], ids=["before", "after"])
def test_what_hangs_on_a_part_is_honoured(name: str, later: bool, stage: Callable[..., nn.Module]) -> None:
    change, on_grid = CHANGES[name]
    plain, model = stage((5, 7, 9), (2, 3, 4)), stage((5, 7, 9), (2, 3, 4))
    change(plain)
    x = tokens(5, 7, 9)["x"].double().requires_grad_()
    expected = run(plain, {"x": x})
    if not later:
        change(model)
    vidattn.accelerate(model)
    if later:
        change(model)
    after = run(model, {"x": x})
    assert_as_before(after, expected, None)
    assert after.ops.calls["window3d_attention"] == on_grid and after.ops.calls["window_attention"] == 2 - on_grid


def test_checkpointing_and_downsampling(stage: Callable[..., nn.Module]) -> None:
    x = tokens(5, 7, 9)["x"].double().requires_grad_()
    calls = compared(stage((5, 7, 9), (2, 3, 4), use_checkpoint=True), x)
    assert calls["window3d_attention"] + calls["window_attention"] == 4  # twice each
    model = stage((5, 7, 9), (2, 3, 4))
    _other_downsampling(model)
    expected = model.layer(x, 5, 7, 9)
    vidattn.accelerate(model)
    found = model.layer(x, 5, 7, 9)
    assert found[1:4] == expected[1:4] and found[5:] == expected[5:]
    torch.testing.assert_close(found[4], expected[4], rtol=1e-10, atol=1e-10)


def test_no_mask_is_built(stage: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    model = stage((5, 7, 9), (2, 3, 4))
    vidattn.accelerate(model)
    monkeypatch.setattr(torch, "arange", None)  # with which the original makes it
    model(tokens(5, 7, 9)["x"].double())

"""The official Video Swin and its copies: stand-ins with their blocks and stages swapped."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from integration_cases import Integration, Target, admit, assert_as_before, run
from standin_video_swin import BasicLayer, MmactionBasicLayer, OmnivoreBasicLayer, SwinTransformer3D, WindowAttention3D
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

import vidattn
from vidattn.models import video_swin_windows
from vidattn.nn import RegionMask


def clip(*shape: int) -> dict[str, Any]:
    return {"x": torch.randn(shape)}


_target = partial(Target, attention=("WindowAttention3D",), integration="video_swin", stand_in=True)
# Stages of 3 x 7 x 9 and 3 x 4 x 5 tokens, then of 3 x 2 x 6: windows that are padded, shifted and clipped.
OFFICIAL = _target(
    "SwinTransformer/Video-Swin-Transformer",
    "Video Swin",
    partial(SwinTransformer3D, BasicLayer),
    partial(clip, 2, 3, 6, 28, 36),
)
MMACTION = _target(
    "open-mmlab/mmaction2",
    "Video Swin",
    partial(SwinTransformer3D, MmactionBasicLayer, num_heads=(2, 4), window_size=(4, 5, 7), qkv_bias=False),
    partial(clip, 1, 3, 6, 9, 42),
)
OMNIVORE = _target(
    "facebookresearch/omnivore",
    "Video Swin",
    partial(SwinTransformer3D, OmnivoreBasicLayer),
    partial(clip, 1, 3, 4, 20, 28),
)
TARGETS = [OFFICIAL, MMACTION, OMNIVORE]


@pytest.mark.parametrize("target", TARGETS, ids=str)
class TestTargets(Integration):
    pass


def pair(monkeypatch: pytest.MonkeyPatch, target: Target = OFFICIAL, **options: Any) -> tuple[Any, Any]:
    """A plain model and its accelerated copy, both in float64."""
    target = target._replace(build=partial(target.build, **options))
    plain, fast = target.make(torch.float64), target.make(torch.float64)
    admit(plain, target.integration, monkeypatch)
    report = vidattn.accelerate(fast)
    assert len(report.swapped) == 10 and not report.skipped
    return plain, fast


def assert_same(plain: nn.Module, fast: nn.Module, ops: dict[str, int] | None = None) -> None:
    arguments = OFFICIAL.arguments(torch.float64)
    before, after = run(plain, arguments), run(fast, arguments)
    assert_as_before(after, before, None)
    if ops is not None:
        assert {name: count for name, count in after.ops.calls.items() if not name.endswith("_backward")} == ops


ALL_FUSED = {"window3d_attention": 4}


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_no_mask_is_built(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor with activation checkpointing around the blocks."""
    plain, fast = pair(monkeypatch, target)
    built: list[Any] = []
    build = video_swin_windows._build_mask
    monkeypatch.setattr(video_swin_windows, "_build_mask", lambda *args: built.append(args) or build(*args))
    for wrapped in (False, True):
        if wrapped:
            apply_activation_checkpointing(fast, check_fn=lambda module: type(module).__name__.startswith("FusedSwinT"))
        video_swin_windows._mask_cache.clear()
        assert run(fast, target.arguments(torch.float64)).ops.calls["window3d_attention"] >= 4
        assert not built
    run(plain, target.arguments(torch.float64))
    assert built


@pytest.mark.parametrize("rates", [{"drop": 0.3}, {"drop": 0.3, "flag": True}], ids=["plain", "checkpointed"])
def test_dropout_draws_the_same_numbers(rates: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """That after the projection too, which the original applies to padded windows."""
    plain, fast = pair(monkeypatch, **rates)
    assert_same(plain.train(), fast.train(), ALL_FUSED if "flag" not in rates else None)


def _hooks_of_a_block(model: Any) -> None:
    def see(module: nn.Module, args: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        assert args[1].shape[1:] == (18, 18)
        return args[0], 0.01 * args[1]

    model.layers[0].blocks[1].register_forward_pre_hook(see)


def _a_part_of_the_instance(model: Any) -> None:
    block = model.layers[0].blocks[1]
    part = block.forward_part1
    block.forward_part1 = lambda x, mask: part(x, 0.01 * mask)


def _an_index(model: Any) -> None:
    index = model.layers[0].blocks[1].attn.relative_position_index
    index.copy_(index.flip(0).clone())


def _softmax(model: Any) -> None:
    model.layers[0].blocks[1].attn.softmax.register_forward_hook(lambda module, args, out: out**2)


def _another_window(model: Any) -> None:
    """Of the attention alone: a bias of other rows."""
    attention = model.layers[0].blocks[1].attn
    attention.window_size = (2, 3, 5)


def _another_shift(model: Any) -> None:
    model.layers[0].blocks[1].shift_size = (1, 0, 2)


def _a_block_of_its_own(model: Any) -> None:
    kind = type(model.layers[0].blocks[1])

    class Softened(kind):
        def forward_part1(self, x: Tensor, mask_matrix: Tensor) -> Tensor:
            return super().forward_part1(x, 0.01 * mask_matrix)

    model.layers[0].blocks[1].__class__ = Softened


@pytest.mark.parametrize(
    ("change", "fused"),
    [
        (_hooks_of_a_block, 3), (_a_part_of_the_instance, 3), (_an_index, 3), (_softmax, 3), (_another_window, 3),
        (_another_shift, 3), (_a_block_of_its_own, 3),
    ],
)  # fmt: skip
def test_what_is_changed_afterwards_counts(
    change: Callable[[Any], None], fused: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, fast = pair(monkeypatch)
    unchanged = run(plain, OFFICIAL.arguments(torch.float64), grad=False)
    for model in (plain, fast):
        change(model)
    arguments = OFFICIAL.arguments(torch.float64)
    before, after = run(plain, arguments), run(fast, arguments)
    assert_as_before(after, before, None)
    assert after.ops.calls["window3d_attention"] == fused
    assert change is _another_window or not torch.allclose(before.outputs[0], unchanged.outputs[0])


def test_arguments_of_the_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage without its downsampling, with recomputed activations, for segmentation."""
    x = torch.randn(1, 24, 2, 5, 7, dtype=torch.float64)
    for target, calls in (
        (MMACTION, [{}, {"do_downsample": False}]),
        (OMNIVORE, [{}, {"use_checkpoint": True}, {"H": 5, "W": 7}, {"use_seg": True}]),
    ):
        plain, fast = pair(monkeypatch, target)
        for arguments in calls:
            before, after = (run(model.layers[0], {"x": x, **arguments}) for model in (plain, fast))
            assert_as_before(after, before, None)
            assert after.ops.calls["window3d_attention"] > 0 or "use_seg" in arguments


def test_a_block_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the standard mask, none, another's, and what stands for the standard one."""
    plain, fast = (model.layers[0].blocks[1] for model in pair(monkeypatch))
    x = torch.randn(2, 3, 5, 7, 24, dtype=torch.float64)
    marker = RegionMask.of((3, 5, 7), (2, 3, 3), (1, 1, 1))
    standard = marker.build(x.device)
    for mask, fused in ((standard, False), (None, True), (torch.randn_like(standard), False)):
        before, after = (run(block, {"x": x, "mask_matrix": mask}) for block in (plain, fast))
        assert_as_before(after, before, None)
        assert ("window3d_attention" in after.ops.calls) == fused
    before = run(plain, {"x": x, "mask_matrix": standard})
    after = run(fast, {"x": x, "mask_matrix": marker})
    assert_as_before(after, before, None)
    assert after.ops.calls["window3d_attention"] == 1


def test_what_is_left_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    model = OFFICIAL.make()
    admit(model, "video_swin", monkeypatch)
    first, second = model.layers[0].blocks
    third, fourth = model.layers[1].blocks

    class Other(WindowAttention3D):
        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            return 2 * super().forward(x, mask)

    first.attn.__class__ = Other
    second.attn.forward = second.attn.forward
    third.attn.relative_position_index.copy_(third.attn.relative_position_index.flip(0).clone())
    fourth.attn.scale = nn.Parameter(torch.tensor(0.3))
    arguments = OFFICIAL.arguments()
    before = run(model, arguments)
    report = vidattn.accelerate(model)
    reasons = {row.name.removeprefix("layers."): row.reason for row in report.skipped}
    assert reasons["0.blocks.0"] == "its attn is a Other"
    assert "untested version" in reasons["0.blocks.0.attn"]
    assert reasons["0.blocks.1"] == "its attn: the instance overrides forward"
    assert reasons["1.blocks.0"] == "its relative_position_index is not the standard one"
    assert "scale" in reasons["1.blocks.1"] and "scale" in reasons["1.blocks.1.attn"]
    assert {row.name for row in report.swapped} == {"layers.0", "layers.1", "layers.1.blocks.0.attn"}
    after = run(model, arguments)
    assert_as_before(after, before, None)


def test_a_module_of_the_name_alone_is_none_of_these() -> None:
    """A stage, or an attention with a second table, that only has the name."""
    model = OFFICIAL.make()
    attention = model.layers[0].blocks[0].attn
    attention.fragment_bias = nn.Parameter(torch.zeros(1))
    del model.layers[0].window_size
    names = {row.name for row in vidattn.accelerate(model).skipped}
    assert "layers.1" in names and "layers.1.blocks.0.attn" in names
    assert "layers.0" not in names and "layers.0.blocks.0.attn" not in names

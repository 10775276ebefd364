"""torchvision's models with their attention swapped."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from integration_cases import Integration, Ops, Target, compiled, run, spread
from torch import nn
from torchvision_swin import torchvision_swin2d, torchvision_swin3d
from twin_cases import assert_same, results

import vidattn


def swin3d(depths: tuple[int, ...], heads: tuple[int, ...], window: tuple[int, int, int]) -> nn.Module:
    return torchvision_swin3d.SwinTransformer3d(
        [2, 4, 4], 24, list(depths), list(heads), list(window), stochastic_depth_prob=0.2, num_classes=5
    )


def swin2d(depths: tuple[int, ...] = (2, 2), version: int = 1, **options: Any) -> nn.Module:
    if version == 2:
        options["block"] = torchvision_swin2d.SwinTransformerBlockV2
        options["downsample_layer"] = torchvision_swin2d.PatchMergingV2
    return torchvision_swin2d.SwinTransformer(
        [4, 4], 24, list(depths), [3] * len(depths), [4, 4], stochastic_depth_prob=0.2, num_classes=5, **options
    )


def pixels(*shape: int) -> dict[str, Any]:
    return {"x": torch.randn(shape)}


_swin3d = partial(Target, "torchvision", attention=("ShiftedWindowAttention3d",), integration="torchvision")
_swin2d = partial(Target, "torchvision", attention=("ShiftedWindowAttention",), integration="torchvision")
_swin2d_v2 = partial(Target, "torchvision", attention=("ShiftedWindowAttentionV2",), integration="torchvision")
TARGETS = [
    # Stages of 3 x 7 x 9, 3 x 4 x 5 and 3 x 2 x 3 tokens: windows that are padded, shifted and clipped.
    _swin3d("swin3d, padded", partial(swin3d, (2, 1, 1), (3, 3, 3), (2, 3, 3)), partial(pixels, 2, 3, 6, 28, 36)),
    _swin3d("swin3d, clipped", partial(swin3d, (2, 1), (2, 4), (4, 5, 7)), partial(pixels, 1, 3, 10, 18, 52)),
    # Stages of 11 x 15, 6 x 8 and 3 x 4 tokens, the last below the window of 4 x 4.
    _swin2d("swin", partial(swin2d, (2, 1, 1)), partial(pixels, 1, 3, 44, 60)),
    _swin2d_v2("swin v2", partial(swin2d, (2, 1), version=2), partial(pixels, 2, 3, 36, 44)),
]


@pytest.mark.parametrize("target", TARGETS, ids=str)
class TestTargets(Integration):
    def test_compiles(self, target: Target) -> None:
        super().test_compiles(target)
        assert not compiled["graph_break"]


@pytest.mark.parametrize("grid", [(2, 9), (9, 3), (3, 3), (4, 9), (8, 8), (5, 1)], ids=str)
@pytest.mark.parametrize("kind", ["ShiftedWindowAttention", "ShiftedWindowAttentionV2"])
def test_windows_are_padded_up_to_and_never_clipped(kind: str, grid: tuple[int, int]) -> None:
    """On axes shorter than the window, as long, longer, and on two axes that differ in this."""
    module = spread(getattr(torchvision_swin2d, kind)(12, [4, 5], [2, 2], 3)).double()
    x = torch.randn(2, *grid, 12, dtype=torch.float64)
    before = results(module, x)
    vidattn.accelerate(module)
    with Ops() as ops:
        assert_same(results(module, x), before, 1e-10)
    assert ops.forward == 1


@pytest.mark.parametrize("index", [0, 2, 3])
def test_a_permuted_position_index_stays_original(index: int) -> None:
    model, arguments = TARGETS[index].make(), TARGETS[index].arguments()
    modules = [module for module in model.modules() if hasattr(module, "relative_position_index")]
    modules[0].relative_position_index.copy_(modules[0].relative_position_index.flip(0).clone())
    before = run(copy.deepcopy(model), arguments, grad=False)
    report = vidattn.accelerate(model)
    assert [row.reason for row in report.skipped] == ["its relative_position_index is not the standard one"]
    assert len(report.swapped) == len(modules) - 1
    report.revert()
    modules[0].relative_position_index.copy_(modules[1].relative_position_index)
    vidattn.accelerate(model)
    modules[0].relative_position_index.copy_(modules[0].relative_position_index.flip(0).clone())
    after = run(model, arguments, grad=False)
    assert after.ops.forward == len(modules) - 1
    assert_same(after.outputs, before.outputs)


def test_a_shift_as_large_as_its_window_stays_original() -> None:
    module = torchvision_swin2d.ShiftedWindowAttention(12, [4, 4], [2, 4], 3)
    report = vidattn.accelerate(module)
    assert [row.reason for row in report.skipped] == ["its shift [2, 4] is not below its window [4, 4]"]


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("size", [(36, 44), (12, 60)], ids=str)
def test_dropout_draws_what_it_drew(version: int, size: tuple[int, int]) -> None:
    """Dropout of the output, which the original draws for partitioned windows, and stochastic depth after it."""
    model = spread(swin2d(version=version, dropout=0.3)).double()
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    before = results(model, x)
    vidattn.accelerate(model)
    assert_same(results(model, x), before, 1e-10)


def test_dropout_draws_what_it_drew_in_3d() -> None:
    module = spread(torchvision_swin3d.ShiftedWindowAttention3d(12, [2, 3, 3], [1, 1, 1], 3, dropout=0.4)).double()
    x = torch.randn(2, 3, 7, 5, 12, dtype=torch.float64)
    before = results(module, x)
    vidattn.accelerate(module)
    assert_same(results(module, x), before, 1e-10)


def test_dropout_of_probabilities() -> None:
    """The op drops its own; what keeps nothing is left to the original."""
    module = spread(torchvision_swin2d.ShiftedWindowAttention(12, [4, 4], [2, 2], 3, attention_dropout=0.5))
    x = torch.randn(3, 9, 8, 12)
    whole = module.eval()(x)
    vidattn.accelerate(module)
    assert_same([module(x)], [whole])
    with Ops() as ops:
        first, second = module.train()(x), module(x)
        assert not torch.equal(first, second) and not torch.equal(first, whole)
        assert ops.forward == 2
        module.attention_dropout = 1.0
        module(x)
        assert ops.forward == 2


def test_projections_are_read_and_never_called() -> None:
    """As in the original: a hook on them sees nothing."""
    module = spread(torchvision_swin2d.ShiftedWindowAttention(12, [4, 4], [2, 2], 3))
    seen: list[Any] = []
    for part in (module.qkv, module.proj):
        part.register_forward_hook(lambda *_: seen.append(1))
    x = torch.randn(1, 9, 8, 12)
    before = module(x)
    vidattn.accelerate(module)
    with Ops() as ops:
        assert_same([module(x)], [before])
    assert ops.forward == 1 and not seen


@pytest.mark.parametrize("index", [0, 2], ids=["3d", "2d"])
def test_feature_extraction_of_an_accelerated_model(index: int) -> None:
    from torchvision.models.feature_extraction import create_feature_extractor

    model, arguments = TARGETS[index].make(), TARGETS[index].arguments()
    before = create_feature_extractor(model, ["features.2"])(**arguments)
    vidattn.accelerate(model)
    after = create_feature_extractor(model, ["features.2"])(**arguments)
    assert torch.equal(before["features.2"], after["features.2"])


def test_an_exported_program_has_the_ops() -> None:
    """``torch.fx`` puts something before the functions of the original while it records."""
    model, x = TARGETS[2].make(), TARGETS[2].inputs()["x"]
    before = model(x)
    vidattn.accelerate(model)
    program = torch.export.export(model, (x,))
    assert sum("vidattn" in str(node.target) for node in program.graph.nodes) == 4
    assert_same([program.module()(x)], [before])


@pytest.mark.parametrize("index", [0, 3], ids=["3d", "2d v2"])
def test_half_precision(index: int) -> None:
    target = TARGETS[index]
    exact = run(target.make(torch.float64), target.arguments(torch.float64), grad=False).outputs[0]
    model, arguments = target.make(torch.bfloat16), target.arguments(torch.bfloat16)
    before = run(model, arguments, grad=False).outputs[0]
    vidattn.accelerate(model)
    after = run(model, arguments, grad=False).outputs[0]
    assert after.dtype == before.dtype
    assert (after - exact).norm() <= 1.5 * (before - exact).norm()

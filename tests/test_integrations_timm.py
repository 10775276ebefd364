"""timm's models with their attention swapped."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from integration_cases import Integration, Ops, Target, compiled, run, spread
from torch import Tensor, nn
from torchvision_swin import torchvision_swin2d  # timm imports torchvision, which may need its schemas
from twin_cases import assert_same, results

import vidattn

assert torchvision_swin2d
from timm.layers import LayerNorm, RmsNorm  # noqa: E402
from timm.models import swin_transformer, vision_transformer  # noqa: E402


def swin(size: tuple[int, int], depths: tuple[int, ...] = (2, 1), **options: Any) -> nn.Module:
    return swin_transformer.SwinTransformer(
        img_size=size,
        patch_size=4,
        embed_dim=24,
        depths=depths,
        num_heads=(3,) * len(depths),
        window_size=4,
        num_classes=5,
        drop_path_rate=0.2,
        **options,
    )


def vit(**options: Any) -> nn.Module:
    return vision_transformer.VisionTransformer(
        img_size=48, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=5, drop_path_rate=0.2, **options
    )


def pixels(*shape: int) -> dict[str, Any]:
    return {"x": torch.randn(shape)}


_swin = partial(Target, "timm", attention=("WindowAttention",), integration="timm")
_vit = partial(Target, "timm", attention=("Attention",), integration="timm")
TARGETS = [
    # Stages of 8 x 12 and 4 x 6 tokens under a window of 4 x 4.
    _swin("swin", partial(swin, (32, 48)), partial(pixels, 2, 3, 32, 48)),
    # 10 x 14 tokens, padded after they are rolled.
    _swin("swin, any size", partial(swin, (48, 48), strict_img_size=False), partial(pixels, 1, 3, 40, 56)),
    _vit("vit", partial(vit, qk_norm=True), partial(pixels, 2, 3, 48, 48)),
]


@pytest.mark.parametrize("target", TARGETS, ids=str)
class TestTargets(Integration):
    def test_compiles(self, target: Target) -> None:
        super().test_compiles(target)
        assert not compiled["graph_break"]


def called(module: nn.Module, x: Tensor) -> dict[str, int]:
    """Count the ops of a call without gradients."""
    with torch.no_grad(), Ops() as ops:
        module(x)
    return dict(ops.calls)


def block(size: tuple[int, int], window: int = 4, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    options = {"shift_size": 2, **options}
    return spread(swin_transformer.SwinTransformerBlock(12, size, num_heads=3, window_size=window, **options)).double()


def tokens(*size: int) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(2, *size, 12, dtype=torch.float64)


WHOLE, WINDOWS = {"window3d_attention": 1}, {"window_attention": 1}


@pytest.mark.parametrize(
    ("size", "options", "expected"),
    [
        ((8, 12), {}, WHOLE),
        ((8, 4), {}, WHOLE),  # the second axis loses its shift
        ((3, 8), {}, WHOLE),  # the first window is that of the grid from the start
        ((9, 10), {"shift_size": 0}, WHOLE),  # padded, nothing rolled
        ((8, 6), {"shift_size": (2, 0)}, WHOLE),  # padded on the axis that is not rolled
        ((8, 10), {}, WINDOWS),  # padded after it is rolled
        ((4, 8), {"always_partition": True}, WINDOWS),  # rolled though one window covers it
        ((4, 8), {"always_partition": True, "dynamic_mask": True}, WINDOWS),
        ((3, 8), {"always_partition": True, "shift_size": 0}, WHOLE),  # padded up to the window
        ((8, 12), {"dynamic_mask": True}, WHOLE),
        ((8, 12), {"head_dim": 5, "qkv_bias": False}, WHOLE),
    ],
    ids=str,
)
def test_grids(size: tuple[int, int], options: dict[str, Any], expected: dict[str, int]) -> None:
    module, x = block(size, **options), tokens(*size)
    before = results(module, x)
    vidattn.accelerate(module)
    assert_same(results(module, x), before, 1e-10)
    assert called(module, x) == expected


def test_a_block_of_another_size_than_it_was_built_for() -> None:
    """With a dynamic mask any grid comes, smaller than the window too."""
    module = block((8, 8), dynamic_mask=True)
    for size, expected in (((12, 8), WHOLE), ((9, 5), WINDOWS), ((2, 8), WINDOWS)):  # too short to be rolled alike
        before = results(module, tokens(*size))
        with vidattn.accelerate(module):
            assert_same(results(module, tokens(*size)), before, 1e-10)
            assert called(module, tokens(*size)) == expected


def test_a_window_that_is_set_later() -> None:
    module = block((8, 8))
    vidattn.accelerate(module)
    for size, window in (((12, 6), (6, 3)), ((10, 10), (5, 5)), ((8, 8), (8, 8))):
        module.set_input_size(size, window)
        original, x = copy.deepcopy(module), tokens(*size)
        for part in (original, original.attn):
            part.__class__ = part.replaced  # type: ignore[assignment]
        assert_same(results(module, x), results(original, x), 1e-10)
        assert called(module, x) == WHOLE


def test_a_mask_of_ones_own_is_used() -> None:
    module, x = block((8, 8)), tokens(8, 8)
    standard = module(x)
    vidattn.accelerate(module)
    for change in (lambda mask: mask.mul(0.01), lambda mask: mask.flip(0), lambda mask: None):
        mask = module.attn_mask
        module.attn_mask = change(mask)
        out = module(x)
        assert called(module, x) == WINDOWS
        assert (out - standard).abs().max() > 1e-3
        other = block((8, 8))
        other.attn_mask = module.attn_mask
        assert_same([out], [other(x)], 1e-10)
        module.attn_mask = mask
    assert called(module, x) == WHOLE
    module.attn_mask.zero_()  # the same tensor, changed
    assert called(module, x) == WINDOWS


def test_a_permuted_position_index_is_used() -> None:
    module, x = block((8, 8)), tokens(8, 8)
    vidattn.accelerate(module)
    index = module.attn.relative_position_index
    index.copy_(index.flip(0).clone())
    other = block((8, 8))
    other.attn.relative_position_index = index
    assert_same([module(x)], [other(x)], 1e-10)
    assert called(module, x) == WINDOWS


def test_hooks_see_what_they_saw() -> None:
    """One on the attention gets windows; one on the softmax or the dropout gets probabilities from the original."""
    x = tokens(8, 8)
    for name, expected in (
        ("attn", WINDOWS),
        ("attn.softmax", {}),
        ("attn.attn_drop", {}),
        ("attn.proj_drop", WINDOWS),
    ):
        module = block((8, 8))
        seen: list[Tensor] = []
        hook = module.get_submodule(name).register_forward_hook(lambda *all, seen=seen: seen.append(all[2]))
        before = module(x)
        vidattn.accelerate(module)
        assert called(module, x) == expected, name
        assert_same([module(x)], [before], 1e-10)
        assert_same([seen[-1]], [seen[0]], 1e-10)
        hook.remove()
        assert called(module, x) == WHOLE


@pytest.mark.parametrize("size", [(8, 8), (9, 5)], ids=str)
def test_dropout_draws_what_it_drew(size: tuple[int, int]) -> None:
    """Dropout of the output, which the original draws for partitioned windows, and stochastic depth after it."""
    options = {"shift_size": 0} if size == (9, 5) else {}
    module, x = block(size, proj_drop=0.3, drop_path=0.3, **options), tokens(*size)
    before = results(module, x)
    vidattn.accelerate(module)
    assert_same(results(module, x), before, 1e-10)
    assert called(module, x) == WHOLE


@pytest.mark.parametrize("fused", [False, True])
def test_the_flag_for_pytorchs_attention(fused: bool) -> None:
    """With it the original reads less of its attention: neither the scale nor the mode of the dropout."""
    windows = spread(swin_transformer.WindowAttention(12, 3, window_size=4)).double()
    sequence = spread(vision_transformer.Attention(12, 3)).double()
    x = torch.randn(6, 16, 12, dtype=torch.float64)
    for module in (windows, sequence):
        module.fused_attn = fused
        before = results(module, x)
        with vidattn.accelerate(module):
            assert_same(results(module, x), before, 1e-10)
            assert sum(called(module, x).values()) == 1
        module.scale = 0.9
        before = results(module, x)
        with vidattn.accelerate(module):
            assert_same(results(module, x), before, 1e-10)
            assert sum(called(module, x).values()) == (0 if fused else 1)


def test_pytorchs_attention_drops_in_the_mode_of_the_module() -> None:
    windows = spread(swin_transformer.WindowAttention(12, 3, window_size=4, attn_drop=0.5))
    sequence = spread(vision_transformer.Attention(12, 3, attn_drop=0.5))
    x = torch.randn(6, 16, 12)
    for module in (windows, sequence):
        module.eval().fused_attn = True
        module.attn_drop.train()
        before = module(x)
        vidattn.accelerate(module)
        assert_same([module(x)], [before])


def test_windows_of_another_number_of_tokens_are_refused_as_before() -> None:
    module = swin_transformer.WindowAttention(12, 3, window_size=4)
    vidattn.accelerate(module)
    with pytest.raises(RuntimeError):
        module(torch.randn(2, 9, 12))


@pytest.mark.parametrize("norm", [LayerNorm, RmsNorm])
def test_norms_and_gates_of_a_sequence(norm: type) -> None:
    options = {"qk_norm": True, "scale_norm": True, "gated": True, "attn_head_dim": 6, "dim_out": 10}
    module = spread(vision_transformer.Attention(12, 3, norm_layer=norm, **options)).double()
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    before = results(module, x)
    vidattn.accelerate(module)
    assert_same(results(module, x), before, 1e-10)
    assert sum(called(module, x).values()) == 1


def test_masks_of_a_sequence_are_left_to_the_original() -> None:
    module = spread(vision_transformer.Attention(12, 3))
    x = torch.randn(2, 9, 12)
    mask = torch.ones(9, 9, dtype=torch.bool).tril()
    before = [module(x, mask), module(x, attn_mask=mask), module(x, is_causal=True), module(x, None, True)]
    vidattn.accelerate(module)
    with Ops() as ops:
        after = [module(x, mask), module(x, attn_mask=mask), module(x, is_causal=True), module(x, None, True)]
    assert ops.forward == 0 and all(map(torch.equal, after, before))


def test_dropout_of_probabilities() -> None:
    """The op drops its own; what keeps nothing is left to the original."""
    module = spread(vision_transformer.Attention(12, 3, attn_drop=0.5))
    x = torch.randn(4, 9, 12)
    vidattn.accelerate(module)
    assert called(module, x) == {"divided_attention": 1}
    assert not torch.equal(module(x), module(x))
    for fused in (False, True):
        module.fused_attn = fused
        module.attn_drop.p = 1.0
        assert called(module, x) == {}


def test_other_attention_of_the_library_is_left_alone() -> None:
    from timm.layers import AttentionRope, DiffAttention
    from timm.models.beit import Attention as BeitAttention
    from timm.models.swin_transformer_v2 import WindowAttention as WindowAttentionV2

    parts = (AttentionRope(12, 3), DiffAttention(12, 3), BeitAttention(12, 3), WindowAttentionV2(12, (4, 4), 3))
    assert not vidattn.accelerate(nn.ModuleList(parts)).swapped


def test_a_subclass_that_attends_otherwise_stays() -> None:
    class Causal(vision_transformer.Attention):
        def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
            return super().forward(x, None, True)

    report = vidattn.accelerate(vit(attn_layer=Causal))
    assert not report.swapped


def test_low_rank_adapters() -> None:
    """On the projections, before and after: the block still does the work of its attention."""
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=2, target_modules=["qkv", "proj"], init_lora_weights=False)
    for before_swap in (False, True):
        module, x = block((9, 5), shift_size=0), tokens(9, 5)
        torch.manual_seed(2)
        expected = inject_adapter_in_model(config, copy.deepcopy(module))
        if before_swap:
            module = copy.deepcopy(expected)
        vidattn.accelerate(module)
        if not before_swap:
            torch.manual_seed(2)
            module = inject_adapter_in_model(config, module)
        assert_same(results(module, x), results(expected, x), 1e-10)
        assert called(module, x) == WHOLE


def test_feature_extraction_of_an_accelerated_model() -> None:
    from timm.models import create_feature_extractor

    model, arguments = TARGETS[2].make(), TARGETS[2].arguments()
    before = create_feature_extractor(model, ["blocks.0.add_1"])(**arguments)
    vidattn.accelerate(model)
    after = create_feature_extractor(model, ["blocks.0.add_1"])(**arguments)
    assert torch.equal(before["blocks.0.add_1"], after["blocks.0.add_1"])


def test_features_of_an_accelerated_model() -> None:
    model, arguments = TARGETS[0].make(), TARGETS[0].arguments()
    before = model.forward_intermediates(arguments["x"], intermediates_only=True)
    vidattn.accelerate(model)
    assert_same(model.forward_intermediates(arguments["x"], intermediates_only=True), before)


def test_training_with_checkpoints_of_activations() -> None:
    model, arguments = TARGETS[0].make().train(), TARGETS[0].arguments()
    model.set_grad_checkpointing()
    before = run(copy.deepcopy(model), arguments)
    vidattn.accelerate(model)
    after = run(model, arguments)
    assert after.ops.forward > 3
    names = [name for name, row in before.gradients.items() if row is not None]
    assert_same([after.gradients[name] for name in names], [before.gradients[name] for name in names], 1e-4)

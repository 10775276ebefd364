"""Models of diffusers with their attention swapped: motion modules, Latte, CogVideoX, and any other ``Attention``."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torchvision_swin  # noqa: F401  (before diffusers, which imports torchvision and cannot do so by itself here)
from integration_cases import Integration, Target, assert_as_before, run, spread
from peft import LoraConfig
from torch import Tensor, nn

import vidattn
from vidattn.twins import Twin

_models = "diffusers.models"
processors = importlib.import_module(f"{_models}.attention_processor")
Attention = processors.Attention
AnimateDiffTransformer3D = importlib.import_module(f"{_models}.unets.unet_motion_model").AnimateDiffTransformer3D
UNetMotionModel = importlib.import_module(f"{_models}.unets.unet_motion_model").UNetMotionModel
TransformerTemporalModel = importlib.import_module(
    f"{_models}.transformers.transformer_temporal"
).TransformerTemporalModel
LatteTransformer3DModel = importlib.import_module(
    f"{_models}.transformers.latte_transformer_3d"
).LatteTransformer3DModel
CogVideoXTransformer3DModel = importlib.import_module(
    f"{_models}.transformers.cogvideox_transformer_3d"
).CogVideoXTransformer3DModel

TEMPORAL: dict[str, Any] = {
    "num_attention_heads": 3,
    "attention_head_dim": 8,
    "in_channels": 16,
    "norm_num_groups": 4,
    "double_self_attention": True,
    "positional_embeddings": "sinusoidal",
    "num_positional_embeddings": 8,
}


def motion_module() -> nn.Module:
    return AnimateDiffTransformer3D(**TEMPORAL)


def latte(**options: Any) -> nn.Module:
    return LatteTransformer3DModel(
        **{
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "in_channels": 4,
            "out_channels": 8,
            "sample_size": 8,
            "patch_size": 2,
            "norm_type": "ada_norm_single",
            "caption_channels": 12,
            "video_length": 5,
            "num_embeds_ada_norm": 1000,
            "activation_fn": "gelu-approximate",
            "attention_bias": True,
            "norm_elementwise_affine": False,
            **options,
        }
    )


class CogVideoX(nn.Module):
    """CogVideoX with its rotary positions, as its pipeline hands them over."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = CogVideoXTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            out_channels=4,
            time_embed_dim=8,
            text_embed_dim=12,
            num_layers=2,
            sample_width=8,
            sample_height=8,
            sample_frames=9,
            patch_size=2,
            temporal_compression_ratio=4,
            max_text_seq_length=8,
            use_rotary_positional_embeddings=True,
        )
        angles = torch.linspace(0, 9, 48 * 16).view(48, 16)
        self.register_buffer("cosines", angles.cos())
        self.register_buffer("sines", angles.sin())

    def forward(self, video: Tensor, text: Tensor, rotary: bool = True) -> Tensor:
        positions = (self.cosines, self.sines) if rotary else None
        return self.transformer(video, text, torch.tensor([3]), image_rotary_emb=positions, return_dict=False)[0]


def clip(channels: int, frames: int) -> dict[str, Any]:
    return {"hidden_states": torch.randn(2 * frames, channels, 3, 5), "num_frames": frames}


def latte_inputs() -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(2, 4, 5, 8, 8),
        "timestep": torch.tensor([3, 5]),
        "encoder_hidden_states": torch.randn(2, 7, 12),
    }


def cogvideox_inputs() -> dict[str, Any]:
    return {"video": torch.randn(1, 3, 4, 8, 8), "text": torch.randn(1, 8, 12)}


_target = partial(Target, "diffusers", attention=("Attention",), integration="diffusers")
TARGETS = [
    _target("TransformerTemporalModel", lambda: TransformerTemporalModel(**TEMPORAL), partial(clip, 16, 6)),
    _target("UNetMotionModel, its motion module", motion_module, partial(clip, 16, 5), compiles=False),  # as the first
    _target("LatteTransformer3DModel", latte, latte_inputs),
    _target("CogVideoXTransformer3DModel", CogVideoX, cogvideox_inputs, compiles=False),  # in a test of its own
]


@pytest.mark.parametrize("target", TARGETS, ids=str)
class TestTargets(Integration):
    pass


def attention(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return spread(Attention(**{"query_dim": 24, "heads": 3, "dim_head": 8, **options})).eval()


def both(module: nn.Module, arguments: dict[str, Any], change: Callable[[Any], Any] = lambda module: None) -> int:
    """Compare a module with its accelerated copy, each changed after that; tell how often an op was called."""
    accelerated = copy.deepcopy(module)
    assert vidattn.accelerate(accelerated).swapped
    for one in (module, accelerated):
        change(one)
    before, after = run(module, arguments), run(accelerated, arguments)
    assert before.ops.forward == 0
    assert_as_before(after, before, None)
    return after.ops.forward


def tokens(**more: Any) -> dict[str, Any]:
    torch.manual_seed(1)
    return {"hidden_states": torch.randn(2, 7, 24).requires_grad_(), **more}


class Doubled(processors.AttnProcessor2_0):
    """A processor of a user, of a class that the library's own is a base of."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return 2 * super().__call__(*args, **kwargs)


WITH_WEIGHTS = processors.CustomDiffusionAttnProcessor2_0(True, True, 24, 24)


class Plain(processors.AttnProcessor2_0):
    """A processor of a user that changes nothing."""


def fuse(module: Any) -> None:
    module.fuse_projections()
    module.set_processor(processors.FusedAttnProcessor2_0())


# Processors


def look_at_scores(module: Any) -> None:
    """Put a method that gives all keys the same weight on the instance, where the eager processor asks for it."""
    module.set_processor(processors.AttnProcessor())
    module.get_attention_scores = lambda query, key, mask=None: torch.full_like(query @ key.mT, 1 / key.shape[1])


@pytest.mark.parametrize(
    ("change", "calls"),
    [
        (lambda module: module.set_processor(processors.AttnProcessor()), 1),
        (lambda module: module.set_use_memory_efficient_attention_xformers(False), 1),
        (fuse, 1),
        (lambda module: module.set_attention_slice(1), 0),
        (lambda module: module.set_processor(Doubled()), 0),
        (lambda module: module.set_processor(WITH_WEIGHTS), 0),
        (look_at_scores, 0),
    ],
    ids=["eager", "xformers off", "fused", "sliced", "own", "a module", "scores"],
)
def test_the_processor_of_the_moment_decides(change: Callable[[Any], Any], calls: int) -> None:
    assert both(attention(), tokens(), change) == calls


def test_processors_of_a_whole_model() -> None:
    model, arguments = TARGETS[3].make(), TARGETS[3].arguments()
    before = run(model, arguments, grad=False)
    vidattn.accelerate(model)
    transformer: Any = model.transformer
    own = transformer.attn_processors
    for change in (
        transformer.fuse_qkv_projections,
        transformer.unfuse_qkv_projections,
        partial(transformer.set_attn_processor, dict(own)),
    ):
        change()
        after = run(model, arguments, grad=False)
        assert_as_before(after, before, None)
        assert after.ops.forward == 2
    assert len(own) == 2 and transformer.attn_processors == own


def test_text_and_video_without_positions() -> None:
    model, arguments = TARGETS[3].make(), TARGETS[3].arguments() | {"rotary": False}
    before = run(model, arguments)
    vidattn.accelerate(model)
    after = run(model, arguments)
    assert_as_before(after, before, None)
    assert after.ops.forward == 2


@pytest.mark.parametrize("norm", [None, "layer_norm"])
@pytest.mark.parametrize("packed", [False, True], ids=["three projections", "packed"])
def test_rotary_positions(packed: bool, norm: str | None) -> None:
    """Queries and keys of the video are turned, those of the text and all values are not."""
    module: Any = attention(qk_norm=norm, processor=processors.CogVideoXAttnProcessor2_0())
    accelerated = copy.deepcopy(module)
    assert vidattn.accelerate(accelerated).swapped
    angles = torch.rand(7, 8)
    arguments = tokens(encoder_hidden_states=torch.randn(2, 4, 24), image_rotary_emb=(angles.cos(), angles.sin()))
    for one in (module, accelerated) if packed else ():
        one.fuse_projections()
        one.set_processor(processors.FusedCogVideoXAttnProcessor2_0())
    before, after = (run(one, arguments, grad=False) for one in (module, accelerated))
    assert_as_before(after, before, None)
    assert after.ops.forward == 1
    arguments["image_rotary_emb"] = None
    assert not torch.allclose(run(module, arguments, grad=False).outputs[0], before.outputs[0], rtol=0.1)


def test_a_processor_that_somebody_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    module, arguments = attention(), tokens()
    before = run(module, arguments, grad=False)
    accelerated = copy.deepcopy(module)
    vidattn.accelerate(accelerated)
    monkeypatch.setattr(processors.AttnProcessor2_0, "__call__", lambda self, attn, x, **rest: 3 * x)
    after = run(accelerated, arguments, grad=False)
    assert torch.equal(after.outputs[0], 3 * arguments["hidden_states"]) and not torch.equal(
        *after.outputs, *before.outputs
    )
    report = vidattn.accelerate(module)
    assert not report.swapped and "untested version" in report.skipped[0].reason


def test_the_eager_processor_takes_the_scale_of_the_module() -> None:
    module = attention(scale_qk=False)
    assert isinstance(module.processor, processors.AttnProcessor) and module.scale == 1.0
    assert both(module, tokens()) == 1
    assert both(attention(), tokens(), lambda module: setattr(module, "scale", 0.7)) == 1  # which nobody reads


# What the original has to do


@pytest.mark.parametrize(
    "more",
    [
        {"encoder_hidden_states": torch.randn(2, 5, 24)},
        {"attention_mask": torch.randn(2, 1, 7)},
        {"scale": 2.0},
        {"hidden_states": torch.randn(2, 24, 2, 3)},
    ],
    ids=lambda more: next(iter(more)),
)
def test_other_calls_run_as_in_the_original(more: dict[str, Any]) -> None:
    assert both(attention(), tokens(**more)) == 0


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"cross_attention_dim": 24}, "it attends to another sequence"),
        ({"norm_num_groups": 4}, "it has parts for images or several sources"),
        ({"query_dim": 32, "spatial_norm_dim": 4}, "it has parts for images or several sources"),
        ({"added_kv_proj_dim": 4}, "it has parts for images or several sources"),
        ({"residual_connection": True}, "it has parts for images or several sources"),
        ({"kv_heads": 1}, "it has parts for images or several sources"),
        ({"processor": Doubled()}, "its processor is a Doubled"),
        ({"dim_head": 136}, "its heads have 136 channels"),
    ],
    ids=lambda value: list(value)[-1] if isinstance(value, dict) else "",
)
def test_what_is_left_as_it_is(options: dict[str, Any], reason: str) -> None:
    report = vidattn.accelerate(attention(**options))
    assert not report.swapped and report.skipped[0].reason.startswith(reason)


def test_text_beside_the_video() -> None:
    """Latte's attention to the text stays the original, beside a spatial attention that does not."""
    model = spread(latte(cross_attention_dim=24)).eval()
    before = run(model, latte_arguments := TARGETS[2].arguments())
    report = vidattn.accelerate(model)
    assert [row.name for row in report.skipped] == ["transformer_blocks.0.attn2"]
    after = run(model, latte_arguments)
    assert_as_before(after, before, None)
    assert after.ops.forward == 2


# Parts


@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm", "fp32_layer_norm", "l2"])
@pytest.mark.parametrize("change", [lambda module: None, fuse], ids=["", "fused"])
def test_norms_of_queries_and_keys(norm: str, change: Callable[[Any], Any]) -> None:
    assert both(attention(qk_norm=norm, rescale_output_factor=2.0), tokens(), change) == 1


def test_a_hook_on_a_norm_sees_what_it_always_sees() -> None:
    module, shapes = attention(qk_norm="layer_norm"), []

    def add_hook(one: Any) -> None:
        one.norm_q.register_forward_hook(lambda module, given, out: shapes.append(out.shape) or 2 * out)

    assert both(module, tokens(), add_hook) == 1
    assert shapes == [(2, 3, 7, 8)] * 2


def test_dropout_draws_the_same_numbers() -> None:
    assert both(attention(dropout=0.4).train(), tokens()) == 1


@pytest.mark.parametrize("when", ["before", "after"])
def test_low_rank_adapters(when: str) -> None:
    target = TARGETS[3]
    adapted = target.make()
    config = LoraConfig(
        r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False, lora_dropout=0.3
    )
    if when == "after":
        vidattn.accelerate(adapted)
    torch.manual_seed(2)
    adapted.transformer.add_adapter(config)
    adapted.train()
    if when == "before":
        vidattn.accelerate(adapted)
    arguments = target.arguments()
    after = run(adapted, arguments)
    assert after.ops.forward == 2
    for module in adapted.modules():
        if isinstance(module, Twin):
            module.__class__ = module.replaced
    assert_as_before(after, run(adapted, arguments), None)


# Whole models


def motion_unet() -> nn.Module:
    return UNetMotionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32),
        norm_num_groups=8,
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
        layers_per_block=1,
        cross_attention_dim=16,
        num_attention_heads=2,
        motion_num_attention_heads=2,
        motion_max_seq_length=16,
    )


def test_a_unet_with_motion_modules() -> None:
    """Through the library's switches: the attention over time and over the pixels of a frame, not that to the text."""
    torch.manual_seed(0)
    model = spread(motion_unet()).eval()
    arguments = {
        "sample": torch.randn(1, 4, 5, 8, 8),
        "timestep": torch.tensor(3),
        "encoder_hidden_states": torch.randn(5, 7, 16),
    }

    before = run(model, arguments)
    report = vidattn.accelerate(model)
    assert {row.reason for row in report.skipped} == {"it attends to another sequence"}
    calls = len(report.swapped)
    assert calls == sum("motion_modules" in row.name for row in report.swapped) + 4 > 4
    assert_as_before(run(model, arguments), before, None)
    for change, expected in (
        (model.set_default_attn_processor, calls),
        (model.fuse_qkv_projections, calls),
        (model.unfuse_qkv_projections, calls),
        (partial(model.set_attn_processor, Plain()), 0),
    ):
        change()
        after = run(model, arguments, grad=False)
        assert after.ops.forward == expected
        assert_as_before(after, before._replace(gradients={}), None)


def test_checkpointed_blocks_and_hooks_of_the_library() -> None:
    model = latte().train()
    spread(model)
    arguments = TARGETS[2].arguments()
    before = run(model, arguments)
    model.enable_gradient_checkpointing()
    vidattn.accelerate(model)
    after = run(model, arguments)
    assert_as_before(after, before, None)
    assert after.ops.forward == 4  # once more in the backward pass


def test_compiles_as_one_graph_with_rotary_positions() -> None:
    torch._dynamo.reset()
    target = TARGETS[3]
    model, arguments = target.make(), target.arguments()
    before = run(model, arguments)
    vidattn.accelerate(model)
    after = run(torch.compile(model, backend="aot_eager", fullgraph=True), arguments, counted=False)
    gradients = {name.removeprefix("_orig_mod."): row for name, row in after.gradients.items()}
    assert_as_before(after._replace(gradients=gradients), before, None)

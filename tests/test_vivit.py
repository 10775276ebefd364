"""The reference ViViT: published sizes, options, what is refused. Its numbers are those of the golden cases."""

from __future__ import annotations

import doctest
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vidattn.models import (
    create_model,
    flax_trees,
    get_input_spec,
    list_models,
    vivit,
    vivit_checkpoint,
    vivit_layers,
)
from vidattn.models.vivit import (
    EncoderBlock,
    EncoderFactorizedSelfAttentionBlock,
    MultiHeadDotProductAttention,
    PatchEmbed,
    SpaceTimeViViT,
    ViViT,
    dot_product_attention,
    factorized_dot_product_attention,
    inflate_kernel,
    sample_frames_uniformly,
)
from vidattn.models.vivit_layers import DropLayer

MANIFESTS = Path(__file__).parent / "manifests"
JOINT, ENCODER = "vivit_b_joint", "vivit_b_factorized_encoder"
SELF_ATTENTION, DOT_PRODUCT = "vivit_b_factorized_self_attention", "vivit_b_factorized_dot_product"
LARGE = "vivit_l_factorized_encoder"
SSV2 = {"num_classes": 174, "image_size": 256, "temporal_num_layers": 4}
# Parameters of published models, and options that tell them from the registered ones.
PARAMETERS: list[tuple[str, dict[str, Any], int]] = [
    (JOINT, {}, 88_954_000),
    (ENCODER, {}, 115_062_928),
    (ENCODER, {"spatial_only_baseline": True}, 86_696_080),
    (SELF_ATTENTION, {}, 117_319_312),
    (DOT_PRODUCT, {}, 88_952_464),
    (LARGE, {}, 606_827_920),
    (LARGE, SSV2, 354_733_230),
    (JOINT, {"hidden_size": 1024, "num_layers": 24, "num_heads": 16, "mlp_dim": 4096}, 307_508_624),
]
# Multiply-adds in 1e9 of matrix products and convolutions.
MACS = {JOINT: 451.52, ENCODER: 283.34, SELF_ATTENTION: 371.09, DOT_PRODUCT: 276.18, LARGE: 992.47}
MODELS = [JOINT, ENCODER, SELF_ATTENTION, DOT_PRODUCT]
TINY = {
    "hidden_size": 16,
    "num_layers": 2,
    "num_heads": 2,
    "mlp_dim": 24,
    "num_classes": 5,
    "patches": (8, 8, 2),
    "num_frames": 6,
    "image_size": (16, 24),
}


def on_meta(name: str, **overrides: Any) -> nn.Module:
    with torch.device("meta"):
        return create_model(name, **overrides)


def tiny(name: str = JOINT, seed: int = 0, **overrides: Any) -> ViViT | SpaceTimeViViT:
    torch.manual_seed(seed)
    model = create_model(name, **{**TINY, **overrides}).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # as initialised, the head is zero and attention hardly counts
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def clip(batch: int = 2, frames: int = 6) -> Tensor:
    return torch.randn(batch, 3, frames, 16, 24, generator=torch.Generator().manual_seed(7))


# Published sizes


@pytest.mark.parametrize(("name", "overrides", "expected"), PARAMETERS)
def test_parameters_are_the_published_ones(name: str, overrides: dict[str, Any], expected: int) -> None:
    assert sum(parameter.numel() for parameter in on_meta(name, **overrides).parameters()) == expected


@pytest.mark.parametrize("name", sorted(MACS))
def test_multiply_adds_are_the_published_ones(name: str) -> None:
    model = on_meta(name).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        logits = model(torch.empty(1, 3, 32, 224, 224, device="meta"))
    assert logits.shape == (1, 400)
    assert counter.get_total_flops() / 2e9 == pytest.approx(MACS[name], rel=1e-4)


def test_the_average_pool_baseline_has_the_published_multiply_adds() -> None:
    model = on_meta(ENCODER, spatial_only_baseline=True).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, 3, 32, 224, 224, device="meta"))
    assert counter.get_total_flops() / 2e9 == pytest.approx(283.892, rel=0.005)


def test_registered_names_and_input() -> None:
    assert [name for name in list_models() if name.startswith("vivit_")] == sorted(MACS)
    for name in MACS:
        spec = get_input_spec(name)
        assert (spec.num_frames, spec.frame_stride, spec.sampling, spec.crop, spec.num_classes) == (
            *(32, 2, "dense", 224),
            400,
        )
        assert spec.short_side == 256 and spec.fixed_length
        assert [(value - spec.mean[0]) / spec.std[0] for value in (0, 255)] == [-1, 1]
    with pytest.raises(TypeError, match=r"takes no argument 'attention'"):
        create_model(ENCODER, attention="spacetime")


@pytest.mark.parametrize("name", [*MODELS, LARGE])
def test_nothing_is_dropped_by_default_and_logits_start_at_zero(name: str) -> None:
    torch.manual_seed(0)
    model = create_model(name, **TINY).train()
    assert not model(clip()).any()
    features = model.forward_features(clip())
    assert torch.equal(features, model.eval().forward_features(clip()))
    assert features.std() > 0.1


# Tokens


def test_tubelets_are_ordered_time_first_and_drop_what_fills_no_patch() -> None:
    embed = PatchEmbed((8, 8, 2), 4, num_frames=6, image_size=(16, 24))
    video = clip()
    tokens = embed(video)
    assert tokens.shape == (2, 3 * 2 * 3, 4)
    own = torch.einsum("bcthw,octhw->bo", video[:, :, 2:4, 8:16, 16:24], embed.proj.weight)
    torch.testing.assert_close(tokens[:, 1 * 6 + 1 * 3 + 2], own)
    larger = torch.nn.functional.pad(video, (0, 7, 0, 7, 0, 1), value=9.0)
    assert torch.equal(embed(larger), tokens)


def test_uniform_frame_sampling_embeds_frames_as_images() -> None:
    embed = PatchEmbed((8, 8), 4, {"method": "temporal_sampling", "n_sampled_frames": 4}, 10, (16, 24))
    video = clip(frames=10)
    tokens = embed(video)
    chosen = torch.stack([embed.proj(video[:, :, frame]) for frame in (2, 4, 6, 8)], dim=1)  # (B, T, C, H, W)
    torch.testing.assert_close(tokens, chosen.permute(0, 1, 3, 4, 2).flatten(1, 3))


def test_sampled_frames_share_patches_where_their_height_is_no_multiple() -> None:
    encoding = {"method": "temporal_sampling", "n_sampled_frames": 2}
    embed = PatchEmbed((8, 8), 4, encoding, 2, (12, 8))
    video = torch.randn(1, 3, 2, 12, 8)
    assert embed.num_tokens == 3  # 24 rows, not twice 12
    middle = torch.cat([video[:, :, 0, 8:], video[:, :, 1, :4]], dim=2)
    torch.testing.assert_close(embed(video)[:, 1], embed.proj(middle).flatten(1))
    with pytest.raises(ValueError, match="image_size must be a multiple"):
        SpaceTimeViViT(8, 1, 1, 8, 1, 1, 5, (8, 8), 4, {**encoding, "n_sampled_frames": 3}, image_size=(12, 8))


@pytest.mark.parametrize(("frames", "taken"), [(10, [2, 5, 8]), (3, [0, 1, 2]), (2, [0, 1]), (4, [1, 2, 3])])
def test_sampled_frames_are_rounded_half_to_even(frames: int, taken: list[int]) -> None:
    video = torch.arange(frames).view(1, 1, -1, 1, 1)
    assert sample_frames_uniformly(video, 3).flatten().tolist() == taken


def test_clips_of_another_size_are_refused() -> None:
    model = tiny()
    for video in (clip(frames=8), clip(frames=5), clip()[..., :16], clip().transpose(3, 4)):
        with pytest.raises(ValueError, match=r"grid of \(3, 2, 3\) patches"):
            model(video)
    for video in (clip()[:, :2], clip()[0], clip()[:, :, :0]):
        with pytest.raises(ValueError, match=r"video must be \(batch, 3, frames"):
            model(video)
    sampled = tiny(sampled_frames=4)
    assert torch.isfinite(sampled(clip(frames=9))).all()  # the sampled frames are as many
    with pytest.raises(ValueError, match=r"grid of \(8, 3\) patches"):
        sampled(clip(frames=3))


# Attention


def test_factorized_heads_see_their_own_axis() -> None:
    query, key, value = torch.randn(3, 2, 3, 5, 4, 8, dtype=torch.float64)
    context = factorized_dot_product_attention(query, key, value)
    for head in range(4):
        for frame in range(3):
            for site in range(5):
                here = (slice(None), slice(None), site) if head < 2 else (slice(None), frame)
                keys, values = key[here][:, :, head], value[here][:, :, head]
                scores = torch.einsum("bd,bkd->bk", query[:, frame, site, head], keys) / math.sqrt(8)
                expected = torch.einsum("bk,bkd->bd", scores.softmax(-1), values)
                torch.testing.assert_close(context[:, frame, site, head], expected)


@pytest.mark.parametrize("attention", ["joint", "space", "time", "factorized"])
def test_attention_reaches_as_far_as_it_says(attention: str) -> None:
    module = MultiHeadDotProductAttention(8, 2, attention).double()
    x = torch.randn(1, 3, 4, 8, dtype=torch.float64, requires_grad=True)
    tokens = x.flatten(1, 2) if attention == "joint" else x
    module(tokens).view(1, 3, 4, 8)[0, 1, 2].sum().backward()
    reached = x.grad[0].abs().amax(-1) > 0  # (T, N)
    same_time, same_site = torch.zeros(2, 3, 4, dtype=torch.bool)
    same_time[1], same_site[:, 2] = True, True
    expected = {
        "joint": torch.ones(3, 4, dtype=torch.bool),
        "space": same_time,
        "time": same_site,
        "factorized": same_time | same_site,
    }[attention]
    assert torch.equal(reached, expected)


def test_attention_is_that_of_torch() -> None:
    module = MultiHeadDotProductAttention(24, 3).double()
    nn.init.normal_(module.qkv.bias)
    theirs = nn.MultiheadAttention(24, 3, batch_first=True).double()
    theirs.load_state_dict(
        {
            "in_proj_weight": module.qkv.weight,
            "in_proj_bias": module.qkv.bias,
            "out_proj.weight": module.proj.weight,
            "out_proj.bias": module.proj.bias,
        }
    )
    x = torch.randn(2, 7, 24, dtype=torch.float64)
    torch.testing.assert_close(module(x), theirs(x, x, x, need_weights=False)[0])


@pytest.mark.parametrize("order", ["time_space", "space_time"])
def test_the_order_of_axes_counts(order: str) -> None:
    torch.manual_seed(3)
    blocks = {name: EncoderFactorizedSelfAttentionBlock(16, 24, 2, name) for name in ("time_space", "space_time")}
    block, other = blocks.pop(order), next(iter(blocks.values()))
    other.load_state_dict(block.state_dict())
    x = torch.randn(2, 3, 5, 16)
    block.eval(), other.eval()
    assert (block(x) - other(x)).abs().max() > 1e-3
    for tokens in (x[:, :1], x[:, :, :1]):  # of one frame or one site, the other attention still has its own weights
        assert block(tokens).shape == tokens.shape


def test_frames_of_the_factorized_encoder_meet_in_the_temporal_encoder_only() -> None:
    model = tiny(ENCODER)
    tokens = torch.randn(1, 3, 6, 16)
    changed = tokens.clone()
    changed[:, 1] += 1.0
    same = (model.spatial_transformer(tokens) == model.spatial_transformer(changed)).flatten(2).all(-1)
    assert same.tolist() == [[True, False, True]]
    assert model.forward_features(clip()).shape == (2, 1 + 3, 16)
    baseline = tiny(ENCODER, spatial_only_baseline=True)
    frames = baseline.forward_features(clip())
    assert frames.shape == (2, 3, 16)
    torch.testing.assert_close(baseline(clip()), baseline.head(frames.mean(1)))


@pytest.mark.parametrize("classifier", ["gap", "gmp", "gsp", "token"])
@pytest.mark.parametrize("name", [JOINT, ENCODER])
def test_classifiers(name: str, classifier: str) -> None:
    model = tiny(name, classifier=classifier)
    features = model.forward_features(clip())
    assert features.shape[1] == (18 if name == JOINT else 3) + (classifier == "token")
    reduced = {
        "gap": lambda: features.mean(1),
        "gmp": lambda: features.amax(1),
        "gsp": lambda: features.sum(1),
        "token": lambda: features[:, 0],
    }[classifier]()
    torch.testing.assert_close(model(clip()), model.head(reduced))


@pytest.mark.parametrize("name", MODELS)
def test_pre_logits(name: str) -> None:
    model = tiny(name, representation_size=7)
    assert model.pre_logits.weight.shape == (7, 16) and model.head.weight.shape == (5, 7)
    seen = []
    model.head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    model(clip())
    assert 0 < seen[0].abs().max() < 1.0
    model.pre_logits.bias.data.fill_(100.0)
    model(clip())
    assert torch.equal(seen[1], torch.ones(2, 7))


def test_gelu_is_the_tanh_approximation_unless_said() -> None:
    for options, approximate in (({}, "tanh"), ({"gelu": "erf"}, "none")):
        for block in tiny(**options).transformer.blocks:
            assert block.mlp.act.approximate == approximate
    assert tiny(SELF_ATTENTION).transformer.blocks[0].mlp.act.approximate == "tanh"


# Training


def test_dropped_layers_are_whole_samples_and_not_scaled() -> None:
    drop = DropLayer(0.5)
    out = drop(torch.ones(200, 3, 2))
    assert set(out.flatten().tolist()) == {0.0, 1.0}
    assert torch.equal(out.amax((1, 2)), out.amin((1, 2)))
    assert 60 < out[:, 0, 0].sum() < 140
    assert torch.equal(drop.eval()(out), out)
    model = tiny(ENCODER, stochastic_droplayer_rate=0.3, num_layers=4, temporal_num_layers=1)
    rates = [block.drop_layer.drop_prob for block in model.spatial_transformer.blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3])
    assert [block.drop_layer.drop_prob for block in model.temporal_transformer.blocks] == [0.0]


def test_a_spatial_layer_is_dropped_for_all_frames_of_a_clip() -> None:
    model = tiny(ENCODER, stochastic_droplayer_rate=0.5).train()
    kept = []
    block = model.spatial_transformer.blocks[-1]
    block.drop_layer.register_forward_hook(lambda module, inputs, output: kept.append(output != 0))
    model(clip(batch=8))
    for mask in kept:
        assert torch.equal(mask.flatten(1).any(1), mask.flatten(1).all(1))
        assert mask.shape == (8, 3, 7, 16)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("rate", ["dropout_rate", "attention_dropout_rate"])
def test_dropout_is_for_training(name: str, rate: str) -> None:
    model = tiny(name, **{rate: 0.5}).train()
    assert not torch.equal(model(clip()), model(clip()))
    assert torch.equal(model.eval()(clip()), model(clip()))


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_has_a_gradient(name: str) -> None:
    model = tiny(name)
    model(clip()).square().sum().backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad.abs().max() > 0, parameter_name


def test_zero_attention_passes_the_input_on() -> None:
    block = EncoderFactorizedSelfAttentionBlock(16, 24, 2, attention_kernel_init_method="zero").eval()
    x = torch.randn(2, 3, 5, 16)
    assert torch.equal(block(x), x + block.mlp(block.norm_mlp(x)))
    block(x).sum().backward()
    attention = block.attn_time
    assert attention.proj.bias.grad.any()
    assert not (attention.qkv.weight.grad.any() or attention.qkv.bias.grad.any() or attention.proj.weight.grad.any())


# Initialisation


def test_initialisation_is_that_of_the_paper() -> None:
    torch.manual_seed(0)
    model = create_model(SELF_ATTENTION, **{**TINY, "hidden_size": 192, "mlp_dim": 384})
    block = model.transformer.blocks[0]
    bound = math.sqrt(6 / (192 + 192))  # xavier of one projection, not of the three together
    for weight in (*block.attn_time.qkv.weight.chunk(3), block.attn_space.proj.weight):
        assert 0.99 * bound < weight.abs().max() <= bound
    assert not (block.attn_time.qkv.bias.any() or block.attn_time.proj.bias.any())
    assert 0 < block.mlp.fc1.bias.abs().max() < 1e-5
    assert model.transformer.pos_embed.std().item() == pytest.approx(0.02, rel=0.05)
    assert not create_model(JOINT, **TINY).transformer.cls_token.any()
    weight = model.patch_embed.proj.weight
    assert not weight[:, :, 0].any()  # the central one of two frames is the second
    assert weight[:, :, 1].std().item() == pytest.approx(math.sqrt(1 / (3 * 2 * 8 * 8)), rel=0.05)


@pytest.mark.parametrize("method", ["average_frame_initializer", None])
def test_tubelets_start_as_averages_or_as_one_kernel(method: str | None) -> None:
    torch.manual_seed(0)
    weight = tiny_embed(method).proj.weight
    assert torch.equal(weight[:, :, 0], weight[:, :, 2]) == (method is not None)
    assert weight.std().item() == pytest.approx(math.sqrt(1 / (3 * 3 * 8 * 8)), rel=0.05)


def tiny_embed(method: str | None) -> PatchEmbed:
    encoding = {"method": "3d_conv", "kernel_init_method": method}
    return PatchEmbed((8, 8, 3), 64, encoding, num_frames=3, image_size=8)


def test_inflated_kernels() -> None:
    kernel = torch.randn(4, 3, 2, 2)
    central = inflate_kernel(kernel, 3)
    assert torch.equal(central[:, :, 1], kernel) and not central[:, :, ::2].any()
    average = inflate_kernel(kernel, 3, "average_frame_initializer")
    torch.testing.assert_close(average.sum(2), kernel)
    assert torch.equal(average[:, :, 0], average[:, :, 2])
    # Weights 2 (T - t + 1) - (T + 1) (H_T - H_{t-1}) of approximate rank pooling, by hand for T = 3.
    ranks = torch.tensor([6 - 4 * (1 + 1 / 2 + 1 / 3), 4 - 4 * (1 / 2 + 1 / 3), 2 - 4 / 3]) / 3
    pooled = inflate_kernel(kernel, 3, "average_arp_frame_initializer")
    torch.testing.assert_close(pooled, kernel[:, :, None] * ranks.view(1, 1, 3, 1, 1))
    with pytest.raises(ValueError, match="method must be one of central_frame_initializer"):
        inflate_kernel(kernel, 3, "median")


# What is refused, and how it runs


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        (JOINT, {"classifier": "0"}, "classifier must be one of token, gap, gmp, gsp, got '0'"),
        (SELF_ATTENTION, {"classifier": "token"}, "without a class token"),
        (DOT_PRODUCT, {"classifier": "token"}, "without a class token"),
        (DOT_PRODUCT, {"num_heads": 1}, "num_heads must be even"),
        (JOINT, {"num_heads": 3}, "dim must be a multiple of num_heads"),
        (JOINT, {"attention": "axial"}, "must have a type of spacetime"),
        (JOINT, {"attention": "factorized_encoder"}, "belongs to SpaceTimeViViT"),
        (SELF_ATTENTION, {"attention_order": "space"}, "attention_order must be time_space or space_time"),
        (JOINT, {"patches": (8, 8)}, "patches must be 3 positive numbers"),
        (JOINT, {"num_frames": 1}, "patches must fit into the clip"),
        (JOINT, {"kernel_init_method": "median"}, "method must be one of"),
        (JOINT, {"gelu": "relu"}, "gelu must be one of tanh, erf"),
    ],
)
def test_impossible_arguments(name: str, overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_model(name, **{**TINY, **overrides})


def test_functions_refuse_odd_heads_and_missing_axes() -> None:
    with pytest.raises(ValueError, match=r"even number of heads, .* got 3"):
        factorized_dot_product_attention(*torch.randn(3, 1, 2, 2, 3, 4))
    with pytest.raises(ValueError, match=r"x must be \(batch, frames, tokens, channels\)"):
        MultiHeadDotProductAttention(8, 2, "time")(torch.randn(1, 6, 8))
    with pytest.raises(ValueError, match="attention must be joint, space, time or factorized"):
        EncoderBlock(8, 8, 2, attention="both")


@pytest.mark.parametrize("name", MODELS)
def test_compiles_without_breaks_and_takes_half_precision(name: str) -> None:
    model = tiny(name)
    with torch.no_grad():
        expected = model(clip())
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(clip()), expected)
        half = model.bfloat16()(clip().bfloat16())
    assert half.dtype == torch.bfloat16
    assert (half.float() - expected).abs().max() < 0.1 * expected.abs().max()


def test_empty_batches() -> None:
    for name in MODELS:
        assert tiny(name)(clip()[:0]).shape == (0, 5)
    assert dot_product_attention(*torch.randn(3, 0, 5, 2, 4)).shape == (0, 5, 2, 4)


@pytest.mark.parametrize(
    "module", [vivit, vivit_layers, vivit_checkpoint, flax_trees], ids=lambda module: module.__name__
)
def test_examples_in_docstrings(module: Any) -> None:
    results = doctest.testmod(module, extraglobs={"torch": torch})
    assert results.attempted > 0 and results.failed == 0


def test_manifests_are_those_of_the_registered_models() -> None:
    configs = {
        (JOINT, ""): "vivit-scenic-b16x2-model1-spacetime",
        (ENCODER, ""): "vivit-scenic-b16x2-model2-fe",
        (SELF_ATTENTION, ""): "vivit-scenic-b16x2-model3-fsa",
        (DOT_PRODUCT, ""): "vivit-scenic-b16x2-model4-fdp",
        (LARGE, ""): "vivit-scenic-l16x2-model2-fe-k400",
        (LARGE, "ssv2"): "vivit-scenic-l16x2-model2-fe-ssv2",
    }
    for (name, dataset), stem in configs.items():
        config = json.loads((MANIFESTS / f"{stem}.json").read_text())["config"]
        model = on_meta(name, **(SSV2 if dataset else {}))
        encoder = config.get("spatial_transformer", config)
        blocks = model.transformer.blocks if isinstance(model, ViViT) else model.spatial_transformer.blocks
        attention = getattr(blocks[0], "attn", None) or blocks[0].attn_time
        assert (len(blocks), attention.num_heads) == (encoder["num_layers"], encoder["num_heads"])
        assert model.classifier == config["classifier"]
        assert model.patch_embed.kernel_init_method == config["temporal_encoding_config"]["kernel_init_method"]
        order = config["attention_config"].get("attention_order")
        assert getattr(blocks[0], "attention_order", None) == order
        assert list(model.patch_embed.patches) == config["patches"]
        assert model.patch_embed.grid == tuple(
            size // patch
            for size, patch in zip(config["input_shape"][1:4], (config["patches"][2], *config["patches"][:2]))
        )


# Epsilon, and encoders with heads of their own


@pytest.mark.parametrize("name", MODELS)
def test_every_norm_takes_the_epsilon(name: str) -> None:
    for overrides, expected in (({}, 1e-6), ({"layer_norm_eps": 1e-12}, 1e-12)):
        norms = [module for module in tiny(name, **overrides).modules() if isinstance(module, nn.LayerNorm)]
        assert len(norms) >= 5 and all(norm.eps == expected for norm in norms)


def test_the_temporal_encoder_may_have_its_own_heads_and_width() -> None:
    model = tiny(ENCODER, num_heads=4, temporal_num_heads=2, temporal_mlp_dim=40)
    blocks = (*model.spatial_transformer.blocks, *model.temporal_transformer.blocks)
    assert [block.attn.num_heads for block in blocks] == [4] * 2 + [2] * 4
    assert [block.mlp.fc1.out_features for block in blocks] == [24] * 2 + [40] * 4
    alike = tiny(ENCODER, num_heads=4)
    assert {block.attn.num_heads for block in alike.temporal_transformer.blocks} == {4}

"""The reference TimeSformer: published sizes, its definition written a second time, any input, training options."""

from __future__ import annotations

import copy
import dataclasses
import doctest
import json
import math
import pickle
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from video_files import numbered_frames, write_video

import vidattn
from vidattn import cli
from vidattn.models import create_model, get_input_spec, list_models, timesformer, timesformer_checkpoint
from vidattn.models.layers import DropPath
from vidattn.models.timesformer import ATTENTION_TYPES, Attention, Block, PatchEmbed, TimeSformer, VisionTransformer

MANIFESTS = Path(__file__).parent / "manifests"
MANIFEST_OF = {
    "timesformer_base": "timesformer-base-divided-8x224-k400",
    "timesformer_hr": "timesformer-hr-divided-16x448-k400",
    "timesformer_large": "timesformer-l-divided-96x224-k400",
    "timesformer_large_ssv2": "timesformer-l-divided-64x224-ssv2",
    "timesformer_joint": "timesformer-base-joint-8x224-k400",
    "timesformer_space_only": "timesformer-base-spaceonly-8x224-k400",
}
PARAMETERS = {
    "timesformer_base": 121_566_352,
    "timesformer_hr": 122_024_080,
    "timesformer_large": 121_633_936,
    "timesformer_large_ssv2": 121_435_566,
    "timesformer_joint": 86_112_400,
    "timesformer_space_only": 86_106_256,
}
# Multiply-adds in 1e9 of one view; published numbers count them, of three views.
MACS = {
    "timesformer_base": 195.830,
    "timesformer_hr": 1702.69,
    "timesformer_large": 2379.86,
    "timesformer_large_ssv2": 1579.19,
    "timesformer_joint": 179.563,
    "timesformer_space_only": 140.505,
}
TINY = {"img_size": 32, "patch_size": 8, "num_classes": 5, "num_frames": 4, "embed_dim": 24, "depth": 2, "num_heads": 3}


def manifest(stem: str) -> dict[str, object]:
    return json.loads((MANIFESTS / f"{stem}.json").read_text())


def on_meta(name: str, **overrides: object) -> TimeSformer:
    with torch.device("meta"):
        return create_model(name, **overrides)


def roughen(module: nn.Module) -> nn.Module:
    """Make every branch visible: as initialised, residual branches hardly count, or are zero."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module


def tiny(attention_type: str = "divided_space_time", **overrides: object) -> TimeSformer:
    torch.manual_seed(0)
    return roughen(TimeSformer(attention_type=attention_type, **{**TINY, **overrides}))


# Published sizes


def test_every_published_size_has_a_manifest() -> None:
    names = [name for name in list_models() if name.startswith("timesformer_")]
    assert sorted(MANIFEST_OF) == names == sorted(PARAMETERS) == sorted(MACS)
    official = {path.stem for path in MANIFESTS.glob("timesformer-*.json") if "-hf-" not in path.stem}
    assert official == set(MANIFEST_OF.values())


@pytest.mark.parametrize("name", sorted(MANIFEST_OF))
def test_state_dict_is_that_of_the_released_checkpoint(name: str) -> None:
    released = manifest(MANIFEST_OF[name])
    model = on_meta(name)
    shapes = {key: list(tensor.shape) for key, tensor in model.state_dict().items()}
    assert shapes == {f"model.{key}": shape for key, shape in released["state"].items()}
    assert sum(parameter.numel() for parameter in model.parameters()) == released["params_total"] == PARAMETERS[name]
    assert not list(model.buffers())
    state = {key: torch.empty(shape, device="meta") for key, shape in released["state"].items()}
    model.model.load_state_dict(state, strict=True, assign=True)


@pytest.mark.parametrize("name", sorted(MANIFEST_OF))
def test_configuration_is_the_released_one(name: str) -> None:
    config = manifest(MANIFEST_OF[name])["config"]
    network = on_meta(name).model
    assert network.patch_embed.img_size == (config["img_size"],) * 2
    assert network.patch_embed.patch_size == (config["patch_size"],) * 2
    assert network.attention_type == config["attention_type"]
    assert {block.attention_type for block in network.blocks} == {config["attention_type"]}
    assert {block.attn.num_heads for block in network.blocks} == {config["num_heads"]}
    assert {module.eps for module in network.modules() if isinstance(module, nn.LayerNorm)} == {config["norm_eps"]}
    assert network.blocks[-1].drop_path.drop_prob == pytest.approx(config["drop_path_rate"])
    assert network.pos_drop.p == network.blocks[0].attn.attn_drop.p == network.blocks[0].mlp.drop.p == 0.0
    spec = get_input_spec(name)
    assert config["input_shape"] == [1, 3, spec.num_frames, spec.crop, spec.crop]
    assert spec.num_classes == config["num_classes"]


@pytest.mark.parametrize("name", sorted(MACS))
def test_multiply_adds_are_the_published_ones(name: str) -> None:
    model, spec = on_meta(name).eval(), get_input_spec(name)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        logits = model(torch.empty(1, 3, spec.num_frames, spec.crop, spec.crop, device="meta"))
    assert logits.shape == (1, spec.num_classes)
    assert counter.get_total_flops() / 2e9 == pytest.approx(MACS[name], rel=1e-5)


def test_input_specs() -> None:
    strides = {
        "timesformer_base": 32,
        "timesformer_joint": 32,
        "timesformer_space_only": 32,
        "timesformer_hr": 16,
        "timesformer_large": 4,
    }
    for name in MANIFEST_OF:
        spec = get_input_spec(name)
        assert spec.short_side == spec.crop == (448 if name == "timesformer_hr" else 224)
        assert spec.mean == pytest.approx((0.45 * 255,) * 3)
        assert spec.std == pytest.approx((0.225 * 255,) * 3)
        assert spec.test_views == (1, 3) and not spec.fixed_length
        if name in strides:
            assert (spec.sampling, spec.frame_stride) == ("spaced", strides[name])
    spec = get_input_spec("timesformer_large_ssv2")
    assert (spec.sampling, spec.num_frames, spec.num_classes) == ("uniform", 64, 174)


def test_overrides_reach_the_network() -> None:
    model = on_meta("timesformer_base", embed_dim=48, depth=3, num_heads=4, drop_rate=0.2, qkv_bias=False, num_frames=5)
    assert model.model.time_embed.shape == (1, 5, 48)
    assert len(model.model.blocks) == 3
    assert model.model.pos_drop.p == 0.2
    assert model.model.blocks[0].attn.qkv.bias is None
    with pytest.raises(TypeError, match="takes no argument 'num_frame'; did you mean num_frames"):
        create_model("timesformer_base", num_frame=3)
    with pytest.raises(TypeError, match="takes no argument 'kwargs'"):
        create_model("timesformer_base", kwargs=3)


# What is computed, written down a second time: one head, one token, one frame after the other


def naive_attention(attention: Attention, x: Tensor) -> Tensor:
    """Attention of one sequence (N, C)."""
    tokens, channels = x.shape
    size = channels // attention.num_heads
    query, key, value = nn.functional.linear(x, attention.qkv.weight, attention.qkv.bias).split(channels, dim=1)
    context = torch.zeros(tokens, channels, dtype=x.dtype)
    for head in range(attention.num_heads):
        part = slice(head * size, (head + 1) * size)
        for row in range(tokens):
            weights = (key[:, part] @ query[row, part] / math.sqrt(size)).exp()
            context[row, part] = (weights / weights.sum()) @ value[:, part]
    return attention.proj(context)


def naive_divided(block: Block, x: Tensor, frames: int) -> Tensor:
    """A block of divided attention on one clip (1 + N * T, C)."""
    cls_token, patches = x[0], x[1:].clone()
    for site in range(len(patches) // frames):
        rows = slice(site * frames, (site + 1) * frames)
        sequence = patches[rows]
        patches[rows] = sequence + block.temporal_fc(
            naive_attention(block.temporal_attn, block.temporal_norm1(sequence))
        )
    result = patches.clone()
    new_cls_token = cls_token.clone()
    for frame in range(frames):
        sequence = torch.cat((cls_token[None], patches[frame::frames]))
        change = naive_attention(block.attn, block.norm1(sequence))
        result[frame::frames] += change[1:]
        new_cls_token += change[0] / frames
    x = torch.cat((new_cls_token[None], result))
    return x + block.mlp(block.norm2(x))


def naive_plain(block: Block, x: Tensor) -> Tensor:
    x = x + naive_attention(block.attn, block.norm1(x))
    return x + block.mlp(block.norm2(x))


@pytest.mark.parametrize(("frames", "sites"), [(1, 1), (1, 6), (3, 1), (5, 7), (8, 4)])
@pytest.mark.parametrize("options", [{"qkv_bias": True}, {"qkv_bias": False, "num_heads": 1}])
def test_divided_block(frames: int, sites: int, options: dict[str, object]) -> None:
    block = roughen(Block(12, **{"num_heads": 3, **options})).double().eval()
    x = torch.randn(2, 1 + sites * frames, 12, dtype=torch.float64)
    with torch.no_grad():
        expected = torch.stack([naive_divided(block, clip, frames) for clip in x])
        torch.testing.assert_close(block(x, 2, frames, 1), expected, rtol=1e-11, atol=1e-11)


def naive_model(network: VisionTransformer, video: Tensor) -> Tensor:
    """Logits of one clip (3, T, H, W) whose grid is the one the network was built for."""
    frames = video.shape[1]
    images = []
    for frame in range(frames):
        patches = network.patch_embed.proj(video[None, :, frame])[0]  # (C, h, w)
        rows = [patches[:, y, x] for y in range(patches.shape[1]) for x in range(patches.shape[2])]
        images.append(torch.stack([network.cls_token[0, 0], *rows]) + network.pos_embed[0])
    if network.attention_type == "space_only":
        tokens = torch.stack(images)
        for block in network.blocks:
            tokens = torch.stack([naive_plain(block, image) for image in tokens])
        return network.head(network.norm(tokens.mean(dim=0))[0])
    patches = [image[1:] + network.time_embed[0, frame] for frame, image in enumerate(images)]
    sites = [patches[frame][site] for site in range(len(patches[0])) for frame in range(frames)]
    x = torch.stack([images[0][0], *sites])
    for block in network.blocks:
        x = naive_divided(block, x, frames) if network.attention_type == "divided_space_time" else naive_plain(block, x)
    return network.head(network.norm(x[0]))


@pytest.mark.parametrize("img_size", [24, (16, 32)])
@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
def test_whole_model(attention_type: str, img_size: object) -> None:
    model = tiny(attention_type, img_size=img_size, num_frames=3).double().eval()
    height, width = model.model.patch_embed.img_size
    video = torch.randn(2, 3, 3, height, width, dtype=torch.float64)
    with torch.no_grad():
        expected = torch.stack([naive_model(model.model, clip) for clip in video])
        torch.testing.assert_close(model(video), expected, rtol=1e-10, atol=1e-10)


def test_attention_without_projections() -> None:
    attention = Attention(12, num_heads=3, with_qkv=False)
    assert not list(attention.parameters())
    x = torch.randn(2, 5, 12)
    heads = x.unflatten(-1, (3, 4)).transpose(1, 2)
    expected = nn.functional.scaled_dot_product_attention(heads, heads, heads).transpose(1, 2).flatten(2)
    torch.testing.assert_close(attention(x), expected)


# Any input


def nearest(old: int, new: int) -> list[int]:
    return [place * old // new for place in range(new)]


@pytest.mark.parametrize(("height", "width"), [(40, 24), (64, 64), (16, 8), (8, 40), (24, 8), (8, 8), (47, 31)])
def test_position_embeddings_of_the_nearest_patch(height: int, width: int) -> None:
    network = tiny().model.eval()
    grid = (height // 8, width // 8)
    plane = network.pos_embed[0, 1:].view(4, 4, 24)
    rows = plane[nearest(4, grid[0])][:, nearest(4, grid[1])].reshape(-1, 24)
    assert torch.equal(network._position_embedding(grid)[0], torch.cat((network.pos_embed[0, :1], rows)))
    # The model of that size with these embeddings gives the same, and what does not fill a patch is not seen.
    twin = TimeSformer(**{**TINY, "img_size": (height, width)}).model.eval()
    with torch.no_grad():
        twin.load_state_dict({**network.state_dict(), "pos_embed": network._position_embedding(grid)})
        video = torch.randn(2, 3, 4, height, width)
        cut = video[..., : grid[0] * 8, : grid[1] * 8]
        torch.testing.assert_close(network(video), twin(cut), rtol=1e-5, atol=1e-5)


def test_position_embeddings_of_as_many_patches_are_used_in_their_order() -> None:
    network = tiny().model
    assert network._position_embedding((2, 8)) is network.pos_embed
    assert network._position_embedding((4, 4)) is network.pos_embed


def test_position_embeddings_of_another_shape_than_a_square_are_not_resized() -> None:
    model = tiny(img_size=(16, 32)).eval()
    assert model(torch.randn(1, 3, 4, 16, 32)).shape == (1, 5)
    with pytest.raises(ValueError, match=r"must give 8 patches, got 4 x 4: .* not \(16, 32\)"):
        model(torch.randn(1, 3, 4, 32, 32))


@pytest.mark.parametrize("attention_type", ["divided_space_time", "joint_space_time"])
@pytest.mark.parametrize("frames", [1, 2, 3, 5, 6, 11])
def test_time_embeddings_of_the_nearest_frame(frames: int, attention_type: str) -> None:
    network = tiny(attention_type).model.eval()
    assert torch.equal(network._time_embedding(frames), network.time_embed[:, nearest(4, frames)])
    twin = TimeSformer(**{**TINY, "num_frames": frames}, attention_type=attention_type).model.eval()
    twin.load_state_dict({**network.state_dict(), "time_embed": network._time_embedding(frames)})
    video = torch.randn(2, 3, frames, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(network(video), twin(video), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
def test_clips_of_a_batch_are_on_their_own(attention_type: str) -> None:
    model = tiny(attention_type).eval()
    video = torch.randn(3, 3, 5, 40, 24)
    with torch.no_grad():
        logits, features = model(video), model.forward_features(video)
        assert features.shape == (3, 24, 5, 5, 3)
        torch.testing.assert_close(model(video[1:2]), logits[1:2], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(model.forward_features(video[2:]), features[2:], rtol=1e-5, atol=1e-5)
        assert torch.equal(model.model.head(model.model.forward_features(video)), logits)


def test_feature_map_has_the_tokens_at_their_places() -> None:
    # Without blocks a feature is the normalised embedding of its own patch.
    for attention_type in ATTENTION_TYPES:
        model = tiny(attention_type, depth=0).eval()
        video = torch.randn(2, 3, 4, 32, 32)
        with torch.no_grad():
            features = model.forward_features(video)
            for frame, y, x in ((0, 0, 0), (3, 1, 2), (2, 3, 0)):
                patch = model.model.patch_embed.proj(video[:, :, frame, 8 * y : 8 * y + 8, 8 * x : 8 * x + 8])
                token = patch.flatten(1) + model.model.pos_embed[:, 1 + 4 * y + x]
                if attention_type != "space_only":
                    token = token + model.model.time_embed[:, frame]
                torch.testing.assert_close(features[:, :, frame, y, x], model.model.norm(token), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
def test_empty_batch(attention_type: str) -> None:
    model = tiny(attention_type)
    logits = model(torch.randn(0, 3, 4, 32, 32))
    assert logits.shape == (0, 5)
    logits.sum().backward()


@pytest.mark.parametrize(
    "shape", [(3, 4, 32, 32), (1, 4, 4, 32, 32), (1, 3, 0, 32, 32), (1, 3, 4, 32, 7), (1, 3, 4, 7, 32)]
)
def test_a_video_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(
        ValueError,
        match=re.escape(f"video must be (batch, 3, frames, height, width), at least one frame of 8 x 8, got {shape}"),
    ):
        tiny()(torch.zeros(shape))


def test_arguments_that_make_no_sense_are_refused() -> None:
    for make in (lambda kind: Block(8, 2, attention_type=kind), lambda kind: tiny(kind)):
        with pytest.raises(ValueError, match=r"attention_type must be one of divided_space_time, .* got 'space'"):
            make("space")
    with pytest.raises(ValueError, match="dim must be a multiple of num_heads, got dim=8 and num_heads=3"):
        Attention(8, 3)
    with pytest.raises(ValueError, match="patch_size must be one or two integers"):
        PatchEmbed(32, (4, 4, 4))
    with pytest.raises(ValueError, match="img_size must be one or two integers"):
        PatchEmbed(0)
    with pytest.raises(ValueError, match=r"img_size must hold a patch of \(8, 8\), got 7"):
        tiny(img_size=7)
    with pytest.raises(ValueError, match="num_frames must be at least 1, got 0"):
        tiny(num_frames=0)
    with pytest.raises(ValueError, match="hybrid_backbone must be None"):
        VisionTransformer(hybrid_backbone=nn.Identity())
    block = Block(8, 2)
    for batch, frames in ((2, 5), (1, 3), (2, 0)):
        with pytest.raises(ValueError, match=r"x must be .* got \(2, 13, 8\)"):
            block(torch.zeros(2, 13, 8), batch, frames, 2)


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype, attention_type: str) -> None:
    torch.manual_seed(0)
    model = TimeSformer(attention_type=attention_type, **TINY).eval()
    video = torch.randn(2, 3, 6, 40, 24)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        exact = model(video)
        half = model.to(dtype)(video.to(dtype))
    assert half.dtype == dtype
    torch.testing.assert_close(half.float(), exact, rtol=0.1, atol=0.1 * exact.abs().max().item())


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
def test_whole_model_compiles_into_one_graph(attention_type: str) -> None:
    torch._dynamo.reset()
    model = tiny(attention_type, drop_path_rate=0.0)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=False)
    for size in ((4, 32, 32), (3, 40, 24)):
        video = torch.randn(1, 3, *size)
        actual = compiled(video)
        torch.testing.assert_close(actual, model(video), rtol=1e-5, atol=1e-5)
        actual.sum().backward()
    torch._dynamo.reset()


def test_copies_and_pickles_are_the_same_model() -> None:
    model = tiny().eval()
    video = torch.randn(1, 3, 4, 32, 32)
    with torch.no_grad():
        expected = model(video)
        assert torch.equal(copy.deepcopy(model)(video), expected)
        assert torch.equal(pickle.loads(pickle.dumps(model))(video), expected)


# Training


def test_drop_path_has_the_grain_of_the_papers_code() -> None:
    block = roughen(Block(12, 3, drop_path=0.5)).train()
    seen: list[tuple[Tensor, Tensor]] = []
    block.drop_path.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
    batch, frames, sites = 5, 4, 6
    block(torch.randn(batch, 1 + sites * frames, 12), batch, frames, 3)
    # patches over time, frames over space, clips in the MLP
    groups = [batch * sites, batch * frames, batch]
    assert [branch.shape[0] for branch, _ in seen] == groups
    for branch, output in seen:
        kept = output.flatten(1).any(dim=1)
        assert torch.equal(output[kept], branch[kept] * 2)
    assert 0 < int(seen[0][1].flatten(1).any(dim=1).sum()) < groups[0]
    assert 0 < int(seen[1][1].flatten(1).any(dim=1).sum()) < groups[1]


def test_the_bias_of_temporal_fc_survives_drop_path() -> None:
    block = roughen(Block(12, 3, drop_path=1.0)).train()
    x = torch.randn(2, 13, 12)
    out = block(x, 2, 4, 3)
    assert torch.equal(out[:, :1], x[:, :1])
    torch.testing.assert_close(out[:, 1:], x[:, 1:] + block.temporal_fc.bias)
    for attention_type in ("joint_space_time", "space_only"):
        block = roughen(Block(12, 3, drop_path=1.0, attention_type=attention_type)).train()
        assert torch.equal(block(x, 2, 4, 3), x)
        assert not torch.equal(block.eval()(x, 2, 4, 3), x)


def test_drop_path_rates_grow_linearly_over_the_blocks() -> None:
    blocks = on_meta("timesformer_base", drop_path_rate=0.22).model.blocks
    assert isinstance(blocks[0].drop_path, nn.Identity)
    assert all(isinstance(block.drop_path, DropPath) for block in blocks[1:])
    assert [block.drop_path.drop_prob for block in blocks[1:]] == pytest.approx(
        [0.02 * block for block in range(1, 12)]
    )


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
@pytest.mark.parametrize("where", ["drop_rate", "attn_drop_rate", "drop_path_rate"])
def test_each_dropout_acts_in_training_alone(where: str, attention_type: str) -> None:
    rates = {"drop_rate": 0.0, "attn_drop_rate": 0.0, "drop_path_rate": 0.0}
    video = torch.randn(4, 3, 4, 32, 32)
    with torch.no_grad():
        still = tiny(attention_type, **rates).train()
        assert torch.equal(still(video), still(video))
        moving = tiny(attention_type, **{**rates, where: 0.5}).train()
        assert not torch.equal(moving(video), moving(video))
        assert torch.equal(moving.eval()(video), still(video))


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
def test_initial_weights(attention_type: str) -> None:
    torch.manual_seed(0)
    model = create_model(
        "timesformer_base", attention_type=attention_type, embed_dim=96, depth=2, num_heads=3, num_classes=40
    ).model
    assert model.cls_token.std().item() == pytest.approx(0.02, rel=0.25)
    assert model.pos_embed.std().item() == pytest.approx(0.02, rel=0.1)
    if attention_type != "space_only":
        assert not model.time_embed.any()
    projections = 0
    for name, module in model.named_modules():
        if isinstance(module, nn.LayerNorm):
            assert (module.weight == 1).all(), name
            assert not module.bias.any(), name
        elif isinstance(module, nn.Linear):
            assert not module.bias.any(), name
            if name.endswith("temporal_fc"):
                projections += 1
                assert not module.weight.any(), name
            else:
                assert module.weight.std().item() == pytest.approx(0.02, rel=0.1), name
    assert projections == (2 if attention_type == "divided_space_time" else 0)
    # The convolution's is torch's own default.
    bound = (3 * 16 * 16) ** -0.5
    assert 0.9 * bound < model.patch_embed.proj.weight.abs().max().item() <= bound
    assert model.no_weight_decay() == {"pos_embed", "cls_token", "time_embed"}


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
def test_weights_can_be_initialised_again(attention_type: str) -> None:
    model, patch_embed = tiny(attention_type).model, tiny(attention_type).model.patch_embed.state_dict()
    model.init_weights()
    for name, parameter in model.named_parameters():
        if name.startswith("patch_embed."):
            assert torch.equal(parameter, patch_embed[name.removeprefix("patch_embed.")])
        else:
            assert parameter.abs().max() < 0.1 or (parameter == 1).all(), name
    if attention_type != "space_only":
        assert not model.time_embed.any()


def test_a_new_model_attends_over_space_alone() -> None:
    block = roughen(Block(12, 3)).eval()
    nn.init.zeros_(block.temporal_fc.weight)
    nn.init.zeros_(block.temporal_fc.bias)
    x = torch.randn(1, 1 + 4 * 3, 12)
    moved = x.clone()
    moved[:, 1 + 3 * 2 + 1] += torch.randn(12)  # patch 2 of frame 1
    with torch.no_grad():
        changed = (block(moved, 1, 3, 2) - block(x, 1, 3, 2)).abs().amax(dim=2)[0] > 1e-5
    rows = torch.arange(12) % 3 == 1
    assert torch.equal(changed, torch.cat((torch.tensor([True]), rows)))


def test_the_classifier_can_be_left_out_and_replaced() -> None:
    model = tiny(num_classes=0).eval().model
    video = torch.randn(2, 3, 4, 32, 32)
    with torch.no_grad():
        assert torch.equal(model(video), model.forward_features(video))
    model.reset_classifier(7)
    assert model.get_classifier() is model.head
    assert model.num_classes == model(video).shape[1] == 7
    model.reset_classifier(0)
    assert isinstance(model.head, nn.Identity)


def test_qk_scale_of_none_or_zero_is_the_default() -> None:
    assert Attention(8, 2, qk_scale=None).scale == 0.5
    assert Attention(8, 2, qk_scale=0.0).scale == 0.5
    assert Attention(8, 2, qk_scale=0.3).scale == 0.3


def test_defaults_are_those_of_the_papers_code() -> None:
    with torch.device("meta"):
        network, model = VisionTransformer(), TimeSformer()
    assert network.head.out_features == 1000
    assert network.norm.eps == network.blocks[0].norm1.eps == 1e-5
    assert network.blocks[0].attn.qkv.bias is None
    assert network.blocks[-1].drop_path.drop_prob == pytest.approx(0.1)
    assert model.model.head.out_features == 400
    assert model.model.norm.eps == model.model.blocks[0].temporal_norm1.eps == 1e-6
    assert model.model.blocks[0].temporal_attn.qkv.bias is not None
    assert (model.num_patches, model.attention_type) == (196, "divided_space_time")
    assert Block(8, 2).drop_path.drop_prob == 0.1
    assert Attention(8).num_heads == 8


# The rest of the package


@pytest.mark.parametrize("name", sorted(MANIFEST_OF))
def test_the_command_takes_it(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    clip = write_video(tmp_path / "clip.mkv", numbered_frames(20, 40, 60))
    create, spec_of = vidattn.models.create_model, vidattn.models.get_input_spec
    overrides = {key: value for key, value in TINY.items() if key != "num_classes"}
    monkeypatch.setattr(
        vidattn.models, "create_model", lambda name, **options: create(name, **{**overrides, **options})
    )
    small = {"num_frames": 4, "frame_stride": 4, "short_side": 32, "crop": 32}
    monkeypatch.setattr(vidattn.models, "get_input_spec", lambda name: dataclasses.replace(spec_of(name), **small))
    assert cli.main(["classify", str(clip), "--model", name, "--views", "1x3"]) == 0
    output = capsys.readouterr().out
    assert "1 clip(s) x 3 crop(s) of 4 frames, 32 x 32" in output
    assert len(re.findall(r"^ +\d+ +[\d.]+ %  ", output, re.MULTILINE)) == 5


@pytest.mark.parametrize("module", [timesformer, timesformer_checkpoint])
def test_examples(module: object) -> None:
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0

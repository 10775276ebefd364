"""The reference X-ViT: published sizes, its definition written a second time, any input, training options."""

from __future__ import annotations

import copy
import dataclasses
import doctest
import json
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from video_files import numbered_frames, write_video
from xvit_cases import TINY, naive_model, tiny

import vidattn
from vidattn import cli
from vidattn.models import (
    create_model,
    get_input_spec,
    list_models,
    xvit,
    xvit_checkpoint,
    xvit_layers,
)
from vidattn.models.layers import DropPath
from vidattn.models.xvit import (
    Attention,
    TemporalShift,
    VisionTransformer,
    XViT,
)

MANIFESTS = Path(__file__).parent / "manifests"
MANIFEST_OF = {
    "xvit_b16_8f": "xvit-B16_16x16_k400",  # the weights do not depend on the number of frames
    "xvit_b16_16f": "xvit-B16_16x16_k400",
    "xvit_b16_16f_ssv2": "xvit-B16_16x16_ssv2",
}
# Multiply-adds in 1e9 of one view, counted on the paper's code; the paper says 425 and 850 for three views.
MACS = {"xvit_b16_8f": 140.57, "xvit_b16_16f": 281.13, "xvit_b16_16f_ssv2": 281.13}


def manifest(stem: str) -> dict[str, Any]:
    return json.loads((MANIFESTS / f"{stem}.json").read_text())


def on_meta(name: str, **overrides: object) -> XViT:
    with torch.device("meta"):
        return create_model(name, **overrides)


# Published sizes


def test_every_published_size_has_a_manifest() -> None:
    assert [name for name in list_models() if name.startswith("xvit_")] == sorted(MANIFEST_OF) == sorted(MACS)


@pytest.mark.parametrize(
    ("name", "stem", "overrides"),
    [(name, stem, {}) for name, stem in MANIFEST_OF.items()]
    + [("xvit_b16_16f", "xvit-B16_16x16_k600", {"num_classes": 600})],
)
def test_state_dict_is_that_of_the_released_checkpoint(name: str, stem: str, overrides: dict[str, int]) -> None:
    released = manifest(stem)
    model = on_meta(name, **overrides)
    assert {key: list(tensor.shape) for key, tensor in model.state_dict().items()} == released["state"]
    assert sum(parameter.numel() for parameter in model.parameters()) == released["params_total"]
    unused = sum(parameter.numel() for parameter in model.new_fc.parameters())
    assert released["params_total"] - unused == released["params_used_in_forward"]
    assert not list(model.buffers())
    state = {key: torch.empty(shape, device="meta") for key, shape in released["state"].items()}
    model.load_state_dict(state, strict=True, assign=True)


@pytest.mark.parametrize(
    ("name", "stem"), [item for item in MANIFEST_OF.items() if item[0] != "xvit_b16_8f"], ids=lambda text: text
)
def test_configuration_is_the_released_one(name: str, stem: str) -> None:
    config = manifest(stem)["config"]
    base = config.pop("base_model")
    network = on_meta(name).base_model
    assert {module.eps for module in network.modules() if isinstance(module, nn.LayerNorm)} == {base["norm_eps"]}
    assert network.patch_embed.patch_size == base["patch_size"]
    assert network.num_frames == base["num_frames"]
    assert {block.attn.num_heads for block in network.blocks} == {base["num_heads"]}
    for block in network.blocks:
        for shift in (block.attn.control_point_query, block.attn.control_point_value):
            assert isinstance(shift, TemporalShift)
            assert (shift.n_segment, shift.fold_div) == (config["XVIT"]["NUM_SEGMENTS"], config["XVIT"]["SHIFT_DIV"])
        assert isinstance(block.attn.control_point, xvit.AfterReconstruction)
    spec = get_input_spec(name)
    assert (spec.num_frames, spec.crop, spec.num_classes) == (
        config["DATA"]["NUM_FRAMES"],
        config["DATA"]["TRAIN_CROP_SIZE"],
        config["MODEL"]["NUM_CLASSES"],
    )
    assert [[value / 255 for value in values] for values in (spec.mean, spec.std)] == [
        config["DATA"]["MEAN"],
        config["DATA"]["STD"],
    ]


@pytest.mark.parametrize("name", sorted(MACS))
def test_multiply_adds_are_those_of_the_papers_code(name: str) -> None:
    model, spec = on_meta(name).eval(), get_input_spec(name)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        logits = model(torch.empty(1, 3, spec.num_frames, spec.crop, spec.crop, device="meta"))
    assert logits.shape == (1, spec.num_classes)
    assert counter.get_total_flops() / 2e9 == pytest.approx(MACS[name], rel=5e-5)


@pytest.mark.parametrize(
    ("size", "parameters", "macs"),
    [
        ("base_patch32", 95_407_452, 106.0),
        ("large_patch16", 317_312_348, 1477.6),
        ("large_patch32", 319_521_116, 369.4),
    ],
)
def test_the_other_backbones(size: str, parameters: int, macs: float) -> None:
    config = {"XVIT.BASE_MODEL": f"vit_{size}_224_in21k", "MODEL.NUM_CLASSES": 174, "XVIT.LOCATIONS_LIST": range(24)}
    if "large" in size:
        config.update({f"TEMPORAL_HEAD.{key}": 1024 for key in ("HIDDEN_DIM", "MLP_DIM")})
        config["TEMPORAL_HEAD.NUM_ATTENTION_HEADS"] = 16
    with torch.device("meta"):
        model = XViT.from_config(config).eval()
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, 3, 8, 224, 224, device="meta"))
    assert 3 * counter.get_total_flops() / 2e9 == pytest.approx(macs, rel=5e-4)


def test_input_specs() -> None:
    specs = {name: get_input_spec(name) for name in MANIFEST_OF}
    assert {name: (spec.sampling, spec.num_frames, spec.num_classes) for name, spec in specs.items()} == {
        "xvit_b16_8f": ("spaced", 8, 400),
        "xvit_b16_16f": ("spaced", 16, 400),
        "xvit_b16_16f_ssv2": ("uniform", 16, 174),
    }
    assert specs["xvit_b16_16f"].frame_stride == 16
    assert specs["xvit_b16_8f"].frame_stride == 32
    assert {(spec.short_side, spec.crop, spec.test_views) for spec in specs.values()} == {(224, 224, (1, 3))}


def test_overrides_reach_the_network() -> None:
    model = on_meta(
        "xvit_b16_16f_ssv2", embed_dim=48, depth=3, num_heads=4, attn_drop_rate=0.2, qkv_bias=False, num_frames=16
    )
    assert model.base_model.temp_embed.shape == (1, 16, 1, 48)
    assert len(model.base_model.blocks) == 3
    assert model.base_model.blocks[0].attn.attn_drop.p == 0.2
    assert model.base_model.blocks[0].attn.qkv.bias is None
    with pytest.raises(TypeError, match="takes no argument 'shift_dif'; did you mean shift_div"):
        create_model("xvit_b16_8f", shift_dif=3)


# What is computed


def test_shifts_go_where_they_are_asked_to() -> None:
    model = tiny(depth=4, locations_list=(0, 2, 7))
    for number, block in enumerate(model.base_model.blocks):
        places = (block.attn.control_point_query, block.attn.control_point_value)
        assert all(isinstance(place, TemporalShift) == (number in (0, 2)) for place in places)
    for options in ({"locations_list": ()}, {"use_xvit": False}):
        assert not any(isinstance(module, TemporalShift) for module in tiny(**options).modules())
    deep = tiny(depth=24)  # more than the paper's code can place
    assert sum(isinstance(module, TemporalShift) for module in deep.modules()) == 48


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temporal_layers": 2, "shift_div": 3, "locations_list": (1,)},
        {"consensus_type": "avg"},
        {"consensus_type": "avg", "dropout_rate": 0.0, "before_softmax": False},
        {"consensus_type": "identity", "use_xvit": False},
        {"shift_per_head": True, "summary_token": True},
        {"shift_window": 2, "dropout_rate": 0.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("frames", [4, 8])
def test_whole_model(options: dict[str, Any], frames: int) -> None:
    model = tiny(**options).double().eval()
    video = torch.randn(2, 3, frames, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        expected = torch.stack([naive_model(model, clip) for clip in video])
        torch.testing.assert_close(model(video), expected, rtol=1e-10, atol=1e-10)


# Any input


@pytest.mark.parametrize("patch_size", [16, 32])
@pytest.mark.parametrize("img_size", [32, 64, 96, 160, 256, 320, 384, 448])
def test_position_embeddings_of_other_sizes(img_size: int, patch_size: int) -> None:
    network = VisionTransformer(img_size=img_size, patch_size=patch_size, embed_dim=6, depth=0, num_heads=1).double()
    side, table = img_size // patch_size, 224 // patch_size
    plane = network.pos_embed[:, 1:].transpose(1, 2).reshape(1, 6, table, table)
    expected = nn.functional.interpolate(plane, size=(side, side), mode="bicubic").flatten(2).transpose(1, 2)
    positions, patches = network._position_embedding()
    assert patches == side
    torch.testing.assert_close(positions[:, 1:], expected)
    assert torch.equal(positions[:, :1], network.pos_embed[:, :1])
    positions.sum().backward()
    torch.testing.assert_close(network.pos_embed.grad.sum().item(), float(positions.numel()))


def test_position_embeddings_of_the_size_they_are_made_for() -> None:
    network = VisionTransformer(patch_size=32, embed_dim=6, depth=0, num_heads=1)
    positions, patches = network._position_embedding()
    assert positions is network.pos_embed
    assert patches == 7


def test_frames_that_patches_do_not_fill() -> None:
    # As many patches as at 224 pixels; but the factor of the resizing is not 1, as in the paper's code.
    network = VisionTransformer(img_size=240, patch_size=32, embed_dim=6, depth=0, num_heads=1)
    positions, patches = network._position_embedding()
    assert patches == 7
    assert not torch.allclose(positions, network.pos_embed, atol=1e-3)
    model = tiny().eval()
    video = torch.randn(1, 3, 4, 40, 47)
    with torch.no_grad():
        assert torch.equal(model(video), model(video[..., :32, :32]))


@pytest.mark.parametrize(("height", "width"), [(16, 64), (64, 64), (32, 48), (15, 32)])
def test_frames_of_another_grid_are_refused(height: int, width: int) -> None:
    model = tiny()
    message = rf"must give 2 x 2 patches of 16 pixels, .* got {height // 16} x {width // 16} patches"
    with pytest.raises(ValueError, match=message):
        model(torch.zeros(1, 3, 4, height, width))


@pytest.mark.parametrize("consensus_type", xvit.CONSENSUS_TYPES)
def test_clips_of_a_batch_are_on_their_own(consensus_type: str) -> None:
    model = tiny(consensus_type=consensus_type).eval()
    video = torch.randn(3, 3, 8, 32, 32)
    with torch.no_grad():
        logits, features = model(video), model.forward_features(video)
        assert logits.shape == ((3, 8, 5) if consensus_type == "identity" else (3, 5))
        assert features.shape == (3, 24, 8, 2, 2)
        torch.testing.assert_close(model(video[1:2]), logits[1:2], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(model.forward_features(video[2:]), features[2:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "frames", "multiple"),
    [({}, 2, 4), ({}, 6, 4), ({"num_frames": 6}, 8, 12), ({"use_xvit": False}, 3, 2), ({}, 0, 4)],
)
def test_clips_that_would_mix_are_refused(options: dict[str, Any], frames: int, multiple: int) -> None:
    with pytest.raises(ValueError, match=rf"video must have a multiple of {multiple} frames .* got {frames}"):
        tiny(**options)(torch.zeros(4, 3, frames, 32, 32))


def test_segments_of_a_clip_meet_in_the_temporal_head_alone() -> None:
    model = tiny().eval()
    video = torch.randn(1, 3, 8, 32, 32)
    moved = video.clone()
    moved[:, :, 4] += torch.randn(3, 32, 32)
    with torch.no_grad():
        changed = (model.forward_features(moved) - model.forward_features(video)).abs().amax(dim=(0, 1, 3, 4)) > 1e-5
        # Two blocks: a change reaches two frames to each side, but not the other segment.
        assert changed.tolist() == [False] * 4 + [True] * 3 + [False]
        assert not torch.allclose(model(moved), model(video), atol=1e-4)


def test_time_embeddings_repeat() -> None:
    model = tiny(use_xvit=False).eval()
    still = torch.randn(1, 3, 1, 32, 32).expand(1, 3, 6, 32, 32)
    with torch.no_grad():
        features = model.forward_features(still)
    torch.testing.assert_close(features[:, :, 2:], features[:, :, :4])
    assert not torch.allclose(features[:, :, 0], features[:, :, 1], atol=1e-3)


def test_a_clip_may_come_with_an_index() -> None:
    model = tiny().eval()
    video = torch.randn(2, 3, 4, 32, 32)
    with torch.no_grad():
        expected = model(video)
        for given in ([video, torch.arange(4)], [[video, None]], [video], (video, 3)):
            assert torch.equal(model(given), expected)
            assert torch.equal(model.forward_features(given), model.forward_features(video))
    with pytest.raises(ValueError, match="starts with one, got an empty list"):
        model([])


def test_feature_map_has_the_tokens_at_their_places() -> None:
    # Without blocks a feature is the normalised embedding of its own patch.
    model = tiny(depth=0, num_frames=4).eval()
    network = model.base_model
    video = torch.randn(2, 3, 4, 32, 32)
    with torch.no_grad():
        features, (positions, _) = model.forward_features(video), network._position_embedding()
        for frame, y, x in ((0, 0, 0), (3, 1, 0), (2, 0, 1)):
            patch = network.patch_embed.proj(video[:, :, frame, 16 * y : 16 * y + 16, 16 * x : 16 * x + 16])
            token = patch.flatten(1) + positions[:, 1 + 2 * y + x] + network.temp_embed[:, frame, 0]
            torch.testing.assert_close(features[:, :, frame, y, x], network.norm(token), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("consensus_type", xvit.CONSENSUS_TYPES)
def test_empty_batch(consensus_type: str) -> None:
    model = tiny(consensus_type=consensus_type)
    video = torch.randn(0, 3, 4, 32, 32)
    logits = model(video)
    assert logits.shape == ((0, 4, 5) if consensus_type == "identity" else (0, 5))
    logits.sum().backward()
    assert model.forward_features(video).shape == (0, 24, 4, 2, 2)


@pytest.mark.parametrize("shape", [(3, 4, 32, 32), (1, 4, 4, 32, 32)])
def test_a_video_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=re.escape(f"video must be (batch, 3, frames, height, width), got {shape}")):
        tiny()(torch.zeros(shape))


def test_arguments_that_make_no_sense_are_refused() -> None:
    for name in ("n_segment", "n_div", "window"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            TemporalShift(nn.Identity(), **{name: 0})
    with pytest.raises(ValueError, match="dim must be a multiple of num_heads, got dim=8 and num_heads=3"):
        Attention(8, 3)
    with pytest.raises(ValueError, match="consensus_type must be one of vit, avg, identity, got 'mean'"):
        tiny(consensus_type="mean")
    with pytest.raises(ValueError, match="before_softmax must be True unless consensus_type is 'avg', got 'vit'"):
        tiny(before_softmax=False)
    with pytest.raises(ValueError, match=r"locations_list must hold numbers of blocks, from 0, got \[-1, 0\]"):
        tiny(locations_list=(0, -1))
    with pytest.raises(ValueError, match="summary_token must be False where use_xvit is"):
        tiny(use_xvit=False, summary_token=True)
    with pytest.raises(ValueError, match="num_segments must be at least 1, got 0"):
        tiny(num_segments=0)
    with pytest.raises(ValueError, match="hybrid_backbone must be None"):
        VisionTransformer(hybrid_backbone=nn.Identity())
    for name, value in (("img_size", (32, 32)), ("patch_size", 0), ("num_frames", 0)):
        with pytest.raises(ValueError, match=re.escape(f"{name} must be an integer, at least 1, got {value}")):
            VisionTransformer(**{name: value})
    network = tiny().base_model
    with pytest.raises(ValueError, match=r"frames must be \(batch \* frames, 3, height, width\), got \(1, 3, 4, 32"):
        network(torch.zeros(1, 3, 4, 32, 32))
    with pytest.raises(ValueError, match="frames must be a multiple of num_frames=2, got 3"):
        network(torch.zeros(3, 3, 32, 32))
    with pytest.raises(ValueError, match="x must hold whole segments of 4 frames, got 6 frames"):
        network(torch.zeros(6, 3, 32, 32))
    attention = tiny(summary_token=True).base_model.blocks[0].attn
    with pytest.raises(ValueError, match="x must hold whole clips of 4 frames, got 6 frames"):
        attention(torch.zeros(6, 5, 24))


@pytest.mark.parametrize("options", [{}, {"summary_token": True, "shift_window": 2}], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = XViT(**{**TINY, **options}).eval()
    video = torch.randn(2, 3, 4, 32, 32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        exact = model(video)
        half = model.to(dtype)(video.to(dtype))
    assert half.dtype == dtype
    torch.testing.assert_close(half.float(), exact, rtol=0.1, atol=0.1 * exact.abs().max().item())


@pytest.mark.parametrize("options", [{}, {"summary_token": True, "shift_per_head": True}], ids=str)
def test_whole_model_compiles_into_one_graph(options: dict[str, Any]) -> None:
    torch._dynamo.reset()
    model = tiny(dropout_rate=0.0, depth=1, **options)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=False)
    video = torch.randn(1, 3, 8, 32, 32)
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


def test_modes_return_the_model_and_record_what_they_are_told_to() -> None:
    model = tiny()
    assert model.train() is model
    assert model.eval() is model
    video = torch.randn(1, 3, 4, 32, 32)
    with torch.no_grad():
        assert not model(video).requires_grad
        assert not model.base_model(video[0].transpose(0, 1)).requires_grad
    assert model(video).requires_grad


@pytest.mark.parametrize("consensus_type", xvit.CONSENSUS_TYPES)
def test_a_frozen_backbone_has_no_gradients(consensus_type: str) -> None:
    video = torch.randn(1, 3, 4, 32, 32)
    for freeze in (True, False):
        model = tiny(consensus_type=consensus_type, freeze_backbone=freeze).eval()
        model(video).square().sum().backward()
        for name, parameter in model.named_parameters():
            read = not (name.startswith("new_fc.") and consensus_type == "vit")
            trains = read and not (freeze and name.startswith("base_model."))
            assert (parameter.grad is not None) == trains, name


def test_where_the_classifier_is() -> None:
    for consensus_type in ("avg", "identity"):
        model = tiny(consensus_type=consensus_type, dropout_rate=0.0)
        assert model.new_fc is None
        assert isinstance(model.base_model.head, nn.Linear)
        assert "base_model.head.weight" in model.state_dict()
        model = tiny(consensus_type=consensus_type, dropout_rate=0.3)
        assert isinstance(model.new_fc, nn.Linear)
        assert model.base_model.head.p == 0.3
    for rate in (0.0, 0.3):
        model = tiny(dropout_rate=rate)
        assert isinstance(model.new_fc, nn.Linear)
        assert model.base_model.head.p == model.consensus.mlp_head[3].p == rate


def test_drop_path_rates_grow_linearly_over_the_blocks() -> None:
    blocks = on_meta("xvit_b16_8f", drop_path_rate=0.22).base_model.blocks
    assert isinstance(blocks[0].drop_path, nn.Identity)
    assert all(isinstance(block.drop_path, DropPath) for block in blocks[1:])
    assert [block.drop_path.drop_prob for block in blocks[1:]] == pytest.approx(
        [0.02 * block for block in range(1, 12)]
    )


@pytest.mark.parametrize(
    "where",
    ["dropout_rate", "drop_rate", "attn_drop_rate", "drop_path_rate", "temporal_drop", "temporal_attn_drop"],
)
def test_each_dropout_acts_in_training_alone(where: str) -> None:
    video = torch.randn(4, 3, 4, 32, 32)
    with torch.no_grad():
        still = tiny(dropout_rate=0.0).train()
        assert torch.equal(still(video), still(video))
        moving = tiny(**{"dropout_rate": 0.0, where: 0.5}).train()
        assert not torch.equal(moving(video), moving(video))
        assert torch.equal(moving.eval()(video), still(video))


def test_initial_weights() -> None:
    torch.manual_seed(0)
    model = create_model("xvit_b16_8f", embed_dim=96, depth=2, num_heads=3, num_classes=40)
    network = model.base_model
    assert network.cls_token.std().item() == pytest.approx(0.02, rel=0.25)
    assert network.pos_embed.std().item() == pytest.approx(0.02, rel=0.1)
    assert not network.temp_embed.any()
    assert not model.consensus.cls_token.any()
    assert model.new_fc.weight.std().item() == pytest.approx(0.001, rel=0.1)
    assert not model.new_fc.bias.any()
    for name, module in model.named_modules():
        if isinstance(module, nn.LayerNorm):
            assert (module.weight == 1).all(), name
            assert not module.bias.any(), name
        elif isinstance(module, nn.Linear) and name.startswith("base_model."):
            assert not module.bias.any(), name
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.1), name
        elif isinstance(module, nn.Linear) and name.startswith("consensus."):  # torch's own default
            bound = module.in_features**-0.5
            assert 0.9 * bound < module.weight.abs().max().item() <= bound * (1 + 1e-6), name
    bound = (3 * 16 * 16) ** -0.5
    assert 0.9 * bound < network.patch_embed.proj.weight.abs().max().item() <= bound
    assert network.no_weight_decay() == {"pos_embed", "cls_token", "temp_embed"}
    own_classifier = create_model(
        "xvit_b16_8f", embed_dim=96, depth=2, num_heads=3, num_classes=40, consensus_type="avg", dropout_rate=0.0
    )
    assert own_classifier.base_model.head.weight.std().item() == pytest.approx(0.001, rel=0.1)


def test_the_network_has_a_classifier_of_its_own() -> None:
    network = VisionTransformer(img_size=32, embed_dim=24, depth=2, num_heads=3, num_classes=0, num_frames=2).eval()
    frames = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        features = network.forward_features(frames)
        assert features.shape == (4, 24)
        assert torch.equal(network(frames), features)
        network.reset_classifier(7)
        assert network.get_classifier() is network.head
        assert torch.equal(network(frames), network.head(features))
        assert network.num_classes == 7
        network.reset_classifier(0)
        assert torch.equal(network(frames), features)


def test_a_layer_before_the_classifier() -> None:
    network = VisionTransformer(
        img_size=32, embed_dim=24, depth=1, num_heads=3, num_classes=5, num_frames=2, representation_size=10
    ).eval()
    frames = torch.randn(2, 3, 32, 32)
    tokens = network.norm(network.forward_tokens(frames))[:, 0]
    torch.testing.assert_close(network.forward_features(frames), network.pre_logits.fc(tokens).tanh())
    assert network.head.in_features == 10
    model = tiny(representation_size=10)
    assert model.new_fc.in_features == model.consensus.cls_token.shape[-1] == 10
    assert model(torch.randn(1, 3, 4, 32, 32)).shape == (1, 5)


# The rest of the package


@pytest.mark.parametrize("name", sorted(MANIFEST_OF))
def test_the_command_takes_it(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    frames = get_input_spec(name).num_frames
    clip = write_video(tmp_path / "clip.mkv", numbered_frames(20, 40, 60))
    create, spec_of = vidattn.models.create_model, vidattn.models.get_input_spec
    size = {"img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 3}
    monkeypatch.setattr(vidattn.models, "create_model", lambda name, **options: create(name, **{**size, **options}))
    small = {"frame_stride": 1, "short_side": 32, "crop": 32}
    monkeypatch.setattr(vidattn.models, "get_input_spec", lambda name: dataclasses.replace(spec_of(name), **small))
    assert cli.main(["classify", str(clip), "--model", name, "--views", "1x3"]) == 0
    output = capsys.readouterr().out
    assert f"1 clip(s) x 3 crop(s) of {frames} frames, 32 x 32" in output
    assert len(re.findall(r"^ +\d+ +[\d.]+ %  ", output, re.MULTILINE)) == 5


@pytest.mark.parametrize("module", [xvit, xvit_checkpoint, xvit_layers], ids=lambda module: module.__name__)
def test_examples(module: object) -> None:
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0

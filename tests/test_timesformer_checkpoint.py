"""Checkpoints of TimeSformer, in the layouts of its projects, and image ViTs to start from."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from vidattn.models import create_model, load_checkpoint
from vidattn.models.timesformer import ATTENTION_TYPES, TimeSformer
from vidattn.models.timesformer_checkpoint import convert_state_dict, resize_rows, revert_state_dict

MANIFESTS = sorted((Path(__file__).parent / "manifests").glob("timesformer-*.json"))
TINY = {"img_size": 32, "patch_size": 8, "num_classes": 5, "num_frames": 4, "embed_dim": 24, "depth": 2, "num_heads": 3}
VIDEO = (2, 3, 4, 32, 32)
State = dict[str, Tensor]


def tiny(seed: int = 0, **overrides: object) -> TimeSformer:
    torch.manual_seed(seed)
    model = TimeSformer(**{**TINY, **overrides}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    return model


def bare(state: State) -> State:
    return {name.removeprefix("model."): tensor for name, tensor in state.items()}


def image_state(num_classes: int = 11, **overrides: object) -> State:
    """A state dict of an image ViT, as timm saves it, of the widths of tiny()."""
    return bare(tiny(seed=1, attention_type="space_only", num_classes=num_classes, **overrides).state_dict())


def assert_same_weights(model: nn.Module, state: State) -> None:
    own = model.state_dict()
    assert own.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(own[name], tensor), name


def assert_clean(report: object) -> None:
    assert not (report.missing or report.unexpected or report.resized or report.ignored)


# Layouts


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda path: path.stem)
def test_every_published_layout_loads_strictly(manifest: Path) -> None:
    published = json.loads(manifest.read_text())
    config = published["config"]
    with torch.device("meta"):
        model = create_model(
            "timesformer_base",
            img_size=config.get("img_size", config.get("image_size")),
            num_classes=config.get("num_classes", config.get("num_labels")),
            num_frames=config["num_frames"],
            attention_type=config["attention_type"],
        )
        state = {name: torch.empty(shape) for name, shape in published["state"].items()}
    for target in (model, model.model):
        report = load_checkpoint(target, state)
        assert report.converted_from == ("huggingface" if "-hf-" in manifest.stem else "official")
        assert len(report.loaded) == len(published["state"]) == len(target.state_dict())
        assert_clean(report)
    assert sum(parameter.numel() for parameter in model.parameters()) == published["params_total"]


WRAPPERS: dict[str, Callable[[State], object]] = {
    "bare": lambda state: state,
    "official": lambda state: {"epoch": 14, "model_state": state, "optimizer_state": {}, "cfg": "TRAIN:\n"},
    "model": lambda state: {"model": state},
    "module": lambda state: {"module": {f"module.{name}": tensor for name, tensor in state.items()}},
    "state_dict": lambda state: {"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}},
}


@pytest.mark.parametrize("wrapper", sorted(WRAPPERS))
@pytest.mark.parametrize("layout", ["official", "bare", "huggingface"])
def test_layouts_and_wrappers(layout: str, wrapper: str, tmp_path: Path) -> None:
    source = tiny(seed=1)
    state = bare(source.state_dict()) if layout == "bare" else revert_state_dict(source.state_dict(), layout)
    content = WRAPPERS[wrapper](state)
    file = tmp_path / "weights.pyth"
    torch.save(content, file)
    video = torch.randn(VIDEO)
    for given in (content, file):
        model = tiny()
        report = load_checkpoint(model, given)
        assert report.converted_from == ("huggingface" if layout == "huggingface" else "official")
        assert_same_weights(model, source.state_dict())
        assert_clean(report)
        with torch.no_grad():
            assert torch.equal(model(video), source(video))
        network = tiny().model
        assert_clean(load_checkpoint(network, given))
        assert_same_weights(network, source.model.state_dict())


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
def test_every_kind_of_attention_and_safetensors(attention_type: str, tmp_path: Path) -> None:
    source, model = tiny(seed=1, attention_type=attention_type), tiny(attention_type=attention_type)
    save_file(revert_state_dict(source.state_dict(), "huggingface"), tmp_path / "model.safetensors")
    report = load_checkpoint(model, tmp_path / "model.safetensors")
    assert report.converted_from == "huggingface"
    assert_clean(report)
    assert_same_weights(model, source.state_dict())


def test_conversion_of_names_is_invertible() -> None:
    names = {name: number for number, name in enumerate(tiny().state_dict())}
    there = revert_state_dict(names, "huggingface")
    assert len(there) == len(names)
    assert not there.keys() & names.keys()
    assert convert_state_dict(there, "huggingface") == names
    assert revert_state_dict(names, "official") == names == convert_state_dict(names, "official")
    assert convert_state_dict(bare(names), "official") == names
    hub = json.loads(next(path for path in MANIFESTS if "-hf-base" in path.stem).read_text())["state"]
    official = json.loads(next(path for path in MANIFESTS if "-base-divided" in path.stem).read_text())["state"]
    assert convert_state_dict(hub, "huggingface") == {f"model.{name}": shape for name, shape in official.items()}
    for function in (convert_state_dict, revert_state_dict):
        assert function({"other.weight": 1, "model.blocks.0.other": 2}, "huggingface") == {
            "other.weight": 1,
            "model.blocks.0.other": 2,
        }
        with pytest.raises(ValueError, match="source must be one of official, huggingface, got 'keras'"):
            function(names, "keras")


def test_the_network_of_hugging_face_without_its_classifier() -> None:
    source, model = tiny(seed=1), tiny()
    state = revert_state_dict(source.state_dict(), "huggingface")
    state = {
        name.removeprefix("timesformer."): tensor for name, tensor in state.items() if name.startswith("timesformer.")
    }
    with pytest.raises(ValueError, match=r"it lacks model\.head\.weight, model\.head\.bias"):
        load_checkpoint(model, state)
    report = load_checkpoint(model, state, strict=False)
    assert report.missing == ("model.head.weight", "model.head.bias")
    assert_same_weights(model.model.blocks, source.model.blocks.state_dict())


# Sizes that differ


def nearest(old: int, new: int) -> list[int]:
    return [place * old // new for place in range(new)]


@pytest.mark.parametrize(("img_size", "num_frames"), [(48, 4), (32, 7), (24, 3)])
def test_tables_of_another_size_are_resized_on_request(img_size: int, num_frames: int, tmp_path: Path) -> None:
    source = tiny(seed=1)
    model = tiny(img_size=img_size, num_frames=num_frames)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"tables would have to be resized: .*strict=False accepts this"):
        load_checkpoint(model, source.state_dict())
    assert_same_weights(model, before)
    report = load_checkpoint(model, source.state_dict(), strict=False)
    patches = (img_size // 8) ** 2
    expected = []
    if img_size != 32:
        expected.append(f"pos_embed from 17 to {patches + 1} rows")
    if num_frames != 4:
        expected.append(f"time_embed from 4 to {num_frames} rows")
    assert list(report.resized) == expected
    state = source.state_dict()
    # the list of patches, not the plane, is what the paper's code interpolates when it loads
    rows = [0] + [1 + place for place in nearest(16, patches)]
    state["model.pos_embed"] = state["model.pos_embed"][:, rows]
    state["model.time_embed"] = state["model.time_embed"][:, nearest(4, num_frames)]
    assert_same_weights(model, state)
    # the same through the constructor's argument
    torch.save({"model_state": source.state_dict()}, tmp_path / "weights.pyth")
    started = TimeSformer(
        **{**TINY, "img_size": img_size, "num_frames": num_frames}, pretrained_model=tmp_path / "weights.pyth"
    )
    assert_same_weights(started, state)


def test_resizing_rows() -> None:
    table = torch.randn(1, 5, 3)
    assert torch.equal(resize_rows(table, 5), table)
    assert torch.equal(resize_rows(table, 8), table[:, nearest(5, 8)])
    assert torch.equal(resize_rows(table, 9, keep_first=True)[:, 1:], table[:, 1:][:, nearest(4, 8)])
    assert torch.equal(resize_rows(table, 9, keep_first=True)[:, :1], table[:, :1])
    assert resize_rows(table.bfloat16(), 7).dtype == torch.bfloat16


def test_another_number_of_classes() -> None:
    source, model = tiny(seed=1, num_classes=7), tiny()
    with pytest.raises(ValueError, match=r"num_classes=7.*num_classes=5.* strict=False keeps the model's own"):
        load_checkpoint(model, source.state_dict())
    head = {name: tensor.clone() for name, tensor in model.model.head.state_dict().items()}
    report = load_checkpoint(model, source.state_dict(), strict=False)
    assert report.missing == ("model.head.weight", "model.head.bias") == report.ignored
    assert_same_weights(model.model.head, head)
    assert_same_weights(model.model.blocks, source.model.blocks.state_dict())


def test_a_checkpoint_of_another_size_says_which() -> None:
    with torch.device("meta"):
        base, narrow = create_model("timesformer_base"), create_model("timesformer_base", embed_dim=96)
        joint, ssv2 = create_model("timesformer_joint"), create_model("timesformer_large_ssv2")
    with pytest.raises(ValueError, match=r"checkpoint is of embed_dim=768, .* \(timesformer_base\); .*embed_dim=96"):
        load_checkpoint(narrow, base.state_dict())
    with pytest.raises(ValueError, match=r"no place for .*temporal_.*\(timesformer_base\); .*\(timesformer_joint\)"):
        load_checkpoint(joint, base.state_dict())
    with pytest.raises(ValueError, match=r"it lacks .*temporal_.*\(timesformer_joint\); .*\(timesformer_base\)"):
        load_checkpoint(base, joint.state_dict())
    with pytest.raises(ValueError, match=r"num_frames=64.*num_classes=174 \(timesformer_large_ssv2\); the model is"):
        load_checkpoint(base, ssv2.state_dict())


# Image models


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("attention_type", ["divided_space_time", "joint_space_time"])
def test_image_models_are_a_start(attention_type: str, strict: bool) -> None:
    image = image_state()
    model = tiny(attention_type=attention_type)
    head = {name: tensor.clone() for name, tensor in model.model.head.state_dict().items()}
    pre_logits = {"pre_logits.fc.weight": torch.zeros(2, 2)}
    report = load_checkpoint(model, {"state_dict": {**image, **pre_logits}}, strict=strict)
    assert report.converted_from == "image"
    assert report.missing == ("model.head.weight", "model.head.bias")
    assert sorted(report.ignored) == ["head.bias", "head.weight", "pre_logits.fc.weight"]
    assert not (report.unexpected or report.resized)
    assert_same_weights(model.model.head, head)
    own = bare(model.state_dict())
    for name, tensor in image.items():
        if not name.startswith("head."):
            assert torch.equal(own[name], tensor), name
    assert not own["time_embed"].any()
    added = own.keys() - image.keys() - {"time_embed"}
    assert bool(added) == (attention_type == "divided_space_time")
    for name in added:
        if "temporal_fc" in name:
            assert not own[name].any(), name
        else:
            assert torch.equal(own[name], image[name.replace("temporal_", "")]), name


def test_an_image_model_sees_a_still_video_as_its_image() -> None:
    image = tiny(seed=1, attention_type="space_only")
    model = tiny()
    load_checkpoint(model, bare(image.state_dict()))  # as many classes: the classifier comes along
    assert torch.equal(model.model.head.weight, image.model.head.weight)
    still = torch.randn(2, 3, 1, 32, 32).expand(VIDEO)
    with torch.no_grad():
        torch.testing.assert_close(model(still), image(still), rtol=1e-4, atol=1e-4)


def test_image_models_are_resized() -> None:
    image = image_state()
    model = tiny(img_size=48, num_frames=6)
    report = load_checkpoint(model, image)
    assert report.resized == ("pos_embed from 17 to 37 rows",)
    assert torch.equal(model.model.pos_embed, resize_rows(image["pos_embed"], 37, keep_first=True))
    assert model.model.time_embed.shape == (1, 6, 24)


@pytest.mark.parametrize("channels", [1, 2, 4, 7])
def test_another_number_of_channels(channels: int) -> None:
    image = image_state()
    model = tiny(in_chans=channels)
    assert f"from 3 to {channels} channels" in load_checkpoint(model, image).resized[0]
    weight = image["patch_embed.proj.weight"]
    if channels == 1:
        expected = weight[:, :1] + weight[:, 1:2] + weight[:, 2:]
    else:
        expected = torch.stack([weight[:, channel % 3] for channel in range(channels)], dim=1) * (3 / channels)
    torch.testing.assert_close(model.model.patch_embed.proj.weight, expected)


def test_a_linear_patch_embedding_becomes_a_convolution() -> None:
    image = image_state()
    model = tiny()
    flat = {**image, "patch_embed.proj.weight": image["patch_embed.proj.weight"].flatten(1)}
    load_checkpoint(model, flat)
    assert torch.equal(model.model.patch_embed.proj.weight, image["patch_embed.proj.weight"])


def test_a_model_on_the_meta_device_starts_from_an_image_model() -> None:
    image = image_state(num_classes=5)
    with torch.device("meta"):
        model = TimeSformer(**TINY)
    load_checkpoint(model, image)
    expected = tiny()
    load_checkpoint(expected, image)
    assert_same_weights(model, expected.state_dict())
    with torch.device("meta"):
        model = TimeSformer(**TINY)
    with pytest.raises(ValueError, match=r"meta device and the checkpoint lacks model\.head\.weight"):
        load_checkpoint(model, image_state())


# Other architectures


@pytest.mark.parametrize(
    ("names", "architecture"),
    [
        (["vivit.embeddings.cls_token"], "a ViViT of Hugging Face"),
        (["backbone.layers.0.blocks.0.attn.relative_position_bias_table"], "another model with window attention"),
        (["blocks.0.attn.qkv.weight", "cls_token"], "a plain vision transformer"),  # without a patch embedding
        (["embeddings.patch_embeddings.projection.weight", "layernorm.bias"], "with other names"),
        (["encoder.weight"], "with other names (encoder.weight)"),
    ],
)
def test_other_architectures_are_named(names: list[str], architecture: str) -> None:
    model = tiny()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for strict in (True, False):
        with pytest.raises(ValueError, match="expected a checkpoint of a TimeSformer.*" + re.escape(architecture)):
            load_checkpoint(model, {name: torch.zeros(2, 2) for name in names}, strict=strict)
    assert_same_weights(model, before)


def test_names_that_nobody_knows_are_unexpected() -> None:
    model = tiny()
    state = {**tiny(seed=1).state_dict(), "aux_head.weight": torch.zeros(2)}
    with pytest.raises(ValueError, match=r"the model has no place for aux_head\.weight"):
        load_checkpoint(model, state)
    assert load_checkpoint(model, state, strict=False).unexpected == ("aux_head.weight",)

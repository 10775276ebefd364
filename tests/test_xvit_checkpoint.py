"""Checkpoints of X-ViT, and image ViTs to start from."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from xvit_cases import TINY

from vidattn.models import create_model, load_checkpoint
from vidattn.models.xvit import VisionTransformer, XViT
from vidattn.models.xvit_checkpoint import resize_positions

MANIFESTS = sorted((Path(__file__).parent / "manifests").glob("xvit-*.json"))
VIDEO = (2, 3, 4, 32, 32)
State = dict[str, Tensor]


def tiny(seed: int = 0, **overrides: object) -> XViT:
    torch.manual_seed(seed)
    model = XViT(**{**TINY, **overrides}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    return model


def bare(state: State) -> State:
    """The network's own tensors, by its own names."""
    return {name.removeprefix("base_model."): state[name] for name in state if name.startswith("base_model.")}


def image_state(num_classes: int = 11) -> State:
    """A state dict of an image ViT, as timm saves it, of the widths of tiny()."""
    torch.manual_seed(1)
    network = VisionTransformer(embed_dim=24, depth=2, num_heads=3, num_classes=num_classes)
    state = {name: 0.3 * torch.randn_like(tensor) for name, tensor in network.state_dict().items()}
    del state["temp_embed"]
    return state


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
    with torch.device("meta"):
        model = create_model("xvit_b16_16f", num_classes=published["config"]["MODEL"]["NUM_CLASSES"])
        state = {name: torch.empty(shape) for name, shape in published["state"].items()}
    report = load_checkpoint(model, state)
    assert report.converted_from == "official"
    assert len(report.loaded) == len(published["state"]) == len(model.state_dict())
    assert_clean(report)


WRAPPERS: dict[str, Callable[[State], object]] = {
    "bare": lambda state: state,
    "official": lambda state: {"epoch": 14, "model_state": state, "optimizer_state": {}, "cfg": "TRAIN:\n"},
    "model": lambda state: {"model": state},
    "state_dict_ema": lambda state: {"epoch": 3, "state_dict_ema": state},
    "module": lambda state: {"module": {f"module.{name}": tensor for name, tensor in state.items()}},
}


@pytest.mark.parametrize("wrapper", sorted(WRAPPERS))
def test_wrappers(wrapper: str, tmp_path: Path) -> None:
    source = tiny(seed=1)
    content = WRAPPERS[wrapper](source.state_dict())
    file = tmp_path / "weights.pyth"
    torch.save(content, file)
    video = torch.randn(VIDEO)
    for given in (content, file):
        model = tiny()
        report = load_checkpoint(model, given)
        assert report.converted_from == "official"
        assert_same_weights(model, source.state_dict())
        assert_clean(report)
        with torch.no_grad():
            assert torch.equal(model(video), source(video))


@pytest.mark.parametrize(
    "options",
    [{}, {"consensus_type": "avg"}, {"consensus_type": "avg", "dropout_rate": 0.0}, {"representation_size": 10}],
    ids=str,
)
def test_every_kind_of_model_and_safetensors(options: dict[str, object], tmp_path: Path) -> None:
    source, model = tiny(seed=1, **options), tiny(**options)
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    assert_clean(load_checkpoint(model, tmp_path / "model.safetensors"))
    assert_same_weights(model, source.state_dict())


def test_the_network_alone() -> None:
    source = tiny(seed=1)
    network = tiny().base_model
    report = load_checkpoint(network, source.state_dict())
    assert_same_weights(network, source.base_model.state_dict())
    assert sorted(report.ignored) == sorted(source.state_dict().keys() - {f"base_model.{key}" for key in report.loaded})
    assert not (report.missing or report.unexpected)
    # with a classifier, which a released file does not have
    network = VisionTransformer(img_size=32, embed_dim=24, depth=2, num_heads=3, num_frames=2, num_classes=7)
    report = load_checkpoint(network, source.state_dict())
    assert report.missing == ("head.weight", "head.bias")
    # and there and back
    state = network.state_dict()
    other = VisionTransformer(img_size=32, embed_dim=24, depth=2, num_heads=3, num_frames=2, num_classes=7)
    assert_clean(load_checkpoint(other, state))
    assert_same_weights(other, state)
    # the network's tensors, under its own names or a model's, are not enough for a model
    for state in (bare(source.state_dict()), source.base_model.state_dict()):
        model = tiny()
        with pytest.raises(ValueError, match=r"it lacks .*consensus\.cls_token"):
            load_checkpoint(model, state)
        report = load_checkpoint(model, state, strict=False)
        assert all(name.startswith(("consensus.", "new_fc.")) for name in report.missing)
        assert_same_weights(model.base_model, source.base_model.state_dict())


def test_a_constructor_that_starts_from_a_file(tmp_path: Path) -> None:
    source = tiny(seed=1)
    torch.save({"model_state": source.state_dict()}, tmp_path / "weights.pyth")
    started = XViT(**TINY, pretrained_model=tmp_path / "weights.pyth")
    assert_same_weights(started, source.state_dict())


# Sizes that differ


@pytest.mark.parametrize("options", [{}, {"consensus_type": "avg"}], ids=str)
def test_another_number_of_classes(options: dict[str, object]) -> None:
    source, model = tiny(seed=1, num_classes=7, **options), tiny(**options)
    with pytest.raises(ValueError, match=r"num_classes=7.*num_classes=5.* strict=False keeps the model's own"):
        load_checkpoint(model, source.state_dict())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = load_checkpoint(model, source.state_dict(), strict=False)
    classifiers = ["new_fc.weight", "new_fc.bias"]
    if not options:
        classifiers += ["consensus.mlp_head.4.weight", "consensus.mlp_head.4.bias"]
    assert sorted(report.missing) == sorted(report.ignored) == sorted(classifiers)
    expected = {name: before[name] if name in classifiers else tensor for name, tensor in source.state_dict().items()}
    assert_same_weights(model, expected)


@pytest.mark.parametrize("strict", [True, False])
def test_time_embeddings_of_another_number_are_never_left_out(strict: bool) -> None:
    source, model = tiny(seed=1, num_frames=4), tiny()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"first in base_model\.temp_embed: .*num_frames=4, .*num_frames=2"):
        load_checkpoint(model, source.state_dict(), strict=strict)
    assert_same_weights(model, before)


def test_a_checkpoint_of_another_size_says_which() -> None:
    with torch.device("meta"):
        kinetics, ssv2 = create_model("xvit_b16_16f"), create_model("xvit_b16_16f_ssv2")
        narrow, average = create_model("xvit_b16_16f", embed_dim=96), create_model("xvit_b16_8f", consensus_type="avg")
    with pytest.raises(
        ValueError, match=r"embed_dim=768, .* with a temporal head \(xvit_b16_16f or xvit_b16_8f\); .*embed_dim=96"
    ):
        load_checkpoint(narrow, kinetics.state_dict())
    with pytest.raises(ValueError, match=r"num_classes=174, .* \(xvit_b16_16f_ssv2\); the model is"):
        load_checkpoint(kinetics, ssv2.state_dict())
    with pytest.raises(ValueError, match=r"no place for consensus\..*the model is .*without a temporal head"):
        load_checkpoint(average, kinetics.state_dict())
    with pytest.raises(ValueError, match=r"it lacks consensus\..*the model is .*with a temporal head"):
        load_checkpoint(kinetics, average.state_dict())


# Image models


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("options", [{}, {"consensus_type": "avg"}], ids=str)
def test_image_models_are_a_start(options: dict[str, object], strict: bool) -> None:
    image = image_state()
    model = tiny(**options)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pre_logits = {"pre_logits.fc.weight": torch.zeros(2, 2)}
    report = load_checkpoint(model, {"model": {**image, **pre_logits}}, strict=strict)
    assert report.converted_from == "image"
    assert sorted(report.ignored) == ["head.bias", "head.weight", "pre_logits.fc.weight"]
    assert set(report.missing) == {name for name in before if not name.startswith("base_model.")}
    assert not (report.unexpected or report.resized)
    own = model.state_dict()
    for name, tensor in own.items():
        if name == "base_model.temp_embed":
            assert not tensor.any()
        elif name in report.missing:
            assert torch.equal(tensor, before[name]), name
        else:
            assert torch.equal(tensor, image[name.removeprefix("base_model.")]), name


def test_an_image_model_sees_each_frame_as_its_image() -> None:
    image = image_state(num_classes=5)
    network = VisionTransformer(embed_dim=24, depth=2, num_heads=3, num_classes=5, num_frames=1).eval()
    report = load_checkpoint(network, image)
    assert not (report.missing or report.ignored)  # as many classes: the classifier comes along
    model = tiny(img_size=224, consensus_type="identity", use_xvit=False)
    load_checkpoint(model, image)
    video = torch.randn(1, 3, 2, 224, 224)
    with torch.no_grad():
        model.new_fc.load_state_dict(network.head.state_dict())
        torch.testing.assert_close(model(video)[0], network(video[0].transpose(0, 1)), rtol=1e-4, atol=1e-4)


def test_image_models_of_another_size_are_resized() -> None:
    image = image_state()
    table = torch.randn(1, 1 + 24 * 24, 24)  # of 384 x 384 pixels
    model = tiny()
    report = load_checkpoint(model, {**image, "pos_embed": table})
    assert report.resized == ("pos_embed from 577 to 197 rows",)
    assert torch.equal(model.base_model.pos_embed, resize_positions(table, 197))
    with pytest.raises(ValueError, match=r"pos_embed must be of square grids, got 7 rows to resize to 197"):
        load_checkpoint(model, {**image, "pos_embed": table[:, :7]})


def test_resizing_positions() -> None:
    table = torch.randn(1, 10, 3, dtype=torch.float64)
    assert torch.equal(resize_positions(table, 10), table)
    assert torch.equal(resize_positions(table, 26)[:, :1], table[:, :1])
    # A plane that rises evenly still does, apart from its edges, and columns stay columns.
    rising = torch.arange(8.0).expand(8, 8).reshape(1, 64, 1)
    resized = resize_positions(torch.cat((torch.zeros(1, 1, 1), rising), dim=1), 17)[0, 1:, 0].view(4, 4)
    torch.testing.assert_close(resized, torch.tensor([0.5, 2.5, 4.5, 6.5]).expand(4, 4))
    assert resize_positions(table.bfloat16(), 17).dtype == torch.bfloat16


def test_a_linear_patch_embedding_becomes_a_convolution() -> None:
    image = image_state()
    model = tiny()
    load_checkpoint(model, {**image, "patch_embed.proj.weight": image["patch_embed.proj.weight"].flatten(1)})
    assert torch.equal(model.base_model.patch_embed.proj.weight, image["patch_embed.proj.weight"])


def test_a_layer_before_the_classifier_comes_along_where_there_is_one() -> None:
    image = {
        **image_state(),
        "pre_logits.fc.weight": torch.randn(10, 24),
        "pre_logits.fc.bias": torch.randn(10),
    }
    model = tiny(representation_size=10)
    assert sorted(load_checkpoint(model, image).ignored) == ["head.bias", "head.weight"]
    assert torch.equal(model.base_model.pre_logits.fc.weight, image["pre_logits.fc.weight"])


def test_an_image_model_of_another_width_is_refused() -> None:
    model = tiny(embed_dim=48)
    for strict in (True, False):
        with pytest.raises(ValueError, match=r"checkpoint is of embed_dim=24, .*; the model is embed_dim=48"):
            load_checkpoint(model, image_state(), strict=strict)


def test_models_on_the_meta_device(tmp_path: Path) -> None:
    with torch.device("meta"):
        network = VisionTransformer(embed_dim=24, depth=2, num_heads=3, num_classes=5)
        model = XViT(**TINY)
    image = image_state(num_classes=5)
    load_checkpoint(network, image)
    assert torch.equal(network.head.weight, image["head.weight"])
    assert not network.temp_embed.any()
    with pytest.raises(ValueError, match=r"meta device and the checkpoint lacks .*new_fc\.weight"):
        load_checkpoint(model, image)
    source = tiny(seed=1)
    load_checkpoint(model, source.state_dict())
    assert_same_weights(model, source.state_dict())


# Other architectures


@pytest.mark.parametrize(
    ("names", "architecture"),
    [
        (["model.blocks.0.temporal_attn.qkv.weight", "model.time_embed"], "TimeSformer"),
        (["vivit.embeddings.cls_token"], "a ViViT of Hugging Face"),
        (["backbone.layers.0.blocks.0.attn.relative_position_bias_table"], "another model with window attention"),
        (["blocks.0.attn.qkv.weight", "cls_token"], "a plain vision transformer"),  # without a patch embedding
        (["encoder.weight"], "with other names (encoder.weight)"),
    ],
)
def test_other_architectures_are_named(names: list[str], architecture: str) -> None:
    model = tiny()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for strict in (True, False):
        with pytest.raises(
            ValueError, match="expected a checkpoint of an X-ViT or an image ViT.*" + re.escape(architecture)
        ):
            load_checkpoint(model, {name: torch.zeros(2, 2) for name in names}, strict=strict)
    assert_same_weights(model, before)


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("timesformer_base", {"img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 3}),
        ("timesformer_joint", {"img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 3}),
    ],
)
def test_a_timesformer_is_not_taken_for_an_image_model(name: str, overrides: dict[str, int]) -> None:
    other = create_model(name, **overrides)
    for state in (other.state_dict(), other.model.state_dict()):
        with pytest.raises(ValueError, match="expected a checkpoint of an X-ViT or an image ViT"):
            load_checkpoint(tiny(), state, strict=False)
    with pytest.raises(ValueError, match="one that looks like an X-ViT"):
        load_checkpoint(other, tiny().state_dict(), strict=False)


def test_names_that_nobody_knows_are_unexpected() -> None:
    model = tiny()
    state = {**tiny(seed=1).state_dict(), "aux_head.weight": torch.zeros(2)}
    with pytest.raises(ValueError, match=r"the model has no place for aux_head\.weight"):
        load_checkpoint(model, state)
    assert load_checkpoint(model, state, strict=False).unexpected == ("aux_head.weight",)

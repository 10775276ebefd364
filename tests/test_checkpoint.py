"""Checkpoints of several projects, and files that are none."""

from __future__ import annotations

import json
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from vidattn.models import create_model, load_checkpoint
from vidattn.models.video_swin import Recognizer3D, SwinTransformer3D, relative_position_index
from vidattn.models.video_swin_checkpoint import (
    convert_state_dict,
    inflate_state_dict,
    resize_bias_table,
    revert_state_dict,
)

MANIFESTS = sorted((Path(__file__).parent / "manifests").glob("video_swin-*.json"))
WINDOW = (2, 3, 3)
State = dict[str, Tensor]


def tiny(seed: int = 0, **overrides: object) -> Recognizer3D:
    torch.manual_seed(seed)
    arguments = {"num_classes": 5, "embed_dim": 8, "depths": (2, 1), "num_heads": (1, 2), "window_size": WINDOW}
    model = create_model("video_swin_t", **{**arguments, **overrides}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def assert_same_weights(model: nn.Module, state: State) -> None:
    own = model.state_dict()
    assert own.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(own[name], tensor), name


def image_state(side: int = 3, prefix: str = "") -> State:
    """A state dict as the image Swin's authors save it, of the widths of tiny()."""
    video = tiny(seed=1).backbone.state_dict()
    state = {}
    for name, tensor in video.items():
        if name.endswith("relative_position_index"):
            plane = relative_position_index((1, side, side))
            state[prefix + name] = plane
            state[prefix + name.replace("relative_position_index", "attn_mask")] = torch.zeros(4, *plane.shape)
        elif name.endswith("relative_position_bias_table"):
            state[prefix + name] = torch.randn((2 * side - 1) ** 2, tensor.shape[1])
        elif name == "patch_embed.proj.weight":
            state[prefix + name] = tensor[:, :, 0].clone()
        else:
            state[prefix + name] = tensor
    return {**state, "head.weight": torch.randn(11, 16), "head.bias": torch.randn(11)}


# Layouts


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda path: path.stem)
def test_every_published_layout_loads_strictly(manifest: Path) -> None:
    published = json.loads(manifest.read_text())
    config = published["config"].get("backbone", published["config"])
    classes = published["config"].get("cls_head", published["config"])["num_classes"]
    names = ("patch_size", "embed_dim", "depths", "num_heads", "window_size")
    with torch.device("meta"):
        model = create_model("video_swin_t", num_classes=classes, **{name: config[name] for name in names})
        state = {name: torch.empty(shape) for name, shape in published["state"].items()}
    report = load_checkpoint(model, state)
    assert report.converted_from == ("torchvision" if "torchvision" in manifest.stem else "official")
    assert len(report.loaded) == published["n_keys"]
    assert not (report.missing or report.unexpected or report.resized or report.ignored)


WRAPPERS: dict[str, Callable[[State], object]] = {
    "bare": lambda state: state,
    "state_dict": lambda state: {"meta": {"epoch": 3}, "state_dict": state, "optimizer": {}},
    "model": lambda state: {"model": state, "epoch": torch.tensor(3)},
    "nested": lambda state: {"state": 1, "model": {"state_dict": state}},
    "module.": lambda state: {"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}},
    "model.": lambda state: {f"model.{name}": tensor for name, tensor in state.items()},
    "module._orig_mod.": lambda state: {f"module._orig_mod.{name}": tensor for name, tensor in state.items()},
}


@pytest.mark.parametrize("wrapper", sorted(WRAPPERS))
@pytest.mark.parametrize("layout", ["official", "mmaction2", "torchvision"])
def test_layouts_and_wrappers(layout: str, wrapper: str, tmp_path: Path) -> None:
    source = tiny(seed=1)
    state = revert_state_dict(source.state_dict(), layout)
    assert any(
        name.startswith({"official": "backbone.norm.", "mmaction2": "backbone.norm1.", "torchvision": "norm."}[layout])
        for name in state
    )
    content = WRAPPERS[wrapper](state)
    file = tmp_path / "weights.pth"
    torch.save(content, file)
    for given in (content, file, str(file)):
        model = tiny()
        report = load_checkpoint(model, given)
        assert report.converted_from == layout
        assert_same_weights(model, source.state_dict())
        assert not (report.missing or report.unexpected or report.resized or report.ignored)
    video = torch.randn(1, 3, 5, 30, 26)
    with torch.no_grad():
        assert torch.equal(model(video), source(video))


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.bin"])
def test_safetensors_are_known_by_their_content(name: str, tmp_path: Path) -> None:
    source, model = tiny(seed=1), tiny()
    save_file(source.state_dict(), tmp_path / name)
    load_checkpoint(model, tmp_path / name)
    assert_same_weights(model, source.state_dict())


@pytest.mark.parametrize("layout", ["official", "mmaction2", "torchvision"])
def test_a_backbone_takes_its_part_of_a_classifiers_checkpoint(layout: str) -> None:
    source, backbone = tiny(seed=1), tiny().backbone
    report = load_checkpoint(backbone, revert_state_dict(source.state_dict(), layout))
    assert_same_weights(backbone, source.backbone.state_dict())
    assert sorted(report.ignored) == ["cls_head.fc_cls.bias", "cls_head.fc_cls.weight"]


@pytest.mark.parametrize("layout", ["official", "mmaction2"])
def test_a_backbones_checkpoint_is_read_without_its_prefix(layout: str) -> None:
    source = tiny(seed=1)
    state = revert_state_dict(
        {f"backbone.{name}": tensor for name, tensor in source.backbone.state_dict().items()}, layout
    )
    state = {name.removeprefix("backbone."): tensor for name, tensor in state.items()}
    backbone = tiny().backbone
    assert load_checkpoint(backbone, state).converted_from == layout
    assert_same_weights(backbone, source.backbone.state_dict())
    model = tiny()
    with pytest.raises(ValueError, match=r"it lacks cls_head\.fc_cls\.weight, cls_head\.fc_cls\.bias"):
        load_checkpoint(model, state)
    report = load_checkpoint(model, state, strict=False)
    assert report.missing == ("cls_head.fc_cls.weight", "cls_head.fc_cls.bias")
    assert_same_weights(model.backbone, source.backbone.state_dict())


@pytest.mark.parametrize("layout", ["official", "mmaction2", "torchvision"])
def test_conversion_of_names_is_invertible(layout: str) -> None:
    names = {name: number for number, name in enumerate(tiny(depths=(1, 2, 1), num_heads=(1, 2, 4)).state_dict())}
    there = revert_state_dict(names, layout)
    assert convert_state_dict(there, layout) == names
    assert revert_state_dict(convert_state_dict(there, layout), layout) == there
    assert (there != names) == (layout != "official")
    for function in (convert_state_dict, revert_state_dict):
        with pytest.raises(ValueError, match="source must be one of official, mmaction2, torchvision, got 'keras'"):
            function(names, "keras")


def test_index_buffers_are_recomputed_and_need_not_be_in_the_file() -> None:
    source, model = tiny(seed=1), tiny()
    state = {
        name: tensor for name, tensor in source.state_dict().items() if not name.endswith("relative_position_index")
    }
    model.backbone.layers[0].blocks[0].attn.relative_position_index.zero_()
    assert not load_checkpoint(model, state).missing
    assert_same_weights(model, source.state_dict())


def test_another_numbering_of_offsets_is_refused() -> None:
    state = tiny(seed=1).state_dict()
    name = "backbone.layers.1.blocks.0.attn.relative_position_index"
    state[name] = state[name].t().contiguous()
    with pytest.raises(ValueError, match=re.escape(name) + " is not the numbering of Video Swin"):
        load_checkpoint(tiny(), state)


def test_preprocessing_buffers_of_mmaction2_are_left_out() -> None:
    state = revert_state_dict(tiny(seed=1).state_dict(), "mmaction2")
    report = load_checkpoint(tiny(), {**state, "data_preprocessor.mean": torch.zeros(3)})
    assert not report.unexpected


# Image checkpoints


@pytest.mark.parametrize("maker", ["authors", "timm"])
def test_image_checkpoints_are_inflated(maker: str, tmp_path: Path) -> None:
    state = image_state()
    given = state
    if maker == "timm":  # which counts a downsampling to the stage after it
        given = {name.replace("layers.0.downsample", "layers.1.downsample"): tensor for name, tensor in state.items()}
    model, before = tiny(), tiny().state_dict()
    report = load_checkpoint(model, {"model": given})
    assert report.converted_from == "image"
    assert report.missing == ("cls_head.fc_cls.weight", "cls_head.fc_cls.bias")
    assert sorted(report.ignored) == ["head.bias", "head.weight"]
    assert not (report.unexpected or report.resized)
    own = model.state_dict()
    for name in report.missing:
        assert torch.equal(own[name], before[name])
    for name, tensor in state.items():
        inflated = own.get(f"backbone.{name}")
        if name.endswith("relative_position_bias_table"):
            assert torch.equal(inflated, tensor.repeat(3, 1))
        elif name == "patch_embed.proj.weight":
            assert torch.equal(inflated, tensor[:, :, None].repeat(1, 1, 2, 1, 1) / 2)
        elif not name.endswith(("relative_position_index", "attn_mask")) and not name.startswith("head."):
            assert torch.equal(inflated, tensor), name
    # A still video is embedded as its image.
    image = torch.randn(1, 3, 8, 8)
    tokens = model.backbone.patch_embed.proj(image.unsqueeze(2).expand(-1, -1, 4, -1, -1))
    expected = nn.functional.conv2d(image, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=4)
    torch.testing.assert_close(tokens, expected.unsqueeze(2).expand(-1, -1, 2, -1, -1), rtol=1e-4, atol=1e-4)


def test_image_tables_of_another_window_are_interpolated_and_reported(tmp_path: Path) -> None:
    state = image_state(side=5, prefix="backbone.")
    file = tmp_path / "image.pth"
    torch.save({"model": state}, file)
    model = tiny()
    report = load_checkpoint(model, file)
    assert len(report.resized) == 3
    assert all("from 81 to 25 spatial offsets" in line for line in report.resized)
    name = "backbone.layers.1.blocks.0.attn.relative_position_bias_table"
    plane = state[name].t().reshape(1, 2, 9, 9)
    expected = nn.functional.interpolate(plane, size=(5, 5), mode="bicubic", align_corners=False)[0].flatten(1).t()
    assert torch.equal(model.state_dict()[name], expected.repeat(3, 1))
    # the same through the constructor's argument
    backbone = SwinTransformer3D(
        pretrained=file,
        patch_size=(2, 4, 4),
        embed_dim=8,
        depths=(2, 1),
        num_heads=(1, 2),
        window_size=WINDOW,
        patch_norm=True,
    )
    backbone.init_weights()
    assert_same_weights(backbone, model.backbone.state_dict())


def test_image_tables_that_do_not_fit_are_refused() -> None:
    table = "layers.0.blocks.0.attn.relative_position_bias_table"
    with pytest.raises(ValueError, match="must be the table of a square window, got 15 rows"):
        inflate_state_dict({table: torch.zeros(15, 1)}, patch_frames=2, window_size=WINDOW)
    heads = {name: tensor.repeat(1, 2) if name.endswith("table") else tensor for name, tensor in image_state().items()}
    with pytest.raises(
        ValueError, match=r"differ in 3 shapes, first in .*bias_table: \(75, 2\) in the file, \(75, 1\)"
    ):
        load_checkpoint(tiny(), heads, strict=False)


# Other windows and other models


@pytest.mark.parametrize("window", [(4, 3, 3), (1, 3, 3), (2, 5, 5), (3, 4, 6)])
@pytest.mark.parametrize("with_index", [True, False])
def test_tables_of_another_window_are_resized_on_request(window: tuple[int, int, int], with_index: bool) -> None:
    source, model = tiny(seed=1), tiny(window_size=window)
    state = source.state_dict()
    if not with_index:
        state = {name: tensor for name, tensor in state.items() if not name.endswith("relative_position_index")}
        if window == (3, 4, 6):  # a table alone does not tell
            with pytest.raises(ValueError, match="its window cannot be told"):
                load_checkpoint(model, state, strict=False)
            return
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"tables would have to be resized.*strict=False accepts this"):
        load_checkpoint(model, state)
    assert_same_weights(model, before)
    report = load_checkpoint(model, state, strict=False)
    assert len(report.resized) == 3
    assert f"from window {WINDOW} to {window}" in report.resized[0]
    assert "resized (3)" in str(report)
    own = model.state_dict()
    for name, tensor in source.state_dict().items():
        if name.endswith("bias_table"):
            assert torch.equal(own[name], resize_bias_table(tensor, WINDOW, window))
        elif name.endswith("relative_position_index"):
            assert torch.equal(own[name], relative_position_index(window))
        else:
            assert torch.equal(own[name], tensor), name


def test_resizing_a_table() -> None:
    table = torch.randn(3 * 5 * 5, 4)
    assert torch.equal(resize_bias_table(table, WINDOW, WINDOW), table)
    constant = resize_bias_table(torch.full((75, 4), 2.5), WINDOW, (5, 4, 7))
    torch.testing.assert_close(constant, torch.full((9 * 7 * 13, 4), 2.5))
    # What does not depend on time, as after inflation, still does not.
    still = resize_bias_table(torch.randn(25, 4).repeat(3, 1), WINDOW, (4, 3, 3)).view(7, 25, 4)
    torch.testing.assert_close(still, still[:1].expand(7, -1, -1))
    # Offset 0 stays where it is, and opposite offsets stay opposite.
    offsets = torch.arange(-1.0, 2.0).repeat_interleave(25).unsqueeze(1)
    stretched = resize_bias_table(offsets, WINDOW, (3, 3, 3)).view(5, 25)
    torch.testing.assert_close(stretched, -stretched.flip(0))
    assert (stretched.diff(dim=0) >= 0).all()
    torch.testing.assert_close(stretched[2], torch.zeros(25))
    flipped = resize_bias_table(table.flip(0), WINDOW, (3, 5, 2))
    torch.testing.assert_close(flipped, resize_bias_table(table, WINDOW, (3, 5, 2)).flip(0))
    assert resize_bias_table(table.bfloat16(), WINDOW, (3, 5, 2)).dtype == torch.bfloat16


def test_another_number_of_classes() -> None:
    source, model = tiny(seed=1, num_classes=7), tiny()
    with pytest.raises(
        ValueError, match=r"num_classes=7; the model is .*num_classes=5.* strict=False keeps the model's own"
    ):
        load_checkpoint(model, source.state_dict())
    head = {name: tensor.clone() for name, tensor in model.cls_head.state_dict().items()}
    report = load_checkpoint(model, source.state_dict(), strict=False)
    assert report.missing == ("cls_head.fc_cls.weight", "cls_head.fc_cls.bias") == report.ignored
    assert_same_weights(model.cls_head, head)
    assert_same_weights(model.backbone, source.backbone.state_dict())


@pytest.mark.parametrize("strict", [True, False])
def test_a_checkpoint_of_another_size_says_which(strict: bool) -> None:
    with torch.device("meta"):
        base, model = create_model("video_swin_b"), create_model("video_swin_t")
    with pytest.raises(ValueError, match=r"checkpoint is of embed_dim=128, depths=\(2, 2, 18, 2\).*\(video_swin_b"):
        load_checkpoint(model, base.state_dict(), strict=strict)


def test_more_blocks_than_the_model_has() -> None:
    source, model = tiny(seed=1, depths=(2, 3)), tiny()
    with pytest.raises(
        ValueError, match=r"no place for backbone\.layers\.1\.blocks\.1.*depths=\(2, 3\).*depths=\(2, 1\)"
    ):
        load_checkpoint(model, source.state_dict())
    report = load_checkpoint(model, source.state_dict(), strict=False)
    assert len(report.unexpected) == 2 * 13
    assert "unexpected (26): backbone.layers.1.blocks.1.norm1.weight" in str(report)
    with pytest.raises(ValueError, match=r"it lacks backbone\.layers\.1\.blocks\.1"):
        load_checkpoint(source, tiny().state_dict())


@pytest.mark.parametrize(
    ("names", "architecture"),
    [
        (["model.blocks.0.temporal_attn.qkv.weight", "model.patch_embed.proj.weight"], "TimeSformer"),
        (["timesformer.encoder.layer.0.temporal_attention.attention.qkv.weight"], "a TimeSformer of Hugging Face"),
        (["vivit.embeddings.cls_token"], "a ViViT of Hugging Face"),
        (["swin.encoder.layers.0.blocks.0.attention.self.query.weight"], "an image Swin of Hugging Face"),
        (["patch_embed.proj.weight", "layers.0.blocks.0.attn.cpb_mlp.0.weight"], "a Swin V2"),
        (["features.1.0.attn.relative_position_bias_table"], "another model with window attention"),
        (["blocks.0.attn.qkv.weight", "cls_token"], "a plain vision transformer"),
        (["layer1.0.conv1.weight", "fc.weight"], "a ResNet"),
        (["encoder.weight"], "with other names (encoder.weight)"),
    ],
)
def test_other_architectures_are_named(names: list[str], architecture: str) -> None:
    model = tiny()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for strict in (True, False):
        with pytest.raises(ValueError, match="expected a checkpoint of a Video Swin.*" + re.escape(architecture)):
            load_checkpoint(model, {name: torch.zeros(2, 2) for name in names}, strict=strict)
    assert_same_weights(model, before)


# The model


def test_a_model_on_the_meta_device_takes_the_tensors_over() -> None:
    source = tiny(seed=1)
    state = {
        name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in source.state_dict().items()
    }
    with torch.device("meta"):
        model = create_model(
            "video_swin_t",
            num_classes=5,
            embed_dim=8,
            depths=(2, 1),
            num_heads=(1, 2),
            window_size=WINDOW,
            frozen_stages=1,
        )
    load_checkpoint(model, state)
    assert_same_weights(model, source.state_dict())
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert not model.backbone.layers[0].blocks[0].attn.qkv.weight.requires_grad
    assert model.backbone.layers[1].blocks[0].attn.qkv.weight.requires_grad
    video = torch.randn(1, 3, 5, 30, 26)
    with torch.no_grad():
        assert torch.equal(model.eval()(video), source(video))


def test_a_model_on_the_meta_device_must_be_filled_completely() -> None:
    with torch.device("meta"):
        model = create_model("video_swin_t", embed_dim=8, depths=(2, 1), num_heads=(1, 2), window_size=WINDOW)
    with pytest.raises(ValueError, match=r"meta device and the checkpoint lacks cls_head\.fc_cls\.weight"):
        load_checkpoint(model, {"model": image_state()})
    assert all(tensor.is_meta for tensor in model.state_dict().values())


def test_dtypes_follow_the_model() -> None:
    source, model = tiny(seed=1), tiny()
    half = {
        name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in source.state_dict().items()
    }
    load_checkpoint(model, half)
    weight = model.cls_head.fc_cls.weight
    assert weight.dtype == torch.float32
    assert torch.equal(weight, source.cls_head.fc_cls.weight.half().float())
    quantised = {**half, "cls_head.fc_cls.weight": torch.ones(5, 16, dtype=torch.int8)}
    with pytest.raises(
        ValueError, match=r"cls_head\.fc_cls\.weight: expected a dtype like torch\.float32, got torch\.int8"
    ):
        load_checkpoint(model, quantised)


def test_loading_keeps_parameters_and_frozen_stages() -> None:
    model = tiny(frozen_stages=1)
    parameters = dict(model.named_parameters())
    load_checkpoint(model, tiny(seed=1).state_dict())
    for name, parameter in model.named_parameters():
        assert parameter is parameters[name]
    assert not model.backbone.patch_embed.proj.weight.requires_grad
    with torch.inference_mode():
        loaded = {name: tensor.clone() for name, tensor in tiny(seed=2).state_dict().items()}
    load_checkpoint(model, loaded)
    model.train()(torch.randn(1, 3, 4, 24, 24)).sum().backward()


def test_only_bundled_models_and_paths_or_mappings_are_taken() -> None:
    with pytest.raises(TypeError, match=r"model: expected one of Recognizer3D, .*SwinTransformer3D, .*got Linear"):
        load_checkpoint(nn.Linear(2, 2), {})
    with pytest.raises(TypeError, match="path_or_state: expected a path or a state dict, got 3"):
        load_checkpoint(tiny(), 3)


# Files that are no checkpoints


class Attack:
    """Creates a folder when it is unpickled by plain pickle."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (self.folder,)


def test_code_in_a_file_is_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "attacked"
    torch.save({"state_dict": tiny().state_dict(), "extra": Attack(marker)}, tmp_path / "zip.pth")
    with (tmp_path / "plain.pth").open("wb") as file:
        pickle.dump({"state_dict": Attack(marker)}, file)
    torch.save({"state_dict": Attack(marker)}, tmp_path / "legacy.pth", _use_new_zipfile_serialization=False)
    for name in ("zip.pth", "plain.pth", "legacy.pth"):
        with pytest.raises(ValueError, match=re.escape(str(tmp_path / name))):
            load_checkpoint(tiny(), tmp_path / name)
        assert not marker.exists()
    with pytest.raises(
        ValueError, match=r"holds Python objects besides tensors \(posix\.mkdir\).*save its state dict alone"
    ):
        load_checkpoint(tiny(), tmp_path / "zip.pth")
    with (tmp_path / "plain.pth").open("rb") as file:  # the attack is real
        pickle.load(file)
    assert marker.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (3, "expected a state dict, got 3"),
        ({}, "expected a state dict, got a mapping of nothing"),
        ({"epoch": 3, "lr": 0.1}, "expected a state dict, got a mapping of epoch, lr"),
        ({"state_dict": {}}, "expected a state dict, got a mapping of nothing"),
        ({"a": torch.zeros(1), "b": "text"}, "expected a mapping of names to tensors, got something else: b"),
        ({3: torch.zeros(1)}, "expected a mapping of names to tensors, got something else: 3"),
    ],
)
def test_files_without_a_state_dict(content: object, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "odd.pth")
    with pytest.raises(ValueError, match=message):
        load_checkpoint(tiny(), tmp_path / "odd.pth")


def test_report_reads_well() -> None:
    model = tiny()
    assert str(load_checkpoint(model, tiny(seed=1).state_dict())) == (
        "loaded 53 tensors from a checkpoint of layout 'official'"
    )
    report = load_checkpoint(model, image_state())
    assert str(report).splitlines()[1:] == [
        "  missing (2): cls_head.fc_cls.weight, cls_head.fc_cls.bias",
        "  ignored (2): head.weight, head.bias",
    ]

"""Checkpoints of ViViT in the layouts of scenic and Hugging Face, and image transformers that start one."""

from __future__ import annotations

import json
import re
import sys
import types
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from test_vivit import DOT_PRODUCT, ENCODER, JOINT, LARGE, MODELS, SELF_ATTENTION, SSV2, TINY, clip, on_meta, tiny
from torch import Tensor, nn

from vidattn.models import create_model, load_checkpoint
from vidattn.models.flax_trees import flatten_flax_tree
from vidattn.models.vivit import inflate_kernel
from vidattn.models.vivit_checkpoint import convert_state_dict, resize_position_embedding, revert_state_dict

MANIFESTS = Path(__file__).parent / "manifests"
MODEL_OF: dict[str, tuple[str, dict[str, Any], str]] = {
    "hf-b16x2-k400": (JOINT, {}, "transformers"),
    "hf-b16x2-k400-hubkeys": (JOINT, {}, "transformers-hub"),
    "scenic-b16x2-model1-spacetime": (JOINT, {}, "scenic"),
    "scenic-b16x2-model2-fe": (ENCODER, {}, "scenic"),
    "scenic-b16x2-model3-fsa": (SELF_ATTENTION, {}, "scenic"),
    "scenic-b16x2-model4-fdp": (DOT_PRODUCT, {}, "scenic"),
    "scenic-l16x2-model2-fe-k400": (LARGE, {}, "scenic"),
    "scenic-l16x2-model2-fe-ssv2": (LARGE, SSV2, "scenic"),
}
LAYOUTS = [(name, "scenic") for name in MODELS] + [(JOINT, "transformers"), (JOINT, "transformers-hub")]
LAYOUTS += [(name, "vidattn") for name in MODELS]
State = dict[str, Tensor]


def assert_same_weights(model: nn.Module, state: State) -> None:
    own = model.state_dict()
    assert own.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(own[name], tensor), name


def scenic(model: nn.Module) -> State:
    return revert_state_dict(model.state_dict(), "scenic", num_heads=2)


def nested(state: State, arrays: bool = True) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, tensor in state.items():
        *branches, leaf = path.split("/")
        node = tree
        for branch in branches:
            node = node.setdefault(branch, {})
        node[leaf] = tensor.numpy() if arrays else tensor
    return tree


# Layouts


def test_every_manifest_is_tested() -> None:
    assert {path.stem.removeprefix("vivit-") for path in MANIFESTS.glob("vivit-*.json")} == set(MODEL_OF)


@pytest.mark.parametrize("stem", sorted(MODEL_OF))
def test_published_layouts_load_strictly_and_are_reverted(stem: str) -> None:
    name, overrides, layout = MODEL_OF[stem]
    published = json.loads((MANIFESTS / f"vivit-{stem}.json").read_text())
    with torch.device("meta"):
        state = {key: torch.empty(shape) for key, shape in published["state"].items()}
    model = on_meta(name, **overrides)
    assert sum(parameter.numel() for parameter in model.parameters()) == published["params_total"]
    report = load_checkpoint(model, state)
    assert report.converted_from == layout
    assert len(report.loaded) == len(model.state_dict())
    assert not (report.missing or report.unexpected or report.resized or report.ignored)
    heads = 12 if overrides == {} and name != LARGE else 16
    reverted = revert_state_dict(model.state_dict(), layout, num_heads=heads)
    assert {key: list(tensor.shape) for key, tensor in reverted.items()} == published["state"]


@pytest.mark.parametrize(("name", "layout"), LAYOUTS)
def test_conversion_is_invertible(name: str, layout: str) -> None:
    source, model = tiny(name, seed=1, representation_size=6), tiny(name, representation_size=6)
    there = revert_state_dict(source.state_dict(), layout, num_heads=2)
    assert load_checkpoint(model, there).converted_from == layout
    assert_same_weights(model, source.state_dict())
    back = revert_state_dict(convert_state_dict(there, layout), layout, num_heads=2)
    assert back.keys() == there.keys()
    for key, tensor in there.items():
        assert torch.equal(back[key], tensor), key
    with torch.no_grad():
        assert torch.equal(model(clip()), source(clip()))


@pytest.mark.parametrize("name", MODELS)
def test_models_on_the_meta_device_take_plain_tensors(name: str) -> None:
    source = tiny(name)
    with torch.device("meta"):
        model = create_model(name, **TINY)
    load_checkpoint(model, scenic(source))
    assert_same_weights(model, source.state_dict())
    assert all(parameter.is_contiguous() for parameter in model.parameters())


def test_heads_of_the_temporal_encoder_may_differ() -> None:
    state = tiny(ENCODER).state_dict()
    there = revert_state_dict(state, "scenic", num_heads=2, temporal_num_heads=4)
    kernels = [
        f"{part}Transformer/encoderblock_0/MultiHeadDotProductAttention_0/query/kernel"
        for part in ("Spatial", "Temporal")
    ]
    assert [tuple(there[kernel].shape) for kernel in kernels] == [(16, 2, 8), (16, 4, 4)]
    for key, tensor in convert_state_dict(there, "scenic").items():
        assert torch.equal(tensor, state[key]), key


def test_heads_of_a_flax_tree_must_be_those_of_the_model() -> None:
    """No shape of a model tells them."""
    source = tiny(ENCODER, seed=1, num_heads=4, temporal_num_heads=2)
    state = revert_state_dict(source.state_dict(), "scenic", num_heads=4, temporal_num_heads=2)
    model = tiny(ENCODER, num_heads=4, temporal_num_heads=2)
    load_checkpoint(model, state)
    with torch.no_grad():
        assert torch.equal(model(clip()), source(clip()))
    with pytest.raises(
        ValueError, match="expected 4 attention heads in temporal_transformer, as the model has, got 2 in"
    ):
        load_checkpoint(tiny(ENCODER, num_heads=4), state)
    for strict in (True, False):
        with pytest.raises(ValueError, match=r"expected 2 attention heads in spatial_transformer, .* got 4 in Spatial"):
            load_checkpoint(tiny(ENCODER), state, strict=strict)
    with pytest.raises(
        ValueError, match=r"expected 8 attention heads in spatial_transformer, .* got 2 in Transformer/"
    ):
        load_checkpoint(tiny(ENCODER, num_heads=8, **SQUARE), image_state())


def test_layouts_have_names() -> None:
    for call in (convert_state_dict, lambda *args: revert_state_dict(*args, num_heads=1)):
        with pytest.raises(ValueError, match="source must be one of vidattn, scenic, transformers, transformers-hub"):
            call({}, "keras")


def test_packed_projections_need_all_three() -> None:
    state = scenic(tiny())
    lost = "Transformer/encoderblock_1/MultiHeadDotProductAttention_0/key/kernel"
    del state[lost]
    with pytest.raises(ValueError, match=r"it lacks transformer\.blocks\.1\.attn\.qkv\.weight; .*attn\.query\.weight"):
        load_checkpoint(tiny(), state)


def test_projections_without_bias() -> None:
    source, model = tiny(seed=1, qkv_bias=False), tiny(qkv_bias=False)
    load_checkpoint(model, revert_state_dict(source.state_dict(), "transformers", num_heads=2))
    assert_same_weights(model, source.state_dict())


def test_the_bare_model_of_hugging_face_leaves_the_head_alone() -> None:
    source, model = tiny(seed=1), tiny()
    state = revert_state_dict(source.state_dict(), "transformers-hub", num_heads=2)
    state = {key.removeprefix("vivit."): tensor for key, tensor in state.items() if not key.startswith("classifier.")}
    state["pooler.dense.weight"] = torch.zeros(16, 16)
    with pytest.raises(ValueError, match=r"it lacks head\.weight, head\.bias"):
        load_checkpoint(model, state)
    head = model.head.weight.clone()
    report = load_checkpoint(model, state, strict=False)
    assert report.missing == ("head.weight", "head.bias") and report.ignored == ("vivit.pooler.dense.weight",)
    assert_same_weights(model.transformer, source.transformer.state_dict())
    assert torch.equal(model.head.weight, head)


def test_what_does_not_fit_is_explained() -> None:
    with pytest.raises(
        ValueError,
        match=r"checkpoint is of hidden_size=16, num_layers=2, 19 positions, num_classes=5; the model is "
        r"hidden_size=16, num_layers=3",
    ):
        load_checkpoint(tiny(num_layers=3), scenic(tiny()))
    with pytest.raises(
        ValueError, match=r"differ in 1 shapes, first in transformer\.pos_embed: \(1, 19, 16\) in the file"
    ):
        load_checkpoint(tiny(num_frames=8), scenic(tiny()))
    with pytest.raises(ValueError, match="strict=False keeps the model's own classifier"):
        load_checkpoint(tiny(num_classes=6), scenic(tiny()))
    assert load_checkpoint(tiny(num_classes=6), scenic(tiny()), strict=False).missing == ("head.weight", "head.bias")
    with pytest.raises(ValueError, match=r"expected a checkpoint of a ViViT .*, got one with other names"):
        load_checkpoint(tiny(), {"weight": torch.zeros(1)})
    video_swin = create_model("video_swin_t", embed_dim=8, depths=(1,), num_heads=(1,))
    with pytest.raises(ValueError, match="got one that looks like a vision transformer of flax"):
        load_checkpoint(video_swin, scenic(tiny()))
    with pytest.raises(ValueError, match="got one that looks like another model with window attention"):
        load_checkpoint(tiny(), video_swin.state_dict())


# Flax trees and files

TREES = {
    "flat": lambda state: {path: tensor.numpy() for path, tensor in state.items()},
    "flat params": lambda state: {f"params/{path}": tensor.numpy() for path, tensor in state.items()},
    "nested": nested,
    "tensors": lambda state: nested(state, arrays=False),
    "params": lambda state: {"params": nested(state), "step": 3, "model_state": {}},
    "train state": lambda state: {
        "global_step": numpy.int64(3),
        "optimizer": {
            "state": {"step": 3, "param_states": nested({path: tensor * 0 for path, tensor in state.items()})},
            "target": nested(state),
        },
        "model_state": {},
        "rng": numpy.zeros(2, dtype=numpy.uint32),
    },
}


@pytest.mark.parametrize("kind", sorted(TREES))
@pytest.mark.parametrize("name", MODELS)
def test_flax_trees(name: str, kind: str) -> None:
    source, model = tiny(name, seed=1), tiny(name)
    report = load_checkpoint(model, TREES[kind](scenic(source)))
    assert report.converted_from == "scenic" and not (report.missing or report.unexpected)
    assert_same_weights(model, source.state_dict())


def test_npz_files(tmp_path: Path) -> None:
    source, model = tiny(seed=1), tiny()
    numpy.savez(tmp_path / "weights.npz", **TREES["flat"](scenic(source)))
    (tmp_path / "weights.npz").rename(tmp_path / "weights.bin")  # known by its content
    assert load_checkpoint(model, tmp_path / "weights.bin").converted_from == "scenic"
    assert_same_weights(model, source.state_dict())
    numpy.savez(tmp_path / "objects.npz", **{"embedding/kernel": numpy.array([print], dtype=object)})
    with pytest.raises(ValueError, match="cannot be read"):
        load_checkpoint(model, tmp_path / "objects.npz")
    torch.save({"state_dict": source.state_dict()}, tmp_path / "torch.npz")  # a zip file as well
    assert load_checkpoint(model, tmp_path / "torch.npz").converted_from == "vidattn"


def test_msgpack_files_are_left_to_flax(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, model = tiny(seed=1), tiny()
    content = b"\x81\xa6params"
    file = tmp_path / "checkpoint_3"
    file.write_bytes(content)
    monkeypatch.setitem(sys.modules, "flax.serialization", None)
    with pytest.raises(ImportError, match="needs flax: pip install flax"):
        load_checkpoint(model, file)
    serialization = types.ModuleType("flax.serialization")
    given = []

    def restore(encoded: bytes) -> dict[str, Any]:
        given.append(encoded)
        return {"params": nested(scenic(source))}

    serialization.msgpack_restore = restore
    monkeypatch.setitem(sys.modules, "flax", types.ModuleType("flax"))
    monkeypatch.setitem(sys.modules, "flax.serialization", serialization)
    assert load_checkpoint(model, file).converted_from == "scenic"
    assert given == [content]
    assert_same_weights(model, source.state_dict())


def test_what_is_no_flax_tree_is_left_alone() -> None:
    for content in ({"state_dict": {"a.weight": torch.zeros(1)}}, {"kernel": torch.zeros(1)}, [1], {}):
        assert flatten_flax_tree(content) is None


def test_arrays_of_other_libraries_are_copied() -> None:
    class Foreign:
        def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
            array = numpy.ones((2, 2), dtype=numpy.float32)
            array.flags.writeable = False
            return array

    tree = flatten_flax_tree({"dense": {"kernel": Foreign(), "steps": numpy.arange(3), "name": numpy.array("a")}})
    assert list(tree) == ["dense/kernel"] and torch.equal(tree["dense/kernel"], torch.ones(2, 2))


def test_bfloat16_arrays(tmp_path: Path) -> None:
    kernel = torch.randn(3, 4).bfloat16()
    numpy.savez(tmp_path / "weights.npz", **{"dense/kernel": kernel.view(torch.int16).numpy().view("V2")})
    with numpy.load(tmp_path / "weights.npz") as archive:
        tree = flatten_flax_tree(dict(archive))
    assert torch.equal(tree["dense/kernel"], kernel)


# Image transformers


def image_state(side: int = 2, counted_through: bool = False, head: str = "head") -> State:
    """The tree of a square image's vision transformer, of the widths of tiny()."""
    image = tiny(seed=1, num_frames=2, image_size=8 * side)
    state = revert_state_dict(image.state_dict(), "scenic", num_heads=2)
    state["embedding/kernel"] = state["embedding/kernel"][1].clone()
    state = {path.replace("output_projection", head): tensor for path, tensor in state.items()}
    if counted_through:
        renames = {"LayerNorm_1/": "LayerNorm_2/", "tion_0/": "tion_1/", "MlpBlock_0/": "MlpBlock_3/"}
        for old, new in renames.items():
            state = {path.replace(old, new): tensor for path, tensor in state.items()}
    return state


SQUARE = {"image_size": 16, "num_frames": 6}


@pytest.mark.parametrize("counted_through", [False, True])
@pytest.mark.parametrize("classifier", ["token", "gap"])
def test_image_transformers_start_the_joint_model(classifier: str, counted_through: bool) -> None:
    state = image_state(counted_through=counted_through, head="output_projection")
    model = tiny(classifier=classifier, **SQUARE)
    before = model.head.weight.clone()
    report = load_checkpoint(model, state)
    assert report.converted_from == "image"
    assert report.missing == ("head.weight", "head.bias") and sorted(report.ignored) == ["head.bias", "head.weight"]
    assert torch.equal(model.head.weight, before)
    position = state["Transformer/posembed_input/pos_embedding"]
    own = model.transformer.pos_embed
    if classifier == "token":
        assert torch.equal(own[:, :1], position[:, :1]) and torch.equal(model.transformer.cls_token, state["cls"])
    patches = own[:, 1:] if classifier == "token" else own
    assert torch.equal(patches.view(1, 3, 4, 16), position[:, None, 1:].expand(1, 3, 4, 16))  # of every frame
    weight = state["embedding/kernel"].permute(3, 2, 0, 1)
    assert torch.equal(model.patch_embed.proj.weight, inflate_kernel(weight, 2))
    image = tiny(seed=1, num_frames=2, image_size=16)
    assert_same_weights(model.transformer.blocks, image.transformer.blocks.state_dict())


def test_an_inflated_frame_gives_the_tokens_of_its_image() -> None:
    state = image_state()
    frame = torch.randn(1, 3, 16, 16)
    image = nn.functional.conv2d(frame, state["embedding/kernel"].permute(3, 2, 0, 1), state["embedding/bias"], 8)
    for method in ("central_frame_initializer", "average_frame_initializer"):
        model = tiny(kernel_init_method=method, **SQUARE)
        load_checkpoint(model, state)
        tokens = model.patch_embed(frame[:, :, None].expand(1, 3, 6, 16, 16))
        torch.testing.assert_close(tokens, image.flatten(2).transpose(1, 2).repeat(1, 3, 1), atol=1e-5, rtol=1e-5)


def test_image_transformers_start_sampled_frames() -> None:
    state = image_state()
    model = tiny(sampled_frames=3, **SQUARE)
    assert load_checkpoint(model, state).converted_from == "image"
    assert torch.equal(model.patch_embed.proj.weight, state["embedding/kernel"].permute(3, 2, 0, 1))


def test_image_transformers_start_the_spatial_encoder() -> None:
    model = tiny(ENCODER, **SQUARE)
    temporal = {name: tensor.clone() for name, tensor in model.temporal_transformer.state_dict().items()}
    report = load_checkpoint(model, image_state())
    image = tiny(seed=1, num_frames=2, image_size=16)
    assert_same_weights(model.spatial_transformer, image.transformer.state_dict())
    assert_same_weights(model.temporal_transformer, temporal)
    assert {name.split(".")[0] for name in report.missing} == {"temporal_transformer", "head"}


def test_image_transformers_start_both_attentions_of_model_3() -> None:
    model = tiny(SELF_ATTENTION, **SQUARE)
    norm_time = model.transformer.blocks[1].norm_time.weight.clone()
    report = load_checkpoint(model, image_state())
    image = tiny(seed=1, num_frames=2, image_size=16).transformer.blocks[1]
    block = model.transformer.blocks[1]
    for ours, theirs in (("attn_time", "attn"), ("attn_space", "attn"), ("norm_space", "norm1"), ("norm_mlp", "norm2")):
        assert_same_weights(getattr(block, ours), getattr(image, theirs).state_dict())
    assert torch.equal(block.norm_time.weight, norm_time)
    assert {re.sub(r"\d", "i", name).rpartition(".")[0] for name in report.missing} == {
        "transformer.blocks.i.norm_time",
        "head",
    }


def test_positions_of_other_images_are_resized() -> None:
    model = tiny(DOT_PRODUCT, image_size=32)
    state = image_state(side=2)
    report = load_checkpoint(model, state)
    assert report.resized == ("transformer.pos_embed from 2 x 2 to 4 x 4 patches",)
    position = state["Transformer/posembed_input/pos_embedding"][0, 1:].view(2, 2, 16)
    shares = torch.tensor([[1, 0], [2 / 3, 1 / 3], [1 / 3, 2 / 3], [0, 1]])  # corners stay where they are
    expected = torch.einsum("ya,xb,abc->yxc", shares, shares, position)
    for frame in model.transformer.pos_embed.view(3, 4, 4, 16):
        torch.testing.assert_close(frame, expected)
    with pytest.raises(ValueError, match="embedding must be that of a square image, got 6 tokens"):
        resize_position_embedding(torch.zeros(1, 6, 4), 1, (2, 4))


def test_an_image_transformer_without_class_token_starts_no_model_with_one() -> None:
    state = image_state()
    del state["cls"]
    state["Transformer/posembed_input/pos_embedding"] = state["Transformer/posembed_input/pos_embedding"][:, 1:]
    load_checkpoint(tiny(classifier="gap", **SQUARE), state)
    with pytest.raises(ValueError, match="has no class token"):
        load_checkpoint(tiny(**SQUARE), state)

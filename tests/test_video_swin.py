"""The reference Video Swin: published sizes, any input, training options. Its numbers are those of the golden cases."""

from __future__ import annotations

import copy
import doctest
import itertools
import json
import pickle
import re
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from torchvision_swin import torchvision_swin3d

import vidattn
from vidattn.models import (
    checkpoint,
    create_model,
    get_input_spec,
    list_models,
    registry,
    video_swin,
    video_swin_checkpoint,
    video_swin_windows,
)
from vidattn.models.layers import DropPath
from vidattn.models.video_swin import (
    BasicLayer,
    PatchEmbed3D,
    Recognizer3D,
    SwinTransformer3D,
    SwinTransformerBlock3D,
    WindowAttention3D,
    compute_mask,
    window_partition,
    window_reverse,
)
from vidattn.models.video_swin_checkpoint import convert_state_dict, revert_state_dict

MANIFESTS = Path(__file__).parent / "manifests"
MANIFEST_OF = {
    "video_swin_t": "video_swin-swin_t_p244_w877_k400",
    "video_swin_s": "video_swin-swin_s_p244_w877_k400",
    "video_swin_b": "video_swin-swin_b_p244_w877_k400",
    "video_swin_l": "video_swin-swin_l_p244_w877_k400",
    "video_swin_l_384": "video_swin-swin_l_p244_w81212_k400_384",
    "video_swin_b_ssv2": "video_swin-swin_b_p244_w1677_ssv2",
}
PARAMETERS = {
    "video_swin_t": 28_158_070,
    "video_swin_s": 49_816_678,
    "video_swin_b": 88_048_984,
    "video_swin_l": 196_953_916,
    "video_swin_l_384": 199_999_516,
    "video_swin_b_ssv2": 88_834_038,
}
# Multiply-adds in 1e9, of 32 frames unless said: published numbers count them, QK^T and PV included.
MACS = [
    ("video_swin_t", {}, (32, 224), 87.76),
    ("video_swin_s", {}, (32, 224), 165.68),
    ("video_swin_b", {}, (32, 224), 281.33),
    ("video_swin_l", {}, (32, 224), 603.27),
    ("video_swin_l_384", {}, (32, 384), 2106.38),
    ("video_swin_b_ssv2", {}, (32, 224), 320.36),
    ("video_swin_t", {"window_size": (16, 7, 7)}, (32, 224), 105.70),
    ("video_swin_t", {"window_size": (4, 7, 7)}, (32, 224), 78.80),
    ("video_swin_t", {}, (16, 224), 43.88),
    ("video_swin_s", {}, (16, 224), 82.84),
    ("video_swin_b", {}, (16, 224), 140.67),
]


def manifest(stem: str) -> dict[str, object]:
    return json.loads((MANIFESTS / f"{stem}.json").read_text())


def on_meta(name: str, **overrides: object) -> nn.Module:
    with torch.device("meta"):
        return create_model(name, **overrides)


def tiny(**overrides: object) -> Recognizer3D:
    torch.manual_seed(0)
    arguments = {"num_classes": 5, "embed_dim": 8, "depths": (2, 1), "num_heads": (1, 2), "window_size": (2, 3, 3)}
    model = create_model("video_swin_t", **{**arguments, **overrides})
    # As initialised, the residual branches hardly count: larger tables and weights make every branch visible.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def attributes(model: nn.Module, kind: type[nn.Module]) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, kind)]


# Published sizes


def test_every_published_size_has_a_manifest() -> None:
    names = [name for name in list_models() if name.startswith("video_swin_")]
    assert sorted(MANIFEST_OF) == names == sorted(PARAMETERS)
    official = {path.stem for path in MANIFESTS.glob("video_swin-swin_*.json")}
    assert official == set(MANIFEST_OF.values())


@pytest.mark.parametrize("name", sorted(MANIFEST_OF))
def test_state_dict_is_that_of_the_released_checkpoint(name: str) -> None:
    released = manifest(MANIFEST_OF[name])
    model = on_meta(name)
    shapes = {key: list(tensor.shape) for key, tensor in model.state_dict().items()}
    assert shapes == released["state"]
    assert len(shapes) == released["n_keys"]
    assert sum(parameter.numel() for parameter in model.parameters()) == released["params_total"] == PARAMETERS[name]
    assert sum(buffer.numel() for buffer in model.buffers()) == released["buffers_total"]
    state = {key: torch.empty(shape, device="meta") for key, shape in released["state"].items()}
    model.load_state_dict(state, strict=True, assign=True)


@pytest.mark.parametrize("name", sorted(MANIFEST_OF))
def test_configuration_is_the_released_one(name: str) -> None:
    config = manifest(MANIFEST_OF[name])["config"]
    model = on_meta(name)
    backbone, given = model.backbone, config["backbone"]
    assert list(backbone.patch_size) == given["patch_size"]
    assert list(backbone.window_size) == given["window_size"]
    assert [layer.depth for layer in backbone.layers] == given["depths"]
    assert [layer.blocks[0].num_heads for layer in backbone.layers] == given["num_heads"]
    assert backbone.layers[-1].blocks[-1].drop_path.drop_prob == pytest.approx(given["drop_path_rate"])
    assert backbone.frozen_stages == given["frozen_stages"]
    assert model.cls_head.dropout.p == config["cls_head"]["dropout_ratio"]
    assert get_input_spec(name).num_classes == config["cls_head"]["num_classes"]


@pytest.mark.parametrize("size", ["t", "s", "b"])
def test_torchvision_names_map_onto_ours_and_back(size: str) -> None:
    released = manifest(f"video_swin-torchvision_swin3d_{size}")
    model = on_meta(f"video_swin_{size}")
    shapes = {key: list(tensor.shape) for key, tensor in model.state_dict().items()}
    assert convert_state_dict(released["state"], "torchvision") == shapes
    assert revert_state_dict(shapes, "torchvision") == released["state"]
    assert sum(parameter.numel() for parameter in model.parameters()) == released["params_total"]


@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize(("name", "overrides", "size", "expected"), MACS)
def test_multiply_adds_are_the_published_ones(
    name: str, overrides: dict[str, object], size: tuple[int, int], expected: float, accelerated: bool
) -> None:
    frames, side = size
    model = on_meta(name, **overrides).eval()
    if accelerated:
        assert vidattn.accelerate(model).swapped
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        logits = model(torch.empty(1, 3, frames, side, side, device="meta"))
    assert logits.shape == (1, get_input_spec(name).num_classes)
    assert counter.get_total_flops() / 2e9 == pytest.approx(expected, rel=0.005)


def test_input_specs() -> None:
    spec = get_input_spec("video_swin_t")
    assert (spec.num_frames, spec.frame_stride, spec.sampling, spec.short_side, spec.crop) == (32, 2, "dense", 224, 224)
    assert get_input_spec("video_swin_b_ssv2").sampling == "uniform"
    assert get_input_spec("video_swin_l_384").crop == get_input_spec("video_swin_l_384").short_side == 384
    with pytest.raises(ValueError, match="did you mean video_swin_t"):
        get_input_spec("video_swin_tt")


def test_unknown_names_are_answered_with_close_ones() -> None:
    with pytest.raises(ValueError, match=r"got 'swin_t'; did you mean .*video_swin_t"):
        create_model("swin_t")
    with pytest.raises(ValueError, match=r"known: .*video_swin_t, "):
        create_model("@")
    with pytest.raises(TypeError, match="'num_class'; did you mean num_classes"):
        create_model("video_swin_t", num_class=3)


def test_models_are_built_on_the_meta_device_and_run_there() -> None:
    model = on_meta("video_swin_t")
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    features = model.eval().forward_features(torch.empty(2, 3, 10, 100, 90, device="meta"))
    assert features.shape == (2, 768, 5, 4, 3)


@pytest.mark.parametrize(
    ("overrides", "size"),
    [
        ({"window_size": (8, 7, 7)}, (9, 60, 58)),  # height and width clipped in the second stage
        ({"window_size": (2, 4, 4), "depths": (1, 2, 2), "num_heads": (1, 2, 4)}, (12, 51, 77)),
        ({"window_size": (4, 3, 5), "embed_dim": 12, "num_heads": (3, 4), "mlp_ratio": 2.5}, (4, 41, 24)),
    ],
)
def test_equal_to_torchvision(overrides: dict[str, object], size: tuple[int, int, int]) -> None:
    model = tiny(**overrides).double().eval()
    options = {
        "patch_size": (2, 4, 4),
        "embed_dim": 8,
        "depths": (2, 1),
        "num_heads": (1, 2),
        "num_classes": 5,
        **overrides,
    }
    lists = {name: list(value) if isinstance(value, tuple) else value for name, value in options.items()}
    theirs = torchvision_swin3d.SwinTransformer3d(**lists).double().eval()
    theirs.load_state_dict(revert_state_dict(model.state_dict(), "torchvision"), strict=True)
    video = torch.randn(2, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(model(video), theirs(video), rtol=1e-12, atol=1e-12)


# Any input


@pytest.mark.parametrize("frames", [1, 2, 3, 5, 8])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 40), (16, 17), (24, 24), (33, 21), (50, 2)])
def test_any_length_and_resolution(frames: int, height: int, width: int) -> None:
    model = tiny().eval()
    video = torch.randn(2, 3, frames, height, width)
    with torch.no_grad():
        features = model.forward_features(video)
        logits = model(video)
    grid = (-(-frames // 2), -(-height // 4), -(-width // 4))
    assert features.shape == (2, 16, grid[0], -(-grid[1] // 2), -(-grid[2] // 2))
    assert logits.shape == (2, 5)
    assert logits.isfinite().all()
    # Each clip of a batch is on its own, whatever the windows and the order they are stacked in.
    with torch.no_grad():
        torch.testing.assert_close(model(video[1:]), logits[1:], rtol=1e-5, atol=1e-5)


def test_padding_a_video_to_whole_patches_changes_nothing() -> None:
    model = tiny().eval()
    video = torch.randn(1, 3, 3, 22, 17)
    padded = nn.functional.pad(video, (0, 3, 0, 2, 0, 1))
    with torch.no_grad():
        assert torch.equal(model(video), model(padded))


def test_empty_batch() -> None:
    model = tiny()
    logits = model(torch.randn(0, 3, 4, 24, 24))
    assert logits.shape == (0, 5)
    logits.sum().backward()


@pytest.mark.parametrize(
    "shape", [(3, 4, 24, 24), (1, 4, 4, 24, 24), (1, 3, 0, 24, 24), (1, 3, 4, 24, 0), (1, 2, 3, 4, 8, 8)]
)
def test_a_video_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(
        ValueError, match=re.escape(f"video must be (batch, 3, frames, height, width), no axis empty, got {shape}")
    ):
        tiny()(torch.zeros(shape))


@pytest.mark.parametrize("sizes", [[2, 3, 3], (2, 3, 3)])
def test_sizes_may_be_lists_or_tuples(sizes: list[int] | tuple[int, ...]) -> None:
    kind = type(sizes)
    model = tiny(window_size=sizes, patch_size=kind((2, 4, 4)), depths=kind((2, 1)), num_heads=kind((1, 2)))
    assert model.backbone.window_size == (2, 3, 3)
    block = SwinTransformerBlock3D(8, 2, window_size=sizes, shift_size=kind((1, 1, 0)))
    x = torch.randn(1, 4, 7, 6, 8)
    window, shift, padded = video_swin_windows.fit_window((4, 7, 6), sizes, kind((1, 1, 0)))
    assert (window, shift, padded) == ((2, 3, 3), (1, 1, 0), (4, 9, 6))
    assert block(x, compute_mask(*padded, kind(window), kind(shift), "cpu")).shape == x.shape


def test_arguments_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="window_size must be three integers"):
        WindowAttention3D(8, (2, 3), 2)
    with pytest.raises(ValueError, match="window_size must be three integers"):
        WindowAttention3D(8, (2, 3, 0), 2)
    with pytest.raises(ValueError, match="dim must be a multiple of num_heads, got dim=8 and num_heads=3"):
        WindowAttention3D(8, (2, 3, 3), 3)
    with pytest.raises(ValueError, match="shift_size must be less than window_size"):
        SwinTransformerBlock3D(8, 2, (2, 3, 3), (0, 3, 0))
    with pytest.raises(ValueError, match="drop_path must be one rate or 3 rates"):
        BasicLayer(8, 3, 2, drop_path=[0.1, 0.2])
    with pytest.raises(ValueError, match="same stages"):
        SwinTransformer3D(depths=(2, 2), num_heads=(2,))
    with pytest.raises(ValueError, match="frozen_stages must be at most the 2 stages"):
        SwinTransformer3D(depths=(2, 2), num_heads=(2, 4), frozen_stages=3)
    with pytest.raises(ValueError, match="drop_prob must be between 0 and 1"):
        DropPath(1.5)
    attention = WindowAttention3D(8, (2, 3, 3), 2)
    with pytest.raises(ValueError, match="19 tokens a window, more than"):
        attention(torch.zeros(4, 19, 8))
    for mask in (torch.zeros(3, 18, 18), torch.zeros(2, 18, 17), torch.zeros(0, 18, 18)):
        with pytest.raises(ValueError, match="mask must be"):
            attention(torch.zeros(4, 18, 8), mask)


def test_views_are_averaged_as_probabilities() -> None:
    model = tiny().eval()
    views = torch.randn(2, 3, 3, 4, 24, 24)
    with torch.no_grad():
        expected = sum(model(views[:, view]).softmax(dim=1) for view in range(3)) / 3
        torch.testing.assert_close(model.predict(views), expected)
    with pytest.raises(ValueError, match="views must be"):
        model.predict(views[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_runs_in_shifted_blocks_too(dtype: torch.dtype) -> None:
    model = tiny().eval()
    video = torch.randn(1, 3, 5, 30, 26)
    with torch.no_grad():
        exact = model(video)
        half = model.to(dtype)(video.to(dtype))
    assert half.dtype == dtype
    torch.testing.assert_close(half.float(), exact, rtol=0.1, atol=0.1 * exact.abs().max().item())


# Windows and masks


def test_mask_lets_exactly_the_neighbours_of_before_the_shift_see_each_other() -> None:
    generator = torch.Generator().manual_seed(0)
    shifted = 0
    for _ in range(60):
        window = [int(torch.randint(1, 5, (), generator=generator)) for _ in range(3)]
        counts = [int(torch.randint(1, 4, (), generator=generator)) for _ in range(3)]
        padded = [axis * count for axis, count in zip(window, counts, strict=True)]
        shift = [
            int(torch.randint(0, axis, (), generator=generator)) if count > 1 else 0
            for axis, count in zip(window, counts, strict=True)
        ]
        shifted += any(shift)
        mask = compute_mask(*padded, window, shift, "cpu")
        axes = [torch.arange(size) for size in padded]
        now = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)
        before = (now + torch.tensor(shift)) % torch.tensor(padded)
        now, before = (window_partition(grid.unsqueeze(0), window) for grid in (now, before))
        moved_together = (before[:, :, None] - before[:, None]) == (now[:, :, None] - now[:, None])
        assert torch.equal(mask == 0, moved_together.all(dim=-1))
        assert mask.unique().tolist() in ([-100.0, 0.0], [0.0])
    assert shifted > 30


def test_partition_is_undone_by_reverse() -> None:
    x = torch.randn(2, 4, 6, 8, 5)
    windows = window_partition(x, (2, 3, 4))
    assert windows.shape == (2 * 2 * 2 * 2, 24, 5)
    # the last window of the first clip, its last token
    assert torch.equal(windows[7, -1], x[0, -1, -1, -1])
    assert torch.equal(window_reverse(windows, (2, 3, 4), 2, 4, 6, 8), x)


def test_position_index_is_that_of_the_offsets() -> None:
    window = (2, 3, 4)
    index = video_swin.relative_position_index(window)
    tokens = list(itertools.product(*map(range, window)))
    for (i, query), (j, key) in itertools.product(enumerate(tokens), repeat=2):
        depth, height, width = (q - k + axis - 1 for q, k, axis in zip(query, key, window, strict=True))
        assert index[i, j] == (depth * 5 + height) * 7 + width
    assert index.dtype == torch.int64


def test_masks_are_shared_and_few_are_kept() -> None:
    arguments = ((4, 6, 6), (2, 3, 3), (1, 1, 1))
    first = compute_mask(*arguments[0], *arguments[1:], "cpu")
    assert compute_mask(*arguments[0], *arguments[1:], torch.device("cpu")) is first
    for width in range(1, 40):
        compute_mask(4, 6, 3 * width, *arguments[1:], "cpu")
    assert len(video_swin_windows._mask_cache) <= 8
    again = compute_mask(*arguments[0], *arguments[1:], "cpu")
    assert again is not first
    assert torch.equal(again, first)


def test_cached_masks_survive_inference_mode_and_fake_tensors() -> None:
    video_swin_windows._mask_cache.clear()
    model = tiny()
    video = torch.randn(1, 3, 5, 30, 26)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, torch.no_grad():
        model(fake.from_tensor(video))
    assert not video_swin_windows._mask_cache
    with torch.inference_mode():
        model.eval()(video)
    assert video_swin_windows._mask_cache
    assert not any(mask.is_inference() for mask in video_swin_windows._mask_cache.values())
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, torch.no_grad():
        model(fake.from_tensor(video))
    model.train()(video).sum().backward()


def test_a_stage_makes_one_mask_and_none_without_a_shift() -> None:
    layer = BasicLayer(8, 4, 2, window_size=(2, 3, 3))
    with mock.patch.object(video_swin, "compute_mask", wraps=compute_mask) as made:
        layer(torch.randn(1, 8, 4, 7, 7))
        assert made.call_count == 1
        layer(torch.randn(1, 8, 2, 3, 3))
        BasicLayer(8, 1, 2, window_size=(2, 3, 3))(torch.randn(1, 8, 4, 7, 7))
        assert made.call_count == 1


@pytest.mark.parametrize("use_checkpoint", [False, True])
def test_whole_model_compiles_into_one_graph(use_checkpoint: bool) -> None:
    torch._dynamo.reset()
    model = tiny(use_checkpoint=use_checkpoint, drop_path_rate=0.0, dropout_ratio=0.0)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=False)
    for size in ((5, 30, 26), (4, 24, 24)):
        video = torch.randn(1, 3, *size)
        expected = model(video)
        actual = compiled(video)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
        actual.sum().backward()
    torch._dynamo.reset()


def test_compiled_model_takes_new_sizes_without_a_third_compilation() -> None:
    torch._dynamo.reset()
    counter = CompileCounter()
    model = tiny(depths=(2,), num_heads=(2,)).eval()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    with torch.no_grad():
        for size in ((6, 30, 26), (10, 37, 43), (14, 62, 39)):  # padded and shifted on every axis
            video = torch.randn(1, 3, *size)
            torch.testing.assert_close(compiled(video), model(video), rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 2
    torch._dynamo.reset()


# Training


def test_train_and_eval_return_the_model() -> None:
    model = tiny()
    backbone = model.backbone
    assert model.train() is model
    assert model.eval() is model
    assert backbone.train() is backbone
    assert backbone.eval() is backbone
    assert backbone.train(False) is backbone


def test_evaluation_is_deterministic_and_training_is_not() -> None:
    model = tiny(drop_rate=0.2, attn_drop_rate=0.2, drop_path_rate=0.4).eval()
    video = torch.randn(2, 3, 5, 30, 26)
    with torch.no_grad():
        assert torch.equal(model(video), model(video))
        plain = tiny().eval()
        plain.load_state_dict(model.state_dict())
        assert torch.equal(plain(video), model(video))
        model.train()
        assert not torch.equal(model(video), model(video))


@pytest.mark.parametrize("where", ["drop_rate", "attn_drop_rate", "drop_path_rate", "dropout_ratio"])
def test_each_dropout_acts_in_training(where: str) -> None:
    rates = {"drop_rate": 0.0, "attn_drop_rate": 0.0, "drop_path_rate": 0.0, "dropout_ratio": 0.0}
    video = torch.randn(4, 3, 5, 30, 26)
    with torch.no_grad():
        still = tiny(**rates).train()
        assert torch.equal(still(video), still(video))
        moving = tiny(**{**rates, where: 0.5}).train()
        assert not torch.equal(moving(video), moving(video))


@pytest.mark.parametrize("frozen", [-1, 0, 1, 2])
def test_frozen_stages(frozen: int) -> None:
    model = tiny(frozen_stages=frozen, drop_rate=0.1)
    backbone = model.backbone
    for _ in range(2):  # from the constructor, and again on each train()
        parts = {"patch_embed": backbone.patch_embed, "layer0": backbone.layers[0], "layer1": backbone.layers[1]}
        expected = {"patch_embed": frozen >= 0, "layer0": frozen >= 1, "layer1": frozen >= 2}
        for name, module in parts.items():
            assert all(parameter.requires_grad != expected[name] for parameter in module.parameters()), name
        model.requires_grad_(True)
        model.train()
        for name, module in parts.items():
            assert all(part.training != expected[name] for part in module.modules()), name
        assert backbone.pos_drop.training != (frozen >= 1)
        assert backbone.norm.training
        assert backbone.norm.weight.requires_grad
        assert model.cls_head.fc_cls.weight.requires_grad
    model(torch.randn(1, 3, 4, 24, 24)).sum().backward()
    frozen_parameters = {id(parameter) for name in parts if expected[name] for parameter in parts[name].parameters()}
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (id(parameter) in frozen_parameters), name


def test_checkpointing_changes_memory_only() -> None:
    options = {"drop_rate": 0.1, "attn_drop_rate": 0.1, "drop_path_rate": 0.3}
    kept, recomputed = tiny(**options), tiny(use_checkpoint=True, **options)
    recomputed.load_state_dict(kept.state_dict())
    results = []
    for model in (kept, recomputed):
        video = torch.randn(2, 3, 5, 30, 26, generator=torch.Generator().manual_seed(1)).requires_grad_()
        calls = []
        for attention in attributes(model, WindowAttention3D):
            attention.register_forward_pre_hook(lambda *_, calls=calls: calls.append("attention"))
        for mlp in attributes(model, video_swin.Mlp):
            mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append("mlp"))
        torch.manual_seed(3)
        with mock.patch.object(video_swin, "checkpoint", wraps=video_swin.checkpoint) as checkpointed:
            logits = model(video)
        logits.square().sum().backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        results.append((logits, video.grad, gradients, calls, checkpointed))
    (logits, video_grad, gradients, calls, unused), (logits2, video_grad2, gradients2, calls2, used) = results
    assert torch.equal(logits, logits2)
    assert torch.equal(video_grad, video_grad2)
    for name, gradient in gradients.items():
        assert torch.equal(gradient, gradients2[name]), name
    assert unused.call_count == 0
    assert used.call_count == 2 * 3  # both halves of each of the three blocks
    assert all(call.kwargs == {"use_reentrant": False} for call in used.call_args_list)
    assert [calls2.count(half) for half in ("attention", "mlp")] == [6, 6]
    assert [calls.count(half) for half in ("attention", "mlp")] == [3, 3]


def test_drop_path_rates_grow_linearly_over_all_blocks() -> None:
    model = on_meta("video_swin_t", drop_path_rate=0.22)
    blocks = attributes(model, SwinTransformerBlock3D)
    assert isinstance(blocks[0].drop_path, nn.Identity)
    rates = [block.drop_path.drop_prob for block in blocks[1:]]
    assert rates == pytest.approx([0.22 * block / 11 for block in range(1, 12)])


def test_drop_path_of_a_block_drops_its_branches() -> None:
    block = SwinTransformerBlock3D(8, 2, (2, 3, 3), drop_path=1.0).train()
    x = torch.randn(2, 2, 3, 3, 8)
    assert torch.equal(block(x, None), x)
    assert not torch.equal(block.eval()(x, None), x)


def test_initial_weights() -> None:
    torch.manual_seed(0)
    model = create_model("video_swin_t", depths=(2, 2), num_heads=(3, 6), patch_norm=True)
    for name, module in model.named_modules():
        if isinstance(module, nn.LayerNorm):
            assert (module.weight == 1).all(), name
            assert not module.bias.any(), name
        elif isinstance(module, nn.Linear):
            std = 0.01 if name == "cls_head.fc_cls" else 0.02
            assert module.weight.std().item() == pytest.approx(std, rel=0.1), name
            assert module.bias is None or not module.bias.any(), name
        elif isinstance(module, WindowAttention3D):
            assert module.relative_position_bias_table.std().item() == pytest.approx(0.02, rel=0.1), name


def test_copies_and_pickles_are_the_same_model() -> None:
    model = tiny().eval()
    video = torch.randn(1, 3, 5, 30, 26)
    with torch.no_grad():
        expected = model(video)
        assert torch.equal(copy.deepcopy(model)(video), expected)
        assert torch.equal(pickle.loads(pickle.dumps(model))(video), expected)


def test_qk_scale_of_none_or_zero_is_the_default() -> None:
    assert WindowAttention3D(8, (2, 2, 2), 2, qk_scale=None).scale == 0.5
    assert WindowAttention3D(8, (2, 2, 2), 2, qk_scale=0.0).scale == 0.5
    assert WindowAttention3D(8, (2, 2, 2), 2, qk_scale=0.3).scale == 0.3


def test_defaults_are_those_of_the_papers_code() -> None:
    backbone = SwinTransformer3D(embed_dim=12, num_heads=(1, 2, 4, 8))
    assert backbone.patch_size == (4, 4, 4)
    assert backbone.window_size == (2, 7, 7)
    assert backbone.patch_embed.norm is None
    assert [layer.depth for layer in backbone.layers] == [2, 2, 6, 2]
    assert backbone.layers[-1].blocks[-1].drop_path.drop_prob == pytest.approx(0.2)
    assert WindowAttention3D(8, (2, 2, 2), 2).qkv.bias is None
    assert BasicLayer(8, 1, 2).window_size == (1, 7, 7)
    assert BasicLayer(8, 1, 2).blocks[0].attn.qkv.bias is None
    assert SwinTransformerBlock3D(8, 2).attn.qkv.bias is not None
    assert PatchEmbed3D().patch_size == (2, 4, 4)


@pytest.mark.parametrize("module", [checkpoint, registry, video_swin, video_swin_checkpoint, video_swin_windows])
def test_examples(module: object) -> None:
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0

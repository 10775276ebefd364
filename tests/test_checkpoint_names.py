"""State dicts as training scripts save them: behind prefixes that not all keys have, beside counters and losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from test_checkpoint import State, assert_same_weights, tiny
from torch import nn

from vidattn.models import create_model, load_checkpoint, video_swin_checkpoint, vivit_checkpoint
from vidattn.models.timesformer_checkpoint import revert_state_dict as revert_timesformer

TRANSFORMER = {"num_classes": 5, "num_heads": 2}
SMALL: dict[str, Callable[[], nn.Module]] = {
    "swin": lambda: create_model(
        "video_swin_t", num_classes=5, embed_dim=8, depths=(2, 1), num_heads=(1, 2), window_size=(2, 3, 3)
    ),
    "timesformer": lambda: create_model(
        "timesformer_base", **TRANSFORMER, img_size=16, patch_size=8, num_frames=4, embed_dim=16, depth=2
    ),
    "vivit": lambda: create_model(
        "vivit_b_factorized_encoder", **TRANSFORMER, hidden_size=16, num_layers=1, temporal_num_layers=1, mlp_dim=24,
        patches=(8, 8, 2), num_frames=4, image_size=16,
    ),
    "joint": lambda: create_model(
        "vivit_b_joint", **TRANSFORMER, hidden_size=16, num_layers=2, mlp_dim=24, patches=(8, 8, 2), num_frames=4,
        image_size=16,
    ),
    "xvit": lambda: create_model("xvit_b16_8f", **TRANSFORMER, embed_dim=16, depth=2, img_size=32, temporal_heads=2),
}  # fmt: skip
LAYOUTS: dict[str, tuple[str, Callable[[State], State]]] = {
    "swin official": ("swin", dict),
    "swin mmaction2": ("swin", lambda state: video_swin_checkpoint.revert_state_dict(state, "mmaction2")),
    "swin torchvision": ("swin", lambda state: video_swin_checkpoint.revert_state_dict(state, "torchvision")),
    "timesformer official": ("timesformer", dict),
    "timesformer huggingface": ("timesformer", lambda state: revert_timesformer(state, "huggingface")),
    "vivit": ("vivit", dict),
    "joint hub": ("joint", lambda state: vivit_checkpoint.revert_state_dict(state, "transformers-hub", num_heads=2)),
    "xvit official": ("xvit", dict),
}
PREFIXES = (
    "module.",
    "net.",
    "model.",
    "backbone.",
    "ema_model.module.",
    "_orig_mod.",
    "lit.model._orig_mod.net.",
    "a.b.c.",
)


def filled(family: str, seed: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    model = SMALL[family]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def behind(prefix: str, state: State) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_prefixes_of_some_names(layout: str) -> None:
    family, revert = LAYOUTS[layout]
    source = filled(family)
    state = revert(source.state_dict())
    beside = {"n_averaged": torch.tensor(3), "criterion.weight": torch.ones(5), "val_acc.tp": torch.zeros(5)}
    for prefix in ("", *PREFIXES):
        for extra in ({}, beside):
            model = SMALL[family]()
            report = load_checkpoint(model, {**extra, **behind(prefix, state)})
            assert_same_weights(model, source.state_dict())
            assert sorted(report.ignored) == sorted(extra)
            assert not report.unexpected and not report.missing
            assert all(name in str(report) for name in extra)


@pytest.mark.parametrize(
    ("extra", "ignored"),
    [
        ({"initted": True, "step": 10}, ["initted", "step"]),  # of a moving average
        ({"net.n_averaged": 3}, ["net.n_averaged"]),
        ({"ema.decay": 0.99, "ema.num_updates": 3}, ["ema.decay", "ema.num_updates"]),
        ({"loss_fn.pos_weight": [1.0, 2.0], "aux_loss.weight": [1.0]}, ["loss_fn.pos_weight", "aux_loss.weight"]),
        ({"train_metrics.accuracy.tp": [1, 2]}, ["train_metrics.accuracy.tp"]),
        ({"normalize.mean": [0.5] * 3, "mean": [0.5] * 3, "std": [0.2] * 3}, ["normalize.mean", "mean", "std"]),
        ({"counter.value": 7}, ["counter.value"]),
    ],
)
def test_what_is_passed_over_is_reported(extra: dict[str, Any], ignored: list[str]) -> None:
    source = filled("swin")
    model = SMALL["swin"]()
    state = {**behind("net.", source.state_dict()), **{name: torch.tensor(value) for name, value in extra.items()}}
    assert sorted(load_checkpoint(model, state).ignored) == sorted(ignored)
    assert_same_weights(model, source.state_dict())


@pytest.mark.parametrize("prefix", ["", "net.", "module.model."])
@pytest.mark.parametrize("family", SMALL)
@pytest.mark.parametrize(
    "extra",
    ["head2.weight", "backbone.extra.bias", "model.blocks.7.attn.qkv.weight", "text_encoder.embedding.weight",
     "proj.0.weight", "fc.bias", "gamma", "blocks.0.alpha", "normal.weight", "lossy.weight", "stepper"],
)  # fmt: skip
def test_names_that_may_be_weights_are_never_passed_over(extra: str, family: str, prefix: str) -> None:
    source = filled(family)
    for name in {extra, prefix + extra}:
        model = SMALL[family]()
        before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        state = {**behind(prefix, source.state_dict()), name: torch.ones(3) if "." in name else torch.tensor(0.5)}
        with pytest.raises(ValueError, match=r"does not fit: .*the model has no place for "):
            load_checkpoint(model, state)
        assert_same_weights(model, before)
        assert len(load_checkpoint(model, state, strict=False).unexpected) == 1
        assert_same_weights(model, source.state_dict())


@pytest.mark.parametrize("family", SMALL)
def test_a_weight_without_the_prefix_is_not_the_model_s(family: str) -> None:
    state = behind("net.", filled(family).state_dict())
    for lost in (list(state)[-1], next(name for name in state if ".attn." in name and "qkv.bias" in name)):
        moved = {(name.removeprefix("net.") if name == lost else name): tensor for name, tensor in state.items()}
        with pytest.raises(ValueError, match=f"it lacks .*; the model has no place for {lost[4:]}"):
            load_checkpoint(SMALL[family](), moved)
        misspelt = {(name + "s" if name == lost else name): tensor for name, tensor in state.items()}
        with pytest.raises(ValueError, match=r"it lacks .*; the model has no place for "):
            load_checkpoint(SMALL[family](), misspelt)


def test_wrappers_inside_of_names() -> None:
    """Of parts that were compiled, parallelised or checkpointed on their own."""
    source, model = filled("swin"), SMALL["swin"]()
    pieces = {
        "blocks.": "blocks._checkpoint_wrapped_module.",
        "backbone.": "backbone._orig_mod.",
        "cls_head.": "cls_head.module.",
    }
    state = {}
    for name, tensor in source.state_dict().items():
        for old, new in pieces.items():
            name = name.replace(old, new)
        state[name] = tensor
    load_checkpoint(model, state)
    assert_same_weights(model, source.state_dict())
    with pytest.raises(
        ValueError, match=r"tensor once, got backbone\.patch_embed\.proj\.weight and backbone\._orig_mod\."
    ):
        load_checkpoint(model, {**source.state_dict(), **state})


def test_two_models_in_one_file_are_ambiguous() -> None:
    one, other = filled("swin", 1).state_dict(), filled("swin", 2).state_dict()
    both = {**behind("online_model.", one), **behind("ema_model.", other), "initted": torch.tensor(True)}
    for strict in (True, False):
        with pytest.raises(
            ValueError, match=r"the weights of one model, got different ones under ema_model\. and online"
        ):
            load_checkpoint(SMALL["swin"](), both, strict=strict)
    with pytest.raises(ValueError, match="expected one state dict, got several, pass one of them: student, teacher"):
        load_checkpoint(SMALL["swin"](), {"student": one, "teacher": other})
    model = SMALL["swin"]()
    tied = {**behind("net.", one), **behind("alias.", {name: tensor.clone() for name, tensor in one.items()})}
    load_checkpoint(model, tied)
    assert_same_weights(model, one)


def test_other_wrappers_of_a_state_dict() -> None:
    source = filled("timesformer")
    optimizer = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": []}
    for content in (
        {"net": source.state_dict(), "epoch": torch.tensor(3), "best": numpy.float64(0.5), "optimizer": optimizer},
        {"state_dict": {"net": source.state_dict()}},
        {"generator": {"module": behind("net.", source.state_dict())}},
    ):
        model = SMALL["timesformer"]()
        load_checkpoint(model, content)
        assert_same_weights(model, source.state_dict())


def test_averaged_models_of_torch() -> None:
    source, model = filled("vivit"), SMALL["vivit"]()
    averaged = torch.optim.swa_utils.AveragedModel(source)
    report = load_checkpoint(model, averaged.state_dict())
    assert report.ignored == ("n_averaged",)
    assert_same_weights(model, source.state_dict())


def test_arrays_of_numpy() -> None:
    source, model = tiny(seed=1), tiny()
    state: dict[str, Any] = {name: tensor.numpy() for name, tensor in source.state_dict().items()}
    big_endian = {name: array.astype(array.dtype.newbyteorder(">")) for name, array in state.items()}
    for arrays in (state, behind("net.", state), {"model": state}, big_endian):
        load_checkpoint(model, arrays)
        assert_same_weights(model, source.state_dict())
        torch.nn.init.zeros_(model.cls_head.fc_cls.weight)
    name = "cls_head.fc_cls.bias"
    for value in (numpy.array(["a"]), numpy.array([None]), "text", None, [1.0] * 400):
        with pytest.raises(ValueError, match=rf"expected a mapping of names to tensors, got something else: {name} \("):
            load_checkpoint(model, {**state, name: value})


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested", "ignore:.*quantize_per_tensor")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda x: x.to_sparse(), "expected a dense tensor, got layout torch.sparse_coo"),
        (lambda x: torch.nested.nested_tensor([x]), "expected a dense tensor, got a nested tensor"),
        (
            lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
            "expected a dtype like torch.float32, got torch.qint8",
        ),
        (lambda x: x.to(torch.complex64), "expected a dtype like torch.float32, got torch.complex64"),
        (lambda x: x.long(), "expected a dtype like torch.float32, got torch.int64"),
        (lambda x: x.to("meta"), "expected a tensor with data, got one on the meta device"),
    ],
)
def test_tensors_of_odd_forms_are_named(make: Callable[[torch.Tensor], torch.Tensor], message: str) -> None:
    state = tiny(seed=1).state_dict()
    name = "cls_head.fc_cls.weight"
    with pytest.raises(ValueError, match=f"load_checkpoint: {name}: {message}"):
        load_checkpoint(tiny(), {**state, name: make(state[name])})


@pytest.mark.parametrize(
    ("family", "prefix", "name"),
    [
        ("timesformer", "model.", "head.weight"),
        ("xvit", "base_model.", "norm.bias"),
        ("swin", "backbone.", "norm.bias"),
    ],
)
def test_two_tensors_of_one_name_are_ambiguous(family: str, prefix: str, name: str) -> None:
    state = filled(family).state_dict()
    assert prefix + name in state
    for strict in (True, False):
        with pytest.raises(ValueError, match=f"expected each tensor once, got {prefix + name} and {name}"):
            load_checkpoint(SMALL[family](), {**state, name: state[prefix + name] + 1}, strict=strict)


@pytest.mark.parametrize("prefix", ["transform_net.", "model_augment.", "loss_model.", "norm_acc_net.", "mean."])
def test_words_that_are_part_of_another_are_no_sign(prefix: str) -> None:
    source, model = filled("swin"), SMALL["swin"]()
    assert not load_checkpoint(model, behind(prefix, source.state_dict())).ignored
    assert_same_weights(model, source.state_dict())

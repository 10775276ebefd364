"""Configurations of X-ViT's code: the released ones, and each entry that counts."""

from __future__ import annotations

import doctest
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from vidattn.models import create_model, xvit_config
from vidattn.models.xvit import Attention, TemporalShift, XViT

MANIFESTS = Path(__file__).parent / "manifests"


def assert_same_settings(model: nn.Module, other: nn.Module) -> None:
    """Compare everything but the weights: names, shapes and whatever the modules say of themselves."""
    assert repr(model) == repr(other)
    assert {key: tensor.shape for key, tensor in model.state_dict().items()} == {
        key: tensor.shape for key, tensor in other.state_dict().items()
    }
    for name in ("num_segments", "consensus_type", "before_softmax", "use_xvit", "freeze_backbone"):
        assert getattr(model, name) == getattr(other, name)
    assert model.base_model.img_size == other.base_model.img_size
    heads, others = (
        [module.num_heads for module in whole.modules() if isinstance(module, Attention)] for whole in (model, other)
    )
    assert heads == others


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat.update(flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return flat


@pytest.mark.parametrize(
    ("name", "stem"), [("xvit_b16_16f", "xvit-B16_16x16_k400"), ("xvit_b16_16f_ssv2", "xvit-B16_16x16_ssv2")]
)
def test_released_configurations(name: str, stem: str) -> None:
    config = json.loads((MANIFESTS / f"{stem}.json").read_text())["config"]
    config["XVIT"]["BASE_MODEL"] = config.pop("base_model")["name"]
    with torch.device("meta"):
        for given in (config, flatten(config)):
            assert_same_settings(XViT.from_config(given), create_model(name))


def test_a_configuration_without_entries_is_the_default_of_the_papers_code() -> None:
    with torch.device("meta"):
        model = XViT.from_config({})
        assert_same_settings(model, XViT(locations_list=(9, 10, 11)))
    assert [isinstance(block.attn.control_point_query, TemporalShift) for block in model.base_model.blocks] == (
        [False] * 9 + [True] * 3
    )


@pytest.mark.parametrize(
    ("key", "value", "name", "expected"),
    [
        ("MODEL.NUM_CLASSES", 7, "num_classes", 7),
        ("MODEL.DROPOUT_RATE", 0.1, "dropout_rate", 0.1),
        ("SOLVER.FREEZE_BACKBONE", True, "freeze_backbone", True),
        ("XVIT.NUM_SEGMENTS", 4, "num_segments", 4),
        ("XVIT.SHIFT_DIV", 4, "shift_div", 4),
        ("XVIT.LOCATIONS_LIST", [1], "locations_list", [1]),
        ("XVIT.USE_XVIT", False, "use_xvit", False),
        ("XVIT.CONSENSUS_TYPE", "avg", "consensus_type", "avg"),
        ("XVIT.CONSENSUS_TYPE", "rnn", "consensus_type", "identity"),
        ("XVIT.BACKBONE.DROP_PATH_RATE", 0.1, "drop_path_rate", 0.1),
        ("XVIT.BACKBONE.DROP_ATTN_RATE", 0.1, "attn_drop_rate", 0.1),
        ("TEMPORAL_HEAD.NUM_ATTENTION_HEADS", 3, "temporal_heads", 3),
        ("TEMPORAL_HEAD.NUM_HIDDEN_LAYERS", 2, "temporal_layers", 2),
        ("TEMPORAL_HEAD.MLP_DIM", 7, "temporal_mlp_dim", 7),
        ("TEMPORAL_HEAD.ATTENTION_PROBS_DROPOUT_PROB", 0.1, "temporal_attn_drop", 0.1),
        ("TEMPORAL_HEAD.HIDDEN_DROPOUT_PROB", 0.1, "temporal_drop", 0.1),
        ("DATA.TRAIN_CROP_SIZE", 160, "img_size", 160),
    ],
)
def test_each_entry_of_a_configuration_counts(key: str, value: object, name: str, expected: object) -> None:
    size = {"embed_dim": 24, "depth": 10}
    with torch.device("meta"):
        model = XViT.from_config({key: value, "XVIT.PRETRAIN": True, "DATA.NUM_FRAMES": 16}, **size)
        same = XViT(**{"locations_list": (9, 10, 11), name: expected, **size})
        plain = XViT(locations_list=(9, 10, 11), **size)
    assert_same_settings(model, same)
    with pytest.raises(AssertionError):
        assert_same_settings(model, plain)


def test_the_size_of_frames_depends_on_what_a_configuration_is_for() -> None:
    size = {"DATA.TRAIN_CROP_SIZE": 160, "DATA.TEST_CROP_SIZE": 192}
    for training, testing, expected in ((True, True, 160), (True, False, 160), (False, True, 192), (False, False, 160)):
        config = {**size, "TRAIN.ENABLE": training, "TEST.ENABLE": testing}
        assert xvit_config.read_config(config)["img_size"] == expected


def test_a_configuration_for_averaging_probabilities() -> None:
    with torch.device("meta"):
        model = XViT.from_config({"XVIT.CONSENSUS_TYPE": "avg", "XVIT.BEFORE_SOFTMAX": False})
    assert not model.before_softmax


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"XVIT.SHIFT_DIF": 8}, r"config must have keys of the paper's code, got XVIT\.SHIFT_DIF"),
        ({"XVIT": {"BASE_MODEL": "resnet50"}}, r"XVIT\.BASE_MODEL must be .* got 'resnet50'"),
        ({"XVIT": {"BACKBONE": {"NORM_LAYER": "BN"}}}, r"NORM_LAYER must be LN, got 'BN'"),
        ({"TEMPORAL_HEAD.HIDDEN_DIM": 512}, r"HIDDEN_DIM must be 768, .* got 512"),
        ({"XVIT.CONSENSUS_TYPE": "max"}, r"consensus_type must be one of vit, avg, identity, got 'max'"),
    ],
)
def test_configurations_that_make_no_sense_are_refused(config: dict[str, Any], message: str) -> None:
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        XViT.from_config(config)


def test_example() -> None:
    result = doctest.testmod(xvit_config)
    assert result.attempted > 0
    assert result.failed == 0

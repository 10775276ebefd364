"""mmaction2's divided attention: a stand-in with its modules swapped."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from integration_cases import Integration, Target, admit, assert_as_before, run
from standin_mmaction2 import Layer
from torch import nn

import vidattn

TARGETS = [
    Target(
        "open-mmlab/mmaction2",
        "TimeSformer (divided attention)",
        partial(Layer, 24, 3, 4),
        lambda: {"x": torch.randn(2, 1 + 4 * 5, 24)},
        ("DividedTemporalAttentionWithNorm", "DividedSpatialAttentionWithNorm"),
        "mmaction2",
        stand_in=True,
    )
]


@pytest.mark.parametrize("target", TARGETS, ids=str)
class TestTargets(Integration):
    pass


def _hooked(layer: Layer) -> None:
    for part in (layer.time, layer.space):
        part.attn.register_forward_hook(lambda module, args, out: (2 * out[0], out[1]))


def _normed_otherwise(layer: Layer) -> None:
    for part in (layer.time, layer.space):
        part.norm.register_forward_pre_hook(lambda module, args: (args[0] - args[0].mean(1, keepdim=True),))


def _batch_first(layer: Layer) -> None:
    for part in (layer.time, layer.space):
        part.attn.batch_first = True


def _more_keys(layer: Layer) -> None:
    for part in (layer.time, layer.space):
        part.attn.add_zero_attn = True


@pytest.mark.parametrize("change", [_hooked, _normed_otherwise, _batch_first, _more_keys])
def test_what_the_ops_cannot_do_is_left(change, monkeypatch: pytest.MonkeyPatch) -> None:
    target = TARGETS[0]
    plain, accelerated = target.make(), target.make()
    admit(plain, "mmaction2", monkeypatch)
    assert len(vidattn.accelerate(accelerated).swapped) == 2
    for model in (plain, accelerated):
        change(model)
    arguments = target.arguments()
    before, after = (run(model, arguments, grad=False) for model in (plain, accelerated))
    torch.testing.assert_close(after.outputs, before.outputs)
    assert after.ops.forward == 0


@pytest.mark.parametrize("swap", [nn.Softsign, nn.Identity])
def test_another_layer_where_paths_are_dropped(swap: type[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    """It sees what the original shows it, whatever it does with that."""
    target = TARGETS[0]
    model = target.make(torch.float64)
    admit(model, "mmaction2", monkeypatch)
    model.time.dropout_layer, model.space.dropout_layer = swap(), swap()
    arguments = target.arguments(torch.float64)
    before = run(model, arguments)
    vidattn.accelerate(model)
    after = run(model, arguments)
    assert_as_before(after, before, None)
    assert after.ops.forward == 2


def test_another_kind_of_attention_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    target = TARGETS[0]
    model = target.make()
    admit(model, "mmaction2", monkeypatch)
    model.time.attn = nn.MultiheadAttention(24, 3, add_bias_kv=True)
    report = vidattn.accelerate(model)
    assert [row.reason for row in report.skipped] == ["its attn is no plain nn.MultiheadAttention of one width"]
    assert len(report.swapped) == 1

"""X-ViT's own repository: a stand-in with its attention swapped."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from integration_cases import Integration, Target, admit, run
from standin_xvit import Attention, Frames, TemporalShift
from torch import nn

import vidattn

TARGETS = [
    Target(
        "1adrianb/video-transformers",
        f"X-ViT, {'shifted' if shifted else 'still'}",
        partial(Frames, 24, 3, 4, shifted),
        lambda: {"x": torch.randn(8, 10, 24)},
        ("Attention",),
        "xvit",
        stand_in=True,
    )
    for shifted in (True, False)
]


@pytest.mark.parametrize("target", TARGETS, ids=str)
class TestTargets(Integration):
    pass


def _other_values(attention: Attention) -> None:
    attention.control_point_value.fold_div = 8


def _only_keys(attention: Attention) -> None:
    attention.control_point_value = attention.control_point_value.net


def _hooked(attention: Attention) -> None:
    attention.control_point_query.register_forward_hook(lambda module, args, out: 2 * out)


def _foreign(attention: Attention) -> None:
    attention.control_point_query = nn.Softsign()
    attention.control_point_value = nn.Softsign()


def _moves(attention: Attention) -> None:
    attention.control_point_query.net = nn.Softsign()
    attention.control_point_value.net = nn.Softsign()


@pytest.mark.parametrize("change", [_other_values, _only_keys, _hooked, _foreign, _moves])
def test_what_the_op_cannot_shift(change, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys and values that are shifted differently, or by something else, are the original's work."""
    target = TARGETS[0]
    plain, accelerated = target.make(), target.make()
    admit(plain, "xvit", monkeypatch)
    vidattn.accelerate(accelerated)
    for model in (plain, accelerated):
        change(model.layers[0])
    arguments = target.arguments()
    before, after = (run(model, arguments, grad=False) for model in (plain, accelerated))
    torch.testing.assert_close(after.outputs, before.outputs)
    assert dict(after.ops.calls) == {"divided_attention": 1}  # of the other layer


@pytest.mark.parametrize("divisions", [2, 3, 100])
def test_any_share_of_channels(divisions: int, monkeypatch: pytest.MonkeyPatch) -> None:
    target = TARGETS[0]
    model = target.make()
    admit(model, "xvit", monkeypatch)
    for name in ("control_point_query", "control_point_value"):
        shift = getattr(model.layers[0], name)
        assert isinstance(shift, TemporalShift)
        shift.fold_div = divisions
    arguments = target.arguments()
    before = run(model, arguments)
    vidattn.accelerate(model)
    after = run(model, arguments)
    torch.testing.assert_close(after.outputs, before.outputs)
    assert after.ops.calls["space_time_mixing_attention"] == 1

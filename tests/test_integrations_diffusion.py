"""Diffusion models of repositories that are no packages, AnimateDiff and Latte, with their attention swapped."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import standin_animateanyone
import standin_animatediff
import standin_latte
import torch
from integration_cases import Integration, Target, admit, assert_as_before, run
from torch import nn

import vidattn

processors = standin_animateanyone.processors

_motion = partial(Target, "AnimateDiff", attention=("VersatileAttention",), integration="animatediff", stand_in=True)
_latte = partial(Target, "Latte", attention=("Attention",), integration="latte", stand_in=True)


def clip(frames: int = 5) -> dict[str, Any]:
    return {"clip": torch.randn(2, 32, frames, 3, 4)}


def patches() -> dict[str, Any]:
    return {"x": torch.randn(2, 5, 7, 24), "condition": torch.randn(2, 24)}


TARGETS = [
    _motion("motion module", standin_animatediff.MotionModule, clip),
    _motion(
        "motion module without positions, MagicAnimate",
        partial(standin_animatediff.MotionModule, frames=0, heads=2),
        partial(clip, 1),
        compiles=False,  # as the first
    ),
    _motion(
        "motion module on later diffusers, as in AnimateAnyone",
        partial(standin_animatediff.MotionModule, attention=standin_animateanyone.VersatileAttention),
        clip,
        compiles=False,  # as the first
    ),
    _latte("Latte", standin_latte.Latte, patches),
]
MOTION, ANYONE, LATTE = TARGETS[0], *TARGETS[2:]


@pytest.mark.parametrize("target", TARGETS, ids=str)
class TestTargets(Integration):
    pass


def calls_of(target: Target, model: nn.Module, change: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch) -> int:
    """Compare a model with its accelerated copy, each changed after that; tell how often an op was called."""
    admit(model, target.integration, monkeypatch)
    accelerated = copy.deepcopy(model)
    assert vidattn.accelerate(accelerated).swapped
    for one in (model, accelerated):
        for module in one.modules():
            if type(module).__name__.endswith(target.attention):
                change(module)
    arguments = target.arguments()
    before = run(model, arguments)
    after = run(accelerated, arguments)
    assert_as_before(after, before, None)
    return after.ops.forward


class Doubled(nn.Module):
    """A wrapper around a layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * self.layer(x)


def _look(module: nn.Module, given: Any, out: torch.Tensor) -> torch.Tensor:
    return out + out.mean(dim=1, keepdim=True)  # over the tokens of a sequence, as the original arranges them


@pytest.mark.parametrize(
    "change",
    [
        lambda module: setattr(module, "to_q", Doubled(module.to_q)),
        lambda module: module.to_k.register_forward_hook(_look),
        lambda module: module.to_out[0].register_forward_hook(_look),
        lambda module: module.pos_encoder.register_forward_hook(_look),
        lambda module: setattr(module.pos_encoder, "forward", lambda x: 2 * x),
        lambda module: setattr(module.pos_encoder.dropout, "p", 0.3) or module.pos_encoder.dropout.train(),
        lambda module: setattr(module.to_out[1], "p", 0.3) or module.to_out[1].train(),
        lambda module: setattr(module, "scale", nn.Parameter(torch.tensor(0.3))),
        lambda module: setattr(module, "group_norm", nn.GroupNorm(4, 32)),
    ],
    ids=[
        "wrapper",
        "hook",
        "hook behind",
        "hook on positions",
        "positions",
        "dropout",
        "last dropout",
        "scale",
        "norm",
    ],
)
def test_what_hangs_on_the_parts_of_a_motion_module(
    change: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its projections would see other sequences: the original runs, with the random numbers of the original."""
    assert calls_of(MOTION, MOTION.make(), change, monkeypatch) == 0


@pytest.mark.parametrize("target", [MOTION, ANYONE], ids=str)
def test_a_new_scale_counts_where_it_is_read(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    assert calls_of(target, target.make(), lambda module: setattr(module, "scale", 0.9), monkeypatch) == 2


class DoubledProcessor(processors.AttnProcessor2_0):
    """A processor of a user."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return 2 * super().__call__(*args, **kwargs)


@pytest.mark.parametrize(
    ("change", "calls"),
    [
        (lambda module: module.set_processor(processors.AttnProcessor()), 2),
        (lambda module: module.set_processor(processors.AttnProcessor()) or setattr(module, "scale", 0.9), 2),
        (lambda module: module.set_processor(DoubledProcessor()), 0),
        (lambda module: module.set_attention_slice(1), 0),
        (lambda module: setattr(module, "rescale_output_factor", 2.0), 0),
        (lambda module: setattr(module, "norm_k", nn.LayerNorm(8)), 0),
    ],
    ids=["eager", "scale", "own", "sliced", "factor", "norm"],
)
def test_the_processor_of_a_motion_module(
    change: Callable[[Any], Any], calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert calls_of(ANYONE, ANYONE.make(), change, monkeypatch) == calls


@pytest.mark.parametrize("attention", [standin_animatediff, standin_animateanyone])
def test_heads_that_are_too_wide(attention: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module = attention.VersatileAttention(320, 2)
    admit(module, "animatediff", monkeypatch)
    assert vidattn.accelerate(module).skipped[0].reason.startswith("its heads have 160 channels")


def test_frames_that_attend_to_a_text_stay_original(monkeypatch: pytest.MonkeyPatch) -> None:
    model = standin_animatediff.MotionModule(text_channels=12)
    admit(model, "animatediff", monkeypatch)
    arguments = MOTION.arguments() | {"text": torch.randn(2, 7, 12)}
    before = run(model, arguments)
    report = vidattn.accelerate(model)
    assert [row.reason for row in report.skipped] == ["it attends to another sequence"]
    after = run(model, arguments)
    assert_as_before(after, before, None)
    assert after.ops.forward == 1


@pytest.mark.parametrize(
    "more",
    [
        {"attention_mask": torch.randn(1, 1, 4)},
        {"encoder_hidden_states": torch.randn(2, 7, 32)},
    ],
    ids=lambda more: next(iter(more)),
)
def test_other_calls_of_a_motion_module(more: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = MOTION.make().get_submodule("transformer_blocks.0.attention_blocks.0")
    admit(module, "animatediff", monkeypatch)
    arguments = {"hidden_states": torch.randn(8, 6, 32), "video_length": 4, **more}
    before = run(module, arguments, grad=False)
    assert vidattn.accelerate(module).swapped
    after = run(module, arguments, grad=False)
    assert after.ops.forward == 0 and torch.equal(*after.outputs, *before.outputs)
    with pytest.raises(RuntimeError):  # frames that do not divide the batch
        module(torch.randn(7, 6, 32), video_length=4)


def test_other_modes_of_latte_stay_original(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its "flash" computes something else: the heads of the result are not put back."""
    model = standin_latte.Latte(attention_mode="flash")
    admit(model, "latte", monkeypatch)
    report = vidattn.accelerate(model)
    assert not report.swapped and report.skipped[0].reason.startswith("its attention_mode is 'flash'")
    assert calls_of(LATTE, LATTE.make(), _to_flash, monkeypatch) == 0


def _to_flash(module: Any) -> None:
    module.attention_mode = "flash"


def test_dropout_of_the_probabilities_of_latte(monkeypatch: pytest.MonkeyPatch) -> None:
    """Right in the mean; one that drops all, or that a hook looks at, is left to the original."""
    torch.manual_seed(0)
    module: Any = standin_latte.Attention(24, 3, attn_drop=0.4).train()
    admit(module, "latte", monkeypatch)
    x = torch.randn(1, 6, 24).expand(4000, -1, -1)
    with torch.no_grad():
        exact = copy.deepcopy(module).eval()(x[:1])[0]
        assert vidattn.accelerate(module).swapped
        draws = module(x)
        error = (draws.mean(dim=0) - exact).abs() / draws.std(dim=0)
        assert error.max() * 4000**0.5 < 5
        module.attn_drop.register_forward_hook(lambda module, given, out: torch.zeros_like(out))
        assert torch.equal(module(x[:1])[0], module.proj.bias.expand(6, 24))

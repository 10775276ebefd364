"""Window attention modules of repositories with their attention swapped."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import standin_windows as repositories
import torch
from integration_cases import Integration, Ops, Target, admit, spread
from standin_transmorph import WindowAttention
from standin_windows import position_index
from test_integrations_transmorph import REPOSITORY
from torch import Tensor, nn
from torch.nn import functional

import vidattn

DIM, HEADS, WINDOW, TOKENS = 12, 3, (2, 3, 4), 24
WINDOWS = 2  # in a clip


def separating(*windows: int, tokens: int = TOKENS) -> Tensor:
    """A mask (..., N, N) that parts the tokens of each window otherwise."""
    region = torch.randint(0, 2, (*windows, tokens), generator=torch.Generator().manual_seed(3))
    return -100.0 * (region[..., None] != region[..., None, :])


def fragments(windows: int, tokens: int) -> Tensor:
    """Distances between the fragments of each pair of tokens."""
    places = torch.randint(0, 3, (windows, tokens, 3), generator=torch.Generator().manual_seed(4))
    return places[:, :, None] - places[:, None]


class Attended(nn.Module):
    """Attention modules one after the other, each with arguments of its own behind the windows."""

    def __init__(self, *calls: tuple[nn.Module, dict[str, Any]]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(part for part, _ in calls)
        self.given = [arguments for _, arguments in calls]

    def forward(self, x: Tensor) -> Tensor:
        for part, given in zip(self.parts, self.given, strict=True):
            floating = {name: row for name, row in given.items() if isinstance(row, Tensor) and row.is_floating_point()}
            given = {**given, **{name: row.to(x.dtype) for name, row in floating.items()}}
            x = x + part(functional.layer_norm(x, x.shape[-1:]), **given)
        return x


class UpAndDown(nn.Module):
    """An encoder's attention, and a decoder's whose queries are something else."""

    def __init__(self, decoder: type[nn.Module]) -> None:
        super().__init__()
        self.encoder = repositories.nnformer.WindowAttention(DIM, (3, 3, 3), HEADS, proj_drop=0.2)
        self.decoder = decoder(DIM, (3, 3, 3), HEADS, proj_drop=0.2)
        self.register_buffer("mask", separating(WINDOWS, tokens=27))

    def forward(self, x: Tensor) -> Tensor:
        skip = self.encoder(x, mask=self.mask, pos_embed=x.mean(0, keepdim=True))
        return self.decoder(skip, x.flip(0), mask=self.mask)


def vrt() -> nn.Module:
    kind = repositories.vrt.WindowAttention
    masked = {"mask": separating(WINDOWS)}
    return Attended((kind(DIM, WINDOW, HEADS), masked), (kind(DIM, (3, 3, 4), HEADS, mut_attn=False), masked))


def rvrt() -> nn.Module:
    return Attended((repositories.rvrt.WindowAttention(DIM, (3, 3, 4), HEADS), {"mask": separating(WINDOWS)}))


def aurora() -> nn.Module:
    plain = repositories.aurora.WindowAttention(DIM, HEADS, use_lora=False)
    adapted = partial(repositories.aurora.WindowAttention, DIM, HEADS, use_lora=True, drop=0.2)
    masked = {"mask": separating(WINDOWS)}
    return Attended((plain, {}), (adapted(), masked), (adapted(), {"rollout_step": 41}))


def bayesian() -> nn.Module:
    return Attended((repositories.bayesian.WindowAttention(DIM, WINDOW, HEADS), {"mask": separating(WINDOWS)}))


def physicsnemo() -> nn.Module:
    kinds = repositories.physicsnemo
    plain, masked = kinds.EarthAttention3D(DIM, 2, WINDOW, HEADS), kinds.EarthAttention2D(DIM, 2, (6, 4), HEADS, 0.2)
    return Attended((plain, {}), (masked, {"mask": separating(3, 2)}))


def mfai() -> nn.Module:
    kind = repositories.mfai.EarthAttention3D
    plain, masked = {"mask": None, "batch_size": 2}, {"mask": separating(6), "batch_size": 2}
    return Attended((kind(DIM, 2, WINDOW, HEADS), plain), (kind(DIM, 2, WINDOW, HEADS), masked))


def fast_vqa() -> nn.Module:
    kind = repositories.fast_vqa.WindowAttention3D
    resized = {"fmask": fragments(WINDOWS, TOKENS), "resized_window_size": WINDOW, "mask": separating(WINDOWS)}
    by_fragment = {"fmask": fragments(WINDOWS, TOKENS), "mask": separating(2 * WINDOWS)}
    first, second = kind(DIM, (3, 4, 5), HEADS), kind(DIM, WINDOW, HEADS, frag_bias=True, proj_drop=0.2)
    return Attended((first, resized), (second, by_fragment))


def windows(*shape: int) -> dict[str, Any]:
    return {"x": torch.randn(*shape, DIM)}


def target(library: str, model: str, integration: str, build: Callable[[], nn.Module], *shape: int) -> Target:
    names = ("WindowAttention", "WindowAttention_kv", "WindowAttention3D", "EarthAttention3D", "EarthAttention2D")
    return Target(library, model, build, partial(windows, *shape), names, integration, stand_in=True)


TARGETS = [
    target("JingyunLiang/VRT", "VRT", "vrt", vrt, 4, TOKENS),
    target("JingyunLiang/RVRT", "RVRT", "vrt", rvrt, 4, TOKENS),
    target("aurora", "Aurora", "aurora", aurora, 4, TOKENS),
    target(REPOSITORY, "TransMorph-Bayes", "transmorph", bayesian, 4, TOKENS),
    target(
        "282857341/nnFormer",
        "nnFormer, tumor and synapse",
        "nnformer",
        partial(UpAndDown, repositories.nnformer.WindowAttention_kv),
        4,
        27,
    ),
    target(
        "282857341/nnFormer",
        "nnFormer, ACDC",
        "nnformer",
        partial(UpAndDown, repositories.acdc.WindowAttention_kv),
        4,
        27,
    ),
    target("physicsnemo", "Pangu and FengWu", "earth", physicsnemo, 6, 2, TOKENS),
    target("mfai", "PanguWeather", "earth", mfai, 12, TOKENS),
    target("VQAssessment/FAST-VQA-and-FasterVQA", "FAST-VQA and DOVER", "fast_vqa", fast_vqa, 4, TOKENS),
]


@pytest.mark.parametrize("target", TARGETS, ids=str)
class TestTargets(Integration):
    pass


# One module of each class with its arguments behind the windows; attention dropout 0.5 where it has some.
DROPPING = {
    "aurora": ("aurora", partial(repositories.aurora.WindowAttention, DIM, HEADS, use_lora=False, attn_drop=0.5), {}),
    "transmorph": ("transmorph", partial(WindowAttention, DIM, WINDOW, HEADS, rpe=True, attn_drop=0.5), {}),
    "bayesian": ("transmorph", partial(repositories.bayesian.WindowAttention, DIM, WINDOW, HEADS, drop=0.5), {}),
    "nnformer": (
        "nnformer",
        partial(repositories.nnformer.WindowAttention, DIM, (2, 4, 3), HEADS, attn_drop=0.5),
        {},
    ),
    "physicsnemo": (
        "earth",
        partial(repositories.physicsnemo.EarthAttention3D, DIM, 2, WINDOW, HEADS, attn_drop=0.5),
        {},
    ),
    "mfai": (
        "earth",
        partial(repositories.mfai.EarthAttention3D, DIM, 2, WINDOW, HEADS, dropout=0.5),
        {"mask": None, "batch_size": 2},
    ),
    "fast_vqa": (
        "fast_vqa",
        partial(repositories.fast_vqa.WindowAttention3D, DIM, WINDOW, HEADS, frag_bias=True, attn_drop=0.5),
        {"fmask": fragments(2, TOKENS)},
    ),
}


def dropping(name: str, monkeypatch: pytest.MonkeyPatch) -> tuple[nn.Module, Tensor, dict[str, Any]]:
    """Make a module, and the arguments of a call of it."""
    torch.manual_seed(0)
    integration, build, given = DROPPING[name]
    module = spread(build())
    admit(module, integration, monkeypatch)
    x = torch.randn(4, 2, TOKENS, DIM) if name == "physicsnemo" else torch.randn(4, TOKENS, DIM)
    return module, x, given


def called_ops(module: nn.Module, x: Tensor, given: dict[str, Any]) -> tuple[Tensor, int]:
    ops = Ops()
    with ops, torch.no_grad():
        return module(x, **given), ops.forward


@pytest.fixture(autouse=True)
def automatic() -> Iterator[None]:
    previous = vidattn.current_backend()
    vidattn.set_backend("auto")
    yield
    vidattn.set_backend(previous)


@pytest.mark.parametrize("name", DROPPING)
def test_dropped_weights_leave_the_mean(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, x, given = dropping(name, monkeypatch)
    if name == "bayesian":
        module.drop = 0.0  # it drops in evaluation too
        expected = module(x)
        module.drop = 0.5
    else:
        expected = module.eval()(x, **given)
    vidattn.accelerate(module.train(name != "bayesian"))
    runs = []
    for seed in range(200):
        torch.manual_seed(seed)
        out, calls = called_ops(module, x, given)
        assert calls > 0
        runs.append(out)
    torch.manual_seed(0)
    assert torch.equal(called_ops(module, x, given)[0], runs[0]) and not torch.equal(runs[0], runs[1])
    found = torch.stack(runs)
    assert ((found.mean(0) - expected).abs() <= 6 * found.std(0) / len(runs) ** 0.5 + 1e-6).all()


@pytest.mark.parametrize("name", DROPPING)
def test_all_dropped_is_the_originals_business(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, x, given = dropping(name, monkeypatch)
    for part in module.modules():
        for attribute in ("attn_drop", "drop"):
            if isinstance(vars(part).get(attribute), float):
                setattr(part, attribute, 1.0)
        if isinstance(part, nn.Dropout) and part.p > 0:
            part.p = 1.0
    expected = module.train()(x, **given)
    vidattn.accelerate(module)
    out, calls = called_ops(module, x, given)
    assert calls == 0 and torch.equal(out, expected)


@pytest.mark.parametrize("name", [name for name in DROPPING if name != "aurora"])
def test_who_looks_at_the_weights_sees_them(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, x, given = dropping(name, monkeypatch)
    vidattn.accelerate(module.eval())
    seen: list[Tensor] = []
    if name == "bayesian":
        module.drop = 0.0
    expected, calls = called_ops(module, x, given)
    assert calls > 0
    handle = module.softmax.register_forward_hook(lambda _module, _inputs, out: seen.append(out))
    out, calls = called_ops(module, x, given)
    assert calls == 0 and len(seen) == 1 and seen[0].shape[-2:] == (TOKENS, TOKENS)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    handle.remove()
    assert called_ops(module, x, given)[1] > 0


@pytest.mark.parametrize("name", ["aurora", "transmorph", "nnformer", "fast_vqa"])
def test_other_masks_stay_with_the_original(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Learned ones have no gradient in the op, truth values mean something else in each library, shapes may spread."""
    module, x, given = dropping(name, monkeypatch)
    for mask in (separating(2).requires_grad_(), separating(2) == 0, separating(4)[:, :1]):
        arguments = {**given, "mask": mask}
        expected, _ = called_ops(module.eval(), x, arguments)
        with vidattn.accelerate(module):
            out, calls = called_ops(module, x, arguments)
        assert calls == 0 and torch.equal(out, expected)


def test_a_position_index_of_its_own_is_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x, _ = dropping("nnformer", monkeypatch)
    index = module.eval().relative_position_index
    assert len(index.unique()) < len(position_index((2, 4, 3)).unique())  # several distances share a row
    index.copy_(index.flip(0).clone())
    expected = module(x)
    vidattn.accelerate(module)
    out, calls = called_ops(module, x, {})
    assert calls == 1
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["transmorph", "bayesian", "nnformer", "physicsnemo", "mfai", "fast_vqa"])
def test_windows_of_another_size_fail_as_they_did(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, x, given = dropping(name, monkeypatch)
    given = {key: row for key, row in given.items() if key != "fmask"}
    for other in (torch.cat((x, x), -2), x[..., :5, :] if name != "fast_vqa" else torch.cat((x, x[..., :1, :]), -2)):
        with pytest.raises((RuntimeError, ValueError)) as before:
            module(other, **given)
        with vidattn.accelerate(module), pytest.raises(type(before.value), match=re.escape(str(before.value))):
            module(other, **given)


@pytest.mark.parametrize("name", [name for name in DROPPING if name != "aurora"])
def test_a_learned_scale_stays_original(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, _, _ = dropping(name, monkeypatch)
    module.scale = nn.Parameter(torch.ones(()))
    report = vidattn.accelerate(module)
    assert not report.swapped and "no gradient" in report.skipped[0].reason


def test_mfai_leaves_no_old_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x, given = dropping("mfai", monkeypatch)
    module.eval()(x, **given)
    assert module.attention2.shape == (4, HEADS, TOKENS, TOKENS)
    vidattn.accelerate(module)
    assert called_ops(module, x, given)[1] > 0
    assert not hasattr(module, "attention") and not hasattr(module, "attention2")
    module.softmax.register_forward_hook(lambda *_: None)
    module(x, **given)
    assert module.attention2.shape == (4, HEADS, TOKENS, TOKENS)


def test_float16_needs_no_safe_attention_of_aurora(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores past the largest float16 are scores, and not what the original clamps them to."""
    module, x, _ = dropping("aurora", monkeypatch)
    module.use_fp16_safe_attention = True
    with torch.no_grad():
        module.qkv.weight.mul_(300.0)
    exact = module.double().eval()(x.double())
    module.half()
    vidattn.accelerate(module)
    out, calls = called_ops(module, x.half(), {})
    assert calls == 1
    assert (out - exact).abs().max() <= 0.02 * exact.abs().max()


def test_verify_takes_a_model_whose_train_returns_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    class Model(Attended):
        def train(self, mode: bool = True) -> None:  # type: ignore[override]  # as FAST-VQA's
            super().train(mode)

    module, x, given = dropping("fast_vqa", monkeypatch)
    model = Model((module, given))
    assert model.eval() is None
    with vidattn.accelerate(model, verify=x, verify_gradients=True) as report:
        assert len(report.swapped) == 1


def test_a_class_of_that_name_alone_is_unknown() -> None:
    class WindowAttention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(4, 12)

        def forward(self, x: Tensor) -> Tensor:
            return self.qkv(x)

    report = vidattn.accelerate(WindowAttention())
    assert not report.swapped and not report.skipped

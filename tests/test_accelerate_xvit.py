"""The twin of X-ViT's attention: equal to the original in outputs, gradients and training; what it leaves alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_cases import device_of
from torch import Tensor, nn
from twin_cases import assert_same, results
from xvit_cases import tiny

import vidattn
from vidattn.models.xvit import Attention, Block, TemporalShift, make_temporal_shift
from vidattn.nn import FusedMixingAttention

BACKENDS = [name for name in vidattn.list_backends() if not vidattn.why_not("spatial_attention", backend=name)]
backends = pytest.mark.parametrize("backend", BACKENDS)
MODELS: dict[str, dict[str, Any]] = {
    "published": {},
    "average": {"consensus_type": "avg"},
    "identity": {"consensus_type": "identity"},
    "per head": {"shift_per_head": True},
    "two frames to each side": {"shift_window": 2},
    "summary token": {"summary_token": True},
}


def attention(n_div: int = 3, **options: Any) -> Attention:
    """Attention whose keys and values are shifted over four frames."""
    block = Block(24, 3, qkv_bias=True, insert_control_point=True, **options)
    network = nn.Module()
    network.blocks = nn.ModuleList([block])
    make_temporal_shift(network, 4, n_div, [0])
    with torch.no_grad():
        for parameter in block.attn.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)
    return block.attn.eval()


def frames(clips: int = 2) -> Tensor:
    return torch.randn(clips * 4, 5, 24)


def both(module: nn.Module, x: Tensor, backend: str | None = None) -> tuple[list[Tensor], list[Tensor]]:
    """Results with the twin, and those of the original."""
    expected = results(module, x)
    with vidattn.accelerate(module, backend=backend) as report:
        assert report.swapped
        return results(module, x), expected


@backends
@pytest.mark.parametrize("name", MODELS)
def test_models(backend: str, name: str) -> None:
    device = device_of(backend)
    model = tiny(**MODELS[name]).eval().to(device)
    assert_same(*both(model, torch.randn(2, 3, 4, 32, 32, device=device), backend))


@backends
@pytest.mark.parametrize("n_div", [1, 2, 3, 8, 100])
def test_attention(backend: str, n_div: int) -> None:
    device = device_of(backend)
    assert_same(*both(attention(n_div).to(device), frames().to(device), backend))


def _ops_of(module: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Name the functions of the library that a forward pass of the twin calls."""
    called: list[str] = []
    import vidattn.nn.parts
    import vidattn.nn.xvit

    for place, name in ((vidattn.nn.xvit, "space_time_mixing_attention"), (vidattn.nn.parts, "spatial_attention")):
        original = getattr(place, name)
        monkeypatch.setattr(
            place, name, lambda *a, original=original, name=name, **k: (called.append(name), original(*a, **k))[1]
        )
    with vidattn.accelerate(module):
        module(x)
    return called


def test_the_shift_is_found_where_it_was_put(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shifts are swapped in after construction, before or after the module became its twin."""
    module = attention()
    assert _ops_of(module, frames(), monkeypatch) == ["space_time_mixing_attention"]
    late = Block(24, 3, qkv_bias=True, insert_control_point=True).attn.eval()
    assert _ops_of(late, frames(), monkeypatch) == ["spatial_attention"]
    report = vidattn.accelerate(late)
    for place in ("control_point_query", "control_point_value"):
        setattr(late, place, TemporalShift(getattr(late, place), 2, 4))
    actual = late(frames())
    report.revert()
    torch.manual_seed(0)
    assert actual.shape == frames().shape
    x = frames()
    expected = late(x)
    with vidattn.accelerate(late):
        torch.testing.assert_close(late(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("change", ["keys only", "values only", "segments", "a hook", "another module", "a net"])
def test_what_the_op_cannot_do_is_computed_as_before(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = attention()
    keys = module.control_point_query
    seen: list[int] = []
    if change == "keys only":
        module.control_point_value = nn.Identity()
    elif change == "values only":
        module.control_point_query = nn.Identity()
    elif change == "segments":
        module.control_point_value = TemporalShift(nn.Identity(), 2, 3)
    elif change == "a hook":
        keys.register_forward_hook(lambda *_: seen.append(1))
    elif change == "another module":
        module.control_point_query, module.control_point_value = nn.Tanh(), nn.Tanh()
    else:
        module.control_point_query = TemporalShift(nn.Tanh(), 4, 3)
        module.control_point_value = TemporalShift(nn.Tanh(), 4, 3)
    x = frames()
    assert _ops_of(module, x, monkeypatch) == []
    assert_same(*both(module, x))
    assert not seen or len(seen) >= 3


def test_a_watched_dropout_keeps_working(monkeypatch: pytest.MonkeyPatch) -> None:
    module = attention()
    shapes: list[tuple[int, ...]] = []
    handle = module.attn_drop.register_forward_hook(lambda _, inputs, __: shapes.append(tuple(inputs[0].shape)))
    assert _ops_of(module, frames(), monkeypatch) == []
    assert shapes == [(8, 3, 5, 5)]
    handle.remove()
    assert _ops_of(module, frames(), monkeypatch) == ["space_time_mixing_attention"]


def test_dropout_of_probabilities() -> None:
    """Drawn by the op; the share that is kept is the same."""
    module = attention(attn_drop=0.5).train()
    with vidattn.accelerate(module):
        x = frames()
        torch.manual_seed(3)
        first = module(x)
        torch.manual_seed(3)
        assert torch.equal(first, module(x))
        assert not torch.equal(first, module(x))
        mean = torch.stack([module(x) for _ in range(300)]).mean(0)
        module.eval()
        expected = module(x)
    assert (mean - expected).abs().max() < 0.35 * expected.abs().max()


@backends
def test_training_lies_on_the_original(backend: str) -> None:
    """Five steps with stochastic depth and dropout of tokens, from the same seed."""
    losses = []
    for accelerated in (False, True):
        model = tiny(drop_path_rate=0.2, drop_rate=0.1).to(device_of(backend)).train()
        if accelerated:
            vidattn.accelerate(model, backend=backend)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        torch.manual_seed(5)
        video = torch.randn(2, 3, 4, 32, 32).to(device_of(backend))
        losses.append([])
        for _ in range(5):
            loss = nn.functional.cross_entropy(model(video), torch.tensor([1, 3], device=video.device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_state_dict_modes_and_verify() -> None:
    model = tiny().eval()
    names = list(model.state_dict())
    report = vidattn.accelerate(model, verify=torch.randn(1, 3, 4, 32, 32))
    assert list(model.state_dict()) == names
    assert {row.twin for row in report.swapped} == {FusedMixingAttention}
    assert len(report.swapped) == 3  # two blocks and the temporal head
    report.revert()
    assert not any(isinstance(module, FusedMixingAttention) for module in model.modules())


def test_compile() -> None:
    """One graph, the numbers of the original."""
    torch._dynamo.reset()
    model = tiny().eval()
    video = torch.randn(1, 3, 4, 32, 32)
    with torch.no_grad():
        expected = model(video)
        vidattn.accelerate(model)
        actual = torch.compile(model, fullgraph=True, backend="aot_eager")(video)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_autocast() -> None:
    module = attention()
    x = frames()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = module(x)
        with vidattn.accelerate(module):
            actual = module(x)
    assert actual.dtype == expected.dtype == torch.bfloat16
    assert (actual - expected).abs().max() <= 0.03 * expected.abs().max()

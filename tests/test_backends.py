"""Who runs a call: the choice of a backend, strictness, fallback, and the reasons that are given."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import vidattn
from vidattn import backends, installation
from vidattn.backends import AttentionCall, choose_backend

QKV = torch.randn(1, 2, 4, 4, 3, 2, 8)
CALL = AttentionCall("window3d_attention", "cpu", torch.float32, 8)
ON_CUDA = CALL._replace(device_type="cuda")


@pytest.fixture(autouse=True)
def automatic(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start each test from "auto", whatever the environment asks of the others."""
    monkeypatch.delenv("VIDATTN_BUILD_EXT", raising=False)
    vidattn.set_backend("auto")


@pytest.fixture
def fallback_not_warned_about() -> Iterator[None]:
    before = backends._warned_about_fallback
    backends._warned_about_fallback = False
    yield
    backends._warned_about_fallback = before


def _python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    full = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment}
    return subprocess.run([sys.executable, "-c", code], env=full, capture_output=True, text=True, timeout=300)


def test_the_cpu_backend_is_there_when_the_extension_is_built() -> None:
    built = importlib.util.find_spec("vidattn._C") is not None
    for op in ("window3d_attention", "window_attention"):
        reasons = vidattn.why_not(op, backend="cpu")
        assert (not reasons) == built
        assert built or "vidattn._C" in reasons[0]
    assert choose_backend(CALL) == ("cpu" if built else "reference")


def test_names() -> None:
    assert vidattn.list_backends() == ["cpu", "cuda", "triton", "reference"]
    assert vidattn.current_backend() == "auto"


def test_argument_before_context_before_setting() -> None:
    vidattn.set_backend("reference")
    assert choose_backend(CALL) == "reference"
    with vidattn.use_backend("auto"):
        assert vidattn.current_backend() == "auto"
        assert choose_backend(CALL, "reference") == "reference"
        with vidattn.use_backend("reference"):
            assert vidattn.current_backend() == "reference"
        assert vidattn.current_backend() == "auto"
    assert vidattn.current_backend() == "reference"


def test_context_ends_with_an_exception() -> None:
    with pytest.raises(KeyError), vidattn.use_backend("reference"):
        raise KeyError
    assert vidattn.current_backend() == "auto"


def test_named_backends_are_strict() -> None:
    """What cannot run raises, with every reason and with who asked for it."""
    with pytest.raises(
        ValueError, match=r"backend 'triton' cannot run this call: .*runs cuda tensors, got a cpu tensor"
    ):
        vidattn.window3d_attention(QKV, window_size=2, backend="triton")
    with vidattn.use_backend("cuda"), pytest.raises(ValueError, match=r"'cuda' \(chosen by use_backend\) cannot run"):
        vidattn.window3d_attention(QKV, window_size=2)
    vidattn.set_backend("cuda")
    with pytest.raises(ValueError, match=r"'cuda' \(chosen by set_backend\) cannot run"):
        vidattn.window_attention(QKV.flatten(1, 3))


def test_all_reasons_are_given() -> None:
    reasons = vidattn.why_not("window3d_attention", QKV.new_zeros(1, 1, 1, 1, 3, 1, 200), window_size=1, backend="cpu")
    assert any("head dimensions up to 128, got 200" in reason for reason in reasons)
    on_cuda = backends._reasons("window3d_attention", "cpu", ON_CUDA._replace(head_dim=200))
    assert any("runs cpu tensors, got a cuda tensor" in reason for reason in on_cuda)
    assert any("got 200" in reason for reason in on_cuda)


def test_too_wide_heads_fall_back() -> None:
    qkv = torch.randn(1, 2, 2, 2, 3, 1, 130)
    expected = vidattn.window3d_attention(qkv, window_size=2, backend="reference")
    assert torch.equal(vidattn.window3d_attention(qkv, window_size=2), expected)
    with pytest.raises(ValueError, match="up to 128, got 130"):
        vidattn.window3d_attention(qkv, window_size=2, backend="cpu")


def test_why_not() -> None:
    assert vidattn.why_not("window3d_attention", backend="reference") == []
    assert vidattn.why_not(vidattn.window3d_attention, QKV, window_size=2, backend="reference") == []
    assert vidattn.why_not(vidattn.window_attention, backend="cuda") == [
        "this version has no cuda kernels for window_attention"
    ]
    with vidattn.use_backend("cuda"):
        assert vidattn.why_not("window3d_attention", QKV, window_size=2) != []
    meta = QKV.to("meta")
    assert vidattn.why_not("window3d_attention", meta, window_size=2, backend="cpu") == vidattn.why_not(
        "window3d_attention", backend="cpu"
    )


def test_why_not_of_auto_explains_the_fallback() -> None:
    """Empty when some kernel runs the call, else what is wrong with each."""
    wide = torch.zeros(1, 1, 1, 1, 3, 1, 130)
    reasons = vidattn.why_not("window3d_attention", wide, window_size=1)
    assert any(reason.startswith("cpu: ") for reason in reasons)
    assert any(reason.startswith("cuda: ") for reason in reasons)
    narrow = vidattn.why_not("window3d_attention", QKV, window_size=2)
    assert (narrow == []) == (vidattn.why_not("window3d_attention", backend="cpu") == [])


@pytest.mark.parametrize(
    ("message", "arguments", "options"),
    [
        ("why_not: op: expected one of .*window3d_attention.* got flash", ("flash",), {}),
        ("why_not: op: expected one of .* got print", (print,), {}),
        ("why_not: backend: expected one of auto, cpu, .* got 'gpu'", ("window3d_attention",), {"backend": "gpu"}),
        ("window3d_attention: qkv: expected shape", (vidattn.window3d_attention, QKV[0]), {"window_size": 2}),
    ],
)
def test_why_not_errors(message: str, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=message):
        vidattn.why_not(*arguments, **options)


@pytest.mark.parametrize("choose", [vidattn.set_backend, lambda name: vidattn.use_backend(name).__enter__()])
def test_unknown_names(choose: Any) -> None:
    with pytest.raises(ValueError, match=r"expected one of auto, cpu, cuda, triton, reference, got 'gpu'"):
        choose("gpu")
    assert vidattn.current_backend() == "auto"


@pytest.mark.usefixtures("fallback_not_warned_about")
def test_a_cuda_call_that_ends_on_the_reference_warns_once() -> None:
    narrow_enough_for_nobody = ON_CUDA._replace(head_dim=10_000, dtype=torch.float64)
    with pytest.warns(UserWarning, match="no kernel runs this call on cuda, so it takes the reference.* got 10000"):
        assert choose_backend(narrow_enough_for_nobody) == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose_backend(narrow_enough_for_nobody) == "reference"


@pytest.mark.usefixtures("fallback_not_warned_about")
def test_a_cpu_call_that_ends_on_the_reference_warns_once_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backends._kernel_missing, ("window3d_attention", "cpu"), lambda: "it is not built")
    monkeypatch.setattr(backends, "pure_by_choice", lambda: False)
    with warnings.catch_warnings():  # who names a backend, or only asks, is told nothing
        warnings.simplefilter("error")
        assert choose_backend(CALL, "reference") == backends.find_backend(CALL) == "reference"
        with vidattn.use_backend("reference"):
            assert choose_backend(CALL) == "reference"
        assert choose_backend(CALL._replace(device_type="meta", head_dim=10_000)) == "reference"
    with pytest.warns(UserWarning, match="needs much memory .cpu: it is not built. This builds them: ") as caught:
        vidattn.window3d_attention(QKV, window_size=2)
    assert installation.build_command() in str(caught[0].message)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vidattn.window3d_attention(QKV, window_size=2)


@pytest.mark.usefixtures("fallback_not_warned_about")
def test_no_warning_where_nobody_wanted_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backends._kernel_missing, ("window3d_attention", "cpu"), lambda: "it is not built")
    monkeypatch.setenv("VIDATTN_BUILD_EXT", "0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose_backend(CALL) == "reference"
    assert "This builds" not in backends.why_reference(CALL)


@pytest.mark.usefixtures("fallback_not_warned_about")
def test_a_call_that_no_kernel_takes_is_told_why_and_no_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backends._kernel_missing, ("window3d_attention", "cpu"), lambda: None)
    monkeypatch.setattr(backends, "pure_by_choice", lambda: False)
    with pytest.warns(UserWarning, match="up to 128, got 130") as caught:
        choose_backend(CALL._replace(head_dim=130))
    assert "This builds" not in str(caught[0].message)


def test_the_environment_chooses() -> None:
    code = "import vidattn; print(vidattn.current_backend())"
    assert _python(code, VIDATTN_BACKEND="reference").stdout.strip() == "reference"
    assert _python(code, VIDATTN_BACKEND="").stdout.strip() == "auto"
    overruled = "import vidattn\nwith vidattn.use_backend('auto'): print(vidattn.current_backend())"
    assert _python(overruled, VIDATTN_BACKEND="reference").stdout.strip() == "auto"


def test_an_unknown_name_in_the_environment_fails_at_first_use() -> None:
    assert _python("import vidattn", VIDATTN_BACKEND="gpu").returncode == 0
    call = "import torch, vidattn; vidattn.window3d_attention(torch.zeros(1, 1, 1, 1, 3, 1, 8), window_size=1)"
    result = _python(call, VIDATTN_BACKEND="gpu")
    assert result.returncode != 0
    assert "ValueError: VIDATTN_BACKEND: expected one of auto, cpu, cuda, triton, reference, got 'gpu'" in result.stderr


def test_the_environment_is_strict() -> None:
    call = "import torch, vidattn; vidattn.window3d_attention(torch.zeros(1, 1, 1, 1, 3, 1, 8), window_size=1)"
    result = _python(call, VIDATTN_BACKEND="cuda")
    assert "backend 'cuda' (chosen by VIDATTN_BACKEND) cannot run this call" in result.stderr


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.linear = nn.Linear(4, 2)
        self.calls: list[tuple[bool, bool]] = []

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> dict[str, torch.Tensor]:
        y = self.linear(self.norm(x)) * scale
        self.calls.append((torch.is_grad_enabled(), y.requires_grad))
        return {"logits": y, "index": y.argmax(1)}


@pytest.mark.parametrize("batch", [torch.randn(3, 4), (torch.randn(3, 4), 2.0), {"x": torch.randn(3, 4), "scale": 2.0}])
def test_warmup(batch: Any) -> None:
    """It leaves parameters, gradients and batch statistics as they were, in both modes."""
    model = _Model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    vidattn.warmup(model, batch)
    vidattn.warmup(model.eval(), batch)
    assert model.calls == [(True, True), (False, False)]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())

"""Who runs a call: the choice of a backend, strictness, fallback, and the reasons that are given."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import vidattn
from vidattn import backends, installation
from vidattn.backends import AttentionCall, choose_backend
from vidattn.installation import EXTENSION
from vidattn.ops import _library

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
    built = EXTENSION.is_file()
    for op in ("window3d_attention", "window_attention"):
        reasons = vidattn.why_not(op, backend="cpu")
        assert (not reasons) == built
        assert built or "vidattn/_C.so is not built" in reasons[0]
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
    with mock.patch.dict(backends._kernel_missing):
        del backends._kernel_missing["temporal_attention", "cuda"]
        assert vidattn.why_not(vidattn.temporal_attention, backend="cuda") == [
            "this version has no cuda kernels for temporal_attention"
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


# ---- The CUDA kernels ----

ATTEND = vidattn.window3d_attention
WINDOWS = torch.randn(2, 10, 3, 1, 8).half()
DENSE = torch.randn(1, 10, 10)
NO_GRADIENT = "gives no gradient of a dense bias, which this call may need"


@pytest.fixture
def cuda_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the backend "cuda" be judged, though not run, on tensors of the CPU."""
    for op in ("window3d_attention", "window_attention", "spatial_attention", "space_time_mixing_attention"):
        monkeypatch.setitem(backends._kernel_missing, (op, "cuda"), lambda: None)
    monkeypatch.setitem(backends._BACKENDS, "cuda", backends.Backend("cuda", ("cuda", "cpu")))


def _gpu(monkeypatch: pytest.MonkeyPatch, capabilities: list[tuple[int, int]], driver: int, build: str) -> None:
    for name, value in (
        ("is_available", lambda: bool(capabilities)),
        ("device_count", lambda: len(capabilities)),
        ("get_device_capability", lambda index=0: capabilities[index]),
    ):
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: driver, raising=False)
    monkeypatch.setattr(torch.ops.vidattn, "_cuda_build", lambda: build)
    monkeypatch.setattr(_library, "TRITON_INTERPRETED", False)
    for answer in ("_why_not_gpus", "_why_no_triton", "_why_no_triton_on_gpus"):
        monkeypatch.setattr(_library, answer, getattr(_library, answer).__wrapped__)


@pytest.mark.parametrize(
    ("capability", "driver", "build", "reason"),
    [
        ((8, 0), 13000, "13.0", None),
        ((8, 9), 13000, "13.2", None),  # machine code needs the major version alone
        ((9, 0), 14000, "13.2", None),
        ((10, 0), 13020, "13.2", None),
        ((7, 5), 13000, "13.0", "needs a GPU of compute capability 8.0 or later, got 7.5"),
        ((9, 0), 12040, "12.8", None),
        ((9, 0), 12030, "12.8", "needs a driver for CUDA 12.4 or later, got one for 12.3"),  # which cannot unpack it
        ((9, 0), 12080, "13.0", "needs a driver for CUDA 13.0 or later, got one for 12.8"),
        ((12, 0), 13000, "13.2", "needs a driver for CUDA 13.2 or later, got one for 13.0"),
    ],
)
def test_which_gpus_and_drivers_run_the_cuda_kernels(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], driver: int, build: str, reason: str | None
) -> None:
    _gpu(monkeypatch, [capability], driver, build)
    assert _library._cuda_gpu_missing() == reason


def test_each_gpu_is_judged_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    _gpu(monkeypatch, [(7, 5), (9, 0)], 13000, "13.0")
    assert _library._cuda_gpu_missing() is None
    check, call = backends._kernel_check["window3d_attention", "cuda"], ON_CUDA._replace(dtype=torch.float16)
    assert check(call._replace(device_index=1)) == []
    (reason,) = check(call._replace(device_index=0))
    assert "got 7.5" in reason
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "needs an NVIDIA GPU" in str(_library._cuda_gpu_missing())


def test_triton_is_judged_by_the_gpu_of_the_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which of them is the current one does not matter."""
    pytest.importorskip("triton", reason="triton is not installed")
    for capabilities in ([(7, 5), (9, 0)], [(9, 0), (7, 5)]):
        with monkeypatch.context() as patch:
            _gpu(patch, capabilities, 13000, "13.0")
            assert _library._triton_missing() is None
            for op in ("window3d_attention", "temporal_shift"):
                check, call = backends._kernel_check[op, "triton"], ON_CUDA._replace(op=op)
                assert check(call._replace(device_index=capabilities.index((9, 0)))) == []
                (reason,) = check(call._replace(device_index=capabilities.index((7, 5))))
                assert "got 7.5" in reason
    _gpu(monkeypatch, [(7, 5), (7, 0)], 13000, "13.0")
    assert "got 7.5" in str(_library._triton_missing())
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert _library._triton_missing() is None


@pytest.mark.parametrize(("answer", "backend"), [("_why_not_gpus", "cuda"), ("_why_no_triton_on_gpus", "triton")])
def test_compiled_code_takes_the_answers_about_gpus_as_constants(
    monkeypatch: pytest.MonkeyPatch, answer: str, backend: str
) -> None:
    monkeypatch.setattr(_library, answer, lambda: tuple(reversed((None, f"no {sys.platform}"))))
    torch._dynamo.reset()

    def reasons(index: int) -> int:
        call = AttentionCall("window3d_attention", "cuda", torch.float16, 8, index)
        found = backends._kernel_check["window3d_attention", backend]
        count = torch.compile(lambda x: x + len(found(call)), fullgraph=True, backend="eager")
        return int(count(torch.zeros(())))

    assert reasons(1) == 0 and reasons(0) == 1


def test_why_the_cuda_kernels_are_missing_is_told() -> None:
    (reason, *_) = vidattn.why_not("window3d_attention", backend="cuda") or [""]
    if not EXTENSION.is_file():
        assert "vidattn/_C.so is not built" in reason
    elif not torch._C._dispatch_has_kernel_for_dispatch_key("vidattn::_window3d_attention_forward", "CUDA"):
        assert "VIDATTN_BUILD_CUDA" in reason
    elif not torch.cuda.is_available():
        assert reason == "there is no GPU"


@pytest.mark.usefixtures("cuda_on_cpu")
def test_the_limits_of_the_cuda_kernels() -> None:
    def reasons(*shape: int, **options: Any) -> list[str]:
        dtype = options.pop("dtype", torch.bfloat16)
        return vidattn.why_not(ATTEND, torch.zeros(shape, dtype=dtype), **options, backend="cuda")

    assert reasons(1, 8, 14, 14, 3, 2, 64, window_size=(8, 7, 7)) == []
    assert reasons(1, 1, 1, 1, 3, 2, 8, window_size=(30, 30, 30)) == []  # clipped to one token
    assert reasons(1, 12, 10, 10, 3, 1, 8, window_size=(12, 10, 11)) == []
    assert reasons(1, 12, 10, 11, 3, 1, 8, window_size=(13, 11, 12)) == ["runs groups of up to 1200 tokens, got 1320"]
    everything = reasons(1, 12, 10, 11, 3, 1, 72, window_size=16, dropout_p=0.1, dtype=torch.float32)
    assert everything == [
        "runs float16 and bfloat16, got torch.float32",
        "runs head dimensions up to 64, got 72",
        "runs groups of up to 1200 tokens, got 1320",
        "has no dropout, got dropout_p 0.1",
    ]
    plan = (Path(__file__).parent.parent / "csrc" / "cuda" / "plan.h").read_text()
    limits = [re.search(rf"kMax{name} = (\d+)", plan) for name in ("Tokens", "HeadDim", "Sequence", "Ranges")]
    ours = (_library.CUDA_WINDOW, _library._CUDA_HEAD_DIM, _library.CUDA_SEQUENCE, _library._CUDA_RANGES)
    assert tuple(int(limit[1]) for limit in limits if limit) == ours


@pytest.mark.usefixtures("cuda_on_cpu")
def test_the_limits_of_sequences() -> None:
    def reasons(sites: int, **options: Any) -> list[str]:
        qkv = torch.zeros(1, 2 * sites + 1, 3, 1, 8, dtype=torch.bfloat16)
        return vidattn.why_not(vidattn.spatial_attention, qkv, 2, cls_token="mean", **options, backend="cuda")

    assert reasons(399) == []
    assert reasons(400) == ["runs groups of up to 400 tokens, got 401"]
    assert reasons(7, dropout_p=0.1) == ["has no dropout, got dropout_p 0.1"]

    def mixing_reasons(tokens: int, count: int) -> list[str]:
        qkv = torch.zeros(2, tokens, 3, 2, 64, dtype=torch.bfloat16)
        ranges = [(channel, channel + 1, 1) for channel in range(count)]
        return vidattn.why_not(vidattn.space_time_mixing_attention, qkv, 2, channel_shifts=ranges, backend="cuda")

    assert mixing_reasons(400, 64) == []
    assert mixing_reasons(401, 65) == [
        "runs groups of up to 400 tokens, got 401",
        "runs up to 64 ranges of channels, got 65",
    ]


def _dense(bias: torch.Tensor = DENSE, windows: torch.Tensor = WINDOWS) -> list[str]:
    return vidattn.why_not(vidattn.window_attention, windows, bias, backend="cuda")


@pytest.mark.usefixtures("cuda_on_cpu")
def test_a_gradient_that_a_backend_cannot_give_is_known_before_the_forward_pass() -> None:
    learned = DENSE.clone().requires_grad_()
    assert _dense() == _dense(windows=WINDOWS.clone().requires_grad_()) == []
    assert _dense(learned) == [NO_GRADIENT]
    with torch.no_grad():
        assert _dense(learned) == []
    with torch.inference_mode():
        assert _dense(learned) == []
    table = torch.zeros(27, 2, requires_grad=True)
    assert vidattn.why_not(ATTEND, QKV.half(), table, window_size=2, backend="cuda") == []


@pytest.mark.usefixtures("cuda_on_cpu")
def test_where_tensors_hide_it_any_may_need_a_gradient() -> None:
    found: list[list[str]] = []

    def ask(bias: torch.Tensor) -> torch.Tensor:
        found.append(_dense(bias))
        return bias.sum()

    with torch.no_grad():
        torch.func.grad(ask)(DENSE)
        torch.func.vmap(ask)(DENSE[None])
        make_fx(ask)(DENSE)
    assert found == [[NO_GRADIENT]] * 3


@pytest.mark.usefixtures("cuda_on_cpu")
def test_compiled_code_knows_which_gradients_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backends._BACKENDS, "cpu", backends.Backend("cpu", ()))
    monkeypatch.setitem(backends._BACKENDS, "triton", backends.Backend("triton", ()))
    chosen: list[str] = []

    def record(graph: torch.fx.GraphModule, _: Any) -> Any:
        chosen.extend(str(node.args[-1]) for node in graph.graph.nodes if "window_attention" in str(node.target))
        return lambda windows, bias: (windows.sum() * bias.sum(),)

    torch._dynamo.reset()
    attend = torch.compile(lambda windows, bias: vidattn.window_attention(windows, 2 * bias), backend=record)
    learned = DENSE.clone().requires_grad_()
    attend(WINDOWS, DENSE)
    attend(WINDOWS, learned)
    with torch.no_grad():
        attend(WINDOWS, learned)
    assert chosen == ["cuda", "reference", "cuda"]


@pytest.mark.usefixtures("cuda_on_cpu")
def test_auto_tries_cuda_before_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backends._BACKENDS, "cpu", backends.Backend("cpu", ()))
    monkeypatch.setitem(backends._BACKENDS, "triton", backends.Backend("triton", ("cuda", "cpu")))
    monkeypatch.setitem(backends._kernel_missing, ("window3d_attention", "triton"), lambda: None)
    call = CALL._replace(dtype=torch.bfloat16)
    assert choose_backend(call) == "cuda"
    assert choose_backend(call._replace(head_dim=80)) == choose_backend(call._replace(dropout_p=0.5)) == "triton"
    assert choose_backend(CALL._replace(dtype=torch.float64)) == "reference"
    monkeypatch.setitem(backends._kernel_missing, ("spatial_attention", "triton"), lambda: None)
    frame = call._replace(op="spatial_attention", group_tokens=400)
    assert choose_backend(frame) == "cuda"
    assert choose_backend(frame._replace(group_tokens=401)) == "triton"


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

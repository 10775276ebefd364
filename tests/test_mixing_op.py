"""The mixing ops as torch sees them: opcheck, compile, autocast, FLOPs, what is saved, what is refused."""

from __future__ import annotations

import doctest
import importlib
from dataclasses import replace
from typing import Any

import pytest
import torch
from attention_cases import (
    BACKENDS,
    BACKENDS_WITH_DROPOUT,
    FIRST_DTYPES,
    HAS_DROPOUT,
    about,
    device_of,
    evaluate,
    full_precision,
    half_precision,
    single_precision,
    to,
)
from mixing_cases import BACKENDS_THAT_SHIFT, Case
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.utils.flop_counter import FlopCounterMode

import vidattn
from vidattn.ops._tensors import keeps_lse

backends = pytest.mark.parametrize("backend", BACKENDS)
shifting_backends = pytest.mark.parametrize("backend", BACKENDS_THAT_SHIFT)
backends_and_dtypes = pytest.mark.parametrize(("backend", "dtype"), FIRST_DTYPES)
OPCHECKS = (
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_static",
    "test_aot_dispatch_dynamic",
)
CASE = Case(3, 6, heads=2)
OPTIONS = (3, [0, 4, 1, 4, 9, -1], 0.3)


def _shifter(backend: str) -> str:
    """The backend, or the reference if it has no kernel of temporal_shift."""
    return backend if backend in BACKENDS_THAT_SHIFT else "reference"


def _opcheck(op: Any, args: tuple[Any, ...]) -> None:
    results = torch.library.opcheck(op.default, args, test_utils=OPCHECKS)
    assert results == dict.fromkeys(OPCHECKS, "SUCCESS")


@backends_and_dtypes
def test_opcheck(backend: str, dtype: torch.dtype) -> None:
    qkv = to(CASE.inputs(dtype), device_of(backend))["qkv"].requires_grad_()
    seed = torch.tensor([7], device=qkv.device)
    op = torch.ops.vidattn.space_time_mixing_attention
    permuted = qkv.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    for packed in (qkv, permuted, qkv.detach()):
        _opcheck(op, (packed, None, None, None, *OPTIONS, 0.0, backend))
    apart = [x.detach().clone().requires_grad_() for x in qkv.unbind(-3)]
    dropout = (seed, *OPTIONS, 0.25) if HAS_DROPOUT[backend] else (None, *OPTIONS, 0.0)
    _opcheck(op, (*apart, *dropout, backend))


@backends_and_dtypes
def test_opcheck_backward(backend: str, dtype: torch.dtype) -> None:
    inputs = to(CASE.inputs(dtype), device_of(backend))
    apart = tuple(x.contiguous() for x in inputs["qkv"].unbind(-3))
    op = torch.ops.vidattn.space_time_mixing_attention
    backward = torch.ops.vidattn.space_time_mixing_attention_backward
    for tensors in ((inputs["qkv"], None, None, None), (*apart, None)):
        saved = op(*tensors, *OPTIONS, 0.0, backend)
        given = saved if saved[1].numel() > 0 else (None, None)
        for grad in (inputs["grad_out"], inputs["grad_out"].transpose(0, 1).contiguous().transpose(0, 1)):
            _opcheck(backward, (grad, *tensors, *given, *OPTIONS, 0.0, backend))


@shifting_backends
def test_opcheck_shift(backend: str) -> None:
    op = torch.ops.vidattn.temporal_shift
    x = torch.randn(6, 8, 4, 5, device=device_of(backend), requires_grad=True)
    for given in (x, x.detach().to(memory_format=torch.channels_last).requires_grad_(), x.detach().transpose(1, 2)):
        _opcheck(op, (given, 3, [0, 2, 1, 2, 4, -1], 1, backend))


@backends
def test_compile(backend: str) -> None:
    """One graph, forward and backward; the second size makes it dynamic, the third compiles nothing."""
    torch._dynamo.reset()
    counter = CompileCounter()
    dtype, shifter = single_precision(backend), _shifter(backend)

    def attend(qkv: Tensor) -> Tensor:
        shifted = vidattn.temporal_shift(2 * qkv.flatten(2), 3, [(0, 3, 1)], backend=shifter).view(qkv.shape)
        return vidattn.space_time_mixing_attention(shifted, 3, shift_div=4, backend=backend)

    counted = torch.compile(attend, fullgraph=True, backend=counter)
    compiled = torch.compile(attend, fullgraph=True)
    for clips, tokens in ((2, 6), (3, 8), (4, 11)):
        inputs = to(replace(CASE, clips=clips, num_tokens=tokens).inputs(dtype), device_of(backend))
        expected, actual = evaluate(attend, inputs, {}), evaluate(compiled, inputs, {})
        evaluate(counted, inputs, {})
        for name, value in actual.items():
            torch.testing.assert_close(value, expected[name], **about(dtype))
    assert counter.frame_count == 2


@pytest.mark.parametrize("backend", BACKENDS_WITH_DROPOUT)
def test_compile_with_dropout_and_autocast(backend: str) -> None:
    torch._dynamo.reset()
    case = replace(CASE, dropout_p=0.2)

    @torch.compile(fullgraph=True)
    def attend(qkv: Tensor) -> Tensor:
        with torch.autocast(qkv.device.type, dtype=half_precision(backend)):
            return case.function()(qkv, **case.options(), backend=backend)

    results = evaluate(attend, to(case.inputs(torch.float32), device_of(backend)), {})
    assert results["out"].dtype == half_precision(backend)  # type: ignore[union-attr]
    assert all(value is not None and value.isfinite().all() for value in results.values())


@backends
def test_export(backend: str) -> None:
    """Exports with a dynamic number of clips."""

    class Attend(torch.nn.Module):
        def forward(self, qkv: Tensor) -> Tensor:
            return vidattn.space_time_mixing_attention(qkv.flatten(0, 1), 3, shift_div=4, backend=backend)

    def clips(count: int) -> Tensor:
        case = replace(CASE, clips=count)
        return case.inputs(single_precision(backend))["qkv"].unflatten(0, (count, 3)).to(device_of(backend))

    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(Attend(), (clips(2),), dynamic_shapes=({0: batch},))
    torch.testing.assert_close(program.module()(clips(5)), Attend()(clips(5)))


@backends
def test_autocast(backend: str) -> None:
    """q, k and v are cast; the gradient comes back in the input's dtype; a shift casts nothing."""
    device, half = device_of(backend), half_precision(backend)
    qkv = CASE.inputs(torch.float32)["qkv"].to(device).requires_grad_()
    attend, options = CASE.function(), dict(CASE.options(), backend=backend)
    with torch.autocast(device, dtype=half):
        out = attend(qkv, **options)
        apart = attend(tuple(qkv.unbind(-3)), **options)
        if full_precision(backend) == torch.float64:
            assert attend(qkv.double(), **options).dtype == torch.float64
        assert vidattn.temporal_shift(qkv, 3, [(0, 2, 1)], backend=_shifter(backend)).dtype == torch.float32
    assert out.dtype == half
    assert torch.equal(out, attend(qkv.to(half), **options)) and torch.equal(apart, out)
    (grad,) = torch.autograd.grad(out.float().sum(), qkv)
    assert grad.dtype == torch.float32


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_flops(device: str) -> None:
    """Both products of every frame, two operations a multiply-add; two and a half times that backward."""
    qkv = torch.randn(6, 5, 3, 4, 8, device=device, requires_grad=True)
    forward = 2 * 2 * 6 * 4 * 5 * 5 * 8
    for given in (qkv, tuple(qkv.unbind(-3))):
        with FlopCounterMode(display=False) as counter:
            out = vidattn.space_time_mixing_attention(given, 3)
            assert counter.get_total_flops() == forward
            out.sum().backward()
        assert counter.get_total_flops() == forward * 7 // 2


@backends
def test_only_inputs_are_saved(backend: str) -> None:
    """No shifted copy and nothing of N x N survives the forward pass; rows this short seldom need an output."""
    qkv = to(replace(CASE, num_tokens=20).inputs(single_precision(backend)), device_of(backend))["qkv"].requires_grad_()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):  # type: ignore[func-returns-value]
        out = vidattn.space_time_mixing_attention(qkv, 3, backend=backend)
        vidattn.temporal_shift(out, 3, [(0, 2, 1)], backend=_shifter(backend))
    assert saved[0].data_ptr() == qkv.data_ptr()
    outputs = [out.shape, (*out.shape[:2], CASE.heads)] if keeps_lse(20, backend) else []  # the log-sum-exp
    assert [x.shape for x in saved[1:]] == outputs


def test_meta_tensors_compute_shapes() -> None:
    qkv = torch.empty(6, 5, 3, 2, 8, device="meta", dtype=torch.bfloat16, requires_grad=True)
    out = vidattn.space_time_mixing_attention(qkv, 3)
    assert out.is_meta and out.shape == (6, 5, 16) and out.dtype == torch.bfloat16
    shifted = vidattn.temporal_shift(out, 3, [(0, 2, 1)])
    assert shifted.is_meta and shifted.shape == out.shape
    shifted.sum().backward()
    assert qkv.grad is not None and qkv.grad.shape == qkv.shape


QKV = torch.zeros(6, 5, 3, 2, 8)
PARTS = tuple(QKV.unbind(-3))
RANGES = r"channel_shifts: expected ranges \(first, last, frame offset\)"
BAD_SHIFTS: list[tuple[type[Exception], str, Any]] = [
    (TypeError, f"{RANGES}, got 3", 3),
    (TypeError, rf"{RANGES}, got \(0, 4\)", [(0, 4)]),
    (TypeError, r"channel_shifts: expected an integer, got 4\.0", [(0, 4.0, 1)]),
    (ValueError, rf"{RANGES} with 0 <= first <= last <= 16 channels, got \(0, 17, 1\)", [(0, 17, 1)]),
    (ValueError, f"{RANGES} with 0 <= first", [(-1, 4, 1)]),
    (ValueError, f"{RANGES} with 0 <= first", [(5, 4, 1)]),
    (ValueError, rf"{RANGES} that do not overlap, got \(0, 4, 1\) and \(3, 5, -1\)", [(3, 5, -1), (0, 4, 1)]),
]


@pytest.mark.parametrize(
    ("error", "message", "qkv", "options"),
    [
        (ValueError, r"qkv: expected shape \(B \* T, N, 3, h, d\), got \(6, 5, 3, 2\)", QKV[..., 0], {}),
        (TypeError, "qkv: expected a tensor .* or three tensors", PARTS[:2], {}),
        (ValueError, "qkv: expected three tensors of equal shape", (*PARTS[:2], PARTS[2][:, :1]), {}),
        (TypeError, "qkv: expected float32, bfloat16, float16 or float64, got torch.int64", QKV.long(), {}),
        (ValueError, r"qkv: expected B \* num_frames = B \* 4 frames, got 6", QKV, {"num_frames": 4}),
        (ValueError, "num_frames: expected at least 1, got 0", QKV, {"num_frames": 0}),
        (TypeError, r"num_frames: expected an integer, got 3\.0", QKV, {"num_frames": 3.0}),
        (ValueError, "shift_div: expected at least 1, got 0", QKV, {"shift_div": 0}),
        (TypeError, r"shift_div: expected an integer, got 8\.0", QKV, {"shift_div": 8.0}),
        (TypeError, "scale: expected a number", QKV, {"scale": torch.tensor(1.0)}),
        (ValueError, "dropout_p: expected 0 <= dropout_p < 1, got 1.0", QKV, {"dropout_p": 1.0}),
        (ValueError, "backend: expected one of auto, cpu, .* got 'gpu'", QKV, {"backend": "gpu"}),
        *((error, message, QKV, {"channel_shifts": shifts}) for error, message, shifts in BAD_SHIFTS),
    ],
)
def test_errors_of_the_attention(error: type[Exception], message: str, qkv: Any, options: dict[str, Any]) -> None:
    """Every refusal names the function and the argument, then what was expected, then what came."""
    with pytest.raises(error, match=f"space_time_mixing_attention: {message}"):
        vidattn.space_time_mixing_attention(qkv, **{"num_frames": 3, **options})


X = torch.zeros(6, 5, 16)


@pytest.mark.parametrize(
    ("error", "message", "x", "options"),
    [
        (TypeError, r"x: expected a tensor \(B \* T, ...\), got \[1\.0\]", [1.0], {}),
        (ValueError, r"x: expected shape .* got \(6,\)", X[:, 0, 0], {}),
        (TypeError, "x: expected a dense tensor", X.to_sparse(), {}),
        (ValueError, r"x: expected B \* num_frames = B \* 4 frames, got 6", X, {"num_frames": 4}),
        (ValueError, "dim: expected a dimension from 1 to 2 or -2 to -1, got 0", X, {"dim": 0}),
        (ValueError, "dim: expected a dimension from 1 to 2 or -2 to -1, got -3", X, {"dim": -3}),
        (ValueError, "dim: expected a dimension from 1 to 2 or -2 to -1, got 3", X, {"dim": 3}),
        (TypeError, "dim: expected an integer, got None", X, {"dim": None}),
        (ValueError, "backend: expected one of auto, cpu, .* got 'gpu'", X, {"backend": "gpu"}),
        *((error, message, X, {"channel_shifts": shifts}) for error, message, shifts in BAD_SHIFTS),
    ],
)
def test_errors_of_the_shift(error: type[Exception], message: str, x: Any, options: dict[str, Any]) -> None:
    with pytest.raises(error, match=f"temporal_shift: {message}"):
        vidattn.temporal_shift(x, **{"num_frames": 3, "channel_shifts": [(0, 4, 1)], **options})


def test_examples() -> None:
    """The examples of the docstrings run and print what they say."""
    assert doctest.testmod(importlib.import_module("vidattn.ops.mixing")).failed == 0

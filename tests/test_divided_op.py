"""The op of attention over time and over space as torch sees it: opcheck, compile, autocast, FLOPs, what is refused."""

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
from divided_cases import KINDS, SEES_ALL, Case, for_kinds
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.utils.flop_counter import FlopCounterMode

import vidattn
from vidattn.ops._tensors import CUDA_WHOLE_ROW_KEYS, keeps_lse

backends_and_kinds = for_kinds(BACKENDS)
backends_dtypes_and_kinds = for_kinds(FIRST_DTYPES, ("backend", "dtype"))
kinds = pytest.mark.parametrize("kind", KINDS)
OPCHECKS = (
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_static",
    "test_aot_dispatch_dynamic",
)


def _opcheck(op: Any, args: tuple[Any, ...]) -> None:
    results = torch.library.opcheck(op.default, args, test_utils=OPCHECKS)
    assert results == dict.fromkeys(OPCHECKS, "SUCCESS")


def _options(case: Case) -> tuple[Any, ...]:
    """Options of the op, in the order of its schema."""
    temporal_heads = {"temporal": case.heads, "temporal_all": case.heads, "factorized": case.heads // 2}
    cls_token = "all" if case.kind in SEES_ALL else case.kind if case.has_cls else None
    return (case.num_frames, case.token_order, temporal_heads.get(case.kind, 0), cls_token, 0.3, case.dropout_p)


@backends_dtypes_and_kinds
def test_opcheck(backend: str, dtype: torch.dtype, kind: str) -> None:
    case = Case(kind, 3, 4, "hwt")
    qkv = to(case.inputs(dtype), device_of(backend))["qkv"].requires_grad_()
    seed = torch.tensor([7], device=qkv.device)
    op = torch.ops.vidattn.divided_attention
    permuted = qkv.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    for packed in (qkv, permuted, qkv.detach()):
        _opcheck(op, (packed, None, None, None, *_options(case), backend))
    apart = [x.detach().clone().requires_grad_() for x in qkv.unbind(-3)]
    dropout = (seed, *_options(replace(case, dropout_p=0.25))) if HAS_DROPOUT[backend] else (None, *_options(case))
    _opcheck(op, (*apart, *dropout, backend))


@backends_dtypes_and_kinds
def test_opcheck_backward(backend: str, dtype: torch.dtype, kind: str) -> None:
    case = Case(kind, 3, 4, "hwt")
    inputs = to(case.inputs(dtype), device_of(backend))
    op, backward = torch.ops.vidattn.divided_attention, torch.ops.vidattn.divided_attention_backward
    apart = tuple(x.contiguous() for x in inputs["qkv"].unbind(-3))
    for tensors in ((inputs["qkv"], None, None, None), (*apart, None)):
        saved = out, cls, lse = op(*tensors, *_options(case), backend)
        given = saved if lse.numel() > 0 else (None, None, None)
        grad_out = torch.randn_like(out)
        grad_cls = torch.randn_like(cls) if kind == "per_frame" else None
        for grad in (grad_out, grad_out.transpose(0, 1).contiguous().transpose(0, 1)):
            _opcheck(backward, (grad, grad_cls, *tensors, *given, *_options(case), backend))


@backends_and_kinds
def test_compile(backend: str, kind: str) -> None:
    """One graph, forward and backward; the second size makes it dynamic, the third compiles nothing."""
    torch._dynamo.reset()
    counter = CompileCounter()
    case, dtype = Case(kind, 3, 4), single_precision(backend)
    options = dict(case.options(), backend=backend)
    del options["dropout_p"]

    def attend(qkv: Tensor) -> Tensor:
        return case.function()(2 * qkv, **options)

    counted = torch.compile(attend, fullgraph=True, backend=counter)
    compiled = torch.compile(attend, fullgraph=True)
    for batch, sites in ((2, 4), (3, 6), (4, 9)):
        inputs = to(replace(case, batch=batch, num_sites=sites).inputs(dtype), device_of(backend))
        expected, actual = evaluate(attend, inputs, {}), evaluate(compiled, inputs, {})
        evaluate(counted, inputs, {})
        for name, value in actual.items():
            torch.testing.assert_close(value, expected[name], **about(dtype))
    assert counter.frame_count == 2


@for_kinds(BACKENDS_WITH_DROPOUT)
def test_compile_with_dropout_and_autocast(backend: str, kind: str) -> None:
    torch._dynamo.reset()
    case = Case(kind, 3, 4, dropout_p=0.2)
    inputs = to(case.inputs(torch.float32), device_of(backend))

    @torch.compile(fullgraph=True)
    def attend(qkv: Tensor) -> Tensor:
        with torch.autocast(qkv.device.type, dtype=half_precision(backend)):
            return case.function()(qkv, **case.options(), backend=backend)

    results = evaluate(attend, inputs, {})
    assert results["out"].dtype == half_precision(backend)  # type: ignore[union-attr]
    assert all(value is not None and value.isfinite().all() for value in results.values())


@backends_and_kinds
def test_export(backend: str, kind: str) -> None:
    """Exports with a dynamic batch."""
    case, dtype = Case(kind, 3, 4), single_precision(backend)

    class Attend(torch.nn.Module):
        def forward(self, qkv: Tensor) -> Tensor:
            return case.function()(qkv, **case.options(), backend=backend)

    example = case.inputs(dtype)["qkv"].to(device_of(backend))
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(Attend(), (example,), dynamic_shapes=({0: batch},))
    other = replace(case, batch=5).inputs(dtype)["qkv"].to(device_of(backend))
    torch.testing.assert_close(program.module()(other), Attend()(other))


@backends_and_kinds
def test_autocast(backend: str, kind: str) -> None:
    """q, k and v are cast; the gradient comes back in the input's dtype."""
    device, half = device_of(backend), half_precision(backend)
    case = Case(kind, 3, 4)
    qkv = case.inputs(torch.float32)["qkv"].to(device).requires_grad_()
    attend, options = case.function(), dict(case.options(), backend=backend)
    with torch.autocast(device, dtype=half):
        out = attend(qkv, **options)
        apart = attend(tuple(qkv.unbind(-3)), **options)
        if full_precision(backend) == torch.float64:
            assert attend(qkv.double(), **options).dtype == torch.float64
    assert out.dtype == half
    assert torch.equal(out, attend(qkv.to(half), **options)) and torch.equal(apart, out)
    (grad,) = torch.autograd.grad(out.float().sum(), qkv)
    assert grad.dtype == torch.float32


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_flops(device: str) -> None:
    """Both products of every sequence, two operations a multiply-add; two and a half times that backward."""
    batch, frames, sites, heads, head_dim = 2, 3, 5, 4, 8

    def products(sequences: int, length: int, heads: int = heads) -> int:
        return 2 * 2 * batch * sequences * heads * length * length * head_dim

    forward = {
        "temporal": products(sites, frames),
        "spatial": products(frames, sites),
        "mean": products(frames, sites + 1),
        "per_frame": products(frames, sites + 1),
        "factorized": products(sites, frames, heads // 2) + products(frames, sites, heads // 2),
        # of each patch with its sequence and the cls token; of this token with all
        "temporal_all": 4 * batch * heads * head_dim * (15 * (3 + 1) + 16),
        "spatial_all": 4 * batch * heads * head_dim * (15 * (5 + 1) + 16),
    }
    for kind, expected in forward.items():
        case = Case(kind, frames, sites, heads=heads)
        qkv = torch.randn(batch, frames * sites + case.has_cls, 3, heads, head_dim, device=device, requires_grad=True)
        for given in (qkv, tuple(qkv.unbind(-3))):
            with FlopCounterMode(display=False) as counter:
                out = case.function()(given, **case.options())
                assert counter.get_total_flops() == expected
                out.sum().backward()
            assert counter.get_total_flops() == expected * 7 // 2


@backends_and_kinds
def test_only_inputs_are_saved(backend: str, kind: str) -> None:
    """Nothing of N x N, repeated or permuted survives the forward pass; rows this short seldom need an output."""
    case = Case(kind, 4, 20, head_dim=16)
    qkv = to(case.inputs(single_precision(backend)), device_of(backend))["qkv"].requires_grad_()
    saved: list[Tensor] = []
    attend = getattr(vidattn, case.name)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):  # type: ignore[func-returns-value]
        attend(qkv, case.num_frames, **case.options(), backend=backend)
    assert saved[0].data_ptr() == qkv.data_ptr()
    patches, frames = 4 * 20, 4 * (kind in ("mean", "per_frame"))  # rows of contexts, and of those of the cls token
    contexts = patches + frames + (kind == "mean")
    numbers = case.batch * case.heads * (contexts * case.head_dim + patches + frames)  # and the log-sum-exp
    kept = keeps_lse(20, backend, 0 if frames else CUDA_WHOLE_ROW_KEYS)
    assert sum(x.numel() for x in saved[1:]) == (numbers if kept else 0)


@backends_and_kinds
def test_inference_mode_and_no_grad(backend: str, kind: str) -> None:
    case = Case(kind)
    qkv = to(case.inputs(single_precision(backend)), device_of(backend))["qkv"]
    attend, options = case.function(), dict(case.options(), backend=backend)
    expected = attend(qkv, **options)
    with torch.inference_mode():
        assert torch.equal(attend(qkv, **options), expected)
    with torch.no_grad():
        out = attend(qkv.requires_grad_(), **options)
    assert not out.requires_grad and torch.equal(out, expected)


@kinds
def test_meta_tensors_compute_shapes(kind: str) -> None:
    case = Case(kind)
    qkv = torch.empty_like(case.inputs(torch.bfloat16)["qkv"], device="meta").requires_grad_()
    out = case.function()(qkv, **case.options())
    assert out.is_meta and out.dtype == torch.bfloat16
    assert out.shape == case.inputs(torch.bfloat16)["grad_out"].shape
    out.sum().backward()
    assert qkv.grad is not None and qkv.grad.shape == qkv.shape


QKV = torch.zeros(1, 12, 3, 2, 8)
PARTS = tuple(QKV.unbind(-3))


@pytest.mark.parametrize("name", ["temporal_attention", "spatial_attention", "factorized_dot_product_attention"])
@pytest.mark.parametrize(
    ("error", "message", "qkv", "options"),
    [
        (ValueError, r"qkv: expected shape \(B, S, 3, h, d\), got \(1, 12, 3, 2\)", QKV[..., 0], {}),
        (ValueError, r"qkv: expected shape .* got \(1, 12, 2, 2, 8\)", QKV[:, :, :2], {}),
        (TypeError, "qkv: expected a tensor .* or three tensors", PARTS[:2], {}),
        (ValueError, "qkv: expected three tensors of equal shape", (*PARTS[:2], PARTS[2][:, :1]), {}),
        (TypeError, "qkv: expected one dtype", (*PARTS[:2], PARTS[2].double()), {}),
        (TypeError, "qkv: expected float32, bfloat16, float16 or float64, got torch.int64", QKV.long(), {}),
        (ValueError, "qkv: expected num_frames * N = 5 * N tokens, got 12".replace("*", r"\*"), QKV, {"num_frames": 5}),
        (ValueError, "num_frames: expected at least 1, got 0", QKV, {"num_frames": 0}),
        (TypeError, r"num_frames: expected an integer, got 3\.0", QKV, {"num_frames": 3.0}),
        (TypeError, "num_frames: expected an integer, got True", QKV, {"num_frames": True}),
        (ValueError, "token_order: expected one of .* got 'wht'", QKV, {"token_order": "wht"}),
        (TypeError, "scale: expected a number", QKV, {"scale": torch.tensor(1.0)}),
        (ValueError, "dropout_p: expected 0 <= dropout_p < 1, got 1.0", QKV, {"dropout_p": 1.0}),
        (ValueError, "backend: expected one of auto, cpu, .* got 'gpu'", QKV, {"backend": "gpu"}),
    ],
)
def test_errors(name: str, error: type[Exception], message: str, qkv: Any, options: dict[str, Any]) -> None:
    """Every refusal names the function and the argument, then what was expected, then what came."""
    with pytest.raises(error, match=f"{name}: {message}"):
        getattr(vidattn, name)(qkv, **{"num_frames": 3, **options})


@pytest.mark.parametrize(
    ("error", "message", "qkv", "options"),
    [
        (ValueError, "spatial_attention: cls_token: expected one of .* got 'first'", QKV, {"cls_token": "first"}),
        (ValueError, r"spatial_attention: qkv: expected a cls token and .* 1 \+ 3 \* N", QKV, {"cls_token": "mean"}),
        (ValueError, "spatial_attention: qkv: expected a cls token", QKV[:, :1], {"cls_token": "per_frame"}),
    ],
)
def test_errors_of_the_cls_token(error: type[Exception], message: str, qkv: Any, options: dict[str, Any]) -> None:
    with pytest.raises(error, match=message):
        vidattn.spatial_attention(qkv, 3, **options)


@pytest.mark.parametrize("name", ["temporal_attention", "spatial_attention"])
def test_errors_of_the_cls_query(name: str) -> None:
    attend = getattr(vidattn, name)
    with pytest.raises(ValueError, match=rf"{name}: cls_query: expected one of \('own', 'all'\), got 'both'"):
        attend(QKV, 3, cls_query="both")
    with pytest.raises(ValueError, match=rf"{name}: qkv: expected a cls token and .* 1 \+ 3 \* N"):
        attend(QKV, 3, cls_query="all")
    with pytest.raises(ValueError, match=f"{name}: qkv: expected a cls token"):
        attend(QKV[:, :1], 3, cls_query="all")
    for cls_token in ("mean", "per_frame"):
        with pytest.raises(
            ValueError, match=f"spatial_attention: cls_token: expected None with cls_query 'all', got '{cls_token}'"
        ):
            vidattn.spatial_attention(QKV[:, :10], 3, cls_token=cls_token, cls_query="all")


@pytest.mark.parametrize("name", ["temporal_attention", "spatial_attention"])
def test_gpus_refuse_a_cls_query_that_sees_all(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By name with the reason, whatever else may be missing; "auto" leaves it to the reference."""
    attend, qkv, reason = getattr(vidattn, name), QKV[:, :10], "runs cls_query 'own', got 'all'"
    for backend in ("cuda", "triton"):
        monkeypatch.setitem(vidattn.backends._kernel_missing, (name, backend), lambda: None)
        assert reason in vidattn.why_not(name, qkv, 3, cls_query="all", backend=backend)
        assert reason not in vidattn.why_not(name, qkv[:, 1:], 3, backend=backend)
        with pytest.raises(ValueError, match=f"{name}: backend '{backend}' cannot run this call: .*{reason}"):
            attend(qkv, 3, cls_query="all", backend=backend)
    call = vidattn.backends.AttentionCall(name, "cuda", torch.float16, 64)
    with vidattn.use_backend("auto"):
        assert vidattn.backends.find_backend(call) == "cuda"
        assert vidattn.backends.find_backend(call._replace(cls_query="all")) == "reference"


@pytest.mark.parametrize(
    ("error", "message", "qkv", "options"),
    [
        (ValueError, "qkv: expected an even number of heads, .* got 1", QKV[..., :1, :], {}),
        (ValueError, "num_temporal_heads: expected 0 to 2, .* got 3", QKV, {"num_temporal_heads": 3}),
        (ValueError, "num_temporal_heads: expected 0 to 2, .* got -1", QKV, {"num_temporal_heads": -1}),
        (TypeError, r"num_temporal_heads: expected an integer, got 1\.0", QKV, {"num_temporal_heads": 1.0}),
    ],
)
def test_errors_of_the_temporal_heads(error: type[Exception], message: str, qkv: Any, options: dict[str, Any]) -> None:
    with pytest.raises(error, match=f"factorized_dot_product_attention: {message}"):
        vidattn.factorized_dot_product_attention(qkv, 3, **options)


def test_examples() -> None:
    """The examples of the docstrings run and print what they say."""
    assert doctest.testmod(importlib.import_module("vidattn.ops.divided")).failed == 0

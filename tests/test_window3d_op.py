"""The ops as torch sees them: opcheck, torch.compile, autocast, FLOP counts, what is saved, what is refused."""

from __future__ import annotations

import doctest
import importlib
import math
from typing import Any

import pytest
import torch
from attention_cases import (
    BACKENDS,
    BACKENDS_THAT_LEARN_A_DENSE_BIAS,
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
from torch import Tensor
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode
from window3d_cases import Case

import vidattn
from vidattn.ops._tensors import keeps_lse

backends = pytest.mark.parametrize("backend", BACKENDS)
backends_and_dtypes = pytest.mark.parametrize(("backend", "dtype"), FIRST_DTYPES)
SHIFTED = Case((3, 5, 7), (2, 3, 3), (1, 1, 1))
# Rows of the table, types of windows, regions; and the options that go with them.
PLAIN, AS_NEEDED = (None, None, None), (True, (), "before_shift")
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


def _layouts(x: Tensor) -> list[Tensor]:
    """The tensor contiguous, dense but permuted, and with a strided last dimension."""
    permuted = x.detach().movedim(1, -1).contiguous().movedim(-1, 1).requires_grad_(x.requires_grad)
    middle = x.detach().movedim(1, 2).contiguous().movedim(2, 1).requires_grad_(x.requires_grad)
    return [x, middle, permuted]


@backends_and_dtypes
@pytest.mark.parametrize("requires_grad", ["all", "none", "bias_table"])
def test_opcheck_window3d(backend: str, dtype: torch.dtype, requires_grad: str) -> None:
    inputs = to(SHIFTED.inputs(dtype, torch.float32 if dtype.itemsize == 2 else dtype), device_of(backend))
    for name, x in inputs.items():
        x.requires_grad_(requires_grad in ("all", name))
    options = (SHIFTED.window, SHIFTED.shift, SHIFTED.wrap, "prefix", -100.0, 0.3)
    table, pad = inputs["bias_table"], inputs["pad_qkv"]
    seed = torch.tensor([7], device=table.device)
    op = torch.ops.vidattn.window3d_attention
    for qkv in _layouts(inputs["qkv"]):
        _opcheck(op, (qkv, None, None, table, pad, *PLAIN, None, *options, 0.0, *AS_NEEDED, backend))
    apart = [x.detach().clone().requires_grad_(inputs["qkv"].requires_grad) for x in inputs["qkv"].unbind(-3)]
    dropout = (seed, *options, 0.25) if HAS_DROPOUT[backend] else (None, *options, 0.0)
    _opcheck(op, (*apart, table, None, *PLAIN, *dropout, *AS_NEEDED, backend))
    _opcheck(op, (*(_layouts(x)[1] for x in apart), None, pad, *PLAIN, None, *options, 0.0, *AS_NEEDED, backend))
    rows = torch.randint(5, (18, 18), device=table.device)
    types = torch.randint(2, (12,), device=table.device, dtype=torch.int32)
    tables = torch.randn(2, 5, 2, device=table.device)
    tables.requires_grad_(table.requires_grad and backend in BACKENDS_THAT_LEARN_A_DENSE_BIAS)
    _opcheck(op, (inputs["qkv"], None, None, tables, pad, rows, types, None, None, *options, 0.0, *AS_NEEDED, backend))
    if backend in ("reference", "cpu"):
        regions, padding = torch.randint(3, (4, 6, 9)), (True, (0, 1, 1, 0, 1, 1), "after_shift")
        given = (inputs["qkv"], None, None, tables, pad, rows, types[[0] * 12], regions, None)
        _opcheck(op, (*given, *options, 0.0, *padding, backend))


@backends_and_dtypes
def test_opcheck_window3d_backward(backend: str, dtype: torch.dtype) -> None:
    case = Case((2, 3, 4), (2, 2, 3), (0, 1, 1))  # a small one: the op runs a hundred times
    inputs = to(case.inputs(dtype), device_of(backend))
    table, pad = inputs["bias_table"], inputs["pad_qkv"]
    options = (case.window, case.shift, case.wrap, "prefix", -100.0, 0.3, 0.0, *AS_NEEDED)
    apart = tuple(x.contiguous() for x in inputs["qkv"].unbind(-3))
    op = torch.ops.vidattn.window3d_attention_backward
    for tensors in ((inputs["qkv"], None, None, table, pad, *PLAIN, None), (*apart, table, pad, *PLAIN, None)):
        saved = torch.ops.vidattn.window3d_attention(*tensors, *options, backend)
        for grad_out in _layouts(inputs["grad_out"]):
            _opcheck(op, (grad_out, *tensors, *saved, *options, True, True, backend))
        for needs in ((False, True), (False, False)):
            _opcheck(op, (inputs["grad_out"], *tensors, *saved, *options, *needs, backend))
    if backend in BACKENDS_THAT_LEARN_A_DENSE_BIAS:
        rows = torch.randint(5, (12, 12), device=table.device)
        types = torch.randint(2, (4,), device=table.device, dtype=torch.int32)
        tables = torch.randn(2, 5, 2, device=table.device)
        typed = (inputs["qkv"], None, None, tables, pad, rows, types, None, None)
        saved = torch.ops.vidattn.window3d_attention(*typed, *options, backend)
        _opcheck(op, (inputs["grad_out"], *typed, *saved, *options, True, True, backend))
    bare = (inputs["qkv"], *(None,) * 8)
    saved = torch.ops.vidattn.window3d_attention(*bare, *options, backend)
    _opcheck(op, (inputs["grad_out"], *bare, *saved, *options, False, False, backend))


@backends
def test_opcheck_window(backend: str) -> None:
    device, dtype = device_of(backend), single_precision(backend)
    learns = backend in BACKENDS_THAT_LEARN_A_DENSE_BIAS
    qkv = torch.randn(6, 10, 3, 2, 8, dtype=dtype, device=device, requires_grad=True)
    bias = torch.randn(2, 10, 10, device=device, requires_grad=learns)
    mask = torch.randn(3, 10, 10, device=device)
    seed, dropout_p = (torch.tensor([7], device=device), 0.5) if HAS_DROPOUT[backend] else (None, 0.0)
    apart = tuple(x.detach().contiguous() for x in qkv.unbind(-3))
    op, backward = torch.ops.vidattn.window_attention, torch.ops.vidattn.window_attention_backward
    for packed in _layouts(qkv):
        _opcheck(op, (packed, None, None, bias, mask, None, None, 0.3, 0.0, backend))
    types, biases = torch.tensor([1, 0], device=device), torch.randn(2, 2, 10, 10, device=device, requires_grad=learns)
    _opcheck(op, (qkv, None, None, biases, mask, types, None, 0.3, 0.0, backend))
    _opcheck(op, (*apart, None, None, None, seed, 0.3, dropout_p, backend))
    _opcheck(op, (qkv.detach(), None, None, bias, None, None, None, 0.3, 0.0, backend))
    tensors = (qkv.detach(), None, None, bias.detach(), mask, None, seed)
    saved = torch.ops.vidattn.window_attention(*tensors, 0.3, dropout_p, backend)
    for grad_out in _layouts(torch.randn(6, 10, 16, dtype=dtype, device=device)):
        for needs_bias in {learns, False}:
            _opcheck(backward, (grad_out, *tensors, *saved, 0.3, dropout_p, needs_bias, backend))


@backends
def test_compile_window3d(backend: str) -> None:
    """One graph, forward and backward; the second size makes it dynamic, the third compiles nothing."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor")
    options = {k: v for k, v in SHIFTED.options().items() if k != "dropout_p"}

    def attend(qkv: Tensor, bias_table: Tensor, pad_qkv: Tensor) -> Tensor:
        return vidattn.window3d_attention(2 * qkv, bias_table, pad_qkv=pad_qkv, backend=backend, **options)

    compiled = torch.compile(attend, fullgraph=True, backend=counter)
    dtype = single_precision(backend)
    for batch, grid in ((2, (3, 5, 7)), (3, (2, 6, 8)), (4, (4, 7, 9))):
        case = Case(grid, SHIFTED.window, SHIFTED.shift, batch=batch)
        inputs = to(case.inputs(dtype), device_of(backend))
        expected = evaluate(attend, inputs, {})
        actual = evaluate(compiled, inputs, {})
        for name, value in actual.items():
            torch.testing.assert_close(value, expected[name], **about(dtype))
    assert counter.frame_count == 2


@backends
def test_compile_window(backend: str) -> None:
    torch._dynamo.reset()
    counter = CompileCounter()

    def attend(qkv: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
        return vidattn.window_attention(2 * qkv, bias, mask, backend=backend)

    counted = torch.compile(attend, fullgraph=True, backend=counter)
    compiled = torch.compile(attend, fullgraph=True)
    dtype = single_precision(backend)
    for groups, tokens in ((6, 8), (9, 12), (12, 18)):
        qkv = torch.randn(groups, tokens, 3, 2, 8, dtype=dtype, device=device_of(backend))
        inputs = {"qkv": qkv, "grad_out": qkv[:, :, 0].flatten(2)}
        options = {"mask": torch.randn(3, tokens, tokens, device=qkv.device)}
        learned = inputs if backend in BACKENDS_THAT_LEARN_A_DENSE_BIAS else options
        learned["bias"] = torch.randn(2, tokens, tokens, device=qkv.device)
        expected, actual = evaluate(attend, inputs, options), evaluate(compiled, inputs, options)
        evaluate(counted, inputs, options)
        for name, value in actual.items():
            torch.testing.assert_close(value, expected[name], **about(dtype))
    assert counter.frame_count == 2


@pytest.mark.parametrize("backend", BACKENDS_WITH_DROPOUT)
@pytest.mark.parametrize("mask_value", [-math.inf, -1.0])
def test_compile_with_dropout_autocast_and_a_mask_value(backend: str, mask_value: float) -> None:
    torch._dynamo.reset()
    inputs = to(SHIFTED.inputs(torch.float32), device_of(backend))
    options = dict(SHIFTED.options(), mask_value=mask_value, dropout_p=0.2)

    @torch.compile(fullgraph=True)
    def attend(qkv: Tensor, bias_table: Tensor, pad_qkv: Tensor) -> Tensor:
        with torch.autocast(qkv.device.type, dtype=half_precision(backend)):
            return vidattn.window3d_attention(qkv, bias_table, pad_qkv=pad_qkv, backend=backend, **options)

    results = evaluate(attend, inputs, {})
    assert results["out"].dtype == half_precision(backend)  # type: ignore[union-attr]
    assert all(value is not None and value.isfinite().all() for value in results.values())


@backends
def test_compiled_code_follows_the_backend_in_force(backend: str) -> None:
    """``use_backend`` works around a compiled function and inside one."""
    torch._dynamo.reset()
    inputs = to(SHIFTED.inputs(single_precision(backend)), device_of(backend))
    graphs: list[str] = []

    def record(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.extend(str(node.args[-1]) for node in graph.graph.nodes if "window3d_attention" in str(node.target))
        return graph.forward

    @torch.compile(fullgraph=True, backend=record)
    def around(qkv: Tensor) -> Tensor:
        return vidattn.window3d_attention(qkv, window_size=2)

    @torch.compile(fullgraph=True, backend=record)
    def inside(qkv: Tensor) -> Tensor:
        with vidattn.use_backend(backend):
            return vidattn.window3d_attention(qkv, window_size=2)

    with vidattn.use_backend(backend):
        around(inputs["qkv"])
    with vidattn.use_backend("reference"):
        around(inputs["qkv"])
    before = vidattn.current_backend()
    inside(inputs["qkv"])
    assert vidattn.current_backend() == before
    assert graphs == ([backend, "reference", backend] if backend != "reference" else ["reference", "reference"])


@backends
def test_export(backend: str) -> None:
    """Exports with a dynamic batch."""

    class Attend(torch.nn.Module):
        def forward(self, qkv: Tensor) -> Tensor:
            return vidattn.window3d_attention(qkv, window_size=(2, 3, 3), shift_size=1, backend=backend)

    kind = {"dtype": single_precision(backend), "device": device_of(backend)}
    example = torch.randn(2, 3, 5, 7, 3, 2, 8, **kind)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(Attend(), (example,), dynamic_shapes=({0: batch},))
    other = torch.randn(5, 3, 5, 7, 3, 2, 8, **kind)
    torch.testing.assert_close(program.module()(other), Attend()(other))


@backends
def test_autocast(backend: str) -> None:
    """q, k, v and pad_qkv are cast, the table is not; gradients come back in each input's dtype."""
    device, half = device_of(backend), half_precision(backend)
    inputs = to(SHIFTED.inputs(torch.float32), device)
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items() if name != "grad_out"}
    options = dict(SHIFTED.options(), backend=backend)
    with torch.autocast(device, dtype=half):
        out = vidattn.window3d_attention(**leaves, **options)
    assert out.dtype == half
    cast = {name: x.to(half) if name != "bias_table" else x for name, x in leaves.items()}
    same = vidattn.window3d_attention(**cast, **options)
    assert torch.equal(out, same)
    grads = torch.autograd.grad(out, list(leaves.values()), inputs["grad_out"].to(half))
    assert all(grad.dtype == torch.float32 for grad in grads)
    with torch.autocast(device, dtype=half):
        apart = vidattn.window3d_attention(
            tuple(leaves["qkv"].unbind(-3)), leaves["bias_table"], pad_qkv=leaves["pad_qkv"], **options
        )
        if full_precision(backend) == torch.float64:
            wide = vidattn.window3d_attention(inputs["qkv"].double(), window_size=2, backend=backend)
            assert wide.dtype == torch.float64
        windows = vidattn.window_attention(inputs["qkv"].flatten(1, 3), backend=backend)
        kinds = (torch.float16, torch.float32, torch.bfloat16)
        mixed = vidattn.window_attention(
            tuple(x.to(dtype) for x, dtype in zip(inputs["qkv"].flatten(1, 3).unbind(-3), kinds, strict=True)),  # type: ignore[arg-type]
            backend=backend,
        )
    assert torch.equal(apart, out)
    assert windows.dtype == half and mixed.dtype == half


def _attention_flops(tokens: int, windows: int, heads: int, head_dim: int) -> int:
    return 2 * 2 * windows * heads * tokens * tokens * head_dim


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_flops(device: str) -> None:
    """Both products on the padded windows, two operations a multiply-add; two and a half times that backward."""
    qkv = torch.randn(2, 3, 5, 7, 3, 4, 8, device=device, requires_grad=True)
    forward = 2 * _attention_flops(18, 2 * 2 * 3, 4, 8)
    for given in (qkv, tuple(qkv.unbind(-3))):
        with FlopCounterMode(display=False) as counter:
            out = vidattn.window3d_attention(given, window_size=(2, 3, 3), shift_size=1)
            assert counter.get_total_flops() == forward
            out.sum().backward()
        assert counter.get_total_flops() == forward * 7 // 2
    windows = torch.randn(6, 10, 3, 2, 8, device=device, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        vidattn.window_attention(windows).sum().backward()
    assert counter.get_total_flops() == _attention_flops(10, 6, 2, 8) * 7 // 2
    with FlopCounterMode(display=False) as counter:
        vidattn.window3d_attention(qkv[:0], window_size=2)
    assert counter.get_total_flops() == 0


@backends
@pytest.mark.parametrize("window", [(2, 5, 5), (3, 8, 8)], ids=str)
def test_only_what_the_backward_pass_needs_is_saved(backend: str, window: tuple[int, int, int]) -> None:
    """Inputs; context and log-sum-exp where rows are too long to be seen whole; nothing of N x N, padded or rolled."""
    case = Case((3, 8, 8), window, (1, 2, 2), head_dim=16)
    inputs = to(case.inputs(single_precision(backend)), device_of(backend))
    leaves = {name: x.requires_grad_() for name, x in inputs.items() if name != "grad_out"}
    saved: list[Tensor] = []

    def save(x: Tensor) -> Tensor:
        saved.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(save, lambda x: x):
        out = vidattn.window3d_attention(**leaves, **case.options(), backend=backend)
        windows = vidattn.window_attention(leaves["qkv"].flatten(1, 3), backend=backend)
    given = [x.data_ptr() for x in leaves.values()]
    others = [x for x in saved if x.data_ptr() not in given]
    expected = [out.data_ptr()] if keeps_lse(math.prod(window), backend) else []
    expected += [windows.data_ptr()] if keeps_lse(192, backend) else []
    assert [x.data_ptr() for x in others if x.shape[-1] == 32] == expected
    assert [x.shape[-1] for x in others if x.shape[-1] != 32] == [2] * len(expected)  # the log-sum-exp of each


@backends
def test_inference_mode_and_no_grad(backend: str) -> None:
    inputs = to(SHIFTED.inputs(single_precision(backend)), device_of(backend))
    tensors = {name: x for name, x in inputs.items() if name != "grad_out"}
    expected = vidattn.window3d_attention(**tensors, **SHIFTED.options(), backend=backend)
    with torch.inference_mode():
        assert torch.equal(vidattn.window3d_attention(**tensors, **SHIFTED.options(), backend=backend), expected)
    table = tensors["bias_table"].requires_grad_()
    with torch.no_grad():
        out = vidattn.window3d_attention(**{**tensors, "bias_table": table}, **SHIFTED.options(), backend=backend)
    assert not out.requires_grad and torch.equal(out, expected)


def test_meta_tensors_compute_shapes() -> None:
    qkv = torch.empty(2, 3, 5, 7, 3, 2, 8, device="meta", dtype=torch.bfloat16, requires_grad=True)
    out = vidattn.window3d_attention(qkv, window_size=(2, 3, 3), shift_size=1)
    assert out.is_meta and out.shape == (2, 3, 5, 7, 16) and out.dtype == torch.bfloat16
    out.sum().backward()
    assert qkv.grad is not None and qkv.grad.shape == qkv.shape


QKV = torch.zeros(1, 2, 4, 4, 3, 2, 8)
PARTS = tuple(QKV.unbind(-3))
WINDOWS = torch.zeros(6, 10, 3, 2, 8)


@pytest.mark.parametrize(
    ("error", "message", "qkv", "options"),
    [
        (ValueError, r"qkv: expected shape \(B, D, H, W, 3, h, d\), got \(1, 2, 4, 4, 3, 2\)", QKV[..., 0], {}),
        (ValueError, r"qkv: expected shape .* got \(1, 2, 4, 4, 2, 2, 8\)", QKV[..., :2, :, :], {}),
        (TypeError, "qkv: expected a tensor .* or three tensors", PARTS[:2], {}),
        (TypeError, "qkv: expected a tensor .* got None", None, {}),
        (ValueError, "qkv: expected three tensors of equal shape", (*PARTS[:2], PARTS[2][:, :1]), {}),
        (TypeError, "qkv: expected one dtype", (*PARTS[:2], PARTS[2].double()), {}),
        (TypeError, "qkv: expected float32, bfloat16, float16 or float64, got torch.int64", QKV.long(), {}),
        (ValueError, "qkv: expected a head dimension of at least 1", QKV[..., :0], {}),
        (ValueError, "qkv: expected one device", (*PARTS[:2], PARTS[2].to("meta")), {}),
        (TypeError, r"window_size: expected an int or three ints .* got 2\.0", QKV, {"window_size": 2.0}),
        (TypeError, "window_size: expected an int or three ints", QKV, {"window_size": (2, 2, "2")}),
        (ValueError, r"window_size: expected three ints .* got \(2, 2\)", QKV, {"window_size": (2, 2)}),
        (ValueError, "window_size: expected values of at least 1", QKV, {"window_size": (2, 0, 2)}),
        (ValueError, "shift_size: expected values of at least 0", QKV, {"shift_size": (0, -1, 0)}),
        (ValueError, "shift_size: expected each shift smaller than its window", QKV, {"shift_size": 2}),
        (
            ValueError,
            r"bias_table: expected shape .* = \(27, 2\), got \(27, 3\)",
            QKV,
            {"bias_table": torch.zeros(27, 3)},
        ),
        (TypeError, "bias_table: expected a floating dtype", QKV, {"bias_table": torch.zeros(27, 2).long()}),
        (TypeError, "bias_table: expected a tensor", QKV, {"bias_table": 0.5}),
        (ValueError, "bias_table: expected device", QKV, {"bias_table": torch.zeros(27, 2, device="meta")}),
        (ValueError, r"pad_qkv: expected shape .* = \(3, 2, 8\)", QKV, {"pad_qkv": torch.zeros(2, 8)}),
        (ValueError, r"pad_qkv: expected shape .* = \(3, 2, 8\)", QKV, {"pad_qkv": torch.zeros(47)}),
        (TypeError, "pad_qkv: expected a tensor", QKV, {"pad_qkv": [0.0] * 48}),
        (ValueError, "bias_index: expected one of .* got 'full'", QKV, {"bias_index": "full"}),
        (ValueError, "mask_value: expected a finite number or -inf, got nan", QKV, {"mask_value": math.nan}),
        (ValueError, "mask_value: expected a finite number or -inf, got inf", QKV, {"mask_value": math.inf}),
        (TypeError, "mask_value: expected a number", QKV, {"mask_value": None}),
        (TypeError, "wrap: expected a bool or three", QKV, {"wrap": (True, False)}),
        (TypeError, "wrap: expected a bool or three", QKV, {"wrap": 1}),
        (TypeError, "scale: expected a number", QKV, {"scale": torch.tensor(1.0)}),
        (ValueError, "scale: expected a finite number", QKV, {"scale": math.inf}),
        (ValueError, "dropout_p: expected 0 <= dropout_p < 1, got 1.0", QKV, {"dropout_p": 1.0}),
        (ValueError, "dropout_p: expected 0 <= dropout_p < 1, got -0.1", QKV, {"dropout_p": -0.1}),
        (ValueError, "backend: expected one of auto, cpu, .* got 'gpu'", QKV, {"backend": "gpu"}),
    ],
)
def test_errors_of_window3d(error: type[Exception], message: str, qkv: Any, options: dict[str, Any]) -> None:
    """Every refusal names the function and the argument, then what was expected, then what came."""
    with pytest.raises(error, match=f"window3d_attention: {message}"):
        vidattn.window3d_attention(qkv, **{"window_size": 2, **options})


@pytest.mark.parametrize(
    ("error", "message", "qkv", "options"),
    [
        (ValueError, r"qkv: expected shape \(G, N, 3, h, d\)", QKV, {}),
        (ValueError, r"bias: expected shape \(h, N, N\) = \(2, 10, 10\)", WINDOWS, {"bias": torch.zeros(1, 10, 10)}),
        (ValueError, r"mask: expected shape \(nW, N, N\) = \(3, 10, 10\)", WINDOWS, {"mask": torch.zeros(3, 10, 9)}),
        (ValueError, "mask: expected shape", WINDOWS, {"mask": torch.zeros(10, 10)}),
        (ValueError, "multiple of nW, got 4", WINDOWS, {"mask": torch.zeros(4, 10, 10)}),
        (ValueError, "multiple of nW, got 0", WINDOWS, {"mask": torch.zeros(0, 10, 10)}),
        (TypeError, "mask: expected a floating dtype", WINDOWS, {"mask": torch.zeros(3, 10, 10, dtype=torch.bool)}),
        (ValueError, "mask: expected a constant", WINDOWS, {"mask": torch.zeros(3, 10, 10, requires_grad=True)}),
        (TypeError, "mask: expected a tensor", WINDOWS, {"mask": -100.0}),
    ],
)
def test_errors_of_window(error: type[Exception], message: str, qkv: Any, options: dict[str, Any]) -> None:
    with pytest.raises(error, match=f"window_attention: .*{message}"):
        vidattn.window_attention(qkv, **options)


def test_sizes_of_other_types() -> None:
    """Lists, torch.Size and numpy integers are sizes too."""
    numpy = pytest.importorskip("numpy")
    expected = vidattn.window3d_attention(QKV, window_size=(2, 3, 3), shift_size=(1, 1, 1))
    for window in ([2, 3, 3], torch.Size((2, 3, 3)), tuple(numpy.array([2, 3, 3]))):
        assert torch.equal(vidattn.window3d_attention(QKV, window_size=window, shift_size=1), expected)


@pytest.mark.parametrize(
    "module",
    ["vidattn.ops.window3d", "vidattn.ops.window", "vidattn.backends", "vidattn.geometry", "vidattn.accelerate"],
)
def test_examples(module: str) -> None:
    """The examples of the docstrings run and print what they say."""
    assert doctest.testmod(importlib.import_module(module)).failed == 0

"""Plans that are kept from call to call: what they launch is what a plan made anew would, with the same numbers."""

from __future__ import annotations

import contextlib
import gc
import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is not installed")

import torch
import triton
from attention_cases import device_of
from torch import Tensor

import vidattn
from benchmarks import overhead
from benchmarks.mocked_gpu import Launched, MockedGpu, mocked_cuda, mocked_gpu
from vidattn.kernels import launch as launch_module
from vidattn.kernels import plans
from vidattn.kernels.launch import INTERPRETED, Launch, is_table, new_workspace, tensors_in
from vidattn.kernels.window3d_bias import window3d_dense_bias
from vidattn.kernels.window3d_forward import window3d_forward

on_mocked_gpu = pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET is set: the interpreter has no driver")
needs_triton = pytest.mark.needs_triton


@dataclass(frozen=True)
class Call:
    """A call of a public function: shapes of its tensors and its options."""

    function: str
    qkv: tuple[int, ...]
    options: dict[str, Any]
    others: dict[str, tuple[int, ...]] | None = None  # further tensors, by name

    def tensors(self, dtype: torch.dtype = torch.float32, device: str = "cpu") -> dict[str, Tensor]:
        """Draw them."""
        shapes = {"qkv": self.qkv, **(self.others or {})}
        return {name: torch.randn(shape, dtype=dtype, device=device) for name, shape in shapes.items()}

    def run(self, tensors: dict[str, Tensor], **options: Any) -> list[Tensor]:
        """Run it forward and backward; gives the outputs, then the gradients."""
        leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
        qkv, *others = leaves.values()
        torch.manual_seed(5)  # of dropout, and of the gradients
        found = getattr(vidattn, self.function)(
            qkv, **dict(zip(list(leaves)[1:], others)), **{**self.options, "backend": "triton", **options}
        )
        outputs = list(found) if isinstance(found, tuple) else [found]
        grads = [torch.randn(x.shape, dtype=x.dtype, device=x.device) for x in outputs]
        return [*outputs, *torch.autograd.grad(outputs, list(leaves.values()), grads)]


def window_call(grid: tuple[int, ...] = (2, 5, 4), **options: Any) -> Call:
    """A call of ``window3d_attention`` with padding."""
    others = {"bias_table": (3 * 5 * 5, 1), "pad_qkv": (3, 1, 8)}
    return Call("window3d_attention", (1, *grid, 3, 1, 8), {"window_size": (2, 3, 3), **options}, others)


CALLS = {
    "window": window_call(),
    "shifted": window_call(shift_size=(0, 1, 1)),
    "geometric": window_call((1, 5, 3), bias_index="geometric", dropout_p=0.3),
    "infinite": window_call(shift_size=(0, 1, 1), mask_value=-float("inf")),
    "long": Call("window3d_attention", (1, 2, 6, 11, 3, 1, 8), {"window_size": (2, 6, 11)}),
    "partitioned": Call("window_attention", (2, 9, 3, 2, 8), {}, {"bias": (2, 9, 9)}),
    "temporal": Call("temporal_attention", (1, 12, 3, 2, 8), {"num_frames": 3, "token_order": "hwt"}),
    "spatial": Call("spatial_attention", (2, 13, 3, 2, 8), {"num_frames": 3, "cls_token": "mean"}),
    "per_frame": Call("spatial_attention", (1, 13, 3, 2, 8), {"num_frames": 3, "cls_token": "per_frame"}),
    "long_frames": Call("spatial_attention", (1, 131, 3, 1, 8), {"num_frames": 1, "cls_token": "mean"}),
    "factorized": Call("factorized_dot_product_attention", (1, 12, 3, 2, 8), {"num_frames": 3, "dropout_p": 0.2}),
    "shift": Call("temporal_shift", (6, 5, 8), {"num_frames": 3, "channel_shifts": [(0, 2, 1), (2, 4, -1)]}),
    "mixing": Call("space_time_mixing_attention", (6, 5, 3, 2, 8), {"num_frames": 3}),
}


@pytest.fixture
def gpu() -> Iterator[MockedGpu]:
    with mocked_gpu() as mocked:
        yield mocked


@pytest.fixture
def launched(gpu: MockedGpu) -> list[Launched]:
    """What reaches the driver."""
    noted: list[Launched] = []
    gpu.on_launch = noted.append
    return noted


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What is asked of the plans: planner and arguments."""
    asked: list[tuple[Any, ...]] = []
    run = plans.run

    def noting(*request: Any) -> None:
        asked.append(request)
        run(*request)

    monkeypatch.setattr(plans, "run", noting)
    return asked


_run = plans.run


def assert_as_planned_anew(launched: list[Launched], request: tuple[Any, ...]) -> None:
    """Compare what a call launches with what its planner says, but for where its own memory is."""
    planner, *arguments = request
    launched.clear()
    _run(*request)
    found = list(launched)
    launched.clear()
    for launch in planner(*arguments):
        launch.run()
    assert [launch[:3] for launch in found] == [launch[:3] for launch in launched]
    given = {x.untyped_storage().data_ptr() for x in tensors_in(arguments)}
    moved: dict[int, int] = {}
    for one, expected in zip(found, launched, strict=True):
        _compare(one.arguments, expected.arguments, given, moved)
    assert len(set(moved.values())) == len(moved)


def _compare(found: Any, expected: Any, given: set[int], moved: dict[int, int]) -> None:
    if isinstance(expected, tuple):
        assert isinstance(found, tuple) and len(found) == len(expected)
        for inner_found, inner_expected in zip(found, expected):
            _compare(inner_found, inner_expected, given, moved)
        return
    found = found.data_ptr() if isinstance(found, Tensor) else found
    if isinstance(expected, Tensor):
        address = expected.data_ptr()
        if not is_table(expected) and expected.untyped_storage().data_ptr() not in given:
            address = moved.setdefault(address, found)
        expected = address
    assert type(found) is type(expected) and found == expected


# ---- What is launched ----


@on_mocked_gpu
@pytest.mark.parametrize("name", CALLS)
def test_a_warm_call_launches_what_a_new_plan_would(
    name: str, gpu: MockedGpu, launched: list[Launched], requests: list[Any]
) -> None:
    call = CALLS[name]
    call.run(call.tensors())
    compiled, passes = len(gpu.compiled), len(requests)
    alive = call.tensors()
    call.run(call.tensors())  # other values at other addresses
    assert len(plans._plans) == passes and None not in plans._plans.values()
    assert all(kept.arguments is not None for plan in plans._plans.values() for kept in plan.launches)
    for request in requests[passes:]:
        assert_as_planned_anew(launched, request)
    assert len(gpu.compiled) == compiled
    del alive


@on_mocked_gpu
def test_what_decides_a_plan(launched: list[Launched], requests: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call below has a plan of its own, and launches what is right for it."""
    call = window_call(shift_size=(0, 1, 1))
    base = call.tensors()
    call.run(base)

    def forward(tensors: dict[str, Tensor] = base, **options: Any) -> None:
        with torch.no_grad():
            vidattn.window3d_attention(**tensors, **{**call.options, "backend": "triton", **options})

    def other(change: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        return {**base, "qkv": change(base["qkv"])}

    def at(offset: int) -> dict[str, Tensor]:
        """The same tensor, off its alignment."""
        return other(lambda x: x.new_empty(x.numel() + offset)[offset:].view(x.shape).copy_(x))

    wide = base["qkv"].new_empty((*base["qkv"].shape[:-1], 12))
    variants = [
        lambda: forward(at(1)),
        lambda: forward(at(2)),
        lambda: forward(other(lambda x: wide[..., :8].copy_(x))),  # other strides
        lambda: forward(other(lambda x: x.transpose(1, 2).contiguous().transpose(1, 2))),  # one that is copied
        lambda: forward(other(lambda x: x.repeat(2, *[1] * 6))),
        lambda: forward({name: x.half() for name, x in base.items()}),
        lambda: forward({**base, "bias_table": base["bias_table"].half()}),
        lambda: forward({**base, "bias_table": None}),
        lambda: forward({**base, "pad_qkv": None}),
        lambda: forward(scale=0.5),
        lambda: forward(mask_value=-50.0),
        lambda: forward(mask_value=-float("inf")),
        lambda: forward(shift_size=0),
        lambda: forward(shift_size=(0, 0, 1)),
        lambda: forward(wrap=True),
        lambda: forward(dropout_p=0.1),
        lambda: forward(dropout_p=0.2),
    ]
    known = set(plans._plans)
    for number, variant in enumerate(variants):
        variant()
        assert len(plans._plans) == len(known) + number + 1, number
        variant()
        assert len(plans._plans) == len(known) + number + 1, number
        assert_as_planned_anew(launched, requests[-1])
    monkeypatch.setenv("VIDATTN_AUTOTUNE", "0")
    forward()
    assert len(plans._plans) == len(known) + len(variants) + 1
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    forward()
    assert len(plans._plans) == len(known) + len(variants) + 2
    assert_as_planned_anew(launched, requests[-1])
    # Planners run on tensors without memory too: another device.
    planner, window, out, lse = requests[-1]
    meta = window._replace(**{name: x.to("meta") for name, x in window._asdict().items() if isinstance(x, Tensor)})
    plans.run(planner, meta, out.to("meta"), lse.to("meta"))
    assert len(plans._plans) == len(known) + len(variants) + 3


@on_mocked_gpu
def test_one_tensor_in_two_places_decides_nothing(launched: list[Launched], requests: list[Any]) -> None:
    """A plan of a call with q = k = v could not tell which of them an argument is."""
    x, y, z = torch.randn(3, 2, 12, 2, 8).unbind()
    for qkv in ((x, x, x), (x, y, z), (y, y, y), (y, x, y), (z, y, x)):
        with torch.no_grad():
            vidattn.temporal_attention(qkv, 3, backend="triton")
        assert_as_planned_anew(launched, requests[-1])
    assert len(plans._plans) == 1


@on_mocked_gpu
def test_a_planner_that_computes_is_asked_each_time(launched: list[Launched], requests: list[Any]) -> None:
    call = window_call()
    call.run(call.tensors())
    planner, *arguments = requests[0]
    asked: list[float] = []

    def looks(window: Any, *rest: Any) -> Any:
        asked.append(window.bias.sum().item())
        return planner(window, *rest)

    def writes(window: Any, out: Tensor, lse: Tensor) -> Any:
        asked.append(0.0)
        lse.zero_()
        return planner(window, out, lse)

    def views(window: Any, out: Tensor, lse: Tensor) -> Any:
        asked.append(0.0)
        return planner(window, out.flatten(0).view(out.shape), lse)

    def tries(window: Any, *rest: Any) -> Any:
        asked.append(0.0)
        new_workspace(window.q, (5,))  # of a configuration that was not taken
        return planner(window, *rest)

    for computes, times in ((looks, 3), (writes, 3), (views, 1), (tries, 1)):
        asked.clear()
        for _ in range(3):
            plans.run(computes, *arguments)
        assert len(asked) == times
        assert_as_planned_anew(launched, (computes, *arguments))
    *_, plan = plans._plans.values()
    assert len(plan.workspaces) == 1


@on_mocked_gpu
def test_what_is_prepared_is_compiled_but_not_launched(
    gpu: MockedGpu, launched: list[Launched], requests: list[Any]
) -> None:
    call = CALLS["shifted"]
    call.run(call.tensors())
    planner, *arguments = requests[0]
    for function in gpu.functions:
        function.device_caches.pop(gpu.device)
    gpu.compiled.clear()
    launched.clear()
    launches = planner(*arguments)
    for launch in launches:
        launch.prepare()
    assert gpu.compiled == [launch.name for launch in launches] and not launched
    for launch in launches:
        launch.run()
    assert len(gpu.compiled) == len(launched) == len(launches)


# ---- The store ----


@on_mocked_gpu
def test_the_store_is_bounded(gpu: MockedGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "_PLANS_KEPT", 3)
    calls = [window_call((2, 5, width)) for width in (4, 5, 6, 7)]
    with torch.no_grad():
        for width in (0, 1, 2, 0, 3, 0, 1):
            tensors = calls[width].tensors()
            vidattn.window3d_attention(**tensors, **calls[width].options, backend="triton")
    assert [plan.workspaces for plan in plans._plans.values()]
    assert len(plans._plans) == 3
    grids = [next(x for x in key if isinstance(x, torch.Size)) for key in plans._plans]
    assert [grid[3] for grid in grids] == [7, 4, 5]  # the one that was used last comes last


@on_mocked_gpu
def test_nothing_of_a_call_is_kept_alive(gpu: MockedGpu, requests: list[Any]) -> None:
    references: list[weakref.ref[Tensor]] = []
    for call in (CALLS["shifted"], CALLS["long"]):
        for _ in range(2):
            tensors = call.tensors()
            references += [weakref.ref(x) for x in (*tensors.values(), *call.run(tensors))]
    references += [weakref.ref(x) for request in requests for x in tensors_in(request)]
    requests.clear()
    del tensors
    gc.collect()
    assert all(reference() is None for reference in references)
    held = [x for plan in plans._plans.values() for kept in plan.launches for x in tensors_in(kept.launch.arguments)]
    assert held and all(is_table(x) for x in held)


@on_mocked_gpu
def test_a_call_within_a_call_has_workspaces_of_its_own(gpu: MockedGpu) -> None:
    """As two threads, or two streams, would have."""
    call = CALLS["shifted"]
    tensors = call.tensors()

    def forward() -> None:
        with torch.no_grad():
            vidattn.window3d_attention(**tensors, **call.options, backend="triton")

    def addresses(of: list[Launched]) -> set[int]:
        return {of[0].arguments[window3d_dense_bias.arg_names.index("planes")]}

    outer: list[Launched] = []
    inner: list[Launched] = []

    def note(launch: Launched) -> None:
        outer.append(launch)
        if len(outer) == 1:
            gpu.on_launch = inner.append
            forward()
            gpu.on_launch = note

    forward()
    gpu.on_launch = note
    forward()
    assert [x.kernel for x in inner] == [x.kernel for x in outer]
    assert addresses(inner).isdisjoint(addresses(outer))


# ---- Streams, graphs, hooks ----


@on_mocked_gpu
def test_a_warm_call_takes_the_current_stream(gpu: MockedGpu, launched: list[Launched]) -> None:
    call = CALLS["shifted"]
    for stream in (0, 0, 7):
        gpu.stream = stream
        launched.clear()
        call.run(call.tensors())
        assert {launch.stream for launch in launched} == {stream}


def test_calls_run_on_the_device_of_their_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    current = [torch.device("cuda", 0)]

    @contextlib.contextmanager
    def device(chosen: torch.device) -> Iterator[None]:
        current.append(chosen)
        yield
        current.pop()

    x = SimpleNamespace(device=torch.device("cuda", 1))
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1].index)
    monkeypatch.setattr(plans, "_describe", lambda arguments: ([x], [], ["a call"]))
    monkeypatch.setattr(plans, "tensors_in", lambda arguments: iter(()))
    monkeypatch.setattr(plans, "_storage", id)
    monkeypatch.setattr(launch_module, "tensors_in", lambda arguments: iter(arguments.values()))
    ran: list[tuple[str, int]] = []

    class Kernel:
        __name__ = "kernel"

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda **_: ran.append(("run", torch.cuda.current_device()))

        def warmup(self, **_: Any) -> None:
            ran.append(("prepare", torch.cuda.current_device()))

    launch = Launch(Kernel(), 1, {"x": x}, {})
    launch.run()
    launch.prepare()

    def planner(*_: Any) -> list[Launch]:
        ran.append(("plan", torch.cuda.current_device()))
        return [launch]

    plans.run(planner, x)
    assert ran == [("run", 1), ("prepare", 1), ("plan", 1), ("run", 1)]
    plans.forget()


def test_the_memory_of_tables_waits_for_every_stream_and_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded: list[str] = []
    tables: Any = [SimpleNamespace(is_cuda=True, record_stream=recorded.append)] * 2
    used_by_graphs: list[Any] = []
    monkeypatch.setattr(plans, "_used_by_graphs", used_by_graphs)
    streams: set[int | None] = set()

    def hold(stream: int, capturing: bool = False) -> None:
        monkeypatch.setattr(plans, "_current_stream", lambda: stream)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: f"stream {stream}")
        monkeypatch.setattr(plans, "is_capturing", lambda: capturing)
        plans._hold(tables, streams)

    for stream in (1, 1, 2, 1):
        hold(stream)
    assert recorded == ["stream 1"] * 2 + ["stream 2"] * 2
    hold(3, capturing=True)
    assert used_by_graphs == tables and len(recorded) == 4
    hold(3, capturing=True)
    hold(4)
    assert used_by_graphs == tables and len(recorded) == 4  # they are never freed now


@on_mocked_gpu
def test_hooks_see_warm_launches(gpu: MockedGpu, launched: list[Launched], monkeypatch: pytest.MonkeyPatch) -> None:
    call, seen = CALLS["shifted"], []
    call.run(call.tensors())
    expected = [launch.kernel for launch in launched]
    hooks = triton.knobs.runtime.launch_enter_hook
    hooks.add(seen.append)
    try:
        call.run(call.tensors())
    finally:
        hooks.remove(seen.append)
    assert len(seen) == len(expected)
    monkeypatch.setattr(window3d_forward, "pre_run_hooks", [lambda **arguments: seen.append(arguments["out"])])
    outputs = call.run(call.tensors())
    assert len(seen) == len(expected) + 1 and seen[-1].data_ptr() == outputs[0].data_ptr()
    assert [launch.kernel for launch in launched] == expected * 3


# ---- Cost ----


@on_mocked_gpu
def test_python_calls_of_a_warm_call(gpu: MockedGpu, requests: list[Any]) -> None:
    """The number of functions that Python enters, which unlike its time is the same on every machine."""
    call = CALLS["shifted"]
    for _ in range(2):
        call.run(call.tensors())
    *_, forward, backward = requests
    assert _python_calls(lambda: _run(*forward)) <= 40
    assert _python_calls(lambda: _run(*backward)) <= 60
    plans.forget()
    assert _python_calls(lambda: _run(*forward)) > 400


def test_python_calls_of_a_whole_forward_call_of_cuda() -> None:
    qkv, table = torch.randn(1, 4, 4, 4, 3, 1, 8).half(), torch.randn(27, 1)
    with mocked_cuda(), torch.no_grad():

        def attend() -> None:
            vidattn.window3d_attention(qkv, table, window_size=2, shift_size=1, backend="cuda")

        attend()
        assert _python_calls(attend) <= 80


def _python_calls(run: Callable[[], None]) -> int:
    count = 0

    def note(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event == "call"

    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(None)
    return count


@on_mocked_gpu
def test_the_benchmark_times_every_case(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["overhead", "--seconds", "0"])
    overhead.main()
    printed = capsys.readouterr().out
    assert all(printed.count(case) >= 2 for case in overhead.CASES)


# ---- Numbers ----


@needs_triton
@pytest.mark.parametrize("name", CALLS)
def test_a_kept_plan_gives_the_same_bits(name: str) -> None:
    call, device = CALLS[name], device_of("triton")
    first, second = (call.tensors(device=device) for _ in range(2))
    plans.forget()
    expected = call.run(second)
    plans.forget()
    call.run(first)
    passes = len(plans._plans)
    assert passes >= 2 and None not in plans._plans.values()
    for found, right in zip(call.run(second), expected, strict=True):
        assert torch.equal(found, right)
    assert len(plans._plans) == passes


@needs_triton
def test_strided_gradients_are_copied_anew_in_every_call() -> None:
    """Below autograd, contiguous() is one operation, which looks like a view."""
    device = device_of("triton")
    qkv = torch.randn(1, 2, 3, 4, 3, 2, 8, device=device)
    inputs = (qkv, *(None,) * 8)
    options = ((2, 2, 2), (0, 1, 1), (False, False, False), "prefix", -100.0, 0.3, 0.0, True, (), "before_shift")
    backward = torch.ops.vidattn.window3d_attention_backward
    for _ in range(3):
        strided = torch.randn(1, 3, 2, 4, 16, device=device).transpose(1, 2)
        args = (strided, *inputs, None, None, *options, False, False)
        expected, *_ = backward(*args, "reference")
        torch.testing.assert_close(backward(*args, "triton")[0], expected)

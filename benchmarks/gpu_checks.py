"""What proves the kernels on a GPU: small calls of every op, and what is done with them in worker processes.

Each function here is a task: it returns what is worth knowing, or raises. A call that a backend does not run is skipped
with the backend's own reasons.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import vidattn
from benchmarks.gpu_build import ROOT, find_tool
from benchmarks.gpu_steps import Skip
from benchmarks.rounds import largest_error

BACKENDS = ("cuda", "triton")
HALVES = ("bfloat16", "float16")
OPCHECKS = (
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_static",
    "test_aot_dispatch_dynamic",
)
TOOLS = ("memcheck", "racecheck", "synccheck")
TOOL_STATUS = 9  # with which compute-sanitizer ends if it finds something
NO_TOOL = "Device not supported"  # where the machine's isolation keeps it from the GPU


class Check(NamedTuple):
    """A call.

    Attributes:
        function: name of the public function.
        sizes: of its tensors, by argument; "grad_out" is the gradient of the result.
        options: its other arguments; a tuple of numbers under "mask" is the size of a tensor.
        float32: whether it runs in float32 too; that takes the compiler longest.
        integers: tensors of integers, by argument: the number that all are below, and the size.
    """

    function: str
    sizes: dict[str, tuple[int, ...]]
    options: dict[str, Any]
    float32: bool = False
    integers: Mapping[str, tuple[int, tuple[int, ...]]] = MappingProxyType({})

    @property
    def arguments(self) -> dict[str, Any]:
        """The options that are no tensors."""
        return {name: value for name, value in self.options.items() if name != "mask"}


def _windows(
    grid: Any,
    window: Any,
    shift: Any,
    heads: int,
    head_dim: int,
    *,
    table: tuple[int, ...] | None = None,
    options: dict[str, Any] | None = None,
    **more: Any,
) -> Check:
    rows = (2 * window[0] - 1) * (2 * window[1] - 1) * (2 * window[2] - 1)
    sizes = {
        "qkv": (1, *grid, 3, heads, head_dim),
        "bias_table": (rows, heads) if table is None else table,
        "pad_qkv": (3, heads, head_dim),
        "grad_out": (1, *grid, heads * head_dim),
    }
    return Check("window3d_attention", sizes, {"window_size": window, "shift_size": shift, **(options or {})}, **more)


def _divided(name: str, tokens: int, num_frames: int, float32: bool = False, **options: Any) -> Check:
    sizes = {"qkv": (2, tokens, 3, 2, 40), "grad_out": (2, tokens, 80)}
    return Check(f"{name}_attention", sizes, {"num_frames": num_frames, **options}, float32)


def _mixing(tokens: int, head_dim: int = 40, **options: Any) -> Check:
    sizes = {"qkv": (6, tokens, 3, 3, head_dim), "grad_out": (6, tokens, 3 * head_dim)}
    return Check("space_time_mixing_attention", sizes, {"num_frames": 3, **options}, "channel_shifts" in options)


def _shift(*size: int, **options: Any) -> Check:
    options = {"num_frames": 3, "channel_shifts": [(0, 8, 1), (8, 13, -1)], **options}
    return Check("temporal_shift", {"x": size, "grad_out": size}, options, True)


_LISTED = {"qkv": (5, 50, 3, 2, 24), "grad_out": (5, 50, 48)}
CHECKS = {
    "windows_padded": _windows((3, 5, 7), (2, 3, 3), (1, 1, 1), 2, 20, float32=True),  # on every axis
    "windows_1": _windows((2, 3, 5), (1, 1, 1), (0, 0, 0), 2, 64),
    "windows_27": _windows((3, 9, 10), (3, 3, 3), (0, 1, 0), 2, 16),
    "windows_49": _windows((1, 14, 14), (1, 7, 7), (0, 3, 3), 3, 32, float32=True),
    "windows_98": _windows((4, 7, 14), (2, 7, 7), (1, 0, 3), 2, 32),
    "windows_144": _windows((1, 24, 24), (1, 12, 12), (0, 6, 6), 2, 32),
    "windows_196": _windows((4, 14, 14), (4, 7, 7), (0, 3, 3), 2, 64),
    "windows_343": _windows((7, 7, 14), (7, 7, 7), (0, 0, 3), 2, 16),
    "windows_392": _windows((8, 14, 14), (8, 7, 7), (0, 0, 0), 3, 32),
    "windows_392_shifted": _windows((16, 14, 14), (8, 7, 7), (4, 3, 3), 2, 32),
    "windows_512": _windows((8, 8, 16), (8, 8, 8), (0, 0, 4), 1, 48),
    "windows_of_types": _windows(
        (4, 6, 8), (2, 3, 4), (1, 1, 2), 2, 20, table=(3, 105, 2), integers={"window_types": (3, (8,))}
    ),
    "windows_own_index": _windows(
        (4, 6, 8), (2, 3, 4), (1, 1, 2), 2, 20, table=(50, 2), integers={"bias_index": (50, (24, 24))}
    ),
    "windows_not_clipped": _windows((3, 5, 7), (4, 6, 8), (2, 0, 3), 2, 20, options={"clip_window": False}),
    "windows_784": _windows((16, 7, 14), (16, 7, 7), (0, 0, 3), 1, 32),
    "listed_windows_mask": Check(
        "window_attention", {"qkv": (6, 50, 3, 2, 24), "grad_out": (6, 50, 48)}, {"mask": (3, 50, 50)}, True
    ),
    "listed_windows_bias": Check("window_attention", _LISTED | {"bias": (2, 50, 50)}, {}),
    "time_8": _divided("temporal", 8 * 13, 8, True, token_order="hwt"),  # sequences that share a tile
    "time_16": _divided("temporal", 16 * 9, 16, token_order="thw"),
    "time_32": _divided("temporal", 32 * 5, 32, token_order="hwt"),
    "time_96": _divided("temporal", 96 * 3, 96, token_order="hwt"),
    "time_140": _divided("temporal", 140 * 2, 140),  # longer than a tile
    "space_22": _divided("spatial", 1 + 3 * 21, 3, True, token_order="hwt", cls_token="mean"),
    "space_197": _divided("spatial", 1 + 2 * 196, 2, token_order="hwt", cls_token="mean"),
    "space_196": _divided("spatial", 3 * 196, 3, token_order="thw"),
    "half_time_half_space": _divided("factorized_dot_product", 5 * 50, 5, True),
    "mixing_20": _mixing(20, channel_shifts=[(3, 57, 1), (57, 90, -2)]),  # cut anywhere
    "mixing_50": _mixing(50, shift_div=3),  # heads from one frame each
    "mixing_197": _mixing(197, 64, shift_div=8),  # and from several
    "shift": _shift(6, 7, 24),
    "shift_channels_first": _shift(6, 24, 7, dim=1),
}
SMALL = ("windows_padded", "space_22", "mixing_20")  # one of each family, as small as they come
# One of each function; the first is as large as it has to be to reach the kernels of long windows.
ONE_EACH = (
    "windows_392_shifted",
    "listed_windows_mask",
    "time_8",
    "space_22",
    "half_time_half_space",
    "mixing_20",
    "shift",
)
# The same for what takes a call apart many times.
ONE_SMALL_EACH = ("windows_padded", *ONE_EACH[1:])


def dtypes_of(check: str) -> tuple[str, ...]:
    """Name the dtypes that a call is checked in."""
    return (*HALVES, *(("float32",) if CHECKS[check].float32 else ()))


# ---- Calls ----


def make_inputs(check: str, dtype: str, seed: int = 0) -> dict[str, Tensor]:
    """Draw the tensors of a call, on the CPU; masks are float32."""
    generator, given = torch.Generator().manual_seed(seed), CHECKS[check]
    inputs = {
        name: torch.randn(size, generator=generator).to(getattr(torch, dtype)) for name, size in given.sizes.items()
    }
    for name, (below, size) in given.integers.items():
        inputs[name] = torch.randint(below, size, generator=generator)
    mask = given.options.get("mask")
    return inputs if mask is None else {**inputs, "mask": torch.randn(mask, generator=generator)}


def evaluate(function: Callable[..., Tensor], check: str, inputs: dict[str, Tensor], **more: Any) -> dict[str, Tensor]:
    """Run a function forward and backward on the tensors of a call.

    Args:
        function: the public function of the call, or its reference.
        check: name of the call.
        inputs: see ``make_inputs``.
        **more: other arguments.

    Returns:
        The result as "out", and gradients by argument.
    """
    backend = more.get("backend", "reference")
    options = CHECKS[check].arguments | more
    leaves = {name: x.detach().clone() for name, x in inputs.items() if name != "grad_out"}
    learnt = [leaves[name].requires_grad_() for name in _learnt(check, backend)]
    out = function(**leaves, **options)
    # The graph of the float64 reference does not contain pad_qkv where nothing is padded.
    gradients = torch.autograd.grad(out, learnt, inputs["grad_out"], materialize_grads=True)
    return {"out": out.detach(), **dict(zip(_learnt(check, backend), gradients, strict=True))}


def _learnt(check: str, backend: str) -> list[str]:
    """Name the tensors whose gradients are asked for: those that a backend gives."""
    given = CHECKS[check]
    dense = {"bias"} | ({"bias_table"} if given.integers else set())  # which the backend "cuda" has no gradient of
    return [name for name in given.sizes if name != "grad_out" and not (name in dense and backend == "cuda")]


def call_triton(check: str, dtype: str) -> None:
    """Make a call on the CPU by the backend "triton", for its kernels alone."""
    evaluate(getattr(vidattn, CHECKS[check].function), check, make_inputs(check, dtype), backend="triton")


def require(check: str, dtype: str, backend: str, device: str) -> dict[str, Tensor]:
    """Give the tensors of a call on a device; raises ``Skip`` if the backend does not run the call."""
    inputs = {name: x.to(device) for name, x in make_inputs(check, dtype).items()}
    given = CHECKS[check]
    tensors = {name: x for name, x in inputs.items() if name != "grad_out"}
    reasons = vidattn.why_not(given.function, **tensors, **given.arguments, backend=backend)
    if reasons:
        raise Skip("; ".join(reasons))
    return inputs


def _function(check: str) -> Callable[..., Tensor]:
    return getattr(vidattn, CHECKS[check].function)  # type: ignore[no-any-return]


# ---- Tasks ----


def check_conformance(program: Path) -> dict[str, Any]:
    """Compare what the primitives give here with what they give on the emulated GPU."""
    if not program.exists():
        raise Skip(f"{program.name} was not built")
    if importlib.util.find_spec("numpy") is None:
        raise Skip("not installed: numpy")
    from tests.cuda_emulator import conformance

    done = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{program.name} failed: {(done.stderr or done.stdout).strip()[-1000:]}")
    wrong = conformance.compare(conformance.parse(done.stdout), conformance.committed())
    if wrong:
        raise AssertionError("; ".join(wrong))
    return {"primitives": conformance.CASES}


def check_numbers(check: str, dtype: str, backend: str, device: str) -> dict[str, Any]:
    """Hold result and gradients against the float64 reference, by the rule of all tests."""
    from tests.tolerance import assert_all_close

    inputs = make_inputs(check, dtype)
    reference = getattr(vidattn.reference, CHECKS[check].function)
    on_device = require(check, dtype, backend, device)
    actual = {name: x.cpu() for name, x in evaluate(_function(check), check, on_device, backend=backend).items()}
    plain = evaluate(_function(check), check, inputs, backend="reference")
    wide = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
    exact = evaluate(reference, check, wide)
    plain, exact = ({name: found[name] for name in actual} for found in (plain, exact))
    # The CUDA kernels round dP before the bias sums it, as all that see no whole rows.
    assert_all_close(actual, plain, exact, getattr(torch, dtype), whole_rows=backend != "cuda")
    return {name: float(f"{largest_error([actual[name]], [exact[name]]):.2g}") for name in actual}


class _OpsCalled(TorchDispatchMode):
    """Notes the calls of our ops, those forward with tensors that require a gradient if the caller's do."""

    def __init__(self, learnt: Sequence[Tensor]) -> None:
        super().__init__()
        self._learnt = {x.untyped_storage().data_ptr() for x in learnt}
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "vidattn":
            forward = not func._schema.name.endswith("_backward")  # second derivatives are the reference's
            self.calls.append((func, tuple(self._own(x, forward) for x in args)))
        return func(*args, **(kwargs or {}))

    def _own(self, x: Any, forward: bool) -> Any:
        if not isinstance(x, Tensor):
            return x
        return x.detach().clone().requires_grad_(forward and x.untyped_storage().data_ptr() in self._learnt)


def check_ops(check: str, dtype: str, backend: str, device: str) -> dict[str, Any]:
    """Have torch look at the ops that a call is made of, forward and backward."""
    inputs = require(check, dtype, backend, device)
    options = CHECKS[check].arguments
    leaves = {name: x for name, x in inputs.items() if name != "grad_out"}
    learnt = [leaves[name].requires_grad_() for name in _learnt(check, backend)]
    with _OpsCalled(learnt) as called:
        out = _function(check)(**leaves, **options, backend=backend)
        torch.autograd.grad(out, learnt, inputs["grad_out"])
    for op, arguments in called.calls:
        results = torch.library.opcheck(op, arguments, test_utils=OPCHECKS)
        assert results == dict.fromkeys(OPCHECKS, "SUCCESS"), f"{op}: {results}"
    if not called.calls:
        raise AssertionError("the call called no op of ours")
    return {"ops": [op._schema.name for op, _ in called.calls]}


def _assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor], where: str) -> None:
    different = [name for name, x in actual.items() if not torch.equal(x, expected[name])]
    assert not different, f"{where}: {', '.join(different)} are not the same, bit for bit"


def check_graph(check: str, dtype: str, backend: str, device: str) -> None:
    """Capture a call forward and backward in a CUDA graph, and replay it on other numbers."""
    static = require(check, dtype, backend, device)
    others = {name: x.to(device) for name, x in make_inputs(check, dtype, seed=1).items()}
    expected = evaluate(_function(check), check, others, backend=backend)
    leaves = {name: x for name, x in static.items() if name != "grad_out"}
    options = CHECKS[check].arguments
    names = _learnt(check, backend)
    learnt = [leaves[name].requires_grad_() for name in names]

    def call() -> list[Tensor]:
        out = _function(check)(**leaves, **options, backend=backend)
        return [out.detach(), *torch.autograd.grad(out, learnt, static["grad_out"])]

    stream = torch.cuda.Stream()  # what is captured must have run on another stream than the default one
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    for turn in range(2):
        with torch.no_grad():
            for name, x in static.items():
                x.copy_(others[name])
        graph.replay()
        torch.cuda.synchronize()
        _assert_equal(dict(zip(("out", *names), results, strict=True)), expected, f"replay {turn}")


def check_reduce_overhead(check: str, dtype: str, backend: str, device: str) -> None:
    """Train through ``torch.compile(mode="reduce-overhead")``: the same bits as without, for several steps."""
    from torch._dynamo.utils import counters

    require(check, dtype, backend, device)
    torch.compiler.reset()
    counters.clear()
    compiled = torch.compile(_function(check), mode="reduce-overhead", fullgraph=True)

    def step(**given: Any) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return compiled(**given).clone()

    for turn in range(4):  # the graph is recorded in the second
        inputs = {name: x.to(device) for name, x in make_inputs(check, dtype, seed=turn).items()}
        expected = evaluate(_function(check), check, inputs, backend=backend)
        _assert_equal(evaluate(step, check, inputs, backend=backend), expected, f"step {turn}")
    skips = counters["inductor"]["cudagraph_skips"]
    assert not skips, f"torch left CUDA graphs out {skips} times"


def check_streams(check: str, dtype: str, backend: str, device: str) -> None:
    """Make calls on two streams at the same time, with other numbers on each."""
    require(check, dtype, backend, device)
    given = [{name: x.to(device) for name, x in make_inputs(check, dtype, seed).items()} for seed in range(2)]
    expected = [evaluate(_function(check), check, inputs, backend=backend) for inputs in given]
    streams = [torch.cuda.Stream() for _ in given]
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
    found: list[list[dict[str, Tensor]]] = [[], []]
    for _ in range(20):
        for stream, inputs, results in zip(streams, given, found, strict=True):
            with torch.cuda.stream(stream):
                results.append(evaluate(_function(check), check, inputs, backend=backend))
    torch.cuda.synchronize()
    for number, (results, same) in enumerate(zip(found, expected, strict=True)):
        for turn, result in enumerate(results):
            _assert_equal(result, same, f"stream {number}, call {turn}")


def check_memory(tool: str, check: str, backends: Sequence[str], device: str) -> dict[str, Any]:
    """Make a call under a tool of compute-sanitizer, by every backend that runs it."""
    sanitizer = find_tool("compute-sanitizer")
    if sanitizer is None:
        raise Skip("no compute-sanitizer")
    command = [sanitizer, "--tool", tool, "--error-exitcode", str(TOOL_STATUS)]
    # torch probes for features by calls that may fail; those are no errors of the kernels.
    command += ["--report-api-errors", "no"] if tool == "memcheck" else []
    command += [sys.executable, "-m", "benchmarks.gpu_checks", check, "--device", device, "--backends", *backends]
    # Else neighbours in torch's blocks of memory hide overruns.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if NO_TOOL in done.stdout:
        raise Skip(f"compute-sanitizer does not reach the GPU: {NO_TOOL}")
    tail = "\n".join(done.stdout.strip().splitlines()[-12:])
    if done.returncode:
        what = "found something" if done.returncode == TOOL_STATUS else f"ended with exit status {done.returncode}"
        raise AssertionError(f"{tool} {what}: {tail}")
    return {"ran": [line.removeprefix("ran ") for line in tail.splitlines() if line.startswith("ran ")]}


def run_numbers(checks: Sequence[str], backends: Sequence[str], device: str) -> Iterator[str]:
    """Check numbers in bfloat16 by every backend that runs a call, and name those; at least one does."""
    for check in checks:
        ran = 0
        for backend in backends:
            try:
                check_numbers(check, "bfloat16", backend, device)
            except Skip:
                continue
            ran += 1
            yield f"{check} {backend}"
        if not ran:
            raise AssertionError(f"{check}: none of {', '.join(backends)} runs it")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_checks", description="Checks the numbers of calls in this process."
    )
    parser.add_argument("check", nargs="+", choices=sorted(CHECKS))
    parser.add_argument("--backends", nargs="+", default=list(BACKENDS), choices=vidattn.list_backends())
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: on a GPU that is not there")
    options = parser.parse_args(arguments)
    machine: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if options.device == "cpu":
        from benchmarks.mocked_machine import mocked_machine

        machine = mocked_machine()
    with machine:
        for line in run_numbers(options.check, options.backends, options.device):
            print(f"ran {line}", flush=True)


if __name__ == "__main__":
    main()

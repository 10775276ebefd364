"""A machine with a GPU that is not there, to try the programs that need one: right numbers, times without a meaning.

Tensors are those of the CPU. The backends "cuda" and "triton" take the calls that they would take on a GPU, and have
the CPU's kernels compute them. A CUDA graph notes what is done while it is captured, and does it again; streams do one
thing after the other; events are a clock; torch compiles nothing.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import calibration, gpu_timing
from benchmarks.mocked_gpu import MockedGpu
from vidattn import backends
from vidattn.ops import _library, mixing

BACKENDS = ("cuda", "triton")


class Event:
    """In the place of ``torch.cuda.Event``."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.time = time.perf_counter()

    def synchronize(self) -> None:
        """Nothing is under way."""

    def elapsed_time(self, other: Event) -> float:
        return max(1e-4, 1e3 * (other.time - self.time))


class Stream:
    """In the place of ``torch.cuda.Stream``."""

    def wait_stream(self, other: Stream) -> None:
        """Nothing is under way."""


class Graph(TorchDispatchMode):
    """In the place of ``torch.cuda.CUDAGraph``."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._calls.append((func, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        """Do again what was captured, into the same tensors."""
        with torch.no_grad():
            for func, args, kwargs, result in self._calls:
                again = func(*args, **kwargs)
                if not (func.is_view or func._schema.is_mutable):
                    for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                        if isinstance(old, torch.Tensor):
                            old.copy_(new)


class Kernels:
    """In the place of the loops that measure rates: each does so much a second."""

    def __init__(self, library: Any, device: str) -> None:
        assert library.exists() and device == "cpu"

    def measure(self, name: str, blocks: int, **_: Any) -> calibration.Measured:
        return calibration.Measured(fastest=2e-3, mean=4e-3, amount=8e3 * blocks, clock=1e9)


def _choose(choose: Callable[..., str]) -> Callable[..., str]:
    def chosen(call: backends.AttentionCall, backend: str | None = None) -> str:
        name = choose(call, backend)
        compiling = isinstance(triton.runtime.driver._active, MockedGpu)  # whose calls are about their launches
        return "cpu" if name in BACKENDS and not compiling else name

    return chosen


@contextlib.contextmanager
def mocked_machine() -> Iterator[None]:
    """Work on such a machine."""
    no_op = lambda *_: None  # noqa: E731
    of_torch = {
        "Event": Event,
        "Stream": Stream,
        "CUDAGraph": Graph,
        "graph": lambda graph: graph,
        "stream": lambda stream: contextlib.nullcontext(),
        "current_stream": Stream,
        "synchronize": no_op,
        "empty_cache": no_op,
        "reset_peak_memory_stats": no_op,
        "memory_allocated": lambda: 0,
        "max_memory_allocated": lambda: 1 << 20,
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_properties": lambda device: SimpleNamespace(multi_processor_count=132),
    }
    devices = {name: backends._BACKENDS[name]._replace(device_types=("cuda", "cpu")) for name in BACKENDS}
    here = {key: lambda: None for key in backends._kernel_missing if key[1] in BACKENDS}
    patches: list[Any] = [mock.patch.object(torch.cuda, name, fake) for name, fake in of_torch.items()]
    patches += [
        mock.patch.object(torch, "compile", lambda function, **_: function),
        # In this order "auto" finds the GPU's kernels before those of the CPU.
        mock.patch.object(backends, "_BACKENDS", {**devices, **backends._BACKENDS, **devices}),
        mock.patch.dict(backends._kernel_missing, here),
        *(mock.patch.object(module, "choose_backend", _choose(module.choose_backend)) for module in (_library, mixing)),
        mock.patch.multiple(calibration, Kernels=Kernels, BUFFER_BYTES=1 << 12, GEMM_SIZE=16),
        mock.patch.object(gpu_timing, "ROTATED_BYTES", 1.0),
    ]
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        yield

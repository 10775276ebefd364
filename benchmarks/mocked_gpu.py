"""A GPU that is not there: backends do on tensors of the CPU what they do on one; nothing is compiled or launched."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from vidattn import backends
from vidattn.kernels import plans
from vidattn.kernels.launch import TARGETS
from vidattn.ops import _library, window, window3d

__all__ = ["Launched", "MockedGpu", "mocked_cuda", "mocked_gpu"]


class Launched(NamedTuple):
    """What reached the driver.

    Attributes:
        kernel: name of the kernel and number of its compiled variant.
        grid: number of programs.
        stream: where.
        arguments: what the kernel was given, compile-time values included.
    """

    kernel: str
    grid: int
    stream: int
    arguments: tuple[Any, ...]


@dataclass
class MockedGpu:
    """In the place of Triton's driver.

    Attributes:
        stream: the current one.
        on_launch: is told of every launch; None for nobody.
        target: what kernels are compiled for.
        do_compile: the compiler, as a method of kernels; None for none. What it compiles is in Triton's cache, under
            the key that the first launch on a GPU asks for.
        compiled: names of the kernels that were compiled, in order.
    """

    stream: int = 0
    on_launch: Callable[[Launched], None] | None = None
    target: GPUTarget = TARGETS["sm_90"]
    do_compile: Callable[..., Any] | None = None
    compiled: list[str] = field(default_factory=list)
    device: int = 1000  # no GPU that is there has this number, so that no kernel of it is taken
    functions: set[JITFunction] = field(default_factory=set)

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return self.stream

    def get_current_target(self) -> Any:
        return self.target

    def compile(self, function: JITFunction, key: str, *rest: Any) -> Any:
        """Do what ``JITFunction._do_compile`` does; the kernel cannot be launched."""
        if self.do_compile is not None:
            self.do_compile(function, key, *rest)
        self.compiled.append(function.__name__)
        name = f"{function.__name__} {len(self.compiled)}"

        def run(
            grid: int, _y: int, _z: int, stream: int, _function: Any, _packed: Any, data: Any, enter: Any, leave: Any,
            *arguments: Any,
        ) -> None:  # fmt: skip
            if enter is not None:
                enter(data)
            if self.on_launch is not None:
                self.on_launch(Launched(name, grid, stream, arguments))
            if leave is not None:
                leave(data)

        kernel = SimpleNamespace(
            run=run,
            function=len(self.compiled),
            packed_metadata=(),
            metadata=SimpleNamespace(target=self.get_current_target()),
            launch_metadata=lambda *_: None,
        )
        function.device_caches[self.device][0][key] = kernel
        self.functions.add(function)
        return kernel


@contextlib.contextmanager
def mocked_gpu(capability: tuple[int, int] = (9, 0), compiles: bool = False) -> Iterator[MockedGpu]:
    """Let the backend "triton" take tensors of the CPU, with outputs that nobody writes.

    Args:
        capability: compute capability of the GPU.
        compiles: whether to compile what would be launched.
    """
    target = GPUTarget("cuda", 10 * capability[0] + capability[1], 32)
    gpu = MockedGpu(target=target, do_compile=JITFunction._do_compile if compiles else None)
    config = triton.runtime.driver
    before = config._active
    plans.forget()
    with contextlib.ExitStack() as stack:
        for patch in (
            mock.patch.object(JITFunction, "_do_compile", lambda function, *rest: gpu.compile(function, *rest)),
            mock.patch.object(torch.cuda, "get_device_capability", lambda device=None: capability),
            mock.patch.object(_library, "_why_no_triton", lambda: None),
            mock.patch.dict(
                backends._BACKENDS, triton=backends._BACKENDS["triton"]._replace(device_types=("cuda", "cpu"))
            ),
        ):
            stack.enter_context(patch)
        config.set_active(gpu)
        try:
            yield gpu
        finally:
            config._active = before
            plans.forget()
            for function in gpu.functions:
                function.device_caches.pop(gpu.device, None)


@contextlib.contextmanager
def mocked_cuda() -> Iterator[None]:
    """Let the backend "cuda" take tensors of the CPU, with native ops that do nothing."""
    ops = ("_window3d_attention_forward", "_window3d_attention_backward")
    library = torch.library.Library("vidattn_mocked", "DEF")
    for op in ops:
        schema = str(getattr(torch.ops.vidattn, op).default._schema)
        library.define(schema.removeprefix("vidattn::"))
        library.impl(op, lambda *_: None, "CPU")
    natives = [getattr(torch.ops.vidattn_mocked, op).default for op in ops]
    passes = tuple(lambda call, *rest, native=native: native(*call, *rest) for native in natives)
    launch_functions = window3d.launch_functions
    with contextlib.ExitStack() as stack:
        for patch in (
            mock.patch.dict(backends._BACKENDS, cuda=backends._BACKENDS["cuda"]._replace(device_types=("cuda", "cpu"))),
            *(
                mock.patch.object(
                    module, "launch_functions", lambda name: passes if name == "cuda" else launch_functions(name)
                )
                for module in (window3d, window)
            ),
            mock.patch.dict(
                backends._kernel_missing,
                {(op, "cuda"): lambda: None for op in ("window3d_attention", "window_attention")},
            ),
        ):
            stack.enter_context(patch)
        yield
    library._destroy()

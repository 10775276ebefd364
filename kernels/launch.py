"""One kernel launch as a value: run it, compile it ahead of time for a GPU that is not here, or look at its grid."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import ref

import torch
import triton
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

__all__ = [
    "INTERPRETED",
    "TARGETS",
    "Launch",
    "Work",
    "is_capturing",
    "is_table",
    "new_table",
    "new_workspace",
    "record_workspaces",
    "tensors_in",
]

# Decided when triton is imported: its decorators then make functions that run on the CPU, one program after the other.
INTERPRETED = bool(triton.knobs.runtime.interpret)
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
_MAX_GRID = 2**31 - 1  # axis x; the others end at 65,535, so they are not used
_POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float64: "*fp64",
    torch.uint8: "*u8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@dataclass(frozen=True)
class Work:
    """What a launch does at least, for predictions.

    Attributes:
        steps: iterations of the main loop in a program, on average.
        scores_per_step: scores that one iteration computes.
        scores: scores that all programs compute, those that only fill up a tile included. Tiles that a bound may prove
            negligible count as left out.
        flops: operations of the matrix products on these scores.
        bytes: each input read once, each output written once.
    """

    steps: float = 0
    scores_per_step: int = 0
    scores: int = 0
    flops: int = 0
    bytes: int = 0


@dataclass(frozen=True)
class Launch:
    """A kernel with its grid, arguments and launch options.

    Attributes:
        kernel: a ``triton.jit`` function.
        grid: number of programs, all along axis x.
        arguments: values of the kernel's parameters, compile-time ones included.
        options: ``num_warps``, ``num_stages``.
        work: what it costs at least.
    """

    kernel: Any
    grid: int
    arguments: Mapping[str, Any]
    options: Mapping[str, int] = field(default_factory=lambda: {"num_warps": 4, "num_stages": 1})
    work: Work = Work()

    def __post_init__(self) -> None:
        if self.grid > _MAX_GRID:
            raise ValueError(f"{self.name}: expected at most {_MAX_GRID} programs, got {self.grid}")

    @property
    def name(self) -> str:
        """What the kernel is called."""
        return self.kernel.__name__

    def run(self) -> Any:
        """Launch on the current stream of the tensors' device.

        Returns:
            The compiled kernel; None where Triton interprets, or where there is no program.
        """
        if self.grid == 0:
            return None
        with self._on_device():
            return self.kernel[(self.grid,)](**self.arguments, **self.options)

    def prepare(self) -> None:
        """Compile for the tensors' device, unless it has been done, without launching."""
        with self._on_device():
            self.kernel.warmup(**self.arguments, **self.options, grid=(self.grid,))

    def _on_device(self) -> contextlib.AbstractContextManager[Any]:
        device = next(tensors_in(self.arguments)).device
        return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()

    def compile(self, target: GPUTarget) -> Any:
        """Compile as a first launch on ``target`` would.

        Args:
            target: one of ``TARGETS``.

        Returns:
            What ``triton.compile`` gives: ``asm``, ``metadata``.
        """
        return triton.compile(self.source(), target=target, options=dict(self.options))

    def source(self) -> ASTSource:
        """Specialise the kernel as a first launch would, by the types, alignment and divisibility of the arguments."""
        signature: dict[str, Any] = {}
        constants: dict[tuple[int, ...], Any] = {}
        attributes: dict[tuple[int, ...], list[list[Any]]] = {}
        for parameter in self.kernel.params:
            value, place = self.arguments[parameter.name], (parameter.num,)
            if parameter.is_constexpr:
                signature[parameter.name], constants[place] = "constexpr", value
            else:
                specialised = not parameter.do_not_specialize
                signature[parameter.name] = _specialise(value, place, specialised, constants, attributes)
        return ASTSource(self.kernel, signature, constants, attributes)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Go through the tensors of nested arguments."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list, Mapping)):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from tensors_in(inner)


def _specialise(
    value: Any,
    place: tuple[int, ...],
    specialised: bool,
    constants: dict[tuple[int, ...], Any],
    attributes: dict[tuple[int, ...], list[list[Any]]],
) -> Any:
    """Give the type of an argument, or those of a tuple's elements; note what the compiler may know of its value."""
    if isinstance(value, tuple):  # a NamedTuple keeps its class, for its names; its elements are always specialised
        kinds = [_specialise(part, (*place, i), True, constants, attributes) for i, part in enumerate(value)]
        return type(value)(*kinds) if hasattr(value, "_fields") else tuple(kinds)
    if value is None or (specialised and type(value) is int and value == 1):
        constants[place] = value
        return "constexpr"
    if isinstance(value, Tensor):
        kind = _POINTERS[value.dtype]
        aligned = value.data_ptr() % 16 == 0  # without memory the address is the offset in it
    elif isinstance(value, float):
        kind, aligned = "fp32", False
    else:
        kind = "i32" if -(2**31) <= value < 2**31 else "i64"
        aligned = specialised and value % 16 == 0
    if aligned:
        attributes[place] = [["tt.divisibility", 16]]
    return kind


_recording = threading.local()
_tables = WeakIdKeyDictionary()


def new_workspace(like: Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Allocate what launches of one plan hand to each other, on the device of ``like``; nothing is written yet."""
    workspace = like.new_empty(shape, dtype=dtype)
    recorded = getattr(_recording, "workspaces", None)
    if recorded is not None:
        recorded.append(ref(workspace))
    return workspace


@contextlib.contextmanager
def record_workspaces() -> Iterator[list[ref[Tensor]]]:
    """Collect the workspaces that this thread allocates; those of launches that were only tried may be gone."""
    outer = getattr(_recording, "workspaces", None)
    _recording.workspaces = []
    try:
        yield _recording.workspaces
    finally:
        _recording.workspaces = outer


def new_table(values: Tensor, device: torch.device) -> Tensor:
    """Bring what shapes alone decide to a device, in int32, for any number of calls; it is there when this returns."""
    table = values.to(torch.int32).to(device)  # the memory is not pinned, so this waits for the copy
    _tables[table] = True
    return table


def is_table(value: Any) -> bool:
    """Tell whether something is a tensor that ``new_table`` made."""
    return isinstance(value, Tensor) and value in _tables


def is_capturing() -> bool:
    """Tell whether the current stream is being captured into a CUDA graph."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()

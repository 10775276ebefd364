"""An emulated GPU: the CUDA sources of csrc/cuda, compiled by g++, run on CPU tensors and are checked as they run.

    import tests.cuda_emulator
    tests.cuda_emulator.install()
    vidattn.window3d_attention(qkv.half(), window_size=(8, 7, 7), backend="cuda")

A call goes the whole way: public function, native op, launch, kernel. A mistake of a kernel raises
``MistakesFound``, which says what, where and by whom.

A block's threads run one after the other, each until it needs the others, in an order that the seed decides. What this
cannot see: too many registers, local memory, the order of streams, blocks that wait for other blocks.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vidattn import backends
from vidattn.ops import divided, mixing, window, window3d

from . import build

__all__ = [
    "MistakesFound",
    "blocks_run",
    "controls",
    "counts",
    "edited",
    "install",
    "run",
    "shared_memory",
    "uninstall",
    "view",
]

_READ, _WRITE, _INITIALISED, _SINGLE_BYTE = 1, 2, 4, 8  # rights, as in machine.h

_libraries: dict[str, torch.library.Library] = {}  # of the ops, by namespace
_undo: list[Callable[[], Any]] = []
_namespace: str | None = None  # where the ops are that calls take; None: nothing is installed


class MistakesFound(AssertionError):
    """What the emulator found in a kernel.

    Attributes:
        findings: each with kind, text, address, block, thread, lane, and the line of the source.
    """

    def __init__(self, findings: Sequence[Any]) -> None:
        self.findings = list(findings)
        lines = [_describe(finding) for finding in self.findings[:5]]
        if len(self.findings) > len(lines):
            lines.append(f"and {len(self.findings) - len(lines)} more")
        super().__init__("\n".join(lines))


def install(checked: bool = True, seed: int = 0) -> None:
    """Make the backend "cuda", when named, run on CPU tensors from now on.

    Args:
        checked: whether each access of memory is checked, which takes twice as long, and 36 times the memory of the
            outputs.
        seed: the order of lanes, warps and blocks, and when asynchronous copies land. 0 is the plain order; the bits
            1, 2 and 4 are backwards, random warps, and copies that land at once; all bits seed the random choices.

    Raises:
        RuntimeError: there is no g++, or the machine is no x86-64.
    """
    global _namespace
    _namespace = _load_backend(checked)
    options = build.emulator().options
    options.checked, options.seed = checked, seed
    _route_calls()


def uninstall() -> None:
    """Undo what install() did; the backend "cuda" is what it was."""
    while _undo:
        _undo.pop()()


@contextmanager
def edited(edits: Mapping[str, Callable[[str], str]]) -> Iterator[None]:
    """Run the calls of a block on changed sources, to see whether a mistake is found; to be used after install().

    Args:
        edits: functions of the text of files in csrc/cuda, by their names.
    """
    global _namespace
    installed = _namespace
    _namespace = _load_backend(build.emulator().options.checked, edits)
    try:
        yield
    finally:
        _namespace = installed


@contextmanager
def controls(**values: Any) -> Iterator[None]:
    """Set options of the emulator inside a block.

    Args:
        **values: seed; truncate (tensor cores round toward zero); approximate (ex2 is off by up to 2 ulp);
            shared_limit (bytes of shared memory that a block may have).
    """
    options = build.emulator().options
    before = {name: getattr(options, name) for name in values}
    try:
        for name, value in values.items():
            setattr(options, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(options, name, value)


def counts() -> dict[str, int]:
    """Count what has run so far: launches, blocks, switches, operations, accesses, conflicts of banks."""
    return build.emulator().counts()


def blocks_run() -> int:
    """Count the blocks that have run so far."""
    return counts()["blocks"]


def view(tensor: Tensor) -> np.ndarray:
    """Give a tensor's memory as NumPy sees it, without a copy; bfloat16 as uint16."""
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.view(torch.uint16)
    return tensor.detach().numpy()


def shared_memory(dtype: Any = np.uint8) -> np.ndarray:
    """Give the shared memory that the last block left, without a copy."""
    return build.emulator().shared_memory().view(dtype)


def run(source: Path, function: str, inputs: Sequence[Tensor], outputs: Sequence[Tensor], *numbers: int) -> None:
    """Compile a CUDA file that stands alone, and call a launch function of it.

    Args:
        source: the file.
        function: an extern "C" function that takes the tensors' addresses and the numbers, and returns null or text.
        inputs: tensors that it may read.
        outputs: tensors that it may write.
        *numbers: ints.

    Raises:
        MistakesFound: the emulator found something.
        RuntimeError: the launch failed.
    """
    emulator = build.emulator()
    launch = getattr(ctypes.CDLL(str(build.shared_library(source, emulator.options.checked))), function)
    launch.restype = ctypes.c_char_p
    emulator.begin()
    named = {f"output {i}": t for i, t in enumerate(outputs)}
    regions = _add_memory({f"input {i}": t for i, t in enumerate(inputs)}, named)
    error = launch(*(ctypes.c_void_p(t.data_ptr()) for t in (*inputs, *outputs)), *map(ctypes.c_int, numbers))
    _raise_findings()
    if error:
        raise RuntimeError(f"{function}: {error.decode()}")
    _raise_unwritten(named, regions)


def _load_backend(checked: bool, edits: Mapping[str, Callable[[str], str]] | None = None) -> str:
    """Compile and load the native ops; give their namespace."""
    namespace, path = build.backend_library(checked, edits)
    build.emulator()  # what the library needs is loaded before it
    if namespace not in _libraries:
        _libraries[namespace] = torch.library.Library(namespace, "DEF")
        for op in _native_ops():
            schema = str(getattr(torch.ops.vidattn, op).default._schema)
            _libraries[namespace].define(schema.removeprefix("vidattn::"))
        torch.ops.load_library(path)
    return namespace


def _native_ops() -> list[str]:
    """Name the native ops of all families."""
    names = [name.split("::") for name in torch._C._dispatch_get_all_op_names()]
    private = {op for namespace, op in names if namespace == "vidattn" and op.startswith("_")}
    return sorted(op for op in private if op.endswith(("_forward", "_backward", "_shift")))


# ---- Calls ----


def _route_calls() -> None:
    """Make the launch functions of the families give those of the emulator for "cuda"."""
    if _undo:
        return
    _replace(backends._BACKENDS, "cuda", backends.Backend("cuda", ("cuda",), when_named=("cpu",)))
    for module, (functions, *ops) in _PASSES.items():
        for function in functions:
            _replace(backends._kernel_missing, (function, "cuda"), lambda: None)
        _undo.append(functools.partial(setattr, module, "launch_functions", module.launch_functions))
        passes = tuple(functools.partial(_launch, op) for op in ops)
        module.launch_functions = functools.partial(_launch_functions, module.launch_functions, passes)


def _replace(table: dict[Any, Any], key: Any, value: Any) -> None:
    _undo.append(functools.partial(table.__setitem__, key, table[key]))
    table[key] = value


def _launch_functions(otherwise: Callable[[str], Any], passes: tuple[Callable[..., None], ...], backend: str) -> Any:
    return passes if backend == "cuda" else otherwise(backend)


def _launch(op: str, *arguments: Any) -> None:
    """Run a native op on the emulated GPU; the first argument of a pass is a call, which stands for many."""
    if isinstance(arguments[0], tuple):
        arguments = (*arguments[0], *arguments[1:])
    ops, name = getattr(torch.ops, _namespace or ""), f"{_namespace}::{op}"
    if not hasattr(ops, op) or not torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU"):
        raise NotImplementedError(f"{op}: expected a pass that has CUDA kernels, got one that has none yet")
    native = getattr(ops, op).default
    inputs, outputs = {}, {}
    for argument, value in zip(native._schema.arguments, arguments, strict=True):
        if isinstance(value, Tensor):
            written = argument.alias_info is not None and argument.alias_info.is_write
            (outputs if written else inputs)[argument.name] = value
    emulator = build.emulator()
    emulator.begin()
    regions = _add_memory(inputs, outputs)
    blocks = blocks_run()
    try:
        native(*arguments)
    finally:
        _raise_findings()
    if blocks_run() == blocks:
        raise RuntimeError(f"{op}: expected blocks to run on the emulated GPU, got none")
    _raise_unwritten(outputs, regions)


# ---- Memory and findings ----


def _span(tensor: Tensor) -> tuple[int, int]:
    """Give the addresses of a tensor's first byte and of the one behind its last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def _bytes_of(tensor: Tensor, memory: np.ndarray, begin: int) -> np.ndarray:
    """Pick from an array with an entry for each byte of memory from an address on those of a tensor."""
    size = tensor.element_size()
    strides = (*(stride * size for stride in tensor.stride()), 1)
    return np.lib.stride_tricks.as_strided(memory[tensor.data_ptr() - begin :], (*tensor.shape, size), strides)


def _add_memory(inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> dict[str, tuple[str, int]]:
    """Tell the emulator which bytes may be read and written; tensors that share a storage are one piece of memory.

    Returns:
        For each tensor the name of its piece, and where that begins.
    """
    pieces: dict[int, list[tuple[str, Tensor, int]]] = {}
    for tensors, rights in ((inputs, _READ | _INITIALISED), (outputs, _READ | _WRITE)):
        for name, tensor in tensors.items():
            if tensor.numel():
                pieces.setdefault(tensor.untyped_storage().data_ptr(), []).append((name, tensor, rights))
    found = {}
    for members in pieces.values():
        begin = min(_span(tensor)[0] for _, tensor, _ in members)
        memory = np.zeros(max(_span(tensor)[1] for _, tensor, _ in members) - begin, np.uint8)
        for _, tensor, rights in members:
            _bytes_of(tensor, memory, begin)[...] |= rights | (_SINGLE_BYTE if tensor.element_size() == 1 else 0)
        piece = ", ".join(name for name, _, _ in members)
        build.emulator().add_memory(piece, begin, memory)
        found.update({name: (piece, begin) for name, _, _ in members})
    return found


def _raise_findings() -> None:
    findings = build.emulator().findings()
    if findings:
        raise MistakesFound(findings)


def _raise_unwritten(outputs: Mapping[str, Tensor], regions: Mapping[str, tuple[str, int]]) -> None:
    """Complain about outputs that no thread wrote, which only the checked mode knows."""
    if not build.emulator().options.checked:
        return
    for name, (piece, begin) in regions.items():
        if name not in outputs:
            continue
        written = _bytes_of(outputs[name], build.emulator().written(piece), begin).all(-1)
        if not written.all():
            index = tuple(map(int, np.argwhere(~written)[0]))
            text = f"{np.count_nonzero(~written)} elements of {name}, the first one at {index}, were never written"
            raise MistakesFound([SimpleNamespace(kind="unwritten", text=text, file="", image="", line=0, thread=-1)])


def _describe(finding: Any) -> str:
    where = f"{Path(finding.file).name}:{finding.line}" if finding.file else ""
    if finding.image:
        where = build.source_line(finding.image, finding.offset)
    text = f"{finding.kind}: {finding.text}"
    if finding.thread >= 0:
        text += f"; block {finding.block}, thread {finding.thread}, lane {finding.lane}"
    return f"{text}; {where}" if where else text


_WINDOWS = ("_window3d_attention_forward", "_window3d_attention_backward")
_DIVIDED = ("_divided_attention_forward", "_divided_attention_backward")
_MIXING = ("_space_time_mixing_attention_forward", "_space_time_mixing_attention_backward", "_temporal_shift")
# Public functions, native ops in the order of launch_functions.
_PASSES: dict[Any, tuple[Any, ...]] = {
    window3d: (("window3d_attention",), *_WINDOWS),
    window: (("window_attention",), *_WINDOWS),
    divided: (("temporal_attention", "spatial_attention", "factorized_dot_product_attention"), *_DIVIDED),
    mixing: (("space_time_mixing_attention", "temporal_shift"), *_MIXING),
}

"""Plans that are kept from call to call: a warm call makes a key and its workspaces, and launches.

A plan is decided by the shapes, strides, dtypes and alignment of the tensors of a call, by its options, its device and
a few settings, never by what the tensors hold. A kept plan has a place instead of each tensor: a tensor of the call, or
a workspace, which each call allocates anew on its own stream. Tables of shapes it keeps. Where Triton compiles, it has
the compiled kernels and launches them without asking again which they are.

A planner that does more than look at shapes has no kept plans: a recorder sees every operation on a tensor of the call.
Such calls, copies of strided tensors for one, are planned each time, which is slower and never wrong.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from threading import Lock
from typing import Any
from weakref import ref

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vidattn.kernels.launch import INTERPRETED, Launch, is_capturing, is_table, record_workspaces, tensors_in

__all__ = ["forget", "run"]

_PLANS_KEPT = 512
_ALLOCATES = ("aten::new_empty", "aten::empty_like")

_plans: OrderedDict[Hashable, _Plan | None] = OrderedDict()  # None: to be planned each time
_lock = Lock()
_used_by_graphs: list[Tensor] = []  # a captured graph goes on reading its tables: they must outlive their plan


def run(planner: Callable[..., Sequence[Launch]], *arguments: Any) -> None:
    """Run a call by the plan that is kept of calls like it; the first one is planned.

    Args:
        planner: gives the launches of a call, in order. It looks at shapes, takes views, and allocates by
            ``new_workspace``; all that is to be computed is a launch.
        *arguments: what it takes: tensors, numbers, and tuples or lists of them. Tensors of one device.
    """
    given, pointers, described = _describe(arguments)
    device = given[0].device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            run(planner, *arguments)
        return
    key = (planner, device, *_settings(), *described)
    with _lock:
        known = key in _plans
        if known:
            _plans.move_to_end(key)
            plan = _plans[key]
    if not known:
        _run_and_keep(key, planner, arguments, given)
    elif plan is None:
        _run_launches(planner(*arguments))
    else:
        plan.run(given, pointers)


def forget() -> None:
    """Drop all plans, for tests that change what plans are made of."""
    with _lock:
        _plans.clear()


# ---- The key of a call ----


def _describe(arguments: Sequence[Any]) -> tuple[list[Tensor], list[int], list[Hashable]]:
    """Give the tensors of a call, their addresses, and all that its plan depends on."""
    given: list[Tensor] = []
    pointers: list[int] = []
    described: list[Hashable] = []
    for argument in arguments:
        for value in argument if isinstance(argument, tuple) else (argument,):
            if isinstance(value, Tensor):
                pointer = value.data_ptr()
                given.append(value)
                pointers.append(pointer)
                described += (value.shape, value.stride(), value.dtype, pointer & 15)
            else:
                described.append(tuple(value) if type(value) is list else value)
    return given, pointers, described


def _settings() -> tuple[Hashable, ...]:
    """What else decides a plan, or the kernels that Triton compiles for it."""
    knobs = triton.knobs
    return (
        torch.get_float32_matmul_precision(),
        os.environ.get("VIDATTN_AUTOTUNE"),
        knobs.runtime.debug,
        knobs.compilation.instrumentation_mode,
    )


# ---- Plans ----


@dataclass(frozen=True)
class _Place:
    """Where a call finds a tensor of a plan.

    Attributes:
        source: number of the tensor that it is, or is a view of: those of the call, then the workspaces.
        start: bytes from the source's first element to its own; None if it is the source itself.
        dtype: of the view.
        shape: of the view.
        stride: of the view.
    """

    source: int
    start: int | None
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]

    def find(self, sources: Sequence[Tensor]) -> Tensor:
        """Give the tensor of a call."""
        source = sources[self.source]
        if self.start is None:
            return source
        first = (source.storage_offset() * source.itemsize + self.start) // self.dtype.itemsize
        view = torch.empty(0, dtype=self.dtype, device=source.device)
        return view.set_(source.untyped_storage(), first, self.shape, self.stride)


class _Arguments:
    """Arguments of a compiled kernel in their order, with addresses in the place of tensors; tuples may be nested."""

    def __init__(self, values: Sequence[Any]) -> None:
        self.values = list(values)
        self.places: list[tuple[int, int, int]] = []
        self.nested: list[tuple[int, _Arguments]] = []
        for index, value in enumerate(values):
            if isinstance(value, _Place):
                self.places.append((index, value.source, value.start or 0))
            elif isinstance(value, Tensor):  # a table
                self.values[index] = value.data_ptr()
            elif isinstance(value, tuple):
                inner = _Arguments(value)
                if inner.places or inner.nested:
                    self.nested.append((index, inner))
                else:
                    self.values[index] = tuple(inner.values)

    def at(self, pointers: Sequence[int]) -> list[Any]:
        """Give the arguments of a call, from the addresses of its sources."""
        values = self.values.copy()
        for index, source, start in self.places:
            values[index] = pointers[source] + start
        for index, inner in self.nested:
            values[index] = tuple(inner.at(pointers))
        return values


@dataclass(frozen=True)
class _Kept:
    """A launch of a kept plan.

    Attributes:
        launch: the launch, with places in its arguments.
        compiled: the kernel to launch; None if only Triton may choose it.
        arguments: what it takes.
    """

    launch: Launch
    compiled: Any = None
    arguments: _Arguments | None = None

    def run(self, sources: Sequence[Tensor]) -> None:
        """Launch on the tensors of a call, as without a plan."""
        found = _mapped(self.launch.arguments, lambda x: x.find(sources) if isinstance(x, _Place) else x)
        replace(self.launch, arguments=found).run()

    def run_compiled(self, sources: Sequence[Tensor], addresses: Sequence[int], stream: int) -> None:
        """Launch the compiled kernel as Triton would, unless it does more for this one."""
        if self.arguments is None or self.launch.kernel.pre_run_hooks:
            self.run(sources)
            return
        kernel, values = self.compiled, self.arguments.at(addresses)
        no_hooks = (None, None, None)
        kernel.run(self.launch.grid, 1, 1, stream, kernel.function, kernel.packed_metadata, *no_hooks, *values)


@dataclass(frozen=True)
class _Plan:
    """A kept plan.

    Attributes:
        launches: what it does.
        workspaces: shape and dtype of what each call allocates.
        tables: what it reads besides the tensors of a call.
        streams: those that may be reading the tables.
    """

    launches: tuple[_Kept, ...]
    workspaces: tuple[tuple[torch.Size, torch.dtype], ...]
    tables: tuple[Tensor, ...]
    streams: set[int | None]

    def run(self, given: Sequence[Tensor], addresses: Sequence[int]) -> None:
        """Run it on the tensors of a call and their addresses."""
        sources, device = [*given], given[0].device
        sources += [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in self.workspaces]
        if INTERPRETED or _hooked():
            for kept in self.launches:
                kept.run(sources)
        else:
            addresses = [*addresses, *(workspace.data_ptr() for workspace in sources[len(given) :])]
            stream = _current_stream()
            for kept in self.launches:
                kept.run_compiled(sources, addresses, stream)
        _hold(self.tables, self.streams)


def _current_stream() -> int:
    driver = triton.runtime.driver.active
    return driver.get_current_stream(driver.get_current_device())


def _hooked() -> bool:
    """Tell whether somebody wants to know of launches, or changes how kernels are compiled."""
    runtime = triton.knobs.runtime
    if runtime.add_stages_inspection_hook is not None:
        return True
    return any(getattr(hook, "calls", hook) for hook in (runtime.launch_enter_hook, runtime.launch_exit_hook))


def _hold(tables: Sequence[Tensor], streams: set[int | None]) -> None:
    """Keep the memory of tables from being used again while the current stream, or a graph, may be reading them.

    Args:
        tables: those of a plan that has just been launched.
        streams: where it was launched before; None among them stands for a graph. The current one is added.
    """
    if not tables or not tables[0].is_cuda or None in streams:
        return
    if is_capturing():
        _used_by_graphs.extend(tables)
        streams.add(None)
    elif (stream := _current_stream()) not in streams:
        for table in tables:
            table.record_stream(torch.cuda.current_stream())
        streams.add(stream)


# ---- Making them ----


def _run_and_keep(
    key: Hashable, planner: Callable[..., Sequence[Launch]], arguments: Sequence[Any], given: Sequence[Tensor]
) -> None:
    """Plan a call, run it, and keep the plan if it can be."""
    with record_workspaces() as allocated, _Recorder(given, allocated) as recorder:
        launches = planner(*arguments)
    compiled, tables, streams = _run_launches(launches)
    if len({id(x) for x in given}) < len(given):
        return  # one tensor in two places: another call may have two
    workspaces = _alive(allocated)
    find = partial(_place, recorder, [*given, *workspaces])
    plan = None
    if not recorder.looked:
        with suppress(LookupError):
            kept = tuple(_keep(launch, kernel, find) for launch, kernel in zip(launches, compiled, strict=True))
            plan = _Plan(kept, tuple((x.shape, x.dtype) for x in workspaces), tables, streams)
    with _lock:
        _plans[key] = plan
        while len(_plans) > _PLANS_KEPT:
            _plans.popitem(last=False)


def _run_launches(launches: Sequence[Launch]) -> tuple[list[Any], tuple[Tensor, ...], set[int | None]]:
    """Run what has just been planned; gives the compiled kernels, the tables, and the streams that may read those."""
    compiled = [launch.run() for launch in launches]
    tables = tuple({id(x): x for launch in launches for x in tensors_in(launch.arguments) if is_table(x)}.values())
    streams: set[int | None] = set()
    _hold(tables, streams)
    return compiled, tables, streams


class _Recorder(TorchDispatchMode):
    """Watches a planner: of which tensor a view is, and whether it computes with one of the call.

    Attributes:
        looked: whether it does; what comes of that must not be kept.
    """

    def __init__(self, given: Sequence[Tensor], allocated: Sequence[ref[Tensor]]) -> None:
        super().__init__()
        self.looked = False
        self._given, self._allocated = given, allocated
        self._views: dict[int, tuple[Tensor, Tensor]] = {}  # by id, which lives as long as the view does

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        # What may give a view, as contiguous() does, may also give a copy.
        if function.is_view and all(_storage(x) == _storage(args[0]) for x in tensors_in(result)):
            self._views.update((id(view), (view, self.origin(args[0]))) for view in tensors_in(result))
        elif function._schema.name not in _ALLOCATES:
            known = {_storage(x) for x in (*self._given, *_alive(self._allocated))}
            self.looked |= any(_storage(x) in known for x in tensors_in((args, kwargs)))
        return result

    def origin(self, x: Tensor) -> Tensor:
        """Give the tensor that ``x`` is a view of, or itself."""
        return self._views[id(x)][1] if id(x) in self._views else x


def _alive(allocated: Sequence[ref[Tensor]]) -> list[Tensor]:
    return [x for reference in allocated if (x := reference()) is not None]


def _place(recorder: _Recorder, sources: Sequence[Tensor], value: Any) -> Any:
    """Give the place of a tensor; LookupError if it is neither of the call, nor a workspace, nor a table."""
    if not isinstance(value, Tensor) or is_table(value):
        return value
    origin = recorder.origin(value)
    number = {id(source): number for number, source in enumerate(sources)}[id(origin)]
    start = None if origin is value else value.data_ptr() - origin.data_ptr()
    return _Place(number, start, value.dtype, value.shape, value.stride())


def _keep(launch: Launch, compiled: Any, find: Callable[[Any], Any]) -> _Kept:
    kept = replace(launch, arguments=_mapped(launch.arguments, find))
    if compiled is None or compiled.metadata.target.backend != "cuda":  # others specialise by more than the key has
        return _Kept(kept)
    return _Kept(kept, compiled, _Arguments([kept.arguments[name] for name in launch.kernel.arg_names]))


def _mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """Change the leaves of nested arguments."""
    if isinstance(value, Mapping):
        return {name: _mapped(inner, change) for name, inner in value.items()}
    if isinstance(value, tuple):
        changed = [_mapped(inner, change) for inner in value]
        return type(value)(*changed) if hasattr(value, "_fields") else tuple(changed)
    return change(value)


def _storage(x: Tensor) -> int:
    return x.untyped_storage()._cdata

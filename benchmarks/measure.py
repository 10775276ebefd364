"""Measures all contenders of one case: who can run, what is right, how long it takes and how much memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import vidattn
from benchmarks import cpu_limits
from benchmarks.calls import EXACT
from benchmarks.memory import peak_extra_bytes, start_server
from benchmarks.rounds import (
    COPY,
    EXP,
    FMA,
    GEMM,
    TRAFFIC,
    allowed_error,
    copy,
    gemm,
    has_fast_gemm,
    interleave,
    largest_error,
    statistics_of,
    summarise,
)
from benchmarks.shapes import DTYPES, Work
from benchmarks.store import Key

Call = Callable[[], Sequence[Tensor]]


def is_ours(contender: str) -> bool:
    """Tell whether a contender has to run kernels of this package."""
    return contender.startswith("vidattn")


@dataclass
class Measured:
    """One case.

    Attributes:
        times: seconds of each round by contender, those of the baselines included.
        info: what else is known of a contender.
        not_run: why contenders were not timed.
    """

    times: dict[str, list[float]] = field(default_factory=dict)
    info: dict[str, dict[str, Any]] = field(default_factory=dict)
    not_run: dict[str, str] = field(default_factory=dict)

    def entries(self, group: str, case: Key, work: Work, info: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Write down what was measured, a contender an entry, in the form of a saved result.

        Args:
            group: where it belongs.
            case: its case, direction, dtype and threads.
            work: what the call costs.
            info: what else an entry should hold.
        """
        shared = dict(zip(("case", "direction", "dtype", "threads"), case)) | work._asdict() | dict(info)
        return [
            {
                "group": group,
                "stats": statistics_of(self.times[name]),
                "info": {
                    **shared,
                    "contender": name,
                    **summarise(self.times, name, work),
                    **known,
                    "not_run": self.not_run,
                },
            }
            for name, known in self.info.items()
        ]


class BackendsTaken(TorchDispatchMode):
    """Notes which backends the calls of our ops take while it is active.

    Attributes:
        names: the backends.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "vidattn":
            self.names |= {argument for argument in args if argument in vidattn.list_backends()}
        return func(*args, **(kwargs or {}))


def backends_taken(call: Callable[[], object]) -> set[str]:
    """Run a call, as if nothing of it were compiled, and name the backends that it takes."""
    with torch.compiler.set_stance("force_eager"), BackendsTaken() as taken:
        call()
    return taken.names


def why_reference(device: str) -> str:
    """Say why calls end on the reference here."""
    if vidattn.current_backend() == "reference":
        return "it would take the reference, which VIDATTN_BACKEND or set_backend names"
    kernels = "cpu" if device == "cpu" else "triton"
    reasons = vidattn.why_not("window3d_attention", backend=kernels) or ["no kernel runs this call"]
    return f"it would take the reference: {'; '.join(reasons)}"


def synchronise(device: str) -> Callable[[], object]:
    """Give the function that waits for what was started on a device."""
    if device == "cpu":
        return lambda: None
    return partial(torch.get_device_module(device).synchronize, device)


def prepare(
    build: Callable[..., Call],
    names: Sequence[str],
    arguments: dict[str, str],
    say: Callable[[str], None],
    judge: str = EXACT,
) -> tuple[dict[str, Call], Measured]:
    """Build and run all contenders once, and compare what they return with the float64 reference.

    Args:
        build: makes the call from ``arguments`` and ``contender=``.
        names: the contenders.
        arguments: what they share; ``dtype`` and ``device`` are among them.
        say: is told what is being done.
        judge: a contender that is compared with in place of the reference.

    Returns:
        The calls of those that can be timed, and what is known so far.

    Raises:
        AssertionError: a contender of ours returns something else than the reference.
    """
    torch.compiler.reset()  # every case counts as the first; not for each contender, or those before compiled again
    calls: dict[str, Call] = {}
    measured = Measured()
    say("float64 reference" if judge == EXACT else judge)
    expected = [tensor.cpu() for tensor in build(contender=judge, **arguments)()]
    for name in names:
        say(name)
        try:
            call = build(contender=name, **arguments)
            backends = backends_taken(call) if is_ours(name) else set()
            if is_ours(name) and (not backends or "reference" in backends):
                measured.not_run[name] = why_reference(arguments["device"]) if backends else "it called no op of ours"
                continue
            result = [tensor.cpu() for tensor in call()]
        except Exception as error:
            if is_ours(name) and not isinstance(error, (ValueError, NotImplementedError)):
                raise  # not a call that a backend refuses
            reason = (str(error).splitlines() or [""])[0][:300]
            planned = isinstance(error, NotImplementedError)
            measured.not_run[name] = reason if planned else f"{type(error).__name__}: {reason}"
            continue
        error, allowed = largest_error(result, expected), allowed_error(DTYPES[arguments["dtype"]], expected[0].dtype)
        if not error <= allowed:
            truth = "the float64 reference" if judge == EXACT else judge
            wrong = f"off {truth} by {error:.1e} of the maximum, more than {allowed:.0e}"
            assert not is_ours(name), f"{name} {arguments}: {wrong}"
            measured.not_run[name] = wrong
            continue
        calls[name] = call
        measured.info[name] = {"error": error} | ({"backend": " and ".join(sorted(backends))} if backends else {})
    return calls, measured


def baselines(dtype: torch.dtype, direction: str, device: str) -> dict[str, Callable[[], object]]:
    """Make the calls that tell what the machine has to offer."""
    calls: dict[str, Callable[[], object]] = {COPY: copy(device)}
    if device != "cpu" or has_fast_gemm(dtype):
        calls[GEMM] = gemm(dtype, device)
    if device == "cpu" and cpu_limits.why_not() is None:
        calls |= {FMA: cpu_limits.fma(dtype, direction), EXP: cpu_limits.exponentials(dtype)}
    return calls


def measure(
    build: Callable[..., Call],
    names: Sequence[str],
    arguments: dict[str, str],
    *,
    rounds: int,
    seconds: float,
    memory: bool,
    say: Callable[[str], None],
    traffic: Callable[[], object] | None = None,
    judge: str = EXACT,
) -> Measured:
    """Measure the contenders of a case.

    Args:
        build: makes the call from ``arguments`` and ``contender=``; a module-level function.
        names: the contenders.
        arguments: what they share; ``dtype`` and ``device`` are among them.
        rounds: rounds at the least.
        seconds: for each contender, unless the rounds take longer.
        memory: measure peak memory too.
        say: is told what is being done.
        traffic: reads and writes what the call must, without its arithmetic; is timed beside it.
        judge: as of ``prepare``.

    Returns:
        All there is to know.
    """
    if memory:
        start_server()  # meanwhile it gets ready
    calls, measured = prepare(build, names, arguments, say, judge)
    if not calls:
        return measured
    timed = list(calls)
    device = arguments["device"]
    say("rounds")
    beside = baselines(DTYPES[arguments["dtype"]], arguments.get("direction", "forward"), device)
    beside |= {TRAFFIC: traffic} if traffic else {}
    for call in beside.values():
        call()
    ours = next((name for name in timed if is_ours(name)), None)
    measured.times = interleave({**calls, **beside}, rounds, seconds * len(timed), synchronise(device), ours)
    calls.clear()
    if memory:
        say("memory")
        builder, threads = f"{build.__module__}:{build.__name__}", torch.get_num_threads()
        for name in timed:
            peak = peak_extra_bytes(builder, threads=threads, contender=name, **arguments)
            measured.info[name]["peak_extra_bytes"] = peak
    return measured

"""Times the Python around a call of a GPU's kernels: ``python -m benchmarks.overhead [--seconds N] [--cold]``.

Shapes are tiny, Triton's driver is one that launches nothing, and so are the native ops of the backend "cuda": what is
left is Python, and no GPU is needed. Each case is timed by Triton with plans that are kept and with plans made anew
each time, by "cuda" where it has kernels, beside eager PyTorch and, where its kernels are built, the backend "cpu",
whose time has a little arithmetic in it, and an op of the same schema and registration that does nothing: what PyTorch
itself takes. The ratio is the median over rounds that call all of them in turn.

In a model, the layers between two calls fill the caches with other things, and a call then takes about twice as long.
``--cold`` copies more than a cache holds before each call.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch

import vidattn
from benchmarks import divided_contenders, mixing_contenders, window3d_contenders
from benchmarks.mocked_gpu import mocked_cuda, mocked_gpu
from benchmarks.rounds import copy, interleave, ratio
from benchmarks.shapes import DIRECTIONS, DividedCase, MixingCase, WindowCase
from benchmarks.tables import print_table
from vidattn.kernels import plans
from vidattn.ops._library import LIBRARY, listening, register_attention

CASES = {
    "windows": (window3d_contenders, WindowCase((4, 4, 4), (2, 2, 2), (0, 0, 0), 1, head_dim=8)),
    "shifted windows": (window3d_contenders, WindowCase((4, 4, 4), (2, 2, 2), (1, 1, 1), 1, head_dim=8)),
    "long windows": (window3d_contenders, WindowCase((6, 5, 5), (6, 5, 5), (0, 0, 0), 1, head_dim=8)),
    "time": (divided_contenders, DividedCase("temporal", 4, 4, heads=1, head_dim=8)),
    "space with a cls token": (divided_contenders, DividedCase("spatial", 4, 4, has_cls=True, heads=1, head_dim=8)),
    "mixing": (mixing_contenders, MixingCase(1, num_frames=4, num_tokens=4, heads=1, head_dim=8)),
}
KEPT, ANEW, CUDA, EAGER = "triton, kept plan", "triton, planned anew", "cuda", "eager"
CPU, IDLE = "cpu", "an op that does nothing"
CONTENDERS = (ANEW, KEPT, CUDA, EAGER, CPU, IDLE)


def idle(attend: Callable[[], object]) -> Callable[[], object]:
    """Make a call of an op like that of another call, registered as it is, whose results are there already."""
    seen: list[Any] = []
    with listening(lambda function, *call: seen.extend(call)):
        attend()
    op, inputs, options = seen
    name = f"_idle_{op}_{len(_idle_ops)}"
    _idle_ops.append(name)
    for suffix in ("", "_backward"):
        schema = getattr(torch.ops.vidattn, op + suffix).default._schema
        LIBRARY.define(str(schema).removeprefix("vidattn::").replace(op, name, 1), tags=torch.Tag.pt2_compliant_tag)
    arguments = (*inputs, *options, "cpu")
    with torch.no_grad():
        outputs = getattr(torch.ops.vidattn, op)(*arguments)
    schema = getattr(torch.ops.vidattn, f"{op}_backward").default._schema
    given, learning = inputs[: inputs._fields.index("seed")], inputs[: len(schema.returns)]
    register_attention(
        name,
        inputs=type(inputs),
        options=type(options),
        forward=lambda *_: tuple(torch.empty_like(x) for x in outputs),
        backward=lambda *_: tuple(None if x is None else torch.empty_like(x) for x in learning),
        fake=lambda *_: outputs,
        flops=lambda *_: 0,
        save=lambda ctx, *_: ctx.save_for_backward(*inputs, *outputs),
        num_outputs=len(outputs),
        num_gradients=sum(argument.name.startswith("grad_") for argument in schema.arguments),
    )
    run, learnt = getattr(torch.ops.vidattn, name), [x for x in given if x is not None and x.requires_grad]
    gradient = torch.zeros_like(outputs[0])

    def forward() -> object:
        with torch.no_grad():
            return run(*arguments)

    def forward_backward() -> object:
        return torch.autograd.grad(run(*arguments)[0], learnt, gradient)

    return forward_backward if learnt else forward


_idle_ops: list[str] = []  # a library defines a name once


def calls(case: str, direction: str) -> dict[str, Callable[[], object]]:
    """Make the calls of a case, each of which has run once.

    Args:
        case: one of ``CASES``.
        direction: "forward" | "forward_backward".

    Returns:
        Calls by contender.
    """
    family, shape = CASES[case]
    (attend,) = family.build_copies(shape, direction, "float32", "vidattn")
    (eager,) = family.build_copies(shape, direction, "float32", "eager")

    def by(backend: str, attend: Callable[[], object] = attend) -> Callable[[], object]:
        def call() -> object:
            with vidattn.use_backend(backend):
                return attend()

        return call

    kept = by("triton")

    def anew() -> object:
        with mock.patch.object(plans, "run", lambda planner, *given: [launch.run() for launch in planner(*given)]):
            return kept()

    found = {KEPT: kept, ANEW: anew, EAGER: eager}
    if isinstance(shape, WindowCase):
        (half,) = family.build_copies(shape, direction, "bfloat16", "vidattn")
        found[CUDA] = by("cuda", half)
    if not vidattn.why_not("window3d_attention", backend="cpu"):
        found[CPU] = by("cpu")
        with vidattn.use_backend("cpu"):
            found[IDLE] = idle(attend)
    for call in found.values():
        call()
    return found


def main() -> None:
    """Time all cases and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3.0, help="for each row")
    parser.add_argument("--cold", action="store_true", help="with caches that are full of other things")
    options = parser.parse_args()
    before = copy() if options.cold else lambda: None
    rows = []
    with mocked_gpu(), mocked_cuda():
        for case in CASES:
            for direction in DIRECTIONS:
                times = interleave(calls(case, direction), 50, options.seconds, before=before)
                micros = {name: statistics.median(values) * 1e6 for name, values in times.items()}
                share = ratio(times, KEPT, ANEW)["median"]
                numbers = [f"{micros[name]:.0f}" if name in micros else "" for name in CONTENDERS]
                rows.append((case, direction, *numbers, f"{share:.2f}"))
    columns = ("case", "direction", *(f"{name}, us" for name in CONTENDERS), "kept / anew")
    print_table(f"Python of a {'cold' if options.cold else 'warm'} call, medians", columns, rows)


if __name__ == "__main__":
    main()

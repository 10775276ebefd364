"""Times the Python around a warm call of a GPU's kernels: ``python -m benchmarks.overhead [--seconds N]``.

Shapes are tiny, Triton's driver is one that launches nothing, and so are the native ops of the backend "cuda": what is
left is Python, and no GPU is needed. Each case is timed by Triton with plans that are kept and with plans made anew
each time, by "cuda" where it has kernels, beside eager PyTorch and, where its kernels are built, the backend "cpu",
whose time has a little arithmetic in it. The ratio is the median over rounds that call all of them in turn.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from unittest import mock

import vidattn
from benchmarks import divided_contenders, mixing_contenders, window3d_contenders
from benchmarks.mocked_gpu import mocked_cuda, mocked_gpu
from benchmarks.rounds import interleave, ratio
from benchmarks.shapes import DIRECTIONS, DividedCase, MixingCase, WindowCase
from benchmarks.tables import print_table
from vidattn.kernels import plans

CASES = {
    "windows": (window3d_contenders, WindowCase((4, 4, 4), (2, 2, 2), (0, 0, 0), 1, head_dim=8)),
    "shifted windows": (window3d_contenders, WindowCase((4, 4, 4), (2, 2, 2), (1, 1, 1), 1, head_dim=8)),
    "long windows": (window3d_contenders, WindowCase((6, 5, 5), (6, 5, 5), (0, 0, 0), 1, head_dim=8)),
    "time": (divided_contenders, DividedCase("temporal", 4, 4, heads=1, head_dim=8)),
    "space with a cls token": (divided_contenders, DividedCase("spatial", 4, 4, has_cls=True, heads=1, head_dim=8)),
    "mixing": (mixing_contenders, MixingCase(1, num_frames=4, num_tokens=4, heads=1, head_dim=8)),
}
KEPT, ANEW, CUDA, EAGER, CPU = "triton, kept plan", "triton, planned anew", "cuda", "eager", "cpu"
CONTENDERS = (ANEW, KEPT, CUDA, EAGER, CPU)


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
    for call in found.values():
        call()
    return found


def main() -> None:
    """Time all cases and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3.0, help="for each row")
    seconds = parser.parse_args().seconds
    rows = []
    with mocked_gpu(), mocked_cuda():
        for case in CASES:
            for direction in DIRECTIONS:
                times = interleave(calls(case, direction), 50, seconds)
                micros = {name: statistics.median(values) * 1e6 for name, values in times.items()}
                share = ratio(times, KEPT, ANEW)["median"]
                numbers = [f"{micros[name]:.0f}" if name in micros else "" for name in CONTENDERS]
                rows.append((case, direction, *numbers, f"{share:.2f}"))
    columns = ("case", "direction", *(f"{name}, us" for name in CONTENDERS), "kept / anew")
    print_table("Python of a call, medians", columns, rows)


if __name__ == "__main__":
    main()

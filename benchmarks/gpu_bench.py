"""Times attention on the GPU that is here against what else there is: ``python -m benchmarks.gpu_bench [--seconds N]``.

What it needs is compiled first, then the GPU is calibrated, then the main cases are timed, and then all others. It
shares results and what is compiled with ``gpu_test``, and goes on as that does; see there.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence

from benchmarks.gpu_steps import Results, Step
from benchmarks.gpu_test import MAIN_CASES, Setting, build_step, calibration_step, carry_out, parser, speed_step

OTHER_DTYPE_CASES = ("swin_t_stage1_shifted", "timesformer_b_space", "xvit_b_16_frames_div8")  # one of each family


def other_calls(cases: Sequence[str]) -> list[tuple[str, str]]:
    """Order all other calls: Swin-T and the other families first, then the first stages of other Swins, the largest."""
    others = [case for case in cases if case not in MAIN_CASES]
    others.sort(key=lambda case: ("swin" in case and not case.startswith("swin_t_stage"), case.partition("stage")[2]))
    dtypes = itertools.product(set(cases).intersection(OTHER_DTYPE_CASES), ("float16", "float32"))
    return [*((case, "bfloat16") for case in others), *sorted(dtypes)]


def steps(setting: Setting, results: Results, built: Results) -> list[Step]:
    """Give the steps in the order of importance."""
    main = [(case, "bfloat16") for case in setting.cases if case in MAIN_CASES]
    others = other_calls(setting.cases)
    return [
        build_step(setting, built, main, 210),
        calibration_step(setting),
        speed_step("speed", setting, results, main, 250),
        build_step(setting, built, others, 0, name="build_more"),
        speed_step("more", setting, results, others, 0),
    ]


def main(arguments: list[str] | None = None) -> int:
    from benchmarks.gpu_timing import CASES, GPU_CASES

    options_of = parser("gpu_bench", (__doc__ or "").partition(":")[0], list(CASES))
    return carry_out(options_of, arguments, steps, list(GPU_CASES))


if __name__ == "__main__":
    sys.exit(main())

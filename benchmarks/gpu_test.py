"""Proves and times the kernels on the GPU that is here: ``python -m benchmarks.gpu_test [--step NAME ...]``.

Steps, what matters most first:

    build            the extension with its CUDA kernels, Triton's kernels, what torch compiles: all before it is needed
    conformance      the primitives of the CUDA kernels give what they give on the emulated GPU
    numbers          every op forward and backward against float64, in each dtype, by each backend
    calibration      what the GPU can do
    speed            the main cases against all there is, forward and with backward
    opcheck          torch's own checks of the ops
    sanitizer        memcheck, racecheck and synccheck on one call of each family
    graphs           CUDA graphs replay on other numbers
    reduce_overhead  torch.compile in the mode of that name
    streams          two streams at a time
    suite            the tests of all backends

Two steps compile as they run: ``reduce_overhead``, because that is what it tests, and ``suite``, whose tests have
Triton kernels of their own; it is the last step, so nothing waits for it.

A run ends in time, and run again it goes on where it stopped: results and what was compiled stay in the folder that
``--out`` names. ``docs/gpu.md`` says more. ``--mocked`` tries this program without a GPU.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.gpu_build import NAME as BUILD
from benchmarks.gpu_build import ROOT, Cache, call_tasks, program_tasks
from benchmarks.gpu_steps import Results, Run, Step, Task, digest, say

SECONDS = 510.0  # of a run, with time to start and to write
OUT = ROOT / "build" / "gpu"
MOCKED = "benchmarks.mocked_machine:mocked_machine"
DIRECTIONS = ("forward", "forward_backward")
# The cases of "speed"; of each family those that a model spends its time in.
MAIN_CASES = (
    "swin_t_stage1",
    "swin_t_stage1_shifted",
    "timesformer_b_space",
    "xvit_b_16_frames_div8",
    "timesformer_b_time",
    "swin_t_stage3_shifted",
    "swin_b_ssv2_stage1_shifted",
    "vivit_b_model3_space",
    "vivit_b_model4",
    "timesformer_l_time",
)
# Limits of a task: of a contender, and of one that torch compiles.
CONTENDER_SECONDS = {False: 60.0, True: 150.0}
SHOWN = 20  # failures that are printed at the end
CHECK_SECONDS, SANITIZER_SECONDS, CALIBRATION_SECONDS = 120.0, 300.0, 60.0


@dataclass(frozen=True)
class Setting:
    """What a run is about.

    Attributes:
        out: folder of results and cache.
        arch: of the GPU, "90" say.
        processes: tasks at a time.
        device: of the tensors.
        backends: those under test.
        cases: those of "speed".
        setup: what workers work in; None for a GPU that is there.
    """

    out: Path
    arch: str
    processes: int
    device: str = "cuda"
    backends: tuple[str, ...] = ("cuda", "triton")
    cases: tuple[str, ...] = MAIN_CASES
    setup: str | None = None

    @property
    def cache(self) -> Cache:
        """What is compiled, and where."""
        return Cache(self.out)


def code_of(machine: dict[str, Any]) -> str:
    """Name what results depend on: the sources, and on what they run."""
    folders = ("vidattn", "kernels", "csrc", "benchmarks", "tests")
    paths = (path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in _SOURCES)
    return digest(paths, *(machine[key] for key in ("gpu", "torch", "triton", "python")))


_SOURCES = (".py", ".h", ".cpp", ".cu", ".cuh")


# ---- The steps ----


def build_step(
    setting: Setting,
    built: Results,
    calls: Sequence[tuple[str, str]],
    seconds: float,
    checks: bool = False,
    name: str = BUILD,
) -> Step:
    """Compile what other steps need: calls that are checked, and cases, each with a dtype, that are timed."""
    from benchmarks.gpu_checks import CHECKS, dtypes_of
    from benchmarks.gpu_timing import COMPILED

    def tasks() -> Iterator[Task]:
        kernels: list[tuple[str, tuple[Any, ...]]] = []
        if checks:
            checked = ((check, dtype) for check in CHECKS for dtype in dtypes_of(check))
            kernels += (("benchmarks.gpu_checks:call_triton", call) for call in checked)
        timed = [(case, direction, dtype) for case, dtype in calls for direction in DIRECTIONS]
        kernels += (("benchmarks.gpu_timing:call_triton", call) for call in timed)
        rivals = [(*call, contender, setting.device) for call in timed for contender in COMPILED]
        if name == BUILD:
            extension = setting.setup is None  # it goes into the package, which a run without a GPU leaves alone
            yield from program_tasks(setting.cache, setting.arch, setting.processes, extension)
        yield from call_tasks(setting.arch, kernels, rivals, compiles=setting.setup is None)

    return Step(name, seconds, tasks, results=built, renews=name == BUILD)  # workers that have no extension


def speed_step(name: str, setting: Setting, results: Results, calls: Sequence[tuple[str, str]], seconds: float) -> Step:
    """Time cases, each contender twice: all of a group once, then all once more, which shows the noise."""
    from benchmarks.gpu_report import AGAIN
    from benchmarks.gpu_timing import COMPILED, contenders

    def tasks() -> Iterator[Task]:
        # What takes torch long to prepare comes last.
        for slow, (case, dtype), direction in itertools.product((False, True), calls, DIRECTIONS):
            group = [contender for contender in contenders(case) if (contender in COMPILED) == slow]
            for again, contender in itertools.product(("", AGAIN), group):
                arguments = (case, direction, dtype, contender)
                first = results.find(name, "/".join(arguments))
                if not again or (first is not None and first["status"] == "passed"):
                    given = (*arguments, setting.device)
                    limit = CONTENDER_SECONDS[slow]
                    yield Task("/".join(arguments) + again, "benchmarks.gpu_timing:measure", given, limit)

    return Step(name, seconds, tasks, processes=1)


def calibration_step(setting: Setting) -> Step:
    """Measure the rates of the GPU."""
    from benchmarks.calibration import KERNEL_STEPS, TORCH_STEPS

    def tasks() -> Iterator[Task]:
        for step in (*TORCH_STEPS, *KERNEL_STEPS):
            arguments = (step, setting.cache.calibration, setting.device)
            yield Task(step, "benchmarks.calibration:measure", arguments, CALIBRATION_SECONDS)

    return Step("calibration", 30, tasks, processes=1)


def check_steps(setting: Setting) -> list[Step]:
    """Prove that the numbers are right, and that torch can do with the ops what it does."""
    from benchmarks.gpu_checks import CHECKS, ONE_EACH, ONE_SMALL_EACH, SMALL, TOOLS, dtypes_of

    cache, device = setting.cache, setting.device

    def conformance() -> Iterator[Task]:
        yield Task("primitives", "benchmarks.gpu_checks:check_conformance", (cache.conformance,), CHECK_SECONDS)

    def numbers() -> Iterator[Task]:
        for backend, check in itertools.product(setting.backends, CHECKS):
            for dtype in dtypes_of(check):
                yield _check("check_numbers", check, dtype, backend, device)

    def each(function: str, checks: Sequence[str] = ONE_EACH) -> Callable[[], Iterator[Task]]:
        return lambda: (
            _check(function, check, "bfloat16", backend, device)
            for backend, check in itertools.product(setting.backends, checks)
        )

    def sanitizer() -> Iterator[Task]:
        for tool, check in itertools.product(TOOLS, SMALL):
            arguments = (tool, check, setting.backends, device)
            yield Task(f"{tool} {check}", "benchmarks.gpu_checks:check_memory", arguments, SANITIZER_SECONDS)

    return [
        Step("conformance", 10, conformance),
        Step("numbers", 60, numbers),
        Step("opcheck", 20, each("check_ops", ONE_SMALL_EACH)),
        Step("sanitizer", 30, sanitizer),
        Step("graphs", 10, each("check_graph")),
        Step("reduce_overhead", 20, each("check_reduce_overhead")),
        Step("streams", 10, each("check_streams")),
    ]


def _check(function: str, *arguments: str) -> Task:
    return Task(" ".join(arguments[:-1]), f"benchmarks.gpu_checks:{function}", arguments, CHECK_SECONDS)


def suite_step(setting: Setting, code: str) -> Step:
    """Run the tests of all backends."""
    from benchmarks.gpu_suite import tasks

    folder = setting.out / "suite" / code
    return Step("suite", 0, lambda: tasks(setting.backends, setting.processes, folder))


def all_steps(setting: Setting, results: Results, built: Results) -> list[Step]:
    """Give the steps in the order of importance."""
    conformance, numbers, *rest = check_steps(setting)
    suite = (
        [suite_step(setting, results.code)] if setting.setup is None else []
    )  # its processes need a GPU that is there
    calls = [(case, "bfloat16") for case in setting.cases]
    return [
        build_step(setting, built, calls, 210, checks=True),
        conformance,
        numbers,
        calibration_step(setting),
        speed_step("speed", setting, results, calls, 110),
        *rest,
        *suite,
    ]


def after_extension(steps: Sequence[Step], built: Results) -> list[Step]:
    """Let steps wait for the extension, if it is among them: its kernels would count as skipped, or be Triton's."""
    if steps[0].name != BUILD:
        return list(steps)
    return [steps[0], *(replace(step, ready=lambda: built.find(BUILD, "extension") is not None) for step in steps[1:])]


# ---- The program ----


def parser(name: str, description: str, cases: Sequence[str]) -> argparse.ArgumentParser:
    """Make the options that both programs have."""
    found = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=description)
    found.add_argument("--out", type=Path, default=OUT, help="folder of results and of what is compiled (%(default)s)")
    found.add_argument("--seconds", type=float, default=SECONDS, help="time limit (%(default)s)")
    found.add_argument("--processes", type=int, help="tasks at a time; as many as there are cores")
    found.add_argument("--step", nargs="+", metavar="NAME", help="only these steps")
    found.add_argument("--case", nargs="+", choices=sorted(cases), metavar="NAME", help="time only these cases")
    found.add_argument("--again", action="store_true", help="do again what has not passed")
    found.add_argument("--fresh", action="store_true", help="forget all results; what is compiled stays")
    found.add_argument("--mocked", action="store_true", help="on a GPU that is not there: to try this program")
    return found


Steps = Callable[[Setting, Results, Results], list[Step]]


def carry_out(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None, steps: Steps, cases: Sequence[str]
) -> int:
    """Run steps as the options say, and report.

    Args:
        parser: of the options.
        arguments: those to parse.
        steps: makes the steps of a setting, its results and the list of what was built.
        cases: those to time, unless the options name some.

    Returns:
        Exit status: 1 if something of ours failed. What there was no time for has not failed.
    """
    import torch

    from benchmarks import gpu_report
    from benchmarks.calibration import describe_gpu
    from benchmarks.gpu_timing import SMALL_CASES
    from tests.imported_copy import describe

    options = parser.parse_args(arguments)
    if not (options.mocked or torch.cuda.is_available()):
        parser.exit(2, f"{parser.prog}: torch {torch.__version__} finds no GPU\n")
    machine = describe_gpu()
    arch = machine.get("capability", "9.0").replace(".", "")
    processes = options.processes or len(os.sched_getaffinity(0))
    setting = Setting(options.out.resolve(), arch, processes, cases=tuple(options.case or cases))
    if options.mocked:
        setting = replace(setting, device="cpu", setup=MOCKED, cases=tuple(options.case or SMALL_CASES))
    os.environ.update(setting.cache.environment())
    code = code_of(machine)
    lines = setting.out / "results.jsonl"
    if options.fresh:
        lines.unlink(missing_ok=True)
    results, built = Results(lines, code, options.again), setting.cache.results(code, options.again)
    every = steps(setting, results, built)
    names = [step.name for step in every]
    unknown = [name for name in options.step or () if name not in names]
    if unknown:
        parser.error(f"--step: expected some of {', '.join(names)}, got {', '.join(unknown)}")
    chosen = [step for step in every if not options.step or step.name in options.step]
    if setting.setup is None:
        chosen = after_extension(chosen, built)
    say(f"{describe()}; {machine['gpu']}, {processes} processes, results in {setting.out}")

    def save() -> tuple[Path, dict[str, Any]]:
        left = {step.name: run.status(step)["left"] for step in chosen}
        return gpu_report.write(setting.out, machine, (results, built), left)

    run = Run(chosen, results, options.seconds, processes, setting.out / "logs", setting.setup, save)
    try:
        run.run()
    finally:
        path, result = save()
    gpu_report.show(result)
    say(gpu_report.extension(built.find(BUILD, "extension")))
    failed = gpu_report.failures(result, [step.name for step in chosen])
    for line in failed[:SHOWN]:
        say(f"FAILED {line['step']}: {line['task']}: {line['reason'].splitlines()[0]}")
    if failed[SHOWN:]:
        say(f"and {len(failed[SHOWN:])} more")
    left = sum(result["left"].values())
    say(f"{len(failed)} failed; {f'{left} tasks are left: run it again' if left else 'all is done'}; {path}")
    return 1 if failed else 0


def main(arguments: list[str] | None = None) -> int:
    from benchmarks.gpu_timing import CASES

    options_of = parser("gpu_test", (__doc__ or "").partition(":")[0], list(CASES))
    return carry_out(options_of, arguments, all_steps, MAIN_CASES)


if __name__ == "__main__":
    sys.exit(main())

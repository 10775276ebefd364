"""Runs on a GPU what proves the kernels: ``python -m benchmarks.gpu_test [--seconds N] [--step NAME ...]``.

Steps, each in processes of its own with a time limit: a small set of calls against the reference; the CUDA kernels,
and what their primitives give beside what the emulated GPU gives; the parity suite in every dtype; opcheck and
torch.compile; the golden cases; and the small set again under compute-sanitizer. Test processes share the suite among
them, since most of the time goes into compiling kernels on the CPU. What a missing package or tool makes impossible is
skipped with the reason. The result is rewritten every few seconds.

The steps named cuda_... test the backend "cuda" whatever the backend under test. They need an extension with CUDA
kernels (VIDATTN_BUILD_CUDA=1 python setup.py build_ext --inplace); cuda_primitives needs nvcc in its place.

``--backend cpu`` tries this program without a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).parent.parent
SHARD, LINES = "VIDATTN_TEST_SHARD", "VIDATTN_TEST_LINES"  # "index/count" and the file of a test process
# In place of pyproject.toml, whose settings need a newer pytest than may be here.
PYTEST_INI = "[pytest]\nmarkers =\n    slow: longer sweeps\n    needs_triton: runs a Triton kernel\n"
MAX_PROCESSES = 16
KEPT_FAILURES = 40
POLL_SECONDS = 3.0


@dataclass(frozen=True)
class Step:
    """One thing to run.

    Attributes:
        name: what it is called.
        seconds: time that is kept for it; it may also use what the steps before it and absent tools leave.
        files: test files; without any, the step is what ``program`` says.
        program: an argument of this program: the small set, or the primitives.
        backend: what is tested; None for the backend under test.
        select: pytest's -k, where {backend} is the backend that is tested.
        strict: whether the backend is also the one in force, by ``VIDATTN_BACKEND``.
        needs: packages without which there is nothing to run.
        optional: packages that only the tests with a certain word in their names need.
        tool: compute-sanitizer's tool to run under.
    """

    name: str
    seconds: float
    files: tuple[str, ...] = ()
    program: str = "--small-set"
    backend: str | None = None
    select: str = "{backend}"
    strict: bool = False
    needs: tuple[str, ...] = ()
    optional: Mapping[str, str] = field(default_factory=dict)
    tool: str | None = None


NUMBERS = ("tests/test_window3d.py", "tests/test_window3d_windows.py")
STEPS = (
    Step("small", 30),
    Step("cuda_primitives", 15, program="--primitives", needs=("numpy",)),
    Step("cuda_numbers", 30, NUMBERS, backend="cuda", needs=("pytest",)),
    Step("cuda_racecheck", 20, backend="cuda", tool="racecheck"),
    Step("numbers", 85, NUMBERS, needs=("pytest",)),
    Step("divided", 55, ("tests/test_divided.py",), needs=("pytest",)),
    Step("mixing", 35, ("tests/test_mixing.py",), needs=("pytest",)),
    Step(
        "ops",
        60,
        (
            "tests/test_window3d_op.py",
            "tests/test_window3d_triton.py",
            "tests/test_divided_op.py",
            "tests/test_divided_triton.py",
            "tests/test_mixing_op.py",
            "tests/test_mixing_triton.py",
        ),
        needs=("pytest",),
    ),
    Step(
        "golden",
        40,
        ("tests/test_golden.py",),
        "accelerated",
        strict=True,
        needs=("pytest", "safetensors"),
        optional={"torchvision": "tv_"},
    ),
    Step("memcheck", 35, tool="memcheck"),
    Step("racecheck", 25, tool="racecheck"),
    Step("initcheck", 30, tool="initcheck"),
)


@dataclass
class Outcome:
    """What came of a step: "running", "passed", "failed", "timed out" or "skipped"."""

    status: str = "running"
    reason: str = ""
    seconds: float = 0.0
    counts: dict[str, int] = field(default_factory=dict)
    failures: list[dict[str, str]] = field(default_factory=list)


# ---- A test process: these hooks make this module a pytest plugin ----


def pytest_collection_finish(session: Any) -> None:
    """Keep this process's share of the tests: every so-manieth, so that neighbours, which share kernels, spread."""
    index, count = map(int, os.environ[SHARD].split("/"))
    session.items[:] = session.items[index::count]
    _write_line({"selected": len(session.items)})


def pytest_runtest_logreport(report: Any) -> None:
    """Note a result at once: the process may be killed."""
    if report.when == "call" or report.outcome != "passed":
        message = ""
        if report.outcome == "failed":
            crash = getattr(report.longrepr, "reprcrash", None)
            message = str(crash.message if crash else report.longrepr)[:400]
        elif report.outcome == "skipped" and isinstance(report.longrepr, tuple):
            message = str(report.longrepr[2])[:200]
        _write_line({"test": report.nodeid, "outcome": report.outcome, "message": message})


def pytest_collectreport(report: Any) -> None:
    """Note a file that cannot be imported."""
    if report.failed:
        _write_line({"test": report.nodeid, "outcome": "failed", "message": str(report.longrepr)[-400:]})


def _write_line(line: Mapping[str, object]) -> None:
    with open(os.environ[LINES], "a") as file:
        file.write(json.dumps(line) + "\n")


# ---- The small set ----


def run_small_set(backend: str) -> list[str]:
    """Compare a few calls of every kind with the reference, forward and backward; for "cuda" those that it takes.

    Args:
        backend: what is tested.

    Returns:
        One line for each call that is wrong.
    """
    import torch

    from tests.tolerance import assert_all_close  # the one rule of all tests

    # Without a GPU, triton is there only where its interpreter takes tensors of the CPU.
    device = "cuda" if backend in ("cuda", "triton") and torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    wrong, ran = [], 0
    for function, sizes, options in _small_cases(generator):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            inputs = {name: torch.randn(size, generator=generator).to(dtype) for name, size in sizes.items()}
            expected = _evaluate(f"vidattn.{function}", inputs, options | {"backend": "reference"}, "cpu")
            exact = _evaluate(f"vidattn.reference.{function}", inputs, options, torch.float64)
            try:
                actual = _evaluate(f"vidattn.{function}", inputs, options | {"backend": backend}, device)
                ran += 1
                # The CUDA kernels round dP before the bias sums it, as all that see no whole rows.
                assert_all_close(actual, expected, exact, dtype, whole_rows=backend != "cuda")
            except Exception as error:
                if backend == "cuda" and "cannot run this call" in str(error):
                    continue
                wrong.append(
                    f"{function} {next(iter(sizes.values()))} {dtype}: {(str(error) or repr(error)).splitlines()[0]}"
                )
    return wrong if ran else ["no call ran"]


def _small_cases(generator: Any) -> list[tuple[str, dict[str, tuple[int, ...]], dict[str, Any]]]:
    """Functions with sizes of their inputs and other arguments."""
    import torch

    def grid_case(grid: Any, window: Any, shift: Any, heads: int, head_dim: int) -> Any:
        rows = (2 * window[0] - 1) * (2 * window[1] - 1) * (2 * window[2] - 1)
        sizes = {
            "qkv": (1, *grid, 3, heads, head_dim),
            "bias_table": (rows, heads),
            "pad_qkv": (3, heads, head_dim),
            "grad_out": (1, *grid, heads * head_dim),
        }
        return "window3d_attention", sizes, {"window_size": window, "shift_size": shift}

    def divided_case(name: str, tokens: int, num_frames: int, **more: Any) -> Any:
        sizes = {"qkv": (2, tokens, 3, 2, 40), "grad_out": (2, tokens, 80)}
        return f"{name}_attention", sizes, {"num_frames": num_frames, **more}

    def mixing_case(tokens: int, **more: Any) -> Any:
        sizes = {"qkv": (6, tokens, 3, 3, 40), "grad_out": (6, tokens, 120)}
        return "space_time_mixing_attention", sizes, {"num_frames": 3, **more}

    shifted = {"x": (6, 7, 24), "grad_out": (6, 7, 24)}
    windows = {"qkv": (5, 50, 3, 2, 24), "bias": (2, 50, 50), "grad_out": (5, 50, 48)}
    return [
        grid_case((3, 5, 7), (2, 3, 3), (1, 1, 1), 2, 20),  # padded on every axis, shifted, an odd head dimension
        grid_case((8, 14, 14), (8, 7, 7), (4, 3, 3), 2, 32),  # windows of Video Swin, shifted on two axes
        ("window_attention", windows, {"mask": torch.randn(5, 50, 50, generator=generator)}),
        divided_case("temporal", 8 * 13, 8, token_order="hwt"),  # sequences that share a tile
        divided_case("temporal", 140 * 2, 140),  # longer than a tile
        divided_case("spatial", 1 + 3 * 7, 3, token_order="hwt", cls_token="mean"),
        divided_case("spatial", 1 + 2 * 196, 2, token_order="hwt", cls_token="mean"),
        divided_case("factorized_dot_product", 5 * 50, 5),
        mixing_case(50, shift_div=3),  # heads from one frame each
        mixing_case(140, shift_div=4),  # and from several
        mixing_case(20, channel_shifts=[(3, 57, 1), (57, 90, -2)]),  # cut anywhere
        ("temporal_shift", shifted, {"num_frames": 3, "channel_shifts": [(0, 8, 1), (8, 13, -1)]}),
    ]


def _evaluate(function: str, inputs: dict[str, Any], options: dict[str, Any], to: Any) -> dict[str, Any]:
    """Run a function forward and backward on a device or in a dtype; results on the CPU."""
    import torch

    module, _, name = function.rpartition(".")
    leaves = {key: value.to(to).requires_grad_() for key, value in inputs.items()}
    grad_out = leaves.pop("grad_out").detach()
    moved = {key: value.to(to) if isinstance(value, torch.Tensor) else value for key, value in options.items()}
    out = getattr(importlib.import_module(module), name)(**leaves, **moved)
    # The graph of the float64 reference does not contain pad_qkv where nothing is padded.
    gradients = torch.autograd.grad(out, list(leaves.values()), grad_out, materialize_grads=True)
    return {key: value.detach().cpu() for key, value in zip(("out", *leaves), (out, *gradients), strict=True)}


def run_primitives() -> list[str]:
    """Compile what prints the results of every primitive, and compare them with those of the emulated GPU.

    Returns:
        One line for each primitive that gives something else.
    """
    from tests.cuda_emulator import conformance

    nvcc = find_tool("nvcc")
    assert nvcc is not None
    with tempfile.TemporaryDirectory() as folder:
        program = str(Path(folder) / "conformance")
        source = conformance.KERNELS / "conformance_gpu.cu"
        flags = ["-std=c++17", "-arch=native", "-I", str(ROOT / "csrc" / "cuda"), "-o", program]
        for command in ([nvcc, *flags, str(source)], [program]):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                return [f"{Path(command[0]).name} failed: {(done.stderr or done.stdout).strip()[-1000:]}"]
    return conformance.compare(conformance.parse(done.stdout), conformance.committed())


# ---- Running steps ----


def absent(packages: Iterable[str]) -> list[str]:
    """Pick the packages that are not installed."""
    return [name for name in packages if importlib.util.find_spec(name) is None]


def find_tool(name: str) -> str | None:
    """Find a tool of CUDA, which is often installed beside a PATH that does not name it."""
    toolkits = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    path = os.pathsep.join([os.environ.get("PATH", ""), *(f"{toolkit}/bin" for toolkit in toolkits if toolkit)])
    return shutil.which(name, path=path)


def missing(step: Step) -> str:
    """Say why a step cannot run here; nothing if it can."""
    packages = absent(step.needs)
    if packages:
        return f"not installed: {', '.join(packages)}"
    if step.tool is not None and find_tool("compute-sanitizer") is None:
        return "no compute-sanitizer"
    if step.program == "--primitives" and find_tool("nvcc") is None:
        return "no nvcc"
    if step.backend is not None:
        import vidattn

        return "; ".join(vidattn.why_not("window3d_attention", backend=step.backend))
    return ""


def commands(step: Step, backend: str, processes: int, folder: Path) -> list[tuple[list[str], dict[str, str]]]:
    """Give the command lines of a step's processes, each with what it adds to the environment."""
    python, backend = sys.executable, step.backend or backend
    paths = [str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    # torch demands it of anyone who asks for deterministic products on a GPU, as the tests do.
    environment["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    if step.strict:
        environment["VIDATTN_BACKEND"] = backend
    if not step.files:
        command = [python, "-m", "benchmarks.gpu_test", step.program, "--backend", backend]
        if step.tool is not None:
            sanitizer = [
                find_tool("compute-sanitizer") or "compute-sanitizer",
                "--tool",
                step.tool,
                "--error-exitcode",
                "9",
            ]
            # torch probes for features by calls that may fail; those are no errors of the kernels.
            command = [*sanitizer, *(["--report-api-errors", "no"] if step.tool == "memcheck" else []), *command]
            environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # else neighbours in torch's blocks hide overruns
        return [(command, environment)]
    settings = folder / "pytest.ini"
    settings.write_text(PYTEST_INI)
    command = [python, "-m", "pytest", "-q", "-c", str(settings), f"--rootdir={ROOT}", "--import-mode=importlib"]
    command += ["-p", "benchmarks.gpu_test", "-p", "no:cacheprovider", "--tb=short"]
    select = [step.select.format(backend=backend), *(f"not {step.optional[name]}" for name in absent(step.optional))]
    command += ["-m", "not slow", "-k", " and ".join(select), *step.files]
    return [
        (command, environment | {SHARD: f"{i}/{processes}", LINES: str(folder / f"{i}.jsonl")})
        for i in range(processes)
    ]


def read_lines(files: Sequence[Path]) -> tuple[dict[str, int], list[dict[str, str]]]:
    """Add up what test processes have noted so far: counts by outcome, and the failures."""
    counts, failures = {"selected": 0, "passed": 0, "failed": 0, "skipped": 0}, []
    for file in files:
        for line in file.read_text().splitlines() if file.exists() else ():
            try:
                noted = json.loads(line)
            except ValueError:  # the last line of a killed process
                continue
            if "selected" in noted:
                counts["selected"] += noted["selected"]
                continue
            counts[noted["outcome"]] += 1
            if noted["outcome"] == "failed":
                failures.append({"test": noted["test"], "message": noted["message"]})
    return counts, failures


def judge(
    step: Step, seconds: float, codes: Sequence[int | None], counts: Mapping[str, int], output: str
) -> tuple[str, str]:
    """Turn exit statuses (None: killed at the limit) and counts into a status and a reason."""
    tail = "\n".join(output.strip().splitlines()[-12:])[-1500:]
    if None in codes:
        return "timed out", f"limit of {seconds:.0f} s"
    if not step.files:
        return ("passed", "") if not any(codes) else ("failed", tail)
    if not counts["selected"]:
        return "failed", f"no test selected: {tail}"
    # 5: a process whose share is empty.
    if any(code not in (0, 1, 5) for code in codes):
        return "failed", f"exit statuses {sorted(set(codes) - {0}, key=str)}: {tail}"
    return ("failed", "") if counts["failed"] else ("passed", "")


def _kill(process: subprocess.Popen[str]) -> None:
    """Kill a process with its children: it was started as the leader of a group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


class Run:
    """Runs steps one after the other and keeps the result file up to date."""

    def __init__(self, path: Path, backend: str, processes: int) -> None:
        from benchmarks.calibration import describe_gpu

        self._path, self._backend, self._processes = path, backend, processes
        self.outcomes: dict[str, Outcome] = {}
        self._header = {"machine": describe_gpu(), "backend": backend, "processes": processes}

    def save(self) -> None:
        """Write the result file."""
        from benchmarks.calibration import write_json

        steps = {name: outcome.__dict__ for name, outcome in self.outcomes.items()}
        write_json(self._path, self._header | {"steps": steps})

    def step(self, step: Step, seconds: float) -> Outcome:
        """Run a step in at most so many seconds."""
        outcome = self.outcomes[step.name] = Outcome()
        reason = missing(step)
        if reason:
            outcome.status, outcome.reason = "skipped", reason
            self.save()
            return outcome
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            running: list[tuple[subprocess.Popen[str], IO[str]]] = []
            for command, environment in commands(step, self._backend, self._processes, folder):
                output = (folder / f"output-{len(running)}").open("w+", errors="replace")
                running.append((self._start(command, environment, output), output))
            files = [folder / f"{i}.jsonl" for i in range(len(running))] if step.files else []
            try:
                while any(process.poll() is None for process, _ in running):
                    time.sleep(min(POLL_SECONDS, 0.2 + (time.monotonic() - start) / 10))
                    outcome.counts, outcome.failures = read_lines(files) if files else ({}, [])
                    outcome.seconds = round(time.monotonic() - start, 1)
                    self.save()
                    if outcome.seconds > seconds:
                        break
            finally:
                codes = [process.poll() for process, _ in running]
                for process, _ in running:
                    _kill(process)
            outcome.counts, failures = read_lines(files) if files else ({}, [])
            outcome.failures = failures[:KEPT_FAILURES]
            outcome.status, outcome.reason = judge(step, seconds, codes, outcome.counts, _worst_output(running, codes))
        if absent(step.optional):
            left_out = f"left out what needs {', '.join(absent(step.optional))}, not installed"
            outcome.reason = "; ".join(filter(None, [left_out, outcome.reason]))
        outcome.seconds = round(time.monotonic() - start, 1)
        self.save()
        return outcome

    def _start(self, command: Sequence[str], environment: Mapping[str, str], output: IO[str]) -> subprocess.Popen[str]:
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **environment},
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )


def _worst_output(running: Sequence[tuple[subprocess.Popen[str], IO[str]]], codes: Sequence[int | None]) -> str:
    """Read what the process with the worst exit status printed."""
    worst = max(range(len(running)), key=lambda i: abs(codes[i] or 0))
    file = running[worst][1]
    file.seek(0)
    text = file.read()
    for _, opened in running:
        opened.close()
    return text


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_test", description=(__doc__ or "").splitlines()[0])
    folder = Path(__file__).parent / "results"
    parser.add_argument("--out", type=Path, default=folder, help="folder of the result, gpu-test.json (%(default)s)")
    parser.add_argument("--seconds", type=float, default=460.0, help="time limit of all steps (%(default)s)")
    parser.add_argument("--step", nargs="+", choices=[step.name for step in STEPS], help="only these")
    parser.add_argument("--backend", default="triton", help="backend under test (%(default)s)")
    parser.add_argument("--processes", type=int, help="test processes at a time")
    parser.add_argument("--small-set", action="store_true", help="run the small set in this process, nothing else")
    parser.add_argument(
        "--primitives", action="store_true", help="compare the primitives of CUDA kernels, nothing else"
    )
    options = parser.parse_args(arguments)
    if options.small_set or options.primitives:
        wrong = run_primitives() if options.primitives else run_small_set(options.backend)
        print("\n".join(wrong) or "all right")
        parser.exit(1 if wrong else 0)

    import torch

    import vidattn
    from tests.imported_copy import describe

    print(describe())
    reasons = vidattn.why_not("window3d_attention", backend=options.backend)
    if options.backend in ("cuda", "triton") and not torch.cuda.is_available():
        reasons.append(f"torch {torch.__version__} finds no GPU")
    if reasons:
        parser.exit(2, f"{parser.prog}: {options.backend} cannot run here: {'; '.join(reasons)}\n")
    processes = options.processes or min(MAX_PROCESSES, len(os.sched_getaffinity(0)))
    run = Run(options.out / "gpu-test.json", options.backend, processes)
    deadline = time.monotonic() + options.seconds
    for step in STEPS:
        if options.step is None or step.name in options.step:
            outcome = run.step(step, min(step.seconds, deadline - time.monotonic()))
            print(
                f"{step.name:15} {outcome.status:9} {outcome.seconds:6.1f} s  {outcome.counts or ''} {outcome.reason}"
            )
            for failure in outcome.failures[:10]:
                print(f"    {failure['test']}: {(failure['message'].splitlines() or [''])[0][:160]}")
            sys.stdout.flush()
    if any(outcome.status in ("failed", "timed out") for outcome in run.outcomes.values()):
        parser.exit(1)


if __name__ == "__main__":
    main()

"""What runs when somebody has a GPU, tried without one: plan, arithmetic, supervision, calibration, test runner."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

import vidattn
from benchmarks import calibration, gpu_bench, gpu_test
from benchmarks.gpu_bench import Task
from benchmarks.prediction import Rates
from benchmarks.rounds import check_agreement
from benchmarks.shapes import GPU_WINDOW_CASES
from benchmarks.window3d_contenders import build_copies

STAGE1 = Task("swin_t_stage1", "forward", "bfloat16", "vidattn")
SMOKE = replace(STAGE1, case="smoke", dtype="float32")


# ---- Plan and arithmetic ----


def test_plan_covers_every_case_and_starts_with_the_main_ones():
    groups = gpu_bench.plan(list(gpu_bench.GPU_CASES))
    assert all(len({task.group for task in group}) == 1 for group in groups)
    tasks = [task for group in groups for task in group]
    assert len(tasks) == len(set(tasks))
    for case in gpu_bench.GPU_CASES:
        for direction in ("forward", "forward_backward"):
            wanted = {Task(case, direction, "bfloat16", name) for name in gpu_bench.contenders(case)}
            assert {"vidattn", "eager", "sdpa", "compiled"} <= {task.contender for task in wanted}
            assert wanted <= set(tasks)
    assert {task.case for task in tasks[:52]} == set(gpu_bench.MAIN_CASES)
    assert {task.dtype for task in tasks} == {"bfloat16", "float16", "float32"}


@pytest.mark.parametrize("case", gpu_bench.GPU_CASES)
@pytest.mark.parametrize("direction", ["forward", "forward_backward"])
def test_inputs_rotate_beyond_the_l2_cache(case, direction):
    shape = gpu_bench.GPU_CASES[case]
    copies = gpu_bench.count_copies(shape, direction, "bfloat16")
    assert copies >= 2 and copies * shape.bytes_moved(direction, torch.bfloat16) > 120e6


def test_figures_of_stage1_by_hand():
    found = gpu_bench.figures(STAGE1, [310.0, 300.0], Rates())
    scores = 8 * 128 * 3 * 392**2
    assert found["scores_per_s"] == pytest.approx(scores / 300e-6)
    assert found["tflops"] == pytest.approx(scores * 128 / 300e-6 * 1e-12)
    assert found["gb_per_s"] == pytest.approx(8 * 16 * 56 * 56 * 96 * 2 * 4 / 300e-6 * 1e-9)
    assert found["noise"] == pytest.approx(1 / 30)
    assert found["floor_us"] == pytest.approx(scores / 3.71e12 * 1e6)  # exponentials: 127 us
    assert found["share_of_floor"] == pytest.approx(found["floor_us"] / 300)
    both = gpu_bench.floor_us(GPU_WINDOW_CASES[STAGE1.case], "forward_backward", "bfloat16", Rates())
    assert both == pytest.approx(found["floor_us"] + scores * 320 / 790e12 * 1e6)  # products: 191 us
    assert gpu_bench.floor_us(GPU_WINDOW_CASES[STAGE1.case], "forward", "float32", Rates()) is None


def test_figures_of_attention_over_time_and_space_by_hand():
    task = Task("timesformer_b_space", "forward", "bfloat16", "vidattn")
    found = gpu_bench.figures(task, [25.0], Rates())
    assert found["scores_per_s"] == pytest.approx(8 * 8 * 12 * 197**2 / 25e-6)
    assert found["floor_us"] == pytest.approx(17.9, rel=0.005)  # bytes
    both = gpu_bench.floor_us(gpu_bench.CASES[task.case], "forward_backward", "bfloat16", Rates())
    assert both == pytest.approx(17.9 + 31.4, rel=0.005)


def test_figures_of_mixing_by_hand():
    task = Task("xvit_b_16_frames_div8", "forward", "bfloat16", "vidattn")
    found = gpu_bench.figures(task, [50.0], Rates())
    assert found["scores_per_s"] == pytest.approx(8 * 16 * 12 * 197**2 / 50e-6)
    assert found["floor_us"] == pytest.approx(36.0, rel=0.005)  # bytes
    both = gpu_bench.floor_us(gpu_bench.CASES[task.case], "forward_backward", "bfloat16", Rates())
    assert both == pytest.approx(36.0 + 63.1, rel=0.005)


def test_speedups_compare_the_better_turns_of_one_case():
    eager, other = replace(STAGE1, contender="eager"), replace(STAGE1, case="swin_t_stage2", contender="eager")
    entries = {STAGE1: {"us": [110.0, 100.0]}, eager: {"us": [300.0]}, other: {"us": [1.0]}}
    assert gpu_bench.speedups(entries) == {"swin_t_stage1/forward/bfloat16": {"eager": 3.0}}


def test_natten_takes_part_only_where_it_computes_something_close(monkeypatch):
    whole, shifted, *_ = gpu_bench.MAIN_CASES
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert gpu_bench.why_not(whole, "forward", "natten") == "natten is not installed"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert gpu_bench.why_not(whole, "forward", "natten") is None
    assert "shifted" in str(gpu_bench.why_not(shifted, "forward", "natten"))
    assert "gradient" in str(gpu_bench.why_not(whole, "forward_backward", "sdpa_prebuilt"))


@pytest.mark.slow
def test_flex_contender_agrees_with_eager():
    shape = gpu_bench.CASES["smoke"]
    results = {name: build_copies(shape, "forward", "float32", name)[0]() for name in ("eager", "flex")}
    check_agreement(results)


# ---- Sampling ----


class FakeEvent:
    """An event whose time is the number of calls enqueued before it."""

    enqueued = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.time = FakeEvent.enqueued

    def elapsed_time(self, other: FakeEvent) -> float:
        return other.time - self.time


def test_event_samples_are_per_call_and_leave_out_the_idle_start(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    durations = iter([100.0, 4.0, 6.0, 8.0])

    def enqueue() -> None:
        FakeEvent.enqueued += next(durations)

    assert gpu_bench._between_events(enqueue, 2, 3) == [2e-3, 3e-3, 4e-3]


class FakeGraph:
    """A capture that remembers what was called; replaying it calls nothing."""

    replays = 0

    def replay(self) -> None:
        FakeGraph.replays += 1


@pytest.mark.parametrize("captures", [True, False])
def test_measuring_on_a_gpu_follows_the_rules_of_graphs(monkeypatch, captures):
    """The steps of a measurement, with everything that needs a GPU in them replaced."""
    streams, calls = [], []

    @contextlib.contextmanager
    def enter(stream_or_graph):
        if isinstance(stream_or_graph, FakeGraph) and not captures:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        streams.append(type(stream_or_graph).__name__)
        yield
        streams.pop()

    class Stream:
        def wait_stream(self, other) -> None: ...

    def build(shape, direction, dtype, contender, device, copies=1):
        def call():
            calls.append(streams[-1] if streams else "default")
            FakeEvent.enqueued += 1.0
            return (torch.ones(3),)

        return [call] * copies

    fakes = {
        "Event": FakeEvent,
        "Stream": Stream,
        "CUDAGraph": FakeGraph,
        "stream": enter,
        "graph": enter,
        "current_stream": Stream,
        "memory_allocated": lambda: 5,
        "max_memory_allocated": lambda: 12,
    }
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        fakes[name] = lambda: None
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(gpu_bench, "build_copies", build)
    measurer = gpu_bench.Measurer("cuda")
    task = replace(STAGE1, case="swin_t_stage4")  # 38 MB forward: five copies
    found = measurer.measure(task)
    assert found["copies"] == 5 and found["agrees"] is True and found["peak_extra_bytes"] == 7
    assert calls.count("Stream") == 5  # each has run on another stream before
    if captures:
        assert found["timer"] == "graph" and calls.count("FakeGraph") == 10  # the copies twice: at least 8 calls
        assert FakeGraph.replays == gpu_bench.REPLAYS + 1
        assert set(measurer.measure(task)) == {"us"} and calls.count("FakeGraph") == 10  # prepared once
    else:
        assert found["timer"] == "events" and found["us"] == pytest.approx(1000.0)
        assert found["not_captured"] == "RuntimeError: operation not permitted when stream is capturing"


def test_copies_have_inputs_of_their_own():
    first, second = build_copies(gpu_bench.CASES["smoke"], "forward_backward", "float32", "vidattn", "cpu", 2)
    assert not torch.equal(first()[0], second()[0])
    assert torch.equal(first()[0], first()[0])


# ---- Supervising ----


def crash_or_hang(connection, device) -> None:
    """A worker that answers "ok" at first, then dies or says nothing, as the task's case demands."""
    while True:
        task = connection.recv()
        if task.case == "crash":
            os.abort()
        if task.case == "hang":
            time.sleep(60)
        connection.send({"us": 1.0, "pid": os.getpid(), "restart": task.case == "restart"})


def test_worker_survives_contenders_that_do_not():
    worker = gpu_bench.Worker("cpu", crash_or_hang)
    try:
        first = worker.measure(replace(SMOKE, case="fine"), 60)
        assert worker.measure(replace(SMOKE, case="fine"), 60) == first
        assert worker.measure(replace(SMOKE, case="crash"), 60) == {"error": "the process ended with exit status -6"}
        second = worker.measure(replace(SMOKE, case="restart"), 60)
        assert second["us"] == 1.0 and "restart" not in second
        third = worker.measure(replace(SMOKE, case="fine"), 60)
        assert len({first["pid"], second["pid"], third["pid"]}) == 3
        assert worker.measure(replace(SMOKE, case="hang"), 0.5) == {"error": "no result within 0 s"}
    finally:
        worker.stop()


class FakeWorker(gpu_bench.Worker):
    def __init__(self, answers) -> None:
        self.answers, self.tasks = answers, []

    def measure(self, task, seconds):
        self.tasks.append(task.contender)
        return dict(self.answers[task.contender])

    def stop(self) -> None:
        self.tasks.append("stop")


def test_bench_measures_twice_and_goes_on_after_failures(tmp_path):
    worker = FakeWorker({"vidattn": {"us": 2.0}, "eager": {"error": "OutOfMemoryError: no"}, "sdpa": {"us": 4.0}})
    bench = gpu_bench.Bench(tmp_path / "gpu.json", Rates(), 100, worker)
    bench.run([[replace(SMOKE, contender=name) for name in ("vidattn", "eager", "sdpa", "natten")]])
    assert worker.tasks == ["vidattn", "eager", "sdpa", "vidattn", "sdpa", "stop"]
    saved = json.loads((tmp_path / "gpu.json").read_text())
    vidattn, eager, sdpa, natten = saved["measurements"]
    assert vidattn["us"] == [2.0, 2.0] and sdpa["us"] == [4.0, 4.0]
    assert eager["error"] == "OutOfMemoryError: no" and natten["skipped"].startswith("natten ")
    assert saved["speedups"] == {"smoke/forward/float32": {"sdpa": 2.0}}


def test_bench_skips_what_does_not_fit_and_keeps_what_it_has(tmp_path):
    class OutOfTime(FakeWorker):
        def measure(self, task, seconds):
            bench._deadline = time.monotonic()
            return super().measure(task, seconds)

    worker = OutOfTime({"vidattn": {"us": 2.0}})
    bench = gpu_bench.Bench(tmp_path / "gpu.json", Rates(), 100, worker)
    bench.run([[SMOKE, replace(SMOKE, contender="eager")]])
    assert worker.tasks == ["vidattn", "stop"]
    ours, eager = json.loads((tmp_path / "gpu.json").read_text())["measurements"]
    assert ours["us"] == [2.0] and eager["skipped"] == "no time left"


def test_whole_bench_on_the_cpu(tmp_path, capsys, monkeypatch):
    cases = ["smoke", "smoke_spatial", "smoke_mixing"]
    groups = [[task for task in group if not task.slow] for group in gpu_bench.plan(cases)]
    monkeypatch.setattr(gpu_bench, "plan", lambda cases: [group for group in groups if group][:6])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    gpu_bench.main(["--device", "cpu", "--case", *cases, "--out", str(tmp_path), "--seconds", "100"])
    text = (tmp_path / "cpu.json").read_text()
    assert os.uname().nodename not in text
    measured = [entry for entry in json.loads(text)["measurements"] if "us" in entry]
    # Three contenders in both directions; of windows four forward and three with backward.
    assert [entry["case"] for entry in measured] == ["smoke_spatial"] * 6 + ["smoke_mixing"] * 6 + ["smoke"] * 7
    assert all(entry["agrees"] is True and len(entry["us"]) == 2 and min(entry["us"]) > 0 for entry in measured)
    rich = capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "rich.console", None)
    gpu_bench.show(json.loads(text))
    plain = capsys.readouterr().out
    for printed in (rich, plain):
        assert "sdpa_prebuilt" in printed and "natten " in printed


def test_wrong_results_are_marked(monkeypatch):
    measurer = gpu_bench.Measurer("cpu")
    assert measurer.measure(SMOKE)["agrees"] is True
    measurer._samples.clear()
    measurer._expected = tuple(x + 1 for x in measurer._expected)
    assert "differ" in measurer.measure(SMOKE)["agrees"]


# ---- Calibration ----


class FakeKernels:
    def measure(self, name, blocks, **_):
        if name == "segments":
            raise calibration.CalibrationError("segments: out of memory")
        amount = {"lds32": 4e3, "lds64": 2e3, "lds64_broadcast": 4e3}.get(name, 8e3)
        return calibration.Measured(fastest=2e-3, mean=4e-3, amount=amount * blocks, clock=1e9)


def test_calibration_writes_what_it_can_measure(tmp_path, monkeypatch):
    monkeypatch.setattr(calibration, "TORCH_STEPS", ())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    calibration.calibrate(tmp_path / "rates.json", lambda folder: FakeKernels())
    saved = json.loads((tmp_path / "rates.json").read_text())
    assert saved["skipped"] == {"segment_copies": "segments: out of memory"}
    assert saved["exponentials_per_s"] == 8 * 8e3 / 2e-3 and saved["sm_clock_hz"] == 1e9
    assert saved["exponentials_per_clock_and_sm"] == pytest.approx(0.032)
    assert saved["wgmma_flops_per_s"] == 2 * saved["wgmma_flops_per_s_sustained"]
    assert saved["lds64_clocks"] == pytest.approx(2 * saved["lds32_clocks"])
    assert saved["lds64_broadcast_wavefronts"] == pytest.approx(1)
    assert saved["shared_bytes_per_s"] == 32 * 8 * 2e3 * saved["exponentials_per_s"] / 8e3
    measured_by_torch = {"copy_bytes_per_s"}
    assert {field.name for field in fields(Rates)} - measured_by_torch <= set(saved)
    assert Rates.load(tmp_path / "rates.json").exponentials_per_s == saved["exponentials_per_s"]


def test_calibration_without_a_compiler_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    saved = calibration.calibrate(tmp_path / "rates.json", lambda folder: calibration.build_library(folder, "90a"))
    assert saved["skipped"]["kernels"] == "no nvcc"
    assert json.loads((tmp_path / "rates.json").read_text()) == saved


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_calibration_loops_hold_what_they_measure(tmp_path):
    library = calibration.build_library(tmp_path, "90a")
    cuobjdump = pytest.importorskip("triton.knobs", reason="no triton, so no disassembler").nvidia.cuobjdump.path
    listing = subprocess.run([cuobjdump, "-sass", library], capture_output=True, text=True, check=True).stdout
    loops = {}
    for part in re.split(r"\n\s*Function : ", listing)[1:]:
        lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)([^;]*);", part)
        places = [int(address, 16) for address, _, _ in lines]
        backward = [
            (places.index(int(target[0], 16)), index)
            for index, (address, opcode, operands) in enumerate(lines)
            if opcode == "BRA" and (target := re.findall(r"0x([0-9a-f]+)", operands))
            if int(target[0], 16) < int(address, 16)
        ]
        loops[part.split()[0]] = [[opcode for _, opcode, _ in lines[a:b]] for a, b in backward]
    wanted = {
        "arithmeticILNS_9OperationE0": ("MUFU.EX2", 32),
        "arithmeticILNS_9OperationE1": ("FMNMX", 32),
        "arithmeticILNS_9OperationE2": ("F2FP.BF16.F32.PACK_AB", 32),
        "arithmeticILNS_9OperationE3": ("FFMA", 32),
        "8mma_sync": ("HMMA.16816.F32.BF16", 8),
        "5wgmma": ("HGMMA.64x128x16.F32.BF16", 4),
        "shared_loadsILNS_7PatternE0": ("LDS", 8),
        "shared_loadsILNS_7PatternE1": ("LDS.64", 8),
        "shared_loadsILNS_7PatternE2": ("LDS.64", 8),
        "l2_reads": ("LDG.E.128.STRONG.GPU", 4),
        "segments": ("LDG.E.128", 12),
    }
    for name, (opcode, count) in wanted.items():
        (found,) = [bodies for function, bodies in loops.items() if name in function]
        assert count in [body.count(opcode) for body in found], (name, [body.count(opcode) for body in found])
    # Without a GPU the library loads and says what is missing.
    if not torch.cuda.is_available():
        with pytest.raises(calibration.CalibrationError, match="exp2: "):
            calibration.Kernels(library, "cpu").measure("exp2", 1)


# ---- The test runner ----


@pytest.fixture
def run(tmp_path) -> gpu_test.Run:
    return gpu_test.Run(tmp_path / "gpu-test.json", "cpu", 2)


def _step(tmp_path: Path, text: str, seconds: float = 60) -> gpu_test.Step:
    file = tmp_path / "test_some_cpu.py"
    file.write_text(text)
    return gpu_test.Step("some", seconds, (str(file),))


def test_runner_collects_results_of_all_processes(run, tmp_path):
    text = """
import pytest
@pytest.mark.parametrize("i", range(7))
def test_even(i): assert i % 2 == 0, f"odd {i}"
def test_left_out(): pytest.skip("because")
"""
    outcome = run.step(_step(tmp_path, text), 60)
    assert outcome.status == "failed"
    assert outcome.counts == {"selected": 8, "passed": 4, "failed": 3, "skipped": 1}
    assert sorted(failure["message"].split("\n")[0] for failure in outcome.failures) == [
        f"AssertionError: odd {i}" for i in (1, 3, 5)
    ]
    assert json.loads((tmp_path / "gpu-test.json").read_text())["steps"]["some"]["counts"]["failed"] == 3


def test_runner_keeps_results_of_a_step_that_hangs(run, tmp_path):
    text = "import time\ndef test_a(): pass\ndef test_b(): pass\ndef test_c(): time.sleep(60)\n"
    outcome = run.step(_step(tmp_path, text, seconds=12), 12)
    assert outcome.status == "timed out" and outcome.counts["passed"] == 2
    assert outcome.seconds < 30


def test_runner_fails_on_crashes_broken_files_and_empty_selections(run, tmp_path):
    crashed = run.step(_step(tmp_path, "import os\ndef test_a(): pass\ndef test_b(): os.abort()\n"), 60)
    assert crashed.status == "failed" and "-6" in crashed.reason and crashed.counts["passed"] == 1
    broken = run.step(_step(tmp_path, "import no_such_module\n"), 60)
    assert broken.status == "failed" and "no_such_module" in str(broken.failures) + broken.reason
    empty = run.step(replace(_step(tmp_path, "def test_a(): pass\n"), select="nothing"), 60)
    assert empty.status == "failed" and "no test selected" in empty.reason


def test_runner_leaves_out_what_needs_an_absent_package(run, tmp_path):
    step = _step(tmp_path, "def test_a(): pass\ndef test_tv_b(): import no_such_module\n")
    outcome = run.step(replace(step, optional={"no_such_module": "tv_", "pytest": "test_a"}), 60)
    assert outcome.status == "passed" and outcome.counts["selected"] == 1
    assert "no_such_module" in outcome.reason


def test_runner_skips_what_is_not_installed(run):
    outcome = run.step(gpu_test.Step("some", 60, ("tests/test_golden.py",), needs=("pytest", "no_such_module")), 60)
    assert (outcome.status, outcome.reason) == ("skipped", "not installed: no_such_module")


def test_what_cuda_kernels_need_is_said_where_it_is_missing(run, monkeypatch):
    steps = {step.name: step for step in gpu_test.STEPS}
    monkeypatch.setattr(vidattn, "why_not", lambda op, backend: [f"no {backend} here", "at all"])
    monkeypatch.setattr(gpu_test, "find_tool", lambda name: name)
    for name in ("cuda_numbers", "cuda_racecheck"):
        outcome = run.step(steps[name], 60)
        assert (outcome.status, outcome.reason) == ("skipped", "no cuda here; at all")
    monkeypatch.setattr(gpu_test, "find_tool", lambda name: None)
    outcome = run.step(steps["cuda_primitives"], 60)
    assert (outcome.status, outcome.reason) == ("skipped", "no nvcc")


def test_primitives_of_the_gpu_are_compared_with_those_of_the_emulated_one(tmp_path, monkeypatch):
    kernels = gpu_test.ROOT / "tests" / "cuda_emulator" / "kernels"
    given = tmp_path / "given.txt"
    given.write_text((kernels / "conformance.txt").read_text())
    nvcc = tmp_path / "nvcc"  # compiles whatever it is given to a program that prints that file
    nvcc.write_text(f"""#!/bin/sh
for out; do test "$before" = -o && break; before=$out; done
printf '#!/bin/sh\ncat {given}\n' > "$out" && chmod +x "$out"
""")
    nvcc.chmod(0o755)
    monkeypatch.setattr(gpu_test, "find_tool", lambda name: str(nvcc))
    assert gpu_test.run_primitives() == []
    line = next(line for line in given.read_text().splitlines() if line.startswith(" 3  5 "))
    given.write_text(given.read_text().replace(line, line[:-8] + "12345678"))
    (wrong,) = gpu_test.run_primitives()
    assert wrong.startswith("case 3: 1 words differ") and wrong.endswith("got 12345678")
    nvcc.write_text("#!/bin/sh\necho no such architecture >&2; exit 1\n")
    assert gpu_test.run_primitives() == ["nvcc failed: no such architecture"]


def test_small_set_finds_wrong_numbers(monkeypatch):
    def spoil(attend):
        def attend_wrongly(*args, backend, **options):
            return attend(*args, backend="reference", **options) * (1.0 if backend == "reference" else 1.5)

        return attend_wrongly

    assert gpu_test.run_small_set("reference") == []
    attend = ("window3d", "window", "temporal", "spatial", "factorized_dot_product", "space_time_mixing")
    for name in (*(f"{name}_attention" for name in attend), "temporal_shift"):
        monkeypatch.setattr(vidattn, name, spoil(getattr(vidattn, name)))
    wrong = gpu_test.run_small_set("wrong")
    assert len(wrong) == 36 and all("off by" in line for line in wrong)


def test_runner_refuses_a_backend_that_cannot_run(capsys):
    if torch.cuda.is_available():
        return
    with pytest.raises(SystemExit) as stopped:
        gpu_test.main([])
    printed = capsys.readouterr()
    assert stopped.value.code == 2 and "finds no GPU" in printed.err
    assert printed.out.startswith(f"vidattn {vidattn.__version__} from {Path(vidattn.__file__).parent}")


def test_steps_fit_into_eight_minutes_and_their_files_exist():
    assert sum(step.seconds for step in gpu_test.STEPS) <= 460  # the default of --seconds
    assert all((gpu_test.ROOT / file).exists() for step in gpu_test.STEPS for file in step.files)

"""What times contenders on a GPU, tried without one: arithmetic, report, contenders, sampling, loops of calibration."""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("triton", reason="triton is not installed")

import torch
from torch import Tensor

import vidattn
from benchmarks import calibration, gpu_build, gpu_report, gpu_test, gpu_timing
from benchmarks.calls import SDPA
from benchmarks.gpu_steps import Results, Skip
from benchmarks.mocked_machine import mocked_machine
from benchmarks.prediction import Rates
from benchmarks.rounds import check_agreement
from benchmarks.shapes import GPU_WINDOW_CASES, WindowCase
from benchmarks.window3d_contenders import build_copies

needs_cpu_kernels = pytest.mark.skipif(
    bool(vidattn.why_not("window3d_attention", backend="cpu")),
    reason="on a GPU that is not there the CPU's kernels compute, which are not built",
)
STAGE1 = ("swin_t_stage1", "forward", "bfloat16")

# ---- Arithmetic ----


@pytest.mark.parametrize("case", gpu_timing.GPU_CASES)
@pytest.mark.parametrize("direction", gpu_test.DIRECTIONS)
def test_inputs_rotate_beyond_the_l2_cache(case, direction):
    shape = gpu_timing.GPU_CASES[case]
    copies = gpu_timing.count_copies(shape, direction, "bfloat16")
    assert copies >= 2 and copies * shape.bytes_moved(direction, torch.bfloat16) > 120e6


def test_figures_of_stage1_by_hand():
    found = gpu_report.figures(*STAGE1, [310.0, 300.0], Rates())
    scores = 8 * 128 * 3 * 392**2
    assert found["scores_per_s"] == pytest.approx(scores / 300e-6)
    assert found["tflops"] == pytest.approx(scores * 128 / 300e-6 * 1e-12)
    assert found["gb_per_s"] == pytest.approx(8 * 16 * 56 * 56 * 96 * 2 * 4 / 300e-6 * 1e-9)
    assert found["noise"] == pytest.approx(1 / 30)
    assert found["floor_us"] == pytest.approx(scores / 3.71e12 * 1e6)  # exponentials: 127 us
    assert found["share_of_floor"] == pytest.approx(found["floor_us"] / 300)
    both = gpu_report.floor_us(GPU_WINDOW_CASES[STAGE1[0]], "forward_backward", "bfloat16", Rates())
    assert both == pytest.approx(found["floor_us"] + scores * 320 / 790e12 * 1e6)  # products: 191 us
    assert gpu_report.floor_us(GPU_WINDOW_CASES[STAGE1[0]], "forward", "float32", Rates()) is None


@pytest.mark.parametrize(
    ("case", "sequences", "forward", "backward"),
    [("timesformer_b_space", 8 * 8 * 12, 17.9, 31.4), ("xvit_b_16_frames_div8", 8 * 16 * 12, 36.0, 63.1)],
)
def test_figures_of_sequences_of_197_tokens_by_hand(case, sequences, forward, backward):
    found = gpu_report.figures(case, "forward", "bfloat16", [25.0], Rates())
    assert found["scores_per_s"] == pytest.approx(sequences * 197**2 / 25e-6)
    assert found["floor_us"] == pytest.approx(forward, rel=0.005)  # bytes
    both = gpu_report.floor_us(gpu_timing.CASES[case], "forward_backward", "bfloat16", Rates())
    assert both == pytest.approx(forward + backward, rel=0.005)


# ---- Report ----


@pytest.fixture
def results(tmp_path) -> Results:
    return Results(tmp_path / "lines", "code")


def add(results: Results, task: str, us: float | None = None, status: str = "passed", **found) -> None:
    line = {"status": status} | ({"reason": f"{task}: no\nand more"} if us is None else {})
    results.add("speed", task, line | ({"found": {"us": us, "launched_us": 2 * us} | found} if us is not None else {}))


def test_the_report_has_both_turns_and_says_why_there_is_none(results, tmp_path, capsys, monkeypatch):
    group = "/".join(STAGE1)
    add(results, f"{group}/vidattn", 110.0, agrees=True)
    add(results, f"{group}/eager", 300.0, agrees=True)
    add(results, f"{group}/sdpa_flash", status="skipped")
    add(results, f"{group}/natten", status="timed out")
    add(results, f"{group}/vidattn/again", 100.0)
    add(results, f"{group}/eager/again", status="failed")
    add(results, "swin_t_stage2/forward/bfloat16/eager", 1.0)
    machine = {"gpu": "NVIDIA H200", "torch": "2", "triton": "3", "date": "today"}
    built = Results(tmp_path / "built", "code")
    path, result = gpu_report.write(tmp_path, machine, (results, built), {"speed": 2, "numbers": 0})
    assert path == tmp_path / "nvidia-h200.json" and result["left"] == {"speed": 2}
    assert result["speedups"] == {group: {"eager": 3.0}}
    ours, eager, flash, natten, other = result["measurements"]
    assert ours["us"] == [110.0, 100.0] and ours["share_of_floor"] == pytest.approx(1.27, abs=0.01)
    assert eager["us"] == [300.0] and eager["second_turn"].startswith(f"{group}/eager/again: no")
    assert flash["skipped"].startswith(f"{group}/sdpa_flash") and "timed out" in natten and other["us"] == [1.0]
    assert gpu_report.failures(result, ["speed"]) == []  # rivals may be what they like
    gpu_report.show(result)
    rich = capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "rich.console", None)
    gpu_report.show(result)
    plain = capsys.readouterr().out
    for printed in (rich, plain):
        assert "110.0" in printed and "100.0" in printed and "eager 3.00x" in printed


def test_ours_fails_where_it_is_wrong_or_does_not_run_and_checks_fail(results, tmp_path):
    add(results, "swin_t_stage1/forward/bfloat16/vidattn", 1.0, agrees="vidattn and eager differ by 2 of the maximum")
    add(results, "swin_t_stage1/forward/bfloat16/eager", 1.0, agrees=True)
    add(results, "swin_t_stage2/forward/bfloat16/triton", status="failed")
    add(results, "swin_t_stage2/forward/bfloat16/eager", status="failed")
    results.add("numbers", "time_8", {"status": "failed", "reason": "off by 1"})
    results.add("numbers", "time_9", {"status": "timed out", "reason": "no result"})
    results.add("build", "rival of somebody", {"status": "failed", "reason": "it crashed"})
    machine = {"gpu": "none"}
    _, result = gpu_report.write(tmp_path, machine, (results,), {})
    failed = {line["task"]: line["reason"] for line in gpu_report.failures(result, ["build", "numbers", "speed"])}
    assert set(failed) == {
        "time_8",
        "time_9",
        "swin_t_stage1/forward/bfloat16/vidattn",
        "swin_t_stage2/forward/bfloat16/triton",
    }
    assert {line["task"] for line in gpu_report.failures(result, ["numbers"])} == {"time_8", "time_9"}
    assert "differ by 2" in failed["swin_t_stage1/forward/bfloat16/vidattn"]


def test_what_is_sent_names_no_folders(results, tmp_path):
    results.add(
        "numbers", "a", {"status": "failed", "reason": f"{gpu_build.ROOT}/x.py, {sys.prefix}/y, {Path.home()}/z"}
    )
    path, _ = gpu_report.write(tmp_path, {"gpu": "none"}, (results,), {})
    text = path.read_text()
    assert "./x.py, python/y, ~/z" in text and str(gpu_build.ROOT) not in text


# ---- Contenders ----


def triangle_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Tensor:
    """What cuEquivariance documents: (B, N, h, n, d), with a bias (B, 1, h, n, n) in float32."""
    assert q.dim() == 5 and bias.shape == (1, 1, q.shape[2], q.shape[3], k.shape[3]) and bias.dtype == torch.float32
    return ((q @ k.transpose(-2, -1)) * scale + bias.to(q.dtype)).softmax(-1) @ v


def flash_attn_func(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What flash-attention documents: (B, n, h, d)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return ((q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5).softmax(-1).matmul(v).transpose(1, 2)


def na3d(q: Tensor, k: Tensor, v: Tensor, kernel_size: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    assert q.dim() == 6 and kernel_size == stride
    return v


@pytest.fixture
def packages(monkeypatch) -> None:
    """The packages of rivals, as their documentation describes them."""
    for name, function in {
        "cuequivariance_torch": triangle_attention,
        "flash_attn": flash_attn_func,
        "natten": na3d,
    }.items():
        module = SimpleNamespace(__spec__=SimpleNamespace(), **{function.__name__: function})
        monkeypatch.setitem(sys.modules, name, module)


def agree(case: str, direction: str, *names: str) -> None:
    assert not any(gpu_timing.why_not(case, direction, "float32", name) for name in names)
    calls = {name: gpu_timing.build_copies(case, direction, "float32", name, "cpu")[0] for name in ("eager", *names)}
    check_agreement({name: call() for name, call in calls.items()})


@pytest.mark.parametrize("case", ["smoke", "plain"])
@pytest.mark.parametrize("direction", gpu_test.DIRECTIONS)
def test_rivals_of_windows_agree_with_the_module_code(case, direction, packages, monkeypatch):
    monkeypatch.setitem(gpu_timing.CASES, "plain", WindowCase((4, 4, 6), (2, 2, 3), (0, 0, 0), 2, head_dim=8, batch=2))
    agree(case, direction, "sdpa_math", "cuequivariance")
    if direction == "forward":
        agree(case, direction, "sdpa_flash")
        calls = {name: gpu_timing.build_copies(case, direction, "float32", name, "cpu")[0]() for name in ("eager",)}
        shape = gpu_timing.CASES[case]
        calls["prebuilt"] = build_copies(shape, direction, "float32", "sdpa_math_prebuilt")[0]()  # type: ignore[arg-type]
        check_agreement(calls)


@pytest.mark.parametrize("case", ["smoke_temporal", "smoke_spatial", "smoke_factorized", "smoke_mixing"])
@pytest.mark.parametrize("direction", gpu_test.DIRECTIONS)
def test_rivals_of_sequences_agree_with_the_module_code(case, direction, packages):
    agree(case, direction, "sdpa_math", "sdpa_flash", "flash_attn")


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("case", ["smoke", "smoke_spatial", "smoke_mixing"])
def test_flex_attention_agrees_with_the_module_code(case):
    with mocked_machine():  # where torch compiles nothing
        agree(case, "forward", "flex")


def test_pinned_kernels_run_or_say_that_they_do_not():
    q = torch.randn(1, 2, 8, 16)
    for name, backend in SDPA.items():
        assert backend.name.lower().startswith(name.removeprefix("sdpa_"))
    (call,) = gpu_timing.build_copies("smoke_temporal", "forward", "float32", "sdpa_cudnn", "cpu")
    with pytest.raises(RuntimeError, match=r"No (available|viable)"):
        call()
    assert torch.nn.functional.scaled_dot_product_attention(q, q, q).isfinite().all()  # nothing stays pinned


def test_contenders_take_part_only_where_they_can(packages, monkeypatch):
    whole, shifted, *_ = gpu_test.MAIN_CASES
    why_not = gpu_timing.why_not
    assert why_not(whole, "forward", "bfloat16", "natten") is None
    assert "shifted" in str(why_not(shifted, "forward", "bfloat16", "natten"))
    assert "gradient" in str(why_not(whole, "forward_backward", "bfloat16", "sdpa_cudnn_prebuilt"))
    assert why_not(whole, "forward", "bfloat16", "sdpa_cudnn_prebuilt") is None
    for name in ("natten", "flash_attn", "cuequivariance_torch"):
        monkeypatch.delitem(sys.modules, name)
    assert why_not(whole, "forward", "bfloat16", "natten") == "not installed: natten"
    assert why_not(whole, "forward", "bfloat16", "cuequivariance") == "not installed: cuequivariance_torch"
    assert why_not("timesformer_b_space", "forward", "bfloat16", "flash_attn") == "not installed: flash_attn"
    with mocked_machine():
        assert why_not(whole, "forward_backward", "bfloat16", "triton") is None  # beside "cuda", which vidattn takes
        assert why_not(whole, "forward", "float32", "triton") == "it is what vidattn takes here"


def test_natten_is_timed_without_being_compared(packages, monkeypatch):
    monkeypatch.setitem(gpu_timing.CASES, "plain", WindowCase((4, 4, 6), (2, 2, 3), (0, 0, 0), 2, head_dim=8, batch=2))
    with mocked_machine():
        found = gpu_timing.measure("plain", "forward", "float32", "natten", "cpu")
    assert found["agrees"] == "computes something else" and found["us"] > 0


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

    assert gpu_timing._between_events(enqueue, 2, 3) == [2e-3, 3e-3, 4e-3]


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

    def build(case, direction, dtype, contender, device, copies=1):
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
    monkeypatch.setattr(gpu_timing, "build_copies", build)
    measurer = gpu_timing.Measurer()
    task = ("swin_t_stage4", "forward", "bfloat16", "eager", "cuda")  # 38 MB: five copies
    found = measurer.measure(*task)
    assert found["copies"] == 5 and found["agrees"] is True and found["peak_extra_bytes"] == 7
    assert calls.count("Stream") == 5  # each has run on another stream before
    assert found["launched_us"] == pytest.approx(1000.0)
    if captures:
        assert found["timer"] == "graph" and calls.count("FakeGraph") == 10  # the copies twice: at least 8 calls
        assert FakeGraph.replays == gpu_timing.REPLAYS + 1
        assert set(measurer.measure(*task)) == {"us"} and calls.count("FakeGraph") == 10  # prepared once
    else:
        assert found["timer"] == "events" and found["us"] == pytest.approx(1000.0)
        assert found["not_captured"] == "RuntimeError: operation not permitted when stream is capturing"


def test_copies_have_inputs_of_their_own():
    first, second = gpu_timing.build_copies("smoke", "forward_backward", "float32", "vidattn", "cpu", 2)
    assert not torch.equal(first()[0], second()[0])
    assert torch.equal(first()[0], first()[0])


@needs_cpu_kernels
def test_wrong_results_are_marked_and_a_case_is_prepared_anew():
    measurer, task = gpu_timing.Measurer(), ("smoke", "forward", "float32", "vidattn", "cpu")
    with mocked_machine():
        found = measurer.measure(*task)
        assert found["agrees"] is True and found["backends"] == ["cpu"] and found["timer"] == "graph"
        measurer._samples.clear()
        measurer._expected = tuple(x + 1 for x in measurer._expected)
        assert "differ" in measurer.measure(*task)["agrees"]
        assert "agrees" in measurer.measure("smoke_spatial", *task[1:])
        assert measurer.measure(*task)["agrees"] is True  # nothing is left of the case before


def test_the_reference_is_not_timed_in_the_place_of_kernels(monkeypatch):
    monkeypatch.setattr(gpu_timing, "backends_taken", lambda call: {"reference"})
    with mocked_machine(), pytest.raises(RuntimeError, match="expected kernels of ours, got reference"):
        gpu_timing.Measurer().measure("smoke", "forward", "float32", "vidattn", "cpu")


def test_a_rival_that_cannot_run_is_left_out_and_ours_fails(monkeypatch):
    def build(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(gpu_timing, "build_copies", build)
    with mocked_machine():
        with pytest.raises(Skip, match="RuntimeError: out of memory"):
            gpu_timing.measure("smoke", "forward", "float32", "eager", "cpu")
        with pytest.raises(RuntimeError, match="out of memory"):
            gpu_timing.measure("smoke", "forward", "float32", "vidattn", "cpu")


# ---- Calibration ----


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_calibration_loops_hold_what_they_measure(tmp_path):
    library = tmp_path / "calibration.so"
    gpu_build.build_calibration(library, "90")
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
        with pytest.raises(RuntimeError, match="exp2: "):
            calibration.Kernels(library, "cpu").measure("exp2", 1)

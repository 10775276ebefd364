"""The benchmarks themselves: what they time, count, measure and report."""

from __future__ import annotations

import copy
import json
import math
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import vidattn
from benchmarks import (
    bench_models,
    divided_contenders,
    mixing_contenders,
    page,
    picture,
    report,
    rounds,
    selection,
    summary,
    targets,
)
from benchmarks.calls import COMPILED, EXACT
from benchmarks.measure import backends_taken, baselines, measure
from benchmarks.memory import peak_extra_bytes
from benchmarks.shapes import (
    DEFAULT_CASES,
    DIVIDED_CASES,
    MIXING_CASES,
    MODEL_CASES,
    SMOKE_CASES,
    SMOKE_DIVIDED_CASES,
    SMOKE_MIXING_CASES,
    WINDOW_CASES,
    Work,
)
from benchmarks.window3d_contenders import build, contenders
from vidattn.reference import window3d as reference

ROOT = Path(__file__).parent.parent
UNCOMPILED = [name for name in contenders("forward", "bfloat16") if name not in COMPILED]


def run_pytest(*arguments: str, root: Path = ROOT, code: int = 0) -> str:
    # One thread: small shapes are no faster with more, and other tests may be running.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", *arguments]
    child = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert child.returncode == code, child.stdout[-3000:] + child.stderr[-3000:]
    return child.stdout + child.stderr


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[str, dict]:
    """What one real run over the smoke case printed and wrote."""
    path = tmp_path_factory.mktemp("benchmarks") / "result.json"
    printed = run_pytest(
        "benchmarks/bench_window3d.py",
        "--smoke",
        "--dtype=float32",
        "-k=not compiled and not flex",
        "--threads=1",
        "--benchmark-only",
        "--no-peak-memory",
        "--benchmark-min-rounds=3",
        "--benchmark-max-time=0",
        f"--benchmark-json={path}",
    )
    return printed, json.loads(path.read_text())


@pytest.fixture(scope="module")
def result(run) -> dict:
    return run[1]


def test_stage1_flops_by_hand():
    # 128 windows of 392 tokens, 3 heads of 32: a multiply-add of two products for each pair of tokens and channel.
    expected = 128 * 3 * 392**2 * 32 * 2 * 2
    for name in ("swin_t_stage1", "swin_t_stage1_shifted"):
        assert WINDOW_CASES[name].flops("forward") == expected
        assert WINDOW_CASES[name].flops("forward_backward") == expected * 7 // 2


def test_flops_count_what_eager_multiplies():
    call = build("smoke", "forward", "float32", "eager")
    with FlopCounterMode(display=False) as counter:
        call()
    assert counter.get_total_flops() == SMOKE_CASES["smoke"].flops("forward")


def test_bytes_count_each_tensor_once():
    case = SMOKE_CASES["smoke"]
    tokens = case.batch * math.prod(case.grid)
    qkv, context, lse = 4 * 3 * tokens * 40, 4 * tokens * 40, 4 * tokens * 2
    assert case.bytes_moved("forward", torch.float32) == qkv + context
    # Written once more: log-sum-exp. Backward: reads qkv, context, its gradient, log-sum-exp; writes the qkv gradient.
    expected = qkv + context + lse + (qkv + 2 * context + lse) + qkv
    assert case.bytes_moved("forward_backward", torch.float32) == expected


def test_cases_have_the_effective_windows_of_the_models():
    geometry = {name: case.geometry for name, case in WINDOW_CASES.items()}
    assert geometry["swin_t_stage1_shifted"].num_windows == 128
    assert geometry["swin_t_stage1_shifted"].shift == (4, 3, 3)
    assert geometry["swin_t_stage4_shifted"].shift == (4, 0, 0)  # one window covers the frame
    assert geometry["swin_b_ssv2_stage1_shifted"].num_tokens == 784
    assert geometry["padded_stage1_shifted"].padded == (16, 63, 84)


@pytest.mark.parametrize("direction", ["forward", "forward_backward"])
@pytest.mark.parametrize("contender", UNCOMPILED)
def test_contenders_compute_window_attention(direction, contender):
    if contender not in contenders(direction, "bfloat16"):
        assert contender == "sdpa_prebuilt"  # whose mask cannot carry the gradient of the table
        return
    case = SMOKE_CASES["smoke"]
    generator = torch.Generator().manual_seed(0)
    sizes = (case.qkv_shape, case.table_shape, (*case.qkv_shape[:4], case.heads * case.head_dim))
    qkv, table, gradient = (torch.randn(size, generator=generator).double() for size in sizes)
    qkv.requires_grad_()
    table.requires_grad_()
    expected = reference.window3d_attention(qkv, table, window_size=case.window, shift_size=case.shift)
    expected = (expected, *torch.autograd.grad(expected, (qkv, table), gradient))
    result = build("smoke", direction, "float32", contender)()
    assert len(result) == (1 if direction == "forward" else 3)
    for ours, theirs in zip(result, expected, strict=False):
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=1e-5 * theirs.abs().max().item())


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["forward", "forward_backward"])
def test_compiled_contenders_agree_with_eager(direction):
    names = ["eager", *(name for name in COMPILED if name in contenders(direction, "float32"))]
    rounds.check_agreement({name: build("smoke", direction, "float32", name)() for name in names})


def test_divided_flops_and_bytes_by_hand():
    case = DIVIDED_CASES["spatial_cls_8_frames"]
    assert case.flops("forward") == 2 * 8 * 12 * 197**2 * 64 * 2 * 2
    assert case.bytes_moved("forward", torch.bfloat16) == 2 * 1569 * 768 * 4 * 2
    assert case.bytes_moved("forward_backward", torch.float32) == 2 * 1569 * 768 * 11 * 4
    half = DIVIDED_CASES["factorized_vivit_b"]
    assert half.flops("forward") == 6 * 64 * 2 * 2 * (196 * 16**2 + 16 * 196**2)


@pytest.mark.parametrize("direction", ["forward", "forward_backward"])
@pytest.mark.parametrize("case", SMOKE_DIVIDED_CASES)
def test_contenders_compute_divided_attention(case, direction):
    shape = SMOKE_DIVIDED_CASES[case]
    names = [name for name in divided_contenders.CONTENDERS if name not in COMPILED]
    calls = {name: divided_contenders.build(case, direction, "float32", name) for name in names}
    with FlopCounterMode(display=False) as counter:
        results = {"eager": calls["eager"]()}
    if direction == "forward":
        assert counter.get_total_flops() == shape.flops(direction)
    results |= {name: calls[name]() for name in names[1:]}
    assert len(results["eager"]) == (1 if direction == "forward" else 2)
    for name in names[1:]:
        for ours, theirs in zip(results[name], results["eager"], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * theirs.abs().max().item())


def test_mixing_flops_and_bytes_by_hand():
    case = MIXING_CASES["xvit_b_div8"]
    assert case.flops("forward") == 16 * 12 * 197**2 * 64 * 2 * 2
    assert case.bytes_moved("forward", torch.bfloat16) == 16 * 197 * 768 * 4 * 2
    assert case.channel_shifts == [(0, 96, 1), (96, 192, -1)]


@pytest.mark.parametrize("direction", ["forward", "forward_backward"])
def test_contenders_compute_mixing_attention(direction):
    shape = SMOKE_MIXING_CASES["smoke"]
    names = [name for name in mixing_contenders.CONTENDERS if name not in COMPILED]
    results = {name: mixing_contenders.build("smoke", direction, "float32", name)() for name in names}
    assert len(results["eager"]) == (1 if direction == "forward" else 2)
    for name in names[1:]:
        for ours, theirs in zip(results[name], results["eager"], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * theirs.abs().max().item())
    if direction == "forward":
        with FlopCounterMode(display=False) as counter:
            mixing_contenders.build("smoke", direction, "float32", "eager")()
        assert counter.get_total_flops() == shape.flops(direction)


def test_contenders_compute_temporal_shift():
    eager, ours = (
        mixing_contenders.build_shift("smoke", "shift", "float32", name)()[0] for name in ("eager", "vidattn")
    )
    assert torch.equal(eager, ours)


def test_agreement_check_finds_blunders():
    right = torch.linspace(-1, 1, 100)
    rounds.check_agreement({"a": (right,), "b": (right + 5e-5,)})
    assert rounds.largest_error([right + 5e-5, right], [right, right]) == pytest.approx(5e-5, rel=0.01)
    assert math.isnan(rounds.largest_error([right.where(right < 0.9, torch.nan), right + 1], [right, right]))
    for wrong in (right + 1e-3, right.where(right < 0.9, torch.nan)):
        with pytest.raises(AssertionError, match="b and a differ"):
            rounds.check_agreement({"a": (right,), "b": (wrong,)})


def test_rounds_call_every_contender_in_turn():
    calls: list[str] = []
    contenders = {name: lambda name=name: calls.append(name) for name in "abc"}
    times = rounds.interleave(contenders, min_rounds=8, seconds=0)
    assert {name: len(values) for name, values in times.items()} == dict.fromkeys("abc", 8)
    in_rounds = [calls[start : start + 3] for start in range(0, 24, 3)]
    assert all(sorted(order) == ["a", "b", "c"] for order in in_rounds)
    assert len({tuple(order) for order in in_rounds}) > 2  # neighbours change


def test_what_comes_before_a_call_is_not_timed(monkeypatch: pytest.MonkeyPatch):
    now = [0.0]

    def take(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(rounds.time, "perf_counter", lambda: now[0])
    times = rounds.interleave({"a": lambda: take(2.0)}, min_rounds=3, seconds=0, before=lambda: take(16.0))
    assert times == {"a": [2.0] * 3} and now[0] == 54.0


def test_rounds_go_on_for_the_given_time():
    times = rounds.interleave({"a": lambda: None}, min_rounds=1, seconds=0.05)
    assert len(times["a"]) > 10


def test_ratios_are_taken_within_rounds():
    # The machine halves its speed after the first round: both slow down, no ratio changes but that of the best rounds.
    times = {"fast": [1.0, 2.0, 2.0], "slow": [3.0, 6.0, 6.0], "gemm": [2.0, 4.0, 4.0], "copy": [1.0, 2.0, 2.0]}
    assert rounds.ratio(times, "slow", "fast") == dict.fromkeys(("min", "median", "low", "high"), 3.0)
    summary = rounds.summarise(times, "fast", Work(rounds.GEMM_FLOPS // 4, rounds.COPY_BYTES // 8))
    assert summary["share_of_gemm"]["median"] == summary["share_of_gemm"]["low"] == 0.5
    assert summary["share_of_copy"]["min"] == summary["share_of_copy"]["high"] == 0.125
    assert list(summary["speedup_over"]) == ["slow"]
    del times["gemm"]
    assert not {"share_of_gemm", "gemm_gflops"} & set(rounds.summarise(times, "fast", Work(1, 1)))


def test_a_matrix_product_that_is_a_plain_loop_is_no_yardstick(monkeypatch):
    assert rounds.has_fast_gemm(torch.float32) and rounds.has_fast_gemm(torch.float64)
    for dtype, taken, fast in ((torch.bfloat16, 0.5, True), (torch.float16, 80.0, False)):
        seconds = iter([[taken], [1.0]])  # of this dtype, and of float32
        monkeypatch.setattr(rounds.timeit, "repeat", lambda *_, seconds=seconds, **__: next(seconds))
        rounds.has_fast_gemm.cache_clear()
        assert rounds.has_fast_gemm(dtype) is fast
        assert ("gemm" in baselines(dtype, "forward", "cpu")) is fast
    rounds.has_fast_gemm.cache_clear()


def test_benchmarks_run_once_when_disabled():
    printed = run_pytest(
        "benchmarks/bench_models.py", "--smoke", "--dtype=float32", "-k=eager or training", "--benchmark-disable"
    )
    assert "3 passed, 2 skipped" in printed
    assert "vidattn_compiled: a training step of this depth takes minutes to compile" in printed


def test_result_holds_the_measured_rounds(result):
    groups: dict[str, dict[str, dict]] = {}
    for benchmark in result["benchmarks"]:
        groups.setdefault(benchmark["group"], {})[benchmark["extra_info"]["contender"]] = benchmark
    assert set(groups) == {"window3d/smoke/forward/float32", "window3d/smoke/forward_backward/float32"}
    for group in groups.values():
        ours = group["vidattn"]
        info, seconds = ours["extra_info"], ours["stats"]["data"]
        assert len(seconds) == 3 and min(seconds) > 0
        assert info["flops"] == SMOKE_CASES["smoke"].flops(info["direction"])
        for rival, speedup in info["speedup_over"].items():
            theirs = group[rival]["stats"]["data"]
            assert speedup["min"] == pytest.approx(min(theirs) / min(seconds))
            in_rounds = [slow / fast for slow, fast in zip(theirs, seconds)]  # a slow rival has fewer
            assert speedup["median"] == pytest.approx(statistics.median(in_rounds))
        share = info["flops"] / min(seconds) / (info["gemm_gflops"] * 1e9)
        assert info["share_of_gemm"]["min"] == pytest.approx(share)
        assert info["backend"] == "cpu" and info["threads"] == 1
        assert 0 < info["error"] < 1e-5  # against float64


def test_peak_memory_counts_result_and_temporaries(tmp_path, monkeypatch):
    (tmp_path / "probe.py").write_text(
        "import torch\n"
        "def build(temporary, result):\n"
        "    kept = torch.ones(64 << 18)\n"  # inputs do not count
        "    def call():\n"
        "        torch.ones(temporary << 18).sum()\n"
        "        return torch.ones(result << 18)\n"
        "    return call\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    peak = peak_extra_bytes("probe:build", temporary=48, result=16)
    assert peak == pytest.approx(48 << 20, abs=2 << 20)
    with pytest.raises(RuntimeError, match="missing"):
        peak_extra_bytes("probe:missing")
    with pytest.raises(RuntimeError, match="ended with code 3"):
        peak_extra_bytes("os:_exit", status=3)


def with_measured(result: dict) -> dict:
    """Put known numbers of a case that has targets into a result."""
    raw = copy.deepcopy(result)
    for benchmark in raw["benchmarks"]:
        info = benchmark["extra_info"]
        info["case"] = "swin_t_stage1"
        info["peak_extra_bytes"] = 5 << 20
        if info["contender"] == "vidattn":
            info["speedup_over"] = {
                "eager": {"min": 5.26, "median": 4.9},
                "sdpa": {"min": 1.55, "median": 1.5},
                "compiled": {"min": 3.0, "median": 3.1},
            }
            info["share_of_gemm"] = {"min": 0.76, "median": 0.7}
    return report.clean(raw)


def test_report_shows_ratios_and_memory(result):
    printed = report.tables(with_measured(result))
    assert "### Attention in (shifted) windows, float32" in printed
    forward = next(line for line in printed.splitlines() if line.startswith("| Swin-T stage 1, forward |"))
    assert "| 5.26 / 4.90 | 1.55 / 1.50 | 3.00 / 3.10 | 76% / 70% |" in forward
    assert forward.endswith("| 5 / 5 / 5 / - |")
    assert "prebuilt" not in printed  # an empty column
    assert "vidattn + compile" not in printed


def test_targets_compare_with_the_limit_and_the_best_rival(result):
    (ours, *_) = [
        entry["info"] for entry in with_measured(result)["benchmarks"] if entry["info"]["contender"] == "vidattn"
    ]
    ours |= {"share_of_limit": {"median": 0.76}, "cpu_isa": "avx2"}
    assert targets.judge([ours]) == [
        "Swin-T stage 1, forward, float32, 1 thread: limit 0.76, target 0.75: reached",
        "Swin-T stage 1, forward, float32, 1 thread: rival 1.50, target 1.60: missed",  # SDPA is the best one
    ]
    del ours["share_of_limit"]
    assert len(targets.judge([ours])) == 1
    half = {**ours, "dtype": "bfloat16", "speedup_over": {"vidattn_float32": {"median": 0.9}}}
    assert targets.judge([half])[0].endswith("float32 0.90, target 0.95: missed")
    assert not targets.judge([{**half, "cpu_isa": "avx512_bf16"}])  # which has products of them


def test_targets_compare_cases_with_each_other(result):
    (ours, *_) = [
        entry["info"] for entry in with_measured(result)["benchmarks"] if entry["info"]["contender"] == "vidattn"
    ]
    ours |= {"speedup_over": {}, "cpu_isa": "avx2"}
    shifted = {**ours, "case": "swin_t_stage1_shifted", "share_of_gemm": {"median": 0.84}}
    threads = {**ours, "threads": 2, "share_of_gemm": {"median": 0.6}}
    assert [line for line in targets.judge([ours, shifted, threads]) if "against" in line] == [
        "Swin-T stage 1, shifted, forward, float32, 1 thread: time against no shift 0.83, target 0.85: reached",
        "Swin-T stage 1, forward, float32, 2 threads: scaling against gemm 0.86, target 0.90: missed",
    ]


@pytest.mark.parametrize(
    ("case", "direction", "expected"),
    [
        ("swin_l_stage2", "forward_backward", {"limit": 0.70}),
        ("swin_t_stage1_shifted", "forward", {"rival": 5.0}),
        ("swinunetr_stage1_shifted", "forward_backward", {"rival": 2.0}),
        ("swin_2d_stage1", "forward", {"rival": 1.5}),
        ("temporal_hr", "forward", {"copy": 0.6}),
        ("temporal_96_frames", "forward", {"rival": 1.15}),
        ("xvit_b_div8", "forward_backward", {"rival": 1.4}),
        ("xvit_b_div8", "shift", {"copy": 0.8}),
        ("sequences_of_8", "forward", {}),
        ("video_swin_t_32x224x224", "training", {"rival": 1.8}),
        ("xvit_b_16x224x224", "inference", {"rival": 1.0}),
    ],
)
def test_each_kind_of_case_has_its_targets(case, direction, expected):
    assert targets.targets_of({"case": case, "direction": direction, "dtype": "float32", "cpu_isa": "avx2"}) == expected


def test_kept_results_are_readable():
    assert len(page.kept()) >= 2
    written = [report.tables(result) for result in page.kept() if not report.is_growth(result)]
    assert all("| vidattn, ms |" in tables for tables in written)
    assert any("| Swin-T stage 1, shifted, forward |" in tables for tables in written)
    assert any("| torchvision swin3d_t, 32 x 224 x 224, inference |" in tables for tables in written)


def test_picture_shows_cases_with_rivals(result, tmp_path):
    measured = with_measured(result)
    assert not picture.speed(report.clean(result), tmp_path / "none.png")  # the smoke case is none that it shows
    for entry in measured["benchmarks"]:
        entry["info"]["case"] = "swin_t_stage3"
    path = tmp_path / "picture.svg"
    assert picture.speed(measured, path)
    drawn = path.read_text()
    assert ">Swin-T stage 3<" in drawn and "> 4.90<" in drawn
    assert f"{summary.describe_machine(measured['machine'])}, {measured['date']}<" in drawn


def test_saved_result_names_no_host_user_or_commit(result, tmp_path, monkeypatch, capsys):
    raw = copy.deepcopy(result)
    assert "node" not in raw["machine_info"]
    raw["machine_info"] |= {"node": "secret-host", "cpu": {"brand_raw": "Fast (R) CPU @ 3 GHz", "hz": 1}, "cores": 2}
    raw["commit_info"] = {"id": "secret-commit", "project": "secret-project", "branch": "secret-branch"}
    raw["benchmarks"][0]["fullname"] = "/home/secret/benchmarks"
    raw["datetime"] = "2026-01-31T12:00:00+00:00"
    source = tmp_path / "raw.json"
    source.write_text(json.dumps(raw))
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    report.main([str(source), "--save"])
    (saved,) = (tmp_path / "results").iterdir()
    isa = raw["machine_info"]["cpu_isa"].replace("_", "-")
    assert saved.name == f"fast-r-cpu-3-ghz-{isa}-1-threads-2026-01-31.json"
    assert "secret" not in saved.read_text()
    printed = capsys.readouterr().out
    report.main([str(saved)])  # a saved result gives the same tables
    assert capsys.readouterr().out.strip() in printed


@pytest.mark.parametrize("content", [None, "no JSON", "[]", '{"machine_info": {}}'])
def test_report_refuses_other_files(content, tmp_path, capsys):
    path = tmp_path / "result.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SystemExit) as stopped:
        report.main([str(path)])
    assert stopped.value.code == 2
    assert "expected a result of a benchmark" in capsys.readouterr().err


def test_default_run_is_short():
    printed = run_pytest("benchmarks/", "--benchmark-only", "--collect-only", "-q")
    families = WINDOW_CASES | DIVIDED_CASES | MIXING_CASES | MODEL_CASES
    assert 8 <= len(DEFAULT_CASES) <= 10 and {case for case, _ in DEFAULT_CASES} <= set(families)
    collected = [line.partition("[")[2].rstrip("]") for line in printed.splitlines() if "::bench_" in line]
    contenders_of: dict[tuple[str, str, str, int], list[str]] = {}
    for case, direction, dtype, threads, contender in (name.split("-") for name in collected):
        contenders_of.setdefault((case, direction, dtype, int(threads)), []).append(contender)
    assert set(contenders_of) == {(case, direction, "float32", 1) for case, direction in DEFAULT_CASES}
    for (_, direction, *_), names in contenders_of.items():
        in_model = {"eager", "compiled", "vidattn", "vidattn_compiled"}
        assert set(names) == (in_model if direction == "inference" else {"eager", "sdpa", "compiled", "vidattn"})
    # On two cores, which the message of a run speaks of.
    assert sum(selection.expected_seconds((*case[:3], 2), names) for case, names in contenders_of.items()) < 300


def test_run_says_what_it_does(run):
    printed, _ = run
    assert f"vidattn {vidattn.__version__} from {ROOT / 'vidattn'}: CPU kernels" in printed
    assert "2 cases, 7 timings, less than a minute on two cores" in printed
    assert "[1/2] smoke, forward, float32: float64 reference eager SDPA SDPA, mask prebuilt vidattn rounds" in printed
    assert "benchmark 'window3d/smoke/forward_backward/float32': 3 tests" in printed  # the usual table
    _, _, table = printed.partition("Every output was compared with the float64 reference before it was timed")
    for heading in ("eager", "SDPA", "vidattn", "gemm", "copy"):
        assert f"┃ {heading} " in table
    assert "GFLOP/s" in table and "% of gemm" in table


def test_table_names_the_fastest_and_what_did_not_run():
    shared = {
        "case": "swin_t_stage3",
        "direction": "forward",
        "dtype": "float32",
        "flops": 10**9,
        "bytes": 1,
        "gemm_gflops": 200.0,
        "copy_gigabytes_per_second": 20.0,
        "peak_extra_bytes": 3 << 20,
        "error": 1e-6,
        "share_of_gemm": {"min": 0.6, "median": 0.5},
        "speedup_over": {"eager": {"min": 3.0, "median": 2.5}},
        "not_run": {"compiled": "no [C++] compiler"},
    }

    def entry(contender: str, seconds: float) -> dict:
        stats = {"min": seconds, "median": seconds}
        return {"group": "window3d/swin_t_stage3", "stats": stats, "info": shared | {"contender": contender}}

    entries = [entry("eager", 0.025), entry("vidattn", 0.010)]
    table = summary.render(entries, {"processor": "Fast CPU", "threads": 2}, bold=False)
    assert "Fast CPU, 2 threads" in table and "largest error was 1e-06 of the maximum in float32" in table
    assert "25.0 ms  2.50x" in table and "10.0 ms *" in table
    assert "100 GFLOP/s" in table and "50% of gemm" in table and "3.00 MiB" in table
    assert "Not run: window3d/swin_t_stage3, compiled: no [C++] compiler" in table
    del shared["share_of_gemm"], shared["gemm_gflops"]  # as where a matrix product is a plain loop
    assert "50% of" not in summary.render([entry("vidattn", 0.010)], {"processor": "Fast CPU"}, bold=False)
    assert "\x1b[1m10.0 ms\x1b[0m" in summary.render(entries, {"processor": "Fast CPU"}, bold=True)


def build_probe(contender: str, dtype: str, device: str):
    """A call that is right, wrong or impossible, as its contender says."""
    if contender == "eager":
        raise RuntimeError("nothing here can do it\nsecond line")
    if contender == "vidattn_refused":
        raise ValueError("no such kernel")
    if contender == "vidattn_broken":
        raise RuntimeError("bug")
    qkv = torch.arange(24.0, dtype=torch.float64 if contender == EXACT else torch.float32).view(1, 4, 3, 1, 2)
    shift = 1.0 if contender in ("compiled", "vidattn_wrong") else 0.0
    if contender.startswith("vidattn"):
        return lambda: (vidattn.temporal_attention(qkv, 2) + shift,)
    return lambda: (vidattn.temporal_attention(qkv, 2, backend="reference") + shift,)


def measure_probe(*names: str):
    arguments = {"dtype": "float32", "device": "cpu"}
    return measure(build_probe, names, arguments, rounds=1, seconds=0, memory=False, say=lambda what: None)


def test_contenders_that_cannot_run_are_listed_with_the_reason():
    measured = measure_probe("eager", "sdpa", "compiled", "vidattn", "vidattn_refused")
    assert set(measured.times) == {"sdpa", "vidattn", "gemm", "copy", "fma", "exp"}
    assert measured.info["vidattn"]["backend"] == "cpu"
    assert measured.not_run["eager"] == "RuntimeError: nothing here can do it"
    assert measured.not_run["vidattn_refused"] == "ValueError: no such kernel"
    assert "off the float64 reference" in measured.not_run["compiled"]


def test_our_mistakes_stop_the_run():
    with pytest.raises(AssertionError, match=r"vidattn_wrong .*: off the float64 reference"):
        measure_probe("sdpa", "vidattn_wrong")
    with pytest.raises(RuntimeError, match="bug"):
        measure_probe("sdpa", "vidattn_broken")


def test_the_reference_is_never_called_vidattn():
    with vidattn.use_backend("reference"):
        measured = measure_probe("sdpa", "vidattn")
    assert "vidattn" not in measured.times
    assert "it would take the reference" in measured.not_run["vidattn"]
    with vidattn.use_backend("reference"):
        assert backends_taken(bench_models.build("smoke", "inference", "float32", "vidattn")) == {"reference"}
    assert backends_taken(bench_models.build("smoke", "training", "float32", "vidattn")) == {"cpu"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("direction", ["inference", "training"])
def test_models_agree_with_float64(direction, dtype):
    exact, *others = (bench_models.build("smoke", direction, dtype, name)() for name in (EXACT, "eager", "vidattn"))
    assert exact[0].dtype == torch.float64
    for result in others:
        assert rounds.largest_error(result, exact) < (1e-5 if dtype == "float32" else 0.1)


@pytest.mark.slow
def test_compiled_vidattn_is_a_contender():
    names = ("vidattn", "vidattn_compiled")
    arguments = {"case": "smoke", "direction": "inference", "dtype": "float32", "device": "cpu"}
    measured = measure(bench_models.build, names, arguments, rounds=1, seconds=0, memory=False, say=lambda what: None)
    assert not measured.not_run and {info["backend"] for info in measured.info.values()} == {"cpu"}


def test_unknown_device_and_threads_are_refused():
    arguments = ("benchmarks/bench_mixing.py", "--benchmark-only", "--collect-only")
    assert "--threads: expected a whole number from 1, got 0" in run_pytest(*arguments, "--threads=0", code=4)

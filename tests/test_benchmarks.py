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

from benchmarks import divided_contenders, report, rounds
from benchmarks.memory import peak_extra_bytes
from benchmarks.shapes import DIVIDED_CASES, SMOKE_CASES, SMOKE_DIVIDED_CASES, WINDOW_CASES
from benchmarks.window3d_contenders import build, contenders
from vidattn.reference import window3d as reference

ROOT = Path(__file__).parent.parent
UNCOMPILED = [name for name in contenders("forward", "bfloat16") if name != "compiled"]


def run_pytest(*arguments: str) -> str:
    # One thread: small shapes are no faster with more, and other tests may be running.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", *arguments]
    child = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stdout[-3000:] + child.stderr[-3000:]
    return child.stdout


@pytest.fixture(scope="module")
def result(tmp_path_factory) -> dict:
    """What one real run over the smoke case wrote."""
    path = tmp_path_factory.mktemp("benchmarks") / "result.json"
    printed = run_pytest(
        "benchmarks/bench_window3d.py",
        "--smoke",
        "-k=float32 and not compiled and not bfloat16",
        "--benchmark-only",
        "--no-peak-memory",
        "--benchmark-min-rounds=3",
        "--benchmark-max-time=0",
        f"--benchmark-json={path}",
    )
    assert "benchmark 'window3d/smoke/forward_backward/float32': 5 tests" in printed  # the usual table
    return json.loads(path.read_text())


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
def test_compiled_contender_agrees_with_eager(direction):
    rounds.check_agreement({name: build("smoke", direction, "float32", name)() for name in ("eager", "compiled")})


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
    names = [name for name in divided_contenders.CONTENDERS if name != "compiled"]
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


def test_agreement_check_finds_blunders():
    right = torch.linspace(-1, 1, 100)
    rounds.check_agreement({"a": (right,), "b": (right + 5e-5,)})
    for wrong in (right + 1e-3, right.where(right < 0.9, torch.nan)):
        with pytest.raises(AssertionError, match="b and a differ"):
            rounds.check_agreement({"a": (right,), "b": (wrong,)})


def test_rounds_call_every_contender_in_turn():
    calls: list[str] = []
    contenders = {name: lambda name=name: calls.append(name) for name in "abc"}
    times = rounds.interleave(contenders, min_rounds=8, max_seconds=0)
    assert {name: len(values) for name, values in times.items()} == dict.fromkeys("abc", 8)
    in_rounds = [calls[start : start + 3] for start in range(0, 24, 3)]
    assert all(sorted(order) == ["a", "b", "c"] for order in in_rounds)
    assert len({tuple(order) for order in in_rounds}) > 2  # neighbours change


def test_rounds_go_on_for_the_given_time():
    times = rounds.interleave({"a": lambda: None}, min_rounds=1, max_seconds=0.05)
    assert len(times["a"]) > 10


def test_ratios_are_taken_within_rounds():
    # The machine halves its speed after the first round: both slow down, no ratio changes but that of the best rounds.
    times = {"fast": [1.0, 2.0, 2.0], "slow": [3.0, 6.0, 6.0], "gemm": [2.0, 4.0, 4.0], "copy": [1.0, 2.0, 2.0]}
    assert rounds.ratio(times, "slow", "fast") == {"min": 3.0, "median": 3.0}
    summary = rounds.summarise(times, "fast", flops=rounds.GEMM_FLOPS // 4, moved=rounds.COPY_BYTES // 8)
    assert summary["share_of_gemm"] == {"min": 0.5, "median": 0.5}
    assert summary["share_of_copy"] == {"min": 0.125, "median": 0.125}
    assert list(summary["speedup_over"]) == ["slow"]


def test_benchmarks_run_once_when_disabled():
    printed = run_pytest("benchmarks/bench_models.py", "--smoke", "-k=float32 and not compiled", "--benchmark-disable")
    assert "8 passed" in printed


def test_result_holds_the_measured_rounds(result):
    groups: dict[str, dict[str, dict]] = {}
    for benchmark in result["benchmarks"]:
        groups.setdefault(benchmark["group"], {})[benchmark["extra_info"]["contender"]] = benchmark
    assert set(groups) == {"window3d/smoke/forward/float32", "window3d/smoke/forward_backward/float32"}
    for group in groups.values():
        ours, gemm = group["vidattn"], group["gemm"]
        info, seconds = ours["extra_info"], ours["stats"]["data"]
        assert len(seconds) == 3 and min(seconds) > 0
        assert info["flops"] == SMOKE_CASES["smoke"].flops(info["direction"])
        for rival, speedup in info["speedup_over"].items():
            theirs = group[rival]["stats"]["data"]
            assert speedup["min"] == pytest.approx(min(theirs) / min(seconds))
            in_rounds = [slow / fast for slow, fast in zip(theirs, seconds, strict=True)]
            assert speedup["median"] == pytest.approx(statistics.median(in_rounds))
        share = info["flops"] / min(seconds) / (gemm["extra_info"]["flops"] / min(gemm["stats"]["data"]))
        assert info["share_of_gemm"]["min"] == pytest.approx(share)


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
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    peak = peak_extra_bytes("probe:build", temporary=48, result=16)
    assert peak == pytest.approx(48 << 20, abs=2 << 20)
    with pytest.raises(RuntimeError, match="missing"):
        peak_extra_bytes("probe:missing")


def test_report_shows_ratios_targets_and_memory(result):
    raw = copy.deepcopy(result)
    for benchmark in raw["benchmarks"]:
        info = benchmark["extra_info"]
        info["case"] = "swin_t_stage1"  # a case with targets
        info["peak_extra_bytes"] = 5 << 20
        if info["contender"] == "vidattn":
            info["speedup_over"] = {
                "eager": {"min": 5.26, "median": 4.9},
                "sdpa": {"min": 1.55, "median": 1.5},
                "compiled": {"min": 3.0, "median": 3.1},
            }
            info["share_of_gemm"] = {"min": 0.76, "median": 0.7}
    printed = report.tables(report.clean(raw))
    forward = printed.split("### Forward and backward")[0]
    assert "| 76% / 70% (target 75%) |" in forward
    assert "| 5.26 / 4.90 (target 5.00) |" in forward
    assert "| 1.55 / 1.50 (target 1.60, missed) |" in forward  # the better one of SDPA and compiled
    assert "| 5 |" in forward
    assert "prebuilt" not in forward  # an empty column


def test_report_compares_with_the_best_only_when_all_were_measured(result):
    printed = report.tables(report.clean(result))
    assert "vs SDPA |" in printed and "best of" not in printed and "compiled" not in printed


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
    assert saved.name == "fast-r-cpu-3-ghz-2-cores-2026-01-31.json"
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
    assert "expected a result of pytest-benchmark" in capsys.readouterr().err

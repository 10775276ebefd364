"""What `make gpu-test` and `make gpu-bench` do on a GPU, done without one: whole runs, and each kind of task."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gpu_harness_cases import CONFORMANCE, ROOT, compiler, start, toolkit

pytest.importorskip("triton", reason="triton is not installed")

import torch

import vidattn
from benchmarks import calibration, gpu_bench, gpu_build, gpu_checks, gpu_report, gpu_suite, gpu_test, gpu_timing
from benchmarks.calls import SDPA
from benchmarks.gpu_steps import Results, Skip, Step
from benchmarks.mocked_machine import mocked_machine
from benchmarks.prediction import Rates

pytestmark = pytest.mark.skipif(
    bool(vidattn.why_not("window3d_attention", backend="cpu")),
    reason="on a GPU that is not there the CPU's kernels compute, which are not built",
)


@pytest.fixture
def machine():
    with mocked_machine():
        yield


# ---- Whole runs ----

STEPS = ("build", "conformance", "numbers", "calibration", "speed", "graphs", "reduce_overhead", "streams")


@pytest.mark.slow
def test_a_whole_run_finds_what_it_should_and_the_next_one_goes_on(tmp_path):
    home = toolkit(tmp_path / "cuda", nvcc=compiler(CONFORMANCE))
    out = tmp_path / "out"
    arguments = ("--step", *STEPS, "--case", "smoke_temporal")
    done = start("gpu_test", out, *arguments, CUDA_HOME=str(home))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 failed; all is done" in done.stdout and "the extension has not been built here" in done.stdout
    text = (out / "none.json").read_text()
    assert os.uname().nodename not in text and str(ROOT) not in text
    result = json.loads(text)
    assert set(result["checks"]) == set(STEPS) - {"speed"} and result["left"] == {}
    for step, found in result["checks"].items():
        assert found["passed"] and set(found) <= {"passed", "skipped"}, step
    kernels = [found["kernels"] for task, found in result["checks"]["build"]["passed"].items() if "kernels " in task]
    assert len(kernels) == 2 + sum(len(gpu_checks.dtypes_of(check)) for check in gpu_checks.CHECKS) and min(kernels) > 0
    assert len(result["checks"]["calibration"]["passed"]) == 9
    assert json.loads((out / "gpu-calibration.json").read_text())["exponentials_per_s"] > 0
    assert result["rates"]["exponentials_per_s"] == 8 * 132 * 8e3 / 2e-3
    measured = {(x["direction"], x["contender"]): x for x in result["measurements"]}
    for direction in ("forward", "forward_backward"):
        for name in ("vidattn", "eager", "sdpa_math", "compiled"):
            entry = measured[direction, name]
            assert entry["agrees"] is True and entry["timer"] == "graph" and len(entry["us"]) == 2
        assert result["speedups"][f"smoke_temporal/{direction}/bfloat16"]["eager"] > 0
        assert measured[direction, "flash_attn"]["skipped"] == "not installed: flash_attn"
    lines = (out / "results.jsonl").read_text()
    # The other program has the calibration already.
    other = start("gpu_bench", out, "--case", "smoke_mixing", "--step", "calibration", "more", CUDA_HOME=str(home))
    assert other.returncode == 0, other.stdout + other.stderr
    assert "calibration  " not in other.stdout and "more  " in other.stdout
    assert (out / "results.jsonl").read_text().startswith(lines)
    result = json.loads((out / "none.json").read_text())
    assert {x["case"] for x in result["measurements"]} == {"smoke_temporal", "smoke_mixing"}


@pytest.mark.slow
def test_a_run_of_all_steps(tmp_path):
    """What the test above leaves out takes long."""
    sanitizer = 'while test "${1%python*}" = "$1"; do shift; done\nexec "$@"\n'
    home = toolkit(tmp_path / "cuda", nvcc=compiler(CONFORMANCE), compute_sanitizer=sanitizer)
    done = start("gpu_test", tmp_path, "--case", "smoke_spatial", "--seconds", "900", CUDA_HOME=str(home))
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "none.json").read_text())
    assert found["left"] == {} and len(found["checks"]["sanitizer"]["passed"]) == 9
    assert {of.partition(" ")[0] for of in found["checks"]["opcheck"]["passed"]} == set(gpu_checks.ONE_SMALL_EACH)


def test_a_run_out_of_time_has_not_failed_and_one_that_finds_a_mistake_has(tmp_path):
    done = start("gpu_test", tmp_path, "--seconds", "0")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tasks are left: run it again" in done.stdout
    left = json.loads((tmp_path / "none.json").read_text())["left"]
    assert set(left) == {"sanitizer", "opcheck", *STEPS} and min(left.values()) > 0
    program = gpu_build.Cache(tmp_path).conformance
    program.parent.mkdir(parents=True)
    text = CONFORMANCE.read_text()
    line = next(line for line in text.splitlines() if line.startswith(" 3  5 "))
    program.write_text(f"#!/bin/sh\ncat <<end\n{text.replace(line, line[:-8] + '12345678')}end\n")
    program.chmod(0o755)
    done = start("gpu_test", tmp_path, "--step", "conformance")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "FAILED conformance: primitives: AssertionError: case 3: 1 words differ" in done.stdout
    found = json.loads((tmp_path / "none.json").read_text())["checks"]["conformance"]["failed"]["primitives"]
    assert found.endswith("got 12345678")


def test_programs_refuse_what_cannot_be(tmp_path, capsys):
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit) as stopped:
            gpu_test.main(["--out", str(tmp_path)])
        assert stopped.value.code == 2 and "finds no GPU" in capsys.readouterr().err
    done = start("gpu_bench", tmp_path, "--step", "numbers")
    assert done.returncode == 2 and "expected some of build, calibration" in done.stderr


# ---- Plans ----


def plan(program: Any, tmp_path: Path) -> list[Step]:
    setting = gpu_test.Setting(tmp_path, "90", 16, cases=tuple(gpu_timing.GPU_CASES) if program is gpu_bench else ())
    if program is gpu_test:
        setting = gpu_test.Setting(tmp_path, "90", 16)
    results = Results(tmp_path / "lines", "code")
    return (gpu_test.all_steps if program is gpu_test else gpu_bench.steps)(setting, results, results)


def test_steps_come_in_the_order_of_importance_and_fit_into_nine_minutes(tmp_path):
    steps = plan(gpu_test, tmp_path)
    assert [step.name for step in steps] == [
        "build",
        "conformance",
        "numbers",
        "calibration",
        "speed",
        "opcheck",
        "sanitizer",
        "graphs",
        "reduce_overhead",
        "streams",
        "suite",
    ]
    for program in (gpu_test, gpu_bench):
        assert sum(step.seconds for step in plan(program, tmp_path)) <= gpu_test.SECONDS < 530
    for step in (*steps, *plan(gpu_bench, tmp_path)):
        tasks = list(step.tasks())
        assert tasks and len({task.name for task in tasks}) == len(tasks), step.name
        for task in tasks:
            json.dumps([str(argument) for argument in task.arguments])
            module, _, function = task.function.partition(":")
            assert callable(getattr(sys.modules[module], function))


def test_every_op_is_checked_in_every_dtype_by_both_backends(tmp_path):
    tasks = {step.name: list(step.tasks()) for step in plan(gpu_test, tmp_path)}
    numbers = {(gpu_checks.CHECKS[check].function, dtype, backend) for check, dtype, backend, _ in
               (task.arguments for task in tasks["numbers"])}  # fmt: skip
    functions = set(vidattn.backends._functions)
    assert len(functions) == 7
    assert numbers == {
        (function, dtype, backend)
        for function in functions
        for dtype in ("bfloat16", "float16", "float32")
        for backend in ("cuda", "triton")
    }
    for step in ("opcheck", "graphs", "reduce_overhead", "streams"):
        found = {(gpu_checks.CHECKS[task.arguments[0]].function, task.arguments[2]) for task in tasks[step]}
        assert found == {(function, backend) for function in functions for backend in ("cuda", "triton")}
    assert {task.arguments[:2] for task in tasks["sanitizer"]} == {
        (tool, check) for tool in ("memcheck", "racecheck", "synccheck") for check in gpu_checks.SMALL
    }


def test_ten_cases_are_timed_first_against_all_there_is_and_then_all_others(tmp_path):
    assert len(gpu_test.MAIN_CASES) == 10 and set(gpu_test.MAIN_CASES) < set(gpu_timing.GPU_CASES)
    families = {type(gpu_timing.CASES[case]) for case in gpu_test.MAIN_CASES}
    assert len(families) == 3
    main, more = (
        [task.arguments for step in plan(gpu_bench, tmp_path) if step.name == name for task in step.tasks()]
        for name in ("speed", "more")
    )
    rivals = {"vidattn", "triton", "eager", *SDPA, "compiled", "flex"}
    for cases, given in ((gpu_test.MAIN_CASES, main), (set(gpu_timing.GPU_CASES) - set(gpu_test.MAIN_CASES), more)):
        for case in cases:
            for direction in ("forward", "forward_backward"):
                names = {x[3] for x in given if x[:3] == (case, direction, "bfloat16")}
                assert names == set(gpu_timing.contenders(case)) >= rivals
    assert {x[2] for x in more} == {"bfloat16", "float16", "float32"}
    compiled = [x[3] in gpu_timing.COMPILED for x in main]
    assert compiled == sorted(compiled)  # what takes long comes last


def test_all_that_is_timed_or_checked_is_compiled_first(tmp_path):
    for program in (gpu_test, gpu_bench):
        steps = plan(program, tmp_path)
        compiled: set[Any] = set()
        for step in steps:
            arguments = [task.arguments for task in step.tasks()]
            if step.name.startswith("build"):
                compiled |= {x[1] for x in arguments if isinstance(x[0], str) and x[0].startswith("benchmarks")}
                compiled |= {x for x in arguments if len(x) == 5}
            elif step.name in ("speed", "more"):
                assert {x[:3] for x in arguments} <= compiled
                assert {x for x in arguments if x[3] in gpu_timing.COMPILED} <= compiled
            elif step.name in ("numbers", "opcheck", "graphs", "reduce_overhead", "streams"):
                assert {x[:2] for x in arguments} <= compiled
            elif step.name == "sanitizer":
                assert {(x[1], "bfloat16") for x in arguments} <= compiled


def test_steps_wait_for_the_extension_where_it_is_to_be_built(tmp_path):
    built, steps = Results(tmp_path / "built", "code"), plan(gpu_test, tmp_path)
    assert all(step.ready() for step in gpu_test.after_extension(steps[1:], built))
    waiting = gpu_test.after_extension(steps, built)
    assert [step.ready() for step in waiting] == [True] + [False] * 10
    built.add("build", "extension", {"status": "timed out", "reason": "no result within 480 s"})
    assert all(step.ready() for step in waiting)


# ---- What is built ----


def test_kernels_are_compiled_once_into_the_cache(tmp_path):
    """In a process of its own, for Triton reads its settings when it is imported."""
    program = f"""
from pathlib import Path
from benchmarks import gpu_build
def compile_shift():
    found = gpu_build.compile_kernels("benchmarks.gpu_checks:call_triton", ("shift", "bfloat16"), "90", True)
    return found["kernels"], sorted(map(str, Path({str(tmp_path)!r}).rglob("*.cubin")))
(kernels, files), again = compile_shift(), compile_shift()
print(kernels, len(files), again == (kernels, files))
"""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("TRITON_")}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["2", "2", "True"], done.stdout + done.stderr


@pytest.fixture
def package(tmp_path, monkeypatch) -> Path:
    """A source tree whose setup.py builds an extension of a few bytes."""
    root = tmp_path / "root"
    (root / "vidattn").mkdir(parents=True)
    (root / "setup.py").write_text("""
import os, pathlib, sys
assert sys.argv[1] == "build_ext" and os.environ["VIDATTN_BUILD_CUDA"] == "1"
folder = pathlib.Path(next(word for word in sys.argv if "--build-lib=" in word).partition("=")[2]) / "vidattn"
folder.mkdir(parents=True, exist_ok=True)
(folder / "_C.so").write_text("built with " + os.environ["MAX_JOBS"])
""")
    monkeypatch.setattr(gpu_build, "ROOT", root)
    monkeypatch.setattr(gpu_build, "PACKAGE", root / "vidattn")
    monkeypatch.setenv("CUDA_HOME", str(toolkit(tmp_path / "cuda", nvcc="exit 0\n")))
    return root / "vidattn"


def test_the_extension_goes_into_the_cache_and_the_package(package, tmp_path):
    cache = gpu_build.Cache(tmp_path / "out")
    (package / "_C.so").write_text("an old one")
    found = gpu_build.build_extension(cache.extension, 7)
    assert (package / "_C.so").read_text() == "built with 7" and found["bytes"] == len("built with 7")
    assert cache.library().read_text() == "built with 7" and os.listdir(package) == ["_C.so"]
    cache.results("code", False).add("build", "extension", {"status": "passed", "found": found})
    assert cache.results("code", False).find("build", "extension")
    assert f"took {found['build_s']} s" in gpu_report.extension(cache.results("code", False).find("build", "extension"))
    (package / "_C.so").write_text("that of somebody else")
    assert not cache.results("code", False).find("build", "extension")  # it is built, and put there, again


def test_an_extension_that_cannot_be_built_says_why(package, tmp_path, monkeypatch):
    (package.parent / "setup.py").write_text("raise SystemExit('no such architecture')")
    with pytest.raises(RuntimeError, match="failed: no such architecture"):
        gpu_build.build_extension(tmp_path / "out", 2)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(Skip, match="no nvcc"):
        gpu_build.build_extension(tmp_path / "out", 2)
    for build in (gpu_build.build_conformance, gpu_build.build_calibration):
        with pytest.raises(Skip, match="no nvcc"):
            build(tmp_path / "program", "90")
    assert "was not built: no nvcc" in gpu_report.extension({"status": "skipped", "reason": "no nvcc"})


def test_nvcc_that_fails_leaves_no_program(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(toolkit(tmp_path / "cuda", nvcc="echo no such architecture >&2; exit 1\n")))
    with pytest.raises(RuntimeError, match="nvcc failed: no such architecture"):
        gpu_build.build_conformance(tmp_path / "program", "90")
    assert not (tmp_path / "program").exists()
    with pytest.raises(Skip, match="program was not built"):
        gpu_checks.check_conformance(tmp_path / "program")


def test_tools_are_those_of_cuda_home_or_on_the_path(tmp_path, monkeypatch):
    tool = toolkit(tmp_path / "cuda", some="") / "bin" / "some"
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    assert gpu_build.find_tool("some") == str(tool)
    monkeypatch.delenv("CUDA_HOME")
    assert gpu_build.find_tool("some") is None
    monkeypatch.setenv("PATH", str(tool.parent), prepend=os.pathsep)
    assert gpu_build.find_tool("some") == str(tool)


def test_a_rival_that_torch_cannot_compile_is_left_out(monkeypatch):
    gpu_build.compile_rival("smoke_temporal", "forward", "float32", "eager", "cpu")  # which runs
    monkeypatch.setattr(gpu_timing, "why_not", lambda *_: "there is none")
    with pytest.raises(Skip, match="there is none"):
        gpu_build.compile_rival("smoke_temporal", "forward", "float32", "compiled", "cpu")


# ---- Checks ----


def spoil(monkeypatch, function: str, change: Callable[[torch.Tensor, int], torch.Tensor]) -> None:
    """Change what a public function gives, knowing how often it has been called; not that of the reference."""
    right, calls = getattr(vidattn, function), []

    def wrong(*args: Any, backend: str | None = None, **options: Any) -> torch.Tensor:
        out = right(*args, backend=backend, **options)
        if backend == "reference":
            return out
        calls.append(1)
        return change(out, len(calls))

    monkeypatch.setattr(vidattn, function, wrong)


def test_wrong_numbers_are_found_in_every_call(machine, monkeypatch):
    for function in vidattn.backends._functions:
        spoil(monkeypatch, function, lambda out, calls: out * 1.5)
    monkeypatch.setattr(vidattn, "why_not", lambda *_, **__: [])
    for check in gpu_checks.CHECKS:
        with pytest.raises(AssertionError, match="off by"):
            gpu_checks.check_numbers(check, "bfloat16", "triton", "cpu")


def test_right_numbers_say_how_far_off_they_are(machine):
    found = gpu_checks.check_numbers("windows_49", "float16", "cuda", "cpu")
    assert set(found) == {"out", "qkv", "bias_table", "pad_qkv"} and 0 < found["qkv"] < 1e-3
    found = gpu_checks.check_numbers("listed_windows_bias", "float16", "cuda", "cpu")
    assert set(found) == {"out", "qkv"}  # "cuda" gives no gradient of a dense bias
    with pytest.raises(Skip, match="float32"):
        gpu_checks.check_numbers("windows_49", "float32", "cuda", "cpu")


@pytest.mark.parametrize("check", [gpu_checks.check_graph, gpu_checks.check_reduce_overhead, gpu_checks.check_streams])
def test_calls_that_give_something_else_each_time_are_found(machine, monkeypatch, check):
    check("time_8", "bfloat16", "triton", "cpu")
    spoil(monkeypatch, "temporal_attention", lambda out, calls: out * (1.0 + calls))
    monkeypatch.setattr(vidattn, "why_not", lambda *_, **__: [])
    with pytest.raises(AssertionError, match="not the same, bit for bit"):
        check("time_8", "bfloat16", "triton", "cpu")


def test_opcheck_sees_the_ops_of_both_directions(machine, monkeypatch):
    seen = []
    monkeypatch.setattr(torch.library, "opcheck", lambda op, args, test_utils: seen.append((op, args)) or {})
    with pytest.raises(AssertionError, match="divided_attention"):
        gpu_checks.check_ops("time_8", "bfloat16", "triton", "cpu")  # these results are not those of success
    monkeypatch.setattr(
        torch.library,
        "opcheck",
        lambda op, args, test_utils: seen.append((op, args)) or dict.fromkeys(test_utils, "SUCCESS"),
    )
    found = gpu_checks.check_ops("windows_padded", "bfloat16", "triton", "cpu")
    names = ["vidattn::window3d_attention", "vidattn::window3d_attention_backward"]
    assert found == {"ops": names} and [op._schema.name for op, _ in seen[-2:]] == names
    forward = [x for x in seen[-2][1] if isinstance(x, torch.Tensor)]
    assert [x.requires_grad for x in forward] == [True, True, True]  # qkv, table, padding
    assert not any(x.requires_grad for x in seen[-1][1] if isinstance(x, torch.Tensor))


def test_opcheck_of_torch_is_satisfied(machine):
    assert gpu_checks.check_ops("shift", "bfloat16", "triton", "cpu")["ops"] == ["vidattn::temporal_shift"] * 2


def test_the_sanitizer_runs_a_call_and_what_it_says_is_told(tmp_path, monkeypatch):
    def tool(script: str) -> None:
        shutil.rmtree(tmp_path / "cuda", ignore_errors=True)
        monkeypatch.setenv("CUDA_HOME", str(toolkit(tmp_path / "cuda", compute_sanitizer=script)))

    def check(name: str = "mixing_20") -> dict[str, Any]:
        return gpu_checks.check_memory("memcheck", name, ("cuda", "triton"), "cpu")

    tool('while test "${1%python*}" = "$1"; do echo "$1"; shift; done\nexec "$@"\n')
    assert "mixing_20 triton" in check()["ran"]
    tool("echo ========= Invalid __global__ write of size 4; exit 9\n")
    with pytest.raises(AssertionError, match="memcheck found something: ========= Invalid"):
        check()
    tool("echo Segmentation fault; exit 139\n")
    with pytest.raises(AssertionError, match="memcheck ended with exit status 139"):
        check()
    tool("echo ========= Error: Device not supported; exit 1\n")
    with pytest.raises(Skip, match="does not reach the GPU"):
        check()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(Skip, match="no compute-sanitizer"):
        check()


def test_the_sanitized_program_fails_where_a_call_is_wrong_or_nobody_runs_it(machine, monkeypatch):
    assert list(gpu_checks.run_numbers(["mixing_20"], ["triton"], "cpu")) == ["mixing_20 triton"]
    monkeypatch.setattr(vidattn, "why_not", lambda *_, **__: ["for a reason"])
    with pytest.raises(AssertionError, match="mixing_20: none of cuda, triton runs it"):
        list(gpu_checks.run_numbers(["mixing_20"], ["cuda", "triton"], "cpu"))


# ---- Calibration ----


def test_calibration_measures_what_the_rates_are_made_of(machine, tmp_path):
    library = tmp_path / "calibration.so"
    with pytest.raises(Skip, match=r"calibration\.so was not built"):
        calibration.measure("exponentials", library, "cpu")
    library.touch()
    results = Results(tmp_path / "lines", "code")
    calibration._kernels.cache_clear()
    for step in (*calibration.TORCH_STEPS, *calibration.KERNEL_STEPS):
        results.add("calibration", step, {"status": "passed", "found": calibration.measure(step, library, "cpu")})
    calibration._kernels.cache_clear()
    found = gpu_report.measured_rates(results)
    assert found["exponentials_per_s"] == 8 * 132 * 8e3 / 2e-3 and found["sm_clock_hz"] == 1e9
    assert found["wgmma_flops_per_s"] == 2 * found["wgmma_flops_per_s_sustained"]
    assert found["lds64_broadcast_wavefronts"] == pytest.approx(1)
    rates = gpu_report.rates_of(found)
    assert set(rates.__dict__) <= set(found) and rates.exponentials_per_s == found["exponentials_per_s"]
    (tmp_path / "rates.json").write_text(json.dumps(found))
    assert Rates.load(tmp_path / "rates.json") == rates


# ---- The suite ----

SUITE = """
import os, time
import pytest
@pytest.mark.parametrize("i", range(5))
def test_even_cpu(i): assert i % 2 == 0, f"odd {i}"
def test_left_out_cpu(): pytest.skip("because")
def test_of_another_backend(): raise AssertionError
"""


def run_suite(folder: Path, text: str, shards: int = 1, select: str = "cpu") -> list[dict[str, Any] | str]:
    file = folder / "test_some.py"
    file.write_text(text)
    found: list[dict[str, Any] | str] = []
    for index in range(shards):
        try:
            found.append(gpu_suite.run(index, shards, folder / "suite", select, (str(file),)))
        except AssertionError as error:
            found.append(str(error))
    return found


def noted(folder: Path) -> dict[str, str]:
    lines = gpu_suite.results((folder / "suite").glob("*.jsonl"))
    return {test.rpartition("::")[2]: line["outcome"] for test, line in lines.items()}


def test_the_suite_is_shared_and_every_failure_told(tmp_path):
    found = run_suite(tmp_path, SUITE, shards=2)
    outcomes = noted(tmp_path)
    expected = {f"test_even_cpu[{i}]": "failed" if i % 2 else "passed" for i in range(5)}
    assert outcomes == expected | {"test_left_out_cpu": "skipped"}
    assert found[0] == {"passed": 3} and "2 of 3 tests failed" in found[1] and "AssertionError: odd 1" in found[1]


def test_a_suite_that_is_killed_goes_on_where_it_was(tmp_path):
    counted = f'\ndef test_count_cpu(): open({str(tmp_path / "count")!r}, "a").write("x")\n'
    run_suite(tmp_path, "def test_a_cpu(): pass" + counted)
    lines = next((tmp_path / "suite").glob("*.jsonl"))
    with lines.open("a") as file:
        file.write('{"test": "some::test_b", "outc')  # it was killed while it wrote this
    (found,) = run_suite(tmp_path, "def test_a_cpu(): pass\ndef test_b_cpu(): pass" + counted)
    assert (tmp_path / "count").read_text() == "x"
    assert noted(tmp_path)["test_b_cpu"] == "passed" and found["passed"] == 3


def test_tests_that_end_or_hang_their_process_fail_and_the_others_go_on(tmp_path, monkeypatch):
    text = "import os, time\ndef test_a_cpu(): pass\ndef test_b_cpu(): os.abort()\ndef test_c_cpu(): time.sleep(60)\n"
    plugin = tmp_path / "sitecustomize.py"
    plugin.write_text("import benchmarks.gpu_suite as suite\nsuite.TEST_SECONDS = 1\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))
    (found,) = run_suite(tmp_path, text + "def test_d_cpu(): pass\n")
    assert noted(tmp_path) == {f"test_{x}_cpu": y for x, y in zip("abcd", ("passed", "failed", "failed", "passed"))}
    assert "2 of 4 tests failed" in found and "exit status -6" in found and "exit status -14" in found


def test_a_suite_without_tests_or_with_a_broken_file_has_failed(tmp_path):
    (empty,) = run_suite(tmp_path, SUITE, select="nothing")
    assert "no test selected" in empty
    shutil.rmtree(tmp_path / "suite")
    with pytest.raises((AssertionError, RuntimeError), match="no_such_module"):
        gpu_suite.run(0, 1, tmp_path / "suite", "cpu", (_broken(tmp_path),))


def _broken(folder: Path) -> str:
    (folder / "test_broken.py").write_text("import no_such_module\n")
    return str(folder / "test_broken.py")


def test_the_suite_needs_packages_and_its_files_exist(tmp_path, monkeypatch):
    assert all((ROOT / file).exists() for file in (*gpu_suite.FILES, *gpu_suite.GOLDEN))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "hypothesis" else object())
    with pytest.raises(Skip, match="not installed: hypothesis"):
        gpu_suite.run(0, 1, tmp_path, "cpu", ())

"""The whole picture: all shapes, limits of the machine, full runs, growth, verdicts, pictures and the page."""

from __future__ import annotations

import ctypes
import json
from pathlib import Path
from types import SimpleNamespace

import made_up_results as made_up
import pytest
import torch
from torch._dynamo.utils import counters

from benchmarks import (
    bench_models,
    cpu_limits,
    divided_contenders,
    growth,
    growth_report,
    mixing_contenders,
    page,
    predicted,
    report,
    rounds,
    selection,
    store,
    window3d_contenders,
)
from benchmarks.measure import Measured, backends_taken, prepare
from benchmarks.shapes import (
    ALIASES,
    CROSSOVER,
    DIRECTIONS,
    DIVIDED_CASES,
    DTYPES,
    MIXING_CASES,
    MODULE_CASES,
    NAMED_CASES,
    TITLES,
    WINDOW_CASES,
    DividedCase,
    ModelCase,
    WindowCase,
    Work,
    work_of,
)
from benchmarks.summary import describe_machine
from benchmarks.verdicts import best_rival, compare, ours_of, slower
from vidattn.geometry import region_mask

ROOT = Path(__file__).parent.parent
OPS = {**WINDOW_CASES, **DIVIDED_CASES, **MIXING_CASES}
FLOAT32 = DTYPES["float32"]


@pytest.fixture(scope="module")
def result() -> dict:
    """All ops in float32, each at half its limit and twice the speed of its best rival, SDPA."""
    return made_up.result()


@pytest.fixture(scope="module")
def grown() -> dict:
    return made_up.growth_result()


def test_the_table_has_the_models_and_no_call_twice():
    stages = [f"swin_{size}{frames}_stage{n}" for size in "tbl" for frames in ("", "_16_frames") for n in (1, 2, 3, 4)]
    others = ["swin_b_ssv2_stage4", "swinunetr_stage2_shifted", "swinunetr_24_stage1", "swin_2d_stage1_shifted"]
    sequences = ["temporal_hr", "spatial_cls_hr", "temporal_96_frames", "vivit_b_model2_space", "vivit_b_model3_time"]
    diffusion = [f"diffusion_{frames}_frames_{heads}" for frames in (16, 25) for heads in ("8x40", "5x64")]
    assert {*stages, *others, *sequences, *diffusion, "vrt_stage1", "pangu_stage2_shifted"} <= OPS.keys()
    assert {f"sequences_of_{length}" for length in CROSSOVER} <= OPS.keys()
    # Swin-S is a deeper Swin-T, and a stage that its window covers has no shifted form.
    assert "Swin-S stage 1, shifted" in ALIASES["swin_t_stage1_shifted"]
    assert "Swin-B, 16 frames, stage 4, shifted" in ALIASES["swin_b_16_frames_stage4"]
    calls = [(case, case.geometry) if isinstance(case, WindowCase) else case for case in OPS.values()]
    assert len(set(calls)) == len(calls) == len({TITLES[name] for name in OPS})
    assert set(NAMED_CASES) <= OPS.keys() and len(NAMED_CASES) == 10
    assert WINDOW_CASES["pangu_stage2_shifted"].geometry.masked_axes == (True, True, False)


@pytest.mark.parametrize("name", ["swin_t_stage3_shifted", "swinunetr_stage3_shifted", "pangu_stage2_shifted"])
def test_visible_scores_are_those_that_no_mask_separates(name):
    case = WINDOW_CASES[name]
    mask = region_mask(case.geometry)
    assert mask is not None
    assert case.visible == pytest.approx(1 - mask.double().mean().item(), rel=1e-12)
    work = work_of(case, "forward_backward", FLOAT32)
    assert work.exponentials == pytest.approx(2 * case.scores * case.visible)
    assert work.flops == 7 * 2 * case.scores * case.head_dim


def test_limits_are_compiled_for_the_instruction_set_of_the_kernels():
    setup = (ROOT / "setup.py").read_text()
    assert f'AVX512 = "{cpu_limits.AVX512}"' in setup and f'"avx2": "{cpu_limits.ISA_FLAGS["avx2"]}"' in setup
    assert cpu_limits.why_not() is None
    for dtype in DTYPES.values():
        cpu_limits.exponentials(dtype)()
        for direction in DIRECTIONS:
            cpu_limits.fma(dtype, direction)()


def test_without_a_compiler_there_are_no_limits(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    cpu_limits._library.cache_clear()
    try:
        assert cpu_limits.why_not() == "there is no no-such-compiler, which measures what the CPU does at best"
    finally:
        cpu_limits._library.cache_clear()


@pytest.mark.parametrize("token_order", ["hwt", "thw"])
@pytest.mark.parametrize("threads", [1, 3])
def test_traffic_touches_each_row_once(token_order, threads):
    batch, sites, frames, heads, words = 2, 3, 4, 2, 5
    generator = torch.Generator().manual_seed(0)
    tokens, width = sites * frames, heads * words
    qkv = torch.randint(1 << 62, (batch, tokens, 3, width), generator=generator)
    dout = torch.randint(1 << 62, (batch, tokens, width), generator=generator)
    out, gradients = torch.zeros_like(dout), torch.zeros_like(qkv)
    pointers = (ctypes.c_void_p(x.data_ptr()) for x in (qkv, dout, out, gradients))
    sizes = (ctypes.c_int64(size) for size in (batch, sites, frames, heads, words))
    flags = ctypes.c_bool(token_order == "hwt"), ctypes.c_bool(True)
    cpu_limits._library().traffic(*pointers, *sizes, *flags, threads)
    assert torch.equal(out, qkv[:, :, 0] | qkv[:, :, 1] | qkv[:, :, 2])
    assert torch.equal(gradients, qkv | dout[:, :, None])


def test_traffic_is_for_short_sequences():
    for direction in DIRECTIONS:
        call = cpu_limits.traffic(DividedCase("temporal", 3, 2, heads=1, head_dim=2), direction, FLOAT32)
        assert call is not None
        call()
    assert cpu_limits.traffic(DIVIDED_CASES["temporal_32_frames"], "forward", FLOAT32) is None
    assert cpu_limits.traffic(DIVIDED_CASES["vivit_b_model3_space"], "forward", FLOAT32) is None


def test_the_interval_of_a_median_is_that_of_the_tables():
    assert rounds.interval(range(5)) == (0, 4)
    assert rounds.interval(range(15)) == (3, 11)  # the 4th and the 12th of 15
    assert rounds.interval(range(20)) == (5, 14)
    assert rounds.interval([7.0]) == (7.0, 7.0)


def test_the_limit_is_the_longer_of_arithmetic_and_bytes():
    times = {"fma": [1.0, 2.0], "exp": [0.5, 1.0], "copy": [3.0, 1.0]}
    work = Work(2 * cpu_limits.FMA_FLOPS, rounds.COPY_BYTES, 2 * cpu_limits.EXPONENTIALS, visible=0.5)
    assert rounds.limit(times, work) == [3.0, 4.0]  # bytes first; then 2 for the visible half of the products, plus 2
    summary = rounds.summarise({"vidattn": [6.0, 8.0], "gemm": [1.0, 1.0], **times}, "vidattn", work)
    assert summary["share_of_limit"]["median"] == 0.5
    assert summary["limited_by"] == "arithmetic"


def test_slow_rivals_leave_the_rounds_early(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(rounds.time, "perf_counter", lambda: clock[0])

    def takes(seconds: float):
        return lambda: clock.__setitem__(0, clock[0] + seconds)

    calls = {"vidattn": takes(1.0), "near": takes(3.9), "slow": takes(4.0), "slowest": takes(20.0), "gemm": takes(99.0)}
    times = rounds.interleave(calls, 15, 0.0, ours="vidattn")
    counts = {name: len(values) for name, values in times.items()}
    assert counts == {"vidattn": 15, "near": 15, "slow": 5, "slowest": 1, "gemm": 15}
    assert rounds.ratio(times, "slow", "vidattn")["median"] == pytest.approx(4.0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "case"),
    [(window3d_contenders, "smoke"), (divided_contenders, "smoke_spatial"), (mixing_contenders, "smoke")],
)
def test_compiled_contenders_run_and_compile_once(family, case):
    names = family.contenders("forward", "float32")
    arguments = {"case": case, "direction": "forward", "dtype": "float32", "device": "cpu"}
    calls, measured = prepare(family.build, names, arguments, lambda what: None)
    assert {"compiled", "compiled_sdpa", "vidattn"} <= calls.keys(), measured.not_run
    if "flex" not in calls:  # torch 2.13 cannot lower, for a CPU, what mixing hands it
        assert family is mixing_contenders and "LoweringException" in measured.not_run["flex"]
    compiled = counters["stats"]["unique_graphs"]
    for call in calls.values():
        call()
    assert counters["stats"]["unique_graphs"] == compiled > 0


def test_a_store_goes_on_and_refuses_what_does_not_belong_to_it(tmp_path):
    path, key = tmp_path / "results.json", ("swin_t_stage1", "forward", "float32", 2)
    first = store.Store(path, made_up.MACHINE)
    work = work_of(WINDOW_CASES["swin_t_stage1"], "forward", FLOAT32)
    first.put(key, made_up.entries("window3d", key, work, not_run={"flex": "no compiler"}))
    again = store.Store(path, made_up.MACHINE)
    assert again.contenders(key) == {*made_up.TIMES, "flex"}
    assert again.contenders((*key[:3], 1)) == set()
    again.put(key, made_up.entries("window3d", key, work, times={"vidattn": 1.0}))
    assert store.Store(path, made_up.MACHINE).contenders(key) == {"vidattn"}
    assert report.load(path)["benchmarks"][0]["stats"]["rounds"] == 15
    with pytest.raises(ValueError, match=r"expected results with cpu_isa avx2, got avx512; name another file"):
        store.Store(path, {**made_up.MACHINE, "cpu_isa": "avx2"})
    path.write_text("[]")
    with pytest.raises(ValueError, match="expected a result of a benchmark"):
        store.Store(path, made_up.MACHINE)


def test_a_full_run_takes_less_than_three_hours(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    cases = full_cases()
    named = {case for case, _, dtype, threads in cases if (dtype, threads) != ("float32", 2)}
    assert named == {*NAMED_CASES}
    assert {("swin_b_stage2", direction, "float32", 2) for direction in DIRECTIONS} <= cases.keys()
    assert {("xvit_b_div8", "forward", "float16", 2), ("xvit_b_div8", "forward", "float32", 1)} <= cases.keys()
    assert "compiled_sdpa" in cases["swin_t_stage1", "forward", "float32", 2]
    assert "compiled" not in cases["swin_t_stage2", "forward", "float32", 2]
    assert "sdpa_prebuilt" in cases["swin_t_stage2", "forward", "float32", 2]
    assert sum(selection.expected_seconds(case, names, full=True) for case, names in cases.items()) < 3 * 3600


def full_cases() -> dict[store.Key, list[str]]:
    """The cases of a full run, and the contenders of each."""
    from benchmarks import bench_divided, bench_mixing, bench_models, bench_window3d

    class Metafunc:
        def __init__(self, function) -> None:
            self.function = function
            self.config = self

        def getoption(self, name: str):
            return {"full": True}.get(name)

        def parametrize(self, names, values) -> None:
            for *case, contender in values:
                cases.setdefault(tuple(case), []).append(contender)

    cases: dict = {}
    for module in (bench_divided, bench_mixing, bench_models, bench_window3d):
        for name in dir(module):
            if name.startswith("bench_"):
                module.pytest_generate_tests(Metafunc(getattr(module, name)))
    return cases


def test_cases_that_were_measured_are_not_selected_again(tmp_path):
    def items(key: store.Key, *contenders: str) -> list[SimpleNamespace]:
        params = dict(zip(("case", "direction", "dtype", "threads"), key))
        specs = [SimpleNamespace(params={**params, "contender": contender}) for contender in contenders]
        return [SimpleNamespace(originalname="bench_window3d_attention", callspec=spec) for spec in specs]

    done, partly, new = (("swin_t_stage1", "forward", "float32", threads) for threads in (1, 2, 3))
    kept = store.Store(tmp_path / "results.json", made_up.MACHINE)
    work = work_of(WINDOW_CASES["swin_t_stage1"], "forward", FLOAT32)
    kept.put(done, made_up.entries("window3d", done, work, not_run={"flex": "no compiler"}))
    kept.put(partly, made_up.entries("window3d", partly, work))
    collected = [*items(done, "vidattn", "flex"), *items(partly, "vidattn", "flex"), *items(new, "vidattn")]
    assert selection.measured_before(collected, kept) == collected[:2]


@pytest.mark.slow
def test_a_full_run_goes_on_where_it_stopped(tmp_path):
    from test_benchmarks import run_pytest

    path = tmp_path / "results.json"
    arguments = ["benchmarks/bench_mixing.py", "--smoke", "--full", "--dtype=float32", "--no-peak-memory"]
    arguments += ["--benchmark-only", "--benchmark-max-time=0", f"--results={path}"]
    printed = run_pytest(*arguments, "-k=shift and not compiled", "--minutes=0.0001")
    assert "start again for the rest" in printed and not path.exists()
    printed = run_pytest(*arguments, "-k=shift and not compiled")
    assert "[1/1] smoke, shift alone, float32:" in printed and "start again" not in printed
    (entry, *_) = json.loads(path.read_text())["benchmarks"]
    assert entry["stats"]["rounds"] >= selection.FULL_ROUNDS and entry["info"]["share_of_limit"]["low"] > 0
    printed = run_pytest(*arguments, "-k=shift and not compiled", code=5)
    assert "no case is left: all are in" in printed


@pytest.mark.parametrize(
    ("name", "shape", "options"),
    [
        ("torchvision_attention", (1, 8, 14, 14, 96), {}),
        ("monai_block", (1, 10, 10, 10, 48), {"size": 10}),
        ("transformers_layer", (1, 9, 768), {"num_frames": 2, "image_size": 32}),
        ("timm_block", (2, 14, 14, 96), {"input_resolution": (14, 14)}),
    ],
)
def test_attention_of_libraries_is_accelerated_and_right(name, shape, options, monkeypatch):
    assert MODULE_CASES[name].model == name
    monkeypatch.setitem(bench_models.CASES, name, ModelCase(name, shape, tuple(options.items())))
    for direction in ("inference", "training"):
        eager, ours = (bench_models.build(name, direction, "float32", contender) for contender in ("eager", "vidattn"))
        assert backends_taken(ours) == {"cpu"}
        assert rounds.largest_error(ours(), eager()) < 1e-4
    assert bench_models.model_flops(name, "training") > 2 * bench_models.model_flops(name, "inference") > 0


@pytest.mark.parametrize("power", [-1.0, 0.0, 1.5, 4.0])
def test_fitted_exponents(power):
    noisy = {size: 3.0 * size**power * factor for size, factor in zip((8, 16, 32, 64), (1.01, 0.99, 0.99, 1.01))}
    assert growth.exponent(noisy) == pytest.approx(power, abs=0.01)
    assert growth.exponent({8: 1.0}) is None


def test_expected_exponents_of_memory():
    windows = {growing.axis: growing for growing in growth.series(2) if growing.op == "windows"}
    for contender, expected in (("vidattn", 0.0), ("eager", 0.9)):  # the results stay, the scores grow
        curve = growth_report.Curves(windows["window"], "forward")
        assert curve.expected("peaks", contender) == pytest.approx(expected, abs=0.1)
    frames = next(growing for growing in growth.series(2) if (growing.op, growing.axis) == ("time", "frames"))
    assert growth_report.Curves(frames, "forward").expected("peaks", "vidattn") == pytest.approx(1.0)
    assert 1.0 < growth_report.Curves(frames, "forward").expected("peaks", "eager") < 2.0


def test_growth_measures_a_point_and_what_runs_out_of_memory(monkeypatch):
    case = DividedCase("temporal", 4, 6, heads=2, head_dim=8)
    only = [growth.Series("time", "frames", "frames", {4: case})]
    monkeypatch.setattr(growth, "series", lambda threads: only)
    monkeypatch.setattr(growth, "CONTENDERS", ("eager", "sdpa", "vidattn"))
    monkeypatch.setattr(growth, "SECONDS", 0.0)

    def peak(builder: str, *, most: int, contender: str, **arguments: object) -> int:
        assert (builder, most) == ("benchmarks.growth:build", 1 << 30)
        if contender == "eager":
            raise MemoryError
        return 1000

    monkeypatch.setattr(growth, "peak_extra_bytes", peak)
    said: list[str] = []
    (key,) = growth.points(only, 1, ["forward"])
    measured = growth.measure_point(key, case, 1 << 30, said.append)
    assert set(measured.info) == {"sdpa", "vidattn"} and measured.info["sdpa"]["peak_extra_bytes"] == 1000
    assert measured.not_run == {"eager": "out of memory: more than 1 GiB"}
    assert len(measured.times["vidattn"]) == growth.ROUNDS and "memory" in said


def test_growth_goes_on_and_stops_in_time(tmp_path, monkeypatch, capsys):
    measured: list[store.Key] = []

    def measure_point(key, case, most, say) -> Measured:
        measured.append(key)
        found = Measured()
        found.times = {name: [0.01] * 5 for name in (*growth.CONTENDERS, *made_up.BASELINES)}
        found.info = {name: {"peak_extra_bytes": 1} for name in growth.CONTENDERS}
        return found

    monkeypatch.setattr(growth, "measure_point", measure_point)
    arguments = [f"--save={tmp_path / 'growth.json'}", "--only=time/resolution", "--direction=forward"]
    growth.main([*arguments, "--minutes=-1"])
    assert not measured and "start again for the rest" in capsys.readouterr().out
    growth.main(arguments)
    assert len(measured) == 4 and "4 of 4 points to measure" in capsys.readouterr().out
    growth.main(arguments)
    assert len(measured) == 4 and "0 of 4 points to measure" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        growth.main([*arguments, "--only=time/flies"])
    assert "expected one of windows/frames" in capsys.readouterr().err


def test_growth_is_told_with_exponents_and_where_memory_ends(grown):
    text = growth_report.tables(grown)
    assert "| space: resolution, 7 to 56 wide | forward | 4.00 | 4.00 | 4.00 | 4.00 | 4.00 |" in text
    assert "(none from 56: out of memory)" in text
    curve = next(c for c in growth_report.curves(grown) if (c.of.op, c.of.axis) == ("space", "resolution"))
    assert sorted(curve.seconds["vidattn"]) == [7, 14, 28, 56] and sorted(curve.seconds["eager"]) == [7, 14, 28]


def test_cases_behind_a_rival_are_named(result):
    every, few = 2 * len(OPS), 2 * len(made_up.FEW)
    assert f"beyond the noise of 15 rounds: none of {every} cases ({every} on 2 threads)." in slower([result])
    behind = made_up.few(slow=2.1)  # SDPA takes 2.0
    assert slower([result, behind]) == slower([result])  # a case counts once
    behind["machine"]["cpu_isa"] = "avx2"
    text = slower([result, behind, made_up.few(threads=1)])
    assert f"15 rounds: {few} of {every + 2 * few} cases ({few} on 1 thread, {every + few} on 2 threads)." in text
    assert "- Swin-T stage 1, forward, float32, 2 threads: 0.95 (0.95 to 0.95) times as fast as SDPA" in text
    assert ": none of" in slower([made_up.few(slow=2.0)])
    assert "Slower in too few rounds to tell:" in slower([made_up.few(slow=2.1, count=5)])
    info = ours_of(result)[0]["info"]
    faster = {"natten": {"median": 0.1}, "vidattn_float32": {"median": 0.1}}
    rival = best_rival({**info, "speedup_over": {**info["speedup_over"], **faster}})
    assert rival is not None and rival.name == "sdpa"  # natten computes something else
    both = {"compiled": {"median": 0.9, "low": 0.8, "high": 1.0}, "vidattn_compiled": {"median": 0.75}}
    rival = best_rival({**info, "speedup_over": both})
    assert rival is not None and rival[1:] == pytest.approx((1.2, 0.8 / 0.75, 1.0 / 0.75))  # compiled against compiled
    both["vidattn_compiled"] = {"median": 1.1}  # slower than what is not
    rival = best_rival({**info, "speedup_over": both})
    assert rival is not None and rival.median == 0.9


def test_changes_are_told_beyond_the_noise(result, tmp_path, capsys):
    later = made_up.few(slow=1.25)
    assert {change.verdict for change in compare(result, result)} == {"same"}
    assert {change.verdict for change in compare(result, made_up.few(slow=1.02))} == {"same"}  # as two runs may
    changes = compare(result, later)
    assert {change.verdict for change in changes} == {"slower"} and changes[0].speed == pytest.approx(0.8, rel=0.01)
    assert {change.verdict for change in compare(later, result)} == {"faster"}
    old = json.loads(json.dumps(result))
    for entry in old["benchmarks"]:
        for share in (value for key, value in entry["info"].items() if key.startswith("share_of_")):
            del share["low"], share["high"]
    assert {change.verdict for change in compare(old, old)} == {"unsure"}  # it does not know its noise
    hungry = json.loads(json.dumps(result))
    for entry in hungry["benchmarks"]:
        entry["info"]["peak_extra_bytes"] *= 2
    assert compare(result, hungry)[0].verdict == "same, 2.00 times the memory"
    paths = [tmp_path / "old.json", tmp_path / "new.json"]
    for path, value in zip(paths, (result, later)):
        store.write(path, value)
    with pytest.raises(SystemExit) as stopped:
        report.main(["--compare", *map(str, paths)])
    assert stopped.value.code == 1
    assert f"{2 * len(made_up.FEW)} slower beyond the noise" in capsys.readouterr().out


def test_the_report_shows_shares_of_the_limit(result, grown, tmp_path, capsys):
    paths = [tmp_path / "ops.json", tmp_path / "growth.json"]
    for path, value in zip(paths, (result, grown)):
        store.write(path, value)
    report.main([*map(str, paths), f"--pictures={tmp_path / 'pictures'}"])
    printed = capsys.readouterr().out
    row = next(line for line in printed.splitlines() if line.startswith("| Swin-T stage 1, forward |"))
    assert "| 50% / 50% |" in row and "(arithmetic) |" in row
    assert "### Time, exponent of the size that grows" in printed
    drawn = sorted(path.name for path in (tmp_path / "pictures").iterdir())
    names = ("cases", "crossover", "growth-memory", "growth-time", "roofline", "speed")
    assert drawn == [f"{name}-avx512.svg" for name in names]
    for name in names:
        text = (tmp_path / "pictures" / f"{name}-avx512.svg").read_text()
        assert f"{describe_machine(made_up.MACHINE)}, 2026-01-31<" in text
        assert len(text) < 250_000
    with pytest.raises(SystemExit):
        report.main([])
    assert "expected results, or --compare with two of them" in capsys.readouterr().err


def test_a_result_is_named_after_what_it_was_measured_on(result, grown):
    assert report.file_name(result) == "made-up-r-cpu-avx512-2-threads-2026-01-31.json"
    assert report.file_name(grown) == "growth-made-up-r-cpu-avx512-2-threads-2026-01-31.json"


def test_the_page_is_current():
    results = page.kept()
    assert page.PAGE.read_text() == page.render(results, predicted.newest()), "run: python -m benchmarks.page"
    pictures = set(page.PICTURES.glob("*.svg"))
    for shown in page.shown(results):
        for of in (shown.result, shown.growth):
            if of is None:
                continue
            growing = report.is_growth(of)
            mine = {
                path
                for path in pictures
                if path.stem.endswith(f"-{of['machine']['cpu_isa']}") and path.stem.startswith("growth-") == growing
            }
            assert mine
            for path in mine:
                assert f"{describe_machine(of['machine'])}, {of['date']}<" in path.read_text(), path.name
            pictures -= mine
    assert not pictures


def test_the_page_shows_the_newest_of_each_instruction_set(result, grown):
    older = {**made_up.few(slow=1.5), "date": "2025-01-31", "file": "older.json"}
    results = [older, {**result, "file": "ops.json"}, {**made_up.few(threads=1), "file": "one.json"}]
    held = made_up.few(threads=1)
    results.append({**held, "machine": {**held["machine"], "cpu_isa": "avx2"}, "file": "avx2.json"})
    text = page.render([*results, {**grown, "file": "growth.json"}], predicted.newest())
    assert "older.json" not in text and "(../benchmarks/results/ops.json)" in text
    windows = sum(name in WINDOW_CASES for name in OPS)
    speeds = "2.00 (2.00 to 2.00) | 50%"
    assert f"| Made up CPU, AVX-512 | windows | {windows} | {speeds} | {speeds} |" in text
    assert "| Made up CPU, AVX2, 1 thread | windows |" in text and "## On a CPU with AVX2, 1 thread" in text
    assert "(../benchmarks/results/one.json)" in text  # of the same processor, below
    assert "on 1 thread, " in text
    assert "| windows | cpu, Made up CPU, AVX-512 | products and exponentials" in text
    assert "Plain sequences of 8 to 1152 tokens; forward: behind at no length" in text
    assert "Fitted exponents beside the expected ones" in text

"""The audit of GPU kernels: what launches cost, what is predicted, and the kernels against their ceilings."""

from __future__ import annotations

import _ctypes
import dataclasses
import json
import os
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton, which compiles the kernels, is not installed")

import torch

from benchmarks import cubins, cuda_audit, gpu_audit, gpu_plans, page, predicted, sass
from benchmarks.ceilings import CEILINGS, GOALS, Ceiling, unmatched, violations
from benchmarks.prediction import Cost, Grid, Rates
from benchmarks.shapes import GPU_DIVIDED_CASES, GPU_MIXING_CASES, GPU_WINDOW_CASES
from benchmarks.triton_kernels import Kernel, Traffic
from vidattn.kernels.launch import INTERPRETED, Work

AUDITED = ("swin_t_stage1", "swin_t_stage1_shifted", "swin_b_ssv2_stage1")
# With them, every ceiling has a case.
ALL_AUDITED = (
    *AUDITED,
    *("swin_2d_window7", "swin_2d_window12", "swin_t_8frames_stage1", "swinunetr"),
    *("timesformer_b_time", "timesformer_hr_time", "timesformer_32_frames_time", "timesformer_l_time"),
    *("timesformer_b_space", "timesformer_l_space"),
    *("vivit_b_model3_time", "vivit_b_model3_space", "vivit_b_model4"),
    *("xvit_b_16_frames_div8", "xvit_b_16_frames_div4"),
    *("xvit_b_16_frames_div8_shift", "xvit_b_8_frames_div8_shift"),
)


# ---- Costs ----


@pytest.mark.parametrize(
    ("case", "direction", "microseconds", "term"),
    [
        ("swin_t_stage1", "forward", 127, "exponentials"),
        ("swin_t_stage1", "backward", 191, "matrix"),
        ("swin_t_stage1_shifted", "forward", 84, "exponentials"),
        ("swin_t_stage1_shifted", "backward", 144.5, "bytes"),
        ("swin_t_stage4_shifted", "forward", 11.9, "exponentials"),
        ("swin_b_stage1", "forward", 170, "exponentials"),
        ("swin_b_ssv2_stage1", "backward", 510, "matrix"),
        ("swin_t_8frames_stage1", "forward", 17.9, "bytes"),
    ],
)
def test_floors_by_hand(case, direction, microseconds, term):
    terms = gpu_plans.window3d_floor(GPU_WINDOW_CASES[case], direction, torch.bfloat16).microseconds(Rates())
    assert max(terms, key=terms.get) == term
    assert terms[term] == pytest.approx(microseconds, rel=0.005)


@pytest.mark.parametrize(
    ("case", "direction", "microseconds", "term"),
    [
        ("timesformer_b_time", "forward", 17.9, "bytes"),
        ("timesformer_b_time", "backward", 31.4, "bytes"),
        ("timesformer_b_space", "forward", 17.9, "bytes"),
        ("timesformer_b_space", "backward", 31.4, "bytes"),
        ("timesformer_hr_space", "forward", 307, "matrix"),
        ("timesformer_hr_space", "backward", 767, "matrix"),
        ("timesformer_l_time", "forward", 215, "bytes"),
        ("vivit_b_model3_time", "forward", 35.9, "bytes"),
        ("vivit_b_model4", "backward", 62.7, "bytes"),
    ],
)
def test_floors_of_divided_attention_by_hand(case, direction, microseconds, term):
    terms = gpu_plans.all_pairs_floor(GPU_DIVIDED_CASES[case], direction, torch.bfloat16).microseconds(Rates())
    assert max(terms, key=terms.get) == term
    assert terms[term] == pytest.approx(microseconds, rel=0.005)


def test_floors_of_mixing_by_hand():
    """Of 128 frames of 197 tokens: 155 and 271 MB, and 77 MB for one tensor in and out."""
    case = GPU_MIXING_CASES["xvit_b_16_frames_div8"]
    for direction, attention in (("forward", 36.0), ("backward", 63.1)):
        terms = gpu_plans.all_pairs_floor(case, direction, torch.bfloat16).microseconds(Rates())
        assert max(terms, key=terms.get) == "bytes" and terms["bytes"] == pytest.approx(attention, rel=0.005)
        shift = gpu_plans.shift_floor(case, direction, torch.bfloat16).microseconds(Rates())
        assert shift["bytes"] == pytest.approx(18.0, rel=0.005)


def test_mma_sync_has_a_rate_of_its_own():
    terms = [Cost(0, 0, 0, 1e12, kind).microseconds(Rates())["matrix"] for kind in ("mma.sync", "wgmma")]
    assert terms == pytest.approx([1e6 / 500, 1e6 / 790])


def test_units_work_at_the_same_time():
    """Whole waves, at least two blocks on an SM: nothing comes on top of the longest term."""
    terms = {"bytes": 5.0, "l2": 20.0, "instructions": 10.0, "exponentials": 8.0, "shared": 9.0, "matrix": 9.0}
    assert set(Grid(4 * 132, 2).added(terms, Rates()).values()) == {0.0}


@pytest.mark.parametrize(
    ("grid", "name", "microseconds"),
    [
        (Grid(3 * 132, 2), "last wave", 10 * (2 / 1.5 - 1)),  # two blocks on each SM, then one
        (Grid(66, 2), "last wave", 10 * (2 - 1)),  # half of the SMs have nothing to do
        (Grid(4 * 132, 2, share=4 * 7 / 24.5), "unequal share", 0.0),  # hidden by what crosses L2
        (Grid(4 * 132, 2, share=2.5), "unequal share", 5.0),
        (Grid(3 * 132, 2, share=0.5), "last wave", 9 * (2 / 1.5 - 1)),  # all partitions wait for the shared memory
        (Grid(4 * 132, 1, copy_in=100_000), "copy-in", 10 + 4 * 100_000 / (4.3e6 / 132) - 20),
        (Grid(132, 2, copy_in=400_000), "copy-in", 10 + 400_000 / (4.3e6 / 132) - 20),  # alone, although two would fit
    ],
)
def test_what_nothing_hides_is_added(grid, name, microseconds):
    terms = {"bytes": 5.0, "l2": 20.0, "instructions": 10.0, "exponentials": 8.0, "shared": 9.0, "matrix": 9.0}
    assert grid.added(terms, Rates())[name] == pytest.approx(max(0.0, microseconds))


def test_measured_rates_replace_assumed_ones(tmp_path):
    path = tmp_path / "rates.json"
    path.write_text(json.dumps({"copy_bytes_per_s": 4e12, "wgmma_flops_per_s": None, "device": "some GPU"}))
    assert Rates.load(path) == Rates(copy_bytes_per_s=4e12)
    path.write_text("{}")
    with pytest.raises(ValueError, match="expected positive rates"):
        Rates.load(path)


@dataclasses.dataclass
class FakeSource:
    signature: dict = dataclasses.field(default_factory=dict)
    constants: dict = dataclasses.field(default_factory=dict)
    attrs: dict = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class FakeLaunch:
    work: Work
    grid: int = 10
    name: str = "kernel"
    options: dict = dataclasses.field(default_factory=dict)
    arguments: dict = dataclasses.field(default_factory=dict)
    source: type = FakeSource


KERNEL = Kernel(
    name="kernel",
    options={},
    constants={},
    warps=4,
    registers=128,
    local_bytes=0,
    spill_instructions=0,
    serialised_products=0,
    shared_bytes=0,
    resident_warps=16,
    traffic=Traffic(own=5000, tail=1000, once=0, step=20_000, copy_in=24_000),
    matrix_instructions="wgmma",
    load_widths={},
    store_widths={},
    narrow_tile_loads=0,
    instructions=1000,
    outside_instructions=600,
    outside_exponentials=18,
    loop_instructions=400,
    loop_exponentials=32,
    outside_shared_bytes=40,
    loop_shared_bytes=100,
    loop_opcodes={},
    loop_matrix_instructions="wgmma",
    loop_flops=64 * 64 * 128,
)


def test_rows_that_no_sequence_has_are_not_moved():
    traffic = Traffic(own=6400, tail=1600, once=10, step=1000, copy_in=0)
    given = {"NUM_TOKENS": 392, "BLOCK_M": 64, "BLOCK_N": 128, "TAIL": 16}
    launch = FakeLaunch(Work(steps=3), grid=7, arguments=given)
    assert traffic.of(launch) == pytest.approx(7 * (6400 * 392 / 448 + 1600 * 8 / 16 + 10 + 3 * 1000))


def test_launch_counts_its_loop_as_often_as_it_runs():
    work = Work(steps=6, scores_per_step=64 * 64, scores=10 * 7 * 64 * 64, flops=10 * 7 * 64 * 64 * 128, bytes=10**6)
    audited = gpu_audit.audit_launch(FakeLaunch(work), KERNEL, Rates())
    assert audited.instructions_per_score == 400 * 128 / 64**2
    l2_bytes = 10 * (5000 + 1000 + 6 * 20_000)
    assert audited.cost == Cost(
        1e6,
        1280 * (600 + 6 * 400),
        1280 * (18 + 6 * 32),
        work.flops,
        l2_bytes=l2_bytes,
        shared_bytes=1280 * (40 + 6 * 100),
    )
    assert audited.microseconds == max(audited.terms.values()) + sum(audited.added.values())


def test_unrolled_loop_does_two_steps_a_round():
    work = Work(steps=6, scores_per_step=64 * 64, scores=10 * 6 * 64 * 64, flops=10 * 6 * 64 * 64 * 128)
    kernel = dataclasses.replace(KERNEL, loop_flops=2 * KERNEL.loop_flops)
    audited = gpu_audit.audit_launch(FakeLaunch(work), kernel, Rates())
    assert audited.instructions_per_score == 400 * 128 / 64**2 / 2
    assert audited.cost.instructions == 1280 * (600 + 3 * 400)


def test_a_loop_that_takes_no_steps_is_not_counted():
    """Sequences in one tile: the loop of the program is for values that are not finite."""
    work = Work(scores=10 * 64 * 64, flops=10 * 64 * 64 * 128)
    audited = gpu_audit.audit_launch(FakeLaunch(work), KERNEL, Rates())
    assert audited.instructions_per_score == 600 * 128 / 64**2
    assert audited.cost == Cost(0, 1280 * 600, 1280 * 18, work.flops, l2_bytes=10 * 6000, shared_bytes=1280 * 40)


def test_helper_has_no_figures_about_scores():
    audited = gpu_audit.audit_launch(FakeLaunch(Work(bytes=10**6)), KERNEL, Rates())
    assert (audited.instructions_per_score, audited.matrix_instructions) == (None, None)
    assert audited.cost.instructions == 1280 * 1000


# ---- Ceilings ----


def audited_case(**changes) -> gpu_audit.CaseAudit:
    work = Work(steps=6, scores_per_step=64 * 64, scores=10 * 6 * 64 * 64, flops=10 * 6 * 64 * 64 * 128)
    launch = gpu_audit.audit_launch(FakeLaunch(work), KERNEL, Rates())
    floor = {"bytes": launch.microseconds / 100}
    return gpu_audit.CaseAudit("triton", "f", "c", "forward", (dataclasses.replace(launch, **changes),), floor)


@pytest.mark.parametrize(
    ("ceiling", "changes", "reported"),
    [
        (Ceiling("*", "spill_instructions", 0), {"spill_instructions": 1}, "spill_instructions 1, ceiling 0"),
        (Ceiling("*", "serialised_products", 0), {"serialised_products": 1}, "serialised_products 1, ceiling 0"),
        (Ceiling("*/f/*", "instructions_per_score", 12.4), {}, "instructions_per_score 12.50, ceiling 12.4"),
        (
            Ceiling("triton/f/c/forward", "matrix_instructions", "tcgen05"),
            {},
            "matrix_instructions wgmma, ceiling tcgen05",
        ),
        (Ceiling("*", "microseconds", 0.1), {}, "ceiling 0.1"),
        (Ceiling("triton/*", "times_the_floor", 1.5), {}, "prediction: times_the_floor 100.00, ceiling 1.5"),
        (Ceiling("*", "instructions_per_score", 10), {"instructions_per_score": None}, "nothing to hold against"),
        (Ceiling("*", "local_bytes", 4, at_least=True), {}, "local_bytes 0, at least 4"),
    ],
)
def test_past_a_ceiling(ceiling, changes, reported):
    (line,) = violations([audited_case(**changes)], [ceiling])
    assert reported in line and "triton/f/c/forward" in line


def test_within_ceilings_or_not_meant():
    ceilings = [
        Ceiling("*", "spill_instructions", 0),
        Ceiling("*/f/*", "instructions_per_score", 12.5),
        Ceiling("*/backward", "microseconds", 1.0),
        Ceiling("*", "matrix_instructions", "wgmma"),
    ]
    assert violations([audited_case()], ceilings) == []


def places(names=None) -> list[str]:
    """Name the directions of the cases, all of them by default, for both backends."""
    return [
        f"{backend}/{family}/{case}/{direction}"
        for backend in ("triton", "cuda")
        for family, of in gpu_plans.FAMILIES.items()
        for case in of.cases
        for direction in gpu_plans.DIRECTIONS
        if names is None or case in names
    ]


def test_every_ceiling_is_for_a_case():
    assert unmatched(places(), [*CEILINGS, *GOALS]) == []
    misspelt = Ceiling("cuda/window3d/swin_t_stage9*/forward", "microseconds", 1.0)
    assert unmatched(places(), [*CEILINGS, misspelt]) == [misspelt.where]


def test_every_ceiling_is_for_a_case_that_is_audited_here():
    assert unmatched(places(ALL_AUDITED), [*CEILINGS, *GOALS]) == []


# ---- Kernels of csrc/cuda ----


@pytest.mark.parametrize(
    ("tiles", "blocks", "turn", "share"),
    [
        ([7, 6, 6, 6], 1, False, 28 / 25),  # 24.5 tiles are 7 on one
        ([7, 6, 6, 6], 2, False, 28 / 25),  # also where two blocks share an SM
        ([7, 6, 6, 6], 4, True, 276 / 275),  # but where they take turns; blocks 132 apart mostly do
        ([3, 3, 3, 2, 2], 1, False, 4 * 5 / 13),  # the fifth warp is where the first one is
        ([3, 3, 3, 2, 2], 2, False, 4 * 8 / 26),  # and the second block begins behind it
        ([2, 2], 6, False, 1.0),
    ],
)
def test_share_of_the_busiest_partition(tiles, blocks, turn, share):
    assert cuda_audit.share_of_busiest(tiles, len(tiles), blocks, turn=turn) == pytest.approx(share)


def test_share_of_windows_at_a_border():
    # Two in depth, eight in height and width: one of two, or one of eight, or one of eight.
    windows = GPU_WINDOW_CASES["swin_t_stage1_shifted"].geometry
    assert cuda_audit.border_share(windows) == pytest.approx(1 - 1 / 2 * 7 / 8 * 7 / 8)


# ---- The kernels ----


@pytest.fixture(scope="module", autouse=True)
def triton_cache(tmp_path_factory):
    """One folder for all compiled kernels of the session."""
    with pytest.MonkeyPatch.context() as patch:
        if "TRITON_CACHE_DIR" not in os.environ:
            patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "triton-cache"))
        yield


def compiles(test):
    """Leave a test of compiled kernels, which takes minutes, to make test-cuda, and out where Triton is interpreted."""
    reason = "TRITON_INTERPRET is set: the interpreter does not compile"
    return pytest.mark.slow(pytest.mark.skipif(INTERPRETED, reason=reason)(test))


def compiles_cuda(test):
    """The same of a test of the kernels of csrc/cuda, which need a compiler."""
    reason = "nvcc, which compiles csrc/cuda, is missing"
    return compiles(pytest.mark.skipif(gpu_audit.why_no_cuda("sm_90") is not None, reason=reason)(test))


@dataclasses.dataclass
class Run:
    """An audit of the cases with the ceilings: exit status, where it wrote its figures, and what it audited."""

    status: int
    folder: Path
    audited: tuple

    @property
    def figures(self) -> dict:
        return json.loads((self.folder / "audit.json").read_text())


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    found = []

    def recorded(*arguments):
        found.append(audit(*arguments))
        return found[-1]

    folder, audit = tmp_path_factory.mktemp("audit"), gpu_audit.audit
    outputs = ["--dump", str(folder), "--save", str(folder / "predicted.json")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_audit, "audit", recorded)
        return Run(
            gpu_audit.main(["--case", *ALL_AUDITED, *outputs]),
            folder,
            *found,
        )


@compiles
def test_kernels_are_within_their_ceilings(run):
    assert run.figures["violations"] == []
    assert run.status == 0
    if gpu_audit.why_no_cuda("sm_90") is None:
        assert unmatched((case.where for case in run.audited[0]), CEILINGS) == []


@compiles
@pytest.mark.parametrize(
    ("case", "direction", "gigabytes"),
    [
        ("swin_t_stage1", "forward", 2.38),
        ("swin_t_stage1", "backward", 8.85),
        ("swin_b_ssv2_stage1", "forward", 5.6),
        ("swin_b_ssv2_stage1", "backward", 20.3),
    ],
)
def test_bytes_that_cross_the_l2_cache_by_hand(run, case, direction, gigabytes):
    """Tiles of queries times what each of them reads."""
    (audited,) = (c for c in run.audited[0] if (c.backend, c.case, c.direction) == ("triton", case, direction))
    assert sum(launch.cost.l2_bytes for launch in audited.launches) == pytest.approx(1e9 * gigabytes, rel=0.02)


@compiles
def test_dump_holds_what_a_recount_needs(run):
    kernels = run.figures["kernels"]
    for name in (name for name in kernels if name.startswith("window3d_forward")):
        found, resources = sass.read((run.folder / f"{name}.cubin").read_bytes())
        assert kernels[name]["instructions"] == len(found.executed())
        assert kernels[name]["registers"] == resources.registers
    for case in run.figures["cases"]:
        assert case["backend"] == "cuda" or {launch["kernel"] for launch in case["launches"]} <= kernels.keys()
        assert case["microseconds"] == pytest.approx(sum(launch["microseconds"] for launch in case["launches"]))


def test_without_nvcc_the_cuda_kernels_are_left_out(monkeypatch):
    assert "sm_100" in gpu_audit.why_no_cuda("sm_100")
    monkeypatch.setattr(gpu_audit, "nvcc", lambda: None)
    assert gpu_audit.why_no_cuda("sm_90") == "no nvcc"


def test_documentation_shows_the_saved_predictions():
    text, path = page.PAGE.read_text(), predicted.newest()
    assert predicted.tables(json.loads(path.read_text())) in text and path.name in text


@compiles
def test_saved_predictions_are_the_times_of_the_audit(run):
    saved = json.loads((run.folder / "predicted.json").read_text())
    assert [saved[key] for key in ("arch", "dtype", "rates")] == [
        run.figures[key] for key in ("arch", "dtype", "rates")
    ]
    assert len(saved["cases"]) == len(run.figures["cases"])
    for case, audited in zip(saved["cases"], run.figures["cases"], strict=True):
        assert (case["case"], case["direction"]) == (audited["case"], audited["direction"])
        assert case["predicted_us"] == pytest.approx(audited["microseconds"], abs=0.05)
        assert case["floor_us"] == pytest.approx(audited["floor_terms"][case["floor_by"]], abs=0.05)
        times = [launch["us"] for launch in case["launches"].values()]
        rounding = 0.06 * (len(times) + 1)  # of each
        assert sum(times) == pytest.approx(case["predicted_us"], abs=rounding)


@compiles
@pytest.mark.parametrize("direction", gpu_plans.DIRECTIONS)
@pytest.mark.parametrize("name", AUDITED)
def test_launches_compute_all_scores_and_waste_little(run, name, direction):
    of = GPU_WINDOW_CASES[name]
    needed = gpu_plans.window3d_floor(of, direction, torch.bfloat16).exponentials
    (case,) = (c for c in run.audited[0] if (c.backend, c.case, c.direction) == ("triton", name, direction))
    scores = [launch.work["scores"] for launch in case.launches if launch.work["scores"]]
    assert len(scores) == {"forward": 1, "backward": 3}[direction]
    whole = of.batch * of.heads * of.geometry.num_windows * of.geometry.num_tokens**2
    for computed in scores:
        assert needed <= computed < 1.4 * whole


@compiles_cuda
@pytest.mark.parametrize("name", AUDITED)
def test_cuda_kernels_read_everything_once(run, name):
    """What crosses L2 is what crosses memory, and a table for each block: the way around the products is complete."""
    (case,) = (c for c in run.audited[0] if (c.backend, c.case, c.direction) == ("cuda", name, "forward"))
    (launch,) = case.launches
    assert launch.cost.bytes <= launch.cost.l2_bytes <= 1.3 * launch.cost.bytes
    assert launch.wide_copies >= 2 and launch.ldmatrix > 0  # of keys and of values


@compiles_cuda
@pytest.mark.parametrize("arch", cuda_audit.SHARED_LIMITS)
def test_no_block_waits_for_others_or_counts_them(arch):
    """Without atomics it cannot; and sums have one order."""
    for name, (program, _) in cubins.kernels(arch).items():
        assert program.instructions and sass.atomics(program.instructions) == 0, name


@compiles_cuda
def test_the_extension_holds_what_the_compiler_gives():
    """Of one file, which compiles in seconds; so the audit need not compile what has been built."""
    assert cubins.is_current(cubins.EXTENSION), "the extension is older than its sources: make build"
    for arch in ("sm_80", "sm_90"):
        compiled = sass.read_all(cubins.cubin(cubins.CSRC / "cuda" / "mixing_shift.cu", arch))
        kernels = cubins.kernels(arch)
        assert len(compiled) == sum(name[0] == "shift_channels" for name in kernels)
        for name, (program, resources) in compiled.items():
            built, built_resources = kernels[cubins._demangled(name)]
            assert built_resources == resources
            assert [x.opcode for x in built.instructions] == [x.opcode for x in program.instructions]


def test_extensions_that_are_older_than_a_source_or_hold_nothing(tmp_path):
    assert not cubins.is_current(tmp_path / "_C.so")
    extension = tmp_path / "old.so"
    extension.touch()
    assert cubins.is_current(extension)
    os.utime(extension, (0, 0))
    assert not cubins.is_current(extension)
    assert sass.embedded(Path(_ctypes.__file__), "sm_90") == {}


@compiles_cuda
def test_spills_on_sm_80_are_those_of_the_kernel_that_it_launches(run):
    """The backward pass of 392 tokens that sm_90 launches has no room on sm_80."""
    case = GPU_WINDOW_CASES["swin_t_stage1"]
    names = [cuda_audit.backward_kernel(case, torch.bfloat16, arch)[0][0] for arch in ("sm_90", "sm_80")]
    assert names == ["depth_fastest_window_backward", "window_backward"]
    program, _ = cubins.kernels("sm_80")["window_backward", "__nv_bfloat16", "32"]
    where = ("cuda", "swin_t_stage1", "backward")
    (audited,) = (c for c in run.audited[0] if (c.backend, c.case, c.direction) == where)
    assert audited.launches[0].spills_on_sm_80 == sass.spills(program.executed())


@compiles_cuda
def test_depth_fastest_backward_by_hand(run):
    """3072 windows and heads; 7 warps with 56 keys meet 7 rows of 56 queries, and 4 make dq of two of these."""
    where = ("cuda", "swin_t_stage1", "backward")
    (case,) = (c for c in run.audited[0] if (c.backend, c.case, c.direction) == where)
    launch = case.launches[0]
    assert launch.kernel == "depth_fastest_window_backward<32>"
    assert (launch.warps, launch.blocks_per_sm, launch.grid.blocks) == (7, 1, 3 * 170)
    scores = 3072 * 49 * 56 * 56
    assert launch.work["scores"] == scores
    # Scores and their gradients are made of 64 keys, dq of 64 queries, the last 8 for nothing.
    assert launch.cost.flops == pytest.approx(scores * 2 * 32 * (3 * 64 / 56 + 2), rel=0.02)
    lanes = 32 * 7 * launch.grid.blocks
    outside = launch.cost.instructions - lanes * launch.instructions_around
    assert outside == pytest.approx(scores * launch.hot_instructions_per_score)


@compiles
def test_lowered_ceiling_fails(run, monkeypatch, capsys):
    monkeypatch.setattr(gpu_audit, "audit", lambda *_: run.audited)
    monkeypatch.setattr(gpu_audit, "CEILINGS", (Ceiling("triton/window3d/*/forward", "instructions_per_score", 1.0),))
    assert gpu_audit.main(["--case", *ALL_AUDITED]) == 1
    assert "past a ceiling: window3d_forward" in capsys.readouterr().out

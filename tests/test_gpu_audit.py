"""The audit of GPU kernels: how it reads machine code, what it counts, and the kernels against their ceilings."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton, which compiles the kernels, is not installed")

import torch

from benchmarks import gpu_audit, sass
from benchmarks.gpu_audit import Ceiling, Cost, Rates
from benchmarks.sass import Instruction, Program
from benchmarks.shapes import GPU_DIVIDED_CASES, GPU_MIXING_CASES, GPU_WINDOW_CASES
from vidattn.kernels.launch import INTERPRETED, Work

AUDITED = ("swin_t_stage1", "swin_t_stage1_shifted", "swin_b_ssv2_stage1")
AUDITED_DIVIDED = ("timesformer_b_time", "timesformer_b_space", "timesformer_l_time", "vivit_b_model4")
AUDITED_MIXING = ("xvit_b_16_frames_div8", "xvit_b_16_frames_div4", "xvit_b_16_frames_div8_shift")


def program(*lines: str) -> Program:
    """A listing as the disassembler prints it, from labels ("L0:") and instructions; branches name labels."""
    listing = []
    for address, line in enumerate(lines):
        listing.append(
            f".{line[:-1].replace('L', 'L_x_')}:" if line.endswith(":") else f"  /*{address:04x}*/  {line} ;"
        )
    return Program.parse("\n".join([".text.kernel:", *listing]))


def opcodes(instructions: list[Instruction]) -> list[str]:
    return [instruction.opcode for instruction in instructions]


# ---- Reading machine code ----


def test_instruction_parts():
    parsed = program("@!P0 LDG.E.128 R4, desc[UR4][R2.64+0x10]", "@UP1 UIADD3 UR4, UR4, 0x1, URZ", "EXIT")
    assert parsed.instructions == (
        Instruction("LDG.E.128", "R4, desc[UR4][R2.64+0x10]", "@!P0"),
        Instruction("UIADD3", "UR4, UR4, 0x1, URZ", "@UP1"),
        Instruction("EXIT"),
    )


def test_code_that_nothing_reaches_is_not_counted():
    parsed = program("MOV R1, R2", "EXIT", "L0:", "BRA `(.L_x_0)", "NOP")
    assert opcodes(parsed.executed()) == ["MOV", "EXIT"]
    assert parsed.in_loop() == []


def test_loop_from_backward_branch():
    parsed = program("MOV R1, R2", "L0:", "FADD R1, R1, R1", "FMUL R2, R1, R1", "@P0 BRA `(.L_x_0)", "EXIT")
    assert opcodes(parsed.in_loop()) == ["FADD", "FMUL", "BRA"]
    assert len(parsed.executed()) == 5


def test_main_loop_has_most_matrix_instructions_and_is_innermost():
    parsed = program(
        "L0:",
        *["FADD R1, R1, R1"] * 20,
        "HMMA.16816.F32.BF16 R4, R8, R10, R4",
        "@P0 BRA `(.L_x_0)",
        "L1:",
        "MOV R9, R8",
        "L2:",
        *["HMMA.16816.F32.BF16 R4, R8, R10, R4"] * 2,
        "@P1 BRA `(.L_x_2)",
        "@P2 BRA `(.L_x_1)",
        "EXIT",
    )
    assert opcodes(parsed.in_loop()) == ["HMMA.16816.F32.BF16"] * 2 + ["BRA"]


def test_first_of_equal_loops_is_the_main_loop():
    body = ["HMMA.16816.F32.BF16 R4, R8, R10, R4", "FADD R1, R1, R1"]
    parsed = program("L0:", *body, "@P0 BRA `(.L_x_0)", "L1:", body[0], "@P0 BRA `(.L_x_1)", "EXIT")
    assert opcodes(parsed.in_loop()) == ["HMMA.16816.F32.BF16", "FADD", "BRA"]
    assert opcodes(parsed.outside()) == ["EXIT"]  # steps of the second loop count as steps of the first


def test_loops_without_matrix_instructions_beside_the_main_loop_count_once():
    matrix = ["L0:", "HMMA.16816.F32.BF16 R4, R8, R10, R4", "@P0 BRA `(.L_x_0)"]
    parsed = program(*matrix, "L1:", "FADD R1, R1, R1", "@P0 BRA `(.L_x_1)", "EXIT")
    assert opcodes(parsed.outside()) == ["FADD", "BRA", "EXIT"]


def test_waiting_placed_behind_the_end_makes_no_long_loop():
    parsed = program(
        "L0:",
        "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R2], R3",
        "@!P0 BRA `(.L_x_2)",
        "L1:",
        "UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR8], tmem[UR10], idesc[UR11], UPT",
        "@P1 BRA `(.L_x_0)",
        *["MUFU.EX2 R1, R1"] * 30,
        "EXIT",
        "L2:",
        "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R2], R3",
        "@!P0 BRA `(.L_x_2)",
        "BRA `(.L_x_1)",
    )
    assert "MUFU.EX2" not in opcodes(parsed.in_loop())
    assert len(parsed.in_loop()) == 7  # what waits belongs to the loop
    assert len(parsed.executed()) == 38


@pytest.mark.parametrize(
    "branch", ["BRA.U UP0, `(.L_x_0)", "BRA P3, `(.L_x_0)", "BRA.DIV UR4, `(.L_x_0)", "@P0 CALL.REL.NOINC `(.L_x_0)"]
)
def test_branch_that_may_fall_through(branch):
    parsed = program("MOV R1, R2", branch, "FADD R1, R1, R1", "L0:", "EXIT")
    assert opcodes(parsed.executed())[-2:] == ["FADD", "EXIT"]


def test_branch_that_is_always_taken():
    parsed = program("BRA `(.L_x_0)", "FADD R1, R1, R1", "L0:", "EXIT")
    assert opcodes(parsed.executed()) == ["BRA", "EXIT"]


def test_indirect_branch_reaches_all_its_targets():
    parsed = program(
        'BRX R2 -0x10 (*"BRANCH_TARGETS .L_x_0,.L_x_1"*)', "FADD R1, R1, R1", "L0:", "EXIT", "L1:", "MUFU.EX2 R1, R1"
    )
    assert opcodes(parsed.executed()) == ["BRX", "EXIT", "MUFU.EX2"]


def test_threads_meet_where_they_were_told_to():
    parsed = program(
        "BSSY B0, `(.L_x_1)",
        "@P0 BRA `(.L_x_0)",
        "BSYNC B0",
        "FADD R1, R1, R1",  # not reached: the threads go on at label 1
        "L1:",
        "EXIT",
        "L0:",
        "FMUL R1, R1, R1",
        "BSYNC B0",
    )
    assert opcodes(parsed.executed()) == ["BSSY", "BRA", "BSYNC", "EXIT", "FMUL", "BSYNC"]


@pytest.mark.parametrize(
    ("opcode", "kind", "flops"),
    [
        ("HGMMA.64x32x16.F32.BF16", "wgmma", 2 * 64 * 32 * 16 / 4),
        ("HMMA.16816.F32.BF16", "mma.sync", 2 * 16 * 8 * 16),
        ("HMMA.1688.F32.TF32", "mma.sync", 2 * 16 * 8 * 8),
        ("UTCHMMA", "tcgen05", 0),
        ("UTCBAR", None, 0),
        ("FFMA", None, 0),
    ],
)
def test_matrix_instructions(opcode, kind, flops):
    assert (Instruction(opcode).matrix_kind, Instruction(opcode).matrix_flops) == (kind, flops)


def test_kinds_of_matrix_instructions_of_a_kernel():
    kinds = [Instruction(opcode) for opcode in ("HMMA.16816.F32", "HGMMA.64x32x16.F32.BF16", "FADD")]
    assert [sass.matrix_kind(kinds[:1]), sass.matrix_kind(kinds), sass.matrix_kind(kinds[2:])] == [
        "mma.sync",
        "mma.sync+wgmma",
        "none",
    ]


def test_widths_of_accesses():
    loads = "LDG.E LDG.E.64 LDG.E.128.CONSTANT LDGSTS.E.BYPASS.128 LDG.E.U16 UTMALDG.2D"
    others = "STG.E.128 STG.E.U16 LDS.128 LDGDEPBAR"
    accesses = [Instruction(name) for name in f"{loads} {others}".split()]
    assert sass.load_widths(accesses) == {"4": 1, "8": 1, "16": 2, "2": 1, "bulk": 1}
    assert sass.store_widths(accesses) == {"16": 1, "2": 1}


def test_spills_and_exponentials():
    accesses = [Instruction(name) for name in ("LDL.64", "STL", "LDS", "MUFU.EX2", "MUFU.RCP", "FMUL")]
    assert (sass.spills(accesses), sass.exponentials(accesses)) == (2, 2)


def test_resource_usage():
    text = "Function k:\n  REG:231 STACK:8 SHARED:1024 LOCAL:16 CONSTANT[0]:672 TEXTURE:0"
    assert sass.Resources.parse(text) == sass.Resources(231, 8, 16)


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "expected"),
    [
        (168, 0, 4, 12),  # 65536 / (168 * 32) = 12.2 warps
        (231, 57344, 4, 8),  # 232 registers: 8.8 warps
        (32, 57344, 4, 16),  # 228 KiB / 57 KiB = 4 blocks
        (32, 0, 4, 64),
        (32, 0, 1, 32),  # 32 blocks at most
        (255, 0, 16, 0),  # does not fit
    ],
)
def test_resident_warps(registers, shared, warps, expected):
    assert sass.resident_warps("sm_90", registers, shared, warps) == expected


TILES = """
  %1 = tt.load %0 : tensor<64x!tt.ptr<i32>, #ttg.slice<{dim = 1, parent = #blocked}>> loc(#loc1)
  %2 = tt.load %p, %m, %c : tensor<64x32x!tt.ptr<bf16>, #blocked> loc(#loc2)
  %3 = ttg.async_copy_global_to_local %b, %s {contiguity = 4 : i32} : tensor<64x64x!tt.ptr<f32>, #b> -> <64x64xf32, #s>
  %4 = tt.load %t : tensor<16x32x!tt.ptr<bf16>, #blocked> loc(#loc3)
"""


def test_loads_that_the_compiler_left_out_are_not_missing():
    """Rows past the end of a sequence are never loaded; a load that is not wide is several narrow ones."""
    assert sass.missing_wide_loads(TILES, 128, {"16": 8}, single=True) == 0
    assert sass.missing_wide_loads(TILES, 128, {"16": 8, "8": 4}, single=True) == 2


@pytest.mark.parametrize(("wide", "single", "missing"), [(10, True, 0), (9, True, 1), (0, True, 10), (0, False, 2)])
def test_wide_loads_that_tiles_call_for(wide, single, missing):
    # Of 128 threads each needs 64 * 32 * 2 bytes / 128 = 2 x 16 of the first tile, 8 x 16 of the second; 8 of the last.
    assert sass.missing_wide_loads(TILES, 128, {"16": wide, "4": 99}, single=single) == missing


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
    terms = gpu_audit.window3d_floor(GPU_WINDOW_CASES[case], direction, torch.bfloat16).microseconds(Rates())
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
    terms = gpu_audit.all_pairs_floor(GPU_DIVIDED_CASES[case], direction, torch.bfloat16).microseconds(Rates())
    assert max(terms, key=terms.get) == term
    assert terms[term] == pytest.approx(microseconds, rel=0.005)


def test_floors_of_mixing_by_hand():
    """Of 128 frames of 197 tokens: 155 and 271 MB, and 77 MB for one tensor in and out."""
    case = GPU_MIXING_CASES["xvit_b_16_frames_div8"]
    for direction, attention in (("forward", 36.0), ("backward", 63.1)):
        terms = gpu_audit.all_pairs_floor(case, direction, torch.bfloat16).microseconds(Rates())
        assert max(terms, key=terms.get) == "bytes" and terms["bytes"] == pytest.approx(attention, rel=0.005)
        shift = gpu_audit.shift_floor(case, direction, torch.bfloat16).microseconds(Rates())
        assert shift["bytes"] == pytest.approx(18.0, rel=0.005)


def test_mma_sync_has_a_rate_of_its_own():
    terms = [Cost(0, 0, 0, 1e12, kind).microseconds(Rates())["matrix"] for kind in ("mma.sync", "wgmma")]
    assert terms == pytest.approx([1e6 / 500, 1e6 / 790])


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
    source: type = FakeSource


KERNEL = sass.Kernel(
    name="kernel",
    options={},
    constants={},
    warps=4,
    registers=128,
    local_bytes=0,
    spill_instructions=0,
    shared_bytes=0,
    resident_warps=16,
    matrix_instructions="wgmma",
    load_widths={},
    store_widths={},
    narrow_tile_loads=0,
    instructions=1000,
    outside_instructions=600,
    outside_exponentials=18,
    loop_instructions=400,
    loop_exponentials=32,
    loop_opcodes={},
    loop_matrix_instructions="wgmma",
    loop_flops=64 * 64 * 128,
)


def test_launch_counts_its_loop_as_often_as_it_runs():
    work = Work(steps=6, scores_per_step=64 * 64, scores=10 * 7 * 64 * 64, flops=10 * 7 * 64 * 64 * 128, bytes=10**6)
    audited = gpu_audit.audit_launch(FakeLaunch(work), KERNEL, Rates())
    assert audited.instructions_per_score == 400 * 128 / 64**2
    assert audited.cost == Cost(1e6, 1280 * (600 + 6 * 400), 1280 * (18 + 6 * 32), work.flops)
    assert audited.microseconds == max(audited.terms.values()) == audited.terms["bytes"]


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
    assert audited.cost == Cost(0, 1280 * 600, 1280 * 18, work.flops)


def test_helper_has_no_figures_about_scores():
    audited = gpu_audit.audit_launch(FakeLaunch(Work(bytes=10**6)), KERNEL, Rates())
    assert (audited.instructions_per_score, audited.matrix_instructions) == (None, None)
    assert audited.cost.instructions == 1280 * 1000


# ---- Ceilings ----


def audited_case(**changes) -> gpu_audit.CaseAudit:
    work = Work(steps=6, scores_per_step=64 * 64, scores=10 * 6 * 64 * 64, flops=10 * 6 * 64 * 64 * 128)
    launch = gpu_audit.audit_launch(FakeLaunch(work), KERNEL, Rates())
    return gpu_audit.CaseAudit("f", "c", "forward", (dataclasses.replace(launch, **changes),), 100.0, {"bytes": 1.0})


@pytest.mark.parametrize(
    ("ceiling", "changes", "reported"),
    [
        (Ceiling("*", "spill_instructions", 0), {"spill_instructions": 1}, "spill_instructions 1, ceiling 0"),
        (Ceiling("f/*", "instructions_per_score", 12.4), {}, "instructions_per_score 12.50, ceiling 12.4"),
        (Ceiling("f/c/forward", "matrix_instructions", "tcgen05"), {}, "matrix_instructions wgmma, ceiling tcgen05"),
        (Ceiling("*", "microseconds", 99.0), {}, "prediction: microseconds 100.00, ceiling 99.0"),
        (Ceiling("f/*", "times_the_floor", 1.5), {}, "prediction: times_the_floor 100.00, ceiling 1.5"),
        (Ceiling("*", "instructions_per_score", 10), {"instructions_per_score": None}, "nothing to hold against"),
    ],
)
def test_past_a_ceiling(ceiling, changes, reported):
    (line,) = gpu_audit.violations([audited_case(**changes)], [ceiling])
    assert reported in line and "f/c/forward" in line


def test_within_ceilings_or_not_meant():
    ceilings = [
        Ceiling("*", "spill_instructions", 0),
        Ceiling("f/*", "instructions_per_score", 12.5),
        Ceiling("*/backward", "microseconds", 1.0),
        Ceiling("*", "matrix_instructions", "wgmma"),
    ]
    assert gpu_audit.violations([audited_case()], ceilings) == []


# ---- The kernels ----


@pytest.fixture(scope="module", autouse=True)
def triton_cache(tmp_path_factory):
    """One folder for all compiled kernels of the session."""
    with pytest.MonkeyPatch.context() as patch:
        if "TRITON_CACHE_DIR" not in os.environ:
            patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "triton-cache"))
        yield


compiles = pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET is set: the interpreter does not compile")


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
            gpu_audit.main(["--case", *AUDITED, *AUDITED_DIVIDED, *AUDITED_MIXING, *outputs]),
            folder,
            *found,
        )


@compiles
def test_kernels_are_within_their_ceilings(run):
    assert run.figures["violations"] == []
    assert run.status == 0


@compiles
def test_dump_holds_what_a_recount_needs(run):
    kernels = run.figures["kernels"]
    for name in (name for name in kernels if name.startswith("window3d_forward")):
        found, resources = sass.read((run.folder / f"{name}.cubin").read_bytes())
        assert kernels[name]["instructions"] == len(found.executed())
        assert kernels[name]["registers"] == resources.registers
    for case in run.figures["cases"]:
        assert {launch["kernel"] for launch in case["launches"]} <= kernels.keys()
        assert case["microseconds"] == pytest.approx(sum(launch["microseconds"] for launch in case["launches"]))


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
        assert sum(launch["us"] for launch in case["launches"].values()) == pytest.approx(case["predicted_us"], abs=0.3)


@compiles
@pytest.mark.parametrize("direction", gpu_audit.DIRECTIONS)
@pytest.mark.parametrize("name", AUDITED)
def test_launches_compute_all_scores_and_waste_little(run, name, direction):
    of = GPU_WINDOW_CASES[name]
    needed = gpu_audit.window3d_floor(of, direction, torch.bfloat16).exponentials
    (case,) = (case for case in run.audited[0] if (case.case, case.direction) == (name, direction))
    scores = [launch.work["scores"] for launch in case.launches if launch.work["scores"]]
    assert len(scores) == {"forward": 1, "backward": 3}[direction]
    whole = of.batch * of.heads * of.geometry.num_windows * of.geometry.num_tokens**2
    for computed in scores:
        assert needed <= computed < 1.4 * whole


@compiles
def test_lowered_ceiling_fails(run, monkeypatch, capsys):
    monkeypatch.setattr(gpu_audit, "audit", lambda *_: run.audited)
    monkeypatch.setattr(gpu_audit, "CEILINGS", (Ceiling("window3d/*/forward", "instructions_per_score", 1.0),))
    assert gpu_audit.main(["--case", *AUDITED, *AUDITED_DIVIDED, *AUDITED_MIXING]) == 1
    assert "past a ceiling: window3d_forward" in capsys.readouterr().out

"""How the audit reads machine code: instructions, loops, ways, widths, and what Triton's own dialect says of tiles."""

from __future__ import annotations

import dataclasses

import pytest

pytest.importorskip("triton", reason="triton, whose wheel has the disassembler, is not installed")

from benchmarks import sass
from benchmarks.cuda_kernels import CudaProgram
from benchmarks.cuda_single_pass import reads_under_way, usual_way
from benchmarks.sass import Instruction, Program
from benchmarks.triton_kernels import Traffic, missing_wide_loads


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


def test_bytes_in_shared_memory():
    names = (
        "LDS LDS.64 STS.128 STS.U16 LDSM.16.M88.4 LDSM.16.MT88.2 LDSM.16.M88 LDGSTS.E.BYPASS.128 LDG.E.128 LDGDEPBAR"
    )
    assert [Instruction(name).shared_bytes for name in names.split()] == [4, 8, 16, 2, 16, 8, 4, 16, 0, 0]


def test_spills_and_exponentials():
    accesses = [Instruction(name) for name in ("LDL.64", "STL", "LDS", "MUFU.EX2", "MUFU.RCP", "FMUL")]
    assert (sass.spills(accesses), sass.exponentials(accesses)) == (2, 2)


def test_atomics():
    names = ["ATOM.E.ADD", "ATOMG.E.CAS", "ATOMS.POPC.INC.32", "RED.E.ADD.F32", "REDG.E.ADD", "UTMAREDG.1D.ADD"]
    others = ["REDUX.SUM", "BAR.RED.AND.DEFER_BLOCKING", "VOTE.ALL", "LDGSTS.E.128"]  # of a warp, of a block
    assert sass.atomics(Instruction(name) for name in names + others) == len(names)


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
    assert missing_wide_loads(TILES, 128, {"16": 8}, single=True) == 0
    assert missing_wide_loads(TILES, 128, {"16": 8, "8": 4}, single=True) == 2


@pytest.mark.parametrize(("wide", "single", "missing"), [(10, True, 0), (9, True, 1), (0, True, 10), (0, False, 2)])
def test_wide_loads_that_tiles_call_for(wide, single, missing):
    # Of 128 threads each needs 64 * 32 * 2 bytes / 128 = 2 x 16 of the first tile, 8 x 16 of the second; 8 of the last.
    assert missing_wide_loads(TILES, 128, {"16": wide, "4": 99}, single=single) == missing


TTIR = """module {
  tt.func public @kernel(%q: !tt.ptr<bf16>) attributes {noinline = false} {
    %1 = tt.load %0 : !tt.ptr<i32> loc(#loc1)
    %2 = tt.load %p, %m, %c : tensor<64x32x!tt.ptr<bf16>> loc(#loc2)
    %3 = scf.for %kind = %c0 to %c8 step %c1 iter_args(%x = %c) -> (tensor<64x64xf32>)  : i32 {
      %4 = tt.load %r : tensor<64x64x!tt.ptr<f32>> loc(#loc3)
      %5 = scf.for %step = %c0 to %n step %c1 iter_args(%y = %x) -> (tensor<64x64xf32>)  : i32 {
        %6 = tt.load %k : tensor<128x32x!tt.ptr<bf16>> loc(#loc4)
        %7 = tt.dot %2, %6, %y : tensor<64x32xbf16> * tensor<32x128xbf16> -> tensor<64x128xf32> loc(#loc5)
        %8 = "tt.reduce"(%7) <{axis = 1 : i32}> ({
        ^bb0(%a: f32 loc(unknown), %b: f32 loc(unknown)):
          tt.reduce.return %a : f32 loc(#loc6)
        }) : (tensor<64x128xf32>) -> tensor<64xf32> loc(#loc6)
        scf.yield %y : tensor<64x64xf32> loc(#loc7)
      } loc(#loc7)
      scf.yield %5 : tensor<64x64xf32> loc(#loc7)
    } loc(#loc7)
    %9 = tt.load %k, %m, %c : tensor<16x32x!tt.ptr<bf16>> loc(#loc8)
    %10 = scf.for %rank = %c0 to %hidden step %c1 iter_args(%z = %3) -> (tensor<64x64xf32>)  : i32 {
      %11 = tt.load %k : tensor<128x32x!tt.ptr<bf16>> loc(#loc9)
      %12 = tt.dot %2, %11, %z : tensor<64x32xbf16> * tensor<32x128xbf16> -> tensor<64x128xf32> loc(#loc9)
      scf.yield %z : tensor<64x64xf32> loc(#loc9)
    } loc(#loc9)
    tt.store %o, %10, %m : tensor<64x32x!tt.ptr<bf16>> loc(#loc10)
    tt.store %l, %10 : tensor<64x!tt.ptr<f32>> loc(#loc10)
  } loc(#loc)
} loc(#loc)"""


def test_traffic_of_a_kernel():
    """The outer loop counts once, the second loop with products as steps of the first."""
    bias = 64 * 64 * 4
    expected = Traffic(own=2 * 64 * 32 * 2, tail=16 * 32 * 2, once=4 + bias + 64 * 4, step=128 * 32 * 2, copy_in=0)
    assert Traffic.parse(TTIR) == dataclasses.replace(expected, copy_in=4 + 64 * 32 * 2 + bias + 128 * 32 * 2)


# ---- Kernels of csrc/cuda: what they execute ----

HMMA = "HMMA.16816.F32.BF16 R4, R8, R10, R4"
LISTING = [
    "S2R R0, SR_TID.X",
    "L0:",  # copies rows, or pieces of 4 bytes of rows that are not aligned
    "@P1 BRA `(.L_x_1)",
    "LDGSTS.E.BYPASS.128 [R2], desc[UR4][R4.64]",
    "BRA `(.L_x_2)",
    "L1:",
    *["LDGSTS.E [R2], desc[UR4][R4.64]"] * 4,
    "L2:",
    "@P0 BRA `(.L_x_0)",
    "BAR.SYNC 0x0",
    "L3:",  # tiles of queries
    "LDG.E R8, desc[UR4][R4.64]",
    "L4:",  # keys
    "LDSM.16.M88.4 R8, [R2]",
    HMMA,
    HMMA,
    "VOTE.ANY P2, P3",
    "@!P2 BRA `(.L_x_5)",
    *["FMUL R4, R4, R5"] * 3,
    "L5:",
    "MUFU.EX2 R4, R4",
    HMMA,
    "LDSM.16.MT88.4 R8, [R2]",
    HMMA,
    "@P0 BRA `(.L_x_4)",
    "@P4 BRA `(.L_x_6)",
    "STG.E desc[UR4][R4.64], R8",
    "L6:",
    "@P0 BRA `(.L_x_3)",
    "EXIT",
]


def test_main_loop_of_a_cuda_kernel():
    loop = CudaProgram(program(*LISTING)).main_loop(lambda _: 1)
    # Without the three multiplications behind the vote.
    assert (loop.hot, loop.all, loop.exponentials, loop.tiles) == (10, 13, 1, 1)
    assert loop.flops == 4 * 2 * 16 * 8 * 16


def test_way_around_the_products():
    kernel = CudaProgram(program(*LISTING))
    kinds = {min(body): kernel.kind(body) for body in kernel.loops if body not in kernel.product_loops}
    assert sorted(kinds.values()) == ["copy", "group"]
    way = kernel.way(lambda body: {"copy": 5, "group": 3}[kernel.kind(body)])
    counted = {}
    for instruction, times in way:
        counted[instruction.opcode] = counted.get(instruction.opcode, 0) + times
    assert counted["LDGSTS.E.BYPASS.128"] == 5 and "LDGSTS.E" not in counted
    assert (counted["LDG.E"], counted["STG.E"]) == (3, 3)
    assert (counted["HMMA.16816.F32.BF16"], counted["MUFU.EX2"]) == (0, 0)  # counted by the score
    assert (counted["S2R"], counted["EXIT"]) == (1, 1)


def test_a_way_that_is_much_slower_is_another_one():
    exact = ["L7:", HMMA, *["FADD R4, R4, R5"] * 40, "@P0 BRA `(.L_x_7)", "STG.E.64 desc[UR4][R4.64], R8"]
    listing = [*LISTING[:-3], "@P5 BRA `(.L_x_6)", *exact, *LISTING[-3:]]
    assert "FADD" not in {instruction.name for instruction, _ in CudaProgram(program(*listing)).way(lambda _: 1)}


SINGLE_PASS = [
    "L0:",  # again, where numbers are not finite
    "@P1 BRA `(.L_x_2)",
    "L1:",  # ranges of channels
    "ISETP.GE.AND P0, PT, R0, R1, PT",
    "@P0 BRA `(.L_x_1)",
    "CS2R R8, SRZ",
    "@P2 LDG.E.128 R8, desc[UR6][R24.64]",
    "LDG.E.128 R12, desc[UR6][R26.64]",
    "BRA `(.L_x_3)",
    "L2:",  # of rows that are not aligned
    *["LDG.E.U16 R8, desc[UR6][R24.64]"] * 9,
    "L3:",
    "IMAD.MOV.U32 R30, RZ, RZ, R13",
    HMMA,
    "LDG.E.128 R16, desc[UR6][R28.64]",
    "STG.E.128 desc[UR6][R24.64], R4",
    "@P3 BRA `(.L_x_0)",
    "EXIT",
]


def test_way_of_a_kernel_that_reads_all_before_it_uses_it():
    way = usual_way(program(*SINGLE_PASS), rounds=5)
    assert [instruction.opcode for instruction, _ in way].count("LDG.E.U16") == 0
    assert [times for instruction, times in way if instruction.name == "ISETP"] == [5]
    assert sum(times for _, times in way) == 5 * 2 + 11
    assert reads_under_way(instruction for instruction, _ in way) == 2


def test_a_store_uses_all_of_its_registers():
    reads = ["LDG.E.128 R8, desc[UR6][R24.64]", "STG.E.128 desc[UR6][R26.64], R8", "LDG.E.128 R12, desc[UR6][R24.64]"]
    assert reads_under_way(program(*reads, "EXIT").instructions) == 1

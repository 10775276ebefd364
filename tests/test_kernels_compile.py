"""Ahead-of-time compilation of the GPU kernels, for every architecture that they are meant for; no GPU is needed."""

from __future__ import annotations

import math
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace

import pytest

pytest.importorskip("triton", reason="triton, which compiles the kernels, is not installed")

import torch
import triton
import triton.language as tl

from benchmarks import sass
from benchmarks.gpu_audit import specialisation
from benchmarks.gpu_plans import DIRECTIONS, plan_divided, plan_mixing, plan_window3d
from benchmarks.shapes import (
    GPU_DIVIDED_CASES,
    GPU_MIXING_CASES,
    GPU_WINDOW_CASES,
    DividedCase,
    MixingCase,
    WindowCase,
)
from benchmarks.triton_kernels import ptxas_log, serialised_products
from vidattn.calls import WindowCall
from vidattn.kernels.launch import INTERPRETED, TARGETS, Launch
from vidattn.ops import _tensors as tensors
from vidattn.ops._arguments import draw_seed

pytestmark = pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET is set: the interpreter does not compile")

SHIFTED = GPU_WINDOW_CASES["swin_t_stage1_shifted"]
WHOLE = WindowCase((8, 8, 8), (8, 8, 8), (0, 0, 0), 2)  # tokens that fill every tile: no tail


@dataclass(frozen=True)
class Call:
    """A call of ``window3d_attention``, or of ``window_attention`` on the windows of the case."""

    case: WindowCase = SHIFTED
    dtype: str = "bfloat16"
    partitioned: bool = False
    has_bias: bool = True
    has_mask: bool = False  # of partitioned windows
    has_pad: bool = True
    mask_value: float = -100.0
    dropout_p: float = 0.0
    types: int = 0  # of partitioned windows with a bias

    def launches(self, direction: str, arch: str) -> list[Launch]:
        """What it launches, on tensors without memory."""
        if self.partitioned:
            return self._partitioned_launches(direction, arch)
        return plan_window3d(
            self.case,
            direction,
            getattr(torch, self.dtype),
            arch,
            has_bias=self.has_bias,
            has_pad=self.has_pad,
            mask_value=self.mask_value,
            dropout_p=self.dropout_p,
        )

    def _partitioned_launches(self, direction: str, arch: str) -> list[Launch]:
        from vidattn.kernels import window3d

        windows, tokens = self.case.geometry.num_windows, self.case.geometry.num_tokens
        groups, heads = self.case.batch * windows, self.case.heads
        with torch.device("meta"):
            qkv = torch.empty(groups, 1, 1, tokens, 3, heads, self.case.head_dim, dtype=getattr(torch, self.dtype))
            planes = (self.types, heads) if self.types else (heads,)
            bias = torch.empty(*planes, tokens, tokens) if self.has_bias else None
            types = torch.empty(windows, dtype=torch.int32) if self.types else None
            mask = torch.empty(windows, tokens, tokens) if self.has_mask else None
        call = WindowCall(
            *qkv.unbind(-3),
            bias=bias,
            bias_window=[],
            mask=mask,
            pad_qkv=None,
            seed=draw_seed(qkv, self.dropout_p),
            window=(1, 1, tokens),
            shift=(0, 0, 0),
            wrap=(False, False, False),
            scale=self.case.head_dim**-0.5,
            mask_value=0.0,
            dropout_p=self.dropout_p,
            window_types=types,
        )
        out, lse = tensors.new_outputs(call)
        if direction == "forward":
            return window3d.plan_forward(call, out, lse, arch=arch)
        dq, dk, dv = torch.empty_like(qkv).unbind(-3)
        dbias = tensors.new_sum(bias, call, self.has_bias)
        return window3d.plan_backward(call, torch.empty_like(out), out, lse, dq, dk, dv, dbias, None, arch=arch)

    def __str__(self) -> str:
        grid, window = ("x".join(map(str, part)) for part in (self.case.grid, self.case.window))
        words = [f"{grid}-w{window}-d{self.case.head_dim}-{self.dtype}"]
        words += ["shifted"] * any(self.case.geometry.shift) + ["partitioned"] * self.partitioned
        words += (
            ["types"] * (self.types > 0)
            + ["no_bias"] * (not self.has_bias)
            + ["mask"] * self.has_mask
            + ["no_pad"] * (not self.has_pad)
        )
        words += ["infinite"] * math.isinf(self.mask_value) + ["dropout"] * (self.dropout_p > 0)
        return "-".join(words)


@dataclass(frozen=True)
class DividedCall:
    """A call of one of the functions of divided attention."""

    case: DividedCase
    dtype: str = "bfloat16"
    dropout_p: float = 0.0

    def launches(self, direction: str, arch: str) -> list[Launch]:
        """What it launches, on tensors without memory."""
        return plan_divided(self.case, direction, getattr(torch, self.dtype), arch, dropout_p=self.dropout_p)

    def __str__(self) -> str:
        of = self.case
        words = [f"{of.kind}-T{of.num_frames}N{of.num_sites}b{of.batch}-{of.token_order}-d{of.head_dim}-{self.dtype}"]
        return "-".join(words + ["cls"] * of.has_cls + ["dropout"] * (self.dropout_p > 0))


@dataclass(frozen=True)
class MixingCall:
    """A call of ``space_time_mixing_attention``."""

    case: MixingCase
    dtype: str = "bfloat16"
    dropout_p: float = 0.0

    def launches(self, direction: str, arch: str) -> list[Launch]:
        """What it launches, on tensors without memory."""
        return plan_mixing(self.case, direction, getattr(torch, self.dtype), arch, dropout_p=self.dropout_p)

    def __str__(self) -> str:
        of = self.case
        words = [f"T{of.num_frames}N{of.num_tokens}b{of.clips}-div{of.shift_div}-d{of.head_dim}-{self.dtype}"]
        return "-".join(words + ["dropout"] * (self.dropout_p > 0))


@dataclass(frozen=True)
class Compiled:
    """What a test looks at of a compiled kernel."""

    name: str
    attends: bool
    spills: int  # accesses to local memory and its bytes
    matrix: str  # kind of matrix instructions in the main loop
    serialised: int = 0  # reasons why products wait for each other


def compile_launch(call: Call | DividedCall | MixingCall, direction: str, index: int, arch: str) -> Compiled:
    """Work of a child process: kernels do not travel between processes, so the launch is planned anew."""
    launch = call.launches(direction, arch)[index]
    compiled = launch.compile(TARGETS[arch])
    attends = launch.work.scores > 0
    if "amdgcn" in compiled.asm:
        matrix = "mfma" if "v_mfma" in compiled.asm["amdgcn"] else "none"
        return Compiled(launch.name, attends, 0, matrix)
    program, resources = sass.read(compiled.asm["cubin"])
    spills = sass.spills(program.executed()) + resources.local + resources.stack
    matrix = sass.matrix_kind(program.in_loop())
    if matrix == "none":  # a short window has no main loop, only waits perhaps
        matrix = sass.matrix_kind(program.executed())
    serialised = serialised_products(ptxas_log(compiled)) if arch == "sm_90" else 0
    return Compiled(launch.name, attends, spills, matrix, serialised)


@pytest.fixture(scope="module")
def processes(tmp_path_factory) -> Iterator[ProcessPoolExecutor]:
    """Two compilers, which share one cache with all tests of the session."""
    with pytest.MonkeyPatch.context() as patch:
        if "TRITON_CACHE_DIR" not in os.environ:
            patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "triton-cache"))
        # Started afresh: a copy of this process would copy the locks of its threads.
        with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
            yield pool


def compile_all(processes: ProcessPoolExecutor, call: Call | DividedCall | MixingCall, arch: str) -> list[Compiled]:
    """Compile each kernel of both directions once."""
    places = {
        specialisation(launch): (call, direction, index, arch)
        for direction in DIRECTIONS
        for index, launch in enumerate(call.launches(direction, arch))
    }
    return list(processes.map(compile_launch, *zip(*places.values())))


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("arch", TARGETS)
def test_window3d(processes, arch, dtype):
    compiled = compile_all(processes, Call(dtype=dtype), arch)
    attending = [kernel for kernel in compiled if kernel.attends]
    assert {kernel.name for kernel in attending} == {
        "window3d_forward",
        "window3d_backward_queries",
        "window3d_backward_keys",
        "window3d_backward_bias",
    }
    kinds = {"sm_80": "mma.sync", "sm_90": "wgmma", "sm_100": "tcgen05 mma.sync", "gfx942": "mfma"}[arch].split()
    assert [(kernel.name, kernel.matrix) for kernel in attending if kernel.matrix not in kinds] == []
    assert [(kernel.name, kernel.spills) for kernel in compiled if kernel.spills] == []
    assert [(kernel.name, kernel.serialised) for kernel in compiled if kernel.serialised] == []


@triton.jit
def multiply_often(x, y, times, ASSUME: tl.constexpr):
    """Add up products over a number of steps that may be none, unless the compiler may count on one; then a last."""
    rows = tl.arange(0, 64)
    pointers = x + rows[:, None] * 64 + rows[None, :]
    first, total = tl.load(pointers), tl.zeros([64, 64], tl.float32)
    if ASSUME:
        tl.assume(times > 0)
    for step in tl.range(0, times):
        tile = tl.load(pointers + step * 4096)
        total = tl.dot(tl.exp2(tl.dot(first, tile)).to(tile.dtype), tile, total)
    tile = tl.load(pointers + times * 4096)
    tl.store(y + rows[:, None] * 64 + rows[None, :], tl.dot(tl.dot(first, tile).to(tile.dtype), tile, total))


@pytest.mark.parametrize("assume", [False, True])
def test_products_wait_where_the_loop_between_them_may_take_no_step(assume):
    """A kernel that comes from Triton's cache tells too, for ptxas is asked anew."""
    with torch.device("meta"):
        x, y = torch.empty(4, 64, 64, dtype=torch.bfloat16), torch.empty(64, 64)
    options = {"num_warps": 4, "num_stages": 2}
    launch = Launch(multiply_often, 1, {"x": x, "y": y, "times": 4, "ASSUME": assume}, options)
    for _ in range(2):
        log = ptxas_log(launch.compile(TARGETS["sm_90"]))
        assert "Compiling entry function 'multiply_often'" in log
        assert (serialised_products(log) > 0) is not assume


TIME, SPACE = GPU_DIVIDED_CASES["timesformer_b_time"], GPU_DIVIDED_CASES["timesformer_b_space"]


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("arch", TARGETS)
def test_divided(processes, arch, dtype):
    """Sequences that share a tile, and those that are streamed, with a cls token."""
    compiled = [kernel for case in (TIME, SPACE) for kernel in compile_all(processes, DividedCall(case, dtype), arch)]
    attending = [kernel for kernel in compiled if kernel.attends]
    assert {kernel.name for kernel in attending} == {
        "divided_forward_packed",
        "divided_backward_packed",
        "divided_forward_stream",
        "divided_backward_queries",
        "divided_backward_keys",
    }
    assert "none" not in {kernel.matrix for kernel in attending}
    assert [(kernel.name, kernel.spills) for kernel in compiled if kernel.spills] == []
    assert [(kernel.name, kernel.serialised) for kernel in compiled if kernel.serialised] == []


MIXING = GPU_MIXING_CASES["xvit_b_16_frames_div8"]


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("arch", TARGETS)
def test_mixing(processes, arch, dtype):
    """Frames that are streamed, and those that share a tile."""
    calls = [MixingCall(case, dtype) for case in (MIXING, replace(MIXING, num_tokens=50))]
    compiled = [kernel for call in calls for kernel in compile_all(processes, call, arch)]
    assert {kernel.name for kernel in compiled} == {
        "divided_forward_packed",
        "divided_backward_packed",
        "divided_forward_stream",
        "divided_backward_queries",
        "divided_backward_keys",
    }
    assert "none" not in {kernel.matrix for kernel in compiled}
    assert [(kernel.name, kernel.spills) for kernel in compiled if kernel.spills] == []
    assert [(kernel.name, kernel.serialised) for kernel in compiled if kernel.serialised] == []


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("num_tokens", [197, 50])
def test_mixing_is_specialised_by_nothing_that_changes_with_the_clip(num_tokens, dropout_p, direction):
    """Another batch, or segments of another length: the same machine code."""

    def kernels(dropout_p=dropout_p, **changes):
        case = replace(MIXING, num_tokens=num_tokens, **changes)
        return [specialisation(launch) for launch in MixingCall(case, dropout_p=dropout_p).launches(direction, "sm_90")]

    expected = kernels()
    for changes in ({"num_frames": 8, "clips": 3}, {"num_frames": 2}, {"clips": 16}):
        assert kernels(**changes) == expected, changes
    if dropout_p > 0:
        assert kernels(0.5) == expected


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_divided_is_specialised_by_nothing_that_changes_with_the_clip(dropout_p, direction):
    """Another batch or number of heads, other frames or sites of sequences as long: the same machine code."""

    def kernels(case, dropout_p=dropout_p, **changes):
        call = DividedCall(replace(case, **changes), dropout_p=dropout_p)
        return [specialisation(launch) for launch in call.launches(direction, "sm_90")]

    for case, other in ((SPACE, "num_frames"), (replace(SPACE, num_sites=49), "num_frames"), (TIME, "num_sites")):
        expected = kernels(case)
        for changes in ({other: 96, "batch": 2}, {"batch": 3}, {other: 16}, {other: 1}, {"heads": 1}, {"heads": 5}):
            assert kernels(case, **changes) == expected, (case, changes)
        if dropout_p > 0:
            assert kernels(case, 0.5) == expected


CALLS = [
    *[
        Call(WindowCase((16, 14, 14), (8, 7, 7), (4, 3, 3), 2, head_dim=head_dim), dtype)
        for dtype, head_dims in (("bfloat16", (1, 16, 20, 32, 64, 96, 128)), ("float32", (20, 32, 64, 128)))
        for head_dim in head_dims
    ],
    *[Call(case, dtype) for case in (WHOLE, GPU_WINDOW_CASES["swin_t_stage1"]) for dtype in ("bfloat16", "float32")],
    *[
        Call(GPU_WINDOW_CASES[name])
        for name in ("swin_b_ssv2_stage1", "swin_b_ssv2_stage1_shifted", "swin_t_8frames_stage1_shifted")
    ],
    Call(WindowCase((5, 9, 4), (2, 7, 7), (1, 3, 3), 2, head_dim=20)),  # padded, clipped
    Call(WindowCase((5, 9, 4), (2, 7, 7), (1, 3, 3), 2, head_dim=20), "float32", has_pad=False),
    Call(WindowCase((3, 3, 3), (1, 1, 1), (0, 0, 0), 2)),  # windows of one token
    Call(WindowCase((60, 80, 80), (8, 7, 7), (4, 3, 3), 3), has_bias=False),
    Call(WindowCase((60, 80, 80), (8, 7, 7), (4, 3, 3), 3, batch=400)),  # offsets past 2**31
    Call(mask_value=-math.inf),
    *[Call(dropout_p=0.1, dtype=dtype) for dtype in ("bfloat16", "float32")],
    *[
        Call(partitioned=True, has_bias=has_bias, has_mask=has_mask, dropout_p=dropout_p, dtype=dtype)
        for has_bias, has_mask, dropout_p in ((True, True, 0), (False, True, 0), (True, False, 0.1), (False, False, 0))
        for dtype in ("bfloat16", "float32")
    ],
    Call(partitioned=True, types=3, has_mask=True),
]
DIVIDED_CALLS = [
    *[
        DividedCall(replace(case, heads=2, head_dim=head_dim), dtype, dropout_p)
        for case in (replace(TIME, num_frames=7), replace(TIME, num_frames=48), SPACE)
        for dtype, head_dims in (("bfloat16", (1, 20, 32, 64, 128)), ("float32", (20, 64)))
        for head_dim in head_dims
        for dropout_p in (0.0, 0.1)
    ],
    *[DividedCall(case, dropout_p=dropout_p) for case in GPU_DIVIDED_CASES.values() for dropout_p in (0.0, 0.1)],
    *[
        DividedCall(DividedCase(kind, frames, sites, "thw", has_cls=has_cls, heads=2))
        for kind, frames, sites, has_cls in (
            ("temporal", 1, 1, False),
            ("temporal", 3, 5, False),
            ("temporal", 300, 4, False),
            ("spatial", 5, 49, True),  # frames that fit into a tile, with a cls token
            ("spatial", 3, 64, False),  # that fill it
            ("spatial", 2, 192, True),  # a cls token alone in the tail
            ("factorized", 200, 200, False),
        )
    ],
    DividedCall(replace(GPU_DIVIDED_CASES["timesformer_l_space"], batch=64)),  # offsets past 2**31
]


MIXING_CALLS = [
    *[
        MixingCall(case, dtype, dropout_p)
        for case in (*GPU_MIXING_CASES.values(), replace(MIXING, num_tokens=50), replace(MIXING, shift_div=5))
        for dtype, dropout_p in (("bfloat16", 0.0), ("bfloat16", 0.1), ("float32", 0.0))
    ],
    *[MixingCall(MixingCase(3, 4, tokens, heads=5, head_dim=20)) for tokens in (1, 33, 197)],
    MixingCall(MixingCase(4, 16, 2, heads=2, head_dim=128)),
    MixingCall(replace(MIXING, clips=64)),  # offsets past 2**31
]


@pytest.mark.slow
@pytest.mark.parametrize("call", CALLS, ids=str)
@pytest.mark.parametrize("arch", TARGETS)
def test_all_configurations(processes, arch, call):
    compiled = compile_all(processes, call, arch)
    attending = [kernel for kernel in compiled if kernel.attends]
    assert len(attending) == (4 if call.has_bias else 3)
    if call.dtype != "float32":  # whose products are exact by default, which no matrix unit is
        assert "none" not in {kernel.matrix for kernel in attending}


@pytest.mark.slow
@pytest.mark.parametrize("call", DIVIDED_CALLS, ids=str)
@pytest.mark.parametrize("arch", TARGETS)
def test_all_divided_configurations(processes, arch, call):
    compiled = compile_all(processes, call, arch)
    attending = [kernel for kernel in compiled if kernel.attends]
    assert attending
    if call.dtype != "float32":
        assert "none" not in {kernel.matrix for kernel in attending}


@pytest.mark.slow
@pytest.mark.parametrize("call", MIXING_CALLS, ids=str)
@pytest.mark.parametrize("arch", TARGETS)
def test_all_mixing_configurations(processes, arch, call):
    compiled = compile_all(processes, call, arch)
    assert compiled and all(kernel.attends for kernel in compiled)
    if call.dtype != "float32":
        assert "none" not in {kernel.matrix for kernel in compiled}

"""What surrounds the Triton kernels of mixing: plans, and what is around the buffers.

Their numbers are tested with those of all backends; test_triton_interpreter.py runs those tests, and the ones here that
need to run a kernel, where there is no GPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is not installed")

import torch
from attention_cases import device_of, evaluate, to
from mixing_cases import Case, check
from torch import Tensor

import vidattn
from benchmarks.gpu_plans import plan_mixing
from benchmarks.shapes import GPU_MIXING_CASES, MixingCase
from vidattn import reference
from vidattn.calls import MixingCall
from vidattn.kernels import divided, mixing
from vidattn.ops import _tensors as tensors

needs_triton = pytest.mark.needs_triton
XVIT = GPU_MIXING_CASES["xvit_b_16_frames_div8"]


def plan(case: MixingCase, direction: str = "forward") -> list[tuple[str, int, int, Any]]:
    """Kernels with the heads and ranges of each."""
    launches = plan_mixing(case, direction, torch.bfloat16, "sm_90")
    return [
        (launch.name, launch.arguments["first_head"], launch.arguments["heads"], launch.arguments["SHAPE"].shifts)
        for launch in launches
    ]


# ---- Plans ----


@pytest.mark.parametrize(("shift_div", "fold"), [(8, 96), (4, 192)])
def test_published_models_take_one_launch_of_each_kernel(shift_div: int, fold: int) -> None:
    """Whatever frames their heads read: one more offset a column costs too little for launches of their own."""
    shifts = (0, fold, 1, fold, 2 * fold, -1)
    case = replace(XVIT, shift_div=shift_div)
    assert plan(case) == [("divided_forward_stream", 0, 12, shifts)]
    names = ("divided_backward_queries", "divided_backward_keys")
    assert plan(case, "backward") == [(name, 0, 12, shifts) for name in names]


def test_short_frames_take_one_launch_and_nothing_of_the_forward_pass() -> None:
    assert [name for name, *_ in plan(replace(XVIT, num_tokens=50))] == ["divided_forward_packed"]
    (launch,) = plan_mixing(replace(XVIT, num_tokens=50), "backward", torch.bfloat16, "sm_90")
    assert launch.name == "divided_backward_packed" and {"lse", "out"}.isdisjoint(launch.arguments)


def test_heads_cut_off_16_bytes_are_apart_from_the_others() -> None:
    """768 // 5 = 153 channels: the third and the fifth head; all others are loaded 16 bytes at a time."""
    first, second = (0, 153, 1), (153, 306, -1)
    wanted = [(0, 2, first), (2, 1, first + second), (3, 1, second), (4, 1, second), (5, 7, None)]
    assert [found[1:] for found in plan(replace(XVIT, shift_div=5))] == wanted


def test_without_shifts_the_kernels_are_those_of_attention_over_space() -> None:
    assert [found[1:] for found in plan(replace(XVIT, shift_div=1000))] == [(0, 12, None)]


@pytest.mark.parametrize("num_frames", [1, 2, 5, 16])
@pytest.mark.parametrize("offset", [-(2**40), -17, -16, -5, -1, 1, 4, 5, 33, 2**40])
def test_far_offsets_come_near_and_stay_out_of_range(num_frames: int, offset: int) -> None:
    ((first, last, near),) = mixing._near([2, 7, offset], num_frames)
    assert (first, last) == (2, 7) and -num_frames < near < 2 * num_frames
    for frame in range(num_frames):
        assert (frame + near) % num_frames == (frame + offset) % num_frames
        assert (0 <= frame + near < num_frames) == (0 <= frame + offset < num_frames)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("name", GPU_MIXING_CASES)
def test_predictions_count_every_score_and_byte(name: str, direction: str) -> None:
    case = GPU_MIXING_CASES[name]
    launches = plan_mixing(case, direction, torch.bfloat16, "sm_90")
    needed = case.flops("forward") // (4 * case.head_dim)
    moved = case.bytes_moved("forward", torch.bfloat16)
    if direction == "backward":
        moved = case.bytes_moved("forward_backward", torch.bfloat16) - moved
    scores = sum(launch.work.scores for launch in launches if not launch.name.endswith("keys"))
    assert needed <= scores <= 1.4 * needed
    assert sum(launch.work.bytes for launch in launches) >= moved


@pytest.mark.parametrize(
    ("shape", "dtype", "shifts", "group", "shifts_of_groups", "together"),
    [
        ((8, 197, 768, 1), torch.bfloat16, [0, 96, 1, 96, 192, -1], 24, (0, 1, 1, 1, 2, -1), 2),
        ((8, 1, 64, 49), torch.float32, [0, 8, -1, 8, 16, 1], 196, (0, 1, -1, 1, 2, 1), 2),
        ((8, 1, 256, 49), torch.float32, [0, 32, -1, 32, 64, 1], 784, (0, 1, -1, 1, 2, 1), 2),  # the same kernel
        ((8, 5, 12, 1), torch.float32, [0, 2, 1], 1, (0, 1, 1), 1),
        ((8, 5, 12, 7), torch.uint8, [0, 3, 1], 21, (0, 1, 1), 1),
        ((8, 5, 12, 3), torch.complex128, [1, 3, 1], 6, (1, 3, 1), 2),
    ],
)
def test_shifts_are_those_of_groups_of_channels(
    shape: tuple[int, ...], dtype: torch.dtype, shifts: list[int], group: int, shifts_of_groups: Any, together: int
) -> None:
    """In words of at most eight bytes, two at a time where groups allow."""
    x = torch.empty(shape, dtype=dtype, device="meta")
    (launch,) = mixing.plan_shift(x, 4, shifts, torch.empty_like(x))
    word = launch.arguments["WORD"].primitive_bitwidth // 8
    assert (launch.arguments["group"], launch.arguments["SHIFTS"]) == (group, shifts_of_groups)
    assert (
        launch.arguments["TOGETHER"] == together
        and launch.arguments["line"] * word == math.prod(shape[2:]) * x.itemsize
    )
    assert launch.grid == 8 * -(-x[0].numel() * x.itemsize // (word * 1024))
    assert launch.work.bytes == 2 * x.numel() * x.itemsize


@needs_triton
@pytest.mark.parametrize(
    ("first", "offset", "width"), [(0, 0, 16), (0, 1, 4), (1, 0, 4), (2, 0, 8), (1, 1, 8), (1, 3, 16), (3, 2, 4)]
)
def test_words_are_those_that_the_address_allows(first: int, offset: int, width: int) -> None:
    """Memory of others may begin anywhere, so the offset in a storage says nothing about the address."""
    base = torch.randn(4 * 5 * 8 + 8, device=device_of("triton"))
    x = torch.from_dlpack(base[first:])[offset : offset + 160].view(4, 5, 8, 1)
    out = torch.empty_like(x)
    assert base.data_ptr() % 16 == out.data_ptr() % 16 == 0 and x.storage_offset() == offset
    (launch,) = mixing.plan_shift(x, 2, [0, 4, 1], out)
    assert launch.arguments["TOGETHER"] * launch.arguments["WORD"].primitive_bitwidth == 8 * width
    mixing.temporal_shift(x, 2, [0, 4, 1], 2, out)
    expected = reference.temporal_shift(x[..., 0].cpu(), 2, [(0, 4, 1)], dim=2)
    assert torch.equal(out[..., 0].cpu(), expected)


# ---- Memory: nothing beside the buffers is read or written, and everything in them is ----


def _guarded(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> tuple[Tensor, Callable[[], None]]:
    """A contiguous tensor of NaN between two stretches of NaN, and a check that these still are."""
    guard = 4096
    storage = torch.full((math.prod(shape) + 2 * guard,), math.nan, dtype=dtype, device=device)

    def check_guards() -> None:
        assert storage[:guard].isnan().all() and storage[-guard:].isnan().all()

    return storage[guard:-guard].view(shape), check_guards


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "case",
    [
        Case(3, 7, channel_shifts=((0, 7, 1), (7, 12, -2)), heads=3, head_dim=5),
        Case(2, 20, channel_shifts=((4, 24, -1), (24, 40, 3)), heads=2, head_dim=20, dropout_p=0.3),
        Case(2, 140, 3, clips=1, heads=3, head_dim=12),
        Case(3, 140, channel_shifts=((0, 33, 2),), clips=1, heads=2, head_dim=20, dropout_p=0.3),
    ],
    ids=str,
)
def test_guards_around_every_buffer(case: Case, dtype: torch.dtype) -> None:
    device, seed = device_of("triton"), torch.tensor([11], device=device_of("triton"))
    inputs = to(case.inputs(dtype), device)
    checks: list[Callable[[], None]] = []

    def guarded(shape: Any, kind: torch.dtype, value: Tensor | None = None) -> Tensor:
        buffer, check_guards = _guarded(tuple(shape), kind, device)
        checks.append(check_guards)
        return buffer if value is None else buffer.copy_(value)

    q, k, v = (guarded(x.shape, dtype, x) for x in inputs["qkv"].unbind(-3))
    frames, tokens, heads, head_dim = q.shape
    out = guarded((frames, tokens, heads * head_dim), dtype)
    dout = guarded(out.shape, dtype, inputs["grad_out"])
    lse = guarded((frames, tokens, heads), torch.float32) if tokens > tensors.WHOLE_ROW_KEYS else None
    shifts = case.channel_shifts or reference.mixing.xvit_channel_shifts(heads * head_dim, case.shift_div)
    flat = [value for shift in shifts for value in shift]
    call = MixingCall(q, k, v, seed if case.dropout_p else None, case.num_frames, flat, head_dim**-0.5, case.dropout_p)
    mixing.forward(call, out, lse)
    grads = [guarded(q.shape, dtype) for _ in range(3)]
    mixing.backward(call, dout, None if lse is None else out, lse, *grads)
    for check_guards in checks:
        check_guards()
    wanted = evaluate(case.function(reference), to(inputs, torch.float64), dict(case.options(), seed=seed))
    tolerance = {torch.float32: 1e-5, torch.float16: 4e-3}[dtype]
    for name, value in {"out": out, "qkv": torch.stack(grads, -3)}.items():
        expected = wanted[name]
        assert expected is not None
        torch.testing.assert_close(value.double(), expected, rtol=tolerance, atol=tolerance)


@needs_triton
@pytest.mark.parametrize("start", [0, 1, 2, 4, 8])
@pytest.mark.parametrize("shape", [(6, 5, 24, 1), (6, 1, 24, 7), (6, 3, 700, 2)], ids=str)
def test_guards_around_a_shift(shape: tuple[int, ...], start: int) -> None:
    """Bytes from any alignment on; a line longer than a program's block."""
    shifts = [(0, 8, 1), (8, 12, -2), (20, 24, 1)]
    x = torch.randint(1, 255, shape, dtype=torch.uint8)
    source, storage = (torch.full((64 + x.numel(),), 255, dtype=torch.uint8, device=device_of("triton")) for _ in "io")
    inner = slice(start, start + x.numel())
    source[inner] = x.flatten()
    flat = [value for shift in shifts for value in shift]
    mixing.temporal_shift(source[inner].view(shape), 3, flat, 2, storage[inner].view(shape))
    assert torch.equal(storage[inner].view(shape).cpu(), reference.temporal_shift(x, 3, shifts, dim=2))
    storage[inner] = 255
    assert (storage == 255).all()


@needs_triton
def test_lines_that_32_bits_do_not_count_are_shifted_alike() -> None:
    x = torch.randn(4, 3, 24, 5, device=device_of("triton"))
    expected, out = torch.empty_like(x), torch.empty_like(x)
    mixing.temporal_shift(x, 2, [0, 8, 1, 8, 16, -1], 2, expected)
    (launch,) = mixing.plan_shift(x, 2, [0, 8, 1, 8, 16, -1], out)
    assert not launch.arguments["LONG"]
    replace(launch, arguments={**launch.arguments, "LONG": True}).run()
    assert torch.equal(out, expected)
    long = torch.empty(2, 1, 2, 2**31 - 1, dtype=torch.uint8, device="meta")
    (launch,) = mixing.plan_shift(long, 2, [0, 1, 1], long)
    assert launch.arguments["LONG"]


# ---- Frames that share a tile ----


@needs_triton
@pytest.mark.usefixtures("fresh_plans")
def test_streamed_like_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short frames can be streamed too; without a log-sum-exp, the backward pass attends again."""
    monkeypatch.setattr(divided, "packed_config", lambda kernel, shape: None)
    for dropout_p in (0.0, 0.3):
        check(Case(3, 18, 3, dropout_p=dropout_p), torch.float32, "triton")


@needs_triton
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", range(3))
def test_only_frames_that_read_it_see_what_is_not_finite(value: float, which: int) -> None:
    """Of q, k or v of one head and frame: the first head is read from the frame before, the second in its own."""
    inputs = to(Case(4, 9, clips=1, heads=2).inputs(torch.float32), device_of("triton"))

    def attend(qkv: Tensor, **options: Any) -> Tensor:
        return vidattn.space_time_mixing_attention(qkv, 4, channel_shifts=[(0, 8, 1)], **options)

    clean = evaluate(attend, inputs, {"backend": "triton"})
    for head, frame in ((0, 2 if which == 0 else 1), (1, 2)):
        spoilt = {name: x.clone() for name, x in inputs.items()}
        spoilt["qkv"][2, 3, which, head, 5] = value
        found = evaluate(attend, spoilt, {"backend": "triton"})
        assert found["out"] is not None and clean["out"] is not None
        assert found["qkv"] is not None and clean["qkv"] is not None
        same = (found["out"] == clean["out"]).unflatten(-1, (2, 8))
        same_grad = found["qkv"] == clean["qkv"]
        assert not same[frame, :, head].all()
        same[frame, :, head] = True
        same_grad[frame, :, 0, head] = True
        same_grad[frame + (head == 0), :, 1:, head] = True
        assert same.all() and same_grad.all()

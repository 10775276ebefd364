"""The CUDA kernel of temporal shift on an emulated GPU: the reference's bits, in any dtype and layout."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cuda_mistakes import spoil
from torch import Tensor

import tests.cuda_emulator as emulated
import vidattn

DTYPES = (
    torch.uint8,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.int64,
    torch.float64,
    torch.complex64,
    torch.complex128,
)
SHIFTS = [(0, 2, 1), (2, 4, -1)]


@pytest.fixture(autouse=True, scope="module")
def emulated_gpu() -> Iterator[None]:
    emulated.install()
    yield
    emulated.uninstall()


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random bits, NaN among them, but for the sign bits of the zeros that no frame gives."""
    generator = torch.Generator().manual_seed(0)
    size = torch.empty((), dtype=dtype).element_size()
    return torch.randint(256, (*shape, size), dtype=torch.uint8, generator=generator).view(dtype)[..., 0]


def check(x: Tensor, num_frames: int, shifts: Any, *, dim: int = -1) -> None:
    blocks = emulated.blocks_run()
    actual = vidattn.temporal_shift(x, num_frames, shifts, dim=dim, backend="cuda")
    assert emulated.blocks_run() > blocks or x.numel() == 0
    expected = vidattn.temporal_shift(x, num_frames, shifts, dim=dim, backend="reference")
    assert actual.stride() == expected.stride() and actual.dtype == x.dtype
    assert torch.equal(actual.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [4, 7, 16, 24])
def test_dtypes(dtype: torch.dtype, channels: int) -> None:
    check(draw(6, 9, channels, dtype=dtype), 3, SHIFTS)
    check(draw(6, channels, 3, 3, dtype=dtype), 3, SHIFTS, dim=1)
    check(draw(6, channels, 4, 4, dtype=dtype).to(memory_format=torch.channels_last), 3, SHIFTS, dim=1)


RANGES = {
    "none": [],
    "all": [(0, 24, 1)],
    "none of the frames": [(3, 9, 3), (9, 11, -3), (11, 13, 2**62), (13, 24, -(2**62))],
    "as far as there are frames": [(3, 9, 2), (9, 24, -2)],
    "single channels": [(i, i + 1, i % 5 - 2) for i in range(24)],
    "with channels between them": [(1, 2, 1), (5, 9, -1), (23, 24, 2)],
    "in any order": [(8, 16, -1), (0, 8, 1)],
}


@pytest.mark.parametrize("name", RANGES)
def test_ranges(name: str) -> None:
    check(draw(6, 5, 24), 3, RANGES[name])
    check(draw(6, 24, 5, dtype=torch.uint8), 3, RANGES[name], dim=1)


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (4, 4), (4, 1, 4), (1, 5, 4)], ids=str)
def test_sizes(shape: tuple[int, ...]) -> None:
    for num_frames in {1, max(1, shape[0])}:
        check(draw(*shape), num_frames, SHIFTS)


def test_more_ranges_than_a_launch_takes() -> None:
    ranges = [(2 * i, 2 * i + 1, i % 3 - 1) for i in range(300)]
    check(draw(4, 3, 601, dtype=torch.float16), 2, ranges)
    check(draw(4, 601, 3, dtype=torch.float16), 4, ranges, dim=1)


def test_more_rows_and_blocks_than_65535() -> None:
    with emulated.controls(checked=False):
        check(draw(2, 35_000, 4, dtype=torch.float16), 2, SHIFTS)
        check(draw(70_000, 2, 4, dtype=torch.float16), 7, SHIFTS)


def test_tensors_that_start_anywhere() -> None:
    memory = draw(4 * 3 * 32 + 16, dtype=torch.uint8)
    for start in (1, 2, 4, 8, 16):
        check(memory[start : start + 4 * 3 * 32].view(4, 3, 32), 2, [(0, 16, 1)])


def test_strided_tensors() -> None:
    check(draw(4, 5, 32)[:, ::2, 4:20], 2, SHIFTS)
    check(draw(4, 1, 16).expand(4, 5, 16), 2, SHIFTS)
    check(draw(5, 4, 16).transpose(0, 1), 2, SHIFTS)


def test_the_gradient() -> None:
    x = torch.randn(6, 5, 8, dtype=torch.float16, requires_grad=True)
    dout = torch.randn(6, 5, 8, dtype=torch.float16)
    for dim in (1, 2):
        found = [
            torch.autograd.grad(vidattn.temporal_shift(x, 3, SHIFTS, dim=dim, backend=backend), x, dout)[0]
            for backend in ("cuda", "reference")
        ]
        assert torch.equal(*found)


def test_orders_of_lanes_and_blocks() -> None:
    for seed in (3, 6):
        with emulated.controls(seed=seed):
            check(draw(6, 197, 24), 3, SHIFTS)


def test_frames_of_more_words_than_32_bits_count() -> None:
    with emulated.edited({"mixing_shift.cu": lambda text: text.replace("> INT32_MAX;", "> 0;")}):
        check(draw(6, 197, 24), 3, SHIFTS)
        check(draw(6, 7, 5, dtype=torch.uint8), 3, SHIFTS, dim=1)


# What is spoiled, and what stands in its place.
MISTAKES = {
    "frames of another segment": (r"a\.segment\.remainder\(frame\)", "frame"),
    "no frame beyond the last": (r"t \+ uint32_t\(offset\[i\]\) < a\.frames", "true"),
    "one channel too many": (
        r"place\[i\] < Index\(a\.ranges\[range\]\.last\)",
        "place[i] <= Index(a.ranges[range].last)",
    ),
    "words behind the frame": (r"at < Index\(a\.frame_words\)", "true"),
    "one block too few": (r"ceil_div\(a\.frame_words, kBlockWords\)", "a.frame_words / kBlockWords + 0"),
    "a launch for each range": (r"a\.begin = a\.end, ", "a.begin = 0, "),
    "words that are too wide": (r"int64_t\(bits & -bits\)", "16"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_shows(mistake: str) -> None:
    edit = spoil(mistake, "mixing_shift.cu", *MISTAKES[mistake])
    with emulated.edited({"mixing_shift.cu": edit}), pytest.raises((AssertionError, RuntimeError)):
        check(draw(6, 197, 24), 3, SHIFTS)
        check(draw(4, 197, 601, dtype=torch.float16), 2, [(2 * i, 2 * i + 1, i % 2) for i in range(300)])
